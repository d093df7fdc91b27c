"""Progress of long stages: a bar with rate and time left on a terminal or in a notebook, log lines elsewhere."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TextIO

from ddfast.wording import plural, singular

_NARROWEST = 40  # columns in which a bar has room for its label, count, rate and time left
_FIRST_MINUTE = 60.0  # seconds of a run after which its rate is trusted
_LONG = 3600.0  # seconds left of a run above which it is said what would be faster
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


class Outlook:
    """How long the rest of a run takes at its pace so far; of hours, once, what would be faster.

    Args:
        stages: of one length each that the run goes through, a `Progress` each.
        faster: what would make it shorter, in words, `fewer --epochs` for example; only what applies.
        clock: seconds.
    """

    def __init__(
        self, stages: int, faster: Sequence[str] = (), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stages, self.faster, self.clock = stages, tuple(faster), clock
        self._finished = 0
        self._begun: float | None = None
        self._said = False

    def begin(self) -> None:
        """A stage begins; the first starts the clock."""
        if self._begun is None:
            self._begun = self.clock()

    def finish(self) -> None:
        """A stage is done."""
        self._finished += 1

    def left(self, part: float) -> float | None:
        """Seconds that the run still takes with this part in [0, 1] of its stage done; None where nothing is yet."""
        share = min((self._finished + part) / max(self.stages, 1), 1.0)
        return None if share <= 0 or self._begun is None else (self.clock() - self._begun) * (1 / share - 1)

    def advice(self, part: float) -> str | None:
        """The one line of a run of hours, when its first minute is over; None before it, behind it, and of others."""
        left = self.left(part)
        if self._said or left is None or self._begun is None or self.clock() - self._begun < _FIRST_MINUTE:
            return None
        self._said = True
        if left <= _LONG:
            return None
        ways = (
            f"{', '.join(self.faster[:-1])} or {self.faster[-1]}" if self.faster[1:] else "".join(self.faster)
        )
        return f"about {duration(left)} left{f'; faster with {ways}' if ways else ''}"


def ways_of_machine(device: str, threads: int, cores: int, more: Callable[[int], str]) -> list[str]:
    """What of a machine would make a run shorter: a GPU beside a CPU, and threads while cores are idle.

    Args:
        device: "cpu" or "cuda".
        threads: of the run.
        cores: that the process may use.
        more: how as many threads are asked for, in words.
    """
    if device != "cpu":
        return []
    return ["a GPU", *([f"more threads ({more(cores)})"] if threads < cores else [])]


class Progress:
    """Context manager that counts finished units of one stage.

    Args:
        label: name of the stage.
        total: number of units in all.
        unit: plural noun of a unit, for the rate.
        done: units that an earlier run already finished; they do not count in the rate.
        quiet: show nothing.
        outlook: of the run that the stage belongs to; None: it stands alone, and no advice is given.
        clock: seconds; default the outlook's.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        quiet: bool = False,
        outlook: Outlook | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.label, self.total, self.unit, self.done, self.quiet = label, total, unit, done, quiet
        self.outlook = outlook
        self._clock = clock or (time.monotonic if outlook is None else outlook.clock)
        self._skipped = done
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._start = self._last_line = self._clock()
        if self.outlook is not None:
            self.outlook.begin()
        bar = None if self.quiet else _bar_of(sys.stderr)
        if bar is not None:
            self._bar = bar(
                total=self.total, initial=self.done, desc=self.label, unit=f" {self.unit}", dynamic_ncols=True
            )
        return self

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more as finished; `note` is shown behind the rate."""
        self.done += units
        self._advise()
        if self._bar is not None:
            note = ", ".join(filter(None, (note, self._run_left())))
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(units)
            return
        now = self._clock()
        if now - self._last_line >= LOG_INTERVAL and self.done < self.total:
            self._last_line = now
            rate = (self.done - self._skipped) / (now - self._start)
            left = duration((self.total - self.done) / rate) if rate > 0 else "?"
            counted = f"{self.done}/{plural(self.total, singular(self.unit))}"
            self._line(f"{counted}, {rate:.1f}/s, {left} left{_behind(self._run_left())}{_behind(note)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.outlook is not None and kind is None:
            self.outlook.finish()
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            taken = self._clock() - self._start
            self._line(f"{self.done}/{plural(self.total, singular(self.unit))} in {duration(taken)}")

    def _part(self) -> float:
        """The part of this stage that is done, of what was left when it began."""
        return (self.done - self._skipped) / max(self.total - self._skipped, 1)

    def _run_left(self) -> str:
        """What the whole run still takes, where it has more stages than this one."""
        left = (
            self.outlook.left(self._part()) if self.outlook is not None and self.outlook.stages > 1 else None
        )
        return "" if left is None else f"{duration(left)} of the whole run"

    def _advise(self) -> None:
        said = None if self.outlook is None or self.quiet else self.outlook.advice(self._part())
        if said is None:
            return
        if self._bar is None:
            self._line(said)
        else:
            self._bar.write(f"{self.label}: {said}", file=sys.stderr)

    def _line(self, text: str) -> None:
        say(f"{self.label}: {text}", quiet=self.quiet)


def _bar_of(stream: TextIO) -> Any:
    """tqdm's bar for a notebook that has widgets or for a terminal with room; None where lines are better."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if type(shell).__name__ == "ZMQInteractiveShell" and importlib.util.find_spec("ipywidgets"):
        from tqdm.notebook import tqdm as widget

        return widget
    if _columns(stream) < _NARROWEST:
        return None
    from tqdm import tqdm

    return tqdm


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
