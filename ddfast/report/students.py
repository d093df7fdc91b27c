"""How students did that were trained on a set: a table for each recipe, so that none compares what cannot be."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddfast.errors import UsageError
from ddfast.output.evaluations import EVALUATIONS, evaluations_of_set
from ddfast.wording import plural

_REGIONS = {"chosen": "Images and their chosen regions. ", "all": "Images and all of their regions. "}
_LABELS = {"online": "labelled online by a teacher", "stored": "stored soft labels", "hard": "hard labels"}


@dataclass(frozen=True)
class StudentTable:
    """The results of one recipe on one test set: a title, what the recipe is, and a row for each evaluation."""

    title: str
    note: str
    rows: list[tuple[str, ...]]


COLUMNS = (
    "images",
    "students",
    "top-1, mean ± deviation",
    "top-5",
    "best tested epoch",
    "better than random",
)


def student_tables(root: Path) -> list[StudentTable]:
    """What `evaluations.json` holds of the set that stands in the folder now, in the order of the first results.

    Raises:
        UsageError: the file is damaged.
    """
    by_recipe: dict[tuple[str, str], list[dict[str, Any]]] = {}
    try:
        for one in evaluations_of_set(root):
            key = (str(one.get("recipe")), str((one.get("digests") or {}).get("test")))
            by_recipe.setdefault(key, []).append(one)
        return [_table(held) for held in by_recipe.values()]
    except _DAMAGED as error:
        raise _damaged(root, error) from error


def _table(held: Sequence[Mapping[str, Any]]) -> StudentTable:
    first = held[0]
    options = "".join(f", {name} {value}" for name, value in first["arch_options"].items())
    digests = first.get("digests") or {}
    bytes_of = ", ".join(
        f"{name} {value}" for name, value in digests.items() if name != "images" and value is not None
    )
    return StudentTable(
        title=f"{first['arch']}{options}: protocol {first['protocol']}, {_LABELS[first['labels']]}",
        note=f"{plural(first['epochs'], 'epoch')} of batch {first['batch_size']}, {plural(first['steps'], 'step')}. "
        f"{_REGIONS.get(first.get('regions', ''), '')}Recipe {first['recipe']}; bytes of {bytes_of}.",
        rows=[_row(one) for one in held],
    )


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    top1 = [float(value) for value in one["top1"]]
    return (
        f"{one['images']}, bytes {(one.get('digests') or {}).get('images', '')}",
        str(len(top1)),
        _accuracy(top1),
        f"{statistics.fmean(one['top5']):.1f}%",
        f"{statistics.fmean(one['best']):.1f}%",
        _points(one),
    )


def _accuracy(top1: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
    return f"{statistics.fmean(top1):.1f}%{deviation}"


def _points(one: Mapping[str, Any]) -> str:
    """How much better than those of a random set, and the standard error; of one student each none is known."""
    better = one.get("better_than_random")
    if better is None:
        return "–"
    error = f" ± {better['error']:.1f}" if len(one["top1"]) > 1 else ""
    return f"{better['points']:+.1f}{error}".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Verdict:
    """The answer to "better than random?", and what it rests on.

    Attributes:
        answer: in a few words.
        note: sentences below it.
        command: what gives the answer, where there is none yet.
        good: whether it is a yes.
    """

    answer: str
    note: str
    command: str = ""
    good: bool = False


_BASELINES = ("random", "random_hard")
_COMPARE = "ddfast compare FOLDER --data DATA && ddfast report FOLDER"


def verdict(root: Path, method: str) -> Verdict:
    """What the last comparison says of the set; where there was none, how to find out.

    Raises:
        UsageError: `evaluations.json` is damaged.
    """
    held = evaluations_of_set(root)
    compared = [one for one in held if one.get("better_than_random")]
    try:
        if compared:
            return _compared(compared[-1])
        alone = _alone(held[-1]) if held else ""
    except _DAMAGED as error:
        raise _damaged(root, error) from error
    if method in _BASELINES:
        return Verdict("This is the random set", f"{alone}Others are measured by it:".strip(), _COMPARE)
    return Verdict(
        "Not measured yet",
        f"{alone}Students of this set and of as many random images, trained by one recipe, give the answer:",
        _COMPARE,
    )


def _alone(one: Mapping[str, Any]) -> str:
    top1 = [float(value) for value in one["top1"]]
    return f"Students reach {_accuracy(top1)} ({one['arch']}, {_LABELS[one['labels']]}), which alone says little. "


def _compared(one: Mapping[str, Any]) -> Verdict:
    points, error = float(one["better_than_random"]["points"]), float(one["better_than_random"]["error"])
    top1 = [float(value) for value in one["top1"]]
    several = len(top1) > 1
    if abs(points) <= error:
        answer = f"Not shown: {_points(one)} points"
    else:
        answer = f"{'Yes, by' if points > 0 else 'No, worse by'} {abs(points):.1f}"
        answer += (f" ± {error:.1f}" if several else "") + " points"
    spread = (
        "± is the standard error of the difference."
        if several
        else "One student each: how far it would spread is not known."
    )
    how = f"top-1 of {one['arch']}, {_LABELS[one['labels']]}"
    return Verdict(answer, f"Students reach {_accuracy(top1)} ({how}). {spread}", good=points > error)


_DAMAGED = (KeyError, TypeError, ValueError, AttributeError)


def _damaged(root: Path, error: Exception) -> UsageError:
    return UsageError(f"{root / EVALUATIONS} is damaged ({type(error).__name__}: {error}): mend or delete it")
