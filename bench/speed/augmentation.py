"""Speed entry of siamese_augment: what DSA and IDC draw for a batch, forward and backward, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bench.speed.registry import (
    Check,
    Contender,
    Contest,
    Measurable,
    Settings,
    Target,
    relative_error,
    speed_entry,
)
from ddfast.training.differentiable import (
    CUTOUT,
    DSA,
    IDC_EVALUATION,
    Drawn,
    augment_groups,
    draw,
    draw_idc,
    group_parameters,
)

CLASSES, SIDE = 10, 32
Augment = Callable[[Tensor], Tensor]


@speed_entry(
    "siamese_augment",
    what="augmentations of DSA and IDC, forward and backward, against the plain composition",
    minutes=0.7,
    targets={"cpu": {"fused": Target(4.0), "fused, rows shared": Target(2.5)}},
)
def siamese_augment(settings: Settings) -> Iterator[Measurable]:
    """2,560 images of 32 px: all six of DSA's operations, one after another, and IDC's of one step.

    With parameters that a class shares, a shift is a window in plain PyTorch and a mirror may be nothing at all: there
    is less to gain, and memory binds.
    """
    count = settings.size(2560, quick=20, gpu=2560)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator).to(settings.device)
    grad = torch.randn(count, 3, SIDE, SIDE, generator=generator).to(settings.device)
    size = (SIDE, SIDE)
    each = [draw(operation, count, size, generator) for operation in DSA]
    yield _contest("the six of DSA, parameters for each image", images, grad, each, list(map(plain, each)))
    by_class = [[draw(operation, 1, size, generator) for _ in range(CLASSES)] for operation in DSA]
    yield _contest(
        f"the six of DSA, parameters for each of {CLASSES} classes",
        images,
        grad,
        [partial(_at_once, of_classes) for of_classes in by_class],
        [partial(_class_by_class, [plain(drawn) for drawn in of_classes]) for of_classes in by_class],
        "fused, rows shared",
    )
    together = draw_idc(IDC_EVALUATION, count, size, generator)
    in_turn = partial(_in_turn, [plain(drawn) for drawn in together.drawn])
    named = " and ".join(drawn.operation for drawn in together.drawn)
    yield _contest(f"{named} of IDC, parameters for each image", images, grad, [together], [in_turn])


def _contest(
    case: str,
    images: Tensor,
    grad: Tensor,
    ours: Sequence[Augment],
    theirs: Sequence[Augment],
    contender: str = "fused",
) -> Contest:
    """All of ours, forward and backward, against all of theirs, once they agree one by one."""
    checked = False

    def both(augment: Augment) -> Tensor:
        leaf = images.detach().requires_grad_()
        made = augment(leaf)
        (back,) = torch.autograd.grad(made, leaf, grad)
        return torch.stack((made.detach(), back)) if checked else back

    def run(augments: Sequence[Augment]) -> None:
        for augment in augments:
            both(augment)

    def gate() -> list[Check]:
        nonlocal checked
        checked = True
        errors = [relative_error(both(a), both(b)) for a, b in zip(ours, theirs, strict=True)]
        checked = False
        return [Check("images and gradients, at worst", max(errors), 1e-5)]

    return Contest(
        f"{case}, forward and backward, {len(images)} images of {SIDE} px",
        ours=[Contender(contender, partial(run, ours), work=len(ours) * len(images))],
        peer=Contender("plain PyTorch", partial(run, theirs), work=len(ours) * len(images)),
        gate=gate,
        unit="images",
    )


def _in_turn(augments: Sequence[Augment], images: Tensor) -> Tensor:
    for augment in augments:
        images = augment(images)
    return images


def _at_once(drawn: Sequence[Drawn], images: Tensor) -> Tensor:
    """Images in as many equal parts as there are draws, one call for all of them."""
    rows = group_parameters(drawn, (images.shape[-2], images.shape[-1]))
    return augment_groups(rows, images.unflatten(0, (len(drawn), -1))).flatten(0, 1)


def _class_by_class(augments: Sequence[Augment], images: Tensor) -> Tensor:
    """Images in as many equal parts as there are augmentations, each through its own."""
    parts = images.view(len(augments), -1, *images.shape[1:]).unbind()
    return torch.cat([augment(part) for augment, part in zip(augments, parts, strict=True)])


# The same in plain PyTorch
# -----------------------------------------------------------------------------------------------------


def plain(drawn: Drawn) -> Augment:
    """What was drawn, as PyTorch's own operations apply it."""
    applied: dict[str, Callable[..., Tensor]] = {
        "colour": _colour,
        "shift": _shift,
        "cutout": _cutout,
        "flip": _flip,
        "scale": _warp,
        "rotation": _warp,
    }
    return lambda images: applied[drawn.operation](images, *drawn.parameters)


def _colour(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    brightness, saturation, contrast = (p.to(images) for p in (brightness, saturation, contrast))
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (2 * saturation)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.5 + contrast)


def _shift(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    count, _, height, width = images.shape
    if len(down) == 1:  # all alike: a window of the padded images
        y, x = int(down), int(across)
        padded = functional.pad(images, (max(-x, 0), max(x, 0), max(-y, 0), max(y, 0)))
        return padded[:, :, max(y, 0) : max(y, 0) + height, max(x, 0) : max(x, 0) + width]
    rows, columns = (
        (torch.arange(side) + moved + 1).clamp(0, side + 1).to(images.device)
        for side, moved in ((height, down), (width, across))
    )
    framed = functional.pad(images, (1, 1, 1, 1)).permute(0, 2, 3, 1)
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
    theta = theta.view(-1, 2, 3).to(images)
    grid = functional.affine_grid(theta, [len(theta), *images.shape[1:]], align_corners=False)
    return functional.grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=False)
