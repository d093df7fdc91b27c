"""The states of the generators of random numbers that belong to a caller, and how they come back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RandomStates:
    """The generators that a model may draw from: torch's, of the CPU and of all GPUs, numpy's and Python's."""

    def __init__(self) -> None:
        self._first = self.now()

    @staticmethod
    def now() -> tuple[Any, ...]:
        """Their states."""
        gpu: tuple[Tensor, ...] = ()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            gpu = tuple(torch.cuda.get_rng_state_all())
        return torch.get_rng_state(), random.getstate(), np.random.get_state(), *gpu  # noqa: NPY002 - models draw from it

    def differ(self, before: tuple[Any, ...]) -> bool:
        """Whether one of them has drawn since."""
        return not equal_states(self.now(), before)

    def restore(self) -> None:
        """Set them back to where they were when this was made, where they are not there."""
        now = self.now()
        if equal_states(now, self._first):
            return
        torch.set_rng_state(self._first[0])
        random.setstate(self._first[1])
        np.random.set_state(self._first[2])  # noqa: NPY002
        if len(self._first) > 3:
            torch.cuda.set_rng_state_all(self._first[3:])


@contextmanager
def kept_random_states(devices: Sequence[int | torch.device] = ()) -> Iterator[None]:
    """Context that takes nothing from the generators of Python, NumPy and torch (the CPU's, and of GPUs `devices`)."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def equal_states(one: Any, other: Any) -> bool:
    """Whether two states, or parts of them, are the same."""
    if isinstance(one, tuple):
        return len(one) == len(other) and all(equal_states(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else one == other
