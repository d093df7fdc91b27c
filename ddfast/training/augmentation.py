"""Augmentation of whole batches at once: one draw of parameters an image, no Python loop over images.

Images are [B, 3, S, S], uint8 or float. Every function draws from the generator it is given. What the matching methods
augment with, differentiably, is in `ddfast.training.differentiable`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Float32 channels-last (x - mean) / std of images in [0, 1], or of uint8 images scaled by 1/255."""
    scale = 1 / 255 if images.dtype == torch.uint8 else 1.0
    result = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
    factor = torch.tensor([scale / s for s in std], device=images.device)
    offset = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return result.mul_(factor.view(1, 3, 1, 1)).sub_(offset.view(1, 3, 1, 1))


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    flips = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flips.to(images.device).view(-1, 1, 1, 1), images.flip(-1), images)


def random_crop_flip(
    images: Tensor, generator: torch.Generator, padding: int = 4, black: Tensor | None = None
) -> Tensor:
    """Pad with black, cut a random window of the old size, mirror with probability one half: one gather.

    `black` [3] is the value of black in each channel, 0 by default.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding))
    if black is not None:
        inside = (..., slice(padding, padding + height), slice(padding, padding + width))
        padded = black.to(images).view(1, 3, 1, 1).expand_as(padded).clone()
        padded[inside] = images
    top = torch.randint(2 * padding + 1, (count, 1), generator=generator)
    left = torch.randint(2 * padding + 1, (count, 1), generator=generator)
    flips = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.arange(width).expand(count, width)
    columns = left + torch.where(flips, width - 1 - columns, columns)
    rows = top + torch.arange(height)
    batch = torch.arange(count).view(-1, 1, 1)
    index = (
        batch.to(images.device),
        rows[:, :, None].to(images.device),
        columns[:, None, :].to(images.device),
    )
    return padded.permute(0, 2, 3, 1)[index].permute(0, 3, 1, 2)


def random_resized_boxes(
    count: int,
    size: int,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Boxes of torchvision's RandomResizedCrop in square images: int32 [count, 4] (x0, y0, x1, y1), ends
    exclusive.

    Area uniform in `scale` (as a share of the image), log of the aspect ratio uniform in `ratio`; the first
    of ten attempts that fits, else the whole image.
    """
    attempts = 10
    area = (
        torch.empty(attempts, count, dtype=torch.float64).uniform_(*scale, generator=generator) * size * size
    )
    low, high = torch.log(torch.tensor(ratio, dtype=torch.float64)).tolist()
    aspect = torch.exp(
        torch.empty(attempts, count, dtype=torch.float64).uniform_(low, high, generator=generator)
    )
    width = torch.round(torch.sqrt(area * aspect)).long()
    height = torch.round(torch.sqrt(area / aspect)).long()
    fits = (width > 0) & (width <= size) & (height > 0) & (height <= size)
    first = torch.argmax(fits.int(), dim=0)
    chosen = torch.arange(count)
    whole = ~fits.any(dim=0)
    width = torch.where(whole, size, width[first, chosen])
    height = torch.where(whole, size, height[first, chosen])
    place = torch.rand(2, count, generator=generator, dtype=torch.float64)
    left = (place[0] * (size - width + 1)).long()
    top = (place[1] * (size - height + 1)).long()
    return torch.stack([left, top, left + width, top + height], dim=1).to(torch.int32)


def resize_boxes(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Antialiased bilinear resize of one box an image ([B, 4]) to size x size, in the images' dtype."""
    from ddfast.ops import crop_resize

    source = torch.arange(len(images), device=images.device)
    return crop_resize(images, boxes.to(images.device), size, source=source)


def shuffle_patches(images: Tensor, factor: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """RDED's ShufflePatches: permute each image's `factor` strips of columns, then its strips of rows.

    Returns the images and the tile that now stands at each place, int64 [B, factor, factor] (row-major
    numbers of the old places). A strip is size // factor wide; the last one takes what is left over.
    """
    count, _, height, width = images.shape
    columns = torch.argsort(torch.rand(count, factor, generator=generator), dim=1)
    rows = torch.argsort(torch.rand(count, factor, generator=generator), dim=1)
    tiles = rows[:, :, None] * factor + columns[:, None, :]
    if factor == 1:
        return images, tiles
    take_columns = _strip_index(columns, width, factor).to(images.device)
    take_rows = _strip_index(rows, height, factor).to(images.device)
    batch = torch.arange(count, device=images.device).view(-1, 1, 1)
    shuffled = images.permute(0, 2, 3, 1)[batch, take_rows[:, :, None], take_columns[:, None, :]]
    return shuffled.permute(0, 3, 1, 2), tiles


def _strip_index(order: Tensor, size: int, factor: int) -> Tensor:
    """Old pixel positions [B, size] after the strips were put in `order` [B, factor]."""
    strip = torch.clamp(torch.arange(size) // max(size // factor, 1), max=factor - 1)
    new_place = torch.argsort(order, dim=1)  # new_place[b, s] = where strip s went
    # Sorting the pixels, stably, by the new place of their strip concatenates the strips in that order.
    return torch.argsort(new_place[:, strip], dim=1, stable=True)
