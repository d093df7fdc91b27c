"""A prior over the games that images play, and the Shapley values it expects from a few coalitions.

Masking cells of an image plays a game v(s) whose interactions are mostly between neighbouring cells. That is put
into a Gaussian process over coalitions (after the Gaussian-process view of cooperative games, Chau et al., 2023):
a sum of games of windows of the grid, of single cells, of pairs, of 2 x 2 and 3 x 3 cells and of the whole grid,
each with the covariance

    k_W(s, t) = product over the cells i of W of kappa(s_i, t_i),
    kappa(0, 0) = e^tilt,   kappa(1, 1) = e^-tilt,   kappa(0, 1) = decay,

so that k_W = decay^(Hamming distance within W) where nothing tilts. The Shapley value is linear in the game, hence
jointly normal with its values, and its covariance with v(t) is that of a product game,

    cov(phi_i, v(t)) = sum over W with i of (kappa(1, t_i) - kappa(0, t_i)) integral over p in (0, 1) of
                       product over j in W, j != i, of (p kappa(1, t_j) + (1 - p) kappa(0, t_j)),

by the integral form of the Shapley value (Owen, 1972). The integrand is a polynomial that depends on the numbers of
present and absent cells alone, so a small table by Gauss-Legendre quadrature is exact, and nothing is enumerated. The
expected phi given the values is linear in them: a projection, as every estimator here.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ddfast.attribution.estimators.coalitions import shapley_weights

Grid = tuple[int, int]

# Ridge on the covariance of observed values, as a share of their mean variance: a coalition given twice adds nothing.
_RIDGE = 1e-12


@dataclass(frozen=True)
class Level:
    """Games of all windows of one shape.

    Attributes:
        shape: rows and columns of a window in cells, laid upright and sideways; None is the whole grid.
        share: variance of the level's games at the middle of the cube of coalitions; the level's windows split it.
        decay: kappa(0, 1), in (0, 1): how much of the covariance is left where one cell differs.
        tilt: positive where the game varies more among small coalitions than among large ones.
    """

    shape: Grid | None
    share: float | Tensor
    decay: float | Tensor
    tilt: float | Tensor = 0.0


@dataclass(frozen=True)
class Parameters:
    """What a prior is made of, relative to each other: a common factor changes no estimate.

    Attributes:
        levels: the windows' games.
        equal: variance of the game in which all players count alike, share * (|s| / d - 1/2): images' games rise.
        rest: variance of independent values, what no window explains.
    """

    levels: tuple[Level, ...]
    equal: float | Tensor
    rest: float | Tensor


class GamePrior:
    """A Gaussian process over the games of d players.

    Args:
        d: number of players.
        grid: rows and columns, players in row-major order; None where the players have no neighbours.
        parameters: by default those fitted to real teachers (`FITTED_GRID`, `FITTED_EXCHANGEABLE`).
    """

    def __init__(self, d: int, grid: Grid | None, parameters: Parameters | None = None) -> None:
        if grid is not None and grid[0] * grid[1] != d:
            raise ValueError(f"a grid of {d} players is wanted, got {grid[0]} x {grid[1]}")
        self.d = d
        self.parameters = parameters or (FITTED_EXCHANGEABLE if grid is None else FITTED_GRID)
        self._levels: list[tuple[Tensor, Level]] = []
        for level in self.parameters.levels:
            windows = _windows(d, grid, level.shape)
            if windows is not None:
                self._levels.append((windows, level))

    def covariance(self, s: Tensor, t: Tensor) -> Tensor:
        """Covariance of values: bool [..., K, d] and [..., M, d] to float64 [..., K, M]."""
        x, y = s.double(), t.double()
        size_s, size_t = x.sum(dim=-1) - self.d / 2, y.sum(dim=-1) - self.d / 2
        total = self.parameters.equal / self.d**2 * size_s[..., :, None] * size_t[..., None, :]
        for windows, level in self._levels:
            width = windows.shape[1]
            in_s, in_t = _by_window(x, windows), _by_window(y, windows)
            present = in_s @ in_t.mT
            absent = (1.0 - in_s) @ (1.0 - in_t).mT
            differ = width - present - absent
            exponent = level.tilt * (absent - present) + differ * _log(level.decay)
            total = total + level.share / len(windows) * exponent.exp().sum(dim=-3)
        same = x @ y.mT + (1.0 - x) @ (1.0 - y).mT == self.d
        return total + self.parameters.rest * same.double()

    def variance(self, s: Tensor) -> Tensor:
        """Variance of the value of each coalition, bool [..., K, d] to float64 [..., K]."""
        x = s.double()
        total = self.parameters.equal / self.d**2 * (x.sum(dim=-1) - self.d / 2) ** 2 + self.parameters.rest
        for windows, level in self._levels:
            present = x[..., windows].sum(dim=-1)
            spread = (level.tilt * (windows.shape[1] - 2.0 * present)).exp()
            total = total + level.share / len(windows) * spread.sum(dim=-1)
        return total

    def shapley_covariance(self, t: Tensor) -> Tensor:
        """Covariance of phi with the value of each coalition, bool [..., M, d] to float64 [..., M, d]."""
        y = t.double()
        size = y.sum(dim=-1, keepdim=True)
        # The game in which all count alike gives every player 1/d of its rise.
        total = self.parameters.equal / self.d**2 * (size - self.d / 2).expand_as(y)
        for windows, level in self._levels:
            width = windows.shape[1]
            inside = t[..., windows]  # [..., M, W, width]
            present = inside.sum(dim=-1, keepdim=True)
            others = _product_integrals(width, level)[
                present - inside.long(), width - present - (~inside).long()
            ]
            joins, misses = _exp(-level.tilt) - level.decay, level.decay - _exp(level.tilt)
            gain = inside.double() * (joins - misses) + misses
            onto = torch.nn.functional.one_hot(windows.flatten(), self.d).double()
            total = total + level.share / len(windows) * (gain * others).flatten(-2) @ onto
        return total + self.parameters.rest * shapley_weights(t)

    def covariance_of_shapley(self) -> Tensor:
        """Covariance of phi before anything is seen, float64 [d, d].

        The difference that a cell makes in one argument of kappa, averaged over the other, times the mean of kappa over
        both for every other cell of the window, integrated over the two chances of being present.
        """
        d = self.d
        total = self.parameters.equal / d**2 * torch.ones(d, d, dtype=torch.float64)
        for windows, level in self._levels:
            width = windows.shape[1]
            node, weight = _quadrature(width // 2 + 1)
            p, q = node[:, None], node[None, :]
            k00, k01, k11 = _exp(level.tilt), level.decay, _exp(-level.tilt)
            mean = p * q * k11 + (p + q - 2.0 * p * q) * k01 + (1.0 - p) * (1.0 - q) * k00
            rise = node * (k11 - k01) + (1.0 - node) * (k01 - k00)
            own = (k11 - 2.0 * k01 + k00) * (weight @ mean ** (width - 1) @ weight)
            member = torch.nn.functional.one_hot(windows, d).sum(dim=1).double()  # [W, d]
            together = member.mT @ member
            if width > 1:
                other = (weight * rise) @ mean ** (width - 2) @ (weight * rise)
                total = total + level.share / len(windows) * other * (together - together.diagonal().diag())
            total = total + level.share / len(windows) * own * together.diagonal().diag()
        return total + self.parameters.rest * _covariance_of_white_shapley(d)

    def given(self, coalitions: Tensor) -> tuple[Tensor, Tensor]:
        """What an estimate and its error are made of, for increments over the value of the empty coalition.

        Args:
            coalitions: bool [K, d], the first the empty one.

        Returns:
            Inverse covariance of the increments, float64 [K - 1, K - 1], and their covariance with phi [K - 1, d].
        """
        covariance, target = self._increments(coalitions)
        return torch.linalg.inv(covariance), target

    def _increments(self, coalitions: Tensor) -> tuple[Tensor, Tensor]:
        """Covariance [..., K - 1, K - 1] of the increments over the first coalition, with the ridge, and with phi."""
        full, target = self.covariance(coalitions, coalitions), self.shapley_covariance(coalitions)
        full = (full - full[..., :1, :] - full[..., :, :1] + full[..., :1, :1])[..., 1:, 1:]
        ridge = _RIDGE * full.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
        covariance = full + ridge * torch.eye(full.shape[-1], dtype=torch.float64)
        return covariance, (target - target[..., :1, :])[..., 1:, :]

    def projection(self, coalitions: Tensor) -> Tensor:
        """Projection of the values of coalitions to the expected phi.

        The value of the empty coalition has no prior: estimates do not change where a constant is added to the game.
        Values are taken to be exact, so the efficiency constraint holds where the full coalition is among them; what
        the ridge of the solver leaves of it is spread evenly.

        Args:
            coalitions: bool [..., K, d]; the first is the empty one, the second the full one.

        Returns:
            float64 [..., K, d].
        """
        covariance, target = self._increments(coalitions)
        factor = torch.linalg.cholesky(covariance)
        inner = torch.cholesky_solve(target, factor)
        sums = torch.zeros(inner.shape[-2], 1, dtype=torch.float64)
        sums[0] = 1.0
        inner = inner - (inner.sum(dim=-1, keepdim=True) - sums) / self.d
        return torch.cat([-inner.sum(dim=-2, keepdim=True), inner], dim=-2)


def _covariance_of_white_shapley(d: int) -> Tensor:
    """Covariance of phi where all 2^d values are independent with variance 1: sums of w(|s|)^2 over coalitions."""
    w = [1.0 / (d * math.comb(d - 1, k)) for k in range(d)]  # of a coalition of k others
    own = 2.0 * math.fsum(math.comb(d - 1, k) * w[k] ** 2 for k in range(d))
    # Of two players both in, both out, or one of them in.
    alike = 2.0 * math.fsum(math.comb(d - 2, k) * w[k] ** 2 for k in range(d - 1)) if d > 1 else 0.0
    unlike = 2.0 * math.fsum(math.comb(d - 2, k) * w[k] * w[k + 1] for k in range(d - 1)) if d > 1 else 0.0
    return torch.full((d, d), alike - unlike, dtype=torch.float64).fill_diagonal_(own)


def _product_integrals(width: int, level: Level) -> Tensor:
    """Integrals over p of (p kappa(1,1) + (1-p) kappa(0,1))^a (p kappa(0,1) + (1-p) kappa(0,0))^b.

    Returns:
        float64 [width, width], entry (a, b) for a present and b absent other cells; a + b is width - 1 where used.
    """
    p, weight = _quadrature(width // 2 + 1)
    present = p * _exp(-level.tilt) + (1.0 - p) * level.decay
    absent = p * level.decay + (1.0 - p) * _exp(level.tilt)
    power = torch.arange(width, dtype=torch.float64)[:, None]
    return (present**power * weight) @ (absent**power).mT


@functools.cache
def _quadrature(points: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on (0, 1), exact for polynomials of degree 2 points - 1."""
    node, weight = np.polynomial.legendre.leggauss(points)
    return torch.from_numpy((node + 1.0) / 2.0), torch.from_numpy(weight / 2.0)


def _windows(d: int, grid: Grid | None, shape: Grid | None) -> Tensor | None:
    """Players of each window of a shape, int64 [W, cells]; None where the grid is too small or there is none."""
    if shape is None:
        return torch.arange(d)[None]
    if shape == (1, 1):
        return torch.arange(d)[:, None]
    if grid is None:
        return None
    cell = torch.arange(d).view(grid)
    found = [
        cell.unfold(0, height, 1).unfold(1, width, 1).reshape(-1, height * width)
        for height, width in sorted({shape, shape[::-1]})
        if height <= grid[0] and width <= grid[1]
    ]
    return torch.cat(found) if found else None


def _by_window(x: Tensor, windows: Tensor) -> Tensor:
    """[..., K, d] to [..., W, K, cells]."""
    return x[..., windows].transpose(-3, -2)


def _exp(x: float | Tensor) -> float | Tensor:
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def _log(x: float | Tensor) -> float | Tensor:
    return x.log() if isinstance(x, Tensor) else math.log(x)


# Fitted by `python -m bench game_prior` to 80 CIFAR-10 test images under a ConvNet-3 at 32 px and 16 photographs of
# clothing under a ResNet-18 at 96 px, each set weighing the same, so that phi from 17 to 128 evaluations has the least
# relative squared error (its mean, on a logarithmic scale). bench/results/estimators_* measure it on other images.
# Designs under a prior fitted to the ConvNet-3 alone err on 22 photographs under the ResNet-18 (16 of these games
# completed from 2,048 evaluations) half as much as antithetic permutations at 32 evaluations, a fifth as much at 64.
# A prior without the level of pairs, or with one of 2 x 3 cells, errs within 5% of this one at 32 evaluations and
# within a third elsewhere. Only ratios of share, equal and rest matter.
FITTED_GRID = Parameters(
    levels=(
        Level((1, 1), share=0.397, decay=0.475),
        Level((1, 2), share=8.84, decay=0.0523, tilt=-0.0789),
        Level((2, 2), share=1.31, decay=0.192, tilt=0.222),
        Level((3, 3), share=0.518, decay=0.412, tilt=0.121),
        Level(None, share=0.0835, decay=0.976, tilt=0.215),
    ),
    equal=39.8,
    rest=1e-4,
)
# The same fit where nothing is known of who is whose neighbour.
FITTED_EXCHANGEABLE = Parameters(
    levels=(Level((1, 1), share=0.116, decay=0.624), Level(None, share=0.597, decay=0.883, tilt=0.033)),
    equal=16.3,
    rest=1e-4,
)
