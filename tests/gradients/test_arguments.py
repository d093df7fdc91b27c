"""Modes around a call, and arguments that are not what is wanted."""

import contextlib
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from ddfast import grad_norm
from ddfast.gradients import METHODS
from tests.gradients.test_any_model import Head, conv, definition, state, surroundings

LABELS = torch.tensor([0, 1, 2, 3, 1])


def built():
    torch.manual_seed(0)
    return Head(
        conv(), nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(2, 8), nn.GELU()
    ).eval()


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
}


@pytest.mark.filterwarnings("ignore:.*batching rule.*")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_modes_around_a_call(mode, method):
    model, images = built(), torch.rand(5, 3, 6, 6)
    expected = grad_norm(model, images, LABELS, method)
    bytes_ = (images * 255).to(torch.uint8)
    of_bytes = grad_norm(model, bytes_, LABELS, method, mean=(0.5,) * 3, std=(0.2,) * 3)
    before = state(model)
    with MODES[mode]():
        around = surroundings()
        norms, logits = grad_norm(model, images, LABELS, method, return_logits=True)
        again = grad_norm(model, bytes_, LABELS, method, mean=(0.5,) * 3, std=(0.2,) * 3)
        assert surroundings() == around
    assert torch.equal(norms, expected)
    assert torch.equal(again, of_bytes)
    assert norms.dtype == logits.dtype == torch.float32
    assert not norms.is_inference()
    assert state(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_what_was_made_in_inference_mode(method):
    images = torch.rand(5, 3, 6, 6)
    expected = grad_norm(built(), images, LABELS, method)
    with torch.inference_mode():
        inferred, labels, mean = images + 0, built()(images).argmax(1) * 0 + LABELS, torch.zeros(3)
        model = built()
    assert labels.is_inference()
    for given in (built(), model):
        norms = grad_norm(given, inferred, labels, method, mean=mean)
        assert torch.equal(norms, expected)
    assert model.head.weight.is_inference()
    assert model.layers[1].running_mean.is_inference()
    assert isinstance(model.head.weight, nn.Parameter)


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.head, self.what = nn.Linear(3, 4), what

    def forward(self, x):
        return self.what(self.head(x.mean((2, 3))))


@dataclass
class Output:
    logits: torch.Tensor


RETURNS = {
    "dict": (lambda logits: {"logits": logits}, "a dict"),
    "tuple": (lambda logits: (logits, logits), "a tuple"),
    "dataclass": (Output, "an? Output"),
    "none": (lambda logits: None, "a NoneType"),
    "vector": (lambda logits: logits[:, 0], r"\(\d+,\)"),
    "map": (lambda logits: logits[..., None], r"\(\d+, 4, 1\)"),
    "one": (lambda logits: logits.mean(), r"\(\)"),
    "classes": (lambda logits: logits.argmax(1, keepdim=True), r"torch.int64 \(\d+, 1\)"),
    "nothing": (lambda logits: logits[:, :0], r"torch.float32 \(\d+, 0\)"),
    "pooled batch": (lambda logits: logits.mean(0, keepdim=True), r"\(1, 4\)"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RETURNS)
def test_a_model_that_returns_no_logits(name, method):
    what, found = RETURNS[name]
    with pytest.raises(ValueError, match=rf"^the model must return logits, .* \[\d+, C\], got {found}; .*\Z"):
        grad_norm(Returns(what).eval(), torch.rand(5, 3, 6, 6), LABELS, method)


IMAGES = torch.rand(5, 3, 6, 6)
BAD = {
    "too large": ({"labels": LABELS + 1}, ValueError, "labels must be classes from 0 to 3, .* got 4"),
    "negative": ({"labels": LABELS - 1}, ValueError, "labels must be classes, 0 or more, got -1"),
    "ignored": (
        {"labels": torch.full((5,), -100)},
        ValueError,
        "labels must be classes, 0 or more, got -100",
    ),
    "int32": (
        {"labels": LABELS.int()},
        ValueError,
        r"labels must be int64 \[5\], one an image, got torch.int32",
    ),
    "bool": ({"labels": LABELS > 1}, ValueError, r"labels must be int64 \[5\], one an image, got torch.bool"),
    "float": ({"labels": LABELS.float()}, ValueError, r"labels must be int64 \[5\], .*got torch.float32"),
    "soft": (
        {"labels": torch.eye(5)},
        ValueError,
        r"labels must be int64 \[5\], .*got torch.float32 \(5, 5\)",
    ),
    "one label": (
        {"labels": torch.tensor(1)},
        ValueError,
        r"labels must be int64 \[5\], .*got torch.int64 \(\)",
    ),
    "list": ({"labels": [0, 1, 2, 3, 1]}, TypeError, "labels must be a tensor, got list; torch.as_tensor"),
    "array": ({"labels": np.zeros(5, np.int64)}, TypeError, "labels must be a tensor, got ndarray"),
    "images as an array": ({"images": IMAGES.numpy()}, TypeError, "images must be a tensor, got ndarray"),
    "images as a list": ({"images": list(IMAGES)}, TypeError, "images must be a tensor, got list"),
    "no images": ({"images": None}, TypeError, "images must be a tensor, got NoneType"),
    "a number": ({"images": torch.tensor(1.0)}, ValueError, r"images must be \[B, ...\]"),
    "complex": ({"images": IMAGES.cfloat()}, ValueError, r"images must be \[B, ...\].*got torch.complex64"),
    "sparse": ({"images": IMAGES.to_sparse()}, ValueError, "images must be .* dense"),
    "meta labels": (
        {"labels": LABELS.to("meta")},
        ValueError,
        "images and labels must hold values, got .* meta",
    ),
    "meta images": (
        {"images": IMAGES.to("meta")},
        ValueError,
        "images and labels must hold values, got .* meta",
    ),
    "a function": ({"model": lambda x: x}, TypeError, "model must be a torch.nn.Module, got function"),
    "half a chunk": ({"chunk_size": 0.5}, ValueError, "chunk_size must be a whole number from 1 on, got 0.5"),
    "a flag": ({"chunk_size": True}, ValueError, "chunk_size must be a whole number from 1 on, got True"),
    "lazy": (
        {"model": nn.Sequential(nn.Flatten(), nn.LazyLinear(4)).eval()},
        ValueError,
        r"layer '1' \(LazyLinear\) has no shape yet; run the model on an image first",
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_line(name, method):
    change, error, message = BAD[name]
    arguments = {"model": built(), "images": IMAGES, "labels": LABELS, **change}
    with pytest.raises(error, match=message) as caught:
        grad_norm(**arguments, method=method)
    assert re.fullmatch(r".+", str(caught.value))


class Stops(Head):
    """Raises in the middle, after it has changed what it could."""

    def __init__(self, when):
        super().__init__(nn.ReLU(inplace=True), conv())
        self.when, self.calls, self.log = when, 0, []
        self.register_buffer("seen", torch.zeros(()))

    def body(self, x):
        self.calls += 1
        self.log.append(1)
        self.seen += 1
        torch.rand(2)
        self.layers[1].weight.data.mul_(2)
        x = super().body(x)
        if self.when == "always" or (x.requires_grad and torch.is_grad_enabled()):
            raise RuntimeError("stop here")
        return x


@pytest.mark.filterwarnings("ignore:grad_norm")
@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("when", ["always", "with a gradient"])
def test_a_model_that_raises_is_as_it_was(when, method):
    torch.manual_seed(0)
    model, images = Stops(when).eval().requires_grad_(False), torch.randn(5, 3, 6, 6)
    model.head.requires_grad_(True)
    before, copy, around = state(model), images.clone(), surroundings()
    with pytest.raises(RuntimeError, match="stop here"):
        grad_norm(model, images, LABELS, method)
    assert state(model) == before
    assert torch.equal(images, copy)
    assert surroundings() == around


def test_hooks_of_parameters_see_nothing_and_stay():
    model, images = built(), torch.rand(5, 3, 6, 6)
    expected = definition(built, images, LABELS)
    seen = []
    weight = model.head.weight
    handles = [
        weight.register_hook(lambda grad: (seen.append(1), grad * 0)[1]),
        weight.register_post_accumulate_grad_hook(seen.append),
    ]
    for method in ("auto", "vmap", "loop"):
        torch.testing.assert_close(
            grad_norm(model, images, LABELS, method).double(), expected, rtol=1e-4, atol=0
        )
    assert not seen
    model(images).sum().backward()
    assert len(seen) == 2
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    for handle in handles:
        handle.remove()
    model(images).sum().backward()
    assert len(seen) == 2


@pytest.mark.filterwarnings("ignore")
def test_training_goes_on_after_a_call():
    from tests.gradients.test_any_model import MODELS, TwoNames

    for make in (TwoNames, MODELS["clamped"], MODELS["hooked weight norm"], MODELS["gru"]):
        torch.manual_seed(0)
        model = make().eval()
        images = torch.rand(5, 3, 6, 6)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        loss = nn.functional.cross_entropy(model(images), LABELS)  # this graph waits
        for method in ("auto", "vmap", "loop"):
            grad_norm(model, images, LABELS, method)
        loss.backward()
        optimizer.step()
        assert all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in model.parameters())
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_reentrant_checkpoints_count_every_layer(method):
    from tests.gradients.test_any_model import Checkpointed

    torch.manual_seed(0)
    model, images = Checkpointed(True).eval(), torch.rand(5, 3, 6, 6)

    def plain():
        torch.manual_seed(0)
        whole = Checkpointed(True).eval()
        whole.body = whole.layers
        return whole

    before = state(model)
    norms = grad_norm(model, images, LABELS, method)
    torch.testing.assert_close(norms.double(), definition(plain, images, LABELS), rtol=1e-4, atol=0)
    assert state(model) == before
