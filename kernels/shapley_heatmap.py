"""From the model's outputs under all coalitions to Shapley values: gather or softmax, then the projection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ddfast.kernels.launching import Allocation, Launch, Run, prepared

COALITIONS = 16  # coalitions whose values a program computes at a time
CLASSES = 256  # at most so many classes of each at a time


@triton.jit
def _exponential_ratio(exponent, total):
    """exp(exponent) / total, with IEEE division."""
    if total.dtype == tl.float64:
        ratio = tl.exp(exponent) / total
    else:
        ratio = tl.div_rn(tl.exp(exponent), total)
    return ratio


@triton.jit
def _values(
    logits,
    label,
    known,
    classes: tl.constexpr,
    VALUE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values of the coalitions whose rows of logits start at the pointers `logits`; 0 where not `known`.

    Two walks over the classes, the first for the largest logit and the second, from L1, for the sum: a sum
    that is rescaled as it goes would turn a leading run of -inf into NaN. A walk keeps a tile of partial
    results in registers and reduces it across threads once, at its end.
    """
    labels = tl.zeros(logits.shape, tl.int64) + label
    labelled = known & (labels >= 0) & (labels < classes)
    target = tl.load(logits + labels, mask=labelled, other=float("nan")).to(COMPUTE)
    if VALUE != "logit":
        shape: tl.constexpr = [logits.shape[0], BLOCK]
        largest_tile = tl.full(shape, float("-inf"), COMPUTE)
        for first in range(0, classes, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = known[:, None] & (column < classes)[None, :]
            tile = tl.load(logits[:, None] + column[None, :], mask=inside, other=float("-inf")).to(COMPUTE)
            largest_tile = tl.maximum(largest_tile, tile)
        largest = tl.max(largest_tile, 1)
        total_tile = tl.zeros(shape, COMPUTE)
        for first in range(0, classes, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = known[:, None] & (column < classes)[None, :]
            tile = tl.load(logits[:, None] + column[None, :], mask=inside, other=float("-inf")).to(COMPUTE)
            total_tile += tl.exp(tile - largest[:, None])
        total = tl.sum(total_tile, 1)
        if VALUE == "prob":
            target = _exponential_ratio(target - largest, total)
        else:
            target = target - largest - tl.log(total)
    return tl.where(known, target, 0.0)


@triton.jit
def _heatmap(
    outputs,
    label,
    projection,
    count,
    players,
    CLASS_COUNT: tl.constexpr,
    VALUE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """phi [BLOCK_D] of one image, 0 beyond `players`: values of BLOCK_K coalitions in parallel, then their
    share of phi in order.

    The projection is not a matrix product: sums run over k in ascending order, in float64, where the product
    of two float32 is exact, so that phi has the bits of the reference whatever is fused.
    """
    player = tl.arange(0, BLOCK_D)
    weights = projection + player
    total = tl.zeros([BLOCK_D], tl.float64)
    lane = tl.arange(0, BLOCK_K)
    for start in range(0, count, BLOCK_K):
        logits = outputs + (start + lane).to(tl.int64) * CLASS_COUNT
        values = _values(logits, label, start + lane < count, CLASS_COUNT, VALUE, COMPUTE, BLOCK_C)
        for k in tl.static_range(BLOCK_K):
            value = tl.gather(values, tl.full([BLOCK_D], k, tl.int32), 0).to(tl.float64)
            known = player < tl.where(start + k < count, players, 0)
            total += tl.load(weights, mask=known, other=0.0).to(tl.float64) * value
            weights += players
    return total.to(COMPUTE)


@triton.jit
def _shapley_heatmap(
    outputs,
    labels,
    projection,
    phi,
    count,
    players,
    projection_image_stride,
    CLASS_COUNT: tl.constexpr,
    VALUE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program an image.

    Bytes moved an image: K C e read for a softmax (e bytes a logit), or K sectors of 32 bytes for plain
    logits, and K d 4 of the projection, which all images share in L2. Operations: two exponentials and about
    six others a logit, 2 K d in float64 for the projection. For a softmax the reads bind; for logits the
    latency of the launch.

    The number of classes is a constant, because Triton sees the alignment of rows only in a divisor it knows:
    1000 is a multiple of 8, and not of the 16 it looks for in a variable.
    """
    image = tl.program_id(0).to(tl.int64)
    player = tl.arange(0, BLOCK_D)
    cells = _heatmap(
        outputs + image * count * CLASS_COUNT,
        tl.load(labels + image),
        projection + image * projection_image_stride,
        count,
        players,
        CLASS_COUNT,
        VALUE,
        COMPUTE,
        BLOCK_K,
        BLOCK_C,
        BLOCK_D,
    )
    tl.store(phi + image * players + player, cells, mask=player < players)


@prepared
def shapley_heatmap(outputs: torch.Tensor, labels: torch.Tensor, projection: torch.Tensor, value: str) -> Run:
    """Launch the kernel; arguments and result are those of the op `ddfast::shapley_heatmap`."""
    batch, count, classes = outputs.shape
    players = projection.shape[-1]
    double = outputs.dtype == torch.float64
    empty = Allocation((batch, players), torch.float64 if double else torch.float32, outputs.device)
    if batch * players == 0:
        return lambda *_: empty()
    launch = Launch(
        _shapley_heatmap,
        (batch,),
        (count, players, count * players if projection.ndim == 3 else 0),
        CLASS_COUNT=classes,
        VALUE=value,
        COMPUTE=tl.float64 if double else tl.float32,
        BLOCK_K=COALITIONS,
        BLOCK_C=min(CLASSES, triton.next_power_of_2(max(classes, 1))),
        BLOCK_D=triton.next_power_of_2(players),
        num_warps=4,
        enable_fp_fusion=False,
    )

    def run(
        outputs: torch.Tensor, labels: torch.Tensor, projection: torch.Tensor, value: str
    ) -> torch.Tensor:
        phi = empty()
        launch(outputs.contiguous(), labels.contiguous(), projection.contiguous(), phi)
        return phi

    return run
