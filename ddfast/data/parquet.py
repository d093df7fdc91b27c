"""Parquet files of the Hub's image layout: a column of files, {bytes, path}, and one of labels."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddfast.data.folder_scan import is_folder
from ddfast.data.labels_in_memory import labels_of
from ddfast.data.memory import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    Held,
    MemorySource,
    file_of_row,
    one_column,
    source_of,
)
from ddfast.data.metadata import METADATA_FILES
from ddfast.data.sources import SPLIT_FOLDERS, is_hidden, is_image, path_inside
from ddfast.data.splits import split_word
from ddfast.errors import BadImage, UsageError, one_line, shown
from ddfast.files import arrow_file
from ddfast.settings import POOL_MEMORY

if TYPE_CHECKING:
    import pyarrow as pa

_MOST_HELD = POOL_MEMORY << 30  # bytes of row groups that are held at once
_LOOKED_AT = 1000  # entries of a folder that are looked at for Parquet files
_FOOTER = 8  # bytes behind a footer: its length, and PAR1


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder, of its `data/`, and of its folders of splits; empty where it holds images.

    A folder with images, or with class folders beside a table, is none of Parquet.
    """
    files, folders = _some_of(folder)
    if any(map(_is_table, files)) or any(map(is_image, files)):
        return _tables_in(folder)
    places = [folder / one for one in folders if one == "data" or ((word := split_word(one)) and word[1])]
    return [path for place in places for path in _tables_in(place)]


def _some_of(folder: Path) -> tuple[list[str], list[str]]:
    """Visible files and folders among the first that a folder lists; none of one that cannot be listed."""
    found: tuple[list[str], list[str]] = ([], [])
    try:
        with os.scandir(folder) as entries:
            for entry in islice(entries, _LOOKED_AT):
                if not is_hidden(entry.name):
                    found[is_folder(entry)].append(entry.name)
    except OSError:  # whoever reads the folder as one of images says what is wrong
        return [], []
    return found


def _tables_in(folder: Path) -> list[Path]:
    files, folders = _some_of(folder)
    if not any(map(_is_table, files)) or any(map(is_image, files)):
        return []
    if any(_holds_images(folder / one) for one in folders):
        return []
    return sorted(folder / name for name in os.listdir(folder) if _is_table(name))


def _is_table(name: str) -> bool:
    return name.lower().endswith(".parquet") and not is_hidden(name) and name not in METADATA_FILES


def _holds_images(folder: Path) -> bool:
    files, folders = _some_of(folder)
    return bool(folders) or any(map(is_image, files))


def matching_files(pattern: str) -> list[Path]:
    """The Parquet files that match a pattern. `UsageError` where there are none."""
    found = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
    if not found:
        raise UsageError(f"no file matches {pattern}")
    return found


def open_parquet(paths: Sequence[Path], split: str, name: str) -> MemorySource:
    """One split of some Parquet files.

    A file is of the split that its name speaks of, or its folder's, as `data/train-00000-of-00002.parquet` and
    `test/0000.parquet`. The names of class numbers are those that the schema's metadata hold for Hugging Face.

    The fingerprint tells of the files by their sizes and their footers, which hold the place, the size and the smallest
    and the largest value of every column of every row group; the images themselves are not read for it.

    Raises:
        UsageError: a file is damaged or has no such columns, or as `open_source`.
    """
    by_split = _splits_of(paths, split)
    wanted = next((kind for kind in SPLIT_FOLDERS[split] if kind in by_split), None)
    if wanted is None:
        raise UsageError(
            f"{name} has no {split} split: wanted {split}-*.parquet, found {shown(path.name for path in paths)}"
        )
    here = HeldParquet(by_split[wanted], name)
    train = HeldParquet(by_split["train"], name) if wanted != "train" and "train" in by_split else None
    source = source_of(here, split, train, name=name)
    if here.bytes_on_disk > _MOST_HELD:
        source.remarks.append(
            f"{name}: {here.bytes_on_disk / 1e9:.1f} GB of Parquet files are read by row groups, of which "
            f"{POOL_MEMORY} GiB are held: unpacked into class folders, or as .tar shards, they are read faster"
        )
    return source


def _splits_of(paths: Sequence[Path], split: str) -> dict[str, list[Path]]:
    """Split -> its files. Files of one split alone are what they are asked for, save train files for a test split."""
    by_split: dict[str, list[Path]] = {}
    for path in paths:
        above = split_word(path.parent.name)
        word = split_word(path.stem) or (above if above and above[1] else None)
        by_split.setdefault(word[0] if word else "train", []).append(path)
    if split == "train" and len(by_split) == 1:
        return {"train": list(paths)}
    return by_split


class HeldParquet(Held):
    """Rows of Parquet files; row groups are held while they are in use, the last used ones up to `_MOST_HELD` bytes.

    Attributes:
        bytes_on_disk: of all files.
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        """Read the labels. Raises `UsageError` for a damaged file, or one without the columns."""
        self._paths = [path.absolute() for path in paths]
        self.bytes_on_disk = sum(path.stat().st_size for path in paths)
        labels: list[Any] = []
        class_names: list[str] | None = None
        groups: list[tuple[int, int, int]] = []  # file, row group, rows
        self._columns: list[str] = []
        for place, path in enumerate(self._paths):
            image, names, counts, said = _read_labels(path)
            if place and names != class_names:
                raise UsageError(f"{name}: {path.name} has other class names than {self._paths[0].name}")
            class_names = names
            self._columns.append(image)
            groups += [(place, group, rows) for group, rows in enumerate(counts)]
            labels += labels_of(said, str(path))
        self._groups = groups
        self._starts = np.cumsum([0, *(rows for _, _, rows in groups)])
        self._held: OrderedDict[int, pa.Array] = OrderedDict()
        super().__init__(name, labels, class_names)

    def image(self, index: int) -> bytes:
        """See `Held`."""
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = self._group(place)[index - int(self._starts[place])].as_py()
        if isinstance(row, bytes):
            return row
        row = row or {}
        if row.get("bytes") is None and path_inside(str(row.get("path"))) is None:
            raise BadImage("it names a file outside of the folder")
        return file_of_row(row, os.fspath(self._paths[self._groups[place][0]].parent))

    def content(self, order: Sequence[int]) -> bytes:
        """Sizes and footers of the files."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self._paths:
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(size - _FOOTER)
                length = int.from_bytes(file.read(4), "little")
                file.seek(max(0, size - _FOOTER - length))
                digest.update(size.to_bytes(8, "little") + file.read())
        return digest.digest()

    def _group(self, place: int) -> pa.Array:
        if place not in self._held:
            import pyarrow as pa
            import pyarrow.parquet as pq

            file, group, rows = self._groups[place]
            path = self._paths[file]
            try:
                with arrow_file(path) as raw, pq.ParquetFile(raw) as table:
                    column = table.read_row_group(group, columns=[self._columns[file]]).column(0)
            except (pa.ArrowException, OSError, ValueError, LookupError) as error:
                raise _damaged(path, error) from error
            if len(column) != rows:
                raise UsageError(f"{path} changed since it was opened: start again")
            self._held[place] = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
            while len(self._held) > 1 and sum(part.nbytes for part in self._held.values()) > _MOST_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(place)
        return self._held[place]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": OrderedDict()}


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(
        f"cannot read {path}: not a Parquet file, or damaged ({one_line(error)}); copy it again"
    )


def _read_labels(path: Path) -> tuple[str, list[str] | None, list[int], list[Any]]:
    """The column of images, class names, rows of each row group, and the labels of a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with arrow_file(path) as raw, pq.ParquetFile(raw) as table:
            schema = table.schema_arrow
            features = _features(schema.metadata)
            files = [
                f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0
            ]
            images = [column for column in schema.names if features.get(column, {}).get("_type") == "Image"]
            classes = [
                column for column in schema.names if features.get(column, {}).get("_type") == "ClassLabel"
            ]
            image = one_column(str(path), "image", images or files, schema.names, IMAGE_COLUMNS)
            label = one_column(str(path), "label", classes, schema.names, LABEL_COLUMNS)
            counts = [table.metadata.row_group(n).num_rows for n in range(table.metadata.num_row_groups)]
            labels = table.read(columns=[label]).column(0).to_pylist()
    except UsageError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise _damaged(path, error) from error
    kind = schema.field(image).type
    if image not in files and not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UsageError(f"{path}: the column {image} is {kind}: wanted image files, {{bytes, path}}")
    names = features.get(label, {}).get("names")
    if isinstance(names, dict):  # {"0": "cat", ...}, as dataset cards write it
        names = [names[key] for key in sorted(names, key=int)]
    return image, names, counts, labels


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """Column -> what Hugging Face's `datasets` wrote of it into the schema; empty where it wrote nothing."""
    try:
        found = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return {c: f for c, f in found.items() if isinstance(f, dict)} if isinstance(found, dict) else {}
