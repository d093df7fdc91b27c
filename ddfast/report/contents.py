"""What a distilled folder holds, as a report needs it: facts, shown images, class rows, scores, a sample of sources.

Everything is read from the folder (and, for the pictures of sources, from the data); nothing depends on time or host.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddfast.errors import BadImage, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ddfast.data.distilled import SoftLabels
    from ddfast.data.sources import Source

SCORES = "scores"
# What is held in memory of the score table; heatmaps are read for the shown sources only.
_COLUMNS = ("sample_id", "label", "crop", "box", "score", "grad_norm", "loss", "correct")
SELECTION = "selection.parquet"
SHOWN_CLASSES = 40
SHOWN_IMAGES = 10
SHOWN_TABLE_ROWS = 200
SAMPLES = 24
SAMPLES_PER_CLASS = 3
SHOWN_QUARANTINED = 50


@dataclass(frozen=True)
class Selected:
    """One row of the selection: the crop that fills a tile."""

    label: int
    image: int
    tile: int
    sample_id: int
    key: str
    box: tuple[float, float, float, float]
    score: float | None


@dataclass
class Folder:
    """A distilled folder, read: all of its classes, or of very many those that a report shows.

    Attributes:
        root: the folder.
        manifest: `manifest.json`.
        images: distilled images of all classes.
        rows: `train/metadata.jsonl`, as are all below of the shown classes.
        selection: rows of `selection.parquet`, by class, image and tile.
        scores: columns of the score table as arrays, see `ddfast.data.table`; None where there is none.
        soft_labels: of the images in `rows`; None where there are none.
    """

    root: Path
    manifest: dict[str, Any]
    images: int
    rows: list[dict[str, Any]]
    selection: list[Selected]
    scores: dict[str, NDArray[Any]] | None
    soft_labels: SoftLabels | None
    _pictures: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def class_names(self) -> list[str]:
        """In label order."""
        return [str(name) for name in self.manifest["class_names"]]

    @property
    def factor(self) -> int:
        """Tiles per side."""
        return int(self.manifest["factor"])

    @property
    def tiles(self) -> int:
        """Tiles of an image."""
        return self.factor**2

    @property
    def image_size(self) -> int:
        """Side of a distilled image, in pixels."""
        return int(self.manifest["image_size"])

    def rows_of(self, label: int) -> list[int]:
        """Places in `rows` of a class's images, in order."""
        return [place for place, row in enumerate(self.rows) if row["label"] == label]

    def image(self, place: int) -> Tensor:
        """Pixels of the image at `place` in `rows`, uint8 [3, S, S]."""
        from ddfast.data.decoding import decode

        name = self.rows[place]["file_name"]
        if name not in self._pictures:
            self._pictures[name] = decode((self.root / "train" / name).read_bytes())
        return self._pictures[name]

    def tile_of(self, selected: Selected) -> Tensor:
        """Pixels of a tile as it stands in its image, uint8 [3, S / factor, S / factor]."""
        image = self.image(self.rows_of(selected.label)[selected.image])
        side = self.image_size // self.factor
        top, left = (index * side for index in divmod(selected.tile, self.factor))
        return image[:, top : top + side, left : left + side]


def shown_labels(classes: int) -> NDArray[np.int64]:
    """Labels whose images, crops and scores a report holds: the first of the table and those of the mosaic, sorted.

    All of up to `SHOWN_TABLE_ROWS` classes, so that the memory of a report does not grow with the number of classes.
    """
    return np.union1d(np.arange(min(classes, SHOWN_TABLE_ROWS)), spread(classes, SHOWN_CLASSES))


def read_folder(root: str | Path) -> Folder:
    """Read a folder whose images, selection and score table stand; soft labels may be missing.

    Raises:
        UsageError: no such folder, or a part that is missing or damaged.
    """
    from ddfast.data.distilled import MANIFEST, METADATA, SOFT_LABELS, read_soft_labels
    from ddfast.data.table import SELECTION_SCHEMA, iter_table, to_numpy

    root = Path(root)
    places: list[int] = []
    rows = []
    images = 0
    try:
        manifest = json.loads((root / MANIFEST).read_text("utf-8"))
        shown = shown_labels(len(manifest["class_names"]))
        with open(root / METADATA, encoding="utf-8") as lines:
            for line in filter(str.strip, lines):
                row = json.loads(line)
                if row["label"] in shown:
                    places.append(images)
                    rows.append(row)
                images += 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{root} is no distilled set with images ({error}): run ddfast distill first"
        ) from error
    columns = _of_labels((to_numpy(block) for block in iter_table(root / SELECTION, SELECTION_SCHEMA)), shown)
    selection = [
        Selected(
            label=int(columns["label"][i]),
            image=int(columns["image"][i]),
            tile=int(columns["tile"][i]),
            sample_id=int(columns["sample_id"][i]),
            key=str(columns["key"][i]),
            box=tuple(float(edge) for edge in columns["box"][i]),  # type: ignore[arg-type]
            score=_finite(columns["score"][i]),
        )
        for i in np.lexsort((columns["tile"], columns["image"], columns["label"]))
    ]
    scores = _of_labels(_score_parts(root / SCORES), shown) if (root / SCORES).is_dir() else None
    labels = None
    if (root / SOFT_LABELS).is_file():
        whole = len(places) == images
        labels = read_soft_labels(root, len(manifest["class_names"]), None if whole else places)
    return Folder(root, manifest, images, rows, selection, scores, labels)


def _score_parts(folder: Path) -> Iterator[dict[str, NDArray[Any]]]:
    """The columns of the score table, one part after the other."""
    from ddfast.data.table import read_table, to_numpy

    paths = sorted(folder.glob("part-*.parquet"))
    if not paths:
        raise UsageError(f"no part-*.parquet in {folder}: run the score stage first")
    for path in paths:
        yield to_numpy(read_table(path, columns=_COLUMNS))


def _of_labels(
    blocks: Iterable[dict[str, NDArray[Any]]], labels: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """The rows of these labels of all blocks, as columns."""
    kept = []
    for block in blocks:
        rows = np.isin(block["label"], labels)
        kept.append({name: column[rows] for name, column in block.items()})
    if not kept:
        raise UsageError(f"{SELECTION} is empty: select again")
    return {name: np.concatenate([block[name] for block in kept]) for name in kept[0]}


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None


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
        Fact("Teacher", str(plan["teacher"]["arch"]), _accuracy(plan["teacher"])),
    ]
    if plan["label_teacher"] != plan["teacher"]:
        found.append(
            Fact("Label teacher", str(plan["label_teacher"]["arch"]), _accuracy(plan["label_teacher"]))
        )
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
    hidden = {"class_names", "counts", "quarantined", "complete"}
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


# What is shown of many ---------------------------------------------------------------------------------------


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of 0..count-1, evenly spaced, the first and the last among them."""
    if count <= limit:
        return list(range(count))
    if limit == 1:
        return [0]
    return [round(step * (count - 1) / (limit - 1)) for step in range(limit)]


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


# The sample of sources ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explained:
    """A selected source with everything that explains the choice.

    Attributes:
        selected: the row of the selection.
        class_name: of the source.
        tile: the kept tile, uint8 [3, s, s].
        source: the fitted source, uint8 [3, S, S]; None where it cannot be shown.
        reason: why `source` is None, one line.
        phi: attributions [rows, cols], None where the method has none.
        boxes: all candidate crops, (x0, y0, x1, y1).
        chosen: index into `boxes`.
        labels: the tile's largest soft labels as (class name, probability), largest first.
        measured: the chosen crop's numbers, as (name, value in words).
    """

    selected: Selected
    class_name: str
    tile: Tensor
    source: Tensor | None
    reason: str | None
    phi: NDArray[np.float64] | None
    boxes: list[tuple[float, ...]]
    chosen: int | None
    labels: list[tuple[str, float]]
    measured: list[tuple[str, str]]


def chosen_samples(
    folder: Folder, limit: int = SAMPLES, per_class: int = SAMPLES_PER_CLASS
) -> list[Selected]:
    """A fixed sample of the selection: of evenly spaced classes the best, the middle and the last ranked crop.

    With more than `limit` / `per_class` classes there are fewer of each, in the end one of every shown class.
    """
    by_label: dict[int, list[Selected]] = defaultdict(list)
    for row in folder.selection:
        by_label[row.label].append(row)
    labels = sorted(by_label)
    each = max(1, min(per_class, limit // max(len(labels), 1)))
    return [
        by_label[labels[i]][j]
        for i in spread(len(labels), limit // each)
        for j in spread(len(by_label[labels[i]]), each)
    ]


def explain(folder: Folder, source: Source | None, samples: Sequence[Selected]) -> list[Explained]:
    """Gather picture, attribution, boxes and labels of the sampled crops."""
    heatmaps = _heatmaps(folder, {selected.sample_id for selected in samples})
    return [_explained(folder, source, selected, heatmaps.get(selected.sample_id)) for selected in samples]


def _explained(
    folder: Folder, source: Source | None, selected: Selected, phi: NDArray[np.float64] | None
) -> Explained:
    image, reason = _read_source(folder, source, selected)
    boxes: list[tuple[float, ...]] = [selected.box]
    chosen: int | None = 0
    measured: list[tuple[str, str]] = []
    if folder.scores is not None:
        rows = np.flatnonzero(folder.scores["sample_id"] == selected.sample_id)
        rows = rows[np.argsort(folder.scores["crop"][rows], kind="stable")]
        boxes = [tuple(float(edge) for edge in folder.scores["box"][row]) for row in rows]
        chosen = boxes.index(selected.box) if selected.box in boxes else None
        if chosen is not None:
            measured = _measured(folder.scores, int(rows[chosen]))
    return Explained(
        selected=selected,
        class_name=folder.class_names[selected.label],
        tile=folder.tile_of(selected),
        source=image,
        reason=reason,
        phi=phi,
        boxes=boxes,
        chosen=chosen,
        labels=_top_labels(folder, selected),
        measured=measured,
    )


def _read_source(
    folder: Folder, source: Source | None, selected: Selected
) -> tuple[Tensor | None, str | None]:
    from ddfast.data.decoding import decode_fit

    if source is None:
        return None, "the data was not given"
    try:
        sample = source.by_id(selected.sample_id)
    except KeyError:
        return None, "the data no longer holds this file"
    try:
        return decode_fit(source.read(sample), folder.image_size), None
    except (BadImage, UsageError, OSError) as error:
        return None, f"the file can no longer be read: {error}"


def _heatmaps(folder: Folder, sample_ids: set[int]) -> dict[int, NDArray[np.float64]]:
    """Attributions [rows, cols] of these sources, of those that have any; read one part of the table at a time."""
    from ddfast.data.table import read_table, to_numpy

    found: dict[int, NDArray[np.float64]] = {}
    wanted = np.array(sorted(sample_ids), np.int64)
    for path in sorted((folder.root / SCORES).glob("part-*.parquet")):
        part = read_table(path, columns=["sample_id", "phi"])
        rows = np.flatnonzero(np.isin(part.column("sample_id").to_numpy(), wanted))
        columns = to_numpy(part.take(rows))
        for sample_id, phi in zip(columns["sample_id"].tolist(), columns["phi"], strict=True):
            side = math.isqrt(phi.size)
            if phi.size and side * side == phi.size and np.isfinite(phi).all():
                found.setdefault(sample_id, phi.astype(np.float64).reshape(side, side))
    return found


def _measured(scores: dict[str, NDArray[Any]], row: int) -> list[tuple[str, str]]:
    found = []
    for column, name in (("grad_norm", "gradient norm"), ("loss", "teacher's loss")):
        if math.isfinite(float(scores[column][row])):
            found.append((name, number(float(scores[column][row]))))
    if math.isfinite(float(scores["loss"][row])):
        found.append(("teacher reads it", "correctly" if scores["correct"][row] else "as another class"))
    return found


def _top_labels(folder: Folder, selected: Selected, count: int = 5) -> list[tuple[str, float]]:
    if folder.soft_labels is None:
        return []
    place = folder.rows_of(selected.label)[selected.image]
    labels = folder.soft_labels.dense(slice(place, place + 1))[0, selected.tile].numpy()
    order = np.argsort(-labels, kind="stable")[:count]
    return [(folder.class_names[i], float(labels[i])) for i in order]


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
