"""Progress of long stages: a bar with rate and time left on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TextIO

from ddfast.wording import plural, singular

_NARROWEST = 40  # columns in which a bar has room for its label, count, rate and time left
LOG_INTERVAL = 15.0  # seconds between two log lines where there is no terminal


def say(message: str, *, quiet: bool = False) -> None:
    """Print one log line to standard error, so that standard output stays the result's."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as `7s`, `3m12s` or `2h05m`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Context manager that counts finished units of one stage.

    Args:
        label: name of the stage.
        total: number of units in all.
        unit: plural noun of a unit, for the rate.
        done: units that an earlier run already finished; they do not count in the rate.
        quiet: show nothing.
    """

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0, quiet: bool = False) -> None:
        self.label, self.total, self.unit, self.done, self.quiet = label, total, unit, done, quiet
        self._skipped = done
        self._bar = None

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        if not self.quiet and _columns(sys.stderr) >= _NARROWEST:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total, initial=self.done, desc=self.label, unit=f" {self.unit}", dynamic_ncols=True
            )
        return self

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more as finished; `note` is shown behind the rate."""
        self.done += units
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(units)
            return
        now = time.monotonic()
        if now - self._last_line >= LOG_INTERVAL and self.done < self.total:
            self._last_line = now
            rate = (self.done - self._skipped) / (now - self._start)
            left = duration((self.total - self.done) / rate) if rate > 0 else "?"
            counted = f"{self.done}/{plural(self.total, singular(self.unit))}"
            self._line(f"{counted}, {rate:.1f}/s, {left} left{_behind(note)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            taken = time.monotonic() - self._start
            self._line(f"{self.done}/{plural(self.total, singular(self.unit))} in {duration(taken)}")

    def _line(self, text: str) -> None:
        say(f"{self.label}: {text}", quiet=self.quiet)


def _columns(stream: TextIO) -> int:
    """Width of the terminal that a stream is, 0 where it is none, a dumb one, or says that it has no width."""
    try:
        if not stream.isatty() or os.environ.get("TERM") == "dumb":
            return 0
        columns, said = os.get_terminal_size(stream.fileno()).columns, os.environ.get("COLUMNS", "")
        return min(columns, int(said)) if said.isdecimal() else columns
    except (
        AttributeError,
        OSError,
        ValueError,
    ):  # no stream at all, a closed one, or one without a descriptor
        return 0


def _behind(note: str) -> str:
    return f", {note}" if note else ""
