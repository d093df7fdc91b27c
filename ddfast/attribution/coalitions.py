"""Coalitions of players, drawn by counter: one seed gives the same coalitions everywhere and in any order.

A coalition s in {0, 1}^d says which of the d players (grid cells of an image) are present. Every random bit
is a word of Philox4x32-10 (Salmon et al., 2011) at the counter (seed low, seed high, draw, position), so a
draw depends on nothing but its own coordinates: not on how many images share the call, nor on which draws
were made before.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ddfast.ops._philox import philox4x32

# Philox key of every coalition stream ("coalitio" in ASCII). The user's seed sits in the counter, so streams
# of different seeds are disjoint, and none meets the crop noise, which keys Philox by the seed itself.
_STREAM_KEY = 0x636F616C6974696F
_WORD = 0xFFFFFFFF


def all_coalitions(d: int, start: int, stop: int) -> Tensor:
    """Coalitions number `start` to `stop - 1` of the 2^d: bit i of the number says whether player i is there.

    Returns:
        bool [stop - start, d].
    """
    number = torch.arange(start, stop)
    return (number[:, None] >> torch.arange(d)) & 1 == 1


def permutations(seeds: Tensor, count: int, d: int) -> Tensor:
    """Uniform random orders in which the d players join.

    Args:
        seeds: int64 [S], one stream each.
        count: orders a stream.
        d: number of players.

    Returns:
        int64 [S, count, d]; entry j is the player that joins j-th.
    """
    return _sort_keys(_words(seeds, count, d)).argsort(dim=-1, stable=True)


def shapley_kernel_subsets(seeds: Tensor, count: int, d: int) -> Tensor:
    """Subsets from the Shapley kernel q(s) of InfoUtil Eq. 5 (Lundberg & Lee, 2017, Theorem 2).

    q(s) ∝ (d - 1) / (binom(d, k) k (d - k)) with k = |s| and 1 <= k <= d - 1: first the size from
    p(k) ∝ 1 / (k (d - k)), then a subset of that size, all equally likely. (The paper prints the range as 1 <
    k < d.)

    Args:
        seeds: int64 [S], one stream each.
        count: subsets a stream.
        d: number of players, at least 2.

    Returns:
        bool [S, count, d]; neither the empty nor the full coalition occurs.
    """
    words = _words(seeds, count, d + 1)
    size = 1 + torch.bucketize(words[..., d, 0].contiguous(), _size_thresholds(d), right=True)
    rank = _sort_keys(words[..., :d, :]).argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank < size[..., None]


def size_distribution(d: int) -> list[float]:
    """p(k) ∝ 1 / (k (d - k)) for k = 1 .. d - 1, the coalition sizes of the Shapley kernel."""
    weight = [1.0 / (k * (d - k)) for k in range(1, d)]
    total = math.fsum(weight)
    return [w / total for w in weight]


@functools.cache
def _size_thresholds(d: int) -> Tensor:
    """Upper ends, in 32-bit words, of the intervals of sizes 1 .. d - 2; what lies above them is size d - 1.

    The sums are correctly rounded (fsum), so the thresholds are the same integers on every machine.
    """
    p = size_distribution(d)
    return torch.tensor([round(math.fsum(p[:k]) * 2**32) for k in range(1, d - 1)], dtype=torch.int64)


def _words(seeds: Tensor, draws: int, positions: int) -> Tensor:
    """Four uniform 32-bit words a (stream, draw, position). Returns int64 [S, draws, positions, 4]."""
    counters = torch.empty(len(seeds), draws, positions, 4, dtype=torch.int64)
    counters[..., 0] = (seeds & _WORD)[:, None, None]
    counters[..., 1] = (seeds >> 32 & _WORD)[:, None, None]
    counters[..., 2] = torch.arange(draws)[:, None]
    counters[..., 3] = torch.arange(positions)
    return philox4x32(counters, _STREAM_KEY)


def _sort_keys(words: Tensor) -> Tensor:
    """62-bit keys of the first two words: sorting d of them shuffles uniformly up to ties (odds d^2/2^63)."""
    return words[..., 0] << 30 | words[..., 1] >> 2
