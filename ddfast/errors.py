"""Errors that carry an exit code: 2 for what the user can put right, 1 for everything else."""

from __future__ import annotations


class DDFastError(Exception):
    """A failure with a one-line message meant for a person. The command line exits with `exit_code`.

    `shared` is set where every process of a run stops for the same reason, so that only one of them need print it.
    """

    exit_code = 1
    shared = False


class UsageError(DDFastError):
    """Bad usage or bad input: the message says what was given, what was wanted and what to do."""

    exit_code = 2


class BadImage(UsageError):
    """A file that cannot be decoded to RGB. `str(error)` is the reason, without the file's name."""
