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

from ddfast.attribution.estimators.coalitions import (
    all_coalitions,
    choices,
    leverage_pairs,
    leverage_probabilities,
    permutations,
    shapley_kernel_subsets,
    shapley_weights,
    size_distribution,
    subsets_of_size,
)
from ddfast.attribution.estimators.design_search import design
from ddfast.attribution.estimators.game_prior import GamePrior, Grid
from ddfast.ops.transfer import to_device

MAX_EXACT_PLAYERS = 20
_ANCHOR_WEIGHT = 1e6
_FOLDS = 5  # of `ramc`
_MOST_CELLS = 1 << 17  # players times evaluations of a plan that is kept: about a megabyte


class Plan(Protocol):
    """Coalitions to evaluate and their projection, of one stream for all images or of a stream an image."""

    @property
    def size(self) -> int:
        """K, the number of coalitions; number 0 is the empty one."""
        ...

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Coalitions bool [(S,) stop - start, d] and their projection float64 alike."""
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

    def on(self, device: torch.device) -> SampledPlan:
        """The same plan in the memory of a device."""
        if device.type == "cpu":
            return self
        return SampledPlan(to_device(self.coalitions, device), to_device(self.projection, device))

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
        coalitions = all_coalitions(self.d, start, stop)
        return coalitions, shapley_weights(coalitions)


Estimator = Callable[[int, int, Tensor, Grid | None], Plan]
"""(d, n_samples, seeds int64 [S], grid or None) -> Plan with rows [S, K, d]."""

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


def make_plan(estimator: str, players: int | Grid, n_samples: int, seed: int | Tensor) -> Plan:
    """The plan of an estimator for d players.

    Args:
        estimator: a name of `list_estimators()`.
        players: rows and columns of a grid of cells, player i in row i // columns; or d, where nothing is known of
            who is whose neighbour. `gp` and `designed` use the grid, to all others it is only its d cells.
        n_samples: model evaluations an image. `exact` takes 2^d whatever this says.
        seed: int for one stream, rows [K, d], which is cached; int64 [B] for a stream an image, rows [B, K,
            d].

    Raises:
        ValueError: unknown estimator, or a budget or a number of players that it cannot serve.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(list_estimators())}, got {estimator!r}")
    d, grid = (players, None) if isinstance(players, int) else (players[0] * players[1], players)
    if isinstance(seed, Tensor):
        return ESTIMATORS[estimator](d, n_samples, seed.cpu(), grid)
    if n_samples * d > _MOST_CELLS:
        return _plan_of_seed.__wrapped__(estimator, d, n_samples, seed, grid)
    return _plan_of_seed(estimator, d, n_samples, seed, grid)


@functools.lru_cache(maxsize=64)
def _plan_of_seed(estimator: str, d: int, n_samples: int, seed: int, grid: Grid | None) -> Plan:
    plan = ESTIMATORS[estimator](d, n_samples, torch.tensor([seed]), grid)
    return plan.of_one_stream() if isinstance(plan, SampledPlan) else plan


@register("exact")
def exact(d: int, n_samples: int, seeds: Tensor, grid: Grid | None = None) -> Plan:
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
def permutation(d: int, n_samples: int, seeds: Tensor, grid: Grid | None = None) -> Plan:
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
def paired(d: int, n_samples: int, seeds: Tensor, grid: Grid | None = None) -> Plan:
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
    return _constrained_regression(torch.cat([half, ~half], dim=1))


@register("leverage")
def leverage(d: int, n_samples: int, seeds: Tensor, grid: Grid | None = None) -> Plan:
    """Leverage SHAP (Musco & Witter, 2025, arXiv 2410.01917): distinct pairs by leverage score, reweighted.

    The regression of `paired`, on complement pairs drawn without replacement so that all sizes come up equally often
    (`leverage_pairs`). Each weighs the Shapley kernel over the probability of being drawn, 1 / (|s| (d - |s|)
    binom(d, |s|) pi(s)). With all 2^d coalitions it is exact.

    Raises:
        ValueError: a budget below 4 (two anchors and one pair).
    """
    if n_samples < 4:
        raise ValueError(
            f"the leverage estimator takes n_samples >= 4 (two anchors and one pair), got {n_samples}"
        )
    if d == 1:
        return _single_player(seeds)
    pairs = min((n_samples - 2) // 2, 2 ** (d - 1) - 1)
    half = leverage_pairs(seeds, pairs, d)
    probability = leverage_probabilities(d, pairs)
    weight = [0.0, *(1.0 / (k * (d - k) * math.comb(d, k) * probability[k]) for k in range(1, d)), 0.0]
    coalitions = torch.cat([half, ~half], dim=1)
    return _constrained_regression(
        coalitions, torch.tensor(weight, dtype=torch.float64)[coalitions.sum(dim=-1)]
    )


@register("enumerated")
def enumerated(d: int, n_samples: int, seeds: Tensor, grid: Grid | None = None) -> Plan:
    """All coalitions of the sizes 1 and d - 1, 2 and d - 2, ... that the budget holds, then pairs of the other sizes.

    What the `shap` package does (Lundberg & Lee, 2017, `KernelExplainer`): the Shapley kernel puts most of its mass
    on the extreme sizes, where there are few coalitions. Those enumerated weigh their share of the kernel, those
    drawn (from the kernel, in complement pairs) divide the rest evenly. The regression is that of `paired`.

    Raises:
        ValueError: a budget below 2 d + 2 (the anchors and the sizes 1 and d - 1).
    """
    if n_samples < 2 * d + 2 and 2**d > n_samples:
        raise ValueError(
            f"the enumerated estimator takes n_samples >= {2 * d + 2} (all coalitions of one player and their "
            f"complements), got {n_samples}: give more samples, a smaller grid or estimator='designed'"
        )
    if d == 1:
        return _single_player(seeds)
    whole, left, sizes = [], n_samples - 2, 1
    while sizes <= d // 2 and math.comb(d, sizes) * (1 if 2 * sizes == d else 2) <= left:
        found = subsets_of_size(d, sizes)
        whole.append(found if 2 * sizes == d else torch.cat([found, ~found]))
        left -= len(whole[-1])
        sizes += 1
    coalitions = torch.cat(whole).expand(len(seeds), -1, -1)
    mass = [0.0, *size_distribution(d), 0.0]
    weight = torch.tensor([mass[k] / math.comb(d, k) for k in range(d + 1)], dtype=torch.float64)
    weights = weight[coalitions.sum(dim=-1)]
    if sizes <= d // 2 and left >= 2:
        half = shapley_kernel_subsets(seeds, left // 2, d, sizes)
        drawn = torch.cat([half, ~half], dim=1)
        rest = torch.full(
            drawn.shape[:2], math.fsum(mass[sizes : d - sizes + 1]) / drawn.shape[1], dtype=torch.float32
        )
        coalitions, weights = (
            torch.cat([coalitions, drawn], dim=1),
            torch.cat([weights, rest.double()], dim=1),
        )
    return _constrained_regression(coalitions, weights)


@register("ramc")
def ramc(d: int, n_samples: int, seeds: Tensor, grid: Grid | None = None) -> Plan:
    """Regression-adjusted Monte Carlo (Witter, Liu & Musco, 2025, arXiv 2506.11849) with a linear model.

    Pairs from the Shapley kernel are split into folds. For each fold a linear model f is fitted to all others by the
    regression of `paired`, whose Shapley values are its coefficients; the fold's own pairs then estimate the Shapley
    values of v - f by Monte Carlo, each evaluation serving all players: a coalition drawn with probability q(s)
    brings (v - f)(s) w(s) / q(s), w as in InfoUtil Eq. 4. The sum is unbiased whatever the fit, and efficiency is
    exact: f obeys it, and the weights of a coalition between the anchors sum to zero over the players.

    Raises:
        ValueError: a budget below 6 (two anchors and two pairs).
    """
    if n_samples < 6:
        raise ValueError(
            f"the ramc estimator takes n_samples >= 6 (two anchors and two pairs), got {n_samples}"
        )
    if d == 1:
        return _single_player(seeds)
    pairs = (n_samples - 2) // 2
    half = shapley_kernel_subsets(seeds, pairs, d)
    coalitions = torch.cat([half, ~half], dim=1)
    s = coalitions.double()
    fold = torch.arange(pairs).repeat(2) % min(_FOLDS, pairs)
    size = coalitions.sum(dim=-1, keepdim=True)
    mass = torch.tensor([1.0, *size_distribution(d), 1.0], dtype=torch.float64)
    subsets = torch.tensor([float(math.comb(d, k)) for k in range(d + 1)], dtype=torch.float64)
    # Horvitz-Thompson weights w(s) / q(s) over the number of draws.
    monte_carlo = shapley_weights(coalitions) * (subsets / mass)[size] / (2 * pairs)
    interior, full = torch.zeros_like(monte_carlo), torch.zeros(len(seeds), d, dtype=torch.float64)
    for each in range(int(fold.max()) + 1):
        others, own = fold != each, fold == each
        fitted = _constrained_regression(coalitions[:, others]).projection  # [S, 2 + others, d]
        # phi of the model enters with its share of the folds, less what Monte Carlo makes of it on the fold's own
        # pairs: there f(s) - v(empty) = s^T fitted^T (v - v(empty)).
        kept = torch.eye(d, dtype=torch.float64) * own.double().mean() - s[:, own].mT @ monte_carlo[:, own]
        full += (fitted[:, 1, None] @ kept)[:, 0]
        interior[:, others] += fitted[:, 2:] @ kept
        interior[:, own] += monte_carlo[:, own]
    return _with_anchors(coalitions, interior, empty=-full - interior.sum(dim=1), full=full)


@register("gp")
def gp(d: int, n_samples: int, seeds: Tensor, grid: Grid | None = None) -> Plan:
    """The expected phi under a Gaussian process over games (`GamePrior`), given coalitions drawn at random.

    The coalitions are distinct pairs of complements, all sizes equally often (`leverage_pairs`). No dummy property:
    a prior in which neighbours interact moves a little of a cell's value to its neighbours. Exact with all 2^d
    coalitions.

    Raises:
        ValueError: a budget below 4 (two anchors and one pair).
    """
    if n_samples < 4:
        raise ValueError(f"the gp estimator takes n_samples >= 4 (two anchors and one pair), got {n_samples}")
    if d == 1:
        return _single_player(seeds)
    half = leverage_pairs(seeds, min((n_samples - 2) // 2, 2 ** (d - 1) - 1), d)
    anchors = torch.tensor([False, True])[:, None].expand(len(seeds), 2, d)
    coalitions = torch.cat([anchors, half, ~half], dim=1)
    prior = GamePrior(d, grid)
    # One by one: batched linear algebra rounds a stream differently beside other streams.
    projection = [prior.projection(each) for each in coalitions]
    return SampledPlan(coalitions, torch.stack(projection) if projection else coalitions.double())


@register("designed")
def designed(d: int, n_samples: int, seeds: Tensor, grid: Grid | None = None) -> Plan:
    """The expected phi under the prior of `gp`, given the coalitions from which it expects the least error.

    One set of coalitions is searched for each budget (`design`), and the seed only turns and mirrors the grid (where
    there is none, it permutes the players), which the prior does not notice. So a stream an image costs nothing.
    Deterministic up to these symmetries, hence neither unbiased nor with a dummy property, but with the least error
    of all estimators here on the games of real teachers. Exact with all 2^d coalitions.

    Raises:
        ValueError: a budget below 3 (two anchors and one coalition).
    """
    if n_samples < 3:
        raise ValueError(
            f"the designed estimator takes n_samples >= 3 (two anchors and one coalition), got {n_samples}"
        )
    if d == 1:
        return _single_player(seeds)
    coalitions, projection = design(d, n_samples, grid)
    relabelled = relabellings(seeds, d, grid)  # [S, d]: the player of the design that stands where i is
    return SampledPlan(coalitions[:, relabelled].transpose(0, 1), projection[:, relabelled].transpose(0, 1))


@register("kernel")
def kernel(d: int, n_samples: int, seeds: Tensor, grid: Grid | None = None) -> Plan:
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


def _constrained_regression(coalitions: Tensor, weight: Tensor | None = None) -> SampledPlan:
    """Weighted least squares of v(s) - v(empty) on s with the efficiency constraint, as `paired` writes it.

    Args:
        coalitions: bool [S, K, d], without the anchors.
        weight: float64 [S, K]; None weighs all alike.
    """
    d = coalitions.shape[-1]
    s = coalitions.double()
    root = torch.ones(1, 1, 1, dtype=torch.float64) if weight is None else weight.sqrt()[..., None]
    centred = root * (s - s.mean(dim=-1, keepdim=True))  # W^(1/2) S P
    # [S, K, d]: phi - Delta/d = solve^T (v(s) - v(empty) - |s| Delta/d).
    solve = root * torch.linalg.pinv(centred, rtol=1e-10).mT
    full = 1.0 / d - (s.mean(dim=-1, keepdim=True) * solve).sum(dim=1)
    return _with_anchors(coalitions, solve, empty=-full - solve.sum(dim=1), full=full)


def relabellings(seeds: Tensor, d: int, grid: Grid | None) -> Tensor:
    """A random symmetry of the players a stream, int64 [S, d]: of the grid's 8 (4 unless square), or any order."""
    if grid is None:
        return permutations(seeds, 1, d)[:, 0]
    cell = torch.arange(d).view(grid)
    turned = [cell, cell.flip(0), cell.flip(1), cell.flip(0, 1)]
    if grid[0] == grid[1]:
        turned += [each.mT for each in turned]
    return torch.stack(turned).flatten(1)[choices(seeds, len(turned))]


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
