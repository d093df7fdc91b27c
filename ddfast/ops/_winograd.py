"""Registration and public face of winograd_conv2d, float32 convolutions with fewer multiplications."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ddfast.ops import reference
from ddfast.ops._dispatch import LIBRARY, define, native_status

OUTPUTS = 32
"""Output channels side by side in a transformed weight; their number is a multiple of it."""

INPUTS = 64
"""The C++ body takes multiples of this many input channels."""


def winograd_weight(weight: Tensor, transposed: bool = False) -> Tensor:
    """The transformed weight G g G^T that `winograd_conv2d` takes, rounded once from float64.

    Args:
        weight: [O, C, 3, 3] floating point, O a multiple of 32 (C, where transposed).
        transposed: make it the weight of the transposed convolution, with which `winograd_conv2d` maps the gradient
            at the output [B, O, H, W] to that at the input [B, C, H, W].

    Returns:
        [16, O / 32, C, 32], or transposed [16, C / 32, O, 32], contiguous, of the same dtype.

    Raises:
        ValueError: another shape.
    """
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or weight.shape[int(transposed)] % OUTPUTS:
        raise ValueError(
            f"weight must be [O, C, 3, 3] with {'C' if transposed else 'O'} a multiple of {OUTPUTS}, "
            f"got {list(weight.shape)}"
        )
    weight = weight.detach()
    if weight.dtype == torch.float32 and weight.device.type == "cpu" and winograd_is_fast():
        return torch.ops.ddfast_native.winograd_weight(weight, transposed)
    if transposed:
        weight = weight.transpose(0, 1).flip(2, 3)
    outputs, inputs = weight.shape[:2]
    points = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    transformed = torch.einsum("ai,ocij,bj->aboc", points, weight.double(), points)
    panels = transformed.reshape(16, outputs // OUTPUTS, OUTPUTS, inputs)
    return panels.transpose(2, 3).to(weight.dtype).contiguous()


def winograd_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    relu: bool = False,
    sets: Tensor | None = None,
    reads: Tensor | None = None,
) -> Tensor:
    """conv2d(input, w, bias, padding=1) + other, then the ReLU, by 4/9 of the multiplications.

    Winograd's minimal algorithm F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural
    Networks", CVPR 2016). In float32 its error against float64 is at most twice that of torch's convolution,
    and less than that of its channels-last one, which sums all terms in one chain. A result depends neither
    on the rest of the batch nor on the number of threads.

    Masked images are alike in most places. `sets` and `reads` promise it: maps of one image whose sets of
    players agree on the players that a tile of 2x2 outputs reads are equal in all that the tile depends on, of
    `input` and of `other`. The C++ body then computes the tile once and copies it, to the same bits.

    Args:
        input: [B, C, H, W] floating point, best channels-last.
        weight: what `winograd_weight` makes of w [O, C, 3, 3]; float32 with input in bfloat16.
        bias: [O] or None, in the dtype of weight.
        other: [B, O, H, W] or None, in the dtype of input, added before the ReLU: the shortcut of a residual
            block.
        relu: whether negative results become 0.
        sets: int64 [images, maps], a bit for each player of each map of the batch; None for no promise.
        reads: int64 [ceil(H / 2) * ceil(W / 2)], a bit for each player that a tile reads; goes with `sets`.

    Returns:
        [B, O, H, W] in the dtype of input and channels-last memory format. It has no backward pass.

    Raises:
        TypeError: dtypes that do not fit, or not floating point.
        ValueError: shapes that do not fit.
    """
    wide = torch.float32 if input.dtype == torch.bfloat16 else input.dtype
    dtypes = [
        (t.dtype, wanted)
        for t, wanted in ((weight, wide), (bias, wide), (other, input.dtype))
        if t is not None
    ]
    if not input.is_floating_point() or any(dtype != wanted for dtype, wanted in dtypes):
        raise TypeError(
            f"with input in {input.dtype}, weight and bias must be {wide} and other {input.dtype}, "
            f"got {', '.join(str(dtype) for dtype, _ in dtypes)}"
        )
    if input.ndim != 4:
        raise ValueError(f"input must be [B, C, H, W], got {list(input.shape)}")
    batch, inputs, height, width = input.shape
    if weight.ndim != 4 or (weight.shape[0], *weight.shape[2:]) != (16, inputs, OUTPUTS):
        raise ValueError(
            f"weight must be [16, O / {OUTPUTS}, {inputs}, {OUTPUTS}], as winograd_weight makes it, "
            f"got {list(weight.shape)}"
        )
    outputs = weight.shape[1] * OUTPUTS
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be [{outputs}], got {list(bias.shape)}")
    if other is not None and other.shape != (batch, outputs, height, width):
        raise ValueError(f"other must be {[batch, outputs, height, width]}, got {list(other.shape)}")
    tiles = ((height + 1) // 2) * ((width + 1) // 2)
    if (sets is None) != (reads is None):
        raise ValueError("sets and reads go together: give both or neither")
    if sets is not None and reads is not None:
        if sets.dtype != torch.int64 or sets.ndim != 2 or sets.numel() != batch:
            raise ValueError(
                f"sets must be int64 [images, maps], {batch} maps in all, got {sets.dtype} {list(sets.shape)}"
            )
        if reads.dtype != torch.int64 or reads.shape != (tiles,):
            raise ValueError(f"reads must be int64 [{tiles}], got {reads.dtype} {list(reads.shape)}")
    return torch.ops.ddfast.winograd_conv2d(input, weight, bias, other, relu, sets, reads)


@functools.cache
def winograd_is_fast() -> bool:
    """Whether the C++ body is there and runs on this CPU, which takes AVX-512."""
    return native_status()[0] and bool(torch.ops.ddfast_native.winograd_supported())


def winograd_pays(height: int, width: int) -> bool:
    """Whether tiles of 2x2 outputs, those over the edge of a map included, leave a gain in multiplications."""
    tiles = ((height + 1) // 2) * ((width + 1) // 2)
    return 16 * tiles <= 0.6 * 9 * height * width


def _fake(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    shape = (input.shape[0], weight.shape[1] * OUTPUTS, *input.shape[2:])
    return input.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _native_accepts(input: Tensor, weight: Tensor, *_: Any) -> bool:
    served = input.dtype in (torch.float32, torch.bfloat16) and weight.dtype == torch.float32
    return served and winograd_is_fast() and input.shape[1] % INPUTS == 0


def _context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Nothing is kept for a backward pass that does not exist."""


def _backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("winograd_conv2d has no backward pass: take torch.nn.functional.conv2d for training")


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    relu: bool,
    sets: Tensor | None = None,
    reads: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Fold the mapped dimension into the batch; mapped weights run once for each. What maps share is not used."""
    size = info.batch_size

    def each(tensor: Tensor | None, dim: int | None) -> list[Tensor | None]:
        return [tensor] * size if tensor is None or dim is None else list(tensor.movedim(dim, 0))

    run = torch.ops.ddfast.winograd_conv2d
    if in_dims[1] is not None or in_dims[2] is not None:
        mapped = zip(
            *(each(t, d) for t, d in zip((input, weight, bias, other), in_dims, strict=False)), strict=True
        )
        return torch.stack([run(*arguments, relu, None, None) for arguments in mapped]), 0
    folded = [
        None if t is None else (t.expand(size, *t.shape) if d is None else t.movedim(d, 0)).flatten(0, 1)
        for t, d in ((input, in_dims[0]), (other, in_dims[3]))
    ]
    return run(folded[0], weight, bias, folded[1], relu, None, None).unflatten(0, (size, -1)), 0


define(
    "winograd_conv2d",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? other, bool relu, Tensor? sets=None, Tensor? reads=None) "
    "-> Tensor",
    reference=reference.winograd_conv2d,
    fake=_fake,
    native_accepts=_native_accepts,
)
torch.library.register_autograd("ddfast::winograd_conv2d", _backward, setup_context=_context, lib=LIBRARY)
torch.library.register_vmap("ddfast::winograd_conv2d", _vmap, lib=LIBRARY)
