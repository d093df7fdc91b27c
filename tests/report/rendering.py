"""A tiny finished run folder in the format of `ddfast distill`, and the source it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddfast.data.opening import open_source
from ddfast.data.sources import Source
from ddfast.output.distilled import (
    Tile,
    image_path,
    metadata_row,
    write_image,
    write_metadata,
    write_soft_labels,
)
from ddfast.output.table import SELECTION_SCHEMA, make_table, part_path, write_table

SIZE = 32
CROPS = 3


def write_source(root: Path, class_names: list[str], each: int = 3) -> Source:
    """An ImageFolder of `each` random images a class, opened."""
    generator = torch.Generator().manual_seed(0)
    for name in class_names:
        for index in range(each):
            image = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
            write_image(root / "train" / name / f"{index}<b>.png", image)
    return open_source(root, "train")


def write_run(
    root: Path,
    source: Source,
    *,
    method: str = "infoutil",
    phi: bool = True,
    factor: int = 1,
    quarantined: tuple[dict[str, str], ...] = (),
    complete: bool = True,
) -> Tensor:
    """Write a run that keeps `factor`^2 sources of each class; returns the distilled images uint8 [N, 3, S, S]."""
    generator = torch.Generator().manual_seed(1)
    tiles, classes = factor**2, len(source.class_names)
    kept = [[s for s in source.samples if s.label == label][:tiles] for label in range(classes)]
    samples = source.samples
    boxes = np.tile(
        np.array([[0, 0, 16, 16], [8, 8, 24, 24], [16, 16, 32, 32]], np.float32), (len(samples), 1)
    )
    losses = torch.rand(len(samples) * CROPS, generator=generator).numpy()
    heat = torch.randn(len(samples), 16, generator=generator).numpy()
    columns = {
        "sample_id": np.repeat(np.array([s.id for s in samples]), CROPS),
        "key": np.repeat(np.array([s.key for s in samples], dtype=object), CROPS),
        "label": np.repeat(np.array([s.label for s in samples]), CROPS),
        "crop": np.tile(np.arange(CROPS), len(samples)),
        "box": boxes,
        "loss": losses,
        "grad_norm": 10 * losses,
        "correct": losses < 0.5,
        "phi": np.repeat(heat, CROPS, axis=0) if phi else None,
    }
    (root / "scores").mkdir(parents=True)
    write_table(part_path(root / "scores", 0), make_table(columns))
    place = {sample.id: index for index, sample in enumerate(samples)}
    chosen = [(s, t) for row in kept for t, s in enumerate(row)]
    score = [float(losses[CROPS * place[s.id] + CROPS - 1]) for s, _ in chosen]
    selection = {
        "label": np.array([s.label for s, _ in chosen]),
        "image": np.zeros(len(chosen)),
        "tile": np.array([t for _, t in chosen]),
        "sample_id": np.array([s.id for s, _ in chosen]),
        "key": np.array([s.key for s, _ in chosen], dtype=object),
        "box": np.tile(np.array([[16, 16, 32, 32]], np.float32), (len(chosen), 1)),
        "score": np.array(score, np.float32),
    }
    write_table(root / "selection.parquet", make_table(selection, SELECTION_SCHEMA))
    images = torch.randint(0, 256, (classes, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    rows = []
    for label, name in enumerate(source.class_names):
        write_image(root / image_path(label, name, 0), images[label])
        cut = [Tile(s.key, [16, 16, 32, 32], 0.5) for s in kept[label]]
        rows.append(metadata_row(label, name, 0, cut))
    write_metadata(root, rows)
    logits = torch.randn(classes, tiles, classes, generator=generator)
    write_soft_labels(root, torch.softmax(logits, dim=2), 20.0)
    teacher = {"arch": "convnet3", "sha256": "0" * 64, "top1": 83.78, "epoch": 24}
    manifest = {
        "format_version": 1,
        "complete": complete,
        "method": method,
        "preset": None,
        "options": {"score": {"estimator": "permutation"}, "select": {"rank_by": "loss", "order": "low"}},
        "seed": 0,
        "ipc": 1,
        "factor": factor,
        "tiles": tiles,
        "image_size": SIZE,
        "class_names": source.class_names,
        "teacher": teacher,
        "label_teacher": teacher,
        "data": {"fingerprint": "0" * 32, "images": len(samples)},
        "counts": {"images": classes, "sources": len(samples), "quarantined": len(quarantined)},
        "quarantined": {"count": len(quarantined), "files": list(quarantined)},
    }
    (root / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return images
