"""Stopping once the crop is settled: the rounds, the confidence, and that neighbours change nothing."""

import itertools
import math

import pytest
import torch
from torch import nn

import ddfast
from ddfast.attribution import settled_shapley, shapley
from ddfast.attribution.estimators.coalitions import all_coalitions, shapley_weights
from ddfast.attribution.estimators.design_search import design, expected_error
from ddfast.attribution.estimators.game_prior import GamePrior
from ddfast.attribution.stopping import Rounds

CLASSES = 5


def small_net(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )
    return net.to(dtype).eval()


def batch(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=generator).to(dtype)
    return images, torch.randint(0, CLASSES, (count,), generator=generator)


def test_rounds_are_nested_and_efficient():
    rounds = Rounds(16, (4, 4))
    assert rounds.sizes == [32, 48, 64, 96, 128]
    assert len(torch.unique(rounds.coalitions, dim=0)) == 128
    assert not rounds.coalitions[0].any()
    assert rounds.coalitions[1].all()
    values = torch.randn(7, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for number, size in enumerate(rounds.sizes):
        phi, settled = rounds.estimate(number, values[:, :size], 0.9)
        torch.testing.assert_close(phi.sum(dim=1), values[:, 1] - values[:, 0], rtol=0, atol=1e-9)
        assert settled.shape == (7,)
        assert settled.dtype == torch.bool


def test_the_first_round_is_the_design_of_its_budget():
    rounds = Rounds(16, (4, 4))
    assert torch.equal(rounds.coalitions[:32], design(16, 32, (4, 4))[0])
    prior = GamePrior(16, (4, 4))
    left = [expected_error(prior, rounds.coalitions[:size]) for size in rounds.sizes]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.1 * left[0]


def test_games_of_the_prior_are_settled_as_often_as_promised():
    """On games drawn from the prior itself the posterior is right but for the union bound and the scale's noise."""
    d, grid = 9, (3, 3)
    prior, rounds = GamePrior(d, grid), Rounds(d, grid)
    everything = all_coalitions(d, 0, 1 << d)
    factor = torch.linalg.cholesky(prior.covariance(everything, everything))
    noise = torch.randn(1 << d, 3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    games = 4.0 + 3.0 * (factor @ noise).mT
    exact = (games @ shapley_weights(everything)) @ rounds._windows().mT
    values = games[:, (rounds.coalitions.long() << torch.arange(d)).sum(dim=1)]
    for confidence in (0.7, 0.9, 0.99):
        phi, settled = rounds.estimate(0, values[:, : rounds.sizes[0]], confidence)
        found = (phi @ rounds._windows().mT).argmax(dim=1)
        right = (found == exact.argmax(dim=1)).double()
        assert 100 < int(settled.sum()) < 2900
        assert float(right[settled].mean()) > confidence - 3 * math.sqrt(0.25 / int(settled.sum()))
        assert float(right[settled].mean()) > float(right[~settled].mean()) + 0.1


def test_it_stops_at_the_asked_confidence_and_no_later():
    net = small_net(torch.float64)
    images, labels = batch(6, torch.float64)
    rounds = Rounds(16, (4, 4))
    seeds = torch.arange(6)
    phi, evaluations = settled_shapley(net, images, labels, confidence=0.8, seed=seeds)
    assert phi.shape == (6, 16)
    assert evaluations.dtype == torch.int64
    assert set(evaluations.tolist()) <= set(rounds.sizes)
    for i in range(6):
        relabelled = rounds.relabelling(seeds[i : i + 1])[0]
        cells = rounds.coalitions[:, relabelled].view(-1, 4, 4)
        masked = images[i] * cells.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
        with torch.no_grad():
            values = net(masked)[:, labels[i]][None]
        for number, size in enumerate(rounds.sizes):
            expected, settled = rounds.estimate(number, values[:, :size], 0.8)
            if settled or number == len(rounds.sizes) - 1:
                break
        assert int(evaluations[i]) == size
        torch.testing.assert_close(phi[i], expected[0, relabelled], rtol=0, atol=1e-9)


def test_a_surer_answer_takes_no_fewer_evaluations():
    images, labels = batch(8)
    taken = [
        settled_shapley(small_net(), images, labels, confidence=confidence)[1]
        for confidence in (0.01, 0.5, 0.9, 0.9999)
    ]
    assert bool((taken[0] == 32).all())
    assert all(bool((less <= more).all()) for less, more in itertools.pairwise(taken))
    assert bool((taken[-1] > taken[0]).any())


def test_it_comes_close_to_enumeration():
    net = small_net(torch.float64)
    images, labels = batch(2, torch.float64)
    phi, evaluations = settled_shapley(net, images, labels, 3, confidence=1 - 1e-12)
    truth = shapley(net, images, labels, 3, estimator="exact")
    assert bool((evaluations <= 72).all())
    assert float((phi - truth).norm() / truth.norm()) < 0.05


def test_neighbours_do_not_matter():
    net = small_net()
    images, labels = batch(5)
    seeds = torch.tensor([9, -8, 2**62, 9, 0])
    together, taken = settled_shapley(net, images, labels, confidence=0.8, seed=seeds, chunk_size=32)
    assert len(set(taken.tolist())) > 1
    for i in range(5):
        one = slice(i, i + 1)
        alone, steps = settled_shapley(
            net, images[one], labels[one], confidence=0.8, seed=seeds[one], chunk_size=32
        )
        assert torch.equal(alone[0], together[i])
        assert torch.equal(steps[0], taken[i])


def test_images_with_baselines_of_their_own_and_none_at_all():
    net = small_net(torch.float64)
    images, labels = batch(3, torch.float64)
    phi, _ = settled_shapley(net, images, labels, baseline=images.flip(0), confidence=0.5)
    with torch.no_grad():
        gain = (net(images) - net(images.flip(0))).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(phi.sum(dim=1), gain, rtol=0, atol=1e-9)
    nothing, taken = settled_shapley(net, images[:0], labels[:0])
    assert nothing.shape == (0, 16)
    assert taken.shape == (0,)


def test_a_game_without_interest_is_left_at_zero():
    """All windows equal: nothing to settle, and no division by the scale of a game that does not vary."""
    images, labels = batch(2)
    phi, evaluations = settled_shapley(lambda x: torch.ones(len(x), CLASSES), images, labels)
    torch.testing.assert_close(phi, torch.zeros(2, 16), rtol=0, atol=1e-6)
    assert set(evaluations.tolist()) <= {32, 48, 64, 96, 128}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"confidence": 1.0}, "confidence must lie between 0 and 1, got 1.0"),
        ({"confidence": 0.0}, "confidence must lie between 0 and 1, got 0.0"),
        ({"n_samples": 31}, "n_samples must be at least 32, the first round of 16 players, got 31"),
        ({"pool": 5}, r"pool must be 1..4 cells for a grid of 4 x 4, got 5"),
        ({"value": "loss"}, "value must be one of logit, prob, logprob, got 'loss'"),
        ({"labels": torch.tensor([0, 9])}, "labels must lie in 0..4"),
    ],
)
def test_arguments_that_do_not_fit(changed, message):
    images, labels = batch(2)
    with pytest.raises(ValueError, match=message):
        settled_shapley(**{"model": small_net(), "images": images, "labels": labels, **changed})


def test_it_is_public():
    assert ddfast.attribution.settled_shapley is settled_shapley
