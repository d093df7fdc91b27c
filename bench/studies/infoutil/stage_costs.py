"""Figure 3: time and memory of each stage of a distillation.

    python -m bench.studies figure3 --data imagenette.zip --teacher resnet18.safetensors

Every method is distilled from nothing in a process of its own, `--rounds` times in turn; seconds are the median of each
stage, memory is the highest that a process held (and on a GPU the most that PyTorch allocated there). The paper's parts
are here as well: informativeness alone (attribution; the gradient norm of the last layer costs next to nothing) and
utility alone (random crops and the gradient norm of all layers). Writes `<out>.csv`, `.md`, `.png` and `.svg`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import facts
from bench.studies.arguments import study_parser, told
from bench.studies.arms import Arm, teacher_at
from bench.studies.charts import COLOURS, FAINT, GRID, figure
from bench.studies.compare import teacher_fact
from bench.studies.teachers import teachers
from ddfast.errors import UsageError
from ddfast.files import atomic_write_text, make_folder
from ddfast.progress import say

TITLE = "Figure 3: time and memory of each stage"
STAGES = ("score", "select", "compose", "relabel", "report")
ARMS = (
    Arm("random images", "random", {}),
    Arm("RDED", "rded", {}),
    Arm("utility alone", "rded", {"rank_by": "grad_norm"}),
    Arm("informativeness alone", "infoutil", {"preset": "paper", "norm": "last_layer"}),
    Arm("InfoUtil, the paper's rules", "infoutil", {"preset": "paper"}),
    Arm("InfoUtil", "infoutil", {}),
)


@dataclass(frozen=True)
class Run:
    """One distillation: seconds of its stages and of the whole process, and its memory in bytes."""

    arm: str
    stages: dict[str, float]
    process: float
    resident: int
    allocated: int


def distill_and_tell(asked: dict[str, Any]) -> None:
    """What the measured process does: distil, then print the GPU memory as JSON. `asked` are `distill`'s arguments."""
    from ddfast.distillation import distill

    distill(**asked, quiet=True)
    allocated = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    print(json.dumps({"allocated": allocated}))


def measure(arm: Arm, arguments: argparse.Namespace, teacher: Path, folder: Path) -> Run:
    """Distil one arm into an empty folder, in a process of its own.

    Raises:
        UsageError: the process failed; its last line is told.
    """
    shutil.rmtree(folder, ignore_errors=True)
    asked = {
        "method": arm.method,
        "data": str(Path(arguments.data).resolve()) if Path(arguments.data).exists() else arguments.data,
        "teacher": str(teacher.resolve()),
        "ipc": arguments.ipc,
        "out": str(folder.resolve()),
        "factor": arguments.factor,
        "images_per_class": arguments.images_per_class or 300,
        "precision": arguments.precision,
        **arm.settings,
    }
    program = (
        "import json, sys; from bench.studies.infoutil.stage_costs import distill_and_tell as go; "
        "go(json.loads(sys.argv[1]))"
    )
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(asked)],
        cwd=facts.CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said, failed = process.stdout.read(), process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    took = time.monotonic() - started
    if process.returncode != 0:
        raise UsageError(f"arm {arm.name!r}: {(failed.strip().splitlines() or ['it was killed'])[-1]}")
    seconds = json.loads((folder / "run.json").read_text("utf-8"))["seconds"]
    allocated = json.loads(said.strip().splitlines()[-1])["allocated"]
    shutil.rmtree(folder)
    stages = {stage: float(seconds.get(stage, 0.0)) for stage in STAGES}
    return Run(arm.name, stages, took, usage.ru_maxrss * 1024, allocated)


def main(argv: Sequence[str]) -> int:
    """Run the study."""
    parser = study_parser("figure3", __doc__)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    (file, *_) = teachers(
        arguments.data,
        arguments.teacher,
        arguments.teacher_arch or ["resnet18"],
        arguments.work,
        arguments.teacher_epochs,
    )
    say(f"{TITLE}: {arguments.rounds * len(ARMS)} distillations, each in a process of its own")
    out = (
        arguments.out
        or facts.RESULTS / "paper" / f"figure3_{Path(arguments.data).stem}_{teacher_at(file).arch}"
    )
    runs: list[Run] = []
    for number in range(arguments.rounds):
        for arm in ARMS:
            runs.append(measure(arm, arguments, file, arguments.work / "stages"))
            told_seconds = ", ".join(f"{name} {took:.1f} s" for name, took in runs[-1].stages.items())
            say(f"round {number + 1}, {arm.name}: {told_seconds}; {runs[-1].resident / 2**20:.0f} MiB")
    print(write(runs, arguments, file, out, argv))
    return 0


def write(
    runs: Sequence[Run], arguments: argparse.Namespace, teacher: Path, out: Path, argv: Sequence[str]
) -> str:
    """Write every run, the page of medians and the picture; returns the page."""
    make_folder(out.parent)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["arm", *(f"{stage}_seconds" for stage in STAGES), "process_seconds", "rss_bytes", "gpu_bytes"]
    )
    for run in runs:
        seconds = [f"{run.stages[stage]:.3f}" for stage in STAGES]
        writer.writerow([run.arm, *seconds, f"{run.process:.3f}", run.resident, run.allocated])
    atomic_write_text(out.with_suffix(".csv"), text.getvalue())
    medians = {
        arm: _median([run for run in runs if run.arm == arm]) for arm in dict.fromkeys(r.arm for r in runs)
    }
    gpu = any(run.allocated for run in runs)
    lines = []
    for run in medians.values():
        cells = [f"{run.stages[stage]:.2f}" for stage in STAGES]
        memory = [f"{run.resident / 2**20:.0f}", *([f"{run.allocated / 2**20:.0f}"] if gpu else [])]
        lines.append(f"| {run.arm} | {' | '.join([*cells, f'{run.process:.1f}', *memory])} |")
    head = (
        [f"{stage}, s" for stage in STAGES]
        + ["process, s", "memory, MiB"]
        + (["GPU memory, MiB"] if gpu else [])
    )
    page = (
        f"# {TITLE}\n\nMedian of {arguments.rounds} runs, each from nothing in a process of its own. The paper's "
        "figure compares with methods that train images, 50 times slower and 100 times larger than InfoUtil by its own "
        "words; its values are not printed.\n\n"
        f"| method | {' | '.join(head)} |\n| --- |{' --- |' * len(head)}\n"
        + "\n".join(lines)
        + f"\n\n![seconds]({out.with_suffix('.png').name})\n\n"
        f"- data {Path(arguments.data).name}, {arguments.images_per_class or 300} images a class scored, IPC "
        f"{arguments.ipc}; teacher {teacher_fact(teacher)}\n"
        f"- {facts.device_name(torch.device('cuda' if gpu else 'cpu'))}, {facts.usable_cores()} cores, "
        f"OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}, arithmetic {arguments.precision}, torch "
        f"{torch.__version__}, commit {facts.commit()[0]}\n\n{told('figure3', argv)}"
    )
    atomic_write_text(out.with_suffix(".md"), page)
    _chart(out, list(medians.values()))
    return page


def _median(runs: Sequence[Run]) -> Run:
    stages = {stage: statistics.median(run.stages[stage] for run in runs) for stage in STAGES}
    return Run(
        runs[0].arm,
        stages,
        statistics.median(run.process for run in runs),
        max(run.resident for run in runs),
        max(run.allocated for run in runs),
    )


def _chart(out: Path, runs: Sequence[Run]) -> None:
    """Seconds of the stages as stacked bars, and memory as bars beside them."""
    with figure(out, 10.4, 1.4 + 0.36 * len(runs), columns=2) as (seconds, memory):
        for place, run in enumerate(runs):
            left = 0.0
            for stage, colour in zip(STAGES, COLOURS, strict=False):
                seconds.barh(place, run.stages[stage], left=left, height=0.58, color=colour)
                left += run.stages[stage]
            _value(seconds, left, place, f"{left:.1f} s")
            held = run.resident / 2**20
            memory.barh(place, held, height=0.58, color="#8593a6")
            _value(memory, held, place, f"{held:.0f} MiB")
        seconds.set_yticks(range(len(runs)), [run.arm for run in runs])
        memory.set_yticks([])
        for axis, heading in ((seconds, "time of the stages"), (memory, "highest memory of the process")):
            axis.set_ylim(len(runs) - 0.4, -0.6)
            axis.set_xlim(0, axis.get_xlim()[1] * 1.18)
            axis.set_title(heading, loc="left", fontsize=9.5, color=FAINT)
            axis.tick_params(length=0)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.grid(axis="x", color=GRID, linewidth=0.8)
            axis.set_axisbelow(True)
        handles = [seconds.barh([0], [0], color=colour) for colour in COLOURS[: len(STAGES)]]
        seconds.figure.legend(
            handles, STAGES, loc="outside lower left", ncols=len(STAGES), frameon=False, fontsize=8.5
        )
        seconds.figure.suptitle(TITLE, x=0.01, ha="left", fontsize=11, fontweight="bold")


def _value(axis: Any, place: float, row: int, told_value: str) -> None:
    axis.annotate(told_value, (place, row), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
