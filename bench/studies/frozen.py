"""Students of the same updates on every set: protocols by name, without a learning rate of a set's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bench.studies.arms import Arm, Setup, Training, set_of, teacher_at
from ddfast.models import Teacher
from ddfast.training.equal_steps import EqualSteps, images_of_a_pass
from ddfast.training.evaluation import read_distilled


def equal_steps(training: Training, ipc: int, teacher: Teacher) -> EqualSteps:
    """What the protocol of a training spends at an IPC, in whole passes over every kind of set.

    `epochs` and `batch_size` of the training, where it has any, are those of a set of whole images.
    """
    return EqualSteps.of(
        training.rules,
        ipc,
        len(teacher.class_names),
        teacher.image_size,
        arch=training.arch,
        teacher_arch=None if training.hard else teacher.arch,
        epochs=training.epochs,
        batch_size=training.batch_size,
    )


def at_equal_steps(training: Training, folder: Path, steps: EqualSteps) -> Training:
    """The training with as many passes over the set in `folder` as make these steps."""
    seen = images_of_a_pass(read_distilled(folder), training.rules)
    return dataclasses.replace(training, epochs=steps.epochs_of(seen), batch_size=steps.batch_size)


def training_on(arm: Arm, ipc: int, setup: Setup, training: Training, seed: int) -> Training:
    """The training of one student of an arm at equal steps; its set is distilled where it is not there."""
    folder = set_of(arm, ipc, setup, training, seed).make()
    return at_equal_steps(training, folder, equal_steps(training, ipc, teacher_at(setup.teacher)))
