"""Counter-based randomness: Philox4x32-10 and the table that turns its words into normal deviates.

A draw is a pure function of a 64-bit key (the seed) and a 128-bit counter (what the draw is for), so it
depends neither on the order of draws nor on the device. Integers are equal everywhere. A normal deviate is
looked up by the top bits of its word, because the last bits of logarithms and cosines differ between libm,
Triton's interpreter and a GPU.
"""

from __future__ import annotations

from statistics import NormalDist

import torch

QUANTILE_BITS = 12

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counters: torch.Tensor, seed: int) -> torch.Tensor:
    """Philox4x32-10 of many counters under one key.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

    Args:
        counters: [..., 4] int64, four words in [0, 2^32) a counter, the least significant word first.
        seed: the 64-bit key; a negative number is taken modulo 2^64.

    Returns:
        [..., 4] int64, four words in [0, 2^32) for each counter.

    Raises:
        TypeError: counters that are not int64.
        ValueError: counters whose last dimension is not 4, or a seed of more than 64 bits.
    """
    if counters.dtype != torch.int64:
        raise TypeError(f"counters must be int64, got {counters.dtype}")
    if counters.ndim == 0 or counters.shape[-1] != 4:
        raise ValueError(f"counters must be [..., 4], got {tuple(counters.shape)}")
    key = as_signed_64_bit(seed)
    keys = [key & _MASK, (key >> 32) & _MASK]
    c0, c1, c2, c3 = counters.unbind(-1)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ keys[0], low1, high0 ^ c3 ^ keys[1], low0
        keys = [(word + weyl) & _MASK for word, weyl in zip(keys, _WEYL, strict=True)]
    return torch.stack((c0, c1, c2, c3), dim=-1)


def as_signed_64_bit(seed: int) -> int:
    """The int64 with the bits of `seed`, which may be any signed or unsigned 64-bit number.

    Raises:
        ValueError: a seed outside [-2^63, 2^64).
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def normal_quantiles() -> torch.Tensor:
    """Quantiles of the standard normal at the 4096 midpoints (i + 1/2) / 4096, ascending.

    Each is rounded to a multiple of 2^-16, far coarser than the error of any libm, so that the table has the
    same bits on every machine. A 32-bit word stands for entry `word >> 20`.

    Returns:
        [4096] float32 on the CPU, a fresh copy.
    """
    return _QUANTILES.clone()


def quantile_table(device: torch.device) -> torch.Tensor:
    """`normal_quantiles()` on `device`, copied there once and shared: not to be written to."""
    if device.type == "cpu":
        return _QUANTILES
    if device not in _COPIES:
        with torch.inference_mode(False):
            copy = _QUANTILES.to(device)
        if type(copy) is not torch.Tensor:  # a stand-in of a tracer, good for this call alone
            return copy
        _COPIES[device] = copy
    return _COPIES[device]


def _make_quantiles() -> torch.Tensor:
    count, normal = 1 << QUANTILE_BITS, NormalDist()
    rounded = [round(normal.inv_cdf((index + 0.5) / count) * 65536) / 65536 for index in range(count)]
    return torch.tensor(rounded, dtype=torch.float32)


_QUANTILES = _make_quantiles()  # takes a millisecond
_COPIES: dict[torch.device, torch.Tensor] = {}  # on other devices


def _multiply(words: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of 32-bit words times a 32-bit constant, in int64 that never overflows."""
    low = (words & 0xFFFF) * constant
    high = (words >> 16) * constant + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
