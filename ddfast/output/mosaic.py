"""Pictures of a distilled set: mosaics of one row a class, its name, then its images.

Everything is drawn by Pillow, and equal arguments give equal pixels with one Pillow version.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ddfast.files import atomic_write_bytes

PIXELATED_UP_TO = 64
"""Images up to this side, in pixels, are enlarged with hard pixel edges, larger ones smoothly."""

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


def png_bytes(picture: Image.Image, facts: PngInfo | None = None) -> bytes:
    """The picture as PNG, with `facts` in its metadata."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=6, pnginfo=facts)
    return buffer.getvalue()


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
    return _mosaic([("", images, labels)], class_names, side, max_classes, max_images)[0]


def paired_mosaic_picture(
    sets: Sequence[tuple[str, Any, Sequence[int]]],
    class_names: Sequence[str],
    *,
    side: int = 96,
    max_classes: int = _CLASS_ROWS,
    max_images: int = _CLASS_IMAGES,
) -> Image.Image:
    """Mosaics side by side under their titles: `sets` are (title, images, labels); see `mosaic_picture`."""
    return _mosaic(sets, class_names, side, max_classes, max_images)[0]


def _mosaic(
    sets: Sequence[tuple[str, Any, Sequence[int]]],
    class_names: Sequence[str],
    side: int,
    max_classes: int,
    max_images: int,
) -> tuple[Image.Image, dict[str, Any]]:
    """The picture, and where the images of each class stand in it."""
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
    places: list[list[int]] = []
    for (title, images, labels), rows, taken in zip(sets, layout, widths, strict=True):
        if title:
            draw.text((x, margin), _fitted(title, heading_font, taken), font=heading_font, fill=_INK)
        for indices in rows:
            label = int(labels[indices[0]])
            if label not in names:
                continue
            y = top + shown.index(label) * (cell + gap)
            places.append([label, len(indices), x, y])
            for column, index in enumerate(indices):
                canvas.paste(resized(to_picture(images[index]), cell), (x + column * (cell + gap), y))
        x += taken + margin
    size = min(to_picture(sets[0][1][0]).width, cell)
    return canvas, {"cell": cell, "step": cell + gap, "size": size, "rows": places}


def _fitted(text: str, font: Any, width: float) -> str:
    """The text on one line, cut with an ellipsis where it is wider than `width` pixels."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


# Files ------------------------------------------------------------------------------------------------------

_LAYOUT = "ddfast.layout"  # a mosaic's own account of where its images stand, as JSON in its metadata
SHOWN_CLASSES = 40  # that a page shows; a mosaic has the first of them


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of 0..count-1, evenly spaced, the first and the last among them."""
    if count <= limit:
        return list(range(count))
    if limit == 1:
        return [0]
    return [round(step * (count - 1) / (limit - 1)) for step in range(limit)]


def mosaic_labels(classes: int) -> list[int]:
    """Labels of the classes that the mosaic of a set shows, ascending: at most 20 of them."""
    return spread(classes, SHOWN_CLASSES)[:_CLASS_ROWS]


def write_mosaic(path: str | Path, images: Any, labels: Sequence[int], class_names: Sequence[str]) -> None:
    """Write the mosaic of a set atomically as PNG, from which `read_mosaic` cuts its images again.

    Args:
        path: of the picture.
        images: N images uint8 [3, S, S], of all classes or at least of those that `mosaic_labels` names.
        labels: [N] class indices.
        class_names: in label order.

    Raises:
        ValueError: no image of a class that is shown.
        UsageError: no space, no permission.
    """
    wanted = set(mosaic_labels(len(class_names)))
    kept = [place for place, label in enumerate(labels) if int(label) in wanted]
    shown = [images[place] for place in kept], [int(labels[place]) for place in kept]
    picture, layout = _mosaic([("", *shown)], class_names, 96, _CLASS_ROWS, _CLASS_IMAGES)
    facts = PngInfo()
    facts.add_text(_LAYOUT, json.dumps(layout))
    atomic_write_bytes(path, png_bytes(picture, facts))


def read_mosaic(path: str | Path) -> dict[int, list[np.ndarray]]:
    """The images uint8 [3, s, s] of each class in a picture of `write_mosaic`; {} for no such picture.

    s is the images' own side up to 64 px, else that of a cell.
    """
    found: dict[int, list[np.ndarray]] = {}
    try:
        with Image.open(path) as picture:
            layout = json.loads(picture.info.get(_LAYOUT, "{}"))  # type: ignore[arg-type]
            canvas = picture.convert("RGB")
        for label, count, left, top in layout.get("rows", []):
            cell, size = layout["cell"], layout["size"]
            for index in range(count):
                x = left + index * layout["step"]
                image = canvas.crop((x, top, x + cell, top + cell))
                pixels = np.asarray(image.resize((size, size), Image.Resampling.NEAREST))
                found.setdefault(int(label), []).append(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError):
        return {}  # gone, damaged, or drawn by something else
    return found
