"""Whether other processes occupy the cores that a run is about to use: two on the same cores lose half their speed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from ddfast.progress import say
from ddfast.ranks import usable_cores
from ddfast.wording import plural

_SHORTEST = 0.1  # seconds of looking below which the kernel's clock of 10 ms says too little
_STAT = Path("/proc/stat")


class Neighbours:
    """Looks at the usable cores from its creation to `busy_cores()`. Outside of Linux it sees nothing."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._own = time.process_time()
        self._before = _worked()

    def busy_cores(self) -> float:
        """How many of the usable cores other processes have kept busy in the mean, 0 where that is unknown."""
        time.sleep(max(0.0, self._started + _SHORTEST - time.monotonic()))
        after = _worked()
        if self._before is None or after is None:
            return 0.0
        seconds, own = time.monotonic() - self._started, time.process_time() - self._own
        return max(0.0, (after - self._before - own) / seconds)


def crowded(busy: float, threads: int, cores: int) -> bool:
    """Whether `threads` threads find too little room on cores of which others keep `busy` busy."""
    return busy >= 0.5 and threads > 1 and busy + threads > cores + 0.5


def warn_of_crowding(
    neighbours: Neighbours, threads: int, settings: Callable[[int], str], *, quiet: bool = False
) -> None:
    """Say in one line that other programs occupy the cores, where they do.

    Args:
        neighbours: what has looked since the call began.
        threads: CPU threads that are about to work.
        settings: how their number is set, `--threads 1` for 1.
        quiet: print nothing.
    """
    if quiet or threads < 2:
        return
    busy, cores = neighbours.busy_cores(), usable_cores()
    if crowded(busy, threads, cores):
        free = max(1, cores - math.ceil(busy - 0.25))
        say(
            f"other programs keep {busy:.1f} of {plural(cores, 'core')} busy and {plural(threads, 'thread')} of this "
            f"run would wait for them: wait until they are done, or start anew with {settings(free)}"
        )


def _worked() -> float | None:
    """Seconds that the usable cores have worked since the machine started; None where the system does not say."""
    try:
        text = _STAT.read_text(encoding="ascii", errors="replace")
        return seconds_worked(text, os.sched_getaffinity(0), os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError, IndexError):
        return None


def seconds_worked(stat: str, cores: set[int], ticks: int) -> float:
    """Seconds that `cores` were not idle, from the text of `/proc/stat` with `ticks` a second.

    The columns behind a core's name are user, nice, system, idle, iowait, irq and softirq.
    """
    total = 0
    for line in stat.splitlines():
        name, *numbers = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cores:
            user, nice, system, _, _, irq, softirq = map(int, numbers[:7])
            total += user + nice + system + irq + softirq
    return total / ticks
