"""K-center, greedy: no image of a class is far from a chosen one (Sener & Savarese, ICLR 2018; arXiv 1708.00489).

Algorithm 1 of the paper in each class: the next centre is the image farthest from the centres so far, which keeps the
covering radius within twice the smallest possible. The paper starts from the labelled pool; without one, the first
centre here is the image nearest the class's mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddfast.methods.selection.coreset import Coreset, squared_distances, unit_length_option


@dataclass(frozen=True)
class KCenterOptions:
    """Options of k-center."""

    unit_length: bool = unit_length_option()


class KCenter(Coreset):
    """The farthest image from those already chosen, again and again."""

    name = "k_center"
    summary = "whole images that cover their class in feature space (Sener & Savarese, 2018)"
    Options = KCenterOptions

    def pick(self, features: Tensor, needed: int, key: int) -> tuple[Tensor, Tensor]:
        """The score of a pick is minus the covering radius that is left with it."""
        nearest = torch.full((len(features),), torch.inf, dtype=torch.float64)  # to a centre, squared
        used = torch.zeros(len(features), dtype=torch.bool)
        picks = torch.empty(needed, dtype=torch.int64)
        scores = torch.empty(needed, dtype=torch.float64)
        for t in range(needed):
            if t == 0:
                best = squared_distances(features, features.mean(dim=0)).argmin()
            else:
                best = nearest.masked_fill(used, -1).argmax()
            used[best] = True
            torch.minimum(nearest, squared_distances(features, features[best]), out=nearest)
            picks[t], scores[t] = best, -nearest.max().sqrt()
        return picks, scores
