"""Whether every class has images enough for a run, which is looked at before anything is written."""

from __future__ import annotations

import numpy as np
import torch

from ddfast.data.sources import reasons_in_words
from ddfast.errors import BadImage, UsageError
from ddfast.methods.synthesis import Synthesis
from ddfast.pipeline.run import Run
from ddfast.wording import argument, is_argument, plural


def check_counts(run: Run) -> None:
    """Refuse a class that cannot give IPC x tiles crops; where it would be close, decode to be sure."""
    needed, most = run.needed, run.plan["images_per_class"]
    if most != "all" and needed > most:
        raise UsageError(
            f"{_ipc_and_tiles(run)} needs {plural(needed, 'image')} a class, {argument('images_per_class')} is {most}: "
            + ("raise it" if is_argument("images_per_class") else "distil anew into another folder with more")
        )
    for label in np.flatnonzero(_counts(run) < 2 * needed).tolist():
        usable, reasons = _usable(run, label, needed)
        if usable < needed:
            raise UsageError(
                f"class {run.source.class_names[label]!r} has {plural(usable, 'usable image')}, "
                f"{_ipc_and_tiles(run)} needs {needed}{reasons_in_words(reasons)}"
            )


def check_pool(run: Run, method: Synthesis) -> None:
    """Refuse a pool that a method cannot draw from; where it would be close, decode to be sure."""
    counts, needed = _counts(run), method.drawn_at_once(run.plan["ipc"])
    method.check_pool(torch.from_numpy(counts), run.source.class_names, run.plan["ipc"])
    for label in np.flatnonzero(counts < 2 * needed).tolist():
        counts[label] = _usable(run, label, needed)[0]
    method.check_pool(torch.from_numpy(counts), run.source.class_names, run.plan["ipc"])


def _counts(run: Run) -> np.ndarray:
    """Sources of each class in the pool, int64 [classes]."""
    labels = run.source.samples.labels[run.pool()]
    return np.bincount(labels, minlength=len(run.source.class_names))


def _usable(run: Run, label: int, most: int) -> tuple[int, list[str]]:
    """How many sources of a class can be decoded, counted up to `most`, and why others cannot."""
    pool = run.pool()
    usable, reasons = 0, []
    loaded = run.load(run.samples(pool[run.source.samples.labels[pool] == label]))
    for _, image in loaded:
        if isinstance(image, BadImage):
            reasons.append(str(image))
        else:
            usable += 1
        if usable == most:
            break
    loaded.close()
    return usable, reasons


def _ipc_and_tiles(run: Run) -> str:
    return f"IPC {run.plan['ipc']} x {plural(run.plan['tiles'], 'tile')}"
