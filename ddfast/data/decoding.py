"""Bytes to pixels: what Pillow can read becomes uint8 RGB, everything else a `BadImage` with its reason.

What "RGB" means for the odd modes, so that two machines and two loaders agree:

- grayscale is repeated over the three channels; a 1-bit image becomes 0 and 255;
- palettes are looked up; transparency, wherever it comes from, is composited on white: a transparent colour is
  compared at the file's own depth, whole 16 bits of it included;
- CMYK is read as Adobe writes it (inverted in JPEG, which is what Pillow does) and converted without a
  profile;
- 16 bits a channel keep their high byte (`value >> 8`), as libpng's strip does, in grayscale and in RGB
  alike, save in a colour PPM, whose own maximum is scaled to 255;
- 32-bit integers and floats: 0..65535 integers as 16 bits, 0..1 floats as a fraction, anything else from its
  own minimum to its own maximum;
- the orientation in EXIF is applied, and that in XMP where EXIF has none, as `PIL.ImageOps.exif_transpose` does;
- of an animation or a multi-page file the first frame is taken; ICC profiles are not applied.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# The plugins of FORMATS are imported here, once: Pillow's lazy registration is not made for many threads.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401 - a JPEG of several pictures
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)
from torch import Tensor

from ddfast.data.sources import limit_from
from ddfast.errors import BadImage

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
"""Pillow's names of what is opened, whatever the file is called. EPS, which starts a program, is none."""

MAX_PIXELS = 178_956_970
"""Pixels above which an image is refused as a decompression bomb: 2^29 bytes of RGB, Pillow's own refusal.

`DDFAST_MAX_PIXELS` in the environment sets another limit, see `pixel_limit`.
"""

_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_ASPECT = 16
"""A strip longer than 16:1 is first cropped to that, so that resizing cannot blow it up."""


# What Pillow's parsers let out on malformed files; its documentation promises OSError and SyntaxError only.
# RuntimeError stands for NotImplementedError and RecursionError as well, ArithmeticError for overflow and
# division by zero, LookupError for missing keys and tags. A Warning is raised where the caller's filters make
# warnings errors.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    LookupError,
    AssertionError,
    EOFError,
    RuntimeError,
    MemoryError,
    BufferError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,
)


def pixel_limit() -> int:
    """Pixels above which an image is refused: `DDFAST_MAX_PIXELS`, else `MAX_PIXELS`.

    Raises:
        UsageError: the variable is not a positive whole number.
    """
    return limit_from("DDFAST_MAX_PIXELS", MAX_PIXELS)


def decode(data: bytes, *, max_pixels: int | None = None) -> Tensor:
    """Decode an image file to RGB.

    Args:
        data: the file's bytes: JPEG, PNG, BMP, WebP, GIF, TIFF or PPM.
        max_pixels: width times height above which the image is refused before any pixel is decoded;
            `pixel_limit()` by default.

    Returns:
        uint8 tensor [3, H, W], contiguous, its own memory.

    Raises:
        BadImage: the file is empty, truncated, damaged, of another format, too large or in a colour space
            without a conversion. `str(error)` is a short reason that is the same on every run and does not
            name the file.
    """
    return _to_tensor(_open_rgb(data, max_pixels))


def decode_fit(data: bytes, size: int, resize: int | None = None, *, max_pixels: int | None = None) -> Tensor:
    """`fit(decode(data), size, resize)` without the tensor between: bytes to uint8 [3, size, size].

    Raises:
        BadImage: as `decode`.
        ValueError: `resize` is smaller than `size`.
    """
    return _to_tensor(_fit_image(_open_rgb(data, max_pixels), size, resize))


def fit(image: Tensor | Image.Image, size: int, resize: int | None = None) -> Tensor:
    """Resize the shorter side to `resize` (default `size`) and cut the central `size` x `size` square.

    The resampling is Pillow's antialiased bilinear filter, and both roundings are torchvision's, so the
    result equals `Resize(resize)` and `CenterCrop(size)` on the Pillow image bit for bit. An image that
    already has the size is returned unchanged. A strip longer than 16:1 is first cropped to 16:1 around its
    centre, which bounds the memory.

    Args:
        image: uint8 RGB tensor [3, H, W] or an RGB Pillow image.
        size: side of the square, in pixels.
        resize: shorter side before the crop, in pixels; at least `size`.

    Returns:
        uint8 tensor [3, size, size], contiguous.

    Raises:
        ValueError: the image is not uint8 [3, H, W], or `resize` is smaller than `size`.
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"image must be uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
        image = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    elif image.mode != "RGB":
        raise ValueError(f"image must be an RGB Pillow image, got mode {image.mode!r}; convert it first")
    return _to_tensor(_fit_image(image, size, resize))


def _fit_image(image: Image.Image, size: int, resize: int | None) -> Image.Image:
    shorter = size if resize is None else resize
    if size < 1 or shorter < size:
        raise ValueError(
            f"size must be at least 1 and resize at least size, got size={size}, resize={resize}"
        )
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        longest = MAX_ASPECT * min(width, height)
        image = _centre_crop(image, min(width, longest), min(height, longest))
        width, height = image.size
    if min(width, height) != shorter:
        image = image.resize(fitted_size(width, height, shorter), Image.Resampling.BILINEAR)
    return _centre_crop(image, size, size)


def fitted_size(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Width and height after the shorter side is resized to `shorter`, rounded as torchvision does."""
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def centre_offsets(width: int, height: int, size: int) -> tuple[int, int]:
    """Left and top of the central square of `size` pixels, rounded as torchvision does."""
    return round((width - size) / 2.0), round((height - size) / 2.0)


def _centre_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def _open_rgb(data: bytes, max_pixels: int | None) -> Image.Image:
    """Decode to an RGB Pillow image; every failure becomes `BadImage`."""
    max_pixels = pixel_limit() if max_pixels is None else max_pixels
    if not data:
        raise BadImage("empty file")
    if max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:
        # Pillow's own limit is a global that refuses at twice its value; it has to follow a limit raised on
        # purpose.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    with _quiet_pillow():
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.UnidentifiedImageError:
            raise BadImage("not an image (JPEG, PNG, BMP, WebP, GIF, TIFF or PPM)") from None
        except _PILLOW_ERRORS as error:
            raise BadImage(_reason(error)) from error
        with image:
            width, height = image.size
            if width < 1 or height < 1:
                raise BadImage(f"no pixels ({width}x{height})")
            if width * height > max_pixels:
                raise BadImage(
                    f"too large: {width}x{height} is more than the limit of {max_pixels} pixels, which "
                    "DDFAST_MAX_PIXELS can raise"
                )
            try:
                image.load()
                transpose = _TRANSPOSE.get(_orientation(image))
                rgb = _to_rgb(image, _transparent_in_png(image, data) if image.format == "PNG" else None)
                return rgb.transpose(transpose) if transpose is not None else rgb
            except _PILLOW_ERRORS as error:
                raise BadImage(_reason(error)) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image in memory as `decode` gives one from its file: upright, RGB on white. It is left alone.

    Raises:
        BadImage: its file is damaged, or its colour space has no conversion.
    """
    with _quiet_pillow():
        try:
            transpose = _TRANSPOSE.get(_orientation(image))  # a copy may lack it
            rgb = _to_rgb(image.copy())
            return rgb.transpose(transpose) if transpose is not None else rgb
        except _PILLOW_ERRORS as error:
            raise BadImage(_reason(error)) from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 (upright) without one, or with damaged EXIF data, whose pixels are still good."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except _PILLOW_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _transparent_in_png(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Where a PNG of 2, 4 or 16 bits has its transparent colour, bool [H, W]; None for all others.

    Pillow compares that colour, which is of the file's depth, with 8-bit pixels, and not at all in 16-bit grayscale.
    """
    depth, wanted = data[24], image.info.get("transparency")
    if image.mode == "L" and depth < 8 and isinstance(wanted, int):
        levels = (1 << depth) - 1
        return np.asarray(image) == (wanted & levels) * (255 // levels)
    if image.mode.startswith("I;16") and isinstance(wanted, int):
        return np.asarray(image) == wanted
    if image.mode == "RGB" and depth == 16 and isinstance(wanted, tuple):
        # Read as little-endian, the other byte of each value is kept.
        with Image.open(io.BytesIO(data), formats=("PNG",)) as low:
            low.tile = [part._replace(args="RGB;16L") for part in low.tile]
            low.load()
            values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
        return (values == np.array(wanted, np.uint16)).all(axis=2)
    return None


def _to_rgb(image: Image.Image, transparent: np.ndarray | None = None) -> Image.Image:
    """RGB on white; `transparent`, bool [H, W], stands for the transparent colour that `image.info` may have."""
    if transparent is not None:
        image.info.pop("transparency")
        rgb = np.array(_to_rgb(image))
        rgb[transparent] = 255
        return Image.fromarray(rgb)
    mode = image.mode
    if mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
        mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        return _deep_gray_to_rgb(image)
    if mode in ("LA", "PA", "RGBA") or ("transparency" in image.info and mode in ("1", "L", "P", "RGB")):
        rgba = image if mode == "RGBA" else image.convert("RGBA")
        if rgba.getchannel("A").getextrema() == (255, 255):
            return rgba.convert("RGB")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _deep_gray_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = (0.0, 1.0) if values.min() >= 0 and values.max() <= 1 else (values.min(), values.max())
        gray = _stretch(values, low, high)
    elif values.min() >= 0 and values.max() <= 0xFFFF:
        gray = (values.astype(np.uint16) >> 8).astype(np.uint8)
    else:
        gray = _stretch(values.astype(np.float64), float(values.min()), float(values.max()))
    return Image.fromarray(gray).convert("RGB")


def _stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low..high to 0..255, rounding half up; a constant image outside 0..1 becomes black."""
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return np.floor((values / 2 - low / 2) / (high / 2 - low / 2) * 255 + 0.5).astype(np.uint8)


def _reason(error: BaseException) -> str:
    """One short line, the same on every run since it stands in the manifest: no file names, no addresses."""
    text = " ".join(str(error).split())
    text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "file", text)
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {text.partition(',')[0]}"
    if isinstance(error, MemoryError):
        text = "needs more memory than there is"
    elif "truncated" in text.lower() or isinstance(error, EOFError):
        return "truncated"
    return f"damaged: {text or type(error).__name__}"[:160]


class _PillowFilter:
    """A warnings filter that silences Pillow while at least one thread decodes.

    `warnings.catch_warnings` would swap the filters of the whole process and put stale ones back when threads
    overlap; inserting and removing one entry leaves everybody else's filters alone.
    """

    entry = ("ignore", None, Warning, re.compile(r"PIL(\.|$)"), 0)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0

    def acquire(self) -> None:
        with self._lock:
            self._users += 1
            filters = warnings.filters
            if not filters or filters[0] is not self.entry:
                filters.insert(0, self.entry)  # type: ignore[attr-defined]

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                filters = warnings.filters
                filters[:] = [entry for entry in filters if entry is not self.entry]  # type: ignore[index]


_FILTER = _PillowFilter()


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    _FILTER.acquire()
    try:
        yield
    finally:
        _FILTER.release()


_EXTENSION = {"png": ".png", "jpeg": ".jpg"}
_SUBSAMPLING = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


def encode_image(
    image: Tensor, format: str = "png", *, quality: int = 95, subsampling: str = "4:4:4"
) -> bytes:
    """Encode an image; equal pixels give equal bytes with one Pillow version.

    Args:
        image: uint8 [3, H, W].
        format: "png" (lossless) or "jpeg".
        quality: of JPEG, 1 to 100.
        subsampling: chroma of JPEG: "4:4:4", "4:2:2" or "4:2:0". RDED's own files are quality 75 with
            "4:2:0".

    Raises:
        ValueError: another shape, dtype, format or subsampling.
    """
    from PIL import Image

    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
    if format not in _EXTENSION or subsampling not in _SUBSAMPLING:
        raise ValueError(
            f"format must be one of {list(_EXTENSION)} and subsampling one of {list(_SUBSAMPLING)}, "
            f"got {format!r} and {subsampling!r}"
        )
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    buffer = io.BytesIO()
    if format == "png":
        picture.save(buffer, "PNG", compress_level=6)
    else:
        picture.save(buffer, "JPEG", quality=quality, subsampling=_SUBSAMPLING[subsampling])
    return buffer.getvalue()
