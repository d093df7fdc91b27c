"""The course of a long training: epochs of steps, any of which it can be killed in and go on from.

The order of an epoch's images and all that is drawn in a step are keyed by (seed, purpose, epoch, step). So weights,
the optimiser's memory, whatever else a training keeps, and the number of steps taken decide all that follows; they are
written every minute, and at the end of every epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast.errors import UsageError
from ddfast.progress import Outlook, Progress, say
from ddfast.seeding import derived_seed, generator, seed_globally, seeded
from ddfast.state import StateFile
from ddfast.training.fitting import Fitting, finite_loss, part
from ddfast.training.image_sets import ImageSet, StreamedSet
from ddfast.training.teacher import check_identity, continued
from ddfast.wording import argument, plural, setting

_SAVE_SECONDS = 60.0  # between two saved states within an epoch: what a kill costs at most, beside a step
_FORMAT = "ddfast-course-1"
_KEY = "ddfast_course"

Prepare = Callable[[Tensor, Tensor, torch.Generator], tuple[Any, Any]]
"""uint8 images [B, 3, S, S] and labels [B] on the device, and the step's draws, to the network's input and targets."""


@dataclass
class Course:
    """A training on its way.

    Attributes:
        fitting: the network and its optimiser.
        train: the images.
        epochs: passes over them.
        batch_size: images a step.
        seed: of all draws.
        prepare: see `Prepare`.
        loss: of the network's output and the targets, a scalar.
        rate: learning rate at a share in [0, 1) of all steps.
        path: of the state's file.
        identity: what decides the result: a resumed training must agree with it.
        arithmetic: how it is computed; a resumed training keeps it.
        quiet: print nothing.
        outlook: of the training.
        after_step: follows every step of the optimiser.
        kept: further tensors that a step depends on, by name.
        restore: puts `kept` back.
        least: images that a step needs.
    """

    fitting: Fitting
    train: ImageSet | StreamedSet
    epochs: int
    batch_size: int
    seed: int
    prepare: Prepare
    loss: Callable[[Any, Any], Tensor]
    rate: Callable[[float], float]
    path: Path
    identity: dict[str, Any]
    arithmetic: dict[str, Any]
    quiet: bool
    outlook: Outlook
    after_step: Callable[[], None] = lambda: None
    kept: Callable[[], Mapping[str, Tensor]] = dict
    restore: Callable[[Mapping[str, Tensor]], None] = lambda tensors: None
    least: int = 2

    def __post_init__(self) -> None:
        self._epoch, self._step = 1, 0  # where it stands: steps of this epoch that are taken
        self._sum, self._count = 0.0, 0  # of the losses of the epoch so far, by image, and images
        self._pending: list[Tensor] = []
        self._state = StateFile(self.path, _KEY)

    def run(self, after_epoch: Callable[[int, float], None]) -> None:
        """Take the steps that are left; `after_epoch` is told of every epoch and its mean loss, before it is saved.

        Raises:
            UsageError: the loss is no longer finite.
        """
        tensors, said = self._state.read("training state")
        if said is not None:
            self.fitting.restore(tensors)
            self.restore(part(tensors, "kept."))
            self._epoch, self._step = said["epoch"], said["step"]
            self._sum, self._count = said["sum"], said["count"]
            if self._epoch <= self.epochs:
                where = f"epoch {self._epoch} of {self.epochs}, step {self._step}"
                say(f"continuing at {where}", quiet=self.quiet)
        while self._epoch <= self.epochs:
            after_epoch(self._epoch, self._one_epoch())
            self._epoch, self._step, self._sum, self._count = self._epoch + 1, 0, 0.0, 0
            self._save()

    @property
    def done(self) -> bool:
        """Whether all epochs are over."""
        return self._epoch > self.epochs

    def _one_epoch(self) -> float:
        """The rest of an epoch; its mean loss, by image."""
        epoch, device = self._epoch, self.fitting.device
        pieces = torch.randperm(len(self.train), generator=generator(self.seed, "order", epoch)).split(
            self.batch_size
        )
        label = f"epoch {epoch}/{self.epochs}"
        taken = min(self._step * self.batch_size, len(self.train))
        saved = time.monotonic()
        progress = Progress(
            label, len(self.train), "images", done=taken, quiet=self.quiet, outlook=self.outlook
        )

        def batches() -> Iterator[tuple[Any, Any]]:
            nonlocal saved
            for number in range(self._step, len(pieces)):
                # A piece is a step whatever of it can be decoded, so that a step is always of the same images.
                for images, labels in self.train.batches(pieces[number], self.batch_size):
                    if len(labels) < self.least:
                        continue
                    seed_globally(derived_seed(self.seed, "forward", epoch, number), device)
                    draws = generator(self.seed, "step", epoch, number)
                    self._size = len(labels)
                    yield self.prepare(images.to(device), labels.to(device), draws)
                    self.after_step()
                progress.advance(len(pieces[number]))
                self._step = number + 1
                if time.monotonic() - saved >= _SAVE_SECONDS and self._step < len(pieces):
                    self._save()
                    saved = time.monotonic()

        def loss(output: Any, targets: Any) -> Tensor:
            value = self.loss(output, targets)
            self._pending.append(value.detach().double() * self._size)
            self._count += self._size
            return value

        total = self.epochs * len(pieces)

        def rate(_: int) -> float:
            return self.rate(((epoch - 1) * len(pieces) + self._step) / total)

        with seeded(self.seed, "forward", epoch, device=device), progress:
            self.fitting.epoch(batches(), loss, rate=rate)
        if not self._count:
            raise UsageError(
                f"no step has {plural(self.least, 'readable image')}: give more images, or a smaller "
                f"{argument('batch_size')}"
            )
        return self._mean()

    def _mean(self) -> float:
        """Mean loss of the epoch so far; what was pending is added up in the order of the steps."""
        for value in torch.stack(self._pending).tolist() if self._pending else []:
            self._sum += value
        self._pending.clear()
        return finite_loss(
            torch.tensor(self._sum / max(self._count, 1), dtype=torch.float64),
            f"lower {argument('lr')}",
            when=f" in epoch {self._epoch}",
        )

    def _save(self) -> None:
        self._mean()
        tensors = {**self.fitting.state(), **{f"kept.{name}": value for name, value in self.kept().items()}}
        said = {
            "format": _FORMAT,
            "training": self.identity,
            "arithmetic": self.arithmetic,
            "epoch": self._epoch,
            "step": self._step,
            "sum": self._sum,
            "count": self._count,
        }
        self._state.write(tensors, said)


def held_arithmetic(
    path: Path, identity: dict[str, Any], now: dict[str, Any], resume: bool
) -> dict[str, Any]:
    """The arithmetic to train in: that of a state which stands at `path` and is gone on with, else `now`.

    Raises:
        UsageError: a state stands there and `resume` is off, or it is of another run, or it is damaged.
    """
    _, said = StateFile(path, _KEY).read("training state")
    if said is None:
        return now
    if not isinstance(said, dict) or said.get("format") != _FORMAT:
        raise UsageError(f"{path} is not a training state of this version: delete it to train anew")
    if not resume:
        raise UsageError(
            f"{path} holds an unfinished run, in epoch {said['epoch']} of {said['training'].get('epochs')}: continue "
            f"it with {setting('resume', True)}, give another {argument('out')}, or delete it to train anew"
        )
    check_identity(path, said["training"], identity)
    return continued(path, said, now)
