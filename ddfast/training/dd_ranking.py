"""DD-Ranking: what a distilled set is worth beyond its labels and its augmentation (Li et al., 2025; arXiv 2505.13300).

Soft labels and augmentation lift any set of images, random ones too. The label-robust score (LRS) counts what a
distilled set gains over random real images with the same labels, and what it loses against the whole data set with hard
labels; the augmentation-robust score (ARS) counts its gain over random images with and without augmentation.

Two departures from the authors' program. It searches the learning rate, and takes the best epoch, on the test split;
here rates are the protocols' and the last epoch counts. And a score is computed from accuracies as fractions, which is
what its normalisation to [0, 1] needs.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddfast.errors import UsageError
from ddfast.files import atomic_write_text, make_folder
from ddfast.models.teacher import Teacher, load_teacher
from ddfast.training.distilled_images import DistilledImages
from ddfast.training.equal_steps import EqualSteps, images_of_a_pass
from ddfast.training.evaluation import check_recipe, evaluate, read_distilled, seeds_of
from ddfast.training.image_sets import ImageSet
from ddfast.training.protocol import PROTOCOLS
from ddfast.wording import argument

WEIGHT = 0.5  # w and gamma on the authors' leaderboard
RECIPES = {"hard": "dc", "soft": "rded", "plain": "rded_plain"}
"""How students are trained: with hard labels, with soft labels, and with soft labels but without augmentation; and the
protocol of each. DD-Ranking's own choice for the first is SGD with steps and no augmentation as well, and AdamW with a
cosine for the others."""


def normalized(value: float) -> float:
    """(e^value - e^-1) / (e - e^-1): from [-1, 1] to [0, 1], convex, so that large gains count more."""
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


@dataclass(frozen=True)
class LabelRobustScore:
    """Label-robust scores of some runs, one student of each kind a run.

    Attributes:
        hard_label_recovery: HLR, full data minus distilled set, both with hard labels, in points of percent.
        improvement_over_random: IOR, distilled set minus random images with the same labels, in points.
        lrs: the score, in [0, 1].
    """

    hard_label_recovery: list[float]
    improvement_over_random: list[float]
    lrs: list[float]

    def columns(self) -> dict[str, list[float]]:
        """A row a run, under the names of DD-Ranking's `obj_scores.csv`."""
        return {
            "hard_label_recovery": self.hard_label_recovery,
            "improvement_over_random": self.improvement_over_random,
            "lrs": self.lrs,
        }

    def as_dict(self) -> dict[str, float]:
        """Mean and deviation over the runs, under the names that DD-Ranking's evaluator returns."""
        return {
            **_summary("hard_label_recovery", self.hard_label_recovery),
            **_summary("improvement_over_random", self.improvement_over_random),
            **_summary("label_robust_score", self.lrs),
        }


@dataclass(frozen=True)
class AugmentationRobustScore:
    """Augmentation-robust scores of some runs.

    Attributes:
        with_augmentation: distilled set minus random images, both with augmentation, in points of percent.
        without_augmentation: the same without.
        ars: the score, in [0, 1].
    """

    with_augmentation: list[float]
    without_augmentation: list[float]
    ars: list[float]

    def columns(self) -> dict[str, list[float]]:
        """A row a run, under the names of DD-Ranking's `aug_scores.csv`."""
        return {
            "with_aug_scores": self.with_augmentation,
            "without_aug_scores": self.without_augmentation,
            "ars_list": self.ars,
        }

    def as_dict(self) -> dict[str, float]:
        """Mean and deviation over the runs, under the names that DD-Ranking's evaluator returns."""
        return {
            **_summary("with_aug_scores", self.with_augmentation),
            **_summary("without_aug_scores", self.without_augmentation),
            **_summary("augmentation_robust_score", self.ars),
        }


def _summary(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and deviation, that of a whole population as DD-Ranking has it."""
    return {f"{name}_mean": statistics.fmean(values), f"{name}_std": statistics.pstdev(values)}


def label_robust_score(
    full_hard: float,
    distilled_hard: Sequence[float],
    distilled: Sequence[float],
    random: Sequence[float],
    *,
    weight: float = WEIGHT,
) -> LabelRobustScore:
    """LRS = (e^a - e^-1) / (e - e^-1), a = w IOR - (1 - w) HLR, of accuracies in percent.

    HLR = Acc(full data, hard labels) - Acc(distilled set, hard labels), IOR = Acc(distilled set) - Acc(random images),
    both with the labels that the method is used with (paper, Sec. "Label-Robust Score").

    Args:
        full_hard: accuracy after training on the whole real set with hard labels.
        distilled_hard: of each run, on the distilled set with hard labels.
        distilled: of each run, on the distilled set with the method's labels.
        random: of each run, on as many random real images with labels of the same kind.
        weight: w in [0, 1].

    Raises:
        ValueError: numbers of runs that differ, or a number out of range.
    """
    _check(weight, [full_hard], distilled_hard, distilled, random)
    recovery = [full_hard - hard for hard in distilled_hard]
    improvement = [ours - theirs for ours, theirs in zip(distilled, random, strict=True)]
    scores = [
        normalized((weight * ior - (1 - weight) * hlr) / 100)
        for hlr, ior in zip(recovery, improvement, strict=True)
    ]
    return LabelRobustScore(recovery, improvement, scores)


def augmentation_robust_score(
    distilled: Sequence[float],
    random: Sequence[float],
    distilled_plain: Sequence[float],
    random_plain: Sequence[float],
    *,
    weight: float = WEIGHT,
) -> AugmentationRobustScore:
    """ARS = (e^b - e^-1) / (e - e^-1), b = g (gain with augmentation) + (1 - g) (gain without), of percents.

    A gain is Acc(distilled set) - Acc(random images), run by run (paper, Sec. "Augmentation-Robust Score").

    Args:
        distilled, random: with augmentation, of each run.
        distilled_plain, random_plain: without.
        weight: g in [0, 1].

    Raises:
        ValueError: numbers of runs that differ, or a number out of range.
    """
    _check(weight, [], distilled, random, distilled_plain, random_plain)
    augmented = [ours - theirs for ours, theirs in zip(distilled, random, strict=True)]
    plain = [ours - theirs for ours, theirs in zip(distilled_plain, random_plain, strict=True)]
    scores = [
        normalized((weight * a + (1 - weight) * b) / 100) for a, b in zip(augmented, plain, strict=True)
    ]
    return AugmentationRobustScore(augmented, plain, scores)


def _check(weight: float, single: Sequence[float], *runs: Sequence[float]) -> None:
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be in [0, 1], got {weight}")
    lengths = [len(values) for values in runs]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(f"wanted the same runs of every kind, at least one, got {lengths}")
    for value in (*single, *(value for values in runs for value in values)):
        if not 0 <= value <= 100:
            raise ValueError(f"accuracies are percents in [0, 100], got {value}")


@dataclass(frozen=True)
class Accuracies:
    """Test accuracies in percent behind both scores, one of each kind a run.

    Attributes:
        full_hard: after training on the whole real set with hard labels.
        distilled: recipe (see `RECIPES`) -> accuracies on the distilled set.
        random: recipe -> accuracies on random real images.
    """

    full_hard: float
    distilled: dict[str, list[float]]
    random: dict[str, list[float]]

    def label_robust(self, labels: str = "soft", *, weight: float = WEIGHT) -> LabelRobustScore:
        """The LRS of a method that is used with "soft" or with "hard" labels."""
        return label_robust_score(
            self.full_hard, self.distilled["hard"], self.distilled[labels], self.random[labels], weight=weight
        )

    def augmentation_robust(self, *, weight: float = WEIGHT) -> AugmentationRobustScore:
        """The ARS, with soft labels."""
        return augmentation_robust_score(
            self.distilled["soft"],
            self.random["soft"],
            self.distilled["plain"],
            self.random["plain"],
            weight=weight,
        )

    def as_dict(self, *, weight: float = WEIGHT) -> dict[str, Any]:
        """Accuracies and scores, ready for JSON."""
        return {
            "full_hard": self.full_hard,
            "distilled": self.distilled,
            "random": self.random,
            "weight": weight,
            "soft": self.label_robust("soft", weight=weight).as_dict(),
            "hard": self.label_robust("hard", weight=weight).as_dict(),
            "augmentation": self.augmentation_robust(weight=weight).as_dict(),
        }


def _percent(given: float) -> float:
    """An accuracy in percent. A share, or what is no number, is refused."""
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = float("nan")
    if not 1 < value <= 100:
        raise UsageError(f"{argument('full_accuracy')} is in percent, 84.8 for example, got {given!r}")
    return value


Distilled = str | Path | DistilledImages
"""A distilled folder, or its images in memory."""


def measure_accuracies(
    distilled: Distilled | Sequence[Distilled],
    random: Sequence[Distilled],
    data: str | Path | ImageSet,
    *,
    arch: str,
    full_accuracy: float,
    seeds: int | Sequence[int] = 5,
    teacher: Teacher | str | Path | None = None,
    epochs: int | None = None,
    **settings: Any,
) -> Accuracies:
    """Train the students that both scores need: six a seed.

    All students of a recipe take the same updates. Where an image of one set stands for several, for its tiles or its
    regions, and one of the other does not, the first is seen in fewer passes.

    Args:
        distilled: a distilled folder, or its images in memory; or several, of which run i takes the i-th, the first
            again behind the last.
        random: the same of random images at the same IPC.
        data: the real data, whose test split is used, or that split decoded.
        arch: the students' architecture.
        full_accuracy: test accuracy in percent of this architecture after training on the whole real set with
            hard labels.
        seeds: how many runs, or the seeds of their students.
        teacher: labels the soft students' batches online; None: the stored soft labels.
        epochs: passes over sets of whole images; None: the protocols'.
        settings: further arguments of `evaluate`.

    Raises:
        UsageError: of `evaluate`, or no set.
    """
    runs = seeds_of(seeds)
    full_accuracy = _percent(full_accuracy)
    given: Any = distilled
    ours: list[Distilled] = list(given) if isinstance(given, (list, tuple)) else [given]
    if not random:
        raise UsageError("DD-Ranking compares with random images: give at least one folder of them")
    if not ours:
        raise UsageError("DD-Ranking scores a distilled set: give at least one folder of it")
    for one in (*ours, *random):
        check_recipe(one, RECIPES["soft"], teacher is not None)
    if isinstance(teacher, (str, Path)):
        teacher = load_teacher(teacher)
    passes = {
        recipe: _passes(recipe, [*ours, *random], arch, teacher, epochs, settings) for recipe in RECIPES
    }

    def accuracies(sets: Sequence[Distilled], first: int, recipe: str) -> list[float]:
        found = []
        for number, seed in enumerate(runs):
            place = number % len(sets)
            result = evaluate(
                sets[place],
                data,
                arch=arch,
                seeds=[seed],
                teacher=None if recipe == "hard" else teacher,
                protocol=RECIPES[recipe],
                **{**settings, **passes[recipe][first + place]},
            )
            found.append(result.mean)
        return found

    return Accuracies(
        full_hard=full_accuracy,
        distilled={recipe: accuracies(ours, 0, recipe) for recipe in RECIPES},
        random={recipe: accuracies(random, len(ours), recipe) for recipe in RECIPES},
    )


def _passes(
    recipe: str,
    sets: Sequence[Distilled],
    arch: str,
    teacher: Teacher | None,
    epochs: int | None,
    settings: Mapping[str, Any],
) -> list[dict[str, int | None]]:
    """Epochs and batch size for each set: of the protocol where all are of one size, else at equal steps."""
    rules, batch_size = PROTOCOLS[RECIPES[recipe]], settings.get("batch_size")
    shown = {name: settings[name] for name in ("rounded", "regions") if name in settings}
    opened = [read_distilled(one, **shown) for one in sets]
    seen = [images_of_a_pass(one, rules) for one in opened]
    if len(set(seen)) == 1:
        return [{"epochs": epochs, "batch_size": batch_size}] * len(sets)
    least = opened[seen.index(min(seen))]
    steps = EqualSteps.of(
        rules,
        least.ipc,
        least.num_classes,
        least.image_size,
        arch=arch,
        teacher_arch=teacher.arch if teacher is not None and recipe != "hard" else None,
        epochs=epochs,
        batch_size=batch_size,
    )
    return [{"epochs": steps.epochs_of(count), "batch_size": steps.batch_size} for count in seen]


def write_scores(
    folder: str | Path, accuracies: Accuracies, *, labels: str = "soft", weight: float = WEIGHT
) -> None:
    """Write `obj_scores.csv` and `aug_scores.csv` as DD-Ranking's evaluators do: a row a run, points and scores.

    Args:
        folder: made where it is missing.
        accuracies: of all runs.
        labels: "soft" or "hard", what the method is used with.
        weight: of both scores.
    """
    folder = make_folder(Path(folder))
    for name, columns in (
        ("obj_scores.csv", accuracies.label_robust(labels, weight=weight).columns()),
        ("aug_scores.csv", accuracies.augmentation_robust(weight=weight).columns()),
    ):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        atomic_write_text(folder / name, text.getvalue())
