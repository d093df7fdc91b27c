"""Errors that carry an exit code: 2 for what the user can put right, 1 for everything else."""

from __future__ import annotations

from collections.abc import Iterable


class DDFastError(Exception):
    """A failure with a one-line message meant for a person. The command line exits with `exit_code`.

    `shared` is set where every process of a run stops for the same reason, so that only one of them need print it.
    """

    exit_code = 1
    shared = False


class UsageError(DDFastError):
    """Bad usage or bad input: the message says what was given, what was wanted and what to do."""

    exit_code = 2


class DivergedError(UsageError):
    """A loss that is no longer finite: the message says at which step, and what to lower."""


class BadImage(UsageError):
    """A file that cannot be decoded to RGB. `str(error)` is the reason, without the file's name."""


def shown(names: Iterable[str], limit: int = 5) -> str:
    """Names for a one-line message: comma-separated, control characters escaped, at most `limit` of them."""
    names = list(names)
    clean = [
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
        for name in names[:limit]
    ]
    return ", ".join(clean) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def one_line(error: BaseException) -> str:
    """An error's text on one line of at most 120 characters, its type where there is no text."""
    return " ".join(str(error).split())[:120].strip() or type(error).__name__
