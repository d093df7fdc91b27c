"""Everything that needs a GPU, in one run of eight minutes: tests, rooflines, speed entries, score pass, profile.

    DDFAST_BUILD_EXT=0 pip install --no-build-isolation --no-deps --editable .
    python -m bench.gpu --out DIR

Every section runs in a process of its own with a limit on its time, so that neither a slow one nor one that crashes
the GPU's context takes the others with it. What a section measured is written when it ends: DIR holds `gpu.md` with
every table, a CSV for each kind of number, the plot and the logs, eight files in all.

`--device cpu --quick` runs every section at tiny sizes on the CPU, to try the path; its numbers mean nothing.
Without a GPU, and without that, it exits with 2.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import facts
from bench.measuring import seconds_of
from bench.op_cases import OpCase, op_cases
from bench.registry import GateFailed, Settings, clock, passed
from bench.results import plot, read_csv, summary
from ddfast.data.files import atomic_write_text, make_folder

MINUTES = 8.0
_RESERVE = 10.0  # seconds at the end, for the tables
_LEAST = 5.0  # seconds below which no section is started
_CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Section:
    """One part of the run.

    Attributes:
        name: of its heading and of its log.
        what: a sentence.
        limit: seconds after which it is killed.
        command: arguments behind the Python interpreter.
    """

    name: str
    what: str
    limit: float
    command: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a section ended: "done", or why not; its output, and the seconds it took."""

    section: Section
    ended: str
    output: str
    seconds: float


# The plan
# -----------------------------------------------------------------------------------------------------

# Speed entries in the order of their weight, with their limits in seconds.
_SPEED = {
    "masked_forward": 45,
    "captum": 60,
    "exact": 60,
    "grad_norm": 35,
    "convnet_forward": 30,
    "convnet_gradients": 30,
    "convnet_compiled": 60,
    "score_pass": 35,
    "grad_norm_opacus": 35,
    "ops": 50,
    "precision": 25,
}
# Tests whose bodies differ on a GPU.
_TESTED = ("tests/kernels", "tests/ops", "tests/attribution", "tests/gradients")


def sections(device: str, quick: bool, work: Path) -> list[Section]:
    """The whole plan, in order. The limits add up to more than the time there is: few sections come near theirs."""
    here = ("-m", "bench.gpu", "--device", device, "--out", str(work), *(("--quick",) if quick else ()))
    tested = ("tests/ops/test_philox.py",) if quick else _TESTED
    tests = ("-m", "pytest", *tested, "--continue-on-collection-errors", "-k", "cuda or philox")
    speed = ("--device", device, "--out", str(work / "speed"), *(("--quick",) if quick else ()))
    return [
        Section(
            "ceilings", "copy bandwidth and matrix rates of this device", 40, (*here, "--section", "ceilings")
        ),
        Section("tests", "the tests that run on a GPU", 120, tests),
        Section("roofline", "every op against the ceilings", 80, (*here, "--section", "roofline")),
        *(
            Section(name, f"speed entry {name}", limit, ("-m", "bench", name, *speed))
            for name, limit in _SPEED.items()
        ),
        Section(
            "profile", "one micro-batch of the score pass, by kernel", 40, (*here, "--section", "profile")
        ),
    ]


def run_sections(
    plan: Sequence[Section], deadline: float, finished: Callable[[Sequence[Outcome]], None]
) -> list[Outcome]:
    """Run the sections until the deadline of `time.monotonic`; `finished` is told all outcomes after each."""
    outcomes: list[Outcome] = []
    for section in plan:
        left = deadline - time.monotonic()
        if left < _LEAST:
            outcomes.append(Outcome(section, "not run: no time was left", "", 0.0))
        else:
            outcomes.append(run_section(section, min(section.limit, left)))
        print(f"{section.name}: {outcomes[-1].ended}, {outcomes[-1].seconds:.0f} s", flush=True)
        finished(outcomes)
    return outcomes


def run_section(section: Section, limit: float) -> Outcome:
    """Run one section in a process of its own, killed after `limit` seconds with what it had printed kept."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            code = subprocess.run(
                [sys.executable, *section.command],
                cwd=_CHECKOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            ).returncode
            ended = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        log.seek(0)
        output = log.read()
    return Outcome(section, ended, output, time.monotonic() - started)


# Ceilings
# -----------------------------------------------------------------------------------------------------

CEILING_COLUMNS = ("what", "rate", "unit")
# Name, dtype of the operands, and whether float32 products may be TF32.
_PRODUCTS = (
    ("bfloat16", torch.bfloat16, False),
    ("float16", torch.float16, False),
    ("tf32", torch.float32, True),
    ("float32", torch.float32, False),
)


def median_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call, by device events with the L2 cache flushed before each on a GPU."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=20, rep=80, return_mode="median") / 1e3
    run()
    return statistics.median(seconds_of(run, device) for _ in range(3))


def ceilings(settings: Settings) -> list[dict[str, str]]:
    """Measure the rates that the rooflines divide by, on random data: zeros run faster than data does."""
    device = settings.device
    elements = settings.size(1 << 24, quick=1 << 16, gpu=1 << 30)
    source = torch.randint(0, 256, (elements,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * elements / median_seconds(lambda: target.copy_(source), device)
    rows = [{"what": "copy", "rate": f"{copied:.4g}", "unit": "bytes a second, read and written"}]
    side = settings.size(1024, quick=64, gpu=8192)
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype, tf32 in _PRODUCTS:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        rate = 2 * side**3 / median_seconds(lambda a=a, b=b: a @ b, device)
        rows.append({"what": name, "rate": f"{rate:.4g}", "unit": "operations a second"})
    torch.backends.cuda.matmul.allow_tf32 = before
    return rows


# Rooflines
# -----------------------------------------------------------------------------------------------------

ROOFLINE_COLUMNS = (
    *("op", "case", "seconds", "bytes", "bytes_a_second", "operations", "operations_a_second"),
    *("limit", "limit_seconds", "share", "binds", "gate"),
)


def roofline(case: OpCase, rates: dict[str, float], device: torch.device) -> dict[str, str]:
    """One op against its limit: the larger of its bytes at copy speed and its operations at the matrix rate.

    A float32 product is three of TF32 in the kernels.
    """
    try:
        gate = passed(case.name, case.check())
    except GateFailed as error:
        return dict.fromkeys(ROOFLINE_COLUMNS, "") | {"op": case.op, "case": case.case, "gate": str(error)}
    seconds = median_seconds(case.ours, device)
    matrix = rates["tf32"] / 3 if case.matrix == "float32" else rates[case.matrix]
    limits = {"bytes": case.bytes / rates["copy"], "operations": case.operations / matrix}
    limit = max(limits, key=limits.__getitem__)
    return {
        "op": case.op,
        "case": case.case,
        "seconds": f"{seconds:.4g}",
        "bytes": str(case.bytes),
        "bytes_a_second": f"{case.bytes / seconds:.4g}",
        "operations": str(case.operations),
        "operations_a_second": f"{case.operations / seconds:.4g}",
        "limit": limit,
        "limit_seconds": f"{limits[limit]:.4g}",
        "share": f"{limits[limit] / seconds:.4g}",
        "binds": case.binds,
        "gate": gate,
    }


def rooflines(settings: Settings, work: Path) -> None:
    """Write roofline.csv, row by row, so that a limit on the time loses only what was not measured yet."""
    path = work / "ceilings.csv"
    if not path.exists():
        raise SystemExit("the ceilings were not measured, and a roofline needs them")
    rates = {row["what"]: float(row["rate"]) for row in _read(path)}
    rows = []
    for case in op_cases(settings):
        rows.append(roofline(case, rates, settings.device))
        write_rows(work / "roofline.csv", ROOFLINE_COLUMNS, rows)
        print(f"{case.name}: {rows[-1]['share'] or rows[-1]['gate']}", flush=True)


# Profile
# -----------------------------------------------------------------------------------------------------


def profiled(settings: Settings) -> str:
    """Table of one micro-batch of the score pass in `auto`, by the time of its kernels."""
    from torch.profiler import ProfilerActivity, profile

    from bench.score_pass import passes

    *_, scored = passes(settings)
    batch = scored.micro_batch(scored.found.images)
    scored.method.score(batch, scored.context)
    activities = [ProfilerActivity.CPU]
    if settings.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        scored.method.score(batch, scored.context)
        if settings.device.type == "cuda":
            torch.cuda.synchronize()
    by = "self_device_time_total" if settings.device.type == "cuda" else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=70)
    return f"{scored.case}, {scored.precision}\n{table}"


# Output
# -----------------------------------------------------------------------------------------------------


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    """Write a CSV with these columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    make_folder(path.parent)
    atomic_write_text(path, text.getvalue())


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def write_report(out: Path, work: Path, device: torch.device, outcomes: Sequence[Outcome]) -> None:
    """Write everything there is so far: gpu.md, the CSVs, the plot and the logs."""
    make_folder(out)
    parts = [
        f"{facts.device_name(device)}; "
        + ", ".join(f"{name} {version}" for name, version in facts.software().items())
        + f", Python {sys.version.split()[0]}; commit {facts.commit()[0]}; {clock()}\n",
        "| section | ended | seconds |\n| --- | --- | --- |\n"
        + "".join(f"| {each.section.name} | {each.ended} | {each.seconds:.0f} |\n" for each in outcomes),
    ]
    for name, table in (("ceilings", _ceiling_table), ("roofline", _roofline_table)):
        path = work / f"{name}.csv"
        if path.exists():
            rows = _read(path)
            parts.append(f"## {name.capitalize()}\n\n{table(rows)}")
            atomic_write_text(out / path.name, path.read_text("utf-8"))
    entries = [work / "speed" / f"{name}.csv" for name in _SPEED]
    rows = [row for path in entries if path.exists() for row in read_csv(path)]
    if rows:
        parts.append(f"## Speed\n\n{summary(rows)}")
        write_rows(out / "speed.csv", list(rows[0]), rows)
        plot(out / "speed.png", rows)
    tests = next((each for each in outcomes if each.section.name == "tests"), None)
    if tests is not None:
        last = next((line for line in reversed(tests.output.splitlines()) if line.strip()), "no output")
        parts.append(f"## Tests\n\n{last}\n")
        atomic_write_text(out / "tests.txt", tests.output)
    profile = next((each for each in outcomes if each.section.name == "profile"), None)
    if profile is not None:
        atomic_write_text(out / "profile.txt", profile.output)
    failures = [each for each in outcomes if each.ended != "done"]
    if failures:
        parts.append("## What did not end well\n\n" + "".join(map(_failure, failures)))
    atomic_write_text(out / "gpu.md", "\n".join(parts))
    atomic_write_text(
        out / "log.txt",
        "\n".join(f"== {each.section.name}: {each.ended}\n{each.output}" for each in outcomes),
    )


def _failure(outcome: Outcome) -> str:
    tail = "\n".join(outcome.output.splitlines()[-12:])
    return f"{outcome.section.name}: {outcome.ended}\n\n```\n{tail}\n```\n\n"


def _ceiling_table(rows: Sequence[dict[str, str]]) -> str:
    lines = [f"| {row['what']} | {float(row['rate']) / 1e12:.3g} T {row['unit']} |" for row in rows]
    return "\n".join(["| what | rate |", "| --- | --- |", *lines]) + "\n"


def _roofline_table(rows: Sequence[dict[str, str]]) -> str:
    lines = [
        "Share of the limit: what the op must move or compute, at the ceilings above, over the time it took.\n",
        "| op | microseconds | GB a second | T operations a second | limit | share | binds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if not row["seconds"]:
            lines.append(f"| {row['op']}, {row['case']} | {row['gate']} | | | | | |")
            continue
        operations = float(row["operations_a_second"]) / 1e12
        cells = [
            f"{row['op']}, {row['case']}",
            f"{float(row['seconds']) * 1e6:.1f}",
            f"{float(row['bytes_a_second']) / 1e9:.0f}",
            f"{operations:.3g}" if operations else "",
            row["limit"],
            f"{100 * float(row['share']):.0f} %",
            row["binds"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all sections, or inside of one of them its work. 2 without a GPU, 1 where a section did not end well."""
    parser = argparse.ArgumentParser(
        prog="ddfast bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (default %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu only with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries the path, measures nothing")
    parser.add_argument("--section", choices=("ceilings", "roofline", "profile"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("--device cpu only tries the path: add --quick")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "ddfast bench gpu: torch finds no CUDA device (--device cpu --quick tries the path without one)",
            file=sys.stderr,
        )
        return 2
    settings = Settings(torch.device(arguments.device), quick=arguments.quick)
    if arguments.section is not None:
        _inside(arguments.section, settings, arguments.out)
        return 0
    deadline = time.monotonic() + 60 * arguments.minutes - _RESERVE
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        outcomes = run_sections(
            sections(arguments.device, arguments.quick, work),
            deadline,
            lambda so_far: write_report(arguments.out, work, settings.device, so_far),
        )
    print((arguments.out / "gpu.md").read_text("utf-8"))
    return int(any(each.ended != "done" for each in outcomes))


def _inside(section: str, settings: Settings, work: Path) -> None:
    """The work of a section, in its own process."""
    if section == "ceilings":
        write_rows(work / "ceilings.csv", CEILING_COLUMNS, ceilings(settings))
    elif section == "roofline":
        rooflines(settings, work)
    else:
        print(profiled(settings))


if __name__ == "__main__":
    raise SystemExit(main())
