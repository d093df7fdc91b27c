"""`python -m bench NAME`: run one benchmark, study or trial, or `all` of the speed entries; without a name, list."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # before torch: its profiler reports a missing GPU as an error

import torch

from bench import facts
from bench.speed.registry import ENTRIES, Entry, GateFailed, Settings, Unavailable
from bench.speed.results import RESULTS, plot, read_csv, rows_of, summary, write_csv
from ddfast.errors import UsageError
from ddfast.files import atomic_write_text

SPEED_MODULES = (
    *("attribution", "norms", "convnet", "augmentation", "matching", "matching_in_training", "unrolled"),
    *("recorded", "recovery", "diffusion", "op_cases", "score_pass", "host_time"),
)


def load_entries() -> dict[str, Entry]:
    """The registered speed entries, by name in the order they run in."""
    modules = [importlib.import_module(f"bench.speed.{module}").__name__ for module in SPEED_MODULES]
    return {
        name: entry
        for module in modules
        for name, entry in ENTRIES.items()
        if entry.contests.__module__ == module
    }


def commands() -> dict[str, tuple[str, str]]:
    """The modules of all rooms with a `main`, by name: each one's dotted name, and the first line of what it does.

    They are what needs data, a teacher or a GPU, or measures no speed. Read, not imported.
    """
    found = {}
    here = Path(__file__).parent
    rooms = (here, here / "speed", here / "studies", here / "studies" / "estimators", here / "trials")
    for path in (path for room in rooms for path in sorted(room.glob("*.py"))):
        tree = ast.parse(path.read_text("utf-8"))
        if path.stem != "__main__" and any(
            isinstance(part, ast.FunctionDef) and part.name == "main" for part in tree.body
        ):
            what = (ast.get_docstring(tree) or "").partition("\n")[0].rstrip(".:")
            found[path.stem] = (".".join(path.relative_to(here.parent).with_suffix("").parts), what)
    studies = "Tables and figures of a paper, its numbers beside ours"
    return found | {"studies": ("bench.studies.__main__", studies)}


def main(argv: Sequence[str]) -> int:
    """Run the benchmark named first with the arguments behind it."""
    entries = load_entries()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m bench NAME [...]\n\nspeed, against peers (--help for options):")
        for entry in entries.values():
            print(f"  {entry.name:<18} {entry.what}")
        print(
            f"  {'all':<18} all of these, about {_minutes(entries.values()):.0f} minutes on two cores\n\nothers:"
        )
        for name, (_, what) in commands().items():
            print(f"  {name:<18} {what}")
        return 0
    name, rest = argv[0], argv[1:]
    if name in (known := commands()):
        return int(importlib.import_module(known[name][0]).main(rest))
    if name != "all" and name not in entries:
        names = ", ".join((*entries, "all", *known))
        print(f"python -m bench: unknown benchmark {name!r}; known: {names}", file=sys.stderr)
        return 2
    chosen = list(entries.values()) if name == "all" else [entries[name]]
    try:
        arguments = parse(rest, name)
        if len(chosen) > 1 and not arguments.quick:
            return max(_alone(entry, rest) for entry in chosen)
        return run(chosen, arguments)
    except UsageError as error:
        print(f"python -m bench {name}: {error}", file=sys.stderr)
        return 2


def _alone(entry: Entry, options: Sequence[str]) -> int:
    """Run an entry in a process of its own, which its peer shares; returns the exit code.

    An entry's ratio would else depend on those before it: `grad_norm` read 4.0 behind the others in one process, where
    its peer was faster, and 5.6 alone. Why was not looked into.
    """
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "bench", entry.name, *options]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}).returncode


def parse(argv: Sequence[str], name: str) -> argparse.Namespace:
    """Options of the speed entries."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds; default each entry's own")
    parser.add_argument("--threads", type=int, default=facts.usable_cores(), help="default all usable cores")
    parser.add_argument("--teacher", type=Path, default=None, help="a trained network; with --data")
    parser.add_argument("--data", default=None, help="its images, as for distill; the test split is used")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries the path, measures nothing")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the results, bench/results by default"
    )
    arguments = parser.parse_args(argv)
    if arguments.out is None:
        if arguments.quick:
            parser.error("--quick measures nothing, so it needs a folder of its own: give --out")
        arguments.out = RESULTS
    return arguments


def run(entries: Sequence[Entry], arguments: argparse.Namespace) -> int:
    """Run speed entries, write a CSV for each and the summary of all in the folder. 1 where a gate failed."""
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch finds no CUDA device")
    torch.set_num_threads(arguments.threads)
    settings = Settings(device, arguments.rounds, arguments.quick, arguments.teacher, arguments.data)
    cost = "seconds" if arguments.quick else f"about {_minutes(entries):.0f} minutes on two cores"
    print(
        f"{facts.device_name(device)}, {arguments.threads} threads; {cost}; results in {arguments.out}",
        flush=True,
    )
    failed = False
    for entry in entries:
        started = time.monotonic()
        print(f"{entry.name}: {entry.what}", flush=True)
        try:
            rows = rows_of(entry, entry.run(settings), device)
        except Unavailable as error:
            print(f"  not measured: {error}")
            continue
        except GateFailed as error:
            print(f"  {error}")
            failed = True
            continue
        write_csv(arguments.out / f"{entry.name}.csv", rows)
        for row in rows:
            print(f"  {_line(row)}")
        print(f"  {time.monotonic() - started:.0f} s", flush=True)
    write_summary(arguments.out, device.type)
    return int(failed)


def write_summary(folder: Path, device: str) -> None:
    """Write speed_<device>.md and .png from the CSVs of the folder, whenever they were measured."""
    files = [folder / f"{name}.csv" for name in load_entries()]
    rows = [row for path in files if path.exists() for row in read_csv(path) if row["device"] == device]
    if rows:
        atomic_write_text(folder / f"speed_{device}.md", summary(rows))
        plot(folder / f"speed_{device}.png", rows)


def _minutes(entries: Iterable[Entry]) -> float:
    return max(1.0, sum(entry.minutes for entry in entries))


def _line(row: dict[str, str]) -> str:
    """One row of a CSV for the terminal."""
    if row["share_p50"]:
        return f"{row['case']}, {row['contender']}: {100 * float(row['share_p50']):.2f} %"
    each = f"{1 / float(row['seconds_p50']):,.4g} {row['unit']} a second"
    if not row["ratio_p50"]:
        return f"{row['case']}, {row['contender']}: {each}"
    spread = " to ".join(f"{float(row[f'ratio_p{level}']):.3g}" for level in (20, 80))
    target = f", target {float(row['target_ratio']):g}" if row["target_ratio"] else ""
    met = {"true": " (met)", "false": " (missed)", "": ""}[row["met"]]
    return (
        f"{row['case']}, {row['contender']}: {float(row['ratio_p50']):.3g} times {row['peer']} ({spread}), {each}"
        f"{target}{met}"
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
