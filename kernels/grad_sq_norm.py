"""Squared norms of per-sample parameter gradients, with no per-sample gradient in memory.

A layer's weight gradient on one sample is G^T X, for T positions, I inputs and O outputs. A convolution's X is
the unfolded image, which is never stored either: a position's row is read where it lies in the channels-last image,
tap by tap. (Planar images are brought channels-last first: two copies of a layer's tensors, a few percent of the
products' time, for loads of 16 bytes instead of 4.) A linear layer is the convolution of an image one pixel high with
kernels of one pixel.

The products run on matrix units: 16-bit inputs as they are, float32 as three products of TF32 (`tf32x3`, whose
error is that of float32) and never as one, float64 as float64. Sums are float32, or float64 for float64. Each
program writes the squared norm of its part, and the parts are added up in a fixed order: the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from ddfast.kernels.launching import Allocation, Launch, Run, capability, prepared

# A few waves on the largest GPUs; tiles shrink until there are so many programs, or as small as they can be.
PROGRAMS = 512

# Generations whose matrix units read operands from shared memory (wgmma, tcgen05), as those behind 0, no GPU, may.
_FROM_SHARED_MEMORY = (0, 9, 10)


@triton.jit
def _columns(
    image,
    position,
    feature,
    tap,
    positions,
    features,
    channels,
    size,
    strides,
    step,
    padding,
    dilation,
    KERNEL_X: tl.constexpr,
    FLAT: tl.constexpr,
    ONES: tl.constexpr,
):
    """Rows `position` of the unfolded channels-last image; 0 outside.

    Columns are the channels `feature` under one tap of the kernel, or, FLAT, the features themselves, for layers with
    so few channels that those of one tap would not fill a tile. Features lie in the order of memory, row of the kernel
    by row, and a row of the kernel (its taps times their channels) is one run of the image where taps touch. So where
    an element lies is a number of its position plus a number of its feature, each worked out once. ONES: one feature
    more, always 1.
    """
    height, width, out_width = size
    y = position // out_width * step[0] - padding[0]
    x = position % out_width * step[1] - padding[1]
    if FLAT:
        row = feature // (KERNEL_X * channels) * dilation[0]
        col = feature // channels % KERNEL_X * dilation[1]
        behind = row * strides[0] + col * strides[1] + feature % channels
        rows, cols = y[:, None] + row[None, :], x[:, None] + col[None, :]
        known = (position < positions)[:, None] & (feature < features)[None, :]
        # What is negative is a large number without its sign.
        known &= (rows.to(tl.uint32) < tl.cast(height, tl.uint32)) & (
            cols.to(tl.uint32) < tl.cast(width, tl.uint32)
        )
        at = (y * strides[0] + x * strides[1])[:, None] + behind[None, :]
        columns = tl.load(image + at, mask=known, other=0)
        if ONES:
            columns = tl.where((feature == features)[None, :], 1.0, columns).to(columns.dtype)
    else:
        y += tap // KERNEL_X * dilation[0]
        x += tap % KERNEL_X * dilation[1]
        inside = (position < positions) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        known = inside[:, None] & (feature < channels)[None, :]
        pixel = y * strides[0] + x * strides[1]
        columns = tl.load(image + pixel[:, None] + feature[None, :], mask=known, other=0)
    return columns


@triton.jit
def _grads(grad, position, output, positions, outputs, stride):
    """The gradient [positions, outputs] at the layer's output; 0 outside."""
    known = (position < positions)[:, None] & (output < outputs)[None, :]
    return tl.load(grad + position[:, None] * stride + output[None, :], mask=known, other=0)


@triton.jit
def _direct(
    input,
    grad_output,
    parts,
    positions,
    features,
    channels,
    outputs,
    groups,
    size,
    input_strides,
    grad_stride,
    step,
    padding,
    dilation,
    KERNEL_X: tl.constexpr,
    TAPS: tl.constexpr,
    FLAT: tl.constexpr,
    BIAS: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A program makes one BLOCK_O x BLOCK_I tile of one sample's G^T X in registers, squares it and adds it up.

    A tile's inputs are channels under one tap, so that where they lie is worked out once a position, or FLAT features,
    to which a bias adds one. Else the bias's gradient is added up beside the product.

    Operations a sample: 2 T I O, three times that on the matrix units for float32. Bytes moved: X and G once from
    memory, and from L2 X once for each BLOCK_O outputs and G once for each BLOCK_I inputs; one number a tile is
    written. A tile of 128 x 128 does 64 multiplications with each element loaded, 32 operations a byte of float32,
    and 64 x 64 half of that: the matrix units bind for float32, L2 for 16-bit inputs with 64 channels.
    """
    program = tl.program_id(0).to(tl.int64)
    if FLAT:
        tiles_i = tl.cdiv(features + 1 if BIAS else features, BLOCK_I)
    else:
        tiles_i = tl.cdiv(channels, BLOCK_I) * TAPS
    tiles = tl.cdiv(outputs, BLOCK_O) * tiles_i
    tile = (program % tiles).to(tl.int32)
    group = (program // tiles % groups).to(tl.int32)
    sample = program // tiles // groups
    image = input + sample * input_strides[2] + group * channels
    grad = grad_output + sample * positions * grad_stride + group * outputs
    output = tile // tiles_i * BLOCK_O + tl.arange(0, BLOCK_O)
    if FLAT:
        tap = 0
        feature = tile % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    else:
        tap = tile % TAPS
        feature = tile % tiles_i // TAPS * BLOCK_I + tl.arange(0, BLOCK_I)

    product = tl.zeros([BLOCK_O, BLOCK_I], SUM)
    total = tl.zeros([16, BLOCK_O], SUM)
    for start in range(0, positions, BLOCK_T):
        position = start + tl.arange(0, BLOCK_T)
        x = _columns(
            image,
            position,
            feature,
            tap,
            positions,
            features,
            channels,
            size,
            input_strides,
            step,
            padding,
            dilation,
            KERNEL_X,
            FLAT,
            BIAS,
        )
        g = _grads(grad, position, output, positions, outputs, grad_stride)
        product = tl.dot(tl.trans(g), x, product, input_precision=PRECISION, out_dtype=SUM)
        if BIAS and not FLAT:  # rows that are 16 apart lie in one thread
            total += tl.sum(tl.reshape(g.to(SUM), [BLOCK_T // 16, 16, BLOCK_O]), 0)
    part = tl.sum(product * product)
    if BIAS and not FLAT:  # by the first of the programs that read these outputs
        bias = tl.sum(total, 0)
        part += tl.where(tile % tiles_i == 0, tl.sum(bias * bias), 0.0)
    tl.store(parts + program, part)


@triton.jit
def _gram(
    input,
    grad_output,
    parts,
    positions,
    features,
    channels,
    outputs,
    groups,
    size,
    input_strides,
    grad_stride,
    step,
    padding,
    dilation,
    KERNEL_X: tl.constexpr,
    TAPS: tl.constexpr,
    FLAT: tl.constexpr,
    BIAS: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program makes one BLOCK_T x BLOCK_T tile of one sample's X X^T and G G^T and adds up their product.

    Only tiles on and above the diagonal are made; those above count twice.

    Operations a sample: T^2 (I + O), three times that on the matrix units for float32. Bytes moved: X and G once from
    memory, and from L2 once for each BLOCK_T positions; one number a tile is written. What binds is as in `_direct`.
    The Gram matrix of the pixels, of which X X^T is sums (csrc/grad_sq_norm.cpp), would save most of T^2 I but has to
    lie in memory: not worth it, for of ResNet-18's layers at 224 px it is less than 5% of the operations that it
    would save.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(positions, BLOCK_T)
    tiles = blocks * (blocks + 1) // 2
    tile = (program % tiles).to(tl.int32)
    group = (program // tiles % groups).to(tl.int32)
    sample = program // tiles // groups
    image = input + sample * input_strides[2] + group * channels
    grad = grad_output + sample * positions * grad_stride + group * outputs
    # tile = col (col + 1) / 2 + row with row <= col; the root is exact enough to be off by one at most.
    col = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    col = tl.where(col * (col + 1) // 2 > tile, col - 1, col)
    col = tl.where((col + 1) * (col + 2) // 2 <= tile, col + 1, col)
    row = tile - col * (col + 1) // 2
    rows = row * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = col * BLOCK_T + tl.arange(0, BLOCK_T)
    inputs_gram = tl.zeros([BLOCK_T, BLOCK_T], SUM)
    taps: tl.constexpr = 1 if FLAT else TAPS
    width = features if FLAT else channels
    steps = tl.cdiv(width, BLOCK_K)
    for at in range(steps * taps):
        tap = at % taps
        feature = at // taps * BLOCK_K + tl.arange(0, BLOCK_K)
        left = _columns(
            image,
            rows,
            feature,
            tap,
            positions,
            features,
            channels,
            size,
            input_strides,
            step,
            padding,
            dilation,
            KERNEL_X,
            FLAT,
            False,
        )
        right = _columns(
            image,
            cols,
            feature,
            tap,
            positions,
            features,
            channels,
            size,
            input_strides,
            step,
            padding,
            dilation,
            KERNEL_X,
            FLAT,
            False,
        )
        inputs_gram = tl.dot(left, tl.trans(right), inputs_gram, input_precision=PRECISION, out_dtype=SUM)
    grads_gram = tl.zeros([BLOCK_T, BLOCK_T], SUM)
    for start in range(0, outputs, BLOCK_K):
        output = start + tl.arange(0, BLOCK_K)
        left = _grads(grad, rows, output, positions, outputs, grad_stride)
        right = _grads(grad, cols, output, positions, outputs, grad_stride)
        grads_gram = tl.dot(left, tl.trans(right), grads_gram, input_precision=PRECISION, out_dtype=SUM)
    if BIAS:  # an input that is always 1; positions that are not there have no gradient
        inputs_gram += 1.0
    part = tl.sum(inputs_gram * grads_gram) * tl.where(row == col, 1.0, 2.0)
    tl.store(parts + program, part)


@triton.jit
def _affine(
    normalized,
    grad_output,
    parts,
    outer,
    parameters,
    inner,
    x_strides,
    grad_strides,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program sums BLOCK_P parameters' gradients over one sample [outer, parameters, inner], then squares.

    Bytes moved: both inputs read once, a number a program written. Operations: three an element. The reads bind.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(parameters, BLOCK_P)
    parameter = (program % blocks).to(tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    sample = program // blocks
    # Summed along the tile behind the loop: Triton 3.6 does not compile a sum within it that is used twice later.
    weights = tl.zeros([BLOCK_P, BLOCK_R], SUM)
    biases = tl.zeros([BLOCK_P, BLOCK_R], SUM)
    x_at = normalized + sample * x_strides[0] + parameter * x_strides[2]
    grad_at = grad_output + sample * grad_strides[0] + parameter * grad_strides[2]
    for start in range(0, outer * inner, BLOCK_R):
        element = start + tl.arange(0, BLOCK_R)[None, :]
        inside = (parameter < parameters) & (element < outer * inner)
        i, j = element // inner, element % inner
        grad = tl.load(grad_at + i * grad_strides[1] + j * grad_strides[3], mask=inside, other=0).to(SUM)
        if WEIGHT:
            x = tl.load(x_at + i * x_strides[1] + j * x_strides[3], mask=inside, other=0).to(SUM)
            weights += x * grad
        if BIAS:
            biases += grad
    weight, bias = tl.sum(weights, 1), tl.sum(biases, 1)
    tl.store(parts + program, tl.sum(weight * weight + bias * bias))


@triton.jit
def _embedding(
    indices,
    grad_output,
    parts,
    positions,
    width,
    padding_idx,
    grad_sample_stride,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program adds up G G^T where the row's and the column's position look up the same row of the table.

    Tiles of positions that share no row, which is most of them off the diagonal, are left after a look at the
    indices; tiles below the diagonal equal those above it.

    Operations a sample: at most T^2 D. Bytes moved: G once from memory. On the diagonal alone the reads bind.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(positions, BLOCK_T)
    tile = (program % (blocks * blocks)).to(tl.int32)
    sample = program // (blocks * blocks)
    row = tile // blocks
    col = tile % blocks
    rows = row * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = col * BLOCK_T + tl.arange(0, BLOCK_T)
    looked_up = tl.load(indices + sample * positions + rows, mask=rows < positions, other=-1)
    also = tl.load(indices + sample * positions + cols, mask=cols < positions, other=-2)
    same = (looked_up[:, None] == also[None, :]) & (looked_up != padding_idx)[:, None]
    part = tl.full([], 0, SUM)
    if (row <= col) & (tl.max(tl.max(same.to(tl.int32), 1), 0) > 0):
        grad = grad_output + sample * grad_sample_stride
        gram = tl.zeros([BLOCK_T, BLOCK_T], SUM)
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            at = grad + rows.to(tl.int64)[:, None] * width + k[None, :]
            left = tl.load(at, mask=(rows < positions)[:, None] & (k < width)[None, :], other=0)
            at = grad + cols.to(tl.int64)[:, None] * width + k[None, :]
            right = tl.load(at, mask=(cols < positions)[:, None] & (k < width)[None, :], other=0)
            gram = tl.dot(left, tl.trans(right), gram, input_precision=PRECISION, out_dtype=SUM)
        part = tl.sum(tl.where(same, gram, 0.0)) * tl.where(row == col, 1.0, 2.0)
    tl.store(parts + program, part)


@triton.jit
def _rows(
    input, grad_output, norms, features, outputs, BIAS: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr
):
    """Squared norm of the outer product of a sample's input and gradient. One program a sample.

    Bytes moved: both read once. Operations: two an element. The reads bind, or the latency of the launch.
    """
    sample = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], SUM)
    for start in range(0, features, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(input + sample * features + at, mask=at < features, other=0).to(SUM)
        squares += x * x
    grad_squares = tl.zeros([BLOCK], SUM)
    for start in range(0, outputs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        g = tl.load(grad_output + sample * outputs + at, mask=at < outputs, other=0).to(SUM)
        grad_squares += g * g
    norm = tl.sum(squares, 0)
    if BIAS:
        norm += 1.0
    tl.store(norms + sample, norm * tl.sum(grad_squares, 0))


@prepared
def grad_sq_norm_linear(input: torch.Tensor, grad_output: torch.Tensor, bias: bool) -> Run:
    """Launch the kernel; arguments and result are those of the op `ddfast::grad_sq_norm_linear`."""
    samples, features, outputs = input.shape[0], input.shape[-1], grad_output.shape[-1]
    if input.ndim > 2:
        positions = input.shape[1:-1].numel()
        of_rows = _product(
            (samples, 1, positions, features),
            (samples, 1, positions, outputs),
            ((1, 1), (1, 1), (0, 0), (1, 1), 1),
            bias,
            grad_output,
        )
        return lambda input, grad_output, _: of_rows(input.contiguous(), grad_output.contiguous())
    empty = Allocation((samples,), _sum_dtype(grad_output), grad_output.device)
    if samples == 0:
        return lambda *_: empty()
    launch = Launch(
        _rows,
        (samples,),
        (features, outputs),
        BIAS=bias,
        SUM=_sum(grad_output),
        BLOCK=min(1024, triton.next_power_of_2(max(features, outputs, 1))),
        num_warps=4,
    )

    def run(input: torch.Tensor, grad_output: torch.Tensor, bias: bool) -> torch.Tensor:
        norms = empty()
        launch(input.contiguous(), grad_output.contiguous(), norms)
        return norms

    return run


@prepared
def grad_sq_norm_conv2d(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> Run:
    """Launch the kernel; arguments and result are those of the op `ddfast::grad_sq_norm_conv2d`."""
    samples, channels, height, width = input.shape
    _, outputs, out_height, out_width = grad_output.shape
    of_rows = _product(
        (samples, height, width, channels),
        (samples, out_height, out_width, outputs),
        (kernel_size, stride, padding, dilation, groups),
        bias,
        grad_output,
    )
    if all(tensor.permute(0, 2, 3, 1).is_contiguous() for tensor in (input, grad_output)):
        return of_rows

    def run(input: torch.Tensor, grad_output: torch.Tensor, *_: Any) -> torch.Tensor:
        last = torch.channels_last
        return of_rows(input.contiguous(memory_format=last), grad_output.contiguous(memory_format=last))

    return run


def _product(
    input_size: tuple[int, int, int, int],
    grad_size: tuple[int, int, int, int],
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], int],
    bias: bool,
    like: torch.Tensor,
) -> Run:
    """Norms of the weight and bias gradient of a convolution of images [B, H, W, C], from gradients [B, H', W', O].

    What is returned takes the two, contiguous, or tensors that lie so in memory. `geometry` is kernel size, stride,
    padding, dilation and groups; `like` has the gradients' dtype and device.
    """
    kernel_size, stride, padding, dilation, groups = geometry
    samples, height, width, all_channels = input_size
    _, out_height, out_width, out_channels = grad_size
    for size in (input_size, grad_size):
        if size[1] * size[2] * size[3] >= 2**31:  # offsets within a sample are 32 bits wide
            raise ValueError(f"a sample must have fewer than 2^31 elements, got {list(size[1:])}")
    positions = out_height * out_width
    channels, outputs = all_channels // groups, out_channels // groups
    kernel, tiles, constants = blocks(
        samples, positions, channels, outputs, kernel_size, groups, bias, like.dtype
    )
    programs = groups * tiles
    empty = Allocation((samples, programs), _sum_dtype(like), like.device)
    if samples * programs == 0:
        if bias and channels * kernel_size[0] * kernel_size[1] == 0:  # there is a bias alone
            rows = (samples, positions, out_channels)
            strides = (positions * out_channels, out_channels, 1)
            return lambda _, g, *__: g.as_strided(rows, strides).sum(1, dtype=_sum_dtype(g)).square().sum(1)
        return lambda *_: empty().sum(1)
    launch = Launch(
        kernel,
        (samples * programs,),
        (
            positions,
            channels * kernel_size[0] * kernel_size[1],
            channels,
            outputs,
            groups,
            (height, width, out_width),
            (width * all_channels, all_channels, height * width * all_channels),
            out_channels,
            tuple(stride),
            tuple(padding),
            tuple(dilation),
        ),
        KERNEL_X=kernel_size[1],
        TAPS=kernel_size[0] * kernel_size[1],
        BIAS=bias,
        SUM=_sum(like),
        PRECISION="ieee" if like.dtype == torch.float64 else "tf32x3",
        **constants,
    )

    def run(input: torch.Tensor, grad_output: torch.Tensor, *_: Any) -> torch.Tensor:
        parts = empty()
        launch(input, grad_output, parts)
        return parts.sum(1)

    return run


def blocks(
    samples: int,
    positions: int,
    channels: int,
    outputs: int,
    kernel_size: Sequence[int],
    groups: int,
    bias: bool,
    dtype: torch.dtype,
) -> tuple[Any, int, dict[str, Any]]:
    """The kernel for a layer's norms, its tiles a sample and group, and its constants.

    Args:
        samples, positions: B and T.
        channels, outputs: of one group.
        kernel_size, groups, bias: the convolution's.
        dtype: of input and gradient.
    """
    taps = kernel_size[0] * kernel_size[1]
    features = channels * taps
    flat = taps > 1 and channels < 16
    double = dtype == torch.float64
    # 64 bytes of a row, at least, are one step of a matrix product.
    depth = {8: 16, 4: 32, 2: 64}[dtype.itemsize]
    # Else the high and low halves of both operands of float32 lie in registers: those of a large tile, 32 deep, would
    # spill. More steps, half as deep, are under way at once instead.
    halved = dtype == torch.float32 and capability() // 10 not in _FROM_SHARED_MEMORY
    if positions * (features + outputs) < features * outputs:
        block = _block(positions)

        def tiles() -> int:
            return triton.cdiv(positions, block) * (triton.cdiv(positions, block) + 1) // 2

        while block > 16 and samples * groups * tiles() < PROGRAMS:
            block //= 2
        shallow = halved and block > 32
        step = min(depth // 2 if shallow else depth, _power(features if flat else channels))
        constants = {
            "FLAT": flat,
            "BLOCK_T": block,
            "BLOCK_K": step,
            "num_stages": 4 if shallow else 3,
            "num_warps": 4,
        }
        if dtype.itemsize == 2 and capability() // 10 == 10:
            # Shared memory holds four such programs, so 128 registers are theirs: the compiler would spill for a fifth.
            constants["maxnreg"] = 128
        return _gram, tiles(), constants
    largest = 64 if double else 128
    block_o = _block(outputs, largest)
    block_i = _least_padded(features + bias, largest) if flat else _block(channels, largest)

    def tiles() -> int:
        tiles_i = triton.cdiv(features + bias, block_i) if flat else taps * triton.cdiv(channels, block_i)
        return triton.cdiv(outputs, block_o) * tiles_i

    while max(block_o, block_i) > 32 and samples * groups * tiles() < PROGRAMS:
        if block_i >= block_o:
            block_i //= 2
        else:
            block_o //= 2
    shallow = halved and max(block_o, block_i) > 32
    constants = {"BLOCK_O": block_o, "BLOCK_I": block_i, "BLOCK_T": 16 if shallow else min(depth, 32)}
    return (
        _direct,
        tiles(),
        {
            "FLAT": flat,
            "num_stages": 2 if flat else 4 if shallow else 3,
            "num_warps": 8 if max(block_o, block_i) == 128 else 4,
            **constants,
        },
    )


@prepared
def grad_sq_norm_norm(
    normalized: torch.Tensor,
    grad_output: torch.Tensor,
    first_dim: int,
    last_dim: int,
    weight: bool,
    bias: bool,
) -> Run:
    """Launch the kernel; arguments and result are those of the op `ddfast::grad_sq_norm_norm`."""
    shape = normalized.shape
    folded = (
        shape[0],
        shape[1:first_dim].numel(),
        shape[first_dim : last_dim + 1].numel(),
        shape[last_dim + 1 :].numel(),
    )
    x, g = normalized.reshape(folded), grad_output.reshape(folded)
    _check_extents(x, g)
    in_place = all(a.data_ptr() == b.data_ptr() for a, b in ((x, normalized), (g, grad_output)))
    samples, outer, parameters, inner = folded
    block_p, block_r = (16, 128) if inner > 1 else (64, 32)
    programs = triton.cdiv(parameters, block_p)
    empty = Allocation((samples, programs), _sum_dtype(g), g.device)
    if samples * programs == 0:
        return lambda *_: empty().sum(1)
    launch = Launch(
        _affine,
        (samples * programs,),
        (outer, parameters, inner, x.stride(), g.stride()),
        WEIGHT=weight,
        BIAS=bias,
        SUM=_sum(g),
        BLOCK_P=block_p,
        BLOCK_R=block_r,
        num_warps=4,
    )

    def run(normalized: torch.Tensor, grad_output: torch.Tensor, *_: Any) -> torch.Tensor:
        parts = empty()
        if not in_place:
            normalized, grad_output = normalized.reshape(folded), grad_output.reshape(folded)
        launch(normalized, grad_output, parts)
        return parts.sum(1)

    return run


@prepared
def grad_sq_norm_embedding(indices: torch.Tensor, grad_output: torch.Tensor, padding_idx: int) -> Run:
    """Launch the kernel; arguments and result are those of the op `ddfast::grad_sq_norm_embedding`."""
    samples, width = grad_output.shape[0], grad_output.shape[-1]
    positions = indices.shape[1:].numel()
    double = grad_output.dtype == torch.float64
    block = min(32, _block(positions))
    programs = triton.cdiv(positions, block) ** 2
    empty = Allocation((samples, programs), _sum_dtype(grad_output), grad_output.device)
    if samples * programs == 0:
        return lambda *_: empty().sum(1)
    launch = Launch(
        _embedding,
        (samples * programs,),
        (positions, width, padding_idx, positions * width),
        SUM=_sum(grad_output),
        PRECISION="ieee" if double else "tf32x3",
        BLOCK_T=block,
        BLOCK_K=16 if double else 32,
        num_warps=4,
    )

    def run(indices: torch.Tensor, grad_output: torch.Tensor, padding_idx: int) -> torch.Tensor:
        parts = empty()
        launch(indices.contiguous(), grad_output.contiguous(), parts)
        return parts.sum(1)

    return run


def _check_extents(*tensors: torch.Tensor) -> None:
    """Offsets within a sample are 32 bits wide."""
    for tensor in tensors:
        shape, strides = tensor.shape[1:], tensor.stride()[1:]
        if sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size) >= 2**31:
            raise ValueError(
                f"a sample must span fewer than 2^31 elements, got {list(shape)} with strides {list(strides)}"
            )


def _power(size: int) -> int:
    """The power of two, 16 or more, that a matrix product over `size` takes."""
    return max(16, triton.next_power_of_2(max(size, 1)))


def _block(size: int, largest: int = 64) -> int:
    """Side of a tile."""
    return min(largest, _power(size))


def _least_padded(features: int, largest: int) -> int:
    """The largest tile that `features` fill to three quarters; where none is, the one that they fill best."""
    sizes = [largest >> shift for shift in range(8) if largest >> shift >= 16]
    shares = {size: features / (triton.cdiv(features, size) * size) for size in sizes}
    return next((size for size in sizes if shares[size] >= 0.75), max(sizes, key=shares.__getitem__))


def _sum(tensor: torch.Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
