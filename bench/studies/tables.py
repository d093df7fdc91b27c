"""What the tables of studies have in common: means with their spread, paired gains, and CSV files."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ddfast.files import atomic_write_text, make_folder


def mean_and_spread(means: Sequence[float], students: Sequence[float] = ()) -> str:
    """`55.1 ± 0.8`: of the sets' means, with their deviation; of a single set, that of its students."""
    spread = means if len(means) > 1 else students
    deviation = f" ± {statistics.stdev(spread):.1f}" if len(spread) > 1 else ""
    return f"{statistics.mean(means):.1f}{deviation}"


def paired(gains: Sequence[float]) -> str:
    """`+1.20 ± 0.30 over 3 sets (+0.90, +1.20, +1.50)`: the gain of every set, their mean and deviation."""
    text = f"{statistics.mean(gains):+.2f}"
    if len(gains) < 2:
        return text
    each = ", ".join(f"{gain:+.2f}" for gain in gains)
    return f"{text} ± {statistics.stdev(gains):.2f} over {len(gains)} sets ({each})"


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, whole or not at all; its folder is made where it is missing."""
    make_folder(path.parent)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())
