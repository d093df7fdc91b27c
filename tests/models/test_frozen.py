"""Frozen networks: the results and the gradients in the images of the network that was given."""

import copy

import pytest
import torch
from torch import nn

from ddfast.models import create_model
from ddfast.models import frozen as module
from ddfast.models.frozen import _FrozenConv2d, frozen
from ddfast.ops._winograd import winograd_is_fast
from ddfast.seeding import seeded

CPU = torch.device("cpu")


def network():
    """Convolutions of every kind: Winograd serves two of them."""
    with seeded("frozen"):
        return nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1),
            nn.Conv2d(64, 128, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(128, 64, 3, padding="same"),
            nn.Conv2d(64, 64, 3, padding=1, stride=2),
            nn.Conv2d(64, 64, 3, padding=1, groups=2),
            nn.Conv2d(64, 64, 1),
            nn.Flatten(),
            nn.LazyLinear(5),
        )


def test_results_and_gradients_are_those_of_the_network():
    model = network()
    images = torch.randn(3, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    model(images)  # the lazy layer
    state = copy.deepcopy(model.state_dict())
    exact_images = images.double().requires_grad_()
    exact = copy.deepcopy(model).double()(exact_images)
    (wanted,) = torch.autograd.grad(exact.square().sum(), exact_images)
    found = frozen(model, CPU)
    given = images.clone().requires_grad_()
    logits = found(given)
    (gradient,) = torch.autograd.grad(logits.square().sum(), given)
    assert torch.linalg.vector_norm(logits - exact) < 1e-6 * torch.linalg.vector_norm(exact)
    assert torch.linalg.vector_norm(gradient - wanted) < 2e-6 * torch.linalg.vector_norm(wanted)
    assert sum(isinstance(each, _FrozenConv2d) for each in found.modules()) == (
        2 if winograd_is_fast() else 0
    )
    # What was given is as it was.
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_without_winograd_and_in_other_dtypes_torch_computes(monkeypatch):
    model = create_model("convnet3", 3, 8, width=64).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            wide = model.to(memory_format=torch.channels_last)(images)
            assert torch.equal(frozen(model, CPU)(images), wide)
        assert torch.equal(frozen(model.double(), CPU)(images.double()), model(images.double()))
        model.float()
        monkeypatch.setattr(module, "winograd_is_fast", lambda: False)
        plain = frozen(model, CPU)
        assert not any(isinstance(each, _FrozenConv2d) for each in plain.modules())
        assert torch.equal(plain(images), model(images))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_changes_rounding_alone(layout):
    model = create_model("resnet18_in", 3, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model(images)
        torch.testing.assert_close(frozen(model, CPU, layout)(images), wanted, rtol=1e-4, atol=1e-5)
