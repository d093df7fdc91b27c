"""What a distilled folder holds, as a report needs it: facts, shown images, class rows, scores, a sample of sources.

Everything is read from the folder (and, for the pictures of sources, from the data); nothing depends on time or host.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddfast.errors import UsageError
from ddfast.output.mosaic import SHOWN_CLASSES, spread
from ddfast.report.folder import SELECTION, SHOWN_TABLE_ROWS, Folder

if TYPE_CHECKING:
    from torch import Tensor
SHOWN_IMAGES = 10
SAMPLES = 24
SAMPLES_PER_CLASS = 3
SHOWN_QUARANTINED = 50


# The facts on top --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """One headline: a name, a value, and a note below it."""

    name: str
    value: str
    note: str = ""


def facts(folder: Folder) -> list[Fact]:
    """The run in a handful of numbers."""
    plan = folder.manifest
    counts = plan.get("counts") or {}
    images, classes = folder.images, len(folder.class_names)
    tiles = f"{folder.factor}×{folder.factor} tiles an image" if folder.factor > 1 else "one crop an image"
    preset = f"preset {plan['preset']}" if plan.get("preset") else "default settings"
    found = [
        Fact("Method", str(plan["method"]), preset),
        Fact("Images", f"{images:,}", f"{plan['ipc']} per class × {classes} classes"),
        Fact("Image size", f"{folder.image_size} px", tiles),
    ]
    teacher, labelled_by = plan.get("teacher"), plan.get("label_teacher")
    if teacher:
        found.append(Fact("Teacher", str(teacher["arch"]), _accuracy(teacher)))
    if labelled_by and labelled_by != teacher:
        found.append(Fact("Label teacher", str(labelled_by["arch"]), _accuracy(labelled_by)))
    total = plan.get("data", {}).get("images")
    scored = counts.get("sources")
    if scored is not None:
        found.append(
            Fact("Sources scored", f"{scored:,}", f"of {total:,} in the training split" if total else "")
        )
    if counts.get("quarantined") is not None:
        bad = counts["quarantined"]
        found.append(
            Fact(
                "Quarantined",
                f"{bad:,}",
                f"file{'s' if bad > 1 else ''} that could not be read" if bad else "every file was read",
            )
        )
    return found


def _accuracy(teacher: dict[str, Any]) -> str:
    parts = []
    if teacher.get("top1") is not None:
        parts.append(f"{teacher['top1']:.1f}% top-1")
    if teacher.get("epoch") is not None:
        parts.append(f"epoch {teacher['epoch']}")
    return ", ".join(parts)


def settings(folder: Folder) -> list[tuple[str, str]]:
    """Every setting of the manifest as (dotted name, value), without the lists shown elsewhere."""
    hidden = {"class_names", "display_names", "counts", "quarantined", "complete", "accuracy"}
    found: list[tuple[str, str]] = []

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}" if name else str(key), inner)
        elif isinstance(value, list):
            found.append((name, ", ".join(map(str, value))))
        else:
            found.append((name, "–" if value is None else str(value)))

    for key, value in folder.manifest.items():
        if key not in hidden:
            walk(key, value)
    return found


def shown_images(folder: Folder) -> tuple[list[tuple[str, list[int]]], str | None]:
    """Rows of the mosaic, (class name, places in `rows`), and a note where images or classes are left out."""
    labels = spread(len(folder.class_names), SHOWN_CLASSES)
    by_label: dict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(folder.rows):
        by_label[row["label"]].append(place)
    rows = [
        (folder.class_names[label], by_label[label][:SHOWN_IMAGES]) for label in labels if by_label[label]
    ]
    left_out = []
    if len(labels) < len(folder.class_names):
        left_out.append(f"{len(labels)} of {len(folder.class_names)} classes")
    most = max((len(places) for places in by_label.values()), default=0)
    if most > SHOWN_IMAGES:
        left_out.append(f"the first {SHOWN_IMAGES} of {most} images of each")
    return rows, f"Shown: {', '.join(left_out)}." if left_out else None


# Scores ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreColumn:
    """What the selection ranked by, for every candidate crop.

    Attributes:
        name: in words.
        values: of all candidates; infinities and NaN are left out.
        kept: of the selected crops.
    """

    name: str
    values: NDArray[np.float64]
    kept: NDArray[np.float64]


def score_column(folder: Folder) -> ScoreColumn | None:
    """Find the column of the score table (or its negative) that holds the scores of the selection.

    None where nothing was ranked by a number.
    """
    kept = np.array([row.score for row in folder.selection if row.score is not None], np.float64)
    if kept.size == 0:
        return None
    if folder.scores is not None and len(kept) == len(folder.selection):
        where = _rows_of_selection(folder)
        own = {"random": "random draw", "forgetting": "forgetting events"}
        for name, column, sign, title in (
            ("score", "score", 1, own.get(folder.manifest["method"], "score")),
            ("grad_norm", "grad_norm", 1, "gradient norm of the teacher's loss"),
            ("loss", "loss", 1, "teacher's loss, nats"),
            ("loss", "loss", -1, "teacher's loss with its sign turned, nats"),
        ):
            values = sign * folder.scores[column].astype(np.float64)
            if np.array_equal(values[where].astype(np.float32), kept.astype(np.float32)):
                if name == "loss":
                    values, kept, title = np.abs(values), np.abs(kept), "teacher's loss, nats"
                return ScoreColumn(title, values[np.isfinite(values)], kept)
    return ScoreColumn("score", kept, kept)


def _rows_of_selection(folder: Folder) -> NDArray[np.int64]:
    """Row of the score table of every selected crop: same source, same box."""
    assert folder.scores is not None
    wanted = np.array([row.sample_id for row in folder.selection], np.int64)
    candidates = np.flatnonzero(np.isin(folder.scores["sample_id"], wanted))
    place = {
        (int(folder.scores["sample_id"][row]), *folder.scores["box"][row].tolist()): int(row)
        for row in candidates[::-1]
    }
    try:
        crops = [(row.sample_id, *row.box) for row in folder.selection]
        return np.array([place[crop] for crop in crops], np.int64)
    except KeyError as error:
        raise UsageError(
            f"{folder.root / SELECTION} names a crop that the score table lacks: select again"
        ) from error


# Classes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassRow:
    """One class in the table.

    Attributes:
        name: of the class.
        sources: scored, None without a score table.
        images: distilled.
        score: mean of the kept crops' scores, None where there are none.
        low: smallest kept score.
        high: largest kept score.
        read: share of the kept crops that the teacher reads as the class, None where it was not measured.
        own: mean probability of the class in the stored soft labels, None without.
        entropy: mean entropy of the stored soft labels in bits, None without.
    """

    name: str
    sources: int | None
    images: int
    score: float | None
    low: float | None
    high: float | None
    read: float | None
    own: float | None
    entropy: float | None


def class_rows(folder: Folder) -> list[ClassRow]:
    """The first `SHOWN_TABLE_ROWS` classes, in label order."""
    images: dict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(folder.rows):
        images[row["label"]].append(place)
    kept: dict[int, list[int]] = defaultdict(list)
    for index, chosen in enumerate(folder.selection):
        kept[chosen.label].append(index)
    where = _rows_of_selection(folder) if folder.scores is not None and folder.selection else None
    measured = folder.scores is not None and bool(np.isfinite(folder.scores["loss"]).any())
    sources: dict[int, int] = {}
    if folder.scores is not None:
        _, firsts = np.unique(folder.scores["sample_id"], return_index=True)
        labels, counts = np.unique(folder.scores["label"][firsts], return_counts=True)
        sources = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    rows = []
    for label, name in enumerate(folder.class_names[:SHOWN_TABLE_ROWS]):
        numbers = [s for s in (folder.selection[i].score for i in kept[label]) if s is not None]
        read = None
        if where is not None and measured and kept[label] and folder.scores is not None:
            read = float(np.mean(folder.scores["correct"][where[kept[label]]]))
        own = entropy = None
        if folder.soft_labels is not None and images[label]:
            stored = folder.soft_labels.dense(_index(images[label])).double()
            own = float(stored[:, :, label].mean())
            entropy = float(-(stored * stored.clamp(min=1e-12).log2()).sum(dim=2).mean())
        rows.append(
            ClassRow(
                name=name,
                sources=sources.get(label, 0) if folder.scores is not None else None,
                images=len(images[label]),
                score=float(np.mean(numbers)) if numbers else None,
                low=min(numbers, default=None),
                high=max(numbers, default=None),
                read=read,
                own=own,
                entropy=entropy,
            )
        )
    return rows


def _index(places: Iterable[int]) -> Tensor:
    import torch

    return torch.tensor(list(places), dtype=torch.int64)


def number(value: float | None, digits: int = 3) -> str:
    """A number at so many significant digits, as people write it; `–` for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:,.{decimals}f}".replace("-", _MINUS)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", _MINUS)


_MINUS = "\N{MINUS SIGN}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
