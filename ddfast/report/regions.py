"""Pictures of the regions of an image: an outline each, of a colour for each size."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw

from ddfast.output.mosaic import resized, to_picture

COLOURS = ((255, 221, 51), (255, 128, 64), (90, 190, 255), (190, 120, 255), (110, 220, 130))
"""Of the smallest regions, the next larger ones, and so on; more sizes begin anew."""

_SHADE = (18, 22, 30)
_OVERSAMPLING = 3


def regions_picture(image: Any, boxes: Any, *, side: int = 128) -> Image.Image:
    """An image with the outlines of some regions; larger ones lie further inside, so that none hides another.

    Args:
        image: uint8 [3, H, W].
        boxes: [P, 4], x0, y0, x1, y1 in pixels of the image.
        side: of the picture in pixels.
    """
    picture = resized(to_picture(image), side)
    scale = side * _OVERSAMPLING / image.shape[-1]
    layer = Image.new("RGBA", (side * _OVERSAMPLING, side * _OVERSAMPLING), (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    found = sorted({tuple(float(edge) for edge in box) for box in boxes}, key=lambda box: box[2] - box[0])
    sizes = sorted({x1 - x0 for x0, _, x1, _ in found})
    line = max(2, side * _OVERSAMPLING // 48)
    for x0, y0, x1, y1 in reversed(found):
        place = sizes.index(x1 - x0)
        inset = place * (line + 2)
        corners = [x0 * scale + inset, y0 * scale + inset, x1 * scale - 1 - inset, y1 * scale - 1 - inset]
        draw.rectangle(corners, outline=(*_SHADE, 150), width=line + 2)
        draw.rectangle(corners, outline=(*COLOURS[place % len(COLOURS)], 255), width=line)
    flat = layer.resize(picture.size, Image.Resampling.BOX)
    return Image.alpha_composite(picture.convert("RGBA"), flat).convert("RGB")
