"""The diverging colour map of attributions: blue against the class, nothing at zero, orange for the class.

Both arms were laid out in OKLCH (Ottosson, 2020) with lightness falling linearly from 0.97 at zero, so that equal steps
of attribution look like equal steps of colour; the table holds the sRGB of nine of them and is interpolated between.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# sRGB of the values -1, -0.75, ..., 1.
DIVERGING = (
    (14, 78, 160),
    (58, 118, 197),
    (110, 158, 224),
    (170, 199, 240),
    (245, 245, 245),
    (252, 203, 164),
    (246, 155, 95),
    (226, 101, 38),
    (178, 54, 8),
)
_STRONGEST = 0.8  # opacity of the largest attribution


def diverging(values: ArrayLike) -> NDArray[np.uint8]:
    """sRGB [..., 3] uint8 of values in [-1, 1]; values beyond are clipped."""
    place = (np.clip(np.asarray(values, np.float64), -1, 1) + 1) / 2 * (len(DIVERGING) - 1)
    table = np.asarray(DIVERGING, np.float64)
    low = np.minimum(place.astype(int), len(DIVERGING) - 2)
    share = (place - low)[..., None]
    return (table[low] * (1 - share) + table[low + 1] * share + 0.5).astype(np.uint8)


def opacity(values: ArrayLike) -> NDArray[np.float64]:
    """Opacity of an overlay: 0 at zero attribution, where the picture shows, to 0.8 at -1 and 1."""
    return np.sqrt(np.abs(np.clip(np.asarray(values, np.float64), -1, 1))) * _STRONGEST


def scaled(phi: ArrayLike) -> NDArray[np.float64]:
    """Attributions over the largest magnitude among them, in [-1, 1]; all zero (or not finite) gives zeros."""
    values = np.nan_to_num(np.asarray(phi, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(np.abs(values).max(initial=0.0))
    return values / largest if largest > 0 else np.zeros_like(values)


def hexadecimal(rgb: ArrayLike) -> str:
    """`#rrggbb` of one colour."""
    r, g, b = (int(channel) for channel in np.asarray(rgb))
    return f"#{r:02x}{g:02x}{b:02x}"
