"""What the league has found."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.studies.league.costs import Cost
from bench.studies.league.roster import MEMBERS, Entry

BASE = MEMBERS[0].name  # what the others are measured by


@dataclass(frozen=True)
class Found:
    """The students of one architecture and kind of labels on one row at one IPC: a set and a student for each seed.

    Attributes:
        entry: the row.
        ipc: images per class.
        student: architecture.
        labels: "hard" or "soft".
        sets: results as `train_students` puts them together, by seed.
        costs: of the sets.
    """

    entry: Entry
    ipc: int
    student: str
    labels: str
    sets: Sequence[dict[str, Any]]
    costs: Sequence[Cost]

    @property
    def top1(self) -> list[float]:
        """Accuracy in percent of each set's student."""
        return [float(each["mean"]) for each in self.sets]

    @property
    def seconds(self) -> float:
        """Core-seconds of a set, mean over the sets."""
        return statistics.mean(cost.core_seconds for cost in self.costs)


@dataclass
class Results:
    """All that is finished, and what is left out: (row, IPC, reason), with the kind of labels where only one is."""

    title: str
    found: list[Found] = field(default_factory=list)
    left_out: list[tuple[str, int, str]] = field(default_factory=list)

    def at(self, name: str, ipc: int, student: str, labels: str) -> Found | None:
        """The cell of a row."""
        wanted = name, ipc, student, labels
        cells = (
            each for each in self.found if (each.entry.name, each.ipc, each.student, each.labels) == wanted
        )
        return next(cells, None)

    def gains(self, each: Found) -> list[float] | None:
        """By how many points each set is better than random images of its seed; None where there are none."""
        base = self.at(BASE, each.ipc, each.student, each.labels)
        if base is None or base is each or len(base.sets) != len(each.sets):
            return None
        return [ours - theirs for ours, theirs in zip(each.top1, base.top1, strict=True)]
