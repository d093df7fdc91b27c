"""Pictures: attribution heatmaps, crop boxes, data URIs; the mosaics of `ddfast.output.mosaic` as well.

Everything is drawn by Pillow, and equal arguments give equal pixels with one Pillow version.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ddfast.output.mosaic import (
    PIXELATED_UP_TO,
    display_side,
    mosaic_picture,
    mosaic_rows,
    paired_mosaic_picture,
    png_bytes,
    resized,
    to_picture,
)
from ddfast.report.colours import diverging, opacity

__all__ = [
    "CANDIDATE",
    "CHOSEN",
    "PIXELATED_UP_TO",
    "data_uri",
    "display_side",
    "encoded",
    "heatmap_picture",
    "mosaic_picture",
    "mosaic_rows",
    "paired_mosaic_picture",
    "png_bytes",
    "resized",
    "to_picture",
]

CANDIDATE = (255, 255, 255)
CHOSEN = (255, 221, 51)
"""Colours of boxes."""

_BOX_EDGE = (18, 22, 30)
_OVERSAMPLING = 4  # boxes are drawn at this scale and averaged down


# Images -----------------------------------------------------------------------------------------------------


def encoded(picture: Image.Image) -> tuple[bytes, str]:
    """The bytes of a picture and their media type: PNG where that is small, else JPEG of quality 90."""
    png = png_bytes(picture)
    if len(png) <= 6000:
        return png, "image/png"
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=90, subsampling=0)
    jpeg = buffer.getvalue()
    return (jpeg, "image/jpeg") if len(jpeg) < len(png) else (png, "image/png")


def data_uri(picture: Image.Image, longest: int | None = None) -> str:
    """The picture as a `data:` URI for a page that needs no other file, at most `longest` pixels a side."""
    if longest is not None and max(picture.size) > longest:
        picture = picture.copy()
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    data, kind = encoded(picture)
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


# Heatmaps and boxes -----------------------------------------------------------------------------------------


def heatmap_picture(
    image: Any,
    phi: Any,
    boxes: Any = None,
    chosen: Any = None,
    *,
    side: int = 256,
    limit: float | None = None,
) -> Image.Image:
    """Attribution over the dimmed image, warm where a cell speaks for the class, cool where against it.

    Args:
        image: uint8 [3, H, W].
        phi: float [rows, cols], attribution of the grid cells (cell boundaries floor(r * H / rows), as
            `ddfast.ops.masked_batch` cuts them). Values that are not finite are shown as 0.
        boxes: [K, 4] candidate boxes (x0, y0, x1, y1) in pixels of `image`, drawn thin; None for none.
        chosen: [4] the box that is drawn thick; None for none.
        side: side of the picture in pixels.
        limit: attribution that gets the full colour; by default the largest of this image in size.

    Raises:
        ValueError: an image or a heatmap of another shape.
    """
    picture = to_picture(image)
    cells = np.nan_to_num(np.asarray(phi, dtype=np.float64), posinf=0, neginf=0)
    if cells.ndim != 2 or not cells.size:
        raise ValueError(f"phi must be [rows, cols], got {list(cells.shape)}")
    largest = float(np.abs(cells).max()) if limit is None else limit
    strength = cells / largest if largest > 0 else np.zeros_like(cells)
    place = np.ix_(_cell_of(side, cells.shape[0]), _cell_of(side, cells.shape[1]))
    colour, alpha = diverging(strength)[place].astype(np.float64), opacity(strength)[place][..., None]
    below = _dimmed(resized(picture, side))
    blended = Image.fromarray(np.rint(below * (1 - alpha) + colour * alpha).astype(np.uint8))
    return _with_boxes(blended, picture.size, boxes, chosen)


def _cell_of(side: int, cells: int) -> np.ndarray:
    """Cell of every pixel along one side: ((p + 1) * cells - 1) // side, int [side]."""
    return ((np.arange(side) + 1) * cells - 1) // side


def _dimmed(picture: Image.Image) -> np.ndarray:
    """The picture drained of most colour and contrast, so that what is drawn over it is read first."""
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None]
    colour = np.asarray(picture, dtype=np.float64)
    return 26 + 0.72 * (0.75 * grey + 0.25 * colour)


def _scaled(box: Any, size: tuple[int, int], side: int) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (float(edge) for edge in box)
    return x0 * side / size[0], y0 * side / size[1], x1 * side / size[0], y1 * side / size[1]


def _with_boxes(picture: Image.Image, size: tuple[int, int], boxes: Any, chosen: Any) -> Image.Image:
    """Draw boxes, their lines inside the box and hence inside the picture, smoothed by oversampling."""
    if boxes is None and chosen is None:
        return picture
    side, scale = picture.width, _OVERSAMPLING
    unit = side / 240
    layer = Image.new("RGBA", (side * scale, side * scale), (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)

    def outline(box: Any, inset: float, width: float, colour: tuple[int, int, int, int]) -> None:
        x0, y0, x1, y1 = (edge * scale for edge in _scaled(box, size, side))
        near, far = inset * scale, inset * scale + 1
        corners = [round(x0 + near), round(y0 + near), round(x1 - far), round(y1 - far)]
        draw.rectangle(corners, outline=colour, width=max(1, round(width * scale)))

    for box in sorted({tuple(float(edge) for edge in box) for box in boxes} if boxes is not None else ()):
        outline(box, 0, 2.2 * unit, (*_BOX_EDGE, 120))
        outline(box, 0.5 * unit, 1.1 * unit, (*CANDIDATE, 235))
    if chosen is not None:
        outline(chosen, 0, 5.5 * unit, (*_BOX_EDGE, 255))
        outline(chosen, 1.2 * unit, 3.2 * unit, (*CHOSEN, 255))
    flat = layer.resize(picture.size, Image.Resampling.BOX)
    return Image.alpha_composite(picture.convert("RGBA"), flat).convert("RGB")
