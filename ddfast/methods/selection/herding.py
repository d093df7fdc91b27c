"""Herding: images whose mean feature follows that of their class (Welling, ICML 2009; arXiv 1206.5241).

Greedy matching of the mean, as coreset selection has it: with mu the mean of all features of the class and S_t the sum
of the t chosen ones, the next image is the unused one with the smallest || (t + 1) mu - (S_t + phi_i) ||. The choice
for a small IPC is the beginning of that for a large one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddfast.methods.selection.coreset import Coreset, squared_distances, unit_length_option


@dataclass(frozen=True)
class HerdingOptions:
    """Options of herding."""

    unit_length: bool = unit_length_option()


class Herding(Coreset):
    """Greedy matching of each class's mean feature."""

    name = "herding"
    summary = "whole images whose mean feature follows the class's (Welling, 2009)"
    Options = HerdingOptions

    def pick(self, features: Tensor, needed: int, key: int) -> tuple[Tensor, Tensor]:
        """The score of a pick is minus the distance of the mean of all picks up to it from the class's mean."""
        mean = features.mean(dim=0)
        chosen = torch.zeros_like(mean)  # S_t
        used = torch.zeros(len(features), dtype=torch.bool)
        picks = torch.empty(needed, dtype=torch.int64)
        scores = torch.empty(needed, dtype=torch.float64)
        for t in range(needed):
            errors = squared_distances(features, (t + 1) * mean - chosen)
            best = errors.masked_fill_(used, torch.inf).argmin()
            picks[t], scores[t] = best, -errors[best].sqrt() / (t + 1)
            used[best] = True
            chosen += features[best]
        return picks, scores
