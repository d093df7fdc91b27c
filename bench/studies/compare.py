"""Students trained on the sets of several methods, side by side: same data, teacher, labels and protocol.

    python -m bench compare --data cifar10-jpeg.zip --teacher teacher.safetensors --arch convnet3 --ipc 1,10 \
        --arm infoutil --arm "paper = infoutil preset=paper" --arm rded --arm random --out bench/results/cifar10

Every arm is distilled once for each IPC, and one student trained for each seed. What is finished is kept in `--work`
and reused, so that a killed comparison goes on where it was. Writes `<out>.csv` (a row a student) and `<out>.md` (the
table, and how it was made).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import ddfast
from bench.studies.arguments import told
from bench.studies.arms import Arm, Setup, Training, at_ipc, by_ipc, teacher_at, train_students
from ddfast.files import atomic_write_text, make_folder

STUDENT_COLUMNS = (
    "arm",
    "ipc",
    "seed",
    "epochs",
    "batch_size",
    "top1_last",
    "top1_best",
    "teacher_loss",
    "options",
)


def table(results: Sequence[dict[str, Any]], ipcs: Sequence[int]) -> str:
    """The comparison in Markdown: arms down, IPCs across, mean ± deviation of the last epoch (best tested epoch)."""
    lines = [
        "| method | " + " | ".join(f"IPC {ipc}" for ipc in ipcs) + " | teacher's loss |",
        "| --- |" + " --- |" * (len(ipcs) + 1),
    ]
    for arm in dict.fromkeys(result["arm"] for result in results):
        rows = {result["ipc"]: result for result in results if result["arm"] == arm}
        cells = [cell(rows[ipc]) if ipc in rows else "" for ipc in ipcs]
        losses = " / ".join(f"{rows[ipc]['teacher_loss']:.2f}" for ipc in ipcs if ipc in rows)
        lines.append(f"| {arm} | {' | '.join(cells)} | {losses} |")
    return "\n".join(lines) + "\n"


def cell(result: dict[str, Any]) -> str:
    """`55.1 ± 0.8 (55.3)`: mean and deviation after the last epoch, mean of the best tested epochs where there are."""
    spread = f" ± {result['std']:.1f}" if len(result["top1"]) > 1 else ""
    best = "" if result["last_only"] else f" ({result['best_mean']:.1f})"
    return f"{result['mean']:.1f}{spread}{best}"


def student_rows(result: dict[str, Any]) -> list[list[Any]]:
    """A row of `STUDENT_COLUMNS` for each student of a result."""
    chosen = {name: value for of_stage in result["options"].values() for name, value in of_stage.items()}
    options = json.dumps(chosen, sort_keys=True)
    common = [result["epochs"], result["batch_size"]]
    loss = f"{result['teacher_loss']:.4f}"
    return [
        [
            *(result["arm"], result["ipc"], seed, *common, f"{last:.2f}"),
            *("" if result["last_only"] else f"{best:.2f}", loss, options),
        ]
        for seed, last, best in zip(result["seeds"], result["top1"], result["best"], strict=True)
    ]


def budget(results: Sequence[dict[str, Any]]) -> str:
    """`IPC 1: 300 epochs, batch 10, seeds 3; IPC 10: ...`, of what was trained."""
    told = []
    for ipc in sorted({result["ipc"] for result in results}):
        of_it = [result for result in results if result["ipc"] == ipc]
        counts = sorted({len(result["seeds"]) for result in of_it})
        seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        told.append(f"IPC {ipc}: {of_it[0]['epochs']} epochs, batch {of_it[0]['batch_size']}, seeds {seeds}")
    return "; ".join(told)


def made_with(results: Sequence[Mapping[str, Any]], precision: str) -> str:
    """Arithmetic, versions and the commits that the students come from."""
    commits = list(dict.fromkeys(commit for result in results for commit in result["commits"]))
    threads = sorted({result["threads"] for result in results})
    shared = " or ".join(str(count) for count in threads) + (" thread" if threads == [1] else " threads")
    return (
        f"arithmetic {precision} on {platform.machine()}, {shared}, torch {torch.__version__}, "
        f"ddfast {ddfast.__version__}, commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    )


def teacher_fact(teacher: Path) -> str:
    """``convnet3, epoch 24 of 24, test top-1 83.78 (`ddfast train-teacher --arch convnet3 ...`)``."""
    opened = teacher_at(teacher)
    training = opened.facts.get("training", {})
    told = opened.arch
    if opened.epoch is not None:
        told += f", epoch {opened.epoch} of {training.get('epochs', opened.epoch)}"
    if opened.top1 is not None:
        told += f", test top-1 {opened.top1:.2f}"
    if not training:
        return told
    options = f"--arch {opened.arch} --epochs {training['epochs']} --image-size {opened.image_size}"
    if opened.epoch not in (None, training["epochs"]):
        options += f" --checkpoint-epochs {opened.epoch}"
    options += "".join(f" --{name} {value}" for name, value in opened.arch_options.items())
    return f"{told} (`ddfast train-teacher {options}`)"


def facts(results: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    """How the table was made, a line each."""
    labels = arguments.labels
    if arguments.label_teacher is not None:
        early = teacher_at(arguments.label_teacher)
        labels += f" by the teacher of epoch {early.epoch}, test top-1 {early.top1:.2f}"
    width = "" if arguments.width is None else f" of width {arguments.width}"
    return [
        f"data {Path(arguments.data).name}, {arguments.images_per_class} images a class scored",
        f"teacher {teacher_fact(arguments.teacher)}, labels {labels}",
        f"student {arguments.arch}{width}, protocol rded; {budget(results)}",
        made_with(results, arguments.precision),
    ]


def write(results: Sequence[dict[str, Any]], arguments: argparse.Namespace, argv: Sequence[str] = ()) -> None:
    """Write `<out>.csv` and `<out>.md`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(STUDENT_COLUMNS)
    for result in results:
        writer.writerows(student_rows(result))
    make_folder(arguments.out.parent)
    atomic_write_text(arguments.out.with_suffix(".csv"), text.getvalue())
    lines = "".join(f"- {fact}\n" for fact in facts(results, arguments))
    arms = "".join(f"- {arm}\n" for arm in arguments.arm)
    heading = judged(arguments.own_sets, arguments.held_out)
    page = f"{heading}\n\n{table(results, arguments.ipc)}\n{lines}\nArms:\n{arms}\n{told('compare', argv, 'bench')}"
    atomic_write_text(arguments.out.with_suffix(".md"), page)


def add_judging(parser: argparse.ArgumentParser) -> None:
    """How students are judged: arguments that `Setup` and `Training` take."""
    parser.add_argument(
        "--last-only", action="store_true", help="test after the last epoch alone: no best tested epoch"
    )
    parser.add_argument(
        "--own-sets",
        action="store_true",
        help="distil a set for each student, with its seed: the deviation then holds the luck of pool and draws",
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=0,
        metavar="N",
        help="judge by N training images of each class that were not scored, not by the test split: for choosing",
    )


def judged(own_sets: bool, held_out: int) -> str:
    """What the numbers of a page are."""
    of = (
        f"Top-1 in percent on {held_out} held-out training images of each class"
        if held_out
        else "Test top-1 in percent"
    )
    over = "students, each on a set distilled with its seed" if own_sets else "students of one set"
    best = "in brackets the best tested epoch, where several were tested"
    return f"{of} after the last epoch, mean ± deviation over {over}; {best}."


def integers(text: str) -> list[int]:
    """`1,10,50` as numbers."""
    return [int(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--width", type=int, default=None, help="channels of a ConvNet student's layers")
    parser.add_argument("--batch-size", type=int, default=None, help="images a step; default the protocol's")
    parser.add_argument(
        "--arm", action="append", required=True, help="method key=value, or name = method key=value"
    )
    parser.add_argument("--ipc", type=integers, default=[10])
    parser.add_argument("--seeds", type=by_ipc, default={0: 3}, help="3, or by IPC: 3,50:1")
    parser.add_argument(
        "--epochs", type=by_ipc, default={}, help="300, or by IPC: 300,50:60; default the protocol's"
    )
    parser.add_argument("--factor", default="auto")
    parser.add_argument("--images-per-class", type=int, default=300)
    parser.add_argument("--precision", default="auto", choices=("auto", "float32"))
    parser.add_argument(
        "--label-teacher", type=Path, default=None, help="labels the students' batches instead of --teacher"
    )
    parser.add_argument("--labels", default="online", choices=("online", "stored"))
    add_judging(parser)
    parser.add_argument("--work", type=Path, default=Path("runs/compare"))
    parser.add_argument("--out", type=Path, required=True, help="results, without ending")
    arguments = parser.parse_args(argv)
    setup = Setup(
        arguments.data,
        arguments.teacher,
        arguments.work,
        arguments.factor,
        arguments.images_per_class,
        arguments.precision,
        arguments.own_sets,
        arguments.held_out,
    )
    results = []
    for arm in [Arm.parse(text) for text in arguments.arm]:
        for ipc in arguments.ipc:
            training = Training(
                arguments.arch,
                arguments.width,
                arguments.labels,
                arguments.label_teacher,
                epochs=at_ipc(arguments.epochs, ipc),
                batch_size=arguments.batch_size,
                last_only=arguments.last_only,
            )
            seeds = range(at_ipc(arguments.seeds, ipc) or 0)
            results.append(train_students(arm, ipc, setup, training, seeds))
            write(results, arguments, sys.argv[1:] if argv is None else argv)
    print(table(results, arguments.ipc))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
