"""Estimators on games given as formulas of the coalition, against enumeration and the axioms, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from ddfast.attribution import ESTIMATORS, list_estimators
from ddfast.attribution.estimators.plans import ExactPlan, SampledPlan, make_plan

DRAWN = ("kernel", "paired", "permutation", "ramc")
WITHOUT_REPLACEMENT = ("designed", "enumerated", "gp", "leverage")
SAMPLING = DRAWN + WITHOUT_REPLACEMENT
EFFICIENT = ("designed", "enumerated", "exact", "gp", "leverage", "paired", "permutation", "ramc")
PRIOR = ("designed", "gp")


def estimate(estimator, players, n_samples, seed, game):
    """phi [(S,) d] of `game`, a function from coalitions bool [..., d] to values float64 [...]."""
    plan = make_plan(estimator, players, n_samples, seed)
    coalitions, projection = plan.rows(0, plan.size)
    return (projection * game(coalitions)[..., None]).sum(dim=-2)


def additive_game(d, seed=0):
    weight = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return weight, lambda s: 0.3 + s.double() @ weight


def pairwise_game(d, seed=0):
    """v(s) = c + sum_i a_i s_i + sum_{i<j} b_ij s_i s_j, whose phi_i is a_i + sum_j b_ij / 2."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(d, dtype=torch.float64, generator=generator)
    b = torch.randn(d, d, dtype=torch.float64, generator=generator).triu(1)
    phi = a + (b + b.mT).sum(dim=1) / 2
    return phi, lambda s: 1.7 + s.double() @ a + ((s.double() @ b) * s).sum(dim=-1)


def smooth_game(d, seed=0):
    """Interactions of every order, most of the weight on the low ones."""
    generator = torch.Generator().manual_seed(seed)
    _, pairwise = pairwise_game(d, seed)
    weight = torch.randn(d, 20, dtype=torch.float64, generator=generator)
    return lambda s: pairwise(s) + torch.tanh(s.double() @ weight).sum(dim=-1)


def table_game(d, seed=0):
    """Any game: 2^d independent values."""
    values = torch.randn(2**d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return lambda s: values[(s.long() << torch.arange(d)).sum(dim=-1)]


def mean_over_all_orders(d, game):
    """The definition of Shapley (1953): the mean marginal contribution over the d! orders of joining."""
    phi = torch.zeros(d, dtype=torch.float64)
    for order in itertools.permutations(range(d)):
        present = torch.zeros(d, dtype=torch.bool)
        before = game(present)
        for player in order:
            present[player] = True
            after = game(present)
            phi[player] += after - before
            before = after
    return phi / math.factorial(d)


def ends(d, game):
    return game(torch.zeros(d, dtype=torch.bool)), game(torch.ones(d, dtype=torch.bool))


def test_registry_lists_the_estimators():
    names = ["designed", "enumerated", "exact", "gp", "kernel", "leverage", "paired", "permutation", "ramc"]
    assert list_estimators() == names == sorted(ESTIMATORS) == sorted((*SAMPLING, "exact"))
    with pytest.raises(ValueError, match=f"one of {', '.join(names)}, got 'lime'"):
        make_plan("lime", 4, 32, 0)


@pytest.mark.parametrize("d", [1, 2, 3, 6])
def test_exact_is_the_mean_over_all_orders(d):
    game = table_game(d)
    torch.testing.assert_close(
        estimate("exact", d, 0, 0, game), mean_over_all_orders(d, game), rtol=0, atol=1e-12
    )


def test_exact_rows_in_pieces_are_the_whole():
    plan = ExactPlan(7)
    assert plan.size == 128
    whole = plan.rows(0, 128)
    pieces = [plan.rows(start, min(start + 50, 128)) for start in range(0, 128, 50)]
    for part in (0, 1):
        assert torch.equal(torch.cat([piece[part] for piece in pieces]), whole[part])


def test_exact_refuses_what_cannot_be_enumerated():
    assert make_plan("exact", 20, 32, 0).size == 2**20
    with pytest.raises(ValueError, match=r"at most 20 players .* got 21"):
        make_plan("exact", 21, 32, 0)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_the_first_row_is_the_empty_coalition(estimator):
    for seed in (0, torch.arange(3)):
        coalitions, projection = make_plan(estimator, 6, 30, seed).rows(0, 1)
        assert not coalitions.any()
        assert projection.dtype == torch.float64
        assert coalitions.dtype == torch.bool


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("seed", [9, torch.tensor([9, -4])], ids=["shared", "per-image"])
def test_one_player_takes_everything(estimator, seed):
    phi = estimate(estimator, 1, 32, seed, lambda s: 2.0 + 3.0 * s[..., 0].double())
    torch.testing.assert_close(phi, torch.full_like(phi, 3.0))


@pytest.mark.parametrize("d", [2, 5, 16])
@pytest.mark.parametrize("estimator", EFFICIENT)
def test_efficiency(estimator, d):
    game = smooth_game(d)
    empty, full = ends(d, game)
    for n_samples in (34, 35, 100) if estimator == "enumerated" else (d + 4, 32, 33, 100):
        total = estimate(estimator, d, n_samples, torch.arange(5), game).sum(dim=-1)
        torch.testing.assert_close(total, (full - empty).expand_as(total), rtol=0, atol=1e-10)


def test_kernel_is_efficient_up_to_its_anchor_weight():
    game = smooth_game(16)
    empty, full = ends(16, game)
    total = estimate("kernel", 16, 100, torch.arange(5), game).sum(dim=-1)
    torch.testing.assert_close(total, (full - empty).expand_as(total), rtol=0, atol=1e-3)


@pytest.mark.parametrize("estimator", ["exact", "permutation"])
def test_a_dummy_player_gets_its_own_value(estimator):
    inner = smooth_game(5)
    phi = estimate(estimator, 6, 24, torch.arange(4), lambda s: inner(s[..., :5]) + 0.25 * s[..., 5])
    torch.testing.assert_close(phi[..., 5], torch.full_like(phi[..., 5], 0.25))


@pytest.mark.parametrize("estimator", sorted({*ESTIMATORS} - {*PRIOR}))
def test_additive_games_are_solved_by_regressions_and_orders(estimator):
    weight, game = additive_game(6)
    phi = estimate(estimator, 6, 60, torch.arange(4), game)
    torch.testing.assert_close(phi, weight.expand_as(phi), rtol=0, atol=1e-8)


@pytest.mark.parametrize("players", [16, (4, 4)], ids=["16", "4x4"])
@pytest.mark.parametrize("estimator", PRIOR)
def test_a_prior_all_but_solves_additive_games(estimator, players):
    weight, game = additive_game(16)
    phi = estimate(estimator, players, 256, torch.arange(4), game)
    assert float((phi - weight).norm(dim=-1).max()) < 0.02 * float(weight.norm())


def test_symmetric_players_share_alike():
    base = smooth_game(4)

    def game(s):
        """Players 0 and 1 count together: neither is told from the other."""
        either = (s[..., 0] | s[..., 1])[..., None]
        return base(torch.cat([either, s[..., 2:]], dim=-1)) + (s[..., 0] & s[..., 1])

    phi = estimate("exact", 5, 0, 0, game)
    torch.testing.assert_close(phi[0], phi[1], rtol=0, atol=1e-12)
    sampled = estimate("permutation", 5, 32, torch.arange(2000), game)
    gap = sampled[:, 0] - sampled[:, 1]
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(2000)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_linearity_in_the_game(estimator):
    one, other = smooth_game(7, seed=1), table_game(7, seed=2)
    merged = estimate(estimator, 7, 40, 3, lambda s: 2.0 * one(s) - 0.5 * other(s))
    apart = 2.0 * estimate(estimator, 7, 40, 3, one) - 0.5 * estimate(estimator, 7, 40, 3, other)
    torch.testing.assert_close(merged, apart, rtol=0, atol=1e-9)


@pytest.mark.parametrize("d", [2, 3, 9, 16])
def test_one_antithetic_pair_is_exact_on_pairwise_games(d):
    phi, game = pairwise_game(d)
    found = estimate("permutation", d, 2 * d, torch.arange(20), game)
    torch.testing.assert_close(found, phi.expand_as(found), rtol=0, atol=1e-10)


@pytest.mark.parametrize("d", [2, 3, 9, 16])
@pytest.mark.parametrize("estimator", ["paired", "leverage", "enumerated", "ramc"])
def test_enough_pairs_are_exact_on_pairwise_games(estimator, d):
    phi, game = pairwise_game(d)
    found = estimate(estimator, d, 8 * d + 10, torch.arange(20), game)
    torch.testing.assert_close(found, phi.expand_as(found), rtol=0, atol=1e-10)


@pytest.mark.parametrize("estimator", DRAWN)
def test_the_error_shrinks_as_the_budget_grows(estimator):
    d, streams = 8, torch.arange(100)
    game = smooth_game(d)
    truth = estimate("exact", d, 0, 0, game)
    errors = [
        float(((estimate(estimator, d, n_samples, streams, game) - truth) ** 2).sum(dim=-1).mean())
        for n_samples in (32, 128, 512, 2048)
    ]
    # Four times the samples, a quarter of the variance; 0.45 leaves room for chance.
    for few, many in itertools.pairwise(errors):
        assert many < 0.45 * few, errors
    assert errors[-1] < 0.01 * float((truth**2).sum())


@pytest.mark.parametrize("estimator", WITHOUT_REPLACEMENT)
@pytest.mark.parametrize("players", [7, (2, 4)], ids=["7", "2x4"])
def test_the_error_shrinks_to_nothing_when_all_coalitions_are_seen(estimator, players):
    d = players if isinstance(players, int) else 8
    game, streams = smooth_game(d), torch.arange(10)
    truth = estimate("exact", d, 0, 0, game)
    errors = [
        float(((estimate(estimator, players, n_samples, streams, game) - truth) ** 2).sum(dim=-1).mean())
        for n_samples in (20, 80, 2**d + 3)
    ]
    assert errors[1] < 0.5 * errors[0], errors
    assert errors[2] < 1e-12 * float((truth**2).sum()), errors


@pytest.mark.parametrize(
    ("estimator", "n_samples", "d"),
    [
        ("permutation", 32, 8),
        ("permutation", 9, 8),
        ("permutation", 100, 8),
        ("permutation", 32, 16),
        ("ramc", 9, 6),
        ("ramc", 40, 8),
    ],
)
def test_unbiased(estimator, n_samples, d):
    game, streams = table_game(d), 4000
    truth = estimate("exact", d, 0, 0, game)
    sampled = estimate(estimator, d, n_samples, torch.arange(streams), game)
    standard_error = sampled.std(dim=0) / math.sqrt(streams)
    assert float(((sampled.mean(dim=0) - truth) / standard_error).abs().max()) < 4.5


@pytest.mark.parametrize("estimator", ["kernel", "paired"])
def test_the_regressions_converge_to_the_exact_values(estimator):
    game = smooth_game(6)
    truth = estimate("exact", 6, 0, 0, game)
    mean = estimate(estimator, 6, 4000, torch.arange(20), game).mean(dim=0)
    torch.testing.assert_close(mean, truth, rtol=0, atol=0.03 * float(truth.norm()))


@pytest.mark.parametrize("n_samples", [17, 31, 32, 61, 62, 200])
def test_permutation_budget(n_samples):
    """At d = 16: one order from 17 evaluations, a pair from 32, another for every 30 more."""
    expected = 17 if n_samples < 32 else 2 + 30 * ((n_samples - 2) // 30)
    assert make_plan("permutation", 16, n_samples, torch.tensor([0])).size == expected


@pytest.mark.parametrize("estimator", SAMPLING)
def test_the_budget_is_never_exceeded(estimator):
    for d, n_samples in itertools.product((2, 3, 9, 16), (17, 18, 25, 32, 64)):
        if estimator == "enumerated" and n_samples < min(2 * d + 2, 2**d):
            continue
        assert 2 <= make_plan(estimator, d, n_samples, torch.tensor([1, 2])).size <= n_samples
        assert 2 <= make_plan(estimator, d, n_samples, 1).size <= n_samples


@pytest.mark.parametrize(
    ("estimator", "n_samples"),
    [
        ("designed", 2),
        ("enumerated", 33),
        ("gp", 3),
        ("kernel", 2),
        ("leverage", 3),
        ("paired", 3),
        ("permutation", 16),
        ("ramc", 5),
    ],
)
def test_a_budget_too_small_is_refused(estimator, n_samples):
    with pytest.raises(ValueError, match=rf"n_samples >= {n_samples + 1} .*got {n_samples}"):
        make_plan(estimator, 16, n_samples, 0)
    make_plan(estimator, 16, n_samples + 1, 0)


@pytest.mark.parametrize("estimator", SAMPLING)
def test_a_shared_stream_is_the_stream_of_that_seed(estimator):
    """The shared plan merges coalitions drawn twice; phi stays what the unmerged plan gives."""
    game = table_game(4)
    merged = make_plan(estimator, 4, 40, 123)
    assert isinstance(merged, SampledPlan)
    assert len(torch.unique(merged.coalitions, dim=0)) == merged.size <= 16
    torch.testing.assert_close(
        estimate(estimator, 4, 40, 123, game),
        estimate(estimator, 4, 40, torch.tensor([123]), game)[0],
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize("estimator", SAMPLING)
def test_a_stream_does_not_depend_on_its_neighbours(estimator):
    together = make_plan(estimator, 9, 26, torch.tensor([5, 6, 7])).rows(0, 26)
    alone = make_plan(estimator, 9, 26, torch.tensor([6])).rows(0, 26)
    assert torch.equal(together[0][1], alone[0][0])
    assert torch.equal(together[1][1], alone[1][0])


@pytest.mark.parametrize("n_samples", [3, 10, 25, 200])
def test_kernel_is_weighted_least_squares_with_an_intercept(n_samples):
    """Below 18 independent rows phi is not determined: both take the solution of smallest norm."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    d, game = 16, smooth_game(16)
    coalitions, projection = make_plan("kernel", d, n_samples, torch.tensor([4])).rows(0, n_samples)
    values = game(coalitions[0])
    size = coalitions[0].sum(dim=-1)
    weight = torch.where((size == 0) | (size == d), 1e6, 1.0).double()
    assert weight.sum() == 2e6 + n_samples - 2
    regression = linear_model.LinearRegression()
    regression.fit(coalitions[0].double().numpy(), values.numpy(), sample_weight=weight.numpy())
    phi = (projection[0] * values[:, None]).sum(dim=0)
    np.testing.assert_allclose(phi.numpy(), regression.coef_, rtol=0, atol=1e-6)


def test_paired_is_least_squares_with_the_last_coefficient_eliminated():
    """phi_d = Delta - sum of the others, as Covert & Lee (2021) write it, where the samples determine phi."""
    d, game = 9, smooth_game(9)
    coalitions, projection = make_plan("paired", d, 60, torch.tensor([8])).rows(0, 60)
    values = game(coalitions[0])
    empty, full = ends(d, game)
    s = coalitions[0, 2:].double().numpy()
    target = (values[2:] - empty).numpy() - s[:, -1] * float(full - empty)
    others = np.linalg.lstsq(s[:, :-1] - s[:, -1:], target, rcond=None)[0]
    expected = np.append(others, float(full - empty) - others.sum())
    phi = (projection[0] * values[:, None]).sum(dim=0)
    np.testing.assert_allclose(phi.numpy(), expected, rtol=0, atol=1e-10)


def test_paired_with_too_few_pairs_stays_closest_to_equal_shares():
    """Three pairs fix at most three directions of phi; in all others every player keeps the same share."""
    d, game = 16, smooth_game(16)
    coalitions, projection = make_plan("paired", d, 8, torch.tensor([2])).rows(0, 8)
    values = game(coalitions[0])
    empty, full = ends(d, game)
    phi = (projection[0] * values[:, None]).sum(dim=0)
    s = coalitions[0, 2:].double()
    directions = s - s.mean(dim=1, keepdim=True)
    deviation = phi - (full - empty) / d
    fitted = directions.mT @ torch.linalg.lstsq(directions.mT, deviation[:, None], driver="gelsd").solution
    torch.testing.assert_close(fitted[:, 0], deviation, rtol=0, atol=1e-10)
    # The fit goes through the odd part of every pair exactly.
    odd = values[2:5] - values[5:8]
    torch.testing.assert_close((2 * s[:3] - 1) @ phi, odd, rtol=0, atol=1e-10)


def test_leverage_weighs_by_kernel_and_probability():
    """Against weighted least squares with the last coefficient eliminated, and weights by Musco & Witter, Alg. 1."""
    d, n_samples, game = 9, 80, smooth_game(9)
    coalitions, projection = make_plan("leverage", d, n_samples, torch.tensor([8])).rows(0, n_samples)
    values, s = game(coalitions[0]), coalitions[0, 2:].double().numpy()
    empty, full = ends(d, game)
    size = coalitions[0, 2:].sum(dim=-1).tolist()
    # c such that sum over sizes of min(binom(d, k), c) is the number drawn: sizes 1 and 8 (9 each) are used up.
    c = (n_samples - 2 - 2 * 9) / 6
    assert 9 < c < math.comb(9, 2)
    weight = [1.0 / (k * (d - k) * math.comb(d, k) * min(1.0, c / math.comb(d, k))) for k in size]
    root = np.sqrt(weight)[:, None]
    target = (values[2:] - empty).numpy() - s[:, -1] * float(full - empty)
    others = np.linalg.lstsq(root * (s[:, :-1] - s[:, -1:]), root[:, 0] * target, rcond=None)[0]
    phi = (projection[0] * values[:, None]).sum(dim=0)
    np.testing.assert_allclose(
        phi.numpy(), np.append(others, float(full - empty) - others.sum()), rtol=0, atol=1e-10
    )


def test_enumerated_has_the_extreme_sizes_whole():
    coalitions = make_plan("enumerated", 9, 60, torch.tensor([3, 4])).rows(0, 60)[0]
    for stream in coalitions:
        counts = torch.bincount(torch.unique(stream, dim=0).sum(dim=-1), minlength=10)
        assert counts[[0, 1, 8, 9]].tolist() == [1, 9, 9, 1]
        assert torch.bincount(stream.sum(dim=-1), minlength=10)[[1, 8]].tolist() == [9, 9]
    # 2 + 2 * 9 + 2 * 36 evaluations hold the sizes 2 and 7 too, and what is left goes to the sizes between.
    rest = make_plan("enumerated", 9, 100, torch.tensor([3])).rows(0, 100)[0][0].sum(dim=-1)
    assert torch.bincount(rest, minlength=10)[[1, 2, 7, 8]].tolist() == [9, 36, 36, 9]


def test_ramc_adds_monte_carlo_of_what_the_fit_leaves():
    """Fold by fold from the definition: coefficients fitted to the other folds, the own fold for the residual."""
    d, n_samples, game = 5, 42, table_game(5)
    coalitions, projection = make_plan("ramc", d, n_samples, torch.tensor([6])).rows(0, n_samples)
    coalitions, values = coalitions[0], game(coalitions[0])
    empty, full = ends(d, game)
    s, size = coalitions[2:].double(), coalitions[2:].sum(dim=-1)
    fold = torch.arange(20).repeat(2) % 5
    kernel_mass = {
        k: (1.0 / (k * (d - k))) / sum(1.0 / (j * (d - j)) for j in range(1, d)) for k in range(1, d)
    }
    expected = torch.zeros(d, dtype=torch.float64)
    for each in range(5):
        others = fold != each
        centred = s[others] - s[others].mean(dim=1, keepdim=True)
        target = values[2:][others] - empty - size[others] * (full - empty) / d
        beta = (full - empty) / d + torch.linalg.lstsq(centred, target[:, None], driver="gelsd").solution[
            :, 0
        ]
        expected += beta / 5
        for row in torch.nonzero(~others)[:, 0].tolist():
            k = int(size[row])
            residual = values[2 + row] - empty - s[row] @ beta
            inside = 1.0 / (d * math.comb(d - 1, k - 1)) * s[row] - 1.0 / (d * math.comb(d - 1, k)) * (
                1 - s[row]
            )
            expected += inside * residual * math.comb(d, k) / kernel_mass[k] / 40
    torch.testing.assert_close((projection[0] * values[:, None]).sum(dim=0), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_without_neighbours_a_grid_is_its_cells(estimator):
    grid, number = (make_plan(estimator, players, 40, 5).rows(0, 40) for players in ((2, 4), 8))
    same = all(torch.equal(one, other) for one, other in zip(grid, number, strict=True))
    assert same == (estimator not in PRIOR)


@pytest.mark.parametrize(("players", "symmetries"), [((4, 4), 8), ((2, 3), 4)], ids=["4x4", "2x3"])
def test_designed_turns_and_mirrors_one_set_of_coalitions(players, symmetries):
    rows, cols = players
    coalitions, projection = make_plan("designed", players, 24, torch.arange(200)).rows(0, 24)
    found = {tuple(map(tuple, each.long().tolist())) for each in coalitions}
    assert len(found) == symmetries
    square = coalitions[0].view(-1, rows, cols)
    turned = [square, square.flip(1), square.flip(2), square.flip(1, 2)]
    turned += [each.mT for each in turned] if rows == cols else []
    assert found == {tuple(map(tuple, each.flatten(1).long().tolist())) for each in turned}
    # A game turned like its coalitions has values turned alike.
    values = table_game(rows * cols)(coalitions[0])
    phi = {tuple(((p * values[:, None]).sum(dim=0)).sort().values.tolist()) for p in projection}
    assert max(phi) == pytest.approx(min(phi))
