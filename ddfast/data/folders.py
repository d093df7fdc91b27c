"""An ImageFolder on disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ddfast.data.sources import (
    MAX_FILE_BYTES,
    Sample,
    Source,
    checked_classes,
    is_hidden,
    is_image,
    keys_of,
    pick_split,
    shown,
    utf8,
)
from ddfast.errors import BadImage, UsageError


class FolderSource(Source):
    """`root/train/<class>/**/*.jpg` and its like. Symbolic links are followed, loops of them are not."""

    def __init__(self, root: Path, split: str, name: str) -> None:
        """List an existing folder. Raises `UsageError` as `open_source` does."""
        top = {entry.name for entry in _listed(root, name) if _is_folder(entry)}
        folder = pick_split(top, split, name)
        self._root = root / folder
        self._undecodable: dict[str, str] = {}  # key -> relative path, for names that are not UTF-8
        above = {_identity(place) for place in (self._root.resolve(), *self._root.resolve().parents)}
        files: dict[str, list[str]] = {}
        loose_images = False
        for entry in _listed(self._root, name):
            if is_hidden(entry.name):
                continue
            if not _is_folder(entry):
                loose_images |= is_image(entry.name)
            elif _identity(entry.path) not in above:
                files[utf8(entry.name)] = []
                for path in _walk(entry, above, name):
                    files[utf8(entry.name)].append(utf8(path))
                    key = utf8(f"{entry.name}/{path}")
                    if key != f"{entry.name}/{path}":
                        self._undecodable[key] = f"{entry.name}/{path}"
        if not folder and len(files) == 1:
            (only,) = files
            if os.path.isdir(os.path.join(root, only, "train")):
                raise UsageError(f"{name} holds one folder, which has the splits: give {name}/{only} instead")
        train_classes = None
        if folder != "train" and "train" in top:
            entries = _listed(root / "train", name)
            train_classes = [utf8(e.name) for e in entries if _is_folder(e) and not is_hidden(e.name)]
        class_names = checked_classes(
            files,
            f"{name.rstrip('/')}/{folder}" if folder else name,
            loose_images=loose_images,
            train_classes=train_classes,
        )
        super().__init__(name, split, class_names, keys_of(files, class_names))

    def _path(self, sample: Sample) -> str:
        return os.path.join(self._root, self._undecodable.get(sample.key, sample.key))

    def read(self, sample: Sample) -> bytes:
        """The file's bytes. `BadImage` if it is unreadable, `UsageError` if the whole folder is gone."""
        try:
            with open(self._path(sample), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_FILE_BYTES:
                    raise BadImage(f"file of {size} bytes, more than the limit of {MAX_FILE_BYTES}")
                return file.read()
        except OSError as error:
            reason = os.strerror(error.errno or 0).lower()
            if not self._root.is_dir():
                raise UsageError(f"{self.name} has gone away: {reason}") from error
            raise BadImage(f"cannot be read: {reason}") from error

    def size_of(self, sample: Sample) -> int:
        """Size of the file in bytes, -1 for a broken link."""
        try:
            return os.stat(self._path(sample)).st_size
        except OSError:
            return -1

    def close(self) -> None:
        """Nothing stays open between reads."""


def _listed(folder: str | Path, name: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        place = shown([utf8(os.fspath(folder))])
        raise UsageError(f"cannot list {place} of {name}: {os.strerror(error.errno or 0).lower()}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _walk(class_folder: os.DirEntry[str], above: set[tuple[int, int]], name: str) -> Iterator[str]:
    """Relative posix paths of the image files under a class folder.

    Every real folder is visited once and none of those `above`, so that links cannot lead in circles.
    """
    seen = above | {_identity(class_folder.path)}
    waiting = [(class_folder.path, "")]
    while waiting:
        place, prefix = waiting.pop()
        for entry in _listed(place, name):
            if is_hidden(entry.name):
                continue
            if _is_folder(entry):
                identity = _identity(entry.path)
                if identity not in seen:
                    seen.add(identity)
                    waiting.append((entry.path, f"{prefix}{entry.name}/"))
            elif is_image(entry.name) and _is_file_or_broken_link(entry):
                yield prefix + entry.name


def _is_file_or_broken_link(entry: os.DirEntry[str]) -> bool:
    """A broken link is a sample that fails; pipes, sockets and devices, which may block, are no samples."""
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return True
