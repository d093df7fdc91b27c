"""UDD: its windows, their response, the policies, what a step takes, and runs that are cut into pieces."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn

from ddfast.errors import UsageError
from ddfast.methods import get_method, list_methods
from ddfast.methods.matching.idc import IDC
from ddfast.methods.matching.udd import UDD, corner_windows, lowest_of, region_means, votes
from ddfast.methods.synthesis import State
from ddfast.seeding import generator
from tests.methods.matching.conftest import TensorPool, context_of, distilled

TINY = {"iterations": 2, "inner_loop": 2, "net_samples": 8, "net_batch": 4, "real_batch": 4}


class Pool(TensorPool):
    """Also gives images of all classes."""

    def batches(self, order, batch_size):
        for places in order.split(batch_size):
            yield places, self.images[places], self.labels[places]

    def say(self, message):
        """Nothing."""


@pytest.fixture
def pool():
    return Pool((6, 5, 7), 8)


def udd(ipc=2, **options):
    return UDD.from_options({**TINY, **options}).resolved(1, ipc)


class Answer(nn.Module):
    """A network whose one layer answers with the green of an image, and a head that sums the corners of its map."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False), nn.ReLU())
        self.head = nn.Linear(16, 2, bias=False)
        with torch.no_grad():
            self.block[0].weight.copy_(torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1))
            self.head.weight.copy_(torch.stack([torch.zeros(16), torch.arange(16.0) / 800]))

    def forward(self, images):
        return self.head(self.block(images).flatten(1))


def test_it_is_a_method_of_idcs_kind():
    assert "udd" in list_methods()
    assert get_method("udd") is UDD
    assert issubclass(UDD, IDC)
    options = UDD.from_options({}).options
    assert (options.policy, options.cfc, options.jitters, options.init) == ("jitter", 1.0, 2, "real")
    assert (options.iterations, options.inner_loop, options.lr_img, options.momentum) == (
        2000,
        100,
        0.005,
        0.5,
    )


# Windows -----------------------------------------------------------------------------------------------------


def test_the_windows_of_32_px_are_four_corners_of_11_16_and_21():
    expected = []
    for size in (11, 16, 21):
        far = 32 - size
        expected += [
            [0, 0, size, size],
            [far, 0, 32, size],
            [0, far, size, 32],
            [far, far, 32, 32],
        ]
    assert corner_windows(32, "1/3,1/2,2/3").tolist() == expected
    assert corner_windows(28, "1/3,1/2,2/3")[::4, 2].tolist() == [9, 14, 19]
    assert corner_windows(8, "1/2").tolist() == [[0, 0, 4, 4], [4, 0, 8, 4], [0, 4, 4, 8], [4, 4, 8, 8]]
    assert corner_windows(4, "1/100").tolist() == [[0, 0, 1, 1], [3, 0, 4, 1], [0, 3, 1, 4], [3, 3, 4, 4]]


@pytest.mark.parametrize(
    ("sizes", "lowest"), [("1/3", 3), ("2/3, 1/2", 5), ("1/3,1/2,2/3", 8), ([0.25, 0.75], 5), ("0.5", 3)]
)
def test_two_thirds_of_the_candidates_join(sizes, lowest):
    method = udd(sizes=sizes)
    assert method.options.lowest == lowest
    assert UDD.from_options({"sizes": sizes, "lowest": 2}).resolved(1, 1).options.lowest == 2


def test_sizes_are_said_in_one_way():
    found = {
        UDD.from_options({"sizes": sizes}).options.sizes
        for sizes in ("2/3,1/3", [1 / 3, 2 / 3], " 1/3 , 4/6")
    }
    assert found == {"1/3,2/3"}


@pytest.mark.parametrize("sizes", ["", "0", "1", "1/2,0.5", "a", "1/0", 3, "-1/3"])
def test_sizes_that_are_none(sizes):
    with pytest.raises(UsageError, match=r"sizes must be different shares of a side .* got "):
        UDD.from_options({"sizes": sizes})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lowest": 13}, r"lowest must lie in 1\.\.12"),
        ({"lowest": 0}, "lowest"),
        ({"sizes": "1/2", "lowest": 5}, r"lowest must lie in 1\.\.4, the corners of sizes 1/2, got 5"),
        ({"policy": "luck"}, "policy"),
        ({"jitter": "poisson"}, "jitter"),
        ({"jitter_size": 0}, "jitter_size"),
        ({"jitter": "salt_pepper", "jitter_size": 1.5}, "share of the pixels, got 1.5"),
        ({"jitters": 0}, "jitters"),
        ({"policy": "gradient", "jitter": "uniform"}, "jitter is of no use with policy='gradient'"),
        ({"policy": "activation", "jitters": 3}, "jitters is of no use with policy='activation'"),
        ({"cfc": -1}, "cfc"),
        ({"chooser_steps": 0}, "chooser_steps"),
    ],
)
def test_bad_options_are_refused_in_a_line(options, said):
    with pytest.raises(UsageError, match=said) as error:
        UDD.from_options(options)
    assert "\n" not in str(error.value)


def test_no_tiles():
    with pytest.raises(UsageError, match="factor of udd is 1, got 2"):
        udd().tiles_per_side("2", 32)
    assert udd().tiles_per_side("auto", 32) == 1


# Response ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [1, 2, 4, 7, 16, 32])
def test_a_regions_response_is_the_mean_of_the_enlarged_map_in_it(places):
    maps = torch.rand(3, places, places, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    windows = corner_windows(16, "1/3,1/2,2/3")
    large = F.interpolate(maps[:, None], size=(16, 16), mode="bilinear", align_corners=False)[:, 0]
    expected = torch.stack([large[:, y0:y1, x0:x1].mean((1, 2)) for x0, y0, x1, y1 in windows.tolist()], 1)
    torch.testing.assert_close(region_means(maps, windows, 16), expected, rtol=1e-12, atol=0)
    assert region_means(maps.float(), windows, 16).dtype == torch.float32


def test_a_response_by_hand():
    maps = torch.tensor([[[1.0, 3.0], [5.0, 9.0]]])
    # A place of the map covers 2 x 2 pixels of 4 x 4; enlarged, its corner pixel keeps its value, and the pixel next to
    # it is 3/4 of it and 1/4 of its neighbour along each side.
    found = region_means(maps, corner_windows(4, "1/4,1/2"), 4)[0]
    assert found[:4].tolist() == pytest.approx([1, 3, 5, 9])
    first = [1, 0.75 * 1 + 0.25 * 3, 0.75 * 1 + 0.25 * 5]
    corner = 0.75 * (0.75 * 1 + 0.25 * 3) + 0.25 * (0.75 * 5 + 0.25 * 9)
    assert float(found[4]) == pytest.approx((sum(first) + corner) / 4)


def test_the_lowest_are_chosen_and_of_equals_the_first():
    response = torch.tensor([[3.0, 1.0, 2.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert lowest_of(response, 3).tolist() == [[1, 3, 4], [0, 1, 2]]
    assert lowest_of(response, 5).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_votes_by_hand():
    # Of four regions the two lowest of each: {0, 1}, {1, 2}, {1, 3}. 1 has three votes, the others one each; by the sum
    # of their ranks 0 (0 + 3 + 2 = 5), 2 (2 + 0 + 3 = 5) and 3 (3 + 2 + 0 = 5) are equal, so 0 is the first.
    one, two, three = ([0.0, 1, 2, 3], [3.0, 1, 0, 2], [2.0, 1, 3, 0])
    found = votes([torch.tensor([each]) for each in (one, two, three)], 2)
    assert lowest_of(found, 2).tolist() == [[0, 1]]
    # A vote outweighs ranks: 3 has two votes and ranks 1 + 1 + 3, 0 has one and ranks 0 + 2 + 2.
    one, two, three = ([0.0, 2, 3, 1], [2.0, 0, 3, 1], [2.0, 0, 1, 3])
    found = votes([torch.tensor([each]) for each in (one, two, three)], 2)[0]
    assert found.tolist() == [4 - 12, 2 - 24, 7 - 12, 5 - 24]


# Policies ----------------------------------------------------------------------------------------------------

CORNERS = torch.tensor([[4.0, 1.0], [2.0, 3.0]])  # of the green channel, each over a quarter of 4 x 4


def green(values, size=4):
    image = torch.zeros(1, 3, size, size)
    image[:, 1] = values.repeat_interleave(size // 2, 0).repeat_interleave(size // 2, 1)
    return image


def searched(image, network=None, **options):
    method = udd(1, **{"sizes": "1/4", "lowest": 2, **options})
    return method.searched(network or Answer(), image, 3, [1] * len(image), context_of(2, ipc=1))


def test_activation_takes_the_corners_that_answer_least():
    assert searched(green(CORNERS), policy="activation").tolist() == [[1, 2]]
    assert searched(green(-CORNERS), policy="activation").tolist() == [
        [0, 1]
    ]  # no answer anywhere: the first ones


def test_gradient_takes_the_corners_whose_answer_matters_least():
    # The head weighs place p of the map by p / 800 for the label's class: the first places count least.
    assert searched(green(CORNERS), policy="gradient").tolist() == [[0, 1]]
    # Where nothing answers the gradient is 0, whatever the head's weight.
    assert searched(
        green(CORNERS * torch.tensor([[1, 1], [1, -1]])), policy="gradient", lowest=2
    ).tolist() == [[0, 3]]


def test_the_gradient_is_that_of_the_cross_entropy_before_the_relu():
    from ddfast.models.maps import activation_maps, map_gradients

    network, image = Answer().double(), green(CORNERS).double()
    image[0, 1, 0, 0] = -1
    before = F.conv2d(image, network.block[0].weight).detach().requires_grad_()
    loss = F.cross_entropy(network.head(before.relu().flatten(1)), torch.tensor([1]))
    (expected,) = torch.autograd.grad(loss, before)
    found = map_gradients(network, image, torch.tensor([1]))
    torch.testing.assert_close(found, expected.abs()[:, 0])
    torch.testing.assert_close(activation_maps(network, image), before.detach().relu()[:, 0])


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "salt_pepper"])
def test_jitter_takes_the_corners_whose_mean_answer_noise_changes_least(kind):
    """Eqs. 2 to 4 with the noise that the draws give, one pass a copy."""
    images = torch.cat([green(CORNERS), green(CORNERS.flip(0)), green(CORNERS.T)])
    method = udd(1, sizes="1/4,1/2", lowest=3, jitter=kind, jitter_size=0.3)
    context, windows = context_of(3, ipc=1), corner_windows(4, "1/4,1/2")
    found = method.searched(Answer(), images, 3, [0, 1, 2], context)
    for label in range(3):
        draws = generator(context.seed, "jitter", label, 3)
        if kind == "salt_pepper":
            u = torch.rand(2, 1, 1, 4, 4, generator=draws)[:, 0, 0]
            dark, light = -context.mean[1] / context.std[1], (1 - context.mean[1]) / context.std[1]
            noisy = torch.where(u < 0.15, dark, torch.where(u > 0.85, light, images[label, 1]))
        elif kind == "uniform":
            u = torch.rand(2, 1, 3, 4, 4, generator=draws)[:, 0, 1]
            noisy = images[label, 1] + 0.3 * (2 * u - 1) * 3**0.5
        else:
            noisy = images[label, 1] + 0.3 * torch.randn(2, 1, 3, 4, 4, generator=draws)[:, 0, 1]
        own, copies = images[label, 1].relu(), noisy.relu()
        sigma = [
            abs(float(own[y0:y1, x0:x1].mean() - copies[:, y0:y1, x0:x1].mean()))
            for x0, y0, x1, y1 in windows.tolist()
        ]
        assert found[label].tolist() == sorted(sorted(range(8), key=lambda n: sigma[n])[:3])


def test_a_step_draws_its_own_noise_and_the_uniform_has_the_size_as_deviation():
    images = torch.zeros(2, 3, 32, 32)
    context = context_of(2, ipc=1)

    def jittered(kind, step):
        method = udd(1, jitter=kind)
        noise = method._noise(images, step, [0, 1], context)
        return torch.stack(method._jittered(images, noise, context))

    copies = {(kind, step): jittered(kind, step) for kind in ("gaussian", "uniform") for step in (0, 1)}
    for noise in copies.values():
        assert noise.shape == (2, 2, 3, 32, 32)
        assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
        assert len({float(each.sum()) for each in noise.flatten(0, 1)}) == 4
    assert float(copies["uniform", 0].abs().max()) <= 0.1 * 3**0.5
    assert not torch.equal(copies["gaussian", 0], copies["gaussian", 1])
    salted = jittered("salt_pepper", 0)
    assert float((salted[:, :, 0] != 0).float().mean()) == pytest.approx(0.1, abs=0.03)
    assert len(salted[:, :, 1].unique()) == 3


def test_vote_is_the_votes_of_the_three():
    images = torch.cat([green(CORNERS), green(CORNERS.flip(0))])
    context = context_of(2, ipc=1)
    options = {"sizes": "1/4,1/2", "lowest": 3}

    def method(policy):
        return udd(1, policy=policy, **options).searched(Answer(), images, 3, [0, 1], context)

    counts = torch.zeros(2, 8)
    for policy in ("activation", "gradient", "jitter"):
        counts.scatter_add_(1, method(policy), torch.ones(2, 3))
    chosen = counts.gather(1, method("vote"))
    assert torch.equal(chosen.sum(1), counts.topk(3, dim=1).values.sum(1))


# What a step takes -------------------------------------------------------------------------------------------


def test_a_step_takes_the_images_and_their_regions_enlarged_and_gradients_reach_the_pixels():
    method, context = udd(1, policy="activation", sizes="1/2", lowest=2), context_of(2, ipc=1)
    images = torch.cat([green(CORNERS), green(CORNERS.flip(1))])
    images += torch.rand(images.shape, generator=torch.Generator().manual_seed(2)) / 10
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (context.mean, context.std))
    known = method.found(0, Answer(), images * std + mean, [0, 1], context)
    images = images.unflatten(0, (2, 1)).requires_grad_()
    found = method.formed(images, known)
    assert found.shape == (2, 3, 3, 4, 4)
    assert torch.equal(found[:, 0], images[:, 0])
    quarters = {0: (0, 0), 1: (0, 2), 2: (2, 0), 3: (2, 2)}
    for label, chosen in enumerate(((1, 2), (0, 3))):
        for place, number in enumerate(chosen):
            y, x = quarters[number]
            crop = images[label, :, :, y : y + 2, x : x + 2]
            large = F.interpolate(crop, size=(4, 4), mode="bilinear", align_corners=False)[0]
            torch.testing.assert_close(found[label, 1 + place], large)
    found[0, 1:].sum().backward()
    touched = images.grad[0, 0].sum(0) != 0
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:2, 2:] = expected[2:, :2] = True
    assert torch.equal(touched, expected)
    assert not images.grad[1].any()


def test_more_than_128_are_drawn_from_with_all_images_among_them():
    method, context = udd(50), context_of(1, ipc=50)
    assert method.count_formed(50) == 450
    for step in (0, 1):
        kept = method._chosen(450, 0, step, context)
        assert len(kept) == len(kept.unique()) == 128
        assert set(range(50)) <= set(kept.tolist())
        assert int(kept.max()) < 450
    assert not torch.equal(kept, method._chosen(450, 0, 0, context))


def test_the_rate_is_idcs_and_is_halved_at_1200_1600_and_1800_of_2000():
    method, context = UDD.from_options({}), context_of(3, ipc=10, size=32)
    rates = [
        method.rate(100 * iteration, context) for iteration in (0, 1199, 1200, 1599, 1600, 1799, 1800, 1999)
    ]
    assert rates == [0.005, 0.005, 0.0025, 0.0025, 0.00125, 0.00125, 0.000625, 0.000625]
    assert method.rate(119_999, context) == 0.005
    assert method.rate(0, context_of(3, ipc=1, size=32)) == pytest.approx(0.0005)
    short = UDD.from_options({"iterations": 10, "inner_loop": 3})
    assert [short.rate(3 * n, context) for n in range(10)] == [0.005] * 6 + [0.0025] * 2 + [0.00125, 0.000625]


def test_the_choice_follows_the_steps_network(pool):
    context, method = context_of(3, ipc=1, size=8), udd(policy="activation")
    seen = []
    inner = method.searched
    method.searched = lambda *a: seen.append(inner(*a)) or seen[-1]
    distilled(method, pool, context)
    assert len(seen) == 4
    assert len({str(each.tolist()) for each in seen}) > 1


# Runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["jitter", "vote"])
def test_a_run_goes_on_from_its_tensors_to_the_same_bits(pool, policy):
    context = context_of(3, ipc=1, size=8)
    whole = distilled(udd(policy=policy), pool, context)
    half = distilled(udd(policy=policy), pool, context, steps=1)
    for _ in range(2):  # after a step of each kind: in a round, and at its end
        tensors = load(save({name: tensor.contiguous() for name, tensor in half.tensors.items()}))
        again = State(half.group, tensors, half.step, copy.deepcopy(half.curve))
        half = distilled(udd(policy=policy), pool, context, state=again, steps=1)
    state = distilled(udd(policy=policy), pool, context, state=half)
    assert set(state.tensors) == set(whole.tensors)
    for name, tensor in whole.tensors.items():
        assert torch.equal(state.tensors[name], tensor), name
    assert state.curve == whole.curve
    assert torch.isfinite(whole.pixels).all()


def test_classes_in_pieces_give_what_all_at_once_give(pool):
    context = context_of(3, ipc=1, size=8)
    together, apart = (distilled(udd(class_batch=n), pool, context, steps=2) for n in (3, 2))
    torch.testing.assert_close(apart.pixels, together.pixels, rtol=0, atol=1e-6)
    torch.testing.assert_close(apart.tensors["cfc.means"], together.tensors["cfc.means"])
    assert apart.curve[1]["cfc"] == pytest.approx(together.curve[1]["cfc"], rel=1e-5)


def test_cmi_acts_on_images_and_regions_even_of_one_image_a_class(pool, proxies, monkeypatch):
    context = context_of(3, ipc=1, size=16)
    big = Pool((6, 5, 7), 16)
    method = udd(1, cmi=10.0, proxies="p")
    method.check_ipc(1)
    state = distilled(method, big, context, steps=1)
    row = state.curve[0]
    assert row["cmi"] > 0
    assert row["cmi_gradient_norm"] > 0
    base = distilled(udd(1, proxies="p"), big, context, steps=1)
    assert base.curve[0]["loss"] == row["loss"]
    assert not torch.equal(base.pixels, state.pixels)


def test_the_regions_that_students_see_are_chosen_once_by_a_network_of_real_images(pool):
    context, method = context_of(3, size=8), udd(chooser_steps=2)
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(1)
    first, said = method.regions(images, lambda: pool, context)
    torch.manual_seed(2)
    again, _ = method.regions(images, lambda: pool, context)
    assert torch.equal(first.chosen, again.chosen)
    assert first.chosen.shape == (6, 8)
    assert torch.equal(first.windows, corner_windows(8, "1/3,1/2,2/3"))
    assert all(row == sorted(set(row)) for row in first.chosen.tolist())
    assert "convnet3_in after 2 steps on real images; it read " in said
    assert said.endswith("policy jitter")


def test_given_proxies_choose_them(proxies):
    context, method = context_of(3), udd(proxies="p", policy="activation")
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    found, said = method.regions(images, lambda: pytest.fail("no real image is needed"), context)
    assert said == "the first of the proxies; policy activation"
    from ddfast.models.maps import activation_maps

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (context.mean, context.std))
    response = region_means(activation_maps(proxies[0], (images - mean) / std), found.windows, 16)
    assert torch.equal(found.chosen, lowest_of(response, 8))
