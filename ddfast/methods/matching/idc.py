"""IDC: gradient matching of images that each decode to several, on networks that train on real images.

Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization", ICML 2022.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddfast.arguments import one_of, positive_number, whole_number
from ddfast.data.tiles import enlarged_tiles
from ddfast.methods.base import Context
from ddfast.methods.matching.base import Matching
from ddfast.methods.matching.initial import INITIAL
from ddfast.methods.matching.networks import Networks
from ddfast.methods.matching.objectives import (
    gradient_distance,
    row_distance,
    summed_magnitudes,
    summed_squares,
)
from ddfast.methods.matching.options import MatchingOptions, begins_with
from ddfast.methods.matching.trained import Descent, OnReal
from ddfast.methods.synthesis import State
from ddfast.output.pixels import SPACES, to_unit
from ddfast.settings import option
from ddfast.training.differentiable import IDC_MATCHING, IDC_TRAINING, Augmentation, draw_idc

DISTANCES = {"squares": summed_squares, "magnitudes": summed_magnitudes, "rows": row_distance}


@dataclass(frozen=True)
class IDCOptions(MatchingOptions):
    """Options of IDC."""

    iterations: int = option(2000, "new networks that the pixels are matched on", stage="synthesize")
    real_batch: int = option(64, "real images of a class in a step", stage="synthesize")
    init: str = begins_with(
        "auto", help="; auto: the mix, and real ones where an image is one tile", choices=("auto", *INITIAL)
    )
    lr_img: float = option(
        0.005,
        "learning rate of the pixels for 10 images per class of 32 px; others get their share by number and area",
        stage="synthesize",
    )
    flip: bool = option(
        False, "mirror images among the augmentations, which digits do not bear", stage="synthesize"
    )
    inner_loop: int = option(100, "steps of the pixels on a network", stage="synthesize")
    net_samples: int = option(
        2000, "real images that a network trains on between two steps", stage="synthesize"
    )
    net_batch: int = option(64, "real images in a step of a network", stage="synthesize")
    net_epochs: int = option(
        0,
        "epochs on the real images that a network trains for before the first step on it",
        stage="synthesize",
    )
    lr_net: float = option(0.01, "learning rate of the networks", stage="synthesize")
    distance: str = option(
        "squares",
        "of gradients: squared differences; absolute ones; 1 - cosine of each output's weights; each summed",
        stage="synthesize",
        choices=tuple(DISTANCES),
    )
    proxy_input: str = option(
        "normalized",
        "images that the proxies of --cmi take: normalised as they were trained, or in [0, 1] as the authors of CMI "
        "have it",
        stage="synthesize",
        choices=SPACES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("inner_loop", "net_samples", "net_batch"):
            self._set(name, whole_number(getattr(self, name), name, least=1))
        self._set("net_epochs", whole_number(self.net_epochs, "net_epochs", least=0))
        self._set("lr_net", positive_number(self.lr_net, "lr_net"))
        one_of(self.distance, "distance", tuple(DISTANCES))
        one_of(self.proxy_input, "proxy_input", SPACES)
        self._check_use("proxy_input", "normalized", "proxies")


class IDC(Matching):
    """Efficient parameterization. The defaults are those of its authors' code on CIFAR-10."""

    name = "idc"
    summary = "gradient matching of images that decode to 2 x 2, on networks that train on real ones (IDC, ICML 2022)"
    Options: ClassVar[type] = IDCOptions
    joint: ClassVar[bool] = True
    protocol: ClassVar[str] = "idc"
    space: ClassVar[str] = "unit"
    factor = 2
    factors: ClassVar[tuple[int, ...]] = (2, 1)
    pads: ClassVar[bool] = True
    steps_by_class: ClassVar[bool] = True
    synthetic_batch: ClassVar[int | None] = 128
    cmi_reduction: ClassVar[str] = "class"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "svhn": {"net_samples": 500},
        "fashion_mnist": {"distance": "magnitudes", "lr_img": 1e-4, "net_samples": 500},
        "tiny_imagenet": {"arch": "convnet4_in", "net_samples": 1000},
        "tiny_imagenet_ipc50": {"arch": "convnet4_in", "net_samples": 1000, "lr_img": 1e-6},
        # Their rate is for 224 px, which `rate` scales by the area.
        "imagenet10": {
            "arch": "resnetap10",
            "iterations": 500,
            "distance": "magnitudes",
            "lr_img": 0.003 / 49,
            "net_samples": 500,
            "net_epochs": 10,
        },
        # With the CMI regulariser; lambda is that of its authors' code. Each needs `proxies`.
        "cifar10_ipc10_cmi": {"cmi": 100.0},
        "cifar10_ipc50_cmi": {"cmi": 50.0},
        "cifar100_ipc10_cmi": {"cmi": 100.0},
        "cifar100_ipc50_cmi": {"cmi": 50.0},
        "svhn_ipc10_cmi": {"cmi": 50.0, "net_samples": 500},
        "svhn_ipc50_cmi": {"cmi": 50.0, "net_samples": 500},
    }

    def resolved(self, factor: int, ipc: int) -> IDC:
        """Fix the tiles per side, and what images of so many begin with."""
        begun = "mix" if factor > 1 else "real"
        left = self.options.init == "auto"
        chosen = type(self)(dataclasses.replace(self.options, init=begun)) if left else copy.copy(self)
        chosen.factor = factor
        return chosen

    def make_networks(self) -> Networks:
        """A new network every `inner_loop` steps, which trains on real images after each (Algorithm 1)."""
        options = self.options
        descent = Descent(options.lr_net, momentum=0.9, weight_decay=5e-4)
        return OnReal(
            options.arch,
            options.inner_loop,
            options.net_samples,
            options.net_batch,
            descent,
            self._for_training,
            options.net_epochs,
        )

    @property
    def steps(self) -> int:
        """Steps of the pixels on all networks."""
        return int(self.options.iterations) * int(self.options.inner_loop)

    def rate(self, number: int, context: Context) -> float:
        """Learning rate of the pixels: in proportion to the images per class and to their area."""
        return float(self.options.lr_img) * (context.ipc / 10) * (context.image_size / 32) ** 2

    def bounded(self, number: int, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] whenever a network is new."""
        return pixels.clamp(0, 1) if number % int(self.options.inner_loop) == 0 else pixels

    def images(self, state: State) -> Tensor:
        """What students train on, in [0, 1]."""
        return state.pixels.clamp(0, 1)

    def decode(self, pixels: Tensor) -> Tensor:
        """Every tile, enlarged to a whole image (Sec. 4.1: uniform multi-formation)."""
        return pixels if self.factor == 1 else enlarged_tiles(pixels, self.factor, 0.5)

    def for_proxies(self, images: Tensor, context: Context) -> Tensor:
        """Normalised images, or those in [0, 1]."""
        if self.options.proxy_input == "normalized":
            return images
        return to_unit(images, context.mean, context.std, "normalized")

    def augmentation(self, size: tuple[int, int], draws: torch.Generator, rows: int = 1) -> Augmentation:
        """Colours, a shift and a cutout, the same for all images of a class, real and synthetic."""
        return draw_idc(self._listed(IDC_MATCHING), rows, size, draws)

    def _for_training(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """Colours and a shift for each image: CutMix takes the place of the cutout."""
        size = (images.shape[-2], images.shape[-1])
        return draw_idc(self._listed(IDC_TRAINING), len(images), size, draws)(images)

    def _listed(self, operations: tuple[str, ...]) -> tuple[str, ...]:
        return ("flip", *operations) if self.options.flip else operations

    def loss(self, network: nn.Module, real: Tensor, synthetic: Tensor, labels: Tensor) -> Tensor:
        """sum_c D(grad_theta CE(A(f(S_c))), grad_theta CE(A(B_c))) over convolutions (Algorithm 1, Eq. 8)."""
        distance = DISTANCES[self.options.distance]
        return gradient_distance(distance, network, real, synthetic, labels, least_dimensions=4)
