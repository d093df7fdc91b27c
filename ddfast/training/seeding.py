"""Random numbers of training: every draw has a generator of its own, keyed by what it is for.

Two trainings in one process do not disturb each other, and torch's global generator is left as it was found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed: BLAKE2b of the key's parts."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for one purpose; one of (seed, "order", epoch) needs no stored state to resume."""
    return torch.Generator().manual_seed(derived_seed(*key))


@contextmanager
def seeded(*key: int | str, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators in a block, for code that takes none: initial weights, dropout.

    The state of the CPU's generator, and of `device`'s where it is a GPU, is put back at the end.
    """
    devices = [device.index or 0] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derived_seed(*key))
        yield
