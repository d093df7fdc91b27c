"""Squared norms of per-sample parameter gradients, with no per-sample gradient in memory.

A layer's weight gradient on one sample is G^T X, for T positions, I inputs and O outputs. A convolution's X is
the unfolded image, which is never stored either: its elements are addressed where they lie in the image. A linear
layer is the convolution of an image one pixel high with kernels of one pixel.

The products run on matrix units: 16-bit inputs as they are, float32 as three products of TF32 (`tf32x3`, whose
error is that of float32) and never as one, float64 as float64. Sums are float32, or float64 for float64. Each
program writes the squared norm of its part, and the parts are added up in a fixed order: the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

PROGRAMS = (
    512  # a few waves on the largest GPUs; tiles shrink until there are so many, or as small as they can be
)
DEPTH = 32  # of one step of a matrix product


@triton.jit
def _columns(
    image,
    position,
    feature,
    positions,
    features,
    size,
    strides,
    step,
    padding,
    dilation,
    KERNEL_X: tl.constexpr,
    TAPS: tl.constexpr,
    BY_POSITION: tl.constexpr,
):
    """Rows `position` and columns `feature` of an unfolded image; 0 outside.

    A feature is a channel and a tap of the kernel. The norm does not ask in which order, so it is the order of
    memory. BY_POSITION (images [C, H, W]): threads go along positions, taps come before channels. Otherwise
    (channels last): threads go along features, and channels come before taps.
    """
    if BY_POSITION:
        t, k = position[None, :], feature[:, None]
    else:
        t, k = position[:, None], feature[None, :]
    height, width, out_width = size
    channels = features // TAPS
    if TAPS == 1:
        channel, tap = k, 0
    elif BY_POSITION:
        channel, tap = k // TAPS, k % TAPS
    else:
        channel, tap = k % channels, k // channels
    y = t // out_width * step[0] - padding[0] + tap // KERNEL_X * dilation[0]
    x = t % out_width * step[1] - padding[1] + tap % KERNEL_X * dilation[1]
    inside = (t < positions) & (k < features) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    columns = tl.load(image + channel * strides[1] + y * strides[2] + x * strides[3], mask=inside, other=0)
    if BY_POSITION:
        columns = tl.trans(columns)
    return columns


@triton.jit
def _grads(grad, position, output, positions, outputs, size, strides, BY_POSITION: tl.constexpr):
    """The gradient [positions, outputs] at the layer's output; 0 outside."""
    if BY_POSITION:
        t, o = position[None, :], output[:, None]
    else:
        t, o = position[:, None], output[None, :]
    at = grad + o * strides[1] + t // size[2] * strides[2] + t % size[2] * strides[3]
    grads = tl.load(at, mask=(t < positions) & (o < outputs), other=0)
    if BY_POSITION:
        grads = tl.trans(grads)
    return grads


@triton.jit
def _direct(
    input,
    grad_output,
    parts,
    positions,
    features,
    outputs,
    groups,
    size,
    input_strides,
    grad_strides,
    step,
    padding,
    dilation,
    KERNEL_X: tl.constexpr,
    TAPS: tl.constexpr,
    BIAS: tl.constexpr,
    INPUT_BY_POSITION: tl.constexpr,
    GRAD_BY_POSITION: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A program makes one BLOCK_O x BLOCK_I tile of one sample's G^T X in registers, squares it and adds it up.

    Operations a sample: 2 T I O. Bytes moved: X and G once from memory, and from L2 X once for each BLOCK_O
    outputs and G once for each BLOCK_I inputs; one number a tile is written. Tiles of 64 x 64 do 32 operations
    with each element that is loaded. The unfolding costs about ten integer operations an element, which bind
    for 16-bit inputs; for float32 the matrix units do.
    """
    program = tl.program_id(0).to(tl.int64)
    tiles_i = tl.cdiv(features, BLOCK_I)
    tiles = tl.cdiv(outputs, BLOCK_O) * tiles_i
    tile = (program % tiles).to(tl.int32)
    group = program // tiles % groups
    sample = program // tiles // groups
    image = input + sample * input_strides[0] + group * (features // TAPS) * input_strides[1]
    grad = grad_output + sample * grad_strides[0] + group * outputs * grad_strides[1]
    output = tile // tiles_i * BLOCK_O + tl.arange(0, BLOCK_O)
    feature = tile % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)

    product = tl.zeros([BLOCK_O, BLOCK_I], SUM)
    bias = tl.zeros([BLOCK_O], SUM)
    for start in range(0, positions, BLOCK_T):
        position = start + tl.arange(0, BLOCK_T)
        x = _columns(
            image,
            position,
            feature,
            positions,
            features,
            size,
            input_strides,
            step,
            padding,
            dilation,
            KERNEL_X,
            TAPS,
            INPUT_BY_POSITION,
        )
        g = _grads(grad, position, output, positions, outputs, size, grad_strides, GRAD_BY_POSITION)
        product = tl.dot(tl.trans(g), x, product, input_precision=PRECISION, out_dtype=SUM)
        if BIAS:
            bias += tl.sum(g.to(SUM), 0)
    part = tl.sum(product * product)
    if BIAS:
        part += tl.where(tile % tiles_i == 0, tl.sum(bias * bias), 0.0)
    tl.store(parts + program, part)


@triton.jit
def _gram(
    input,
    grad_output,
    parts,
    positions,
    features,
    outputs,
    groups,
    size,
    input_strides,
    grad_strides,
    step,
    padding,
    dilation,
    KERNEL_X: tl.constexpr,
    TAPS: tl.constexpr,
    BIAS: tl.constexpr,
    INPUT_BY_POSITION: tl.constexpr,
    GRAD_BY_POSITION: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program makes one BLOCK_T x BLOCK_T tile of one sample's X X^T and G G^T and adds up their product.

    Tiles below the diagonal equal those above it, which count twice. A bias is one more input that is always
    one: it adds one to X X^T.

    Operations a sample: T^2 (I + O). Bytes moved: X and G once from memory, and from L2 once for each BLOCK_T
    positions; one number a tile is written. What binds is as in `_direct`.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(positions, BLOCK_T)
    tile = (program % (blocks * blocks)).to(tl.int32)
    group = program // (blocks * blocks) % groups
    sample = program // (blocks * blocks) // groups
    image = input + sample * input_strides[0] + group * (features // TAPS) * input_strides[1]
    grad = grad_output + sample * grad_strides[0] + group * outputs * grad_strides[1]
    row = tile // blocks
    col = tile % blocks
    part = tl.full([], 0, SUM)
    if row <= col:
        rows = row * BLOCK_T + tl.arange(0, BLOCK_T)
        cols = col * BLOCK_T + tl.arange(0, BLOCK_T)
        inputs_gram = tl.zeros([BLOCK_T, BLOCK_T], SUM)
        for start in range(0, features, BLOCK_K):
            feature = start + tl.arange(0, BLOCK_K)
            left = _columns(
                image,
                rows,
                feature,
                positions,
                features,
                size,
                input_strides,
                step,
                padding,
                dilation,
                KERNEL_X,
                TAPS,
                INPUT_BY_POSITION,
            )
            right = _columns(
                image,
                cols,
                feature,
                positions,
                features,
                size,
                input_strides,
                step,
                padding,
                dilation,
                KERNEL_X,
                TAPS,
                INPUT_BY_POSITION,
            )
            inputs_gram = tl.dot(left, tl.trans(right), inputs_gram, input_precision=PRECISION, out_dtype=SUM)
        grads_gram = tl.zeros([BLOCK_T, BLOCK_T], SUM)
        for start in range(0, outputs, BLOCK_K):
            output = start + tl.arange(0, BLOCK_K)
            left = _grads(grad, rows, output, positions, outputs, size, grad_strides, GRAD_BY_POSITION)
            right = _grads(grad, cols, output, positions, outputs, size, grad_strides, GRAD_BY_POSITION)
            grads_gram = tl.dot(left, tl.trans(right), grads_gram, input_precision=PRECISION, out_dtype=SUM)
        if BIAS:
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
    weight = tl.zeros([BLOCK_P], SUM)
    bias = tl.zeros([BLOCK_P], SUM)
    x_at = normalized + sample * x_strides[0] + parameter * x_strides[2]
    grad_at = grad_output + sample * grad_strides[0] + parameter * grad_strides[2]
    for start in range(0, outer * inner, BLOCK_R):
        element = start + tl.arange(0, BLOCK_R)[None, :]
        inside = (parameter < parameters) & (element < outer * inner)
        i, j = element // inner, element % inner
        grad = tl.load(grad_at + i * grad_strides[1] + j * grad_strides[3], mask=inside, other=0).to(SUM)
        if WEIGHT:
            x = tl.load(x_at + i * x_strides[1] + j * x_strides[3], mask=inside, other=0).to(SUM)
            weight += tl.sum(x * grad, 1)
        if BIAS:
            bias += tl.sum(grad, 1)
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


def grad_sq_norm_linear(input: torch.Tensor, grad_output: torch.Tensor, bias: bool) -> torch.Tensor:
    """Launch the kernel; arguments and result are those of the op `ddfast::grad_sq_norm_linear`."""
    samples, features, outputs = input.shape[0], input.shape[-1], grad_output.shape[-1]
    positions = input[0].numel() // features if samples * features else 0
    if input.ndim == 2:
        sq_norm = _sq_norm(input)
        return (sq_norm + 1 if bias else sq_norm) * _sq_norm(grad_output)
    x = input.reshape(samples, positions, 1, features).movedim(-1, 1).transpose(2, 3)
    g = grad_output.reshape(samples, positions, 1, outputs).movedim(-1, 1).transpose(2, 3)
    return _sq_norm_of_product(x, g, (1, 1), (1, 1), (0, 0), (1, 1), 1, bias)


def grad_sq_norm_conv2d(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> torch.Tensor:
    """Launch the kernel; arguments and result are those of the op `ddfast::grad_sq_norm_conv2d`."""
    return _sq_norm_of_product(input, grad_output, kernel_size, stride, padding, dilation, groups, bias)


def _sq_norm_of_product(
    input: torch.Tensor,
    grad_output: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> torch.Tensor:
    """Norms of a convolution's gradient from images [B, C, H, W] and gradients [B, O, H', W'] of any strides."""
    samples, channels, height, width = input.shape
    _, out_channels, out_height, out_width = grad_output.shape
    _check_extents(input, grad_output)
    taps = kernel_size[0] * kernel_size[1]
    positions = out_height * out_width
    features, outputs = channels // groups * taps, out_channels // groups
    double = grad_output.dtype == torch.float64
    block_k = 16 if double else DEPTH
    if positions * (features + outputs) < features * outputs:
        block = _block(positions)
        while block > 16 and samples * groups * triton.cdiv(positions, block) ** 2 < PROGRAMS:
            block //= 2
        kernel, blocks = _gram, {"BLOCK_T": block, "BLOCK_K": block_k}
        programs = groups * triton.cdiv(positions, block) ** 2
    else:
        block_o, block_i = _block(outputs), _block(features)

        def tiles() -> int:
            return groups * triton.cdiv(outputs, block_o) * triton.cdiv(features, block_i)

        while max(block_o, block_i) > 16 and samples * tiles() < PROGRAMS:
            if block_i >= block_o:
                block_i //= 2
            else:
                block_o //= 2
        kernel, blocks = _direct, {"BLOCK_O": block_o, "BLOCK_I": block_i, "BLOCK_T": block_k}
        programs = tiles()
    parts = torch.empty((samples, programs), dtype=_sum_dtype(grad_output), device=grad_output.device)
    if parts.numel() == 0:
        return parts.sum(1)
    kernel[(samples * programs,)](
        input,
        grad_output,
        parts,
        positions,
        features,
        outputs,
        groups,
        (height, width, out_width),
        input.stride(),
        grad_output.stride(),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        KERNEL_X=kernel_size[1],
        TAPS=taps,
        BIAS=bias,
        INPUT_BY_POSITION=input.stride(3) <= input.stride(1),
        GRAD_BY_POSITION=grad_output.stride(3) <= grad_output.stride(1),
        SUM=tl.float64 if double else tl.float32,
        PRECISION="ieee" if double else "tf32x3",
        num_warps=4,
        **blocks,
    )
    return parts.sum(1)


def grad_sq_norm_norm(
    normalized: torch.Tensor,
    grad_output: torch.Tensor,
    first_dim: int,
    last_dim: int,
    weight: bool,
    bias: bool,
) -> torch.Tensor:
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
    samples, outer, parameters, inner = folded
    block_p, block_r = (16, 128) if inner > 1 else (64, 32)
    programs = triton.cdiv(parameters, block_p)
    parts = torch.empty((samples, programs), dtype=_sum_dtype(g), device=g.device)
    if parts.numel() == 0:
        return parts.sum(1)
    _affine[(samples * programs,)](
        x,
        g,
        parts,
        outer,
        parameters,
        inner,
        x.stride(),
        g.stride(),
        WEIGHT=weight,
        BIAS=bias,
        SUM=tl.float64 if g.dtype == torch.float64 else tl.float32,
        BLOCK_P=block_p,
        BLOCK_R=block_r,
        num_warps=4,
    )
    return parts.sum(1)


def grad_sq_norm_embedding(
    indices: torch.Tensor, grad_output: torch.Tensor, padding_idx: int
) -> torch.Tensor:
    """Launch the kernel; arguments and result are those of the op `ddfast::grad_sq_norm_embedding`."""
    samples, width = grad_output.shape[0], grad_output.shape[-1]
    positions = indices[0].numel() if samples else 0
    double = grad_output.dtype == torch.float64
    block = min(32, _block(positions))
    programs = triton.cdiv(positions, block) ** 2
    parts = torch.empty((samples, programs), dtype=_sum_dtype(grad_output), device=grad_output.device)
    if parts.numel() == 0:
        return parts.sum(1)
    grads = grad_output.contiguous()
    _embedding[(samples * programs,)](
        indices.contiguous(),
        grads,
        parts,
        positions,
        width,
        padding_idx,
        grads.stride(0),
        SUM=tl.float64 if double else tl.float32,
        PRECISION="ieee" if double else "tf32x3",
        BLOCK_T=block,
        BLOCK_K=16 if double else DEPTH,
        num_warps=4,
    )
    return parts.sum(1)


def _sq_norm(rows: torch.Tensor) -> torch.Tensor:
    """Squared norm [B] of rows [B, I], in one pass."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=_sum_dtype(rows)).square()


def _check_extents(*tensors: torch.Tensor) -> None:
    """Offsets within a sample are 32 bits wide."""
    for tensor in tensors:
        shape, strides = tensor.shape[1:], tensor.stride()[1:]
        if sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size) >= 2**31:
            raise ValueError(
                f"a sample must span fewer than 2^31 elements, got {list(shape)} with strides {list(strides)}"
            )


def _block(size: int) -> int:
    """Side of a tile: a power of two that a matrix product takes."""
    return max(16, min(64, triton.next_power_of_2(max(size, 1))))


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
