"""Where labelled images come from: what every source offers, and `open_source`, which finds the right one.

A source is one split of a data set. Whatever holds the files, the same files give the same samples, keys and
ids, so a zip and the folder it was made from lead to the same draws and the same result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ddfast.errors import UsageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
"""Endings that make a file in a class folder a sample, in any case. Other files are left alone."""

MAX_FILE_BYTES = 1 << 30
"""A larger image file is not read: it is no photograph, and an archive may lie about sizes."""

SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
"""The folders that may hold a split; the first that exists is taken."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image file, known but not read.

    `key` is "class/relative path" with forward slashes, `id` the signed 64-bit `sample_id(key)` that seeds
    its noise, `label` the index of its class in `Source.class_names`.
    """

    id: int
    key: str
    label: int


def sample_id(key: str) -> int:
    """Stable signed 64-bit id of a sample: BLAKE2b with an 8-byte digest of the UTF-8 key, little endian."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "little", signed=True)


class Source(ABC):
    """One split of a labelled image set.

    Attributes:
        name: what the user called it, for messages.
        split: "train" or "test".
        class_names: in label order: sorted as plain strings, save for torchvision's sets, which keep theirs.
        samples: sorted by label, then key; keys and ids are unique.

    `read` may be called from many threads. A source holds at most one open file for each archive; `close`, or
    the end of a `with` block, closes it, the next `read` opens it again. A source can be pickled.
    """

    def __init__(
        self, name: str, split: str, class_names: Sequence[str], keys: Iterable[tuple[str, int]]
    ) -> None:
        """`keys` are (key, label) pairs in any order. Raises `UsageError` where two keys share an id."""
        self.name = name
        self.split = split
        self.class_names = list(class_names)
        ordered = sorted(keys, key=lambda pair: (pair[1], pair[0]))
        self.samples: list[Sample] = [Sample(sample_id(key), key, label) for key, label in ordered]
        self._by_id: dict[int, Sample] = {}
        for sample in self.samples:
            other = self._by_id.setdefault(sample.id, sample)
            if other is not sample:
                raise UsageError(
                    f"{name}: {shown([other.key, sample.key])} share one 64-bit id; rename one of them"
                )

    @abstractmethod
    def read(self, sample: Sample) -> bytes:
        """The sample's encoded image. `BadImage` if it is unreadable, `UsageError` if the source is gone."""

    @abstractmethod
    def size_of(self, sample: Sample) -> int:
        """Size in bytes of the sample's file, -1 where it cannot be told."""

    @abstractmethod
    def close(self) -> None:
        """Close what is open. The next `read` opens it again."""

    def by_id(self, sample_id: int) -> Sample:
        """The sample with this id. Raises `KeyError` if there is none."""
        return self._by_id[sample_id]

    def counts(self) -> list[int]:
        """Samples in each class, in label order."""
        counts = [0] * len(self.class_names)
        for sample in self.samples:
            counts[sample.label] += 1
        return counts

    def fingerprint(self) -> str:
        """32 hex digits over class names, keys and file sizes; equal for a folder and a zip of it."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(self.class_names).encode())
        for sample in self.samples:
            digest.update(json.dumps([sample.key, sample.label, self.size_of(sample)]).encode())
        return digest.hexdigest()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        classes, samples = len(self.class_names), len(self.samples)
        return f"{type(self).__name__}({self.name!r}, {self.split!r}, {classes} classes, {samples} samples)"


def open_source(data: str | os.PathLike[str], split: str = "train") -> Source:
    """Open one split of a labelled image set.

    Args:
        data: one of
            - a folder with `train/<class>/...` and `test/<class>/...` or `val/<class>/...`, or with the class
              folders alone, which are a train split;
            - a .zip of the same layout, which may stand in one common folder;
            - WebDataset shards: an uncompressed .tar, or several as `part-{000..003}.tar` or `part-*.tar`,
              with that layout, or with pairs `key.jpg` and `key.cls` (a class number or name; `key.json` with
              "label" or "label_name" will do), the names of numbers in `classes.txt`, one a line, inside or
              beside the shards;
            - a torchvision set by name, as `cifar10`, downloaded once into `$DDFAST_DATA` or
              `~/.cache/ddfast`.
        split: "train" or "test" ("test" is looked for in `test/`, then in `val/`).

    Labels of the test split follow the class order of the train split where there is one.

    Raises:
        UsageError: no such data, no images, one class only, an empty class, no such split, a damaged archive,
            or an archive member that points outside.
        ValueError: an unknown split.
    """
    from ddfast.data.archives import TarSource, ZipSource, find_shards
    from ddfast.data.folders import FolderSource
    from ddfast.data.named_sets import NAMED_SETS, NamedSource

    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    name = os.fspath(data)
    path = Path(name).expanduser()
    try:
        if name and os.path.isdir(path):  # "" would be the current folder
            return FolderSource(path, split, name)
        if os.path.isfile(path):
            if path.suffix.lower() == ".tar":
                return TarSource([path], split, name)
            if zipfile.is_zipfile(path):
                return ZipSource(path, split, name)
            if path.suffix.lower() == ".zip":
                raise UsageError(
                    f"cannot read {name}: not a zip archive, or its end is missing; copy it again"
                )
            raise UsageError(f"cannot read {name}: wanted a folder, a .zip or an uncompressed .tar")
        if re.search(r"[{*?\[]", name):
            return TarSource(find_shards(os.fspath(path)), split, name)
    except PermissionError as error:
        raise UsageError(f"cannot read {error.filename or name}: permission denied") from error
    if name.lower() in NAMED_SETS:
        return NamedSource(name.lower(), split)
    raise UsageError(
        f"no such folder or archive: {shown([name])}; wanted a folder, a .zip, .tar shards or one of "
        f"{', '.join(NAMED_SETS)}"
    )


def shown(names: Iterable[str], limit: int = 5) -> str:
    """Names for a one-line message: comma-separated, control characters escaped, at most `limit` of them."""
    names = list(names)
    clean = [
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
        for name in names[:limit]
    ]
    return ", ".join(clean) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# What every layout has in common: files by class, checked and named


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out: dot files, and what macOS adds to its zips."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    """Whether a file's name makes it a sample."""
    return name.lower().endswith(EXTENSIONS)


def pick_split(folders: Collection[str], split: str, name: str) -> str:
    """The one of `folders` that holds `split`; "" where nothing is split, which is a train split.

    Raises `UsageError` where the split is missing, naming those that exist.
    """
    for candidate in SPLIT_FOLDERS[split]:
        if candidate in folders:
            return candidate
    known = [folder for group in SPLIT_FOLDERS.values() for folder in group if folder in folders]
    if split == "train" and not known:
        return ""
    wanted = " or ".join(f"{folder}/" for folder in SPLIT_FOLDERS[split])
    found = ", ".join(f"{folder}/" for folder in known) or "no split folders, so that all of it is train"
    raise UsageError(f"{name} has no {split} split: wanted {wanted}, found {found}")


def checked_classes(
    files: dict[str, list[str]],
    place: str,
    *,
    loose_images: bool = False,
    train_classes: Collection[str] | None = None,
) -> list[str]:
    """Check what was found and fix the label order.

    Args:
        files: class name -> relative paths of its images.
        place: the folder they were found in, for messages.
        loose_images: whether images stand beside the class folders; said where there are no others.
        train_classes: the classes of the train split, when this is another.

    Returns:
        class names in label order, sorted as plain strings.

    Raises:
        UsageError: no images, a class without images, one class only, a class that the train split lacks.
    """
    if not any(files.values()):
        if loose_images:
            raise UsageError(f"images without class folders in {place}: wanted one folder for each class")
        raise UsageError(
            f"no images in {place}: wanted class folders with files ending in {' '.join(EXTENSIONS)}"
        )
    empty = sorted(class_name for class_name, paths in files.items() if not paths)
    if empty:
        raise UsageError(f"class without images in {place}: {shown(empty)}; add images or remove the folder")
    if train_classes is not None:
        unknown = sorted(set(files) - set(train_classes))
        if unknown:
            raise UsageError(f"{place} has classes that the train split lacks: {shown(unknown)}")
    class_names = sorted(files if train_classes is None else train_classes)
    if len(class_names) < 2:
        raise UsageError(
            f"one class only in {place}: {shown(class_names)}; wanted at least two class folders"
        )
    return class_names


def keys_of(files: dict[str, list[str]], class_names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(key, label) of every file."""
    for label, class_name in enumerate(class_names):
        for path in files.get(class_name, ()):
            yield f"{class_name}/{path}", label


def utf8(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 become backslash escapes."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    return name


def one_line(error: BaseException) -> str:
    """An error's text on one line of at most 120 characters, its type where there is no text."""
    return " ".join(str(error).split())[:120] or type(error).__name__
