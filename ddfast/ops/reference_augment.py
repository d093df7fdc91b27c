"""siamese_augment and its adjoint in plain PyTorch, a part of `ddfast.ops.reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddfast.ops.precision import accumulation_dtype

AUGMENT_COLUMNS = (
    "mirrored",
    *("brightness", "saturation", "contrast"),
    *("down", "across"),
    *("xx", "xy", "x0", "yx", "yy", "y0"),
    *("top", "left", "bottom", "right"),
)
"""What stands in a row of parameters, in this order."""


def siamese_augment(images: Tensor, parameters: Tensor, linear: bool) -> Tensor:
    """Mirror, colour, shift, warp and cut of images [N, C, H, W] by parameters [G, 16], N / G images a row.

    `linear`: without the brightness, the part that is not linear in the pixels. Differentiable any number of times.
    """
    dtype = accumulation_dtype(images.dtype)
    rows = parameters.to(dtype).repeat_interleave(len(images) // max(1, len(parameters)), dim=0)
    column = {name: rows[:, place].view(-1, 1, 1, 1) for place, name in enumerate(AUGMENT_COLUMNS)}
    x = images.to(dtype)
    x = torch.where(column["mirrored"] > 0, x.flip(-1), x)
    x = _coloured(x, column, linear)
    x = _shifted(x, column)
    x = _warped(x, rows[:, 6:12].view(-1, 2, 3))
    x = torch.where(_cut(x, column), 0, x)
    return like(images, x)


def siamese_augment_backward(grad_output: Tensor, parameters: Tensor) -> Tensor:
    """The transpose of the linear part of `siamese_augment` at a gradient [N, C, H, W]."""
    transpose: Any = torch.func.vjp(
        lambda images: siamese_augment(images, parameters, True), torch.zeros_like(grad_output)
    )[1]
    return like(grad_output, transpose(grad_output)[0])


def like(images: Tensor, x: Tensor) -> Tensor:
    """x in the dtype of the images and in the layout that `new_like` gives, differentiable."""
    return x.to(images.dtype).contiguous(memory_format=_layout(images))


def new_like(images: Tensor) -> Tensor:
    """Memory for the result: channels-last for dense channels-last images, contiguous for all others."""
    return torch.empty(images.shape, dtype=images.dtype, device=images.device, memory_format=_layout(images))


def _layout(images: Tensor) -> torch.memory_format:
    last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _coloured(x: Tensor, column: dict[str, Tensor], linear: bool) -> Tensor:
    """x + brightness; its distance from its grey image times saturation, from its mean times contrast."""
    saturation, contrast = column["saturation"], column["contrast"]
    brightness = torch.zeros_like(saturation) if linear else column["brightness"]
    y = x + brightness
    grey = y.mean(dim=1, keepdim=True)
    y = grey + (y - grey) * saturation
    mean = y.mean(dim=(1, 2, 3), keepdim=True)
    y = mean + (y - mean) * contrast
    return torch.where((brightness != 0) | (saturation != 1) | (contrast != 1), y, x)


def _shifted(x: Tensor, column: dict[str, Tensor]) -> Tensor:
    """Pixel (i, j) of the result is pixel (i + down, j + across), zero outside."""
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device).view(1, 1, -1, 1) + column["down"].long()
    columns = torch.arange(width, device=x.device).view(1, 1, 1, -1) + column["across"].long()
    return _taken(x, rows, columns)


def _taken(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels of [N, C, H, W] at rows and columns that broadcast to [N, 1, H, W], zero outside of the image."""
    height, width = x.shape[-2:]
    there = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    at = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    taken = x.flatten(2).gather(2, at.flatten(2).expand(-1, x.shape[1], -1))
    return torch.where(there, taken.view(x.shape), 0)


def _warped(x: Tensor, theta: Tensor) -> Tensor:
    """Bilinear at theta (column, row, 1), positions running from -1 to 1 over the outer edges of the image."""
    height, width = x.shape[-2:]
    across, down = (
        (2 * torch.arange(size, device=x.device, dtype=x.dtype) + 1) / size - 1 for size in (width, height)
    )
    placed = [
        theta[:, axis, 0].view(-1, 1, 1, 1) * across
        + theta[:, axis, 1].view(-1, 1, 1, 1) * down[:, None]
        + theta[:, axis, 2].view(-1, 1, 1, 1)
        for axis in (0, 1)
    ]
    # In pixels, and no further than where all four neighbours are outside.
    columns, rows = (
        (((position + 1) * size - 1) / 2).clamp(-1, size)
        for position, size in zip(placed, (width, height), strict=True)
    )
    left, top = columns.floor(), rows.floor()
    right_share, lower_share = columns - left, rows - top
    total = torch.zeros_like(x)
    for below in (0, 1):
        for right in (0, 1):
            weight = (lower_share if below else 1 - lower_share) * (right_share if right else 1 - right_share)
            total = total + weight * _taken(x, top.long() + below, left.long() + right)
    identity = theta.new_tensor([[1, 0, 0], [0, 1, 0]])
    return torch.where((theta != identity).any(dim=(1, 2)).view(-1, 1, 1, 1), total, x)


def _cut(x: Tensor, column: dict[str, Tensor]) -> Tensor:
    """bool [N, 1, H, W]: what the box takes out."""
    rows = torch.arange(x.shape[-2], device=x.device).view(1, 1, -1, 1)
    columns = torch.arange(x.shape[-1], device=x.device).view(1, 1, 1, -1)
    inside = (rows >= column["top"]) & (rows < column["bottom"])
    return inside & (columns >= column["left"]) & (columns < column["right"])
