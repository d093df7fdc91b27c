"""Accuracy against the seconds that a synthesis takes: one figure and one table of all results that are given.

    python -m bench.studies cost cmi_cifar10-jpeg_convnet3_in.csv cmi_dsa_cifar10-jpeg_convnet3_in.csv \
        --add "herding=950,InfoUtil=950,RDED=950"

Takes the CSV files of the study `cmi`, whose arms all train on hard labels, and trains nothing. An arm that several
files hold is told once for each protocol. Seconds are those of a set's distillation; what was trained before it, the
teacher that InfoUtil, RDED and herding choose by or the proxies of CMI, is added with `--add`. Writes `<out>.csv`,
`<out>.md`, `<out>.png` and `<out>.svg`.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import facts
from bench.studies.arguments import told
from bench.studies.charts import COLOURS, FAINT, GREY, GRID, figure, name_points
from bench.studies.cmi import CHOSEN, COLUMNS
from ddfast.errors import UsageError
from ddfast.files import atomic_write_text, make_folder
from ddfast.progress import duration

TITLE = "Accuracy against the seconds of a synthesis"
WITH_CMI = " + CMI"  # how an arm with the regulariser ends
_NEEDED = [name for name in COLUMNS if name not in ("epochs", "steps", "commits")]
_LEAST = 1.0  # seconds at which what took less is drawn: the axis is logarithmic


@dataclass(frozen=True)
class Point:
    """An arm at one IPC with the students of one architecture and protocol.

    Attributes:
        arm, ipc, student, protocol: as in the files.
        steps: updates of a student; empty where an older file does not tell.
        seconds: of a set, mean over the sets, with what was added.
        top1: mean over sets and students, percent.
        deviation: over the sets' means; over the students where there is one set; 0 of a single student.
    """

    arm: str
    ipc: int
    student: str
    protocol: str
    steps: str
    seconds: float
    top1: float
    deviation: float


def read(paths: Sequence[Path], added: dict[str, float]) -> list[Point]:
    """The points of the files, in their order.

    Raises:
        UsageError: a file is not one of the study `cmi`, or an older one that has no seconds; two files differ in what
            they have of an arm.
    """
    rows: dict[tuple[str, int, str, str, str], dict[tuple[str, str], tuple[float, float]]] = {}
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            read_rows = csv.DictReader(file)
            if lacking := [name for name in _NEEDED if name not in (read_rows.fieldnames or ())]:
                raise UsageError(
                    f"{path} has no column {lacking[0]}: give CSV files that python -m bench.studies cmi wrote; it "
                    "writes an older one anew from what it kept in --work"
                )
            for row in read_rows:
                key = (row["arm"], int(row["ipc"]), row["student"], row["protocol"], row.get("steps") or "")
                one, told_of = (row["set"], row["seed"]), (float(row["top1"]), float(row["seconds"]))
                if rows.setdefault(key, {}).setdefault(one, told_of) != told_of:
                    raise UsageError(
                        f"{path} has other results of {row['arm']} at IPC {row['ipc']} than a file before it: give "
                        "files of one budget"
                    )
    points = []
    for (arm, ipc, student, protocol, steps), found in rows.items():
        sets: dict[str, list[float]] = {}
        for (number, _), (top1, _) in found.items():
            sets.setdefault(number, []).append(top1)
        means = [statistics.mean(each) for each in sets.values()]
        spread = means if len(means) > 1 else next(iter(sets.values()))
        of_sets = {number: seconds for (number, _), (_, seconds) in found.items()}
        points.append(
            Point(
                arm,
                ipc,
                student,
                protocol,
                steps,
                statistics.mean(of_sets.values()) + added.get(arm, 0.0),
                statistics.mean(means),
                statistics.stdev(spread) if len(spread) > 1 else 0.0,
            )
        )
    return points


def added_seconds(text: str) -> dict[str, float]:
    """`herding=950,RDED=950` as numbers by arm."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    return {name.strip(): float(seconds) for name, _, seconds in pairs}


def main(argv: Sequence[str]) -> int:
    """Read the files, and write figure and table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies cost",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, help="CSV files of the study cmi")
    parser.add_argument(
        "--add", type=added_seconds, default={}, metavar="ARM=SECONDS,...", help="seconds spent before"
    )
    parser.add_argument("--out", type=Path, default=None, help="results, without ending")
    arguments = parser.parse_args(argv)
    if missing := [path for path in arguments.results if not path.is_file()]:
        parser.error(f"no file {missing[0]}")
    points = read(arguments.results, arguments.add)
    out = arguments.out or facts.RESULTS / "paper" / "cost"
    make_folder(out.parent)
    atomic_write_text(out.with_suffix(".csv"), _table(points))
    draw(out, points)
    page = _page(points, arguments, argv, out.with_suffix(".png").name)
    atomic_write_text(out.with_suffix(".md"), page)
    print(page)
    return 0


def draw(path: Path, points: Sequence[Point], along: str = "seconds of a synthesis") -> None:
    """A panel for each IPC and architecture: top-1 against seconds, `along` in words, on a logarithmic axis.

    A method has one colour; its mark is hollow with the CMI regulariser. Random images are grey.
    """
    kinds = list(dict.fromkeys((point.ipc, point.student) for point in points))
    names = list(dict.fromkeys(_method(point) for point in points))
    plain = [name for name in names if name != "random"]
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(plain)} | {"random": GREY}
    with figure(path, 7.2 * len(kinds), 4.8, 1, len(kinds)) as axes:
        for axis, (ipc, student) in zip(axes, kinds, strict=True):
            shown = [each for each in points if (each.ipc, each.student) == (ipc, student)]
            for point in shown:
                colour = colours[_method(point)]
                axis.errorbar(
                    max(point.seconds, _LEAST),
                    point.top1,
                    yerr=point.deviation,
                    color=colour,
                    marker="o",
                    markerfacecolor="white" if point.arm.endswith(WITH_CMI) else colour,
                    capsize=2.5,
                    elinewidth=1,
                )
            axis.set_xscale("log")
            axis.margins(x=0.15)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
            axis.set_xlabel(along)
            axis.set_title(f"IPC {ipc}, {student}", loc="left", fontsize=9.5, color=FAINT)
            name_points(
                axis,
                [
                    (
                        max(each.seconds, _LEAST),
                        each.top1,
                        each.deviation,
                        _name(each, points),
                        colours[_method(each)],
                    )
                    for each in shown
                ],
            )
        axes[0].set_ylabel("test top-1, %")


def _method(point: Point) -> str:
    """The arm without the regulariser."""
    return point.arm.removesuffix(WITH_CMI)


def _name(point: Point, points: Sequence[Point]) -> str:
    """The arm, with its protocol where it was judged by several, and its students' updates where they differ."""
    kind = (point.arm, point.ipc, point.student)
    alike = [each for each in points if (each.arm, each.ipc, each.student) == kind]
    name = point.arm if len({each.protocol for each in alike}) == 1 else f"{point.arm}, {point.protocol}"
    updates = {each.steps for each in alike if each.protocol == point.protocol}
    return name if len(updates) == 1 else f"{name}, {point.steps}"


def _table(points: Sequence[Point]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arm", "ipc", "student", "protocol", "steps", "seconds", "top1", "deviation"))
    for point in points:
        numbers = (f"{point.seconds:.1f}", f"{point.top1:.2f}", f"{point.deviation:.2f}")
        writer.writerow((point.arm, point.ipc, point.student, point.protocol, point.steps, *numbers))
    return text.getvalue()


def _page(points: Sequence[Point], arguments: argparse.Namespace, argv: Sequence[str], picture: str) -> str:
    lines = [
        f"# {TITLE}",
        "",
        told("cost", argv),
        "Test top-1 in percent after the last epoch, hard labels, each method by its authors' protocol: mean over "
        "sets and students ± deviation over the sets' means (one set: over its students).",
        "",
        f"![accuracy against seconds]({picture})",
        "",
        "| method | IPC | student | protocol | updates | seconds of a set | top-1 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for point in sorted(points, key=lambda each: (each.ipc, each.student, each.seconds)):
        lines.append(
            f"| {point.arm} | {point.ipc} | {point.student} | {point.protocol} | {point.steps} | "
            f"{duration(point.seconds)} | {point.top1:.1f} ± {point.deviation:.1f} |"
        )
    lines += ["", "- seconds of the distillation itself by the clock, images read among it"]
    if arguments.add:
        each = ", ".join(f"{name} {duration(seconds)}" for name, seconds in arguments.add.items())
        lines.append(f"- with what was trained before: {each}")
    chosen = [name for name in CHOSEN if any(point.arm == name for point in points)]
    if without := [name for name in chosen if name != "random" and name not in arguments.add]:
        lines.append(f"- without the training of the teacher that {', '.join(without)} choose by")
    return "\n".join([*lines, ""])
