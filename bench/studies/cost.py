"""What a study will cost, told before it starts: sets to distil, students to train, and minutes from measured steps."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.studies.arms import Arm, Distillation, Setup, Training, set_of, student_path, teacher_at, test_set
from ddfast.data import open_source
from ddfast.models import create_model
from ddfast.ops.precision import autocast
from ddfast.pipeline.plan import read_plan
from ddfast.training import DistilledImages, ImageSet, train_student
from ddfast.training.device import resolve_device

_STEPS = (
    1,
    2,
    8,
)  # epochs of one step; the last two are timed, their difference is free of what happens once
_BACKWARD = 2.0  # forward passes that a backward pass costs, about
_TIMED_IMAGES = 64


@dataclass(frozen=True)
class Work:
    """One cell of a table: students of some seeds on one arm's set."""

    arm: Arm
    ipc: int
    setup: Setup
    training: Training
    seeds: Sequence[int]

    @property
    def missing(self) -> list[int]:
        """Seeds whose student is not kept."""
        return [
            seed
            for seed in self.seeds
            if not student_path(self.arm, self.ipc, self.setup, self.training, seed).exists()
        ]


@dataclass(frozen=True)
class Cost:
    """What has still to be done.

    Attributes:
        distillations: sets to distil, each told once.
        students: students to train.
        kept: students that an earlier run has trained.
        minutes: of all of it, estimated.
        steps: measured seconds of a training step, by (architecture, batch size).
    """

    distillations: int
    students: int
    kept: int
    minutes: float
    steps: dict[tuple[str, int], float]

    def __str__(self) -> str:
        told = "; ".join(
            f"{arch}, batch {batch}: {1000 * seconds:.0f} ms" for (arch, batch), seconds in self.steps.items()
        )
        return (
            f"{self.distillations} sets to distil, {self.students} students to train ({self.kept} are kept); about "
            f"{self.minutes:.0f} minutes with {torch.get_num_threads()} threads"
            + (f" (measured: a step of {told})" if told else "")
        )


def cost_of(work: Sequence[Work]) -> Cost:
    """Count what is missing and time one step of each kind of student."""
    students, kept, seconds = 0, 0, 0.0
    steps: dict[tuple[str, int], float] = {}
    sets: dict[Path, Distillation] = {}
    for cell in work:
        missing = len(cell.missing)
        students, kept = students + missing, kept + len(cell.seeds) - missing
        if not missing:
            continue
        teacher = teacher_at(cell.setup.teacher)
        rules, training = cell.training.rules, cell.training
        classes, size = len(teacher.class_names), teacher.image_size
        count = cell.ipc * classes
        batch = min(
            training.batch_size or rules.batch_size_for(cell.ipc, classes, size, training.arch, teacher.arch),
            count,
        )
        online = training.labels == "online" and not training.hard
        step = step_seconds(
            training, batch, cell.setup.teacher if online else None, classes, size, cell.setup.precision
        )
        steps[training.arch, batch] = step
        epochs = training.epochs or rules.epochs_for(cell.ipc)
        tests = len(rules.tested_epochs(epochs)) * len(test_set(cell.setup.data, size))
        forward = forward_seconds(training.arch, training.width, classes, size, cell.setup.precision)
        seconds += missing * (
            (epochs + rules.passes_after) * math.ceil(count / batch) * step + tests * forward
        )
        for seed in cell.missing:
            distillation = set_of(cell.arm, cell.ipc, cell.setup, training, seed)
            plan = read_plan(distillation.folder) if distillation.folder.exists() else None
            if plan is None or not plan["complete"]:
                sets[distillation.folder] = distillation
    tables = {}
    for each in sets.values():
        table = f"{each.method}-{each.folder.name.split('-')[1]}"
        if not list(each.folder.parent.glob(f"{table}-ipc*/manifest.json")):
            tables[table] = _score_seconds(each)
    return Cost(len(sets), students, kept, (seconds + sum(tables.values())) / 60, steps)


@functools.cache
def step_seconds(
    training: Training, batch: int, teacher: Path | None, classes: int, size: int, precision: str
) -> float:
    """Seconds of one training step, from students that are thrown away."""
    opened = None if teacher is None else teacher_at(teacher)
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, 3, size, size), generator=draws, dtype=torch.uint8)
    labels = torch.arange(batch) % classes
    names = opened.class_names if opened is not None else [str(label) for label in range(classes)]
    soft = torch.full((batch, 1, classes), 1 / classes)
    mean_std = (0.5,) * 3, (0.25,) * 3
    distilled = DistilledImages(images, labels, names, *mean_std, soft_labels=soft)
    took = []
    for epochs in _STEPS:
        started = time.perf_counter()
        train_student(
            distilled,
            ImageSet(images[:1], labels[:1]),
            arch=training.arch,
            arch_options={} if training.width is None else {"width": training.width},
            teacher=opened,
            protocol=training.rules,
            epochs=epochs,
            batch_size=batch,
            autoaugment=training.autoaugment,
            precision=precision,
            quiet=True,
        )
        took.append(time.perf_counter() - started)
    return max(took[-1] - took[-2], 0.0) / (_STEPS[-1] - _STEPS[-2])


@functools.cache
def forward_seconds(arch: str, width: int | None, classes: int, size: int, precision: str) -> float:
    """Seconds of one image's forward pass."""
    model = create_model(arch, classes, size, **({} if width is None else {"width": width})).eval()
    device = resolve_device("auto")
    model, images = model.to(device), torch.zeros(_TIMED_IMAGES, 3, size, size, device=device)
    best = math.inf
    for _ in range(3):
        started = time.perf_counter()
        with torch.inference_mode(), autocast(precision, device):
            model(images).sum().item()
        best = min(best, time.perf_counter() - started)
    return best / _TIMED_IMAGES


def _score_seconds(distillation: Distillation) -> float:
    """Seconds of a score pass: its forward passes a source, times the sources."""
    teacher = teacher_at(distillation.arguments["teacher"])
    options = distillation.identity["score"]["options"]
    crops = options.get("crops", 0)
    passes = options.get("n_samples", 0) + crops * (1 + _BACKWARD if "norm" in options else 1)
    counts = open_source(distillation.arguments["data"], "train").counts()
    sources = sum(min(count, distillation.arguments["images_per_class"]) for count in counts)
    width = teacher.arch_options.get("width")
    precision = distillation.arguments["precision"]
    return (
        sources
        * passes
        * forward_seconds(teacher.arch, width, len(teacher.class_names), teacher.image_size, precision)
    )
