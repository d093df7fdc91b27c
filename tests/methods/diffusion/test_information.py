"""What images tell, against the paper's formulas in float64, and its gradient, whole and in pieces."""

import math

import pytest
import torch
from torch import nn

from ddfast.methods.diffusion.information import information

CLASSES, EACH, TAU = 3, 5, 0.5


@pytest.fixture
def read():
    torch.manual_seed(0)
    project = nn.Sequential(nn.Linear(12, 7), nn.Softplus(), nn.Linear(7, 6)).double()
    classify = nn.Linear(12, 4).double()

    def read(samples):
        flat = samples.flatten(1)
        return nn.functional.normalize(project(flat), dim=1), classify(flat)

    return read


@pytest.fixture
def samples():
    return torch.randn(
        CLASSES * EACH, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


LABELS = torch.arange(CLASSES).repeat_interleave(EACH)
PLACES = [2, 0, 3]  # the run's classes among the estimator's four


def by_hand(read, samples, beta):
    """Sum over the images of log q(y | y^) + beta KL(H || Q), and both means, image by image."""
    projections, logits = read(samples)
    spread, certain = [], []
    for label in range(CLASSES):
        rows = torch.arange(label * EACH, (label + 1) * EACH)
        probabilities = torch.softmax(projections[rows] / TAU, dim=1)
        centre = sum(probabilities) / EACH
        for row, p in zip(rows, probabilities, strict=True):
            spread.append((p * (p.log() - centre.log())).sum())
            of_run = logits[row][PLACES]
            certain.append(of_run[label] - of_run.exp().sum().log())
    return sum(certain) + beta * sum(spread), sum(certain) / len(samples), sum(spread) / len(samples)


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("rows", [100, 4, 1])
def test_value_and_gradient_are_the_papers(read, samples, beta, rows):
    leaf = samples.clone().requires_grad_()
    total, certain, spread = by_hand(read, leaf, beta)
    (wanted,) = torch.autograd.grad(total, leaf)
    found = information(read, samples, LABELS, PLACES, beta=beta, tau=TAU, rows=rows)
    torch.testing.assert_close(found.prototype, math.log(CLASSES) + certain.detach())
    torch.testing.assert_close(found.context, spread.detach())
    torch.testing.assert_close(found.gradient, wanted)
    assert not samples.requires_grad
    assert wanted.abs().max() > 1e-4


def test_without_a_gradient_nothing_is_recorded(read, samples):
    found = information(read, samples, LABELS, PLACES, beta=1.0, tau=TAU, rows=4, wanted=False)
    assert found.gradient is None
    assert not found.prototype.requires_grad


def test_one_image_a_class_has_no_context(read, samples):
    one = information(read, samples[::EACH], torch.arange(3), PLACES, beta=1.0, tau=TAU, rows=100)
    alone = information(read, samples[::EACH], torch.arange(3), PLACES, beta=0.0, tau=TAU, rows=100)
    assert abs(float(one.context)) < 1e-12
    torch.testing.assert_close(one.gradient, alone.gradient)


def test_images_of_a_class_count_together(read, samples):
    """The gradient of one image depends on the others of its class, and on none of another class."""
    moved = samples.clone()
    moved[1] += 1.0
    grads = [
        information(read, x, LABELS, PLACES, beta=1.0, tau=TAU, rows=4).gradient for x in (samples, moved)
    ]
    changed = (grads[0] - grads[1]).flatten(1).abs().amax(dim=1) > 1e-9
    assert changed[:EACH].all()
    assert not changed[EACH:].any()
