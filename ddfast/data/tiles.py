"""Tiles of a distilled image: cut out, and enlarged to whole images."""

from __future__ import annotations

from torch import Tensor


def tiles_of(images: Tensor, factor: int) -> Tensor:
    """Images [N, 3, S, S] -> their tiles [N * factor^2, 3, S/factor, S/factor] in row-major order."""
    count, _, size, _ = images.shape
    side = size // factor
    split = images.view(count, 3, factor, side, factor, side).permute(0, 2, 4, 1, 3, 5)
    return split.reshape(count * factor**2, 3, side, side)
