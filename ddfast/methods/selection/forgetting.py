"""Forgetting: images that a training learns and forgets most often (Toneva et al., ICLR 2019; arXiv 1812.05159).

Before anything is scored, a network is trained on the run's pool. Whenever an image is visited, it is noted whether the
network reads it correctly at that moment, before the step (Algorithm 1 of the paper); correct at one visit and wrong at
the next is a forgetting event. The coreset is the images of each class with the most events. An image that is never
read correctly counts as forgotten more often than any other.

The pool, `--images-per-class` of each class, stands for the paper's whole training set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.data.pool import Pool
from ddfast.errors import UsageError
from ddfast.methods.base import Context
from ddfast.methods.selection.base import Batch, Candidates, Selection, Table, whole_images
from ddfast.models import Teacher
from ddfast.models.registry import check_model, create_model
from ddfast.seeding import generator, seeded
from ddfast.settings import option
from ddfast.state import Checkpoint
from ddfast.training.augmentation import normalize, random_crop_flip
from ddfast.training.fitting import Fitting, constant, cosine, finite_loss, part
from ddfast.wording import argument

_EPOCH = "epoch"  # the name in a state of how many are done


@dataclass(frozen=True)
class ForgettingOptions:
    """Options of forgetting: the training whose events are counted."""

    epochs: int = option(50, "passes over the pool")
    arch: str = option(
        "teacher",
        "architecture of the network, one that ddfast train-teacher --help lists, or teacher: the teacher's, from new "
        "weights",
    )
    lr: float = option(0.05, "learning rate of SGD at the start, which falls to 0 as a cosine")
    train_batch_size: int = option(128, "images a step")

    def __post_init__(self) -> None:
        for name, least in (("epochs", 2), ("train_batch_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


class Forgetting(Selection):
    """The images with the most forgetting events."""

    name = "forgetting"
    summary = "whole images that a training forgets most often (Toneva et al., 2019)"
    Options = ForgettingOptions
    options: Any
    prepares = True

    def check(self, image_size: int | None) -> None:
        """Refuse an architecture that there is not."""
        if self.options.arch != "teacher":
            check_model(self.options.arch, image_size, what=f"{argument('arch')} of forgetting: ")

    def prepare(self, pool: Pool, context: Context, checkpoint: Checkpoint) -> Tensor:
        """Train on the pool and count. An image that was never read correctly gets the number of epochs, which no
        count of events reaches."""
        training = _Training(self.options, pool, context)
        for epoch in range(training.restore(checkpoint.load()), self.options.epochs):
            training.run_epoch(epoch)
            pool.say(f"forgetting: {training.progress(epoch + 1)}")
            if epoch + 1 < self.options.epochs:
                checkpoint.save(training.state(epoch + 1))
        return training.history.forgotten(self.options.epochs)

    def score(self, batch: Batch, context: Context) -> Candidates:
        """One candidate an image: all of it, with its number of forgetting events."""
        assert context.prepared is not None
        return Candidates(boxes=whole_images(batch), score=context.prepared.of(batch.ids)[:, None])

    def rank(self, table: Table, needed: int) -> tuple[dict[int, np.ndarray], np.ndarray]:
        """Most often forgotten first."""
        return table.ranked_within_class(-table.score, np.arange(len(table.label))), table.score


class History:
    """What became of N images at their visits: Algorithm 1's accuracies and counts.

    Attributes:
        correct: uint8 [N], whether the last visit read the image correctly.
        learned: uint8 [N], whether any visit did.
        events: int32 [N], visits that read it wrongly right after one that read it correctly.
    """

    def __init__(self, images: int) -> None:
        self.correct = torch.zeros(images, dtype=torch.uint8)
        self.learned = torch.zeros(images, dtype=torch.uint8)
        self.events = torch.zeros(images, dtype=torch.int32)

    def visit(self, places: Tensor, correct: Tensor) -> None:
        """Note how the images at `places` (int64 [B], each once) were read: bool [B]."""
        now = correct.to(torch.uint8)
        self.events[places] += (self.correct[places] > now).int()
        self.correct[places] = now
        self.learned[places] |= now

    def forgotten(self, never: int) -> Tensor:
        """Forgetting events of each image, float32 [N]; `never` for those that were never read correctly."""
        return torch.where(self.learned.bool(), self.events.float(), float(never))


class Visited(NamedTuple):
    """What a batch is compared with.

    Attributes:
        places: int64 [B], of its images in the pool.
        labels: int64 [B].
        targets: the labels on the training's device.
    """

    places: Tensor
    labels: Tensor
    targets: Tensor


def _cross_entropy(logits: Tensor, batch: Visited) -> Tensor:
    return F.cross_entropy(logits.float(), batch.targets)


class _Training:
    """The network on its way: SGD with momentum on padded crops and mirrored images of the pool."""

    def __init__(self, options: ForgettingOptions, pool: Pool, context: Context) -> None:
        assert context.teacher is not None
        self.options, self.pool, self.context = options, pool, context
        self.mean_std = (context.teacher.mean, context.teacher.std)
        model = _new_network(options.arch, context.teacher, pool.classes, context)
        self.fitting = Fitting(model, self._optimizer, context.device, context.precision)
        self.history = History(len(pool.labels))

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            model.parameters(), lr=self.options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        )

    def run_epoch(self, epoch: int) -> None:
        """One pass over the pool; every draw comes from a generator of (seed, purpose, epoch)."""
        seed, device, options = self.context.seed, self.context.device, self.options
        rate = constant(options.lr * cosine(epoch / options.epochs))
        with seeded(seed, "forgetting dropout", epoch, device=device):
            losses = self.fitting.epoch(self._batches(epoch), _cross_entropy, rate=rate, note=self._visit)
        finite_loss(losses.sum(), f"lower --lr (now {options.lr:g})", when=f" in epoch {epoch + 1}")

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Visited]]:
        seed, device = self.context.seed, self.context.device
        order = torch.randperm(len(self.pool.labels), generator=generator(seed, "forgetting order", epoch))
        draws = generator(seed, "forgetting augmentation", epoch)
        for places, images, labels in self.pool.batches(order, self.options.train_batch_size):
            if len(places) == 1:  # BatchNorm has no statistics of one value
                continue
            inputs = normalize(random_crop_flip(images, draws, images.shape[-1] // 8), *self.mean_std)
            yield inputs.to(device), Visited(places, labels, labels.to(device))

    def _visit(self, logits: Tensor, batch: Visited) -> None:
        self.history.visit(batch.places, logits.argmax(dim=1).cpu() == batch.labels)

    def progress(self, epochs: int) -> str:
        """What is known behind so many epochs, for the log."""
        share, events = self.history.correct.double().mean().item(), int(self.history.events.sum())
        return (
            f"epoch {epochs}/{self.options.epochs}: {100 * share:.1f}% read correctly, {events} events so far"
        )

    def state(self, epochs: int) -> dict[str, Tensor]:
        """All that the next epoch depends on, behind `epochs` of them."""
        history = {f"history.{name}": value for name, value in vars(self.history).items()}
        return {**self.fitting.state(), **history, _EPOCH: torch.tensor(epochs)}

    def restore(self, tensors: Mapping[str, Tensor]) -> int:
        """Put a state back; the number of epochs that it holds, 0 where there is none."""
        if _EPOCH not in tensors:
            return 0
        self.fitting.restore(tensors)
        for name, value in part(tensors, "history.").items():
            setattr(self.history, name, value)
        return int(tensors[_EPOCH])


def _new_network(arch: str, teacher: Teacher, classes: int, context: Context) -> nn.Module:
    """A network with new weights: of that architecture, or of the teacher's."""
    name = teacher.arch if arch == "teacher" else arch
    settings = teacher.arch_options if arch == "teacher" else {}
    try:
        with seeded(context.seed, "forgetting weights"):
            return create_model(name, classes, context.image_size, **settings)
    except ValueError as error:
        raise UsageError(f"{argument('arch')} of forgetting: {error}") from error
