"""Kill a distillation at random moments and compare what its resumptions end in with an undisturbed run.

    python -m bench kill --data cifar10-jpeg.zip --teacher teacher.safetensors --images-per-class 100
    python -m bench kill --data cifar10-jpeg.zip --method dm --iterations 60 --real-batch 64 --class-batch 3

Options that are not its own are the distillation's. Also runs it with other numbers of images in flight, or with a pool
that is decoded anew in every step, and on several ranks. Prints a line a check and exits with 1 where a byte differs.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ddfast.methods import get_method


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but `run.json` and `evaluations.json`, which are outside a run's identity."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "evaluations.json")
    }


def run(command: Sequence[str], out: Path, *extra: str) -> float:
    """Run to the end; returns the seconds it took."""
    started = time.monotonic()
    subprocess.run([*command, "--out", str(out), *extra], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def run_killed(
    command: Sequence[str], out: Path, kills: int, seconds: float, draws: random.Random
) -> Iterator[dict[str, str]]:
    """Kill -9 a run `kills` times after random times, resuming it each time; yield what every finished run holds.

    A run that reaches its end before the next kill is yielded, and another one is started in an empty folder.
    """
    hits = 0
    while hits < kills:
        process = subprocess.Popen([*command, "--out", str(out), "--resume"], stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=draws.uniform(0.2, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            hits += 1
            continue
        if process.returncode != 0:
            raise SystemExit(f"a resumed run ended with exit code {process.returncode}")
        yield digests(out)
        shutil.rmtree(out)
    run(command, out, "--resume")
    yield digests(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", default=None)
    parser.add_argument("--method", default="infoutil")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--images-per-class", default="100", help="a number, or all")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--ranks", type=int, nargs="*", default=[], help="also on so many ranks each")
    parser.add_argument("--work", type=Path, default=Path("runs/kill"))
    arguments, others = parser.parse_known_args(argv)
    distillation = [
        *("-m", "ddfast", "distill", arguments.method, "--quiet", "--data", arguments.data),
        *("--ipc", str(arguments.ipc), "--images-per-class", arguments.images_per_class, *others),
        *(("--teacher", arguments.teacher) if arguments.teacher is not None else ()),
    ]
    command = [sys.executable, *distillation]
    shutil.rmtree(arguments.work, ignore_errors=True)
    seconds = run(command, arguments.work / "undisturbed")
    wanted = digests(arguments.work / "undisturbed")
    print(f"undisturbed: {len(wanted)} files in {seconds:.1f} s")
    failed = 0
    selects = "select" in get_method(arguments.method).stages
    for flag, value in [("--batch-size", n) for n in (1, 7, 64)] if selects else [("--pool-memory", 0)]:
        out = arguments.work / f"{flag[2:]}-{value}"
        run(command, out, flag, str(value))
        failed += _report(f"{flag} {value}", digests(out), wanted)
    for ranks in arguments.ranks:
        out = arguments.work / f"ranks-{ranks}"
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
        run([sys.executable, *torchrun, *distillation], out)
        failed += _report(f"{ranks} ranks", digests(out), wanted)
    out = arguments.work / "killed"
    draws = random.Random(arguments.seed)
    for number, found in enumerate(run_killed(command, out, arguments.kills, seconds, draws), start=1):
        failed += _report(f"killed and resumed, run {number}", found, wanted)
    print(f"{arguments.kills} kills")
    return 1 if failed else 0


def _report(what: str, found: dict[str, str], wanted: dict[str, str]) -> bool:
    different = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    print(
        f"{what}: {'the same bytes' if not different else f'{len(different)} files differ: {different[:5]}'}"
    )
    return bool(different)


if __name__ == "__main__":
    raise SystemExit(main())
