"""Registration and public faces of grad_sq_norm_* and normalization_backward.

The gradient of a layer's parameters on one sample is a product of what went into the layer and of the
gradient that came back to its output. Its squared norm needs neither the gradients of all samples at once
(as `torch.func.vmap` makes them) nor, where there are few positions, the gradient at all: with X [T, I] and
G [T, O] it is

    ||G^T X||^2 = sum_{t,s} (X X^T)_{ts} (G G^T)_{ts},

T * I * O multiplications on the left, T^2 (I + O) on the right (Goodfellow 2015, arXiv 1510.01799, for T =
1; Rochette et al. 2019, arXiv 1912.06015, and Li et al. 2022, arXiv 2110.05679, for T > 1), half of them by
symmetry. The bodies take the cheaper side. A convolution's X X^T is a sum over its taps of inner products of
pixels, so on the CPU the Gram matrix of the P pixels, P^2 C / 2 multiplications for C channels, may stand in for
T^2 I / 2 with I = taps * C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddfast.ops import reference
from ddfast.ops._dispatch import LIBRARY, define

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def grad_sq_norm_linear(input: Tensor, grad_output: Tensor, *, bias: bool = True) -> Tensor:
    """Squared norm, per sample, of the gradient of a linear layer's weight [O, I] and bias [O].

    Args:
        input: [B, ..., I] floating point, what went into the layer.
        grad_output: [B, ..., O] of the same dtype, the loss's gradient at the layer's output, where the loss is
            a sum of one term a sample.
        bias: whether the layer has a bias.

    Returns:
        [B] float32, float64 for float64.

    Raises:
        TypeError: dtypes that differ or are not floating point.
        ValueError: shapes that do not belong together.
    """
    _check_dtypes(input, grad_output)
    if input.ndim < 2 or input.shape[:-1] != grad_output.shape[:-1]:
        raise ValueError(
            "input and grad_output must be [B, ..., I] and [B, ..., O], "
            f"got {tuple(input.shape)} and {tuple(grad_output.shape)}"
        )
    return torch.ops.ddfast.grad_sq_norm_linear(input, grad_output, bias)


def grad_sq_norm_conv2d(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = True,
) -> Tensor:
    """Squared norm per sample of the gradient of a convolution's weight [O, C / groups, kh, kw] and bias [O].

    Args:
        input: [B, C, H, W] floating point, what went into the layer, before zero padding.
        grad_output: [B, O, H', W'] of the same dtype, the loss's gradient at the layer's output.
        kernel_size, stride, padding, dilation, groups: the convolution's, an int or (vertical, horizontal). Any
            padding but zeros on both sides is the caller's to apply to `input`.
        bias: whether the layer has a bias.

    Returns:
        [B] float32, float64 for float64.

    Raises:
        TypeError: dtypes that differ or are not floating point.
        ValueError: shapes that do not belong together.
    """
    _check_dtypes(input, grad_output)
    kernel_size, stride, padding, dilation = map(_pair, (kernel_size, stride, padding, dilation))
    if input.ndim != 4 or grad_output.ndim != 4 or len(input) != len(grad_output):
        raise ValueError(
            "input and grad_output must be [B, C, H, W] and [B, O, H', W'], "
            f"got {tuple(input.shape)} and {tuple(grad_output.shape)}"
        )
    if input.shape[1] % groups or grad_output.shape[1] % groups:
        raise ValueError(
            f"groups {groups} must divide {input.shape[1]} input and {grad_output.shape[1]} output channels"
        )
    positions = tuple(
        (input.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel_size[d] - 1) - 1) // stride[d] + 1
        for d in (0, 1)
    )
    if positions != tuple(grad_output.shape[2:]):
        raise ValueError(
            f"a convolution with kernel_size {kernel_size}, stride {stride}, padding {padding} and dilation "
            f"{dilation} makes {positions} of {tuple(input.shape[2:])}, but grad_output is "
            f"{tuple(grad_output.shape[2:])}"
        )
    return torch.ops.ddfast.grad_sq_norm_conv2d(
        input, grad_output, kernel_size, stride, padding, dilation, groups, bias
    )


def grad_sq_norm_norm(
    normalized: Tensor, grad_output: Tensor, dims: tuple[int, int], *, weight: bool = True, bias: bool = True
) -> Tensor:
    """Squared norm, per sample, of the gradient of a normalisation layer's affine parameters.

    Serves every layer that computes normalized * weight + bias: BatchNorm in eval mode, InstanceNorm and
    GroupNorm with dims (1, 1), LayerNorm and RMSNorm with dims (-n, -1) for n normalised dimensions.

    Args:
        normalized: [B, ...] floating point, the layer's input after normalisation and before weight and bias.
        grad_output: the same shape and dtype, the loss's gradient at the layer's output.
        dims: first and last dimension (both included) that weight and bias extend over; their gradient is summed
            over all others but the first, the batch.
        weight, bias: which of the two the layer has.

    Returns:
        [B] float32, float64 for float64.

    Raises:
        TypeError: dtypes that differ or are not floating point.
        ValueError: shapes that differ, or dims that are not an interval of dimensions behind the batch.
    """
    _check_dtypes(normalized, grad_output)
    if normalized.shape != grad_output.shape:
        raise ValueError(
            "normalized and grad_output must have one shape, "
            f"got {tuple(normalized.shape)} and {tuple(grad_output.shape)}"
        )
    first, last = (d + normalized.ndim if d < 0 else d for d in dims)
    if not 1 <= first <= last < normalized.ndim:
        raise ValueError(f"dims must be an interval of dimensions 1 to {normalized.ndim - 1}, got {dims}")
    return torch.ops.ddfast.grad_sq_norm_norm(normalized, grad_output, first, last, weight, bias)


def grad_sq_norm_embedding(indices: Tensor, grad_output: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """Squared norm, per sample, of the gradient of an embedding table.

    A row that a sample looks up more than once gets the sum of its gradients.

    Args:
        indices: [B, ...] int64 or int32, the rows looked up.
        grad_output: [B, ..., D] floating point, the loss's gradient at the layer's output.
        padding_idx: a row that takes no gradient, counted from 0.

    Returns:
        [B] float32, float64 for float64.

    Raises:
        TypeError: indices that are no integers or a gradient that is not floating point.
        ValueError: shapes that do not belong together.
    """
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be int64 or int32, got {indices.dtype}")
    _check_dtypes(grad_output)
    if indices.ndim < 1 or indices.shape != grad_output.shape[:-1]:
        raise ValueError(
            "indices and grad_output must be [B, ...] and [B, ..., D], "
            f"got {tuple(indices.shape)} and {tuple(grad_output.shape)}"
        )
    if padding_idx is not None and padding_idx < 0:
        raise ValueError(f"padding_idx must be None or at least 0, got {padding_idx}")
    row = -1 if padding_idx is None else padding_idx
    return torch.ops.ddfast.grad_sq_norm_embedding(indices.to(torch.int64), grad_output, row)


def normalization_backward(
    input: Tensor,
    grad_output: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    *,
    weight_norm: bool = True,
    bias_norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """Backward pass of a normalisation and the squared norm, per sample, of its parameters' gradient.

    The layer computes (input - mean) * rstd * weight + bias. The sums over positions that the norm needs are those
    that the gradient at the input needs where the statistics are the sample's own, so one call makes both, and the
    normalised input is never stored.

    Args:
        input: [B, C, ...] floating point, what went into the layer.
        grad_output: the same shape and dtype, the loss's gradient at the layer's output.
        mean, rstd: floating point; the mean and the inverse of the standard deviation. [C]: constants, as of
            BatchNorm in eval mode. [B, groups]: taken from the sample's groups of channels, as in GroupNorm.
        weight: [C] floating point, or None for ones.
        weight_norm, bias_norm: which of the two parameters' gradients count in the norm.

    Returns:
        the gradient at the input, of its shape, dtype and layout (channels-last or contiguous), and the squared
        norms [B] float32, float64 for float64.

    Raises:
        TypeError: input and grad_output in different dtypes or not floating point.
        ValueError: shapes that do not belong together.
    """
    _check_dtypes(input, grad_output)
    if input.ndim < 2 or input.shape != grad_output.shape:
        raise ValueError(
            "input and grad_output must have one shape [B, C, ...], "
            f"got {tuple(input.shape)} and {tuple(grad_output.shape)}"
        )
    samples, channels = input.shape[:2]
    fixed = mean.shape == (channels,)
    grouped = mean.ndim == 2 and mean.shape[0] == samples and mean.shape[1] and channels % mean.shape[1] == 0
    if not (fixed or grouped) or rstd.shape != mean.shape:
        raise ValueError(
            f"mean and rstd must be [{channels}] or [{samples}, groups] with groups that divide {channels}, "
            f"got {tuple(mean.shape)} and {tuple(rstd.shape)}"
        )
    if weight is not None and weight.shape != (channels,):
        raise ValueError(f"weight must be [{channels}], got {tuple(weight.shape)}")
    return torch.ops.ddfast.normalization_backward(
        input, grad_output, mean, rstd, weight, weight_norm, bias_norm
    )


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    vertical, horizontal = (value, value) if isinstance(value, int) else value
    return vertical, horizontal


def _check_dtypes(*tensors: Tensor) -> None:
    dtypes = [tensor.dtype for tensor in tensors]
    if any(dtype not in _FLOAT_DTYPES or dtype != dtypes[0] for dtype in dtypes):
        raise TypeError(
            f"input and grad_output must share one floating-point dtype, got {', '.join(map(str, dtypes))}"
        )


def _per_sample_fake(first: Tensor, grad_output: Tensor, *_: Any) -> Tensor:
    return grad_output.new_empty(first.shape[0], dtype=reference.accumulation_dtype(grad_output.dtype))


def _native_accepts(first: Tensor, grad_output: Tensor, *_: Any) -> bool:
    return True


define(
    "grad_sq_norm_linear",
    "(Tensor input, Tensor grad_output, bool bias) -> Tensor",
    reference=reference.grad_sq_norm_linear,
    fake=_per_sample_fake,
    triton="grad_sq_norm",
    native_accepts=_native_accepts,
)
define(
    "grad_sq_norm_conv2d",
    "(Tensor input, Tensor grad_output, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "int groups, bool bias) -> Tensor",
    reference=reference.grad_sq_norm_conv2d,
    fake=_per_sample_fake,
    triton="grad_sq_norm",
    native_accepts=_native_accepts,
)
define(
    "grad_sq_norm_norm",
    "(Tensor normalized, Tensor grad_output, int first_dim, int last_dim, bool weight, bool bias) -> Tensor",
    reference=reference.grad_sq_norm_norm,
    fake=_per_sample_fake,
    triton="grad_sq_norm",
    native_accepts=_native_accepts,
)
define(
    "grad_sq_norm_embedding",
    "(Tensor indices, Tensor grad_output, int padding_idx) -> Tensor",
    reference=reference.grad_sq_norm_embedding,
    fake=_per_sample_fake,
    triton="grad_sq_norm",
    native_accepts=_native_accepts,
)


def _normalization_backward_fake(input: Tensor, grad_output: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    last = input.ndim == 4 and not input.is_contiguous()
    last = last and input.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    grad_input = torch.empty_like(input, dtype=grad_output.dtype, memory_format=layout)
    return grad_input, _per_sample_fake(input, grad_output)


define(
    "normalization_backward",
    "(Tensor input, Tensor grad_output, Tensor mean, Tensor rstd, Tensor? weight, bool weight_norm, "
    "bool bias_norm) -> (Tensor, Tensor)",
    reference=reference.normalization_backward,
    fake=_normalization_backward_fake,
    triton="normalization_backward",
    native_accepts=_native_accepts,
)


def _refuse_gradient(name: str) -> None:
    """A gradient through a gradient norm is a clear error, never a wrong number."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"ddfast::{name} cannot be differentiated; for a gradient of a gradient norm use "
            "torch.autograd.grad with create_graph=True, or call it under torch.no_grad()"
        )

    torch.library.register_autograd(f"ddfast::{name}", backward, lib=LIBRARY)


def _fold_vmap(name: str) -> None:
    """vmap over a per-sample op: the vmapped dimension joins the samples."""

    def vmap(
        info: Any, in_dims: tuple[int | None, ...], first: Tensor, grad_output: Tensor, *rest: Any
    ) -> Any:
        tensors = [
            tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape)
            if dim is None
            else tensor.movedim(dim, 0)
            for tensor, dim in zip((first, grad_output), in_dims, strict=False)
        ]
        norms = getattr(torch.ops.ddfast, name)(*(tensor.flatten(0, 1) for tensor in tensors), *rest)
        return norms.unflatten(0, tensors[0].shape[:2]), 0

    torch.library.register_vmap(f"ddfast::{name}", vmap, lib=LIBRARY)


for _name in ("grad_sq_norm_linear", "grad_sq_norm_conv2d", "grad_sq_norm_norm", "grad_sq_norm_embedding"):
    _refuse_gradient(_name)
    _fold_vmap(_name)
_refuse_gradient("normalization_backward")


@torch.library.register_vmap("ddfast::normalization_backward", lib=LIBRARY)
def _normalization_backward_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    """vmap over a normalisation: one call for each element, whose statistics may be its own."""
    results = [
        torch.ops.ddfast.normalization_backward(
            *(
                value if dim is None else value.select(dim, i)
                for value, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True)), (0, 0)
