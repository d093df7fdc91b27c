"""Try a teacher on labelled images before hours are spent on what it says: does it know these classes, in this order?

Three things go wrong unseen: the outputs stand in another order than the labels, the images are normalised in another
way than in its training, or it was never any good. The first shows in the confusions: images of one class are read,
again and again, as one other. So several images of some classes tell more than one of each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ddfast.errors import UsageError
from ddfast.models.teacher import checked_logits
from ddfast.progress import say
from ddfast.training.augmentation import normalize
from ddfast.training.device import memory_layout
from ddfast.wording import argument, plural, setting

LEAST_IMAGES = 64
MOST_IMAGES = 512
IMAGES_OF_A_CLASS = 8  # at least, where there are more classes than can all be tried
_PIXELS = 1 << 22  # tried on a CPU; more images than `LEAST_IMAGES` only while they stay below
_CERTAIN = 1e-3  # chance that a teacher in the right order looks as if it were in another
_LIKELY = 0.01
_FAR_BETTER = 2  # images that another order must explain for each that only the right one does
_BATCH = 64


def images_to_try(image_size: int, device: torch.device) -> int:
    """How many images a teacher is tried on: more of small ones, and on a GPU."""
    if device.type == "cuda":
        return MOST_IMAGES
    return min(MOST_IMAGES, max(LEAST_IMAGES, _PIXELS // image_size**2))


def drawn_places(labels: np.ndarray, classes: int, count: int) -> np.ndarray:
    """Places of about `count` samples that tell most of a teacher, ascending.

    As many of each class; of more classes than that gives `IMAGES_OF_A_CLASS` each, some classes only. The draw is
    always the same.

    Args:
        labels: int [N], in 0 .. classes - 1.
        classes: C.
        count: number of samples wanted.
    """
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(classes + 1))
    chosen: list[np.ndarray] = []
    left = count
    for done, label in enumerate(np.random.default_rng(0).permutation(classes).tolist()):
        first, last = edges[label], edges[label + 1]
        share = max(IMAGES_OF_A_CLASS, -(-left // (classes - done)))
        number = int(min(last - first, share, left))
        chosen.append(order[np.linspace(first, last - 1, number).round().astype(np.int64)])
        left -= number
        if left == 0:
            break
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Reading:
    """How a teacher reads some labelled images.

    Attributes:
        hits: images that it reads as their label.
        images: all of them.
        classes: C.
        near_chance: whether guessing reaches as many hits in one of a hundred tries.
        moves: label -> the output as which its images are read instead, where the labels so moved explain the images
            better than the right order does; each output for one label.
        moved_hits: hits that the moves would add, less those that they would cost.
        far_better: whether they explain at least twice as many of the images that they move.
        chance: probability that a teacher in the right order would speak as much for another.

    """

    hits: int
    images: int
    classes: int
    near_chance: bool
    moves: dict[int, int]
    moved_hits: int
    far_better: bool
    chance: float

    @property
    def rate(self) -> float:
        """Share of hits."""
        return self.hits / self.images

    @property
    def poor(self) -> bool:
        """Whether it is nearer to guessing than to reading every image."""
        return self.rate < (1 + 1 / self.classes) / 2


def read_images(predictions: Tensor, labels: Tensor, classes: int) -> Reading:
    """Compare predictions with labels, both int64 [N], N at least 1.

    Another order is judged on images that had no part in finding it: it is found on every other image of a class,
    and tried on the rest, and the other way round. `chance` is that of a sign test on the images that one of the two
    orders explains.
    """
    pairs = list(zip(labels.tolist(), predictions.tolist(), strict=True))
    halves: tuple[list[tuple[int, int]], ...] = ([], [])
    seen: Counter[int] = Counter()
    for label, prediction in pairs:
        halves[seen[label] % 2].append((label, prediction))
        seen[label] += 1
    better = worse = 0
    for found_on, tried_on in (halves, halves[::-1]):
        moves = _moves(found_on)
        gained, lost = _gained_and_lost(moves, tried_on)
        better, worse = better + gained, worse + lost
    chance = _sign_test(better, worse)
    moves = _moves(pairs) if chance <= _LIKELY else {}
    gained, lost = _gained_and_lost(moves, pairs)
    hits = sum(label == prediction for label, prediction in pairs)
    return Reading(
        hits=hits,
        images=len(pairs),
        classes=classes,
        near_chance=hits <= max(chance_hits(len(pairs), classes), _hits_of_the_unrelated(pairs)),
        moves=moves,
        moved_hits=gained - lost,
        far_better=better >= _FAR_BETTER * worse,
        chance=chance,
    )


def _moves(pairs: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Labels whose images are mostly read as one other output, the strongest first; each output for one label."""
    counts = Counter(pairs)
    taken: dict[int, int] = {}
    outputs: set[int] = set()
    for (label, output), _ in sorted(
        counts.items(), key=lambda item: (-item[1], item[0][0] != item[0][1], item[0])
    ):
        if label not in taken and output not in outputs:
            taken[label] = output
            outputs.add(output)
    return {
        label: output
        for label, output in taken.items()
        if output != label and counts[label, output] >= max(2, counts[label, label] + 1)
    }


def _gained_and_lost(moves: Mapping[int, int], pairs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Images that the moves alone explain, and those that only the right order does: a moved output is lost to its
    own label as well."""
    moved = set(moves) | set(moves.values())
    gained = sum(moves.get(label) == prediction for label, prediction in pairs)
    return gained, sum(label in moved and label == prediction for label, prediction in pairs)


def _sign_test(better: int, worse: int) -> float:
    """Probability of at least `better` of all where either is as likely."""
    trials = better + worse
    return sum(math.comb(trials, k) for k in range(better, trials + 1)) / 2**trials


def chance_hits(trials: int, classes: int, tail: float = 0.01) -> int:
    """The most hits that guessing reaches, but for a share `tail` of tries (binomial quantile)."""
    p = 1 / classes
    mass, total = (1 - p) ** trials, 0.0
    for hits in range(trials):
        total += mass
        if total >= 1 - tail:
            return hits
        mass *= (trials - hits) / (hits + 1) * p / (1 - p)
    return trials


def _hits_of_the_unrelated(pairs: Sequence[tuple[int, int]]) -> float:
    """Hits that such predictions reach on such labels where they have nothing to do with each other.

    One output for every image hits as often as its class is there. Mean and 2.33 standard deviations (one of a hundred)
    over all orders of the predictions.
    """
    count = len(pairs)
    labels, outputs = Counter(label for label, _ in pairs), Counter(output for _, output in pairs)
    products = [labels[k] * outputs[k] for k in labels]
    mean = sum(products) / count
    if count < 2:
        return mean
    both = sum(product * (labels[k] + outputs[k]) for k, product in zip(labels, products, strict=True))
    # Of the sum of a matrix over a random matching (Hoeffding, 1951).
    variance = (mean * count + mean**2 - both / count) / (count - 1)
    return mean + 2.33 * math.sqrt(max(variance, 0.0))


def check_reading(
    reading: Reading,
    class_names: Sequence[str],
    *,
    role: str,
    what: str,
    top1: float | None,
    quiet: bool,
    chance_will_do: bool = False,
) -> None:
    """Say how many images a teacher reads, warn where they are few, and refuse it where its order must be another.

    Args:
        reading: of `read_images`.
        class_names: of the labels.
        role: "teacher" or "label teacher".
        what: "training image" or "test image".
        top1: test accuracy that its file claims, percent.
        quiet: say nothing.
        chance_will_do: only warn of a teacher near chance.

    Raises:
        UsageError: near chance, or another class order explains the images far better.
    """
    images, classes = plural(reading.images, what), plural(reading.classes, "class")
    said = f"the {role} reads {reading.hits} of {images} correctly"
    chance = f", near chance for {classes}" if reading.near_chance else ""
    way_out = f"({setting('preflight', False)} goes on regardless)"
    certain = reading.chance <= _CERTAIN or reading.near_chance
    if reading.moves and reading.far_better and certain:
        raise UsageError(
            f"{said}{chance}: it {_misread(reading.moves, class_names)}, so its outputs stand in another class order, "
            f"in which {reading.hits + reading.moved_hits} would be right; say the order with "
            f"{argument('class_order' if role == 'teacher' else 'label_class_order')} {way_out}"
        )
    if reading.near_chance and not chance_will_do:
        raise UsageError(
            f"{said}{chance}: its class order or normalisation does not match the data {way_out}"
        )
    say(f"{role} reads {reading.hits} of {images} ({100 * reading.rate:.0f}%)", quiet=quiet)
    reasons = []
    if reading.near_chance or reading.poor:
        judged = "near chance" if reading.near_chance else "poor"
        reasons.append(f"that is {judged} for {classes}")
    if top1 is not None and _falls_short(reading, top1 / 100):
        reasons.append(f"its file says {top1:.0f}%")
    if reading.moves:
        reasons.append(
            f"it mostly {_misread(reading.moves, class_names)}, as if these stood in another order"
        )
    if reasons:
        say(
            f"warning: {' and '.join(reasons)}: check the {role}'s class order, normalisation and image size, or train "
            "it further",
            quiet=quiet,
        )


def _falls_short(reading: Reading, claimed: float) -> bool:
    """Whether so few hits would come about in one of a thousand tries at the claimed accuracy."""
    spread = math.sqrt(max(reading.images * claimed * (1 - claimed), 1.0))
    return reading.hits < reading.images * claimed - 3.1 * spread


def _misread(moves: Mapping[int, int], class_names: Sequence[str], most: int = 3) -> str:
    shown = [f"{class_names[label]!r} images as {class_names[output]!r}" for label, output in moves.items()]
    more = f" and so on for {plural(len(shown) - most, 'more class')}" if len(shown) > most else ""
    return f"reads {', '.join(shown[:most])}{more}"


def try_teacher(
    model: nn.Module,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    classes: int,
    device: torch.device,
    *,
    role: str = "teacher",
) -> Tensor:
    """Predictions of a model in eval mode on `device`: uint8 images [N, 3, S, S] -> int64 [N], on the CPU.

    Raises:
        UsageError: it returns no logits of its classes, or NaN or infinity.
    """
    layout, found = memory_layout(model, device), []
    with torch.no_grad():
        for batch in images.split(_BATCH):
            inputs = normalize(batch.to(device), mean, std).contiguous(memory_format=layout)
            logits = checked_logits(model(inputs), classes, role).float().cpu()
            if not bool(torch.isfinite(logits).all()):
                raise UsageError(
                    f"the {role} returns NaN or infinity: its weights are damaged, train it again"
                )
            found.append(logits.argmax(dim=1))
    return torch.cat(found)
