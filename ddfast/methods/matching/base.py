"""The step that all matching methods share; what a method adds is its loss, and the networks it compares on.

A step draws a real batch of every class of its group, augments it as the class's synthetic images, and moves the
pixels down the gradient of the loss plus lambda times CMI; then the networks may train. Every draw is keyed by the
class and the step, or by the step alone, so that neither the grouping of the classes nor a regulariser changes one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from ddfast.data.pool import ClassPool
from ddfast.errors import DivergedError, UsageError
from ddfast.methods.base import Context
from ddfast.methods.matching.cfc import Contrast, contrasted
from ddfast.methods.matching.options import MatchingOptions
from ddfast.methods.matching.pixels import PixelMethod
from ddfast.methods.matching.real import all_drawn, lower, normalised, short_of
from ddfast.methods.synthesis import Group, State
from ddfast.ops.graphs import Recorded
from ddfast.ops.precision import autocast, repeatable_convolutions
from ddfast.ops.transfer import to_device
from ddfast.seeding import generator, seeded
from ddfast.training.differentiable import augment_groups, group_parameters
from ddfast.wording import argument, plural


class Matching(PixelMethod):
    """Base of the methods that match synthetic images with real ones on networks.

    A method writes `loss` and `make_networks`; see `PixelMethod` for what else it may say.
    """

    Options: ClassVar[type] = MatchingOptions
    # Whether all classes are one group, because networks are trained between the steps; a step still takes them
    # `class_batch` at a time.
    joint: ClassVar[bool] = False
    # Whether every class has a step of the optimiser to itself, which carries the momentum of all others on as well.
    steps_by_class: ClassVar[bool] = False
    synthetic_batch: ClassVar[int | None] = None  # decoded images of a class in a step, at most

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

    def count_formed(self, images: int) -> int:
        """How many `formed` makes of so many of a class."""
        return images

    def rate(self, number: int, context: Context) -> float:
        """Learning rate of the pixels in a step."""
        return float(self.options.lr_img)

    def bounded(self, number: int, pixels: Tensor) -> Tensor:
        """Pixels before a step, within the bounds that the method keeps them to."""
        return pixels

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
        super().check_pool(counts, class_names, ipc)

    def drawn_at_once(self, ipc: int) -> int:
        """See `Synthesis`."""
        return max(int(self.options.real_batch), super().drawn_at_once(ipc))

    def groups(self, classes: int, ipc: int) -> list[Group]:
        """Consecutive classes, `class_batch` in a group; all in one where networks train or CFC compares them all."""
        if self.joint or self.options.cfc:
            return [Group(0, tuple(range(classes)))]
        starts = range(0, classes, self.options.class_batch)
        return [
            Group(number, tuple(range(start, min(start + self.options.class_batch, classes))))
            for number, start in enumerate(starts)
        ]

    @torch.enable_grad()
    @repeatable_convolutions()
    def step(self, number: int, state: State, pool: ClassPool, context: Context) -> float:
        """See `Synthesis`. The loss that is returned is the sum over the group's classes, without CMI."""
        self.open(context)
        group = state.group
        state.tensors = {name: tensor.to(context.device) for name, tensor in state.tensors.items()}
        before = state.tensors
        # Networks that draw when they are called, dropout for example, draw the same after a kill.
        with seeded(context.seed, "network forward", group.number, number, device=context.device):
            network = self.networks.at(number, state, pool, context)
        pixels, velocity = self.bounded(number, state.pixels), state.tensors["momentum"]
        rate = self.rate(number, context)
        classes = torch.arange(len(group.classes), device=context.device)
        contrast = Contrast(before) if self.options.cfc else None
        if self.steps_by_class:
            pixels, velocity = self._carried_on(pixels, velocity, classes, rate)
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
            with seeded(context.seed, "training forward", group.number, number, device=context.device):
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
        super().close()

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
