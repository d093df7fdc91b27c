"""What the formulas of matching methods share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddfast.models.registry import features

MICRO_BATCH = 256
"""Images that go through a network at once where no gradient is wanted."""


def class_means(network: nn.Module, images: Tensor) -> Tensor:
    """Mean penultimate feature of each class, float32 [C, F] (float64 for float64), of images [C, n, 3, H, W].

    All classes go through the network in one pass; with InstanceNorm, which treats images apart, that gives the bits
    of a pass for each class. Under `torch.no_grad` the images go in pieces, which bounds the memory.
    """
    found = features_in_pieces(network, images.flatten(0, 1))
    return found.unflatten(0, images.shape[:2]).mean(dim=1)


def features_in_pieces(network: nn.Module, images: Tensor) -> Tensor:
    """Penultimate features [B, F] of images [B, 3, H, W], float32 or float64, `MICRO_BATCH` of them at a time.

    In one piece where gradients are recorded, and where the batch decides what BatchNorm makes of an image.
    """
    if torch.is_grad_enabled() or _sees_the_batch(network):
        pieces = [images]
    else:
        pieces = list(images.split(MICRO_BATCH))
    found = torch.cat([features(network, piece) for piece in pieces])
    return found if found.dtype == torch.float64 else found.float()


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """Sum of squared differences, a scalar."""
    return (first - second).square().sum()


def _sees_the_batch(network: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) and module.training for module in network.modules())
