"""Stage relabel: soft labels of every tile, metadata, and the report."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from torch import Tensor

from ddfast.data.decoding import MAX_PIXELS, decode
from ddfast.data.tiles import tiles_of
from ddfast.errors import BadImage, UsageError
from ddfast.files import make_folder
from ddfast.methods.synthesis import Synthesis
from ddfast.ops import crop_resize
from ddfast.output.distilled import _LABEL_PARTS, SOFT_LABELS, image_path
from ddfast.output.label_parts import is_whole_part, join_label_parts, largest_probabilities, write_label_part
from ddfast.output.pixels import read_pixels
from ddfast.pipeline.plan import LABEL_TEMPERATURE
from ddfast.pipeline.quarantine import note_counts
from ddfast.pipeline.run import Run, _logits, _normalized_logits, clock
from ddfast.pipeline.score import iter_quarantined
from ddfast.progress import Progress

_LABEL_BATCH = 64  # tiles labelled together; fixed, because it decides the last bits
_LABEL_PART = (
    2048  # most images in one part of the soft labels, the unit of resumption and of work for a rank
)
_LABEL_PART_BYTES = 8 << 20  # of logits, which bounds a part where there are many classes


# Relabel
# --------------------------------------------------------------------------------------------------------


def relabel(run: Run) -> None:
    """Label every tile by the label teacher, and count in the manifest what the run holds.

    Of a method that goes without teachers too, labels stay hard where none was given.
    """
    if run.label_teacher is None:
        return
    started = time.monotonic()
    run.set_arithmetic()
    if not (run.out / SOFT_LABELS).exists():
        _write_labels(run)
    if "score" in run.method.stages:
        run.ranks.on_main("counts", lambda: count(run))
    else:
        run.ranks.on_main("counts", lambda: shutil.rmtree(run.out / _LABEL_PARTS, ignore_errors=True))
    clock(run, "relabel", started)


def count(run: Run) -> None:
    """Count images, sources and quarantined files, and list these; of pixels that were made they are counted."""
    shutil.rmtree(run.out / _LABEL_PARTS, ignore_errors=True)
    if isinstance(run.method, Synthesis):
        return
    note_counts(run, lambda: iter_quarantined(run))


def _write_labels(run: Run) -> None:
    """`soft_labels.safetensors`, part by part; finished parts survive a kill.

    The written images are labelled, and where pixels were made, one tile each, these, which students train on.
    """
    classes, tiles, top_k = len(run.source.class_names), run.plan["tiles"], run.plan["label_top_k"]
    images = classes * run.plan["ipc"]
    folder = make_folder(run.out / _LABEL_PARTS)
    size = _part_images(classes, tiles)
    parts = [folder / f"part-{index:06d}" for index in range(-(-images // size))]
    mine = run.ranks.share(len(parts))
    total = sum(min(size, images - index * size) for index in mine)
    # Tiles of pictures are enlarged in one way whatever made them.
    labels_pixels = isinstance(run.method, Synthesis) and run.plan["factor"] == 1
    pixels = _made_pixels(run) if labels_pixels else None
    with Progress("relabel", total, "images", quiet=run.quiet, outlook=run.outlook()) as progress:
        for index in mine:
            names = [
                _image_path(run, number) for number in range(index * size, min((index + 1) * size, images))
            ]
            if is_whole_part(parts[index]):
                progress.advance(len(names))
            else:
                made = None if pixels is None else pixels[index * size : index * size + len(names)]
                _label_part(run, parts[index], names, made, progress)
    run.ranks.meet("relabel")
    shape = (images, tiles, classes if top_k is None else top_k)
    run.ranks.on_main(
        "labels",
        lambda: join_label_parts(run.out, parts, shape, LABEL_TEMPERATURE, indexed=top_k is not None),
    )


def _image_path(run: Run, number: int) -> Path:
    """Path of image `number` of all, classes in label order."""
    label, index = divmod(number, run.plan["ipc"])
    return run.out / image_path(label, run.source.class_names[label], index, run.plan["format"])


def _part_images(classes: int, tiles: int) -> int:
    """Images of one part of the soft labels: whole batches, few where there are many classes."""
    images = _LABEL_BATCH // tiles
    return images * max(1, min(_LABEL_PART // images, _LABEL_PART_BYTES // (4 * classes * _LABEL_BATCH)))


def _made_pixels(run: Run) -> Tensor:
    """The pixels of a run that made them, normalised, one tile each, float32 [N, 3, S, S] class by class."""
    stored = read_pixels(run.out)
    if stored.space == "normalized":
        return stored.images
    mean, std = (torch.tensor(run.plan[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (stored.images - mean) / std


def _label_part(run: Run, path: Path, names: list[Path], pixels: Tensor | None, progress: Progress) -> None:
    """Write softmax(logits / T) of every tile of the named images; a tile is enlarged to the image.

    `pixels`: of the images where they were made, float32 [len(names), 3, S, S], normalised.
    """
    size, factor, teacher = run.plan["image_size"], run.plan["factor"], run.label_teacher
    assert teacher is not None, "a run without a label teacher has no stage relabel"
    per_batch = _LABEL_BATCH // factor**2
    found = []
    for first in range(0, len(names), per_batch):
        named = names[first : first + per_batch]
        if pixels is None:
            tiles = tiles_of(torch.stack([_written_image(name) for name in named]), factor)
            if factor > 1:
                tiles = crop_resize(
                    tiles,
                    torch.tensor([[0, 0, size // factor, size // factor]]).expand(len(tiles), 1, 4),
                    size,
                )[:, 0]
        else:
            tiles = pixels[first : first + per_batch]
        full = torch.zeros(_LABEL_BATCH, 3, size, size, dtype=tiles.dtype)
        full[: len(tiles)] = tiles
        of_batch = (
            _logits(teacher, full, run)
            if pixels is None
            else _normalized_logits(teacher, full.to(run.device), run)
        )
        probabilities = torch.softmax(of_batch[: len(tiles)] / LABEL_TEMPERATURE, dim=1)
        stored = largest_probabilities(probabilities.view(len(named), factor**2, -1), run.plan["label_top_k"])
        found.append(stored)
        progress.advance(len(named))
    values = torch.cat([values for values, _ in found])
    indices = [indices for _, indices in found if indices is not None]
    write_label_part(path, values, torch.cat(indices) if indices else None)


def _written_image(path: Path) -> Tensor:
    if not path.is_file():
        raise UsageError(f"{path} is missing: run the compose stage first")
    try:
        return decode(path.read_bytes(), max_pixels=MAX_PIXELS)
    except (OSError, BadImage) as error:
        raise UsageError(
            f"{path} cannot be read ({error}): delete it and run the compose stage again"
        ) from error
