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

from ddfast.philox import philox4x32

# Philox key of every coalition stream ("coalitio" in ASCII). The user's seed sits in the counter, so streams
# of different seeds are disjoint, and none meets the crop noise, which keys Philox by the seed itself.
_STREAM_KEY = 0x636F616C6974696F
_WORD = 0xFFFFFFFF

# Up to so many subsets of a size are numbered and shuffled.
_MAX_SHUFFLED = 1 << 40


def all_coalitions(d: int, start: int, stop: int) -> Tensor:
    """Coalitions number `start` to `stop - 1` of the 2^d: bit i of the number says whether player i is there.

    Returns:
        bool [stop - start, d].
    """
    number = torch.arange(start, stop)
    return (number[:, None] >> torch.arange(d)) & 1 == 1


def shapley_weights(coalitions: Tensor) -> Tensor:
    """What v(s) brings to each phi_i in InfoUtil Eq. 4: w(|s| - 1) if i is in s, else -w(|s|).

    w(k) = 1 / (d binom(d - 1, k)). Bool [..., K, d] to float64 [..., K, d].
    """
    d = coalitions.shape[-1]
    # w(-1) and w(d) only meet a player that is not there, so 0 stands for both.
    marginal = [0.0, *(1.0 / (d * math.comb(d - 1, k)) for k in range(d)), 0.0]
    weight = torch.tensor(marginal, dtype=torch.float64)
    size = coalitions.sum(dim=-1, keepdim=True)
    return torch.where(coalitions, weight[size], -weight[size + 1])


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


def shapley_kernel_subsets(seeds: Tensor, count: int, d: int, smallest: int = 1) -> Tensor:
    """Subsets from the Shapley kernel q(s) of InfoUtil Eq. 5 (Lundberg & Lee, 2017, Theorem 2).

    q(s) ∝ (d - 1) / (binom(d, k) k (d - k)) with k = |s| and 1 <= k <= d - 1: first the size from
    p(k) ∝ 1 / (k (d - k)), then a subset of that size, all equally likely. (The paper prints the range as 1 <
    k < d.)

    Args:
        seeds: int64 [S], one stream each.
        count: subsets a stream.
        d: number of players, at least 2.
        smallest: the law given that smallest <= |s| <= d - smallest, by default the whole.

    Returns:
        bool [S, count, d]; neither the empty nor the full coalition occurs.
    """
    words = _words(seeds, count, d + 1)
    thresholds = _size_thresholds(d, smallest)
    size = smallest + torch.bucketize(words[..., d, 0].contiguous(), thresholds, right=True)
    rank = _sort_keys(words[..., :d, :]).argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank < size[..., None]


def size_distribution(d: int) -> list[float]:
    """p(k) ∝ 1 / (k (d - k)) for k = 1 .. d - 1, the coalition sizes of the Shapley kernel."""
    weight = [1.0 / (k * (d - k)) for k in range(1, d)]
    total = math.fsum(weight)
    return [w / total for w in weight]


def subsets_of_size(d: int, size: int) -> Tensor:
    """All binom(d, size) subsets of one size in lexicographic order, those with player 0 first: bool [binom, d]."""
    return _unrank(torch.arange(math.comb(d, size))[None], d, size)[0]


def choices(seeds: Tensor, number: int) -> Tensor:
    """One of `number` things for each stream, all equally likely, int64 [S]."""
    return _sort_keys(_words(seeds, 1, 1))[:, 0, 0] % number


def leverage_pairs(seeds: Tensor, pairs: int, d: int) -> Tensor:
    """Distinct pairs of complements by leverage scores (Musco & Witter, 2025, arXiv 2410.01917, Alg. 1).

    The leverage score of a coalition in the constrained regression of InfoUtil Eq. 5 is 1 / binom(d, |s|), so every
    size is wanted equally often until it is used up: a pair is drawn with probability min(1, c / binom(d, |s|)), c
    such that `pairs` are expected. The paper draws how many of each size there are from a binomial; here systematic
    sampling rounds the expected counts up or down, so that the budget is met exactly and the probabilities stay.

    Args:
        seeds: int64 [S], one stream each.
        pairs: distinct pairs a stream, at most 2^(d-1) - 1.
        d: number of players, at least 2.

    Returns:
        bool [S, pairs, d], the smaller coalition of each pair (at d / 2 the one with player 0), by size.
    """
    probability = leverage_probabilities(d, pairs)
    words = _words(seeds, pairs + 1, d // 2)
    # Counts by size: running sums of the expected counts, shifted by one uniform number a stream and cut.
    shift = words[:, pairs, 0, 0].double() / 2**32
    until = torch.zeros(len(seeds), dtype=torch.int64)
    expected = 0.0
    drawn, used = [], []
    for size in range(1, d // 2 + 1):
        expected += probability[size] * _pairs_of_size(d, size)
        # The nudge keeps whole numbers whole where a sum of floats falls short of them.
        before, until = until, torch.floor(expected + shift + 1e-9).long().clamp(max=pairs)
        count = until - before
        most = int(count.max()) if len(seeds) else 0
        if most:
            drawn.append(_distinct_subsets(seeds, words[:, :most, size - 1], d, size))
            used.append(torch.arange(most) < count[:, None])
    if not drawn:
        return torch.zeros(len(seeds), pairs, d, dtype=torch.bool)
    return torch.cat(drawn, dim=1)[torch.cat(used, dim=1)].view(len(seeds), pairs, d)


@functools.cache
def leverage_probabilities(d: int, pairs: int) -> list[float]:
    """Probability that `leverage_pairs` draws the pair of a coalition of size 0 .. d (0 for the two anchors)."""
    sizes = range(1, d // 2 + 1)
    left, c = float(pairs), 0.0
    # A size smaller than its equal share is taken whole; the others share what it leaves. binom grows with size.
    for size in sizes:
        share = sum(_pairs_of_size(d, k) / math.comb(d, k) for k in range(size, d // 2 + 1))
        c = left / share
        if c < math.comb(d, size):
            break
        left -= _pairs_of_size(d, size)
    return [0.0 if size in (0, d) else min(1.0, c / math.comb(d, size)) for size in range(d + 1)]


def _pairs_of_size(d: int, size: int) -> int:
    """Pairs of complements whose smaller coalition has `size` players."""
    return math.comb(d, size) // (2 if 2 * size == d else 1)


def _distinct_subsets(seeds: Tensor, words: Tensor, d: int, size: int) -> Tensor:
    """Subsets of one size, no two alike in a stream, all equally likely; at d / 2 only those with player 0.

    Args:
        seeds: int64 [S], one stream each.
        words: int64 [S, count, 4], randomness of these draws; count is at most the number of subsets.
        d: number of players.
        size: players of a subset, at most d / 2.

    Returns:
        bool [S, count, d]; the first so many of a stream are a uniform draw themselves.
    """
    number = _pairs_of_size(d, size)
    if number <= _MAX_SHUFFLED:
        return _unrank(_shuffled(_sort_keys(words), number), d, size)
    # Too many to number, and to draw one twice: odds below count^2 / 2^41.
    first = 1 + size * words.shape[1]
    keys = _sort_keys(_words(seeds, words.shape[1], d, first))
    subsets = keys.argsort(dim=-1, stable=True).argsort(dim=-1) < size
    return subsets ^ ~subsets[..., :1] if 2 * size == d else subsets


def _shuffled(random: Tensor, number: int) -> Tensor:
    """The first entries of a random order of 0 .. number - 1.

    A Fisher-Yates shuffle that writes down only the places it has swapped: `held[:, i]` went to `place[:, i]`.

    Args:
        random: int64 [S, count], uniform in [0, 2^62); count is at most `number`.
        number: how many there are, far below 2^62.

    Returns:
        int64 [S, count].
    """
    place, held, entries = torch.empty_like(random), torch.empty_like(random), torch.empty_like(random)
    for j in range(random.shape[1]):
        place[:, j] = j + random[:, j] % (number - j)
        entries[:, j] = _lying_at(place[:, j], place[:, :j], held[:, :j])
        held[:, j] = _lying_at(torch.full_like(place[:, j], j), place[:, :j], held[:, :j])
    return entries


def _lying_at(where: Tensor, place: Tensor, held: Tensor) -> Tensor:
    """What a shuffle holds at `where` [S] after the swaps `place`, `held` [S, j]: the last one to go there."""
    if not place.shape[1]:
        return where
    swap = torch.where(place == where[:, None], torch.arange(1, place.shape[1] + 1), 0).amax(dim=1)
    return torch.where(swap > 0, held.gather(1, (swap - 1).clamp(min=0)[:, None])[:, 0], where)


def _unrank(ranks: Tensor, d: int, size: int) -> Tensor:
    """Subsets of `size` players by their number in lexicographic order, those with player 0 first.

    Args:
        ranks: int64 [S, count], below binom(d, size) <= 2^41.

    Returns:
        bool [S, count, d].
    """
    rank, wanted = ranks.clone(), torch.full_like(ranks, size)
    subsets = torch.zeros(*ranks.shape, d, dtype=torch.bool)
    for player in range(d):
        left = d - 1 - player
        with_player = torch.tensor([0, *(math.comb(left, k - 1) for k in range(1, size + 1))])[wanted]
        joins = rank < with_player
        subsets[..., player] = joins
        rank = torch.where(joins, rank, rank - with_player)
        wanted = wanted - joins.long()
    return subsets


@functools.cache
def _size_thresholds(d: int, smallest: int) -> Tensor:
    """Upper ends, in 32-bit words, of the intervals of all sizes but the last, `smallest` .. d - smallest - 1.

    The sums are correctly rounded (fsum), so the thresholds are the same integers on every machine.
    """
    p = size_distribution(d)[smallest - 1 : d - smallest]
    total = math.fsum(p) if smallest > 1 else 1.0
    ends = [round(math.fsum(p[:k]) / total * 2**32) for k in range(1, len(p))]
    return torch.tensor(ends, dtype=torch.int64)


def _words(seeds: Tensor, draws: int, positions: int, first: int = 0) -> Tensor:
    """Four uniform 32-bit words a (stream, draw, position), draws `first` on: int64 [S, draws, positions, 4]."""
    counters = torch.empty(len(seeds), draws, positions, 4, dtype=torch.int64)
    counters[..., 0] = (seeds & _WORD)[:, None, None]
    counters[..., 1] = (seeds >> 32 & _WORD)[:, None, None]
    counters[..., 2] = torch.arange(first, first + draws)[:, None]
    counters[..., 3] = torch.arange(positions)
    return philox4x32(counters, _STREAM_KEY)


def _sort_keys(words: Tensor) -> Tensor:
    """62-bit keys of the first two words: sorting d of them shuffles uniformly up to ties (odds d^2/2^63)."""
    return words[..., 0] << 30 | words[..., 1] >> 2
