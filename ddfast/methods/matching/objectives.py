"""What the formulas of matching methods share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from ddfast.models.registry import features
from ddfast.ops._convnet import differentiable_in_images

MICRO_BATCH = 256
"""Images that go through a network at once, at most, where no gradient is wanted."""


def class_means(network: nn.Module, images: Tensor) -> Tensor:
    """Mean penultimate feature of each class, float32 [C, F] (float64 for float64), of images [C, n, 3, H, W].

    All classes go through the network in one pass. Under `torch.no_grad` they go in pieces, which bounds the memory,
    but for a network with BatchNorm, in which the batch decides what becomes of an image. With InstanceNorm, which
    treats images apart, either gives the bits of a pass for each class.
    """
    if torch.is_grad_enabled() or _sees_the_batch(network):
        return _means(features(network, images.flatten(0, 1)), images)
    classes = max(1, MICRO_BATCH // images.shape[1])
    return torch.cat([_means(_in_pieces(network, some), some) for some in images.split(classes)])


def _in_pieces(network: nn.Module, images: Tensor) -> Tensor:
    pieces = images.flatten(0, 1).split(MICRO_BATCH)
    return torch.cat([features(network, piece) for piece in pieces])


def _means(found: Tensor, images: Tensor) -> Tensor:
    """Means over the images of a class, of features that may come in half precision."""
    found = found if found.dtype == torch.float64 else found.float()
    return found.unflatten(0, images.shape[:2]).mean(dim=1)


def weight_gradients(
    network: nn.Module, images: Tensor, label: Tensor, *, differentiable: bool = False
) -> list[Tensor]:
    """Gradients of the mean cross-entropy of images of one class, in the network's weights, biases and norms left out.

    Args:
        network: what it computes is differentiated; its own parameters get no gradient, not from the result either.
        images: [n, 3, H, W].
        label: of all of them, an int64 scalar.
        differentiable: in the images.

    Returns:
        a tensor for each parameter of two or more dimensions, in the network's order.
    """
    # Leaves of this call alone, so that nobody can ask the result for gradients in the weights.
    leaves = {name: each.detach().requires_grad_(each.ndim > 1) for name, each in network.named_parameters()}
    logits = functional_call(network, leaves, (images,))
    loss = F.cross_entropy(logits, label.expand(len(images)))
    weights = [leaf for leaf in leaves.values() if leaf.requires_grad]
    with differentiable_in_images() if differentiable else nullcontext():
        return list(torch.autograd.grad(loss, weights, create_graph=differentiable))


def gradient_distance(
    distance: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
    network: nn.Module,
    real: Tensor,
    synthetic: Tensor,
    labels: Tensor,
    *,
    least_dimensions: int = 2,
) -> Tensor:
    """sum_c D(grad_theta CE(S_c), grad_theta CE(B_c)), a scalar, differentiable in the synthetic images (DC, Eq. 9).

    Args:
        distance: D, of the gradients of one class.
        network, real, synthetic, labels: as `Matching.loss`.
        least_dimensions: of the weights that count; 4 for convolutions alone.
    """

    def counted(gradients: list[Tensor]) -> list[Tensor]:
        return [gradient for gradient in gradients if gradient.ndim >= least_dimensions]

    total = synthetic.new_zeros(())
    for images, made, label in zip(real, synthetic.unbind(), labels, strict=True):
        wanted = counted(weight_gradients(network, images, label))
        found = counted(weight_gradients(network, made, label, differentiable=True))
        total = total + distance(found, wanted)
    return total


def row_distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Sum over the layers, and the rows of a layer, of 1 - cosine: a row holds the weights of one output (DC, Eq. 10).

    The cosine's denominator has 1e-6 added, as the authors' code has it.
    """
    total = found[0].new_zeros(())
    for one, other in zip(found, wanted, strict=True):
        a, b = one.flatten(1), other.flatten(1)
        norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
        total = total + (1 - (a * b).sum(1) / (norms + 1e-6)).sum()
    return total


def cosine_distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """1 - cosine of all layers as one vector; 1e-6 as in `row_distance`."""
    a, b = (torch.cat([each.flatten() for each in layers]) for layers in (found, wanted))
    return 1 - (a * b).sum() / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b) + 1e-6)


def summed_squares(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Sum of squared differences over all layers."""
    return torch.stack([squared_distance(a, b) for a, b in zip(found, wanted, strict=True)]).sum()


def summed_magnitudes(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Sum of absolute differences over all layers."""
    return torch.stack([(a - b).abs().sum() for a, b in zip(found, wanted, strict=True)]).sum()


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """Sum of squared differences, a scalar."""
    return (first - second).square().sum()


def _sees_the_batch(network: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) and module.training for module in network.modules())
