"""Options of DM, presets, groups, beginnings, and one clear line for each bad input."""

import pytest
import torch

from ddfast.errors import UsageError
from ddfast.methods import get_method, list_methods
from ddfast.methods.matching.dm import DM
from ddfast.methods.matching.initial import mosaics
from ddfast.methods.matching.options import MatchingOptions
from ddfast.seeding import generator
from ddfast.wording import flags_of_command
from tests.methods.matching.conftest import TensorPool, context_of

NAMES = ("cat", "dog", "owl")


def dm(**options):
    return DM(MatchingOptions(**options))


def test_dm_is_registered_with_the_papers_defaults():
    assert "dm" in list_methods()
    method = get_method("dm").from_options({})
    options = method.options
    assert (options.arch, options.iterations, options.real_batch) == ("convnet3_in", 20000, 256)
    assert (options.lr_img, options.momentum, options.cmi, options.init) == (1.0, 0.5, 0.0, "real")
    assert method.stages == ("synthesize",)
    assert not method.needs_teacher
    assert method.space == "normalized"
    assert method.steps == 20000
    decisive = set(MatchingOptions.__dataclass_fields__) - {"proxies"}  # a path: what is in its files counts
    assert set(method.options_of_stage("synthesize")) == decisive


@pytest.mark.parametrize(
    ("preset", "weight"),
    [
        ("cifar10_ipc10_cmi", 8000.0),
        ("cifar10_ipc50_cmi", 2000.0),
        ("cifar100_ipc10_cmi", 2000.0),
        ("cifar100_ipc50_cmi", 500.0),
        ("svhn_ipc10_cmi", 18000.0),
        ("svhn_ipc50_cmi", 500.0),
    ],
)
def test_presets_with_cmi_have_the_authors_lambda_and_need_proxies(preset, weight):
    assert DM.from_options({"proxies": "p"}, preset).options.cmi == weight
    with pytest.raises(UsageError, match=f"cmi {weight:g} needs proxies"):
        DM.from_options({}, preset)


def test_every_preset_makes_a_method():
    for name, values in DM.presets.items():
        method = DM.from_options({"proxies": "p"} if name.endswith("_cmi") else {}, name)
        assert all(getattr(method.options, option) == value for option, value in values.items())
        assert method.options.flip == (not name.startswith("svhn"))
    assert DM.from_options({}, "cifar10_ipc100").options.lr_img == 10.0


def test_groups_are_consecutive_classes():
    groups = dm(class_batch=4).groups(10, 1)
    assert [group.classes for group in groups] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert [group.number for group in groups] == [0, 1, 2]
    assert [group.classes for group in dm(class_batch=20).groups(3, 1)] == [(0, 1, 2)]


def test_beginning_with_real_images(pool):
    context = context_of(3)
    state = dm().begin(dm(class_batch=2).groups(3, 2)[1], pool, context)
    drawn = pool.draw(2, 2, generator(context.seed, "init", 2)).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (context.mean, context.std))
    assert torch.allclose(state.pixels.double(), (drawn - mean) / std, atol=1e-6)
    assert state.pixels.dtype == torch.float32
    assert not state.tensors["momentum"].any()


def test_beginning_with_noise_needs_no_image():
    context = context_of(3, ipc=40)
    state = dm(init="noise").begin(dm().groups(3, 40)[0], TensorPool((0, 0, 0), 16), context)
    assert state.pixels.shape == (120, 3, 16, 16)
    assert float(state.pixels.mean()) == pytest.approx(0, abs=0.02)
    assert float(state.pixels.std()) == pytest.approx(1, abs=0.02)
    assert not torch.equal(state.pixels[:40], state.pixels[40:80])


def test_beginning_with_a_mix_has_four_different_images_in_each(pool):
    context = context_of(3)
    state = dm(init="mix").begin(dm().groups(3, 2)[0], pool, context)
    drawn = pool.draw(1, 8, generator(context.seed, "init", 1)).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (context.mean, context.std))
    drawn = (drawn - mean) / std
    for image in range(2):
        for tile, (top, left) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
            found = state.pixels[2 + image, :, top : top + 8, left : left + 8]
            assert torch.allclose(found, drawn[tile * 2 + image][:, ::2, ::2], atol=1e-6)


def test_a_mosaic_of_an_odd_side_gives_the_first_tiles_the_rest():
    images = torch.arange(9).view(9, 1, 1, 1).expand(9, 3, 5, 5).byte()
    (mosaic,) = mosaics(images, 3)
    assert mosaic.shape == (3, 5, 5)
    assert mosaic[0].tolist() == [
        [0, 0, 1, 1, 2],
        [0, 0, 1, 1, 2],
        [3, 3, 4, 4, 5],
        [3, 3, 4, 4, 5],
        [6, 6, 7, 7, 8],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"iterations": 1.5}, "iterations must be a whole number, got 1.5"),
        ({"real_batch": 0}, "real_batch must be at least 1, got 0"),
        ({"class_batch": 0}, "class_batch must be at least 1, got 0"),
        ({"cmi_every": 0, "cmi": 1, "proxies": "p"}, "cmi_every must be at least 1, got 0"),
        ({"lr_img": 0}, "lr_img must be positive, got 0"),
        ({"lr_img": float("nan")}, "lr_img must be"),
        ({"lr_img": "fast"}, "lr_img must be a"),
        ({"momentum": 1}, "momentum must be below 1, got 1"),
        ({"momentum": -0.1}, "momentum must be at least 0, got -0.1"),
        ({"cmi": -1, "proxies": "p"}, "cmi must be at least 0, got -1"),
        ({"cmi": float("inf"), "proxies": "p"}, "cmi must be"),
        ({"cmi": 8000}, "cmi 8000 needs proxies, a folder of networks trained on the real images"),
        ({"proxy_arch": "resnet18_in"}, "proxy_arch is of no use without proxies"),
        ({"cmi_every": 5}, "cmi_every is of no use without cmi"),
        ({"proxies": 3, "cmi": 1}, "proxies must be a path, got 3"),
        ({"init": "grey"}, "init must be one of real, noise, mix, got 'grey'"),
        ({"itertions": 3}, "method dm has no option 'itertions'"),
    ],
)
def test_bad_options_get_one_line(options, message):
    with pytest.raises(UsageError) as error:
        DM.from_options(options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_options_from_python_get_the_same_lines():
    with pytest.raises(UsageError, match="iterations must be at least 1, got 0"):
        MatchingOptions(iterations=0)
    with pytest.raises(UsageError, match="cmi must be a number, got True"):
        MatchingOptions(cmi=True)


def test_messages_name_flags_on_the_command_line():
    with (
        flags_of_command({"cmi": "--cmi", "proxies": "--proxies"}),
        pytest.raises(UsageError, match=r"^--cmi 5 needs --proxies"),
    ):
        MatchingOptions(cmi=5)


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({"arch": "convnet33"}, None, "unknown model 'convnet33'"),
        ({"arch": "convnet3_in"}, 33, "image_size must be a multiple of 8, got 33"),
        ({"proxy_arch": "resnet", "cmi": 1.0, "proxies": "p"}, None, "proxy_arch: unknown model 'resnet'"),
    ],
)
def test_bad_architectures(options, size, message):
    with pytest.raises(UsageError) as error:
        dm(**options).check(size)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "counts", "ipc", "message"),
    [
        (
            {"real_batch": 9},
            (9, 5, 7),
            2,
            "a step draws 9 different images of a class, but dog has 5, owl has 7: lower real_batch to 5",
        ),
        ({"real_batch": 1}, (9, 0, 7), 1, "but dog has 0: give every class images"),
        (
            {"real_batch": 2},
            (9, 5, 7),
            6,
            "init='real' begins with 6 different images of a class, but dog has 5: lower ipc to 5, or take init=",
        ),
        ({"real_batch": 2, "init": "mix"}, (9, 9, 11), 3, "begins with 12 different images of a class"),
        ({"real_batch": 2, "init": "mix"}, (9, 9, 11), 3, "lower ipc to 2"),
        ({"real_batch": 2, "init": "mix"}, (9, 3, 11), 1, "but dog has 3: take init='noise'"),
    ],
)
def test_pools_that_do_not_do(options, counts, ipc, message):
    with pytest.raises(UsageError) as error:
        dm(**options).check_pool(torch.tensor(counts), NAMES, ipc)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_cmi_is_refused_where_it_would_do_nothing():
    method = dm(real_batch=2, cmi=3.0, proxies="p")
    with pytest.raises(UsageError, match="CMI is 0 where a class has a single image"):
        method.check_ipc(1)
    method.check_ipc(2)
    dm(real_batch=2, proxies="p").check_ipc(1)  # measured, it does not act


def test_pools_that_do():
    dm(real_batch=5).check_pool(torch.tensor([9, 5, 7]), NAMES, 5)
    dm(real_batch=5, init="noise").check_pool(torch.tensor([9, 5, 7]), NAMES, 100)
    dm(real_batch=5, cmi=1.0, proxies="p").check_pool(torch.tensor([9, 5, 7]), NAMES, 2)
    dm(real_batch=5, init="mix").check_pool(torch.tensor([9, 8, 8]), NAMES, 2)
