"""Time and memory of one call: a synchronised clock, and the peak above what was held before."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROUND_SECONDS = 0.05  # a call shorter than this is repeated within a round until the round is this long
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SAMPLING_SECONDS = 0.001


@dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile of a quantity over the rounds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Percentiles of one value or more, with linear interpolation."""
        if not values:
            raise ValueError("percentiles of no values: measure at least one round")
        levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        return cls(*torch.tensor(values, dtype=torch.float64).quantile(levels).tolist())


def synchronise(device: torch.device) -> None:
    """Wait for all work queued on a GPU; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Seconds a call, on the clock of the host, over `calls` calls in a row; a GPU is waited for before and after."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    synchronise(device)
    return (time.perf_counter() - started) / calls


def calls_a_round(run: Callable[[], Any], device: torch.device) -> int:
    """How many calls make a round of `ROUND_SECONDS`; itself runs the call twice, once to warm up."""
    run()
    once = max(seconds_of(run, device), 1e-7)
    return max(1, min(1000, round(ROUND_SECONDS / once)))


def fastest(runs: Mapping[str, Callable[[], Any]], device: torch.device) -> tuple[str, dict[str, float]]:
    """The name of the fastest of several settings of one contender, and the seconds of each after a warm-up.

    A peer is given its best setting on the machine at hand this way. Settings are timed twice, in turn, and the
    better time counts.
    """
    for run in runs.values():
        run()
    best = {name: min(seconds_of(run, device) for _ in range(2)) for name, run in runs.items()}
    return min(best, key=best.__getitem__), best


def extra_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Peak memory of one call, in bytes, above what was held before it.

    On a GPU the allocator's peak. On the CPU the peak of the resident set, read from the kernel's own high-water mark
    where Linux lets a process reset it, and sampled every millisecond elsewhere. Free memory is handed back first,
    as an earlier call's leavings would hide what this one needs.
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    _trim()
    with _resident_peak() as peak:
        before = _status("VmRSS")
        run()
    return max(0, peak() - before)


def _trim() -> None:
    """Give the heap's free pages back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    """A size of this process, in bytes, from /proc."""
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text("ascii"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no line {field}: memory is measured on Linux only")
    return int(found[1]) * 1024


@contextlib.contextmanager
def _resident_peak() -> Iterator[Callable[[], int]]:
    """Context whose value returns, after it, the largest resident set in it, in bytes."""
    try:
        _CLEAR.write_text("5", "ascii")
    except OSError:
        with _sampled_peak() as peak:
            yield peak
        return
    found: list[int] = []
    yield lambda: found[0]
    found.append(_status("VmHWM"))


@contextlib.contextmanager
def _sampled_peak() -> Iterator[Callable[[], int]]:
    largest = _status("VmRSS")
    stopped = threading.Event()

    def sample() -> None:
        nonlocal largest
        while not stopped.wait(_SAMPLING_SECONDS):
            largest = max(largest, _status("VmRSS"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: largest
    finally:
        stopped.set()
        thread.join()
