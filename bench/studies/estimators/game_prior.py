"""Fit the prior over games to real teachers and search the designs that ddfast keeps.

    python -m bench game_prior \
        --games "data=cifar10-jpeg.zip teacher=convnet3.safetensors skip=8 images=80" \
        --games "data=clothing10.zip teacher=resnet18.safetensors size=96 keys=keys.txt evaluations=2048"

Prints the parameters for `ddfast/attribution/estimators/game_prior.py` and the designs
for `ddfast/attribution/estimators/kept_designs.py`.

The fit minimises what the prior is for: the relative squared error of phi from a few coalitions. Designs are searched
under the parameters so far, others are drawn at random so that the fit cannot lean on one; then the parameters are
moved (L-BFGS) to lower the mean over sets of games and budgets of log(mean error); and so on a few times.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.studies.estimators.games import (
    PLAYERS,
    SIDE,
    Games,
    numbers,
    pick,
    pick_keys,
    sampled_games,
    whole_games,
)
from ddfast.attribution.estimators.design_search import (
    best_design,
    candidates,
    design,
    expected_error,
    extended,
    refined,
    search,
)
from ddfast.attribution.estimators.game_prior import GamePrior, Level, Parameters
from ddfast.attribution.stopping import ROUNDS
from ddfast.data.opening import open_source
from ddfast.models import load_teacher

GRID = (SIDE, SIDE)
SHAPES = ((1, 1), (1, 2), (2, 2), (3, 3), None)
BUDGETS = (17, 24, 32, 48, 64, 128)
_ROUNDS, _STEPS = 4, 20
_REFINED, _RANDOM = 1, 3  # designs of a budget in each round
_STARTS = {17: 24, 24: 24, 32: 24, 48: 16, 64: 12, 96: 4, 128: 3}  # of the designs that are kept, by budget
_HOLD = 1e-3  # how firmly a round holds the parameters near where it found them


def parameters_of(theta: Tensor, shapes: Sequence[tuple[int, int] | None]) -> Parameters:
    """Parameters from free numbers: logarithm of share, logit of decay and tilt a level, then equal and rest."""
    levels = []
    for shape, (share, decay, tilt) in zip(shapes, theta[:-2].view(-1, 3), strict=True):
        # A tilt of single cells adds nothing to a game: it only scales the constant.
        levels.append(Level(shape, share.exp(), decay.sigmoid(), tilt * (shape != (1, 1))))
    return Parameters(tuple(levels), theta[-2].exp(), theta[-1].exp())


def start_of(shapes: Sequence[tuple[int, int] | None]) -> Tensor:
    """Where the fit starts: a likelihood fit's rounded shares, no tilt."""
    shares = {(1, 1): 0.8, (1, 2): 8.0, (2, 2): 2.0, (3, 3): 0.4, None: 0.1}
    decays = {(1, 1): 0.4, (1, 2): 0.3, (2, 2): 0.3, (3, 3): 0.6, None: 0.97 if len(shapes) > 2 else 0.9}
    rows = [torch.tensor([shares[s], decays[s], 0.0]).double() for s in shapes]
    free = [torch.stack([row[0].log(), torch.logit(row[1]), row[2]]) for row in rows]
    return torch.cat([*free, torch.tensor([16.0, 1e-4]).double().log()])


def fit(
    sets: Sequence[Games], shapes: Sequence[tuple[int, int] | None], grid: tuple[int, int] | None
) -> Tensor:
    """Free numbers of the parameters with the least error on sets of games, each set weighing the same."""
    theta, exact = start_of(shapes), [games.phi for games in sets]
    for number in range(_ROUNDS):
        prior = GamePrior(PLAYERS, grid, _fixed(parameters_of(theta, shapes)))
        designs = {n: _designs(prior, n, number) for n in BUDGETS}
        values = {
            n: [torch.stack([games.of(s) for s in found]) for games in sets] for n, found in designs.items()
        }
        moving = theta.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([moving], lr=0.7, max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss(moving: Tensor = moving, held: Tensor = theta, designs=designs, values=values) -> Tensor:  # type: ignore[no-untyped-def]
            total = _HOLD * ((moving - held) ** 2).sum()
            prior = GamePrior(PLAYERS, grid, parameters_of(moving, shapes))
            for n, found in designs.items():
                projection = torch.stack([prior.projection(s) for s in found])
                for value, phi in zip(values[n], exact, strict=True):
                    error = ((value @ projection - phi) ** 2).sum(dim=-1) / (phi**2).sum(dim=-1)
                    total = total + error.mean().log() / (len(sets) * len(designs))
            return total

        def step(moving: Tensor = moving, optimizer=optimizer, loss=loss) -> Tensor:  # type: ignore[no-untyped-def]
            optimizer.zero_grad()
            now = loss()
            now.backward()
            return now

        optimizer.step(step)
        theta = moving.detach()
        print(f"round {number + 1}: mean log error {float(loss().detach()):.4f}", flush=True)
    return theta


def _fixed(parameters: Parameters) -> Parameters:
    """The same with plain numbers, rounded as they are written down."""

    def rounded(x: float | Tensor) -> float:
        return float(f"{float(x):.3g}")

    levels = (
        Level(each.shape, rounded(each.share), rounded(each.decay), rounded(each.tilt))
        for each in parameters.levels
    )
    return Parameters(tuple(levels), rounded(parameters.equal), rounded(parameters.rest))


def _designs(prior: GamePrior, n: int, number: int) -> list[Tensor]:
    found = []
    for i in range(_REFINED + _RANDOM):
        chosen = search(prior, candidates(PLAYERS, max(100, 2 * n), 100 * number + i), n, sweeps=0)
        found.append(refined(prior, chosen) if i < _REFINED and n <= 64 else chosen)
    return found


def kept_design(prior: GamePrior, n: int) -> Tensor:
    """The best of many starts."""
    found = [best_design(prior, n)]
    for seed in range(_STARTS[n]):
        chosen = search(prior, candidates(PLAYERS, max(60 + 60 * (seed % 4), 2 * n), 1000 + seed), n)
        found.append(refined(prior, chosen))
    return min(found, key=lambda each: expected_error(prior, each))


def kept_rounds(prior: GamePrior) -> Tensor:
    """The design of the first round, each further one extended and then refined without touching those before."""
    sizes = [share * PLAYERS for share in ROUNDS]
    coalitions, _ = design(PLAYERS, sizes[0], GRID)
    for size in sizes[1:]:
        coalitions = refined(prior, extended(prior, coalitions, size), fixed=len(coalitions))
        print(f"# round of {size}: {expected_error(prior, coalitions):.4f}", flush=True)
    return coalitions


def read_games(text: str, work: Path) -> Games:
    """One `--games` argument."""
    given = dict(word.split("=", 1) for word in text.split())
    teacher, source = load_teacher(given["teacher"]), open_source(given["data"], "test")
    size = int(given.get("size", teacher.image_size))
    if "keys" in given:
        samples = pick_keys(source, Path(given["keys"]))
    else:
        samples = pick(source, int(given["images"]), int(given.get("skip", 0)))
    precision = given.get("precision", "float32")
    if "evaluations" in given:
        return sampled_games(teacher, source, samples, size, precision, work, int(given["evaluations"]))
    return whole_games(teacher, source, samples, size, precision, work)


def main(argv: Sequence[str] | None = None) -> int:
    """Fit and search."""
    parser = argparse.ArgumentParser(
        prog="python -m bench game_prior",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--games",
        action="append",
        required=True,
        help="data= teacher= [size= skip= images= keys= evaluations= precision=]",
    )
    parser.add_argument("--work", type=Path, default=Path("runs/estimators"), help="games are kept here")
    parser.add_argument(
        "--keep-parameters", action="store_true", help="search designs under the present prior"
    )
    arguments = parser.parse_args(argv)
    if not arguments.keep_parameters:
        sets = [read_games(text, arguments.work) for text in arguments.games]
        for name, shapes, grid in (
            ("FITTED_EXCHANGEABLE", ((1, 1), None), None),
            ("FITTED_GRID", SHAPES, GRID),
        ):
            parameters = _fixed(parameters_of(fit(sets, shapes, grid), shapes))
            print(f"{name} = {parameters}")
        prior = GamePrior(PLAYERS, GRID, parameters)
    else:
        prior = GamePrior(PLAYERS, GRID)
    for n in _STARTS:
        found = kept_design(prior, n)
        print(f'{n}: "{_digits(found)}",  # {expected_error(prior, found):.4f}', flush=True)
    print(f'rounds: "{_digits(kept_rounds(prior))}"')
    return 0


def _digits(coalitions: Tensor) -> str:
    return "".join(f"{number:04x}" for number in numbers(coalitions).tolist())


if __name__ == "__main__":
    raise SystemExit(main())
