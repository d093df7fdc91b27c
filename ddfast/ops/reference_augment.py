"""siamese_augment and its adjoint in plain PyTorch, a part of `ddfast.ops.reference`."""

from __future__ import annotations

from collections.abc import Iterator

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
    x, rows, column = _opened(images, parameters)
    x = torch.where(column["mirrored"] > 0, x.flip(-1), x)
    x = _coloured(x, column, linear)
    x = _shifted(x, column["down"], column["across"])
    x = torch.where(_warps(rows), _warped(x, rows), x)
    return like(images, torch.where(_cut(x, column), 0, x))


def siamese_augment_backward(grad_output: Tensor, parameters: Tensor) -> Tensor:
    """The transpose of the linear part of `siamese_augment` at a gradient [N, C, H, W]: that of each step in turn."""
    x, rows, column = _opened(grad_output, parameters)
    x = torch.where(_cut(x, column), 0, x)
    x = torch.where(_warps(rows), _warp_transposed(x, rows), x)
    x = _shifted(x, -column["down"], -column["across"])
    x = _coloured(x, column, True)
    return like(grad_output, torch.where(column["mirrored"] > 0, x.flip(-1), x))


def _opened(images: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Images and a row of parameters for each, in the dtype of sums; and each parameter as [N, 1, 1, 1]."""
    dtype = accumulation_dtype(images.dtype)
    rows = parameters.to(dtype).repeat_interleave(len(images) // max(1, len(parameters)), dim=0)
    column = {name: rows[:, place].view(-1, 1, 1, 1) for place, name in enumerate(AUGMENT_COLUMNS)}
    return images.to(dtype).contiguous(), rows, column  # sums in one order, whatever the layout


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


def _shifted(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Pixel (i, j) of the result is pixel (i + down, j + across), zero outside."""
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device).view(1, 1, -1, 1) + down.long()
    columns = torch.arange(width, device=x.device).view(1, 1, 1, -1) + across.long()
    there, at = _places(x, rows, columns)
    return torch.where(there, x.flatten(2).gather(2, at).view(x.shape), 0)


def _places(x: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows and columns that broadcast to [N, 1, H, W]: whether they are inside, and where, [N, C, H * W]."""
    height, width = x.shape[-2:]
    there = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    at = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    return there, at.flatten(2).expand(-1, x.shape[1], -1)


def _warps(rows: Tensor) -> Tensor:
    """bool [N, 1, 1, 1]: which rows move anything."""
    return (rows[:, 6:12] != rows.new_tensor([1, 0, 0, 0, 1, 0])).any(dim=1).view(-1, 1, 1, 1)


def _warped(x: Tensor, rows: Tensor) -> Tensor:
    """Bilinear at theta (column, row, 1), positions running from -1 to 1 over the outer edges of the image."""
    total = torch.zeros_like(x)
    for weight, at in _taps(x, rows):
        value = x.flatten(2).gather(2, at).view(x.shape)
        total = total + torch.where(weight != 0, weight * value, 0)
    return total


def _warp_transposed(x: Tensor, rows: Tensor) -> Tensor:
    total = torch.zeros_like(x).flatten(2)
    for weight, at in _taps(x, rows):
        total = total.scatter_add(2, at, torch.where(weight != 0, weight * x, 0).flatten(2))
    return total.view(x.shape)


def _taps(x: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The four pixels that each one of a warp reads: their weights, zero outside, and where they are."""
    height, width = x.shape[-2:]
    theta = rows[:, 6:12].reshape(-1, 2, 3, 1, 1, 1)
    across, down = (
        (2 * torch.arange(size, device=x.device, dtype=x.dtype) + 1) / size - 1 for size in (width, height)
    )
    placed = [theta[:, k, 0] * across + theta[:, k, 1] * down[:, None] + theta[:, k, 2] for k in (0, 1)]
    # In pixels, and no further than where all four are outside.
    column, row = (
        (((position + 1) * size - 1) / 2).clamp(-1, size)
        for position, size in zip(placed, (width, height), strict=True)
    )
    left, top = column.floor(), row.floor()
    for below in (0, 1):
        for right in (0, 1):
            there, at = _places(x, top.long() + below, left.long() + right)
            share_y = row - top if below else 1 - (row - top)
            share_x = column - left if right else 1 - (column - left)
            yield torch.where(there, share_y * share_x, 0), at


def _cut(x: Tensor, column: dict[str, Tensor]) -> Tensor:
    """bool [N, 1, H, W]: what the box takes out."""
    rows = torch.arange(x.shape[-2], device=x.device).view(1, 1, -1, 1)
    columns = torch.arange(x.shape[-1], device=x.device).view(1, 1, 1, -1)
    inside = (rows >= column["top"]) & (rows < column["bottom"])
    return inside & (columns >= column["left"]) & (columns < column["right"])
