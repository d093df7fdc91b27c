"""In which order a teacher's outputs stand, where its file does not say it: names from a list, a mapping or a file."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddfast.errors import UsageError
from ddfast.wording import plural


def read_class_order(
    given: str | Path | Sequence[str] | Mapping[Any, Any], class_names: Sequence[str] | None = None
) -> list[str]:
    """Class names in the order of a teacher's outputs.

    Args:
        given: the names; a mapping {index: name} or {name: index}; or the path of a text file of one name a line, or
            of a JSON file of a list or such a mapping. Where a name is a list itself, as in {"0": ["n01440764",
            "tench"]}, the entry that is a class counts.
        class_names: the classes that are wanted: names that differ from one only by spaces at the ends or in how
            Unicode composes them are written as these are.

    Raises:
        UsageError: no such file, not of these forms, indices that are not 0 to C - 1, or a name twice.
    """
    if isinstance(given, str | Path):
        what, content = f"class order {given}", _content(Path(given))
    else:
        what, content = "class order", given
    if isinstance(content, Mapping):
        content = _by_index(content, what)
    if isinstance(content, str | bytes) or not isinstance(content, Sequence):
        raise UsageError(f"{what} must be a list of names or {{index: name}}, got a {type(content).__name__}")
    wanted = list(class_names or [])
    names = [_name(value, place, wanted, what) for place, value in enumerate(content)]
    if not names:
        raise UsageError(f"{what} names no class")
    first: dict[str, int] = {}
    for place, name in enumerate(names):
        if name in first:
            raise UsageError(f"{what} names {name!r} twice, for outputs {first[name]} and {place}")
        first[name] = place
    return names


def output_places(order: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """For each class the place of its output, where the outputs stand in `order`.

    Raises:
        UsageError: `order` names other classes, or another number of them.
    """
    places = {name: place for place, name in enumerate(order)}
    unknown = sorted(set(order) - set(class_names))
    lacking = [name for name in class_names if name not in places]
    differences = []
    if unknown:
        differences.append(
            f"{_some(unknown)} is no class of the data"
            if len(unknown) == 1
            else f"{_some(unknown)} are no classes of the data"
        )
    if lacking:
        differences.append(f"it lacks {_some(lacking)}")
    if len(order) != len(class_names):
        differences.insert(0, f"the data has {len(class_names)}")
    if differences:
        raise UsageError(f"the class order names {plural(len(order), 'class')}: {', '.join(differences)}")
    return [places[name] for name in class_names]


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _content(path: Path) -> Any:
    """What a file holds: JSON where it is that, else its lines."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise UsageError(
            f"class order {path} cannot be read ({reason}): give a file of one class name a line"
        ) from error
    except ValueError as error:
        raise UsageError(
            f"class order {path} is no UTF-8 text: give a file of one class name a line"
        ) from error
    if path.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            if path.suffix.lower() == ".json" or isinstance(error, _Twice):
                raise UsageError(f"class order {path} is no JSON list or mapping ({error})") from error
    lines = [line.rstrip("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UsageError(
                f"class order {path} has an empty line, {number} of {len(lines)}: one class name a line"
            )
    return lines


class _Twice(ValueError):
    """A key of a JSON mapping stands twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Twice(f"it has {key!r} twice")
        found[key] = value
    return found


def _by_index(content: Mapping[Any, Any], what: str) -> list[Any]:
    """The names of {index: name} or {name: index} by their index."""
    pairs = [(_index(key), value) for key, value in content.items()]
    inverse = [(_index(value), key) for key, value in content.items()]
    fits, fits_inverse = (
        _complete(pairs),
        _complete(inverse) and not any(isinstance(v, str) for v in content.values()),
    )
    if fits and fits_inverse and sorted(map(str, pairs)) != sorted(map(str, inverse)):
        raise UsageError(
            f"{what} maps numbers to numbers, so it does not say which are the outputs: give a list of names"
        )
    if not fits and not fits_inverse:
        raise UsageError(
            f"{what} must map every output from 0 to {max(len(content) - 1, 0)} to a name, or names to these"
        )
    return [value for _, value in sorted(pairs if fits else inverse, key=lambda pair: int(pair[0] or 0))]


def _complete(pairs: Sequence[tuple[int | None, Any]]) -> bool:
    return sorted(-1 if index is None else index for index, _ in pairs) == list(range(len(pairs)))


def _index(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else None


def _name(value: Any, place: int, wanted: Sequence[str], what: str) -> str:
    """One entry as a name, written as the wanted class that it means where there is one."""
    forms = list(value) if isinstance(value, list | tuple) else [value]
    texts = [
        str(form)
        for form in forms
        if isinstance(form, str) or (isinstance(form, int) and not isinstance(form, bool))
    ]
    if not texts or len(texts) < len(forms):
        raise UsageError(f"{what} has {str(value)[:60]!r} for output {place}, wanted a class name")
    for text in texts:
        if text in wanted:
            return text
    plain = {_plain(name): name for name in wanted}
    for text in texts:
        if len(plain) == len(wanted) and _plain(text) in plain:
            return plain[_plain(text)]
    return texts[0]


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())
