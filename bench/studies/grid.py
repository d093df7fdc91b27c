"""Run a recipe: settle its cells, say what they cost, then distil and train, and write the table after every cell."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import facts
from bench.studies.arguments import study_parser
from bench.studies.arms import Arm, Setup, Training, at_ipc, by_ipc, teacher_at, train_students
from bench.studies.compare import add_judging, integers
from bench.studies.cost import Work, cost_of
from bench.studies.infoutil.recipes import (
    AS_PAPER,
    EARLY,
    EARLY_UP_TO,
    LABELS_OF,
    RECIPES,
    STAGES,
    Recipe,
    Row,
)
from bench.studies.page import Block, Filled, write
from bench.studies.teachers import checkpoints, early_teacher, fitting, teachers, teachers_to_train
from ddfast.errors import UsageError
from ddfast.models import list_models
from ddfast.progress import say
from ddfast.training.protocol import protocol_named

RESULTS = facts.RESULTS / "paper"


def parse(name: str, argv: Sequence[str]) -> argparse.Namespace:
    """Options of a recipe."""
    recipe = RECIPES[name]
    parser = study_parser(name, f"{recipe.title}. {recipe.tests}", wrapped=True)
    parser.add_argument("--early-teacher", type=Path, default=None, help="label teacher of 10 epochs")
    parser.add_argument(
        "--student", action="append", default=[], help="architectures, in place of the recipe's"
    )
    parser.add_argument("--width", type=int, default=None, help="channels of a ConvNet's layers")
    parser.add_argument("--ipc", type=integers, default=list(recipe.ipcs))
    parser.add_argument(
        "--seeds", type=by_ipc, default={}, help="3, or by IPC: 3,50:1; default the paper's 3"
    )
    parser.add_argument("--epochs", type=by_ipc, default={}, help="300, or by IPC: 300,50:60")
    parser.add_argument(
        "--rows", default="", help="only some rows: numbers, or words of their names, comma between"
    )
    add_judging(parser)
    parser.add_argument(
        "--kept", action="store_true", help="train nothing: write the table of the students that are kept"
    )
    parser.add_argument("--cost", action="store_true", help="say what it would cost, and stop")
    arguments = parser.parse_args(argv)
    arguments.images_per_class = arguments.images_per_class or recipe.images_per_class
    return arguments


@dataclass(frozen=True)
class Cell:
    """One cell of a table: what is trained, and the row it belongs to (its name settled)."""

    row: Row
    work: Work


def rows_for(recipe: Recipe, teacher: Path, only: str) -> list[Row]:
    """The rows of a recipe: those of `stages` once for each checkpoint, and the `only` ones where any are named."""
    rows: list[Row] = []
    for row in recipe.rows:
        if row.labels != STAGES:
            rows.append(row)
            continue
        for path in [*checkpoints(teacher), teacher]:
            age = "the full teacher" if path == teacher else f"epoch {teacher_at(path).epoch}"
            rows.append(replace(row, name=f"{row.name}{LABELS_OF} {age}", labels=str(path)))
    words = [word.strip() for word in only.split(",") if word.strip()]
    kept = [
        row
        for number, row in enumerate(rows, start=1)
        if not words
        or any(word == str(number) or (not word.isdigit() and word in row.name) for word in words)
    ]
    if not kept:
        raise UsageError(f"--rows {only!r} fits none of: {'; '.join(row.name for row in rows)}")
    return kept


def cells_of(recipe: Recipe, teacher: Path, student: str, arguments: argparse.Namespace) -> list[Cell]:
    """The cells of one teacher and one student, IPC by IPC, so that what is finished can be compared."""
    setup = Setup(
        arguments.data,
        teacher,
        arguments.work,
        arguments.factor,
        arguments.images_per_class,
        arguments.precision,
        arguments.own_sets,
        arguments.held_out,
    )
    return [
        Cell(
            row,
            Work(
                replace(Arm.parse(row.arm), name=row.name),
                ipc,
                setup,
                _training(row, ipc, teacher, student, arguments),
                range(at_ipc(arguments.seeds, ipc) or recipe.seeds),
            ),
        )
        for ipc in arguments.ipc
        for row in rows_for(recipe, teacher, arguments.rows)
    ]


def _training(row: Row, ipc: int, teacher: Path, student: str, arguments: argparse.Namespace) -> Training:
    early = row.labels == EARLY or (row.labels == AS_PAPER and ipc <= EARLY_UP_TO)
    labels = None
    if early:
        labels = _early(arguments.data, teacher, arguments.early_teacher, arguments.work)
    elif Path(row.labels).suffix == ".safetensors" and Path(row.labels) != teacher:
        labels = Path(row.labels)
    if protocol_named(row.protocol).labels == "hard" and f"{student}_in" in list_models():
        student = f"{student}_in"
    return Training(
        student,
        arguments.width if student.startswith("convnet") else None,
        label_teacher=labels,
        protocol=row.protocol,
        autoaugment=row.autoaugment,
        epochs=at_ipc(arguments.epochs, ipc),
        last_only=arguments.last_only,
    )


_early = functools.cache(early_teacher)


def students_of(recipe: Recipe, arch: str, image_size: int, named: Sequence[str]) -> list[str]:
    """Architectures to train on what `arch` distilled: those named, the recipe's, or the same one."""
    if named:
        return list(named)
    listed = dict(recipe.students).get(arch.removesuffix("_small"))
    return [arch] if listed is None else [fitting(student, image_size) for student in listed]


def run_recipe(name: str, argv: Sequence[str]) -> int:
    """Run a recipe."""
    recipe, arguments = RECIPES[name], parse(name, argv)
    archs = arguments.teacher_arch or recipe.teachers
    if not arguments.teacher:
        lacking = teachers_to_train(
            arguments.data, archs, arguments.work, arguments.teacher_epochs, arguments.width
        )
        if lacking:
            said = f"{len(lacking)} teachers to train for {arguments.teacher_epochs} epochs: {', '.join(lacking)}"
            say(said + ("; the rest is counted when they are there" if arguments.cost else ""))
            if arguments.cost:
                return 0
    files = teachers(
        arguments.data, arguments.teacher, archs, arguments.work, arguments.teacher_epochs, arguments.width
    )
    grid = [
        (teacher, student, cells_of(recipe, teacher, student, arguments))
        for teacher in files
        for student in students_of(
            recipe, teacher_at(teacher).arch, teacher_at(teacher).image_size, arguments.student
        )
    ]
    if arguments.kept:
        grid = [(teacher, student, _kept(cells)) for teacher, student, cells in grid]
    work = [cell.work for _, _, cells in grid for cell in cells]
    if not work:
        raise UsageError(f"--kept: no student of {name} is kept in {arguments.work}; run it without --kept")
    if not arguments.kept:
        say(f"{recipe.title}: {cost_of(work)}")
    say(budget_note(recipe, work))
    if arguments.cost:
        return 0
    out = arguments.out or RESULTS / "_".join(
        [name, Path(arguments.data).stem, *dict.fromkeys(teacher_at(file).arch for file in files)]
    )
    blocks = [
        Block(teacher, student, [], [row.name for row in rows_for(recipe, teacher, arguments.rows)])
        for teacher, student, _ in grid
    ]
    for (_, _, cells), block in zip(grid, blocks, strict=True):
        for cell in cells:
            found = train_students(
                cell.work.arm, cell.work.ipc, cell.work.setup, cell.work.training, cell.work.seeds
            )
            block.cells.append(Filled(cell.row, cell.work, found))
            page = write(name, recipe, blocks, out, budget_note(recipe, work), argv)
    print(page)
    return 0


def _kept(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with the seeds whose students are kept, without those that have none."""
    found = []
    for cell in cells:
        missing = set(cell.work.missing)
        if seeds := [seed for seed in cell.work.seeds if seed not in missing]:
            found.append(replace(cell, work=replace(cell.work, seeds=seeds)))
    return found


def budget_note(recipe: Recipe, work: Sequence[Work]) -> str:
    """The budget in words: the paper's, or what of it was spent."""
    spent = []
    for ipc in dict.fromkeys(cell.ipc for cell in work):
        cells = [cell for cell in work if cell.ipc == ipc]
        full = cells[0].training.rules.epochs_for(ipc)
        epochs = cells[0].training.epochs or full
        fewest, most = min(len(cell.seeds) for cell in cells), max(len(cell.seeds) for cell in cells)
        if epochs != full or fewest != recipe.seeds:
            seeds = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            spent.append(
                f"IPC {ipc}: {epochs} of {full} epochs, {seeds} seeds for the paper's {recipe.seeds}"
            )
    return "Budget: " + ("; ".join(spent) if spent else f"the paper's, {recipe.seeds} seeds") + "."
