"""Where labelled images come from: what every source offers, and `open_source`, which finds the right one.

A source is one split of a data set. Whatever holds the files, the same files give the same samples, keys and
ids, so a zip and the folder it was made from lead to the same draws and the same result.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ddfast.data.samples import DuplicateId, Sample, SampleList
from ddfast.errors import BadImage, UsageError, shown
from ddfast.wording import argument

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Endings that make a file in a class folder a sample, in any case: torchvision's ImageFolder's, and GIF."""

_SEGMENTED = frozenset(
    ("images", "image", "imgs", "img", "masks", "mask", "labels", "label", "annotations", "annotation")
)
_BESIDE_IMAGES = frozenset(
    (".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html", ".parquet", ".cls")
) | {".db", ".ini", ".log", ".url", ".lst", ".index", ".pdf", ".py", ".sh", ".ipynb"}
"""Endings of what stands beside images and is none: such files are left out without a word."""

MAX_FILE_BYTES = 1 << 30
"""A larger image file is not read: it is no photograph, and an archive may lie about sizes.

`DDFAST_MAX_FILE_BYTES` in the environment sets another limit.
"""

SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
"""The folders that may hold a split; the first that exists is taken."""


_NOT_THE_FILE = {
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENODEV, errno.ENXIO),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
}


class Source(ABC):
    """One split of a labelled image set.

    Attributes:
        name: what the user called it, for messages.
        split: "train" or "test".
        class_names: in label order: sorted as plain strings, save for torchvision's sets, which keep theirs.
        samples: sorted by label, then key; keys and ids are unique. Their ids and labels are arrays as well:
            `samples.ids` int64 [N] and `samples.labels` int32 [N].

        left_out: ending -> number of the files beside the samples that are none by their ending, as `.heic`; text
            and tables, which nobody takes for images, are not counted.
        remarks: lines on what is read otherwise than a user may expect.

    `read` may be called from many threads. A source of archives keeps some of them open; `close`, or the end of a
    `with` block, closes them, the next `read` opens what it needs again. A source can be pickled.
    """

    def __init__(
        self,
        name: str,
        split: str,
        class_names: Sequence[str],
        keys: Iterable[tuple[str, int]] | SampleList,
    ) -> None:
        """`keys` are (key, label) pairs in any order, or samples already sorted by label, then key.

        Raises `UsageError` where two keys share an id.
        """
        self.name = name
        self.split = split
        self.class_names = list(class_names)
        self.left_out: dict[str, int] = {}
        self.remarks: list[str] = []
        try:
            self.samples = keys if isinstance(keys, SampleList) else SampleList.of(keys)
        except DuplicateId as error:
            raise twins_refused(name, error) from error

    @abstractmethod
    def read(self, sample: Sample) -> bytes:
        """The sample's encoded image. `BadImage` if it is unreadable, `UsageError` if the source is gone."""

    @abstractmethod
    def size_of(self, sample: Sample) -> int:
        """Size in bytes of the sample's file, -1 where it cannot be told."""

    @abstractmethod
    def close(self) -> None:
        """Close what is open. The next `read` opens it again."""

    def holds(self, path: str | Path) -> bool:
        """Whether what is written at `path` would lie among the images: never, where they are no files of a folder."""
        return False

    def by_id(self, sample_id: int) -> Sample:
        """The sample with this id. Raises `KeyError` if there is none."""
        return self.samples[self.samples.position(sample_id)]

    def counts(self) -> list[int]:
        """Samples in each class, in label order."""
        return np.bincount(self.samples.labels, minlength=len(self.class_names)).tolist()

    def sizes(self) -> np.ndarray:
        """`size_of` every sample, int64 [N]."""
        return np.fromiter((self.size_of(sample) for sample in self.samples), np.int64, len(self.samples))

    def notes(self) -> list[str]:
        """What a user should hear of, a line each: `remarks`, and what was `left_out`, counted and named."""
        if not self.left_out:
            return self.remarks
        left_out = (
            f"{self.name}: left out {sum(self.left_out.values())} files of the {self.split} split by their ending: "
            f"{endings_in_words(self.left_out)}; images end in {' '.join(EXTENSIONS)}"
        )
        return [*self.remarks, left_out]

    def fingerprint(self) -> str:
        """32 hex digits over class names, keys and file sizes; equal for a folder and a zip of it."""
        digest = hashlib.blake2b(digest_size=16)
        names = json.dumps(self.class_names).encode()
        digest.update(f"{len(names)} {len(self.samples)} ".encode())
        digest.update(names)
        digest.update(self.samples.keys)
        digest.update(self.samples.labels.astype("<i4").tobytes())
        digest.update(self.sizes().astype("<i8").tobytes())
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


def check_outside(out: Path, source: Source) -> None:
    """Refuse to write among the images of the data, where pictures would be taken for more of them.

    Raises:
        UsageError: `out` lies there.
    """
    if source.holds(out):
        raise UsageError(
            f"{out} lies among the images of {source.name}, so that what is written there would be taken for data; "
            f"choose another {argument('out')}"
        )


def place_of(data: Any) -> str | None:
    """`described`, by the whole path where it is one: `run.json` is read from other folders, too. None stays None."""
    if data is None:
        return None
    text = described(data)
    found = not is_in_memory(data) and os.path.exists(os.path.expanduser(text))
    return os.path.abspath(os.path.expanduser(text)) if found else text


def machine_refused(name: str, error: OSError) -> None:
    """Raise `UsageError` where a read failed for want of the machine or the network.

    Such a failure says nothing of the file: to quarantine it would change the result.
    """
    if error.errno in _NOT_THE_FILE:
        reason = os.strerror(error.errno or 0).lower()
        raise UsageError(f"cannot read {name}: {reason}; resume when that is mended") from error


def size_refused(size: int) -> None:
    """Raise `BadImage` for a file of more bytes than `file_limit()`."""
    limit = file_limit()
    if size > limit:
        raise BadImage(
            f"file of {size} bytes, more than the limit of {limit}, which DDFAST_MAX_FILE_BYTES can raise"
        )


def file_limit() -> int:
    """Bytes above which an image file is not read: `DDFAST_MAX_FILE_BYTES`, else `MAX_FILE_BYTES`.

    Raises:
        UsageError: the variable is not a positive whole number.
    """
    return limit_from("DDFAST_MAX_FILE_BYTES", MAX_FILE_BYTES)


def limit_from(variable: str, default: int) -> int:
    """A limit that an environment variable may replace. `UsageError` unless it is a positive whole number."""
    given = os.environ.get(variable)
    if given is None:
        return default
    if not re.fullmatch(r"0*[1-9][0-9]{0,17}", given):
        raise UsageError(f"{variable} must be a positive whole number, got {given!r}")
    return int(given)


# What every layout has in common: files by class, checked and named


def twins_refused(name: str, error: DuplicateId) -> UsageError:
    """What to say of two keys with one id."""
    return UsageError(f"{name}: {shown(error.keys)} share one 64-bit id; rename one of them")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out: dot files, and what macOS adds to its zips."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    """Whether a file's name makes it a sample."""
    return name.lower().endswith(EXTENSIONS)


def ending_left_out(name: str) -> str:
    """The ending for which a file that is no sample is left out, "" for one that nobody takes for an image."""
    ending = os.path.splitext(name)[1].lower()
    return "" if ending in _BESIDE_IMAGES else ending or "no ending"


def endings_in_words(left_out: Mapping[str, int]) -> str:
    """Counted endings, the most frequent first: `12 .heic, 3 .avif`."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return shown(f"{count} {ending}" for ending, count in ordered)


def order_remark(names_file: bytes, class_names: Sequence[str], name: str) -> list[str]:
    """A line where a `classes.txt` beside class folders says another order or other names than theirs."""
    lines = [line.strip() for line in names_file.decode("utf-8-sig", "replace").splitlines() if line.strip()]
    if lines == list(class_names):
        return []
    return [
        f"{name}: the classes are the folders' names, sorted as text as torchvision's ImageFolder sorts them "
        f"({shown(class_names, 3)}), and not in the order or by the names of classes.txt ({shown(lines, 3)})"
    ]


def reasons_in_words(reasons: Iterable[str]) -> str:
    """Why files could not be read, the most frequent first: ` (unreadable: 4 truncated, 1 empty file)`; "" for none."""
    counts = Counter(reasons)
    ordered = sorted(counts, key=lambda reason: (-counts[reason], reason))
    return f" (unreadable: {shown((f'{counts[r]} {r}' for r in ordered), 3)})" if ordered else ""


def path_inside(name: str) -> str | None:
    """A relative path without `.` and double slashes; None for one that points outside of where it stands."""
    parts = re.split(r"[/\\]", name)
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name) or ".." in parts or "\0" in name:
        return None
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def spellings(found: Collection[str], train_classes: Collection[str] | None, place: str) -> dict[str, str]:
    """Class name as found -> class name in the train split, where the two differ in Unicode's composition only.

    A file system or a packer may decompose an accented letter, so that one name has two spellings that look alike.

    Args:
        found: class names of a split.
        train_classes: those of the train split, when this is another.
        place: the folder they were found in, for messages.

    Raises:
        UsageError: two classes of one split whose names look alike, which `==` tells apart and no reader can.
    """
    for names, where in ((found, place), (train_classes or (), "the train split")):
        seen: dict[str, str] = {}
        for class_name in sorted(names):
            twin = seen.setdefault(unicodedata.normalize("NFC", class_name), class_name)
            if twin != class_name:
                raise UsageError(
                    f"{where} has the class {class_name} twice, composed and decomposed Unicode ({twin!a} and "
                    f"{class_name!a}): rename one, or put their files together if they are one class"
                )
    if train_classes is None:
        return {class_name: class_name for class_name in found}
    known = {unicodedata.normalize("NFC", class_name): class_name for class_name in train_classes}
    return {
        class_name: known.get(unicodedata.normalize("NFC", class_name), class_name) for class_name in found
    }


def composed(names: Iterable[str]) -> list[str]:
    """Class names by which two spellings of one, in composed and in decomposed Unicode, are equal."""
    return [unicodedata.normalize("NFC", name) for name in names]


def checked_classes(
    files: Mapping[str, object],
    place: str,
    *,
    loose_images: bool = False,
    train_classes: Collection[str] | None = None,
    left_out: Mapping[str, int] | None = None,
) -> list[str]:
    """Check what was found and fix the label order.

    Args:
        files: class name -> its images, or how many there are.
        place: the folder they were found in, for messages.
        loose_images: whether images stand beside the class folders; said where there are no others.
        train_classes: the classes of the train split, when this is another.
        left_out: ending -> number of the files that are no images by their ending; named where nothing else is there.

    Returns:
        class names in label order, sorted as plain strings.

    Raises:
        UsageError: no images, a class without images, one class only, a class that the train split lacks.
    """
    if not any(files.values()):
        if loose_images:
            raise UsageError(
                f"images without class folders in {place}: wanted one folder for each class, in a folder of them "
                "where the class itself is called train, test or val"
            )
        seen = f"; it holds {endings_in_words(left_out)}" if left_out else ""
        if left_out and ".tar" in left_out:
            seen += f", which are given as {place}/*.tar"
        raise UsageError(
            f"no images in {place}: wanted class folders with files ending in {' '.join(EXTENSIONS)}{seen}"
        )
    empty = sorted(class_name for class_name, paths in files.items() if not paths)
    if empty:
        seen = f" ({place} also holds {endings_in_words(left_out)}, which are left out)" if left_out else ""
        raise UsageError(
            f"class without images in {place}: {shown(empty)}; add images or remove the folder{seen}"
        )
    if train_classes is not None:
        unknown = sorted(set(files) - set(train_classes))
        if unknown:
            cases = {class_name.casefold(): class_name for class_name in train_classes}
            alike = next((cases[new.casefold()] for new in unknown if new.casefold() in cases), None)
            hint = (
                "" if alike is None else f"; the train split writes {alike}, and upper and lower case differ"
            )
            raise UsageError(f"{place} has classes that the train split lacks: {shown(unknown)}{hint}")
    class_names = sorted(files if train_classes is None else train_classes)
    folded = {class_name.casefold() for class_name in files}
    if len(files) > 1 and folded <= _SEGMENTED and folded & {"images", "image", "imgs", "img"}:
        raise UsageError(
            f"{place} has {shown(f'{folder}/' for folder in sorted(files))}: images beside masks or annotations, and "
            "no classes; wanted one folder for each class, or other names if these are classes"
        )
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


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may hold half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# Data that are no files

IN_MEMORY = "in memory: "
"""How the name of images that a program holds begins, in messages and in `run.json`."""


def is_in_memory(data: Any) -> bool:
    """Whether data are images in memory rather than a path or a name."""
    return not isinstance(data, (str, bytes)) and not hasattr(data, "__fspath__")


def described(data: Any) -> str:
    """One line on data, for `run.json`: the path or name, or what is held in memory."""
    if not is_in_memory(data):
        return str(data)
    if isinstance(data, Mapping):
        return IN_MEMORY + ", ".join(f"{split} {kind_in_words(part)}" for split, part in data.items())
    return IN_MEMORY + kind_in_words(data)


def kind_in_words(data: Any) -> str:
    """What is held in memory, in a few words: `uint8 tensor [50000, 3, 32, 32]`, `CIFAR10 of 50000`."""
    if isinstance(data, (tuple, list)) and len(data) == 2 and is_many_images(data[0]):
        data = data[0]
    shape = getattr(data, "shape", None)
    if shape is not None and hasattr(data, "dtype"):
        kind = "tensor" if str(data.dtype).startswith("torch.") else "array"
        return f"{str(data.dtype).removeprefix('torch.')} {kind} {list(shape)}"
    count = f" of {len(data)}" if hasattr(data, "__len__") else ""
    return f"{type(data).__name__}{count}"


def is_many_images(images: Any) -> bool:
    """Whether this holds many images, as the first of (images, labels) does, and not one."""
    if isinstance(images, (list, tuple)):
        return True
    return hasattr(images, "shape") and hasattr(images, "__getitem__") and len(images.shape) >= 3
