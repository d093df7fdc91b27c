"""Results side by side: tables of one recipe each, and what a set is better than random images by."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddfast.errors import UsageError
from ddfast.training.evaluation import EvaluationResult
from ddfast.wording import plural

COLUMNS = ("soft", "hard")
"""The labels that students are trained on: those stored of a teacher, or the class."""

CSV_NAME = "comparison.csv"


@dataclass(frozen=True)
class Row:
    """One set in a table.

    Attributes:
        name: what it is called.
        kind: "set", "random" or "coreset".
        folder: of the set.
        method: that made it.
        results: by column, "soft" where it has soft labels and "hard".
        random: name of the row of the random set of its size; None for the others.
    """

    name: str
    kind: str
    folder: Path
    method: str
    results: Mapping[str, EvaluationResult]
    random: str | None = None


@dataclass(frozen=True)
class Better:
    """How much better students of a set did than those of a random one.

    Attributes:
        name: of the set.
        points: difference of the mean accuracies, in percentage points.
        error: standard error of that difference, sqrt(s1^2 / n1 + s2^2 / n2) of the deviations over n students; 0
            where there is one student each, of which no deviation is known.
        labels: "soft" or "hard".
    """

    name: str
    points: float
    error: float
    labels: str

    def __str__(self) -> str:
        return f"better than random by {self.points:.2f} ± {self.error:.2f} points"


@dataclass(frozen=True)
class Table:
    """Sets that may be compared: each column has one recipe and one test set.

    Attributes:
        rows: the sets that were given, then the random ones, then the coresets.
        ipc: images per class.
        images: of each set.
        image_size: in pixels.
        teacher: architecture and test accuracy in percent of the teacher; None where there is none.

    Raises:
        UsageError: two results of a column have different recipes or test images.
    """

    rows: Sequence[Row]
    ipc: int
    images: int
    image_size: int
    teacher: tuple[str, float] | None = None

    def __post_init__(self) -> None:
        for column in COLUMNS:
            held = [(row, row.results[column]) for row in self.rows if column in row.results]
            for row, result in held[1:]:
                first, other = held[0]
                for what, ours, theirs in (
                    ("the recipe", result.recipe, other.recipe),
                    ("test images", result.digests.get("test"), other.digests.get("test")),
                ):
                    if ours != theirs:
                        raise UsageError(
                            f"{row.name} and {first.name} cannot stand in one table: {what} {ours} is not {theirs}; "
                            "train both by the same protocol, students and steps, and test them on the same images"
                        )

    @property
    def columns(self) -> list[str]:
        """The columns in which there is anything."""
        return [name for name in COLUMNS if any(name in row.results for row in self.rows)]

    def recipe(self, column: str) -> EvaluationResult:
        """A result of the column; its recipe is that of all."""
        return next(row.results[column] for row in self.rows if column in row.results)

    def better(self) -> list[Better]:
        """Of each set that was given: by soft labels where it and its random set have them, else by hard ones."""
        by_name = {row.name: row for row in self.rows}
        found = []
        for row in self.rows:
            if row.random is not None:
                other = by_name[row.random]
                column = next(name for name in COLUMNS if name in row.results and name in other.results)
                found.append(better_of(row.name, row.results[column], other.results[column], column))
        return found

    def __str__(self) -> str:
        width = max([len("teacher"), *(len(row.name) for row in self.rows)])
        columns = self.columns
        first = self.recipe(columns[0])
        options = "".join(f", {name} {value}" for name, value in first.arch_options.items())
        lines = [
            f"{plural(self.images, 'image')} (IPC {self.ipc}) of {self.image_size} px; {first.arch}{options}, protocol "
            f"{first.protocol}, {plural(first.steps, 'step')} of batch {first.batch_size}, "
            f"{plural(len(first.seeds), 'student')} each",
            "  ".join(["set".ljust(width), *(f"{name} labels".ljust(15) for name in columns)]).rstrip(),
        ]
        for row in self.rows:
            cells = [str(row.results[c]).removeprefix("top1 ") if c in row.results else "–" for c in columns]
            lines.append("  ".join([row.name.ljust(width), *(cell.ljust(15) for cell in cells)]).rstrip())
        if self.teacher is not None:
            lines.append(f"{'teacher'.ljust(width)}  {self.teacher[1]:.2f} ({self.teacher[0]})")
        lines.append("recipes: " + ", ".join(f"{name} labels {self.recipe(name).recipe}" for name in columns))
        return "\n".join(lines)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        tables: one for each size of sets (and each teacher of soft labels).
        notes: what is left out, and why.
        out: folder of all that was written.
    """

    tables: Sequence[Table]
    notes: Sequence[str]
    out: Path

    @property
    def csv(self) -> Path:
        """Path of the table of all results."""
        return self.out / CSV_NAME

    @property
    def report(self) -> Path:
        """Path of the page of the first table; those of others are in folders beside it."""
        return self.out / "report.html"

    @property
    def better(self) -> list[Better]:
        """The answer to "better than random?" of every set that was given, in the order of the tables."""
        return [one for table in self.tables for one in table.better()]

    def __str__(self) -> str:
        lines = [str(table) for table in self.tables]
        lines += [f"note: {note}" for note in self.notes]
        found = self.better
        if len(found) == 1:
            return "\n".join(
                [*lines, f"by {found[0].labels} labels, ± is the standard error:", str(found[0])]
            )
        lines.append("± is the standard error:")
        return "\n".join([*lines, *(f"{one.name}, {one.labels} labels: {one}" for one in found)])


def better_of(name: str, ours: EvaluationResult, random: EvaluationResult, column: str) -> Better:
    """What a set is better than random images by, in points, with the standard error of the difference."""
    error = math.sqrt(ours.std**2 / len(ours.top1) + random.std**2 / len(random.top1))
    return Better(name, ours.mean - random.mean, error, column)


def in_words(one: Better) -> str:
    """The headline as a sentence of the page."""
    word = "better" if one.points >= 0 else "worse"
    return (
        f"{one.name} is {word} than random by {abs(one.points):.1f} ± {one.error:.1f} points of top-1 accuracy "
        f"({one.labels} labels; ± is the standard error of the difference)"
    )


def comparison_csv(found: Comparison) -> str:
    """A row a set and kind of labels."""
    buffer = io.StringIO()
    names = (
        *(
            "table",
            "name",
            "kind",
            "method",
            "ipc",
            "images",
            "image_size",
            "labels",
            "arch",
            "protocol",
            "epochs",
        ),
        *(
            "batch_size",
            "steps",
            "students",
            "top1",
            "top1_std",
            "top5",
            "best",
            "better_than_random",
            "error",
        ),
        *("recipe", "images_sha256", "labels_sha256", "teacher_sha256", "test_sha256"),
    )
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    for number, table in enumerate(found.tables, start=1):
        better = {(one.name, one.labels): one for one in table.better()}
        size = {"table": number, "ipc": table.ipc, "images": table.images, "image_size": table.image_size}
        for row in table.rows:
            for column, result in row.results.items():
                one = better.get((row.name, column))
                writer.writerow(
                    {
                        **size,
                        "name": row.name,
                        "kind": row.kind,
                        "method": row.method,
                        "labels": column,
                        "arch": result.arch,
                        "protocol": result.protocol,
                        "epochs": result.epochs,
                        "batch_size": result.batch_size,
                        "steps": result.steps,
                        "students": len(result.seeds),
                        "top1": result.mean,
                        "top1_std": result.std,
                        "top5": result.top5_mean,
                        "best": result.best_mean,
                        "recipe": result.recipe,
                        **({} if one is None else {"better_than_random": one.points, "error": one.error}),
                        **{f"{name}_sha256": value or "" for name, value in result.digests.items()},
                    }
                )
        if table.teacher is not None:
            arch, top1 = table.teacher
            writer.writerow(
                {
                    **size,
                    "images": "",
                    "ipc": "",
                    "name": "teacher",
                    "kind": "teacher",
                    "arch": arch,
                    "top1": top1,
                }
            )
    return buffer.getvalue()
