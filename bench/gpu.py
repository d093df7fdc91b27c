"""Everything that needs a GPU, in one run of eight minutes: budget of the score pass, tests, rooflines, speed, profile.

    DDFAST_BUILD_EXT=0 pip install --no-build-isolation --no-deps --editable .
    python -m bench.gpu --out DIR

Every section runs in a process of its own with a limit on its time, so that neither a slow one nor one that crashes
the GPU's context takes the others with it. The first sections fit into the time even where each comes to its limit;
the others take what is left. What a section measured is written when it ends: DIR holds `gpu.md` with every table, a
CSV for each kind of number, the plot and the logs, nine files in all.

`gpu.md` begins with the budget of the score pass: what each part of a micro-batch costs the host and the device, what
waited, and which of the two, or decoding, binds (`bench.speed.budget`).

`--device cpu --quick` runs every section at tiny sizes on the CPU, to try the path; its numbers mean nothing.
Without a GPU, and without that, it exits with 2.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import facts
from bench.speed import budget
from bench.speed.measuring import seconds_of
from bench.speed.op_cases import OpCase, op_cases
from bench.speed.registry import GateFailed, Settings, clock, passed
from bench.speed.results import plot, read_csv, summary
from ddfast.files import atomic_write_text, make_folder

MINUTES = 8.0
_RESERVE = 10.0  # seconds at the end, for the tables
_LEAST = 5.0  # seconds below which no section is started
_CHECKOUT = facts.CHECKOUT


@dataclass(frozen=True)
class Section:
    """One part of the run.

    Attributes:
        name: of its heading and of its log.
        what: a sentence.
        limit: seconds after which it is killed.
        command: arguments behind the Python interpreter.
        open_ended: does as much as its limit allows, so that coming to it is no fault.
        environment: variables of its process beside those of this one.
    """

    name: str
    what: str
    limit: float
    command: tuple[str, ...]
    open_ended: bool = False
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a section ended: "done", or why not; its output, and the seconds it took."""

    section: Section
    ended: str
    output: str
    seconds: float

    @property
    def well(self) -> bool:
        """Whether it did what it was meant to."""
        return self.ended == "done" or (self.section.open_ended and self.ended.startswith("stopped"))


# The plan
# -----------------------------------------------------------------------------------------------------

# Speed entries with their limits in seconds: those that have their time for certain, and those that take what is left,
# in the order of their weight.
_SPEED_FIRST = {"score_pass": 35, "masked_forward": 40, "grad_norm": 35}
_SPEED_LEFT = {
    "ops": 50,
    "captum": 50,
    "exact": 50,
    "convnet_forward": 30,
    "convnet_gradients": 30,
    "convnet_compiled": 50,
    "siamese_augment": 20,
    "dm_real_side": 20,
    "dm_iteration": 40,
    "dm_cmi_iteration": 60,
    "dsa_iteration": 60,
    "idc_step": 60,
    "idm_iteration": 60,
    "mtt_iteration": 60,
    "sre2l_step": 30,
    "igds_step": 30,
    "unrolled_gradient": 30,
    "recorded_steps": 60,
    "directional": 30,
    "grad_norm_opacus": 30,
    "precision": 25,
    "host_time": 30,
    "launchers": 20,
    "convnet_training": 20,
    "convnet_eval": 20,
}
_ON_HOST = ("host_time", "launchers")  # entries that measure the CPU on every machine
# Tests whose bodies differ on a GPU.
_TESTED = (
    "tests/test_philox.py",
    "tests/kernels",
    "tests/ops",
    "tests/masked_forward",
    "tests/attribution",
    "tests/gradients",
)
_SANITIZED = ("tests/kernels", "tests/ops")


def sections(device: str, quick: bool, work: Path) -> list[Section]:
    """The whole plan, in order.

    The limits of all sections before `ops` fit into the time there is; few sections come near theirs.
    """
    own = ("--device", device, "--out", str(work), *(("--quick",) if quick else ()))
    tested = ("tests/test_philox.py",) if quick else _TESTED
    tests = ("-m", "pytest", *tested, "--continue-on-collection-errors", "-k", "cuda or philox")

    def inside(name: str, what: str, limit: float) -> Section:
        return Section(name, what, limit, ("-m", "bench.gpu", *own, "--section", name))

    def speed(name: str, limit: float) -> Section:
        where = ("--device", "cpu" if name in _ON_HOST else device, "--out", str(work / "speed"))
        command = ("-m", "bench", name, *where, *(("--quick", "--threads", "1") if quick else ()))
        return Section(name, f"speed entry {name}", limit, command)

    return [
        inside("ceilings", "copy bandwidth and matrix rates of this device", 30),
        inside("budget", "a micro-batch of the score pass, part by part", 70),
        Section("tests", "the tests that run on a GPU", 110, tests),
        inside("roofline", "every op against the ceilings", 70),
        *(speed(name, limit) for name, limit in _SPEED_FIRST.items()),
        _sanitizer(device, 60),
        *(speed(name, limit) for name, limit in _SPEED_LEFT.items()),
        inside("profile", "one micro-batch of the score pass, by kernel", 40),
    ]


def _sanitizer(device: str, limit: float) -> Section:
    """The ops' tests under compute-sanitizer, which stops at the first access outside of an allocation.

    Every tensor is an allocation of its own then, as torch's cached blocks would hide what lies between them.
    """
    name, what = "sanitizer", "the ops' tests under compute-sanitizer"
    tool, missing = sanitizer_tool(device)
    if tool is None:
        return Section(name, what, limit, ("-c", f"print({missing!r})"))
    tests = ("-m", "pytest", *_SANITIZED, "-k", "cuda", "-x")
    script = f"import os, sys; os.execv({tool!r}, [{tool!r}, *sys.argv[1:]])"
    options = ("--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "20")
    command = ("-c", script, *options, sys.executable, *tests)
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return Section(name, what, limit, command, open_ended=True, environment=uncached)


def sanitizer_tool(device: str) -> tuple[str | None, str]:
    """Where compute-sanitizer is, or None and the reason why the ops' memory accesses are not checked."""
    if device != "cuda":
        return None, "memory accesses are not checked: compute-sanitizer needs a GPU"
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for found in ("compute-sanitizer", f"{toolkit}/bin/compute-sanitizer"):
        tool = shutil.which(found)
        if tool is not None:
            return tool, ""
    return None, "memory accesses are not checked: compute-sanitizer, of the CUDA toolkit, is not installed"


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
    """Run one section in a process of its own, killed after `limit` seconds with what it had printed kept.

    Processes that it started go with it: one that went on would take the device from the sections behind.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, *section.command],
            cwd=_CHECKOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **dict(section.environment)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            ended = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
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
        rate = 2 * side**3 / median_seconds(partial(torch.matmul, a, b), device)
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

    from bench.speed.score_pass import passes

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
    page = work / "budget.md"
    if page.exists():
        parts.insert(1, f"## Budget of the score pass\n\n{page.read_text('utf-8')}")
        atomic_write_text(out / "budget.csv", (work / "budget.csv").read_text("utf-8"))
    for name, table in (("ceilings", _ceiling_table), ("roofline", _roofline_table)):
        path = work / f"{name}.csv"
        if path.exists():
            rows = _read(path)
            parts.append(f"## {name.capitalize()}\n\n{table(rows)}")
            atomic_write_text(out / path.name, path.read_text("utf-8"))
    entries = [work / "speed" / f"{name}.csv" for name in (*_SPEED_FIRST, *_SPEED_LEFT)]
    rows = [row for path in entries if path.exists() for row in read_csv(path)]
    if rows:
        parts.append(f"## Speed\n\n{summary(rows)}")
        write_rows(out / "speed.csv", list(rows[0]), rows)
        plot(out / "speed.png", rows)
    by_name = {each.section.name: each for each in outcomes}
    if "tests" in by_name:
        parts.append(f"## Tests\n\n{_last_line(by_name['tests'])}\n")
        atomic_write_text(out / "tests.txt", by_name["tests"].output)
    if "sanitizer" in by_name:
        parts.append(f"## Memory accesses\n\n{_last_line(by_name['sanitizer'])}\n")
    if "profile" in by_name:
        atomic_write_text(out / "profile.txt", by_name["profile"].output)
    failures = [each for each in outcomes if not each.well]
    if failures:
        parts.append("## What did not end well\n\n" + "".join(map(_failure, failures)))
    atomic_write_text(out / "gpu.md", "\n".join(parts))
    atomic_write_text(
        out / "log.txt",
        "\n".join(f"== {each.section.name}: {each.ended}\n{each.output}" for each in outcomes),
    )


def _last_line(outcome: Outcome) -> str:
    """What a section printed last; of one that was stopped at its limit that it was."""
    last = next((line for line in reversed(outcome.output.splitlines()) if line.strip()), "no output")
    stopped = outcome.well and outcome.ended != "done"
    return f"No fault in what ran within {outcome.seconds:.0f} s: {last}" if stopped else last


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
        prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (default %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu only with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries the path, measures nothing")
    parser.add_argument(
        "--section", choices=("ceilings", "budget", "roofline", "profile"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("--device cpu only tries the path: add --quick")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "python -m bench gpu: torch finds no CUDA device (--device cpu --quick tries the path without one)",
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
    return int(not all(each.well for each in outcomes))


def _inside(section: str, settings: Settings, work: Path) -> None:
    """The work of a section, in its own process."""
    if section == "ceilings":
        write_rows(work / "ceilings.csv", CEILING_COLUMNS, ceilings(settings))
    elif section == "budget":
        found = budget.measured(settings)
        write_rows(work / "budget.csv", budget.COLUMNS, found.rows())
        atomic_write_text(work / "budget.md", found.page())
        print(found.page())
    elif section == "roofline":
        rooflines(settings, work)
    else:
        print(profiled(settings))


if __name__ == "__main__":
    raise SystemExit(main())
