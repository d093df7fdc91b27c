"""Registration and public face of convnet_block_batch_norm: the same block with BatchNorm in train mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddfast.ops import reference
from ddfast.ops._convnet import (
    backward_fake,
    checked,
    empty_channels_last,
    gradient_by,
    is_differentiated,
    one_by_one,
    save,
    save_backward,
    second_gradient_of_all,
)
from ddfast.ops._dispatch import LIBRARY, below_autocast, call, define


def convnet_block_batch_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """avg_pool2d(relu(batch_norm(conv2d(input, weight, bias, padding=1), norm_weight, norm_bias, eps)), 2).

    The block of ConvNets with BatchNorm, normalised by the mean and the variance of this batch, as in train mode.
    With more than 4 input channels the convolution is written and kept for the backward pass, and computed again
    otherwise. No result depends on the number of threads.

    Differentiable twice and more: the first backward pass is an op of its own, whose derivatives are plain PyTorch.
    The gradient of `bias` is exactly zero, as the norm takes every constant away. It works under `torch.compile` and
    `vmap`; what `torch.func.grad` differentiates is computed by plain PyTorch. Autocast does not change its dtypes.

    Args:
        input: [B, C, H, W] floating point, any strides; H and W at least 2. The last row or column of an odd size
            counts in the norm and is dropped by the pooling.
        weight: [O, C, 3, 3].
        bias: [O] or None.
        norm_weight, norm_bias: [O] or None, the norm's scale and shift.
        eps: added to the variance.

    Returns:
        the pooled map [B, O, H // 2, W // 2] in the dtype of input and channels-last memory format; mean [O] and
        variance [O] of the convolution's channels over the B * H * W positions (not one less), without gradients.
        They are NaN where there are no images. float16 and bfloat16 are normalised in float32, in which their
        statistics come.

    Raises:
        TypeError: dtypes that differ or are not floating point.
        ValueError: shapes that do not fit.
    """
    differentiated = is_differentiated(*checked(input, weight, bias, norm_weight, norm_bias))
    if differentiated and torch._C._are_functorch_transforms_active():
        layers = below_autocast(reference.convnet_block_batch_norm, input.device.type)
        pooled, mean, variance, _ = layers(input, weight, bias, norm_weight, norm_bias, eps)
        return pooled, mean.detach(), variance.detach()
    return call("convnet_block_batch_norm", input, weight, bias, norm_weight, norm_bias, eps)[:3]


def convnet_block_batch_norm_eval(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """The same block in eval mode: normalised by a mean and a variance that are given. It has no backward pass.

    Only the pooled map is written. An image's result depends neither on the rest of the batch nor on the number of
    threads.

    Args:
        input, weight, bias, norm_weight, norm_bias, eps: as `convnet_block_batch_norm`.
        mean, variance: [O], of the convolution's channels, in the dtype of input.

    Returns:
        [B, O, H // 2, W // 2] in the dtype of input and channels-last memory format.

    Raises:
        TypeError: dtypes that differ or are not floating point.
        ValueError: shapes that do not fit.
    """
    checked(input, weight, bias, norm_weight, norm_bias)
    for name, vector in (("mean", mean), ("variance", variance)):
        if vector.dtype != input.dtype:
            raise TypeError(f"{name} must be {input.dtype}, as input is, got {vector.dtype}")
        if vector.shape != (weight.shape[0],):
            raise ValueError(f"{name} must be [{weight.shape[0]}], got {list(vector.shape)}")
    run = torch.ops.ddfast.convnet_block_batch_norm_eval
    return run(input, weight, bias, norm_weight, norm_bias, mean, variance, eps)


def _fake(
    input: Tensor, weight: Tensor, bias: Any, norm_weight: Any, norm_bias: Any, eps: float
) -> tuple[Tensor, ...]:
    batch, inputs, height, width = input.shape
    outputs = weight.shape[0]
    dtype = reference.accumulation_dtype(input.dtype)
    mean, variance = (input.new_empty(outputs, dtype=dtype) for _ in range(2))
    kept = inputs > reference.RECOMPUTED_INPUTS
    conv = empty_channels_last(input, (batch, outputs, height, width)) if kept else input.new_empty(0)
    return empty_channels_last(input, (batch, outputs, height // 2, width // 2)), mean, variance, conv


def _eval_fake(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    batch, height, width = input.shape[0], *input.shape[2:]
    return empty_channels_last(input, (batch, weight.shape[0], height // 2, width // 2))


def _native_accepts(first: Tensor, *_: Any) -> bool:
    return first.dtype == torch.float32 and first.shape[0] > 0


def _eval_native_accepts(first: Tensor, *_: Any) -> bool:
    return first.dtype == torch.float32


def _nothing_to_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Nothing is kept for a backward pass that does not exist."""


def _no_gradient(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "convnet_block_batch_norm_eval has no backward pass: take PyTorch's layers where one is wanted"
    )


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return gradient_by(torch.ops.ddfast.convnet_block_batch_norm_backward, ctx, grad)


def _second_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The derivative of all that the backward pass computes, statistics included, by plain PyTorch."""
    given = (ctx.to_input, ctx.to_weight, True, True)
    grads = tuple(grad if known else None for grad, known in zip(grads, given, strict=True))
    needs = list(ctx.needs_input_grad)
    if ctx.images_only:
        needs[2:6] = [False] * 4
    if all(grad is None for grad in grads):
        return (None,) * 12
    return second_gradient_of_all(reference.convnet_block_batch_norm_gradients, ctx, grads, needs)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """Each mapped element is a batch of its own, with its own statistics."""
    return one_by_one(torch.ops.ddfast.convnet_block_batch_norm, info, in_dims, arguments)


def _eval_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Fold the mapped dimension into the batch; mapped parameters run once for each."""
    op = torch.ops.ddfast.convnet_block_batch_norm_eval
    if any(dim is not None for dim in in_dims[1:]):
        (stacked,), (dim,) = one_by_one(lambda *given: (op(*given),), info, in_dims, arguments)
        return stacked, dim
    folded = arguments[0].movedim(in_dims[0], 0)
    return op(folded.flatten(0, 1), *arguments[1:]).unflatten(0, folded.shape[:2]), 0


def _backward_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    return one_by_one(torch.ops.ddfast.convnet_block_batch_norm_backward, info, in_dims, arguments)


define(
    "convnet_block_batch_norm",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.convnet_block_batch_norm,
    fake=_fake,
    native_accepts=_native_accepts,
)
define(
    "convnet_block_batch_norm_backward",
    "(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor mean, Tensor variance, Tensor conv, float eps, bool to_input, bool to_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.convnet_block_batch_norm_backward,
    fake=backward_fake,
    native_accepts=_native_accepts,
)
define(
    "convnet_block_batch_norm_eval",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor mean, Tensor variance, "
    "float eps) -> Tensor",
    reference=reference.convnet_block_batch_norm_eval,
    fake=_eval_fake,
    native_accepts=_eval_native_accepts,
)
torch.library.register_autograd(
    "ddfast::convnet_block_batch_norm_eval", _no_gradient, setup_context=_nothing_to_save, lib=LIBRARY
)
torch.library.register_vmap("ddfast::convnet_block_batch_norm_eval", _eval_vmap, lib=LIBRARY)
torch.library.register_autograd(
    "ddfast::convnet_block_batch_norm", _gradient, setup_context=save, lib=LIBRARY
)
torch.library.register_autograd(
    "ddfast::convnet_block_batch_norm_backward", _second_gradient, setup_context=save_backward, lib=LIBRARY
)
torch.library.register_vmap("ddfast::convnet_block_batch_norm", _vmap, lib=LIBRARY)
torch.library.register_vmap("ddfast::convnet_block_batch_norm_backward", _backward_vmap, lib=LIBRARY)
