"""The images that a synthesis begins with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

INITIAL = ("real", "noise", "mix")


def mosaics(images: Tensor, tiles: int) -> Tensor:
    """Images that each show `tiles` x `tiles` images, shrunk by nearest neighbour: IDC's start.

    Args:
        images: [N * tiles ** 2, 3, H, W]. Tile k, in rows from the top, of mosaic i is image k * N + i.
        tiles: per side. Where it does not divide the side, the first tiles are a pixel larger.

    Returns:
        [N, 3, H, W] in the dtype of `images`.
    """
    count = len(images) // tiles**2
    heights, widths = (_parts(side, tiles) for side in images.shape[-2:])
    parts = iter(images.split(count))
    rows = [
        torch.cat([functional.interpolate(next(parts), size=(height, width)) for width in widths], dim=-1)
        for height in heights
    ]
    return torch.cat(rows, dim=-2)


def _parts(side: int, parts: int) -> list[int]:
    return [side // parts + (part < side % parts) for part in range(parts)]
