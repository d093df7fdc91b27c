"""Names that people read, for classes whose own are WordNet ids or numbers; the classes keep their own as keys."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddfast.errors import UsageError, one_line, shown
from ddfast.wording import plural

ShownNames = str | Path | Mapping[Any, Any] | Sequence[Any]
"""{class: name}, names in the order of the classes, or a text or JSON file of either."""

_BETWEEN = re.compile(r"\s*[\t,;:=]\s*|\s+")


def read_shown_names(given: ShownNames, class_names: Sequence[str]) -> list[str]:
    """A name to show for each class.

    Args:
        given: a mapping from classes to names, which may know more; names in the order of the classes; or a file.
            A text file has a class and its name in each line, as `n01440764 tench, Tinca tinca` (a tab, comma, space,
            `:` or `=` between them), or one name a line. A JSON file has a mapping or a list, also
            {"0": ["n01440764", "tench"]}.
        class_names: in label order.

    Raises:
        UsageError: no such file, neither of these, or a class without a name.
    """
    what, content = _content(given)
    if isinstance(content, Mapping):
        by_class = _by_class(content, class_names)
    elif all(isinstance(entry, list) for entry in content):
        by_class = _by_class(dict(enumerate(content)), class_names)
    else:
        lines = [str(entry) for entry in content]
        by_class = _of_lines(lines, class_names)
        if len(by_class) < len(class_names) and len(lines) == len(class_names):
            by_class = dict(zip(class_names, lines, strict=True))
    lacking = [name for name in class_names if not by_class.get(name, "").strip()]
    if lacking:
        raise UsageError(
            f"{what} names {len(class_names) - len(lacking)} of {plural(len(class_names), 'class')}, not "
            f"{shown(lacking, 3)}: give a line for each, class and name, or one name a line in the order of the classes"
        )
    return [" ".join(by_class[name].split()) for name in class_names]


def check_shown_names(given: ShownNames) -> None:
    """Refuse a file that cannot be read, before any data is opened. Errors as `read_shown_names`."""
    _content(given)


def _content(given: ShownNames) -> tuple[str, Mapping[Any, Any] | list[Any]]:
    """What it is, for a message, and the mapping or list that it holds."""
    what, content = "class names", given
    if isinstance(given, (str, Path)):
        path = Path(os.path.expanduser(given))
        what = f"class names {given}"
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            reason = (error.strerror or type(error).__name__).lower()
            raise UsageError(
                f"{what} cannot be read ({reason}): give a file of a class and its name a line"
            ) from error
        except ValueError as error:
            raise UsageError(
                f"{what} is no UTF-8 text: give a file of a class and its name a line"
            ) from error
        content = [line for line in text.splitlines() if line.strip()]
        if path.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"):
            try:
                content = json.loads(text)
            except (ValueError, RecursionError) as error:
                if path.suffix.lower() == ".json":
                    raise UsageError(f"{what} is no JSON ({one_line(error)})") from error
    if isinstance(content, (str, bytes)) or not isinstance(content, (Mapping, Sequence)) or not content:
        raise UsageError(f"{what} must be {{class: name}} or names in the order of the classes")
    return what, content if isinstance(content, Mapping) else list(content)


def _by_class(content: Mapping[Any, Any], class_names: Sequence[str]) -> dict[str, str]:
    """Names by class; of {index: [class, name]} the entry that is a class is looked up."""
    known, found = set(class_names), {}
    for key, value in content.items():
        forms = [str(form) for form in value] if isinstance(value, (list, tuple)) else [str(value)]
        if str(key) in known:
            found[str(key)] = ", ".join(forms)
        elif len(forms) > 1 and (own := next((form for form in forms if form in known), None)) is not None:
            found[own] = ", ".join(form for form in forms if form != own)
    return found


def _of_lines(lines: Sequence[str], class_names: Sequence[str]) -> dict[str, str]:
    """Names behind the classes that lines begin with; of two classes that one begins with, the longer."""
    known, found = set(class_names), {}
    for line in map(str.strip, lines):
        read = [
            (line[: cut.start()].strip('"'), line[cut.end() :].strip('"')) for cut in _BETWEEN.finditer(line)
        ]
        fitting = [(key, name) for key, name in read if key in known and name]
        if fitting:
            found[fitting[-1][0]] = fitting[-1][1]
    numbered = re.compile(r"\d+[\s,]+(?=\S)")  # a class, its number, its name
    if len(found) > 1 and all(numbered.match(name) for name in found.values()):
        found = {key: numbered.sub("", name, count=1) for key, name in found.items()}
    return found
