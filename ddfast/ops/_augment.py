"""Registration and public faces of siamese_augment: what is drawn for an image, applied in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddfast.ops import reference
from ddfast.ops._crops import _folded
from ddfast.ops._dispatch import LIBRARY, below_autocast, call, define
from ddfast.ops.reference_augment import AUGMENT_COLUMNS, new_like
from ddfast.ops.transfer import to_device

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_IDENTITY = (0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0)
_WHOLE = ("down", "across", "top", "left", "bottom", "right")

Parameter: TypeAlias = Tensor | float


def siamese_augment(images: Tensor, parameters: Tensor) -> Tensor:
    """Mirror, colour, shift, warp and cut images as a row of parameters says, in one pass.

    The augmentations of DSA (Zhao & Bilen, ICML 2021, Sec. 3.3) and of IDC (Kim et al., ICML 2022), without their
    draws. A row with everything but one operation left out is DSA's, and several are IDC's. In this order, each
    exactly what plain PyTorch does, up to rounding:

    1. mirrored: the columns in reverse.
    2. brightness is added; then the distance from the mean of the channels is multiplied by saturation, and the
       distance from the mean of the image by contrast.
    3. shifted: pixel (i, j) is what was (i + down, j + across), 0 outside.
    4. warped: `grid_sample` of `affine_grid`, bilinear, zeros outside, align_corners=False.
    5. cut: 0 inside of a box.

    What a row leaves out changes nothing, not a bit. Affine in the pixels: the gradient is the transpose with the
    same parameters, of which alone something is kept, and the gradient of that is this op without the brightness. It
    is gathered, not scattered, on a GPU, so it is deterministic everywhere, and no image's depends on the others or
    on the number of threads. Means and weights are taken in float32 (float64 for float64). It works under
    `torch.compile` and `vmap`; what `torch.func.grad` differentiates is computed by plain PyTorch.

    Args:
        images: float [N, C, H, W], any strides.
        parameters: float [G, 16] of `augment_parameters`, where G divides N: each row is that of N / G images in a
            row, so G = N for a row an image, and G = 1 for one that all share. On a CPU they may be of images on a
            GPU; on a GPU they are not looked at, as that would wait for it.

    Returns:
        [N, C, H, W] in the images' dtype; channels-last where they are dense channels-last, else contiguous.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: shapes that do not fit, or parameters that require a gradient, are not finite or not whole where
            they must be.
    """
    if images.dtype not in _FLOAT_DTYPES or not parameters.is_floating_point():
        raise TypeError(
            f"images and parameters must be floating point, got {images.dtype} and {parameters.dtype}"
        )
    if images.ndim != 4:
        raise ValueError(f"images must be [N, C, H, W], got {list(images.shape)}")
    if parameters.ndim != 2 or parameters.shape[1] != len(AUGMENT_COLUMNS):
        raise ValueError(f"parameters must be [G, {len(AUGMENT_COLUMNS)}], got {list(parameters.shape)}")
    if len(images) % max(1, len(parameters)) or (len(images) > 0 and len(parameters) == 0):
        raise ValueError(
            f"{len(parameters)} rows of parameters do not divide {len(images)} images: give a row an image, or "
            "one for each of so many groups of equal size"
        )
    if parameters.requires_grad:
        raise ValueError(
            "parameters must not require a gradient: the images alone are differentiated, so detach them"
        )
    rows = to_device(parameters.to(reference.accumulation_dtype(images.dtype)), images.device)
    differentiated = torch.is_grad_enabled() and images.requires_grad
    if differentiated and torch._C._are_functorch_transforms_active():
        return below_autocast(reference.siamese_augment, images.device.type)(images, rows, False)
    return call("siamese_augment", images, rows, False)


def augment_parameters(
    rows: int = 1,
    *,
    mirrored: Tensor | bool | None = None,
    brightness: Parameter | None = None,
    saturation: Parameter | None = None,
    contrast: Parameter | None = None,
    shift: Sequence[Parameter] | None = None,
    theta: Tensor | None = None,
    cut: Sequence[Parameter] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Rows of parameters for `siamese_augment`; what is None is left out.

    Args:
        rows: how many. Each argument is a number for all of them, or a tensor of one or of `rows` numbers.
        mirrored: whether left and right change places.
        brightness: added to every pixel.
        saturation, contrast: factors; 1 changes nothing.
        shift: (down, across), whole pixels: where a pixel's value comes from, relative to it.
        theta: [2, 3] or [rows, 2, 3], where `affine_grid` reads.
        cut: (top, left, bottom, right), whole pixels, the last two exclusive; it may reach outside of the image.
        device: where they are made.

    Returns:
        float64 [rows, 16].
    """
    device = torch.device(device)
    table = to_device(torch.tensor(_IDENTITY, dtype=torch.float64), device).repeat(rows, 1)
    absent = (None,) * 6
    given: list[Any] = [mirrored, brightness, saturation, contrast, *(shift or absent[:2]), *absent]
    for place, value in enumerate([*given, *(cut or ())]):
        if value is not None:
            table[:, place] = to_device(value.reshape(-1), device) if isinstance(value, Tensor) else value
    if theta is not None:
        table[:, 6:12] = to_device(theta.reshape(-1, 6), device)
    return table


def _fake(images: Tensor, parameters: Tensor, *_: Any) -> Tensor:
    return new_like(images)


def _check(images: Tensor, parameters: Tensor, *_: Any) -> None:
    """Raise ValueError for the first parameter that is not what it must be."""
    for place, name in enumerate(AUGMENT_COLUMNS):
        column = parameters[:, place]
        fine, wanted = column.isfinite(), "finite"
        if name == "mirrored":
            fine, wanted = (column == 0) | (column == 1), "0 or 1"
        elif name in _WHOLE:
            fine, wanted = fine & (column == column.trunc()), "a whole number of pixels"
        if not fine.all():
            row = int((~fine).nonzero()[0])
            raise ValueError(
                f"{name} must be {wanted}, got {float(column[row]):g} in row {row} of parameters"
            )


def _native_accepts(images: Tensor, parameters: Tensor, *_: Any) -> bool:
    return parameters.dtype == reference.accumulation_dtype(images.dtype)


define(
    "siamese_augment",
    "(Tensor images, Tensor parameters, bool linear) -> Tensor",
    reference=reference.siamese_augment,
    fake=_fake,
    triton="siamese_augment",
    native_accepts=_native_accepts,
    check=_check,
    native_checks=True,
)
define(
    "siamese_augment_backward",
    "(Tensor grad_output, Tensor parameters) -> Tensor",
    reference=reference.siamese_augment_backward,
    fake=_fake,
    triton="siamese_augment",
    native_accepts=_native_accepts,
    check=_check,
    native_checks=True,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.ddfast.siamese_augment_backward(grad, ctx.saved_tensors[0]), None, None


def _gradient_of_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.ddfast.siamese_augment(grad, ctx.saved_tensors[0], True), None


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], images: Tensor, parameters: Tensor, linear: bool
) -> tuple[Tensor, int]:
    """Fold the mapped dimension into the images and into the rows."""
    images, parameters = (
        _folded(tensor, dim, info.batch_size)
        for tensor, dim in zip((images, parameters), in_dims[:2], strict=True)
    )
    made = torch.ops.ddfast.siamese_augment(images, parameters, linear)
    return made.unflatten(0, (info.batch_size, len(made) // info.batch_size)), 0


def _backward_vmap(
    info: Any, in_dims: tuple[int | None, ...], grad_output: Tensor, parameters: Tensor
) -> tuple[Tensor, int]:
    grad_output, parameters = (
        _folded(tensor, dim, info.batch_size)
        for tensor, dim in zip((grad_output, parameters), in_dims, strict=True)
    )
    made = torch.ops.ddfast.siamese_augment_backward(grad_output, parameters)
    return made.unflatten(0, (info.batch_size, len(made) // info.batch_size)), 0


torch.library.register_autograd("ddfast::siamese_augment", _gradient, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd(
    "ddfast::siamese_augment_backward", _gradient_of_gradient, setup_context=_save, lib=LIBRARY
)
torch.library.register_vmap("ddfast::siamese_augment", _vmap, lib=LIBRARY)
torch.library.register_vmap("ddfast::siamese_augment_backward", _backward_vmap, lib=LIBRARY)
