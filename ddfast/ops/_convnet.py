"""Registration and public face of convnet_block: convolution, InstanceNorm, ReLU and pooling in one call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ddfast.ops import reference
from ddfast.ops._dispatch import LIBRARY, below_autocast, call, define, native_status, triton_status

_PIECE = 2**19
"""Elements of the map that the second derivative handles at a time on a CPU, so that its steps stay in the cache."""

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def convnet_block(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
) -> Tensor:
    """avg_pool2d(relu(instance_norm(conv2d(input, weight, bias, padding=1), norm_weight, norm_bias, eps)), 2).

    The block of the ConvNets of DC, DSA, DM, MTT and IDC. Only the pooled map is written, a quarter of the
    convolution's; where a gradient is wanted and there are more than 4 input channels, the convolution is kept
    besides, and computed again otherwise. An image's result depends neither on the rest of the batch nor on the
    number of threads, and gradients of parameters not on the number of threads.

    Differentiable twice and more: the first backward pass is an op of its own, whose derivatives are plain PyTorch.
    The gradient of `bias` is exactly zero, as the norm takes every constant away. It works under `torch.compile`,
    `vmap` and `functional_call`; what `torch.func.grad` differentiates is computed by plain PyTorch, as registered
    ops have no rule for that. Autocast does not change its dtypes.

    Args:
        input: [B, C, H, W] floating point, any strides; H and W at least 2. The last row or column of an odd size
            counts in the norm and is dropped by the pooling.
        weight: [O, C, 3, 3].
        bias: [O] or None.
        norm_weight, norm_bias: [O] or None, the norm's scale and shift.
        eps: added to the variance, which is that of all H * W positions (not H * W - 1).

    Returns:
        [B, O, H // 2, W // 2] in the dtype of input and channels-last memory format. float16 and bfloat16 are
        normalised in float32.

    Raises:
        TypeError: dtypes that differ or are not floating point.
        ValueError: shapes that do not fit.
    """
    differentiated = is_differentiated(*checked(input, weight, bias, norm_weight, norm_bias))
    if differentiated and torch._C._are_functorch_transforms_active():
        layers = below_autocast(reference.convnet_block_layers, input.device.type)
        return layers(input, weight, bias, norm_weight, norm_bias, eps)[0]
    keep = differentiated and input.shape[1] > reference.RECOMPUTED_INPUTS
    return call("convnet_block", input, weight, bias, norm_weight, norm_bias, eps, keep)[0]


def checked(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> list[Tensor]:
    """The tensors among a block's arguments; errors as `convnet_block`."""
    tensors = [input, weight, *(t for t in (bias, norm_weight, norm_bias) if t is not None)]
    if input.dtype not in _FLOAT_DTYPES or any(tensor.dtype != input.dtype for tensor in tensors):
        raise TypeError(
            "input, weight, bias, norm_weight and norm_bias must share one floating-point dtype, "
            f"got {', '.join(str(tensor.dtype) for tensor in tensors)}"
        )
    if input.ndim != 4 or input.shape[1] < 1 or min(input.shape[2:]) < 2:
        raise ValueError(
            f"input must be [B, C, H, W] with C at least 1 and H and W at least 2, got {list(input.shape)}"
        )
    if weight.ndim != 4 or weight.shape[0] < 1 or tuple(weight.shape[1:]) != (input.shape[1], 3, 3):
        raise ValueError(f"weight must be [O, {input.shape[1]}, 3, 3], got {list(weight.shape)}")
    for name, vector in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None and vector.shape != (weight.shape[0],):
            raise ValueError(f"{name} must be [{weight.shape[0]}], got {list(vector.shape)}")
    return tensors


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@torch.compiler.assume_constant_result
def convnet_block_is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a body other than the reference serves the device and dtype."""
    if device.type == "cuda":
        return triton_status()[0] and dtype != torch.float64
    return device.type == "cpu" and dtype == torch.float32 and native_status()[0]


@contextmanager
def differentiable_in_images() -> Iterator[None]:
    """Backward passes in this block are differentiable in their images and incoming gradients, not in their weights.

    For gradient matching, which moves images along a gradient of weights: autograd cannot tell a registered op that
    nobody will ask for the rest, which is two of six convolutions of the second backward pass. Who enters it sees to it
    that the weights are leaves which nobody else holds: what is asked of them would lack a part.
    """
    before = only_images_are_asked_for()
    _SECOND.images_only = True
    try:
        yield
    finally:
        _SECOND.images_only = before


def only_images_are_asked_for() -> bool:
    """Whether this is such a block."""
    return getattr(_SECOND, "images_only", False)


_SECOND = threading.local()


def empty_channels_last(like: Tensor, shape: tuple[Any, ...]) -> Tensor:
    return like.new_empty_strided(shape, reference.channels_last_strides(shape))


def _fake(
    input: Tensor, weight: Tensor, bias: Any, norm_weight: Any, norm_bias: Any, eps: float, keep: bool
) -> tuple[Tensor, ...]:
    batch, _, height, width = input.shape
    outputs = weight.shape[0]
    dtype = reference.accumulation_dtype(input.dtype)
    mean, rstd = (input.new_empty((batch, outputs), dtype=dtype) for _ in range(2))
    conv = empty_channels_last(input, (batch, outputs, height, width)) if keep else input.new_empty(0)
    return empty_channels_last(input, (batch, outputs, height // 2, width // 2)), mean, rstd, conv


def backward_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    to_input, to_weight = rest[-2:]
    grad_input = empty_channels_last(input, tuple(input.shape)) if to_input else input.new_empty(0)
    grad_weight = weight.new_empty(weight.shape) if to_weight else weight.new_empty(0)
    return grad_input, grad_weight, weight.new_empty(weight.shape[0]), weight.new_empty(weight.shape[0])


def _curvature_fake(
    grad_output: Tensor,
    conv: Tensor,
    mapped: Tensor,
    norm_weight: Any,
    norm_bias: Any,
    mean: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    maps = (empty_channels_last(conv, tuple(conv.shape)) for _ in range(2))
    return *maps, empty_channels_last(grad_output, tuple(grad_output.shape)), mean.new_empty(mean.shape)


def _native_accepts(first: Tensor, *_: Any) -> bool:
    return first.dtype == torch.float32


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep a block's five tensors, eps, and all that it gives besides the pooled map."""
    ctx.eps = inputs[5]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:5], *output[1:])


def gradient_by(backward: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients that the op of a block's backward pass gives, and None for each argument that has none."""
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad
    grad_input, grad_weight, *of_norm = backward(grad, *saved, ctx.eps, needs[0], needs[1])
    of_bias = torch.zeros_like(saved[2]) if needs[2] else None
    found = [grad_input, grad_weight, of_bias, *of_norm, *[None] * (len(needs) - 5)]
    return tuple(each if needed else None for each, needed in zip(found, needs, strict=True))


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return gradient_by(torch.ops.ddfast.convnet_block_backward, ctx, grad)


def save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what a block's backward pass was given."""
    ctx.save_for_backward(*inputs[:9])
    ctx.eps, ctx.to_input, ctx.to_weight = inputs[9:]
    ctx.images_only = only_images_are_asked_for()


def _second_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The derivative of all that the backward pass computes, statistics included, by plain PyTorch.

    On the CPU a few images at a time: its many steps are small ones in the cache then.
    """
    grad_output, input, weight, bias, norm_weight, norm_bias, mean, rstd, conv = ctx.saved_tensors
    given = (ctx.to_input, ctx.to_weight, True, True)
    grads = tuple(grad if known else None for grad, known in zip(grads, given, strict=True))
    needs = list(ctx.needs_input_grad)
    if ctx.images_only:
        needs[2:6] = [False] * 4
    results: list[Any] = [None] * 12
    pieces: dict[int, list[Any]] = {place: [] for place in (0, 1, 2, 4)}
    if all(grad is None for grad in grads):
        return tuple(results)
    if torch.is_grad_enabled():  # this may be differentiated in turn
        return second_gradient_of_all(reference.convnet_block_gradients, ctx, grads, ctx.needs_input_grad)
    batch, outputs = mean.shape
    images = max(1, _PIECE // (outputs * input.shape[2] * input.shape[3]))
    images = images if input.device.type == "cpu" and batch > 0 else max(1, batch)
    for first in range(0, max(1, batch), images):
        part = slice(first, first + images)
        of_conv = conv[part] if conv.ndim == 4 else functional.conv2d(input[part], weight, bias, padding=1)
        found = reference.convnet_block_second_gradients(
            grad_output[part],
            input[part],
            weight,
            norm_weight,
            norm_bias,
            mean[part],
            rstd[part],
            of_conv,
            (None if grads[0] is None else grads[0][part], *grads[1:]),
            (*needs[:3], needs[4]),
        )
        for place, grad in zip((0, 1, 2, 4), found, strict=True):
            pieces[place].append(grad)
    for place in (0, 1):
        results[place] = torch.cat(pieces[place]) if needs[place] else None
    for place in (2, 4):
        results[place] = sum(pieces[place][1:], pieces[place][0]) if needs[place] else None
    results[3] = torch.zeros_like(bias) if needs[3] else None
    results[5] = torch.zeros_like(norm_bias) if needs[5] else None
    return tuple(results)


def second_gradient_of_all(
    gradients: Callable[..., tuple[Tensor, ...]],
    ctx: Any,
    grads: tuple[Tensor | None, ...],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The same by differentiating the backward pass from the arguments on, in operations that can be differentiated.

    `gradients` is the backward pass as a function of what it takes, without what the forward pass kept; `needs` says
    which of its first six arguments are asked for.
    """
    saved: list[Any] = list(ctx.saved_tensors)
    wanted = [place for place, need in enumerate(needs[:6]) if need]
    used = [k for k in range(4) if grads[k] is not None]

    def first(*arguments: Tensor) -> tuple[Tensor, ...]:
        for place, argument in zip(wanted, arguments, strict=True):
            saved[place] = argument
        found = gradients(
            saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], ctx.eps, ctx.to_input, ctx.to_weight
        )
        return tuple(found[k] for k in used)

    results: list[Tensor | None] = [None] * 12
    if wanted:
        transpose: Any = torch.func.vjp(first, *(saved[place] for place in wanted))[1]
        for place, grad in zip(wanted, transpose(tuple(grads[k] for k in used)), strict=True):
            results[place] = grad
    return tuple(results)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """Fold the mapped dimension into the batch; mapped parameters run once for each."""
    op = torch.ops.ddfast.convnet_block
    if any(dim is not None for dim in in_dims[1:5]):
        return one_by_one(op, info, in_dims, arguments)
    folded = arguments[0].movedim(in_dims[0], 0)
    outputs = op(folded.flatten(0, 1), *arguments[1:])
    unfolded = (
        t.unflatten(0, folded.shape[:2]) if t.ndim > 1 else t.expand(info.batch_size, 0) for t in outputs
    )
    return tuple(unfolded), (0, 0, 0, 0)


def _backward_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """Gradients of parameters are sums over a batch, so each mapped element has a call of its own."""
    return one_by_one(torch.ops.ddfast.convnet_block_backward, info, in_dims, arguments)


def one_by_one(
    op: Any, info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    results = [
        op(
            *(
                value if dim is None else value.select(dim, i)
                for value, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(outputs) for outputs in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


define(
    "convnet_block",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.convnet_block,
    fake=_fake,
    triton="convnet_block",
    native_accepts=_native_accepts,
)
define(
    "convnet_block_backward",
    "(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor mean, Tensor rstd, Tensor conv, float eps, bool to_input, bool to_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.convnet_block_backward,
    fake=backward_fake,
    triton="convnet_block",
    native_accepts=_native_accepts,
)
define(
    "convnet_block_curvature",
    "(Tensor grad_output, Tensor conv, Tensor mapped, Tensor? norm_weight, Tensor? norm_bias, Tensor mean, "
    "Tensor rstd, Tensor? of_scale, Tensor? of_shift) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.convnet_block_curvature,
    fake=_curvature_fake,
    native_accepts=_native_accepts,
)
torch.library.register_autograd("ddfast::convnet_block", _gradient, setup_context=save, lib=LIBRARY)
torch.library.register_autograd(
    "ddfast::convnet_block_backward", _second_gradient, setup_context=save_backward, lib=LIBRARY
)
torch.library.register_vmap("ddfast::convnet_block", _vmap, lib=LIBRARY)
torch.library.register_vmap("ddfast::convnet_block_backward", _backward_vmap, lib=LIBRARY)
