"""Evaluate a distilled set: train students on it from several seeds and test them on the real test split."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddfast.errors import UsageError
from ddfast.models.teacher import Teacher, load_teacher, with_class_order, with_outputs_in
from ddfast.ops.precision import float32_by_default
from ddfast.progress import say
from ddfast.training.device import resolve_device
from ddfast.training.image_sets import ImageSet, read_test_set
from ddfast.training.preflight import check_reading, drawn_places, images_to_try, read_images, try_teacher
from ddfast.training.protocol import Protocol, protocol_named
from ddfast.training.student import DistilledImages, train_student

if TYPE_CHECKING:
    from ddfast.data.distilled import DistilledSet


@dataclass(frozen=True)
class EvaluationResult:
    """Test accuracies of students trained on one distilled set, in percent.

    Attributes:
        arch: the students' architecture.
        protocol: name of the protocol.
        labels: "online" (from a teacher, on the mixed batch), "stored" (mixed by area) or "hard".
        epochs: passes over the set.
        batch_size: images a step.
        seeds: one a student.
        top1: accuracy of each student after its last epoch: the headline.
        top5: the same among the five likeliest classes.
        best: best tested epoch of each student, chosen on the test set as RDED reports it.
        per_class: accuracy of each class after the last epoch, mean over the students.
        arch_options: keyword arguments of the architecture.

    """

    arch: str
    protocol: str
    labels: str
    epochs: int
    batch_size: int
    seeds: list[int]
    top1: list[float]
    top5: list[float]
    best: list[float]
    per_class: list[float]
    arch_options: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean of `top1`."""
        return statistics.fmean(self.top1)

    @property
    def std(self) -> float:
        """Sample standard deviation of `top1`; 0 for one seed."""
        return _deviation(self.top1)

    @property
    def top5_mean(self) -> float:
        """Mean of `top5`."""
        return statistics.fmean(self.top5)

    @property
    def best_mean(self) -> float:
        """Mean of `best`."""
        return statistics.fmean(self.best)

    @property
    def best_std(self) -> float:
        """Sample standard deviation of `best`; 0 for one seed."""
        return _deviation(self.best)

    def as_dict(self) -> dict[str, Any]:
        """The fields and the statistics, ready for JSON (a class without test images is None)."""
        statistic = {
            name: getattr(self, name) for name in ("mean", "std", "top5_mean", "best_mean", "best_std")
        }
        per_class = [None if math.isnan(value) else value for value in self.per_class]
        return {**asdict(self), **statistic, "per_class": per_class}

    def __str__(self) -> str:
        return f"top1 {self.mean:.2f} ± {self.std:.2f}"


@float32_by_default()
def evaluate(
    distilled: str | Path | DistilledSet | DistilledImages,
    data: str | Path | ImageSet,
    *,
    arch: str,
    arch_options: Mapping[str, Any] | None = None,
    seeds: int | Sequence[int] = 3,
    teacher: Teacher | str | Path | None = None,
    epochs: int | None = None,
    protocol: str | Protocol = "rded",
    batch_size: int | None = None,
    autoaugment: bool = False,
    precision: str = "float32",
    device: str = "auto",
    workers: int | None = None,
    quiet: bool = False,
    class_order: str | Path | Sequence[str] | Mapping[Any, Any] | None = None,
    preflight: bool = True,
) -> EvaluationResult:
    """Train students of `arch` on a distilled set and test them.

    Args:
        distilled: a distilled folder, an opened `DistilledSet`, or images in memory.
        data: the real data, whose test split is used, or that split decoded.
        arch: name for `create_model`.
        arch_options: its keyword arguments, `{"width": 32}` for example.
        seeds: how many students (seeds 0, 1, ...), or their seeds.
        teacher: labels the mixed batches online, as RDED does; None: the stored soft labels. A file or an
            opened one. A protocol with hard labels takes none.
        epochs: passes over the distilled set; None: the protocol's for the IPC.
        protocol: a name of `PROTOCOLS` or a protocol of your own.
        batch_size: images a step; None: the protocol's rule for the IPC.
        autoaugment: torchvision's AutoAugment on the students' images.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where it is faster.
        device: "auto", "cpu" or "cuda".
        workers: decoding threads for the test split; None: the loader's default.
        quiet: print nothing.
        class_order: the classes in the order of the teacher's outputs, as `ddfast.distill` takes it.
        preflight: try the teacher on test images first: refuse one whose outputs stand in another class order, and
            warn of one that reads few.

    Raises:
        UsageError: no test split, classes or image sizes that differ, no labels, an unknown name, or a teacher in
            another class order.

    """
    chosen = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not chosen:
        raise UsageError("evaluation needs at least one seed, got 0")
    try:
        rules = protocol_named(protocol) if isinstance(protocol, str) else protocol
    except ValueError as error:
        raise UsageError(str(error)) from error
    images = read_distilled(distilled)
    if teacher is not None and not isinstance(teacher, Teacher):
        names = None if class_order is None else images.class_names
        teacher = load_teacher(teacher, class_order=class_order, class_names=names)
    elif teacher is not None and class_order is not None:
        teacher = with_class_order(teacher, class_order, images.class_names)
    elif (
        teacher is not None
        and teacher.class_order is not None
        and set(teacher.class_names) == set(images.class_names)
    ):
        teacher = with_outputs_in(teacher, images.class_names)
    test = data if isinstance(data, ImageSet) else _open_test(data, images, workers, quiet)
    if teacher is not None and preflight:
        _try_on_test(teacher, test, images, resolve_device(device), quiet)
    students = []
    for seed in chosen:
        student = train_student(
            images,
            test,
            arch=arch,
            arch_options=arch_options,
            teacher=teacher,
            protocol=rules,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            autoaugment=autoaugment,
            precision=precision,
            device=device,
            quiet=quiet,
        )
        say(
            f"{arch} seed {seed}: top-1 {student.top1:.2f}% after epoch {student.epochs}, "
            f"best {student.best:.2f}% after epoch {student.best_epoch + 1}",
            quiet=quiet,
        )
        students.append(student)
    per_class = torch.tensor([student.per_class for student in students], dtype=torch.float64).mean(dim=0)
    return EvaluationResult(
        arch=arch,
        protocol=rules.name,
        labels="hard" if rules.labels == "hard" else "stored" if teacher is None else "online",
        epochs=students[0].epochs,
        batch_size=students[0].batch_size,
        seeds=chosen,
        top1=[student.top1 for student in students],
        top5=[student.top5 for student in students],
        best=[student.best for student in students],
        per_class=per_class.tolist(),
        arch_options=dict(arch_options or {}),
    )


def read_distilled(distilled: str | Path | DistilledSet | DistilledImages) -> DistilledImages:
    """The whole distilled set as tensors; images that are in memory already as they are."""
    if isinstance(distilled, DistilledImages):
        return distilled
    from ddfast.data.distilled import DistilledSet

    opened = DistilledSet(distilled.root if isinstance(distilled, DistilledSet) else distilled)
    soft_labels = opened.soft_labels
    return DistilledImages(
        images=torch.stack([opened[place][0] for place in range(len(opened))]),
        labels=opened.labels,
        class_names=opened.class_names,
        mean=opened.mean,
        std=opened.std,
        factor=math.isqrt(soft_labels.shape[1]),
        soft_labels=soft_labels,
        temperature=opened.temperature,
    )


def _try_on_test(
    teacher: Teacher, test: ImageSet, images: DistilledImages, device: torch.device, quiet: bool
) -> None:
    """Refuse a teacher that does not read test images; one of other classes or another size is refused later on."""
    if list(teacher.class_names) != list(images.class_names) or teacher.image_size != test.images.shape[-1]:
        return
    model = copy.deepcopy(teacher.model).to(device).float().eval()
    places = drawn_places(
        test.labels.cpu().numpy(), images.num_classes, images_to_try(teacher.image_size, device)
    )
    index = torch.from_numpy(places)
    tried = test.images[index.to(test.images.device)]
    found = try_teacher(model, tried, teacher.mean, teacher.std, images.num_classes, device)
    check_reading(
        read_images(found, test.labels.cpu()[index], images.num_classes),
        images.class_names,
        role="teacher",
        what="test images",
        top1=teacher.top1,
        way_out=" (--no-preflight goes on regardless)",
        quiet=quiet,
        chance_will_do=True,  # students of any labels can be compared
    )


def _open_test(data: str | Path, images: DistilledImages, workers: int | None, quiet: bool) -> ImageSet:
    from ddfast.data import open_source

    source = open_source(data, "test")
    if list(source.class_names) != list(images.class_names):
        raise UsageError(
            f"{data} has {len(source.class_names)} classes that are not the distilled set's "
            f"{images.num_classes}, or stand in another order: give the data it was distilled from"
        )
    return read_test_set(source, images.image_size, workers=workers, quiet=quiet)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
