"""The fused convolutions in plain PyTorch, a part of `ddfast.ops.reference`: winograd_conv2d and convnet_block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ddfast.ops.precision import accumulation_dtype

RECOMPUTED_INPUTS = 4
"""Input channels up to which the convolution costs less to compute again in the backward pass than to keep."""


def winograd_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    relu: bool,
    sets: Tensor | None = None,
    reads: Tensor | None = None,
) -> Tensor:
    """A 3x3 convolution, stride 1, padding 1, as A^T [(G g G^T) (B^T d B)] A over tiles of 2x2 outputs.

    It computes all of them, whatever `sets` and `reads` promise to be equal.
    """
    dtype, input = input.dtype, input.to(weight.dtype)
    batch, _, height, width = input.shape
    to_points = input.new_tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
    to_outputs = input.new_tensor([[1, 1, 1, 0], [0, 1, -1, -1]])
    padded = functional.pad(input, (1, 1 + width % 2, 1, 1 + height % 2))
    tiles = padded.unfold(2, 4, 2).unfold(3, 4, 2)  # [B, C, th, tw, 4, 4]
    points = torch.einsum("ai,ncyxij,bj->abncyx", to_points, tiles, to_points).flatten(0, 1)
    weight = weight.transpose(1, 2).flatten(2)  # [16, C, O]
    sums = torch.einsum("pncyx,pco->pnoyx", points, weight).unflatten(0, (4, 4))
    outputs = torch.einsum("ia,abnoyx,jb->noyixj", to_outputs, sums, to_outputs)
    result = outputs.reshape(batch, weight.shape[2], height + height % 2, width + width % 2)
    result = result[:, :, :height, :width]
    if bias is not None:
        result = result + bias[:, None, None]
    if other is not None:
        result = result + other
    result = result.relu() if relu else result
    return result.to(dtype).contiguous(memory_format=torch.channels_last)


def convnet_block(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pooled map, mean and 1 / deviation of each channel of each image, and the convolution where kept."""
    pooled, mean, rstd, conv = convnet_block_layers(input, weight, bias, norm_weight, norm_bias, eps)
    kept = _in_channels_last(conv) if keep else input.new_empty(0)
    return _in_channels_last(pooled), mean, rstd, kept


def convnet_block_layers(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `convnet_block` returns with the convolution, in any memory format; for every transform of PyTorch."""
    conv = functional.conv2d(input, weight, bias, padding=1)
    centred, mean, rstd = _instance_norm(conv, eps)
    return _pooled(centred, rstd, norm_weight, norm_bias).to(input.dtype), mean, rstd, conv


def _pooled(centred: Tensor, rstd: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> Tensor:
    shifted = _affine(centred * rstd[..., None, None], norm_weight, norm_bias)
    return functional.avg_pool2d(shifted.relu(), 2)


def convnet_block_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    conv: Tensor,
    eps: float,
    to_input: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, norm_weight and norm_bias; empty where the first two are not asked for."""
    if conv.ndim != 4:
        conv = functional.conv2d(input, weight, bias, padding=1)
    centred = conv.to(mean.dtype) - mean[..., None, None]
    grads = _convnet_block_gradients(
        grad_output, input, weight, norm_weight, norm_bias, centred, rstd, to_input, to_weight
    )
    return _asked_for(grads, input, weight, to_input, to_weight)


def _asked_for(
    grads: Sequence[Tensor], input: Tensor, weight: Tensor, to_input: bool, to_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_input = _in_channels_last(grads[0]) if to_input else input.new_empty(0)
    grad_weight = grads[1].contiguous() if to_weight else weight.new_empty(0)
    return grad_input, grad_weight, grads[2], grads[3]


def convnet_block_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    to_input: bool,
    to_weight: bool,
) -> tuple[Tensor, ...]:
    """What `convnet_block_backward` returns, as a function of its own arguments only, which can be differentiated."""
    centred, _, rstd = _instance_norm(functional.conv2d(input, weight, bias, padding=1), eps)
    return _convnet_block_gradients(
        grad_output, input, weight, norm_weight, norm_bias, centred, rstd, to_input, to_weight
    )


def _convnet_block_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    centred: Tensor,
    rstd: Tensor,
    to_input: bool,
    to_weight: bool,
    over: tuple[int, ...] = (2, 3),
) -> tuple[Tensor, ...]:
    """The backward pass from the centred convolution on; its statistics are those `over` these dimensions."""
    dtype, scale = centred.dtype, rstd[..., None, None]
    height, width = input.shape[2:]
    normalized = centred * scale
    spread = grad_output.to(dtype).repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    spread = functional.pad(spread, (0, width % 2, 0, height % 2))
    # As threshold_backward: where z is NaN the gradient passes.
    grad = spread.masked_fill(_affine(normalized, norm_weight, norm_bias) <= 0, 0)
    grad_beta, grad_gamma = grad.sum((0, 2, 3)), (grad * normalized).sum((0, 2, 3))
    inner = _affine(grad, norm_weight, None)
    slope = (inner * normalized).mean(over, keepdim=True)
    of_conv = (scale * (inner - inner.mean(over, keepdim=True) - slope * normalized)).to(input.dtype)
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        of_conv, input, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (to_input, to_weight, False)
    )
    return grad_input, grad_weight, grad_gamma.to(weight.dtype), grad_beta.to(weight.dtype)


def convnet_block_batch_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pooled map, mean and variance of each channel of the batch, and the convolution where it is kept."""
    conv = functional.conv2d(input, weight, bias, padding=1)
    centred, mean, variance = _batch_statistics(conv)
    pooled = _pooled(centred, (variance + eps).rsqrt(), norm_weight, norm_bias).to(input.dtype)
    kept = _in_channels_last(conv) if input.shape[1] > RECOMPUTED_INPUTS else input.new_empty(0)
    return _in_channels_last(pooled), mean, variance, kept


def convnet_block_batch_norm_eval(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> Tensor:
    """The pooled map, normalised by the mean and variance of each channel that are given."""
    wide = functional.conv2d(input, weight, bias, padding=1).to(accumulation_dtype(input.dtype))
    centred, rstd = wide - mean.to(wide.dtype)[:, None, None], (variance.to(wide.dtype) + eps).rsqrt()
    return _in_channels_last(_pooled(centred, rstd, norm_weight, norm_bias).to(input.dtype))


def convnet_block_batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    conv: Tensor,
    eps: float,
    to_input: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, norm_weight and norm_bias; empty where the first two are not asked for."""
    if conv.ndim != 4:
        conv = functional.conv2d(input, weight, bias, padding=1)
    centred, rstd = conv.to(mean.dtype) - mean[:, None, None], (variance + eps).rsqrt()
    grads = _convnet_block_gradients(
        grad_output, input, weight, norm_weight, norm_bias, centred, rstd, to_input, to_weight, (0, 2, 3)
    )
    return _asked_for(grads, input, weight, to_input, to_weight)


def convnet_block_batch_norm_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    to_input: bool,
    to_weight: bool,
) -> tuple[Tensor, ...]:
    """What `convnet_block_batch_norm_backward` returns, as a function of its own arguments only."""
    centred, _, variance = _batch_statistics(functional.conv2d(input, weight, bias, padding=1))
    rstd = (variance + eps).rsqrt()
    return _convnet_block_gradients(
        grad_output, input, weight, norm_weight, norm_bias, centred, rstd, to_input, to_weight, (0, 2, 3)
    )


def convnet_block_second_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    conv: Tensor,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients at grad_output, input, weight and norm_weight of <grads, what convnet_block_backward returns>.

    Convolutions around `convnet_block_curvature`: the given gradients are mapped as the input is, and what comes of the
    full-size maps goes back to the input and to the weight.
    """
    of_input, of_weight, of_scale, of_shift = grads
    mapped = torch.zeros_like(conv)
    if of_input is not None:
        mapped = functional.conv2d(of_input, weight, padding=1)
    if of_weight is not None:
        other = functional.conv2d(input, of_weight, padding=1)
        mapped = other if of_input is None else mapped + other
    of_conv, at_conv, at_grad_output, at_scale = torch.ops.ddfast.convnet_block_curvature(
        grad_output, conv, mapped, norm_weight, norm_bias, mean, rstd, of_scale, of_shift
    )
    found: list[Tensor | None] = [at_grad_output if needs[0] else None, None, None, None]
    shape = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    backward = torch.ops.aten.convolution_backward
    if needs[1] or needs[2]:
        mask = (needs[1], needs[2], False)
        found[1:3] = backward(at_conv, input, weight, None, *shape, mask)[:2]
        mask = (needs[1] and of_weight is not None, needs[2] and of_input is not None, False)
        more = backward(
            of_conv,
            input if of_input is None else of_input,
            weight if of_weight is None else of_weight,
            None,
            *shape,
            mask,
        )
        found[1:3] = [
            one + other if also else one for one, other, also in zip(found[1:3], more, mask, strict=False)
        ]
    if needs[3]:
        found[3] = at_scale.sum(0).to(weight.dtype)
    return found[0], found[1], found[2], found[3]


def convnet_block_curvature(
    grad_output: Tensor,
    conv: Tensor,
    mapped: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    of_scale: Tensor | None,
    of_shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the second derivative of convnet_block takes from the full-size maps.

    With r = rstd, x the normalised convolution, E the mean over a plane and P f = f - E f - x E[x f], the backward
    pass is d = r P a for a = norm_weight * dz. With v the mapped gradients, u that of norm_weight and
    h = u dz - r (v E[a x] + a E[v x]), the gradient at the convolution is r (P h - x r E[v P a]).

    Args:
        grad_output: [B, O, H // 2, W // 2], the gradient at the block's output.
        conv: [B, O, H, W], the convolution.
        mapped: [B, O, H, W], v.
        norm_weight, norm_bias: [O] or None.
        mean, rstd: [B, O], of the planes of `conv`, in the dtype of sums.
        of_scale, of_shift: [O] or None, the gradients of those of norm_weight and norm_bias.

    Returns:
        d and the gradient at the convolution, as `conv`; the gradient at grad_output, as that; the gradient at
        norm_weight by image, [B, O] in the dtype of sums.
    """
    dtype, scale = mean.dtype, rstd[..., None, None]
    height, width = conv.shape[2:]
    mapped = mapped.to(dtype)

    def average(planes: Tensor) -> Tensor:
        return planes.mean((2, 3), keepdim=True)

    normalized = (conv.to(dtype) - mean[..., None, None]) * scale

    def project(planes: Tensor) -> Tensor:
        return planes - average(planes) - normalized * average(planes * normalized)

    passed = _affine(normalized, norm_weight, norm_bias) > 0
    spread = grad_output.to(dtype).repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    dz = functional.pad(spread, (0, width % 2, 0, height % 2)) * passed
    inner = _affine(dz, norm_weight, None)
    projected = project(inner)
    of_conv = (scale * projected).to(conv.dtype)
    at_inner = scale * project(mapped)
    at_normalized = -scale * (mapped * average(inner * normalized) + inner * average(mapped * normalized))
    at_dz = _affine(at_inner, norm_weight, None)
    if of_scale is not None:
        factor = of_scale.to(dtype)[:, None, None]
        at_normalized, at_dz = at_normalized + factor * dz, at_dz + factor * normalized
    if of_shift is not None:
        at_dz = at_dz + of_shift.to(dtype)[:, None, None]
    at_conv = scale * (project(at_normalized) - normalized * scale * average(mapped * projected))
    at_grad_output = functional.avg_pool2d(at_dz * passed, 2).to(grad_output.dtype)
    return (
        _in_channels_last(of_conv),
        _in_channels_last(at_conv.to(conv.dtype)),
        _in_channels_last(at_grad_output),
        (dz * at_inner).sum((2, 3)),
    )


def _instance_norm(conv: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The map less its mean over each plane, that mean, and 1 / deviation, in the dtype of sums."""
    wide = conv.to(accumulation_dtype(conv.dtype))
    mean = wide.mean((2, 3))
    centred = wide - mean[..., None, None]
    return centred, mean, (centred.square().mean((2, 3)) + eps).rsqrt()


def _batch_statistics(conv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The map less its mean over the batch's planes of a channel, that mean, and the variance, in the dtype of sums."""
    wide = conv.to(accumulation_dtype(conv.dtype))
    mean = wide.mean((0, 2, 3))
    centred = wide - mean[:, None, None]
    return centred, mean, centred.square().mean((0, 2, 3))


def _affine(planes: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Planes [B, C, H, W] times weight [C] plus bias [C], in the dtype of the planes."""
    if weight is not None:
        planes = planes * weight.to(planes.dtype)[:, None, None]
    return planes if bias is None else planes + bias.to(planes.dtype)[:, None, None]


def _in_channels_last(tensor: Tensor) -> Tensor:
    """The tensor in channels-last memory, with the strides of a new one where a dimension of size 1 leaves a choice."""
    memory = torch.empty_strided(
        tensor.shape, channels_last_strides(tensor.shape), dtype=tensor.dtype, device=tensor.device
    )
    return tensor if tensor.stride() == memory.stride() else memory.copy_(tensor)


def channels_last_strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Strides of a dense [B, C, H, W] tensor whose channels lie side by side."""
    _, channels, height, width = shape
    return height * width * channels, 1, width * channels, channels
