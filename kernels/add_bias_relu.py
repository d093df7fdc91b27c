"""What follows a convolution, in one pass over its output: bias, a residual block's shortcut, ReLU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from ddfast.kernels.launching import Launch, Run, prepared
from ddfast.kernels.masked_batch import _rounded

BLOCK = 1024  # elements a program: 8 a thread, so that a thread moves 16 bytes of half precision at a time


@triton.jit
def _add_bias_relu(
    x,
    bias,
    other,
    elements,
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program brings BLOCK numbers of a channels-last map from x to relu(x + bias + other), where they lie.

    Sums are taken in this order in float32 (float64 for float64) and rounded once.

    Bytes moved: x read and written once, `other` read once, 3 e an element (e bytes); the bias, from L1. Operations:
    three an element. The memory binds, as long as accesses are 16 bytes wide, for which C has to be a multiple of 16;
    three passes of their own would move 7 e.
    """
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    value = tl.load(x + element, mask=inside, other=0).to(COMPUTE)
    if bias is not None:
        value += tl.load(bias + element % CHANNELS, mask=inside, other=0).to(COMPUTE)
    if other is not None:
        value += tl.load(other + element, mask=inside, other=0).to(COMPUTE)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN stays, as in torch
    tl.store(x + element, _rounded(value, x.dtype.element_ty), mask=inside)


@prepared
def add_bias_relu_(x: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor | None, relu: bool) -> Run:
    """Launch the kernel; arguments are those of the op `ddfast::add_bias_relu_`, which writes to `x`."""
    elements, layout = x.numel(), torch.channels_last
    if elements == 0:
        return lambda *_: None
    launch = Launch(
        _add_bias_relu,
        (triton.cdiv(elements, BLOCK),),
        (elements,),
        CHANNELS=x.shape[1],
        RELU=relu,
        COMPUTE=tl.float64 if x.dtype == torch.float64 else tl.float32,
        BLOCK=BLOCK,
        num_warps=4,
    )
    in_place = x.is_contiguous(memory_format=layout)

    def run(x: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor | None, *_: Any) -> None:
        written = x if in_place else x.contiguous(memory_format=layout)
        launch(
            written,
            None if bias is None else bias.contiguous(),
            None if other is None else other.contiguous(memory_format=layout),
        )
        if not in_place:
            x.copy_(written)

    return run
