"""Norm, ReLU and pooling of convnet_block behind cuDNN's convolution, forward and backward.

The convolution's matrix products are cuDNN's; what costs in the plain layers are the full-size maps, which go through
memory about seven times. Here one launch reads the convolution and writes the pooled map, a quarter of it, and in the
backward pass one launch reads the convolution and the pooled gradient and writes the gradient at the convolution, from
which cuDNN makes those of input and weight.

Maps are channels-last. A program owns BLOCK_C channels of one image, so sums need no second launch. It goes over cells
of 2x2 positions, one of the pooled map each, and the incomplete ones of an odd last row or column besides. Where all
cells fit into its registers they are read once; larger maps are read again for each step, from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ddfast.kernels.launching import Allocation, Launch, Run, prepared

from ddfast.ops.reference import accumulation_dtype, channels_last_strides

_ONE = (1, 1)  # stride, padding, dilation
_LAST = torch.channels_last
_convolution_backward = torch.ops.aten.convolution_backward.default

VALUES = 32  # of the map that a thread holds where all of it stays in registers
WARPS = 16


@triton.jit
def _positions(cell, cells_wide, height, width, channels, c, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """Offsets into an image, and which exist, of one of the four positions of cells [Q, 1] for channels c [1, C]."""
    row = cell // cells_wide * 2 + ROW
    col = cell % cells_wide * 2 + COLUMN
    return (row * width + col) * channels + c, (row < height) & (col < width) & (c < channels)


@triton.jit
def _load(
    conv,
    cell,
    cells_wide,
    height,
    width,
    channels,
    c,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    SUM: tl.constexpr,
):
    offset, there = _positions(cell, cells_wide, height, width, channels, c, ROW, COLUMN)
    return tl.load(conv + offset, mask=there, other=0).to(SUM), there


@triton.jit
def _load_cells(conv, cell, cells_wide, height, width, channels, c, SUM: tl.constexpr):
    """The four positions of the cells and which of them exist."""
    a, in_a = _load(conv, cell, cells_wide, height, width, channels, c, 0, 0, SUM)
    b, in_b = _load(conv, cell, cells_wide, height, width, channels, c, 0, 1, SUM)
    d, in_d = _load(conv, cell, cells_wide, height, width, channels, c, 1, 0, SUM)
    e, in_e = _load(conv, cell, cells_wide, height, width, channels, c, 1, 1, SUM)
    return a, b, d, e, in_a, in_b, in_d, in_e


@triton.jit
def _squares(a, b, d, e, in_a, in_b, in_d, in_e, mean):
    """Sum over the positions of cells of the squared distance from the mean [1, C]."""
    a = tl.where(in_a, a - mean, 0)
    b = tl.where(in_b, b - mean, 0)
    d = tl.where(in_d, d - mean, 0)
    e = tl.where(in_e, e - mean, 0)
    return a * a + b * b + d * d + e * e


@triton.jit
def _relu(x):
    return tl.where(x <= 0, 0.0, x)  # NaN stays


@triton.jit
def _pooled(a, b, d, e, mean, scale, shift):
    upper = _relu((a - mean) * scale + shift) + _relu((b - mean) * scale + shift)
    return 0.25 * (upper + _relu((d - mean) * scale + shift) + _relu((e - mean) * scale + shift))


@triton.jit
def _forward(
    conv,
    gamma,
    beta,
    pooled,
    means,
    rstds,
    channels,
    height,
    width,
    eps,
    AFFINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    SINGLE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Statistics and the pooled map of BLOCK_C channels of one image.

    Bytes moved: the convolution read once and a quarter of it written, 5 an element of float32. Operations: about ten
    an element. The memory binds.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, BLOCK_C)
    image = program // blocks
    c = ((program % blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    q = tl.arange(0, BLOCK_Q)[:, None]
    cells_wide = (width + 1) // 2
    cells = (height + 1) // 2 * cells_wide
    conv += image * height * width * channels
    pooled += image * (height // 2) * (width // 2) * channels
    count = tl.full((), height * width, SUM)
    if SINGLE:
        a, b, d, e, in_a, in_b, in_d, in_e = _load_cells(conv, q, cells_wide, height, width, channels, c, SUM)
        mean = tl.sum(a + b + d + e, 0)[None, :] / count
        squares = tl.sum(_squares(a, b, d, e, in_a, in_b, in_d, in_e, mean), 0)[None, :]
    else:
        sums = tl.zeros([BLOCK_Q, BLOCK_C], SUM)
        for start in range(0, cells, BLOCK_Q):
            a, b, d, e, in_a, in_b, in_d, in_e = _load_cells(
                conv, start + q, cells_wide, height, width, channels, c, SUM
            )
            sums += a + b + d + e
        mean = tl.sum(sums, 0)[None, :] / count
        sums = tl.zeros([BLOCK_Q, BLOCK_C], SUM)
        for start in range(0, cells, BLOCK_Q):
            a, b, d, e, in_a, in_b, in_d, in_e = _load_cells(
                conv, start + q, cells_wide, height, width, channels, c, SUM
            )
            sums += _squares(a, b, d, e, in_a, in_b, in_d, in_e, mean)
        squares = tl.sum(sums, 0)[None, :]
    rstd = 1 / tl.sqrt(squares / count + eps)
    tl.store(means + image * channels + c, mean, mask=c < channels)
    tl.store(rstds + image * channels + c, rstd, mask=c < channels)
    scale = rstd
    shift = tl.zeros([1, BLOCK_C], SUM)
    if AFFINE:
        scale *= tl.load(gamma + c, mask=c < channels, other=0).to(SUM)
    if SHIFTED:
        shift += tl.load(beta + c, mask=c < channels, other=0).to(SUM)
    if SINGLE:
        row, col = q // cells_wide, q % cells_wide
        whole = (row < height // 2) & (col < width // 2) & (c < channels)
        value = _pooled(a, b, d, e, mean, scale, shift).to(pooled.dtype.element_ty)
        tl.store(pooled + (row * (width // 2) + col) * channels + c, value, mask=whole)
    else:
        for start in range(0, cells, BLOCK_Q):
            cell = start + q
            a, b, d, e, in_a, in_b, in_d, in_e = _load_cells(
                conv, cell, cells_wide, height, width, channels, c, SUM
            )
            row, col = cell // cells_wide, cell % cells_wide
            whole = (row < height // 2) & (col < width // 2) & (c < channels)
            value = _pooled(a, b, d, e, mean, scale, shift).to(pooled.dtype.element_ty)
            tl.store(pooled + (row * (width // 2) + col) * channels + c, value, mask=whole)


@triton.jit
def _load_grad(grad_output, cell, cells_wide, height, width, channels, c, SUM: tl.constexpr):
    """A quarter of the pooled map's gradient, what each of a cell's positions gets; 0 for incomplete cells."""
    row, col = cell // cells_wide, cell % cells_wide
    whole = (row < height // 2) & (col < width // 2) & (c < channels)
    offset = (row * (width // 2) + col) * channels + c
    return 0.25 * tl.load(grad_output + offset, mask=whole, other=0).to(SUM)


@triton.jit
def _store_grad(
    grad_conv, x, g, cell, cells_wide, height, width, channels, c, scale, shift, offset, slope,
    ROW: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """The gradient at one position of the cells, where x is the convolution less its mean."""
    at, there = _positions(cell, cells_wide, height, width, channels, c, ROW, COLUMN)
    grad = scale * tl.where(x * scale + shift <= 0, 0.0, g) - offset - slope * x
    tl.store(grad_conv + at, grad.to(grad_conv.dtype.element_ty), mask=there)


@triton.jit
def _cell_sums(a, b, d, e, g, scale, shift):
    """Sums over the positions of cells of dz and of dz * x."""
    ga = tl.where(a * scale + shift <= 0, 0.0, g)
    gb = tl.where(b * scale + shift <= 0, 0.0, g)
    gd = tl.where(d * scale + shift <= 0, 0.0, g)
    ge = tl.where(e * scale + shift <= 0, 0.0, g)
    return ga + gb + gd + ge, ga * a + gb * b + gd * d + ge * e


@triton.jit
def _store_cells(
    grad_conv, a, b, d, e, g, cell, cells_wide, height, width, channels, c, scale, shift, offset, slope
):
    _store_grad(
        grad_conv, a, g, cell, cells_wide, height, width, channels, c, scale, shift, offset, slope, 0, 0
    )
    _store_grad(
        grad_conv, b, g, cell, cells_wide, height, width, channels, c, scale, shift, offset, slope, 0, 1
    )
    _store_grad(
        grad_conv, d, g, cell, cells_wide, height, width, channels, c, scale, shift, offset, slope, 1, 0
    )
    _store_grad(
        grad_conv, e, g, cell, cells_wide, height, width, channels, c, scale, shift, offset, slope, 1, 1
    )


@triton.jit
def _backward(
    conv,
    grad_output,
    gamma,
    beta,
    means,
    rstds,
    grad_conv,
    grad_sums,
    product_sums,
    channels,
    height,
    width,
    AFFINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    SINGLE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """The gradient at the convolution for BLOCK_C channels of one image, and their sums for the norm's parameters.

    Bytes moved: the convolution and the pooled gradient read once, the gradient written once, 9 an element of float32.
    Operations: about fifteen an element. The memory binds.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, BLOCK_C)
    image = program // blocks
    c = ((program % blocks).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    q = tl.arange(0, BLOCK_Q)[:, None]
    cells_wide = (width + 1) // 2
    cells = (height + 1) // 2 * cells_wide
    conv += image * height * width * channels
    grad_conv += image * height * width * channels
    grad_output += image * (height // 2) * (width // 2) * channels
    count = tl.full((), height * width, SUM)
    mean = tl.load(means + image * channels + c, mask=c < channels, other=0)
    rstd = tl.load(rstds + image * channels + c, mask=c < channels, other=0)
    scale = rstd
    shift = tl.zeros([1, BLOCK_C], SUM)
    if AFFINE:
        scale *= tl.load(gamma + c, mask=c < channels, other=0).to(SUM)
    if SHIFTED:
        shift += tl.load(beta + c, mask=c < channels, other=0).to(SUM)
    if SINGLE:
        a, b, d, e, _, _, _, _ = _load_cells(conv, q, cells_wide, height, width, channels, c, SUM)
        g = _load_grad(grad_output, q, cells_wide, height, width, channels, c, SUM)
        a, b, d, e = a - mean, b - mean, d - mean, e - mean
        grads, products = _cell_sums(a, b, d, e, g, scale, shift)
    else:
        grads = tl.zeros([BLOCK_Q, BLOCK_C], SUM)
        products = tl.zeros([BLOCK_Q, BLOCK_C], SUM)
        for start in range(0, cells, BLOCK_Q):
            a, b, d, e, _, _, _, _ = _load_cells(conv, start + q, cells_wide, height, width, channels, c, SUM)
            g = _load_grad(grad_output, start + q, cells_wide, height, width, channels, c, SUM)
            more_grads, more_products = _cell_sums(a - mean, b - mean, d - mean, e - mean, g, scale, shift)
            grads += more_grads
            products += more_products
    grad_sum = tl.sum(grads, 0)[None, :]
    product_sum = tl.sum(products, 0)[None, :]
    tl.store(grad_sums + image * channels + c, grad_sum, mask=c < channels)
    tl.store(product_sums + image * channels + c, product_sum * rstd, mask=c < channels)
    offset = scale * grad_sum / count
    slope = scale * rstd * rstd * product_sum / count
    if SINGLE:
        _store_cells(
            grad_conv, a, b, d, e, g, q, cells_wide, height, width, channels, c, scale, shift, offset, slope
        )
    else:
        for start in range(0, cells, BLOCK_Q):
            cell = start + q
            a, b, d, e, _, _, _, _ = _load_cells(conv, cell, cells_wide, height, width, channels, c, SUM)
            g = _load_grad(grad_output, cell, cells_wide, height, width, channels, c, SUM)
            a, b, d, e = a - mean, b - mean, d - mean, e - mean
            _store_cells(
                grad_conv,
                a,
                b,
                d,
                e,
                g,
                cell,
                cells_wide,
                height,
                width,
                channels,
                c,
                scale,
                shift,
                offset,
                slope,
            )


def _blocks(channels: int, height: int, width: int, element_size: int) -> dict[str, int | bool]:
    """Block sizes and warps for maps [B, channels, height, width]."""
    cells = triton.next_power_of_2(triton.cdiv(height, 2) * triton.cdiv(width, 2))
    for line in (
        128,
        64,
    ):  # bytes of a position that a program reads; the fewer, the larger a map it can hold
        block_c = min(line // element_size, triton.next_power_of_2(channels))
        warps = 4 * cells * block_c // (32 * VALUES)
        if warps <= WARPS:
            return {"SINGLE": True, "BLOCK_C": block_c, "BLOCK_Q": cells, "num_warps": max(warps, 1)}
    block_c = min(128 // element_size, triton.next_power_of_2(channels))
    block_q = 32 * 8 * 16 // element_size // block_c  # 16 bytes a thread, of each of the four positions
    return {"SINGLE": False, "BLOCK_C": block_c, "BLOCK_Q": block_q, "num_warps": 8}


def _maps(shape: tuple[int, ...], like: torch.Tensor) -> Allocation:
    """Memory for maps of that shape, channels-last."""
    return Allocation(shape, like.dtype, like.device, channels_last_strides(shape))


def _convolution(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """cuDNN's, dense in channels-last memory."""
    # A channels-last input decides: the weight is brought to it below, in C++.
    conv = torch.conv2d(input.contiguous(memory_format=_LAST), weight, bias, _ONE, _ONE)
    return conv.contiguous(memory_format=_LAST)


def _launch(
    kernel: object,
    input: torch.Tensor,
    outputs: int,
    numbers: tuple[float, ...],
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
) -> Launch:
    """A kernel over the convolution [B, outputs, H, W] of an input, a program for some channels of an image."""
    batch, _, height, width = input.shape
    if outputs * height * width >= 2**31:
        raise ValueError(f"a map must have fewer than 2^31 elements, got {[outputs, height, width]}")
    blocks = _blocks(outputs, height, width, input.element_size())
    return Launch(
        kernel,
        (batch * triton.cdiv(outputs, int(blocks["BLOCK_C"])),),
        (outputs, height, width, *numbers),
        AFFINE=norm_weight is not None,
        SHIFTED=norm_bias is not None,
        SUM=tl.float64 if input.dtype == torch.float64 else tl.float32,
        **blocks,
    )


@prepared
def convnet_block(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    keep: bool,
) -> Run:
    """Convolve and launch the kernel; arguments and results are those of the op `ddfast::convnet_block`."""
    (batch, _, height, width), outputs = input.shape, weight.shape[0]
    statistic = Allocation((batch, outputs), accumulation_dtype(input.dtype), input.device)
    pooled = _maps((batch, outputs, height // 2, width // 2), input)
    kept = _maps((batch, outputs, height, width), input)
    nothing = Allocation((0,), input.dtype, input.device)
    if batch == 0:
        return lambda *_: (pooled(), statistic(), statistic(), kept() if keep else nothing())
    launch = _launch(_forward, input, outputs, (eps,), norm_weight, norm_bias)
    strides = channels_last_strides((batch, outputs, height, width))

    def run(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        norm_bias: torch.Tensor | None,
        eps: float,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        small, mean, rstd = pooled(), statistic(), statistic()
        conv = _convolution(input, weight, bias)
        launch(
            conv,
            conv if norm_weight is None else norm_weight.contiguous(),
            conv if norm_bias is None else norm_bias.contiguous(),
            small,
            mean,
            rstd,
        )
        return small, mean, rstd, conv.as_strided(conv.shape, strides) if keep else nothing()

    return run


@prepared
def convnet_block_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    conv: torch.Tensor,
    eps: float,
    to_input: bool,
    to_weight: bool,
) -> Run:
    """Launch the kernel, then cuDNN's gradients; as the op `ddfast::convnet_block_backward`."""
    (batch, _, height, width), outputs = input.shape, weight.shape[0]
    inner = _maps(tuple(input.shape), input)
    nothing = Allocation((0,), input.dtype, input.device)
    if batch == 0:
        return lambda *_: (
            inner() if to_input else nothing(),
            torch.zeros_like(weight, memory_format=torch.contiguous_format) if to_weight else nothing(),
            *(weight.new_zeros(outputs) for _ in range(2)),
        )
    launch = _launch(_backward, input, outputs, (), norm_weight, norm_bias)
    of_conv = _maps((batch, outputs, height, width), input)
    statistic = Allocation((batch, outputs), mean.dtype, input.device)
    geometry = (_ONE, _ONE, _ONE, False, (0, 0), 1, (to_input, to_weight, False))
    strides = channels_last_strides(tuple(input.shape))

    def run(
        grad_output: torch.Tensor,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        norm_bias: torch.Tensor | None,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        conv: torch.Tensor,
        *_: object,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        input = input.contiguous(memory_format=_LAST)
        conv = conv.contiguous(memory_format=_LAST) if conv.ndim == 4 else _convolution(input, weight, bias)
        grad_conv, grads, products = of_conv(), statistic(), statistic()
        launch(
            conv,
            grad_output.contiguous(memory_format=_LAST),
            conv if norm_weight is None else norm_weight.contiguous(),
            conv if norm_bias is None else norm_bias.contiguous(),
            mean.contiguous(),
            rstd.contiguous(),
            grad_conv,
            grads,
            products,
        )
        of_input, of_weight, _none = _convolution_backward(grad_conv, input, weight, None, *geometry)
        if to_input:
            grad_input = of_input.contiguous(memory_format=_LAST).as_strided(of_input.shape, strides)
        else:
            grad_input = nothing()
        grad_weight = of_weight.contiguous() if to_weight else nothing()
        return grad_input, grad_weight, products.sum(0).to(weight.dtype), grads.sum(0).to(weight.dtype)

    return run
