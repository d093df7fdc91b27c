"""The grid of players over an image: rows x cols parts, as even as possible where the grid does not divide
it."""

from __future__ import annotations

import torch


def part_start(index: int, length: int, parts: int) -> int:
    """First pixel of part `index` of `parts` along an axis of `length` pixels; `index == parts` gives
    `length`."""
    return index * length // parts


def part_of_pixel(length: int, parts: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[length] int64: the part that each pixel along an axis lies in, the inverse of `part_start`."""
    pixel = torch.arange(length, device=device)
    return ((pixel + 1) * parts - 1) // length


def player_map(
    rows: int, cols: int, height: int, width: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """[height, width] int64: the player of each pixel, counted along the rows of the grid."""
    row = part_of_pixel(height, rows, device)
    col = part_of_pixel(width, cols, device)
    return row[:, None] * cols + col
