"""DC: synthetic images whose gradients of a network's weights are those of real ones, while the network trains on them.

Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching", ICLR 2021.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddfast.arguments import one_of, positive_number, whole_number
from ddfast.errors import UsageError
from ddfast.methods.matching.base import Matching
from ddfast.methods.matching.networks import Networks
from ddfast.methods.matching.objectives import (
    cosine_distance,
    gradient_distance,
    row_distance,
    summed_squares,
)
from ddfast.methods.matching.options import MatchingOptions, begins_with, number_or_auto
from ddfast.methods.matching.trained import Augment, Descent, OnSynthetic
from ddfast.settings import option
from ddfast.training.differentiable import Augmentation, DrawnTogether
from ddfast.wording import setting

DISTANCES = {"rows": row_distance, "squares": summed_squares, "cosine": cosine_distance}

# (steps of the pixels on a network, epochs of it after each) by images per class, from the authors' code; between them
# the next smaller one counts.
_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


@dataclass(frozen=True)
class DCOptions(MatchingOptions):
    """Options of DC and DSA."""

    augments: ClassVar[bool] = False

    iterations: int = option(1000, "new networks that the pixels are matched on", stage="synthesize")
    init: str = begins_with("noise")
    lr_img: float = option(0.1, "learning rate of the pixels", stage="synthesize")
    outer_loop: int | str = option(
        "auto",
        "steps of the pixels on a network; auto: 10 at 10 images per class",
        stage="synthesize",
        type=str,
        metavar="N",
        check=number_or_auto,
    )
    inner_loop: int | str = option(
        "auto",
        "epochs that a network trains on the synthetic images between two steps; auto: 50 at 10 images per class",
        stage="synthesize",
        type=str,
        metavar="N",
        check=number_or_auto,
    )
    lr_net: float = option(0.01, "learning rate of the networks", stage="synthesize")
    net_batch: int = option(256, "synthetic images in a step of a network", stage="synthesize")
    distance: str = option(
        "rows",
        "of gradients: 1 - cosine of each output's weights, summed; squared differences; 1 - cosine of all",
        stage="synthesize",
        choices=tuple(DISTANCES),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("outer_loop", "inner_loop"):
            self._set(name, number_or_auto(getattr(self, name), name))
        self._set("lr_net", positive_number(self.lr_net, "lr_net"))
        self._set("net_batch", whole_number(self.net_batch, "net_batch", least=1))
        one_of(self.distance, "distance", tuple(DISTANCES))
        if not (self.flip or self.augments):
            raise UsageError(
                f"{setting('flip', False)} is of no use to dc, which augments nothing: leave it out, or take dsa"
            )


class DC(Matching):
    """Gradient matching. The defaults are those of its authors' code."""

    name = "dc"
    summary = "synthetic images whose weight gradients are those of real ones, on networks in training (DC, ICLR 2021)"
    Options: ClassVar[type] = DCOptions
    joint: ClassVar[bool] = True
    protocol: ClassVar[str] = "dc"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny_imagenet": {"arch": "convnet4_in"},
        # With the CMI regulariser; lambda is that of its authors' code. Each needs `proxies`.
        "cifar10_ipc10_cmi": {"cmi": 50000.0},
        "cifar10_ipc50_cmi": {"cmi": 10000.0},
    }

    def resolved(self, factor: int, ipc: int) -> DC:
        """Fix the loops for this number of images per class."""
        outer, inner = next(loops for least, loops in reversed(_LOOPS.items()) if least <= ipc)
        found = {"outer_loop": outer, "inner_loop": inner}
        left = {name: value for name, value in found.items() if getattr(self.options, name) == "auto"}
        return type(self)(dataclasses.replace(self.options, **left)) if left else self

    def make_networks(self) -> Networks:
        """A new network every `outer_loop` steps, which trains on the synthetic images in between (Algorithm 1)."""
        options = self.options
        descent = Descent(options.lr_net)
        return OnSynthetic(
            options.arch,
            options.outer_loop,
            options.inner_loop,
            options.net_batch,
            descent,
            self.decoded,
            self.training(),
        )

    def proxy_number(self, number: int) -> int:
        """A proxy stays as long as a network."""
        return number // int(self.options.outer_loop)

    @property
    def steps(self) -> int:
        """Steps of the pixels on all networks."""
        return int(self.options.iterations) * int(self.options.outer_loop)

    def augmentation(self, size: tuple[int, int], draws: torch.Generator, rows: int = 1) -> Augmentation:
        """None."""
        return DrawnTogether(())

    def training(self) -> Augment | None:
        """What the images that networks train on go through: nothing."""
        return None

    def loss(self, network: nn.Module, real: Tensor, synthetic: Tensor, labels: Tensor) -> Tensor:
        """sum_c D(grad_theta CE(S_c), grad_theta CE(B_c)) (Eqs. 9 and 10)."""
        return gradient_distance(DISTANCES[self.options.distance], network, real, synthetic, labels)
