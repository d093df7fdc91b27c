"""Pictures: mosaics of distilled images, attribution heatmaps, crop boxes.

Everything is drawn by Pillow, and equal arguments give equal pixels with one Pillow version.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddfast.report.colours import diverging, opacity

PIXELATED_UP_TO = 64
"""Images up to this side, in pixels, are enlarged with hard pixel edges, larger ones smoothly."""

CANDIDATE = (255, 255, 255)
CHOSEN = (255, 221, 51)
"""Colours of boxes."""

_BOX_EDGE = (18, 22, 30)
_OVERSAMPLING = 4  # boxes are drawn at this scale and averaged down
_PAPER = (250, 250, 248)
_INK = (42, 46, 54)
_CLASS_ROWS = 20
_CLASS_IMAGES = 10


# Images -----------------------------------------------------------------------------------------------------


def to_picture(image: Any) -> Image.Image:
    """uint8 [3, H, W] tensor or array -> RGB picture.

    Raises:
        ValueError: another shape or dtype.
    """
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[0] != 3:
        raise ValueError(f"image must be uint8 [3, H, W], got {array.dtype} {list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))


def resized(picture: Image.Image, side: int) -> Image.Image:
    """A square picture at another side: hard pixel edges for small images, smooth for larger ones."""
    if picture.size == (side, side):
        return picture
    enlarged_pixels = picture.width <= PIXELATED_UP_TO and side > picture.width
    kernel = Image.Resampling.NEAREST if enlarged_pixels else Image.Resampling.LANCZOS
    return picture.resize((side, side), kernel)


def display_side(size: int, wanted: int) -> int:
    """Side to show an image of `size` pixels at: for small images the nearest whole multiple of their own."""
    return size * max(1, round(wanted / size)) if size <= PIXELATED_UP_TO else wanted


def encoded(picture: Image.Image) -> tuple[bytes, str]:
    """The bytes of a picture and their media type: PNG where that is small, else JPEG of quality 90."""
    png = png_bytes(picture)
    if len(png) <= 6000:
        return png, "image/png"
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=90, subsampling=0)
    jpeg = buffer.getvalue()
    return (jpeg, "image/jpeg") if len(jpeg) < len(png) else (png, "image/png")


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


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


# Mosaics ----------------------------------------------------------------------------------------------------


def mosaic_rows(
    labels: Sequence[int], classes: int = _CLASS_ROWS, images: int = _CLASS_IMAGES
) -> list[list[int]]:
    """Which images a mosaic shows: for the first `classes` labels present their first `images` indices."""
    rows: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        rows.setdefault(int(label), []).append(index)
    return [rows[label][:images] for label in sorted(rows)[:classes]]


def mosaic_picture(
    images: Any,
    labels: Sequence[int],
    class_names: Sequence[str],
    *,
    side: int = 96,
    max_classes: int = _CLASS_ROWS,
    max_images: int = _CLASS_IMAGES,
) -> Image.Image:
    """One row a class: its name, then its images.

    Args:
        images: N images uint8 [3, S, S].
        labels: [N] class indices.
        class_names: in label order.
        side: wanted side of a cell in pixels; images of up to 64 px are enlarged to the nearest whole
            multiple, pixel by pixel, others resized smoothly.
        max_classes: rows at most.
        max_images: images a row at most.

    Raises:
        ValueError: no images.
    """
    return _mosaic([("", images, labels)], class_names, side, max_classes, max_images)


def paired_mosaic_picture(
    sets: Sequence[tuple[str, Any, Sequence[int]]],
    class_names: Sequence[str],
    *,
    side: int = 96,
    max_classes: int = _CLASS_ROWS,
    max_images: int = _CLASS_IMAGES,
) -> Image.Image:
    """Mosaics side by side under their titles: `sets` are (title, images, labels); see `mosaic_picture`."""
    return _mosaic(sets, class_names, side, max_classes, max_images)


def _mosaic(
    sets: Sequence[tuple[str, Any, Sequence[int]]],
    class_names: Sequence[str],
    side: int,
    max_classes: int,
    max_images: int,
) -> Image.Image:
    if not sets or not all(len(images) for _, images, _ in sets):
        raise ValueError("a mosaic needs at least one image")
    cell = display_side(to_picture(sets[0][1][0]).width, side)
    gap, margin = max(2, cell // 16), max(16, cell // 4)
    layout = [mosaic_rows(labels, max_classes, max_images) for _, _, labels in sets]
    shown = sorted(
        {int(labels[row[0]]) for (_, _, labels), rows in zip(sets, layout, strict=True) for row in rows}
    )
    shown = shown[:max_classes]
    widths = [max(len(row) for row in rows) * (cell + gap) - gap for rows in layout]
    font = ImageFont.load_default(max(13, round(cell * 0.18)))
    heading_font = ImageFont.load_default(max(16, round(cell * 0.22)))
    names = {label: _fitted(str(class_names[label]), font, 2 * cell) for label in shown}
    left = margin + math.ceil(max(font.getlength(name) for name in names.values())) + cell // 6
    heading = round(cell * 0.22) + cell // 5 if any(title for title, _, _ in sets) else 0
    width = left + sum(widths) + margin * (len(sets) - 1) + margin
    height = margin * 2 + heading + len(shown) * (cell + gap) - gap
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    top = margin + heading
    for row, label in enumerate(shown):
        middle = top + row * (cell + gap) + cell // 2
        draw.text((left - cell // 6, middle), names[label], font=font, fill=_INK, anchor="rm")
    x = left
    for (title, images, labels), rows, taken in zip(sets, layout, widths, strict=True):
        if title:
            draw.text((x, margin), _fitted(title, heading_font, taken), font=heading_font, fill=_INK)
        for indices in rows:
            label = int(labels[indices[0]])
            if label not in names:
                continue
            y = top + shown.index(label) * (cell + gap)
            for column, index in enumerate(indices):
                canvas.paste(resized(to_picture(images[index]), cell), (x + column * (cell + gap), y))
        x += taken + margin
    return canvas


def _fitted(text: str, font: Any, width: float) -> str:
    """The text on one line, cut with an ellipsis where it is wider than `width` pixels."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
