"""Registration and public face of assemble_masked_features, the gather of locality reuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddfast.ops import reference
from ddfast.ops._dispatch import LIBRARY, call, define
from ddfast.ops.transfer import to_device

MAX_CLASSES = 12

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def assemble_masked_features(variants: Tensor, coalitions: Tensor, table: Tensor) -> Tensor:
    """Feature maps of every coalition, location by location, from the maps of a few.

    Players fall into M classes, and variant v is the feature map with the classes of v's set bits present and
    the others absent. A location that sees at most one player of each class, player table[h, w, m] of class
    m, cannot tell a coalition from the variant v(h, w) = sum_m [table[h, w, m] in the coalition] 2^m; its
    features are taken from there.

    Args:
        variants: [B, 2^M, C, H, W] floating point. Channels-last maps are read in place, others are copied
            into that layout first.
        coalitions: bool [K, d], the same for every image, or [B, K, d].
        table: int32 [H, W, M], 1 <= M <= 12: a player, 0 to d - 1, or -1 where the location sees none of
            the class.

    Returns:
        [B * K, C, H, W] of the variants' dtype in channels-last memory format; image b under coalition k is
        row b * K + k. Values are copied, so no bit changes. Differentiable any number of times with respect
        to the variants.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: shapes that do not fit; on the CPU also a player outside -1 .. d - 1. A GPU is not asked,
            because reading the table back would stall it.
    """
    if not isinstance(variants, Tensor) or variants.ndim != 5:
        got = list(variants.shape) if isinstance(variants, Tensor) else type(variants).__name__
        raise ValueError(f"variants must be a [B, 2^M, C, H, W] tensor, got {got}")
    if variants.dtype not in _FLOATING:
        raise TypeError(f"variants must be floating point of 16 to 64 bits, got {variants.dtype}")
    batch, patterns, _, height, width = variants.shape
    if table.dtype != torch.int32:
        raise TypeError(f"table must be int32, got {table.dtype}")
    if table.ndim != 3 or table.shape[:2] != (height, width) or not 1 <= table.shape[2] <= MAX_CLASSES:
        raise ValueError(
            f"table must be [{height}, {width}, M] with 1 to {MAX_CLASSES} classes for variants "
            f"{list(variants.shape)}, got {list(table.shape)}"
        )
    if patterns != 1 << table.shape[2]:
        raise ValueError(
            f"variants must hold 2^M = {1 << table.shape[2]} maps an image for a table of {table.shape[2]} "
            f"classes, got {patterns}"
        )
    if coalitions.dtype != torch.bool:
        raise TypeError(f"coalitions must be bool, got {coalitions.dtype}")
    if coalitions.ndim not in (2, 3) or (coalitions.ndim == 3 and len(coalitions) != batch):
        raise ValueError(f"coalitions must be [K, d] or [{batch}, K, d], got {list(coalitions.shape)}")
    return call(
        "assemble_masked_features",
        variants,
        to_device(coalitions, variants.device),
        to_device(table, variants.device),
    )


def _check_players(variants: Tensor, coalitions: Tensor, table: Tensor) -> None:
    if table.numel() and not -1 <= int(table.min()) <= int(table.max()) < coalitions.shape[-1]:
        raise ValueError(
            f"table must name players in [-1, {coalitions.shape[-1]}), "
            f"got {int(table.min())} to {int(table.max())}"
        )


def _fake(variants: Tensor, coalitions: Tensor, table: Tensor) -> Tensor:
    shape = (variants.shape[0] * coalitions.shape[-2], *variants.shape[2:])
    return variants.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    variants, coalitions, table = inputs
    ctx.save_for_backward(coalitions, table)
    ctx.shape = variants.shape


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The transpose of a gather, a sum over the coalitions that took a variant, in differentiable steps."""
    coalitions, table = ctx.saved_tensors
    batch, _, channels, height, width = ctx.shape
    count = coalitions.shape[-2]
    which = reference.variant_at_location(coalitions, table).expand(batch, count, height, width)
    which = which.unsqueeze(2).expand(batch, count, channels, height, width)
    grad = grad.unflatten(0, (batch, count))
    total = grad.new_zeros(ctx.shape, dtype=reference.accumulation_dtype(grad.dtype))
    return total.scatter_add(1, which, grad.to(total.dtype)).to(grad.dtype), None, None


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], variants: Tensor, coalitions: Tensor, table: Tensor
) -> tuple[Tensor, int]:
    """Fold the mapped dimension into the batch of images; a mapped table runs once for each."""
    size = info.batch_size
    variants_dim, coalitions_dim, table_dim = in_dims
    variants = _mapped_first(variants, variants_dim, size)
    batch, count = variants.shape[1], coalitions.shape[-2]
    if table_dim is not None:
        coalitions = _mapped_first(coalitions, coalitions_dim, size)
        each = zip(variants, coalitions, table.movedim(table_dim, 0), strict=True)
        return torch.stack([torch.ops.ddfast.assemble_masked_features(*one) for one in each]), 0
    if coalitions_dim is not None or coalitions.ndim == 3:
        coalitions = _mapped_first(coalitions, coalitions_dim, size)
        if coalitions.ndim == 3:
            coalitions = coalitions.unsqueeze(1).expand(-1, batch, -1, -1)
        count = coalitions.shape[-2]
        coalitions = coalitions.flatten(0, 1)
    assembled = torch.ops.ddfast.assemble_masked_features(variants.flatten(0, 1), coalitions, table)
    return assembled.unflatten(0, (size, batch * count)), 0


def _mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A vmapped argument with its mapped dimension first; one that is not mapped is expanded."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _native_accepts(variants: Tensor, coalitions: Tensor, table: Tensor) -> bool:
    """The C++ body has no element type of its own: it moves bytes."""
    return True


define(
    "assemble_masked_features",
    "(Tensor variants, Tensor coalitions, Tensor table) -> Tensor",
    reference=reference.assemble_masked_features,
    fake=_fake,
    triton="assemble_masked_features",
    native_accepts=_native_accepts,
    check=_check_players,
)
torch.library.register_autograd(
    "ddfast::assemble_masked_features", _backward, setup_context=_context, lib=LIBRARY
)
torch.library.register_vmap("ddfast::assemble_masked_features", _vmap, lib=LIBRARY)
