"""What a report reads of a distilled folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddfast.errors import UsageError
from ddfast.output.mosaic import SHOWN_CLASSES, spread

if TYPE_CHECKING:
    from torch import Tensor

    from ddfast.output.distilled import SoftLabels
    from ddfast.output.pixels import Pixels

SCORES = "scores"
# What is held in memory of the score table; heatmaps are read for the shown sources only.
_COLUMNS = ("sample_id", "label", "crop", "box", "score", "grad_norm", "loss", "correct")
SELECTION = "selection.parquet"
SHOWN_TABLE_ROWS = 200


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
        scores: columns of the score table as arrays, see `ddfast.output.table`; None where there is none.
        soft_labels: of the images in `rows`; None where there are none.
        pixels: of all images that were optimised, which have no selection; None for images that were chosen.
    """

    root: Path
    manifest: dict[str, Any]
    images: int
    rows: list[dict[str, Any]]
    selection: list[Selected]
    scores: dict[str, NDArray[Any]] | None
    soft_labels: SoftLabels | None
    pixels: Pixels | None = None
    _pictures: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def class_names(self) -> list[str]:
        """As people read them, in label order."""
        return [str(name) for name in self.manifest.get("display_names") or self.manifest["class_names"]]

    @property
    def factor(self) -> int:
        """Tiles per side."""
        return self.pixels.factor if self.pixels is not None else int(self.manifest["factor"])

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
        from ddfast.data.tiles import tiles_of

        image = self.image(self.rows_of(selected.label)[selected.image])
        return tiles_of(image[None], self.factor)[selected.tile]


def shown_labels(classes: int) -> NDArray[np.int64]:
    """Labels whose images, crops and scores a report holds: the first of the table and those of the mosaic, sorted.

    All of up to `SHOWN_TABLE_ROWS` classes, so that the memory of a report does not grow with the number of classes.
    """
    return np.union1d(np.arange(min(classes, SHOWN_TABLE_ROWS)), spread(classes, SHOWN_CLASSES))


def read_folder(root: str | Path) -> Folder:
    """Read a folder whose images stand, and their pixels or their selection; scores and soft labels may be missing.

    Raises:
        UsageError: no such folder, or a part that is missing or damaged.
    """
    from ddfast.output.distilled import MANIFEST, METADATA, SOFT_LABELS, read_soft_labels
    from ddfast.output.pixels import PIXELS, read_pixels

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
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{root} is no distilled set with images ({error}): run ddfast distill first"
        ) from error
    pixels = read_pixels(root) if (root / PIXELS).is_file() else None
    selection = [] if pixels is not None else _read_selection(root, shown)
    scores = _of_labels(_score_parts(root / SCORES), shown) if (root / SCORES).is_dir() else None
    labels = None
    if (root / SOFT_LABELS).is_file():
        whole = len(places) == images
        labels = read_soft_labels(root, len(manifest["class_names"]), None if whole else places)
    return Folder(root, manifest, images, rows, selection, scores, labels, pixels)


def _read_selection(root: Path, labels: NDArray[np.int64]) -> list[Selected]:
    """The rows of `selection.parquet` of these labels, by class, image and tile."""
    from ddfast.output.table import SELECTION_SCHEMA, iter_table, to_numpy

    columns = _of_labels(
        (to_numpy(block) for block in iter_table(root / SELECTION, SELECTION_SCHEMA)), labels
    )
    return [
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


def _score_parts(folder: Path) -> Iterator[dict[str, NDArray[Any]]]:
    """The columns of the score table, one part after the other."""
    from ddfast.output.table import read_table, to_numpy

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
