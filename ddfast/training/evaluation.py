"""Evaluate a distilled set: train students on it from several seeds and test them on the real test split."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddfast.arguments import architecture_options, data_of, one_of, path_of, whole_number
from ddfast.crowding import Neighbours, warn_of_crowding
from ddfast.errors import UsageError
from ddfast.history import History, check_history
from ddfast.isolation import isolated
from ddfast.models.class_order import read_class_order
from ddfast.models.published import published
from ddfast.models.registry import check_model
from ddfast.models.teacher import Teacher, load_teacher, with_class_order, with_outputs_in
from ddfast.ops._dispatch import say_slow_ops
from ddfast.ops.precision import PRECISIONS, compute_dtype
from ddfast.output.whitening import read_whitening
from ddfast.progress import Outlook, say, ways_of_machine
from ddfast.ranks import usable_cores
from ddfast.training.augmentation import normalize
from ddfast.training.device import resolve_device
from ddfast.training.distilled_images import DistilledImages
from ddfast.training.image_sets import ImageSet, read_test_set, whitened
from ddfast.training.mixing import check_autoaugment, check_labels
from ddfast.training.preflight import check_reading, drawn_places, images_to_try, read_images, try_teacher
from ddfast.training.protocol import PROTOCOLS, Protocol, protocol_named
from ddfast.training.recipe import data_digests, recipe_hash
from ddfast.training.student import takes_learned_rate, train_student
from ddfast.wording import argument, did_you_mean, plural, setting

if TYPE_CHECKING:
    from ddfast.data.sources import Source
    from ddfast.output.distilled import DistilledSet

FLOAT32, EIGHT_BITS = "pixels, float32", "8 bits"
"""What students are trained on: pixels as they were optimised, or pictures."""

REGIONS = ("none", "chosen", "all")
"""Of an image's regions, those that students see beside it, where the set has some."""


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
        images: what the students were trained on: "pixels, float32" as they were optimised, or "8 bits".
        steps: updates of a student's weights.
        recipe: 12 hex digits of the frozen recipe, see `ddfast.training.recipe`: results of different recipes are not
            to be compared.
        regions: what students saw beside each image: "none", its "chosen" regions, or "all" candidates.
        digests: 12 hex digits each of the bytes of "images", "labels", "teacher" and "test"; the teacher's is None
            for hard labels and where it is not known.

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
    images: str = EIGHT_BITS
    steps: int = 0
    recipe: str = ""
    digests: dict[str, str | None] = field(default_factory=dict)
    regions: str = "none"

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


@isolated()
def evaluate(
    distilled: str | Path | DistilledSet | DistilledImages,
    data: Any,
    *,
    arch: str | None = None,
    arch_options: Mapping[str, Any] | None = None,
    seeds: int | Sequence[int] = 3,
    teacher: Teacher | str | Path | Callable[[], Teacher | None] | None = None,
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
    rounded: bool = False,
    regions: str = "chosen",
    log_dir: str | Path | None = None,
    wandb: str | None = None,
) -> EvaluationResult:
    """Train students of `arch` on a distilled set and test them.

    Args:
        distilled: a distilled folder, an opened `DistilledSet`, or images in memory.
        data: the real data, as `ddfast.data.open_source` takes it, whose test split is used; or that split alone, in
            memory ((images, labels) or a `Dataset`: class numbers without names are places among the set's classes)
            or decoded.
        arch: name for `create_model`; None: the one that a set of pixels was matched on.
        arch_options: its keyword arguments, `{"width": 32}` for example.
        seeds: how many students (seeds 0, 1, ...), or their seeds.
        teacher: labels the mixed batches online, as RDED does; None: the stored soft labels. A file or an
            opened one, or a function that opens one once the other settings are checked. A protocol with hard
            labels takes none.
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
        rounded: train on the 8-bit images of a set that has pixels in float32: what rounding costs. A set without
            pixels has no others.
        regions: of a set whose images have some (UDD), what students see beside each: "none", the "chosen" ones, or
            "all" candidates. Sets without regions have none to be chosen.
        log_dir: folder of `history.jsonl`, a line a student, and of TensorBoard's files where it is installed.
        wandb: project of Weights & Biases that gets the same numbers.

    Raises:
        UsageError: no test split, classes or image sizes that differ, no labels, an unknown name, a teacher in
            another class order, or a protocol of soft labels for a set with hard labels and no teacher.

    """
    neighbours = Neighbours()
    chosen = seeds_of(seeds)
    rules = rules_of(protocol)
    epochs = None if epochs is None else whole_number(epochs, "epochs", least=1)
    batch_size = None if batch_size is None else whole_number(batch_size, "batch_size", least=1)
    workers = None if workers is None else whole_number(workers, "workers", least=0)
    one_of(precision, "precision", PRECISIONS)
    one_of(regions, "regions", REGIONS)
    where = resolve_device(device)
    precision = compute_dtype(precision, where)
    arch_options = architecture_options(arch_options)
    arch = _matched_arch(distilled) if arch is None else arch
    check_model(arch, **arch_options)
    if rules.labels == "hard" and teacher is not None:
        raise UsageError(f"the protocol {rules.name} trains on hard labels: leave the teacher out")
    if class_order is not None:
        if teacher is None:
            raise UsageError(
                f"{argument('class_order')} describes a teacher: give {argument('teacher')} as well"
            )
        read_class_order(class_order)
    opened = _opened(distilled)
    root = None if isinstance(opened, DistilledImages) else opened.root
    check_history(log_dir, wandb, outside=root)
    check_model(arch, opened.image_size, **arch_options)
    if isinstance(teacher, torch.nn.Module):
        raise UsageError(
            f"{argument('teacher')} must be a ddfast Teacher, which knows classes and normalisation, got the bare "
            f"module {type(teacher).__name__}: wrap it in ddfast.Teacher(model, class_names=...)"
        )
    if callable(teacher):
        teacher = teacher()
    if teacher is not None and not isinstance(teacher, Teacher):
        teacher = path_of(teacher, "teacher") if not isinstance(teacher, str) else teacher
        names = None if class_order is None and published(teacher) is None else opened.class_names
        teacher = load_teacher(teacher, class_order=class_order, class_names=names)
    elif teacher is not None and class_order is not None:
        teacher = with_class_order(teacher, class_order, opened.class_names)
    elif (
        teacher is not None
        and teacher.class_order is not None
        and set(teacher.class_names) == set(opened.class_names)
    ):
        teacher = with_outputs_in(teacher, opened.class_names)
    if teacher is None:
        check_labels(_has_soft_labels(opened), rules)
    source = None if isinstance(data, ImageSet) else source_of_test_split(data, opened)
    stored = teacher is None and rules.labels == "soft"
    images = read_distilled(opened, rounded=rounded, regions=regions, soft_labels=stored)
    seen = "none" if images.boxes is None else regions
    check_autoaugment(images, autoaugment)
    if isinstance(data, ImageSet):
        test = data
        _check_labels(test, images.num_classes)
        wanted = (3, images.image_size, images.image_size)
        if tuple(test.images.shape[1:]) != wanted:
            raise UsageError(
                f"test images must be [N, {', '.join(map(str, wanted))}], as the distilled ones are, got "
                f"{list(test.images.shape)}"
            )
    else:
        assert source is not None
        test = read_test_set(
            source, images.image_size, enlarged=rules.enlarged_tests, workers=workers, quiet=quiet
        )
    if teacher is not None and preflight:
        _try_on_test(teacher, test, images, where, quiet)
    say_slow_ops(where, quiet=quiet)
    if where.type == "cpu":
        warn_of_crowding(neighbours, torch.get_num_threads(), "OMP_NUM_THREADS={}".format, quiet=quiet)
    if takes_learned_rate(rules, images):
        say(f"students learn at the rate that came with the images, {images.learned_rate:.4g}", quiet=quiet)
    tested = test if images.whitening is None else whitened(test, images.whitening)
    students = []
    own = ways_of_machine(where.type, torch.get_num_threads(), usable_cores(), "OMP_NUM_THREADS={}".format)
    several = [f"fewer {argument('seeds')}"] if len(chosen) > 1 else []
    outlook = Outlook(len(chosen), [*several, f"fewer {argument('epochs')}", *own])
    said = {"arch": arch, "protocol": rules.name, "seeds": chosen, "precision": precision}
    name = "images in memory" if root is None else str(root)
    with History(log_dir, wandb, command="evaluate", run=name, settings=said) as history:
        for seed in chosen:
            student = train_student(
                images,
                tested,
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
                outlook=outlook,
            )
            say(
                f"{arch} seed {seed}: top-1 {student.top1:.2f}% after epoch {student.epochs}, "
                f"best {student.best:.2f}% after epoch {student.best_epoch + 1}",
                quiet=quiet,
            )
            students.append(student)
            history.note(
                "student",
                len(students),
                seed=seed,
                arch=arch,
                top1=student.top1,
                top5=student.top5,
                best=student.best,
                best_epoch=student.best_epoch + 1,
                epochs=student.epochs,
                loss=student.final_loss,
            )
    per_class = torch.tensor([student.per_class for student in students], dtype=torch.float64).mean(dim=0)
    labels = "hard" if rules.labels == "hard" else "stored" if teacher is None else "online"
    return EvaluationResult(
        arch=arch,
        protocol=rules.name,
        labels=labels,
        epochs=students[0].epochs,
        batch_size=students[0].batch_size,
        seeds=chosen,
        top1=[student.top1 for student in students],
        top5=[student.top5 for student in students],
        best=[student.best for student in students],
        per_class=per_class.tolist(),
        arch_options=arch_options,
        images=FLOAT32 if images.is_float and not rounded else EIGHT_BITS,
        steps=students[0].steps,
        recipe=recipe_hash(
            rules,
            arch=arch,
            arch_options=arch_options,
            epochs=students[0].epochs,
            steps=students[0].steps,
            batch_size=students[0].batch_size,
            labels=labels,
            image_size=images.image_size,
            autoaugment=autoaugment,
            precision=precision,
            regions=seen,
        ),
        regions=seen,
        digests=data_digests(
            images if teacher is None else images.normalized_like(teacher),
            labels,
            _labelled_by(opened, teacher),
            test,
        ),
    )


def _labelled_by(opened: DistilledSet | DistilledImages, teacher: Teacher | None) -> str | None:
    """SHA-256 of the teacher that soft labels are from; None where nobody knows it."""
    if teacher is not None:
        return teacher.sha256
    said = None if isinstance(opened, DistilledImages) else opened.manifest.get("label_teacher")
    return str(said["sha256"]) if isinstance(said, dict) and said.get("sha256") else None


def read_distilled(
    distilled: str | Path | DistilledSet | DistilledImages,
    *,
    rounded: bool = False,
    regions: str = "chosen",
    soft_labels: bool = True,
) -> DistilledImages:
    """The whole distilled set as tensors; images that are in memory already as they are.

    Args:
        distilled: a folder, an opened one, or images.
        rounded: the 8-bit images of a set that has pixels in float32.
        regions: one of `REGIONS`; images in memory keep theirs or lose them.
        soft_labels: read those of a folder as well, which are made dense.

    Raises:
        UsageError: all regions, of a set that has none, or of images in memory, which hold the chosen ones alone.
    """
    if isinstance(distilled, DistilledImages):
        if regions == "all":
            raise UsageError(
                f"{setting('regions', 'all')} needs the folder of a set: images in memory hold the chosen ones"
            )
        distilled = replace(distilled, boxes=None) if regions == "none" else distilled
        return distilled.rounded() if rounded else distilled
    opened = _opened(distilled)
    assert not isinstance(opened, DistilledImages)
    pixels, mean, std = opened.pixels, opened.mean, opened.std
    held = None if pixels is None else pixels.regions
    if regions == "all" and held is None:
        raise UsageError(f"{opened.root} has no regions beside its images: leave {argument('regions')} out")
    boxes = None if held is None or regions == "none" else held.boxes(regions)
    whitening = None if pixels is None else read_whitening(opened.root)
    if whitening is not None and pixels is not None and not rounded:
        images = pixels.images
    elif whitening is not None:
        images = whitening(torch.stack([opened[place][0] for place in range(len(opened))]))
    elif pixels is None or rounded:
        images = torch.stack([opened[place][0] for place in range(len(opened))])
        if pixels is not None and (pixels.factor > 1 or boxes is not None):
            images = normalize(
                images, mean, std
            )  # their tiles and regions are enlarged in float, as those of pixels are
    else:
        images = pixels.images if pixels.space == "normalized" else normalize(pixels.images, mean, std)
    return DistilledImages(
        images=images,
        labels=opened.labels,
        class_names=opened.class_names,
        mean=mean,
        std=std,
        factor=opened.factor,
        soft_labels=opened.soft_labels if soft_labels else None,
        temperature=1.0 if opened.temperature is None else opened.temperature,
        boxes=boxes,
        learned_rate=None if pixels is None else pixels.learned_rate,
        whitening=whitening,
    )


def check_recipe(
    distilled: str | Path | DistilledSet | DistilledImages, protocol: str | Protocol, has_teacher: bool
) -> None:
    """Refuse a set whose labels do not suffice for a protocol, before anything is trained.

    Raises:
        UsageError: hard labels only, no teacher, and a protocol of soft ones.
    """
    if not has_teacher:
        check_labels(_has_soft_labels(_opened(distilled)), rules_of(protocol))


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
        what="test image",
        top1=teacher.top1,
        quiet=quiet,
        chance_will_do=True,  # students of any labels can be compared
    )


def _opened(distilled: str | Path | DistilledSet | DistilledImages) -> DistilledSet | DistilledImages:
    """The set, opened anew without a transform where it is a folder's; no image is decoded yet."""
    if isinstance(distilled, DistilledImages):
        return distilled
    from ddfast.output.distilled import DistilledSet

    if isinstance(distilled, DistilledSet):
        return DistilledSet(distilled.root)
    return DistilledSet(path_of(distilled, "distilled"))


def _has_soft_labels(opened: DistilledSet | DistilledImages) -> bool:
    """Whether soft labels are stored; of a folder they are not made dense for it."""
    return (opened.soft_labels if isinstance(opened, DistilledImages) else opened.stored) is not None


def _matched_arch(distilled: str | Path | DistilledSet | DistilledImages) -> str:
    """The architecture that the pixels of a set were matched on.

    Raises:
        UsageError: they were matched on none.
    """
    opened = _opened(distilled)
    options = {} if isinstance(opened, DistilledImages) else opened.manifest["options"].get("synthesize", {})
    if not isinstance(options.get("arch"), str):
        raise UsageError(f"{argument('arch')} is missing: the set does not say which architecture to train")
    return str(options["arch"])


def source_of_test_split(data: Any, distilled: DistilledSet | DistilledImages) -> Source:
    """The test split of real data, whose classes must be those of the distilled set."""
    from ddfast.data.memory import open_memory
    from ddfast.data.opening import open_source
    from ddfast.data.sources import composed, described, is_in_memory

    data = data_of(data)
    if is_in_memory(data):
        splits = data if isinstance(data, Mapping) else {"test": data}  # images alone are those to test on
        source: Source = open_memory(splits, "test", distilled.class_names)
    else:
        source = open_source(data, "test")
    if composed(source.class_names) != composed(distilled.class_names):
        raise UsageError(
            f"{described(data)} has {plural(len(source.class_names), 'class')} that are not the distilled set's "
            f"{len(distilled.class_names)}, or stand in another order: give the data it was distilled from"
        )
    return source


def seeds_of(given: int | Sequence[int]) -> list[int]:
    """The students' seeds: 0, 1, ... for a number of students, or those that are given."""
    if isinstance(given, str) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
        count = whole_number(given, "seeds")
        if count < 1:
            raise UsageError(f"{argument('seeds')}: evaluation needs at least one seed, got {count}")
        return list(range(count))
    found = [whole_number(seed, "seeds", least=0, most=2**63 - 1) for seed in given]
    if not found:
        raise UsageError(f"{argument('seeds')}: evaluation needs at least one seed, got 0")
    if len(set(found)) < len(found):
        twice = next(seed for seed in found if found.count(seed) > 1)
        raise UsageError(f"{argument('seeds')} has {twice} twice, which would train one student twice")
    return found


def rules_of(given: str | Protocol) -> Protocol:
    """A protocol by its name, or one as it is."""
    if isinstance(given, Protocol):
        return given
    try:
        return protocol_named(given)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{error}{did_you_mean(given, PROTOCOLS)}") from error


def _check_labels(test: ImageSet, classes: int) -> None:
    labels = test.labels
    if labels.dtype != torch.int64 or len(labels) != len(test.images) or not len(labels):
        raise UsageError(
            f"the test set must have an int64 label for every image, got {labels.dtype} {list(labels.shape)} for "
            f"{plural(len(test.images), 'image')}"
        )
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        raise UsageError(f"labels of the test set must lie in 0..{classes - 1}, got {least}..{most}")


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
