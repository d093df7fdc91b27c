"""Tiles of a distilled image: cut out, and enlarged to whole images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def tiles_of(images: Tensor, factor: int) -> Tensor:
    """Images [N, 3, S, S] -> their tiles [N * factor^2, 3, S/factor, S/factor] in row-major order."""
    count, _, size, _ = images.shape
    side = size // factor
    split = images.view(count, 3, factor, side, factor, side).permute(0, 2, 4, 1, 3, 5)
    return split.reshape(count * factor**2, 3, side, side)


def enlarged_tiles(images: Tensor, factor: int, grey: Tensor | float) -> Tensor:
    """Every tile enlarged to a whole image, bilinear; differentiable (IDC, Sec. 4.1).

    Args:
        images: float [N, 3, S, S].
        factor: tiles per side. Where it does not divide S, the images are padded on the right and at the bottom.
        grey: what they are padded with, a number or [3]: 0.5 in the images' space.

    Returns:
        [N * factor^2, 3, S, S], the tiles of an image in a row.
    """
    size = images.shape[-1]
    if missing := -size % factor:
        value = grey if isinstance(grey, float) else grey.to(images).view(3, 1, 1)
        images = F.pad(images - value, (0, missing, 0, missing)) + value
    tiles = tiles_of(images, factor)
    # On a GPU the gradient of torch's interpolation adds in any order; that of products does not.
    if tiles.is_cuda:
        return _by_products(tiles, size)
    return F.interpolate(tiles, size=size, mode="bilinear", align_corners=False)


def _by_products(tiles: Tensor, size: int) -> Tensor:
    """Bilinear enlargement of square tiles [N, 3, s, s] to `size` px."""
    unit = torch.eye(tiles.shape[-1], dtype=tiles.dtype, device=tiles.device)[None]
    shares = F.interpolate(unit, size=size, mode="linear", align_corners=False)[0]
    return shares.T @ tiles @ shares
