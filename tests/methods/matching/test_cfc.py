"""The contrastive loss of class features: by hand, in the order of its running means, and on any matching method."""

import math

import pytest
import torch
from torch import nn

from ddfast.errors import DivergedError, UsageError
from ddfast.methods import get_method, list_methods
from ddfast.methods.matching.base import Matching
from ddfast.methods.matching.cfc import Contrast, contrasted, contrastive_loss
from ddfast.methods.matching.dm import DM
from ddfast.training.differentiable import DrawnTogether
from tests.methods.matching.conftest import TensorPool, context_of, distilled


@pytest.fixture
def pool():
    return TensorPool((6, 5, 7), 8)


def dm(**options):
    return DM.from_options({"iterations": 3, "real_batch": 4, **options})


class Colours(nn.Module):
    """Features of an image: its channels' means."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, images):
        return self.head(images.mean(dim=(2, 3)))


def test_the_loss_by_hand():
    means = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]], dtype=torch.float64)
    features = torch.tensor([[3.0, 3.0], [0.0, -7.0]], dtype=torch.float64)
    found = contrastive_loss(features, means, torch.tensor([0, 1]))
    root = math.sqrt(0.5)
    # Class 0: cosines root, root, -root. Class 1: 0, -1, 0.
    first = -math.log(math.exp(root / 0.7) / (math.exp(root / 0.7) + math.exp(-root / 0.7)))
    second = -math.log(math.exp(-1 / 0.7) / (math.exp(0) + math.exp(0)))
    assert found.tolist() == pytest.approx([first, second], rel=1e-12)


def test_the_denominator_leaves_the_class_out_so_that_the_loss_has_the_printed_minimum():
    means = torch.cat([torch.ones(1, 4), -torch.ones(9, 4)]).double()
    found = contrastive_loss(3 * torch.ones(1, 4).double(), means, torch.tensor([0]))
    assert float(found) == pytest.approx(-2 / 0.7 + math.log(9))
    assert float(found) == pytest.approx(-0.66, abs=0.005)


def test_its_gradient_is_that_of_finite_differences():
    draws = torch.Generator().manual_seed(1)
    features, means = (torch.randn(3, 5, dtype=torch.float64, generator=draws) for _ in range(2))
    labels = torch.arange(3)
    assert torch.autograd.gradcheck(lambda f: contrastive_loss(f, means, labels), features.requires_grad_())


def images_of(*colours):
    """[C, 1, 3, 2, 2], each of a colour."""
    return torch.stack([torch.tensor(each).view(1, 3, 1, 1).expand(1, 3, 2, 2) for each in colours])


def test_the_running_means_by_hand_and_the_loss_takes_those_before_the_step():
    network = Colours()
    steps = [
        images_of([4.0, 0, 0], [0.0, 2, 0]),
        images_of([0.0, 8, 0], [0.0, 0, 6]),
        images_of([1.0, 1, 1], [2.0, 0, 0]),
    ]
    held, values = {}, []
    for images in steps:
        contrast = Contrast(held)
        pixels = images.clone().requires_grad_()
        parts = [
            contrasted(network, pixels[label : label + 1], torch.tensor([label]), pixels, contrast.means)
            for label in (0, 1)
        ]
        for part in parts:
            contrast.add(*part)
        values.append(None if contrast.value is None else float(contrast.value))
        assert (contrast.value is None) == any(gradient is None for *_, gradient in parts)
        held = contrast.moved()
    assert values[0] is None  # the first step has nothing to compare with
    # The second: F is [4 0 0], [0 2 0]. Class 0 has [0 8 0]: cosines 0 and 1. Class 1 has [0 0 6]: 0 and 0.
    assert values[1] == pytest.approx(1 / 0.7, abs=1e-5)
    # The third: F is half of each: [2 4 0], [0 1 3]. Class 0 [1 1 1], class 1 [2 0 0].
    own, other = 6 / math.sqrt(3 * 20), 4 / math.sqrt(3 * 10)
    assert values[2] == pytest.approx((other - own) / 0.7 + (2 / math.sqrt(20) - 0) / 0.7, abs=1e-5)
    assert held["cfc.means"].tolist() == [[1.5, 2.5, 0.5], [1.0, 0.5, 1.5]]


def test_a_step_adds_the_weighted_gradient_and_notes_both_norms(pool):
    context = context_of(3, size=8)
    base, with_it, doubled = (
        distilled(dm(cfc=weight), pool, context, steps=2) for weight in (0.0, 300.0, 600.0)
    )
    assert "cfc" not in with_it.curve[0]
    assert "cfc.means" not in base.tensors
    assert [row["loss"] for row in base.curve] == [row["loss"] for row in with_it.curve]
    assert [row["gradient_norm"] for row in base.curve] == [row["gradient_norm"] for row in with_it.curve]
    row, twice = with_it.curve[1], doubled.curve[1]
    assert -2 / 0.7 + math.log(2) <= row["cfc"] / 3 <= 2 / 0.7 + math.log(2)
    assert twice["cfc"] == row["cfc"]
    assert twice["cfc_gradient_norm"] == pytest.approx(2 * row["cfc_gradient_norm"], rel=1e-6)
    moved = (with_it.pixels - base.pixels).norm()
    assert float(moved) == pytest.approx(row["cfc_gradient_norm"], rel=1e-3)  # a step of rate 1
    assert float((doubled.pixels - base.pixels).norm()) == pytest.approx(2 * float(moved), rel=1e-3)


def test_the_loss_falls_where_it_alone_acts(pool):
    context = context_of(3, size=8)
    method = dm(iterations=12, cfc=3000.0, momentum=0.0)
    method.loss = lambda network, real, synthetic, labels: synthetic.sum() * 0
    method.augmentation = lambda size, draws: DrawnTogether(())
    fixed = method.networks.at(0, method.begin(method.groups(3, 2)[0], pool, context), pool, context)
    method.networks.at = lambda *_: fixed
    state = distilled(method, pool, context)
    values = [row["cfc"] for row in state.curve if "cfc" in row]
    assert values[1:] == sorted(values[1:], reverse=True)  # the running means lag a step behind
    assert values[-1] < values[0] - 0.01


def test_all_classes_are_one_group_whatever_the_batch(pool):
    context = context_of(3, size=8)
    assert len(dm(class_batch=2).groups(3, 2)) == 2
    assert len(dm(class_batch=2, cfc=1.0).groups(3, 2)) == 1
    apart, together = (distilled(dm(class_batch=n, cfc=50.0), pool, context) for n in (2, 3))
    torch.testing.assert_close(apart.pixels, together.pixels, rtol=0, atol=1e-5)
    assert [row["cfc"] for row in apart.curve[1:]] == pytest.approx(
        [row["cfc"] for row in together.curve[1:]], rel=1e-5
    )


def test_every_method_that_matches_takes_it():
    matching = [get_method(name) for name in list_methods() if issubclass(get_method(name), Matching)]
    assert len(matching) >= 6
    for method in matching:
        if hasattr(method.Options, "cfc"):
            assert method.from_options({"cfc": 0.5}).options.cfc == 0.5
            assert method.Options.cfc == (1.0 if method.name == "udd" else 0.0)


@pytest.mark.parametrize("name", ["dsa", "idc"])
def test_methods_whose_networks_train_go_on_from_a_kill_with_it(name):
    class Pool(TensorPool):
        def batches(self, order, batch_size):
            for places in order.split(batch_size):
                yield places, self.images[places], self.labels[places]

    pool, context = Pool((6, 5, 7), 8), context_of(3, ipc=1, size=8)
    small = {
        "idc": {"inner_loop": 3, "net_samples": 4, "net_batch": 4},
        "dsa": {"outer_loop": 3, "inner_loop": 1},
    }

    def made():
        options = {"iterations": 1, "real_batch": 4, "cfc": 1.0, "init": "real", **small[name]}
        return get_method(name).from_options(options).resolved(1, 1)

    whole = distilled(made(), pool, context)
    half = distilled(made(), pool, context, steps=2)
    state = distilled(made(), pool, context, state=half)
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert [row.get("cfc") for row in state.curve] == [row.get("cfc") for row in whole.curve]
    assert whole.curve[1]["cfc_gradient_norm"] > 0
    assert whole.tensors["cfc.means"].shape[0] == 3


def test_a_network_that_draws_draws_the_same_with_it(pool):
    context = context_of(3, size=8)
    losses = []
    for weight in (0.0, 1e-20):
        method = dm(cfc=weight)
        inner = method.networks.at
        method.networks.at = lambda *a, inner=inner: nn.Sequential(nn.Dropout(0.3), inner(*a))
        losses.append([row["loss"] for row in distilled(method, pool, context).curve])
    assert losses[0] == losses[1]


def test_a_single_class_and_a_weight_below_0_are_refused():
    with pytest.raises(UsageError, match="cfc tells classes apart, and there is one: set it to 0"):
        dm(cfc=1.0).check_pool(torch.tensor([9]), ["a"], 1)
    dm().check_pool(torch.tensor([9]), ["a"], 1)
    with pytest.raises(UsageError, match="cfc"):
        dm(cfc=-0.5)


def test_what_diverges_names_it(pool):
    method, context = dm(lr_img=1e30, cfc=1.0), context_of(3, size=8)
    with pytest.raises(DivergedError, match="or cfc, now 1"):
        distilled(method, pool, context, steps=1)
