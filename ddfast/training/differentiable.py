"""The differentiable augmentations of the matching methods, drawn apart from being applied.

DSA (Zhao & Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021, Sec. 3.3) takes one of
six operations. IDC (Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization", ICML 2022, and
misc/augment.py of its repository) mirrors, colours and cuts always, where these are listed, and takes one of those
listed that move pixels. A draw holds its parameters, a row an image or one row for all: with one row, real and
synthetic images are changed in the same way, which is what makes the augmentation siamese.

Images are float [B, C, H, W], normalised: what an operation leaves empty is 0, the mean colour. All operations are
affine in the pixels of an image, and all that is drawn for it is applied by one call of `ddfast.ops.siamese_augment`,
of which the gradient, and its gradient, is one call too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddfast.ops import augment_parameters, siamese_augment
from ddfast.ops.reference_augment import AUGMENT_COLUMNS

SHIFT = 0.125  # share of the side that a shift moves by, at most
CUTOUT = 0.5  # side of the square that is cut out, as a share of the image's
SCALE = 1.2  # most that an axis is scaled by, either way
ROTATION = 15.0  # degrees, either way

DSA = ("colour", "shift", "cutout", "flip", "scale", "rotation")
MOVES = ("shift", "scale", "rotation")  # IDC takes one of them

# What IDC lists: `color_crop_cutout` where it matches, the same parameters for real and synthetic images; `color_crop`
# where it trains its networks, whose CutMix takes the place of the cutout; and `color_crop_flip_scale_rotate` where it
# trains students. The latter two draw parameters for each image.
IDC_MATCHING = ("colour", "shift", "cutout")
IDC_TRAINING = ("colour", "shift")
IDC_EVALUATION = ("colour", "shift", "flip", "scale", "rotation")

_ORDER = {"flip": 0, "colour": 1, "shift": 2, "scale": 3, "rotation": 3, "cutout": 4}  # of one call of the op


@dataclass(frozen=True)
class Drawn:
    """An operation with its parameters.

    Attributes:
        operation: one of `DSA`.
        parameters: a row an image, or a single row for all images.
    """

    operation: str
    parameters: tuple[Tensor, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Images float [B, C, H, W], augmented."""
        return DrawnTogether((self,))(images)

    def calls(self, size: tuple[int, int]) -> list[dict[str, Any]]:
        """See `DrawnTogether`."""
        return [self.given(size)]

    def given(self, size: tuple[int, int]) -> dict[str, Any]:
        """The arguments of `augment_parameters` for images of a size (height, width)."""
        first, *rest = self.parameters
        if self.operation == "flip":
            return {"mirrored": first}
        if self.operation == "colour":
            saturation, contrast = rest
            # In float64, so that each is rounded once whatever the images' dtype.
            return {
                "brightness": first.double() - 0.5,
                "saturation": 2 * saturation.double(),
                "contrast": 0.5 + contrast.double(),
            }
        if self.operation == "shift":
            return {"shift": (first, rest[0])}
        if self.operation == "cutout":
            sides = [int(side * CUTOUT + 0.5) for side in size]
            return {"cut": (first, rest[0], first + sides[0], rest[0] + sides[1])}
        return {"theta": first}


@dataclass(frozen=True)
class DrawnTogether:
    """Operations with their parameters, one after another.

    Attributes:
        drawn: all of them with a row an image, or all with a single row.
    """

    drawn: tuple[Drawn, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Images float [B, C, H, W], augmented, in as few calls of the op as the order allows."""
        for given in self.calls(_size(images)):
            rows = max(len(value[0] if isinstance(value, tuple) else value) for value in given.values())
            unchanged = rows == 1 and set(given) == {"mirrored"} and not bool(given["mirrored"])
            if rows > 0 and not unchanged:
                images = siamese_augment(images, augment_parameters(rows, **given))
        return images

    def calls(self, size: tuple[int, int]) -> list[dict[str, Any]]:
        """The arguments of `augment_parameters` of one call of the op after another, for images of a size."""
        found: list[dict[str, Any]] = []
        last = len(_ORDER)
        for each in self.drawn:
            place = _ORDER[each.operation]
            if place <= last:
                found.append({})
            found[-1] |= each.given(size)
            last = place
        return found


Augmentation = Drawn | DrawnTogether
"""What was drawn for images: a function of them."""


def group_parameters(drawn: Sequence[Augmentation], size: tuple[int, int]) -> Tensor:
    """What was drawn for groups of images, each with a single row, as parameters of the op, float64 [calls, G, 16].

    Args:
        drawn: for each group.
        size: (height, width) of the images in pixels.
    """
    calls = itertools.zip_longest(*(each.calls(size) for each in drawn), fillvalue={})
    rows = [torch.cat([augment_parameters(**arguments) for arguments in call]) for call in calls]
    return (
        torch.stack(rows) if rows else torch.empty(0, len(drawn), len(AUGMENT_COLUMNS), dtype=torch.float64)
    )


def augment_groups(parameters: Tensor, images: Tensor) -> Tensor:
    """Groups of images, each augmented by what was drawn for it, all in one call of the op.

    Args:
        parameters: of `group_parameters`.
        images: float [G, n, C, H, W].

    Returns:
        [G, n, C, H, W], with the bits of one group after another.
    """
    flat = images.flatten(0, 1)
    for rows in parameters:
        flat = siamese_augment(flat, rows)
    return flat.unflatten(0, images.shape[:2])


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


def draw_idc(
    operations: Sequence[str], rows: int, size: tuple[int, int], generator: torch.Generator
) -> DrawnTogether:
    """What IDC draws: flip, colour and cutout where they are listed, and one of `MOVES` that are, each as likely.

    Args:
        operations: `IDC_MATCHING`, `IDC_TRAINING`, `IDC_EVALUATION`, or others of `DSA` in any order. The flip comes
            first, then colour, the move and the cutout.
        rows, size, generator: see `draw`.
    """
    if unknown := [name for name in operations if name not in DSA]:
        raise ValueError(f"operations must be among {', '.join(DSA)}, got {unknown[0]!r}")
    drawn = [draw(name, rows, size, generator) for name in ("flip", "colour") if name in operations]
    if moves := [name for name in operations if name in MOVES]:
        drawn.append(draw_one(moves, rows, size, generator))
    if "cutout" in operations:
        drawn.append(draw("cutout", rows, size, generator))
    return DrawnTogether(tuple(drawn))


def without_flip(operations: Sequence[str]) -> tuple[str, ...]:
    """The operations but for the mirror, which digits do not bear."""
    return tuple(name for name in operations if name != "flip")


def dsa(images: Tensor, generator: torch.Generator, *, flip: bool = True) -> Tensor:
    """DSA as its evaluation has it: one of six operations for the whole batch, parameters for each image."""
    operations = DSA if flip else without_flip(DSA)
    return draw_one(operations, len(images), _size(images), generator)(images)


def idc(images: Tensor, generator: torch.Generator, *, flip: bool = True) -> Tensor:
    """IDC's evaluation: mirror and colour always, and one of shift, scale and rotation for the whole batch."""
    operations = IDC_EVALUATION if flip else without_flip(IDC_EVALUATION)
    return draw_idc(operations, len(images), _size(images), generator)(images)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _shifts(side: int, rows: int, generator: torch.Generator) -> Tensor:
    most = int(side * SHIFT + 0.5)
    return torch.randint(-most, most + 1, (rows, 1), generator=generator)


def _first_pixels(side: int, rows: int, generator: torch.Generator) -> Tensor:
    """Where a cut-out square around a uniform centre begins; it may lie outside of the image."""
    cut = int(side * CUTOUT + 0.5)
    return torch.randint(0, side + (1 - cut % 2), (rows, 1), generator=generator) - cut // 2
