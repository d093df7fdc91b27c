"""What decides a student's result: the recipe, by one hash, and the bytes it was applied to, by others.

Two results may stand in one table where their recipes and their test images are the same. What then differs is the
distilled set: its images, its labels, and the teacher that the labels are from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ddfast.training.distilled_images import DistilledImages
from ddfast.training.image_sets import ImageSet
from ddfast.training.protocol import Protocol

_DIGITS = 12
_BLOCK = 1 << 24  # bytes that are copied at once


def recipe_hash(
    protocol: Protocol,
    *,
    arch: str,
    arch_options: Mapping[str, Any],
    epochs: int,
    steps: int,
    batch_size: int,
    labels: str,
    image_size: int,
    autoaugment: bool,
    precision: str,
    regions: str = "none",
) -> str:
    """12 hex digits of the SHA-256 of all that a student's training is, but for its data and its seed.

    Args:
        protocol: with all of its numbers, so that one of a caller's own is told from the one whose name it bears.
        arch, arch_options: the student.
        epochs: passes over the set.
        steps: updates of the weights.
        batch_size: images a step.
        labels: "online", "stored" or "hard".
        image_size: side of the images in pixels.
        autoaugment: whether AutoAugment came first.
        precision: what it was computed in.
        regions: that were seen beside each image: "none", "chosen" or "all".
    """
    rules = {**asdict(protocol), "labels": None}  # `labels` says more: where soft ones come from
    said = {
        "protocol": rules,
        "arch": arch,
        "arch_options": dict(arch_options),
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "labels": labels,
        "image_size": image_size,
        "autoaugment": bool(autoaugment),
        "precision": precision,
        **({} if regions == "none" else {"regions": regions}),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:_DIGITS]


def data_digests(
    images: DistilledImages, labels: str, teacher: str | None, test: ImageSet
) -> dict[str, str | None]:
    """12 hex digits each of what students were trained on and tested on.

    Args:
        images: the distilled set, as it was trained on: rounded, where it was, and normalised as the teacher wants.
        labels: "online", "stored" or "hard".
        teacher: SHA-256 of the teacher that the soft labels are from, where it is known.
        test: the real test images.

    Returns:
        "images", "labels" (the classes, and the stored soft labels where those were used), "teacher" and "test"; the
        teacher's is None for hard labels and where it is not known.
    """
    soft = images.soft_labels if labels == "stored" else None
    return {
        "images": _digest(
            images.images,
            *(() if images.boxes is None else (images.boxes,)),
            *_learned(images),
            *_read_as(images),
        ),
        "labels": _digest(images.labels, *(() if soft is None else (soft, torch.tensor(images.temperature)))),
        "teacher": None if labels == "hard" or teacher is None else teacher[:_DIGITS],
        "test": _digest(test.images, test.labels),
    }


def _learned(images: DistilledImages) -> tuple[Tensor, ...]:
    """The learning rate that came with the images, which belongs to them."""
    rate = images.learned_rate
    return () if rate is None else (torch.tensor(rate, dtype=torch.float64),)


def _read_as(images: DistilledImages) -> tuple[Tensor, ...]:
    """How the images are read: their normalisation and tiles, and the whitening that took the normalisation's place."""
    how = torch.tensor([*images.mean, *images.std, images.factor], dtype=torch.float64)
    whitening = images.whitening
    return (how,) if whitening is None else (how, whitening.mean, whitening.basis, whitening.variances)


def _digest(*tensors: Tensor) -> str:
    """Of dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for block in flat.split(_BLOCK):
            found.update(block.numpy().tobytes())
    return found.hexdigest()[:_DIGITS]
