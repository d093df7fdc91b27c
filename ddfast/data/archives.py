"""Images inside archives, read in place: zip files and WebDataset tar shards."""

from __future__ import annotations

import glob
import os
import re
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ddfast.data.archive_tree import Layout, Member, Tree
from ddfast.data.labels import class_list
from ddfast.data.metadata import METADATA_FILES
from ddfast.data.samples import Sample
from ddfast.data.sources import Source, is_image, machine_refused, size_refused, utf8
from ddfast.data.splits import split_word
from ddfast.errors import BadImage, UsageError, one_line, shown

_MAX_LABEL_BYTES = 1 << 20  # a .cls, .json or classes.txt larger than this is no label
_MAX_METADATA_BYTES = 1 << 30
_MAX_LINK_BYTES = 4096
_MOST_OPEN = 64  # archives kept open between reads, far below the usual limit of 1,024 files
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

    def __init__(self, paths: Sequence[Path], split: str, name: str, layout: Layout) -> None:
        absolute = [path.absolute() for path in paths]
        self._archives = _OpenArchives(absolute, [path.stat().st_size for path in absolute])
        super().__init__(name, split, layout.class_names, layout.keys)
        self.left_out, self.remarks = layout.left_out, layout.remarks
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


def _unpacked(data: bytes, member: Member) -> bytes:
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
        tree = Tree(name)
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
                            Member(
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
        tree, labels, lists, unclosed = _scanned(paths, shard_splits, name)
        if shard_splits and tree.splits_below():  # the shards' folders say it already
            tree, labels, lists, unclosed = _scanned(paths, [], name)
        paired = tree.is_paired(labels)
        if paired:
            for parent in dict.fromkeys(path.parent for path in paths):
                if (beside := parent / "classes.txt").is_file():
                    lists[os.fspath(beside)] = beside.read_bytes()
        layout = tree.paired_layout(labels, _one_list(lists, name), split) if paired else tree.layout(split)
        super().__init__(paths, split, name, layout)
        if unclosed:
            self.remarks.append(
                f"{shown(unclosed)} {'ends' if len(unclosed) == 1 else 'end'} without the zeros that close a tar: "
                "files that stood behind may be missing; if a copy was cut off, copy it again"
            )


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
) -> tuple[Tree, dict[str, bytes], dict[str, bytes], list[str]]:
    """What stands in all shards.

    Returns:
        Their tree; "key.cls" or "key.json" -> its content; place of a classes.txt -> its content; the shards that
        nothing closes.
    """
    tree = Tree(name)
    labels: dict[str, bytes] = {}
    lists: dict[str, bytes] = {}
    unclosed: list[str] = []
    for index, path in enumerate(paths):
        above = f"{shard_splits[index]}/" if shard_splits else ""
        for info, member in _tar_members(path, index, unclosed):
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
    return tree, labels, lists, unclosed


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


def _file_bytes(path: Path, member: Member) -> bytes:
    with open(path, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _tar_members(
    path: Path, index: int, unclosed: list[str]
) -> Iterator[tuple[tarfile.TarInfo, Member | None]]:
    """Every member of a shard; None unless it is a plain file. Raises `UsageError` for a damaged tar.

    `unclosed` gets the path of one that ends behind a file, without the block of zeros that closes an archive.
    """
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
                            member = Member(index, info.offset_data, info.size, info.size)
                        archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                        yield info, member
                    end = archive.offset
                if start and end == start and not _is_header(file, start):
                    return  # rubbish behind the end
                # tarfile takes a damaged header for the end: the end is zeros, or no more bytes.
                file.seek(end)
                closing = file.read(tarfile.BLOCKSIZE)
                if not closing:
                    unclosed.append(os.fspath(path))
                if closing.strip(b"\0"):
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
                f"cannot read {path}: not an uncompressed tar but one packed with {packing}; unpack it first"
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
        raise UsageError(
            f"shards must be uncompressed .tar files, got {shown(wrong)}; unpack packed ones first"
        )
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
