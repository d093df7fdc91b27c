"""The differentiable augmentations of the matching methods, drawn apart from being applied.

DSA (Zhao & Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021, Sec. 3.3) takes one of
six operations; IDC (Kim et al., ICML 2022) mirrors and colours always, and takes one of three more. A draw holds its
parameters, a row an image or one row for all: with one row, real and synthetic images are changed in the same way,
which is what makes the augmentation siamese.

Images are float [B, C, H, W], normalised: what an operation leaves empty is 0, the mean colour. Every operation but the
contrast's mean is affine in the pixels of an image, and all are differentiable in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 0.125  # share of the side that a shift moves by, at most
CUTOUT = 0.5  # side of the square that is cut out, as a share of the image's
SCALE = 1.2  # most that an axis is scaled by, either way
ROTATION = 15.0  # degrees, either way

DSA = ("colour", "shift", "cutout", "flip", "scale", "rotation")
IDC = ("shift", "scale", "rotation")


@dataclass(frozen=True)
class Drawn:
    """An augmentation with its parameters.

    Attributes:
        operation: one of `DSA`.
        parameters: a row an image, or a single row for all images.
    """

    operation: str
    parameters: tuple[Tensor, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Images float [B, C, H, W], augmented."""
        return _APPLIED[self.operation](images, *self.parameters)


def draw(operation: str, rows: int, size: tuple[int, int], generator: torch.Generator) -> Drawn:
    """Parameters of one operation.

    Args:
        operation: one of `DSA`.
        rows: images that get parameters of their own; 1 for one set that all images share.
        size: (height, width) of the images in pixels.
        generator: of the CPU.
    """
    if operation == "colour":  # brightness, saturation, contrast
        return Drawn(operation, tuple(torch.rand(3, rows, 1, 1, 1, generator=generator)))
    if operation == "shift":
        return Drawn(operation, tuple(_shifts(side, rows, generator) for side in size))
    if operation == "cutout":
        return Drawn(operation, tuple(_first_pixels(side, rows, generator) for side in size))
    if operation == "flip":
        return Drawn(operation, (torch.rand(rows, generator=generator) < 0.5,))
    if operation == "scale":
        factors = torch.rand(2, rows, generator=generator) * (SCALE - 1 / SCALE) + 1 / SCALE
        zero = torch.zeros(rows)
        return Drawn("scale", (torch.stack([factors[0], zero, zero, zero, factors[1], zero], dim=1),))
    if operation == "rotation":
        angle = (torch.rand(rows, generator=generator) - 0.5) * 2 * math.radians(ROTATION)
        sine, cosine, zero = torch.sin(angle), torch.cos(angle), torch.zeros(rows)
        return Drawn(operation, (torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1),))
    raise ValueError(f"operation must be one of {', '.join(DSA)}, got {operation!r}")


def draw_one(
    operations: Sequence[str], rows: int, size: tuple[int, int], generator: torch.Generator
) -> Drawn:
    """One of the operations, each as likely, with its parameters; see `draw`."""
    chosen = int(torch.randint(len(operations), (), generator=generator))
    return draw(operations[chosen], rows, size, generator)


def draw_listed(
    listed: Sequence[str], rows: int, size: tuple[int, int], generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """IDC's augmentation: mirror and colour where they are listed, one of the listed `IDC`, a cutout where it is."""
    ways = [name for name in IDC if name in listed]
    drawn = [draw(name, rows, size, generator) for name in ("flip", "colour") if name in listed]
    drawn += [draw_one(ways, rows, size, generator)] if ways else []
    drawn += [draw("cutout", rows, size, generator)] if "cutout" in listed else []

    def apply(images: Tensor) -> Tensor:
        for operation in drawn:
            images = operation(images)
        return images

    return apply


def dsa(images: Tensor, generator: torch.Generator) -> Tensor:
    """DSA as its evaluation has it: one of six operations for the whole batch, parameters for each image."""
    return draw_one(DSA, len(images), _size(images), generator)(images)


def idc(images: Tensor, generator: torch.Generator) -> Tensor:
    """IDC's evaluation: mirror and colour always, and one of shift, scale and rotation for the whole batch."""
    for operation in ("flip", "colour"):
        images = draw(operation, len(images), _size(images), generator)(images)
    return draw_one(IDC, len(images), _size(images), generator)(images)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _shifts(side: int, rows: int, generator: torch.Generator) -> Tensor:
    most = int(side * SHIFT + 0.5)
    return torch.randint(-most, most + 1, (rows, 1), generator=generator)


def _first_pixels(side: int, rows: int, generator: torch.Generator) -> Tensor:
    """Where a cut-out square around a uniform centre begins; it may lie outside of the image."""
    cut = int(side * CUTOUT + 0.5)
    return torch.randint(0, side + (1 - cut % 2), (rows, 1), generator=generator) - cut // 2


def _colour(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """x + U(-.5, .5); distance from the grey image times U(0, 2); distance from the image's mean times U(.5, 1.5)."""
    brightness, saturation, contrast = (p.to(images) for p in (brightness, saturation, contrast))
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (2 * saturation)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.5 + contrast)


def _shift(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Whole pixels; zeros come in."""
    count, _, height, width = images.shape
    if len(down) == 1:  # all alike: a window of the padded images
        y, x = int(down), int(across)
        padded = F.pad(images, (max(-x, 0), max(x, 0), max(-y, 0), max(y, 0)))
        return padded[:, :, max(y, 0) : max(y, 0) + height, max(x, 0) : max(x, 0) + width]
    rows, columns = (
        (torch.arange(side) + moved + 1).clamp(0, side + 1).to(images.device)
        for side, moved in ((height, down), (width, across))
    )
    framed = F.pad(images, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    batch = torch.arange(count, device=images.device).view(-1, 1, 1)
    return framed[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(images: Tensor, top: Tensor, left: Tensor) -> Tensor:
    inside = [
        (torch.arange(side) >= first) & (torch.arange(side) < first + int(side * CUTOUT + 0.5))
        for side, first in zip(images.shape[-2:], (top, left), strict=True)
    ]
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(square.to(images.device), 0)


def _flip(images: Tensor, mirrored: Tensor) -> Tensor:
    if len(mirrored) == 1:
        return images.flip(-1) if bool(mirrored) else images
    return torch.where(mirrored.to(images.device).view(-1, 1, 1, 1), images.flip(-1), images)


def _warp(images: Tensor, theta: Tensor) -> Tensor:
    """Bilinear, around the centre, by the affine maps theta [B, 6] or [1, 6]."""
    theta = theta.view(-1, 2, 3).to(images)
    grid = F.affine_grid(theta, [len(theta), *images.shape[1:]], align_corners=False)
    return F.grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=False)


_APPLIED: dict[str, Callable[..., Tensor]] = {
    "colour": _colour,
    "shift": _shift,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _warp,
    "rotation": _warp,
}
