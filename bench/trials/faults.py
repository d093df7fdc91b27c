"""Break a distillation in every way that a long run breaks, and look at what is left.

    python -m bench faults [--only kills,disk] [--seed 0]

Runs on a small rendered set. Every injected fault has to end in the bytes of the undisturbed run, after a resumption
where one is needed, or in one clear line that says what to do. Writes bench/results/faults.csv, in
which a family takes the place of its earlier results, and the counts to faults.md; exits with 1 where a fault was lost:
other bytes, a traceback, a hang.

Processes are forked from this one, which has imported everything, and find each other as under torchrun; the family
`torchrun` uses the real one.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bench import facts
from bench.trials.kill import digests
from ddfast.data.loaders import dali_missing
from ddfast.files import atomic_write_text

T = TypeVar("T")
Hook = Callable[[int], None]  # called in each forked process with its rank, before the command

CLASSES = ("across", "down", "rising")
SIDE = 16
SHARD = 64  # sources in a shard here, so that a small set has several
PATIENCE = 300.0  # seconds after which a run counts as hanging
GRACE = 10.0  # seconds that the other ranks have to notice a dead one before they get torchrun's SIGTERM


# The set and the command ------------------------------------------------------------------------------------


def render_set(root: Path, per_class: int = 100, seed: int = 0) -> Path:
    """An image folder of stripes, `per_class` PNG images of 16 px in each of three classes."""
    from PIL import Image

    draws = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    for name, along in zip(CLASSES, (y, x, x + y), strict=True):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for number in range(per_class):
            wave = np.sin(along * 1.1 + draws.uniform(0, 6.28))[..., None] * draws.uniform(0.3, 1.0, 3)
            pixels = 128 + 70 * wave + draws.normal(0, 20, (SIDE, SIDE, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{number:04d}.png")
    return root


def make_teacher(path: Path) -> Path:
    """A ConvNet of random weights: faults do not care what it knows."""
    import torch

    from ddfast.models import create_model, save_teacher

    torch.manual_seed(0)
    model = create_model("convnet3", len(CLASSES), image_size=SIDE, width=8).eval()
    save_teacher(
        path,
        model,
        arch="convnet3",
        arch_options={"width": 8},
        class_names=CLASSES,
        image_size=SIDE,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    return path


def command(data: Path, teacher: Path, out: Path, *extra: str) -> list[str]:
    """Arguments of `ddfast`."""
    return [
        *("distill", "infoutil", "--data", str(data), "--teacher", str(teacher), "--out", str(out)),
        *("--ipc", "2", "--factor", "2", "--workers", "1", "--no-preflight", "--resume", "--quiet", *extra),
    ]


# Running it in forked processes -----------------------------------------------------------------------------


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


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_write(number: int, when: str, victim: int = 0, action: Callable[[], None] = _die) -> Hook:
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


# The suite --------------------------------------------------------------------------------------------------


@dataclass
class Suite:
    """Inputs, the undisturbed result, and what every fault ended in."""

    work: Path
    draws: random.Random
    data: Path = field(init=False)
    teacher: Path = field(init=False)
    wanted: dict[str, str] = field(init=False)
    seconds: float = field(init=False)
    each: int | None = None
    results: list[tuple[str, str, str]] = field(default_factory=list)
    _writes: list[str] = field(default_factory=list)

    def some(self, faults: Sequence[T]) -> Sequence[T]:
        """All faults of a family, or as many of them, drawn at random, as were asked for of each."""
        if self.each is None or len(faults) <= self.each:
            return faults
        return self.draws.sample(list(faults), self.each)

    def __post_init__(self) -> None:
        from ddfast.pipeline import run

        run.SHARD_SOURCES = SHARD
        os.environ["DDFAST_THREADS"] = "1"
        self.work.mkdir(parents=True)
        self.data = render_set(self.work / "data")
        self.teacher = make_teacher(self.work / "teacher.safetensors")
        outcome = launch(self.command(self.work / "undisturbed"), hook=self._note_imports)
        if not outcome.done:
            raise SystemExit(f"the undisturbed run failed: {outcome.said}")
        self.wanted = digests(self.work / "undisturbed")
        self._import_as_noted()
        with self.folder() as out:
            started = time.monotonic()
            launch(self.command(out))
            self.seconds = time.monotonic() - started

    def _note_imports(self, rank: int) -> None:
        """Write what a run has imported by its last file to `modules`."""
        rename = os.replace

        def replace(source: Any, target: Any) -> None:
            rename(source, target)
            (self.work / "modules").write_text("\n".join(sys.modules))

        os.replace = replace  # type: ignore[assignment]

    def _import_as_noted(self) -> None:
        """Import the same here, so that the processes forked from this one start with it."""
        for name in (self.work / "modules").read_text().splitlines():
            if name.startswith(
                ("torchvision", "torch._dynamo", "torch.fx", "PIL.", "pyarrow", "ddfast.", "jinja2")
            ):
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)

    def command(self, out: Path, *extra: str, data: Path | None = None) -> list[str]:
        """The command over this suite's inputs."""
        return command(data or self.data, self.teacher, out, *extra)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """An output folder that goes when the fault is judged."""
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        yield out
        shutil.rmtree(out, ignore_errors=True)

    def judge(self, family: str, fault: str, out: Path, broken: Outcome | None, *, ranks: int = 1,
              data: Path | None = None, wanted: dict[str, str] | None = None) -> None:  # fmt: skip
        """Resume a broken run to its end and compare. The fault itself must have ended in success, in one clear line
        or, where a process was killed, in its death."""
        end = "same bytes"
        if broken is not None and (
            broken.hung or broken.tracebacks or any(c in (1, 70) for c in broken.codes)
        ):
            end = f"lost: {'hung' if broken.hung else 'no clear error'} {broken.codes} {broken.lines[:2]}"
        else:
            outcome = launch(self.command(out, data=data), ranks)
            if not outcome.done:
                end = f"lost: not resumed {outcome.codes} {outcome.lines[:2]}"
            else:
                found, expected = digests(out), wanted or self.wanted
                differ = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
                end = f"lost: {differ[:3]} differ" if differ else "same bytes"
                if end == "same bytes" and broken is not None and 2 in broken.codes:
                    end = "one clear error, then the same bytes"
        self.note(family, fault, end)

    def note(self, family: str, fault: str, end: str) -> None:
        """Keep a result; lost ones are printed."""
        self.results.append((family, fault, end))
        if end.startswith("lost"):
            print(f"{family}: {fault}: {end}", flush=True)

    def writes(self) -> list[str]:
        """Names of the files that the undisturbed run commits, in order."""
        if self._writes:
            return self._writes
        log = self.work / "writes"
        log.unlink(missing_ok=True)

        def hook(rank: int) -> None:
            rename = os.replace

            def replace(source: Any, target: Any) -> None:
                rename(source, target)
                with open(log, "a") as file:
                    file.write(f"{os.path.basename(target)}\n")

            os.replace = replace  # type: ignore[assignment]

        with self.folder() as out:
            launch(self.command(out), hook=hook)
        self._writes = log.read_text().splitlines()
        return self._writes


def kills_at_writes(suite: Suite) -> None:
    """SIGKILL around every file that a single process commits."""
    moments = product(enumerate(suite.writes()), ("before", "torn", "after"))
    for (number, name), when in suite.some(list(moments)):
        with suite.folder() as out:
            broken = launch(suite.command(out), hook=at_write(number, when))
            suite.judge("kill at a write", f"{when} write {number}, {name}", out, broken)


def kills_of_ranks(suite: Suite) -> None:
    """SIGKILL one of several ranks at a random moment or write; resume with another number of ranks."""
    for number in suite.some(range(36)):
        ranks, resumed = suite.draws.choice(((2, 1), (2, 3), (3, 1), (3, 2), (1, 3), (2, 2)))
        victim = suite.draws.randrange(ranks)
        with suite.folder() as out:
            if number % 2:
                moment = suite.draws.uniform(0.02, 1.2) * suite.seconds
                broken = launch(suite.command(out), ranks, kill_after=moment, kill_rank=victim)
                what = f"rank {victim} of {ranks} after {moment:.2f} s"
            else:
                write = suite.draws.randrange(1, 9)
                when = suite.draws.choice(("before", "torn", "after"))
                broken = launch(suite.command(out), ranks, at_write(write, when, victim))
                what = f"rank {victim} of {ranks} {when} its write {write}"
            suite.judge("kill of a rank", f"{what}, resumed by {resumed}", out, broken, ranks=resumed)


def changes_of_world_size(suite: Suite) -> None:
    """Score with n ranks, go on with m, and change again in the middle."""
    for ranks, then in suite.some(((1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2))):
        with suite.folder() as out:
            broken = launch(suite.command(out), ranks, at_write(3, "after"))
            again = launch(suite.command(out), then, at_write(2, "before", victim=then - 1))
            suite.judge("change of world size", f"{ranks} ranks, then {then}", out, broken, ranks=ranks)
            suite.note(
                "change of world size",
                f"{then} ranks, killed again",
                f"lost: hung {again.codes}" if again.hung else suite.results[-1][2],
            )


def full_disks(suite: Suite) -> None:
    """ENOSPC from every synced file on, file size limits, and small real file systems."""
    for number in suite.some(range(0, 2 * len(suite.writes()), 2)):
        with suite.folder() as out:
            broken = launch(suite.command(out), hook=full_at_sync(number))
            suite.judge("full disk", f"from sync {number} on", out, broken)
    for limit in suite.some((300, 700, 1500, 3000, 6000, 9000, 14000, 30000)):
        with suite.folder() as out:
            broken = launch(suite.command(out), hook=file_size_limit(limit))
            suite.judge("full disk", f"no file above {limit} bytes", out, broken)
    for kilobytes in suite.some((16, 32, 48, 64, 96, 128, 160, 192)):
        with suite.folder() as out:
            out.mkdir()
            mounted = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(out)], capture_output=True
            )
            if mounted.returncode:
                print("full disk: no tmpfs may be mounted here; the injected errors stand alone")
                return
            try:
                broken = launch(suite.command(out), suite.draws.choice((1, 2)))
                subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
                suite.judge("full disk", f"file system of {kilobytes} kB", out, broken)
            finally:
                subprocess.run(["umount", str(out)], check=True)


def damaged_shards(suite: Suite) -> None:
    """Truncate, flip, empty, swap or remove committed shards, label parts, images and tables; then resume."""
    scored = suite.work / "scored"
    launch([*suite.command(scored)], hook=at_write(len(suite.writes()) - 4, "before"))
    shards = sorted((scored / "scores").glob("part-*.parquet"))
    for number in suite.some(range(30)):
        with suite.folder() as out:
            shutil.copytree(scored, out)
            path = out / "scores" / suite.draws.choice(shards).name
            data = bytearray(path.read_bytes())
            kind = ("truncated", "bit flipped", "emptied", "swapped", "removed")[number % 5]
            if kind == "truncated":
                path.write_bytes(data[: suite.draws.randrange(len(data))])
            elif kind == "bit flipped":
                data[suite.draws.randrange(len(data))] ^= 1 << suite.draws.randrange(8)
                path.write_bytes(data)
            elif kind == "emptied":
                path.write_bytes(b"")
            elif kind == "swapped":
                shutil.copyfile(
                    suite.draws.choice([shard for shard in shards if shard.name != path.name]), path
                )
            else:
                path.unlink()
            ranks = suite.draws.choice((1, 2, 3))
            suite.judge("damaged shard", f"{kind} {path.name}, {ranks} ranks", out, None, ranks=ranks)
    for name in suite.some(("selection.parquet", "train/metadata.jsonl", "train/00001_down/000000.png")):
        with suite.folder() as out:
            shutil.copytree(scored, out)
            (out / name).write_bytes((out / name).read_bytes()[:-9])
            suite.judge("damaged shard", f"truncated {name}", out, None)


def corrupt_sources(suite: Suite) -> None:
    """Damage 5% of the image files; killed, resumed and shared runs must agree with an undisturbed one on them."""
    for number in suite.some(range(6)):
        data = suite.work / f"corrupt-{number}"
        shutil.copytree(suite.data, data)
        files = sorted((data / "train").rglob("*.png"))
        for path in suite.draws.sample(files, len(files) // 20):
            content = bytearray(path.read_bytes())
            kind = suite.draws.choice(("truncated", "bytes changed", "text", "empty"))
            if kind == "truncated":
                content = content[: suite.draws.randrange(len(content))]
            elif kind == "bytes changed":
                for _ in range(20):
                    content[suite.draws.randrange(len(content))] = suite.draws.randrange(256)
            path.write_bytes(b"" if kind == "empty" else b"no image" if kind == "text" else bytes(content))
        alone = suite.work / f"corrupt-{number}-alone"
        first = launch(suite.command(alone, data=data))
        if not first.done:
            suite.note("5% of the files corrupt", f"set {number}", f"lost: {first.codes} {first.lines[:2]}")
            continue
        wanted = digests(alone)
        bad = json.loads((alone / "manifest.json").read_text())["quarantined"]["count"]
        for ranks in suite.some((1, 2, 3)):
            with suite.folder() as out:
                broken = launch(
                    suite.command(out, data=data), ranks, at_write(suite.draws.randrange(2, 7), "before")
                )
                suite.judge(
                    "5% of the files corrupt",
                    f"set {number}, {bad} quarantined, {ranks} ranks, killed",
                    out,
                    broken,
                    ranks=suite.draws.choice((1, 2)),
                    data=data,
                    wanted=wanted,
                )
        shutil.rmtree(data)


def removed_data(suite: Suite) -> None:
    """Take away the data, a class or a file in the middle of a run; put it back and resume."""
    for number, what in suite.some(list(enumerate(("train", "train/down", "train/across", ".") * 3))):
        data = suite.work / "vanishing"
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(suite.data, data)
        away = suite.work / "away"
        place = data / what

        def vanish(place: Path = place, away: Path = away) -> None:
            os.rename(place, away)

        with suite.folder() as out:
            hook = at_write(2 + number // 4, "after", action=vanish)
            broken = launch(suite.command(out, data=data), suite.draws.choice((1, 2)), hook)
            if not away.exists():
                suite.note("removed data", what, f"lost: never removed {broken.codes} {broken.lines[:2]}")
                continue
            os.rename(away, place)
            suite.judge("removed data", f"{what} after write {2 + number // 4}", out, broken, data=data)


def cut_archives(suite: Suite) -> None:
    """Cut, grow or remove the archive that a run reads from; put it back and resume."""
    for number, (ending, what) in suite.some(
        list(enumerate(product(("zip", "tar"), ("cut", "grown", "removed"))))
    ):
        packed = Path(shutil.make_archive(os.fspath(suite.work / "packed"), ending, suite.data))
        kept = suite.work / "kept"
        shutil.copyfile(packed, kept)
        alone = suite.work / f"packed-{ending}-alone"
        if not alone.exists() and not launch(suite.command(alone, data=packed)).done:
            raise SystemExit(f"the undisturbed run from a {ending} failed")

        def spoil(packed: Path = packed, what: str = what) -> None:
            if what == "cut":
                os.truncate(packed, packed.stat().st_size // 2)
            elif what == "grown":
                with open(packed, "ab") as file:
                    file.write(bytes(1024))
            else:
                packed.unlink()

        with suite.folder() as out:
            hook = at_write(2 + number % 3, "after", action=spoil)
            broken = launch(suite.command(out, data=packed), suite.draws.choice((1, 2)), hook)
            shutil.copyfile(kept, packed)
            suite.judge(
                "archive changed", f"{ending} {what} after write {2 + number % 3}", out, broken, data=packed,
                wanted=digests(alone),
            )  # fmt: skip


def refusals(suite: Suite) -> None:
    """Swap loader, limits, teacher, data or seed between start and resumption: one line, nothing changed."""
    started = suite.work / "started"
    launch(suite.command(started), hook=at_write(5, "before"))
    other = suite.work / "other.safetensors"
    shutil.copyfile(suite.teacher, other)
    content = bytearray(other.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    more = suite.work / "more"
    shutil.copytree(suite.data, more)
    shutil.copyfile(more / "train/down/0000.png", more / "train/down/9999.png")
    swaps: list[tuple[str, list[str], Hook | None]] = [
        ("another loader", suite.command(started, "--loader", "pillow"), None),
        *([("DALI", suite.command(started, "--loader", "dali"), None)] if dali_missing() is None else []),
        ("another limit of pixels", suite.command(started), other_limit),
        ("another seed", suite.command(started, "--seed", "1"), None),
        ("another teacher", command(suite.data, other, started), None),
        ("another IPC", [*suite.command(started), "--ipc", "3"], None),
        ("a file more in the data", suite.command(started, data=more), None),
        ("another precision", suite.command(started, "--precision", "auto"), None),
        ("another image size", suite.command(started, "--image-size", "32"), None),
    ]
    for (what, arguments, hook), ranks in suite.some(list(product(swaps, (1, 2)))):
        outcome = launch(arguments, ranks, hook)
        clear = outcome.refused and not outcome.tracebacks
        end = "one clear error" if clear else f"lost: {outcome.codes} {outcome.lines[:2]}"
        suite.note("swap in the middle of a run", f"{what}, {ranks} ranks", end)
    with suite.folder() as out:
        shutil.copytree(started, out)
        suite.judge("swap in the middle of a run", "swapped back", out, None)
    for cut in suite.some((0, 1, 100, -2)):
        with suite.folder() as out:
            shutil.copytree(started, out)
            text = (out / "manifest.json").read_bytes()
            (out / "manifest.json").write_bytes(text[:cut])
            outcome = launch(suite.command(out))
            clear = outcome.refused and not outcome.tracebacks
            suite.note(
                "damaged manifest",
                f"cut at {cut}",
                "one clear error" if clear else f"lost: {outcome.codes} {outcome.lines[:2]}",
            )


def torchrun(suite: Suite) -> None:
    """The real torchrun: it restarts the ranks when one is killed, here by itself at a write."""
    for ranks, write in suite.some(((1, 3), (2, 2), (2, 4), (3, 2), (3, 3))):
        with suite.folder() as out:
            marker = suite.work / "died"
            marker.unlink(missing_ok=True)
            script = suite.work / "once.py"
            script.write_text(_DIES_ONCE.format(root=os.fspath(facts.CHECKOUT)))
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
                    *("--max-restarts", "2", "--standalone", str(script), str(marker), str(write)),
                    *suite.command(out),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                process.wait(timeout=PATIENCE)
                end = f"lost: exit code {process.returncode}, killed: {marker.exists()}"
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its ranks
                process.wait()
                end = "lost: hung"
            if process.returncode == 0 and marker.exists():
                end = "same bytes" if digests(out) == suite.wanted else "lost: other bytes"
            suite.note("torchrun restarts", f"rank 0 of {ranks} killed at its write {write}", end)


_DIES_ONCE = """
import os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from bench import faults
from ddfast.cli import main
from ddfast.methods import run
if __name__ == "__main__":
    run.SHARD_SOURCES = faults.SHARD
    marker, write = Path(sys.argv[1]), int(sys.argv[2])
    def die():
        marker.touch()
        faults._die()
    if not marker.exists():
        faults.at_write(write, "before", action=die)(int(os.environ["RANK"]))
    sys.exit(main(sys.argv[3:]))
"""

FAMILIES: dict[str, Callable[[Suite], None]] = {
    "writes": kills_at_writes,
    "ranks": kills_of_ranks,
    "world": changes_of_world_size,
    "disk": full_disks,
    "shards": damaged_shards,
    "sources": corrupt_sources,
    "data": removed_data,
    "archives": cut_archives,
    "swaps": refusals,
    "torchrun": torchrun,
}


def summary(results: Sequence[tuple[str, str, str]]) -> str:
    """Counts by family as a Markdown table."""
    families = list(dict.fromkeys(family for family, _, _ in results))
    ends = ("same bytes", "one clear error, then the same bytes", "one clear error", "lost")
    counts = Counter((family, end.partition(":")[0]) for family, _, end in results)
    lines = [f"| fault | injected | {' | '.join(ends)} |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for family in [*families, "all"]:
        row = [sum(counts[f, end] for f in (families if family == "all" else [family])) for end in ends]
        lines.append(f"| {family} | {sum(row)} | {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def _with_earlier(path: Path, results: Sequence[tuple[str, str, str]], commit: str) -> list[list[str]]:
    """Put results into the CSV in place of earlier ones of their families; returns all that it holds then."""
    new = {family for family, _, _ in results}
    kept: list[list[str]] = []
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            kept = [row for row in list(csv.reader(file))[1:] if row[0] not in new]
    rows = [*kept, *([*result, commit] for result in results)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("fault", "what", "end", "commit"), *rows])
    atomic_write_text(path, text.getvalue())
    return rows


def _write(path: Path, suite: Suite, seed: int) -> None:
    """The results so far, with those of families that did not run this time."""
    revision, dirty = facts.commit()
    rows = _with_earlier(
        path.with_suffix(".csv"), suite.results, f"{revision}{' with changes' if dirty else ''}"
    )
    atomic_write_text(path, page(rows, path.with_suffix(".csv").name, seed))


def page(rows: Sequence[Sequence[str]], by_name: str, seed: int) -> str:
    """The counts as a page; `rows` are those of the file `by_name`."""
    at: dict[str, list[str]] = {}
    for family, commit in dict.fromkeys((row[0], row[3]) for row in rows):
        at.setdefault(commit, []).append(family)
    software = ", ".join(f"{name} {version}" for name, version in facts.software().items())
    runs = [f"{commit}: {', '.join(of)}" for commit, of in at.items()]
    return (
        "# Faults\n\n"
        f"`python -m bench faults --seed {seed}`: three classes of 100 images, ConvNet-3 of width 8, shards of {SHARD} "
        "sources. Every fault has to end in the bytes of the undisturbed run, or in one clear line that says what to "
        "do; lost would be anything else: other bytes, a traceback, a hang. Every fault by name and end: "
        f"{by_name}.\n\n"
        f"{summary([(row[0], row[1], row[2]) for row in rows])}\n\n"
        f"{software}, CPU. Run at {'; '.join(runs)}.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(FAMILIES), help="families, with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of moments, victims and damage")
    parser.add_argument("--each", type=int, default=None, help="faults of each kind; default all")
    parser.add_argument("--work", type=Path, default=Path("runs/faults"))
    parser.add_argument("--results", type=Path, default=facts.RESULTS / "faults.md")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import ddfast.distillation  # noqa: F401 - imported here, so that every forked process has it

    shutil.rmtree(arguments.work, ignore_errors=True)
    suite = Suite(arguments.work, random.Random(arguments.seed), arguments.each)
    started = time.monotonic()
    for name in arguments.only.split(","):
        before = len(suite.results)
        FAMILIES[name](suite)
        ends = Counter(end.partition(":")[0] for _, _, end in suite.results[before:])
        print(f"{name}: {dict(ends)}, {time.monotonic() - started:.0f} s", flush=True)
        if arguments.each is None:
            _write(arguments.results, suite, arguments.seed)
    print(summary(suite.results))
    shutil.rmtree(arguments.work, ignore_errors=True)
    return 1 if any(end.startswith("lost") for _, _, end in suite.results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
