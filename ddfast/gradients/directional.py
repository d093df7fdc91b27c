"""The derivative of a gradient along a direction: what unrolled training and gradient matching are made of.

With g = d loss / d weights and a direction v among the weights, the gradient of the number <g, v> in the weights is
the Hessian times v, and its gradient in the images is how d loss / d images changes as the weights move along v. Where
a distance D compares g with another gradient, v = dD/dg makes of it the gradient of D in the images.

    gradients = differentiable_gradients(loss, weights)
    found = along(gradients, direction, [*weights, images])

Both passes run in reverse (a backward pass of the backward pass). Forward mode over reverse mode takes as many products
of every layer, nine, but computes the two tangents of each apart, has no rule for GroupNorm's backward pass nor for
fused ops, and took 1.1 times as long on a ConvNet whose norm was made of operations that have one (1.7 times as long as
this on PyTorch's norm; 50 images of 32 px, one thread): `python -m bench directional` compares them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def differentiable_gradients(loss: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """d loss / d weights with the graph that `along` goes back through; zeros for weights that are of no use.

    Args:
        loss: scalar.
        weights: which it depends on, each of which requires gradients.
    """
    found = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True, materialize_grads=True)
    return tuple(found)


def along(
    gradients: Sequence[Tensor], direction: Sequence[Tensor], wanted: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradient of sum(<gradients, direction>) in the tensors `wanted`; zeros where it does not depend on one.

    The graph of the gradients is used up.

    Args:
        gradients: of `differentiable_gradients`.
        direction: a tensor like each of them. No gradient flows into it.
        wanted: weights, images or labels that the loss was computed from.

    Returns:
        A tensor like each of `wanted`.
    """
    pairs = [(g, v.detach()) for g, v in zip(gradients, direction, strict=True) if g.requires_grad]
    if not pairs or not wanted:
        return tuple(torch.zeros_like(tensor) for tensor in wanted)
    curved, directions = zip(*pairs, strict=True)
    found = torch.autograd.grad(curved, wanted, directions, allow_unused=True, materialize_grads=True)
    return tuple(found)


def inner(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """<first, second> over all tensors, added up in float64: a scalar without a graph, on their device."""
    products = [
        (a.detach() * b.detach()).sum(dtype=torch.float64) for a, b in zip(first, second, strict=True)
    ]
    return torch.stack(products).sum()
