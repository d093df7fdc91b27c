"""Faults of every kind that a long run meets, and what each has to end in; `faults` runs them over methods."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from bench import facts
from bench.trials.kill import digests
from bench.trials.processes import (
    PATIENCE,
    Hook,
    Outcome,
    at_write,
    file_size_limit,
    full_at_sync,
    launch,
    other_limit,
)
from bench.trials.subjects import Subject, render_set
from ddfast.data.loaders import dali_missing

T = TypeVar("T")
Result = tuple[str, str, str, str]  # family of the method, fault, what was done, how it ended

SHARD = 64  # sources in a shard here, so that a small set has several


# Packages that a run imports, of which the processes here start with what an undisturbed run had.
_IMPORTED = ("torchvision", "torch._dynamo", "torch.fx", "PIL.", "pyarrow", "ddfast.", "jinja2", "diffusers")


def divided_finely() -> None:
    """Small sets have several shards, and every step of a synthesis is kept, so that a kill leaves something."""
    from ddfast.pipeline import plan, synthesize

    plan.SHARD_SOURCES = SHARD
    synthesize._SAVE_SECONDS = 0.0


@dataclass
class Suite:
    """A method of one family, its inputs, the undisturbed result, and what every fault ended in."""

    work: Path
    draws: random.Random
    family: str
    subject: Subject
    each: int | None = None
    data: Path = field(init=False)
    needs: list[str] = field(init=False)
    wanted: dict[str, str] = field(init=False)
    seconds: float = field(init=False)
    results: list[Result] = field(default_factory=list)
    _writes: list[tuple[str, int]] = field(default_factory=list)

    def some(self, faults: Sequence[T]) -> Sequence[T]:
        """All faults of a family, or as many of them, drawn at random, as were asked for of each."""
        if self.each is None or len(faults) <= self.each:
            return faults
        return self.draws.sample(list(faults), self.each)

    def __post_init__(self) -> None:
        divided_finely()
        os.environ["DDFAST_THREADS"] = "1"
        self.work.mkdir(parents=True)
        self.data = render_set(self.work / "data", self.subject.per_class)
        self.needs = self.subject.made(self.work, self.data)
        outcome = launch(self.command(self.work / "undisturbed"), hook=self._note_imports)
        if not outcome.done:
            raise SystemExit(f"the undisturbed run of {self.subject.method} failed: {outcome.said}")
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
            if name.startswith(_IMPORTED):
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)

    def command(
        self, out: Path, *extra: str, data: Path | None = None, needs: Sequence[str] | None = None
    ) -> list[str]:
        """The command over this suite's inputs."""
        return self.subject.command(data or self.data, out, self.needs if needs is None else needs, *extra)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """An output folder that goes when the fault is judged."""
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        yield out
        shutil.rmtree(out, ignore_errors=True)

    def judge(self, fault: str, what: str, out: Path, broken: Outcome | None, *, ranks: int = 1,
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
        self.note(fault, what, end)

    def note(self, fault: str, what: str, end: str) -> None:
        """Keep a result; lost ones are printed."""
        self.results.append((self.family, fault, what, end))
        if end.startswith("lost"):
            print(f"{self.family}: {fault}: {what}: {end}", flush=True)

    def writes(self) -> list[tuple[str, int]]:
        """Names and bytes of the files that the undisturbed run commits, in order."""
        if self._writes:
            return self._writes
        log = self.work / "writes"
        log.unlink(missing_ok=True)

        def hook(rank: int) -> None:
            rename = os.replace

            def replace(source: Any, target: Any) -> None:
                rename(source, target)
                with open(log, "a") as file:
                    file.write(f"{os.path.getsize(target)} {os.path.basename(target)}\n")

            os.replace = replace  # type: ignore[assignment]

        with self.folder() as out:
            launch(self.command(out), hook=hook)
        lines = (line.partition(" ") for line in log.read_text().splitlines())
        self._writes = [(name, int(size)) for size, _, name in lines]
        return self._writes

    def last_kept(self, name: str) -> int:
        """Place of the write behind those of half the states or shards: a run killed there has something to lose."""
        places = [place for place, (written, _) in enumerate(self.writes()) if written.startswith(name)]
        return places[len(places) // 2] + 1


def kills_at_writes(suite: Suite) -> None:
    """SIGKILL around every file that a single process commits."""
    moments = product(enumerate(suite.writes()), ("before", "torn", "after"))
    for (number, (name, _)), when in suite.some(list(moments)):
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


def several_ranks(suite: Suite) -> None:
    """No fault at all: 1, 2 and 3 ranks from the start to the end."""
    for ranks in (1, 2, 3):
        with suite.folder() as out:
            suite.judge("no fault, several ranks", f"{ranks} ranks", out, None, ranks=ranks)


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
                f"lost: hung {again.codes}" if again.hung else suite.results[-1][3],
            )


def full_disks(suite: Suite) -> None:
    """ENOSPC from every synced file on, file size limits, and small real file systems."""
    for number in suite.some(range(0, 2 * len(suite.writes()), 2)):
        with suite.folder() as out:
            broken = launch(suite.command(out), hook=full_at_sync(number))
            suite.judge("full disk", f"from sync {number} on", out, broken)
    sizes = sorted({size for _, size in suite.writes()})
    limits = sorted({sizes[len(sizes) * part // 8] - 1 for part in range(8)})
    for limit in suite.some(limits):
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


def damaged(content: bytes, kind: str, draws: random.Random, other: bytes) -> bytes | None:
    """A file's content after an accident of that kind; None where it is gone. `other` takes its place when swapped."""
    data = bytearray(content)
    if kind == "truncated":
        return bytes(data[: draws.randrange(len(data))])
    if kind == "bit flipped":
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    return {"emptied": b"", "swapped": other, "removed": None}.get(kind, bytes(data))


def damaged_files(suite: Suite) -> None:
    """Truncate, flip, empty, swap or remove what a killed run has kept, shards or states, and files of its end."""
    kept, pattern = ("scores", "part-*.parquet") if suite.subject.scores else ("state", "group-*.safetensors")
    half = suite.work / "half"
    launch([*suite.command(half)], hook=at_write(suite.last_kept(pattern.partition("*")[0]), "before"))
    files = sorted((half / kept).glob(pattern))
    for number in suite.some(range(30)):
        with suite.folder() as out:
            shutil.copytree(half, out)
            path = out / kept / suite.draws.choice(files).name
            kind = ("truncated", "bit flipped", "emptied", "swapped", "removed")[number % 5]
            other = suite.draws.choice([each for each in files if each.name != path.name] or files)
            content = damaged(path.read_bytes(), kind, suite.draws, other.read_bytes())
            path.unlink() if content is None else path.write_bytes(content)
            ranks = suite.draws.choice((1, 2, 3))
            suite.judge(f"damaged {kept}", f"{kind} {path.name}, {ranks} ranks", out, None, ranks=ranks)
    ended = suite.work / "ended"  # all but the manifest and the report
    launch([*suite.command(ended)], hook=at_write(len(suite.writes()) - 4, "before"))
    found = ("selection.parquet", "pixels.safetensors", "curve.parquet", "train/metadata.jsonl", "before.png")
    names = [name for name in (*found, "train/00001_down/000000.png") if (ended / name).is_file()]
    for name in suite.some(names):
        with suite.folder() as out:
            shutil.copytree(ended, out)
            (out / name).write_bytes((out / name).read_bytes()[:-9])
            suite.judge("damaged output", f"truncated {name}", out, None)


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
        told = json.loads((alone / "manifest.json").read_text())["quarantined"]
        bad = "files" if told is None else told["count"]  # a synthesis leaves them out, and does not count
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
            hook = at_write(2 + number // 4, "after", action=vanish)  # the manifest is written twice before
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
    more = suite.work / "more"
    shutil.copytree(suite.data, more)
    shutil.copyfile(more / "train/down/0000.png", more / "train/down/9999.png")
    swaps: list[tuple[str, list[str], Hook | None]] = [
        ("another loader", suite.command(started, "--loader", "pillow"), None),
        *([("DALI", suite.command(started, "--loader", "dali"), None)] if dali_missing() is None else []),
        ("another limit of pixels", suite.command(started), other_limit),
        ("another seed", suite.command(started, "--seed", "1"), None),
        *(
            (f"another {name[2:]}", suite.command(started, needs=needs), None)
            for name, needs in _others(suite)
        ),
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


def _others(suite: Suite) -> Iterator[tuple[str, list[str]]]:
    """For each file that the method needs the options with another one in its place: a bit of it is flipped."""
    for place in range(0, len(suite.needs), 2):
        name, path = suite.needs[place], Path(suite.needs[place + 1])
        if path.is_file():
            other = suite.work / f"other{path.suffix}-{place}{path.suffix}"
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            other.write_bytes(content)
            yield name, [*suite.needs[: place + 1], str(other), *suite.needs[place + 2 :]]


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
from bench.trials.fault_kinds import divided_finely
from bench.trials.processes import at_write, die
from ddfast.cli import main
if __name__ == "__main__":
    divided_finely()
    marker, write = Path(sys.argv[1]), int(sys.argv[2])
    def end():
        marker.touch()
        die()
    if not marker.exists():
        at_write(write, "before", action=end)(int(os.environ["RANK"]))
    sys.exit(main(sys.argv[3:]))
"""

KINDS: dict[str, Callable[[Suite], None]] = {
    "writes": kills_at_writes,
    "equal": several_ranks,
    "ranks": kills_of_ranks,
    "world": changes_of_world_size,
    "disk": full_disks,
    "files": damaged_files,
    "sources": corrupt_sources,
    "data": removed_data,
    "archives": cut_archives,
    "swaps": refusals,
    "torchrun": torchrun,
}
