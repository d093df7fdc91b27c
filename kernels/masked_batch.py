"""Every image under every coalition: normalise once, then write one masked copy for each coalition."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from ddfast.kernels.launching import Allocation, Launch, Run, channels_last, prepared

# Elements of one image a program: 8 a thread, so that a thread stores 16 bytes of half precision.
BLOCK = 1024
# About one wave of programs on the largest GPUs.
PROGRAMS = 1024


@triton.jit
def _divide(x, y):
    """IEEE division: in float32, `/` alone compiles to an approximation."""
    if x.dtype == tl.float64:
        quotient = x / y
    else:
        quotient = tl.div_rn(x, y)
    return quotient


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """x in `dtype`, as torch rounds it: from float64 to 16 bits by way of float32."""
    if dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def _masked_batch(
    images,
    coalitions,
    baseline,
    mean,
    std,
    masked,
    elements,
    height,
    width,
    rows,
    cols,
    count,
    count_a_program,
    coalitions_image_stride,
    image_stride,
    image_channel_stride,
    image_row_stride,
    image_col_stride,
    baseline_image_stride,
    baseline_channel_stride,
    baseline_row_stride,
    baseline_col_stride,
    CHANNELS: tl.constexpr,
    IMAGES_INTERLEAVED: tl.constexpr,
    COMPUTE: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns a run of BLOCK elements of one image, in the channels-last order of the output.

    It loads the run and its baseline once, normalises them in registers, and then stores one selection of
    the two for each of its coalitions.

    Bytes moved: B K C H W e written (e bytes an element of the output), B C H W read once, and the
    coalitions, which stay in L1. Operations: four an element of an image, and for each element written a
    byte of the coalition from L1 and a select. The writes bind: the kernel runs at the bandwidth of memory,
    as long as a thread's stores are 16 bytes wide, for which C H W has to be a multiple of 16.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(elements, BLOCK)
    chunks = tl.cdiv(count, count_a_program)
    tile = (program % tiles).to(tl.int32)
    first = ((program // tiles) % chunks).to(tl.int32) * count_a_program
    image = program // tiles // chunks

    element = tile * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    channel = element % CHANNELS
    row = element // CHANNELS // width
    col = element // CHANNELS % width
    player = ((row + 1).to(GRID) * rows - 1) // height * cols + ((col + 1).to(GRID) * cols - 1) // width

    pixels = images + image * image_stride
    if IMAGES_INTERLEAVED:
        pixels += element
    else:
        pixels += (
            channel.to(tl.int64) * image_channel_stride
            + row.to(tl.int64) * image_row_stride
            + col.to(tl.int64) * image_col_stride
        )
    present = tl.load(pixels, mask=inside, other=0).to(COMPUTE)
    if images.dtype.element_ty == tl.uint8:
        present = _divide(present, tl.full([BLOCK], 255, COMPUTE))
    if mean is not None:
        present -= tl.load(mean + channel).to(COMPUTE)
    if std is not None:
        present = _divide(present, tl.load(std + channel).to(COMPUTE))
    present = _rounded(present, masked.dtype.element_ty)

    absent = tl.load(
        baseline
        + image * baseline_image_stride
        + channel.to(tl.int64) * baseline_channel_stride
        + row.to(tl.int64) * baseline_row_stride
        + col.to(tl.int64) * baseline_col_stride,
        mask=inside,
        other=0,
    )
    absent = _rounded(absent.to(COMPUTE), masked.dtype.element_ty)

    cells = coalitions.to(tl.pointer_type(tl.uint8), bitcast=True)
    cells += image * coalitions_image_stride + first.to(tl.int64) * (rows * cols) + player
    copy = masked + (image * count + first) * elements + element
    for _ in range(first, tl.minimum(first + count_a_program, count)):
        keep = tl.load(cells, mask=inside, other=0) != 0
        tl.store(copy, tl.where(keep, present, absent), mask=inside)
        cells += rows * cols
        copy += elements


@prepared
def masked_batch(
    images: torch.Tensor,
    coalitions: torch.Tensor,
    baseline: torch.Tensor,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Run:
    """Launch the kernel; arguments and result are those of the op `ddfast::masked_batch`."""
    batch, channels, height, width = images.shape
    count, elements = coalitions.shape[-2], channels * height * width
    if elements > 2**31 - BLOCK:
        raise ValueError(
            f"images must have at most {2**31 - BLOCK} elements each, got {list(images.shape[1:])}"
        )
    size = (batch * count, channels, height, width)
    empty = Allocation(size, dtype, images.device, channels_last(size))
    if 0 in size:
        return lambda *_: empty()
    planes = baseline[:, None, None] if baseline.ndim == 1 else baseline
    double = torch.float64 in (images.dtype, baseline.dtype, dtype)

    # Coalitions are shared out among programs only as far as the images alone leave the GPU idle.
    tiles = triton.cdiv(elements, BLOCK)
    chunks = min(count, triton.cdiv(PROGRAMS, tiles * batch))
    count_a_program = triton.cdiv(count, chunks)
    launch = Launch(
        _masked_batch,
        (tiles * batch * triton.cdiv(count, count_a_program),),
        (
            elements,
            height,
            width,
            rows,
            cols,
            count,
            count_a_program,
            count * coalitions.shape[-1] if coalitions.ndim == 3 else 0,
            *images.stride(),
            *planes.expand(images.shape).stride(),
        ),
        CHANNELS=channels,
        IMAGES_INTERLEAVED=images[0].permute(1, 2, 0).is_contiguous(),
        COMPUTE=tl.float64 if double else tl.float32,
        GRID=tl.int32 if max((height + 1) * rows, (width + 1) * cols) < 2**31 else tl.int64,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )

    def run(
        images: torch.Tensor,
        coalitions: torch.Tensor,
        baseline: torch.Tensor,
        mean: torch.Tensor | None,
        std: torch.Tensor | None,
        *_: Any,
    ) -> torch.Tensor:
        masked = empty()
        launch(
            images,
            coalitions.contiguous(),
            baseline,
            None if mean is None else mean.contiguous(),
            None if std is None else std.contiguous(),
            masked,
        )
        return masked

    return run
