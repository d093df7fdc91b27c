"""Random real images: the row that keeps every comparison honest, since it gets the same soft labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ddfast.methods.base import Context
from ddfast.methods.selection.base import Batch, Candidates, Selection, Table, whole_images
from ddfast.seeding import drawn


@dataclass(frozen=True)
class RandomOptions:
    """Random selection has no options; `--seed` draws another subset."""


class Random(Selection):
    """Uniform draw without replacement of whole images from each class; a tile holds a whole image,
    resized."""

    name = "random"
    summary = "whole images drawn uniformly from each class"
    Options = RandomOptions
    options: Any
    needs_teacher = False

    def score(self, batch: Batch, context: Context) -> Candidates:
        """One candidate an image: all of it, with a uniform draw for a score."""
        return Candidates(
            boxes=whole_images(batch), score=drawn(batch.ids.cpu(), context.seed, "random").float()
        )

    def rank(self, table: Table, needed: int) -> tuple[dict[int, np.ndarray], np.ndarray]:
        """Highest draw first."""
        return table.ranked_within_class(-table.score, np.arange(len(table.label))), table.score


class RandomHard(Random):
    """The same images of a seed with hard labels: what `ddfast compare` sets beside a set that has no teacher."""

    name = "random_hard"
    summary = "whole images drawn uniformly from each class, with hard labels"
    listed = False
    stages = ("score", "select", "compose")
