"""Files on disk: an ImageFolder, or images that `metadata.jsonl` or `metadata.csv` labels."""

from __future__ import annotations

import errno
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddfast.data.folder_scan import ClassListing, forget, identity, is_folder, list_classes, listed
from ddfast.data.samples import DuplicateId, Sample, SampleList
from ddfast.data.sources import (
    Source,
    checked_classes,
    is_hidden,
    is_image,
    pick_split,
    size_refused,
    twins_refused,
    utf8,
)
from ddfast.errors import BadImage, UsageError

_GONE = {errno.ENOENT, errno.ENOTDIR}
# Failures of the machine or the network, which say nothing of the file: quarantining it would change the result.
_NOT_THE_FILE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN}


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
        try:
            with open(self.path_of(sample), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                listed_size = self.size_of(sample)
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
            if error.errno in _NOT_THE_FILE:
                raise UsageError(f"cannot read {self.name}: {reason}; resume when that is mended") from error
            raise BadImage(f"cannot be read: {reason}") from error

    def size_of(self, sample: Sample) -> int:
        """Size of the file in bytes when it was listed, -1 for a broken link."""
        return int(self._sizes[self.samples.position(sample.id)])

    def sizes(self) -> np.ndarray:
        """`size_of` every sample, int64 [N]."""
        return self._sizes

    def close(self) -> None:
        """Nothing stays open between reads."""


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
