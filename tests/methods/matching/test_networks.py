"""Fresh networks: the weights of `create_model`, drawn in place."""

import pytest
import torch

from ddfast.methods.matching import networks
from ddfast.methods.matching.networks import Fresh
from ddfast.methods.matching.objectives import (
    cosine_distance,
    row_distance,
    summed_magnitudes,
    summed_squares,
    weight_gradients,
)
from ddfast.methods.synthesis import Group, State
from ddfast.models import create_model
from ddfast.models.fusing import FusedSequential
from ddfast.models.registry import features
from ddfast.seeding import seeded
from tests.methods.matching.conftest import context_of

STATE = State(Group(0, (0,)), {})


def expected(arch, step, size, seed=5):
    with seeded(seed, "network", step):
        return create_model(arch, 3, size)


# resnetap10 draws its convolutions twice, so a network is made anew for every step; the others are reset in place.
@pytest.mark.parametrize(
    ("arch", "size", "in_place"),
    [
        ("convnet3_in", 16, True),
        ("convnet3", 16, True),
        ("convnet4_in", 32, True),
        ("resnet18_in", 32, True),
        ("mobilenet_v2", 32, False),
        ("resnetap10", 32, False),
    ],
)
def test_weights_are_those_of_a_new_network(arch, size, in_place, monkeypatch):
    fresh = Fresh(arch)
    context = context_of(3, size=size)
    fresh.at(0, STATE, None, context)
    made = []
    monkeypatch.setattr(networks, "create_model", lambda *a: made.append(a) or create_model(*a))
    for step in (3, 0):
        wanted = expected(arch, step, size).state_dict()
        found = fresh.at(step, STATE, None, context).state_dict()
        assert list(found) == list(wanted)
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name
    assert len(made) == (0 if in_place else 2)


def test_a_network_is_fused_frozen_and_built_once():
    fresh = Fresh("convnet3_in")
    first = fresh.at(0, STATE, None, context_of(3))
    assert any(isinstance(module, FusedSequential) for module in first.modules())
    assert first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert fresh.at(1, STATE, None, context_of(3)) is first
    assert fresh.at(1, STATE, None, context_of(4)) is not first


def test_nothing_of_an_earlier_step_stays():
    fresh, context = Fresh("convnet3"), context_of(3)
    network = fresh.at(0, STATE, None, context)
    with torch.no_grad():
        network(torch.randn(4, 3, 16, 16))  # moves BatchNorm's statistics
    found = fresh.at(0, STATE, None, context).state_dict()
    for name, tensor in expected("convnet3", 0, 16).state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_the_callers_random_state_stays():
    torch.manual_seed(1)
    wanted = torch.rand(2)
    torch.manual_seed(1)
    Fresh("convnet3_in").at(0, STATE, None, context_of(3))
    assert torch.equal(torch.rand(2), wanted)


def test_the_callers_default_dtype_changes_no_weight():
    torch.set_default_dtype(torch.float64)
    try:
        found = Fresh("convnet3_in").at(2, STATE, None, context_of(3)).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in expected("convnet3_in", 2, 16).state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_features_of_a_fused_network_are_those_of_the_layers_with_gradients():
    network = Fresh("convnet3_in").at(0, STATE, None, context_of(3))
    plain = expected("convnet3_in", 0, 16).requires_grad_(False)
    images = torch.randn(5, 3, 16, 16)
    exact = images.double().requires_grad_()
    found = images.clone().requires_grad_()
    wanted, got = features(plain.double(), exact), features(network, found)
    assert got.shape == (5, 512)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(got.square().sum(), found)
    (right,) = torch.autograd.grad(wanted.square().sum(), exact)
    assert torch.linalg.vector_norm(gradient - right) < 1e-5 * torch.linalg.vector_norm(right)


@pytest.mark.parametrize("distance", [row_distance, summed_squares, summed_magnitudes, cosine_distance])
def test_gradients_of_a_distance_in_the_images_are_those_of_the_layers(distance):
    network = Fresh("convnet3_in").at(0, STATE, None, context_of(3)).requires_grad_()
    plain = expected("convnet3_in", 0, 16).double()
    real, made = torch.randn(6, 3, 16, 16), torch.randn(3, 3, 16, 16)
    found = []
    for net, dtype in ((network, torch.float32), (plain, torch.float64)):
        images = made.to(dtype).requires_grad_()
        wanted = weight_gradients(net, real.to(dtype), torch.tensor(1))
        gradients = weight_gradients(net, images, torch.tensor(1), differentiable=True)
        found.append(torch.autograd.grad(distance(gradients, wanted), images)[0])
    assert torch.linalg.vector_norm(found[0] - found[1]) < 1e-4 * torch.linalg.vector_norm(found[1])


def test_gradients_of_a_fused_network_are_matched_in_the_images_alone():
    network = Fresh("convnet3_in").at(0, STATE, None, context_of(3)).requires_grad_()
    images = torch.randn(3, 3, 16, 16, requires_grad=True)
    gradients = weight_gradients(network, images, torch.tensor(1), differentiable=True)
    first = next(network.parameters())
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(gradients[-2].square().sum(), first)
