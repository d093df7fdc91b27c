"""Shapley estimators against exact values: error and crop agreement at each budget, on the games of real images.

    python -m bench estimators --data cifar10-jpeg.zip --teacher teacher.safetensors --images 80 \
        --out bench/results/estimators_cifar10_convnet3

Exact values come from the whole game of each image, 65,536 coalitions (`bench.studies.estimators.games`), kept in
`--work`. Every estimator then meets the same games. Measures, means over images and seeds: the squared error of phi
over the square of the exact one; how often the argmax of the map pooled 2 x 2, InfoUtil's crop, is the exact map's; and
what the crop loses where it is another, in shares of the distance between the best and the worst window of the exact
map, since some images have two windows as good as each other. Writes `<out>.csv`, `<out>.md` and `<out>.png`.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import facts
from bench.studies.arguments import told
from bench.studies.estimators.games import SIDE, Games, pick, pick_keys, whole_games
from ddfast.attribution.estimators.plans import make_plan
from ddfast.attribution.stopping import Rounds
from ddfast.data.opening import open_source
from ddfast.files import atomic_path, atomic_write_text, make_folder
from ddfast.models import load_teacher

BUDGETS = (17, 24, 32, 48, 62, 64, 96, 122, 128, 256, 512)
# In the order of the table: what people use, what is published, ours.
ESTIMATORS = {
    "kernel": "Captum's sampling",
    "paired": "paired",
    "enumerated": "enumerated sizes",
    "leverage": "leverage",
    "ramc": "regression-adjusted",
    "permutation": "antithetic permutations",
    "gp": "Gaussian process",
    "designed": "Gaussian process, designed",
}
_FEW = 30  # images
CONFIDENCES = (0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Result:
    """One estimator at one budget; `evaluations` are what it took of the budget."""

    estimator: str
    budget: int
    evaluations: float
    error: float
    error_median: float
    agreement: float
    lost: float


def pooled(phi: Tensor) -> Tensor:
    """Sums over the 2 x 2 windows of maps [..., 16], [..., 9]."""
    cells = phi.unflatten(-1, (SIDE, SIDE))
    rows = cells[..., :-1, :] + cells[..., 1:, :]
    return (rows[..., :-1] + rows[..., 1:]).flatten(-2)


def crop(phi: Tensor) -> Tensor:
    """Number of the best 2 x 2 window of maps [..., 16], int64 [...]."""
    return pooled(phi).argmax(dim=-1)


def measure(name: str, budget: int, games: Games, exact: Tensor, seeds: int) -> Result | None:
    """One estimator at one budget, or None where it does not take so few evaluations."""
    try:
        plan = make_plan(name, (SIDE, SIDE), budget, torch.arange(seeds))
    except ValueError:
        return None
    coalitions, projection = plan.rows(0, plan.size)
    found = torch.stack([games.of(s) @ p for s, p in zip(coalitions, projection, strict=True)])
    return _result(name, budget, plan.size, found, exact)


def measure_stopping(confidence: float, games: Games, exact: Tensor, seeds: int) -> Result:
    """`settled_shapley` on the tables: rounds of evaluations until the crop is settled."""
    found, evaluations = [], []
    for seed in range(seeds):
        rounds = Rounds(SIDE * SIDE, (SIDE, SIDE))
        phi = torch.zeros_like(exact)
        used = torch.zeros(len(exact), dtype=torch.int64)
        relabelled = rounds.relabelling(torch.tensor([seed]))[0]
        values = games.of(rounds.coalitions[:, relabelled])
        open_ = torch.ones(len(exact), dtype=torch.bool)
        for number, size in enumerate(rounds.sizes):
            estimate, settled = rounds.estimate(number, values[open_, :size], confidence)
            phi[open_], used[open_] = estimate[:, relabelled], size
            open_[open_.clone()] = ~settled
        found.append(phi)
        evaluations.append(used.double().mean())
    mean = float(torch.stack(evaluations).mean())
    return _result(f"settled {confidence:g}", rounds.sizes[-1], mean, torch.stack(found), exact)


def _result(name: str, budget: int, evaluations: float, found: Tensor, exact: Tensor) -> Result:
    """Measures of phi [seeds, N, 16] against the exact [N, 16]."""
    error = ((found - exact) ** 2).sum(dim=-1) / (exact**2).sum(dim=-1)
    windows = pooled(exact)
    best = windows.amax(dim=-1)
    chosen = windows.expand(len(found), -1, -1).gather(-1, crop(found)[..., None])[..., 0]
    lost = (best - chosen) / (best - windows.amin(dim=-1))
    agreement = (crop(found) == crop(exact)).double().mean()
    return Result(
        name,
        budget,
        evaluations,
        float(error.mean()),
        float(error.median()),
        float(agreement),
        float(lost.mean()),
    )


# Output
# ---------------------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """Budgets down, estimators across: error / agreement / percent lost, the least error of each budget in bold."""
    names = [name for name in ESTIMATORS if any(result.estimator == name for result in results)]
    lines = [
        "| evaluations | " + " | ".join(f"`{name}`" for name in names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for budget in sorted({result.budget for result in results if result.estimator in ESTIMATORS}):
        row = {result.estimator: result for result in results if result.budget == budget}
        least = min(result.error for name, result in row.items() if name in ESTIMATORS)
        cells = []
        for name in names:
            if name not in row:
                cells.append("–")
                continue
            mark = "**" if row[name].error == least else ""
            lost = 100 * row[name].lost
            cells.append(f"{mark}{row[name].error:.3g}{mark} / {row[name].agreement:.3f} / {lost:.1f}")
        lines.append(f"| {budget} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def stopping_table(results: Sequence[Result]) -> str:
    """What stopping saves: its mean evaluations, and the budget at which `designed` agrees as often."""
    lines = [
        "| stop at confidence | evaluations, mean | agreement | error | `designed` agrees as often at | saved |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    fixed = sorted((result for result in results if result.estimator == "designed"), key=lambda r: r.budget)
    for result in results:
        if not result.estimator.startswith("settled"):
            continue
        needed = budget_of_agreement(fixed, result.agreement)
        saved = "–" if needed is None else f"{100 * (1 - result.evaluations / needed):.0f}%"
        at = "more than 512" if needed is None else f"{needed:.0f}"
        share = result.estimator.split()[1]
        lines.append(
            f"| {share} | {result.evaluations:.1f} | {result.agreement:.3f} | {result.error:.3g} | {at} | {saved} |"
        )
    return "\n".join(lines) + "\n"


def budget_of_agreement(fixed: Sequence[Result], agreement: float) -> float | None:
    """Evaluations at which an estimator of ascending budgets first agrees so often, interpolated between budgets."""
    for before, after in zip([None, *fixed[:-1]], fixed, strict=True):
        if after.agreement >= agreement:
            if before is None:
                return float(after.budget)
            share = (agreement - before.agreement) / (after.agreement - before.agreement)
            return before.budget + share * (after.budget - before.budget)
    return None


def plot(results: Sequence[Result], title: str, path: Path) -> None:
    """Error and disagreement of the crop against evaluations, both axes logarithmic, every line named at its end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {
        "kernel": "#9a9a9a",
        "paired": "#c3a06b",
        "enumerated": "#6fa287",
        "leverage": "#8b7fb8",
        "ramc": "#b88a9c",
        "permutation": "#2f6fb0",
        "gp": "#e08a2e",
        "designed": "#c0232c",
    }
    figure, panels = pyplot.subplots(1, 2, figsize=(12.0, 5.0), layout="constrained")
    for panel, what in zip(panels, ("error", "agreement"), strict=True):
        ends = []
        for name, label in ESTIMATORS.items():
            # The budgets of whole pairs of orders would only crowd the lines of the others.
            drawn = [
                r
                for r in results
                if r.estimator == name and (name == "permutation" or r.budget not in (62, 122))
            ]
            points = sorted({r.evaluations: r for r in drawn}.values(), key=lambda r: r.evaluations)
            if not points:
                continue
            x = [r.evaluations for r in points]
            y = [r.error if what == "error" else 100 * r.agreement for r in points]
            ours = name == "designed"
            panel.plot(
                x,
                y,
                color=colours[name],
                linewidth=2.4 if ours else 1.4,
                marker="o",
                markersize=4.5 if ours else 3,
                zorder=3 if ours else 2,
            )
            ends.append((y[-1], label, colours[name], ours))
        if what == "agreement":
            stops = [r for r in results if r.estimator.startswith("settled")]
            panel.plot(
                [r.evaluations for r in stops],
                [100 * r.agreement for r in stops],
                color="#c0232c",
                linestyle=(0, (2, 1.5)),
                marker="D",
                markersize=4,
                linewidth=1.4,
                zorder=4,
            )
            if stops:
                panel.annotate(
                    "stopping early",
                    (stops[0].evaluations, 100 * stops[0].agreement),
                    xytext=(-5, 6),
                    textcoords="offset points",
                    ha="right",
                    fontsize=9,
                    color="#c0232c",
                )
        panel.set_xscale("log", base=2)
        ticks = [16, 32, 64, 128, 256, 512]
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_xlim(15, 560)
        panel.set_xlabel("model evaluations an image")
        panel.grid(True, color="#e6e6e6", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        if what == "error":
            panel.set_yscale("log")
            panel.set_ylim(bottom=5e-5, top=4)
            panel.set_title("relative squared error of phi", loc="left", fontsize=11)
        else:
            panel.set_ylim(30, 101)
            panel.set_title("crop agrees with the exact map's, %", loc="left", fontsize=11)
        _name_ends(panel, ends, log=what == "error")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", color="#444444")
    with atomic_path(path) as unfinished:
        figure.savefig(unfinished, dpi=200, format="png")
    pyplot.close(figure)


def _name_ends(panel: object, ends: list[tuple[float, str, str, bool]], *, log: bool) -> None:
    """Labels behind the lines' ends, pushed apart where they would touch."""
    transform = panel.transData  # type: ignore[attr-defined]
    gap = 13.0
    panel.figure.canvas.draw()  # type: ignore[attr-defined]
    placed: list[float] = []
    heights = sorted(((transform.transform((512, y))[1], y, *rest) for y, *rest in ends), reverse=True)
    for height, y, label, colour, ours in heights:
        at = min([height, *(other - gap * panel.figure.dpi / 72 for other in placed[-1:])])  # type: ignore[attr-defined]
        placed.append(at)
        panel.annotate(  # type: ignore[attr-defined]
            label,
            (512, y),
            xytext=(10, (at - height) * 72 / panel.figure.dpi),  # type: ignore[attr-defined]
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold" if ours else "normal",
            color=colour,
            annotation_clip=False,
        )


def write(
    results: Sequence[Result], games: Games, arguments: argparse.Namespace, argv: Sequence[str] = ()
) -> None:
    """Write `<out>.csv`, `<out>.md` and `<out>.png`."""
    teacher = load_teacher(arguments.teacher)
    revision, _ = facts.commit()
    size = arguments.image_size or teacher.image_size
    said = [
        f"{len(games.keys)} test images of {Path(arguments.data).name} at {size} px, {arguments.seeds} seeds",
        f"teacher {teacher.arch}, test top-1 {teacher.top1:.2f}; logit of the true class, baseline 0, 4 x 4 cells",
        f"values in {arguments.precision}; exact values from all 65,536 coalitions",
        f"torch {torch.__version__}, commit {revision}",
        "near 32 evaluations the 15 pairs of `paired` and `leverage` hardly determine 16 values, hence their peak",
    ]
    if len(games.keys) < _FEW:
        said.append("agreement moves in steps of an image here; what the crop loses says more")
    make_folder(arguments.out.parent)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            *("estimator", "budget", "evaluations", "error_mean", "error_median", "agreement", "crop_loss"),
            *("images", "seeds"),
        ]
    )
    for r in results:
        numbers = (f"{value:.6g}" for value in (r.evaluations, r.error, r.error_median, r.agreement, r.lost))
        writer.writerow([r.estimator, r.budget, *numbers, len(games.keys), arguments.seeds])
    atomic_write_text(arguments.out.with_suffix(".csv"), text.getvalue())
    page = (
        "Relative squared error of phi / share of images whose 2 x 2 crop is that of the exact map / what the crop "
        "loses of the distance between the exact map's best and worst window, in percent; means over images and seeds."
        f"\n\n{table(results)}\nEvaluating in rounds until the crop is settled (`settled_shapley`):\n\n"
        f"{stopping_table(results)}\n" + "".join(f"- {line}\n" for line in said)
    )
    page += f"\n{told('estimators', argv, 'bench')}"
    if arguments.keys:
        page += "\nImages:\n" + "".join(f"- {key}\n" for key in games.keys)
    atomic_write_text(arguments.out.with_suffix(".md"), page)
    shown = f"{len(games.keys)} test images of {Path(arguments.data).stem}, 4 x 4 cells"
    title = f"Shapley estimators, {teacher.arch} at {size} px, {shown}"
    plot(results, title, arguments.out.with_suffix(".png"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m bench estimators",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="as for ddfast distill; the test split is used")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--images", type=int, default=80, help="the classes in turn (default 80)")
    parser.add_argument(
        "--keys", type=Path, default=None, help="file with the images' keys, one a line, instead"
    )
    parser.add_argument("--image-size", type=int, default=None, help="px; default the teacher's")
    parser.add_argument("--seeds", type=int, default=16, help="coalition streams (default 16)")
    parser.add_argument("--precision", default="float32", choices=("float32", "auto"))
    parser.add_argument("--work", type=Path, default=Path("runs/estimators"), help="games are kept here")
    parser.add_argument("--out", type=Path, required=True, help="results, without ending")
    arguments = parser.parse_args(argv)
    teacher = load_teacher(arguments.teacher)
    source = open_source(arguments.data, "test")
    samples = pick_keys(source, arguments.keys) if arguments.keys else pick(source, arguments.images)
    size = arguments.image_size or teacher.image_size
    games = whole_games(teacher, source, samples, size, arguments.precision, arguments.work)
    exact = games.phi
    found = [
        measure(name, budget, games, exact, arguments.seeds) for name in ESTIMATORS for budget in BUDGETS
    ]
    results = [result for result in found if result is not None]
    results += [measure_stopping(each, games, exact, arguments.seeds) for each in CONFIDENCES]
    write(results, games, arguments, sys.argv[1:] if argv is None else argv)
    print(table(results))
    print(stopping_table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
