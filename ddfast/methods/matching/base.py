"""The step that all matching methods share; what a method adds is its loss, and the networks it compares on.

A step draws a real batch of every class of its group, augments it as the class's synthetic images, and moves the
pixels down the gradient of the loss plus lambda times CMI. Every draw is keyed by the class and the step, or by the
step alone, so that neither the grouping of the classes nor a regulariser changes one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddfast.data.pool import ClassPool
from ddfast.errors import DivergedError, UsageError, shown
from ddfast.methods.base import Context
from ddfast.methods.matching.cmi import Regulariser
from ddfast.methods.matching.initial import mosaics
from ddfast.methods.matching.networks import Networks
from ddfast.methods.matching.options import MatchingOptions
from ddfast.methods.synthesis import Group, State, Synthesis
from ddfast.models.registry import check_model
from ddfast.ops.precision import autocast
from ddfast.ops.transfer import to_device
from ddfast.seeding import generator, seeded
from ddfast.training.differentiable import DSA, draw_one
from ddfast.wording import argument, plural, setting

_NOTES = 10  # times in a run that variance and CMI are measured, beside the first and the last step


class Matching(Synthesis):
    """Base of the methods that match synthetic images with real ones on networks.

    A method writes `loss` and `make_networks`; one whose images are decoded before use, or augmented otherwise,
    overrides `factor` and `decode`, or `augmentation`.
    """

    Options: ClassVar[type] = MatchingOptions
    factor: ClassVar[int] = 1  # tiles per side that an image decodes to

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.networks = self.make_networks()
        self._regulariser: Regulariser | None = None

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
        """Normalised images [N * factor ** 2, 3, H, W] of pixels [N, 3, H, W], class by class; differentiable."""
        return pixels

    def augmentation(
        self, size: tuple[int, int], draws: torch.Generator, rows: int = 1
    ) -> Callable[[Tensor], Tensor]:
        """What the real and the synthetic images of a class go through in a step: DSA with one operation for all.

        Args:
            size: (height, width) in pixels.
            draws: of the class and the step.
            rows: images that get parameters of their own; 1 for one set that all images share.
        """
        operations = DSA if self.options.flip else tuple(name for name in DSA if name != "flip")
        return draw_one(operations, rows, size, draws)

    def check(self, image_size: int | None) -> None:
        """Refuse an architecture that does not exist, or does not take images of that size."""
        check_model(self.options.arch, image_size)
        if self.options.proxy_arch is not None:
            check_model(self.options.proxy_arch, image_size, what=f"{argument('proxy_arch')}: ")

    def check_pool(self, counts: Tensor, class_names: Sequence[str], ipc: int) -> None:
        """Refuse a class that has fewer images than a step draws or the start takes, and CMI on single images."""
        batch, least = self.options.real_batch, int(counts.min())
        if few := _short_of(batch, counts, class_names):
            raise UsageError(
                f"a step draws {plural(batch, 'different image')} of a class, but {few}: "
                + _lower("real_batch", least, "give every class images")
            )
        needed = self._begun_with(ipc)
        if few := _short_of(needed, counts, class_names):
            raise UsageError(
                f"{setting('init', self.options.init)} begins with {plural(needed, 'different image')} of a class, "
                f"but {few}: " + _lower("ipc", ipc * least // needed, f"take {setting('init', 'noise')}")
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
        """Load the proxies, once in a process."""
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
        """Consecutive classes, `class_batch` in a group."""
        starts = range(0, classes, self.options.class_batch)
        return [
            Group(number, tuple(range(start, min(start + self.options.class_batch, classes))))
            for number, start in enumerate(starts)
        ]

    def begin(self, group: Group, pool: ClassPool, context: Context) -> State:
        """Pixels of the start, normalised, and no momentum."""
        begun = [self._initial(label, pool, context).to(context.device) for label in group.classes]
        pixels = torch.cat(begun)
        return State(group, {"pixels": pixels, "momentum": torch.zeros_like(pixels)})

    def _initial(self, label: int, pool: ClassPool, context: Context) -> Tensor:
        """[ipc, 3, S, S], float32."""
        draws = generator(context.seed, "init", label)
        if self.options.init == "noise":
            return torch.randn(context.ipc, 3, context.image_size, context.image_size, generator=draws)
        tiles = self._mixed if self.options.init == "mix" else 1
        drawn = _all_drawn(pool, label, context.ipc * tiles**2, draws, context, "ipc", divisor=tiles**2)
        return _normalised(mosaics(drawn, tiles) if tiles > 1 else drawn, context, torch.float32)

    @torch.enable_grad()
    def step(self, number: int, state: State, pool: ClassPool, context: Context) -> float:
        """See `Synthesis`. The loss that is returned is the sum over the group's classes, without CMI."""
        self.open(context)
        group = state.group
        state.tensors = {name: tensor.to(context.device) for name, tensor in state.tensors.items()}
        network = self.networks.at(number, state, context)
        labels = to_device(torch.tensor(group.classes), context.device)
        pixels = state.pixels.detach().requires_grad_()
        # Networks that draw when they are called, dropout for example, draw the same after a kill.
        with (
            seeded(context.seed, "forward", group.number, number, device=context.device),
            autocast(context.precision, context.device),
        ):
            real, synthetic = self._augmented(number, group, self._decoded(pixels, group), pool, context)
            loss = self.loss(network, real, synthetic, labels)
            (gradient,) = torch.autograd.grad(loss, pixels)
            measured = {"loss": loss.detach(), "gradient_norm": torch.linalg.vector_norm(gradient)}
            cmi_gradient = self._regularise(number, group, pixels, context, measured)
        # SGD with momentum as torch has it.
        if cmi_gradient is not None:
            gradient = gradient + cmi_gradient
        velocity = self.options.momentum * state.tensors["momentum"] + gradient
        moved = state.pixels.add(velocity, alpha=-self.options.lr_img)
        if self._is_noted(number):
            each = state.pixels.unflatten(0, (len(group.classes), -1))
            measured["pixel_variance"] = each.var(dim=1, correction=0).mean()
        row = self._checked(number, measured, torch.linalg.vector_norm(moved))
        state.tensors |= {"pixels": moved, "momentum": velocity}
        self.networks.advance(number, state, pool, context)
        state.curve.append({"step": float(number), **row})
        return row["loss"]

    def _decoded(self, pixels: Tensor, group: Group) -> Tensor:
        """[C, n, 3, H, W]"""
        return self.decode(pixels).unflatten(0, (len(group.classes), -1))

    def _augmented(
        self, number: int, group: Group, decoded: Tensor, pool: ClassPool, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Real [C, R, 3, H, W] and synthetic images [C, n, 3, H, W] of a step."""
        size, batch = (decoded.shape[-2], decoded.shape[-1]), self.options.real_batch
        drawn = [
            _all_drawn(
                pool, label, batch, generator(context.seed, "real", label, number), context, "real_batch"
            )
            for label in group.classes
        ]
        real = _normalised(torch.stack(drawn), context, decoded.dtype)
        synthetic = []
        # `unbind`, as the gradient of a class taken by its place would be as large as all classes.
        for place, (label, made) in enumerate(zip(group.classes, decoded.unbind(), strict=True)):
            augment = self.augmentation(size, generator(context.seed, "augment", label, number))
            real[place] = augment(real[place])
            synthetic.append(augment(made))
        return real, torch.stack(synthetic)

    def _regularise(
        self, number: int, group: Group, pixels: Tensor, context: Context, measured: dict[str, Tensor]
    ) -> Tensor | None:
        """The gradient of lambda * CMI in the pixels where it acts in this step; what was measured joins `measured`."""
        acts = self.options.cmi > 0 and number % self.options.cmi_every == 0
        if self._regulariser is None or not (acts or self._is_noted(number)):
            return None
        decoded = self._decoded(pixels, group)
        measured["cmi"], gradient = self._regulariser.value_and_gradient(
            decoded, number, context.seed, wanted=acts
        )
        if gradient is None:
            return None
        # CMI is a mean over the images of the run, of which the group has its share.
        weight = self.options.cmi * len(group.classes) / context.classes
        (pulled,) = torch.autograd.grad(decoded, pixels, weight * gradient)
        measured["cmi_gradient_norm"] = torch.linalg.vector_norm(pulled)
        return pulled

    def _is_noted(self, number: int) -> bool:
        """Whether what costs something is measured in this step: the first, the last, and some between."""
        return number % max(1, self.steps // _NOTES) == 0 or number == self.steps - 1

    def _checked(self, number: int, measured: dict[str, Tensor], moved: Tensor) -> dict[str, float]:
        """What was measured, as numbers: the one time that a step waits for a GPU.

        Raises:
            DivergedError: something is not finite, the pixels after the step among it.
        """
        found = torch.stack([value.double() for value in (*measured.values(), moved)]).tolist()
        row = dict(zip((*measured, "pixels"), found, strict=True))
        if bad := next((name for name, value in row.items() if not math.isfinite(value)), None):
            lower = f"{argument('lr_img')}, now {self.options.lr_img:g}"
            if self.options.cmi:
                lower += f", or {argument('cmi')}, now {self.options.cmi:g}"
            raise DivergedError(
                f"{_CALLED.get(bad, bad)} of {self.name} would no longer be finite at step {number} of {self.steps}: "
                f"lower {lower}; what was made before that step is kept"
            )
        del row["pixels"]
        return row


_CALLED = {
    "loss": "the loss",
    "gradient_norm": "the loss's gradient",
    "cmi": "CMI",
    "cmi_gradient_norm": "CMI's gradient",
    "pixel_variance": "the variance of the pixels",
    "pixels": "the pixels",
}


def _normalised(images: Tensor, context: Context, dtype: torch.dtype) -> Tensor:
    """(x / 255 - mean) / std of uint8 images [..., 3, H, W] in one pass, on the context's device."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (context.mean, context.std))
    shift, scale = (
        to_device(values.to(dtype), context.device).view(3, 1, 1) for values in (-mean / std, 1 / (255 * std))
    )
    return torch.addcmul(shift, to_device(images, context.device).to(dtype), scale)


def _all_drawn(
    pool: ClassPool,
    label: int,
    count: int,
    draws: torch.Generator,
    context: Context,
    keyword: str,
    *,
    divisor: int = 1,
) -> Tensor:
    """`count` images of a class, uint8 [count, 3, S, S].

    Raises:
        UsageError: fewer can be read; `keyword`, of which `count` is `divisor` times as many, is what to lower.
    """
    drawn = pool.draw(label, count, draws)
    if len(drawn) < count:
        raise UsageError(
            f"{shown([context.class_names[label]])} has {plural(len(drawn), 'readable image')}, {count} are needed: "
            + _lower(keyword, len(drawn) // divisor, "give the class more images")
        )
    return drawn


def _lower(keyword: str, most: int, otherwise: str) -> str:
    """Advice: the value that there are images for, or another way."""
    return f"lower {argument(keyword)} to {most}, or {otherwise}" if most else otherwise


def _short_of(needed: int, counts: Tensor, class_names: Sequence[str]) -> str:
    """The classes with fewer than `needed` images, for a message; empty where there are none."""
    found = [
        f"{shown([name])} has {count}"
        for name, count in zip(class_names, counts.tolist(), strict=True)
        if count < needed
    ]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more have too few" if len(found) > 3 else "")
