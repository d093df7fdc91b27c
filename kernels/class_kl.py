"""Divergence of features from their class's mean, and its gradient: one program a class, one launch in all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ddfast.kernels.launching import Allocation, Launch, Run, prepared

from ddfast.ops import reference

WIDEST = 8192  # features that a program holds in registers; wider ones take the reference


@triton.jit
def _log_softmax(features, row, column, width, SUM: tl.constexpr):
    z = tl.load(features + row * width + column, mask=column < width, other=-float("inf")).to(SUM)
    top = tl.max(z, 0)
    return z - top - tl.log(tl.sum(tl.exp(z - top), 0))


@triton.jit
def _class_kl(
    features,
    order,
    starts,
    counts,
    weights,
    divergences,
    gradient,
    width,
    LOWEST: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows order[start : start + count] of one class, twice: for the class's mean, then for what hangs on it.

    Bytes moved: features read twice, the second time mostly from the cache, the gradient written once. Operations:
    two exponentials a feature and pass. With few classes the latency of their rows, one after another, binds.
    """
    program = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + program)
    count = tl.load(counts + program)
    weight = tl.load(weights + program)
    column = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, SUM)
    sums = tl.zeros([BLOCK], SUM)
    for k in range(start, start + count):
        log_p = _log_softmax(features, tl.load(order + k), column, width, SUM)
        higher = tl.maximum(top, log_p)
        sums = sums * tl.exp(top - higher) + tl.exp(log_p - higher)
        top = higher
    log_q = top + tl.log(sums) - tl.log(count.to(SUM))
    for k in range(start, start + count):
        row = tl.load(order + k)
        log_p = _log_softmax(features, row, column, width, SUM)
        p = tl.exp(log_p)
        excess = tl.where(log_p == -float("inf"), 0.0, log_p - log_q)
        divergence = tl.sum(p * excess, 0)
        tl.store(divergences + row, divergence * weight)
        grad = p * (excess - divergence) * weight
        tl.store(gradient + row * width + column, grad.to(gradient.dtype.element_ty), mask=column < width)


@prepared
def class_kl(features: torch.Tensor, members: torch.Tensor, counts: torch.Tensor, by_class: bool) -> Run:
    """Launch the kernel; arguments and results are those of the op `ddfast::class_kl`."""
    (rows, width), classes = features.shape, len(counts)
    if width > WIDEST:
        return reference.class_kl
    dtype = reference.accumulation_dtype(features.dtype)
    launch = Launch(
        _class_kl,
        (classes,),
        (width,),
        LOWEST=torch.finfo(dtype).min,
        SUM=tl.float64 if dtype == torch.float64 else tl.float32,
        BLOCK=triton.next_power_of_2(width),
        num_warps=min(max(triton.next_power_of_2(width) // 256, 1), 16),
    )
    gradients = Allocation((rows, width), features.dtype, features.device)
    shares = Allocation((rows,), dtype, features.device)

    def run(
        features: torch.Tensor, members: torch.Tensor, counts: torch.Tensor, by_class: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gradient, divergences = gradients(), shares()
        share = 1 / counts.to(dtype) / classes if by_class else torch.full_like(counts, 1 / rows, dtype=dtype)
        launch(
            features.contiguous(),
            members.argsort(stable=True),
            counts.cumsum(0) - counts,
            counts.contiguous(),
            share.contiguous(),
            divergences,
            gradient,
        )
        return divergences.sum(), gradient

    return run
