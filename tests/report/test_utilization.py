"""mUE: its three readings by hand, and which way each goes."""

import math

import pytest
import torch

from ddfast.models import create_model
from ddfast.models.maps import activation_maps, map_gradients
from ddfast.report.regions import COLOURS, regions_picture
from ddfast.report.utilization import INTERVALS, utilization_of


def test_by_hand():
    # The largest activation of the set is 10. In 5 intervals of 2 the first map has its places in 0, 0, 4, 4 and the
    # second in 0, 0, 0, 1: shares 1/2 1/2 and 3/4 1/4.
    maps = torch.tensor([[[0.0, 1.0], [9.0, 10.0]], [[0.0, 0.5], [0.9, 2.5]]])
    found = utilization_of(maps)
    half, quarter = math.log(2), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert found.by_intervals[5] == pytest.approx((half + quarter) / 2 / math.log(5))
    # In 10 intervals of 1 the first has 0, 1, 9, 9 and the second 0, 0, 0, 2.
    three = -0.5 * math.log(0.5) - 2 * 0.25 * math.log(0.25)
    assert found.by_intervals[10] == pytest.approx((three + quarter) / 2 / math.log(10))
    assert tuple(found.by_intervals) == INTERVALS == (5, 6, 7, 8, 9, 10)
    assert found.mue == pytest.approx(sum(found.by_intervals.values()) / 6)
    assert found.printed == pytest.approx(1 - found.mue / 4)
    assert found.images == 2


def test_the_variant_from_min_to_max_has_intervals_of_each_maps_own():
    maps = torch.tensor([[[4.0, 4.1], [4.9, 5.0]], [[0.0, 10.0], [90.0, 100.0]]])
    found = utilization_of(maps[:1])
    two = {d: math.log(2) for d in INTERVALS if d < 10} | {
        10: -0.5 * math.log(0.5) - 2 * 0.25 * math.log(0.25)
    }
    # In float32 0.1 of the way is a little below or above the tenth, so both places of the interval are allowed.
    least, most = (sum(v / math.log(d) for d, v in one.items()) / 6 for one in (two | {10: math.log(2)}, two))
    assert least - 1e-6 <= found.min_max <= most + 1e-2
    assert found.min_max == pytest.approx(utilization_of(100 * (maps[:1] - 4)).min_max, abs=0.02)
    assert utilization_of(maps).mue != pytest.approx(utilization_of(maps).min_max, abs=0.01)


def test_wider_activations_are_more_used_and_the_printed_form_falls():
    draws = torch.Generator().manual_seed(1)
    noise = torch.randn(50, 32, 32, generator=draws)
    peak = torch.zeros(1, 32, 32)
    peak[0, 0, 0] = 1
    found = [
        utilization_of(torch.cat([(0.5 + std * noise).clamp(0, 1), peak]))
        for std in (0.02, 0.05, 0.1, 0.2, 0.3)
    ]
    assert [one.mue for one in found] == sorted(one.mue for one in found)
    assert [one.printed for one in found] == sorted((one.printed for one in found), reverse=True)
    assert found[0].mue < 0.3
    assert found[-1].mue > 0.85
    assert all(one.printed > 0.999 for one in found)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_map_that_is_the_same_everywhere_is_not_used(value):
    found = utilization_of(torch.full((2, 4, 4), value))
    assert (found.mue, found.min_max, found.printed) == (0, 0, 1)


@pytest.mark.parametrize(
    ("arch", "size", "side"),
    [
        ("convnet3_in", 32, 8),
        ("convnet3", 16, 4),
        ("convnet4_in", 32, 4),
        ("resnet18_in", 32, 4),
        ("resnet18", 64, 2),
        ("resnetap10", 64, 8),
        ("vgg11_in", 32, 2),
        ("alexnet_in", 32, 8),
        ("mobilenet_v2", 64, 2),
    ],
)
def test_the_map_is_that_of_the_last_block_before_its_pooling(arch, size, side):
    torch.manual_seed(1)
    model = create_model(arch, 3, size).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert activation_maps(model.eval(), images).shape == (2, side, side)
        assert model.train().training
    found = map_gradients(model.eval(), images, torch.tensor([0, 2]))
    assert found.shape == (2, side, side)
    assert float(found.max()) > float(found.min()) >= 0  # behind a global pooling as well
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_map_of_a_fused_network_is_that_of_the_plain_one():
    from ddfast.models.fusing import fuse

    model = create_model("convnet3_in", 3, 16, width=8)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(activation_maps(fuse(model), images), activation_maps(model, images))
    with torch.no_grad():
        maps = images
        for layer in list(model.blocks)[:-1]:
            maps = layer(maps)
    torch.testing.assert_close(activation_maps(model, images), maps.mean(1))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_maps_is_refused():
    with pytest.raises(ValueError, match="no layer that hands on maps"):
        activation_maps(
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)), torch.zeros(1, 3, 2, 2)
        )


def test_regions_are_outlined_inside_of_the_picture():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    picture = regions_picture(image, torch.tensor([[0, 0, 3, 3], [4, 4, 8, 8]]), side=64)
    assert picture.size == (64, 64)
    assert picture.getpixel((0, 10)) == COLOURS[0]
    assert picture.getpixel((10, 10)) == (0, 0, 0)
    assert picture.getpixel((48, 48)) == (0, 0, 0)
    assert picture.getpixel((40, 3)) == (0, 0, 0)
    assert regions_picture(image, torch.zeros(0, 4), side=64).getextrema() == ((0, 0),) * 3
