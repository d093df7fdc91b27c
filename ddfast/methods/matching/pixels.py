"""What all methods share that move pixels on networks: their start, what they are decoded to, and CMI.

A method writes its step, or takes the one of `Matching`. Draws are keyed by the class, or by the step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddfast.data.pool import ClassPool
from ddfast.errors import UsageError
from ddfast.methods.base import Context
from ddfast.methods.matching.cmi import Regulariser
from ddfast.methods.matching.initial import mosaics
from ddfast.methods.matching.networks import Networks
from ddfast.methods.matching.options import PixelOptions
from ddfast.methods.matching.real import all_drawn, lower, normalised, scaled, short_of, standardised
from ddfast.methods.synthesis import Group, State, Synthesis
from ddfast.models.registry import check_model
from ddfast.ops.precision import autocast
from ddfast.output.pixels import to_unit
from ddfast.seeding import generator
from ddfast.training.differentiable import DSA, Augmentation, draw_one, without_flip
from ddfast.wording import argument, plural, setting


class PixelMethod(Synthesis):
    """Base of the methods whose pixels move down a gradient that networks give.

    A method writes `make_networks` and `step`; one whose images are decoded before use, or augmented otherwise,
    overrides `factor` and `decode`, or `augmentation`.
    """

    Options: ClassVar[type] = PixelOptions
    # What CMI is a mean over: the images of the run, or those of a class, summed over classes ("class").
    cmi_reduction: ClassVar[str] = "mean"
    mixed_by: ClassVar[str] = "nearest"  # how real images are shrunk where a start mixes them

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._regulariser: Regulariser | None = None
        self._opened = False

    @cached_property
    def networks(self) -> Networks:
        """What the steps compare images on."""
        return self.make_networks()

    @abstractmethod
    def make_networks(self) -> Networks:
        """The networks that images are compared on."""

    def decode(self, pixels: Tensor) -> Tensor:
        """Images [N * factor ** 2, 3, H, W] of pixels [N, 3, H, W], in the same space and order; differentiable."""
        return pixels

    def found(
        self, number: int, network: nn.Module, pixels: Tensor, classes: Sequence[int], context: Context
    ) -> dict[str, Tensor]:
        """What `formed` has to know in a step, tensors on the device by name: nothing.

        Args:
            number: of the step.
            network: of the step.
            pixels: [N, 3, H, W], class by class, without a gradient.
            classes: their labels.
            context: of the run.
        """
        return {}

    def formed(self, images: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """What a step takes of decoded images [C, n, 3, H, W]: these, and what is made of them, [C, m, 3, H, W].

        Args:
            images: normalised, class by class; they are differentiated through.
            known: of `found`.
        """
        return images

    def for_proxies(self, images: Tensor, context: Context) -> Tensor:
        """What CMI's proxies take of the images that `formed` gives: these, normalised, as the proxies were trained."""
        return images

    def augmentation(self, size: tuple[int, int], draws: torch.Generator, rows: int = 1) -> Augmentation:
        """What the images of a class go through in a step, the real and the synthetic ones: DSA with one operation.

        Args:
            size: (height, width) in pixels.
            draws: of the class and the step.
            rows: images that get parameters of their own; 1 for one set that all images share.
        """
        operations = DSA if self.options.flip else without_flip(DSA)
        return draw_one(operations, rows, size, draws)

    def proxy_number(self, number: int) -> int:
        """Which draw of a proxy a step uses: one of its own."""
        return number

    def check(self, image_size: int | None) -> None:
        """Refuse an architecture that does not exist, or does not take images of that size."""
        check_model(self.options.arch, image_size)
        if self.options.proxy_arch is not None:
            check_model(self.options.proxy_arch, image_size, what=f"{argument('proxy_arch')}: ")

    def check_pool(self, counts: Tensor, class_names: Sequence[str], ipc: int) -> None:
        """Refuse a class that has fewer images than the start takes."""
        needed, least = self._begun_with(ipc), int(counts.min())
        if few := short_of(needed, counts, class_names):
            raise UsageError(
                f"{setting('init', self.options.init)} begins with {plural(needed, 'different image')} of a class, "
                f"but {few}: " + lower("ipc", ipc * least // needed, f"take {setting('init', 'noise')}")
            )

    def check_ipc(self, ipc: int) -> None:
        """Refuse CMI on single images."""
        if self.options.cmi and ipc * self.factor**2 == 1:
            raise UsageError(
                f"CMI is 0 where a class has a single image, so {argument('cmi')} would do nothing: "
                f"give {argument('ipc')} at least 2, or leave out {argument('cmi')}"
            )

    def drawn_at_once(self, ipc: int) -> int:
        """See `Synthesis`."""
        return self._begun_with(ipc)

    def _begun_with(self, ipc: int) -> int:
        """Real images of a class that the start takes."""
        return {"real": ipc, "noise": 0, "mix": ipc * self._mixed**2}[self.options.init]

    def inputs(self) -> dict[str, Any]:
        """The proxies' files."""
        if self.options.proxies is None:
            return {}
        from ddfast.training.proxies import proxies_identity

        return {"proxies": proxies_identity(self.options.proxies)}

    def open(self, context: Context) -> None:
        """Load the proxies, once in a process, and refuse networks that do not fit."""
        if self._opened:
            return
        self._opened = True
        self.networks.check(context)
        if self.options.proxies is not None and self._regulariser is None:
            self._regulariser = Regulariser.load(self.options.proxies, self.options.proxy_arch, context)

    @property
    def _mixed(self) -> int:
        """Real images per side of an image that begins as a mix."""
        return max(2, self.factor)

    @property
    def steps(self) -> int:
        """Iterations."""
        return int(self.options.iterations)

    def begin(self, group: Group, pool: ClassPool, context: Context) -> State:
        """Pixels of the start, and no momentum."""
        begun = [self._initial(label, pool, context).to(context.device) for label in group.classes]
        pixels = torch.cat(begun)
        return State(group, {"pixels": pixels, "momentum": torch.zeros_like(pixels)})

    def _initial(self, label: int, pool: ClassPool, context: Context) -> Tensor:
        """[ipc, 3, S, S], float32."""
        draws = generator(context.seed, "init", label)
        if self.options.init == "noise":
            noise = torch.randn(context.ipc, 3, context.image_size, context.image_size, generator=draws)
            if self.space == "unit":
                return to_unit(noise, context.mean, context.std, "normalized")
            return noise
        tiles = self._mixed if self.options.init == "mix" else 1
        drawn = all_drawn(pool, label, context.ipc * tiles**2, draws, context, "ipc", divisor=tiles**2)
        begun = mosaics(drawn, tiles, self.mixed_by) if tiles > 1 else drawn
        return normalised(begun, context) if self.space == "normalized" else scaled(begun, context)

    def close(self) -> None:
        """Give back the memory of what was recorded on a GPU."""
        self.networks.close()
        if self._regulariser is not None:
            self._regulariser.close()

    def decoded(self, pixels: Tensor, context: Context) -> Tensor:
        """Normalised images [N * factor ** 2, 3, H, W] of pixels [N, 3, H, W], class by class; differentiable."""
        images = self.decode(pixels)
        return images if self.space == "normalized" else standardised(images, context)

    def _by_class(self, pixels: Tensor, classes: int, context: Context) -> Tensor:
        """[C, n, 3, H, W]"""
        return self.decoded(pixels, context).unflatten(0, (classes, -1))

    def _regularise(
        self,
        number: int,
        network: nn.Module,
        group: Group,
        pixels: Tensor,
        context: Context,
        measured: dict[str, Tensor],
    ) -> Tensor | None:
        """The gradient of lambda * CMI in the pixels where it acts in this step; what was measured joins `measured`."""
        acts = self.options.cmi > 0 and number % self.options.cmi_every == 0
        if self._regulariser is None or not (acts or self.is_noted(number)):
            return None
        pixels = pixels.detach().requires_grad_()
        with autocast(context.precision, context.device):
            found = self.found(number, network, pixels.detach(), group.classes, context)
            formed = self.formed(self._by_class(pixels, len(group.classes), context), found)
            formed = self.for_proxies(formed, context)
            measured["cmi"], gradient = self._regulariser.value_and_gradient(
                formed, self.proxy_number(number), context.seed, wanted=acts
            )
        if gradient is None:
            return None
        # The value is a mean over the images of the group, which has its share of the run's.
        share = 1.0 if self.cmi_reduction == "class" else 1 / context.classes
        weight = self.options.cmi * len(group.classes) * share
        (pulled,) = torch.autograd.grad(formed, pixels, weight * gradient)
        measured["cmi_gradient_norm"] = torch.linalg.vector_norm(pulled)
        return pulled

    def _checked(self, number: int, measured: dict[str, Tensor], moved: Tensor) -> dict[str, float]:
        """See `Synthesis.finite`."""
        lower = [f"{argument('lr_img')}, now {self.options.lr_img:g}"]
        lower += [
            f"{argument(name)}, now {getattr(self.options, name):g}"
            for name in ("cmi", "cfc")
            if getattr(self.options, name, 0)
        ]
        return self.finite(number, measured, moved, CALLED, f"lower {', or '.join(lower)}")


CALLED = {
    "loss": "the loss",
    "gradient_norm": "the loss's gradient",
    "cmi": "CMI",
    "cmi_gradient_norm": "CMI's gradient",
    "cfc": "the contrastive loss",
    "cfc_gradient_norm": "the contrastive loss's gradient",
    "pixel_variance": "the variance of the pixels",
    "made": "the pixels",
}
