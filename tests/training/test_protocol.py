"""Each number of E-RDED, pinned to what RDED's code gives."""

import math

import numpy as np
import pytest
import torch

from ddfast.models import create_model
from ddfast.training.protocol import PROTOCOLS, Protocol, protocol_named

RDED = PROTOCOLS["rded"]


def test_numbers_of_rded():
    assert (RDED.epochs, RDED.lr, RDED.betas, RDED.weight_decay) == (300, 1e-3, (0.9, 0.999), 0.01)
    assert (RDED.temperature, RDED.mix_alpha) == (20.0, 1.0)


def test_learning_rate_falls_along_a_quarter_cosine():
    factors = [RDED.lr_factor(epoch, 300) for epoch in (0, 75, 150, 299, 300)]
    # cos(0) = 1; cos(pi/8); cos(pi/4) = sqrt(1/2); cos(299 pi/600); cos(pi/2) = 0.
    expected = [1.0, 0.9619397662556434, 0.8535533905932737, 0.5026179819157097, 0.5]
    assert factors == pytest.approx(expected, rel=1e-9)
    assert RDED.lr_factor(30, 60) == RDED.lr_factor(150, 300)


def test_tested_epochs():
    assert RDED.tested_epochs(300) == [249, 259, 269, 279, 289, 299]
    assert RDED.tested_epochs(60) == [49, 59]
    assert RDED.tested_epochs(45) == [39, 44]
    assert RDED.tested_epochs(1) == [0]


@pytest.mark.parametrize(
    ("ipc", "classes", "size", "expected"),
    [
        (1, 10, 32, 10),
        (10, 10, 32, 50),
        (50, 10, 32, 100),
        (10, 100, 32, 100),
        (50, 100, 32, 200),
        (10, 1000, 224, 100),
        (50, 200, 64, 100),
        (1, 200, 64, 100),
        (1, 3, 32, 3),  # never more than the set holds
        (5, 10, 32, 10),  # between the listed values: the largest not above
        (20, 10, 32, 50),
        (100, 10, 32, 100),
    ],
)
def test_batch_sizes(ipc, classes, size, expected):
    assert RDED.batch_size_for(ipc, classes, size) == expected


def test_cifar100_convnet_from_convnet_is_a_case_of_its_own():
    assert RDED.batch_size_for(10, 100, 32, "convnet3", "convnet3") == 25
    assert RDED.lr_for("convnet3", "convnet3", 100, 32) == 2e-3
    assert RDED.batch_size_for(10, 100, 32, "convnet3", None) == 100
    assert RDED.lr_for("convnet3", "resnet18_small", 100, 32) == 1e-3
    assert RDED.lr_for("convnet3", "convnet3", 10, 32) == 1e-3


@pytest.mark.parametrize(
    ("arch", "lr"),
    [
        ("resnet18", 1e-3),
        ("vgg11", 5e-4),
        ("efficientnet_b0", 2e-3),
        ("mobilenet_v2", 2.5e-3),
        ("swin_v2_t", 1e-4),
    ],
)
def test_learning_rates_of_architectures(arch, lr):
    assert RDED.lr_for(arch, None, 10, 32) == lr


def test_norm_parameters_and_biases_do_not_decay():
    model = create_model("convnet3", 10, 32)
    decayed, spared = RDED.parameter_groups(model.named_parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "blocks.0.weight",
        "blocks.4.weight",
        "blocks.8.weight",
        "classifier.weight",
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)


def test_cutmix_boxes_follow_the_law():
    draws = np.random.default_rng(0)
    boxes = np.array([RDED.cutmix_box(32, draws) for _ in range(20000)])
    top, left, bottom, right = boxes.T
    assert boxes.min() == 0
    assert boxes.max() == 32
    assert (bottom >= top).all()
    assert (right >= left).all()
    area = (bottom - top) * (right - left) / 1024

    # lambda is uniform (Beta(1, 1)), half a side is int(32 sqrt(1 - lambda)) // 2, the centre uniform over
    # the pixels; rows and columns are clipped on their own.
    halves = np.floor(np.floor(32 * np.sqrt((np.arange(4000) + 0.5) / 4000)) / 2)[:, None]
    side = (np.clip(np.arange(32) + halves, 0, 32) - np.clip(np.arange(32) - halves, 0, 32)).mean(axis=1)
    assert (right - left).mean() == pytest.approx(side.mean(), abs=0.15)
    assert area.mean() == pytest.approx((side**2).mean() / 1024, abs=0.006)
    inner = boxes[(top > 0) & (left > 0) & (bottom < 32) & (right < 32)]
    assert len(inner) > 1000
    assert np.array_equal(inner[:, 2] - inner[:, 0], inner[:, 3] - inner[:, 1])
    assert ((inner[:, 2] - inner[:, 0]) % 2 == 0).all()


def test_cutmix_draws_come_from_the_generator_alone():
    np.random.seed(0)  # noqa: NPY002 - the global state must not matter
    first = [RDED.cutmix_box(32, np.random.default_rng(5)) for _ in range(2)]
    np.random.seed(1)  # noqa: NPY002
    assert RDED.cutmix_box(32, np.random.default_rng(5)) == first[0] == first[1]


def test_unknown_protocols_list_the_known():
    with pytest.raises(ValueError, match="unknown protocol 'mtt'; known: rded, dc, dsa"):
        protocol_named("mtt")
    assert protocol_named("rded") is RDED


def test_a_protocol_of_ones_own():
    own = Protocol("own", epochs=7, temperature=4.0)
    assert own.lr_for("convnet3", None, 10, 32) == 1e-3
    assert math.isclose(own.lr_factor(7, 7), 0.5)
    assert torch.tensor(own.tested_epochs(7)).tolist() == [6]


@pytest.mark.parametrize(
    ("name", "epochs", "expected"),
    [
        # E = 300: the rate falls behind epoch 151, the loop ends behind epoch 300.
        ("dc", 300, {0: 1, 151: 1, 152: 0.1, 300: 0.1}),
        ("dsa", 1000, {0: 1, 501: 1, 502: 0.1, 1000: 0.1}),
        # Milestones 666 and 833 of 1000.
        ("idc", 1000, {0: 1, 665: 1, 666: 0.2, 832: 0.2, 833: 0.04, 999: 0.04}),
        ("sre2l", 400, {0: 1, 100: 0.5 + 0.5 * math.sqrt(0.5), 200: 0.5, 400: 0}),
        # Five epochs up from 0.01, then a cosine over the other 95.
        ("sre2l_tiny", 100, {0: 0.01, 1: 0.208, 4: 0.802, 5: 1, 100: 0}),
        ("igds", 2000, {0: 1, 1999: 1}),
    ],
)
def test_schedules_by_hand(name, epochs, expected):
    rules = PROTOCOLS[name]
    assert rules.epochs == epochs
    for epoch, factor in expected.items():
        assert rules.lr_factor(epoch, epochs) == pytest.approx(factor, abs=1e-12), epoch


def test_epochs_by_ipc():
    assert [PROTOCOLS["igds"].epochs_for(ipc) for ipc in (1, 10, 20, 50, 100)] == [
        2000,
        2000,
        1500,
        1500,
        1000,
    ]
    assert [PROTOCOLS["dc"].epochs_for(ipc) for ipc in (1, 50)] == [300, 300]


@pytest.mark.parametrize(
    ("name", "epochs", "tested"),
    [
        ("dc", 300, [249, 259, 269, 279, 289, 299, 300]),
        ("idc", 1000, [249, 499, 749, 999]),
        ("rded", 300, [249, 259, 269, 279, 289, 299]),
    ],
)
def test_tested_epochs_of_all(name, epochs, tested):
    assert PROTOCOLS[name].tested_epochs(epochs) == tested


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("rded", torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": {0.01, 0.0}}),
        ("dc", torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": {5e-4}}),
        ("dsa", torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": {5e-4}}),
        ("idc", torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": {5e-4}}),
        ("sre2l", torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": {0.01}}),
        ("sre2l_tiny", torch.optim.SGD, {"lr": 0.2, "momentum": 0.9, "weight_decay": {1e-4}}),
        ("igds", torch.optim.Adam, {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": {0.0}}),
    ],
)
def test_optimisers(name, kind, expected):
    rules = PROTOCOLS[name]
    optimizer = rules.make_optimizer(
        torch.nn.Sequential(torch.nn.Linear(2, 2)), rules.lr_for("x", None, 10, 32)
    )
    assert type(optimizer) is kind
    for key, value in expected.items():
        found = {group[key] for group in optimizer.param_groups}
        assert found == (value if isinstance(value, set) else {value})


@pytest.mark.parametrize(
    ("name", "temperature", "labels", "batch"),
    [
        ("dc", 20.0, "hard", 256),
        ("dsa", 20.0, "hard", 256),
        ("idc", 20.0, "hard", 64),
        ("igds", 20.0, "hard", 64),
        ("sre2l", 30.0, "soft", 128),
        ("sre2l_tiny", 20.0, "soft", 256),
    ],
)
def test_labels_and_batches(name, temperature, labels, batch):
    rules = PROTOCOLS[name]
    assert (rules.labels, rules.batch_size_for(50, 10, 32)) == (labels, batch)
    assert labels == "hard" or rules.temperature == temperature
    assert rules.batch_size_for(1, 10, 32) == 10  # never more than the set holds


def test_words_that_are_none_are_refused():
    with pytest.raises(ValueError, match="mix must be one of none, cutmix, mixup, got 'cut'"):
        Protocol("own", mix="cut")
