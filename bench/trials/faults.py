"""Break a distillation in every way that a long run breaks, and look at what is left.

    python -m bench faults [--methods selection,matching,trajectory,diffusion] [--only writes,disk] [--seed 0]

One method of each family, infoutil, dm, mtt and igds, runs on a small rendered set. Every injected fault has to end in
the bytes of the undisturbed run, after a resumption where one is needed, or in one clear line that says what to do.
Writes bench/results/faults.csv, in which a kind of fault of a family takes the place of its earlier results, and the
counts by family to faults.md; exits with 1 where a fault was lost: other bytes, a traceback, a hang.

Processes are forked from this one, which has imported everything, and find each other as under torchrun; the kind
`torchrun` uses the real one.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench import facts
from bench.studies.tables import write_rows
from bench.trials.fault_kinds import KINDS, SHARD, Result, Suite
from bench.trials.subjects import SUBJECTS
from ddfast.files import atomic_write_text

COLUMNS = ("family", "fault", "what", "end", "commit")
ENDS = ("same bytes", "one clear error, then the same bytes", "one clear error", "lost")


def summary(results: Sequence[Sequence[str]]) -> str:
    """Counts by family and fault as a Markdown table; a result begins with family, fault, what was done and its end."""
    counts = Counter((row[0], row[1], row[3].partition(":")[0]) for row in results)
    lines = [
        f"| method | fault | injected | {' | '.join(ENDS)} |",
        "| --- | --- |" + " ---: |" * (len(ENDS) + 1),
    ]
    kinds = list(dict.fromkeys((row[0], row[1]) for row in results))
    families = list(dict.fromkeys(family for family, _ in kinds))
    for family in families:
        of_family = [kind for kind in kinds if kind[0] == family]
        lines += [_line(family, fault, [(family, fault)], counts) for _, fault in of_family]
        lines.append(_line(family, "all", of_family, counts))
    return "\n".join([*lines, _line("all", "all", kinds, counts)])


def _line(
    family: str, fault: str, kinds: Sequence[tuple[str, str]], counts: Counter[tuple[str, str, str]]
) -> str:
    row = [sum(counts[of, injected, end] for of, injected in kinds) for end in ENDS]
    told = f"{family} ({SUBJECTS[family].method})" if family in SUBJECTS else family
    return f"| {told} | {fault} | {sum(row)} | {' | '.join(map(str, row))} |"


def with_earlier(path: Path, results: Sequence[Result], commit: str) -> list[list[str]]:
    """Put results into the CSV in place of earlier ones of their family and kind; returns all that it holds then."""
    new = {row[:2] for row in results}
    kept: list[list[str]] = []
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            columns, *earlier = list(csv.reader(file))
        if "family" not in columns:  # of the time when all faults were of the selection
            earlier = [["selection", *row] for row in earlier]
        kept = [row for row in earlier if (row[0], row[1]) not in new]
    rows = [*kept, *([*result, commit] for result in results)]
    write_rows(path, COLUMNS, rows)
    return rows


def page(rows: Sequence[Sequence[str]], by_name: str, argv: Sequence[str]) -> str:
    """The counts as a page; `rows` are those of the file `by_name`."""
    at: dict[str, dict[str, list[str]]] = {}
    for family, fault, commit in dict.fromkeys((row[0], row[1], row[4]) for row in rows):
        at.setdefault(commit, {}).setdefault(family, []).append(fault)
    software = ", ".join(f"{name} {version}" for name, version in facts.software().items())
    runs = [
        f"- {commit}: " + "; ".join(f"{family}: {', '.join(faults)}" for family, faults in of.items())
        for commit, of in at.items()
    ]
    sizes = ", ".join(f"{name} ({one.method}) {one.per_class}" for name, one in SUBJECTS.items())
    return (
        f"# Faults\n\nMade by `python -m bench {' '.join(['faults', *argv])}`.\n\n"
        f"Three classes of 16 px, images of each: {sizes}; networks of width 8 or ConvNet-3 with InstanceNorm, shards "
        f"of {SHARD} sources, every step kept. Every fault has to end in the bytes of the undisturbed run, or in one "
        "clear line that says what to do; lost would be anything else: other bytes, a traceback, a hang. Every fault "
        f"by name and end: {by_name}.\n\n{summary(rows)}\n\n{software}, CPU. Run at commit:\n\n"
        + "\n".join([*runs, ""])
    )


def _write(path: Path, results: Sequence[Result], argv: Sequence[str]) -> None:
    """The results so far, with those of kinds that did not run this time."""
    revision, dirty = facts.commit()
    table = path.with_suffix(".csv")
    rows = with_earlier(table, results, f"{revision}{' with changes' if dirty else ''}")
    atomic_write_text(path, page(rows, table.name, argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(SUBJECTS), help="families, with commas between")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of faults, with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of moments, victims and damage")
    parser.add_argument(
        "--each", type=int, default=None, help="faults of each kind, writes nothing; default all"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/faults"))
    parser.add_argument(
        "--results", type=Path, default=None, help="page; default that of bench/results, and with --each none"
    )
    arguments = parser.parse_args(argv)
    words = list(sys.argv[1:] if argv is None else argv)
    families, kinds = arguments.methods.split(","), arguments.only.split(",")
    for given, known in ((families, SUBJECTS), (kinds, KINDS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import ddfast.distillation  # noqa: F401 - imported here, so that every forked process has it

    shutil.rmtree(arguments.work, ignore_errors=True)
    results_page = arguments.results
    if results_page is None and arguments.each is None:
        results_page = facts.RESULTS / "faults.md"
    results: list[Result] = []
    started = time.monotonic()
    for family in families:
        draws = random.Random(arguments.seed)
        suite = Suite(arguments.work / family, draws, family, SUBJECTS[family], arguments.each)
        for name in kinds:
            before = len(suite.results)
            KINDS[name](suite)
            ends = Counter(row[3].partition(":")[0] for row in suite.results[before:])
            print(f"{family}, {name}: {dict(ends)}, {time.monotonic() - started:.0f} s", flush=True)
            if results_page is not None:
                _write(results_page, suite.results, words)
        results += suite.results
        shutil.rmtree(suite.work, ignore_errors=True)
    print(summary(results))
    shutil.rmtree(arguments.work, ignore_errors=True)
    return 1 if any(row[3].startswith("lost") for row in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
