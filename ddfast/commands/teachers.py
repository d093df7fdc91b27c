"""Teachers as a command line names them: a file, a state dict with what must be said of it, or published weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from ddfast.commands.flags import add_settings
from ddfast.errors import UsageError
from ddfast.wording import argument


def add_teacher(parser: argparse.ArgumentParser, **said: Any) -> None:
    """Add --teacher and what must be said of a state dict; arguments of `add_argument` for --teacher."""
    add_settings(parser, ("teacher",), teacher=said)
    add_architecture(parser)
    add_settings(
        parser,
        ("normalization", "class_order"),
        normalization={
            "help": "mean and deviation of the pixels of a .pt state dict: imagenet, cifar10, tinyimagenet, none, "
            "numbers as mean,mean,mean/std,std,std, or auto: imagenet"
        },
    )


def add_architecture(parser: argparse.ArgumentParser, **said: Any) -> None:
    """Add --teacher-arch, which only a state dict needs; arguments of `add_argument` that are otherwise here."""
    arguments: dict[str, Any] = {
        "default": None,
        "metavar": "NAME",
        "help": "architecture of a weights-only state dict, one that ddfast train-teacher --help lists, "
        "torchvision:NAME or timm:NAME; default what the teacher file says",
    }
    parser.add_argument("--teacher-arch", **{**arguments, **said})


def said_normalization(arguments: argparse.Namespace) -> str | None:
    """The normalisation that is given, None where it is left to the teacher or the default."""
    return None if arguments.normalization == "auto" else str(arguments.normalization)


def teacher_choice(
    arguments: argparse.Namespace,
    spec: str | None,
    classes_and_size: Callable[[], tuple[Sequence[str], int | None]],
    class_order: str | None,
    role: str = "teacher",
    *,
    describes_pixels: bool = True,
) -> Any:
    """What loads the teacher that is named, once the other options are checked; None where none is.

    Args:
        arguments: of the command.
        spec: teacher file, state dict, or published weights.
        classes_and_size: what gives the classes of the data and the image size, for a file that does not name them.
        class_order: file of the order of its outputs.
        role: "teacher" or "label_teacher".
        describes_pixels: whether the normalisation is of nothing but the teacher.

    Raises:
        UsageError: there is no such file, or an option that only a state dict needs is missing or left over.
    """
    if spec is None:
        said = {"teacher_arch": arguments.teacher_arch, "class_order": class_order}
        if describes_pixels:
            said["normalization"] = said_normalization(arguments)
        for keyword in ("teacher_arch", "normalization", "class_order"):
            if role == "teacher" and said.get(keyword) is not None:
                raise UsageError(
                    f"{argument(keyword)} describes a teacher: give {argument('teacher')} as well"
                )
        return None
    check_teacher(arguments, spec, class_order, role)
    return lambda: _load_teacher(arguments, spec, classes_and_size, class_order)


def check_teacher(
    arguments: argparse.Namespace, spec: str, class_order: str | None, role: str = "teacher"
) -> None:
    """Refuse a teacher that is not there, and what is said of it that cannot be; arguments as `teacher_choice`."""
    from ddfast.models.class_order import read_class_order
    from ddfast.models.normalization import normalization
    from ddfast.models.registry import check_model, described_input
    from ddfast.models.teacher import is_state_dict
    from ddfast.pipeline.teachers import check_teacher_choice

    check_teacher_choice(spec, role)
    if class_order is not None:
        read_class_order(class_order)
    if said_normalization(arguments) is not None:
        try:
            normalization(arguments.normalization)
        except ValueError as error:
            raise UsageError(str(error)) from error
    if arguments.teacher_arch is not None:
        check_model(arguments.teacher_arch, what=f"{argument('teacher_arch')}: ")
    if is_state_dict(spec):
        described = arguments.teacher_arch is not None and described_input(arguments.teacher_arch) is not None
        wanted = {"teacher_arch": "its architecture", "image_size": "its image size"}
        missing = [
            f"{what} as {argument(keyword)}"
            for keyword, what in wanted.items()
            if getattr(arguments, keyword, "of the data") is None
            and not (keyword == "image_size" and described)
        ]
        if missing:
            raise UsageError(f"{spec} is a bare state dict: give {' and '.join(missing)}")


def _load_teacher(
    arguments: argparse.Namespace,
    spec: str,
    classes_and_size: Callable[[], tuple[Sequence[str], int | None]],
    class_order: str | None,
) -> Any:
    """A teacher by its file; where that does not name its classes, they and their order are those of the data."""
    from ddfast.models import load_teacher
    from ddfast.models.published import published

    said: dict[str, Any] = {"class_order": class_order}
    bare = is_bare(arguments, spec)
    others = published(spec) is not None
    if bare or (arguments.teacher_arch is not None and not others):
        said |= {"arch": arguments.teacher_arch, "normalization": said_normalization(arguments)}
    if others:
        said["normalization"] = said_normalization(arguments)
    if bare or others or class_order is not None:
        said["class_names"], size = classes_and_size()
        said |= {"image_size": size} if bare else {}
    return load_teacher(spec, **said)


def is_bare(arguments: argparse.Namespace, spec: str) -> bool:
    """Whether a teacher file holds weights alone."""
    from ddfast.models.published import published
    from ddfast.models.teacher import is_named, is_state_dict

    if arguments.teacher_arch is None or published(spec) is not None:
        return is_state_dict(spec)
    return not is_named(spec)


def class_names_of(data: str) -> Sequence[str]:
    """The classes of a data set."""
    from ddfast.data import open_source

    return open_source(data, "train").class_names
