"""What the formulas of matching methods share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddfast.models.registry import features

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


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """Sum of squared differences, a scalar."""
    return (first - second).square().sum()


def _sees_the_batch(network: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) and module.training for module in network.modules())
