"""DD-Ranking's label-robust and augmentation-robust scores of methods, from students trained here.

    python -m bench dd_ranking --data cifar10-jpeg.zip --teacher teacher.safetensors --arch convnet3 --ipc 10 \
        --arm infoutil --arm rded --arm herding --seeds 5 --out bench/results/dd_ranking
    python -m bench dd_ranking --data cifar10-jpeg.zip --teacher teacher.safetensors --arch convnet3_in --ipc 1,10 \
        --methods InfoUtil,DM,IDC --budget "dm:iterations=300" --own-sets --work WORK --out bench/results/dd_ranking

For each arm and seed it trains six students: on the arm's set and on random images drawn with that seed, each with hard
labels, with soft labels, and with soft labels but without augmentation. All students of a recipe take the same updates:
images that stand for several are seen in fewer passes. With the options and the `--work` of the study `league`, and
`--own-sets`, it scores the sets that the league has. Sets and students are kept in `--work`, which all studies share.
Writes `<out>.json`, `<out>.md` and, in the folder `<out>`, the two CSV files of DD-Ranking's evaluators for each arm.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.studies.arguments import told
from bench.studies.arms import Arm, Setup, Training, at_ipc, by_ipc, set_of, teacher_at, train_students
from bench.studies.compare import integers, made_with, teacher_fact
from bench.studies.frozen import training_on
from bench.studies.league import roster
from ddfast.errors import DDFastError, UsageError
from ddfast.files import atomic_write_text, make_folder
from ddfast.methods import get_method
from ddfast.training.dd_ranking import RECIPES, WEIGHT, Accuracies, write_scores
from ddfast.training.equal_steps import images_of_a_pass
from ddfast.training.evaluation import read_distilled


def measure(arm: Arm, ipc: int, arguments: argparse.Namespace) -> tuple[Accuracies, list[dict[str, Any]]]:
    """Accuracies of one arm at one IPC, and the results of all students behind them."""
    setup = Setup(
        arguments.data,
        arguments.teacher,
        arguments.work,
        arguments.factor,
        arguments.images_per_class,
        arguments.precision,
        arguments.own_sets,
    )
    seeds = range(at_ipc(arguments.seeds, ipc) or 0)
    if not seeds:
        raise UsageError(f"--seeds must be at least 1 at every IPC, got none at IPC {ipc}")
    results: list[dict[str, Any]] = []
    drawn = [Arm(f"random, seed {seed}", "random", _shared(arm, seed)) for seed in seeds]

    def accuracies(recipe: str, seed: int, of: Arm) -> float:
        training = Training(
            arguments.arch,
            arguments.width,
            arguments.labels,
            protocol=RECIPES[recipe],
            epochs=at_ipc(arguments.epochs, ipc),
        )
        if arguments.own_sets or _stands_for_several(arm, ipc, setup, training, drawn[0]):
            training = training_on(of, ipc, setup, training, seed)
        results.append(train_students(of, ipc, setup, training, [seed]))
        return float(results[-1]["mean"])

    found: dict[str, dict[str, list[float]]] = {"distilled": {}, "random": {}}
    for recipe in RECIPES:
        found["distilled"][recipe] = [accuracies(recipe, seed, arm) for seed in seeds]
        found["random"][recipe] = [accuracies(recipe, seed, drawn[seed]) for seed in seeds]
    return Accuracies(_full_accuracy(arguments), **found), results


def _stands_for_several(arm: Arm, ipc: int, setup: Setup, training: Training, random: Arm) -> bool:
    """Whether a pass over the arm's set shows more images than one over random images."""
    seen = [
        images_of_a_pass(read_distilled(set_of(each, ipc, setup, training, 0).make()), training.rules)
        for each in (arm, random)
    ]
    return seen[0] != seen[1]


def _shared(arm: Arm, seed: int) -> dict[str, Any]:
    """Settings of the random images beside an arm: its pool, where it chooses its tiles as well, and their seed."""
    shared = ("factor", "images_per_class") if "select" in get_method(arm.method).stages else ()
    return {**{key: value for key, value in arm.settings.items() if key in shared}, "seed": seed}


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
    rows: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    arguments: argparse.Namespace,
    argv: Sequence[str],
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
        *(["a set of its own for each student"] if arguments.own_sets else []),
        *(f"{row['arm']}, IPC {row['ipc']}: {row['budget']}" for row in rows),
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
    lines = "".join(f"- {fact}\n" for fact in [*facts, *arguments.left_out])
    made = told("dd_ranking", argv, "bench")
    atomic_write_text(arguments.out.with_suffix(".md"), f"{heading}\n{table(rows)}\n{lines}\n{made}")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, score and write. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="bench dd_ranking", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--width", type=int, default=None, help="channels of a ConvNet student's layers")
    parser.add_argument("--arm", action="append", default=[], help="as for bench.studies.compare")
    roster.add_options(parser, ())
    parser.add_argument(
        "--own-sets", action="store_true", help="a set for each student, distilled with its seed"
    )
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
    words = list(sys.argv[1:] if argv is None else argv)
    arguments.left_out = []
    rows: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    try:
        for arm, ipc, budget in _arms(arguments):
            accuracies, students = measure(arm, ipc, arguments)
            results += students
            scores = accuracies.as_dict(weight=arguments.weight)
            epochs = students[len(accuracies.random["hard"])]["epochs"]  # of random images, which are whole
            rows.append({"arm": arm.name, "ipc": ipc, "epochs": epochs, "budget": budget, **scores})
            plain = re.sub(r"[^A-Za-z0-9.-]+", "_", arm.name)
            write_scores(arguments.out / f"{plain}-ipc{ipc}", accuracies, weight=arguments.weight)
            write(rows, results, arguments, words)
    except (DDFastError, ValueError) as error:
        print(f"bench dd_ranking: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code if isinstance(error, DDFastError) else 2
    print(table(rows))
    return 0


def _arms(arguments: argparse.Namespace) -> list[tuple[Arm, int, str]]:
    """The arms at every IPC with their settings in words: those in words, then the league's.

    Raises:
        UsageError: there is none, or a word that nothing knows.
    """
    found = [
        (arm, ipc, f"`{text}`")
        for text in arguments.arm
        for arm in [Arm.parse(text)]
        for ipc in arguments.ipc
    ]
    for entry in roster.settle(arguments):
        for ipc in arguments.ipc:
            if (reason := entry.lacks(ipc, arguments)) is not None:
                arguments.left_out.append(f"{entry.name}, IPC {ipc}: left out, {reason}")
            else:
                found.append((entry.arm(ipc, arguments), ipc, f"`{entry.spent(ipc, arguments)}`"))
    if not found:
        raise UsageError("nothing to score: give --arm or --methods")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
