"""From a heatmap to crop boxes: pool, add scaled normal noise, take the largest window, centre a box on
it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LANES = 128  # (image, crop) pairs a program


@triton.jit
def _pooled(phi, window, windows_across, cols, pool: tl.constexpr, inside):
    """Mean of phi over one pool x pool window, for every lane; `phi` points at each lane's own heatmap."""
    corner = phi + (window // windows_across) * cols + window % windows_across
    total = tl.zeros(phi.shape, tl.float32)
    for row in tl.static_range(pool):
        for col in tl.static_range(pool):
            total += tl.load(corner + row * cols + col, mask=inside, other=0.0)
    return tl.div_rn(total, tl.full(phi.shape, pool * pool, tl.float32))


@triton.jit
def _crop_start(first_part, parts, length, crop, pool: tl.constexpr):
    """First pixel, along one axis, of a crop centred on the window of `pool` parts and kept in the image."""
    start = first_part * length // parts
    end = (first_part + pool) * length // parts
    return tl.minimum(tl.maximum((start + end - crop) // 2, 0), length - crop)


@triton.jit(do_not_specialize=["seed"])
def _noisy_crop_boxes(
    phi,
    sample_ids,
    quantiles,
    boxes,
    lanes,
    seed,
    alpha,
    rows,
    cols,
    crops,
    image_height,
    image_width,
    crop_height,
    crop_width,
    pool: tl.constexpr,
    clean_last: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One lane is one crop of one image, and walks over the windows of the heatmap three times.

    Bytes moved: 4 d + 8 read and 16 crops written an image; the windows are pooled anew in each walk, out of
    the L1 cache, because a lane has no indexable registers. Operations: about 100 integer operations (ten
    Philox rounds) for each image, crop and window. Neither binds: at the sizes of a batch (a few thousand
    lanes of a dozen windows) the kernel is over within the latency of its launch. What matters here is bits:
    additions in a fixed order, IEEE division and square root, and no fused multiply-add.
    """
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < lanes
    image = lane // crops
    crop = (lane % crops).to(tl.int32)
    phi += image * (rows * cols)
    windows_across = cols - pool + 1
    windows = (rows - pool + 1) * windows_across
    count = tl.full([BLOCK], windows, tl.float32)

    total = tl.zeros([BLOCK], tl.float32)
    for window in range(windows):
        total += _pooled(phi, window, windows_across, cols, pool, inside)
    mean = tl.div_rn(total, count)

    squares = tl.zeros([BLOCK], tl.float32)
    for window in range(windows):
        deviation = _pooled(phi, window, windows_across, cols, pool, inside) - mean
        squares += deviation * deviation
    scale = alpha * tl.sqrt_rn(tl.div_rn(squares, count))

    sample = tl.load(sample_ids + image, mask=inside, other=0)
    sample_low = (sample & 0xFFFFFFFF).to(tl.uint32)
    sample_high = ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    best = tl.zeros([BLOCK], tl.int32)
    best_value = tl.full([BLOCK], float("-inf"), tl.float32)
    for window in range(windows):
        value = _pooled(phi, window, windows_across, cols, pool, inside)
        counter = tl.full([BLOCK], window, tl.uint32)
        word, _, _, _ = tl.philox(seed, sample_low, sample_high, crop.to(tl.uint32), counter)
        noisy = value + scale * tl.load(quantiles + (word >> 20).to(tl.int32))
        if clean_last:
            value = tl.where(crop == crops - 1, value, noisy)
        else:
            value = noisy
        better = value > best_value  # false for NaN
        best = tl.where(better, window, best)
        best_value = tl.where(better, value, best_value)

    y0 = _crop_start(best // windows_across, rows, image_height, crop_height, pool)
    x0 = _crop_start(best % windows_across, cols, image_width, crop_width, pool)
    corners = tl.join(tl.join(x0, x0 + crop_width), tl.join(y0, y0 + crop_height))  # [BLOCK, 2, 2]
    element = tl.program_id(0).to(tl.int64) * (BLOCK * 4) + tl.arange(0, BLOCK * 4)
    tl.store(boxes + element, tl.reshape(corners, [BLOCK * 4]), mask=element < lanes * 4)


def noisy_crop_boxes(
    phi: torch.Tensor,
    sample_ids: torch.Tensor,
    quantiles: torch.Tensor,
    seed: int,
    rows: int,
    cols: int,
    pool: int,
    crops: int,
    clean_last: bool,
    alpha: float,
    image_height: int,
    image_width: int,
    crop_height: int,
    crop_width: int,
) -> torch.Tensor:
    """Launch the kernel; arguments and result are those of the op `ddfast::noisy_crop_boxes`."""
    images = phi.shape[0]
    boxes = torch.empty(images, crops, 4, dtype=torch.int32, device=phi.device)
    if boxes.numel() == 0:
        return boxes
    lanes = images * crops
    _noisy_crop_boxes[(triton.cdiv(lanes, LANES),)](
        phi.contiguous(),
        sample_ids.contiguous(),
        quantiles.contiguous(),
        boxes,
        lanes,
        seed,
        alpha,
        rows,
        cols,
        crops,
        image_height,
        image_width,
        crop_height,
        crop_width,
        pool=pool,
        clean_last=clean_last,
        BLOCK=LANES,
        num_warps=LANES // 32,
        enable_fp_fusion=False,
    )
    return boxes
