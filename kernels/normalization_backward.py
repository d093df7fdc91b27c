"""The backward pass of a normalisation and the squared norms of its per-sample parameter gradients, in one read.

With fixed statistics (BatchNorm in eval mode) a single launch reads the input and the gradient once, adds up each
channel of each sample and writes the gradient at the input. With the sample's own statistics (GroupNorm) that gradient
needs the sums first: one launch adds up, a second one reads both again and writes. A channel's positions are divided
among programs, whose parts are added up in a fixed order: the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS = 1024  # a few waves on the largest GPUs; positions are divided until there are so many


@triton.jit
def _pass(
    input,
    grad_output,
    grad_input,
    sums,
    mean,
    rstd,
    scale,
    offset,
    slope,
    channels,
    positions,
    split,
    splits,
    statistic_stride,
    x_strides,
    grad_strides,
    out_strides,
    SUMS: tl.constexpr,
    WRITE: tl.constexpr,
    OF_SAMPLE: tl.constexpr,
    BY_POSITION: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A program goes over `split` positions of BLOCK_C channels of one sample.

    SUMS: it stores the sums of g and of g * normalised, where normalised = (x - mean) * rstd. WRITE: it stores the
    gradient at the input, scale * g, less offset + slope * normalised where OF_SAMPLE. Threads go along positions
    where these lie side by side (BY_POSITION), else along channels.

    Bytes moved: x and g read once, the gradient written once, 12 an element of float32. Operations: about seven an
    element. The memory binds.
    """
    program = tl.program_id(0).to(tl.int64)
    part = (program % splits).to(tl.int32)
    blocks = tl.cdiv(channels, BLOCK_C)
    channel = (program // splits % blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    sample = program // splits // blocks
    if BY_POSITION:
        c = channel[:, None]
        step = tl.arange(0, BLOCK_P)[None, :]
        grad_sum = tl.zeros([BLOCK_C, BLOCK_P], SUM)
        product_sum = tl.zeros([BLOCK_C, BLOCK_P], SUM)
    else:
        c = channel[None, :]
        step = tl.arange(0, BLOCK_P)[:, None]
        grad_sum = tl.zeros([BLOCK_P, BLOCK_C], SUM)
        product_sum = tl.zeros([BLOCK_P, BLOCK_C], SUM)
    statistic = sample * statistic_stride + c
    centre = tl.load(mean + statistic, mask=c < channels, other=0)
    spread = tl.load(rstd + statistic, mask=c < channels, other=0)
    if WRITE:
        factor = tl.load(scale + statistic, mask=c < channels, other=0)
        if OF_SAMPLE:
            level = tl.load(offset + statistic, mask=c < channels, other=0)
            tilt = tl.load(slope + statistic, mask=c < channels, other=0)
    x_at = input + sample * x_strides[0] + c * x_strides[1]
    grad_at = grad_output + sample * grad_strides[0] + c * grad_strides[1]
    out_at = grad_input + sample * out_strides[0] + c * out_strides[1]
    end = tl.minimum((part + 1) * split, positions)
    for start in range(part * split, end, BLOCK_P):
        p = start + step
        inside = (c < channels) & (p < end)
        x = tl.load(x_at + p * x_strides[2], mask=inside, other=0).to(SUM)
        g = tl.load(grad_at + p * grad_strides[2], mask=inside, other=0).to(SUM)
        normalized = (x - centre) * spread
        if SUMS:
            grad_sum += g
            product_sum += g * normalized
        if WRITE:
            out = factor * g
            if OF_SAMPLE:
                out -= level + tilt * normalized
            tl.store(out_at + p * out_strides[2], out.to(grad_input.dtype.element_ty), mask=inside)
    if SUMS:
        at = sums + ((sample * splits + part) * 2) * channels + channel
        axis: tl.constexpr = 1 if BY_POSITION else 0
        tl.store(at, tl.sum(grad_sum, axis), mask=channel < channels)
        tl.store(at + channels, tl.sum(product_sum, axis), mask=channel < channels)


def normalization_backward(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    weight_norm: bool,
    bias_norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; arguments and results are those of the op `ddfast::normalization_backward`."""
    samples, channels = input.shape[:2]
    dtype = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    of_sample = mean.ndim == 2
    last = input.ndim == 4 and not input.is_contiguous()
    last = last and input.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    input, grad_output = (tensor.contiguous(memory_format=layout) for tensor in (input, grad_output))
    grad_input = torch.empty_like(input, dtype=grad_output.dtype)
    if input.numel() == 0:
        return grad_input, torch.zeros(samples, dtype=dtype, device=input.device)
    x, g, out = (tensor[..., None].flatten(2) for tensor in (input, grad_output, grad_input))
    positions = x.shape[2]
    for tensor in (x, g):
        if tensor[0].numel() >= 2**31:
            raise ValueError(f"a sample must have fewer than 2^31 elements, got {list(tensor.shape[1:])}")

    mean, rstd = mean.to(dtype), rstd.to(dtype)
    groups = mean.shape[-1]
    if of_sample:
        mean, rstd = (s.repeat_interleave(channels // groups, 1) for s in (mean, rstd))
    mean, rstd = mean.contiguous(), rstd.contiguous()
    scale = rstd if weight is None else rstd * weight.to(dtype)
    by_position = x.stride(2) == 1 and (positions > 1 or not last)
    if by_position:
        block_p = min(1024, triton.next_power_of_2(positions))
        block_c = min(triton.next_power_of_2(channels), 1024 // block_p)
    else:
        block_c = min(64, triton.next_power_of_2(channels))
        block_p = min(triton.next_power_of_2(positions), 1024 // block_c)
    programs = samples * triton.cdiv(channels, block_c)
    splits = min(triton.cdiv(positions, block_p), triton.cdiv(PROGRAMS, programs))
    split = triton.cdiv(triton.cdiv(positions, splits), block_p) * block_p
    splits = triton.cdiv(positions, split)
    sums = torch.empty((samples, splits, 2, channels), dtype=dtype, device=x.device)

    def launch(offset: torch.Tensor, slope: torch.Tensor, *, add: bool, write: bool) -> None:
        _pass[(programs * splits,)](
            x,
            g,
            out,
            sums,
            mean,
            rstd,
            scale,
            offset,
            slope,
            channels,
            positions,
            split,
            splits,
            channels if of_sample else 0,
            x.stride(),
            g.stride(),
            out.stride(),
            SUMS=add,
            WRITE=write,
            OF_SAMPLE=of_sample,
            BY_POSITION=by_position,
            SUM=tl.float64 if dtype == torch.float64 else tl.float32,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            num_warps=4,
        )

    launch(scale, scale, add=True, write=not of_sample)
    grads, products = sums.sum(1).unbind(1)  # [B, channels]
    norms = grads.new_zeros(samples)
    if weight_norm:
        norms += products.square().sum(1)
    if bias_norm:
        norms += grads.square().sum(1)
    if of_sample:  # the statistics depend on the input too
        width = channels // groups
        means = (
            (s if weight is None else s * weight.to(dtype)).unflatten(1, (groups, width)).sum(2)
            / (width * positions)
            for s in (grads, products)
        )
        offset, slope = (s.repeat_interleave(width, 1) * rstd for s in means)
        launch(offset, slope, add=False, write=True)
    return grad_input, norms
