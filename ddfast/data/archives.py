"""Images inside archives, read in place: zip files and WebDataset tar shards."""

from __future__ import annotations

import glob
import json
import os
import re
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from array import array
from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product, takewhile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ddfast.data.labels import class_list, class_names_of, label_in, label_in_text
from ddfast.data.metadata import METADATA_FILES, MetadataFile, labels_in, overrides_folders
from ddfast.data.samples import Sample
from ddfast.data.sources import (
    SPLIT_FOLDERS,
    Source,
    checked_classes,
    ending_left_out,
    is_hidden,
    is_image,
    machine_refused,
    one_line,
    path_inside,
    shown,
    size_refused,
    spellings,
    utf8,
)
from ddfast.data.splits import pick_split, split_word, train_folder
from ddfast.errors import BadImage, UsageError

_MAX_LABEL_BYTES = 1 << 20  # a .cls, .json or classes.txt larger than this is no label
_MAX_METADATA_BYTES = 1 << 30
_MAX_LINK_BYTES = 4096
_MOST_OPEN = 64  # archives kept open between reads, far below the usual limit of 1,024 files
_MAX_LINKS = 40  # links followed from one to the next, as Linux does
_MAX_SHARDS = 1_000_000
_TAR_PACKINGS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_PACKINGS = {
    6: "imploding",
    8: "deflate",
    9: "Deflate64",
    12: "bzip2",
    14: "LZMA",
    20: "Zstandard",
    93: "Zstandard",
    95: "XZ",
    96: "JPEG",
    98: "PPMd",
    99: "AES encryption",
}
"""Zip methods by number (APPNOTE 4.4.5)."""
_MAIN_IMAGES = {"img", "image", "input", "rgb", "jpg", "jpeg", "png", "photo", "main", "original"}
_SPLIT_NAMES = {folder for group in SPLIT_FOLDERS.values() for folder in group}


@dataclass(frozen=True, slots=True)
class _Member:
    """Where a file lies in an archive: `stored` bytes at `offset` that unpack to `size` bytes.

    In a tar, `method` is None and the bytes are the file's. In a zip it is the compression method, and a
    local header comes first.
    """

    archive: int
    offset: int
    stored: int
    size: int
    method: int | None = None
    crc: int = 0
    encrypted: bool = False


class _Members:
    """Members in columns, some 30 bytes each."""

    _CODES = "iqqqiIb"  # archive, offset, stored, size, method (-1: none), crc, encrypted

    def __init__(self) -> None:
        self._columns = [array(code) for code in self._CODES]

    def append(self, member: _Member) -> int:
        """Keep a member; returns its row. Raises `OverflowError` for numbers that no archive can hold."""
        method = -1 if member.method is None else member.method
        values = (
            member.archive,
            member.offset,
            member.stored,
            member.size,
            method,
            member.crc,
            member.encrypted,
        )
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        return len(self._columns[0]) - 1

    def take(self, rows: Iterable[int]) -> _Members:
        """Some of them, in this order."""
        taken, rows = _Members(), list(rows)
        for column, source in zip(taken._columns, self._columns, strict=True):
            column.extend(array(column.typecode, map(source.__getitem__, rows)))
        return taken

    def sizes(self) -> np.ndarray:
        """Unpacked sizes in bytes, int64 [N]."""
        return np.array(self._columns[3], np.int64)

    def __getitem__(self, row: int) -> _Member:
        archive, offset, stored, size, method, crc, encrypted = (column[row] for column in self._columns)
        return _Member(archive, offset, stored, size, None if method < 0 else method, crc, bool(encrypted))


@dataclass(frozen=True, slots=True)
class _Layout:
    """What an archive holds of one split."""

    keys: list[tuple[str, int]]  # (key, label) of every image
    class_names: list[str]  # in label order
    rows: dict[str, int]  # key -> its row in `members`
    members: _Members
    left_out: dict[str, int]  # see `Source`


class _OpenArchives:
    """Descriptors of archives, opened when first read: at most `_MOST_OPEN`, and one for each thread that reads."""

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int]) -> None:
        """`sizes` in bytes, as when they were scanned."""
        self.paths, self.sizes = list(paths), list(sizes)
        self._lock = threading.Lock()
        self._open: OrderedDict[int, int] = OrderedDict()  # archive -> descriptor, the last used at the end
        self._readers: Counter[int] = Counter()

    @contextmanager
    def borrow(self, archive: int) -> Iterator[int]:
        """The archive's descriptor, which stays open for the `with` block.

        Raises:
            UsageError: it is gone, or has another size than when it was scanned.
        """
        with self._lock:
            if archive not in self._open:
                self._open[archive] = self._opened(archive)
            self._open.move_to_end(archive)
            self._readers[archive] += 1
            descriptor = self._open[archive]
            if len(self._open) > _MOST_OPEN:
                idle = [other for other in self._open if not self._readers[other]]
                for other in idle[: len(self._open) - _MOST_OPEN]:
                    os.close(self._open.pop(other))
        try:
            yield descriptor
        finally:
            with self._lock:
                self._readers[archive] -= 1

    def _opened(self, archive: int) -> int:
        path = self.paths[archive]
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            machine_refused(str(path), error)
            raise UsageError(f"{path} has gone away: {os.strerror(error.errno or 0).lower()}") from error
        try:
            self.check_size(archive, descriptor)
        except UsageError:
            os.close(descriptor)
            raise
        return descriptor

    def check_size(self, archive: int, descriptor: int) -> None:
        """Raise `UsageError` where an archive is no longer as long as when it was scanned."""
        size, scanned = os.fstat(descriptor).st_size, self.sizes[archive]
        if size != scanned:
            raise UsageError(
                f"{self.paths[archive]} changed since it was listed: it had {scanned} bytes and has {size}; "
                "put it back, or start again"
            )

    def close(self, close: Callable[[int], None] = os.close) -> None:
        """Close them all. Nobody may be reading."""
        with self._lock:
            while self._open:
                close(self._open.popitem()[1])

    def __getstate__(self) -> tuple[list[Path], list[int]]:
        return self.paths, self.sizes

    def __setstate__(self, state: tuple[list[Path], list[int]]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        self.close(close)  # `os` may be gone when Python ends


class _ArchiveSource(Source):
    """Files at known offsets of one or more archives. `os.pread` shares no position: reads need no lock."""

    def __init__(self, paths: Sequence[Path], split: str, name: str, layout: _Layout) -> None:
        absolute = [path.absolute() for path in paths]
        self._archives = _OpenArchives(absolute, [path.stat().st_size for path in absolute])
        super().__init__(name, split, layout.class_names, layout.keys)
        self.left_out = layout.left_out
        self._members = layout.members.take(layout.rows[sample.key] for sample in self.samples)

    def size_of(self, sample: Sample) -> int:
        """Size of the file in bytes, unpacked."""
        return self._members[self.samples.position(sample.id)].size

    def sizes(self) -> np.ndarray:
        """`size_of` every sample, int64 [N]."""
        return self._members.sizes()

    def close(self) -> None:
        """Close the archives. No `read` may be under way."""
        self._archives.close()

    def _bytes(self, archive: int, offset: int, size: int) -> bytes:
        parts: list[bytes] = []
        with self._archives.borrow(archive) as descriptor:
            try:
                while size > 0:
                    part = os.pread(descriptor, size, offset)
                    if not part:
                        self._archives.check_size(archive, descriptor)
                        raise BadImage("the archive ends within the file")
                    parts.append(part)
                    offset += len(part)
                    size -= len(part)
            except OSError as error:
                machine_refused(str(self._archives.paths[archive]), error)
                raise BadImage(f"cannot be read: {os.strerror(error.errno or 0).lower()}") from error
        return b"".join(parts)

    def read(self, sample: Sample) -> bytes:
        """The file's bytes, unpacked. `BadImage` for a damaged one, `UsageError` if the archive is gone."""
        member = self._members[self.samples.position(sample.id)]
        if member.size < 0:
            raise BadImage("cannot be read: no such file or directory")
        size_refused(max(member.size, member.stored))
        if member.encrypted:
            raise BadImage("encrypted in the archive")
        if member.method is None:
            return self._bytes(member.archive, member.offset, member.size)
        # The local header repeats the name, and its extra field may differ from the central directory's.
        header = self._bytes(member.archive, member.offset, 30)
        if header[:4] != b"PK\x03\x04":
            raise BadImage("damaged in the archive: no local header")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = member.offset + 30 + name_length + extra_length
        data = _unpacked(self._bytes(member.archive, start, member.stored), member)
        if zlib.crc32(data) != member.crc:
            raise BadImage("damaged in the archive: wrong checksum")
        return data


def _unpacked(data: bytes, member: _Member) -> bytes:
    """The bytes of a zip member. Raises `BadImage` with the packing's name where this Python cannot unpack it."""
    if member.method == zipfile.ZIP_STORED:
        return data
    try:
        if member.method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
        elif member.method == zipfile.ZIP_BZIP2:
            import bz2

            data = bz2.BZ2Decompressor().decompress(data, member.size + 1)
        elif member.method == zipfile.ZIP_LZMA:
            data = _lzma_unpacked(data, member.size)
        else:
            packing = _PACKINGS.get(member.method or 0, "an unknown method")
            raise BadImage(
                f"packed with {packing} (zip method {member.method}); wanted stored, deflate, bzip2 or LZMA: "
                "pack it anew"
            )
    except ImportError as error:  # a Python that was built without the library
        raise BadImage(
            f"packed with {_PACKINGS[member.method or 0]}, which this Python was built without; pack it with deflate"
        ) from error
    except (zlib.error, OSError, ValueError, EOFError, MemoryError, struct.error, LookupError) as error:
        raise BadImage(f"damaged in the archive: {one_line(error)}") from error
    if len(data) != member.size:
        raise BadImage(f"damaged in the archive: not the {member.size} bytes it should have")
    return data


def _lzma_unpacked(data: bytes, size: int) -> bytes:
    """A zip's LZMA: two bytes of version, two of the properties' length, the properties, then the bare stream."""
    import lzma

    (length,) = struct.unpack_from("<H", data, 2)
    first, dictionary = struct.unpack_from("<BI", data, 4)
    # A dictionary larger than the file serves nothing, and a damaged one could ask for 4 GB.
    packing = {
        "id": lzma.FILTER_LZMA1,
        "dict_size": max(4096, min(dictionary, size)),
        "lc": first % 9,
        "lp": first // 9 % 5,
        "pb": first // 45,
    }
    try:
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[packing])
        return unpacker.decompress(data[4 + length :], size + 1)
    except lzma.LZMAError as error:
        raise ValueError(one_line(error)) from error


class ZipSource(_ArchiveSource):
    """An ImageFolder in a zip, whose files are stored or packed with deflate, bzip2 or LZMA."""

    def __init__(self, path: Path, split: str, name: str) -> None:
        """Read the central directory. Raises `UsageError` as `open_source` does."""
        tree = _Tree(name)
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    inside = tree.check(_zip_name(info))
                    if info.is_dir() or info.filename.endswith("\\"):
                        tree.add_folder(inside)
                    elif stat.S_ISLNK(info.external_attr >> 16) and info.file_size <= _MAX_LINK_BYTES:
                        tree.add_link(inside, archive.read(info).decode("utf-8", "replace"))
                    else:
                        if _labels_images(inside, info.file_size) and not info.flag_bits & 1:
                            tree.metadata[inside] = archive.read(info)
                        if inside.rpartition("/")[2] == "classes.txt" and info.file_size <= _MAX_LABEL_BYTES:
                            tree.class_lists[inside] = archive.read(info)
                        tree.add(
                            inside,
                            _Member(
                                archive=0,
                                offset=info.header_offset,
                                stored=info.compress_size,
                                size=info.file_size,
                                method=info.compress_type,
                                crc=info.CRC,
                                encrypted=bool(info.flag_bits & 1),
                            ),
                        )
        except PermissionError:
            raise
        except (  # RuntimeError: an encrypted link, or a method that zipfile does not have
            zipfile.BadZipFile,
            zlib.error,
            struct.error,
            OSError,
            EOFError,
            ValueError,
            RuntimeError,
            ArithmeticError,
            LookupError,
        ) as error:
            raise UsageError(f"cannot read {name}: damaged zip ({one_line(error)}); copy it again") from error
        super().__init__([path], split, name, tree.layout(split))


def _zip_name(info: zipfile.ZipInfo) -> str:
    """A member's name: UTF-8 where it is that, flagged or not, else code page 437; and `/` where Windows wrote `\\`."""
    name = info.filename
    if not info.flag_bits & 0x800:  # without the flag zipfile has decoded code page 437, which loses nothing
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            name = info.filename
    if info.create_system == 0 and "/" not in name:
        name = name.replace("\\", "/")
    return name


def _labels_images(inside: str, size: int) -> bool:
    """Whether a member is a metadata file."""
    return inside.rpartition("/")[2] in METADATA_FILES and size <= _MAX_METADATA_BYTES


class TarSource(_ArchiveSource):
    """WebDataset shards: the ImageFolder layout, or pairs of an image and its label.

    Shards that say their split in their names, as `train-000.tar` and `val-000.tar`, count as the folders `train/` and
    `val/` of one archive.
    """

    def __init__(self, paths: Sequence[Path], split: str, name: str) -> None:
        """Scan the shards' headers. Raises `UsageError` as `open_source` does."""
        shard_splits = _splits_of_shards(paths, split)
        tree, labels, lists = _scanned(paths, shard_splits, name)
        if shard_splits and tree.splits_below():  # the shards' folders say it already
            tree, labels, lists = _scanned(paths, [], name)
        paired = tree.is_paired(labels)
        if paired:
            for parent in dict.fromkeys(path.parent for path in paths):
                if (beside := parent / "classes.txt").is_file():
                    lists[os.fspath(beside)] = beside.read_bytes()
        layout = tree.paired_layout(labels, _one_list(lists, name), split) if paired else tree.layout(split)
        super().__init__(paths, split, name, layout)


def _splits_of_shards(paths: Sequence[Path], split: str) -> list[str]:
    """The split of each shard by its name; empty where the names do not tell splits apart."""
    words = [split_word(path.stem) for path in paths]
    kinds = [word[0] for word in words if word is not None]
    if len(kinds) < len(paths):
        return []
    # Shards of one split alone are what they are asked for as: the train split, or the test split by its name.
    told_apart = len(set(kinds)) > 1 or (split == "test" and kinds[0] != "train")
    return kinds if told_apart else []


def _scanned(
    paths: Sequence[Path], shard_splits: Sequence[str], name: str
) -> tuple[_Tree, dict[str, bytes], dict[str, bytes]]:
    """The tree of all shards; "key.cls" or "key.json" -> its content; place of a classes.txt -> its content."""
    tree = _Tree(name)
    labels: dict[str, bytes] = {}
    lists: dict[str, bytes] = {}
    for index, path in enumerate(paths):
        above = f"{shard_splits[index]}/" if shard_splits else ""
        for info, member in _tar_members(path, index):
            inside = above + tree.check(utf8(info.name))
            if info.isdir():
                tree.add_folder(inside)
            elif info.issym():
                tree.add_link(inside, utf8(info.linkname))
            elif info.islnk():  # named from the archive's root
                tree.add_link(inside, utf8(info.linkname), base=above)
            elif member is not None:
                tree.add(inside, member, once=is_image(inside))
                stem, ending = os.path.splitext(inside)
                if _labels_images(inside, member.size):
                    tree.metadata[inside] = _file_bytes(path, member)
                elif member.size > _MAX_LABEL_BYTES:
                    continue
                elif ending.lower() in (".cls", ".json"):
                    labels[stem + ending.lower()] = _file_bytes(path, member)
                elif inside.rpartition("/")[2] == "classes.txt":
                    tree.class_lists[inside] = _file_bytes(path, member)
                    lists[f"{path}/{inside.removeprefix(above)}"] = tree.class_lists[inside]
    return tree, labels, lists


def _one_list(lists: Mapping[str, bytes], name: str) -> bytes | None:
    """The class list that all agree on; None where there is none. `UsageError` names two that differ, and where."""
    first: tuple[str, bytes] | None = None
    for place, data in lists.items():
        if first is None:
            first = place, data
        elif class_list(data) != (held := class_list(first[1])):
            here = class_list(data)
            line = next((n for n, (a, b) in enumerate(zip(held, here, strict=False)) if a != b), None)
            how = (
                f"have {len(held)} and {len(here)} lines"
                if line is None
                else f"differ in line {line + 1}, {shown([held[line]])} and {shown([here[line]])}"
            )
            raise UsageError(
                f"two class lists of {name} disagree: {first[0]} and {place} {how}; keep the one that the labels mean"
            )
    return None if first is None else first[1]


def _file_bytes(path: Path, member: _Member) -> bytes:
    with open(path, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _tar_members(path: Path, index: int) -> Iterator[tuple[tarfile.TarInfo, _Member | None]]:
    """Every member of a shard; None unless it is a plain file. Raises `UsageError` for a damaged tar."""
    total = path.stat().st_size
    try:
        with open(path, "rb") as file:
            start: int | None = 0
            while start is not None:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    while (info := archive.next()) is not None:
                        member = None
                        if info.isreg():
                            if info.issparse() or info.offset_data + info.size > total:
                                sparse = "a sparse file"
                                what = sparse if info.issparse() else "the archive ends within a file"
                                raise UsageError(
                                    f"cannot read {path}: {what} ({shown([utf8(info.name)])}); make it again"
                                )
                            member = _Member(index, info.offset_data, info.size, info.size)
                        archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                        yield info, member
                    end = archive.offset
                if start and end == start and not _is_header(file, start):
                    return  # rubbish behind the end
                # tarfile takes a damaged header for the end: the end is zeros, or no more bytes.
                file.seek(end)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise UsageError(f"cannot read {path}: damaged tar header at byte {end}; make it again")
                start = _next_archive(file, end)
    except PermissionError:
        raise
    except (
        tarfile.TarError,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        ArithmeticError,
        RecursionError,
    ) as error:
        with open(path, "rb") as file:
            begin = file.read(6)
        packing = next((kind for magic, kind in _TAR_PACKINGS.items() if begin.startswith(magic)), None)
        if packing is not None:
            raise UsageError(
                f"cannot read {path}: packed with {packing}; unpack it, shards are read in place"
            ) from error
        raise UsageError(
            f"cannot read {path}: not an uncompressed tar, or damaged ({one_line(error)}); make it again"
        ) from error


def _is_header(file: BinaryIO, place: int) -> bool:
    file.seek(place + 257)
    return file.read(5) == b"ustar"


def _next_archive(file: BinaryIO, place: int) -> int | None:
    """Where the next archive begins behind the zeros that end one, as `cat a.tar b.tar` leaves it; None at the end."""
    file.seek(place)
    while part := file.read(1 << 20):
        if rest := part.lstrip(b"\0"):
            found = place + len(part) - len(rest)
            return found - (found - place) % tarfile.BLOCKSIZE
        place += len(part)
    return None


def find_shards(pattern: str) -> list[Path]:
    """Expand `{000..003}`, `{a,b}` and globs to existing .tar files. `UsageError` for a missing shard."""
    paths: list[Path] = []
    for expanded in _braces(pattern):
        if glob.has_magic(expanded):
            found = sorted(Path(match) for match in glob.glob(expanded, recursive=True))
            if not found:
                raise UsageError(f"no shard matches {expanded}")
            paths += found
        else:
            paths.append(Path(expanded))
    missing = [os.fspath(path) for path in paths if not path.is_file()]
    if missing:
        raise UsageError(f"no such shard: {shown(missing)}")
    wrong = [os.fspath(path) for path in paths if path.suffix.lower() != ".tar"]
    if wrong:
        raise UsageError(f"shards must be uncompressed .tar files, got {shown(wrong)}")
    return list(dict.fromkeys(paths))


def _braces(pattern: str) -> list[str]:
    choices: list[Sequence[str]] = []
    count = 1
    for position, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})(?:\.\.([1-9]\d{0,5}))?", part)
        if position % 2 == 0:
            choices.append([part])
        elif numbers:
            first, last = int(numbers[1]), int(numbers[2])
            step = int(numbers[3] or 1)
            count *= (last - first) // step + 1
            if not 0 < count <= _MAX_SHARDS:
                raise UsageError(f"shard range {{{part}}} must run upwards, to at most {_MAX_SHARDS} shards")
            choices.append([f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1, step)])
        else:
            choices.append(part.split(","))
            count *= len(choices[-1])
            if count > _MAX_SHARDS:
                raise UsageError(f"{pattern} names more than {_MAX_SHARDS} shards")
    return ["".join(combination) for combination in product(*choices)]


class _Tree:
    """The files of an archive, or of several, as one tree of checked paths."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._table = _Members()
        self._members: dict[str, int] = {}  # path -> row of the table
        self._folders: set[str] = set()  # those stored in their own right, which may be empty
        self._links: dict[str, str] = {}
        self.metadata: dict[str, bytes] = {}  # path of a metadata file -> its content
        self.class_lists: dict[str, bytes] = {}  # path of a classes.txt -> its content

    def check(self, name: str) -> str:
        """The path without `.` and double slashes. Raises `UsageError` for one that points outside."""
        inside = path_inside(name)
        if inside is None:
            raise UsageError(f"{self.name} has a member that points outside of it: {shown([name])}; refused")
        return inside

    def add_folder(self, name: str) -> None:
        """A folder of its own."""
        self._folders.add(self.check(name))

    def add(self, name: str, member: _Member, once: bool = False) -> None:
        """A file. Of two of one name the last counts, as when unpacking; `once` makes that a `UsageError`."""
        inside = self.check(name)
        if once and inside in self._members:
            raise UsageError(f"{self.name} has {shown([inside])} twice; names must be unique over all shards")
        self._members[inside] = self._table.append(member)

    def add_link(self, name: str, target: str, base: str | None = None) -> None:
        """A link, relative to `base` (default: the folder it stands in). `UsageError` if it leads outside."""
        inside = self.check(name)
        place = (inside.rpartition("/")[0] if base is None else base).split("/")
        place = [part for part in place if part]
        outside = target.startswith(("/", "\\"))
        for part in target.split("/"):
            if part == "..":
                outside = outside or not place
                place = place[:-1]
            elif part not in ("", "."):
                place.append(part)
        if outside:
            raise UsageError(f"{self.name} has a link that points outside of it: {shown([name])}; refused")
        self._links[inside] = "/".join(place)

    def _visible(self) -> dict[str, int]:
        """Files and links to files, without those that are hidden or stand in a hidden folder."""
        members = dict(self._members)
        ordered: list[str] = []
        for link, target in self._links.items():
            for _ in range(_MAX_LINKS):  # of a circle of links nothing remains
                target = self._links.get(target, target)
            if target in self._members:
                members[link] = self._members[target]
            elif not f"{link}/".startswith(f"{target}/"):  # a link to a folder, and to none that it stands in
                ordered = ordered or sorted(self._members)
                first = bisect_left(ordered, f"{target}/")
                for path in takewhile(
                    lambda path, inside=f"{target}/": path.startswith(inside), ordered[first:]
                ):
                    members[link + path[len(target) :]] = self._members[path]
        return {path: member for path, member in members.items() if not _in_hidden(path)}

    def _all_folders(self, paths: Iterable[str]) -> set[str]:
        """Every visible folder: those stored, those that files stand in, and their parents."""
        folders: set[str] = set()
        stored = (folder for folder in self._folders if not _in_hidden(folder))
        for folder in (*stored, *(path.rpartition("/")[0] for path in paths)):
            while folder and folder not in folders:
                folders.add(folder)
                folder = folder.rpartition("/")[0]
        return folders

    def splits_below(self) -> bool:
        """Whether the folders in the top folders are splits, as in `train/train/`."""
        return any(path.split("/")[1] in _SPLIT_NAMES for path in self._members if path.count("/") > 1)

    def layout(self, split: str) -> _Layout:
        """One split of the ImageFolder layout. Raises `UsageError` as `open_source` does."""
        visible = self._visible()
        # "train/" -> the folders in it, "" -> those at the top
        children: dict[str, set[str]] = defaultdict(set)
        for path in self._all_folders(visible):
            parent, slash, child = path.rpartition("/")
            children[parent + slash].add(child)
        root = ""
        if len(children[""]) == 1 and not children[""] & _SPLIT_NAMES:
            (common,) = children[""]
            word = split_word(common)
            root = f"{common}/" if children[f"{common}/"] and not (word and word[1]) else ""

        def has_classes(folder: str) -> bool:
            inside = f"{root}{folder}/"
            loose = (path[len(inside) :] for path in visible if path.startswith(inside))
            images = any("/" not in path and is_image(path) for path in loose)
            metadata = any(inside + file in self.metadata for file in METADATA_FILES)
            return metadata or (bool(children[inside]) and not images)

        folder = pick_split(children[root], split, self.name, has_classes)
        train = train_folder(children[root], self.name, has_classes)
        here = self._contents(root, folder, children, visible)
        there = None if train is None or train == folder else self._contents(root, train, children, visible)
        train_classes = None if there is None else self._classes_of(there)
        if here.said is not None:
            return self._labelled_layout(here, there)
        spelled = spellings(here.files, train_classes, here.shown)
        class_names = checked_classes(
            {spelled[class_name]: paths for class_name, paths in here.files.items()},
            here.shown,
            loose_images=here.loose_images,
            train_classes=train_classes,
            left_out=here.left_out,
        )
        rows = {
            f"{spelled[class_name]}/{path}": visible[f"{here.prefix}{class_name}/{path}"]
            for class_name, paths in here.files.items()
            for path in paths
        }
        return self._layout(class_names, rows, here.left_out)

    def _contents(
        self, root: str, folder: str, children: Mapping[str, set[str]], visible: Mapping[str, int]
    ) -> _SplitContents:
        """What stands in the folder of a split."""
        prefix = f"{root}{folder}/" if folder else root
        contents = _SplitContents(prefix, f"{self.name}/{prefix}".rstrip("/"))
        contents.files = {class_name: [] for class_name in children[prefix]}
        for path in visible:
            if not path.startswith(prefix):
                continue
            class_name, slash, inside = path[len(prefix) :].partition("/")
            if not is_image(path):
                if ending := ending_left_out(path.rpartition("/")[2]):
                    contents.left_out[ending] += 1
            elif slash:
                contents.files[class_name].append(inside)
            else:
                contents.loose_images = True
        files = []
        for path, data in self.metadata.items():
            where = f"{self.name}/{path}"
            stands_in = path[: -len(path.rpartition("/")[2])]
            below = stands_in[len(prefix) :]
            if stands_in.startswith(prefix) and below.count("/") <= 1 and path in visible:
                files.append(MetadataFile(where, data, below))
            elif folder and stands_in == root:
                files.append(MetadataFile(where, data, "", f"{folder}/"))
        needed = contents.loose_images or len(contents.files) < 2
        said = labels_in(files, self.name, needed=needed) if files else {}
        if said and not needed:
            images = (
                f"{class_name}/{path}" for class_name, paths in contents.files.items() for path in paths
            )
            if not overrides_folders(said, contents.files, lambda: images, contents.shown):
                said = {}
        contents.said = said or None
        return contents

    def _classes_of(self, train: _SplitContents) -> list[str]:
        """The classes of a train split, in any order."""
        if train.said is None:
            return list(train.files)
        names = class_names_of(set(train.said.values()), self._names_file(train), self.name)
        return list(dict.fromkeys(names.values()))

    def _names_file(self, contents: _SplitContents) -> bytes | None:
        """The `classes.txt` of a split that metadata labels, or the one beside its folder."""
        beside = "/".join([*contents.prefix.split("/")[:-2], "classes.txt"])
        return self.class_lists.get(f"{contents.prefix}classes.txt", self.class_lists.get(beside))

    def _labelled_layout(self, here: _SplitContents, there: _SplitContents | None) -> _Layout:
        """One split of images that metadata labels."""
        said = here.said or {}
        train = {} if there is None else there.said or {}
        names = class_names_of({*said.values(), *train.values()}, self._names_file(here), self.name)
        train_classes = None if there is None else list(there.files)
        if train:
            train_classes = list(dict.fromkeys(names[label] for label in train.values()))
        spelled = spellings({names[label] for label in said.values()}, train_classes, here.shown)
        counts = Counter(spelled[names[label]] for label in said.values())
        class_names = checked_classes(counts, here.shown, train_classes=train_classes, left_out=here.left_out)
        visible = self._visible()
        missing = self._table.append(_Member(archive=0, offset=0, stored=0, size=-1))
        rows = {
            f"{spelled[names[label]]}/{path}": visible.get(here.prefix + path, missing)
            for path, label in said.items()
        }
        return self._layout(class_names, rows, here.left_out)

    def _layout(self, class_names: list[str], rows: dict[str, int], left_out: Mapping[str, int]) -> _Layout:
        labels = {class_name: label for label, class_name in enumerate(class_names)}
        keys = [(key, labels[key.partition("/")[0]]) for key in rows]
        return _Layout(keys, class_names, rows, self._table, dict(left_out))

    def is_paired(self, labels: Mapping[str, bytes]) -> bool:
        """Whether labels stand beside the images: some image has a .cls, or every image a .json and some a label."""
        stems = {_labelled_stem(path, labels) for path in self._visible() if is_image(path)}
        if any(f"{stem}.cls" in labels for stem in stems):
            return True
        beside = [f"{stem}.json" for stem in stems]
        return (
            bool(beside)
            and all(file in labels for file in beside)
            and any(_label_of(None, labels[file]) is not None for file in beside)
        )

    def paired_layout(self, labels: Mapping[str, bytes], names_file: bytes | None, split: str) -> _Layout:
        """One split of images with `key.cls` or `key.json` beside them. Raises as `open_source` does.

        An image belongs to the label whose key is the longest that its name begins with, up to a dot. Of several
        images of one key those named `key.<extension>` are samples (`key.mask.png` is none); where there is none such,
        the only one is, or the only one called `key.img.<extension>` or the like.
        """
        visible = self._visible()
        groups: dict[str, list[str]] = defaultdict(list)
        for path in visible:
            if is_image(path):
                groups[_labelled_stem(path, labels)].append(path)
        said: dict[str, int | str] = {}  # path -> class number or name
        for stem, paths in groups.items():
            label = _label_of(labels.get(f"{stem}.cls"), labels.get(f"{stem}.json"))
            if label is None:
                raise UsageError(
                    f"{self.name} has no label for {shown([paths[0]])}: wanted a class number or name in "
                    f'{shown([stem])}.cls, or "label" in {shown([stem])}.json'
                )
            said |= dict.fromkeys(self._samples_of(stem, paths), label)
        names = class_names_of(said.values(), names_file, self.name)
        tops = {path.partition("/")[0] for path in said if "/" in path}
        flat = {path.partition("/")[0] for path in said if path.count("/") == 1}
        # Pairs stand in a split's folder directly: one of another spelling counts beside its counterpart only.
        kinds = {word[0] for top in tops if (word := split_word(top)) and word[1]}
        apart = "train" in kinds and len(kinds) > 1
        folders = {top for top in tops if top in _SPLIT_NAMES or (apart and top in flat and split_word(top))}
        folder = pick_split(folders, split, self.name, lambda folder: apart)
        train = train_folder(folders, self.name, lambda folder: apart)
        prefix = f"{folder}/" if folder else ""
        place = f"{self.name}/{folder}" if folder else self.name
        found = {names[label] for path, label in said.items() if path.startswith(prefix)}
        train_classes = None
        if train is not None and train != folder:
            train_classes = {names[label] for path, label in said.items() if path.startswith(f"{train}/")}
        spelled = spellings(found, train_classes or None, place)
        counts: dict[str, int] = defaultdict(int)
        rows: dict[str, int] = {}
        for path, label in said.items():
            if path.startswith(prefix):
                class_name = spelled[names[label]]
                counts[class_name] += 1
                rows[f"{class_name}/{path[len(prefix) :]}"] = visible[path]
        left_out = Counter(
            ending
            for path in visible
            if path.startswith(prefix) and not is_image(path)
            if (ending := ending_left_out(path.rpartition("/")[2]))
        )
        class_names = checked_classes(counts, place, train_classes=train_classes or None, left_out=left_out)
        return self._layout(class_names, rows, left_out)

    def _samples_of(self, stem: str, paths: list[str]) -> list[str]:
        """Those images of one key that are samples."""
        plain = [path for path in paths if path.rpartition(".")[0] == stem]
        if plain or len(paths) == 1:
            return plain or paths
        main = [path for path in paths if path[len(stem) + 1 :].casefold().split(".")[0] in _MAIN_IMAGES]
        if len(main) != 1:
            raise UsageError(
                f"{self.name} has {shown(sorted(paths))} beside one label: call the sample {shown([stem])}.img and its "
                "extension, or give each a label of its own"
            )
        return main


@dataclass
class _SplitContents:
    """What stands in the folder of a split of an archive.

    Attributes:
        prefix: path of the folder, with a slash at its end; "" for the top.
        shown: for messages.
        files: class folder -> paths of its images, relative to it.
        said: path -> label, where metadata labels the images.
        loose_images: whether images stand beside the class folders.
        left_out: see `Source`.
    """

    prefix: str
    shown: str
    files: dict[str, list[str]] = field(default_factory=dict)
    said: dict[str, int | str] | None = None
    loose_images: bool = False
    left_out: Counter[str] = field(default_factory=Counter)


def _in_hidden(path: str) -> bool:
    return any(is_hidden(part) for part in path.split("/"))


def _labelled_stem(path: str, labels: Mapping[str, bytes]) -> str:
    """The key of an image: the longest that has a label, else WebDataset's, the path up to the first dot of its name."""
    folder, slash, name = path.rpartition("/")
    parts = name.split(".")
    stems = [folder + slash + ".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    for ending in (".cls", ".json"):
        for stem in stems:
            if stem + ending in labels:
                return stem
    return stems[-1]


def _label_of(cls: bytes | None, record: bytes | None) -> int | str | None:
    """The class number or name in a .cls, else in a .json."""
    if cls is not None:
        return label_in_text(cls.decode("utf-8-sig", "replace"))
    try:
        fields = json.loads(record or b"null")
    except (ValueError, RecursionError):
        return None
    return label_in(fields) if isinstance(fields, dict) else None
