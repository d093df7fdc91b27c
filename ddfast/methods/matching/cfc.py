"""The category-wise feature contrastive loss (CFC): features of a class near its own running mean, far from others.

Wang, Zhang and Cheng, "UDD", Sec. 2.5. An option of every matching method, as the paper adds it to IDC as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.methods.matching.objectives import class_means

TEMPERATURE = 0.7
DECAY = 0.5


def contrastive_loss(
    features: Tensor, means: Tensor, labels: Tensor, temperature: float = TEMPERATURE
) -> Tensor:
    """-log( exp(cos(f_c, F_c) / tau) / sum_{i != c} exp(cos(f_c, F_i) / tau) ) of each class c, float [C] (Eq. 7).

    The sum leaves out c itself, as printed, so that the loss may be negative.

    Args:
        features: [C, D], the mean features f_c of some classes; differentiable.
        means: [K, D], the running means F of all classes, K of 2 or more.
        labels: int64 [C], the classes' rows of `means`.
        temperature: tau.
    """
    cosines = F.normalize(features, dim=1) @ F.normalize(means, dim=1).T / temperature
    rows = labels.unsqueeze(1)
    others = cosines.scatter(1, rows, -torch.inf)
    return torch.logsumexp(others, dim=1) - cosines.gather(1, rows).squeeze(1)


def contrasted(
    network: nn.Module, synthetic: Tensor, labels: Tensor, pixels: Tensor, means: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Mean features [C, D] of images [C, n, 3, H, W], the loss summed over classes, and its gradient in the pixels.

    Loss and gradient are None where there are no running means yet. The graph from the pixels to the images is used up.
    """
    features = class_means(network, synthetic)
    if means is None:
        return features.detach(), None, None
    loss = contrastive_loss(features, means, labels).sum()
    return features.detach(), loss.detach(), torch.autograd.grad(loss, pixels)[0]


class Contrast:
    """The loss in one step, on running means of all classes that live in the state.

    The loss takes the means as they were before the step, for every class; those of the first step are its own
    features, and the loss acts from the second step on.

    Attributes:
        means: F before the step, [K, D]; None in the first.
        value: the loss, summed over the classes so far; None in the first step.
    """

    NAME: ClassVar[str] = "cfc.means"

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: of the state before the step."""
        self.means = tensors.get(self.NAME)
        self.value: Tensor | None = None
        self._found: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def add(self, features: Tensor, value: Tensor | None, gradient: Tensor | None) -> None:
        """Some classes' part, from `contrasted`."""
        self._found.append(features)
        if value is not None and gradient is not None:
            self.value = value if self.value is None else self.value + value
            self._gradients.append(gradient)

    @property
    def gradient(self) -> Tensor:
        """In the pixels of the classes so far; of none in the first step."""
        return torch.cat(self._gradients)

    def moved(self) -> dict[str, Tensor]:
        """F <- alpha F + (1 - alpha) f, once all classes were seen (Eq. 8)."""
        found = torch.cat(self._found)
        return {self.NAME: found if self.means is None else torch.lerp(found, self.means, DECAY)}
