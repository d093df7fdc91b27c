"""Labels of images in memory: class numbers, names, one-hot rows, and the classes that they make."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ddfast.data.sources import is_unicode
from ddfast.errors import UsageError

Label = int | str
_MOST_CLASSES = 10**9


def distinct(class_names: Sequence[Any]) -> list[str]:
    """Class names as text; of those with one name, each has its number behind it.

    Raises:
        UsageError: no list, or a name that is empty, holds NUL or is no valid Unicode.
    """
    if isinstance(class_names, (str, bytes)) or not isinstance(class_names, Iterable):
        raise UsageError(
            f"class names must be a list, one for each class number, got {shortened(class_names)}"
        )
    names = [_as_text(name) for name in class_names]
    if bad := next((name for name in names if not name or "\0" in name or not is_unicode(name)), None):
        raise UsageError(f"a class has the name {bad!r}: give it one of valid Unicode without NUL")
    if "" in names:
        raise UsageError(f"class number {names.index('')} has an empty name")
    given = Counter(names)
    found = [f"{name} ({number})" if given[name] > 1 else name for number, name in enumerate(names)]
    if twice := next((name for name, count in Counter(found).items() if count > 1), None):
        raise UsageError(f"two classes have the name {twice!r}: rename one of them")
    return found


def _as_text(name: Any) -> str:
    if isinstance(name, (tuple, list)):
        return ", ".join(map(_as_text, name))
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name)


def label_of(label: Any, whose: str) -> Label:
    """A label as a class number or a class name. Raises `UsageError` for anything else, NUL in a name included."""
    if isinstance(label, (Tensor, np.ndarray, np.generic)):
        array = np.asarray(label.detach().cpu().float() if isinstance(label, Tensor) else label)
        if array.size == 1:
            label = label.item()
        elif array.ndim == 1 and array.size and array.dtype.kind in "buif" and _is_one_hot(array[None]):
            label = int(array.argmax())
    if isinstance(label, str):
        if not label or "\0" in label or not is_unicode(label):
            raise UsageError(f"{whose} has the label {label!r}, which is no class name")
        return label
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    try:
        number = operator.index(label)
    except TypeError:
        raise UsageError(
            f"{whose} has the label {shortened(label)}: wanted a class number or a class name"
        ) from None
    if number == -1:
        raise UsageError(f"{whose} has the label -1, which stands for none: give labelled images")
    if not 0 <= number < _MOST_CLASSES:
        raise UsageError(f"{whose} has the label {number}: class numbers count from 0 and stay below 10^9")
    return number


def labels_of(labels: Any, name: str) -> list[Label]:
    """Labels [N], [N, 1] or one-hot [N, C] as class numbers or names. Raises `UsageError` as `label_of`."""
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu()
        labels = (labels.float() if labels.is_floating_point() else labels).numpy()
    if isinstance(labels, np.ndarray):
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        elif labels.ndim == 2 and labels.dtype.kind in "buif" and _is_one_hot(labels):
            labels = labels.argmax(axis=1)
        if labels.ndim != 1:
            raise UsageError(f"{name}: labels must be [N] class numbers or names, got {list(labels.shape)}")
        labels = [
            one.decode("utf-8", "replace") if isinstance(one, bytes) else one for one in labels.tolist()
        ]
    elif isinstance(labels, (str, bytes)) or not hasattr(labels, "__len__"):
        raise UsageError(f"{name}: labels must be [N] class numbers or names, got {shortened(labels)}")
    return [label_of(label, f"{name}: image {index}") for index, label in enumerate(labels)]


def _is_one_hot(labels: np.ndarray) -> bool:
    return bool(((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all())


def shortened(value: Any) -> str:
    """A value for a message, on one line of at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def width_of(labels: Iterable[Label]) -> int:
    """Digits of the largest class number."""
    return len(str(max((label for label in labels if isinstance(label, int)), default=0)))


def named(labels: Sequence[Label], class_names: Sequence[str] | None, width: int, name: str) -> list[str]:
    """The class name of every label. Raises `UsageError` for one out of range, and for names beside numbers."""
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        raise UsageError(f"{name} has class numbers and class names among its labels: use one of them")
    if kinds == {str}:
        return [str(label) for label in labels]
    if class_names is None:
        return [f"{label:0{width}d}" for label in labels]
    numbers = np.fromiter((int(label) for label in labels), np.int64, len(labels))
    if len(numbers) and numbers.max() >= len(class_names):
        index = int(np.argmax(numbers >= len(class_names)))
        raise UsageError(
            f"{name}: image {index} has the label {numbers[index]}, and there are {len(class_names)} classes, "
            f"0 to {len(class_names) - 1}"
        )
    return [class_names[number] for number in numbers]


def classes_of(labels: Sequence[Label], names: Sequence[str]) -> list[str]:
    """The classes that occur, in the order of their numbers; sorted where they have none."""
    return [names for _, names in sorted(set(zip(labels, names, strict=True)))]  # type: ignore[type-var]
