"""Random crop boxes that the tests of crop_resize and of its kernels share."""

from __future__ import annotations

import torch
from torch import Tensor


def random_boxes(
    count: int, height: int, width: int, *, whole_pixels: bool, least: float = 1, seed: int = 0
) -> Tensor:
    """float32 [count, 4] boxes (x0, y0, x1, y1) inside height x width pixels, with sides of `least` or more.

    The first box is the whole image. Fractional boxes touch the image's edges now and then.
    """
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height], dtype=torch.float32)
    extent = least + torch.rand(count, 2, generator=generator) * (size - least)
    start = torch.rand(count, 2, generator=generator) * (size - extent)
    stop = torch.minimum(start + extent, size)
    if whole_pixels:
        start, stop = start.floor(), stop.ceil()
    boxes = torch.cat([start, stop], 1)
    boxes[:1] = torch.tensor([0, 0, width, height], dtype=torch.float32)
    return boxes
