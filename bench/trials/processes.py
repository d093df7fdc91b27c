"""Runs of `ddfast` in forked processes that find each other as under torchrun, and hooks that break them."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Hook = Callable[[int], None]  # called in each forked process with its rank, before the command

SIDE = 16  # of the images
PATIENCE = 300.0  # seconds after which a run counts as hanging
GRACE = 10.0  # seconds that the other ranks have to notice a dead one before they get torchrun's SIGTERM


@dataclass
class Outcome:
    """How the processes of one run ended: exit codes by rank (negative: the signal), and their error lines."""

    codes: list[int]
    lines: list[str]
    hung: bool = False
    said: str = ""

    @property
    def done(self) -> bool:
        """Whether every process finished."""
        return not self.hung and all(code == 0 for code in self.codes)

    @property
    def refused(self) -> bool:
        """Whether every process that ended by itself said why in one line, with exit code 2, and none hung."""
        own = [code for code in self.codes if code >= 0]
        return not self.hung and all(code == 2 for code in own) and bool(own) and len(set(self.lines)) >= 1

    @property
    def tracebacks(self) -> bool:
        """Whether a process printed a traceback."""
        return any(line.startswith("Traceback") for line in self.lines)


def launch(arguments: Sequence[str], ranks: int = 1, hook: Hook | None = None, kill_after: float | None = None,
           kill_rank: int = 0) -> Outcome:  # fmt: skip
    """Run the command in `ranks` forked processes; SIGKILL one after `kill_after` seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as logs:
        pids = [_fork(arguments, rank, ranks, port, hook, Path(logs, str(rank))) for rank in range(ranks)]
        codes, hung = _wait(pids, kill_after, kill_rank)
        said = [line for rank in range(ranks) for line in Path(logs, str(rank)).read_text().splitlines()]
    lines = [line for line in said if line.startswith(("ddfast: ", "Traceback"))]
    return Outcome(codes, lines, hung, "\n".join(said))


def _fork(
    arguments: Sequence[str], rank: int, ranks: int, port: int, hook: Hook | None, log: Path
) -> int:  # fmt: skip
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if ranks > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            os.environ.update({name: str(value) for name, value in numbers.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        if hook is not None:
            hook(rank)
        from ddfast.cli import main

        code = main(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # what a process would print and die of
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: Sequence[int], kill_after: float | None, kill_rank: int) -> tuple[list[int], bool]:
    """Exit codes of all processes, and whether they hung.

    Where one dies, the others get SIGTERM a while later; torchrun sends it at once.
    """
    started = time.monotonic()
    codes: dict[int, int] = {}
    first_death: float | None = None
    while len(codes) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    if codes[rank] and first_death is None:
                        first_death = time.monotonic()
        now = time.monotonic()
        left = [pid for rank, pid in enumerate(pids) if rank not in codes]
        if kill_after is not None and now - started >= kill_after:
            kill_after = None
            if kill_rank not in codes:
                os.kill(pids[kill_rank], signal.SIGKILL)
        if first_death is not None and now - first_death > GRACE:
            first_death = now
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        if now - started > PATIENCE:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return [codes.get(rank, -signal.SIGKILL) for rank in range(len(pids))], True
        time.sleep(0.002)
    return [codes[rank] for rank in range(len(pids))], False


# Hooks ------------------------------------------------------------------------------------------------------


def die() -> None:
    """Kill this process as a machine that goes would."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_write(number: int, when: str, victim: int = 0, action: Callable[[], None] = die) -> Hook:
    """At the `number`-th file that rank `victim` commits: act `before` or `after` its rename, or with half of it
    `torn` away."""

    def hook(rank: int) -> None:
        if rank != victim:
            return
        rename, left = os.replace, [number]

        def replace(source: Any, target: Any) -> None:
            left[0] -= 1
            if left[0] == -1 and when == "torn":
                with open(source, "rb+") as file:
                    file.truncate(os.path.getsize(source) // 2)
            if left[0] == -1 and when in ("before", "torn"):
                action()
            rename(source, target)
            if left[0] == -1 and when == "after":
                action()

        os.replace = replace  # type: ignore[assignment]

    return hook


def full_at_sync(number: int, victim: int = 0) -> Hook:
    """The disk is full from the `number`-th file on that rank `victim` syncs."""

    def hook(rank: int) -> None:
        if rank != victim:
            return
        sync, left = os.fsync, [number]

        def fsync(descriptor: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        os.fsync = fsync  # type: ignore[assignment]

    return hook


def file_size_limit(limit: int) -> Hook:
    """No file may grow beyond `limit` bytes (RLIMIT_FSIZE)."""
    return lambda rank: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def other_limit(rank: int) -> None:
    """Images that were good are too large now."""
    os.environ["DDFAST_MAX_PIXELS"] = str(SIDE * SIDE - 1)
