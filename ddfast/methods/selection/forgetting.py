"""Forgetting: images that a training learns and forgets most often (Toneva et al., ICLR 2019; arXiv 1812.05159).

Before anything is scored, a network is trained on the run's pool. Whenever an image is visited, it is noted whether the
network reads it correctly at that moment, before the step (Algorithm 1 of the paper); correct at one visit and wrong at
the next is a forgetting event. The coreset is the images of each class with the most events. An image that is never
read correctly counts as forgotten more often than any other.

The pool, `--images-per-class` of each class, stands for the paper's whole training set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.data.pool import Pool
from ddfast.errors import UsageError
from ddfast.methods.base import Context, Method
from ddfast.methods.selection.base import Batch, Candidates, Table, whole_images
from ddfast.models import Teacher
from ddfast.models.registry import check_model, create_model
from ddfast.ops.precision import autocast
from ddfast.seeding import generator, seeded
from ddfast.settings import option
from ddfast.state import Checkpoint
from ddfast.training.augmentation import normalize, random_crop_flip
from ddfast.wording import argument


@dataclass(frozen=True)
class ForgettingOptions:
    """Options of forgetting: the training whose events are counted."""

    epochs: int = option(50, "passes over the pool")
    arch: str = option(
        "teacher", "architecture of the network, or `teacher`: the teacher's, from new weights"
    )
    lr: float = option(0.05, "learning rate of SGD at the start; falls to 0 as a cosine")
    train_batch_size: int = option(128, "images a step")

    def __post_init__(self) -> None:
        for name, least in (("epochs", 2), ("train_batch_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


class Forgetting(Method):
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


class _Training:
    """The network on its way: SGD with momentum on padded crops and mirrored images of the pool."""

    def __init__(self, options: ForgettingOptions, pool: Pool, context: Context) -> None:
        assert context.teacher is not None
        self.options, self.pool, self.context = options, pool, context
        self.mean_std = (context.teacher.mean, context.teacher.std)
        model = _new_network(options.arch, context.teacher, pool.classes, context)
        self.model = model.to(device=context.device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.history = History(len(pool.labels))

    def run_epoch(self, epoch: int) -> None:
        """One pass over the pool; every draw comes from a generator of (seed, purpose, epoch)."""
        seed, device, options = self.context.seed, self.context.device, self.options
        order = torch.randperm(len(self.pool.labels), generator=generator(seed, "forgetting order", epoch))
        draws = generator(seed, "forgetting augmentation", epoch)
        total = torch.zeros((), device=device)
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * 0.5 * (1 + math.cos(math.pi * epoch / options.epochs))
        with seeded(seed, "forgetting dropout", epoch, device=device):
            for places, images, labels in self.pool.batches(order, options.train_batch_size):
                if len(places) == 1:  # BatchNorm cannot train on it
                    continue
                inputs = normalize(random_crop_flip(images, draws, images.shape[-1] // 8), *self.mean_std)
                with autocast(self.context.precision, device):
                    logits = self.model(inputs.to(device))
                self.history.visit(places, logits.argmax(dim=1).cpu() == labels)
                loss = F.cross_entropy(logits.float(), labels.to(device))
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                total += loss.detach()
        if not math.isfinite(total.item()):
            raise UsageError(
                f"the loss became {total.item()} in epoch {epoch + 1}: lower --lr (now {options.lr:g})"
            )

    def progress(self, epochs: int) -> str:
        """What is known behind so many epochs, for the log."""
        share, events = self.history.correct.double().mean().item(), int(self.history.events.sum())
        return (
            f"epoch {epochs}/{self.options.epochs}: {100 * share:.1f}% read correctly, {events} events so far"
        )

    def state(self, epochs: int) -> dict[str, Tensor]:
        """All that the next epoch depends on, behind `epochs` of them."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for number, parameter in enumerate(self.model.parameters()):
            if "momentum_buffer" in self.optimizer.state[parameter]:
                tensors[f"momentum.{number}"] = self.optimizer.state[parameter]["momentum_buffer"]
        tensors |= {f"history.{name}": value for name, value in vars(self.history).items()}
        return {**tensors, "epochs": torch.tensor(epochs)}

    def restore(self, tensors: Mapping[str, Tensor]) -> int:
        """Put a state back; the number of epochs that it holds, 0 where there is none."""
        if not tensors:
            return 0
        self.model.load_state_dict(_part(tensors, "model."))
        for name, value in _part(tensors, "history.").items():
            setattr(self.history, name, value)
        parameters = list(self.model.parameters())
        for number, value in _part(tensors, "momentum.").items():
            # In its parameter's memory layout, as in the run that is continued: it decides the rounding.
            buffer = torch.empty_like(parameters[int(number)]).copy_(value).detach()
            self.optimizer.state[parameters[int(number)]]["momentum_buffer"] = buffer
        return int(tensors["epochs"])


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _new_network(arch: str, teacher: Teacher, classes: int, context: Context) -> nn.Module:
    """A network with new weights: of that architecture, or of the teacher's."""
    name = teacher.arch if arch == "teacher" else arch
    settings = teacher.arch_options if arch == "teacher" else {}
    try:
        with seeded(context.seed, "forgetting weights"):
            return create_model(name, classes, context.image_size, **settings)
    except ValueError as error:
        raise UsageError(f"{argument('arch')} of forgetting: {error}") from error
