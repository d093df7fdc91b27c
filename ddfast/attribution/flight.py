"""How many micro-batches are in flight: prepared and waiting for the model while memory lasts.

A micro-batch is a fixed set of masked images that goes through the model at once. Its composition decides the
last bits of the result and never changes here. What may change, with memory and with measured time, is how many
of them are prepared before the first of them is run.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 16
MEMORY_SHARE = 0.5
"""Share of the free memory that prepared micro-batches may take."""
GAIN = 0.97
"""More stay in flight only where they take less than this share of the time."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Prepared(Protocol):
    """What goes through the model at once."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors it takes memory for."""
        ...


Batch = TypeVar("Batch", bound=Prepared)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed: torch's own error on a GPU, a plain RuntimeError on the CPU."""
    text = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in text
        or "can't allocate memory" in text
    )


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on a device now; the CPU's are those that the system calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 1 << 30  # not Linux: a careful guess
    return int(available.split()[1]) * 1024


@dataclass
class Flight:
    """The number of micro-batches in flight, found by measurement and shrunk where memory runs out.

    Starting from one, the number is doubled while a micro-batch takes clearly less time for it and the bytes
    prepared stay within half of the free memory. After a failed allocation it is halved for good and the
    micro-batches are run again.

    Attributes:
        device: where micro-batches are prepared.
        size: micro-batches in flight now.
        limit: the most there may be; lowered by what was measured. A GPU takes one: it works while the next is
            prepared, and to measure it would be to wait for it.
        clock: seconds.
    """

    device: torch.device
    size: int = 1
    limit: int = MAX_IN_FLIGHT
    clock: Callable[[], float] = time.perf_counter
    _seconds: dict[int, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.device.type != "cpu":
            self.limit = 1

    def run(
        self,
        items: Iterable[Item],
        prepare: Callable[[Item], Batch],
        forward: Callable[[Batch], Result],
    ) -> Iterator[tuple[Item, Result]]:
        """Each item with forward(prepare(item)), in order; forward is called once for each.

        Raises:
            RuntimeError: memory ran out with a single micro-batch in flight.
        """
        waiting = collections.deque(items)
        while waiting:
            begin, together = self.clock(), min(self.size, len(waiting))
            results: list[Result] = []
            prepared: collections.deque[Batch] = collections.deque()
            failure = None
            try:
                prepared.extend(prepare(waiting[index]) for index in range(together))
                held = sum(t.numel() * t.element_size() for batch in prepared for t in batch.tensors)
                while prepared:
                    results.append(forward(prepared.popleft()))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error)
            if failure is not None:
                prepared.clear()  # its memory is what the next attempt needs
                self._shrink(failure)
            elif together == self.size:
                self._measured((self.clock() - begin) / together, held)
            for result in results:
                yield waiting.popleft(), result

    def _shrink(self, failure: str) -> None:
        if self.size == 1:
            raise RuntimeError(
                f"out of memory on {self.device} with one micro-batch in flight, give a smaller chunk_size: {failure}"
            )
        self.size = self.limit = self.size // 2
        log.warning("out of memory: %d micro-batches in flight from now on", self.size)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measured(self, seconds: float, held: int) -> None:
        """Grow, or go back, by the time that a micro-batch took; the first time of a size only warms up."""
        if self.size not in self._seconds:
            self._seconds[self.size] = float("inf")
            return
        self._seconds[self.size] = seconds
        smaller = self._seconds.get(self.size // 2, float("inf"))
        if self.size > 1 and seconds > GAIN * smaller:
            self.size = self.limit = self.size // 2
        elif 2 * self.size <= self.limit and 2 * held <= MEMORY_SHARE * free_memory(self.device):
            self.size *= 2
