"""Checks of arguments: each returns the value as the plain Python type that is meant, or says what is wrong.

A number may come as text of the command line, as a Python number or as one of NumPy or torch.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ddfast.errors import UsageError
from ddfast.wording import argument, did_you_mean


def whole_number(value: Any, keyword: str, *, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int in `least..most`.

    Raises:
        UsageError: no whole number, or out of range; the message names the argument as its caller does.
    """
    found = _whole(value)
    if found is None:
        raise UsageError(f"{argument(keyword)} must be a whole number, got {value!r}")
    if least is not None and found < least:
        raise UsageError(f"{argument(keyword)} must be at least {least}, got {found}")
    if most is not None and found > most:
        raise UsageError(f"{argument(keyword)} must be at most {most}, got {found}")
    return found


def whole_number_or(value: Any, keyword: str, words: tuple[str, ...], *, least: int = 1) -> int | str:
    """`value` where it is one of `words`, else as a whole number of at least `least`.

    Raises:
        UsageError: neither.
    """
    if isinstance(value, str) and value in words:
        return value
    found = _whole(value)
    if found is None or found < least:
        kind = "positive number" if least == 1 else f"number of at least {least}"
        raise UsageError(f"{argument(keyword)} must be {', '.join(words)} or a {kind}, got {value}")
    return found


def positive_number(value: Any, keyword: str, *, zero: bool = False) -> float:
    """`value` as a finite float above 0, or at least 0 with `zero`.

    Raises:
        UsageError: no number, or out of range.
    """
    found = _real(value)
    if found is None:
        raise UsageError(f"{argument(keyword)} must be a number, got {value!r}")
    if not (found >= 0 if zero else found > 0):
        raise UsageError(f"{argument(keyword)} must be {'at least 0' if zero else 'positive'}, got {value}")
    if math.isinf(found):
        raise UsageError(f"{argument(keyword)} must be finite, got {value}")
    return found


def number_below_one(value: Any, keyword: str) -> float:
    """`value` as a float from 0 to below 1: a momentum, or the share of a moving average that a step keeps.

    Raises:
        UsageError: no number, or out of range.
    """
    found = positive_number(value, keyword, zero=True)
    if found >= 1:
        raise UsageError(f"{argument(keyword)} must be below 1, got {found:g}")
    return found


def one_of(value: Any, keyword: str, known: Iterable[str]) -> str:
    """`value`, which must be one of `known`; the message lists them and suggests the nearest.

    Raises:
        UsageError: it is none of them.
    """
    names = tuple(known)
    if not isinstance(value, str) or value not in names:
        raise UsageError(
            f"{argument(keyword)} must be one of {', '.join(names)}, got {value!r}{did_you_mean(value, names)}"
        )
    return value


def architecture_options(value: Any, keyword: str = "arch_options") -> dict[str, Any]:
    """`value` as keyword arguments of `create_model`, with plain numbers; None is none.

    Raises:
        UsageError: no mapping of names, or a width that is no number of channels.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UsageError(
            f"{argument(keyword)} must be a mapping, {{'width': 32}} for example, got {_short(value)}"
        )
    plain = {name: _plain(one) for name, one in value.items()}
    if "width" in plain:
        plain["width"] = whole_number(plain["width"], "width", least=1)
    return plain


def path_of(value: Any, keyword: str) -> Path:
    """`value` as a `Path`, in which `~` is the home folder, as a shell would have it.

    Raises:
        UsageError: neither text nor a path, or empty.
    """
    try:
        text = os.fspath(value)
    except TypeError:
        raise UsageError(f"{argument(keyword)} must be a path, got {_short(value)}") from None
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if not text or "\0" in text:
        raise UsageError(f"{argument(keyword)} must be a path, got {text!r}")
    return Path(os.path.expanduser(text))


def data_of(value: Any, keyword: str = "data") -> Any:
    """`value` as a name, a `Path`, or the images in memory that it is, which `ddfast.data.open_source` looks into.

    Raises:
        UsageError: none of them.
    """
    if isinstance(value, str):
        return value
    texts = isinstance(value, (list, tuple)) and (not value or isinstance(value[0], (str, os.PathLike)))
    if isinstance(value, (bytes, os.PathLike)) or texts or not _holds_things(value):
        return path_of(value, keyword)
    return value


def output_folder(value: Any, keyword: str = "out") -> Path:
    """`value` as the path of a folder that can be written to, or be made.

    Raises:
        UsageError: it is a file, or it could not be written to.
    """
    path = path_of(value, keyword)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; {argument(keyword)} must be a folder")
    _check_unicode(path, keyword)
    _check_writable(path, path, keyword)
    return path


def output_file(value: Any, keyword: str = "out") -> Path:
    """`value` as the path of a file that can be written, its folder made if need be.

    Raises:
        UsageError: it is a folder, or it could not be written.
    """
    path = path_of(value, keyword)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; {argument(keyword)} must be a file")
    _check_unicode(path, keyword)
    _check_writable(path.parent, path, keyword)
    return path


def _check_unicode(path: Path, keyword: str) -> None:
    """Refuse a name that is no UTF-8: safetensors cannot read it again."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{argument(keyword)} must be valid UTF-8, got {str(path)!a}") from None


def _check_writable(folder: Path, path: Path, keyword: str) -> None:
    """Refuse a folder in which nothing can be written, by a nameless file that goes at once."""
    standing = folder
    while not standing.exists() and standing != standing.parent:
        standing = standing.parent
    if not standing.is_dir():
        raise UsageError(
            f"cannot write {path}: {standing} is a file, not a folder; choose another {argument(keyword)}"
        )
    try:
        with tempfile.TemporaryFile(dir=standing, prefix=".ddfast-"):
            pass
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise UsageError(
            f"cannot write {path}: {reason} in {standing}; choose another {argument(keyword)}"
        ) from error


def _plain(value: Any) -> Any:
    """A number of NumPy or torch as Python's; anything else as it is."""
    return value.item() if hasattr(value, "item") and not getattr(value, "ndim", 0) else value


def _whole(value: Any) -> int | None:
    if isinstance(value, bool) or type(value).__name__ == "bool_":
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor of several numbers
        pass
    try:
        if isinstance(value, str):
            return int(value)
        real = float(value) if isinstance(value, numbers.Real) else math.nan
        return int(real) if real.is_integer() else None
    except (TypeError, ValueError, OverflowError):
        return None


def _real(value: Any) -> float | None:
    if isinstance(value, bool) or type(value).__name__ == "bool_":
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _holds_things(value: Any) -> bool:
    return hasattr(value, "__getitem__") or hasattr(value, "__iter__")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
