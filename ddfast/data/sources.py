"""Where labelled images come from: an ImageFolder, a zip, WebDataset tar shards, or a torchvision set by name.

A source is one split of a data set. Whatever holds the files, the same files give the same samples, keys and ids, so a
zip and the folder it was made from lead to the same draws and the same result.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from ddfast.errors import BadImage, UsageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
"""File names that make a sample, in any case. Other files in a class folder are left alone."""

MAX_FILE_BYTES = 1 << 30
"""A single image file larger than this is not read: it is no photograph, and an archive may lie about sizes."""

_SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
_NOT_DATA = "__MACOSX"


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image file, known but not read.

    `key` is "class/relative path" with forward slashes, `id` the signed 64-bit `sample_id(key)` that seeds its noise,
    `label` the index of its class in `Source.class_names`.
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
        class_names: in label order. Sorted as plain strings, save for torchvision's sets, which keep torchvision's order.
        samples: sorted by label, then key; keys and ids are unique.

    `read` may be called from many threads. A source holds at most one open file for each archive, closes it with
    `close` or at the end of a `with` block, opens it again when needed, and can be pickled.
    """

    def __init__(
        self, name: str, split: str, class_names: Sequence[str], keys: Iterable[tuple[str, int]]
    ) -> None:
        """`keys` are (key, label) pairs in any order. Raises `UsageError` where two keys share an id."""
        self.name = name
        self.split = split
        self.class_names = list(class_names)
        self.samples: list[Sample] = [
            Sample(sample_id(key), key, label)
            for key, label in sorted(keys, key=lambda pair: (pair[1], pair[0]))
        ]
        self._by_id: dict[int, Sample] = {}
        for sample in self.samples:
            other = self._by_id.setdefault(sample.id, sample)
            if other is not sample:
                raise UsageError(
                    f"{name}: {shown([other.key])} and {shown([sample.key])} have the same 64-bit id; rename one of them"
                )

    @abstractmethod
    def read(self, sample: Sample) -> bytes:
        """The sample's encoded image. Raises `BadImage` if it cannot be read, `UsageError` if the source is gone."""

    @abstractmethod
    def size_of(self, sample: Sample) -> int:
        """Size in bytes of the sample's file, -1 where it cannot be told."""

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
        """32 hex digits over the class names, the keys and the file sizes; equal for a folder and a zip of it."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(self.class_names).encode())
        for sample in self.samples:
            digest.update(json.dumps([sample.key, sample.label, self.size_of(sample)]).encode())
        return digest.hexdigest()

    def close(self) -> None:
        """Close what is open. The next `read` opens it again."""

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
        return f"{type(self).__name__}({self.name!r}, split={self.split!r}, {classes} classes, {samples} samples)"


def open_source(data: str | os.PathLike[str], split: str = "train") -> Source:
    """Open one split of a labelled image set.

    Args:
        data: a folder or a .zip with `train/<class>/...` and `test/<class>/...` or `val/<class>/...` (a zip may hold it
            in one common folder); class folders alone are a train split. Or WebDataset shards: a .tar, or several as
            `part-{000..003}.tar` or `part-*.tar`, with that layout inside or with pairs `key.jpg` and `key.cls` (or
            `key.json` with "label"). Or a torchvision set by name, as `cifar10`, downloaded once into `$DDFAST_DATA`
            or `~/.cache/ddfast`.
        split: "train" or "test" ("test" is looked for in `test/`, then in `val/`).

    Labels of the test split follow the class order of the train split where there is one.

    Raises:
        UsageError: no such data, no images, one class only, an empty class, no such split, a damaged archive, or an
            archive member that points outside.
        ValueError: an unknown split.
    """
    if split not in _SPLIT_FOLDERS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    name = os.fspath(data)
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return FolderSource(path, split, name)
        if path.is_file():
            if path.suffix.lower() != ".tar" and zipfile.is_zipfile(path):
                return ZipSource(path, split, name)
            if path.suffix.lower() == ".zip":
                raise UsageError(
                    f"cannot read {name}: it is not a zip archive, or its end is missing; copy it again"
                )
            if path.suffix.lower() == ".tar":
                return TarSource([path], split, name)
            raise UsageError(f"cannot read {name}: wanted a folder, a .zip or an uncompressed .tar")
        if re.search(r"[{*?\[]", name):
            return TarSource(_shards(os.fspath(path)), split, name)
    except PermissionError as error:
        raise UsageError(f"cannot read {error.filename or name}: permission denied") from error
    if name.lower() in torchvision_sets():
        return TorchvisionSource(name.lower(), split)
    raise UsageError(
        f"no such data: {shown([name])}; wanted a folder, a .zip, .tar shards or one of {', '.join(torchvision_sets())}"
    )


def shown(names: Iterable[str], limit: int = 5) -> str:
    """Names for a one-line message: comma-separated, control characters escaped, at most `limit` of them."""
    names = list(names)
    clean = [
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in n)
        for n in names[:limit]
    ]
    return ", ".join(clean) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# What every layout has in common: classes with files, checked and named ---------------------------------------------


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == _NOT_DATA


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _pick_split(folders: Collection[str], split: str, name: str) -> str:
    """Name of the folder that holds `split`; "" where the class folders stand in the root. Raises `UsageError`."""
    for candidate in _SPLIT_FOLDERS[split]:
        if candidate in folders:
            return candidate
    known = [folder for group in _SPLIT_FOLDERS.values() for folder in group if folder in folders]
    if split == "train" and not known:
        return ""
    wanted = " or ".join(f"{folder}/" for folder in _SPLIT_FOLDERS[split])
    found = ", ".join(f"{folder}/" for folder in known) or "class folders only, which are a train split"
    raise UsageError(f"{name} has no {split} split: wanted {wanted}, found {found}")


def _checked_classes(
    files: dict[str, list[str]], name: str, place: str, train_classes: Collection[str] | None
) -> list[str]:
    """Class names in label order for `files` (class name -> relative paths of its images). Raises `UsageError`."""
    where = f"{name}/{place}" if place else name
    if not any(files.values()):
        raise UsageError(
            f"no images in {where}: wanted {place + '/' if place else ''}<class>/*, with one of {' '.join(EXTENSIONS)}"
        )
    empty = sorted(class_name for class_name, paths in files.items() if not paths)
    if empty:
        raise UsageError(f"class without images in {where}: {shown(empty)}; add images or remove the folder")
    if train_classes is not None:
        unknown = sorted(set(files) - set(train_classes))
        if unknown:
            raise UsageError(f"{where} has classes that the train split lacks: {shown(unknown)}")
    class_names = sorted(files if train_classes is None else train_classes)
    if len(class_names) < 2:
        raise UsageError(
            f"one class only in {where}: {shown(class_names)}; wanted two or more class folders with images"
        )
    return class_names


def _keys(files: dict[str, list[str]], class_names: Sequence[str]) -> Iterator[tuple[str, int]]:
    for label, class_name in enumerate(class_names):
        for path in files.get(class_name, ()):
            yield f"{class_name}/{path}", label


# Folders ------------------------------------------------------------------------------------------------------------


class FolderSource(Source):
    """An ImageFolder: `root/train/<class>/**/*.jpg`. Symbolic links are followed, loops of them are not."""

    def __init__(self, root: Path, split: str, name: str) -> None:
        """`root` is an existing folder. Raises `UsageError` as `open_source`."""
        entries = _listed(root, name)
        folder = _pick_split([entry.name for entry in entries if _is_folder(entry)], split, name)
        self._root = root / folder
        self._undecodable: dict[str, str] = {}  # key -> path, for names that are not UTF-8
        files: dict[str, list[str]] = {}
        for entry in _listed(self._root, name):
            if _is_folder(entry) and not _is_hidden(entry.name):
                paths = list(_walk(entry.path, name))
                class_name = _utf8(entry.name)
                files[class_name] = [_utf8(path) for path in paths]
                for path in paths:
                    key = f"{class_name}/{_utf8(path)}"
                    if key != f"{entry.name}/{path}":
                        self._undecodable[key] = f"{entry.name}/{path}"
        train_classes = None
        if split == "test" and (root / "train").is_dir():
            train_entries = _listed(root / "train", name)
            train_classes = [_utf8(e.name) for e in train_entries if _is_folder(e) and not _is_hidden(e.name)]
        nested = None if folder else _split_one_level_down(entries)
        if nested and len(files) == 1:
            raise UsageError(f"{name} holds one folder, {nested}, which has the splits: give {name}/{nested}")
        class_names = _checked_classes(files, name, folder, train_classes)
        super().__init__(name, split, class_names, _keys(files, class_names))

    def _path(self, sample: Sample) -> str:
        return os.path.join(self._root, self._undecodable.get(sample.key, sample.key))

    def read(self, sample: Sample) -> bytes:
        """The file's bytes. Raises `BadImage` if it cannot be read, `UsageError` if the whole folder is gone."""
        try:
            with open(self._path(sample), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_FILE_BYTES:
                    raise BadImage(f"file of {size} bytes, more than the limit of {MAX_FILE_BYTES}")
                return file.read()
        except OSError as error:
            if not self._root.is_dir():
                raise UsageError(f"{self.name} has gone away: {os.strerror(error.errno or 0)}") from error
            raise BadImage(f"cannot be read: {os.strerror(error.errno or 0)}") from error

    def size_of(self, sample: Sample) -> int:
        """Size of the file in bytes, -1 for a broken link."""
        try:
            return os.stat(self._path(sample)).st_size
        except OSError:
            return -1


def _listed(folder: str | Path, name: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        place = shown([_utf8(os.fspath(folder))])
        raise UsageError(f"cannot list {place} of {name}: {os.strerror(error.errno or 0).lower()}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def _split_one_level_down(entries: Sequence[os.DirEntry[str]]) -> str | None:
    folders = [entry for entry in entries if _is_folder(entry) and not _is_hidden(entry.name)]
    if len(folders) == 1 and os.path.isdir(os.path.join(folders[0].path, "train")):
        return folders[0].name
    return None


def _walk(folder: str, name: str) -> Iterator[str]:
    """Relative posix paths of the image files under a class folder; every real folder is visited once."""
    status = os.stat(folder)
    seen = {(status.st_dev, status.st_ino)}
    waiting = [(folder, "")]
    while waiting:
        place, prefix = waiting.pop()
        for entry in _listed(place, name):
            if _is_hidden(entry.name):
                continue
            if _is_folder(entry):
                status = os.stat(entry.path)
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    waiting.append((entry.path, f"{prefix}{entry.name}/"))
            elif _is_image(entry.name) and _is_readable_kind(entry):
                yield prefix + entry.name


def _is_readable_kind(entry: os.DirEntry[str]) -> bool:
    """Regular files and broken links (samples that will fail), not pipes, sockets and devices (which may block)."""
    try:
        mode = entry.stat().st_mode if entry.is_symlink() else entry.stat(follow_symlinks=False).st_mode
    except OSError:
        return True
    return stat.S_ISREG(mode)


def _utf8(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 become backslash escapes."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    return name


# Archives -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Member:
    """Where a file lies in an archive. `method` is None for plain bytes at `offset`, else a zip compression method."""

    archive: int
    offset: int
    stored: int  # bytes in the archive
    size: int  # bytes of the file
    method: int | None = None
    crc: int = 0
    encrypted: bool = False


class _ArchiveSource(Source):
    """Files at known offsets of one or more archives, read with `os.pread`: no shared position, so no lock."""

    def __init__(
        self,
        paths: Sequence[Path],
        split: str,
        name: str,
        files: dict[str, list[str]],
        class_names: Sequence[str],
        members: dict[str, _Member],
    ) -> None:
        self._paths = [path.absolute() for path in paths]
        self._members = members
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        super().__init__(name, split, class_names, _keys(files, class_names))

    def size_of(self, sample: Sample) -> int:
        """Size of the file in bytes, unpacked."""
        return self._members[sample.key].size

    def close(self) -> None:
        """Close the archives. No `read` may be under way."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_descriptors")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _descriptors={})

    def _descriptor(self, archive: int) -> int:
        descriptor = self._descriptors.get(archive)
        if descriptor is None:
            with self._lock:
                descriptor = self._descriptors.get(archive)
                if descriptor is None:
                    try:
                        descriptor = os.open(self._paths[archive], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                    except OSError as error:
                        raise UsageError(
                            f"{self._paths[archive]} has gone away: {os.strerror(error.errno or 0).lower()}"
                        ) from error
                    self._descriptors[archive] = descriptor
        return descriptor

    def _bytes(self, archive: int, offset: int, size: int) -> bytes:
        descriptor = self._descriptor(archive)
        parts: list[bytes] = []
        try:
            while size > 0:
                part = os.pread(descriptor, size, offset)
                if not part:
                    raise BadImage("the archive ends within the file")
                parts.append(part)
                offset += len(part)
                size -= len(part)
        except OSError as error:
            raise BadImage(f"cannot be read: {os.strerror(error.errno or 0)}") from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read(self, sample: Sample) -> bytes:
        """The file's bytes, unpacked. Raises `BadImage` for a damaged member, `UsageError` if the archive is gone."""
        member = self._members[sample.key]
        if max(member.size, member.stored) > MAX_FILE_BYTES:
            raise BadImage(f"file of {member.size} bytes, more than the limit of {MAX_FILE_BYTES}")
        if member.encrypted:
            raise BadImage("encrypted in the archive")
        if member.method is None:
            return self._bytes(member.archive, member.offset, member.size)
        # The local header repeats the name and may have another extra field than the central directory.
        header = self._bytes(member.archive, member.offset, 30)
        if header[:4] != b"PK\x03\x04":
            raise BadImage("damaged in the archive: no local header")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = member.offset + 30 + name_length + extra_length
        data = _unpack(self._bytes(member.archive, start, member.stored), member)
        if zlib.crc32(data) != member.crc:
            raise BadImage("damaged in the archive: wrong checksum")
        return data


def _unpack(data: bytes, member: _Member) -> bytes:
    if member.method == zipfile.ZIP_STORED:
        return data
    if member.method != zipfile.ZIP_DEFLATED:
        raise BadImage(f"packed with zip method {member.method}; wanted stored or deflated")
    unpacker = zlib.decompressobj(-15)
    try:
        data = unpacker.decompress(data, member.size + 1)
    except zlib.error as error:
        raise BadImage(f"damaged in the archive: {error}") from error
    if len(data) != member.size:
        raise BadImage(f"damaged in the archive: not the {member.size} bytes it should have")
    return data


class ZipSource(_ArchiveSource):
    """An ImageFolder in a zip, read in place."""

    def __init__(self, path: Path, split: str, name: str) -> None:
        """Read the central directory. Raises `UsageError` as `open_source`."""
        tree = _Tree(name)
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if info.is_dir():
                        tree.add_folder(info.filename)
                        continue
                    tree.check(info.filename)
                    kind = info.external_attr >> 16
                    if stat.S_ISLNK(kind):
                        target = (
                            archive.read(info).decode("utf-8", "surrogateescape")
                            if info.file_size < 4096
                            else "/"
                        )
                        tree.add_link(info.filename, target)
                        continue
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
        except (
            zipfile.BadZipFile,
            zlib.error,
            struct.error,
            OSError,
            EOFError,
            ValueError,
            RuntimeError,
            OverflowError,
            LookupError,
        ) as error:
            raise UsageError(
                f"cannot read {name}: damaged zip archive ({_one_line(error)}); copy it again"
            ) from error
        files, class_names, members = tree.split(split)
        super().__init__([path], split, name, files, class_names, members)


class TarSource(_ArchiveSource):
    """WebDataset shards (uncompressed tar), read in place: the ImageFolder layout, or pairs of image and label."""

    def __init__(self, paths: Sequence[Path], split: str, name: str) -> None:
        """Scan the shards' headers. Raises `UsageError` as `open_source`."""
        tree = _Tree(name)
        labels: dict[str, bytes] = {}  # path without extension -> what its .cls or .json says
        names_file: bytes | None = None
        for index, path in enumerate(paths):
            for info, member in _tar_members(path, index):
                if info.isdir():
                    tree.add_folder(_utf8(info.name))
                elif info.issym():
                    tree.add_link(_utf8(info.name), _utf8(info.linkname))
                elif info.islnk():
                    tree.add_link(_utf8(info.name), _utf8(info.linkname), from_root=True)
                elif member is not None:
                    inside = tree.check(_utf8(info.name))
                    suffix = PurePosixPath(inside).suffix.lower()
                    if suffix in (".cls", ".json") and member.size <= 1 << 20:
                        labels[f"{inside[: -len(suffix)]}{suffix}"] = _plain(path, member)
                    elif PurePosixPath(inside).name == "classes.txt":
                        names_file = _plain(path, member)
                    tree.add(inside, member, unique=_is_image(inside))
        beside = paths[0].parent / "classes.txt"
        if names_file is None and beside.is_file():
            names_file = beside.read_bytes()
        if tree.is_paired(labels):
            files, class_names, members = tree.pairs(labels, names_file, split)
        else:
            files, class_names, members = tree.split(split)
        super().__init__(paths, split, name, files, class_names, members)


def _plain(path: Path, member: _Member) -> bytes:
    with open(path, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _tar_members(path: Path, index: int) -> Iterator[tuple[tarfile.TarInfo, _Member | None]]:
    """Every member of a shard; the member is None unless it is a plain file. Raises `UsageError` for a damaged tar."""
    total = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                member = None
                if info.isreg():
                    if info.issparse() or info.offset_data + info.size > total:
                        kind = "a sparse file" if info.issparse() else "the archive ends within a file"
                        raise UsageError(
                            f"cannot read {path}: {kind} ({shown([_utf8(info.name)])}); make it again"
                        )
                    member = _Member(archive=index, offset=info.offset_data, stored=info.size, size=info.size)
                yield info, member
                archive.members = []  # tarfile keeps every header; the index here is enough
            archive.fileobj.seek(archive.offset)  # type: ignore[union-attr]
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # type: ignore[union-attr]
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
        OverflowError,
        RecursionError,
    ) as error:
        hint = "; a compressed tar has to be unpacked first" if isinstance(error, tarfile.ReadError) else ""
        raise UsageError(
            f"cannot read {path}: not a tar archive, or damaged ({_one_line(error)}){hint}"
        ) from error


def _shards(pattern: str) -> list[Path]:
    """Expand `{000..003}`, `{a,b}` and globs. Raises `UsageError` for a shard that is not there."""
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
    choices: list[list[str]] = []
    for position, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if position % 2 == 0:
            choices.append([part])
        elif numbers:
            first, last = int(numbers[1]), int(numbers[2])
            if not first <= last < first + 1_000_000:
                raise UsageError(f"shard range {{{part}}} must run upwards, over at most a million shards")
            width = len(numbers[1]) if len(numbers[1]) == len(numbers[2]) or numbers[1].startswith("0") else 0
            choices.append([f"{number:0{width}d}" for number in range(first, last + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(combination) for combination in product(*choices)]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


class _Tree:
    """The file names of an archive, checked as they come, and the classes found in them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: dict[str, _Member] = {}
        self.folders: set[str] = set()
        self._links: dict[str, str] = {}

    def check(self, name: str) -> str:
        """The member's path, normalised. Raises `UsageError` for one that points outside of the archive."""
        parts = re.split(r"[/\\]", name)
        if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name) or ".." in parts or "\0" in name:
            raise UsageError(
                f"{self.name} has a member that points outside of the archive: {shown([name])}; refused"
            )
        return "/".join(part for part in name.split("/") if part not in ("", "."))

    def add_folder(self, name: str) -> None:
        """A folder of its own, which may be empty."""
        self.folders.add(self.check(name))

    def add(self, name: str, member: _Member, unique: bool = False) -> None:
        """A file. Of two with one name the last counts, as in unpacking; with `unique` that is an error."""
        inside = self.check(name)
        if unique and inside in self.members:
            raise UsageError(
                f"{self.name} has {shown([inside])} twice; sample names must be unique over all shards"
            )
        self.members[inside] = member

    def add_link(self, name: str, target: str, from_root: bool = False) -> None:
        """A link to another member. Raises `UsageError` if it leads outside of the archive."""
        inside = self.check(name)
        base = [] if from_root else inside.split("/")[:-1]
        if target.startswith(("/", "\\")):
            raise UsageError(
                f"{self.name} has a link that points outside of the archive: {shown([name])}; refused"
            )
        for part in target.split("/"):
            if part == "..":
                if not base:
                    raise UsageError(
                        f"{self.name} has a link that points outside of the archive: {shown([name])}; refused"
                    )
                base.pop()
            elif part not in ("", "."):
                base.append(part)
        self._links[inside] = "/".join(base)

    def _resolve_links(self) -> None:
        for link, target in self._links.items():
            for _ in range(40):  # a loop of links ends here, and is then no file
                if target not in self._links:
                    break
                target = self._links[target]
            if target in self.members:
                self.members[link] = self.members[target]
        self._links.clear()

    def _visible(self) -> dict[str, _Member]:
        self._resolve_links()
        return {
            path: m
            for path, m in self.members.items()
            if not any(_is_hidden(part) for part in path.split("/"))
        }

    def _all_folders(self, paths: Iterable[str]) -> set[str]:
        """Every visible folder: those stored, those that files stand in, and the parents of both."""
        folders: set[str] = set()
        stored = (
            folder for folder in self.folders if not any(_is_hidden(part) for part in folder.split("/"))
        )
        for folder in (*stored, *(path.rpartition("/")[0] for path in paths)):
            while folder and folder not in folders:
                folders.add(folder)
                folder = folder.rpartition("/")[0]
        return folders

    def split(self, split: str) -> tuple[dict[str, list[str]], list[str], dict[str, _Member]]:
        """Files by class, class names in label order, and members by key, of the ImageFolder layout."""
        visible = self._visible()
        folders = self._all_folders(visible)
        known = {folder for group in _SPLIT_FOLDERS.values() for folder in group}
        top = {folder for folder in folders if "/" not in folder}
        prefix = ""
        if len(top) == 1 and not top & known:  # one common folder around everything
            (common,) = top
            inner = {folder.split("/")[1] for folder in folders if folder.count("/") == 1}
            if inner:
                prefix, top = common + "/", inner
        folder = _pick_split(top, split, self.name)
        prefix += folder + "/" if folder else ""
        children: dict[str, set[str]] = defaultdict(set)  # "train/" -> its class folders
        for path in folders:
            parent, _, child = path.rpartition("/")
            children[parent + "/" if parent else ""].add(child)
        files: dict[str, list[str]] = {class_name: [] for class_name in children[prefix]}
        members: dict[str, _Member] = {}
        for path, member in visible.items():
            inside = path[len(prefix) :]
            if path.startswith(prefix) and "/" in inside and _is_image(inside):
                class_name, _, relative = inside.partition("/")
                files[class_name].append(relative)
                members[inside] = member
        train_classes = None
        if split == "test" and "train" in top:
            train_classes = children[prefix[: -len(folder) - 1] + "train/"]
        class_names = _checked_classes(files, self.name, folder, train_classes)
        return files, class_names, members

    def is_paired(self, labels: dict[str, bytes]) -> bool:
        """Whether labels stand beside the images: some image has a .cls, or every image has a .json."""
        images = [_webdataset_key(path) for path in self._visible() if _is_image(path)]
        if any(f"{key}.cls" in labels for key in images):
            return True
        return bool(images) and all(f"{key}.json" in labels for key in images)

    def pairs(
        self, labels: dict[str, bytes], names_file: bytes | None, split: str
    ) -> tuple[dict[str, list[str]], list[str], dict[str, _Member]]:
        """As `split`, for `key.jpg` beside `key.cls` or `key.json`; `names_file` has a class name on each line."""
        images = {path: member for path, member in self._visible().items() if _is_image(path)}
        top = {path.partition("/")[0] for path in images if "/" in path}
        known = {folder for group in _SPLIT_FOLDERS.values() for folder in group}
        folder = _pick_split(top & known, split, self.name)
        prefix = folder + "/" if folder else ""
        numbers: dict[str, int | str] = {}
        for path in images:
            key = _webdataset_key(path)
            label = labels.get(f"{key}.cls")
            said = (
                _class_in_cls(label) if label is not None else _class_in_json(labels.get(f"{key}.json", b""))
            )
            if said is None:
                raise UsageError(
                    f"{self.name} has no label for {shown([path])}: wanted {shown([key])}.cls with a class number, or "
                    '.json with "label"'
                )
            numbers[path] = said
        names = _class_names(numbers.values(), names_file, self.name)
        files: dict[str, list[str]] = defaultdict(list)
        members: dict[str, _Member] = {}
        for path, member in images.items():
            if path.startswith(prefix):
                class_name = names[numbers[path]]
                files[class_name].append(path[len(prefix) :])
                members[f"{class_name}/{path[len(prefix) :]}"] = member
        all_classes = sorted(set(names.values())) if split == "test" or not folder else None
        class_names = _checked_classes(dict(files), self.name, folder, all_classes)
        return files, class_names, members


def _webdataset_key(path: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _class_in_cls(text: bytes) -> int | str | None:
    said = text.decode("utf-8", "replace").strip()
    return int(said) if re.fullmatch(r"\d{1,9}", said) else said or None


def _class_in_json(text: bytes) -> int | str | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    for field in ("class_name", "label_name", "label", "cls", "class_id"):
        said = record.get(field)
        if (isinstance(said, int) and not isinstance(said, bool) and said >= 0) or (
            isinstance(said, str) and said
        ):
            return said
    return None


def _class_names(said: Collection[int | str], names_file: bytes | None, name: str) -> dict[int | str, str]:
    """Class name of every label that occurs. Numbers without names are padded, so that they sort as numbers."""
    largest = max((label for label in said if isinstance(label, int)), default=0)
    names: dict[int | str, str] = {}
    lines = names_file.decode("utf-8", "replace").splitlines() if names_file is not None else None
    if lines is not None and largest >= len(lines):
        raise UsageError(f"classes.txt of {name} has {len(lines)} lines, but class number {largest} occurs")
    for label in said:
        if isinstance(label, int):
            names[label] = lines[label].strip() if lines is not None else f"{label:0{len(str(largest))}d}"
        else:
            names[label] = label
    if any(not class_name or "/" in class_name for class_name in names.values()):
        raise UsageError(
            f"{name} has an empty class name, or one with a slash; correct classes.txt or the labels"
        )
    return names


# torchvision's sets -------------------------------------------------------------------------------------------------

# name -> (class in torchvision.datasets, its arguments for train, for test)
_TORCHVISION: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashionmnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "kmnist": ("KMNIST", {"train": True}, {"train": False}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "oxfordiiitpet": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "fgvcaircraft": ("FGVCAircraft", {"split": "trainval"}, {"split": "test"}),
    "dtd": ("DTD", {"split": "train"}, {"split": "test"}),
    "imagenette": ("Imagenette", {"split": "train"}, {"split": "val"}),
}


def torchvision_sets() -> list[str]:
    """Names that `open_source` hands to torchvision."""
    return list(_TORCHVISION)


class TorchvisionSource(Source):
    """A set of `torchvision.datasets` by name; keys are "class/index.png", `read` gives a lossless PNG."""

    def __init__(self, name: str, split: str, root: str | os.PathLike[str] | None = None) -> None:
        """Load the set, downloading it where it is missing.

        Args:
            name: one of `torchvision_sets()`.
            split: "train" or "test".
            root: where the files are; `$DDFAST_DATA` or `~/.cache/ddfast` by default.

        Raises `UsageError` where the set cannot be downloaded or is damaged.
        """
        import torchvision.datasets

        class_name, train_options, test_options = _TORCHVISION[name]
        root = os.fspath(root or os.environ.get("DDFAST_DATA") or Path.home() / ".cache" / "ddfast")
        kind = getattr(torchvision.datasets, class_name)
        try:
            os.makedirs(root, exist_ok=True)
            self._set = kind(root, download=True, **(train_options if split == "train" else test_options))
        except (OSError, RuntimeError, EOFError, ValueError, ImportError) as error:
            raise UsageError(
                f"cannot load {name} from {root}: {_one_line(error)}; connect to the network once, or put torchvision's "
                f"files there (DDFAST_DATA names another folder)"
            ) from error
        labels = [int(label) for label in _torchvision_labels(self._set)]
        names = [str(known) for known in getattr(self._set, "classes", None) or ()]
        if not names:
            names = [f"{label:0{len(str(max(labels)))}d}" for label in range(max(labels) + 1)]
        self._indices: dict[str, int] = {}
        keys: list[tuple[str, int]] = []
        for index, label in enumerate(labels):
            key = f"{names[label].replace('/', '-')}/{index:07d}.png"
            self._indices[key] = index
            keys.append((key, label))
        super().__init__(name, split, names, keys)

    def _image(self, sample: Sample) -> Any:
        try:
            return self._set[self._indices[sample.key]][0]
        except (OSError, SyntaxError, ValueError) as error:
            raise BadImage(f"cannot be read: {_one_line(error)}") from error

    def read(self, sample: Sample) -> bytes:
        """The image as PNG. Raises `BadImage` if torchvision cannot open it."""
        import io

        image = self._image(sample)
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            image = image.convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "png", compress_level=1)
        return buffer.getvalue()

    def size_of(self, sample: Sample) -> int:
        """Always -1: torchvision checks its own files, and the index stands in the key."""
        return -1


def _torchvision_labels(dataset: Any) -> Sequence[int]:
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None:
            return labels
    return [label for _, label in dataset]
