"""DD-Ranking's label-robust and augmentation-robust scores of methods, from students trained here.

    python -m bench dd_ranking --data cifar10-jpeg.zip --teacher teacher.safetensors --arch convnet3 --ipc 10 \
        --arm infoutil --arm rded --arm herding --seeds 5 --out bench/results/dd_ranking

For each arm and seed it trains six students: on the arm's set and on random images drawn with that seed, each with hard
labels, with soft labels, and with soft labels but without augmentation. Sets and students are kept in `--work`, which
all studies share. Writes `<out>.json`, `<out>.md` and, in the folder `<out>`, the two CSV files of DD-Ranking's
evaluators for each arm.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.studies.arms import Arm, Setup, Training, at_ipc, by_ipc, teacher_at, train_students
from bench.studies.compare import integers, made_with, teacher_fact
from ddfast.errors import DDFastError, UsageError
from ddfast.files import atomic_write_text, make_folder
from ddfast.training.dd_ranking import RECIPES, WEIGHT, Accuracies, write_scores


def measure(arm: Arm, ipc: int, arguments: argparse.Namespace) -> tuple[Accuracies, list[dict[str, Any]]]:
    """Accuracies of one arm at one IPC, and the results of all students behind them."""
    setup = Setup(
        arguments.data,
        arguments.teacher,
        arguments.work,
        arguments.factor,
        arguments.images_per_class,
        arguments.precision,
    )
    seeds = range(at_ipc(arguments.seeds, ipc) or 0)
    if not seeds:
        raise UsageError(f"--seeds must be at least 1 at every IPC, got none at IPC {ipc}")
    results: list[dict[str, Any]] = []

    def accuracies(recipe: str, seed: int, of: Arm) -> float:
        training = Training(
            arguments.arch,
            arguments.width,
            arguments.labels,
            protocol=RECIPES[recipe],
            epochs=at_ipc(arguments.epochs, ipc),
        )
        results.append(train_students(of, ipc, setup, training, [seed]))
        return float(results[-1]["mean"])

    found: dict[str, dict[str, list[float]]] = {"distilled": {}, "random": {}}
    for recipe in RECIPES:
        found["distilled"][recipe] = [accuracies(recipe, seed, arm) for seed in seeds]
        drawn = [Arm(f"random, seed {seed}", "random", _shared(arm, seed)) for seed in seeds]
        found["random"][recipe] = [accuracies(recipe, seed, drawn[seed]) for seed in seeds]
    return Accuracies(_full_accuracy(arguments), **found), results


def _shared(arm: Arm, seed: int) -> dict[str, Any]:
    """Settings of the random images beside an arm: its own of the pool and the tiles, and their seed."""
    return {
        **{key: value for key, value in arm.settings.items() if key in ("factor", "images_per_class")},
        "seed": seed,
    }


def _full_accuracy(arguments: argparse.Namespace) -> float:
    """Accuracy of the whole data set with hard labels: given, or the teacher's where it is the students' network.

    Raises:
        UsageError: neither is there.
    """
    if arguments.full_accuracy is not None:
        return float(arguments.full_accuracy)
    teacher = teacher_at(arguments.teacher)
    wanted = {} if arguments.width is None else {"width": arguments.width}
    if teacher.arch != arguments.arch or teacher.arch_options != wanted or teacher.top1 is None:
        raise UsageError(
            f"the teacher says nothing of {arguments.arch} on the whole data set: give --full-accuracy in percent"
        )
    return teacher.top1


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Scores in Markdown, an arm and IPC a row."""
    lines = [
        "| method | IPC | HLR | IOR | LRS | IOR, hard | LRS, hard | gain with aug. | without | ARS |",
        "| --- |" + " --- |" * 9,
    ]
    for row in rows:
        cells = [
            _cell(row["soft"], "hard_label_recovery", 1),
            _cell(row["soft"], "improvement_over_random", 1),
            _cell(row["soft"], "label_robust_score", 3),
            _cell(row["hard"], "improvement_over_random", 1),
            _cell(row["hard"], "label_robust_score", 3),
            _cell(row["augmentation"], "with_aug_scores", 1),
            _cell(row["augmentation"], "without_aug_scores", 1),
            _cell(row["augmentation"], "augmentation_robust_score", 3),
        ]
        lines.append(f"| {row['arm']} | {row['ipc']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(scores: dict[str, float], name: str, digits: int) -> str:
    return f"{scores[f'{name}_mean']:.{digits}f} ± {scores[f'{name}_std']:.{digits}f}"


def write(
    rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], arguments: argparse.Namespace
) -> None:
    """Write `<out>.json` and `<out>.md`."""
    make_folder(arguments.out.parent)
    first = results[0]
    of_ipc = {row["ipc"]: (row["epochs"], len(row["distilled"]["hard"])) for row in rows}
    budget = "; ".join(
        f"IPC {ipc}: {epochs} epochs, {seeds} seeds" for ipc, (epochs, seeds) in of_ipc.items()
    )
    facts = [
        f"data {Path(arguments.data).name}, {arguments.images_per_class} images a class scored",
        f"teacher {teacher_fact(arguments.teacher)}, soft labels {arguments.labels}",
        f"student {first['arch']}, protocols {', '.join(RECIPES.values())}; {budget}",
        f"whole data set with hard labels: {rows[0]['full_hard']:.2f}",
        made_with(results, arguments.precision),
    ]
    document = {"facts": facts, "recipes": RECIPES, "scores": rows}
    atomic_write_text(arguments.out.with_suffix(".json"), json.dumps(document, indent=1) + "\n")
    heading = (
        "DD-Ranking's scores (arXiv 2505.13300), mean ± deviation over runs. HLR: points lost against the whole data\n"
        "set, with hard labels. IOR: points gained over random images with the same labels. LRS, ARS: in [0, 1],\n"
        f"weight {arguments.weight:g}. Where gains and losses cancel, a score is 0.269.\n"
    )
    lines = "".join(f"- {fact}\n" for fact in facts)
    atomic_write_text(arguments.out.with_suffix(".md"), f"{heading}\n{table(rows)}\n{lines}")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, score and write. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="bench dd_ranking", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--width", type=int, default=None, help="channels of a ConvNet student's layers")
    parser.add_argument("--arm", action="append", required=True, help="as for bench.studies.compare")
    parser.add_argument("--ipc", type=integers, default=[10])
    parser.add_argument("--seeds", type=by_ipc, default={0: 5}, help="runs: 5, or by IPC: 5,50:1")
    parser.add_argument("--epochs", type=by_ipc, default={}, help="as for bench.studies.compare")
    parser.add_argument(
        "--full-accuracy", type=float, default=None, help="percent; default the teacher's own"
    )
    parser.add_argument(
        "--weight", type=float, default=WEIGHT, help="of IOR, and of the gain with augmentation"
    )
    parser.add_argument("--labels", default="online", choices=("online", "stored"))
    parser.add_argument("--factor", default="auto")
    parser.add_argument("--images-per-class", type=int, default=300)
    parser.add_argument("--precision", default="auto", choices=("auto", "float32"))
    parser.add_argument("--work", type=Path, default=Path("runs/compare"))
    parser.add_argument("--out", type=Path, required=True, help="results, without ending")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    try:
        for arm in [Arm.parse(text) for text in arguments.arm]:
            for ipc in arguments.ipc:
                accuracies, students = measure(arm, ipc, arguments)
                results += students
                scores = accuracies.as_dict(weight=arguments.weight)
                rows.append({"arm": arm.name, "ipc": ipc, "epochs": students[0]["epochs"], **scores})
                plain = re.sub(r"[^A-Za-z0-9.-]+", "_", arm.name)
                write_scores(arguments.out / f"{plain}-ipc{ipc}", accuracies, weight=arguments.weight)
                write(rows, results, arguments)
    except (DDFastError, ValueError) as error:
        print(f"bench dd_ranking: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code if isinstance(error, DDFastError) else 2
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
