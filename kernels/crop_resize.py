"""Antialiased bilinear resize of many boxes into the tiles of mosaics, its transpose, and its fusion with what a
forward pass wants: normalised, padded, cast, channels last."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from ddfast.kernels.launching import Allocation, Launch, Run, channels_last, prepared
from ddfast.kernels.masked_batch import _rounded

# Rows and columns of a tile that a program computes: 4 columns a thread, so that it stores 16 bytes of float32, and 4
# rows, which share what is computed once a column.
ROWS = 32
COLS = 64
IMAGE_ROWS = 8  # of an image, in the backward pass


@triton.jit
def _divide(x, y):
    """x / y, correctly rounded for numbers of ordinary size.

    In float32, `/` alone is an approximation, whose error one residual step removes. `tl.div_rn` is a function
    call, around which registers would go to memory.
    """
    quotient = x / y
    if x.dtype != tl.float64:
        quotient += tl.fma(-quotient, y, x) * (1.0 / y)
    return quotient


@triton.jit
def _inverse(x):
    """1 / x, rounded as `_divide` does."""
    return _divide(tl.full(x.shape, 1, x.dtype), x)


@triton.jit
def _quotient(x, y, inverse):
    """x / y for blocks, as `_divide` rounds it, from `inverse`, which is 1 / y."""
    y = tl.broadcast_to(y, x.shape)
    quotient = x * inverse
    return quotient + tl.fma(-quotient, y, x) * inverse


@triton.jit
def _axis(box, low, size, length, COMPUTE: tl.constexpr):
    """One axis of a box: its first pixel, how many pixels it has, shift and scale of the filter.

    In pixels counted from the first one, output i is centred at shift + scale * (i + 1/2), and a pixel weighs
    max(0, 1 - distance / max(scale, 1)). The pixels stay within the image's `length`, whatever the box says.
    """
    start = tl.load(box + low).to(COMPUTE)
    stop = tl.load(box + low + 2).to(COMPUTE)
    first = tl.floor(start)
    pixels = tl.minimum(tl.ceil(stop), tl.cast(length, COMPUTE)) - first
    shift = start - first
    scale = _divide(stop - start, tl.cast(size, COMPUTE))
    known = (start >= 0) & (stop > start)  # false for NaN too
    return (
        tl.where(known, first, 0).to(tl.int32),
        tl.where(known, pixels, 0).to(tl.int32),
        shift,
        scale,
    )


@triton.jit
def _taps(scale):
    """How many pixels can weigh in one output."""
    return tl.ceil(2 * tl.maximum(scale, 1.0)).to(tl.int32)


@triton.jit
def _first_tap(centre, scale):
    """The first pixel that weighs in an output."""
    return tl.maximum(tl.floor(centre - tl.maximum(scale, 1.0) - 0.5).to(tl.int32) + 1, 0)


@triton.jit
def _weight(pixel, centre, inverse, pixels):
    """The triangle filter at a pixel, zero outside the crop; `inverse` is that of the filter's support."""
    distance = tl.abs(pixel.to(centre.dtype) + 0.5 - centre)
    return tl.where((pixel >= 0) & (pixel < pixels), tl.maximum(1.0 - distance * inverse, 0.0), 0.0)


@triton.jit
def _resized(
    image,
    channel_offset,
    box,
    y,
    x,
    inside_y,
    inside_x,
    height,
    width,
    image_height,
    image_width,
    row_stride,
    col_stride,
    BYTES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Rows `y` and columns `x` of the tile that a box of an image becomes, where they are `inside`.

    The weights of a tap are a column vector times a row vector; each tap is one load of a pixel in its own
    dtype and one multiply-add. `channel_offset` is that of each column, so that columns may take turns among
    the channels. BYTES: rounded half up to 0 .. 255.
    """
    top, rows, shift_y, scale_y = _axis(box, 1, height, image_height, COMPUTE)
    left, cols, shift_x, scale_x = _axis(box, 0, width, image_width, COMPUTE)
    inverse_y = _inverse(tl.maximum(scale_y, 1.0))
    inverse_x = _inverse(tl.maximum(scale_x, 1.0))
    centre_y = shift_y + scale_y * (y.to(COMPUTE) + 0.5)
    centre_x = shift_x + scale_x * (x.to(COMPUTE) + 0.5)
    first_y = _first_tap(centre_y, scale_y)
    first_x = _first_tap(centre_x, scale_x)
    rows = tl.where(inside_y, rows, 0)
    cols = tl.where(inside_x, cols, 0)
    crop = image + channel_offset + top.to(tl.int64) * row_stride + left.to(tl.int64) * col_stride

    # Taps along x outside, along y inside: a thread has as many columns as rows, or more, so that the weights
    # which are computed again for every tap of the other axis are the fewer ones.
    sums = tl.zeros([y.shape[0], x.shape[0]], COMPUTE)
    total_y = tl.zeros(y.shape, COMPUTE)
    total_x = tl.zeros(x.shape, COMPUTE)
    for tap_y in range(_taps(scale_y)):
        total_y += _weight(first_y + tap_y, centre_y, inverse_y, rows)
    for tap_x in range(_taps(scale_x)):
        weight_x = _weight(first_x + tap_x, centre_x, inverse_x, cols)
        total_x += weight_x
        column = crop + (first_x + tap_x).to(tl.int64) * col_stride
        for tap_y in range(_taps(scale_y)):
            weight_y = _weight(first_y + tap_y, centre_y, inverse_y, rows)
            weight = weight_y[:, None] * weight_x[None, :]
            pixels = column[None, :] + ((first_y + tap_y).to(tl.int64) * row_stride)[:, None]
            sums += weight * tl.load(pixels, mask=weight > 0, other=0).to(COMPUTE)
    sums *= _inverse(total_y)[:, None] * _inverse(total_x)[None, :]
    if BYTES:
        sums = tl.minimum(tl.maximum(tl.floor(sums + 0.5), 0.0), 255.0)
    return sums


@triton.jit
def _crop_resize(
    images,
    boxes,
    source,
    mosaics,
    batch,
    channels,
    image_height,
    image_width,
    height,
    width,
    factor,
    image_stride,
    channel_stride,
    row_stride,
    col_stride,
    COMPUTE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """A program computes BLOCK_Y x BLOCK_X pixels of one channel of one tile, where they lie in the mosaic.

    Bytes moved: M C h w e written once (e bytes an element), and the pixels under the boxes read once from
    memory and ceil(2 sy) ceil(2 sx) times from L1, with s = max(1, crop / tile): 4 loads an output pixel when
    a crop is enlarged. Instructions (sm_90): about 13 a load and 40 an output pixel besides, shared by the 16
    pixels of a thread. Their issue binds, then the writes; nothing else is stored, not the crop, not the tile
    before it is laid into its mosaic.
    """
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(width, BLOCK_X)
    blocks = tl.cdiv(height, BLOCK_Y) * across
    block = (program % blocks).to(tl.int32)
    channel = program // blocks % channels
    tile = program // blocks // channels

    y = block // across * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = block % across * BLOCK_X + tl.arange(0, BLOCK_X)
    image = tl.load(source + tile)
    sums = _resized(
        images + image * image_stride + channel * channel_stride,
        tl.zeros([BLOCK_X], tl.int64),
        boxes + 4 * tile,
        y,
        x,
        (y < height) & (image >= 0) & (image < batch),
        x < width,
        height,
        width,
        image_height,
        image_width,
        row_stride,
        col_stride,
        mosaics.dtype.element_ty == tl.uint8,
        COMPUTE,
    )
    if mosaics.dtype.element_ty == tl.uint8:
        sums = sums.to(tl.int32)
    place = (tile % (factor * factor)).to(tl.int32)
    row = (tile // (factor * factor) * channels + channel) * factor * height + place // factor * height + y
    target = mosaics + row[:, None] * (factor * width) + (place % factor * width + x)[None, :]
    tl.store(target, sums.to(mosaics.dtype.element_ty), mask=(y < height)[:, None] & (x < width)[None, :])


@triton.jit
def _crop_batch(
    images,
    boxes,
    source,
    mean,
    std,
    result,
    batch,
    image_height,
    image_width,
    height,
    width,
    top,
    left,
    padded_height,
    padded_width,
    image_stride,
    channel_stride,
    row_stride,
    col_stride,
    CHANNELS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """A program computes BLOCK_Y rows of BLOCK_X numbers, which take turns among the channels, of one tile.

    Bytes moved: M C H W e written once for the padded size (e bytes an element), and the pixels under the
    boxes read once from memory, from L1 as often as _crop_resize reads them. Instructions (sm_90): about 13 for
    each tap of an element inside the tile, 4 taps where a crop is enlarged, and 50 besides; a program that
    meets padding alone stores zeros and does nothing else. Counted for an H200 and float32, tiles of half the
    side take their writes and their instructions equally long; a tile without padding is bound by the issue
    of instructions, at a quarter of the bandwidth. Rows of C W e bytes that are a multiple of 16 are stored
    16 bytes a thread.
    """
    program = tl.program_id(0).to(tl.int64)
    elements = padded_width * CHANNELS
    across = tl.cdiv(elements, BLOCK_X)
    blocks = tl.cdiv(padded_height, BLOCK_Y) * across
    block = (program % blocks).to(tl.int32)
    tile = program // blocks

    row = block // across * BLOCK_Y + tl.arange(0, BLOCK_Y)
    element = block % across * BLOCK_X + tl.arange(0, BLOCK_X)
    y = row - top
    x = element // CHANNELS - left
    channel = element % CHANNELS
    inside_y = (y >= 0) & (y < height)
    inside_x = (x >= 0) & (x < width)
    value = tl.zeros([BLOCK_Y, BLOCK_X], COMPUTE)
    if (tl.max(inside_y.to(tl.int32), 0) > 0) & (tl.max(inside_x.to(tl.int32), 0) > 0):
        image = tl.load(source + tile)
        value = _resized(
            images + image * image_stride,
            channel.to(tl.int64) * channel_stride,
            boxes + 4 * tile,
            y,
            x,
            inside_y & (image >= 0) & (image < batch),
            inside_x,
            height,
            width,
            image_height,
            image_width,
            row_stride,
            col_stride,
            images.dtype.element_ty == tl.uint8,
            COMPUTE,
        )
        if images.dtype.element_ty == tl.uint8:
            whole = tl.full([1, BLOCK_X], 255, COMPUTE)
            value = _quotient(value, whole, _inverse(whole))
        if mean is not None:
            value -= tl.load(mean + channel)[None, :]
        if std is not None:
            scale = tl.load(std + channel)[None, :]
            value = _quotient(value, scale, _inverse(scale))
        value = tl.where(inside_y[:, None] & inside_x[None, :], value, 0.0)
    target = result + (tile * padded_height + row)[:, None] * elements + element[None, :]
    within = (row < padded_height)[:, None] & (element < elements)[None, :]
    tl.store(target, _rounded(value, result.dtype.element_ty), mask=within)


@triton.jit
def _inverse_totals(
    boxes,
    inverses,
    tiles,
    height,
    width,
    image_height,
    image_width,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 / the sum of the weights of output i of each box: [tiles, height] along y, then [tiles, width] along x.

    One program a box and axis. Bytes moved: 4 a number written. Operations: about 8 ceil(2 s) a number. Launch
    latency binds.
    """
    program = tl.program_id(0).to(tl.int64)
    tile, down = program // 2, program % 2
    size = tl.where(down == 1, height, width)
    length = tl.where(down == 1, image_height, image_width)
    table = inverses + tl.where(down == 1, tile * height, tl.cast(tiles, tl.int64) * height + tile * width)
    _, pixels, shift, scale = _axis(boxes + 4 * tile, down, size, length, COMPUTE)
    inverse = _inverse(tl.maximum(scale, 1.0))
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        centre = shift + scale * (i.to(COMPUTE) + 0.5)
        first = _first_tap(centre, scale)
        total = tl.zeros([BLOCK], COMPUTE)
        for tap in range(_taps(scale)):
            total += _weight(first + tap, centre, inverse, pixels)
        tl.store(table + i, _inverse(total), mask=i < size)


@triton.jit
def _tiles_of_images(source, order, tiles, BLOCK: tl.constexpr):
    """The tiles in the order of their images, ascending within one; behind them, where those of each image begin.

    One program an image, and one for the end of the last. Bytes moved: 8 a tile, from L2, twice a program. Launch
    latency binds, as long as there are no more than thousands of tiles.
    """
    image = tl.program_id(0).to(tl.int64)
    before = tl.zeros([BLOCK], tl.int64)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        cut = tl.load(source + tile, mask=tile < tiles, other=0)
        before += ((cut < image) & (tile < tiles)).to(tl.int64)
    start = tl.sum(before, 0)
    tl.store(order + tiles + image, start)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        cut = tl.load(source + tile, mask=tile < tiles, other=0)
        mine = ((cut == image) & (tile < tiles)).to(tl.int64)
        tl.store(order + start + tl.cumsum(mine, 0) - 1, tile.to(tl.int64), mask=mine > 0)
        start += tl.sum(mine, 0)


@triton.jit
def _outputs(scale):
    """How many outputs a pixel can weigh in, and one to spare for rounding."""
    return tl.ceil(2 * tl.maximum(scale, 1.0) / scale).to(tl.int32) + 1


@triton.jit
def _first_output(pixel, shift, scale):
    """The first output that a pixel weighs in, or the one before it."""
    low = (pixel.to(scale.dtype) + 0.5 - tl.maximum(scale, 1.0) - shift) * _inverse(scale) - 0.5
    return tl.maximum(tl.floor(low).to(tl.int32), 0)


@triton.jit
def _share(pixel, output, inverse_totals, size, pixels, shift, scale, inverse):
    """The weight, divided by the total of all, that a pixel has in an output."""
    inside = (pixel >= 0) & (pixel < pixels) & (output < size)
    centre = shift + scale * (output.to(scale.dtype) + 0.5)
    inverse_total = tl.load(inverse_totals + output, mask=inside, other=0)
    return _weight(pixel, centre, inverse, pixels) * inverse_total


@triton.jit
def _crop_resize_backward(
    grad_output,
    boxes,
    order,
    inverse_totals,
    grad_images,
    tiles,
    channels,
    image_height,
    image_width,
    height,
    width,
    factor,
    mosaic_stride,
    channel_stride,
    row_stride,
    col_stride,
    COMPUTE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """A program gathers BLOCK_Y x BLOCK_X pixels of one channel of one image's gradient from its boxes' tiles.

    Each pixel is written once, by one program, which adds up its boxes in ascending order: no atomics, and
    the same bits in every run.

    Bytes moved: B C H W e written once, the M C h w e of the tiles' gradients read once from memory, and from
    L1 ceil(2 sy / ry + 1) ceil(2 sx / rx + 1) times a pixel and box that covers it, with r = crop / tile and
    s = max(1, r). Operations: 2 a load. The loads from L1 bind.
    """
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(image_width, BLOCK_X)
    blocks = tl.cdiv(image_height, BLOCK_Y) * across
    block = (program % blocks).to(tl.int32)
    channel = program // blocks % channels
    image = program // blocks // channels

    block_y = block // across * BLOCK_Y
    block_x = block % across * BLOCK_X
    y = block_y + tl.arange(0, BLOCK_Y)
    x = block_x + tl.arange(0, BLOCK_X)
    sums = tl.zeros([BLOCK_Y, BLOCK_X], COMPUTE)
    starts = order + tiles + image
    for at in range(tl.load(starts), tl.load(starts + 1)):
        tile = tl.load(order + at)
        top, rows, shift_y, scale_y = _axis(boxes + 4 * tile, 1, height, image_height, COMPUTE)
        left, cols, shift_x, scale_x = _axis(boxes + 4 * tile, 0, width, image_width, COMPUTE)
        meets_y = (top < block_y + BLOCK_Y) & (top + rows > block_y)
        if meets_y & (left < block_x + BLOCK_X) & (left + cols > block_x):
            place = (tile % (factor * factor)).to(tl.int32)
            tile_grad = grad_output + tile // (factor * factor) * mosaic_stride + channel * channel_stride
            tile_grad += (place // factor * height).to(tl.int64) * row_stride
            tile_grad += (place % factor * width).to(tl.int64) * col_stride
            inverse_y = _inverse(tl.maximum(scale_y, 1.0))
            inverse_x = _inverse(tl.maximum(scale_x, 1.0))
            totals_y = inverse_totals + tile * height
            totals_x = inverse_totals + tl.cast(tiles, tl.int64) * height + tile * width
            first_y = _first_output(y - top, shift_y, scale_y)
            first_x = _first_output(x - left, shift_x, scale_x)
            for step_y in range(_outputs(scale_y)):
                i = first_y + step_y
                share_y = _share(y - top, i, totals_y, height, rows, shift_y, scale_y, inverse_y)
                line = tile_grad + i.to(tl.int64)[:, None] * row_stride
                for step_x in range(_outputs(scale_x)):
                    j = first_x + step_x
                    share_x = _share(x - left, j, totals_x, width, cols, shift_x, scale_x, inverse_x)
                    share = share_y[:, None] * share_x[None, :]
                    grad = tl.load(line + j.to(tl.int64)[None, :] * col_stride, mask=share > 0, other=0)
                    sums += share * grad.to(COMPUTE)
    row = (image * channels + channel) * image_height + y
    target = grad_images + row[:, None] * image_width + x[None, :]
    inside = (y < image_height)[:, None] & (x < image_width)[None, :]
    tl.store(target, sums.to(grad_images.dtype.element_ty), mask=inside)


@prepared
def crop_resize(
    images: torch.Tensor, boxes: torch.Tensor, source: torch.Tensor, height: int, width: int, factor: int
) -> Run:
    """Launch the kernel; arguments and result are those of the op `ddfast::crop_resize`."""
    batch, channels, image_height, image_width = images.shape
    tiles = boxes.shape[0]
    size = (tiles // factor**2, channels, factor * height, factor * width)
    empty = Allocation(size, images.dtype, images.device)
    if 0 in size:
        return lambda *_: empty()
    block_y, block_x = _block(height, width, ROWS)
    blocks = triton.cdiv(height, block_y) * triton.cdiv(width, block_x)
    launch = Launch(
        _crop_resize,
        (tiles * channels * blocks,),
        (batch, channels, image_height, image_width, height, width, factor, *images.stride()),
        COMPUTE=_compute(images.dtype),
        BLOCK_Y=block_y,
        BLOCK_X=block_x,
        num_warps=4,
    )

    def run(images: torch.Tensor, boxes: torch.Tensor, source: torch.Tensor, *_: Any) -> torch.Tensor:
        mosaics = empty()
        launch(images, boxes.contiguous(), source.contiguous(), mosaics)
        return mosaics

    return run


@prepared
def crop_batch(
    images: torch.Tensor,
    boxes: torch.Tensor,
    source: torch.Tensor,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    height: int,
    width: int,
    padded_height: int,
    padded_width: int,
    dtype: torch.dtype,
) -> Run:
    """Launch the kernel; arguments and result are those of the op `ddfast::crop_batch`."""
    batch, channels, image_height, image_width = images.shape
    tiles = boxes.shape[0]
    size = (tiles, channels, padded_height, padded_width)
    empty = Allocation(size, dtype, images.device, channels_last(size))
    if 0 in size:
        return lambda *_: empty()
    # 16 threads side by side store 16 bytes each, and every thread computes 16 numbers.
    columns = 16 * 16 // dtype.itemsize
    block_y = min(ROWS * COLS // columns, triton.next_power_of_2(padded_height))
    columns = min(columns, triton.next_power_of_2(padded_width * channels))
    blocks = triton.cdiv(padded_height, block_y) * triton.cdiv(padded_width * channels, columns)
    wide = torch.float64 in (images.dtype, dtype)
    launch = Launch(
        _crop_batch,
        (tiles * blocks,),
        (
            batch,
            image_height,
            image_width,
            height,
            width,
            (padded_height - height) // 2,
            (padded_width - width) // 2,
            padded_height,
            padded_width,
            *images.stride(),
        ),
        CHANNELS=channels,
        COMPUTE=tl.float64 if wide else tl.float32,
        BLOCK_Y=block_y,
        BLOCK_X=columns,
        num_warps=4,
    )

    def run(
        images: torch.Tensor,
        boxes: torch.Tensor,
        source: torch.Tensor,
        mean: torch.Tensor | None,
        std: torch.Tensor | None,
        *_: Any,
    ) -> torch.Tensor:
        result = empty()
        launch(
            images,
            boxes.contiguous(),
            source.contiguous(),
            None if mean is None else mean.contiguous(),
            None if std is None else std.contiguous(),
            result,
        )
        return result

    return run


@prepared
def crop_resize_backward(
    grad_output: torch.Tensor,
    boxes: torch.Tensor,
    source: torch.Tensor,
    images: int,
    image_height: int,
    image_width: int,
    factor: int,
) -> Run:
    """Launch the kernels; arguments and result are those of the op `ddfast::crop_resize_backward`."""
    channels = grad_output.shape[1]
    height, width = grad_output.shape[2] // factor, grad_output.shape[3] // factor
    size, device = (images, channels, image_height, image_width), grad_output.device
    empty = Allocation(size, grad_output.dtype, device)
    if 0 in size:
        return lambda *_: empty()
    if grad_output.numel() == 0:
        return lambda *_: empty().zero_()
    tiles, compute = boxes.shape[0], _compute(grad_output.dtype)
    new_order = Allocation((tiles + images + 1,), torch.int64, device)
    sums_dtype = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    new_totals = Allocation((tiles * (height + width),), sums_dtype, device)
    group = Launch(
        _tiles_of_images,
        (images + 1,),
        (tiles,),
        BLOCK=min(128, triton.next_power_of_2(tiles)),
        num_warps=4,
    )
    weigh = Launch(
        _inverse_totals,
        (2 * tiles,),
        (tiles, height, width, image_height, image_width),
        COMPUTE=compute,
        BLOCK=min(256, triton.next_power_of_2(max(height, width))),
        num_warps=1,
    )
    block_y, block_x = _block(image_height, image_width, IMAGE_ROWS)
    blocks = triton.cdiv(image_height, block_y) * triton.cdiv(image_width, block_x)
    gather = Launch(
        _crop_resize_backward,
        (images * channels * blocks,),
        (tiles, channels, image_height, image_width, height, width, factor, *grad_output.stride()),
        COMPUTE=compute,
        BLOCK_Y=block_y,
        BLOCK_X=block_x,
        num_warps=4,
    )

    def run(grad_output: torch.Tensor, boxes: torch.Tensor, source: torch.Tensor, *_: Any) -> torch.Tensor:
        grad_images, order, totals = empty(), new_order(), new_totals()
        boxes = boxes.contiguous()
        group(source.contiguous(), order)
        weigh(boxes, totals)
        gather(grad_output, boxes, order, totals, grad_images)
        return grad_images

    return run


def _block(height: int, width: int, rows: int) -> tuple[int, int]:
    return min(rows, triton.next_power_of_2(height)), min(COLS, triton.next_power_of_2(width))


def _compute(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
