"""What a set of images tells: I(X; Y) and H(X | Y) of an estimator, and the gradient of I + beta H in the images.

IGDS, Section 3.1, as bounds from below, in nats, over C classes of n images each:

    I(X; Y)  >= H(Y) + E log q(Y | Y^)     q by the estimator's classifier, on the features X^
    H(X | Y) >= E KL(H_X || Q^Y)           H_X = softmax(X^ / tau) of the projection, Q^y its mean over class y

All images of a class count together, by Q. They go through the estimator in pieces all the same: what a piece's rows
add to the gradient is known once the features of all are, in closed form (`ddfast.cmi`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddfast.information import cmi

Read = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Samples [B, ...] to projections [B, D] and logits [B, C'], float32, differentiable."""


@dataclass(frozen=True)
class Information:
    """What was measured, in nats: scalars on the samples' device.

    Attributes:
        prototype: I(X; Y), a mean over the images.
        context: H(X | Y), a mean over the images.
        gradient: of the sum over the images of both, the second times beta; as the samples, None where not wanted.
    """

    prototype: Tensor
    context: Tensor
    gradient: Tensor | None


def information(
    read: Read,
    samples: Tensor,
    labels: Tensor,
    places: Sequence[int],
    *,
    beta: float,
    tau: float,
    rows: int,
    wanted: bool = True,
) -> Information:
    """I(X; Y) + beta H(X | Y) of samples, and its gradient.

    Args:
        read: the estimator.
        samples: [N, ...], in whatever space `read` takes.
        labels: int64 [N], the class of each among `places`.
        places: the logits of the run's C classes.
        beta: weight of H(X | Y).
        tau: temperature of its softmax.
        rows: samples that go through the estimator at once: what bounds the memory. Q stays that of all.
        wanted: whether the gradient is.
    """
    if not wanted or len(samples) <= rows:
        with torch.set_grad_enabled(wanted):
            leaf = samples.detach().requires_grad_(wanted)
            parts = [read(piece) for piece in leaf.split(rows)]
            prototype, context, total = _summed(parts, labels, places, beta, tau)
        gradient = torch.autograd.grad(total, leaf)[0] if wanted else None
        return Information(prototype, context, gradient)
    pieces = samples.detach().split(rows)
    with torch.no_grad():
        found = [read(piece) for piece in pieces]
    with torch.enable_grad():
        seen = [tuple(each.detach().requires_grad_() for each in part) for part in found]
        prototype, context, total = _summed([(one, two) for one, two in seen], labels, places, beta, tau)
        pulled = torch.autograd.grad(total, [each for part in seen for each in part])
        gradients = []
        for place, piece in enumerate(pieces):
            leaf = piece.clone().requires_grad_()
            gradients.append(torch.autograd.grad(read(leaf), leaf, pulled[2 * place : 2 * place + 2])[0])
    return Information(prototype, context, torch.cat(gradients))


def _summed(
    parts: Sequence[tuple[Tensor, Tensor]], labels: Tensor, places: Sequence[int], beta: float, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """I(X; Y), H(X | Y), and what is differentiated: the sum over the images of log q + beta KL."""
    projections = torch.cat([part[0] for part in parts])
    logits = torch.cat([part[1] for part in parts])[:, list(places)]
    certain = logits.log_softmax(dim=1).gather(1, labels[:, None]).mean()
    context = cmi(projections / tau, labels)
    prototype = math.log(len(places)) + certain.detach()  # H(Y): classes are as large as each other
    return prototype, context.detach(), len(labels) * (certain + beta * context)
