"""Argument checks that the attributions share. Each raises ValueError with what was given and what fits."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddfast.philox import as_signed_64_bit


def as_tensors(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Images and labels that were given as arrays or lists, as tensors; tensors as they are."""
    return _as_tensor(images, "images", "[B, C, H, W]"), _as_tensor(labels, "labels", "[B]")


def _as_tensor(value: Any, name: str, shape: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        if isinstance(value, tuple | list) and value and all(isinstance(entry, Tensor) for entry in value):
            return torch.stack(tuple(value))
        array = np.asarray(value)
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a tensor {shape}, got {type(value).__name__}") from None


def check_images(images: Tensor, labels: Tensor) -> None:
    """Images are [B, C, H, W] uint8 or float, labels [B] int64."""
    if images.dim() != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            f"images must be [B, C, H, W] uint8 or float, got {list(images.shape)} {images.dtype}"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be [{len(images)}] int64, got {list(labels.shape)} {labels.dtype}")


def check_labels(labels: Tensor, classes: int) -> None:
    """Labels [B] name classes of the model."""
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, the classes of the model, got {low}..{high}")


def check_scores(scores: Tensor, images: int) -> None:
    """What the model returned for `images` images is [images, classes]."""
    wanted = f"the model must return class scores [{images}, classes]"
    if not isinstance(scores, Tensor):
        raise ValueError(
            f"{wanted}, got {type(scores).__name__}: give a function that picks them, such as {_picking(scores)}"
        )
    if scores.dim() != 2 or len(scores) != images or not scores.shape[1]:
        raise ValueError(f"{wanted}, got {list(scores.shape)}")
    if not scores.is_floating_point():
        raise ValueError(f"{wanted} in a floating dtype, got {scores.dtype}")


def _picking(output: Any) -> str:
    """The function that picks class scores out of what a model returned, as one would write it."""
    for name in ("logits", "scores", "out"):
        if isinstance(output, Mapping) and name in output:
            return f"lambda x: model(x)[{name!r}]"
        if isinstance(getattr(output, name, None), Tensor):
            return f"lambda x: model(x).{name}"
    if isinstance(output, Mapping):
        return f"lambda x: model(x)[{next(iter(output), 'logits')!r}]"
    return "lambda x: model(x)[0]" if isinstance(output, tuple | list) else "lambda x: model(x).logits"


def check_finite(bad: int, evaluated: int, what: str) -> None:
    """None of the scores of the `evaluated` images was NaN or infinite; `bad` were."""
    if bad:
        raise ValueError(
            f"the model returned NaN or infinity for {bad} of {evaluated} {what}: "
            "check its weights, its normalisation and the images"
        )


def check_grid(grid: int | tuple[int, int], images: Tensor) -> tuple[int, int]:
    """A grid of cells of at least one pixel each, as (rows, columns)."""
    try:
        rows, cols = map(operator.index, grid) if isinstance(grid, Iterable) else [operator.index(grid)] * 2
    except (TypeError, ValueError):
        raise ValueError(f"grid must be a whole number or two of them, got {grid!r}") from None
    height, width = images.shape[-2:]
    if not (1 <= rows <= height and 1 <= cols <= width):
        raise ValueError(f"grid must be 1..{height} rows by 1..{width} columns for these images, got {grid}")
    return rows, cols


def check_chunk_size(chunk_size: int) -> int:
    """At least one image in a forward pass."""
    try:
        chunk_size = operator.index(chunk_size)
    except TypeError:
        raise ValueError(f"chunk_size must be a whole number, got {chunk_size!r}") from None
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 image, got {chunk_size}")
    return chunk_size


def check_seed(seed: int | Tensor, images: int) -> int | Tensor:
    """A 64-bit integer, taken as signed, or int64 [B]."""
    if isinstance(seed, Tensor):
        if seed.shape != (images,) or seed.dtype != torch.int64:
            raise ValueError(f"seed must be an int or [{images}] int64, got {list(seed.shape)} {seed.dtype}")
        return seed
    try:
        return as_signed_64_bit(operator.index(seed))
    except TypeError:
        raise ValueError(f"seed must be a whole number, got {seed!r}") from None


def _check_numbers(values: Any, name: str) -> None:
    """None is NaN or infinite. oneDNN's ReLU makes 0 of NaN, so that scores do not tell; a GPU is not waited for."""
    if isinstance(values, Tensor):
        wrong = (
            values.device.type == "cpu" and values.is_floating_point() and not bool(values.isfinite().all())
        )
    else:
        wrong = isinstance(values, float) and not math.isfinite(values)
    if wrong:
        raise ValueError(f"{name} must hold finite numbers, and some are NaN or infinite")


def check_baseline(baseline: float | Tensor, images: Tensor) -> float | Tensor:
    """Baselines [B, C, H, W] are one an image; a single one [1, C, H, W] becomes [C, H, W] and serves all.

    What is masked, images and baseline, holds finite numbers. All other forms are `masked_batch`'s to check.
    """
    _check_numbers(images, "images")
    _check_numbers(baseline, "baseline")
    if not isinstance(baseline, Tensor) or baseline.dim() != 4:
        return baseline
    if len(baseline) not in (1, len(images)):
        raise ValueError(
            f"baseline must be one image or {len(images)}, as many as the images, got {list(baseline.shape)}"
        )
    return baseline[0] if len(baseline) == 1 else baseline
