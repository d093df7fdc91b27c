"""The league's results: a row a student in a CSV file, the page, and accuracy against core-seconds."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.studies.against_time import Point, draw
from bench.studies.arguments import told
from bench.studies.arms import Setup
from bench.studies.cmi import SUBJECTS
from bench.studies.compare import made_with, teacher_fact
from bench.studies.league.results import Found, Results
from bench.studies.league.roster import Entry
from bench.studies.tables import mean_and_spread, paired, write_rows
from ddfast.files import atomic_write_text
from ddfast.progress import duration

COLUMNS = (
    *("method", "ipc", "student", "labels", "protocol", "set", "epochs", "steps", "batch_size", "top1"),
    *("over_random", "seconds", "core_seconds", "peak_memory", "image_bytes", "label_bytes"),
    *("options", "commits"),
)
_READ_BY_TEACHER = ("herding", "k-center", "k-means", "RDED", "InfoUtil", "SRe2L", "SRe2L + CMI")


def write(
    results: Results,
    rows: Sequence[Entry],
    setup: Setup,
    out: Path,
    arguments: argparse.Namespace,
    argv: Sequence[str],
) -> str:
    """Write `<out>.csv` and `<out>.md`; returns the page."""
    write_rows(out.with_suffix(".csv"), COLUMNS, _csv_rows(results, arguments))
    text = page(results, rows, setup, out, arguments, argv)
    atomic_write_text(out.with_suffix(".md"), text)
    return text


def draw_figures(results: Results, out: Path, arguments: argparse.Namespace) -> None:
    """Accuracy against core-seconds, a figure for each kind of labels."""
    for labels in arguments.labels:
        if points := [_point(each) for each in results.found if each.labels == labels]:
            draw(_picture(out, labels), points, f"{_clock(results)} of a synthesis")


def _picture(out: Path, labels: str) -> Path:
    return out.with_name(f"{out.name}_{labels}.png")


def _csv_rows(results: Results, arguments: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    for each in results.found:
        gains = results.gains(each)
        options = json.dumps(each.entry.spent(each.ipc, arguments))[1:-1]
        for place, (one, cost) in enumerate(zip(each.sets, each.costs, strict=True)):
            yield (
                *(each.entry.name, each.ipc, each.student, each.labels, one["protocol"], one["seeds"][0]),
                *(one["epochs"], one["steps"], one["batch_size"], f"{each.top1[place]:.2f}"),
                "" if gains is None else f"{gains[place]:.2f}",
                *(f"{cost.seconds:.3f}", f"{cost.core_seconds:.3f}"),
                *("" if cost.peak_memory is None else cost.peak_memory, cost.image_bytes, cost.label_bytes),
                *(options, " ".join(one["commits"])),
            )


def _point(each: Found) -> Point:
    spread = statistics.stdev(each.top1) if len(each.top1) > 1 else 0.0
    return Point(
        each.entry.name,
        each.ipc,
        each.student,
        each.labels,
        "",
        each.seconds,
        statistics.mean(each.top1),
        spread,
    )


def _clock(results: Results) -> str:
    """What seconds are of."""
    devices = {cost.device for each in results.found for cost in each.costs}
    return (
        "core-seconds"
        if devices <= {"cpu"}
        else "GPU-seconds"
        if devices == {"cuda"}
        else "core- or GPU-seconds"
    )


# The page ---------------------------------------------------------------------------------------------------


def page(
    results: Results,
    rows: Sequence[Entry],
    setup: Setup,
    out: Path,
    arguments: argparse.Namespace,
    argv: Sequence[str],
) -> str:
    """The page in Markdown."""
    lines = [
        f"# {results.title}",
        "",
        told("league", argv),
        "Test top-1 in percent after the last epoch, mean ± deviation over sets, each distilled with a seed of its own "
        "for one student. Over random: points gained on random images of the same seed with the same labels, mean ± "
        "deviation over the pairs. A set: what making its images takes; memory is the peak of its process; bytes are "
        "those of its images (float32 where they were optimised) and of a byte or two a class label.",
    ]
    for student in arguments.student:
        for ipc in arguments.ipc:
            if any((each.ipc, each.student) == (ipc, student) for each in results.found):
                lines += ["", f"## IPC {ipc}, students {student}", ""]
                lines += _table(results, rows, ipc, student, arguments)
    if results.left_out:
        lines += ["", "## Left out", ""]
        lines += [f"- {name}, IPC {ipc}: {reason}" for name, ipc, reason in dict.fromkeys(results.left_out)]
    drawn = [labels for labels in arguments.labels if _picture(out, labels).is_file()]
    lines += ["", "## Accuracy against time", ""] if drawn else []
    lines += [f"![{labels} labels: accuracy against time]({_picture(out, labels).name})" for labels in drawn]
    lines += ["", "## How it was made", "", *_recipe(results, arguments), *_made(results, setup, arguments)]
    lines += ["", "## Budgets", "", *_budgets(results, rows, arguments)]
    return "\n".join([*lines, ""])


def _table(
    results: Results, rows: Sequence[Entry], ipc: int, student: str, arguments: argparse.Namespace
) -> list[str]:
    """Methods down; accuracies, gains and costs across."""
    head = ["method"]
    for labels in arguments.labels:
        head += [f"{labels} labels", "over random"]
    head += ["a set takes", f"{_clock(results)}", "peak memory", "bytes of a set"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' --- |' * (len(head) - 1)}"]
    for entry in rows:
        cells, costs = [entry.name], None
        for labels in arguments.labels:
            found = results.at(entry.name, ipc, student, labels)
            gains = None if found is None else results.gains(found)
            cells += [
                "" if found is None else mean_and_spread(found.top1),
                "" if gains is None else paired(gains),
            ]
            costs = found.costs if found is not None else costs
        if costs is not None:
            peaks = [cost.peak_memory for cost in costs if cost.peak_memory is not None]
            cells += [
                duration(statistics.mean(cost.seconds for cost in costs)),
                f"{statistics.mean(cost.core_seconds for cost in costs):,.0f}",
                f"{max(peaks) / 1e6:,.0f} MB" if peaks else "",
                f"{statistics.mean(cost.image_bytes + cost.label_bytes for cost in costs):,.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _recipe(results: Results, arguments: argparse.Namespace) -> list[str]:
    """The students' training: the same of every row, and how many passes that is where it differs."""
    lines = []
    for labels in arguments.labels:
        for ipc in arguments.ipc:
            cells = [each for each in results.found if (each.labels, each.ipc) == (labels, ipc)]
            if not cells:
                continue
            first = cells[0].sets[0]
            passes: dict[int, list[str]] = {}
            for each in cells:
                of_passes = passes.setdefault(each.sets[0]["epochs"], [])
                of_passes += [] if each.entry.name in of_passes else [each.entry.name]
            usual = max(passes, key=lambda epochs: len(passes[epochs]))
            others = "; ".join(
                f"{count} for {', '.join(names)}" for count, names in passes.items() if count != usual
            )
            steps = sorted({each.sets[0]["steps"] for each in cells})
            counted = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
            lines.append(
                f"- {labels} labels, IPC {ipc}: protocol {first['protocol']}, {counted} steps of batch "
                f"{first['batch_size']}, {usual:,} passes{f' ({others})' if others else ''}, "
                f"{len(cells[0].sets)} sets a row"
            )
    return lines


def _made(results: Results, setup: Setup, arguments: argparse.Namespace) -> list[str]:
    """Data, teacher, what was trained before, and the commit."""
    size = setup.teacher.stat().st_size
    used = dict.fromkeys(name for each in results.found for name in each.entry.needs)
    trained = [
        f"{name} {duration(arguments.trained[name])} on a core"
        if name in arguments.trained
        else f"{name} not told"
        for name in ("teacher", *used)
    ]
    readers = [name for name in _READ_BY_TEACHER if any(each.entry.name == name for each in results.found)]
    taught = f"; {', '.join(readers)} need the teacher, soft labels too" if readers else ""
    return [
        f"- data {Path(setup.data).name}; methods that choose have {setup.images_per_class} images a class, the others "
        "all",
        f"- teacher {teacher_fact(setup.teacher)}: soft labels are its own on the students' batches, {size:,} bytes "
        "for all rows alike",
        f"- trained before, and not among the seconds of a set: {', '.join(trained)}{taught}",
        f"- {made_with([one for each in results.found for one in each.sets], setup.precision)}"
        if results.found
        else "- nothing is finished",
    ]


def _budgets(results: Results, rows: Sequence[Entry], arguments: argparse.Namespace) -> list[str]:
    """Every row's settings; what is not named is the method's own default. Beside it what its paper spends."""
    papers = {subject.name: subject.budget for subject in SUBJECTS.values()}
    lines = []
    for entry in rows:
        of_ipc: dict[str, list[int]] = {}
        for ipc in arguments.ipc:
            if any((each.entry, each.ipc) == (entry, ipc) for each in results.found):
                of_ipc.setdefault(entry.spent(ipc, arguments), []).append(ipc)
        for spent, ipcs in of_ipc.items():
            where = "" if len(of_ipc) == 1 else f" at IPC {', '.join(map(str, ipcs))}"
            paper = papers.get(entry.member.name)
            lines.append(f"- {entry.name}{where}: `{spent}`" + (f" (the paper: {paper})" if paper else ""))
    return lines
