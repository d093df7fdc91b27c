"""Random numbers of training: every draw has a generator of its own, keyed by what it is for.

Two trainings in one process do not disturb each other, and torch's global generator is left as it was found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ddfast.philox import philox4x32


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

    The state of the CPU's generator, and of `device`'s where it is a GPU, is put back at the end. Those of other GPUs
    are left alone, which `torch.manual_seed` would not do.
    """
    gpu: list[int] = []
    if device is not None and device.type == "cuda":
        gpu = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=gpu):
        seed_globally(derived_seed(*key), device)
        yield


def seed_globally(seed: int, device: torch.device | None = None) -> None:
    """Seed torch's global generator of the CPU, and that of `device` where it is a GPU.

    `torch.manual_seed` would seed all GPUs, and one that is not used yet would get this seed in place of its caller's.
    """
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def stream(seed: int, name: str) -> int:
    """64-bit key of the random stream `name` under `seed`, so that no two uses of a seed share draws."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def drawn(ids: Tensor, seed: int, name: str) -> Tensor:
    """Uniform draws in [0, 1) of sample ids (int64 [M]) under a seed's stream: float64 [M], exact in float32."""
    low, high, zero = ids & 0xFFFFFFFF, (ids >> 32) & 0xFFFFFFFF, torch.zeros_like(ids)
    words = philox4x32(torch.stack((low, high, zero, zero), dim=1), stream(seed, name))[:, 0]
    return (words >> 8).double() / 2**24
