"""Mirror, colour, shift, warp and cut of images by given parameters, and the transpose: one pass over the images."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from ddfast.kernels.crop_resize import _divide, _inverse
from ddfast.kernels.launching import Allocation, Launch, Run, channels_last, prepared

from ddfast.ops import reference

WIDEST = 64  # channels that a program holds side by side; more take the reference
HELD = 2048  # float32 numbers of a step, 16 a thread, so that it stores 16 bytes at a time; half as many of float64
PIXELS = 4096  # of an image, for one program; the mean of a larger image is a launch of its own


@triton.jit
def _shares(position, low, high):
    """The shares that the two pixels around a position have in it, summed over those in low .. high - 1."""
    first = tl.floor(position)
    share = position - first
    total = tl.where((first >= low) & (first < high), 1.0 - share, 0.0)
    return total + tl.where((first + 1 >= low) & (first + 1 < high), share, 0.0)


@triton.jit
def _theta(row, height, width, COMPUTE: tl.constexpr):
    """The warp of a row in pixels from the centre: xx, xy, x0, yx, yy, y0, and whether it is one."""
    high, wide = tl.cast(height, COMPUTE), tl.cast(width, COMPUTE)
    xx, xy, x0 = tl.load(row + 6).to(COMPUTE), tl.load(row + 7).to(COMPUTE), tl.load(row + 8).to(COMPUTE)
    yx, yy, y0 = tl.load(row + 9).to(COMPUTE), tl.load(row + 10).to(COMPUTE), tl.load(row + 11).to(COMPUTE)
    same = (xx == 1) & (xy == 0) & (x0 == 0) & (yx == 0) & (yy == 1) & (y0 == 0)
    return xx, xy * _divide(wide, high), x0 * wide * 0.5, yx * _divide(high, wide), yy, y0 * high * 0.5, ~same


@triton.jit
def _from_centre(k, size, COMPUTE: tl.constexpr):
    return k.to(COMPUTE) + (0.5 - tl.cast(size, COMPUTE) * 0.5)


@triton.jit
def _position(a, b, offset, x, y, size, COMPUTE: tl.constexpr):
    """Where a warp reads along one axis, in pixels, and no further than where there is nothing on either side."""
    wide = tl.cast(size, COMPUTE)
    position = a * x + (b * y + (offset + (wide * 0.5 - 0.5)))
    return tl.minimum(tl.maximum(position, -1.0), wide)


@triton.jit
def _is_cut(row, y, x):
    top, left = tl.load(row + 12).to(tl.int32), tl.load(row + 13).to(tl.int32)
    bottom, right = tl.load(row + 14).to(tl.int32), tl.load(row + 15).to(tl.int32)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


@triton.jit
def _mean(
    image,
    row,
    height,
    width,
    channel_stride,
    row_stride,
    col_stride,
    BACKWARD: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean of what a row's contrast is about: the image, or what warp and shift make of a gradient, on the way back.

    The latter needs no gather: it is the sum of the gradient times the shares that a pixel of it draws from inside.
    """
    lane = tl.arange(0, LANES)[:, None]
    sums = tl.zeros([LANES, BLOCK], COMPUTE)
    xx, xy, x0, yx, yy, y0, warped = _theta(row, height, width, COMPUTE)
    down, across = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    for start in range(0, height * width, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        y, x = pixel // width, pixel % width
        there = pixel < height * width
        at = image + (y.to(tl.int64) * row_stride + x.to(tl.int64) * col_stride)[None, :]
        if BACKWARD:
            there = there & ~_is_cut(row, y, x)
        value = tl.load(
            at + lane.to(tl.int64) * channel_stride, mask=there[None, :] & (lane < CHANNELS), other=0
        ).to(COMPUTE)
        if BACKWARD:
            x_c, y_c = _from_centre(x, width, COMPUTE), _from_centre(y, height, COMPUTE)
            column, line = x.to(COMPUTE), y.to(COMPUTE)
            if warped:
                column = _position(xx, xy, x0, x_c, y_c, width, COMPUTE)
                line = _position(yy, yx, y0, y_c, x_c, height, COMPUTE)
            share = _shares(column, tl.maximum(0, -across), tl.minimum(width, width - across))
            share *= _shares(line, tl.maximum(0, -down), tl.minimum(height, height - down))
            value *= share[None, :]
        sums += value
    count = tl.cast(height, COMPUTE) * tl.cast(width, COMPUTE) * CHANNELS
    return _divide(tl.sum(tl.sum(sums, 1), 0), count)


@triton.jit
def _means(
    images,
    parameters,
    means,
    images_a_row,
    height,
    width,
    image_stride,
    channel_stride,
    row_stride,
    col_stride,
    BACKWARD: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean that each image's contrast is about, 0 where it has none: one program an image.

    Bytes moved: C H W e read an image whose contrast is not 1, nothing of the others. The latency of a program's
    loads, one step after another, binds.
    """
    image = tl.program_id(0).to(tl.int64)
    row = parameters + image // images_a_row * 16
    mean = tl.cast(0.0, COMPUTE)
    if tl.load(row + 3) != 1:
        mean = _mean(
            images + image * image_stride,
            row,
            height,
            width,
            channel_stride,
            row_stride,
            col_stride,
            BACKWARD,
            COMPUTE,
            CHANNELS,
            LANES,
            BLOCK,
        )
    tl.store(means + image, mean)


@triton.jit
def _coloured(value, weight, row, brightness, mean, COMPUTE: tl.constexpr, CHANNELS: tl.constexpr):
    """Colour of [LANES, BLOCK] values that are sums of pixels with total weight `weight`: colour is affine in them."""
    saturation, contrast = tl.load(row + 2).to(COMPUTE), tl.load(row + 3).to(COMPUTE)
    if (brightness != 0) | (saturation != 1) | (contrast != 1):
        grey = tl.sum(value, 0)
        grey = _divide(grey, tl.full(grey.shape, CHANNELS, COMPUTE)) + brightness * weight
        value += (brightness * weight)[None, :]
        value = grey[None, :] + (value - grey[None, :]) * saturation
        if contrast != 1:
            middle = ((mean + brightness) * weight)[None, :]
            value = middle + (value - middle) * contrast
    return value


@triton.jit
def _siamese_augment(
    images,
    parameters,
    means,
    result,
    images_a_row,
    height,
    width,
    pixels_a_program,
    image_stride,
    channel_stride,
    row_stride,
    col_stride,
    result_channel_stride,
    result_pixel_stride,
    LINEAR: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program makes a run of pixels of one image, BLOCK at a time, all channels of them.

    Each pixel is gathered from where cut, warp, shift and mirror say, and coloured after that: colour is affine, so
    it may act on the sum of four pixels in place of each of them, as long as its constants have their weight.

    Bytes moved: 2 N C H W e, read and written once, and where the contrast is not 1 the image once more, from L2 at
    the latest: its mean is needed before its first pixel. With a warp the four neighbours come from L1. Operations:
    about 8 a number, 20 with a warp. Memory binds; the stores are 16 bytes a thread wide for planes of a multiple of
    4 pixels of float32.
    """
    program = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(height * width, pixels_a_program)
    image = program // parts
    first = (program % parts).to(tl.int32) * pixels_a_program
    row = parameters + image // images_a_row * 16
    source = images + image * image_stride
    target = result + image * height * width * CHANNELS

    mirrored = tl.load(row) != 0
    brightness = tl.load(row + 1).to(COMPUTE)
    if LINEAR:
        brightness = tl.zeros_like(brightness)
    down, across = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    xx, xy, x0, yx, yy, y0, warped = _theta(row, height, width, COMPUTE)
    mean = tl.cast(0.0, COMPUTE)
    if means is not None:
        mean = tl.load(means + image)
    else:
        if tl.load(row + 3) != 1:
            mean = _mean(
                source,
                row,
                height,
                width,
                channel_stride,
                row_stride,
                col_stride,
                False,
                COMPUTE,
                CHANNELS,
                LANES,
                BLOCK,
            )

    lane = tl.arange(0, LANES)[:, None]
    channel = source + lane.to(tl.int64) * channel_stride
    for start in range(first, tl.minimum(first + pixels_a_program, height * width), BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        y, x = pixel // width, pixel % width
        inside = pixel < height * width
        kept = inside & ~_is_cut(row, y, x)
        value = tl.zeros([LANES, BLOCK], COMPUTE)
        weight = tl.zeros([BLOCK], COMPUTE)
        taps = tl.where(warped, 2, 1)
        column, line = x.to(COMPUTE), y.to(COMPUTE)
        if warped:
            x_c, y_c = _from_centre(x, width, COMPUTE), _from_centre(y, height, COMPUTE)
            column = _position(xx, xy, x0, x_c, y_c, width, COMPUTE)
            line = _position(yy, yx, y0, y_c, x_c, height, COMPUTE)
        left, top = tl.floor(column), tl.floor(line)
        for below in range(taps):
            v = top.to(tl.int32) + below
            share_y = 1.0 - tl.abs(line - (top + below))
            i = v + down
            known = kept & (v >= 0) & (v < height) & (i >= 0) & (i < height)
            for right in range(taps):
                u = left.to(tl.int32) + right
                share = share_y * (1.0 - tl.abs(column - (left + right)))
                j = u + across
                there = known & (u >= 0) & (u < width) & (j >= 0) & (j < width)
                j = tl.where(mirrored, width - 1 - j, j)
                at = channel + (i.to(tl.int64) * row_stride + j.to(tl.int64) * col_stride)[None, :]
                found = tl.load(at, mask=there[None, :] & (lane < CHANNELS), other=0).to(COMPUTE)
                value += share[None, :] * found
                weight += tl.where(there, share, 0.0)
        value = _coloured(value, weight, row, brightness, mean, COMPUTE, CHANNELS)
        at = target + lane.to(tl.int64) * result_channel_stride + (pixel * result_pixel_stride)[None, :]
        tl.store(at, value.to(result.dtype.element_ty), mask=inside[None, :] & (lane < CHANNELS))


@triton.jit
def _first(centre, reach, known, size):
    """The first position that may read from a pixel, of `_positions` many; 0 of all where nothing is known."""
    low = tl.ceil(centre - reach - 0.01)
    low = tl.minimum(tl.maximum(low, -2.0 * (reach + 1.0)), tl.cast(size, reach.dtype))
    return tl.where(known, low, 0.0).to(tl.int32)


@triton.jit
def _positions(reach, known, size):
    return tl.where(known, (2.0 * (reach + 0.01)).to(tl.int32) + 1, size)


@triton.jit
def _siamese_augment_backward(
    grads,
    parameters,
    means,
    result,
    images_a_row,
    height,
    width,
    pixels_a_program,
    image_stride,
    channel_stride,
    row_stride,
    col_stride,
    result_channel_stride,
    result_pixel_stride,
    COMPUTE: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program makes a run of pixels of the gradient at one image, BLOCK at a time, all channels of them.

    Each pixel gathers the gradients of the positions that read from it: those within the inverse map of its two by
    two neighbourhood, 3 x 3 of them for the scales and angles of DSA. No atomics, and the same bits in every run. A
    map without an inverse has all positions looked at.

    Bytes moved: 2 N C H W e, and the gradient once more where the contrast is not 1, from L2 at the latest. With a
    warp the neighbours come from L1, nine loads a number. Operations: about 8 a number, 90 with a warp. Memory binds,
    or with a warp the issue of loads from L1.
    """
    program = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(height * width, pixels_a_program)
    image = program // parts
    first = (program % parts).to(tl.int32) * pixels_a_program
    row = parameters + image // images_a_row * 16
    source = grads + image * image_stride
    target = result + image * height * width * CHANNELS

    mirrored = tl.load(row) != 0
    down, across = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    xx, xy, x0, yx, yy, y0, warped = _theta(row, height, width, COMPUTE)
    mean = tl.cast(0.0, COMPUTE)
    if means is not None:
        mean = tl.load(means + image)
    else:
        if tl.load(row + 3) != 1:
            mean = _mean(
                source,
                row,
                height,
                width,
                channel_stride,
                row_stride,
                col_stride,
                True,
                COMPUTE,
                CHANNELS,
                LANES,
                BLOCK,
            )
    determinant = xx * yy - xy * yx
    longest = tl.maximum(tl.abs(yy) + tl.abs(xy), tl.abs(xx) + tl.abs(yx))
    known = tl.abs(determinant) * tl.cast(height + width, COMPUTE) > longest  # or all of the image is as near
    determinant = tl.where(known, determinant, 1.0)
    inverse = _inverse(determinant)
    reach_x = tl.where(known, (tl.abs(yy) + tl.abs(xy)) * tl.abs(inverse), 0.0)
    reach_y = tl.where(known, (tl.abs(xx) + tl.abs(yx)) * tl.abs(inverse), 0.0)
    columns, lines = _positions(reach_x, known, width), _positions(reach_y, known, height)
    half_x, half_y = tl.cast(width, COMPUTE) * 0.5 - 0.5, tl.cast(height, COMPUTE) * 0.5 - 0.5

    lane = tl.arange(0, LANES)[:, None]
    channel = source + lane.to(tl.int64) * channel_stride
    for start in range(first, tl.minimum(first + pixels_a_program, height * width), BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        i, j = pixel // width, pixel % width
        inside = pixel < height * width
        v, u = i - down, tl.where(mirrored, width - 1 - j, j) - across
        there = inside & (v >= 0) & (v < height) & (u >= 0) & (u < width)
        value = tl.zeros([LANES, BLOCK], COMPUTE)
        if warped:
            from_x = u.to(COMPUTE) - half_x - x0
            from_y = v.to(COMPUTE) - half_y - y0
            first_x = _first((yy * from_x - xy * from_y) * inverse + half_x, reach_x, known, width)
            first_y = _first((xx * from_y - yx * from_x) * inverse + half_y, reach_y, known, height)
            for below in range(lines):
                y = first_y + below
                y_c = _from_centre(y, height, COMPUTE)
                known_y = there & (y >= 0) & (y < height)
                for right in range(columns):
                    x = first_x + right
                    x_c = _from_centre(x, width, COMPUTE)
                    column = _position(xx, xy, x0, x_c, y_c, width, COMPUTE)
                    line = _position(yy, yx, y0, y_c, x_c, height, COMPUTE)
                    share = tl.maximum(1.0 - tl.abs(column - u.to(COMPUTE)), 0.0)
                    share *= tl.maximum(1.0 - tl.abs(line - v.to(COMPUTE)), 0.0)
                    reads = known_y & (x >= 0) & (x < width) & (share > 0) & ~_is_cut(row, y, x)
                    at = channel + (y.to(tl.int64) * row_stride + x.to(tl.int64) * col_stride)[None, :]
                    found = tl.load(at, mask=reads[None, :] & (lane < CHANNELS), other=0).to(COMPUTE)
                    value += share[None, :] * found
        else:
            at = channel + (v.to(tl.int64) * row_stride + u.to(tl.int64) * col_stride)[None, :]
            kept = there & ~_is_cut(row, v, u)
            value = tl.load(at, mask=kept[None, :] & (lane < CHANNELS), other=0).to(COMPUTE)
        none = tl.zeros([BLOCK], COMPUTE)
        value = _coloured(value, none + 1.0, row, tl.cast(0.0, COMPUTE), mean, COMPUTE, CHANNELS)
        at = target + lane.to(tl.int64) * result_channel_stride + (pixel * result_pixel_stride)[None, :]
        tl.store(at, value.to(result.dtype.element_ty), mask=inside[None, :] & (lane < CHANNELS))


@prepared
def siamese_augment(images: torch.Tensor, parameters: torch.Tensor, linear: bool) -> Run:
    """Launch the kernel; arguments and result are those of the op `ddfast::siamese_augment`."""
    if images.shape[1] > WIDEST:
        return reference.siamese_augment
    return _launches(_siamese_augment, images, parameters, False, LINEAR=linear)


@prepared
def siamese_augment_backward(grad_output: torch.Tensor, parameters: torch.Tensor) -> Run:
    """Launch the kernel; arguments and result are those of the op `ddfast::siamese_augment_backward`."""
    if grad_output.shape[1] > WIDEST:
        return reference.siamese_augment_backward
    return _launches(_siamese_augment_backward, grad_output, parameters, True)


def _launches(
    kernel: Any, images: torch.Tensor, parameters: torch.Tensor, backward: bool, **constants: Any
) -> Run:
    count, channels, height, width = size = tuple(images.shape)
    if channels * height * width >= 2**31:
        raise ValueError(f"an image must have fewer than 2^31 numbers, got {list(size)}")
    last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    empty = Allocation(size, images.dtype, images.device, channels_last(size) if last else None)
    if 0 in size:
        return lambda *_: empty()
    wide = images.dtype == torch.float64
    lanes = triton.next_power_of_2(channels)
    shared = {
        "COMPUTE": tl.float64 if wide else tl.float32,
        "CHANNELS": channels,
        "LANES": lanes,
        "BLOCK": min((HELD // 2 if wide else HELD) // lanes, triton.next_power_of_2(height * width)),
        "num_warps": 4,
    }
    parts = triton.cdiv(height * width, PIXELS)
    images_a_row = count // len(parameters)
    launch = Launch(
        kernel,
        (count * parts,),
        (
            images_a_row,
            height,
            width,
            PIXELS,
            *images.stride(),
            *((1, channels) if last else (height * width, 1)),
        ),
        **constants,
        **shared,
    )
    find = Launch(
        _means, (count,), (images_a_row, height, width, *images.stride()), BACKWARD=backward, **shared
    )
    new_means = Allocation((count,), torch.float64 if wide else torch.float32, images.device)

    def run(images: torch.Tensor, parameters: torch.Tensor, *_: Any) -> torch.Tensor:
        result, parameters = empty(), parameters.contiguous()
        means = None
        if parts > 1:
            means = new_means()
            find(images, parameters, means)
        launch(images, parameters, means, result)
        return result

    return run
