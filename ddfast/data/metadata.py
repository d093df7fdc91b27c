"""Labels in `metadata.jsonl`, `metadata.csv` or `metadata.parquet`, as Hugging Face's imagefolder reads them.

Images that stand in class folders as well have two labels. Where both divide them alike (each folder one label, each
label one folder), the folders' names count, as in a distilled set. Where they do not, Hugging Face takes the
metadata's labels and torchvision the folders; the metadata's count here too, if it labels every image.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddfast.data.labels import LABEL_FIELDS, label_in, label_in_text
from ddfast.data.sources import is_unicode, path_inside
from ddfast.errors import UsageError, one_line, shown

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""What may label the images of a folder, the folders in it, and the folder above it."""


@dataclass(frozen=True, slots=True)
class MetadataFile:
    """A metadata file of a split.

    Attributes:
        path: for messages.
        data: its bytes.
        below: where it stands within the split: "" or "folder/".
        split: for one that stands above the split: "train/", which its paths of this split begin with.
    """

    path: str
    data: bytes
    below: str = ""
    split: str = ""


def labels_in(files: Sequence[MetadataFile], name: str, *, needed: bool) -> dict[str, int | str]:
    """Path relative to the split -> class number or name, of the rows that have a label.

    Args:
        files: the metadata files of one split.
        name: what the user calls the source, for messages.
        needed: nothing else labels the images: a row without a label, or a file that makes no sense, is refused. Else
            such a row is no row and such a file no file.

    Raises:
        UsageError: as `needed` says; a path that points outside; a file that two rows label, or two files differently.
    """
    said: dict[str, int | str] = {}
    places: dict[str, str] = {}
    for file in files:
        mine: dict[str, int | str] = {}
        try:
            for path, label in _labels_of(file, name, needed):
                if path in mine:
                    raise UsageError(f"{file.path} names {shown([path])} twice; keep one row")
                mine[path] = label
        except UsageError:
            if needed:
                raise
            continue
        for path, label in mine.items():
            if said.setdefault(path, label) != label:
                raise UsageError(
                    f"{places[path]} labels {shown([path])} {said[path]!r}, {file.path} {label!r}: keep one of them"
                )
            places.setdefault(path, file.path)
    return said


def _labels_of(file: MetadataFile, name: str, needed: bool) -> Iterator[tuple[str, int | str]]:
    for number, fields in enumerate(_rows(file, name), start=1):
        file_name = fields.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            raise UsageError(
                f"row {number} of {file.path} of {name} has no file_name; wanted a path relative to it"
            )
        inside = path_inside(file_name)
        if not inside or not is_unicode(inside):
            raise UsageError(
                f"{file.path} names a file that points outside of it: {shown([file_name])}; refused"
            )
        if not inside.startswith(file.split):
            continue
        label = label_in(fields)
        if label is not None:
            yield file.below + inside[len(file.split) :], label
        elif needed:
            raise UsageError(
                f"row {number} of {file.path} has no label: wanted one of {', '.join(LABEL_FIELDS)}"
            )


def _rows(file: MetadataFile, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a metadata file. Raises `UsageError` for what is no JSON, CSV or Parquet."""
    try:
        if file.path.endswith(".parquet"):
            yield from _parquet_rows(file.data)
        elif file.path.endswith(".csv"):
            for row in csv.DictReader(io.StringIO(file.data.decode("utf-8-sig"), newline="")):
                numbers = {key: label_in_text(text) for key, text in row.items() if isinstance(text, str)}
                yield {**numbers, "file_name": row.get("file_name")}
        else:
            for line in io.StringIO(file.data.decode("utf-8-sig"), newline=None):
                if line.strip():
                    fields = json.loads(line)
                    if not isinstance(fields, dict):
                        raise ValueError(f"a line holds {type(fields).__name__}, no object")
                    yield fields
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UsageError(f"cannot read {file.path} of {name} ({one_line(error)}); correct it") from error


def _parquet_rows(data: bytes) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(io.BytesIO(data)) as table:
            wanted = [field for field in ("file_name", *LABEL_FIELDS) if field in table.schema_arrow.names]
            for batch in table.iter_batches(columns=wanted):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise ValueError(one_line(error)) from error


def overrides_folders(
    said: Mapping[str, int | str],
    folders: Collection[str],
    images: Callable[[], Iterable[str]],
    place: str,
) -> bool:
    """Whether metadata, and not the class folders, labels the images that stand in two class folders or more.

    Args:
        said: path -> label, as `labels_in` gives it.
        folders: the class folders.
        images: gives the paths of all images in them; called only where the two do not divide them alike.
        place: the folder of the class folders, for messages.

    Raises:
        UsageError: the metadata divides the images otherwise than the folders do, and labels some of them only.
    """
    labels_of: dict[str, set[int | str]] = defaultdict(set)
    folders_of: dict[int | str, set[str]] = defaultdict(set)
    known = set(folders)
    for path, label in said.items():
        folder, slash, _ = path.partition("/")
        if slash and folder in known:
            labels_of[folder].add(label)
            folders_of[label].add(folder)
    if all(len(labels) == 1 for labels in labels_of.values()) and len(labels_of) == len(folders_of):
        return False
    labelled, without = False, None
    for path in images():
        if path in said:
            labelled = True
        elif without is None:
            without = path
    if labelled and without is not None:
        divided = next((folder for folder, labels in sorted(labels_of.items()) if len(labels) > 1), None)
        how = "gives two folders one label" if divided is None else f"divides {shown([divided])}/"
        raise UsageError(
            f"{place} has class folders, and metadata that {how} but has no label for {shown([without])}: label "
            "every image there to take its classes, or remove it to take the folders as classes"
        )
    return labelled
