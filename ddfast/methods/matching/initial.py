"""The images that a synthesis begins with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

INITIAL = ("real", "noise", "mix")


def mosaics(images: Tensor, tiles: int, mode: str = "nearest") -> Tensor:
    """Images that each show `tiles` x `tiles` images, shrunk: the start of IDC (nearest neighbour) and IDM (bilinear).

    Args:
        images: [N * tiles ** 2, 3, H, W]. Tile k, in rows from the top, of mosaic i is image k * N + i.
        mode: "nearest" or "bilinear", without antialiasing, as their codes have it.
        tiles: per side. Where it does not divide the side, the first tiles are a pixel larger.

    Returns:
        [N, 3, H, W] in the dtype of `images`.
    """
    count = len(images) // tiles**2
    heights, widths = (_parts(side, tiles) for side in images.shape[-2:])
    parts = iter((images if mode == "nearest" else images.float()).split(count))
    rows = [
        torch.cat(
            [functional.interpolate(next(parts), size=(height, width), mode=mode) for width in widths], dim=-1
        )
        for height in heights
    ]
    mixed = torch.cat(rows, dim=-2)
    return (mixed if images.is_floating_point() else mixed.round()).to(images.dtype)


def _parts(side: int, parts: int) -> list[int]:
    return [side // parts + (part < side % parts) for part in range(parts)]
