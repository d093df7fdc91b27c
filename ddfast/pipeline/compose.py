"""Stage compose: decode the selected sources again, cut, tile and write the images."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddfast.data.samples import Sample
from ddfast.errors import BadImage, UsageError
from ddfast.ops import crop_resize
from ddfast.output.distilled import Tile, image_path, metadata_row, write_image, write_metadata
from ddfast.pipeline.relabel import count
from ddfast.pipeline.run import Run, clock
from ddfast.pipeline.select import iter_selection
from ddfast.progress import Progress

# Synthesize
# -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """One image of the selection: its label, its number in its class, and its tiles in row-major order."""

    label: int
    index: int
    path: str
    ids: list[int]
    keys: list[str]
    boxes: np.ndarray
    scores: list[float]


def _chosen_images(run: Run) -> Iterator[_Chosen]:
    """The images of the selection in their order."""
    tiles, names = run.plan["tiles"], run.source.class_names
    for block in iter_selection(run.out):
        for first in range(0, len(block["label"]), tiles):
            rows = slice(first, first + tiles)
            label, index = int(block["label"][first]), int(block["image"][first])
            yield _Chosen(
                label=label,
                index=index,
                path=image_path(label, names[label], index, run.plan["format"]),
                ids=block["sample_id"][rows].tolist(),
                keys=[str(key) for key in block["key"][rows]],
                boxes=block["box"][rows],
                scores=[float(score) for score in block["score"][rows]],
            )


def compose(run: Run) -> None:
    """Synthesis pass: decode only the selected sources, cut and tile their crops, write the images."""
    started = time.monotonic()
    run.set_arithmetic()
    tiles, factor = run.plan["tiles"], run.plan["factor"]
    mine = run.ranks.share(len(run.source.class_names) * run.plan["ipc"])
    missing = _missing_images(run)
    samples = (run.source.by_id(i) for image in _picked(run, missing) for i in image.ids)
    loaded = run.load(samples)
    side = run.plan["image_size"] // factor
    done = len(mine) - int(missing.sum())
    with Progress(
        "compose", len(mine), "images", done=done, quiet=run.quiet, outlook=run.outlook()
    ) as progress:
        for image in _picked(run, missing):
            sources = torch.stack([_decoded(*next(loaded)) for _ in range(tiles)])
            boxes = torch.from_numpy(image.boxes.copy())
            mosaic = crop_resize(sources, boxes, side, source=torch.arange(tiles), factor=factor)
            write_image(run.out / image.path, mosaic[0])
            progress.advance()
    loaded.close()
    run.ranks.meet("compose")
    run.ranks.on_main("metadata", lambda: write_metadata(run.out, _metadata_rows(run)))
    if "relabel" not in run.method.stages:
        run.ranks.on_main("counts", lambda: count(run))
    clock(run, "compose", started)


def _missing_images(run: Run) -> np.ndarray:
    """Which images are this rank's and not yet written whole, bool [images]."""
    missing = np.zeros(len(run.source.class_names) * run.plan["ipc"], dtype=bool)
    for number, image in enumerate(_chosen_images(run)):
        if number % run.ranks.size == run.ranks.rank:
            missing[number] = not _is_whole_image(run.out / image.path)
    return missing


def _picked(run: Run, wanted: np.ndarray) -> Iterator[_Chosen]:
    return (image for image, picked in zip(_chosen_images(run), wanted, strict=True) if picked)


def _is_whole_image(path: Path) -> bool:
    """Whether an image that an earlier run wrote has kept its end (and, as a PNG, its checksums)."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.verify()
        with open(path, "rb") as file:
            file.seek(-2, os.SEEK_END)
            return path.suffix != ".jpg" or file.read() == b"\xff\xd9"
    except (OSError, SyntaxError, ValueError):
        return False


def _metadata_rows(run: Run) -> Iterator[dict[str, Any]]:
    for image in _chosen_images(run):
        cut = [
            Tile(key, box.tolist(), score)
            for key, box, score in zip(image.keys, image.boxes, image.scores, strict=True)
        ]
        name = run.source.class_names[image.label]
        yield metadata_row(image.label, name, image.index, cut, run.plan["format"])


def _decoded(sample: Sample, image: Tensor | BadImage) -> Tensor:
    if isinstance(image, BadImage):
        raise UsageError(f"{sample.key} could be read when it was scored and cannot now ({image})")
    return image
