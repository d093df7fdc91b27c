"""DM: synthetic images whose mean features are those of real ones, over random networks.

Zhao and Bilen, "Dataset Condensation with Distribution Matching", WACV 2023.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddfast.methods.matching.base import Matching
from ddfast.methods.matching.networks import Fresh, Networks
from ddfast.methods.matching.objectives import class_means, squared_distance


class DM(Matching):
    """Distribution matching. The defaults of `MatchingOptions` are those of its authors' code."""

    name = "dm"
    summary = (
        "synthetic images whose mean features are those of real ones, over random networks (DM, WACV 2023)"
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar10_ipc1": {"lr_img": 1.0},
        "cifar10_ipc10": {"lr_img": 1.0},
        "cifar10_ipc50": {"lr_img": 1.0},
        "cifar10_ipc100": {"lr_img": 10.0},
        "cifar100_ipc1": {"lr_img": 1.0},
        "cifar100_ipc10": {"lr_img": 1.0},
        "cifar100_ipc50": {"lr_img": 1.0},
        "svhn_ipc1": {"lr_img": 1.0, "flip": False},
        "svhn_ipc10": {"lr_img": 1.0, "flip": False},
        "svhn_ipc50": {"lr_img": 1.0, "flip": False},
        "tiny_imagenet": {"arch": "convnet4_in", "lr_img": 1.0},
        # With the CMI regulariser; lambda is that of its authors' code. Each needs `proxies`.
        "cifar10_ipc10_cmi": {"cmi": 8000.0},
        "cifar10_ipc50_cmi": {"cmi": 2000.0},
        "cifar100_ipc10_cmi": {"cmi": 2000.0},
        "cifar100_ipc50_cmi": {"cmi": 500.0},
        "svhn_ipc10_cmi": {"cmi": 18000.0, "flip": False},
        "svhn_ipc50_cmi": {"cmi": 500.0, "flip": False},
    }

    def make_networks(self) -> Networks:
        """A new random network psi at every step, never trained (Algorithm 1)."""
        return Fresh(self.options.arch)

    def loss(self, network: nn.Module, real: Tensor, synthetic: Tensor, labels: Tensor) -> Tensor:
        """sum_c || 1/|B_c| sum_x psi(A(x, w_c)) - 1/|S_c| sum_s psi(A(s, w_c)) ||^2 (Algorithm 1)."""
        with torch.no_grad():
            wanted = class_means(network, real)
        return squared_distance(class_means(network, synthetic), wanted)
