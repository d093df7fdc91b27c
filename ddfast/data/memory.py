"""Labelled images that a program holds: arrays, tensors, a Dataset of PyTorch or of Hugging Face, and splits of them.

Nothing is copied as a whole and nothing of the caller's is changed: one image at a time becomes the bytes of a file, as
`ddfast.data.pixels_in_memory` says. Image number 123 of class `cat` has the key `cat/0000123.png`, as the images of
torchvision's sets by name have, and the id of a file of that path: the same images in a folder under these names lead
to the same draws and the same result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from ddfast.data.labels_in_memory import Label, classes_of, distinct, label_of, labels_of, named, width_of
from ddfast.data.pixels_in_memory import as_file
from ddfast.data.samples import Sample
from ddfast.data.sources import (
    IN_MEMORY,
    SPLIT_FOLDERS,
    Source,
    described,
    is_many_images,
    kind_in_words,
    size_refused,
)
from ddfast.data.splits import split_word
from ddfast.errors import BadImage, UsageError, one_line, shown
from ddfast.wording import plural

# Usual names of the columns, the likeliest first.
IMAGE_COLUMNS = ("image", "img", "images")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "label_name", "target", "cls")
# What an array of a split is called, and what holds the names of the classes.
_IMAGES = frozenset(("x", "image", "images", "img", "imgs", "data"))
_LABELS = frozenset(("y", "label", "labels", "target", "targets"))
NAMES_OF_ARRAYS = ("class_names", "classes", "label_names")
ARRAYS_WANTED = "x_train, y_train, x_test and y_test, or images and labels"
# One image at a time: neither a Dataset nor a lazily opened image need bear two threads. It guards decoding too where
# a Dataset decodes.
_READING = threading.RLock()


class Held(ABC):
    """Some labelled images in memory.

    Attributes:
        name: what they are, for messages.
        labels: the class number or class name of each.
        class_names: the names of the class numbers; None where nothing says them.
        digests: uint64 [N] of what `encoded` gives, where they are known.
        remarks: lines on what is read otherwise than a user may expect.
    """

    def __init__(self, name: str, labels: Sequence[Label], class_names: Sequence[Any] | None) -> None:
        self.name = name
        self.labels = list(labels)
        self.class_names = None if class_names is None else distinct(class_names)
        self.digests: np.ndarray | None = None
        self.remarks: list[str] = []

    @abstractmethod
    def image(self, index: int) -> Any:
        """An image as it is held: what `as_file` takes."""

    def encoded(self, index: int) -> bytes:
        """An image as the bytes of a file.

        Raises:
            UsageError: it is no image, or holds values out of range.
            BadImage: its file is damaged.
        """
        with _READING:
            try:
                return as_file(self.image(index))
            except BadImage:
                raise
            except UsageError as error:
                raise UsageError(f"{self.name}: image {index} {error}") from error

    def digest(self, index: int) -> int:
        """64 bits of BLAKE2b of what `encoded` gives; 0 for an image that cannot be read."""
        try:
            return _digest(self.encoded(index))
        except BadImage:
            return 0

    def all_digests(self) -> np.ndarray:
        """`digest` of every image, uint64 [N]; each is read once, whoever asks how often."""
        if self.digests is None:
            count = len(self.labels)
            self.digests = np.fromiter(map(self.digest, range(count)), np.uint64, count)
        return self.digests

    def content(self, order: Sequence[int]) -> bytes:
        """What a fingerprint tells of the content of the images, which are in this order."""
        return bytes(self.all_digests()[order].astype("<u8").tobytes())


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class HeldArrays(Held):
    """Images and labels side by side: two tensors, two arrays, or two lists."""

    def __init__(
        self, images: Any, labels: Any, class_names: Sequence[Any] | None = None, name: str = ""
    ) -> None:
        """`images` [N, 3, H, W], [N, H, W, 3], [N, H, W] or a sequence of images, `labels` [N]; `UsageError` if not."""
        name = name or IN_MEMORY + kind_in_words(images)
        if not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
            raise UsageError(
                f"{name}: wanted (images, labels) as arrays, tensors or lists, got {type(images).__name__}"
            )
        shape = getattr(images, "shape", None)
        if shape is not None and len(shape) not in (3, 4) and str(images.dtype) != "object":
            raise UsageError(
                f"{name}: images must be [N, 3, H, W], [N, H, W, 3] or [N, H, W], got {list(shape)}"
            )
        super().__init__(name, labels_of(labels, name), class_names)
        if len(images) != len(self.labels):
            raise UsageError(
                f"{name}: {plural(len(images), 'image')} and {plural(len(self.labels), 'label')}: wanted one label "
                "for each image"
            )
        self._images = getattr(images, "iloc", images)  # of pandas: by place, as the labels are

    @classmethod
    def of_labels(cls, labels: Any, class_names: Sequence[Any] | None, name: str) -> HeldArrays:
        """The labels of a split whose images nobody asks for."""
        return cls(range(len(labels)), labels, class_names, name)

    def image(self, index: int) -> Any:
        """See `Held`."""
        return self._images[index]


class HeldRows(Held):
    """A Hugging Face `Dataset` with a column of images and one of labels. Images keep the bytes of their files."""

    def __init__(self, rows: Any) -> None:
        """`UsageError` where the columns cannot be told."""
        name = f"{IN_MEMORY}datasets.Dataset of {plural(len(rows), 'row')}"
        transformed, rows = rows.format["type"] == "custom", rows.with_format(None)
        features = dict(rows.features)
        kinds = {column: type(feature).__name__ for column, feature in features.items()}
        self._column = one_column(
            name, "image", [c for c in kinds if kinds[c] == "Image"], list(kinds), IMAGE_COLUMNS
        )
        label = one_column(
            name, "label", [c for c in kinds if kinds[c] == "ClassLabel"], list(kinds), LABEL_COLUMNS
        )
        labels = rows.select_columns([label])[:][label]
        super().__init__(name, labels_of(labels, name), getattr(features[label], "names", None))
        if transformed:
            self.remarks.append(
                f"{name}: its transform is not applied, images are read as the table holds them"
            )
        self._rows = rows.select_columns([self._column])
        if kinds[self._column] == "Image":
            self._rows = self._rows.cast_column(self._column, type(features[self._column])(decode=False))

    def image(self, index: int) -> Any:
        """See `Held`."""
        image = self._rows[index][self._column]
        if image is None:
            raise BadImage("no image in this row")
        return file_of_row(image) if isinstance(image, Mapping) else image


def file_of_row(image: Mapping[str, Any], folder: str = "") -> bytes:
    """The file that {"bytes", "path"} holds, or names within `folder`. Raises `BadImage` where there is none."""
    if image.get("bytes") is not None:
        return bytes(image["bytes"])
    path = os.path.join(folder, str(image.get("path")))
    if not os.path.isfile(path):
        raise BadImage("cannot be read: no such file or directory")
    try:
        with open(path, "rb") as file:
            size_refused(os.fstat(file.fileno()).st_size)
            return file.read()
    except OSError as error:
        raise BadImage(f"cannot be read: {(error.strerror or 'no such file').lower()}") from error


def one_column(name: str, what: str, typed: list[str], columns: list[str], usual: Sequence[str]) -> str:
    """The column of images or of labels: the only one of that type, else the one of a usual name."""
    if len(typed) == 1:
        return typed[0]
    named = [column for column in usual if column in (typed or columns)]
    if named:
        return named[0]
    if typed:
        raise UsageError(f"{name} has {len(typed)} columns of {what}s, {shown(typed)}: keep one of them")
    raise UsageError(
        f"{name} has no {what} column: wanted {'Image' if what == 'image' else 'ClassLabel'} or a column named "
        f"{usual[0]}, found {shown(columns)}"
    )


class HeldPairs(Held):
    """A map-style torch `Dataset`, or a list, of (image, label)."""

    def __init__(self, pairs: Any) -> None:
        """Take the labels of torchvision's own sets from their tables; of others every item is read, once.

        Raises `UsageError` where an item is not (image, label).
        """
        self._pairs = pairs
        name = f"{IN_MEMORY}{type(pairs).__name__} of {plural(len(pairs), 'image')}"
        known = _known_labels(pairs)
        super().__init__(name, [] if known is None else labels_of(known, name), _names_in(pairs, name))
        if known is None:
            digests = np.zeros(len(pairs), np.uint64)
            for index in range(len(pairs)):
                image, label = self._item(index)
                self.labels.append(label_of(label, f"{name}: image {index}"))
                try:
                    digests[index] = _digest(as_file(image))
                except BadImage:
                    pass  # quarantined when it is asked for
                except UsageError as error:
                    raise UsageError(f"{name}: image {index} {error}") from error
            self.digests = digests

    def image(self, index: int) -> Any:
        """See `Held`."""
        image, label = self._item(index)
        if label_of(label, f"{self.name}: image {index}") != self.labels[index]:
            raise UsageError(
                f"has the label {label!r} and had {self.labels[index]!r} before: give data that do not change"
            )
        return image

    def _item(self, index: int) -> tuple[Any, Any]:
        try:
            item = self._pairs[index]
        except BadImage:
            raise
        except Exception as error:  # the caller's own code
            raise UsageError(
                f"{self.name}: image {index} cannot be read ({type(error).__name__}: {one_line(error)})"
            ) from error
        if isinstance(item, Mapping):
            found = [next((c for c in usual if c in item), None) for usual in (IMAGE_COLUMNS, LABEL_COLUMNS)]
            if None not in found:
                return item[found[0]], item[found[1]]
        if isinstance(item, (tuple, list)) and len(item) == 2:
            return item[0], item[1]
        of = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise UsageError(
            f"{self.name}: item {index} is a {type(item).__name__}{of}: wanted (image, label) in each"
        )


def _known_labels(pairs: Any) -> Any:
    """The labels as the library's own sets have them in a table; None where only the items say them."""
    kind = type(pairs)
    if kind is Subset:
        inner = _known_labels(pairs.dataset)
        return None if inner is None else [inner[index] for index in pairs.indices]
    if kind is ConcatDataset:
        parts = [_known_labels(part) for part in pairs.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part]
    if kind is TensorDataset:
        return pairs.tensors[1] if len(pairs.tensors) == 2 else None
    if kind.__module__.startswith("torchvision.datasets.") and getattr(pairs, "target_transform", 0) is None:
        for attribute in ("targets", "labels", "_labels"):
            labels = getattr(pairs, attribute, None)
            if isinstance(labels, (list, np.ndarray, Tensor)) and len(labels) == len(pairs):
                return labels
    return None


def _names_in(pairs: Any, name: str) -> Sequence[Any] | None:
    """The class names that a Dataset has as `classes`, or the one that it is a part of."""
    if isinstance(pairs, ConcatDataset):
        parts = [_names_in(part, name) for part in pairs.datasets]
        if any(part != parts[0] for part in parts):
            raise UsageError(f"{name} joins sets of different classes: give the labels one meaning first")
        return parts[0] if parts else None
    names = getattr(pairs, "classes", None)
    if names is None and isinstance(getattr(pairs, "dataset", None), Dataset):
        return _names_in(pairs.dataset, name)
    return list(names) if isinstance(names, (list, tuple)) and names else None


class MemorySource(Source):
    """One split of images in memory; see the head of this file for its keys."""

    def __init__(
        self, held: Held, split: str, labels: Sequence[str], class_names: Sequence[str], name: str = ""
    ) -> None:
        """`labels` are the class name of each image. Raises `UsageError` where two keys share an id."""
        numbers = {class_name: number for number, class_name in enumerate(class_names)}
        keys = [
            (f"{label.replace('/', '-')}/{index:07d}.png", numbers[label])
            for index, label in enumerate(labels)
        ]
        super().__init__(name or held.name, split, class_names, keys)
        self._held = held

    def read(self, sample: Sample) -> bytes:
        """The image's file, or a PPM of its pixels.

        Raises:
            UsageError: it is no image, or another one than the fingerprint tells of.
            BadImage: its file is damaged.
        """
        index = _index_of(sample.key)
        data = self._held.encoded(index)
        if self._held.digests is not None and self._held.digests[index] != _digest(data):
            raise UsageError(
                f"{self.name}: image {index} is not what it was when it was first read: give data that do not change, "
                "without transforms that draw at random"
            )
        return data

    def size_of(self, sample: Sample) -> int:
        """Always -1: an image in memory is no file."""
        return -1

    def fingerprint(self) -> str:
        """32 hex digits over class names, keys, labels and the content of every image, each read once at most.

        The content is the RGB pixels with their height and width, or the file's bytes where a row of a Hugging Face
        set holds a file. So equal images have one fingerprint as tensors, as arrays and as a Dataset of them, and
        another one as files, of which sizes are hashed.
        """
        digest = hashlib.blake2b(digest_size=16)
        names = json.dumps(self.class_names).encode()
        digest.update(f"memory {len(names)} {len(self.samples)} ".encode())
        digest.update(names)
        digest.update(self.samples.keys)
        digest.update(self.samples.labels.astype("<i4").tobytes())
        order = [_index_of(sample.key) for sample in self.samples]
        digest.update(self._held.content(order))
        return digest.hexdigest()

    def close(self) -> None:
        """Nothing stays open between reads."""


def _index_of(key: str) -> int:
    return int(key.rpartition("/")[2].removesuffix(".png"))


# Which of all that it is


def open_memory(data: Any, split: str, class_names: Sequence[str] | None = None) -> MemorySource:
    """One split of images in memory.

    Args:
        data: one of what `held_of` takes, which is a train split, or a mapping of splits to them.
        split: "train" or "test".
        class_names: of the distilled set that a test split is for, where no train split says them.

    Raises:
        UsageError: as `open_source`.
    """
    if not isinstance(data, Mapping):
        if split != "train":
            raise UsageError(
                f"{described(data)} is one split, so that all of it is train: give {{'train': ..., 'test': ...}}"
            )
        data = {"train": data}
    splits = _splits(data)
    wanted = next((kind for kind in SPLIT_FOLDERS[split] if kind in splits), None)
    if wanted is None:
        raise UsageError(
            f"{described(data)} has no {split} split: wanted {' or '.join(SPLIT_FOLDERS[split])}, found "
            f"{shown(map(str, data))}"
        )
    here = held_of(splits[wanted])
    train = held_of(splits["train"]) if wanted != "train" and "train" in splits else None
    if here.class_names is None and train is None and len(splits) > 1:
        here.class_names = next((names for part in splits.values() if (names := _names_said(part))), None)
    return source_of(here, split, train, class_names if train is None else None)


def _names_said(data: Any) -> list[str] | None:
    """The names of class numbers that a Dataset says, without a look at its images."""
    if isinstance(data, Held):
        return data.class_names
    if _is_hugging_face(data):
        named = [kind.names for kind in data.features.values() if hasattr(kind, "names")]
        return distinct(named[0]) if len(named) == 1 else None
    names = _names_in(data, described(data))
    return None if names is None else distinct(names)


def _is_hugging_face(data: Any) -> bool:
    return type(data).__module__.split(".")[0] == "datasets" and hasattr(data, "features")


def _splits(data: Mapping[Any, Any]) -> dict[str, Any]:
    """ "train", "test" or "val" -> what is held of it."""
    keys = [str(key) for key in data]
    if arrays := arrays_by_split(keys, "the data"):
        class_names = next((list(data[key]) for key in NAMES_OF_ARRAYS if key in keys), None)
        return {kind: HeldArrays(data[x], data[y], class_names) for kind, (x, y) in arrays.items()}
    splits: dict[str, Any] = {}
    for key, part in zip(keys, data.values(), strict=True):
        word = split_word(key)
        if word is None or (key != word[0] and word[0] in keys):  # the plainly named one counts
            continue
        if word[0] in splits:
            raise UsageError(
                f"the data have the keys {shown(keys)}, two of which may be the {word[0]} split: call one {word[0]}"
            )
        splits[word[0]] = part
    if not splits:
        raise UsageError(
            f"the data have the keys {shown(keys)}: wanted splits, {{'train': ..., 'test': ...}}"
        )
    return splits


def arrays_by_split(keys: Sequence[str], name: str) -> dict[str, tuple[str, str]]:
    """Split -> the names of its images and of its labels; empty where the names are of no such arrays.

    An array is of the split that its name speaks of, as `x_train`, `test_images` or `val_labels`, and of the train
    split where it speaks of none, as `images` and `labels`.

    Raises:
        UsageError: two arrays may be the same thing.
    """
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        words = set(re.split(r"[^a-z]+", key.casefold())) - {""}
        said = split_word(key)
        what = "images" if words & _IMAGES else "labels" if words & _LABELS else None
        if what is None or (said is None and len(words) > 1):
            continue
        arrays = found.setdefault(said[0] if said else "train", {})
        if what in arrays:
            raise UsageError(
                f"{name} has {arrays[what]} and {key}, either of which may be the {what}: keep one"
            )
        arrays[what] = key
    return {kind: (a["images"], a["labels"]) for kind, a in found.items() if len(a) == 2}


def held_of(data: Any) -> Held:
    """Labelled images as they are held.

    Args:
        data: (images, labels), a torch `Dataset` or a list of (image, label), or a Hugging Face `Dataset`.

    Raises:
        UsageError: it is something else, or images without labels.
    """
    if isinstance(data, Held):
        return data
    if _is_hugging_face(data):
        if not hasattr(data, "__len__"):
            raise UsageError(
                f"{IN_MEMORY}{type(data).__name__} is streamed: give a Dataset, which has a length"
            )
        return HeldRows(data)
    couple = isinstance(data, (tuple, list)) and len(data) == 2 and not _is_pair(data[0])
    if couple and (isinstance(data, tuple) or is_many_images(data[0])):
        return HeldArrays(*data)
    if hasattr(data, "shape") and hasattr(data, "dtype"):
        raise UsageError(f"{IN_MEMORY}{kind_in_words(data)} has no labels: give (images, labels)")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return HeldPairs(data)
    hint = ": give the Dataset that it loads" if hasattr(data, "dataset") else ""
    raise UsageError(
        f"data must be a path, a name or images in memory, got a {type(data).__name__}{hint}; wanted (images, labels), "
        "a Dataset with a length and items (image, label), or {'train': ..., 'test': ...} of these"
    )


def _is_pair(item: Any) -> bool:
    """Whether this is (image, label) and no list of images."""
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        return False
    try:
        label_of(item[1], "it")
    except UsageError:
        return False
    return True


def source_of(
    here: Held,
    split: str,
    train: Held | None = None,
    class_names: Sequence[str] | None = None,
    name: str = "",
) -> MemorySource:
    """A split as a source, its classes those of the train split where that is another.

    Without class names a class is called by its number, with zeros in front to sort as numbers. Classes of which there
    are no images are left out. Classes keep the order of their numbers; those that are labelled by name are sorted.

    Args:
        here: the split.
        split: "train" or "test".
        train: the train split, where that is another.
        class_names: of the distilled set that the split is for, in its order, where there is no train split.
        name: what the user calls it.

    Raises:
        UsageError: no images, a label out of range, one class only, or a class that the train split lacks.
    """
    name = name or here.name
    if not here.labels:
        raise UsageError(f"{name}: no images")
    numbered = here.class_names or (train.class_names if train is not None else None)
    width = width_of(here.labels + (train.labels if train is not None else []))
    if class_names is not None and here.class_names is None:
        # Numbers are those of the classes' names where all of these are numbers, else places in their order.
        if all(re.fullmatch("[0-9]{1,9}", one) for one in class_names):
            width = len(class_names[-1]) if class_names else 1
        else:
            numbered = list(class_names)
    labels = named(here.labels, numbered, width, name)
    remarks = list(here.remarks)
    if class_names is not None:
        known = list(class_names)
    else:
        base, of = (here, labels) if train is None else (train, None)
        names = base.class_names or here.class_names
        known = classes_of(base.labels, of or named(base.labels, names, width, base.name))
        if (
            base.class_names is not None
            and train is None
            and (gone := len(base.class_names) - len(known)) > 0
        ):
            lacking = [one for one in base.class_names if one not in set(known)]
            remarks.append(
                f"{name}: left out {plural(gone, 'class')} of {len(base.class_names)}, which have no images: "
                f"{shown(lacking, 3)}"
            )
    if unknown := sorted(set(labels) - set(known)):
        other = "train split" if class_names is None else "distilled set"
        raise UsageError(f"{name} has classes that the {other} lacks: {shown(unknown)}")
    if len(known) < 2:
        raise UsageError(f"{name}: one class only, {shown(known)}; wanted at least two")
    source = MemorySource(here, split, labels, known, name)
    source.remarks = remarks
    return source
