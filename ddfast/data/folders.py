"""Files on disk: an ImageFolder, or images that a metadata file labels."""

from __future__ import annotations

import errno
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ddfast.data.folder_scan import (
    ClassListing,
    forget,
    holds_classes,
    identity,
    is_folder,
    list_classes,
    listed,
    sizes_of,
)
from ddfast.data.labels import class_names_of
from ddfast.data.metadata import METADATA_FILES, MetadataFile, labels_in, overrides_folders
from ddfast.data.samples import DuplicateId, Sample, SampleList, sample_ids
from ddfast.data.sources import (
    Source,
    checked_classes,
    ending_left_out,
    is_hidden,
    is_image,
    machine_refused,
    order_remark,
    size_refused,
    spellings,
    twins_refused,
    utf8,
)
from ddfast.data.splits import pick_split, split_word, train_folder
from ddfast.errors import BadImage, UsageError, one_line

_GONE = {errno.ENOENT, errno.ENOTDIR}


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

    def holds(self, path: str | Path) -> bool:
        """See `Source`."""
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self._root))

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

    def has_classes(folder: str) -> bool:
        return holds_classes(root / folder)

    if len(visible := [folder for folder in top if not is_hidden(folder)]) == 1 and not split_word(
        visible[0]
    ):
        below = {entry.name for entry in listed(root / visible[0], name) if is_folder(entry)}
        if any(split_word(inner) == ("train", True) for inner in below):
            raise UsageError(
                f"{name} holds one folder, which has the splits: give {name}/{visible[0]} instead"
            )
    folder = pick_split(top, split, name, has_classes)
    train = train_folder(top, name, has_classes)
    here = _Contents(root, folder, name, search=True)
    there = None
    if train is not None and train != folder:
        # The metadata in each class folder shows only in a listing, which one of the two splits has to pay for.
        there = _Contents(root, train, name, search=here.said is not None)
    return MetadataSource(here, there, split) if here.said is not None else FolderSource(here, there, split)


class _Contents:
    """What stands in the folder of a split, which is listed where it has to be.

    Attributes:
        said: path -> label, where metadata labels the images; None where class folders do.
        class_folders: the visible folders, by their names on disk.
        loose_images: whether images stand beside them.
    """

    def __init__(self, root: Path, folder: str, name: str, *, search: bool) -> None:
        """`search`: look for metadata in the class folders as well, which lists them."""
        self.root, self.folder, self.name, self.place = root, folder, name, root / folder
        self.shown = f"{name.rstrip('/')}/{folder}" if folder else name
        self.class_folders: list[str] = []
        self.loose_images = False
        self.left_out: Counter[str] = Counter()
        resolved = self.place.resolve()
        self._above = {identity(parent) for parent in (resolved, *resolved.parents)}
        for entry in listed(self.place, name):
            if is_hidden(entry.name):
                continue
            if is_folder(entry):
                if identity(entry.path) not in self._above:
                    self.class_folders.append(entry.name)
            elif is_image(entry.name):
                self.loose_images = True
            elif ending := ending_left_out(utf8(entry.name)):
                self.left_out[ending] += 1
        self._listings: dict[str, ClassListing] | None = None
        self.said = self._labels(search)

    def listings(self) -> dict[str, ClassListing]:
        """Class folder -> its images."""
        if self._listings is None:
            found = list_classes(self.place, self.class_folders, self._above, self.name)
            self._listings = dict(zip(self.class_folders, found, strict=True))
        return self._listings

    def _labels(self, search: bool) -> dict[str, int | str] | None:
        files = [
            *_metadata_in(self.place, "", ""),
            *(_metadata_in(self.root, "", f"{self.folder}/") if self.folder else ()),
        ]
        needed = self.loose_images or len(self.class_folders) < 2
        if needed and any(not file.split for file in files):
            return labels_in(files, self.name, needed=True)
        if search:
            for folder, listing in self.listings().items():
                if listing.metadata:
                    files += _metadata_in(self.place, f"{folder}/", "")
        said = labels_in(files, self.name, needed=needed) if files else {}
        if not said:
            return None
        if needed:
            return said
        return said if overrides_folders(said, self.class_folders, self._images, self.shown) else None

    def _images(self) -> Iterator[str]:
        for folder, listing in self.listings().items():
            if len(listing.sizes):
                yield from (f"{folder}/{path}" for path in listing.names.decode().split("\0"))

    def class_names_on_disk(self) -> list[str]:
        """The class folders' names as valid Unicode."""
        return [utf8(folder) for folder in self.class_folders]


def _metadata_in(place: Path, below: str, split: str) -> list[MetadataFile]:
    """The metadata files in a folder of the split, or, with `split`, in the folder above it."""
    found = []
    for file in METADATA_FILES:
        path = place / below / file
        if path.is_file():
            try:
                found.append(MetadataFile(str(path), path.read_bytes(), below, split))
            except OSError as error:
                raise UsageError(f"cannot read {path} ({one_line(error)}); correct it") from error
    return found


class FolderSource(FilesOnDisk):
    """`root/train/<class>/**/*.jpg` and its like. Symbolic links are followed, loops of them are not."""

    def __init__(self, here: _Contents, train: _Contents | None, split: str) -> None:
        """Take what stands in the split's folder, and in the train split's. Raises `UsageError` as `open_source`."""
        name = here.name
        train_classes = None if train is None else _classes_of(train)
        spelled = spellings(here.class_names_on_disk(), train_classes, here.shown)
        listings = {
            spelled[utf8(folder)]: _called(listing, folder, spelled[utf8(folder)])
            for folder, listing in here.listings().items()
        }
        left_out = here.left_out + sum(
            (Counter(listing.left_out) for listing in listings.values()), Counter()
        )
        class_names = checked_classes(
            {class_name: len(listing.sizes) for class_name, listing in listings.items()},
            here.shown,
            loose_images=here.loose_images,
            train_classes=train_classes,
            left_out=left_out,
        )
        samples = _samples(class_names, listings, name)
        sizes = [listings[c].sizes for c in class_names if c in listings]
        super().__init__(name, split, class_names, samples, here.place, np.concatenate(sizes))
        self.left_out = dict(left_out)
        if (listed_names := _names_file(here, above=bool(here.folder))) is not None:
            self.remarks = order_remark(listed_names, class_names, name)
        self._elsewhere = {  # key -> path, where the two differ
            f"{spelled[utf8(folder)]}/{clean.decode()}": os.fsdecode(os.fsencode(folder) + b"/" + raw)
            for folder, listing in here.listings().items()
            for clean, raw in _raw_names(folder, spelled[utf8(folder)], listing)
        }

    def path_of(self, sample: Sample) -> str:
        """Where the file is."""
        return os.path.join(self._root, self._elsewhere.get(sample.key, sample.key))


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


def _called(listing: ClassListing, folder: str, class_name: str) -> ClassListing:
    """A listing with the ids of another class name than its folder's."""
    if class_name == utf8(folder) or not len(listing.sizes):
        return listing
    prefix = class_name.encode("utf-8") + b"/"
    return replace(listing, ids=sample_ids(prefix + path for path in listing.names.split(b"\0")))


def _raw_names(folder: str, class_name: str, listing: ClassListing) -> list[tuple[bytes, bytes]]:
    """(UTF-8 name, raw name) of the files whose path is not their key, be it for the class folder's sake."""
    if class_name == folder:
        return list(listing.undecodable.items())
    names = listing.names.split(b"\0") if len(listing.sizes) else []
    return [(name, listing.undecodable.get(name, name)) for name in names]


def _classes_of(train: _Contents) -> list[str]:
    """The classes of a train split, in any order."""
    if train.said is None:
        return train.class_names_on_disk()
    return list(
        dict.fromkeys(class_names_of(set(train.said.values()), _names_file(train), train.name).values())
    )


def _names_file(contents: _Contents, *, above: bool = True) -> bytes | None:
    """The `classes.txt` in the folder of a split, or the one in the folder `above` it."""
    places = [contents.place / "classes.txt", *([contents.place.parent / "classes.txt"] if above else [])]
    return next((path.read_bytes() for path in places if path.is_file()), None)


class MetadataSource(FilesOnDisk):
    """Images of one folder, labelled by metadata in it, in the folders in it, or in the folder above.

    Keys are "class/file name". Files that no row names are no samples; a row whose file is missing is a sample
    that fails. The names of class numbers may stand in `classes.txt` beside the metadata.
    """

    def __init__(self, here: _Contents, train: _Contents | None, split: str) -> None:
        """Take the split's labels and the files' sizes. Raises `UsageError` as `open_source` does."""
        name, said = here.name, here.said or {}
        numbers = {*said.values()} | (
            set() if train is None or train.said is None else {*train.said.values()}
        )
        names = class_names_of(numbers, _names_file(here), name)
        train_classes = None
        if train is not None:
            train_classes = (
                train.class_names_on_disk()
                if train.said is None
                else list(dict.fromkeys(names[label] for label in train.said.values()))
            )
        spelled = spellings({names[label] for label in said.values()}, train_classes, here.shown)
        counts = Counter(spelled[names[label]] for label in said.values())
        class_names = checked_classes(counts, here.shown, train_classes=train_classes, left_out=here.left_out)
        labels = {class_name: label for label, class_name in enumerate(class_names)}
        keys = [
            (f"{spelled[names[label]]}/{path}", labels[spelled[names[label]]]) for path, label in said.items()
        ]
        try:
            samples = SampleList.of(keys)
        except DuplicateId as error:
            raise twins_refused(name, error) from error
        paths = [os.path.join(here.place, sample.key.partition("/")[2]) for sample in samples]
        super().__init__(name, split, class_names, samples, here.place, sizes_of(paths))

    def path_of(self, sample: Sample) -> str:
        """Where the file is."""
        return os.path.join(self._root, sample.key.partition("/")[2])
