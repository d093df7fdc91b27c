"""Coalitions from which a prior over games expects to learn the most about the Shapley values.

The posterior covariance of phi under a `GamePrior` does not depend on the values, so the coalitions that make its
trace smallest can be chosen before any image is seen: greedily, one after the other, then by exchanging single ones
while that helps (Fedorov exchange, 1972).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ddfast.attribution.coalitions import all_coalitions, shapley_kernel_subsets
from ddfast.attribution.game_prior import GamePrior, Grid

_ENUMERATED_PLAYERS = 10  # up to so many players every coalition is a candidate
_CANDIDATES = 1024  # random candidates beyond, and as many complements
_SWEEPS = 20
_EXCHANGED = 128  # up to this budget coalitions are exchanged; beyond, the greedy choice gains little from it
# Candidates that the grid's symmetries make equal are told apart by up to this share of their gain, far above the
# rounding of any machine, so that the same one wins everywhere.
_TIE = 1e-6
# A candidate whose value is known up to this share of the largest variance has nothing left to tell.
_KNOWN = 1e-9


@functools.lru_cache(maxsize=64)
def design(d: int, n_samples: int, grid: Grid | None) -> tuple[Tensor, Tensor]:
    """The coalitions of a budget and their projection.

    Returns:
        coalitions bool [K, d], the empty and the full one first, and projection float64 [K, d], with K the smaller of
        n_samples and 2^d.
    """
    prior = GamePrior(d, grid)
    coalitions = search(prior, candidates(d), n_samples)
    return coalitions, prior.projection(coalitions)


def candidates(d: int, count: int = _CANDIDATES, seed: int = 0) -> Tensor:
    """Coalitions to choose from: all of few players, else single players, draws from the Shapley kernel, complements.

    Returns:
        bool [M, d] without repeats, the empty and the full one first.
    """
    if d <= _ENUMERATED_PLAYERS:
        found = all_coalitions(d, 0, 1 << d)
    else:
        drawn = shapley_kernel_subsets(torch.tensor([seed]), count, d)[0]
        found = torch.cat([torch.zeros(1, d, dtype=torch.bool), torch.eye(d, dtype=torch.bool), drawn])
        found = torch.unique(torch.cat([found, ~found]), dim=0)
    size = found.sum(dim=-1)
    between = (size > 0) & (size < d)
    return torch.cat([found[size == 0], found[size == d], found[between]])


def search(prior: GamePrior, pool: Tensor, n_samples: int, sweeps: int = _SWEEPS) -> Tensor:
    """A good choice of n_samples coalitions of a pool, the first two of the pool among them.

    Args:
        prior: what is believed of the games.
        pool: bool [M, d], the empty and the full coalition first.
        n_samples: how many to choose; the whole pool where it holds no more.
        sweeps: passes of exchanges at most.

    Returns:
        bool [K, d], the first two of the pool first.
    """
    if n_samples >= len(pool):
        return pool
    problem = _Problem(prior, pool)
    chosen = problem.greedy(n_samples - 1)
    if n_samples <= _EXCHANGED:
        chosen = problem.exchanged(chosen, sweeps)
    return torch.cat([pool[:1], pool[chosen]])


class _Problem:
    """Choose rows of a pool; all values are increments over the empty coalition, whose value is known."""

    def __init__(self, prior: GamePrior, pool: Tensor) -> None:
        self.prior, self.pool = prior, pool
        self.with_empty = prior.covariance(pool, pool[:1])[:, 0]
        self.variance = prior.variance(pool) - 2.0 * self.with_empty + self.with_empty[0]
        target = prior.shapley_covariance(pool)
        self.target = target - target[:1]
        self.known = _KNOWN * self.variance.max()
        word = torch.arange(len(pool)) * 0x9E3779B1 % 2**32  # a scrambled number a candidate
        self.tie = 1.0 + _TIE * word.double() / 2**32

    def column(self, j: int) -> Tensor:
        """Covariance of every candidate with candidate j, float64 [M]."""
        covariance = self.prior.covariance(self.pool, self.pool[j : j + 1])[:, 0]
        return covariance - self.with_empty - self.with_empty[j] + self.with_empty[0]

    def gain(self, target: Tensor, variance: Tensor, taken: list[int]) -> Tensor:
        """How much each candidate would take off the trace of the covariance of phi, float64 [M]."""
        gain = (target**2).sum(dim=-1) / variance.clamp(min=self.known) * self.tie
        gain[variance <= self.known] = -1.0
        gain[taken] = -2.0
        gain[0] = -2.0
        return gain

    def greedy(self, count: int) -> list[int]:
        """The full coalition, then whichever gains most given those before: a pivoted Cholesky factorisation."""
        target, variance = self.target.clone(), self.variance.clone()
        factor = torch.empty(count, len(self.pool), dtype=torch.float64)
        chosen: list[int] = []
        for step in range(count):
            j = 1 if step == 0 else int(self.gain(target, variance, chosen).argmax())
            column = self.column(j) - factor[:step].mT @ factor[:step, j]
            factor[step] = column / variance[j].sqrt()
            target = target - factor[step][:, None] * (target[j] / variance[j].sqrt())
            variance = variance - factor[step] ** 2
            chosen.append(j)
        return chosen

    def exchanged(self, chosen: list[int], sweeps: int) -> list[int]:
        """Each but the full coalition in turn against the best candidate given all others, until none moves."""
        chosen = list(chosen)
        columns = torch.stack([self.column(j) for j in chosen], dim=1)  # [M, n]
        for _ in range(sweeps):
            moved = False
            weight, left, variance = self._posterior(chosen, columns)
            for i in range(1, len(chosen)):
                # Without i: its rank-one share goes back (the inverse of a matrix less a row and a column).
                freed = columns @ weight[:, i]
                share = (weight[i] @ self.target[chosen]) / weight[i, i]
                target = left + freed[:, None] * share
                spread = variance + freed**2 / weight[i, i]
                gain = self.gain(target, spread, [j for j in chosen if j != chosen[i]])
                best = int(gain.argmax())
                if best != chosen[i] and gain[best] > gain[chosen[i]] * (1.0 + 10.0 * _TIE):
                    chosen[i] = best
                    columns[:, i] = self.column(best)
                    weight, left, variance = self._posterior(chosen, columns)
                    moved = True
            if not moved:
                break
        return chosen

    def _posterior(self, chosen: list[int], columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inverse covariance of the chosen [n, n]; covariance with phi [M, d] and variance [M] given them."""
        weight = torch.linalg.inv(columns[chosen])
        left = self.target - columns @ (weight @ self.target[chosen])
        return weight, left, self.variance - ((columns @ weight) * columns).sum(dim=-1)
