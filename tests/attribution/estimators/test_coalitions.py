"""Coalition samplers: their laws, and that a draw depends on nothing but its seed and its place."""

import hashlib
import itertools

import pytest
import torch

from ddfast.attribution.estimators.coalitions import (
    all_coalitions,
    permutations,
    shapley_kernel_subsets,
    size_distribution,
)


def chi_square(observed, expected):
    return float(((observed - expected) ** 2 / expected).sum())


def test_all_coalitions_are_the_binary_numbers():
    expected = [tuple(reversed(bits)) for bits in itertools.product([False, True], repeat=5)]
    assert [tuple(row) for row in all_coalitions(5, 0, 32).tolist()] == expected
    assert torch.equal(all_coalitions(20, 2**20 - 3, 2**20)[-1], torch.ones(20, dtype=torch.bool))


def test_permutations_are_uniform():
    orders = permutations(torch.tensor([11]), 24_000, 4)[0]
    assert torch.equal(orders.sort(dim=-1).values, torch.arange(4).expand(24_000, 4))
    _, counts = torch.unique(orders, dim=0, return_counts=True)
    assert len(counts) == 24
    # 23 degrees of freedom: the 99.99% quantile is 55.
    assert chi_square(counts.double(), torch.full((24,), 1000.0)) < 55


@pytest.mark.parametrize("d", [2, 3, 9, 16, 49])
def test_size_distribution_is_the_shapley_kernel(d):
    weight = [(d - 1) / (k * (d - k)) for k in range(1, d)]
    assert size_distribution(d) == pytest.approx([w / sum(weight) for w in weight], rel=1e-14)


def test_subset_sizes_follow_the_shapley_kernel():
    d, draws = 16, 20_000
    sizes = shapley_kernel_subsets(torch.tensor([3]), draws, d)[0].sum(dim=-1)
    observed = torch.bincount(sizes, minlength=d + 1).double()
    assert observed[0] == 0
    assert observed[d] == 0
    # 14 degrees of freedom: the 99.99% quantile is 42.6.
    assert chi_square(observed[1:d], draws * torch.tensor(size_distribution(d))) < 42.6


def test_subsets_of_one_size_are_equally_likely():
    subsets = shapley_kernel_subsets(torch.tensor([5]), 20_000, 5)[0]
    pairs = subsets[subsets.sum(dim=-1) == 2]
    found, counts = torch.unique(pairs, dim=0, return_counts=True)
    assert len(found) == 10
    # 9 degrees of freedom: the 99.99% quantile is 33.7.
    assert chi_square(counts.double(), torch.full((10,), len(pairs) / 10)) < 33.7


@pytest.mark.parametrize("sample", [permutations, shapley_kernel_subsets])
def test_a_draw_depends_only_on_its_seed_and_place(sample):
    seeds = torch.tensor([7, -1, 2**63 - 1, -(2**63), 7 + 2**32])
    together = sample(seeds, 6, 9)
    for row, seed in zip(together, seeds, strict=True):
        torch.testing.assert_close(sample(seed[None], 6, 9)[0], row)
        torch.testing.assert_close(sample(seed[None], 2, 9)[0], row[:2])
    for one, other in itertools.combinations(together, 2):
        assert not torch.equal(one, other)


def test_draws_are_the_same_everywhere():
    """Pinned: a change here changes every distilled set."""
    seeds = torch.tensor([0, 42, -5])
    orders = permutations(seeds, 4, 16).to(torch.uint8).numpy().tobytes()
    subsets = shapley_kernel_subsets(seeds, 23, 16).to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(orders).hexdigest()[:16] == "1030db1bb182ff70"
    assert hashlib.sha256(subsets).hexdigest()[:16] == "0a4f3cf2ea992854"
