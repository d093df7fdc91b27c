"""Coalitions from which a prior over games expects to learn the most about the Shapley values.

The posterior covariance of phi under a `GamePrior` does not depend on the values, so the coalitions that make its
trace smallest can be chosen before any image is seen: greedily, one after the other, then by exchanging single ones
while that helps (Fedorov, 1972), first for random candidates and then for neighbours of those chosen, one cell more or
less (coordinate exchange: Meyer & Nachtsheim, 1995). The best of a few starts is taken. On real teachers the expected
error and the real one rank designs nearly alike (correlation 0.94 at 32 evaluations of a 4 x 4 grid).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ddfast.attribution.estimators.coalitions import all_coalitions, shapley_kernel_subsets
from ddfast.attribution.estimators.game_prior import GamePrior, Grid
from ddfast.attribution.estimators.kept_designs import kept_design

_ENUMERATED_PLAYERS = 10  # up to so many players every coalition is a candidate
_CANDIDATES = 1024  # random candidates beyond, and as many complements
# Up to a budget: how many starts, each from so many random candidates. Few candidates and many starts find better
# designs than the reverse; beyond the last budget the greedy choice alone is left, from all candidates.
_STARTS = ((64, 3, 100), (128, 1, 200))
_SWEEPS = 20
# Candidates that the grid's symmetries make equal are told apart by up to this share of their gain, far above the
# rounding of any machine, so that the same one wins everywhere.
_TIE = 1e-6
# A candidate whose value is known up to this share of the largest variance has nothing left to tell.
_KNOWN = 1e-9


@functools.lru_cache(maxsize=64)
def design(d: int, n_samples: int, grid: Grid | None) -> tuple[Tensor, Tensor]:
    """The coalitions of a budget and their projection: those kept (`designs`), else searched once, for seconds.

    Returns:
        coalitions bool [K, d], the empty and the full one first, and projection float64 [K, d], with K the smaller of
        n_samples and 2^d (above 20 players: and the number of candidates).
    """
    prior = GamePrior(d, grid)
    kept = kept_design(grid, n_samples)
    coalitions = best_design(prior, n_samples) if kept is None else kept
    return coalitions, prior.projection(coalitions)


def best_design(prior: GamePrior, n_samples: int) -> Tensor:
    """The search at its full length, bool [K, d] (see `design`)."""
    count, candidates_each = next(
        ((starts, each) for most, starts, each in _STARTS if n_samples <= most), (0, 0)
    )
    if prior.d <= _ENUMERATED_PLAYERS:
        return search(prior, candidates(prior.d), n_samples)
    if not count:
        return search(prior, candidates(prior.d, max(_CANDIDATES, n_samples)), n_samples, sweeps=0)
    found = []
    for seed in range(count):
        chosen = search(prior, candidates(prior.d, max(candidates_each, n_samples), seed), n_samples)
        found.append(refined(prior, chosen))
    error = [expected_error(prior, each) for each in found]
    # Starts that end in the same design, turned or mirrored, are told apart by their order alone.
    return found[next(i for i, each in enumerate(error) if each <= min(error) * (1.0 + 10.0 * _TIE))]


def expected_error(prior: GamePrior, coalitions: Tensor) -> float:
    """Trace of the covariance of phi given the values of coalitions, as a share of that before."""
    precision, target = prior.given(coalitions)
    before = prior.covariance_of_shapley().trace()
    return float(1.0 - ((precision @ target) * target).sum() / before)


def refined(prior: GamePrior, coalitions: Tensor, sweeps: int = _SWEEPS, fixed: int = 2) -> Tensor:
    """Exchange coalitions, all but the first `fixed`, for each other's neighbours and complements while it helps."""
    error = expected_error(prior, coalitions)
    for _ in range(sweeps):
        flipped = coalitions[:, None] ^ torch.eye(prior.d, dtype=torch.bool)
        pool = _joined(coalitions, torch.cat([flipped.flatten(0, 1), ~coalitions]))
        chosen = _Problem(prior, pool).exchanged(list(range(1, len(coalitions))), sweeps, fixed - 1)
        moved = pool[[0, *chosen]]
        after = expected_error(prior, moved)
        if after > error * (1.0 - 10.0 * _TIE):
            break
        coalitions, error = moved, after
    return coalitions


def _joined(first: Tensor, others: Tensor) -> Tensor:
    """The coalitions `first`, distinct, then those of `others` that are not among them, each once."""
    pool = torch.unique(torch.cat([others, first]), dim=0)
    known = {tuple(row) for row in first.tolist()}
    return torch.cat([first, pool[[tuple(row) not in known for row in pool.tolist()]]])


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
    chosen = problem.exchanged(problem.greedy(n_samples - 1), sweeps)
    return torch.cat([pool[:1], pool[chosen]])


def extended(prior: GamePrior, coalitions: Tensor, n_samples: int) -> Tensor:
    """A design [K, d] and the candidates that add most to it, one after the other, bool [n_samples, d]."""
    pool = _joined(coalitions, candidates(prior.d))
    chosen = _Problem(prior, pool).greedy(min(n_samples, len(pool)) - 1, list(range(1, len(coalitions))))
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

    def greedy(self, count: int, start: Sequence[int] = (1,)) -> list[int]:
        """`start` (the full coalition), then whichever gains most given those before: a pivoted Cholesky factor."""
        target, variance = self.target.clone(), self.variance.clone()
        factor = torch.empty(count, len(self.pool), dtype=torch.float64)
        chosen: list[int] = []
        for step in range(count):
            j = start[step] if step < len(start) else int(self.gain(target, variance, chosen).argmax())
            column = self.column(j) - factor[:step].mT @ factor[:step, j]
            factor[step] = column / variance[j].sqrt()
            target = target - factor[step][:, None] * (target[j] / variance[j].sqrt())
            variance = variance - factor[step] ** 2
            chosen.append(j)
        return chosen

    def exchanged(self, chosen: Sequence[int], sweeps: int, fixed: int = 1) -> list[int]:
        """Each but the first `fixed` in turn against the best candidate given all others, until none moves."""
        chosen = list(chosen)
        columns = torch.stack([self.column(j) for j in chosen], dim=1)  # [M, n]
        for _ in range(sweeps):
            moved = False
            weight, left, variance = self._posterior(chosen, columns)
            for i in range(fixed, len(chosen)):
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
