"""The matching methods' networks against the sizes that their papers and code give."""

import math

import pytest
import torch
from torch import nn

from ddfast.models import create_model, features


@pytest.mark.parametrize(
    ("name", "image_size", "length"),
    [
        ("alexnet_in", 32, 3072),
        ("vgg11_in", 32, 512),
        ("resnet18_in", 32, 512),
        ("resnet18_in", 64, 2048),
        ("resnetap10", 32, 256),
        ("resnetap10", 64, 512),
        ("resnetap10", 128, 512),
        ("resnetap10", 224, 512),
    ],
)
def test_feature_lengths(name, image_size, length):
    model = create_model(name, 10, image_size).eval()
    assert features(model, torch.zeros(1, 3, image_size, image_size)).shape == (1, length)


def test_parameter_counts():
    # Weights and biases of the convolutions, two of each norm's channels, the linear layer.
    vgg = [(3, 64), (64, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 512), (512, 512)]
    expected = sum(9 * i * o + o + 2 * o for i, o in vgg) + 512 * 10 + 10
    assert sum(p.numel() for p in create_model("vgg11_in", 10, 32).parameters()) == expected
    alexnet = [(3, 128, 25), (128, 192, 25), (192, 256, 9), (256, 192, 9), (192, 192, 9)]
    expected = sum(i * o * taps + o for i, o, taps in alexnet) + 3072 * 10 + 10
    assert sum(p.numel() for p in create_model("alexnet_in", 10, 32).parameters()) == expected


def test_resnet18_in_has_the_convolutions_of_resnet18():
    ours = [m.weight.shape for m in create_model("resnet18_in", 10, 32).modules() if isinstance(m, nn.Conv2d)]
    torchvisions = [
        m.weight.shape for m in create_model("resnet18_small", 10, 32).modules() if isinstance(m, nn.Conv2d)
    ]
    assert sorted(ours) == sorted(torchvisions)


def test_resnetap10_never_strides_a_convolution_and_starts_he_normal():
    torch.manual_seed(0)
    model = create_model("resnetap10", 10, 64)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {m.stride for m in convolutions} == {(1, 1)}
    widest = max(convolutions, key=lambda m: m.weight.numel())
    assert float(widest.weight.detach().std()) == pytest.approx(
        math.sqrt(2 / (9 * widest.out_channels)), rel=0.01
    )
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize(("name", "image_size"), [("alexnet_in", 36), ("vgg11_in", 48), ("resnet18_in", 40)])
def test_sides_that_do_not_halve_are_refused(name, image_size):
    with pytest.raises(ValueError, match="multiple of"):
        create_model(name, 10, image_size)


@pytest.mark.parametrize("name", ["alexnet_in", "vgg11_in", "resnet18_in", "resnetap10"])
def test_image_size_is_needed(name):
    with pytest.raises(ValueError, match="image_size"):
        create_model(name, 10)
