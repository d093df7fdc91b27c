"""Students trained on the sets of several methods, side by side: same data, teacher, labels and protocol.

    python -m bench.compare --data cifar10-jpeg.zip --teacher teacher.safetensors --arch convnet3 --ipc 1,10 \\
        --arm infoutil --arm "paper = infoutil preset=paper" --arm rded --arm random --out bench/results/cifar10

Every arm is distilled and evaluated once for each IPC. What is finished is kept in `--work` and reused, so that a
killed comparison goes on where it was. Writes `<out>.csv` (a row a student) and `<out>.md` (the table, and how it was
made).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ddfast
from ddfast.data.files import atomic_write_text
from ddfast.distillation import distill
from ddfast.errors import UsageError
from ddfast.methods.run import read_plan
from ddfast.models import load_teacher
from ddfast.progress import say
from ddfast.training import evaluate


@dataclass(frozen=True)
class Arm:
    """One row of the table: `name = method key=value ...`; keys are options of the method or of `distill`."""

    name: str
    method: str
    settings: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Parse `method`, `method key=value` or `name = method key=value`."""
        name, separator, rest = text.partition(" = ")
        words = (rest if separator else text).split()
        settings: dict[str, Any] = {}
        for word in words[1:]:
            key, _, value = word.partition("=")
            settings[key] = _value(key, value)
        return cls(name.strip() if separator else text, words[0], settings)


def _value(key: str, text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if key == "crop_frac":
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def run_arm(arm: Arm, ipc: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Distil and evaluate one arm at one IPC, or read the result of an earlier try."""
    folder = _folder(arm.name, ipc, arguments)
    settled = (arguments.arch, arguments.width, arguments.batch_size, arguments.labels, arguments.precision)
    asked = [arm.method, arm.settings, ipc, _at(arguments.seeds, ipc), _at(arguments.epochs, ipc), *settled]
    if arguments.label_teacher is not None:
        asked.append(load_teacher(arguments.label_teacher).sha256)
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    result_path = folder.parent / f"{folder.name}.{key}.json"
    if result_path.exists():
        return json.loads(result_path.read_text("utf-8"))
    settings = dict(arm.settings)
    # An arm scores once: its other IPCs, and the arms that name it by scores=, copy the table.
    scored = _folder(settings.pop("scores", arm.name), arguments.ipc[0], arguments)
    try:
        distill(
            arm.method,
            data=arguments.data,
            teacher=arguments.teacher,
            ipc=ipc,
            out=folder,
            scores=scored if scored != folder else None,
            resume=True,
            **{
                "factor": arguments.factor,
                "images_per_class": arguments.images_per_class,
                "precision": arguments.precision,
                **settings,
            },
        )
    except UsageError as error:
        raise UsageError(f"arm {arm.name!r}: {error}") from error
    found = evaluate(
        folder,
        arguments.data,
        arch=arguments.arch,
        arch_options={} if arguments.width is None else {"width": arguments.width},
        batch_size=arguments.batch_size,
        seeds=_at(arguments.seeds, ipc),
        teacher=(arguments.label_teacher or arguments.teacher) if arguments.labels == "online" else None,
        epochs=_at(arguments.epochs, ipc),
        precision=arguments.precision,
        quiet=True,
    )
    plan = read_plan(folder)
    assert plan is not None
    result = {
        "arm": arm.name,
        "ipc": ipc,
        "options": plan["options"],
        "preset": plan["preset"],
        **found.as_dict(),
    }
    result["seconds"] = json.loads((folder / "run.json").read_text("utf-8"))["seconds"]
    result["teacher_loss"] = _teacher_loss(folder, arguments)
    atomic_write_text(result_path, json.dumps(result, indent=1) + "\n")
    say(
        f"{arm.name}, IPC {ipc}: {found}, best {found.best_mean:.2f}, teacher's loss {result['teacher_loss']:.2f}"
    )
    return result


def _folder(name: str, ipc: int, arguments: argparse.Namespace) -> Path:
    return arguments.work / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}-ipc{ipc}"


def _by_ipc(text: str) -> dict[int, int]:
    """`300,50:60`: 60 at IPC 50 and 300 elsewhere, as {0: 300, 50: 60}."""
    pairs = [part.split(":") if ":" in part else ("0", part) for part in text.split(",")]
    return {int(ipc): int(value) for ipc, value in pairs}


def _at(values: dict[int, int], ipc: int) -> int | None:
    return values.get(ipc, values.get(0))


def _teacher_loss(folder: Path, arguments: argparse.Namespace) -> float:
    """Mean cross-entropy of the teacher on the whole distilled images, in nats: how hard it finds them."""
    distilled = ddfast.DistilledSet(folder)
    teacher = load_teacher(arguments.teacher)
    mean, std = torch.tensor(teacher.mean).view(1, 3, 1, 1), torch.tensor(teacher.std).view(1, 3, 1, 1)
    images = torch.stack([distilled[i][0] for i in range(len(distilled))])
    with torch.no_grad():
        logits = torch.cat([teacher.model((part.float() / 255 - mean) / std) for part in images.split(64)])
    return float(torch.nn.functional.cross_entropy(logits, distilled.labels))


# Output
# ---------------------------------------------------------------------------------------------------------


def table(results: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """The comparison in Markdown: arms down, IPCs across, mean ± deviation of the last epoch (best tested epoch)."""
    lines = [
        "| method | " + " | ".join(f"IPC {ipc}" for ipc in arguments.ipc) + " | teacher's loss |",
        "| --- |" + " --- |" * (len(arguments.ipc) + 1),
    ]
    for arm in dict.fromkeys(result["arm"] for result in results):
        rows = {result["ipc"]: result for result in results if result["arm"] == arm}
        cells = [_cell(rows[ipc]) if ipc in rows else "" for ipc in arguments.ipc]
        losses = " / ".join(f"{rows[ipc]['teacher_loss']:.2f}" for ipc in arguments.ipc if ipc in rows)
        lines.append(f"| {arm} | {' | '.join(cells)} | {losses} |")
    return "\n".join(lines) + "\n"


def _cell(result: dict[str, Any]) -> str:
    spread = f" ± {result['std']:.1f}" if len(result["top1"]) > 1 else ""
    return f"{result['mean']:.1f}{spread} ({result['best_mean']:.1f})"


def facts(results: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    """How the table was made, a line each."""
    teacher = load_teacher(arguments.teacher)
    of_ipc = {r["ipc"]: r for r in results}
    runs = ", ".join(
        f"IPC {ipc}: {r['epochs']} epochs, batch {r['batch_size']}, seeds {len(r['seeds'])}"
        for ipc, r in of_ipc.items()
    )
    labels = arguments.labels
    if arguments.label_teacher is not None:
        early = load_teacher(arguments.label_teacher)
        labels += f" by the teacher of epoch {early.epoch}, test top-1 {early.top1:.2f}"
    width = "" if arguments.width is None else f" of width {arguments.width}"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return [
        f"data {Path(arguments.data).name}, {arguments.images_per_class} images a class scored",
        f"teacher {teacher.arch}, {teacher.epoch} epochs, test top-1 {teacher.top1:.2f}, labels {labels}",
        f"student {arguments.arch}{width}, protocol rded; {runs}",
        f"arithmetic {arguments.precision} on {platform.machine()}, torch {torch.__version__}, "
        f"ddfast {ddfast.__version__}, commit {commit.stdout.strip() or 'unknown'}",
    ]


def write(results: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Write `<out>.csv` and `<out>.md`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["arm", "ipc", "seed", "epochs", "batch_size", "top1_last", "top1_best", "teacher_loss", "options"]
    )
    for r in results:
        options = json.dumps({**r["options"]["score"], **r["options"]["select"]}, sort_keys=True)
        for seed, last, best in zip(r["seeds"], r["top1"], r["best"], strict=True):
            row = [r["arm"], r["ipc"], seed, r["epochs"], r["batch_size"], f"{last:.2f}", f"{best:.2f}"]
            writer.writerow([*row, f"{r['teacher_loss']:.4f}", options])
    atomic_write_text(arguments.out.with_suffix(".csv"), text.getvalue())
    lines = "".join(f"- {fact}\n" for fact in facts(results, arguments))
    heading = (
        "Test top-1 after the last epoch, mean ± deviation over seeds; in brackets the best tested epoch.\n"
    )
    arms = "".join(f"- {arm}\n" for arm in arguments.arm)
    page = f"{heading}\n{table(results, arguments)}\n{lines}\nArms:\n{arms}"
    atomic_write_text(arguments.out.with_suffix(".md"), page)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--width", type=int, default=None, help="channels of a ConvNet student's layers")
    parser.add_argument("--batch-size", type=int, default=None, help="images a step; default the protocol's")
    parser.add_argument(
        "--arm", action="append", required=True, help="method key=value, or name = method key=value"
    )
    parser.add_argument("--ipc", type=lambda text: [int(part) for part in text.split(",")], default=[10])
    parser.add_argument("--seeds", type=_by_ipc, default={0: 3}, help="3, or by IPC: 3,50:1")
    parser.add_argument(
        "--epochs", type=_by_ipc, default={}, help="300, or by IPC: 300,50:60; default the protocol's"
    )
    parser.add_argument("--factor", default="auto")
    parser.add_argument("--images-per-class", type=int, default=300)
    parser.add_argument("--precision", default="auto", choices=("auto", "float32"))
    parser.add_argument(
        "--label-teacher", default=None, help="labels the students' batches instead of --teacher"
    )
    parser.add_argument("--labels", default="online", choices=("online", "stored"))
    parser.add_argument("--work", type=Path, default=Path("runs/compare"))
    parser.add_argument("--out", type=Path, required=True, help="results, without ending")
    arguments = parser.parse_args(argv)
    results = []
    for arm in [Arm.parse(text) for text in arguments.arm]:
        for ipc in arguments.ipc:
            results.append(run_arm(arm, ipc, arguments))
            write(results, arguments)
    print(table(results, arguments))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
