"""Every method by one recipe: random images and coresets, RDED, InfoUtil, matching with and without CMI, SRe2L, IGDS.

    python -m bench.studies league --data cifar10-jpeg.zip --teacher teacher.safetensors --proxies PROXIES \
        --experts EXPERTS --prior PRIOR --estimator estimator.safetensors --ipc 1,10 --sets 3 \
        --budget "dsa:iterations=15 inner_loop=10" --trained "teacher=950,proxies=3600" --leave-out "IDM=a day a set"

Every student has a set of its own, distilled with its seed, and is tested after its last epoch: once with hard labels
(--hard) and once with the soft labels of one teacher (--soft), which labels the students' own batches. All sets of an
IPC get the same updates of the same batch size: an image that stands for several, for its tiles or its regions, is seen
in fewer passes. No set brings a learning rate of its own. The difference to random images is taken set by set, with the
same labels. Each set is distilled in a process of its own, whose peak of memory is told. What is finished is kept in
--work. Writes `<out>.csv`, a row a student, `<out>.md`, anew after every row, and a figure for each kind of labels:
accuracy against core-seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import facts
from bench.studies.arguments import study_parser
from bench.studies.arms import (
    FROZEN,
    Distillation,
    Setup,
    Training,
    at_ipc,
    by_ipc,
    set_of,
    teacher_at,
    train_students,
)
from bench.studies.compare import integers
from bench.studies.frozen import at_equal_steps, equal_steps
from bench.studies.league.costs import cost_of, make_alone
from bench.studies.league.page import draw_figures, write
from bench.studies.league.results import Found, Results
from bench.studies.league.roster import NAMES, Entry, add_options, settle
from bench.studies.teachers import teachers
from ddfast.errors import DDFastError, UsageError
from ddfast.models.registry import check_model
from ddfast.progress import say
from ddfast.training.protocol import PROTOCOLS

TITLE = "All methods by one recipe"
LABELS = ("hard", "soft")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[Entry]]:
    """Options of the study, and its rows."""
    parser = study_parser("league", __doc__)
    add_options(parser, NAMES)
    parser.add_argument("--ipc", type=integers, default=[1, 10])
    parser.add_argument(
        "--student", action="append", default=[], help="architecture, may be repeated; default --matched"
    )
    parser.add_argument(
        "--sets", type=by_ipc, default={0: 3}, help="sets a row, each with a student: 3, or 3,50:1"
    )
    for labels, usual in zip(LABELS, ("dsa", "rded"), strict=True):
        known = [name for name, rules in PROTOCOLS.items() if rules.labels == labels]
        parser.add_argument(f"--{labels}", default=usual, choices=known, help=f"protocol, default {usual}")
        parser.add_argument(
            f"--{labels}-epochs", type=by_ipc, default={}, help="passes over whole images, as --sets by IPC"
        )
    parser.add_argument("--labels", default="hard,soft", help="hard, soft, or both with a comma")
    parser.add_argument(
        "--trained",
        type=lambda text: dict(_pair(part) for part in text.split(",") if part),
        default={},
        metavar="WHAT=SECONDS,...",
        help="core-seconds of what was trained before: teacher, proxies, experts, prior, estimator",
    )
    parser.add_argument(
        "--here",
        action="store_true",
        help="distil in this process: quicker for tiny sets, and tells no memory",
    )
    arguments = parser.parse_args(argv)
    arguments.labels = [word.strip() for word in arguments.labels.split(",")]
    if unknown := [word for word in arguments.labels if word not in LABELS]:
        parser.error(f"--labels: {unknown[0]!r} is neither hard nor soft")
    if len(arguments.teacher) > 1:
        parser.error("soft labels are those of one teacher for all: give one --teacher")
    arguments.images_per_class = arguments.images_per_class or 300
    arguments.student = arguments.student or [arguments.matched]
    return arguments, settle(arguments)


def _pair(text: str) -> tuple[str, float]:
    name, separator, seconds = text.partition("=")
    known = ("teacher", "proxies", "experts", "prior", "estimator")
    if not separator or name.strip() not in known:
        raise argparse.ArgumentTypeError(f"wanted one of {', '.join(known)} with =SECONDS, got {text!r}")
    return name.strip(), float(seconds)


def main(argv: Sequence[str]) -> int:
    """Run the study; the page is written anew after every row."""
    arguments, rows = parse(argv)
    (teacher, *_) = teachers(
        arguments.data,
        arguments.teacher,
        arguments.teacher_arch or ["convnet"],
        arguments.work,
        arguments.teacher_epochs,
    )
    if arguments.factor == "auto":
        arguments.factor = 1 if teacher_at(teacher).image_size <= 64 else 2
    setup = setup_of(teacher, arguments)
    for student in (*arguments.student, arguments.matched):
        check_model(student, teacher_at(teacher).image_size)
    # A word that no method knows stops the study; what cannot be had leaves out a row.
    for ipc in arguments.ipc:
        for entry in rows:
            if entry.lacks(ipc, arguments) is None:
                Distillation.of(entry.arm(ipc, arguments), ipc, setup)
    name = "_".join(["league", Path(arguments.data).stem, *arguments.student])
    out = arguments.out or facts.RESULTS / "paper" / name
    results = Results(TITLE)
    for ipc in arguments.ipc:
        for entry in rows:
            _run(entry, ipc, setup, arguments, results)
            write(results, rows, setup, out, arguments, argv)
        draw_figures(results, out, arguments)
    print(write(results, rows, setup, out, arguments, argv))
    return 0


def setup_of(teacher: Path, arguments: argparse.Namespace) -> Setup:
    """Data, teacher and work folder, with a set of its own for each student."""
    return Setup(
        arguments.data,
        teacher,
        arguments.work,
        arguments.factor,
        arguments.images_per_class,
        arguments.precision,
        own_sets=True,
    )


def training_of(student: str, ipc: int, labels: str, arguments: argparse.Namespace) -> Training:
    """How students of whole images are trained: the recipe of a kind of labels."""
    return Training(
        student,
        labels="hard" if labels == "hard" else "online",
        protocol=arguments.hard + FROZEN if labels == "hard" else arguments.soft,
        epochs=at_ipc(arguments.hard_epochs if labels == "hard" else arguments.soft_epochs, ipc),
        last_only=True,
    )


def _run(entry: Entry, ipc: int, setup: Setup, arguments: argparse.Namespace, results: Results) -> None:
    """The sets of a row at an IPC, and their students; a row that cannot be had is left out with the reason."""
    reason = entry.lacks(ipc, arguments)
    seeds = range(at_ipc(arguments.sets, ipc) or 1)
    if reason is None:
        try:
            made = [_made(entry, ipc, setup, seed, arguments) for seed in seeds]
        except DDFastError as error:
            reason = _one_line(error)
    if reason is not None:
        say(f"{entry.name}, IPC {ipc}: left out, {reason}")
        results.left_out.append((entry.name, ipc, reason))
        return
    costs = [cost_of(each) for each in made]
    for student in arguments.student:
        for labels in arguments.labels:
            try:
                sets = [_student(entry, ipc, setup, seed, student, labels, arguments) for seed in seeds]
            except UsageError as error:
                results.left_out.append((entry.name, ipc, f"{labels} labels: {_one_line(error)}"))
                continue
            results.found.append(Found(entry, ipc, student, labels, sets, costs))


def _one_line(error: DDFastError) -> str:
    return " ".join(str(error).split())


def _made(entry: Entry, ipc: int, setup: Setup, seed: int, arguments: argparse.Namespace) -> Distillation:
    distillation = Distillation.of(entry.arm(ipc, arguments, seed), ipc, setup)
    if arguments.here:
        distillation.make()
    else:
        make_alone(distillation)
    return distillation


def _student(
    entry: Entry, ipc: int, setup: Setup, seed: int, student: str, labels: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The student of one set, at the steps that all have."""
    arm, whole = entry.arm(ipc, arguments), training_of(student, ipc, labels, arguments)
    steps = equal_steps(whole, ipc, teacher_at(setup.teacher))
    training = at_equal_steps(whole, set_of(arm, ipc, setup, whole, seed).folder, steps)
    return train_students(arm, ipc, setup, training, [seed])
