"""Soft-label entropy by teacher age: why the labels of an early teacher are other labels than the full one's.

    python -m bench.studies entropy --data cifar10.zip --teacher teacher.safetensors --out bench/results/paper/entropy

Every checkpoint beside the teacher file (`<teacher>-epochN.safetensors`) and the teacher itself label the same
distilled set, whole images, at T = 20 (what students are trained on, RDED) and at T = 1. Entropies are in bits: log2(C)
is a label that says nothing, 0 one that says the class alone. Writes `<out>.csv`, `.md`, `.png` and `.svg`.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import ddfast
from bench import facts
from bench.studies.arguments import study_parser, told
from bench.studies.arms import Arm, Distillation, Setup, teacher_at
from bench.studies.charts import COLOURS, FAINT, GRID, figure
from bench.studies.compare import teacher_fact
from bench.studies.teachers import checkpoints, teachers
from ddfast.files import atomic_write_text, make_folder
from ddfast.models import Teacher
from ddfast.training.augmentation import normalize

TEMPERATURES = (20.0, 1.0)
_LABELLED = 64  # images a forward pass


@dataclass(frozen=True)
class Age:
    """The labels of one checkpoint.

    Attributes:
        epoch: of the checkpoint; None where the file does not say.
        top1: its test accuracy in percent, or None.
        entropy: bits of each image's soft label at each of `TEMPERATURES`, float64 [2, N].
        agrees: share of the images whose likeliest class is theirs.
    """

    epoch: int | None
    top1: float | None
    entropy: torch.Tensor
    agrees: float


def label_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy of distributions [N, C] in bits, float64 [N]; 0 log 0 is 0."""
    p = probabilities.double()
    return -torch.special.xlogy(p, p).sum(dim=1) / math.log(2)


def main(argv: Sequence[str]) -> int:
    """Measure and write."""
    parser = study_parser("entropy", __doc__)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--arm", default="random", help="method and options of the set that is labelled")
    arguments = parser.parse_args(argv)
    (file, *_) = teachers(
        arguments.data,
        arguments.teacher,
        arguments.teacher_arch or ["convnet"],
        arguments.work,
        arguments.teacher_epochs,
    )
    setup = Setup(
        arguments.data,
        file,
        arguments.work,
        arguments.factor,
        arguments.images_per_class or 300,
        arguments.precision,
    )
    folder = Distillation.of(Arm.parse(arguments.arm), arguments.ipc, setup).make()
    ages = [aged(teacher_at(path), folder) for path in [*checkpoints(file), file]]
    out = arguments.out or facts.RESULTS / "paper" / f"entropy_{Path(arguments.data).stem}"
    page = write(ages, setup, arguments, out, argv)
    print(page)
    return 0


def aged(teacher: Teacher, folder: Path) -> Age:
    """Label the whole images of a distilled folder."""
    distilled = ddfast.DistilledSet(folder)
    images = torch.stack([distilled[place][0] for place in range(len(distilled))])
    with torch.no_grad():
        logits = torch.cat(
            [teacher.model(normalize(part, teacher.mean, teacher.std)) for part in images.split(_LABELLED)]
        )
    entropy = torch.stack([label_entropy(F.softmax(logits.double() / t, dim=1)) for t in TEMPERATURES])
    agrees = float((logits.argmax(dim=1) == distilled.labels).double().mean())
    return Age(teacher.epoch, teacher.top1, entropy, agrees)


def write(
    ages: Sequence[Age], setup: Setup, arguments: argparse.Namespace, out: Path, argv: Sequence[str]
) -> str:
    """Write the table, the page and the picture; returns the page."""
    make_folder(out.parent)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f"entropy_T{t:g}_{what}" for t in TEMPERATURES for what in ("mean", "p10", "p90")]
    writer.writerow(["epoch", "top1", "agrees", *names])
    lines = []
    for age in ages:
        numbers = [value for row in age.entropy for value in _spread(row)]
        writer.writerow([age.epoch, age.top1, f"{age.agrees:.4f}", *(f"{value:.4f}" for value in numbers)])
        accuracy = "" if age.top1 is None else f"{age.top1:.1f}"
        cells = [f"{m:.3f} ({low:.3f} to {high:.3f})" for m, low, high in map(_spread, age.entropy)]
        lines.append(f"| {age.epoch} | {accuracy} | {100 * age.agrees:.0f} | {' | '.join(cells)} |")
    atomic_write_text(out.with_suffix(".csv"), text.getvalue())
    classes = len(teacher_at(setup.teacher).class_names)
    page = (
        "# Soft-label entropy by teacher age\n\n"
        "Bits of the labels that each checkpoint gives the same distilled images: mean (10th to 90th percentile). "
        f"A label that says nothing has log2({classes}) = {math.log2(classes):.3f}.\n\n"
        "| epochs | test top-1 | reads as labelled, % | T = 20 | T = 1 |\n| --- | --- | --- | --- | --- |\n"
        + "\n".join(lines)
        + f"\n\n![entropy]({out.with_suffix('.png').name})\n\n"
        f"- data {Path(setup.data).name}, set `{arguments.arm}` at IPC {arguments.ipc}, whole images\n"
        f"- teacher {teacher_fact(setup.teacher)}\n\n{told('entropy', argv)}"
    )
    atomic_write_text(out.with_suffix(".md"), page)
    chart(out, ages, math.log2(classes))
    return page


def _spread(values: torch.Tensor) -> tuple[float, float, float]:
    low, high = torch.quantile(values, torch.tensor([0.1, 0.9], dtype=values.dtype)).tolist()
    return float(values.mean()), low, high


def chart(out: Path, ages: Sequence[Age], most: float) -> None:
    """Distribution of the entropy at each age, a violin for each, one panel a temperature."""
    with figure(out, 9.6, 3.6, columns=len(TEMPERATURES)) as axes:
        for axis, temperature, row in zip(axes, TEMPERATURES, range(len(TEMPERATURES)), strict=True):
            values = [age.entropy[row].tolist() for age in ages]
            bodies = axis.violinplot(values, showextrema=False, widths=0.75)["bodies"]
            for body in bodies:
                body.set(facecolor=COLOURS[row], edgecolor=COLOURS[row], alpha=0.35)
            for place, age in enumerate(ages, start=1):
                mean, low, high = _spread(age.entropy[row])
                axis.plot([place, place], [low, high], color=COLOURS[row], linewidth=1.4)
                axis.plot(place, mean, "o", color=COLOURS[row], markersize=5)
                axis.annotate(
                    f"{mean:.3f}",
                    (place, mean),
                    (8, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8.5,
                )
            axis.set_xticks(range(1, len(ages) + 1), [_age_label(age) for age in ages])
            axis.set_title(
                f"T = {temperature:g}" + (", what students learn from" if row == 0 else ""),
                loc="left",
                fontsize=9.5,
                color=FAINT,
            )
            axis.tick_params(length=0)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.grid(axis="y", color=GRID, linewidth=0.8)
            axis.set_axisbelow(True)
            axis.axhline(most, color=FAINT, linewidth=0.9, linestyle=":")
        axes[0].set_ylabel("entropy of a soft label, bits")
        title = "Soft-label entropy by teacher age (dotted: a label that says nothing)"
        axes[0].figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")


def _age_label(age: Age) -> str:
    epoch = "unknown age" if age.epoch is None else f"{age.epoch} epochs"
    return epoch if age.top1 is None else f"{epoch}\n{age.top1:.1f} %"
