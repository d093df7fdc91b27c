"""RDED: random crops, kept where the teacher is most certain (Sun et al., CVPR 2024; arXiv 2312.03526).

The comparison follows the authors' code: crops of random area, the lowest cross-entropy within an image and
then within a class, and kept patch number q * IPC + j in quadrant q of image j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddfast.methods.base import Context
from ddfast.methods.selection.base import Batch, Candidates, Selection, Table
from ddfast.methods.selection.judging import judge
from ddfast.ops.transfer import to_device
from ddfast.philox import philox4x32
from ddfast.seeding import stream
from ddfast.settings import option


@dataclass(frozen=True)
class RDEDOptions:
    """Options of RDED. The defaults are the published settings."""

    crops: int = option(5, "random crops an image")
    min_area: float = option(0.08, "smallest crop, as a share of the image's area")
    scoring_input: str = option(
        "pad", "how a tile smaller than the image meets the teacher", choices=("pad", "resize")
    )
    rank_by: str = option(
        "loss",
        "keep the crops of the lowest loss, or of the highest gradient norm",
        choices=("loss", "grad_norm"),
    )

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise ValueError(f"crops must be at least 1, got {self.crops}")
        if not 0 < self.min_area <= 1:
            raise ValueError(f"min_area must be in (0, 1], got {self.min_area}")


class RDED(Selection):
    """Realistic, diverse and efficient dataset distillation."""

    name = "rded"
    summary = "random crops with the lowest teacher loss (Sun et al., 2024)"
    Options = RDEDOptions
    options: Any
    layout = "stride"

    def score(self, batch: Batch, context: Context) -> Candidates:
        """Draw m square crops of random area and position an image; score each by the teacher's loss, or by its
        gradient norm."""
        boxes = random_square_boxes(
            batch.ids,
            stream(context.seed, "rded"),
            self.options.crops,
            self.options.min_area,
            context.image_size,
        )
        verdict = judge(
            batch.images,
            to_device(boxes, batch.images.device),
            batch.labels,
            context,
            scoring_input=self.options.scoring_input,
            norm="auto" if self.options.rank_by == "grad_norm" else None,
        )
        return Candidates(
            boxes=boxes,
            grad_norm=verdict.grad_norm,
            loss=verdict.loss,
            correct=verdict.correct,
            damaged=verdict.damaged,
        )

    def rank(self, table: Table, needed: int) -> tuple[dict[int, np.ndarray], np.ndarray]:
        """Lowest loss within each image, then lowest loss within each class; or highest norm in both."""
        key = table.loss if self.options.rank_by == "loss" else -table.grad_norm
        best = table.best_within_source(key)
        return table.ranked_within_class(key, best), -key


def random_square_boxes(ids: Tensor, seed: int, crops: int, min_area: float, size: int) -> Tensor:
    """Square boxes of random area and place, the law of RandomResizedCrop with ratio 1.

    Args:
        ids: int64 [M] sample ids.
        seed: 64-bit key; counter (id low, id high, crop, 0).
        crops: boxes an image, K.
        min_area: areas are uniform in [min_area, 1] of the image's.
        size: side of the image in pixels.

    Returns:
        int32 [M, K, 4], (x0, y0, x1, y1).
    """
    ids = ids.cpu()
    count = ids.numel()
    counters = torch.zeros(count, crops, 4, dtype=torch.int64)
    counters[..., 0] = (ids & 0xFFFFFFFF)[:, None]
    counters[..., 1] = ((ids >> 32) & 0xFFFFFFFF)[:, None]
    counters[..., 2] = torch.arange(crops)
    words = philox4x32(counters.view(-1, 4), seed).view(count, crops, 4)
    # Areas in 2^-32 steps; the side is the rounded square root, as torchvision takes it.
    area = (min_area + (1 - min_area) * (words[..., 0].double() + 0.5) / 2**32) * size * size
    side = area.sqrt().round().to(torch.int64).clamp(1, size)
    free = size - side + 1  # places along one axis
    x0 = (words[..., 1] * free) >> 32
    y0 = (words[..., 2] * free) >> 32
    return torch.stack((x0, y0, x0 + side, y0 + side), dim=-1).to(torch.int32)
