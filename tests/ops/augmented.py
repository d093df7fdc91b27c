"""What rows of augmentation parameters mean, by PyTorch's own functions, and rows of every operation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.ops import augment_parameters

EXACT = ("flip", "shift", "far shift", "cutout", "cut across the border")  # those that compute nothing
OPERATIONS = (
    *EXACT,
    *("brightness", "colour", "contrast"),
    *("scale", "rotation", "large scale", "quarter turn", "affine", "collapsed"),
    *("color_crop_cutout", "color_crop", "flip_color_rotate", "everything"),
)


def rows_of(operation: str, rows: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Parameters [rows, 16] that are drawn for one of `OPERATIONS`."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(rows, generator=generator, dtype=torch.float64) * (high - low) + low

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (rows,), generator=generator)

    def scaled(most: float) -> Tensor:
        across, down = (uniform(-math.log(most), math.log(most)).exp() for _ in range(2))
        zero = torch.zeros_like(across)
        return torch.stack([across, zero, zero, zero, down, zero], 1)

    def turned(angle: Tensor) -> Tensor:
        sine, cosine, zero = angle.sin(), angle.cos(), torch.zeros_like(angle)
        return torch.stack([cosine, -sine, zero, sine, cosine, zero], 1)

    flip = {"mirrored": whole(0, 1)}
    colour = {
        "brightness": uniform(-0.5, 0.5),
        "saturation": uniform(0, 2),
        "contrast": uniform(0.5, 1.5),
    }
    shift = {"shift": [whole(-math.ceil(side / 8), math.ceil(side / 8)) for side in size]}
    first = [whole(-(side // 4), side - 1) for side in size]
    cut = {"cut": (*first, *(f + (side + 1) // 2 for f, side in zip(first, size, strict=True)))}
    angle = uniform(-math.pi / 12, math.pi / 12)
    drift = uniform(-0.7, 0.7), uniform(-0.7, 0.7)
    affine = torch.stack([uniform(-1.5, 1.5) for _ in range(6)], 1)
    given = {
        "flip": flip,
        "shift": shift,
        "far shift": {"shift": [whole(-2 * side, 2 * side) for side in size]},
        "cutout": cut,
        "cut across the border": {"cut": (-3, 1, size[0] + 5, size[1] + 9)},
        "brightness": {"brightness": colour["brightness"]},
        "colour": colour,
        "contrast": {"contrast": colour["contrast"]},
        "scale": {"theta": scaled(1.2)},
        "rotation": {"theta": turned(angle)},
        "large scale": {"theta": scaled(5)},
        "quarter turn": {"theta": turned(angle + math.pi / 2)},
        "affine": {"theta": affine},
        "collapsed": {"theta": torch.stack([*(drift[0],) * 2, drift[1], *(drift[0],) * 2, drift[1]], 1)},
        "color_crop_cutout": {**colour, **shift, **cut},
        "color_crop": {**colour, **shift},
        "flip_color_rotate": {**flip, **colour, "theta": turned(angle)},
        "everything": {**flip, **colour, **shift, **cut, "theta": turned(angle) * scaled(1.2)[:, :1]},
    }[operation]
    return augment_parameters(rows, **given)


def plain(images: Tensor, parameters: Tensor) -> Tensor:
    """Images [N, C, H, W] under rows [G, 16], N / G images a row; steps that no row has are left out."""
    rows = parameters.repeat_interleave(len(images) // len(parameters), 0).to(images.dtype)
    mirrored, brightness, saturation, contrast = (rows[:, k].view(-1, 1, 1, 1) for k in range(4))
    x = torch.where(mirrored == 1, images.flip(3), images)
    if (rows[:, 1:4] != rows.new_tensor([0, 1, 1])).any():
        x = x + brightness
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * saturation
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (x - mean) * contrast
    if rows[:, 4:6].any():
        x = torch.stack([_moved(one, int(row[4]), int(row[5])) for one, row in zip(x, rows, strict=True)])
    if (rows[:, 6:12] != rows.new_tensor([1, 0, 0, 0, 1, 0])).any():
        grid = F.affine_grid(rows[:, 6:12].reshape(-1, 2, 3), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
    boxes = rows[:, 12:].long().tolist()
    mask = torch.ones_like(x)
    for hole, (top, left, bottom, right) in zip(mask, boxes, strict=True):
        hole[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = 0
    return x * mask


def _moved(image: Tensor, down: int, across: int) -> Tensor:
    """[C, H, W], shifted by whole pixels with zeros coming in."""
    height, width = image.shape[-2:]
    margins = (abs(across), abs(across), abs(down), abs(down))
    top, left = abs(down) + down, abs(across) + across
    return F.pad(image, margins)[:, top : top + height, left : left + width]
