"""The backward pass of a normalisation and the squared norms of its per-sample parameter gradients, in one read.

With fixed statistics (BatchNorm in eval mode) a single launch reads the input and the gradient once, adds up each
channel of each sample and writes the gradient at the input. With the sample's own statistics (GroupNorm) that gradient
needs the sums first: one launch adds up, a second one reads both again and writes. A channel's positions are divided
among programs, whose parts are added up in a fixed order: the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from ddfast.kernels.launching import Allocation, Launch, Run, channels_last, prepared

PROGRAMS = 1024  # a few waves on the largest GPUs; positions are divided until there are so many


@triton.jit
def _pass(
    input,
    grad_output,
    grad_input,
    sums,
    mean,
    rstd,
    weight,
    means_at,
    channels,
    positions,
    split,
    splits,
    groups,
    width,
    strides,
    OF_SAMPLE: tl.constexpr,
    SUMS: tl.constexpr,
    WRITE: tl.constexpr,
    BY_POSITION: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A program goes over `split` positions of BLOCK_C channels of one sample.

    SUMS: it stores the sums of g and of g * normalised, where normalised = (x - mean) * rstd. WRITE: it stores the
    gradient at the input, rstd * (weight * g), where OF_SAMPLE with the two `means` of the group subtracted inside the
    brackets, the second one times normalised. Threads go along positions where these lie side by side (BY_POSITION),
    else along channels.

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
    statistic = c
    if OF_SAMPLE:
        statistic = sample * groups + c // width
    centre = tl.load(mean + statistic, mask=c < channels, other=0).to(SUM)
    spread = tl.load(rstd + statistic, mask=c < channels, other=0).to(SUM)
    if WRITE:
        factor = spread
        if weight is not None:
            factor *= tl.load(weight + c, mask=c < channels, other=0).to(SUM)
        if OF_SAMPLE:
            means = sums + means_at
            level = spread * tl.load(means + 2 * statistic, mask=c < channels, other=0)
            tilt = spread * tl.load(means + 2 * statistic + 1, mask=c < channels, other=0)
    at = sample * strides[0] + c * strides[1]
    end = tl.minimum((part + 1) * split, positions)
    for start in range(part * split, end, BLOCK_P):
        p = start + step
        inside = (c < channels) & (p < end)
        x = tl.load(input + at + p * strides[2], mask=inside, other=0).to(SUM)
        g = tl.load(grad_output + at + p * strides[2], mask=inside, other=0).to(SUM)
        normalized = (x - centre) * spread
        if SUMS:
            grad_sum += g
            product_sum += g * normalized
        if WRITE:
            out = factor * g
            if OF_SAMPLE:
                out -= level + tilt * normalized
            tl.store(grad_input + at + p * strides[2], out.to(grad_input.dtype.element_ty), mask=inside)
    if SUMS:
        at = sums + ((sample * splits + part) * 2) * channels + channel
        axis: tl.constexpr = 1 if BY_POSITION else 0
        tl.store(at, tl.sum(grad_sum, axis), mask=channel < channels)
        tl.store(at + channels, tl.sum(product_sum, axis), mask=channel < channels)


@triton.jit
def _finish(
    sums,
    weight,
    norms,
    means_at,
    channels,
    positions,
    splits,
    groups,
    width,
    MEANS: tl.constexpr,
    WEIGHT_NORM: tl.constexpr,
    BIAS_NORM: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """A program adds up the parts of one sample's sums: the squared norm and, MEANS, what each group subtracts.

    Bytes moved: the sums read once, from L2. Operations: three a sum. Launch latency binds.
    """
    sample = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK_G, BLOCK_W], SUM)
    for first_group in range(0, groups, BLOCK_G):
        group = first_group + tl.arange(0, BLOCK_G)
        grad_mean = tl.zeros([BLOCK_G, BLOCK_W], SUM)
        product_mean = tl.zeros([BLOCK_G, BLOCK_W], SUM)
        for first in range(0, width, BLOCK_W):
            within = first + tl.arange(0, BLOCK_W)
            c = group[:, None] * width + within[None, :]
            inside = (group < groups)[:, None] & (within < width)[None, :]
            grads = tl.zeros([BLOCK_G, BLOCK_W], SUM)
            products = tl.zeros([BLOCK_G, BLOCK_W], SUM)
            at = sums + sample * splits * 2 * channels + c
            for _ in range(splits):
                grads += tl.load(at, mask=inside, other=0)
                products += tl.load(at + channels, mask=inside, other=0)
                at += 2 * channels
            if WEIGHT_NORM:
                squares += products * products
            if BIAS_NORM:
                squares += grads * grads
            if MEANS:
                if weight is not None:
                    factor = tl.load(weight + c, mask=inside, other=0).to(SUM)
                    grads *= factor
                    products *= factor
                grad_mean += grads
                product_mean += products
        if MEANS:
            count = width * positions
            at = sums + means_at + 2 * (sample * groups + group)
            tl.store(at, tl.sum(grad_mean, 1) / count, mask=group < groups)
            tl.store(at + 1, tl.sum(product_mean, 1) / count, mask=group < groups)
    tl.store(norms + sample, tl.sum(tl.sum(squares, 1), 0))


@prepared
def normalization_backward(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    weight_norm: bool,
    bias_norm: bool,
) -> Run:
    """Launch the kernels; arguments and results are those of the op `ddfast::normalization_backward`."""
    samples, channels = input.shape[:2]
    device, double = input.device, grad_output.dtype == torch.float64
    dtype, tl_dtype = (torch.float64, tl.float64) if double else (torch.float32, tl.float32)
    of_sample = mean.ndim == 2
    last = input.ndim == 4 and not input.is_contiguous()
    last = last and input.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    new_grad = Allocation(
        input.shape, grad_output.dtype, device, channels_last(input.shape) if last else None
    )
    new_norms = Allocation((samples,), dtype, device)
    if input.numel() == 0:
        return lambda *_: (new_grad(), new_norms().zero_())
    positions = input[0, 0].numel()
    if channels * positions >= 2**31:
        shape = [channels, positions]
        raise ValueError(f"a sample must have fewer than 2^31 elements, got {shape}")
    # Sample, channel and position.
    strides = (channels * positions, 1, channels) if last else (channels * positions, positions, 1)

    groups = mean.shape[1] if of_sample else 1
    by_position = not last
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
    means_at = samples * splits * 2 * channels  # behind the sums
    new_sums = Allocation((means_at + (samples * groups * 2 if of_sample else 0),), dtype, device)
    width = channels // groups

    def over_positions(*, add: bool, write: bool) -> Launch:
        return Launch(
            _pass,
            (programs * splits,),
            (means_at, channels, positions, split, splits, groups, width, strides),
            OF_SAMPLE=of_sample,
            SUMS=add,
            WRITE=write,
            BY_POSITION=by_position,
            SUM=tl_dtype,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            num_warps=4,
        )

    block_w = min(1024, triton.next_power_of_2(width))
    add, write = over_positions(add=True, write=not of_sample), over_positions(add=False, write=True)
    finish = Launch(
        _finish,
        (samples,),
        (means_at, channels, positions, splits, groups, width),
        MEANS=of_sample,
        WEIGHT_NORM=weight_norm,
        BIAS_NORM=bias_norm,
        SUM=tl_dtype,
        BLOCK_G=min(triton.next_power_of_2(groups), 1024 // block_w),
        BLOCK_W=block_w,
        num_warps=4,
    )

    def run(
        input: torch.Tensor,
        grad_output: torch.Tensor,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        weight: torch.Tensor | None,
        *_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad_input, norms, sums = new_grad(), new_norms(), new_sums()
        if weight is not None:
            weight = weight.contiguous()
        tensors = (
            input.contiguous(memory_format=layout),
            grad_output.contiguous(memory_format=layout),
            grad_input,
            sums,
            mean.contiguous(),
            rstd.contiguous(),
            weight,
        )
        add(*tensors)
        finish(sums, weight, norms)
        if of_sample:  # the statistics depend on the input too
            write(*tensors)
        return grad_input, norms

    return run
