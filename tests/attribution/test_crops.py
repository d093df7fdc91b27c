import copy

import pytest
import torch
from torch import nn

from ddfast.attribution import CropRule, shapley, shapley_crops
from ddfast.ops import noisy_crop_boxes

RULES = [
    CropRule(seed=5, crop_size=8),
    CropRule(seed=-1, crop_size=[8, 12, 16], pool=[2, 3, 4], crops=3, coverage=0.6),
]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128, 5)
    ).eval()


def batch(count):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % 5, torch.arange(count) * 2**40 - 7


def settings(**changed):
    common = {
        "grid": 4,
        "n_samples": 32,
        "estimator": "permutation",
        "value": "logit",
        "baseline": 0.0,
        "precision": "float32",
        "seed": 3,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.2, 0.3),
        "chunk_size": 128,
    }
    return {**common, **changed}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"chunk_size": 31},  # one image a forward pass
        {"chunk_size": 7},  # an image takes several
        {"seed": torch.arange(9), "estimator": "paired", "value": "prob"},
        {"baseline": torch.rand(9, 3, 16, 16)},
        {"estimator": "kernel", "n_samples": 25},
    ],
)
def test_has_the_bits_of_attribution_and_then_boxes(rule, changed, net):
    images, labels, ids = batch(9)
    wanted = settings(**changed)
    phi, boxes = shapley_crops(net, images, labels, ids, rule, **wanted)
    expected = shapley(net, images, labels, **wanted)
    assert (phi.dtype, boxes.dtype) == (torch.float32, torch.int32)
    assert torch.equal(phi, expected)
    options = {"grid": 4, "image_size": 16, "crop_size": rule.crop_size, "pool": rule.pool}
    placed = noisy_crop_boxes(
        expected, ids, seed=rule.seed, crops=rule.crops, coverage=rule.coverage, **options
    )
    assert torch.equal(boxes, placed)
    assert torch.equal(rule.boxes(expected, ids, 4, 16), placed)


def test_float64(net):
    images, labels, ids = batch(3)
    double = copy.deepcopy(net).double()
    phi, boxes = shapley_crops(double, images, labels, ids, RULES[0], **settings())
    expected = shapley(double, images, labels, **settings())
    assert phi.dtype == torch.float64
    assert torch.equal(phi, expected)
    assert torch.equal(boxes, RULES[0].boxes(expected, ids, 4, 16))


def test_nobody_and_nonsense(net):
    images, labels, ids = batch(4)
    phi, boxes = shapley_crops(net, images[:0], labels[:0], ids[:0], RULES[1], **settings())
    assert (tuple(phi.shape), tuple(boxes.shape)) == ((0, 16), (0, 3, 4))
    with pytest.raises(ValueError, match=r"sample_ids must be \[4\], one an image, got \[5\]"):
        shapley_crops(net, images, labels, torch.arange(5), RULES[0], **settings())
    with pytest.raises(ValueError, match="crop_size must lie within the image"):
        shapley_crops(net, images, labels, ids, CropRule(seed=0, crop_size=17), **settings())
    broken = nn.Sequential(nn.Flatten(), nn.Linear(768, 5)).eval()
    nn.init.constant_(broken[1].bias, torch.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        shapley_crops(broken, images, labels, ids, RULES[0], **settings())
