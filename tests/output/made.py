"""A small finished folder of optimised images, as the synthesize stage leaves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast.output.distilled import image_path, metadata_row, write_image, write_metadata
from ddfast.output.pixels import to_bytes, write_before, write_curve, write_pixels

MEAN, STD = [0.5, 0.45, 0.4], [0.25, 0.2, 0.3]


def smooth_pixels(labels: Tensor, size: int, seed: int = 0) -> Tensor:
    """Normalised images float32 [N, 3, size, size], none of which is a whole number of grey levels."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(len(labels), 3, size, size, generator=draws) * 0.8


def write_made(
    root: Path,
    class_names: list[str],
    *,
    ipc: int = 2,
    size: int = 16,
    space: str = "normalized",
    factor: int = 1,
    images: Tensor | None = None,
    before: bool = True,
    curve: list[dict[str, float]] | None = None,
    **manifest: Any,
) -> Tensor:
    """Write the folder; returns the stored pixels float32 [N, 3, size, size]."""
    root.mkdir(parents=True, exist_ok=True)
    labels = torch.arange(len(class_names)).repeat_interleave(ipc)
    if images is None:
        images = smooth_pixels(labels, size)
        if space == "unit":
            images = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    write_pixels(root, images, labels, space=space, factor=factor)
    rows = []
    for place, label in enumerate(labels.tolist()):
        name, index = class_names[label], place % ipc
        write_image(
            root / image_path(label, name, index), to_bytes(images[place : place + 1], MEAN, STD, space)[0]
        )
        rows.append(metadata_row(label, name, index, ()))
    write_metadata(root, rows)
    if before:
        write_before(root, to_bytes(images.flip(0), MEAN, STD, space), labels, class_names)
    if curve is None:
        curve = [{"group": 0, "step": step, "loss": 4.0 - step} for step in range(3)]
    if curve:
        write_curve(root, curve)
    facts = {
        "format_version": 1,
        "complete": True,
        "method": "made_up",
        "preset": None,
        "options": {"synthesize": {"iterations": 3, "real_batch": 8, "init": "real"}},
        "seed": 5,
        "ipc": ipc,
        "factor": factor,
        "tiles": factor**2,
        "image_size": size,
        "class_names": class_names,
        "mean": MEAN,
        "std": STD,
        "teacher": None,
        "label_teacher": None,
        "label_temperature": None,
        "label_top_k": None,
        "data": {"fingerprint": "0" * 32, "images": 600},
        "counts": {"images": len(labels), "sources": None, "quarantined": 0},
        "quarantined": {"count": 0, "files": []},
        **manifest,
    }
    (root / "manifest.json").write_text(json.dumps(facts), "utf-8")
    return images
