"""From a heatmap to crop boxes: pool, add scaled normal noise, take the largest window, centre a box on
it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from ddfast.kernels.launching import Allocation, Launch, Run, prepared

LANES = 1024  # (crop, window) pairs whose noise a program draws at a time


@triton.jit
def _window_sums(cells, place, inside, pool, cols):
    """Sum of the pool x pool window at each place of the lanes, added row by row; `cells` is the heatmap."""
    across = cols - pool + 1
    corner = place // across * cols + place % across
    sums = tl.zeros(place.shape, tl.float32)
    for row in range(pool):
        for col in range(pool):
            sums += tl.gather(cells, tl.where(inside, corner + row * cols + col, 0), 0)
    return sums


@triton.jit
def _sum_in_order(values, count):
    """values[0] + values[1] + ... + values[count - 1], added from the left, in every lane."""
    total = tl.zeros(values.shape, tl.float32)
    for index in range(count):
        total += tl.gather(values, tl.full(values.shape, index, tl.int32), 0)
    return total


@triton.jit
def _crop_start(first_part, pool, parts, length, crop):
    """First pixel, along one axis, of a crop centred on the window of `pool` parts and kept in the image."""
    start = (first_part.to(tl.int64) * length // parts).to(tl.int32)
    end = ((first_part + pool).to(tl.int64) * length // parts).to(tl.int32)
    return tl.minimum(tl.maximum((start + end - crop) // 2, 0), length - crop)


@triton.jit
def _window(
    cells,
    coverage,
    rows,
    cols,
    POOLS: tl.constexpr,
    CROP_HEIGHTS: tl.constexpr,
    CROP_WIDTHS: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Pool, crop height and crop width of the first size whose best place holds `coverage` of the positive
    cells, of the last size where none does. The tuples go from the last size to the first."""
    pool = tl.full([], POOLS[0], tl.int32)
    crop_height = tl.full([], CROP_HEIGHTS[0], tl.int32)
    crop_width = tl.full([], CROP_WIDTHS[0], tl.int32)
    if SIZES > 1:
        place = tl.arange(0, cells.shape[0])
        positive = tl.where(cells > 0, cells, 0.0)
        total = tl.max(_sum_in_order(positive, rows * cols), 0)  # the same in every lane
        for size in tl.static_range(1, SIZES):
            inside = place < (rows - POOLS[size] + 1) * (cols - POOLS[size] + 1)
            sums = _window_sums(positive, place, inside, POOLS[size], cols)
            held = tl.max(tl.where(inside, sums, 0.0), 0)
            enough = (total > 0) & (held >= coverage * total)
            pool = tl.where(enough, POOLS[size], pool)
            crop_height = tl.where(enough, CROP_HEIGHTS[size], crop_height)
            crop_width = tl.where(enough, CROP_WIDTHS[size], crop_width)
    return pool, crop_height, crop_width


@triton.jit
def _place_boxes(
    cells,
    sample,
    quantiles,
    boxes,
    seed,
    alpha,
    coverage,
    rows,
    cols,
    crops,
    image_height,
    image_width,
    POOLS: tl.constexpr,
    CROP_HEIGHTS: tl.constexpr,
    CROP_WIDTHS: tl.constexpr,
    SIZES: tl.constexpr,
    CLEAN_LAST: tl.constexpr,
    BLOCK_CROPS: tl.constexpr,
):
    """Write the boxes [crops, 4] of one image; a lane of `cells` is a cell of its heatmap, then a window.

    Lanes read each other's values by shuffles, so that no heatmap needs memory. Bits are a promise: additions
    in a fixed order, IEEE division and square root, and no fused multiply-add.
    """
    pool, crop_height, crop_width = _window(
        cells, coverage, rows, cols, POOLS, CROP_HEIGHTS, CROP_WIDTHS, SIZES
    )
    across = cols - pool + 1
    places = (rows - pool + 1) * across
    place = tl.arange(0, cells.shape[0])
    inside = place < places
    area = tl.zeros(place.shape, tl.float32) + (pool * pool).to(tl.float32)
    count = tl.zeros(place.shape, tl.float32) + places.to(tl.float32)
    pooled = tl.div_rn(_window_sums(cells, place, inside, pool, cols), area)
    mean = tl.div_rn(_sum_in_order(pooled, places), count)
    deviations = pooled - mean
    scale = alpha * tl.sqrt_rn(tl.div_rn(_sum_in_order(deviations * deviations, places), count))

    blank = tl.zeros([BLOCK_CROPS, cells.shape[0]], tl.uint32)
    sample_low = blank + (sample & 0xFFFFFFFF).to(tl.uint32)
    sample_high = blank + ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    counter = blank + place.to(tl.uint32)[None, :]
    for first in range(0, crops, BLOCK_CROPS):
        crop = first + tl.arange(0, BLOCK_CROPS)
        word, _, _, _ = tl.philox(seed, sample_low, sample_high, blank + crop.to(tl.uint32)[:, None], counter)
        noise = tl.load(quantiles + (word >> 20).to(tl.int32), mask=inside[None, :], other=0.0)
        value = pooled[None, :] + scale[None, :] * noise
        if CLEAN_LAST:
            value = tl.where((crop == crops - 1)[:, None], pooled[None, :], value)
        value = tl.where(inside[None, :] & (value == value), value, float("-inf"))
        best = tl.argmax(value, 1)  # the first of equal values
        y0 = _crop_start(best // across, pool, rows, image_height, crop_height)
        x0 = _crop_start(best % across, pool, cols, image_width, crop_width)
        corners = tl.join(tl.join(x0, x0 + crop_width), tl.join(y0, y0 + crop_height))  # [crops, 2, 2]
        element = first * 4 + tl.arange(0, BLOCK_CROPS * 4)
        tl.store(boxes + element, tl.reshape(corners, [BLOCK_CROPS * 4]), mask=element < crops * 4)


@triton.jit(do_not_specialize=["seed"])
def _noisy_crop_boxes(
    phi,
    sample_ids,
    quantiles,
    boxes,
    seed,
    alpha,
    coverage,
    rows,
    cols,
    crops,
    image_height,
    image_width,
    POOLS: tl.constexpr,
    CROP_HEIGHTS: tl.constexpr,
    CROP_WIDTHS: tl.constexpr,
    SIZES: tl.constexpr,
    CLEAN_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CROPS: tl.constexpr,
):
    """One program an image, one lane a cell, and a (crop, window) pair for the noise.

    Bytes moved: 4 d + 8 read and 16 crops written an image; the 16 KB of quantiles stay in L1. Operations:
    about 100 integer operations (ten Philox rounds) for each crop and window. Neither binds: at the sizes of
    a batch (some hundred images of a dozen windows) the kernel is over within the latency of its launch and
    of the few hundred dependent shuffles that the fixed order of additions costs.
    """
    image = tl.program_id(0).to(tl.int64)
    cell = tl.arange(0, BLOCK)
    cells = tl.load(phi + image * (rows * cols) + cell, mask=cell < rows * cols, other=0.0)
    _place_boxes(
        cells,
        tl.load(sample_ids + image),
        quantiles,
        boxes + image * crops * 4,
        seed,
        alpha,
        coverage,
        rows,
        cols,
        crops,
        image_height,
        image_width,
        POOLS,
        CROP_HEIGHTS,
        CROP_WIDTHS,
        SIZES,
        CLEAN_LAST,
        BLOCK_CROPS,
    )


@prepared
def noisy_crop_boxes(
    phi: torch.Tensor,
    sample_ids: torch.Tensor,
    quantiles: torch.Tensor,
    seed: int,
    rows: int,
    cols: int,
    pools: Sequence[int],
    crops: int,
    clean_last: bool,
    alpha: float,
    image_height: int,
    image_width: int,
    crop_heights: Sequence[int],
    crop_widths: Sequence[int],
    coverage: float,
) -> Run:
    """Launch the kernel; arguments and result are those of the op `ddfast::noisy_crop_boxes`."""
    images = phi.shape[0]
    empty = Allocation((images, crops, 4), torch.int32, phi.device)
    if images * crops == 0:
        return lambda *_: empty()
    block, block_crops, warps = blocks(rows * cols, crops)
    launch = Launch(
        _noisy_crop_boxes,
        (images,),
        (seed, alpha, coverage, rows, cols, crops, image_height, image_width),
        POOLS=tuple(pools[::-1]),
        CROP_HEIGHTS=tuple(crop_heights[::-1]),
        CROP_WIDTHS=tuple(crop_widths[::-1]),
        SIZES=len(pools),
        CLEAN_LAST=clean_last,
        BLOCK=block,
        BLOCK_CROPS=block_crops,
        num_warps=warps,
        enable_fp_fusion=False,
    )

    def run(phi: torch.Tensor, sample_ids: torch.Tensor, quantiles: torch.Tensor, *_: Any) -> torch.Tensor:
        boxes = empty()
        launch(phi.contiguous(), sample_ids.contiguous(), quantiles.contiguous(), boxes)
        return boxes

    return run


def blocks(players: int, crops: int) -> tuple[int, int, int]:
    """Lanes for the cells, crops that a program places at a time, and warps.

    One warp where it can hold an image: its shuffles then need no barrier.
    """
    block = triton.next_power_of_2(players)
    block_crops = max(1, min(triton.next_power_of_2(max(crops, 1)), LANES // block))
    return block, block_crops, 1 if block * block_crops <= 256 else 4
