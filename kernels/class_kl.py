"""Divergence of features from their class's mean, and its gradient: one program a class, one launch in all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ddfast.kernels.launching import Allocation, Launch, Run, prepared

from ddfast.ops import reference

WIDEST = 8192  # features that a program holds in registers; wider ones take the reference
HELD = 4096  # numbers of a step: so many rows of fewer features side by side
SCANNED = 4  # rows, or classes, that a thread looks at in one step


@triton.jit
def _log_softmax(features, rows, there, column, width, SUM: tl.constexpr):
    """Rows [R, BLOCK] of log P; minus infinity behind the last feature, and uniform where no row is there."""
    inside = there[:, None] & (column < width)[None, :]
    z = tl.load(features + rows[:, None] * width + column[None, :], mask=inside, other=0).to(SUM)
    z = tl.where((column < width)[None, :], z, -float("inf"))
    z -= tl.max(z, 1)[:, None]
    return z - tl.log(tl.sum(tl.exp(z), 1))[:, None]


@triton.jit
def _class_kl(
    features,
    members,
    counts,
    order,
    divergences,
    gradient,
    rows,
    classes,
    width,
    BY_CLASS: tl.constexpr,
    LOWEST: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """One class's rows, gathered in `order` behind those of the classes before it, then gone over twice: for the
    class's mean, and for what hangs on it.

    Bytes moved: features read twice, the second time mostly from the cache, the gradient written once; 8 a row and
    class of `members`, from L2. Operations: two exponentials a feature and pass. With few classes the latency of their
    steps of ROWS rows, one after another, binds.
    """
    program = tl.program_id(0).to(tl.int64)
    scanned = tl.arange(0, SCAN)
    before, present = tl.zeros([SCAN], tl.int64), tl.zeros([SCAN], tl.int64)
    for first in range(0, classes, SCAN):
        each = tl.load(counts + first + scanned, mask=first + scanned < classes, other=0)
        before += tl.where(first + scanned < program, each, 0)
        present += (each > 0).to(tl.int64)
    start = tl.sum(before, 0)
    place = start
    for first in range(0, rows, SCAN):
        row = first + scanned
        mine = tl.load(members + row, mask=row < rows, other=-1) == program
        tl.store(order + place + tl.cumsum(mine.to(tl.int32), 0) - 1, row.to(tl.int64), mask=mine)
        place += tl.sum(mine.to(tl.int32), 0)
    tl.debug_barrier()  # what one thread has stored, others load

    count = tl.load(counts + program)
    share = (count * tl.sum(present, 0) if BY_CLASS else tl.cast(rows, tl.int64)).to(SUM)
    column = tl.arange(0, BLOCK)
    step = tl.arange(0, ROWS)
    top = tl.full([BLOCK], LOWEST, SUM)
    sums = tl.zeros([BLOCK], SUM)
    for first in range(0, count, ROWS):
        there = first + step < count
        row = tl.load(order + start + first + step, mask=there, other=0)
        log_p = _log_softmax(features, row, there, column, width, SUM)
        log_p = tl.where(there[:, None], log_p, -float("inf"))
        higher = tl.maximum(top, tl.max(log_p, 0))
        sums = sums * tl.exp(top - higher) + tl.sum(tl.exp(log_p - higher[None, :]), 0)
        top = higher
    log_q = (top + tl.log(sums) - tl.log(count.to(SUM)))[None, :]
    for first in range(0, count, ROWS):
        there = first + step < count
        row = tl.load(order + start + first + step, mask=there, other=0)
        log_p = _log_softmax(features, row, there, column, width, SUM)
        p = tl.exp(log_p)
        excess = tl.where(log_p == -float("inf"), 0.0, log_p - log_q)
        divergence = tl.sum(p * excess, 1)
        tl.store(divergences + row, divergence / share, mask=there)
        grad = p * (excess - divergence[:, None]) / share
        at = gradient + row[:, None] * width + column[None, :]
        inside = there[:, None] & (column < width)[None, :]
        tl.store(at, grad.to(gradient.dtype.element_ty), mask=inside)


@prepared
def class_kl(features: torch.Tensor, members: torch.Tensor, counts: torch.Tensor, by_class: bool) -> Run:
    """Launch the kernel; arguments and result are those of the op `ddfast::class_kl`."""
    (rows, width), classes = features.shape, len(counts)
    if width > WIDEST:
        return reference.class_kl
    dtype = reference.accumulation_dtype(features.dtype)
    block = triton.next_power_of_2(width)
    at_once = min(max(HELD // block, 1), 16, triton.next_power_of_2(rows))
    warps = min(max(at_once * block // 512, 1), 16)
    launch = Launch(
        _class_kl,
        (classes,),
        (rows, classes, width),
        BY_CLASS=by_class,
        LOWEST=torch.finfo(dtype).min,
        SUM=tl.float64 if dtype == torch.float64 else tl.float32,
        ROWS=at_once,
        BLOCK=block,
        SCAN=min(32 * warps * SCANNED, triton.next_power_of_2(max(rows, classes))),
        num_warps=warps,
    )
    gradients = Allocation((rows, width), features.dtype, features.device)
    shares = Allocation((rows,), dtype, features.device)
    places = Allocation((rows,), torch.int64, features.device)

    def run(
        features: torch.Tensor, members: torch.Tensor, counts: torch.Tensor, by_class: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gradient, divergences = gradients(), shares()
        launch(
            features.contiguous(), members.contiguous(), counts.contiguous(), places(), divergences, gradient
        )
        return divergences.sum(), gradient

    return run
