"""The search for coalitions against the trace it lowers, computed without updates, in float64."""

import functools

import pytest
import torch

from ddfast.attribution.estimators import design_search as design_module
from ddfast.attribution.estimators.coalitions import all_coalitions, shapley_weights
from ddfast.attribution.estimators.design_search import candidates, design, extended, refined, search
from ddfast.attribution.estimators.game_prior import GamePrior
from ddfast.attribution.estimators.kept_designs import kept_design


@functools.cache
def covariance_of_all(prior):
    everything = all_coalitions(prior.d, 0, 1 << prior.d)
    return everything, prior.covariance(everything, everything)


def traced(prior, coalitions):
    """Trace of the covariance of phi given values, over all 2^d coalitions; the constant has no prior."""
    everything, covariance = covariance_of_all(prior)
    number = (coalitions.long() << torch.arange(prior.d)).sum(dim=-1)
    missed = shapley_weights(everything)
    missed.index_add_(0, number, -prior.projection(coalitions))
    return float((missed.mT @ covariance @ missed).trace())


@pytest.mark.parametrize(("d", "grid"), [(6, (2, 3)), (6, None)])
def test_greedy_takes_what_lowers_the_expected_error_most(d, grid):
    prior = GamePrior(d, grid)
    pool = candidates(d)
    chosen = search(prior, pool, 7, sweeps=0)
    assert chosen.shape == (7, d)
    assert not chosen[0].any()
    assert chosen[1].all()
    for taken in range(2, 7):
        best = min(traced(prior, torch.cat([chosen[:taken], one[None]])) for one in pool[2:])
        assert traced(prior, chosen[: taken + 1]) == pytest.approx(best, rel=1e-4)


def test_exchanges_lower_the_expected_error_until_none_helps():
    prior = GamePrior(8, (2, 4))
    pool = candidates(8)
    greedy, exchanged = search(prior, pool, 12, sweeps=0), search(prior, pool, 12)
    least = traced(prior, exchanged)
    assert least < traced(prior, greedy) * (1 - 1e-4)
    for i in range(2, 12):
        for other in pool[2::17]:
            tried = exchanged.clone()
            tried[i] = other
            if not (exchanged == other).all(dim=1).any():
                assert traced(prior, tried) > least * (1 - 1e-4)


def test_candidates_hold_single_players_and_complements():
    pool = candidates(16, count=50)
    assert len(torch.unique(pool, dim=0)) == len(pool) >= 2 + 2 * 16
    assert not pool[0].any()
    assert pool[1].all()
    known = {tuple(row) for row in pool.tolist()}
    assert known == {tuple(row) for row in (~pool).tolist()}
    assert all(tuple(row) in known for row in torch.eye(16).bool().tolist())
    assert len(candidates(9)) == 512


@pytest.mark.parametrize("n_samples", [3, 16, 17, 32, 200])
def test_a_design_has_distinct_coalitions_within_its_budget(n_samples):
    coalitions, projection = design(16, n_samples, (4, 4))
    assert coalitions.shape == projection.shape == (n_samples, 16)
    assert len(torch.unique(coalitions, dim=0)) == n_samples
    assert not coalitions[0].any()
    assert coalitions[1].all()


def test_a_design_of_more_than_there_is_has_it_all():
    assert len(design(4, 100, (2, 2))[0]) == 16
    assert len(design(3, 8, None)[0]) == 8


def test_more_evaluations_are_expected_to_err_less():
    prior = GamePrior(9, (3, 3))
    errors = [traced(prior, design(9, n_samples, (3, 3))[0]) for n_samples in (3, 10, 20, 40, 80, 160)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[0]


@pytest.mark.parametrize(("d", "grid"), [(8, (2, 4)), (6, None)])
def test_the_expected_error_is_the_share_of_the_trace_that_is_left(d, grid):
    prior = GamePrior(d, grid)
    chosen = candidates(d)[[0, 1, 5, 12, 30, 40]]
    everything, covariance = covariance_of_all(prior)
    before = shapley_weights(everything)
    expected = traced(prior, chosen) / float((before.mT @ covariance @ before).trace())
    assert design_module.expected_error(prior, chosen) == pytest.approx(expected, rel=1e-8)


def test_neighbours_refine_a_poor_design():
    prior = GamePrior(16, (4, 4))
    poor = candidates(16, count=40)[:20]
    better = refined(prior, poor)
    assert len(torch.unique(better, dim=0)) == len(better) == 20
    assert not better[0].any()
    assert better[1].all()
    assert design_module.expected_error(prior, better) < 0.8 * design_module.expected_error(prior, poor)


def test_a_design_is_extended_by_what_adds_most():
    prior = GamePrior(9, (3, 3))
    first = search(prior, candidates(9), 8, sweeps=0)
    longer = extended(prior, first, 12)
    assert torch.equal(longer[:8], first)
    assert torch.equal(extended(prior, first, 8), first)
    best = min(traced(prior, torch.cat([first, one[None]])) for one in candidates(9)[2:])
    assert traced(prior, longer[:9]) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("n_samples", [17, 24, 32, 48, 64, 96, 128])
def test_kept_designs_are_what_a_search_finds_or_better(n_samples):
    kept, prior = kept_design((4, 4), n_samples), GamePrior(16, (4, 4))
    assert kept.shape == (n_samples, 16)
    assert kept.dtype == torch.bool
    assert len(torch.unique(kept, dim=0)) == n_samples
    assert not kept[0].any()
    assert kept[1].all()
    assert torch.equal(design(16, n_samples, (4, 4))[0], kept)
    found = search(prior, candidates(16, count=100), n_samples, sweeps=2)
    assert design_module.expected_error(prior, kept) < design_module.expected_error(prior, found)


def test_other_grids_and_budgets_have_no_kept_design():
    assert kept_design((4, 4), 33) is None
    assert kept_design((2, 8), 32) is None
    assert kept_design(None, 32) is None
