"""Real images as the networks of a matching method see them, and the refusals where there are too few."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ddfast.data.pool import ClassPool
from ddfast.errors import UsageError, shown
from ddfast.methods.base import Context
from ddfast.ops.transfer import to_device
from ddfast.wording import argument, plural


def scaled(images: Tensor, context: Context, dtype: torch.dtype = torch.float32) -> Tensor:
    """x / 255 of uint8 images, on the context's device."""
    return to_device(images, context.device).to(dtype) / 255


def normalised(images: Tensor, context: Context, dtype: torch.dtype = torch.float32) -> Tensor:
    """(x / 255 - mean) / std of uint8 images [..., 3, H, W] in one pass, on the context's device."""
    shift, scale = _of_bytes(tuple(context.mean), tuple(context.std), dtype, context.device)
    return torch.addcmul(shift, to_device(images, context.device).to(dtype), scale)


def standardised(images: Tensor, context: Context) -> Tensor:
    """(x - mean) / std of images in [0, 1], [..., 3, H, W]; differentiable."""
    mean, std = (
        on_channels(tuple(values), images.dtype, images.device) for values in (context.mean, context.std)
    )
    return (images - mean) / std


# On a GPU they are sent once, as what is recorded sends nothing.


@functools.cache
def on_channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the channels, [3, 1, 1], that a normalisation is made of."""
    with torch.inference_mode(False):
        return to_device(torch.tensor(values, dtype=dtype), device).view(3, 1, 1)


@functools.cache
def _of_bytes(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """-mean / std and 1 / (255 std), computed in float64."""
    centre, spread = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    with torch.inference_mode(False):
        shift, scale = (
            to_device(values.to(dtype), device).view(3, 1, 1)
            for values in (-centre / spread, 1 / (255 * spread))
        )
    return shift, scale


def all_drawn(
    pool: ClassPool,
    label: int,
    count: int,
    draws: torch.Generator,
    context: Context,
    keyword: str,
    *,
    divisor: int = 1,
) -> Tensor:
    """`count` images of a class, uint8 [count, 3, S, S].

    Raises:
        UsageError: fewer can be read; `keyword`, of which `count` is `divisor` times as many, is what to lower.
    """
    drawn = pool.draw(label, count, draws)
    if len(drawn) < count:
        raise UsageError(
            f"{shown([context.class_names[label]])} has {plural(len(drawn), 'readable image')}, {count} are needed: "
            + lower(keyword, len(drawn) // divisor, "give the class more images")
        )
    return drawn


def lower(keyword: str, most: int, otherwise: str) -> str:
    """Advice: the value that there are images for, or another way."""
    return f"lower {argument(keyword)} to {most}, or {otherwise}" if most else otherwise


def short_of(needed: int, counts: Tensor, class_names: Sequence[str]) -> str:
    """The classes with fewer than `needed` images, for a message; empty where there are none."""
    found = [
        f"{shown([name])} has {count}"
        for name, count in zip(class_names, counts.tolist(), strict=True)
        if count < needed
    ]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more have too few" if len(found) > 3 else "")
