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
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from ddfast.data.labels import class_names_of, label_in, label_in_text
from ddfast.data.samples import Sample
from ddfast.data.sources import (
    SPLIT_FOLDERS,
    Source,
    checked_classes,
    is_hidden,
    is_image,
    machine_refused,
    one_line,
    path_inside,
    pick_split,
    shown,
    size_refused,
    utf8,
)
from ddfast.errors import BadImage, UsageError

_MAX_LABEL_BYTES = 1 << 20  # a .cls, .json or classes.txt larger than this is no label
_MAX_LINK_BYTES = 4096
_MOST_OPEN = 64  # archives kept open between reads, far below the usual limit of 1,024 files
_MAX_LINKS = 40  # links followed from one to the next, as Linux does
_MAX_SHARDS = 1_000_000
_PACKINGS = {
    **{6: "imploding", 8: "deflate", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 20: "Zstandard", 93: "Zstandard"},
    **{95: "XZ", 96: "JPEG", 98: "PPMd", 99: "AES encryption"},
}
"""Zip methods by number (APPNOTE 4.4.5)."""
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
                    if info.is_dir():
                        tree.add_folder(info.filename)
                    elif stat.S_ISLNK(info.external_attr >> 16) and info.file_size <= _MAX_LINK_BYTES:
                        tree.add_link(info.filename, archive.read(info).decode("utf-8", "replace"))
                    else:
                        tree.add(
                            info.filename,
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


class TarSource(_ArchiveSource):
    """WebDataset shards: the ImageFolder layout, or pairs of an image and its label."""

    def __init__(self, paths: Sequence[Path], split: str, name: str) -> None:
        """Scan the shards' headers. Raises `UsageError` as `open_source` does."""
        tree = _Tree(name)
        labels: dict[str, bytes] = {}  # "key.cls" or "key.json" -> its content
        names_file: bytes | None = None
        for index, path in enumerate(paths):
            for info, member in _tar_members(path, index):
                inside = tree.check(utf8(info.name))
                if info.isdir():
                    tree.add_folder(inside)
                elif info.issym():
                    tree.add_link(inside, utf8(info.linkname))
                elif info.islnk():  # named from the archive's root
                    tree.add_link(inside, utf8(info.linkname), base="")
                elif member is not None:
                    tree.add(inside, member, once=is_image(inside))
                    if member.size <= _MAX_LABEL_BYTES and inside.endswith((".cls", ".json")):
                        labels[inside] = _file_bytes(path, member)
                    elif member.size <= _MAX_LABEL_BYTES and inside.rpartition("/")[2] == "classes.txt":
                        names_file = _file_bytes(path, member)
        beside = paths[0].parent / "classes.txt"
        if names_file is None and beside.is_file():
            names_file = beside.read_bytes()
        paired = tree.is_paired(labels)
        layout = tree.paired_layout(labels, names_file, split) if paired else tree.layout(split)
        super().__init__(paths, split, name, layout)


def _file_bytes(path: Path, member: _Member) -> bytes:
    with open(path, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _tar_members(path: Path, index: int) -> Iterator[tuple[tarfile.TarInfo, _Member | None]]:
    """Every member of a shard; None unless it is a plain file. Raises `UsageError` for a damaged tar."""
    total = path.stat().st_size
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                member = None
                if info.isreg():
                    if info.issparse() or info.offset_data + info.size > total:
                        what = "a sparse file" if info.issparse() else "the archive ends within a file"
                        raise UsageError(
                            f"cannot read {path}: {what} ({shown([utf8(info.name)])}); make it again"
                        )
                    member = _Member(archive=index, offset=info.offset_data, stored=info.size, size=info.size)
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                yield info, member
            file.seek(
                archive.offset
            )  # tarfile takes a damaged header for the end: the end is zeros, or no more bytes
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise UsageError(
                    f"cannot read {path}: damaged tar header at byte {archive.offset}; make it again"
                )
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
        raise UsageError(
            f"cannot read {path}: not an uncompressed tar, or damaged ({one_line(error)}); make it again"
        ) from error


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
        numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", part)
        if position % 2 == 0:
            choices.append([part])
        elif numbers:
            first, last = int(numbers[1]), int(numbers[2])
            count *= last - first + 1
            if not 0 < count <= _MAX_SHARDS:
                raise UsageError(f"shard range {{{part}}} must run upwards, to at most {_MAX_SHARDS} shards")
            choices.append([f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)])
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
        for link, target in self._links.items():
            for _ in range(_MAX_LINKS):  # of a circle of links nothing remains
                target = self._links.get(target, target)
            if target in self._members:
                members[link] = self._members[target]
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

    def layout(self, split: str) -> _Layout:
        """One split of the ImageFolder layout. Raises `UsageError` as `open_source` does."""
        visible = self._visible()
        children: dict[str, set[str]] = defaultdict(
            set
        )  # "train/" -> the folders in it, "" -> those at the top
        for path in self._all_folders(visible):
            parent, slash, child = path.rpartition("/")
            children[parent + slash].add(child)
        root = ""
        if len(children[""]) == 1 and not children[""] & _SPLIT_NAMES:
            (common,) = children[""]
            root = f"{common}/" if children[f"{common}/"] else ""
        folder = pick_split(children[root], split, self.name)
        prefix = f"{root}{folder}/" if folder else root
        counts: dict[str, int] = dict.fromkeys(children[prefix], 0)
        rows: dict[str, int] = {}
        loose_images = False
        for path, row in visible.items():
            if path.startswith(prefix) and is_image(path):
                key = path[len(prefix) :]
                class_name, slash, _ = key.partition("/")
                if slash:
                    counts[class_name] += 1
                    rows[key] = row
                else:
                    loose_images = True
        class_names = checked_classes(
            counts,
            f"{self.name}/{prefix}".rstrip("/"),
            loose_images=loose_images,
            train_classes=children[f"{root}train/"]
            if folder != "train" and "train" in children[root]
            else None,
        )
        return self._layout(class_names, rows)

    def _layout(self, class_names: list[str], rows: dict[str, int]) -> _Layout:
        labels = {class_name: label for label, class_name in enumerate(class_names)}
        keys = [(key, labels[key.partition("/")[0]]) for key in rows]
        return _Layout(keys, class_names, rows, self._table)

    def is_paired(self, labels: Mapping[str, bytes]) -> bool:
        """Whether labels stand beside the images: some image has a .cls, or every image has a .json."""
        keys = [_webdataset_key(path) for path in self._visible() if is_image(path)]
        some_class = any(f"{key}.cls" in labels for key in keys)
        return some_class or (bool(keys) and all(f"{key}.json" in labels for key in keys))

    def paired_layout(self, labels: Mapping[str, bytes], names_file: bytes | None, split: str) -> _Layout:
        """One split of images with `key.cls` or `key.json` beside them. Raises as `open_source` does.

        Of several images with one key, only that named `key.<extension>` is the sample (`key.mask.png` is
        none).
        """
        said: dict[str, int | str] = {}  # path -> class number or name
        visible = self._visible()
        for path in visible:
            key = _webdataset_key(path)
            if is_image(path) and path.count(".", len(key)) == 1:
                label = _label_of(labels.get(f"{key}.cls"), labels.get(f"{key}.json"))
                if label is None:
                    raise UsageError(
                        f"{self.name} has no label for {shown([path])}: wanted a class number or name in "
                        f'{shown([key])}.cls, or "label" in {shown([key])}.json'
                    )
                said[path] = label
        names = class_names_of(said.values(), names_file, self.name)
        folders = {path.partition("/")[0] for path in said if "/" in path} & _SPLIT_NAMES
        folder = pick_split(folders, split, self.name)
        prefix = f"{folder}/" if folder else ""
        counts: dict[str, int] = defaultdict(int)
        rows: dict[str, int] = {}
        for path, label in said.items():
            if path.startswith(prefix):
                counts[names[label]] += 1
                rows[f"{names[label]}/{path[len(prefix) :]}"] = visible[path]
        train_classes = {names[label] for path, label in said.items() if path.startswith("train/")}
        class_names = checked_classes(
            counts,
            f"{self.name}/{folder}" if folder else self.name,
            train_classes=train_classes if folder != "train" and train_classes else None,
        )
        return self._layout(class_names, rows)


def _in_hidden(path: str) -> bool:
    return any(is_hidden(part) for part in path.split("/"))


def _webdataset_key(path: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _label_of(cls: bytes | None, record: bytes | None) -> int | str | None:
    """The class number or name in a .cls, else in a .json."""
    if cls is not None:
        return label_in_text(cls.decode("utf-8", "replace"))
    try:
        fields = json.loads(record or b"null")
    except (ValueError, RecursionError):
        return None
    return label_in(fields) if isinstance(fields, dict) else None
