"""DSA: gradient matching on images that are augmented alike.

Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ddfast.methods.matching.base import Matching
from ddfast.methods.matching.dc import DC, DCOptions
from ddfast.methods.matching.options import begins_with
from ddfast.methods.matching.trained import Augment
from ddfast.training.differentiable import Augmentation


@dataclass(frozen=True)
class DSAOptions(DCOptions):
    """Options of DSA."""

    augments: ClassVar[bool] = True

    init: str = begins_with("real")


class DSA(DC):
    """Gradient matching with siamese augmentation. The defaults are those of its authors' code."""

    name = "dsa"
    summary = "DC on real and synthetic images that are augmented alike (DSA, ICML 2021)"
    Options: ClassVar[type] = DSAOptions
    protocol: ClassVar[str] = "dsa"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "svhn": {"flip": False},
        "tiny_imagenet": {"arch": "convnet4_in"},
        # With the CMI regulariser; lambda is that of its authors' code. Each needs `proxies`.
        "cifar10_ipc10_cmi": {"cmi": 50000.0},
        "cifar10_ipc50_cmi": {"cmi": 10000.0},
        "cifar100_ipc10_cmi": {"cmi": 80000.0},
        "cifar100_ipc50_cmi": {"cmi": 20000.0},
        "svhn_ipc10_cmi": {"cmi": 80000.0, "flip": False},
        "svhn_ipc50_cmi": {"cmi": 10000.0, "flip": False},
    }

    def augmentation(self, size: tuple[int, int], draws: torch.Generator, rows: int = 1) -> Augmentation:
        """The same operation with the same parameters for all images of a class, real and synthetic (Eq. 5)."""
        return Matching.augmentation(self, size, draws, rows)

    def training(self) -> Augment | None:
        """What the images that networks train on go through: an operation for the batch, drawn anew for each image."""
        return lambda images, draws: self.augmentation(
            (images.shape[-2], images.shape[-1]), draws, len(images)
        )(images)
