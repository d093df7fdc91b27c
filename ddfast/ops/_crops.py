"""Registration and public faces of crop_resize and crop_batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddfast.ops import reference
from ddfast.ops._attribution import ChannelStatistic, _channel_statistic, _pair
from ddfast.ops._constants import shared
from ddfast.ops._dispatch import LIBRARY, call, define

_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def crop_resize(
    images: Tensor,
    boxes: Tensor,
    size: int | tuple[int, int],
    *,
    source: Tensor | None = None,
    factor: int = 1,
) -> Tensor:
    """Cut boxes out of images, resize every crop to one size, and lay the results as tiles into mosaics.

    Each tile is the antialiased bilinear resize of its crop alone: for boxes on whole pixels it is what
    `F.interpolate(crop, size, mode="bilinear", antialias=True, align_corners=False)` gives, and a crop that
    already has the size comes out unchanged. For fractional boxes the same triangle filter is centred by
    the exact box and reaches the pixels floor(x0) .. ceil(x1) - 1. Sums are taken in float32 (float64 for
    float64 images); uint8 results are rounded half up.

    Linear in `images` and differentiable any number of times with respect to them. The gradient is
    gathered, not scattered, so it is deterministic on every device.

    Args:
        images: [B, C, H, W] uint8 or floating point, any strides.
        boxes: [M, 4] or [B, K, 4], integer or floating point: x0, y0, x1, y1 in pixels, x1 and y1 exclusive,
            inside the image and at least one pixel wide and high. Held as float32. Values are not checked on a
            GPU, where looking would wait for the device; nothing outside the images is ever read.
        size: tile size in pixels, an int (square) or (height, width).
        source: [M] integer, the image that each box cuts, 0 <= source < B. None: box m of [M, 4] cuts image
            m (M = B), box (b, k) of [B, K, 4] cuts image b.
        factor: tiles per side of a mosaic. Box m becomes tile m % factor^2 of mosaic m // factor^2, in
            row-major order, so factor^2 divides M. [B, K, 4] boxes take factor 1.

    Returns:
        [M / factor^2, C, factor * height, factor * width] of the images' dtype; [B, K, C, height, width] for
        [B, K, 4].

    Raises:
        TypeError: a dtype that is not served.
        ValueError: shapes, sizes, sources or boxes that do not fit, or boxes that require a gradient.
    """
    _check_images(images)
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1 or factor < 1:
        raise ValueError(f"size and factor must be at least 1, got size {size} and factor {factor}")
    flat, source = _flat_boxes(images, boxes, source)
    if boxes.ndim == 3 and factor != 1:
        raise ValueError(f"boxes [B, K, 4] give one output a box; flatten them to [M, 4] for factor {factor}")
    if len(flat) % factor**2:
        raise ValueError(
            f"{len(flat)} boxes do not fill mosaics of {factor} x {factor} tiles; give a multiple of it"
        )
    tiles = call("crop_resize", images, flat, source, height, width, factor)
    return tiles.unflatten(0, boxes.shape[:2]) if boxes.ndim == 3 else tiles


def crop_batch(
    images: Tensor,
    boxes: Tensor,
    size: int | tuple[int, int],
    *,
    source: Tensor | None = None,
    padded: int | tuple[int, int] | None = None,
    mean: ChannelStatistic = None,
    std: ChannelStatistic = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cut boxes out of images, resize and normalise them, ready for a forward pass.

    What `crop_resize`, a division by 255, (x - mean) / std, zero padding, a cast and a change of layout write
    in six passes, in one. The padding is zero in normalised space, as RDED pads a tile smaller than the image
    (Sun et al., CVPR 2024). Bytes are rounded as crop_resize rounds them: a model sees the tile that a file
    would hold.

    Args:
        images, boxes, size, source: those of `crop_resize`.
        padded: size of the result in pixels, an int (square) or (height, width); the tile lies in its middle,
            half a pixel up and left where that cannot be. Default: `size`.
        mean, std: [C], tensors or sequences, in units of the images (for uint8: of 1/255 of them), or None.
        dtype: floating dtype of the result. Default: that of float images, float32 for uint8.

    Returns:
        [M, C, height, width] of `padded` in channels-last memory format, for [B, K, 4] boxes with M = B * K,
        box (b, k) at b * K + k. Differentiable any number of times with respect to float images.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: as crop_resize, or a padded size smaller than the tile.
    """
    _check_images(images)
    height, width = (size, size) if isinstance(size, int) else size
    padded_height, padded_width = (height, width) if padded is None else _pair(padded, "padded")
    if not (1 <= height <= padded_height and 1 <= width <= padded_width):
        raise ValueError(
            f"size must be at least 1 and at most padded, got size {size} and padded {padded_height} x "
            f"{padded_width}"
        )
    flat, source = _flat_boxes(images, boxes, source)
    if dtype is None:
        dtype = images.dtype if images.is_floating_point() else torch.float32
    if dtype not in _FLOAT_DTYPES:
        raise TypeError(f"dtype must be a floating-point dtype of 16 to 64 bits, got {dtype}")
    precision = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32
    return call(
        "crop_batch",
        images,
        flat,
        source,
        _channel_statistic("mean", mean, images, precision),
        _channel_statistic("std", std, images, precision),
        height,
        width,
        padded_height,
        padded_width,
        dtype,
    )


def _flat_boxes(images: Tensor, boxes: Tensor, source: Tensor | None) -> tuple[Tensor, Tensor]:
    """Boxes as float32 [M, 4], and the image of each as int64 [M].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or boxes that require a gradient.
    """
    if boxes.shape[-1:] != (4,) or boxes.ndim not in (2, 3):
        raise ValueError(f"boxes must be [M, 4] or [B, K, 4], got {tuple(boxes.shape)}")
    if boxes.requires_grad:
        raise ValueError(
            "boxes must not require a gradient: the images alone are differentiated, so detach them"
        )
    count, batched = images.shape[0], boxes.ndim == 3
    if source is None:
        if boxes.shape[0] != count:
            raise ValueError(
                f"boxes {tuple(boxes.shape)} for {count} images need source, the image of each box"
            )
        device, each = images.device, boxes.shape[1] if batched else 1
        source = shared(
            ("source", count, each, device),
            lambda: torch.arange(count, device=device).repeat_interleave(each),
        )
    elif batched:
        raise ValueError(
            "boxes [B, K, 4] cut image b already; leave source out or flatten the boxes to [M, 4]"
        )
    flat = boxes.detach().reshape(-1, 4).to(torch.float32)
    if source.shape != flat.shape[:1] or source.dtype.is_floating_point:
        raise ValueError(
            f"source must be {len(flat)} integers, one a box, got {source.dtype} {tuple(source.shape)}"
        )
    if not images.device == flat.device == source.device:
        raise ValueError(
            "images, boxes and source must be on one device, "
            f"got {images.device}, {flat.device} and {source.device}"
        )
    return flat, source.to(torch.int64)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must be [B, C, H, W], got {tuple(images.shape)}")
    if images.dtype not in (torch.uint8, *_FLOAT_DTYPES):
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")


def _crop_resize_fake(
    images: Tensor, boxes: Tensor, source: Tensor, height: int, width: int, factor: int
) -> Tensor:
    mosaics = boxes.shape[0] // factor**2
    return images.new_empty((mosaics, images.shape[1], factor * height, factor * width))


def _crop_batch_fake(
    images: Tensor,
    boxes: Tensor,
    source: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    height: int,
    width: int,
    padded_height: int,
    padded_width: int,
    dtype: torch.dtype,
) -> Tensor:
    shape = (boxes.shape[0], images.shape[1], padded_height, padded_width)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


def _crop_resize_backward_fake(
    grad_output: Tensor,
    boxes: Tensor,
    source: Tensor,
    images: int,
    image_height: int,
    image_width: int,
    factor: int,
) -> Tensor:
    return grad_output.new_empty((images, grad_output.shape[1], image_height, image_width))


def _check_boxes(boxes: Tensor, source: Tensor, images: int, height: int, width: int) -> None:
    """Raise ValueError for the first source outside the batch or box outside its image."""
    wrong = (source < 0) | (source >= images)
    if wrong.any():
        m = int(wrong.nonzero()[0])
        raise ValueError(f"source must be in [0, {images}), got source[{m}] = {int(source[m])}")
    x0, y0, x1, y1 = boxes.unbind(1)
    inside = (x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height) & (x1 - x0 >= 1) & (y1 - y0 >= 1)
    if not inside.all():
        m = int((~inside).nonzero()[0])
        raise ValueError(
            f"boxes must be x0, y0, x1, y1 inside {width} x {height} pixels and at least one pixel wide "
            f"and high, got boxes[{m}] = {boxes[m].tolist()}"
        )


def _check_crop_resize(images: Tensor, boxes: Tensor, source: Tensor, *rest: Any) -> None:
    _check_boxes(boxes, source, images.shape[0], images.shape[2], images.shape[3])


def _check_crop_resize_backward(
    grad_output: Tensor,
    boxes: Tensor,
    source: Tensor,
    images: int,
    image_height: int,
    image_width: int,
    factor: int,
) -> None:
    _check_boxes(boxes, source, images, image_height, image_width)


def _native_accepts(images: Tensor, boxes: Tensor, source: Tensor, *_: Any) -> bool:
    return boxes.dtype == torch.float32 and source.dtype == torch.int64


define(
    "crop_resize",
    "(Tensor images, Tensor boxes, Tensor source, int height, int width, int factor) -> Tensor",
    reference=reference.crop_resize,
    fake=_crop_resize_fake,
    triton="crop_resize",
    native_accepts=_native_accepts,
    check=_check_crop_resize,
)
define(
    "crop_resize_backward",
    "(Tensor grad_output, Tensor boxes, Tensor source, int images, int image_height, int image_width, "
    "int factor) -> Tensor",
    reference=reference.crop_resize_backward,
    fake=_crop_resize_backward_fake,
    triton="crop_resize",
    native_accepts=_native_accepts,
    check=_check_crop_resize_backward,
)


define(
    "crop_batch",
    "(Tensor images, Tensor boxes, Tensor source, Tensor? mean, Tensor? std, int height, int width, "
    "int padded_height, int padded_width, ScalarType dtype) -> Tensor",
    reference=reference.crop_batch,
    fake=_crop_batch_fake,
    triton="crop_resize",
    native_accepts=_native_accepts,
    check=_check_crop_resize,
)


def _save_crop_resize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, boxes, source, _, _, ctx.factor = inputs
    ctx.images, _, ctx.image_height, ctx.image_width = images.shape
    ctx.save_for_backward(boxes, source)


def _crop_resize_gradient(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    boxes, source = ctx.saved_tensors
    grad_images = torch.ops.ddfast.crop_resize_backward(
        grad_output, boxes, source, ctx.images, ctx.image_height, ctx.image_width, ctx.factor
    )
    return grad_images, None, None, None, None, None


def _save_crop_resize_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, boxes, source, _, _, _, ctx.factor = inputs
    ctx.height, ctx.width = grad_output.shape[2] // ctx.factor, grad_output.shape[3] // ctx.factor
    ctx.save_for_backward(boxes, source)


def _crop_resize_backward_gradient(ctx: Any, grad_images: Tensor) -> tuple[Tensor | None, ...]:
    boxes, source = ctx.saved_tensors
    grad = torch.ops.ddfast.crop_resize(grad_images, boxes, source, ctx.height, ctx.width, ctx.factor)
    return grad, None, None, None, None, None, None


def _save_crop_batch(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, boxes, source, _, std, ctx.height, ctx.width, _, _, dtype = inputs
    ctx.image_shape, ctx.image_dtype = images.shape, images.dtype
    ctx.compute = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32
    ctx.save_for_backward(boxes, source, std)


def _crop_batch_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The transpose of an affine map, in differentiable operations."""
    boxes, source, std = ctx.saved_tensors
    top, left = (grad.shape[2] - ctx.height) // 2, (grad.shape[3] - ctx.width) // 2
    grad = grad[:, :, top : top + ctx.height, left : left + ctx.width].to(ctx.compute)
    if std is not None:
        grad = grad / std[:, None, None]
    batch, _, image_height, image_width = ctx.image_shape
    grad_images = torch.ops.ddfast.crop_resize_backward(
        grad, boxes, source, batch, image_height, image_width, 1
    )
    return grad_images.to(ctx.image_dtype), *(None,) * 9


def _folded(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A vmapped tensor with its vmapped dimension (`size` copies where it has none) folded into the first."""
    tensor = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _folded_boxes(
    info: Any, in_dims: tuple[int | None, ...], boxes: Tensor, source: Tensor, images: int
) -> tuple[Tensor, Tensor]:
    """Boxes and sources of all vmapped calls in one list, where each call has `images` images of its own."""
    source = source.unsqueeze(0) if in_dims[1] is None else source.movedim(in_dims[1], 0)
    offset = images * torch.arange(info.batch_size, device=source.device)
    return _folded(boxes, in_dims[0], info.batch_size), (source + offset[:, None]).flatten()


def _crop_resize_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    images: Tensor,
    boxes: Tensor,
    source: Tensor,
    height: int,
    width: int,
    factor: int,
) -> tuple[Tensor, int]:
    apart = 0
    if in_dims[0] is not None:
        images = _folded(images, in_dims[0], info.batch_size)
        apart = images.shape[0] // info.batch_size
    boxes, source = _folded_boxes(info, in_dims[1:3], boxes, source, apart)
    tiles = torch.ops.ddfast.crop_resize(images, boxes, source, height, width, factor)
    return tiles.unflatten(0, (info.batch_size, tiles.shape[0] // info.batch_size)), 0


def _crop_batch_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    images: Tensor,
    boxes: Tensor,
    source: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, int]:
    if in_dims[3] is not None or in_dims[4] is not None:
        raise ValueError("mean and std are those of all images and cannot be mapped over")
    apart = 0
    if in_dims[0] is not None:
        images = _folded(images, in_dims[0], info.batch_size)
        apart = images.shape[0] // info.batch_size
    boxes, source = _folded_boxes(info, in_dims[1:3], boxes, source, apart)
    batch = torch.ops.ddfast.crop_batch(images, boxes, source, mean, std, *rest)
    return batch.unflatten(0, (info.batch_size, batch.shape[0] // info.batch_size)), 0


def _crop_resize_backward_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad_output: Tensor,
    boxes: Tensor,
    source: Tensor,
    images: int,
    image_height: int,
    image_width: int,
    factor: int,
) -> tuple[Tensor, int]:
    grad_output = _folded(grad_output, in_dims[0], info.batch_size)
    boxes, source = _folded_boxes(info, in_dims[1:3], boxes, source, images)
    grad_images = torch.ops.ddfast.crop_resize_backward(
        grad_output, boxes, source, images * info.batch_size, image_height, image_width, factor
    )
    return grad_images.unflatten(0, (info.batch_size, images)), 0


torch.library.register_autograd(
    "ddfast::crop_resize", _crop_resize_gradient, setup_context=_save_crop_resize, lib=LIBRARY
)
torch.library.register_autograd(
    "ddfast::crop_resize_backward",
    _crop_resize_backward_gradient,
    setup_context=_save_crop_resize_backward,
    lib=LIBRARY,
)
torch.library.register_vmap("ddfast::crop_resize", _crop_resize_vmap, lib=LIBRARY)
torch.library.register_vmap("ddfast::crop_resize_backward", _crop_resize_backward_vmap, lib=LIBRARY)
torch.library.register_autograd(
    "ddfast::crop_batch", _crop_batch_gradient, setup_context=_save_crop_batch, lib=LIBRARY
)
torch.library.register_vmap("ddfast::crop_batch", _crop_batch_vmap, lib=LIBRARY)
