"""A study's results: `<out>.csv`, a row a student, `<out>.md`, the paper's numbers beside ours, and a chart."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.studies.arguments import told
from bench.studies.arms import teacher_at
from bench.studies.charts import Line, accuracy_chart
from bench.studies.compare import STUDENT_COLUMNS, budget, cell, judged, made_with, student_rows, teacher_fact
from bench.studies.cost import Work
from bench.studies.infoutil.recipes import LABELS_OF, RANDOM, STAGES, Gain, Recipe, Row
from bench.studies.reported import Reported, data_name, gains, met, model_name
from ddfast.files import atomic_write_text, make_folder

_MOST_TOLD = 4  # data sets whose gains are told one by one

COLUMNS = (
    *("study", "teacher", "student", "labels", "label_teacher_epoch", "autoaugment", "protocol"),
    *STUDENT_COLUMNS,
    *("top5_last", "paper", "command", "commit"),
)


@dataclass(frozen=True)
class Filled:
    """A cell with its result."""

    row: Row
    work: Work
    found: dict[str, Any]


@dataclass
class Block:
    """The finished cells of one teacher and one student.

    `order` holds the names of the rows from top to bottom.
    """

    teacher: Path
    student: str
    cells: list[Filled]
    order: Sequence[str]

    def at(self, row: str, ipc: int) -> Filled | None:
        """The cell of a row's name."""
        return next((each for each in self.cells if each.row.name == row and each.work.ipc == ipc), None)

    @property
    def ipcs(self) -> list[int]:
        """Ascending."""
        return sorted({each.work.ipc for each in self.cells})

    @property
    def rows(self) -> list[Row]:
        """Those that have a cell."""
        found = {each.row.name: each.row for each in self.cells}
        return [found[name] for name in self.order if name in found]


def write(
    name: str, recipe: Recipe, blocks: Sequence[Block], out: Path, spent: str, argv: Sequence[str]
) -> str:
    """Write both files; returns the Markdown."""
    make_folder(out.parent)
    filled = [block for block in blocks if block.cells]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for block in filled:
        for each in block.cells:
            writer.writerows(_csv_rows(name, block, each))
    atomic_write_text(out.with_suffix(".csv"), text.getvalue())
    if any(row.labels == STAGES for row in recipe.rows):
        panels = [panel for block in filled for panel in _lines_by_age(block, len(filled) > 1)]
        accuracy_chart(out, panels, recipe.title, tick="epoch {}")
    else:
        accuracy_chart(out, [_lines(name, block) for block in filled], recipe.title)
    page = markdown(name, recipe, filled, spent, argv, out.with_suffix(".png").name)
    atomic_write_text(out.with_suffix(".md"), page)
    return page


def _lines(name: str, block: Block) -> tuple[str, list[Line]]:
    """Heading and lines of a block's panel."""
    lines = []
    for row in block.rows:
        points = []
        for ipc in block.ipcs:
            if (each := block.at(row.name, ipc)) is not None:
                paper = _paper(name, block, row, ipc)
                points.append(
                    (ipc, each.found["mean"], each.found["std"], None if paper is None else paper.top1)
                )
        lines.append(Line(row.name, points, row.arm == RANDOM.arm))
    return f"distilled with {teacher_at(block.teacher).arch}, student {block.student}", lines


def _lines_by_age(block: Block, several: bool) -> list[tuple[str, list[Line]]]:
    """A panel for each IPC: accuracy against the epochs of the teacher that labels."""
    panels = []
    for ipc in block.ipcs:
        points: dict[str, list[tuple[int, float, float, float | None]]] = {}
        for row in block.rows:
            if (each := block.at(row.name, ipc)) is not None:
                labels = each.work.training.label_teacher or block.teacher
                point = (teacher_at(labels).epoch or 0, each.found["mean"], each.found["std"], None)
                points.setdefault(row.name.partition(LABELS_OF)[0], []).append(point)
        lines = [Line(name, sorted(of_it), name.startswith("random")) for name, of_it in points.items()]
        of = f", distilled with {teacher_at(block.teacher).arch}, student {block.student}" if several else ""
        panels.append((f"IPC {ipc}, against the epochs of the label teacher{of}", lines))
    return panels


def _csv_rows(name: str, block: Block, each: Filled) -> list[list[Any]]:
    training, found = each.work.training, each.found
    paper = _paper(name, block, each.row, each.work.ipc)
    label_teacher = None if training.hard else teacher_at(training.label_teacher or block.teacher)
    left = [
        name,
        teacher_at(block.teacher).arch,
        training.arch,
        found["labels"],
        "" if label_teacher is None else label_teacher.epoch,
        training.autoaugment,
        training.protocol,
    ]
    right = ["" if paper is None else paper.top1, each.row.arm, " ".join(found["commits"])]
    return [
        [*left, *row, "" if math.isnan(top5) else f"{top5:.2f}", *right]
        for row, top5 in zip(student_rows(found), found["top5"], strict=True)
    ]


def _paper(name: str, block: Block, row: Row, ipc: int) -> Reported | None:
    if not row.method:
        return None
    return met(
        name,
        str(block.cells[0].work.setup.data),
        teacher_at(block.teacher).arch,
        block.student,
        ipc,
        row.method,
    )


# The page
# ---------------------------------------------------------------------------------------------------------


def markdown(
    name: str, recipe: Recipe, blocks: Sequence[Block], spent: str, argv: Sequence[str], chart: str
) -> str:
    """The page: a table of accuracies and one of claims for each teacher and student, then how it was made."""
    setup = blocks[0].cells[0].work.setup
    parts = [
        f"# {recipe.title}\n",
        f"{recipe.tests}\n",
        f"{judged(setup.own_sets, setup.held_out)} {spent}\n",
    ]
    for block in blocks:
        if len(blocks) > 1:
            parts.append(f"## Distilled with {teacher_at(block.teacher).arch}, student {block.student}\n")
        parts.append(accuracies(name, block))
        if claims := claim_table(name, recipe, block):
            parts.append(claims)
    parts.append(f"![accuracy against IPC]({chart})\n")
    if recipe.note:
        parts.append(f"{recipe.note}\n")
    parts.append("".join(f"- {fact}\n" for fact in _facts(blocks)))
    arms = dict.fromkeys(f"- {row.name}: `{row.arm}`" for block in blocks for row in block.rows)
    parts.append("Arms:\n\n" + "\n".join(arms) + "\n")
    parts.append(told(name, argv))
    return "\n".join(parts)


def accuracies(name: str, block: Block) -> str:
    """Rows down, IPCs across; where the paper has the number, it and the difference stand behind ours."""
    ipcs, rows = block.ipcs, block.rows
    known = {
        (row.name, ipc): paper for row in rows for ipc in ipcs if (paper := _paper(name, block, row, ipc))
    }
    head = ["method"]
    for ipc in ipcs:
        head.append(f"IPC {ipc}")
        if any(place[1] == ipc for place in known):
            head += ["paper", "difference"]
    head.append("teacher's loss")
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1)]
    for row in rows:
        cells = [row.name]
        for ipc in ipcs:
            each, paper = block.at(row.name, ipc), known.get((row.name, ipc))
            cells.append(cell(each.found) if each else "")
            if any(place[1] == ipc for place in known):
                cells.append(_reported(paper) if paper else "")
                cells.append(f"{each.found['mean'] - paper.top1:+.1f}" if each and paper else "")
        found = [each.found for ipc in ipcs if (each := block.at(row.name, ipc))]
        cells.append(" / ".join(f"{one['teacher_loss']:.2f}" for one in found))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _reported(paper: Reported) -> str:
    return f"{paper.top1:g}" + ("" if paper.std is None else f" ± {paper.std:g}")


def claim_table(name: str, recipe: Recipe, block: Block) -> str:
    """The claims: our gain at each IPC, and the paper's wherever it has measured it."""
    ipcs = block.ipcs
    lines = []
    for gain in _gains(recipe, block):
        ours = [_gain(block, gain, ipc) for ipc in ipcs]
        if any(ours):
            lines.append(f"| {gain.claim} | {' | '.join(ours)} | {_paper_gains(name, gain, block)} |")
    if not lines:
        return ""
    head = f"| gain in points | {' | '.join(f'IPC {ipc}' for ipc in ipcs)} | the paper's |"
    return "\n".join([head, "| --- |" + " --- |" * (len(ipcs) + 1), *lines]) + "\n"


def _gains(recipe: Recipe, block: Block) -> Sequence[Gain]:
    """The recipe's claims; for rows that stand for a teacher's stages, each stage against the full teacher."""
    full = f"{LABELS_OF} the full teacher"
    staged = [
        Gain(
            f"{row.name} over {full.removeprefix(', ')}",
            row.name,
            row.name.partition(LABELS_OF)[0] + full,
        )
        for row in block.rows
        if f"{LABELS_OF} epoch" in row.name
    ]
    return [*recipe.gains, *staged]


def _gain(block: Block, gain: Gain, ipc: int) -> str:
    one, other = block.at(gain.row, ipc), block.at(gain.base, ipc)
    if one is None or other is None:
        return ""
    told = f"{one.found['mean'] - other.found['mean']:+.1f}"
    if min(len(one.found["top1"]), len(other.found["top1"])) > 1:
        told += f" ± {math.hypot(one.found['std'], other.found['std']):.1f}"
    return told


def _paper_gains(name: str, gain: Gain, block: Block) -> str:
    """`+5.0, +3.9, +1.4 at IPC 1, 10, 50`: on our data and networks where the paper has them, else wherever it has.

    Of many other data sets the ranges: those with our networks, where the paper has any.
    """
    if not gain.method:
        return ""
    found = gains(name, gain.method, gain.base_method)
    ours = (
        data_name(str(block.cells[0].work.setup.data)),
        model_name(teacher_at(block.teacher).arch),
        model_name(block.student),
    )
    same = [each for each in found if each[0].where[:3] == ours]
    if not same:
        found = [each for each in found if each[0].where[1:3] == ours[1:]] or found
    groups: dict[tuple[str, str], list[tuple[Reported, float]]] = {}
    for each in same or found:
        groups.setdefault((each[0].data, each[0].student), []).append(each)
    if len(groups) > _MOST_TOLD:
        return _ranges(groups)
    told = []
    for (data, student), members in groups.items():
        values = ", ".join(f"{value:+.1f}" for _, value in members)
        at = ", ".join(str(reported.ipc) for reported, _ in members)
        told.append(f"{'' if same else f'{data}, {student}: '}{values} at IPC {at}")
    return "; ".join(told)


def _ranges(groups: Mapping[tuple[str, str], Sequence[tuple[Reported, float]]]) -> str:
    """`7 data sets, ConvNet: +0.2 to +13.5 at IPC 1, ...`."""
    of_ipc: dict[int, list[float]] = {}
    for members in groups.values():
        for reported, value in members:
            of_ipc.setdefault(reported.ipc, []).append(value)
    ranges = ", ".join(
        f"{min(of_ipc[ipc]):+.1f} to {max(of_ipc[ipc]):+.1f} at IPC {ipc}" for ipc in sorted(of_ipc)
    )
    sets, students = (list(dict.fromkeys(names)) for names in zip(*groups, strict=True))
    return f"{len(sets)} data sets, {', '.join(students)}: {ranges}"


def _facts(blocks: Sequence[Block]) -> list[str]:
    """How it was made, a line each."""
    filled = [each for block in blocks for each in block.cells]
    setup = filled[0].work.setup
    told = [f"data {Path(setup.data).name}, {setup.images_per_class} images a class scored"]
    told += dict.fromkeys(f"teacher {teacher_fact(block.teacher)}" for block in blocks)
    early = {
        each.work.training.label_teacher for each in filled if each.work.training.label_teacher is not None
    }
    told += sorted(f"label teacher {teacher_fact(path)}" for path in early)
    for protocol in dict.fromkeys(each.work.training.protocol for each in filled):
        of_it = [each for each in filled if each.work.training.protocol == protocol]
        archs = ", ".join(dict.fromkeys(each.work.training.arch for each in of_it))
        labels = "hard labels" if of_it[0].work.training.hard else "labels online"
        told.append(f"student {archs}, protocol {protocol}, {labels}; {budget([one.found for one in of_it])}")
    return [*told, made_with([each.found for each in filled], setup.precision)]
