"""Files on disk: an ImageFolder, or images that `metadata.jsonl` or `metadata.csv` labels."""

from __future__ import annotations

import csv
import errno
import json
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddfast.data.folder_scan import ClassListing, forget, identity, is_folder, list_classes, listed, sizes_of
from ddfast.data.labels import LABEL_FIELDS, class_names_of, label_in, label_in_text
from ddfast.data.samples import DuplicateId, Sample, SampleList
from ddfast.data.sources import (
    Source,
    checked_classes,
    is_hidden,
    is_image,
    is_unicode,
    machine_refused,
    one_line,
    path_inside,
    pick_split,
    shown,
    size_refused,
    twins_refused,
    utf8,
)
from ddfast.errors import BadImage, UsageError

_GONE = {errno.ENOENT, errno.ENOTDIR}

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
"""What may label the images of a folder; the first that exists counts."""


class FilesOnDisk(Source):
    """A source whose samples are files under one folder, of sizes known from its listing."""

    def __init__(
        self,
        name: str,
        split: str,
        class_names: Sequence[str],
        samples: SampleList,
        root: Path,
        sizes: np.ndarray,
    ) -> None:
        """`sizes` int64 [N] in the order of `samples`, -1 for a broken link."""
        super().__init__(name, split, class_names, samples)
        self._root = root
        self._sizes = sizes

    @abstractmethod
    def path_of(self, sample: Sample) -> str:
        """Where the file is."""

    def read(self, sample: Sample) -> bytes:
        """The file's bytes.

        Raises:
            BadImage: it is unreadable or too large.
            UsageError: the folder or the file is gone, the file's size is not the one that was listed and that
                the fingerprint tells of, or this machine cannot read any file now.
        """
        path, listed_size = self.path_of(sample), self.size_of(sample)
        if listed_size < 0 and os.path.exists(path) and not os.path.isfile(path):
            raise BadImage("cannot be read: not a file")  # a pipe would block
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != listed_size:
                    forget(self._root)
                    raise UsageError(
                        f"{self.name} changed since it was listed: {sample.key} had {listed_size} bytes and has "
                        f"{size}; start again, so that it is listed anew"
                    )
                size_refused(size)
                return file.read()
        except OSError as error:
            reason = os.strerror(error.errno or 0).lower()
            if not self._root.is_dir():
                raise UsageError(f"{self.name} has gone away: {reason}") from error
            if error.errno in _GONE and self.size_of(sample) >= 0:
                forget(self._root)
                raise UsageError(
                    f"{self.name} changed since it was listed: {sample.key} is gone; put it back, or start again"
                ) from error
            machine_refused(self.name, error)
            raise BadImage(f"cannot be read: {reason}") from error

    def size_of(self, sample: Sample) -> int:
        """Size of the file in bytes when it was listed, -1 for a broken link."""
        return int(self._sizes[self.samples.position(sample.id)])

    def sizes(self) -> np.ndarray:
        """`size_of` every sample, int64 [N]."""
        return self._sizes

    def close(self) -> None:
        """Nothing stays open between reads."""


def open_folder(root: Path, split: str, name: str) -> FilesOnDisk:
    """One split of an existing folder: an ImageFolder, or images labelled by a metadata file.

    Raises `UsageError` as `open_source` does.
    """
    top = {entry.name for entry in listed(root, name) if is_folder(entry)}
    place = root / pick_split(top, split, name)
    if metadata_file(place) is not None and not _has_class_folders(place, name):
        return MetadataSource(root, split, name)
    return FolderSource(root, split, name)


def metadata_file(place: Path) -> Path | None:
    """The metadata file of a folder, if it has one."""
    return next((path for file in METADATA_FILES if (path := place / file).is_file()), None)


def _has_class_folders(place: Path, name: str) -> bool:
    """Whether all images stand in folders, of which there are two at least."""
    visible = [entry for entry in listed(place, name) if not is_hidden(entry.name)]
    folders = sum(is_folder(entry) for entry in visible)
    return folders > 1 and not any(is_image(entry.name) for entry in visible if not is_folder(entry))


class FolderSource(FilesOnDisk):
    """`root/train/<class>/**/*.jpg` and its like. Symbolic links are followed, loops of them are not."""

    def __init__(self, root: Path, split: str, name: str) -> None:
        """List an existing folder. Raises `UsageError` as `open_source` does."""
        top = {entry.name for entry in listed(root, name) if is_folder(entry)}
        folder = pick_split(top, split, name)
        place = root / folder
        above = {identity(parent) for parent in (place.resolve(), *place.resolve().parents)}
        class_folders: list[str] = []
        loose_images = False
        for entry in listed(place, name):
            if is_hidden(entry.name):
                continue
            if not is_folder(entry):
                loose_images |= is_image(entry.name)
            elif identity(entry.path) not in above:
                class_folders.append(entry.name)
        if not folder and len(class_folders) == 1 and os.path.isdir(place / class_folders[0] / "train"):
            raise UsageError(
                f"{name} holds one folder, which has the splits: give {name}/{class_folders[0]} instead"
            )
        listings = dict(zip(class_folders, list_classes(place, class_folders, above, name), strict=True))
        train_classes = None
        if folder != "train" and "train" in top:
            entries = listed(root / "train", name)
            train_classes = [utf8(e.name) for e in entries if is_folder(e) and not is_hidden(e.name)]
        class_names = checked_classes(
            {utf8(class_folder): len(listing.sizes) for class_folder, listing in listings.items()},
            f"{name.rstrip('/')}/{folder}" if folder else name,
            loose_images=loose_images,
            train_classes=train_classes,
        )
        by_class = {utf8(class_folder): listing for class_folder, listing in listings.items()}
        samples = _samples(class_names, by_class, name)
        sizes = [by_class[c].sizes for c in class_names if c in by_class]
        super().__init__(name, split, class_names, samples, place, np.concatenate(sizes))
        self._undecodable = {  # key -> path, for names that are not UTF-8
            f"{utf8(class_folder)}/{clean.decode()}": os.fsdecode(os.fsencode(class_folder) + b"/" + raw)
            for class_folder, listing in listings.items()
            for clean, raw in _raw_names(class_folder, listing)
        }

    def path_of(self, sample: Sample) -> str:
        """Where the file is."""
        return os.path.join(self._root, self._undecodable.get(sample.key, sample.key))


def _samples(class_names: Sequence[str], listings: dict[str, ClassListing], name: str) -> SampleList:
    """The listings as one list: sorted by label, then key, as each listing is sorted by path."""
    keys: list[bytes] = []
    counts = np.zeros(len(class_names), np.int64)
    ids: list[np.ndarray] = []
    for label, class_name in enumerate(class_names):
        listing = listings.get(class_name)
        if listing is None:  # a class of the train split that this one lacks
            continue
        prefix = class_name.encode("utf-8") + b"/"
        keys.append(prefix + listing.names.replace(b"\0", b"\0" + prefix))
        counts[label] = len(listing.sizes)
        ids.append(listing.ids)
    labels = np.repeat(np.arange(len(class_names), dtype=np.int32), counts)
    try:
        return SampleList(b"\0".join(keys), labels, np.concatenate(ids))
    except DuplicateId as error:
        raise twins_refused(name, error) from error


def _raw_names(class_folder: str, listing: ClassListing) -> list[tuple[bytes, bytes]]:
    """(UTF-8 name, raw name) of the files whose path is not UTF-8, be it for the class folder's sake."""
    if utf8(class_folder) == class_folder:
        return list(listing.undecodable.items())
    names = listing.names.split(b"\0") if len(listing.sizes) else []
    return [(name, listing.undecodable.get(name, name)) for name in names]


class MetadataSource(FilesOnDisk):
    """Images of one folder, labelled by `metadata.jsonl` or `metadata.csv` in it.

    Keys are "class/file name". Files that no row names are no samples; a row whose file is missing is a sample
    that fails. The names of class numbers may stand in `classes.txt` beside the metadata.
    """

    def __init__(self, root: Path, split: str, name: str) -> None:
        """Read the metadata and the files' sizes. Raises `UsageError` as `open_source` does."""
        top = {entry.name for entry in listed(root, name) if is_folder(entry)}
        folder = pick_split(top, split, name)
        place = root / folder
        said = _labels_in(place, name)
        train = _labels_in(root / "train", name) if folder != "train" and "train" in top else None
        names_file = next(
            (place / file for file in ("classes.txt", "../classes.txt") if (place / file).is_file()), None
        )
        names = class_names_of(
            {*said.values(), *(train or {}).values()},
            None if names_file is None else names_file.read_bytes(),
            name,
        )
        counts = Counter(names[label] for label in said.values())
        class_names = checked_classes(
            counts,
            f"{name.rstrip('/')}/{folder}" if folder else name,
            train_classes=None if train is None else {names[label] for label in train.values()},
        )
        labels = {class_name: label for label, class_name in enumerate(class_names)}
        keys = [(f"{names[label]}/{path}", labels[names[label]]) for path, label in said.items()]
        try:
            samples = SampleList.of(keys)
        except DuplicateId as error:
            raise twins_refused(name, error) from error
        paths = [os.path.join(place, sample.key.partition("/")[2]) for sample in samples]
        super().__init__(name, split, class_names, samples, place, sizes_of(paths))

    def path_of(self, sample: Sample) -> str:
        """Where the file is."""
        return os.path.join(self._root, sample.key.partition("/")[2])


def _labels_in(place: Path, name: str) -> dict[str, int | str]:
    """Relative path -> class number or name, from a folder's metadata file; empty where there is none."""
    path = metadata_file(place)
    if path is None:
        return {}
    said: dict[str, int | str] = {}
    for number, fields in enumerate(_rows(path, name), start=1):
        file_name = fields.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            raise UsageError(
                f"row {number} of {path} of {name} has no file_name; wanted a path relative to it"
            )
        inside = path_inside(file_name)
        if not inside or not is_unicode(inside):
            raise UsageError(f"{path} names a file that points outside of it: {shown([file_name])}; refused")
        label = label_in(fields)
        if label is None:
            raise UsageError(f"row {number} of {path} has no label: wanted one of {', '.join(LABEL_FIELDS)}")
        if inside in said:
            raise UsageError(f"{path} names {shown([inside])} twice; keep one row")
        said[inside] = label
    return said


def _rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a metadata file. Raises `UsageError` for what is no JSON or CSV."""
    try:
        if path.suffix == ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                for row in csv.DictReader(file):
                    numbers = {key: label_in_text(text) for key, text in row.items() if isinstance(text, str)}
                    yield {**numbers, "file_name": row.get("file_name")}
        else:
            with open(path, encoding="utf-8-sig") as file:
                for line in file:
                    if line.strip():
                        fields = json.loads(line)
                        if not isinstance(fields, dict):
                            raise ValueError(f"a line holds {type(fields).__name__}, no object")
                        yield fields
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UsageError(f"cannot read {path} of {name} ({one_line(error)}); correct it") from error
