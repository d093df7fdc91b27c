"""Words of messages: plurals, the nearest known name, and an argument's name as its caller typed it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_flags: ContextVar[Mapping[str, str] | None] = ContextVar("flags of the running command", default=None)


@contextmanager
def flags_of_command(flags: Mapping[str, str]) -> Iterator[None]:
    """Let messages name arguments by the flags of the running command (keyword -> flag), not by keywords."""
    token = _flags.set(flags)
    try:
        yield
    finally:
        _flags.reset(token)


def argument(keyword: str) -> str:
    """An argument's name as its caller knows it: `--image-size` on the command line, `image_size` in Python."""
    return (_flags.get() or {}).get(keyword, keyword)


def setting(keyword: str, value: Any) -> str:
    """How its caller gives an argument a value: `--threads 1` or `threads=1`; `--resume` or `resume=True`.

    A command without that flag gets the keyword's form as well, so ask `is_argument` before giving advice.
    """
    flags = _flags.get()
    if flags is None:
        return f"{keyword}={value!r}"
    if isinstance(value, bool):
        keyword = keyword if value else f"no_{keyword}"
        return flags.get(keyword, "--" + keyword.replace("_", "-"))
    return f"{flags.get(keyword, '--' + keyword.replace('_', '-'))} {value}"


def is_argument(keyword: str) -> bool:
    """Whether the caller can give this argument: always in Python, on the command line where a flag is there."""
    flags = _flags.get()
    return flags is None or keyword in flags


def on_command_line() -> bool:
    """Whether a command of `ddfast` is running, so that advice may name commands."""
    return _flags.get() is not None


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known name that `word` was probably meant to be; None where none is near."""
    names = {name.lower(): name for name in known}
    typed = str(word).lower()
    begun = [name for name in names if len(typed.strip("-")) > 2 and name.startswith(typed)]
    found = difflib.get_close_matches(typed, begun or list(names), n=1, cutoff=0.0 if begun else 0.75)
    return names[found[0]] if found else None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`; did you mean rded?` for the end of a message, empty where no known name is near."""
    name = nearest(word, known)
    return "" if name is None else f"; did you mean {name}?"


def plural(count: int, noun: str, more: str | None = None) -> str:
    """`1 image`, `2 images`, `12 classes`: a count with its noun. `more` is an irregular plural."""
    return f"{count} {noun if count == 1 else more or _plural_of(noun)}"


def singular(noun: str) -> str:
    """The singular of a regular plural: `images` -> `image`, `classes` -> `class`."""
    if noun.endswith(("sses", "shes", "tches", "xes")):
        return noun[:-2]
    return noun.removesuffix("s")


def _plural_of(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "sh", "tch", "x")) else "s")
