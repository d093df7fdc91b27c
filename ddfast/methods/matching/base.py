"""The step that all matching methods share; what a method adds is its loss, and the networks it compares on.

A step draws a real batch of every class of its group, augments it as the class's synthetic images, and moves the
pixels down the gradient of the loss plus lambda times CMI; then the networks may train. Every draw is keyed by the
class and the step, or by the step alone, so that neither the grouping of the classes nor a regulariser changes one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddfast.data.pool import ClassPool
from ddfast.errors import DivergedError, UsageError
from ddfast.methods.base import Context
from ddfast.methods.matching.cfc import Contrast, contrasted
from ddfast.methods.matching.cmi import Regulariser
from ddfast.methods.matching.initial import mosaics
from ddfast.methods.matching.networks import Networks
from ddfast.methods.matching.options import MatchingOptions
from ddfast.methods.matching.real import all_drawn, lower, normalised, scaled, short_of, standardised
from ddfast.methods.synthesis import Group, State, Synthesis
from ddfast.models.registry import check_model
from ddfast.ops.graphs import Recorded
from ddfast.ops.precision import autocast
from ddfast.ops.transfer import to_device
from ddfast.output.pixels import to_unit
from ddfast.seeding import generator, seeded
from ddfast.training.differentiable import (
    DSA,
    Augmentation,
    augment_groups,
    draw_one,
    group_parameters,
)
from ddfast.wording import argument, plural, setting


class Matching(Synthesis):
    """Base of the methods that match synthetic images with real ones on networks.

    A method writes `loss` and `make_networks`; one whose images are decoded before use, or augmented otherwise,
    overrides `factor` and `decode`, or `augmentation`.
    """

    Options: ClassVar[type] = MatchingOptions
    # Whether all classes are one group, because networks are trained between the steps; a step still takes them
    # `class_batch` at a time.
    joint: ClassVar[bool] = False
    # What CMI is a mean over: the images of the run, or those of a class, summed over classes ("class").
    cmi_reduction: ClassVar[str] = "mean"
    # Whether every class has a step of the optimiser to itself, which carries the momentum of all others on as well.
    steps_by_class: ClassVar[bool] = False
    mixed_by: ClassVar[str] = "nearest"  # how real images are shrunk where a start mixes them
    synthetic_batch: ClassVar[int | None] = None  # decoded images of a class in a step, at most

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

    @abstractmethod
    def loss(self, network: nn.Module, real: Tensor, synthetic: Tensor, labels: Tensor) -> Tensor:
        """The paper's formula, summed over classes: a scalar, differentiable in `synthetic`.

        No class may change another one's share, so that classes can be grouped at will.

        Args:
            network: of the step; its parameters need no gradient unless `make_networks` says so.
            real: [C, R, 3, H, W], R images of each of C classes, normalised and augmented.
            synthetic: [C, n, 3, H, W], decoded, and augmented in the same way as the real ones of the class.
            labels: int64 [C].
        """

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

    def count_formed(self, images: int) -> int:
        """How many `formed` makes of so many of a class."""
        return images

    def augmentation(self, size: tuple[int, int], draws: torch.Generator, rows: int = 1) -> Augmentation:
        """What the real and the synthetic images of a class go through in a step: DSA with one operation for all.

        Args:
            size: (height, width) in pixels.
            draws: of the class and the step.
            rows: images that get parameters of their own; 1 for one set that all images share.
        """
        operations = DSA if self.options.flip else tuple(name for name in DSA if name != "flip")
        return draw_one(operations, rows, size, draws)

    def rate(self, number: int, context: Context) -> float:
        """Learning rate of the pixels in a step."""
        return float(self.options.lr_img)

    def proxy_number(self, number: int) -> int:
        """Which draw of a proxy a step uses: one of its own."""
        return number

    def bounded(self, number: int, pixels: Tensor) -> Tensor:
        """Pixels before a step, within the bounds that the method keeps them to."""
        return pixels

    def check(self, image_size: int | None) -> None:
        """Refuse an architecture that does not exist, or does not take images of that size."""
        check_model(self.options.arch, image_size)
        if self.options.proxy_arch is not None:
            check_model(self.options.proxy_arch, image_size, what=f"{argument('proxy_arch')}: ")

    def check_pool(self, counts: Tensor, class_names: Sequence[str], ipc: int) -> None:
        """Refuse a class that has fewer images than a step draws or the start takes, and a single class for CFC."""
        if self.options.cfc and len(class_names) < 2:
            raise UsageError(f"{argument('cfc')} tells classes apart, and there is one: set it to 0")
        batch, least = self.options.real_batch, int(counts.min())
        if few := short_of(batch, counts, class_names):
            raise UsageError(
                f"a step draws {plural(batch, 'different image')} of a class, but {few}: "
                + lower("real_batch", least, "give every class images")
            )
        needed = self._begun_with(ipc)
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
        return max(int(self.options.real_batch), self._begun_with(ipc))

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

    def groups(self, classes: int, ipc: int) -> list[Group]:
        """Consecutive classes, `class_batch` in a group; all in one where networks train or CFC compares them all."""
        if self.joint or self.options.cfc:
            return [Group(0, tuple(range(classes)))]
        starts = range(0, classes, self.options.class_batch)
        return [
            Group(number, tuple(range(start, min(start + self.options.class_batch, classes))))
            for number, start in enumerate(starts)
        ]

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

    @torch.enable_grad()
    def step(self, number: int, state: State, pool: ClassPool, context: Context) -> float:
        """See `Synthesis`. The loss that is returned is the sum over the group's classes, without CMI."""
        self.open(context)
        group = state.group
        state.tensors = {name: tensor.to(context.device) for name, tensor in state.tensors.items()}
        before = state.tensors
        network = self.networks.at(number, state, pool, context)
        pixels, velocity = self.bounded(number, state.pixels), state.tensors["momentum"]
        rate = self.rate(number, context)
        classes = torch.arange(len(group.classes), device=context.device)
        contrast = Contrast(before) if self.options.cfc else None
        if self.steps_by_class:
            pixels, velocity = self._carried_on(pixels, velocity, classes, rate)
        # Networks that draw when they are called, dropout for example, draw the same after a kill.
        with seeded(context.seed, "forward", group.number, number, device=context.device):
            measured: dict[str, Tensor] = {}
            gradient = self._gradient(number, network, group, pixels, pool, context, measured, contrast)
            cmi_gradient = self._regularise(number, network, group, pixels, context, measured)
        # SGD with momentum as torch has it.
        if cmi_gradient is not None:
            gradient = gradient + cmi_gradient
        velocity = self.options.momentum * velocity + gradient
        moved = pixels.add(velocity, alpha=-rate)
        if self.steps_by_class:
            moved, velocity = self._carried_on(moved, velocity, len(classes) - 1 - classes, rate)
        if self.is_noted(number):
            each = pixels.unflatten(0, (len(group.classes), -1))
            measured["pixel_variance"] = each.var(dim=1, correction=0).mean()
        row = self._checked(number, measured, moved)
        state.tensors = {**before, "pixels": moved, "momentum": velocity}
        if contrast is not None:
            state.tensors |= contrast.moved()
        try:
            self.networks.advance(number, state, pool, context)
        except DivergedError:
            state.tensors = before
            raise
        state.curve.append({"step": float(number), **row})
        return row["loss"]

    def _carried_on(
        self, pixels: Tensor, velocity: Tensor, steps: Tensor, rate: float
    ) -> tuple[Tensor, Tensor]:
        """Pixels and momentum of each class after the steps of so many other classes, int64 [C]: without a gradient."""
        momentum = self.options.momentum
        each = steps.to(pixels).repeat_interleave(len(pixels) // len(steps)).view(-1, 1, 1, 1)
        left = momentum**each
        return pixels - rate * velocity * (momentum * (1 - left) / (1 - momentum)), velocity * left

    def _gradient(
        self,
        number: int,
        network: nn.Module,
        group: Group,
        pixels: Tensor,
        pool: ClassPool,
        context: Context,
        measured: dict[str, Tensor],
        contrast: Contrast | None,
    ) -> Tensor:
        """The gradient of a step in the pixels, `class_batch` classes at a time, which bounds memory.

        The loss and the norm of its gradient join `measured`; those of the weighted contrast, which the gradient
        includes, as well.
        """
        loss = torch.zeros((), dtype=pixels.dtype, device=context.device)
        gradients = []
        pieces = pixels.detach().split(self.options.class_batch * (len(pixels) // len(group.classes)))
        for place, piece in enumerate(pieces):
            first = place * self.options.class_batch
            classes = group.classes[first : first + self.options.class_batch]
            draws = self._draws(number, network, piece, classes, pool, context)
            if contrast is not None:
                with seeded(context.seed, "contrast", number, place, device=context.device):
                    contrast.add(*self._contrasting(network, piece, draws, contrast.means, context))
            found, gradient = self._matching(network, piece, draws, context)
            gradients.append(gradient)
            loss = loss + found
        gradient = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
        measured |= {"loss": loss, "gradient_norm": torch.linalg.vector_norm(gradient)}
        if contrast is None or contrast.value is None:
            return gradient
        weighted = float(self.options.cfc) * contrast.gradient
        measured |= {"cfc": contrast.value, "cfc_gradient_norm": torch.linalg.vector_norm(weighted)}
        return gradient + weighted

    def close(self) -> None:
        """Give back the memory of what was recorded on a GPU."""
        for recorded in (self._matching, self._contrasting):
            recorded.forget()
        self.networks.close()
        if self._regulariser is not None:
            self._regulariser.close()

    # What follows is of tensors alone, so that a GPU records it as one CUDA graph: nothing in it draws, waits, or
    # sends anything to the device.

    @cached_property
    def _matching(self) -> Recorded:
        return Recorded(self._matched, what=f"the step of {self.name}")

    def _matched(
        self, network: nn.Module, pixels: Tensor, draws: Mapping[str, Tensor], context: Context
    ) -> tuple[Tensor, Tensor]:
        """The loss on some classes, and its gradient in their pixels."""
        pixels = pixels.detach().requires_grad_()
        with autocast(context.precision, context.device):
            synthetic = self._synthetic(pixels, draws, context)
            real = augment_groups(draws["augment"], normalised(draws["real"], context, synthetic.dtype))
            loss = self.loss(network, real, synthetic, draws["labels"])
            return loss.detach(), torch.autograd.grad(loss, pixels)[0]

    @cached_property
    def _contrasting(self) -> Recorded:
        return Recorded(self._contrasted, what=f"the contrastive loss of {self.name}")

    def _contrasted(
        self,
        network: nn.Module,
        pixels: Tensor,
        draws: Mapping[str, Tensor],
        means: Tensor | None,
        context: Context,
    ) -> tuple[Tensor | None, ...]:
        """See `contrasted`."""
        pixels = pixels.detach().requires_grad_()
        with autocast(context.precision, context.device):
            synthetic = self._synthetic(pixels, draws, context)
            return contrasted(network, synthetic, draws["labels"], pixels, means)

    def _synthetic(self, pixels: Tensor, draws: Mapping[str, Tensor], context: Context) -> Tensor:
        """Images [C, n, 3, H, W] as a step sees them: decoded, formed, drawn from and augmented."""
        formed = self.formed(self._by_class(pixels, len(draws["labels"]), context), draws)
        if "chosen" in draws:
            pairs = zip(formed.unbind(), draws["chosen"].unbind(), strict=True)
            formed = torch.stack([made[places] for made, places in pairs])
        return augment_groups(draws["augment"], formed)

    def decoded(self, pixels: Tensor, context: Context) -> Tensor:
        """Normalised images [N * factor ** 2, 3, H, W] of pixels [N, 3, H, W], class by class; differentiable."""
        images = self.decode(pixels)
        return images if self.space == "normalized" else standardised(images, context)

    def _by_class(self, pixels: Tensor, classes: int, context: Context) -> Tensor:
        """[C, n, 3, H, W]"""
        return self.decoded(pixels, context).unflatten(0, (classes, -1))

    def _draws(
        self,
        number: int,
        network: nn.Module,
        pixels: Tensor,
        classes: Sequence[int],
        pool: ClassPool,
        context: Context,
    ) -> dict[str, Tensor]:
        """What a step on some classes takes besides their pixels, sent to the device without waiting for it.

        "labels", int64 [C]; "real", uint8 [C, R, 3, H, W]; "augment", of `group_parameters`, a group a class; "chosen",
        int64 [C, n], places among the formed images, where not all of them count; and what was `found`.
        """
        size, batch = (pixels.shape[-2], pixels.shape[-1]), self.options.real_batch
        made = self.count_formed(len(pixels) // len(classes) * self.factor**2)
        real = [
            all_drawn(
                pool, label, batch, generator(context.seed, "real", label, number), context, "real_batch"
            )
            for label in classes
        ]
        augment = [
            self.augmentation(size, generator(context.seed, "augment", label, number)) for label in classes
        ]
        drawn = {
            "labels": torch.tensor(classes),
            "real": torch.stack(real),
            "augment": group_parameters(augment, size),
        }
        if self.synthetic_batch is not None and made > self.synthetic_batch:
            drawn["chosen"] = torch.stack([self._chosen(made, label, number, context) for label in classes])
        with autocast(context.precision, context.device):
            found = self.found(number, network, pixels, classes, context)
        return {name: to_device(tensor, context.device) for name, tensor in drawn.items()} | found

    def _chosen(self, made: int, label: int, number: int, context: Context) -> Tensor:
        """Places of `synthetic_batch` of the images that were made of a class, drawn anew in every step."""
        draws = generator(context.seed, "subsample", label, number)
        return torch.randperm(made, generator=draws)[: self.synthetic_batch]

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
