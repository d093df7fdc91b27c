"""Files that appear whole or not at all: a temporary in the same folder, `fsync`, then `os.replace`."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddfast.errors import UsageError

_TEMPORARY = re.compile(r"\..*\.tmp-\d+")
_NAME_MAX = 255  # bytes in one file name, on every file system in use

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}
_BAD_PATH = {
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENAMETOOLONG,
    errno.ENOTEMPTY,
    errno.ELOOP,
}


def megabytes(size: int) -> str:
    """A size in bytes as people read it: `12.3 MB` (1 MB = 10^6 bytes)."""
    return f"{size / 1e6:.1f} MB"


@contextmanager
def explained(path: str | Path, needed: int | None = None) -> Iterator[None]:
    """Turn a failure to write `path` into a `UsageError` of one line; other errors pass through.

    `needed` is the size in bytes of what was to be written, where it is known.
    """
    path = Path(path)
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            wanted = f" (needs {megabytes(needed)})" if needed is not None else ""
            raise UsageError(
                f"no space left on {path.parent}{wanted}: free some or choose another disk, then start again"
            ) from error
        if error.errno in _NO_ACCESS:
            raise UsageError(
                f"cannot write {path}: {os.strerror(error.errno).lower()}; choose a folder you may write to"
            ) from error
        if error.errno in _BAD_PATH:
            raise UsageError(f"cannot write {path}: {os.strerror(error.errno).lower()}") from error
        raise


def make_folder(path: str | Path) -> Path:
    """Make a folder and its parents where they are missing. Raises `UsageError` where that is impossible."""
    path = Path(path)
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def beside(folder: Path, ending: str) -> Path:
    """The path beside a folder that has its name with an ending."""
    if folder.name in ("", ".."):
        folder = folder.resolve()
    return folder.with_name(folder.name + ending)


def temporary_path(path: str | Path) -> Path:
    """`.<name>.tmp-<pid>` beside `path`: what `sweep_temporary` recognises. A long name is cut to fit."""
    path = Path(path)
    ending = f".tmp-{os.getpid()}"
    name = os.fsencode(path.name)[: _NAME_MAX - len(ending) - 1]
    return path.with_name("." + name.decode("utf-8", "ignore") + ending)


@contextmanager
def atomic_path(path: str | Path, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is synced to disk and renamed to `path`.

    On any exception the temporary is removed and `path` is left as it was. Raises `UsageError` for a full
    disk, a missing permission or an impossible path.
    """
    path = Path(path)
    temporary = temporary_path(path)
    with explained(path, needed):
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically. A reader sees the old bytes or the new ones, never a part.

    Raises `UsageError` for a full disk, a missing permission or an impossible path.
    """
    with atomic_path(path, len(data)) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    r"""Write UTF-8 text atomically, with `\n` line ends on every system. Errors as `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def arrow_file(path: str | Path, mode: str = "rb") -> Any:
    """A file for pyarrow, which takes some paths that are given as text for a URI or for a home folder."""
    import pyarrow as pa

    return pa.OSFile(os.fsencode(path), mode)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success it becomes `path`, which may be an empty folder.

    On any exception the temporary folder and what is in it are removed. Errors as in `atomic_path`.
    """
    path = Path(os.path.realpath(path))
    temporary = temporary_path(path)
    with explained(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            os.rename(temporary, path)  # onto an empty folder as well
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(path.parent)


def sweep_temporary(folder: str | Path) -> list[Path]:
    """Remove what a killed run left half-written anywhere under `folder`; return the removed paths, sorted.

    Everything named like a temporary of `atomic_path` or `atomic_folder` goes, whoever made it: call it when
    no other process writes there (in a distributed run: on rank 0, before the first barrier). A missing
    folder is empty.
    """
    removed: list[Path] = []
    for parent, folders, names in os.walk(folder):
        for name in [name for name in folders if _TEMPORARY.fullmatch(name)]:
            folders.remove(name)
            removed.append(Path(parent, name))
        removed += [Path(parent, name) for name in names if _TEMPORARY.fullmatch(name)]
    for path in removed:
        with explained(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return sorted(removed)


def sweep_temporary_of(path: Path) -> None:
    """Remove what a killed run left half-written beside `path`; other files stay."""
    prefix = temporary_path(path).name.rsplit("-", 1)[0] + "-"
    with explained(path):
        for entry in list(path.parent.iterdir()):
            if entry.name.startswith(prefix) and entry.name.removeprefix(prefix).isdigit():
                entry.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the file system can (some network ones cannot)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}:
            raise
    finally:
        os.close(descriptor)
