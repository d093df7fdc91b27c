"""Registration and public face of add_bias_relu_, what follows a convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddfast.ops import reference
from ddfast.ops._dispatch import LIBRARY, define

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def add_bias_relu_(
    x: Tensor, bias: Tensor | None = None, other: Tensor | None = None, *, relu: bool = True
) -> Tensor:
    """relu(x + bias + other), written over `x`: on a GPU one pass over memory, where there were up to three.

    Args:
        x: [B, C, H, W] floating point, the output of a convolution without bias. Channels-last maps are written in
            place, others by way of a copy.
        bias: [C] of the same dtype, or None.
        other: a tensor like `x`, the shortcut of a residual block, or None.
        relu: whether negative numbers become 0; NaN stays.

    Returns:
        x. Sums are taken in this order, in float32 (float64 for float64), and rounded once. Not differentiable.

    Raises:
        TypeError: a dtype that is not listed above, or dtypes that differ.
        ValueError: shapes that do not fit, or elements of `x` that share memory.
        RuntimeError: a gradient is wanted.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, other)):
        raise RuntimeError("add_bias_relu_ has no derivative: call it under torch.no_grad()")
    if x.dtype not in _FLOATING:
        raise TypeError(f"x must be floating point of 16 to 64 bits, got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}")
    for name, tensor, shape in (("bias", bias, x.shape[1:2]), ("other", other, x.shape)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} as x is, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for x {list(x.shape)}, got {list(tensor.shape)}")
    if x.numel() and any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError("elements of x share memory (it is expanded): pass x.clone()")
    torch.ops.ddfast.add_bias_relu_(x, bias, other, relu)
    return x


def _fake(x: Tensor, bias: Tensor | None, other: Tensor | None, relu: bool) -> None:
    """Makes nothing new."""


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    relu: bool,
) -> tuple[None, None]:
    """One call for each element: what is mapped over may be the bias too."""
    if in_dims[0] is None:
        raise ValueError("x is written to, so it has to be mapped over where bias or other is")
    for i in range(info.batch_size):
        parts = [
            t if t is None or dim is None else t.select(dim, i)
            for t, dim in zip((x, bias, other), in_dims, strict=False)
        ]
        torch.ops.ddfast.add_bias_relu_(*parts, relu)
    return None, None


define(
    "add_bias_relu_",
    "(Tensor(a!) x, Tensor? bias, Tensor? other, bool relu) -> ()",
    reference=reference.add_bias_relu_,
    fake=_fake,
    triton="add_bias_relu",
)
torch.library.register_vmap("ddfast::add_bias_relu_", _vmap, lib=LIBRARY)
