"""The images in a tree of class folders: listed once, by many threads, and remembered on disk.

What is remembered, and when it is believed
- Trees of fewer than 10,000 files are listed anew each time.
- The listing of a larger one stands in `$DDFAST_CACHE`, else `$XDG_CACHE_HOME/ddfast`, else `~/.cache/ddfast`,
  under `scans/`, one file for each absolute path; `DDFAST_CACHE=off` does without. It is an .npz of plain
  arrays. One that is missing, damaged or cannot be written costs a new listing and nothing else.
- A class folder's listing is believed while the folder and every folder under it keep device, inode and both
  times (content and status change). Adding, removing or renaming a file changes them, so that class is listed
  anew and the others are not. A folder that changed less than 3 seconds before it was listed is not believed:
  the clock of a file system may be too coarse to show another change.
- Overwriting a file in place changes none of this, so a remembered size may be wrong. It cannot reach a result:
  reading a file whose size is not the listed one drops the listing and ends the run (`FolderSource.read`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
import time
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ddfast.data.metadata import METADATA_FILES
from ddfast.data.samples import sample_ids
from ddfast.data.sources import ending_left_out, is_hidden, is_image, utf8
from ddfast.errors import UsageError, shown
from ddfast.files import atomic_path

CACHED_FROM = 10_000
"""Files from which on a listing is remembered."""

_VERSION = 2
_SETTLED_NS = 3_000_000_000  # a change this long ago has another time stamp than the next one
_THREADS = 32  # listings wait for the disk or the network, not for a core
_NOT_SETTLED = -1
# What reading a damaged .npz raises: NumPy parses an array's header as Python source, and one that claims too
# much needs too much memory.
_CACHE_ERRORS = (
    *(OSError, ValueError, KeyError, EOFError, MemoryError, SyntaxError, TypeError, NotImplementedError),
    *(RuntimeError, OverflowError, struct.error, zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


@dataclass(frozen=True)
class ClassListing:
    """The images under one class folder.

    Attributes:
        names: their relative posix paths in UTF-8, sorted, NUL between them.
        sizes: int64 [n] in bytes; -1 for a broken link.
        ids: int64 [n], `sample_id` of "class/path".
        folders: the folders visited, the class folder ("") first, relative to it.
        stamps: int64 [folders, 4]: device, inode, time of content and of status in ns; -1 where not settled.
        left_out: ending -> number of the files that are no images by their ending.
        metadata: the metadata files of the class folder itself, by name.
        undecodable: UTF-8 name -> raw name, for names that are not UTF-8. Such a listing is not remembered.
    """

    names: bytes
    sizes: np.ndarray
    ids: np.ndarray
    folders: list[bytes]
    stamps: np.ndarray
    left_out: dict[str, int] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    undecodable: dict[bytes, bytes] = field(default_factory=dict)


def list_classes(
    root: Path, class_folders: Sequence[str], above: set[tuple[int, int]], name: str
) -> list[ClassListing]:
    """List class folders of `root`, in parallel, taking from the cache what has not changed.

    Args:
        root: the folder they stand in.
        class_folders: their names.
        above: identities of `root` and the folders above it, which links must not lead back to.
        name: what the user calls the source.

    Raises:
        UsageError: a folder cannot be listed.
    """
    remembered = _read_cache(root)

    def one(class_folder: str) -> tuple[ClassListing, bool]:
        held = remembered.get(os.fsencode(class_folder))
        place = os.path.join(root, class_folder)
        if held is not None and _unchanged(place, held):
            return held, True
        try:
            return _list_class(place, class_folder, above, name), False
        except OSError as error:
            reason = os.strerror(error.errno or 0).lower()
            raise UsageError(f"cannot list {shown([utf8(class_folder)])} of {name}: {reason}") from error

    if len(class_folders) < 2 * _THREADS:
        found = [one(class_folder) for class_folder in class_folders]
    else:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="ddfast-list") as pool:
            found = list(pool.map(one, class_folders, chunksize=1))
    listings = [listing for listing, _ in found]
    news = not all(kept for _, kept in found) or len(found) != len(remembered)
    if news and sum(len(listing.sizes) for listing in listings) >= CACHED_FROM:
        _write_cache(root, class_folders, listings)
    return listings


def forget(root: Path) -> None:
    """Drop what is remembered of `root`."""
    path = cache_path(root)
    if path is not None:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return


def listed(folder: str | Path, name: str) -> list[os.DirEntry[str]]:
    """A folder's entries, sorted by name. Raises `UsageError` where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        place = shown([utf8(os.fspath(folder))])
        raise UsageError(f"cannot list {place} of {name}: {os.strerror(error.errno or 0).lower()}") from error


def holds_classes(place: str | Path) -> bool:
    """Whether a folder is built as a split is: folders or metadata in it, and no images beside them but labelled ones.

    False where it cannot be listed.
    """
    folders = False
    images = False
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name in METADATA_FILES:
                    return True
                if not is_hidden(entry.name):
                    images |= is_image(entry.name)
                    folders |= is_folder(entry)
    except OSError:
        return False
    return folders and not images


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def sizes_of(paths: Sequence[str]) -> np.ndarray:
    """Sizes of files in bytes, int64 [N], -1 for those that are missing or no files; asked by many threads."""

    def one(path: str) -> int:
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return -1
        return status.st_size if stat.S_ISREG(status.st_mode) else -1

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="ddfast-list") as pool:
        return np.fromiter(pool.map(one, paths, chunksize=64), np.int64, len(paths))


def identity(folder: str | Path) -> tuple[int, int]:
    """Device and inode of a folder."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


# Listing ----------------------------------------------------------------------------------------------------


def _list_class(place: str, class_folder: str, above: set[tuple[int, int]], name: str) -> ClassListing:
    """Every real folder is visited once and none of those `above`, so links cannot lead in circles."""
    found: list[tuple[bytes, int]] = []
    undecodable: dict[bytes, bytes] = {}
    left_out: Counter[str] = Counter()
    metadata: list[str] = []
    folders: list[bytes] = []
    stamps: list[tuple[int, int, int, int]] = []
    seen = above | {identity(place)}
    waiting = [(place, "")]
    while waiting:
        here, prefix = waiting.pop()
        stamps.append(_stamp(here))
        folders.append(os.fsencode(prefix))
        for entry in listed(here, name):
            if is_hidden(entry.name):
                continue
            if is_folder(entry):
                which = identity(entry.path)
                if which not in seen:
                    seen.add(which)
                    waiting.append((entry.path, f"{prefix}{entry.name}/"))
            elif not prefix and entry.name in METADATA_FILES:
                metadata.append(entry.name)
            elif not is_image(entry.name):
                if ending := ending_left_out(utf8(entry.name)):
                    left_out[ending] += 1
            elif (size := _size(entry)) is not None:
                raw = os.fsencode(prefix + entry.name)
                clean = utf8(prefix + entry.name).encode("utf-8")
                found.append((clean, size))
                if raw != clean:
                    undecodable[clean] = raw
    found.sort()
    names = [path for path, _ in found]
    prefix_bytes = utf8(class_folder).encode("utf-8") + b"/"
    return ClassListing(
        names=b"\0".join(names),
        sizes=np.array([size for _, size in found], np.int64),
        ids=sample_ids(prefix_bytes + path for path in names),
        folders=folders,
        stamps=np.array(stamps, np.int64).reshape(-1, 4),
        left_out=dict(left_out),
        metadata=metadata,
        undecodable=undecodable,
    )


def _size(entry: os.DirEntry[str]) -> int | None:
    """Bytes of a file, -1 for a broken link, which is a sample that fails.

    None for pipes, sockets and devices, which may block and are no samples.
    """
    try:
        status = entry.stat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _stamp(folder: str) -> tuple[int, int, int, int]:
    """To be taken before the folder is listed, so that a change meanwhile shows the next time."""
    now = time.time_ns()
    status = os.stat(folder)
    content, change = status.st_mtime_ns, status.st_ctime_ns
    if max(content, change) > now - _SETTLED_NS:
        content = _NOT_SETTLED
    return _signed(status.st_dev), _signed(status.st_ino), content, change


def _signed(number: int) -> int:
    """An unsigned 64-bit number in int64."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _unchanged(place: str, listing: ClassListing) -> bool:
    for folder, stamp in zip(listing.folders, listing.stamps.tolist(), strict=True):
        try:
            status = os.stat(os.fsencode(place) + b"/" + folder)
        except OSError:
            return False
        now = [_signed(status.st_dev), _signed(status.st_ino), status.st_mtime_ns, status.st_ctime_ns]
        if now != stamp or stamp[2] == _NOT_SETTLED:
            return False
    return True


# The cache --------------------------------------------------------------------------------------------------


def cache_path(root: Path) -> Path | None:
    """The file that remembers `root`; None where `DDFAST_CACHE=off` or there is no home."""
    given = os.environ.get("DDFAST_CACHE", "")
    if given.lower() == "off":
        return None
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no home folder
        return None
    base = Path(os.path.expanduser(given)) if given else Path(home) / "ddfast"
    place = os.fsencode(os.path.realpath(root))
    return base / "scans" / f"{hashlib.blake2b(place, digest_size=16).hexdigest()}.npz"


def _write_cache(root: Path, class_folders: Sequence[str], listings: Sequence[ClassListing]) -> None:
    path = cache_path(root)
    if path is None:
        return
    kept = [
        (os.fsencode(folder), listing)
        for folder, listing in zip(class_folders, listings, strict=True)
        if not listing.undecodable and utf8(folder) == folder and len(listing.sizes)
    ]
    if not kept:
        return
    arrays = {
        "version": np.array([_VERSION], np.int64),
        "root": _text(os.fsencode(os.path.realpath(root))),
        "classes": _text(b"\0".join(folder for folder, _ in kept)),
        "files": np.array([len(listing.sizes) for _, listing in kept], np.int64),
        "names": _text(b"\0".join(listing.names for _, listing in kept)),
        "sizes": np.concatenate([listing.sizes for _, listing in kept]),
        "ids": np.concatenate([listing.ids for _, listing in kept]),
        "folder_counts": np.array([len(listing.folders) for _, listing in kept], np.int64),
        "folders": _text(b"\0".join(folder for _, listing in kept for folder in listing.folders)),
        "stamps": np.concatenate([listing.stamps for _, listing in kept]),
        "others": _text(json.dumps([[listing.left_out, listing.metadata] for _, listing in kept]).encode()),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except (OSError, UsageError):  # a full disk, a read-only home
        return


def _text(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _read_cache(root: Path) -> dict[bytes, ClassListing]:
    """Class folder -> what is remembered of it; empty where nothing usable is."""
    path = cache_path(root)
    if path is None:
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            held = {name: np.atleast_1d(np.asarray(arrays[name])) for name in arrays.files}
        if held["version"].tolist() != [_VERSION]:
            return {}
        if held["root"].tobytes() != os.fsencode(os.path.realpath(root)):
            return {}
        return dict(_unpacked(held))
    except _CACHE_ERRORS:
        return {}


def _unpacked(arrays: dict[str, np.ndarray]) -> Iterator[tuple[bytes, ClassListing]]:
    """The listings of a cache. Raises `ValueError` or `KeyError` for one that makes no sense."""
    for name in ("classes", "names", "folders", "others"):
        if arrays[name].dtype != np.uint8:
            raise ValueError(f"{name} is no text")
    for name in ("files", "folder_counts", "sizes", "ids", "stamps"):
        if arrays[name].dtype != np.int64:
            raise ValueError(f"{name} is not int64")
    classes = arrays["classes"].tobytes().split(b"\0")
    names, folders = arrays["names"].tobytes(), arrays["folders"].tobytes().split(b"\0")
    names.decode("utf-8")  # a ValueError now, not when a key is read
    if re.search(rb"(?:^|[/\0])\.\.(?:$|[/\0])", names):
        raise ValueError("a name leads outside")
    ends = np.append(np.flatnonzero(arrays["names"] == 0), len(names))
    file_ends, folder_ends = arrays["files"].cumsum(), arrays["folder_counts"].cumsum()
    others = json.loads(arrays["others"].tobytes())
    whole = (
        isinstance(others, list)
        and all(_are_others(pair) for pair in others)
        and len(others) == len(classes)
        and len(classes) == len(file_ends) == len(folder_ends)
        and int(arrays["files"].min()) > 0
        and int(arrays["folder_counts"].min()) > 0
        and len(ends) == int(file_ends[-1])
        and arrays["sizes"].shape == arrays["ids"].shape == (int(file_ends[-1]),)
        and arrays["stamps"].shape == (int(folder_ends[-1]), 4)
        and len(folders) == int(folder_ends[-1])
    )
    if not whole:
        raise ValueError("its parts do not fit together")
    first = first_folder = 0
    for index, class_folder in enumerate(classes):
        last, last_folder = int(file_ends[index]), int(folder_ends[index])
        begin = int(ends[first - 1]) + 1 if first else 0
        yield (
            class_folder,
            ClassListing(
                names=names[begin : int(ends[last - 1])],
                sizes=arrays["sizes"][first:last],
                ids=arrays["ids"][first:last],
                folders=folders[first_folder:last_folder],
                stamps=arrays["stamps"][first_folder:last_folder],
                left_out=others[index][0],
                metadata=others[index][1],
            ),
        )
        first, first_folder = last, last_folder


def _are_others(pair: object) -> bool:
    """Whether this is what is remembered of a class's other files: counts by ending, and names of metadata files."""
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    counts, names = pair
    return (
        isinstance(counts, dict)
        and all(type(count) is int and count > 0 for count in counts.values())
        and isinstance(names, list)
        and all(name in METADATA_FILES for name in names)
    )
