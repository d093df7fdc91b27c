"""Feed damaged files to everything that ddfast reads, and count what becomes of them.

    python -m bench fuzz --count 10000 --out bench/results/fuzz.md

COUNT damaged images (JPEG, PNG, GIF, BMP, WebP, TIFF, PPM), each through every loader that is installed, and a
twenty-fifth of COUNT of each other kind: archives, manifests, metadata, soft labels, score tables, remembered
listings, teachers; and of what methods that make pixels keep: pixels, states, curves, proxies, experts, priors. A case
is drawn from its kind, its number and the seed alone, so `--case jpeg:17` repeats one. It runs in a worker process with
a limit on time and memory. Outcomes:

    read       an image, a source or a table came out
    refused    one clear line: UsageError (BadImage among them)
    crash      the process died
    hang       the time limit passed
    other      another exception, more than one line, or loaders that disagree on whether there is an image

Exits with 1 where the last three are not all zero.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench import facts
from bench.trials import made_files

OUTCOMES = ("read", "refused", "crash", "hang", "other")
MEMORY = 6 << 30  # address space above what the libraries take, in bytes
_OF_ALL = (
    "zip",
    "tar",
    "shards",
    "listing",
    "labels",
    "teacher",
    "state dict",
)  # kinds that any method may read
SHARE = 25  # one case of each other kind to so many images

Case = tuple[str, int]


def cases(count: int) -> list[Case]:
    """Every case: its kind and its number within it."""
    from bench.trials.mutation import FILES, FORMATS

    each = -(-count // len(FORMATS))
    images = [(kind, number) for kind in FORMATS for number in range(each)]
    return images + [(kind, number) for kind in FILES for number in range(max(1, count // SHARE))]


def draws_of(case: Case, seed: int) -> random.Random:
    """What decides a case."""
    digest = hashlib.blake2b(f"{seed}/{case[0]}/{case[1]}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))


def damaged(case: Case, seed: int) -> bytes:
    """The damaged file of a case; number -1 - n is the nth whole file."""
    from bench.trials.mutation import FORMATS, mutated, whole_files, whole_images

    wholes = whole_images(case[0]) if case[0] in FORMATS else whole_files(case[0])
    if case[1] < 0:
        return wholes[-1 - case[1]]
    return mutated(case[0], wholes, draws_of(case, seed))


# In the worker ----------------------------------------------------------------------------------------------


def tried(case: Case, seed: int, folder: Path) -> tuple[str, str]:
    """Outcome of a case and what was said."""
    from ddfast.errors import UsageError

    try:
        return "read", read(case, seed, folder)
    except UsageError as error:
        text = str(error)
        return ("refused", text) if text and "\n" not in text else ("other", f"not one line: {text!r}")
    except BaseException as error:
        return "other", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def read(case: Case, seed: int, folder: Path) -> str:
    """Read the damaged file of a case; returns what came out in a few words."""
    from bench.trials.mutation import FORMATS

    if case[0] == "listing":
        return _read_listing(case, seed, folder)
    kind, data = case[0], damaged(case, seed)
    if kind in FORMATS:
        return _read_image(kind, data)
    if kind in ("zip", "tar", "shards"):
        from ddfast.data import load_all, open_source

        path = folder / f"set.{'zip' if kind == 'zip' else 'tar'}"
        path.write_bytes(data)
        with open_source(path) as source:
            source.fingerprint()
            images, _, bad = load_all(source, 16, workers=0)
        return f"{len(images)} images, {len(bad)} bad"
    if kind in made_files.KINDS:
        return made_files.read_damaged(kind, data, folder)
    if kind == "labels":
        return _read_labels(data, folder)
    if kind in ("manifest", "metadata", "soft labels"):
        return _read_distilled(kind, data, folder)
    if kind == "scores":
        from ddfast.output.table import read_table, to_numpy

        (folder / "x.parquet").write_bytes(data)
        return f"{len(to_numpy(read_table(folder / 'x.parquet')))} columns"
    from ddfast.models import load_teacher

    path = folder / ("t.safetensors" if kind == "teacher" else "t.pt")
    path.write_bytes(data)
    said: dict[str, Any] = (
        {"arch": "convnet3", "class_names": ["a", "b"], "image_size": 16} if kind != "teacher" else {}
    )
    return load_teacher(path, **said).arch


def _loaders() -> list[str]:
    """The loaders that a CPU has."""
    from ddfast.data.loaders import LOADERS, dali_missing

    missing = {"dali-hw"} if dali_missing() is None else {"dali", "dali-hw"}
    return [name for name in LOADERS[1:] if name not in missing]


def _read_image(kind: str, data: bytes) -> str:
    """Through every loader; they must agree on whether there is an image."""
    from bench.trials.mutation import FORMATS
    from ddfast.data.loaders import resolve_loader
    from ddfast.data.samples import Sample
    from ddfast.data.sources import Source
    from ddfast.errors import BadImage

    class OneFile(Source):
        """A source of one file."""

        def read(self, sample: Sample) -> bytes:
            """The file."""
            return data

        def size_of(self, sample: Sample) -> int:
            """Its size."""
            return len(data)

        def close(self) -> None:
            """Nothing is open."""

    source = OneFile("one", "train", ["a"], [(f"a/0.{FORMATS[kind]}", 0)])
    found = {}
    for name in _loaders():
        ((_, found[name]),) = resolve_loader(name)(source, source.samples, 32, workers=0)
    images = {name for name, image in found.items() if not isinstance(image, BadImage)}
    if images and images != set(found):
        raise AssertionError(f"only {sorted(images)} gave an image; Pillow says {found['pillow']}")
    pillow = found["pillow"]
    if isinstance(pillow, BadImage):
        raise pillow
    return "an image"


def _read_distilled(kind: str, data: bytes, folder: Path) -> str:
    from bench.trials.mutation import write_distilled
    from ddfast.output import DistilledSet
    from ddfast.pipeline.plan import read_plan

    root = write_distilled(folder / "out")
    name = {
        "manifest": "manifest.json",
        "metadata": "train/metadata.jsonl",
        "soft labels": "soft_labels.safetensors",
    }
    (root / name[kind]).write_bytes(data)
    opened = DistilledSet(root)
    for index in range(len(opened)):
        opened[index]
    read_plan(root)
    return f"{len(opened)} images"


def _read_labels(data: bytes, folder: Path) -> str:
    """The metadata file of a folder of images, as CSV where it does not start like JSON."""
    from bench.trials.mutation import whole_images
    from ddfast.data import load_all, open_source

    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(whole_images("jpeg")[0])
    (folder / ("metadata.jsonl" if data[:1] == b"{" else "metadata.csv")).write_bytes(data)
    with open_source(folder) as source:
        source.fingerprint()
        images, _, bad = load_all(source, 16, workers=0)
    return f"{len(images)} images, {len(bad)} bad"


def _read_listing(case: Case, seed: int, folder: Path) -> str:
    """A damaged listing costs a new one. Damage under right checksums, which no accident makes, may be believed."""
    from bench.trials.mutation import mutated, mutated_member, write_listing
    from ddfast.data import load_all, open_source

    path, draws = write_listing(folder), draws_of(case, seed)
    whole, right = path.read_bytes(), case[1] % 2 == 1
    if case[1] >= 0:
        path.write_bytes(mutated_member(whole, draws) if right else mutated("listing", (whole,), draws))
    with open_source(folder / "set") as source:
        images, _, bad = load_all(source, 16, workers=0)
    if not right and (len(images), len(bad)) != (4, 0):
        raise AssertionError(f"{len(images)} images and {len(bad)} bad files, wanted 4 and 0")
    return f"{len(images)} images, {len(bad)} bad"


def check_wholes(seed: int) -> None:
    """Read a whole file of each kind. Raises `SystemExit` where one is refused: the counts would say nothing."""
    from bench.trials.mutation import FILES, FORMATS

    for kind in (*FORMATS, *FILES):
        with tempfile.TemporaryDirectory() as folder:
            outcome, text = tried((kind, -2 if kind == "listing" else -1), seed, Path(folder))
        if outcome != "read":
            raise SystemExit(f"an undamaged {kind} is not read: {text}")


def work(connection: Connection, seed: int) -> None:
    """Answer cases until the other end closes."""
    import torch

    torch.set_num_threads(1)
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, 2)  # libjpeg and DALI report damage on the terminal
    check_wholes(seed)  # which also loads every library before memory is limited
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
    connection.send("ready")
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        with tempfile.TemporaryDirectory() as folder:
            connection.send(tried(case, seed, Path(folder)))


# The other side ---------------------------------------------------------------------------------------------


class Worker:
    """A worker process that is replaced when a case ends it."""

    def __init__(self, seed: int, limit: float) -> None:
        self.seed, self.limit = seed, limit
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, self.seed), daemon=True)
        self.process.start()
        other.close()
        if self.connection.recv() != "ready":
            raise RuntimeError("the worker does not start")

    def run(self, case: Case) -> tuple[str, str]:
        """Outcome of a case."""
        self.connection.send(case)
        if self.connection.poll(self.limit):
            try:
                return self.connection.recv()
            except EOFError:
                self.process.join()
                outcome = "crash", f"exit code {self.process.exitcode}"
        else:
            outcome = "hang", f"more than {self.limit:.0f} s"
        self.close()
        self._start()
        return outcome

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.kill()
        self.process.join()


def run_all(wanted: Sequence[Case], seed: int, limit: float, workers: int) -> dict[Case, tuple[str, str]]:
    """Outcome of every case; which worker had it does not matter."""
    waiting: Iterator[Case] = iter(wanted)
    lock, found = threading.Lock(), {}
    started = time.monotonic()

    def drain() -> None:
        worker = Worker(seed, limit)
        while True:
            with lock:
                case = next(waiting, None)
            if case is None:
                worker.close()
                return
            outcome = worker.run(case)
            with lock:
                found[case] = outcome
                if len(found) % 1000 == 0:
                    print(
                        f"{len(found)} of {len(wanted)}, {time.monotonic() - started:.0f} s", file=sys.stderr
                    )

    threads = [threading.Thread(target=drain) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def family_of(kind: str) -> str:
    """The family of methods that reads a kind of file: every one has images and archives."""
    from bench.trials.mutation import FORMATS

    if kind in made_files.KINDS:
        return made_files.KINDS[kind].family
    return "all methods" if kind in (*FORMATS, *_OF_ALL) else "selection"


def report(found: dict[Case, tuple[str, str]], seed: int, argv: Sequence[str] = ()) -> str:
    """The counts as a page."""
    counts: dict[str, Counter[str]] = {}
    families: dict[str, Counter[str]] = {}
    for (kind, _), (outcome, _) in found.items():
        counts.setdefault(kind, Counter())[outcome] += 1
        families.setdefault(family_of(kind), Counter())[outcome] += 1
    loaders = _loaders()
    lines = [
        "# Damaged files",
        "",
        f"Made by `python -m bench {' '.join(['fuzz', *argv])}`.",
        "",
        f"Seed {seed}: {len(found)} damaged files (bit flips, truncations, splices, header",
        "fields, random, inserted, deleted and repeated chunks; checksums of PNG and tar mostly made to fit again).",
        f"Images go through every loader: {', '.join(loaders)}. Read: something came out. Refused: one clear line.",
        "Other: another exception, several lines, or loaders that disagree on whether there is an image.",
        "",
        f"Pillow {facts.version('pillow')}, torchvision {facts.version('torchvision')}, "
        f"pyarrow {facts.version('pyarrow')}, safetensors {facts.version('safetensors')}; commit {facts.commit()[0]}.",
        "",
        *_counted("kind", {**counts, "all": sum(counts.values(), Counter())}),
        "",
        *_counted("read by", families),
    ]
    wrong = [(case, told) for case, told in sorted(found.items()) if told[0] not in ("read", "refused")]
    if wrong:
        lines += ["", "To repeat one: `python -m bench fuzz --case KIND:NUMBER`.", ""]
        lines += [f"- {kind}:{number}: {outcome}, {text}" for (kind, number), (outcome, text) in wrong]
    return "\n".join(lines) + "\n"


def _counted(head: str, counts: dict[str, Counter[str]]) -> list[str]:
    """A table of outcomes."""
    lines = [
        f"| {head} | files | {' | '.join(OUTCOMES)} |",
        f"| --- | --- | {' | '.join('---' for _ in OUTCOMES)} |",
    ]
    for name, counter in counts.items():
        cells = " | ".join(str(counter[outcome]) for outcome in OUTCOMES)
        lines.append(f"| {name} | {sum(counter.values())} | {cells} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases and write the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="damaged images; of each other kind a 25th")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds a case")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--kinds", nargs="+", help="only these")
    parser.add_argument("--case", help="KIND:NUMBER: run this one here, with its traceback")
    parser.add_argument("--out", type=Path, help="write the page here")
    arguments = parser.parse_args(argv)
    if arguments.case is not None:
        kind, _, number = arguments.case.rpartition(":")
        folder = Path(tempfile.mkdtemp())
        print(read((kind, int(number)), arguments.seed, folder))
        shutil.rmtree(folder)
        return 0
    wanted = [
        case for case in cases(arguments.count) if arguments.kinds is None or case[0] in arguments.kinds
    ]
    check_wholes(arguments.seed)
    found = run_all(wanted, arguments.seed, arguments.limit, arguments.workers)
    page = report(found, arguments.seed, sys.argv[1:] if argv is None else argv)
    print(page)
    if arguments.out is not None:
        from ddfast.files import atomic_write_text

        atomic_write_text(arguments.out, page)
    return int(any(outcome not in ("read", "refused") for outcome, _ in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
