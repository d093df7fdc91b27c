"""The trial of a method can fail, and its verdict does not outlive a change of the model."""

import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from ddfast import grad_norm
from ddfast.gradients import norms as implementation
from ddfast.gradients.fingerprint import fingerprint
from tests.gradients.test_any_model import Branching, Head, Mixing, conv, definition


def verdict(model, images, labels, method="auto", **keywords):
    """Norms, and what was said of the method."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        norms = grad_norm(model, images, labels, method, **keywords)
    return norms, [str(w.message) for w in said if "grad_norm" in str(w.message)]


def check(model, images, labels, method="auto", **keywords):
    norms, said = verdict(model, images, labels, method, **keywords)
    expected = definition(lambda: model, images, labels)
    torch.testing.assert_close(norms.double(), expected, rtol=1e-4, atol=1e-7)
    return said


LABELS = torch.tensor([0, 1, 2, 3, 1])
IMAGES = {
    "blank": torch.zeros(5, 3, 6, 6),
    "equal": torch.rand(1, 3, 6, 6).expand(5, 3, 6, 6),
    "two equal ones first": torch.cat([torch.ones(2, 3, 6, 6), torch.rand(3, 3, 6, 6)]),
    "mirrored": torch.rand(1, 3, 6, 6).repeat(5, 1, 1, 1).flip(3),
}


@pytest.mark.parametrize("how", ["mean", "statistics", "many", "sort"])
@pytest.mark.parametrize("first", IMAGES)
def test_images_that_show_nothing_hide_no_mixture_of_the_batch(first, how):
    torch.manual_seed(0)
    model = Mixing(how).eval()
    said = check(model, IMAGES[first], LABELS)
    assert len(said) == 1
    assert check(model, torch.rand(5, 3, 6, 6), LABELS) == []


def test_one_image_first_and_many_later():
    torch.manual_seed(0)
    model = Mixing("many").eval()
    assert check(model, torch.rand(1, 3, 6, 6), LABELS[:1]) == []
    assert "on 5 images it gives" in check(model, torch.rand(5, 3, 6, 6), LABELS)[0]


def test_a_layer_that_is_exchanged_is_tried_again():
    torch.manual_seed(0)
    model, images = Head(conv(), nn.ReLU()).eval(), torch.rand(5, 3, 6, 6)
    assert check(model, images, LABELS) == []
    model.layers[1] = nn.PReLU(8)
    assert "weight of layer 'layers.1' (PReLU)" in check(model, images, LABELS)[0]
    model.layers[1] = nn.ReLU()
    assert check(model, images, LABELS) == []


class Switched(Head):
    flag = False

    def __init__(self):
        super().__init__(conv(), nn.Tanh())
        self.settings = {"mix": False, "inner": types.SimpleNamespace(mix=[False])}
        self.register_buffer("mix", torch.tensor(False))
        self.closed = (lambda value: lambda: value[0])([False])

    def mixes(self):
        inner = self.settings["inner"].mix[0]
        return self.flag or self.settings["mix"] or inner or self.mix or self.closed() or MIXES

    def body(self, x):
        x = self.layers(x)
        return x - x.mean(0) + x.square() if self.mixes() else x


MIXES = False


def replace_forward(model):
    def forward(self, x):
        x = self.layers(x)
        return self.head((x - x.mean(0) + x.square()).flatten(2).mean(2))

    model.forward = types.MethodType(forward, model)


CHANGES = {
    "attribute": lambda model: setattr(model, "flag", True),
    "class attribute": lambda model: setattr(Switched, "flag", True),
    "dict": lambda model: model.settings.update(mix=True),
    "nested": lambda model: model.settings["inner"].mix.__setitem__(0, True),
    "buffer": lambda model: model.mix.fill_(True),
    "closure": lambda model: setattr(model, "closed", (lambda value: lambda: value[0])([True])),
    "global": lambda model: globals().update(MIXES=True),
    "forward": replace_forward,
    "hook": lambda model: model.layers.register_forward_hook(
        lambda m, a, out: out - out.mean(0) + out.square()
    ),
    "a method of the class": lambda model: setattr(
        Switched,
        "body",
        lambda self, x: Mixing.body(types.SimpleNamespace(layers=self.layers, how="mean"), x),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_seen(change, monkeypatch):
    monkeypatch.setattr(Switched, "flag", False)
    monkeypatch.setattr(Switched, "body", Switched.body)
    monkeypatch.setitem(globals(), "MIXES", False)
    torch.manual_seed(0)
    model, images = Switched().eval(), torch.rand(5, 3, 6, 6)
    assert check(model, images, LABELS) == []
    before = fingerprint(model)
    CHANGES[change](model)
    assert fingerprint(model) != before
    assert "on two images it gives" in check(model, images, LABELS)[0]


def test_training_steps_are_no_change_of_the_program():
    model = Head(conv(), nn.BatchNorm2d(8), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = fingerprint(model.eval())
    model.train()(torch.rand(4, 3, 6, 6)).sum().backward()
    optimizer.step()
    assert fingerprint(model.eval()) == before


class Chance(Head):
    def __init__(self, how):
        super().__init__(conv())
        self.how = how

    def body(self, x):
        x = self.layers(x)
        if self.how == "dropout":
            return functional.dropout(x, 0.5, training=True)
        if self.how == "rare":
            return x * 2 if torch.rand(()) < 0.2 else x
        if self.how == "noise":
            return x + 0.1 * torch.randn_like(x)
        import random

        return x * random.random()


@pytest.mark.parametrize("method", implementation.METHODS)
@pytest.mark.parametrize("how", ["dropout", "noise", "rare", "python"])
def test_a_model_that_returns_something_else_each_time_is_refused(how, method):
    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match=r"Chance\) returns other logits for the same images each time.*chance"
    ):
        grad_norm(Chance(how).eval(), torch.rand(5, 3, 6, 6), LABELS, method)


class AtMost(Head):
    def body(self, x):
        assert len(x) <= 2, "two at most"
        return self.layers(x)


def test_what_raises_at_the_chunks_size_ends_in_the_loop():
    torch.manual_seed(0)
    model, images = AtMost(conv()).eval(), torch.rand(5, 3, 6, 6)
    said = check(model, images, LABELS)
    assert len(said) == 1
    assert (
        "the ghost method does not serve AtMost, using the loop over images: it raises AssertionError: two"
        in said[0]
    )
    assert check(AtMost(conv()).eval(), images, LABELS, chunk_size=2) == []


def test_an_image_that_the_model_refuses_is_the_models_own_error():
    class Picky(Head):
        def body(self, x):
            if not x.sum().isfinite():
                raise OverflowError("not finite")
            return self.layers(x)

    torch.manual_seed(0)
    model, images = Picky(conv()).eval(), torch.rand(5, 3, 6, 6)
    check(model, images, LABELS)
    images[4] = float("inf")
    with pytest.raises(OverflowError, match="not finite"):
        grad_norm(model, images, LABELS)
    check(model, images[:4], LABELS[:4])


def test_numbers_drawn_in_vain_do_no_harm():
    torch.manual_seed(0)
    model, images = Head(conv()).eval(), torch.rand(5, 3, 6, 6)
    expected = grad_norm(model, images, LABELS)
    model.register_forward_pre_hook(lambda module, given: (torch.rand(3), given)[1])
    assert torch.equal(grad_norm(model, images, LABELS), expected)


def test_the_trial_sees_a_fault_of_the_models_own_precision_and_layout(monkeypatch):
    from ddfast import ops

    right = ops.grad_sq_norm_conv2d

    def wrong(input, *arguments, **keywords):
        factor = 1.1 if input.dtype == torch.float32 else 1.0
        return factor * right(input, *arguments, **keywords)

    monkeypatch.setattr(ops, "grad_sq_norm_conv2d", wrong)
    torch.manual_seed(0)
    assert "on two images it gives" in check(Head(conv()).eval(), torch.rand(5, 3, 6, 6), LABELS)[0]


def test_the_warning_names_why_neither_method_serves():
    torch.manual_seed(0)
    said = check(Branching(conv()).eval(), torch.rand(5, 3, 6, 6), LABELS)
    assert len(said) == 1
    assert "the ghost method and vmap do not serve Branching, using the loop over images" in said[0]
    assert "the ghost method: the model reads what it computes of the images, by torch.Tensor.item" in said[0]
    assert "vmap: it raises RuntimeError" in said[0]
    assert "\n" not in said[0]
    said = check(Branching(conv()).eval(), torch.rand(5, 3, 6, 6), LABELS, "vmap")
    assert "vmap does not serve Branching, using the loop over images: it raises RuntimeError" in said[0]
    assert check(Branching(conv()).eval(), torch.rand(5, 3, 6, 6), LABELS, "loop") == []
