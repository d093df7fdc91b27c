"""The samples that a report explains: source, heatmap, crops."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddfast.errors import BadImage, UsageError
from ddfast.output.mosaic import spread
from ddfast.report.contents import SAMPLES, SAMPLES_PER_CLASS, number
from ddfast.report.folder import SCORES, Folder, Selected

if TYPE_CHECKING:
    from torch import Tensor

    from ddfast.data.sources import Source


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
    from ddfast.output.table import read_table, to_numpy

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
