"""Plain JPEGs by torchvision's decoder and PyTorch's resize; every other file by Pillow.

torchvision decodes with libjpeg-turbo, to Pillow's bits. PyTorch resizes bytes with Pillow's filter in vector
instructions and 16-bit weights, where Pillow has scalar code and 22 bits: the result differs by one grey level
in one value of five hundred, in half the time (`bench/results/loading.md`). An image that has its size already
is the same bit for bit.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from ddfast.data.decoding import MAX_ASPECT, centre_offsets, decode_fit, fitted_size
from ddfast.data.jpeg import PlainJpeg, plain_jpeg


@cache
def torchvision_decodes() -> bool:
    """Whether torchvision is installed and was built with a JPEG decoder."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    import torchvision.io  # noqa: F401 - registers the operators

    return hasattr(torch.ops.image, "decode_jpeg")


def suits(jpeg: PlainJpeg, max_pixels: int) -> bool:
    """Whether an image is small enough and no strip, so that nothing but its pixels matters."""
    longer, shorter = max(jpeg.width, jpeg.height), min(jpeg.width, jpeg.height)
    return longer <= MAX_ASPECT * shorter and longer * shorter <= max_pixels


def decode_fit_native(data: bytes, size: int, resize: int | None = None, *, max_pixels: int) -> Tensor:
    """`decode_fit`, faster for plain JPEGs: uint8 [3, size, size].

    Raises:
        BadImage: as `decode_fit`, whose verdict counts for whatever torchvision does not decode.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    jpeg = plain_jpeg(data)
    if jpeg is None or not suits(jpeg, max_pixels):
        return decode_fit(data, size, resize, max_pixels=max_pixels)
    try:
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:
        return decode_fit(data, size, resize, max_pixels=max_pixels)
    height, width = image.shape[1:]
    shorter = size if resize is None else resize
    if min(width, height) != shorter:
        width, height = fitted_size(width, height, shorter)
        image = torch.nn.functional.interpolate(
            image.unsqueeze(0), size=(height, width), mode="bilinear", antialias=True
        )[0]
    left, top = centre_offsets(width, height, size)
    return image[:, top : top + size, left : left + size].contiguous()
