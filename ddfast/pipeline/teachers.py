"""The teachers of a run: which were given, whether they fit the data, and how they are loaded again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ddfast.arguments import path_of
from ddfast.data.sources import Source, composed
from ddfast.errors import UsageError
from ddfast.methods.base import Method
from ddfast.models import Teacher, load_teacher
from ddfast.models.class_order import read_class_order
from ddfast.models.normalization import Normalization
from ddfast.models.normalization import normalization as resolve_normalization
from ddfast.models.published import NAMED, published
from ddfast.models.teacher import is_named, with_class_order, with_outputs_in
from ddfast.settings import Settings
from ddfast.wording import argument, plural

TeacherChoice = str | Path | Teacher | Callable[[], Teacher]
"""A teacher by its file or name, a loaded one, or what loads it once the settings are checked."""

ClassOrder = str | Path | Sequence[str] | Mapping[Any, Any]
"""Classes in the order of a teacher's outputs: names, {index: name}, or a file of them."""


def check_teachers(settings: Settings, method: type[Method]) -> None:
    """Refuse teachers that are not there or that the method has no use for; nothing is read yet.

    Raises:
        UsageError: in one line, what is wrong.
    """
    if settings.teacher is None and method.requires_teacher():
        raise UsageError(
            f"{argument('teacher')} must be a path, got None: {method.name} needs one, a .safetensors file of "
            f"train-teacher, a .pt state dict, {NAMED}"
        )
    for given, role in ((settings.teacher, "teacher"), (settings.label_teacher, "label_teacher")):
        if given is not None:
            check_teacher_choice(given, role)
    for role in ("class_order", "label_class_order"):
        if getattr(settings, role) is not None:
            read_class_order(getattr(settings, role))
    if settings.class_order is not None and settings.teacher is None:
        raise UsageError(f"{argument('class_order')} describes a teacher: give {argument('teacher')} as well")
    if settings.label_class_order is not None and settings.label_teacher is None:
        raise UsageError(
            f"{argument('label_class_order')} describes a label teacher: give {argument('label_teacher')} as well"
        )
    normalization_of(settings)


def with_one_teacher(settings: Settings) -> Settings:
    """The settings of a method that goes without a teacher, where a label teacher given alone is the teacher too."""
    if settings.teacher is not None or settings.label_teacher is None:
        return settings
    return dataclasses.replace(
        settings,
        teacher=settings.label_teacher,
        label_teacher=None,
        class_order=settings.class_order or settings.label_class_order,
        label_class_order=None,
    )


def normalization_of(settings: Settings) -> Normalization:
    """(mean, std) of the pixels of a run without a teacher.

    Raises:
        UsageError: no such normalisation.
    """
    try:
        return resolve_normalization(settings.normalization)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{argument('normalization')}: {error}") from error


def open_teachers(
    settings: Settings, source: Source, method: type[Method]
) -> tuple[Teacher | None, Teacher | None]:
    """What a method asks and what labels its images, the outputs of both in the order of the data's classes.

    Raises:
        UsageError: they do not fit the data, each other or the normalisation that was given.
    """
    if settings.teacher is None:
        return None, None
    main = _teacher(settings.teacher, source.class_names, settings.class_order)
    check_teacher(main, source, role="teacher")
    if settings.normalization != "auto" and normalization_of(settings) != (tuple(main.mean), tuple(main.std)):
        raise UsageError(
            f"{argument('normalization')} differs from the teacher's, which {_reads(main)}: leave it out"
        )
    if "relabel" not in method.stages:
        return main, None
    labels = _label_teacher(settings, source, main)
    check_teacher(labels, source, role="label teacher")
    if (labels.image_size, labels.mean, labels.std) != (main.image_size, main.mean, main.std):
        raise UsageError(
            "the label teacher must share the teacher's image size and normalisation: "
            f"{_reads(labels)}, the teacher {_reads(main)}"
        )
    return main, labels


def _label_teacher(settings: Settings, source: Source, main: Teacher) -> Teacher:
    """The teacher of the soft labels: the main one unless another is given."""
    given, order = settings.label_teacher, settings.label_class_order
    if given is None or (given is settings.teacher and order is None):
        return main
    if order is None and not callable(given) and not is_named(given):
        order = settings.class_order  # an early checkpoint of the same training
    return _teacher(given, source.class_names, order)


def _teacher(given: TeacherChoice, class_names: Sequence[str], class_order: ClassOrder | None) -> Teacher:
    """A teacher of this run's own, its outputs in the order of the data where their order was said.

    Its model is a copy where the caller holds it: a run moves it and sets its mode and layout.
    """
    if callable(given):
        given = given()
    if not isinstance(given, Teacher):
        names = None if class_order is None and published(given) is None else class_names
        return load_teacher(str(given), class_order=class_order, class_names=names)
    held = dataclasses.replace(given, model=copy.deepcopy(given.model).float().eval())
    if class_order is not None:
        return with_class_order(held, class_order, class_names)
    if held.class_order is not None and set(held.class_names) == set(class_names):
        return with_outputs_in(held, class_names)
    return held


def check_teacher(teacher: Teacher, source: Source, *, role: str = "teacher") -> None:
    """Refuse a teacher whose outputs are not the classes of the data, in that order.

    Raises:
        UsageError: the counts or the orders differ.
    """
    theirs, ours = list(teacher.class_names), list(source.class_names)
    if len(theirs) != len(ours):
        raise UsageError(
            f"the {role} knows {plural(len(theirs), 'class')}, {source.name} has {len(ours)}: give its own teacher"
        )
    for index, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if composed([a]) != composed([b]):
            raise UsageError(
                f"the {role}'s class {index} is {a!r}, that of {source.name} is {b!r}: the class order must match, or "
                f"be said with {argument('class_order' if role == 'teacher' else 'label_class_order')}"
            )


def check_teacher_choice(given: TeacherChoice | None, role: str) -> None:
    """Refuse what cannot be a teacher, a file that is not there among it; nothing is read yet."""
    if isinstance(given, torch.nn.Module):
        raise UsageError(
            f"{argument(role)} must be a ddfast Teacher, which knows classes and normalisation, got the bare module "
            f"{type(given).__name__}: write it with ddfast.models.save_teacher"
        )
    if isinstance(given, Teacher) or callable(given) or published(given) is not None:
        return
    path = path_of(given, role)
    if path.is_dir():
        raise UsageError(
            f"{argument(role)} {path} is a folder: give a .safetensors file of train-teacher, or a folder with a "
            "config.json, as the Hub has them"
        )
    if not path.is_file():
        raise UsageError(
            f"no teacher file {path}: give a .safetensors file of train-teacher, a .pt state dict, {NAMED}"
        )


def check_stands(path: str | Path | None, role: str, *, moved: bool) -> None:
    """Refuse a teacher file of a run that is no longer there; `moved` where its path is that of `run.json`."""
    if path is None:
        return
    try:
        check_teacher_choice(path, role)
    except UsageError as error:
        if not moved:
            raise
        raise UsageError(f"{error} ({argument(role)} says where it is now)") from error


def load_again(spec: str | Path | None, plan: dict[str, Any], role: str) -> Teacher:
    """A teacher of a run by its file, with what the manifest says of it."""
    if spec is None:
        raise UsageError(
            f"the run was started with a teacher that has no file: give its file as {argument(role)}"
        )
    said: dict[str, Any] = {}
    if published(spec) is not None:
        said = {"normalization": (plan["mean"], plan["std"])}
    elif not is_named(spec):
        said = {
            "arch": plan[role]["arch"],
            "normalization": (plan["mean"], plan["std"]),
            "image_size": plan["image_size"],
        }
    return load_teacher(
        str(spec), class_names=plan["class_names"], class_order=plan[role].get("class_order"), **said
    )


def check_reads(teacher: Teacher, size: int) -> None:
    """Refuse an image size that the teacher's network cannot take, by one black image."""
    try:
        with torch.no_grad():
            teacher.model(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"the teacher {teacher.arch} reads {teacher.image_size} px and cannot read {size} px: leave "
            f"{argument('image_size')} out, or train one at that size"
        ) from error


def _reads(teacher: Teacher) -> str:
    numbers = (", ".join(f"{value:g}" for value in values) for values in (teacher.mean, teacher.std))
    return "reads {} px with mean {} and deviation {}".format(teacher.image_size, *numbers)
