"""Speed entries of the Shapley engine: against Captum, against materialised masks, against direct enumeration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import ddfast
from bench.speed.measuring import fastest
from bench.speed.registry import (
    Check,
    Contender,
    Contest,
    GateFailed,
    Measurable,
    Settings,
    Target,
    relative_error,
    require,
    speed_entry,
)
from bench.speed.subjects import Subject, subject
from ddfast.attribution.estimators.plans import make_plan

GRID = 4
PLAYERS = GRID * GRID
ESTIMATOR = "designed"  # the least error at every budget (bench/results/estimators_*.md)
CAPTUM_SAMPLES = 256
WITHIN = 1.25  # of Captum's mean error
BUDGETS = (8, 12, 17, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256)


def player_map(rows: int, cols: int, height: int, width: int) -> Tensor:
    """Player of every pixel, int64 [height, width]: cells of an even grid, along its rows."""
    row = ((torch.arange(height) + 1) * rows - 1) // height
    col = ((torch.arange(width) + 1) * cols - 1) // width
    return row[:, None] * cols + col


def error(phi: Tensor, truth: Tensor) -> float:
    """Mean over images of ||phi - truth||^2 / ||truth||^2."""
    difference = (phi.double().cpu() - truth).square().sum(1)
    return float((difference / truth.square().sum(1)).mean())


# Time to Captum's error
# -----------------------------------------------------------------------------------------------------


@speed_entry(
    "captum",
    what=f"time to Captum's error at {CAPTUM_SAMPLES} samples, ResNet-18, 224 px, 4x4 grid",
    minutes=5,
    targets={
        "cpu": {"float32": Target(15.0), "auto": Target(25.0)},
        "cuda": {"float32": Target(200.0), "auto": Target(200.0)},
    },
)
def captum_error(settings: Settings) -> Iterator[Measurable]:
    """The best estimator at the smallest budget whose mean error is within a quarter of Captum's.

    Errors are taken with a stream of coalitions an image; in a timed call one stream serves all images, as by default.
    The truth is the mean of two independent and unbiased estimates with many evaluations, whose difference says how far
    it is from the exact values: a gate holds that to a tenth of Captum's error.
    """
    require("captum")
    images = settings.size(6, quick=2, gpu=16)
    found = subject(settings, images, settings.size(224, quick=32, gpu=224))
    explain = partial(_ours, found)
    evaluations = settings.size(1024, quick=192, gpu=4096)
    halves = [
        explain("float32", evaluations, 1000 + half, estimator="permutation").double().cpu()
        for half in range(2)
    ]
    truth = (halves[0] + halves[1]) / 2
    doubt = float(((halves[0] - halves[1]).square().sum(1) / 4 / truth.square().sum(1)).mean())

    samples = settings.size(CAPTUM_SAMPLES, quick=32, gpu=CAPTUM_SAMPLES)
    batch = _best_captum_batch(settings, found)
    captum_phi = torch.cat([_captum(found, image, samples, batch) for image in range(images)])
    captum_error = error(captum_phi, truth)

    contenders, checks = [], [Check("error of the truth itself", doubt, captum_error / 10)]
    budgets = {}
    for precision in settings.precisions():
        ours_at = partial(explain, precision, estimator=ESTIMATOR)
        budget, ours = _least_budget(ours_at, truth, WITHIN * captum_error)
        budgets[precision] = budget
        checks.append(Check(f"{precision} error at {budget} evaluations", ours, WITHIN * captum_error))
        run = partial(ours_at, budget, 0, one_stream=True)
        run()  # a long contest does not warm up
        contenders.append(Contender(precision, run, work=images))
    turn = iter(range(10**9))
    told = ", ".join(f"{budget} at {precision}" for precision, budget in budgets.items())
    yield Contest(
        f"Captum's error at {samples}, {found.name}",
        ours=contenders,
        peer=Contender(
            f"Captum KernelShap, {batch} a forward pass",
            lambda: _captum(found, next(turn) % images, samples, batch),
            package="captum",
        ),
        gate=lambda: checks,
        unit="images",
        rounds=5,
        long=True,
        note=f"evaluations an image: {samples} for Captum, {told} by `{ESTIMATOR}`; "
        f"Captum's error {captum_error:.3g}, {images} images",
    )


def _ours(
    found: Subject, precision: str, evaluations: int, seed: int, one_stream: bool = False, *, estimator: str
) -> Tensor:
    """phi [N, 16] of all images, each under coalitions of its own, or one stream for all."""
    seeds = seed * len(found.images) + torch.arange(len(found.images))
    return ddfast.shapley(
        found.model,
        found.images,
        found.labels,
        grid=GRID,
        n_samples=evaluations,
        precision=precision,
        seed=seed if one_stream else seeds,
        mean=found.mean,
        std=found.std,
        estimator=estimator,
    )


def _least_budget(explain: Callable[[int, int], Tensor], truth: Tensor, allowed: float) -> tuple[int, float]:
    """The smallest budget whose mean error over two seeds is allowed, and that error.

    Raises:
        GateFailed: no budget reaches it.
    """
    found = float("inf")
    for budget in BUDGETS:
        try:
            found = sum(error(explain(budget, seed), truth) for seed in (1, 2)) / 2
        except ValueError:  # the estimator asks for more
            continue
        if found <= allowed:
            return budget, found
    raise GateFailed(
        f"no budget up to {BUDGETS[-1]} evaluations reaches an error of {allowed:.3g}: the last was {found:.3g}"
    )


def _captum(found: Subject, image: int, samples: int, batch: int) -> Tensor:
    """phi [1, 16] of one image by Captum's KernelShap."""
    from captum.attr import KernelShap

    pixels = found.normalised(found.images[image : image + 1])
    height, width = pixels.shape[-2:]
    players = player_map(GRID, GRID, height, width).to(pixels.device)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(image)
        attributions = KernelShap(found.model).attribute(
            pixels,
            baselines=0.0,
            target=int(found.labels[image]),
            feature_mask=players[None, None],
            n_samples=samples,
            perturbations_per_eval=batch,
        )
    phi = attributions.new_zeros(PLAYERS)
    phi[players.flatten()] = attributions[0, 0].flatten()  # every pixel of a cell holds the cell's value
    return phi[None]


def _best_captum_batch(settings: Settings, found: Subject) -> int:
    """The `perturbations_per_eval` with which Captum is fastest here."""
    candidates = settings.size((1, 4, 16, 64), quick=(32,), gpu=(16, 64, 128, 256))
    samples = settings.size(32, quick=8, gpu=CAPTUM_SAMPLES)
    runs = {str(batch): partial(_captum, found, 0, samples, batch) for batch in candidates}
    return int(fastest(runs, settings.device)[0])


# Evaluations a second
# -----------------------------------------------------------------------------------------------------


@speed_entry(
    "masked_forward",
    what="masked ResNet-18 evaluations a second at 64 coalitions, against eager PyTorch on materialised masks",
    minutes=1,
    targets={
        "cpu": {"float32": Target(3.0), "auto": Target(5.0)},
        "cuda": {"float32": Target(4.0), "auto": Target(4.0, rate=100_000)},
    },
)
def masked_forward(settings: Settings) -> Iterator[Measurable]:
    """The same coalitions through the same network on both sides, down to the same phi.

    `permutation` spends 62 of the 64 evaluations asked for. Every image has coalitions of its own; both sides count
    the empty one for every image, although ddfast evaluates it once for all of them.
    """
    images = settings.size(4, quick=2, gpu=256)
    found = subject(settings, images, settings.size(224, quick=32, gpu=224))
    seeds = torch.arange(images)
    plan = make_plan("permutation", PLAYERS, 64, seeds)
    coalitions, projection = (part.to(settings.device) for part in plan.rows(0, plan.size))
    evaluations = images * plan.size

    def ours(precision: str) -> Tensor:
        return ddfast.shapley(
            found.model,
            found.images,
            found.labels,
            grid=GRID,
            n_samples=64,
            estimator="permutation",
            precision=precision,
            seed=seeds,
            mean=found.mean,
            std=found.std,
        )

    size = found.images.shape[-1]
    players = player_map(GRID, GRID, size, size).to(settings.device)

    @torch.no_grad()
    def plain(batch: int) -> Tensor:
        pixels = found.normalised()
        rows = []
        for image, label in zip(range(images), found.labels.tolist(), strict=True):
            values = [
                found.model(torch.where(part[:, players][:, None], pixels[image], 0.0))[:, label]
                for part in coalitions[image].split(batch)
            ]
            rows.append(torch.cat(values).double() @ projection[image])
        return torch.stack(rows).float()

    batches = settings.size((8, 31, 62), quick=(62,), gpu=(31, 62))
    batch = int(fastest({str(size): partial(plain, size) for size in batches}, settings.device)[0])

    def gate() -> Iterator[Check]:
        wanted = plain(batch)
        for precision in settings.precisions():
            allowed = 1e-4 if precision == "float32" else 0.1
            yield Check(f"phi at {precision}", relative_error(ours(precision), wanted), allowed)

    yield Contest(
        f"64 coalitions, {found.name}",
        ours=[Contender(name, partial(ours, name), work=evaluations) for name in settings.precisions()],
        peer=Contender("eager", partial(plain, batch), work=evaluations),
        gate=gate,
        unit="evaluations",
        rounds=5,
        long=True,
        note=f"{images} images a call, {plan.size} coalitions each; eager at its best batch, {batch} masked images",
    )


# Exact values
# -----------------------------------------------------------------------------------------------------


@speed_entry(
    "exact",
    what="exact Shapley values against direct enumeration in eager PyTorch",
    minutes=4,
    targets={"cpu": {"float32": Target(2.5)}, "cuda": {"float32": Target(5.0)}},
)
def exact(settings: Settings) -> Iterator[Measurable]:
    """All coalitions of ConvNet-3 at 32 px (65,536), and of ResNet-18 at 224 px (4,096 of a 4x3 grid on the CPU)."""
    small = _small_net(settings)
    grid = settings.size((4, 4), quick=(2, 3), gpu=(4, 4))
    yield _enumeration(settings, small, grid, checked=grid, timed=2 ** math.prod(grid))
    large = subject(settings, 1, settings.size(224, quick=32, gpu=224))
    grid = settings.size((4, 3), quick=(2, 2), gpu=(4, 4))
    checked = settings.size((4, 2), quick=(2, 2), gpu=(4, 3))
    timed = settings.size(1024, quick=16, gpu=8192)
    yield _enumeration(settings, large, grid, checked=checked, timed=timed)


def _small_net(settings: Settings) -> Subject:
    from bench.speed.subjects import IMAGENET_MEAN, IMAGENET_STD, rendered

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ddfast.create_model("convnet3", num_classes=10, image_size=32).eval()
    images = rendered(1, 32)
    found = Subject("ConvNet-3", model, images, torch.tensor([3]), IMAGENET_MEAN, IMAGENET_STD)
    return found.to(settings.device)


def _enumeration(
    settings: Settings,
    found: Subject,
    grid: tuple[int, int],
    *,
    checked: tuple[int, int],
    timed: int,
) -> Contest:
    """ddfast on all coalitions of `grid`, eager PyTorch on the first `timed` of them; phi is compared on `checked`."""
    count = 2 ** math.prod(grid)
    case = f"{found.name}, {found.images.shape[-1]} px"

    def ours(grid: tuple[int, int]) -> Tensor:
        return ddfast.shapley(
            found.model,
            found.images,
            found.labels,
            grid=grid,
            estimator="exact",
            mean=found.mean,
            std=found.std,
        )

    batches = settings.size((64, 256), quick=(16,), gpu=(256, 1024))
    trial = min(timed, 2 * max(batches))
    runs = {str(batch): partial(_values, found, grid, batch, trial) for batch in batches}
    batch = int(fastest(runs, settings.device)[0])

    def gate() -> Iterator[Check]:
        values = _values(found, checked, batch, 2 ** math.prod(checked))
        wanted = shapley_of_values(values, math.prod(checked))
        yield Check("phi of a {}x{} grid".format(*checked), relative_error(ours(checked)[0], wanted), 1e-4)

    part = "" if timed == count else f" and timed on {timed:,} of them, as each costs it the same"
    return Contest(
        f"{case}, {count:,} coalitions",
        ours=[Contender("float32", partial(ours, grid), work=count)],
        peer=Contender("eager", partial(_values, found, grid, batch, timed), work=timed),
        gate=gate,
        unit="coalitions",
        rounds=3,
        long=True,
        note=f"{case}: eager at its best batch, {batch} masked images{part}",
    )


@torch.no_grad()
def _values(found: Subject, grid: tuple[int, int], batch: int, count: int) -> Tensor:
    """v(s) of the first `count` coalitions by direct evaluation; bit i of s is player i."""
    pixels = found.normalised()
    players = player_map(*grid, *pixels.shape[-2:]).to(pixels.device)
    label = int(found.labels[0])
    values = []
    for first in range(0, count, batch):
        code = torch.arange(first, min(first + batch, count), device=pixels.device)
        present = (code[:, None, None, None] >> players[None, None]) & 1 == 1
        values.append(found.model(torch.where(present, pixels, 0.0))[:, label])
    return torch.cat(values)


def shapley_of_values(values: Tensor, players: int) -> Tensor:
    """phi float64 [players] of a game given as v(s) for every code s, by the definition (InfoUtil, Eq. 4)."""
    values = values.double()
    code = torch.arange(len(values), device=values.device)
    size = sum(((code >> i) & 1 for i in range(players)), torch.zeros_like(code))
    weight = torch.tensor(
        [1 / (players * math.comb(players - 1, s)) for s in range(players)], dtype=torch.float64
    ).to(values.device)
    phi = []
    for i in range(players):
        without = code[(code >> i) & 1 == 0]
        phi.append((weight[size[without]] * (values[without | 1 << i] - values[without])).sum())
    return torch.stack(phi)
