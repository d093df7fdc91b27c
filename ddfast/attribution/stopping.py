"""Evaluate an image only until its crop is settled: rounds of coalitions, and a stop once the best window is sure.

The coalitions of each round go on top of those before. After every round the posterior of a Gaussian process over games
(`GamePrior`) says how sure the best window of the pooled map (InfoUtil, Sec. 3.2.1) is: clear images stop after the
first round, and what they save can be spent on the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ddfast.attribution.engine import DEFAULT_CHUNK_SIZE, Channels, ImageGame
from ddfast.attribution.estimators.design_search import design, extended
from ddfast.attribution.estimators.game_prior import GamePrior, Grid
from ddfast.attribution.estimators.kept_designs import kept_rounds
from ddfast.attribution.estimators.plans import relabellings
from ddfast.attribution.inspection import Inspection
from ddfast.attribution.validation import (
    as_tensors,
    check_baseline,
    check_chunk_size,
    check_grid,
    check_images,
    check_seed,
)
from ddfast.masked_forward.forward import check_model
from ddfast.ops._attribution import VALUES
from ddfast.ops.precision import resolve_precision
from ddfast.random_states import RandomStates

# Evaluations after each round, in players.
ROUNDS = (2, 3, 4, 6, 8)


@torch.inference_mode(False)
@torch.no_grad()
def settled_shapley(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    grid: int | Grid = 4,
    n_samples: int = 128,
    confidence: float = 0.9,
    value: str = "logit",
    baseline: float | Tensor = 0.0,
    precision: str = "float32",
    seed: int | Tensor = 0,
    *,
    pool: int = 2,
    mean: Channels = None,
    std: Channels = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Shapley values of grid cells, evaluated until the best window is settled: `shapley` that stops on its own.

    Rounds up to 2, 3, 4, 6 and 8 evaluations a cell, at most `n_samples`. An image stops after the round in which its
    best window of pool x pool cells beats all others with the asked confidence, under the posterior of the prior over
    games whose scale is estimated from the image's own values. How often the crop is then that of the exact map, and
    what is saved, is measured in bench/results/estimators_*.md.

    Args:
        model: as for `shapley`, and so are `images`, `labels`, `grid`, `value`, `baseline`, `precision`, `mean`, `std`
            and `chunk_size`.
        images: uint8 or float [B, C, H, W].
        labels: int64 [B].
        grid: cells per side, or (rows, columns).
        n_samples: most evaluations an image, the empty and the full image included.
        confidence: in (0, 1). Above it the window counts as settled.
        value: "logit", "prob" or "logprob".
        baseline: what absent cells show.
        precision: "float32", "bfloat16" or "auto".
        seed: int, or int64 [B] for a stream an image: how the coalitions are turned and mirrored.
        pool: side of the window in cells.
        mean: channel means [C] to subtract.
        std: channel deviations [C] to divide by.
        chunk_size: masked images in one forward pass.

    Returns:
        phi [B, d], float32 (float64 from a float64 model), and the evaluations that each image took, int64 [B] on the
        CPU. With a stream an image, both owe nothing to the other images of the call.

    Raises:
        ValueError: as `shapley`; a confidence outside (0, 1), a window larger than the grid, or fewer evaluations than
            one round takes.
        TypeError: a baseline tensor that is not floating point.
    """
    images, labels = as_tensors(images, labels)
    check_images(images, labels)
    check_model(model, images)
    rows, cols = check_grid(grid, images)
    resolve_precision(precision, images.device)
    if value not in VALUES:
        raise ValueError(f"value must be one of {', '.join(VALUES)}, got {value!r}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    chunk = check_chunk_size(DEFAULT_CHUNK_SIZE if chunk_size is None else chunk_size)
    baseline = check_baseline(baseline, images)
    seed = check_seed(seed, len(images))
    seeds = seed.cpu() if isinstance(seed, Tensor) else torch.full((len(images),), seed)

    d = rows * cols
    rounds = rounds_of(d, (rows, cols), n_samples, pool)
    relabelling = rounds.relabelling(seeds)  # [B, d]
    coalitions = rounds.coalitions[:, relabelling].transpose(0, 1)  # [B, K, d]
    values = torch.empty(len(images), rounds.sizes[-1], dtype=torch.float64)
    phi = torch.zeros(len(images), d, dtype=torch.float64)
    evaluations = torch.zeros(len(images), dtype=torch.int64)
    active = torch.arange(len(images))
    dtype = torch.float32
    inspection: Inspection | None = None
    states = RandomStates()
    for number, size in enumerate(rounds.sizes):
        if not len(active):
            break
        before = rounds.sizes[number - 1] if number else 0
        there = active.to(images.device)
        per_image = isinstance(baseline, Tensor) and baseline.dim() == 4
        game = ImageGame(
            model,
            images[there],
            labels.to(images.device)[there],
            (rows, cols),
            value,
            baseline[there] if per_image and isinstance(baseline, Tensor) else baseline,
            mean,
            std,
            precision,
            evaluations=size - before,
            chunk=chunk,
            inspection=inspection,
        )
        dtype = game.dtype
        game.look()
        inspection = game.inspection
        values[active, before:size] = _values(game, coalitions[active, before:size], chunk)
        game.check_finite()
        estimate, settled = rounds.estimate(number, values[active, :size], confidence)
        phi[active] = estimate.gather(1, relabelling[active])
        evaluations[active] = size
        active = active[~settled]
        if game.draws:
            states.restore()
    return phi.to(images.device, torch.float64 if dtype == torch.float64 else torch.float32), evaluations


def _values(game: ImageGame, coalitions: Tensor, chunk: int) -> Tensor:
    """Values float64 [B, K] of coalitions bool [B, K, d], in forward passes of at most `chunk` masked images."""
    images, size = coalitions.shape[:2]
    values = torch.empty(images, size, dtype=torch.float64)
    together = max(1, chunk // size)
    for begin in range(0, images, together):
        which = slice(begin, min(begin + together, images))
        for start in range(0, size, chunk):
            part = coalitions[which, start : start + chunk]
            # The projection onto the values themselves.
            scores = game.scores(which, part)
            own = torch.eye(part.shape[1], dtype=torch.float64)
            values[which, start : start + chunk] = game.project(which, scores, own).double().cpu()
    return values


@functools.lru_cache(maxsize=16)
def rounds_of(d: int, grid: Grid, n_samples: int, pool: int) -> Rounds:
    """The rounds of a grid, made once."""
    return Rounds(d, grid, n_samples, pool)


class Rounds:
    """Nested coalitions, and after each round the projection to phi and how sure the pooled map is.

    Attributes:
        sizes: coalitions after each round.
        coalitions: bool [K, d], the empty and the full one first.

    Raises:
        ValueError: fewer evaluations than the first round takes, or a window larger than the grid.
    """

    def __init__(self, d: int, grid: Grid, n_samples: int = 128, pool: int = 2) -> None:
        if not 1 <= pool <= min(grid):
            raise ValueError(
                f"pool must be 1..{min(grid)} cells for a grid of {grid[0]} x {grid[1]}, got {pool}"
            )
        wanted = sorted({min(max(share * d, 3), 1 << d) for share in ROUNDS})
        self.sizes = [size for size in wanted if size <= n_samples]
        if not self.sizes:
            raise ValueError(
                f"n_samples must be at least {wanted[0]}, the first round of {d} players, got {n_samples}"
            )
        self.grid, self.pool = grid, pool
        prior = GamePrior(d, grid)
        kept = kept_rounds(grid)
        if kept is None:
            first, _ = design(d, self.sizes[0], grid)
            self.coalitions = extended(prior, first, self.sizes[-1])
        else:
            self.coalitions = kept[: self.sizes[-1]]
        self._prepared = [self._prepare(prior, size) for size in self.sizes]

    def _prepare(self, prior: GamePrior, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Projection [size, d]; weights whose squares with the values give the game's scale; covariance of phi."""
        seen = self.coalitions[:size]
        precision, target = prior.given(seen)
        left = prior.covariance_of_shapley() - target.mT @ precision @ target
        return prior.projection(seen), precision, left

    def relabelling(self, seeds: Tensor) -> Tensor:
        """The symmetry of each stream, int64 [S, d]."""
        return relabellings(seeds, self.coalitions.shape[1], self.grid)

    def estimate(self, number: int, values: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
        """phi float64 [B, d] after a round, from values [B, K], and whether the best window is settled, bool [B].

        The chance that some other window is better is at most the sum of the chances that each is (a union bound),
        which are those of normal differences. Their scale is the mean of squared standardised leave-one-out residuals
        of the image's values.
        """
        projection, precision, covariance = self._prepared[number]
        phi = values @ projection
        rise = values[:, 1:] - values[:, :1]
        residual = rise @ precision
        scale = (residual**2 / precision.diagonal()).mean(dim=-1)  # [B]
        window = self._windows()
        pooled = phi @ window.mT  # [B, windows]
        best = pooled.argmax(dim=-1)
        spread = window @ covariance @ window.mT
        own = spread.diagonal()
        deviation = (own[best][:, None] + own - 2.0 * spread[best]).clamp(min=0.0) * scale[:, None]
        lead = pooled.gather(1, best[:, None]) - pooled
        doubt = torch.special.ndtr(-lead / deviation.sqrt().clamp(min=1e-300))
        doubt = doubt.scatter(1, best[:, None], 0.0).sum(dim=-1)
        return phi, doubt <= 1.0 - confidence

    def _windows(self) -> Tensor:
        """Sums over windows of pool x pool cells, float64 [windows, d]."""
        d = self.coalitions.shape[1]
        cell = torch.arange(d).view(self.grid)
        member = cell.unfold(0, self.pool, 1).unfold(1, self.pool, 1).reshape(-1, self.pool**2)
        return torch.nn.functional.one_hot(member, d).sum(dim=1).double()
