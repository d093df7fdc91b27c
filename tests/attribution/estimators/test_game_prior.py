"""The prior over games against enumeration of all coalitions, in float64."""

import pytest
import torch

from ddfast.attribution.estimators.coalitions import all_coalitions, shapley_weights
from ddfast.attribution.estimators.game_prior import (
    FITTED_EXCHANGEABLE,
    FITTED_GRID,
    GamePrior,
    Level,
    Parameters,
)

TILTED = Parameters(
    levels=(
        Level((1, 1), 0.7, 0.4),
        Level((1, 2), 3.0, 0.2, -0.3),
        Level((2, 2), 1.5, 0.5, 0.4),
        Level((3, 3), 0.4, 0.7, 0.2),
        Level(None, 0.2, 0.8, 0.1),
    ),
    equal=5.0,
    rest=0.01,
)
CASES = [(9, (3, 3)), (8, (2, 4)), (5, (1, 5)), (6, None)]


def anchors_first(d):
    everything = all_coalitions(d, 0, 1 << d)
    return torch.cat([everything[:1], everything[-1:], everything[1:-1]])


@pytest.mark.parametrize(("d", "grid"), CASES)
@pytest.mark.parametrize("parameters", [None, TILTED], ids=["fitted", "tilted"])
def test_covariances_are_those_of_one_process(d, grid, parameters):
    prior = GamePrior(d, grid, parameters)
    everything = all_coalitions(d, 0, 1 << d)
    covariance = prior.covariance(everything, everything)
    torch.testing.assert_close(covariance, covariance.mT, rtol=0, atol=1e-12)
    assert float(torch.linalg.eigvalsh(covariance)[0]) > 0
    torch.testing.assert_close(prior.variance(everything), covariance.diagonal(), rtol=0, atol=1e-12)
    # phi is a linear map of the values, which is what its covariance with them has to follow.
    expected = covariance @ shapley_weights(everything)
    torch.testing.assert_close(prior.shapley_covariance(everything), expected, rtol=0, atol=1e-12)


def test_one_window_is_the_product_over_its_cells():
    level = Level((2, 2), 2.0, 0.3, 0.5)
    prior = GamePrior(6, (2, 3), Parameters((level,), equal=0.0, rest=0.0))
    s, t = torch.tensor([[1, 1, 0, 0, 1, 1]]).bool(), torch.tensor([[1, 0, 0, 0, 1, 0]]).bool()
    # Windows {0, 1, 3, 4} and {1, 2, 4, 5}; in each one cell differs, one is present in both, the rest is absent.
    left = 0.3 * 2.718281828459045 ** (0.5 * (1 - 2))
    right = 0.3 * 0.3 * 2.718281828459045 ** (0.5 * (1 - 1))
    assert float(prior.covariance(s, t)) == pytest.approx((left + right) * 2.0 / 2)


@pytest.mark.parametrize("turn", [lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.mT])
def test_the_grid_can_be_turned(turn):
    prior = GamePrior(9, (3, 3), TILTED)
    s = all_coalitions(9, 0, 512)[::5]
    turned = turn(s.view(-1, 3, 3)).reshape(-1, 9)
    torch.testing.assert_close(prior.covariance(turned, turned), prior.covariance(s, s), rtol=0, atol=1e-12)
    expected = turn(prior.shapley_covariance(s).view(-1, 3, 3)).reshape(-1, 9)
    torch.testing.assert_close(prior.shapley_covariance(turned), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("d", "grid"), CASES)
def test_the_projection_is_the_conditional_expectation(d, grid):
    """By brute force: the joint normal of all 2^d values under a constant of enormous variance, then phi of it."""
    prior = GamePrior(d, grid, TILTED)
    everything = anchors_first(d)
    covariance = prior.covariance(everything, everything) + 1e6
    seen = torch.cat(
        [torch.arange(2), torch.randperm(len(everything) - 2, generator=torch.manual_seed(0))[:13] + 2]
    )
    gain = torch.linalg.solve(covariance[seen][:, seen], covariance[seen])
    expected = gain @ shapley_weights(everything)
    torch.testing.assert_close(prior.projection(everything[seen]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("d", "grid"), CASES)
def test_all_coalitions_leave_nothing_to_expect(d, grid):
    everything = anchors_first(d)
    for parameters in (None, TILTED):
        projection = GamePrior(d, grid, parameters).projection(everything)
        torch.testing.assert_close(projection, shapley_weights(everything), rtol=0, atol=1e-6)


def test_projections_of_many_sets_are_those_of_each():
    prior = GamePrior(9, (3, 3))
    between = all_coalitions(9, 1, 511)
    order = torch.stack([torch.randperm(510, generator=torch.manual_seed(seed))[:20] for seed in range(3)])
    anchors = torch.tensor([False, True])[:, None].expand(3, 2, 9)
    coalitions = torch.cat([anchors, between[order]], dim=1)
    together = prior.projection(coalitions)
    for each, found in zip(coalitions, together, strict=True):
        torch.testing.assert_close(prior.projection(each), found, rtol=0, atol=1e-12)
    full = together.sum(dim=-1)
    torch.testing.assert_close(
        full[:, :2], torch.tensor([-1.0, 1.0]).double().expand(3, 2), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(full[:, 2:], torch.zeros(3, 20).double(), rtol=0, atol=1e-12)


def test_a_coalition_seen_twice_adds_nothing():
    prior = GamePrior(9, (3, 3))
    once = anchors_first(9)[[0, 1, 40, 90, 300]]
    twice = prior.projection(once[[0, 1, 2, 3, 4, 3]])
    twice[3] += twice[5]
    torch.testing.assert_close(twice[:5], prior.projection(once), rtol=0, atol=1e-6)


def test_players_without_neighbours_are_exchangeable():
    order = torch.randperm(7, generator=torch.manual_seed(1))
    prior, s = GamePrior(7, None), all_coalitions(7, 0, 128)
    torch.testing.assert_close(prior.covariance(s[:, order], s[:, order]), prior.covariance(s, s))


def test_windows_larger_than_the_grid_are_left_out():
    prior = GamePrior(4, (2, 2))
    assert len(prior._levels) == len(FITTED_GRID.levels) - 1
    assert len(GamePrior(4, None)._levels) == len(FITTED_EXCHANGEABLE.levels)


def test_a_grid_of_other_players_is_refused():
    with pytest.raises(ValueError, match="a grid of 9 players is wanted, got 2 x 4"):
        GamePrior(9, (2, 4))
