"""Labels that stand beside images, in WebDataset shards and in metadata files: class numbers or class names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ddfast.data.sources import is_unicode, shown
from ddfast.errors import UsageError

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
    """The class number or name that a text is; None for an empty one."""
    text = text.strip()
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text or None


def class_names_of(said: Collection[int | str], names_file: bytes | None, name: str) -> dict[int | str, str]:
    """Class name of every label.

    Args:
        said: the labels that occur.
        names_file: `classes.txt`, the names of class numbers, one a line; None where there is none. Without it
            numbers are padded with zeros, to sort as numbers.
        name: what the user calls the source, for messages.

    Raises:
        UsageError: a number without a line, an empty name, one with a slash or NUL, or no valid Unicode.
    """
    largest = max((label for label in said if isinstance(label, int)), default=0)
    lines = names_file.decode("utf-8", "replace").splitlines() if names_file is not None else None
    if lines is not None and largest >= len(lines):
        raise UsageError(f"classes.txt of {name} has {len(lines)} lines, but class number {largest} occurs")
    names: dict[int | str, str] = {}
    for label in said:
        if isinstance(label, str):
            names[label] = label
        else:
            names[label] = lines[label].strip() if lines is not None else f"{label:0{len(str(largest))}d}"
    bad = [class_name for class_name in names.values() if not class_name or {"/", "\0"} & set(class_name)]
    if bad:
        raise UsageError(
            f"{name} has an empty class name or one with a slash or NUL ({shown(bad)}); correct the labels"
        )
    garbled = [class_name for class_name in names.values() if not is_unicode(class_name)]
    if garbled:
        raise UsageError(
            f"{name} has a class name that is no valid Unicode ({shown(garbled)}); correct the labels"
        )
    return names
