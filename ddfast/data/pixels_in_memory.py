"""One image in memory as the bytes of a file, which is what a source gives: a PPM of its 8-bit RGB pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddfast.errors import UsageError, one_line

_ROUNDING = 1e-3  # how far a float image may leave [0, 1] by the rounding of half precision and of resizing
_CHANNELS = (3, 1, 4)  # RGB, grey, RGBA; where two axes may hold the channels, the likelier number counts


def as_file(image: Any) -> bytes:
    """An image in memory as the bytes of a file that `ddfast.data.decode` reads.

    Args:
        image: a Pillow image; an array or tensor [3, H, W], [H, W, 3] or [H, W] (or 1 or 4 channels, the fourth
            transparency, put on white), bool, of whole numbers from 0 to 255, or float in [0, 1]; or the bytes of an
            image file, which are given back. Where both the first and the last axis may be the channels, a tensor's
            are the first and an array's the last.

    Returns:
        The file's bytes: of a Pillow image, an array or a tensor those of a PPM ("P6"), so that equal RGB pixels give
        equal bytes.

    Raises:
        UsageError: no image, another shape, or values out of range; the message goes on behind the image's name.
        BadImage: a Pillow image whose file is damaged.
    """
    from ddfast.data.decoding import upright_rgb

    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        return _ppm(np.asarray(upright_rgb(image)))
    first = isinstance(image, Tensor)
    pixels = _bytes_of(_array_of(image), first)
    if pixels.shape[2] == 4:
        return _ppm(np.asarray(upright_rgb(Image.fromarray(np.ascontiguousarray(pixels)))))
    return _ppm(pixels)


def _ppm(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 1 or 3] as a PPM."""
    height, width, channels = pixels.shape
    if channels == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes()


def _array_of(image: Any) -> np.ndarray:
    try:
        if isinstance(image, Tensor):
            held = image.detach().cpu()
            array = (held.float() if held.dtype == torch.bfloat16 else held).numpy()
        else:
            array = np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; sparse, quantised and meta tensors
        raise UsageError(f"is no image but {_kind(image)} ({one_line(error)})") from error
    if array.dtype.kind not in "buif":
        what = _kind(image) if array.dtype.kind in "OUSV" else f"{array.dtype} values"
        raise UsageError(f"is no image but {what}: wanted a Pillow image, an array or a tensor")
    return array


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"a{'n' if name[:1].lower() in 'aeiou' else ''} {name}"


def _bytes_of(array: np.ndarray, first: bool) -> np.ndarray:
    """uint8 [H, W, C] of an array in any of the layouts; `first`: an ambiguous one has its channels first."""
    shape = list(array.shape)
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim == 3:
        ends = (0, 2) if first else (2, 0)
        found = next((axis for count in _CHANNELS for axis in ends if shape[axis] == count), None)
        if found is None:
            raise _wrong_shape(shape)
        array = np.moveaxis(array, found, 2)
    if array.ndim != 3 or 0 in array.shape:
        raise _wrong_shape(shape)
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    least, most = array.min(), array.max()
    if array.dtype.kind in "iu":
        if least < 0 or most > 255:
            raise UsageError(
                f"holds whole numbers from {least} to {most}: wanted 0 to 255, or floats from 0 to 1"
            )
        return array.astype(np.uint8)
    if not (least >= -_ROUNDING and most <= 1 + _ROUNDING):
        hint = "divide them by 255" if least >= 0 and 1 < most <= 255 else "give them before normalisation"
        raise UsageError(f"holds floats from {least:.4g} to {most:.4g}: wanted 0 to 1; {hint}")
    return np.floor(array.astype(np.float32).clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _wrong_shape(shape: list[int]) -> UsageError:
    return UsageError(f"has the shape {shape}: wanted [3, H, W], [H, W, 3] or [H, W]")
