"""Labels that stand beside images, in WebDataset shards and in metadata files: class numbers or class names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ddfast.data.sources import is_unicode
from ddfast.errors import UsageError, shown

LABEL_FIELDS = ("label_name", "class_name", "label", "cls")
"""Where a record says its label; the first that does counts."""


def label_in(fields: Mapping[str, Any]) -> int | str | None:
    """The class number, 0 to 10^9, or class name in a record; None where it has none."""
    for field in LABEL_FIELDS:
        said = fields.get(field)
        if (isinstance(said, str) and said) or (type(said) is int and 0 <= said < 10**9):
            return said
    return None


def label_in_text(text: str) -> int | str | None:
    """The class number or name that a text is; None for an empty one, and for -1, which stands for no label.

    A number with zeros in front stays text, `class_names_of` knows what it is.
    """
    text = text.strip().removeprefix("\ufeff")
    if text in ("", "-1"):
        return None
    return int(text) if re.fullmatch(r"0|[1-9][0-9]{0,8}", text) else text


def class_list(names_file: bytes) -> list[str]:
    """The lines of a `classes.txt`: the names of class numbers 0, 1, ... Blank lines at the end are none."""
    lines = [line.strip() for line in names_file.decode("utf-8-sig", "replace").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def class_names_of(
    said: Collection[int | str], names_file: bytes | None, name: str, *, slashes: bool = False
) -> dict[int | str, str]:
    """Class name of every label. No two classes become one: what would merge them is refused.

    Args:
        said: the labels that occur.
        names_file: `classes.txt`, the names of class numbers, one a line; None where there is none. Without it
            numbers are padded with zeros, to sort as numbers, and those written with zeros stay as they are.
        name: what the user calls the source, for messages.
        slashes: whether names may hold some; where they become folders of keys they may not.

    Raises:
        UsageError: a number without a line, a name on two lines, a number written in two ways, an empty name, one
            with NUL or a slash that may not be, or no valid Unicode.
    """
    lines = class_list(names_file) if names_file is not None else None
    numbers = {
        label: number for label in said if (number := _number_in(label, lines is not None)) is not None
    }
    largest = max(numbers.values(), default=0)
    if lines is not None and largest >= len(lines):
        raise UsageError(f"classes.txt of {name} has {len(lines)} lines, but class number {largest} occurs")
    if lines is not None:
        _check_list(lines, numbers.values(), name)
    names: dict[int | str, str] = {}
    spelled: dict[int, int | str] = {}  # number -> how it is written
    for label in said:
        if label in numbers and lines is not None:
            names[label] = lines[numbers[label]]
            continue
        names[label] = label if isinstance(label, str) else f"{label:0{len(str(largest))}d}"
        if lines is None and re.fullmatch(r"[0-9]{1,9}", names[label]):
            other = spelled.setdefault(int(names[label]), label)
            if other != label:
                raise UsageError(
                    f"{name} writes a label as {other!r} and as {label!r}, which are one number and two names: "
                    "write it in one way"
                )
    refused = {"\0"} if slashes else {"/", "\0"}
    bad = [class_name for class_name in names.values() if not class_name or refused & set(class_name)]
    if bad:
        what = "NUL" if slashes else "a slash or NUL"
        raise UsageError(
            f"{name} has an empty class name or one with {what} ({shown(bad)}); correct the labels"
        )
    garbled = [class_name for class_name in names.values() if not is_unicode(class_name)]
    if garbled:
        raise UsageError(
            f"{name} has a class name that is no valid Unicode ({shown(garbled)}); correct the labels"
        )
    return names


def _number_in(label: int | str, listed: bool) -> int | None:
    """The class number that a label is: beside a class list also one with zeros in front."""
    if isinstance(label, int):
        return label
    return int(label) if listed and re.fullmatch(r"0[0-9]{1,8}", label) else None


def _check_list(lines: Sequence[str], numbers: Collection[int], name: str) -> None:
    """Refuse a class list that gives one name to two classes, one of which occurs."""
    places: dict[str, list[int]] = {}
    for number, line in enumerate(lines):
        places.setdefault(line, []).append(number)
    for number in sorted(set(numbers)):
        if lines[number] and len(twins := places[lines[number]]) > 1:
            raise UsageError(
                f"classes.txt of {name} names {shown([lines[number]])} on lines "
                f"{' and '.join(str(twin + 1) for twin in twins)}, which are two classes: give each a name of its own"
            )
