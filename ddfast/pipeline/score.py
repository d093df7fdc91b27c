"""Stage score: every source of the pool decoded once, rows of candidate crops kept.

Two passes over the data and a table between them. The score pass keeps rows, not pixels; selection sorts the
rows; the synthesis pass decodes only the sources that were selected. Every stage writes whole files by atomic
rename and skips what already stands, so that a run killed at any moment continues to the same bytes.

Several processes share a stage by number: rank r of n scores shards r, r + n, ... and writes images and labels in
the same way. What is one file (selection, metadata, manifest, report) is rank 0's.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddfast.data.samples import Sample
from ddfast.errors import BadImage, UsageError
from ddfast.files import make_folder
from ddfast.methods.selection.base import Batch, Candidates
from ddfast.ops.transfer import Arriving, to_device
from ddfast.output.distilled import SCORES
from ddfast.output.table import (
    SCORE_SCHEMA,
    is_readable,
    make_table,
    part_path,
    read_facts,
    score_schema,
    write_table,
)
from ddfast.pipeline.plan import score_digest
from ddfast.pipeline.prepare import prepare
from ddfast.pipeline.run import Run, _shards, clock
from ddfast.progress import Progress
from ddfast.unchanged import unchanged
from ddfast.wording import argument

# Score
# ----------------------------------------------------------------------------------------------------------


def score(run: Run) -> None:
    """Score pass: decode each source of the pool once, and keep rows of candidate crops in `scores/`.

    Where the method wants one, a preparation on the whole pool comes first.
    """
    started = time.monotonic()
    run.set_arithmetic()
    if run.selection.prepares:
        prepare(run)
        clock(run, "prepare", started)
        started = time.monotonic()
    processor = time.process_time()
    make_folder(run.out / SCORES)
    pool, size = run.pool(), run.plan["arithmetic"]["shard_sources"]
    mine = run.ranks.share(_shards(run))
    digest = score_digest(run.plan)
    missing = [i for i in mine if not _is_committed(part_path(run.out / SCORES, i), i, digest)]
    if missing:
        for teacher, _ in run.teachers:
            teacher.model.to(device=run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        shards = [pool[i * size : (i + 1) * size] for i in missing]
        sources = sum(len(pool[i * size : (i + 1) * size]) for i in mine)
        wanted = sum(len(shard) for shard in shards)
        wished = (sample for shard in shards for sample in run.samples(shard))
        label = "score" if run.ranks.size == 1 else f"score, rank 0 of {run.ranks.size}"
        outlook = run.outlook(f"fewer {argument('images_per_class')}", *_fewer_evaluations(run))
        progress = Progress(label, sources, "images", done=sources - wanted, quiet=run.quiet, outlook=outlook)
        with progress, unchanged(*(teacher.model for teacher, _ in run.teachers)):
            _warm(run, shards[0])
            loaded = _Awaited(run.load(wished, on_device=True))
            _score_shards(
                run,
                [
                    _Shard(run, index, len(shard), digest)
                    for index, shard in zip(missing, shards, strict=True)
                ],
                loaded,
                progress,
            )
        _note_rate(run, wanted, time.monotonic() - started, loaded.seconds, time.process_time() - processor)
    run.ranks.meet("score")
    clock(run, "score", started)


def _fewer_evaluations(run: Run) -> list[str]:
    """A method that evaluates the teacher many times an image is as fast as these are few."""
    return [f"fewer {argument('n_samples')}"] if hasattr(run.method.options, "n_samples") else []


def _is_committed(path: Path, index: int, digest: str) -> bool:
    """Whether a file is shard `index` of this score table, every byte of it as it was written."""
    if not is_readable(path, SCORE_SCHEMA):
        return False
    facts = read_facts(path)
    return facts.get("shard") == index and facts.get("scores") == digest


def score_table(run: Run) -> str:
    """How the score table stands: "whole", "damaged", where a part of it is or is missing, or "gone"."""
    paths = [part_path(run.out / SCORES, index) for index in range(_shards(run))]
    if not any(path.exists() for path in paths):
        return "gone"
    return "whole" if all(is_readable(path, SCORE_SCHEMA) for path in paths) else "damaged"


class _Awaited:
    """An iterator over loaded images that counts the seconds for which its consumer, the model, had to wait."""

    def __init__(self, loaded: Iterator[tuple[Sample, Tensor | BadImage]]) -> None:
        self._loaded = loaded
        self.seconds = 0.0

    def __iter__(self) -> _Awaited:
        return self

    def __next__(self) -> tuple[Sample, Tensor | BadImage]:
        started = time.monotonic()
        try:
            return next(self._loaded)
        finally:
            self.seconds += time.monotonic() - started


def _note_rate(run: Run, sources: int, seconds: float, waited: float, processor: float) -> None:
    """Keep in `run.json` how fast this pass of this rank was, and the share of it in which the model was busy.

    `processor` is the time of all its threads on a core, which neighbours on the machine do not lengthen.
    """
    run.facts["score"] = {
        "sources": sources,
        "seconds": round(seconds, 3),
        "processor_seconds": round(processor, 3),
        "waited_for_images": round(waited, 3),
        "busy": round(1 - waited / seconds, 4) if seconds > 0 else None,
    }


class _Shard:
    """A shard of the score table on its way to the disk, where it goes with its last micro-batch."""

    def __init__(self, run: Run, index: int, sources: int, digest: str) -> None:
        self.sources = sources
        self._path, self._facts = part_path(run.out / SCORES, index), {"shard": index, "scores": digest}
        self._columns: dict[str, list[Any]] = {}
        self._bad: list[dict[str, str]] = []
        self._left = sources

    def add(self, pairs: list[tuple[Sample, Tensor | BadImage]], candidates: Candidates | None) -> None:
        """The rows of its next micro-batch, on the host; files that could not be read stand in the footer."""
        self._bad += [
            {"path": s.key, "reason": str(image)} for s, image in pairs if isinstance(image, BadImage)
        ]
        if candidates is not None:
            if candidates.damaged is not None and int(candidates.damaged):
                raise UsageError(
                    "the teacher returns NaN or infinity for real images: its weights are damaged, train it again"
                )
            good = [i for i, (_, image) in enumerate(pairs) if not isinstance(image, BadImage)]
            _append_rows(self._columns, [pairs[i][0] for i in good], good, candidates)
        self._left -= len(pairs)
        if not self._left:
            self._commit()

    def _commit(self) -> None:
        rows = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        width = rows["features"].shape[1] if "features" in rows else 0
        table = make_table(rows, score_schema(width)) if rows else SCORE_SCHEMA.empty_table()
        write_table(self._path, table, {**self._facts, "quarantined": self._bad})


def _score_shards(
    run: Run,
    shards: Iterable[_Shard],
    loaded: Iterator[tuple[Sample, Tensor | BadImage]],
    progress: Progress,
) -> None:
    """Score loaded images, micro-batch by micro-batch.

    On a GPU the rows of a micro-batch are read when the next one is under way, so that the device never waits for the
    host to ask.
    """
    micro_batch = run.plan["arithmetic"]["micro_batch"]
    late = 0 if run.device.type == "cpu" else 1
    waiting: deque[tuple[_Shard, list[tuple[Sample, Tensor | BadImage]], _Rows | None]] = deque()

    def settle(most: int) -> None:
        while len(waiting) > most:
            shard, pairs, rows = waiting.popleft()
            shard.add(pairs, None if rows is None else rows.wait())
            progress.advance(len(pairs))

    for shard in shards:
        for first in range(0, shard.sources, micro_batch):
            pairs = [next(loaded) for _ in range(min(micro_batch, shard.sources - first))]
            rows = None
            if any(not isinstance(image, BadImage) for _, image in pairs):
                try:
                    rows = _Rows(run.selection.score(_micro_batch(run, pairs, micro_batch), run.context))
                except ValueError as error:
                    raise UsageError(f"cannot score with this teacher: {error}") from error
            waiting.append((shard, pairs, rows))
            settle(late)
    settle(0)


def _warm(run: Run, places: np.ndarray) -> None:
    """Score the first images until a GPU has recorded the passes, before the loader's threads are there."""
    if run.device.type == "cpu":
        return
    micro_batch = run.plan["arithmetic"]["micro_batch"]
    loaded = run.load(run.samples(places[:micro_batch]), on_device=True)
    pairs = list(loaded)
    if any(not isinstance(image, BadImage) for _, image in pairs):
        for _ in range(4):  # the first compiles, the second is watched, the third records
            _Rows(run.selection.score(_micro_batch(run, pairs, micro_batch), run.context)).wait()


class _Rows:
    """Candidates on their way to the host."""

    def __init__(self, candidates: Candidates) -> None:
        held = {field.name: getattr(candidates, field.name) for field in dataclasses.fields(candidates)}
        self._names = [name for name, value in held.items() if value is not None]
        self._arriving = Arriving([held[name] for name in self._names])

    def wait(self) -> Candidates:
        """The candidates, their tensors on the host."""
        return Candidates(**dict(zip(self._names, self._arriving.wait(), strict=True)))


def _micro_batch(run: Run, pairs: list[tuple[Sample, Tensor | BadImage]], size: int) -> Batch:
    """A batch of fixed size: black images stand where a file is bad and behind the last one."""
    side = run.plan["image_size"]
    labels, ids = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    place = next(image.device for _, image in pairs if not isinstance(image, BadImage))
    images = [torch.zeros(3, side, side, dtype=torch.uint8, device=place)] * size
    for i, (sample, image) in enumerate(pairs):
        if not isinstance(image, BadImage):
            images[i], labels[i], ids[i] = image, sample.label, sample.id
    # One copy where the images lie, and none to the device where that is there.
    return Batch(to_device(torch.stack(images), run.device), labels, ids)


def _append_rows(
    columns: dict[str, list[Any]], samples: list[Sample], places: list[int], candidates: Candidates
) -> None:
    boxes = candidates.boxes.numpy()[places]
    crops = boxes.shape[1]
    rows: dict[str, np.ndarray] = {
        "sample_id": np.repeat(np.array([s.id for s in samples], dtype=np.int64), crops),
        "key": np.repeat(np.array([s.key for s in samples], dtype=object), crops),
        "label": np.repeat(np.array([s.label for s in samples], dtype=np.int32), crops),
        "crop": np.tile(np.arange(crops, dtype=np.int16), len(samples)),
        "box": boxes.reshape(-1, 4).astype(np.float32),
    }
    for name in ("score", "grad_norm", "loss", "correct"):
        values = getattr(candidates, name)
        if values is not None:
            rows[name] = values.numpy()[places].reshape(-1)
    if candidates.phi is not None:
        rows["phi"] = np.repeat(candidates.phi.float().numpy()[places], crops, axis=0)
    if candidates.features is not None:
        rows["features"] = np.repeat(candidates.features.numpy()[places], crops, axis=0)
    for name, values in rows.items():
        columns.setdefault(name, []).append(values)


def iter_quarantined(run: Run) -> Iterator[dict[str, str]]:
    """Files of the pool that could not be decoded, as {path, reason}, shard by shard."""
    for index in range(_shards(run)):
        yield from read_facts(part_path(run.out / SCORES, index)).get("quarantined", ())
