from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddfast import files
from ddfast.errors import UsageError
from ddfast.files import (
    atomic_folder,
    atomic_path,
    atomic_write_bytes,
    atomic_write_text,
    make_folder,
    sweep_temporary,
    temporary_path,
)

AS_ROOT = os.geteuid() == 0


def test_a_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    atomic_write_bytes(path, b"old content, longer")
    atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_text_is_utf8_with_unix_line_ends(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.txt", "größe\nzwei\n")
    assert (tmp_path / "a.txt").read_bytes() == "größe\nzwei\n".encode()


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def half_a_write() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_a_write()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_temporary_stands_beside_the_file_and_is_named_by_the_process(tmp_path: Path) -> None:
    assert temporary_path(tmp_path / "a.png") == tmp_path / f".a.png.tmp-{os.getpid()}"


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127 + ".", "漢" * 85])
def test_names_of_the_longest_length_can_be_written(tmp_path: Path, name: str) -> None:
    atomic_write_bytes(tmp_path / name, b"x")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space left on"),
        (errno.EDQUOT, "no space left on"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "read-only file system"),
        (errno.ENAMETOOLONG, "file name too long"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def failing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", failing)
    with pytest.raises(UsageError) as caught:
        atomic_write_bytes(tmp_path / "a.bin", b"x" * 2_500_000)
    message = str(caught.value)
    assert words in message
    assert str(tmp_path) in message
    assert "\n" not in message
    assert ("2.5 MB" in message) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert os.listdir(tmp_path) == []


def test_other_failures_are_not_disguised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(files.os, "fsync", failing)
    with pytest.raises(OSError, match="input/output error"):
        atomic_write_bytes(tmp_path / "a.bin", b"x")


def test_a_file_size_limit_of_the_process_is_no_space(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UsageError, match=r"no space left on .* \(needs 0\.1 MB\)"):
            atomic_write_bytes(tmp_path / "a.bin", b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(AS_ROOT, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match="permission denied"):
            atomic_write_bytes(tmp_path / "a.bin", b"x")
    finally:
        tmp_path.chmod(0o700)


def test_a_file_where_a_folder_is_wanted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"cannot write .*not a directory"):
        atomic_write_bytes(tmp_path / "file" / "a.bin", b"x")
    with pytest.raises(UsageError, match="cannot write"):
        make_folder(tmp_path / "file" / "sub")
    with pytest.raises(UsageError, match="is a directory"):
        atomic_write_bytes(tmp_path, b"x")


def test_make_folder_makes_parents_and_accepts_an_existing_one(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(tmp_path / "a" / "b").is_dir()


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a.txt").write_text("a")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "a"
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def half_a_folder() -> None:
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "a.txt").write_text("a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half_a_folder()
    assert os.listdir(tmp_path) == []


def test_a_folder_does_not_replace_another(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("kept")

    def write() -> None:
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "a.txt").write_text("a")

    with pytest.raises(UsageError, match="cannot write"):
        write()
    assert os.listdir(tmp_path / "out") == ["kept.txt"]
    assert os.listdir(tmp_path) == ["out"]


def test_the_sweep_takes_temporaries_of_any_process_and_nothing_else(tmp_path: Path) -> None:
    kept = ["a.png", ".hidden", ".a.tmp-", "a.tmp-12", ".tmp-notes", "sub/.b.tmp-x"]
    stale = [".a.png.tmp-1", f".b.tmp-{os.getpid()}", "sub/.c.parquet.tmp-99999"]
    (tmp_path / "sub").mkdir()
    for name in kept + stale:
        (tmp_path / name).write_text("x")
    (tmp_path / ".out.tmp-77" / "deep").mkdir(parents=True)
    (tmp_path / ".out.tmp-77" / "deep" / ".x.tmp-5").write_text("x")
    removed = sweep_temporary(tmp_path)
    assert removed == sorted(tmp_path / name for name in [*stale, ".out.tmp-77"])
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(kept)
    assert sweep_temporary(tmp_path) == []
    assert sweep_temporary(tmp_path / "missing") == []


def test_a_killed_writer_leaves_the_old_file_and_a_sweepable_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    program = (
        "import os, signal\n"
        "from ddfast.files import atomic_path\n"
        f"with atomic_path({str(path)!r}) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2
    assert len(sweep_temporary(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["a.bin"]
