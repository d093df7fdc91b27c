"""CMI in a matching method: value, gradient, share, proxies drawn, and what a piece is."""

import pytest
import torch
import torch.nn.functional as F

from ddfast.methods.matching import cmi as module
from ddfast.methods.matching.cmi import Regulariser
from ddfast.methods.matching.dm import DM
from ddfast.methods.matching.options import MatchingOptions
from ddfast.models.registry import features
from ddfast.seeding import generator
from tests.methods.matching.conftest import context_of, distilled


def by_the_paper(proxy, images):
    """Eq. 10 in float64: the mean over all images of KL(P_s || Q_y), as the authors' code has it."""
    proxy = proxy.double()
    exact = images.double().requires_grad_()
    rows = []
    for of_class in exact:
        p = F.softmax(features(proxy, of_class), dim=1)
        q = p.mean(0, keepdim=True).expand_as(p)
        rows.append((p * (p.log() - q.log())).sum(1))
    value = torch.cat(rows).mean()
    return value.detach(), torch.autograd.grad(value, exact)[0]


def dm(**options):
    return DM(MatchingOptions(**{"iterations": 4, "real_batch": 6, "cmi": 100.0, "proxies": "p", **options}))


@pytest.mark.parametrize("rows", [128, 7, 1])
def test_value_and_gradient_are_the_papers_whatever_the_pieces(proxies, rows, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", rows)
    images = torch.randn(3, 3, 3, 16, 16)
    value, gradient = Regulariser(proxies[:1]).value_and_gradient(images, 0, 5)
    wanted, exact = by_the_paper(proxies[0], images)
    assert float(value) == pytest.approx(float(wanted), rel=1e-4)
    assert gradient.shape == images.shape
    assert torch.linalg.vector_norm(gradient - exact) < 1e-4 * torch.linalg.vector_norm(exact)
    assert not images.requires_grad


def test_a_value_without_a_gradient(proxies):
    images = torch.randn(3, 3, 3, 16, 16)
    regulariser = Regulariser(proxies)
    value, gradient = regulariser.value_and_gradient(images, 2, 5, wanted=False)
    assert gradient is None
    assert value == regulariser.value_and_gradient(images, 2, 5)[0]


def test_the_proxy_of_a_step_is_drawn_by_seed_and_step(proxies):
    images = torch.randn(2, 3, 3, 16, 16)
    both = Regulariser(proxies)
    alone = [Regulariser([proxy]).value_and_gradient(images, 0, 5)[0] for proxy in proxies]
    drawn = []
    for step in range(12):
        value = both.value_and_gradient(images, step, 5)[0]
        chosen = int(torch.randint(2, (), generator=generator(5, "proxy", step)))
        assert value == alone[chosen]
        drawn.append(chosen)
    assert set(drawn) == {0, 1}


def test_a_step_adds_lambda_times_the_gradient_of_images_without_augmentation(pool, proxies):
    context = context_of(3)
    base, regular = DM(MatchingOptions(iterations=4, real_batch=6)), dm(lr_img=0.5)
    state = regular.begin(regular.groups(3, 2)[0], pool, context)
    begun = state.pixels.clone()
    distilled(regular, pool, context, state=state, steps=1)
    plain = distilled(base, pool, context, steps=1)
    chosen = int(torch.randint(2, (), generator=generator(context.seed, "proxy", 0)))
    value, exact = by_the_paper(proxies[chosen], begun.unflatten(0, (3, 2)))
    added = state.tensors["momentum"] - plain.tensors["momentum"]
    wanted = 100 * exact.flatten(0, 1)
    assert torch.linalg.vector_norm(added - wanted) < 1e-3 * torch.linalg.vector_norm(wanted)
    row = state.curve[0]
    assert row["cmi"] == pytest.approx(float(value), rel=1e-4)
    assert row["cmi_gradient_norm"] == pytest.approx(float(torch.linalg.vector_norm(wanted)), rel=1e-4)
    assert row["gradient_norm"] == plain.curve[0]["gradient_norm"]
    assert row["loss"] == plain.curve[0]["loss"]
    assert torch.equal(state.pixels, begun.add(state.tensors["momentum"], alpha=-0.5))


@pytest.mark.parametrize("class_batch", [1, 2])
def test_grouping_changes_the_pixels_by_rounding_alone(pool, proxies, class_batch):
    """A class's share of the mean is a product of other factors in another grouping: its gradient rounds otherwise."""
    context = context_of(3)
    together = distilled(dm(), pool, context)
    apart = [
        distilled(dm(class_batch=class_batch), pool, context, group=group)
        for group in range(len(dm(class_batch=class_batch).groups(3, 2)))
    ]
    found = torch.cat([state.pixels for state in apart])
    moved = torch.linalg.vector_norm(together.pixels - dm().begin(dm().groups(3, 2)[0], pool, context).pixels)
    assert torch.linalg.vector_norm(found - together.pixels) < 1e-4 * moved
    rows = [len(state.group.classes) for state in apart]
    first = sum(state.curve[0]["cmi"] * share for state, share in zip(apart, rows, strict=True)) / 3
    assert first == pytest.approx(together.curve[0]["cmi"], rel=1e-5)


def test_cmi_falls_with_the_regulariser(pool, proxies):
    context = context_of(3)
    state = distilled(dm(iterations=12, cmi=3000.0), pool, context)
    plain = distilled(DM(MatchingOptions(iterations=12, real_batch=6)), pool, context)

    def mean(pixels):
        images = pixels.unflatten(0, (3, 2))
        return sum(float(Regulariser([p]).value_and_gradient(images, 0, 0)[0]) for p in proxies)

    assert mean(state.pixels) < 0.5 * mean(plain.pixels)


def test_every_so_many_steps(pool, proxies):
    state = distilled(dm(iterations=40, cmi_every=3), pool, context_of(3))
    acts = [int(row["step"]) for row in state.curve if "cmi_gradient_norm" in row]
    assert acts == list(range(0, 40, 3))
    measured = [int(row["step"]) for row in state.curve if "cmi" in row]
    assert measured == sorted({*acts, *range(0, 40, 4), 39})  # and where the variance is


def test_proxies_are_loaded_once_frozen_and_asked_for_what_the_run_is(pool, proxies, monkeypatch):
    import sys

    asked = []
    stand_in = sys.modules["ddfast.training.proxies"]
    inner = stand_in.load_proxies
    monkeypatch.setattr(
        stand_in,
        "load_proxies",
        lambda folder, **given: asked.append((folder, given)) or inner(folder, **given),
    )
    method, context = dm(proxy_arch="resnet18_in"), context_of(3)
    method.open(context)
    distilled(method, pool, context, steps=2)
    assert asked == [
        (
            "p",
            {
                "class_names": context.class_names,
                "image_size": 16,
                "mean": context.mean,
                "std": context.std,
                "arch": "resnet18_in",
            },
        )
    ]
    assert not any(p.requires_grad for proxy in proxies for p in proxy.parameters())
    assert not any(p.grad is not None for proxy in proxies for p in proxy.parameters())
