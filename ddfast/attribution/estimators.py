"""Shapley estimators as linear maps: the coalitions to evaluate and the projection of their values to phi.

Every estimator here is linear in the values of the game, phi_i = sum_k projection[k, i] * v(coalitions[k]).
So an estimator is a `Plan`, made once for a seed and shared by every image of that seed. The Shapley value
itself (InfoUtil Eq. 4, whose printed binomial has to be inverted for the axioms to hold) is

    phi_i = sum over s without i of  (v(s + e_i) - v(s)) / (d * binom(d - 1, |s|)).

Row 0 of every plan is the empty coalition. A budget `n_samples` counts model evaluations an image, the empty
and the full coalition included; a plan never asks for more, and may ask for fewer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ddfast.attribution.coalitions import all_coalitions, permutations, shapley_kernel_subsets

MAX_EXACT_PLAYERS = 20
_ANCHOR_WEIGHT = 1e6


class Plan(Protocol):
    """Coalitions to evaluate and their projection, of one stream for all images or of a stream an image."""

    @property
    def size(self) -> int:
        """K, the number of coalitions; number 0 is the empty one."""
        ...

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Coalitions bool [(S,) stop - start, d] and their projection float64 alike, both on the CPU."""
        ...


@dataclass(frozen=True)
class SampledPlan:
    """A plan held in memory: coalitions bool [(S,) K, d] and projection float64 [(S,) K, d]."""

    coalitions: Tensor
    projection: Tensor

    @property
    def size(self) -> int:
        """K, the number of coalitions."""
        return self.coalitions.shape[-2]

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows `start` to `stop - 1` of both."""
        return self.coalitions[..., start:stop, :], self.projection[..., start:stop, :]

    def of_one_stream(self) -> SampledPlan:
        """The plan of a single stream, [K, d], in which a coalition that was drawn twice is evaluated once.

        Its projections add up. The rows come out in lexicographic order, so the empty coalition stays first.
        """
        coalitions, place = torch.unique(self.coalitions[0], dim=0, return_inverse=True)
        projection = torch.zeros(coalitions.shape, dtype=torch.float64)
        return SampledPlan(coalitions, projection.index_add_(0, place, self.projection[0]))


@dataclass(frozen=True)
class ExactPlan:
    """All 2^d coalitions with the weights of InfoUtil Eq. 4. Rows are computed on demand: none are held."""

    d: int

    @property
    def size(self) -> int:
        """2^d."""
        return 1 << self.d

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows `start` to `stop - 1`: v(s) enters phi_i with w(|s| - 1) if i is in s, else with -w(|s|)."""
        d = self.d
        coalitions = all_coalitions(d, start, stop)
        # w(k) = 1 / (d binom(d-1, k)); w(-1) and w(d) only meet a player that is not there, so 0 stands for
        # both.
        marginal = [0.0, *(1.0 / (d * math.comb(d - 1, k)) for k in range(d)), 0.0]
        weight = torch.tensor(marginal, dtype=torch.float64)
        size = coalitions.sum(dim=-1, keepdim=True)
        return coalitions, torch.where(coalitions, weight[size], -weight[size + 1])


Estimator = Callable[[int, int, Tensor], Plan]
"""(d, n_samples, seeds int64 [S]) -> Plan with rows [S, K, d]."""

ESTIMATORS: dict[str, Estimator] = {}


def register(name: str) -> Callable[[Estimator], Estimator]:
    """Enter an estimator under `name`."""

    def enter(estimator: Estimator) -> Estimator:
        ESTIMATORS[name] = estimator
        return estimator

    return enter


def list_estimators() -> list[str]:
    """Names that `shapley(estimator=...)` takes, sorted."""
    return sorted(ESTIMATORS)


def make_plan(estimator: str, d: int, n_samples: int, seed: int | Tensor) -> Plan:
    """The plan of an estimator for d players.

    Args:
        estimator: a name of `list_estimators()`.
        d: number of players.
        n_samples: model evaluations an image. `exact` takes 2^d whatever this says.
        seed: int for one stream, rows [K, d], which is cached; int64 [B] for a stream an image, rows [B, K,
            d].

    Raises:
        ValueError: unknown estimator, or a budget or a number of players that it cannot serve.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(list_estimators())}, got {estimator!r}")
    if isinstance(seed, Tensor):
        return ESTIMATORS[estimator](d, n_samples, seed.cpu())
    return _plan_of_seed(estimator, d, n_samples, seed)


@functools.lru_cache(maxsize=64)
def _plan_of_seed(estimator: str, d: int, n_samples: int, seed: int) -> Plan:
    plan = ESTIMATORS[estimator](d, n_samples, torch.tensor([seed]))
    return plan.of_one_stream() if isinstance(plan, SampledPlan) else plan


@register("exact")
def exact(d: int, n_samples: int, seeds: Tensor) -> Plan:
    """InfoUtil Eq. 4 by enumeration: 2^d evaluations an image, the same for every seed and every budget.

    Raises:
        ValueError: more than 20 players.
    """
    if d > MAX_EXACT_PLAYERS:
        raise ValueError(
            f"the exact estimator takes at most {MAX_EXACT_PLAYERS} players (2^20 evaluations), got {d}: "
            "give a smaller grid or a sampling estimator"
        )
    return ExactPlan(d)


@register("permutation")
def permutation(d: int, n_samples: int, seeds: Tensor) -> Plan:
    """Marginal contributions along random orders, each order also walked backwards (antithetic pairs).

    phi_i is the mean over orders of v(before i, and i) - v(before i) (Castro et al., 2009), unbiased; the sum
    over an order telescopes to v(full) - v(empty), so efficiency is exact. Backwards, the coalitions are the
    complements of those forwards, and one pair is exact on games of at most pairwise interactions (Mitchell
    et al., 2022). A pair costs 2 (d - 1) evaluations beside the two anchors, so the budget gives floor((n -
    2) / (2 (d - 1))) pairs: exactly one at n = 32, d = 16. Below 2 d evaluations a single order is walked
    once, which takes d + 1.

    Raises:
        ValueError: a budget below d + 1.
    """
    if n_samples < d + 1:
        raise ValueError(
            f"the permutation estimator takes n_samples >= {d + 1} (one order of {d} players), "
            f"got {n_samples}: give more samples, a smaller grid or estimator='paired'"
        )
    if d == 1:
        return _single_player(seeds)
    pairs = (n_samples - 2) // (2 * (d - 1))
    joined = permutations(seeds, max(pairs, 1), d).argsort(
        dim=-1
    )  # [S, m, d]: the time at which each player joins
    step = torch.arange(1, d)[:, None]
    # After `step` players have joined, v adds to the player that has just joined and subtracts from the next
    # to join.
    coalitions = (joined[:, :, None] < step).flatten(1, 2)
    marginal = ((joined[:, :, None] == step - 1).double() - (joined[:, :, None] == step).double()).flatten(
        1, 2
    )
    first, last = (joined == 0).double().sum(dim=1), (joined == d - 1).double().sum(dim=1)
    orders = joined.shape[1]
    if pairs:
        coalitions = torch.cat([coalitions, ~coalitions], dim=1)
        marginal = torch.cat([marginal, -marginal], dim=1)
        first = last = first + last
        orders *= 2
    return _with_anchors(coalitions, marginal / orders, empty=-first / orders, full=last / orders)


@register("paired")
def paired(d: int, n_samples: int, seeds: Tensor) -> Plan:
    """The regression of InfoUtil Eq. 5 on complement pairs, its efficiency constraint eliminated exactly.

    Subsets come from the Shapley kernel, each with its complement (Covert & Lee, 2021), so all samples weigh
    the same:

        phi = argmin sum_s (v(s) - v(empty) - s^T phi)^2   s.t.   1^T phi = Delta = v(full) - v(empty).

    With P = I - 11^T/d, phi = Delta/d + P u satisfies the constraint for every u, which leaves the free least
    squares of v(s) - v(empty) - |s| Delta/d on the columns of S P, solved by its pseudo-inverse. Fewer than d
    - 1 independent pairs do not determine phi; the pseudo-inverse then gives the solution closest to the
    equal shares Delta/d. Once they do, the estimate is exact on games of at most pairwise interactions.

    Raises:
        ValueError: a budget below 4 (two anchors and one pair).
    """
    if n_samples < 4:
        raise ValueError(
            f"the paired estimator takes n_samples >= 4 (two anchors and one pair), got {n_samples}"
        )
    if d == 1:
        return _single_player(seeds)
    half = shapley_kernel_subsets(seeds, (n_samples - 2) // 2, d)
    coalitions = torch.cat([half, ~half], dim=1)
    s = coalitions.double()
    centred = s - s.mean(dim=-1, keepdim=True)  # S P
    solve = torch.linalg.pinv(
        centred, rtol=1e-10
    ).mT  # [S, K, d]: phi - Delta/d = solve^T (v(s) - v(empty) - |s| Delta/d)
    full = 1.0 / d - (s.mean(dim=-1, keepdim=True) * solve).sum(dim=1)
    return _with_anchors(coalitions, solve, empty=-full - solve.sum(dim=1), full=full)


@register("kernel")
def kernel(d: int, n_samples: int, seeds: Tensor) -> Plan:
    """Kernel SHAP as Captum's `KernelShap` samples and solves it, the literal reading of InfoUtil B.1.

    n_samples - 2 independent subsets from the Shapley kernel weigh 1, the empty and the full coalition 10^6
    in place of the constraint of Eq. 5, and phi are the coefficients of weighted least squares with an
    intercept: with X and v centred by their weighted means, phi = pinv(W^(1/2) X) W^(1/2) v. Where the
    samples do not determine phi this is the least squares solution of smallest norm, which is scikit-learn's,
    and so Captum's. Captum's own budget is 25.

    Raises:
        ValueError: a budget below 3.
    """
    if n_samples < 3:
        raise ValueError(
            f"the kernel estimator takes n_samples >= 3 (two anchors and one sample), got {n_samples}"
        )
    if d == 1:
        return _single_player(seeds)
    sampled = shapley_kernel_subsets(seeds, n_samples - 2, d)
    anchors = torch.tensor([False, True])[:, None].expand(len(seeds), 2, d)
    coalitions = torch.cat([anchors, sampled], dim=1)
    weight = torch.ones(n_samples, 1, dtype=torch.float64)
    weight[:2] = _ANCHOR_WEIGHT
    x = coalitions.double()
    x = weight.sqrt() * (x - (weight * x).sum(dim=1, keepdim=True) / weight.sum())
    return SampledPlan(coalitions, weight.sqrt() * torch.linalg.pinv(x, rtol=1e-12).mT)


def _single_player(seeds: Tensor) -> SampledPlan:
    """The game of one player, whose value is v(full) - v(empty) whatever the estimator."""
    none = torch.empty(len(seeds), 0, 1, dtype=torch.float64)
    one = torch.ones(len(seeds), 1, dtype=torch.float64)
    return _with_anchors(none.bool(), none, empty=-one, full=one)


def _with_anchors(coalitions: Tensor, projection: Tensor, *, empty: Tensor, full: Tensor) -> SampledPlan:
    """Put the empty and the full coalition, with projections [S, d], before the sampled ones [S, K, d]."""
    anchors = torch.tensor([False, True])[:, None].expand(len(coalitions), 2, coalitions.shape[-1])
    return SampledPlan(
        torch.cat([anchors, coalitions], dim=1),
        torch.cat([torch.stack([empty, full], dim=1), projection], dim=1),
    )
