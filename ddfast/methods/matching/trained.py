"""Networks that are trained between steps: on the synthetic images (DC, DSA), or on real ones (IDC, UDD).

A round begins with new weights and lasts some steps. The weights of the next step live in the state, so that a run that
was killed goes on with them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddfast.data.pool import ClassPool
from ddfast.errors import DivergedError, UsageError
from ddfast.methods.base import Context
from ddfast.methods.matching.networks import Built, Networks
from ddfast.methods.matching.real import normalised
from ddfast.methods.synthesis import State
from ddfast.ops.graphs import Recorded
from ddfast.ops.transfer import to_device
from ddfast.seeding import derived_seed, generator
from ddfast.training.protocol import PROTOCOLS
from ddfast.wording import argument

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Augments float images [B, 3, H, W], each by draws of its own."""

Targets = tuple[Tensor, ...]
"""Labels of a batch, int64 [B]; where it is mixed of two, the others' labels and the shares of both, [2], as well."""

PREFIX = "network."
"""Opens the names of a network's tensors in a state."""

_VELOCITY = "network.velocity."
_CALIBRATION = 16  # real images of a class that BatchNorm's statistics are measured on (DC)


@dataclass(frozen=True)
class Descent:
    """SGD as torch has it: learning rate, momentum and weight decay on all parameters."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def step(self, parameters: Sequence[Tensor], velocities: Sequence[Tensor], loss: Tensor) -> None:
        """Move the parameters down the loss, in place; the velocities as well."""
        gradients = list(torch.autograd.grad(loss, parameters))
        with torch.no_grad():
            if self.weight_decay:
                torch._foreach_add_(gradients, list(parameters), alpha=self.weight_decay)
            if self.momentum:
                torch._foreach_mul_(list(velocities), self.momentum)
                torch._foreach_add_(list(velocities), gradients)
                gradients = list(velocities)
            torch._foreach_add_(list(parameters), gradients, alpha=-self.lr)


class Training:
    """A network in training, whose weights and velocities lie in one place, so that a GPU records a step of it.

    Args:
        network: whose parameters are moved, in place.
        descent: how.
    """

    def __init__(self, network: nn.Module, descent: Descent) -> None:
        self.network = network
        self._named, self._descent = dict(network.named_parameters()), descent
        momentum = self._named if descent.momentum else {}
        self._velocities = {name: torch.zeros_like(each) for name, each in momentum.items()}
        self.step = Recorded(self._step, what="a training step")

    @torch.no_grad()
    def begin(self, velocities: Mapping[str, Tensor]) -> None:
        """Go on with these velocities, by the names of the parameters; 0 where there are none."""
        for name, place in self._velocities.items():
            place.copy_(velocities[name]) if name in velocities else place.zero_()

    def velocities(self) -> dict[str, Tensor]:
        """What `begin` goes on with."""
        return {name: each.clone() for name, each in self._velocities.items()}

    def _step(self, images: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """A step on normalised images: the loss and the logits before it."""
        logits = self.network(images)
        loss = _entropy(logits, *targets)
        self._descent.step(list(self._named.values()), list(self._velocities.values()), loss)
        return loss.detach(), logits.detach()


def _entropy(
    logits: Tensor, own: Tensor, others: Tensor | None = None, shares: Tensor | None = None
) -> Tensor:
    """The mean cross-entropy of `Targets`."""
    entropy = F.cross_entropy(logits, own)
    if others is None or shares is None:
        return entropy
    return shares[0] * entropy + shares[1] * F.cross_entropy(logits, others)


class Trained(Networks):
    """A network that is trained after every step of a round but the last.

    BatchNorm's statistics are measured on 16 real images of each class before every step and frozen in it, as the code
    of DC has it.
    """

    def __init__(self, arch: str, steps: int, descent: Descent) -> None:
        """`steps`: of the pixels, in a round."""
        self._built = Built(arch, trained=True)
        self._steps, self._descent = steps, descent
        self._training: Training | None = None
        self._begun: dict[str, Tensor] = {}  # velocities of a network that trained before its first step

    @abstractmethod
    def batches(
        self, step: int, state: State, pool: ClassPool, context: Context
    ) -> Iterator[tuple[Tensor, Targets]]:
        """What the network trains on after a step: normalised images, and their targets."""

    def before(
        self, step: int, dtype: torch.dtype, pool: ClassPool, context: Context
    ) -> Iterator[tuple[Tensor, Targets]]:
        """What a new network trains on before its first step: nothing, as most have it."""
        return iter(())

    def at(self, step: int, state: State, pool: ClassPool, context: Context) -> nn.Module:
        """See `Networks`: in train mode, but for BatchNorm, with gradients of the parameters."""
        redrawn = self._built.on(context)
        if step % self._steps == 0:
            network = redrawn.drawn(context.seed, "network", step // self._steps)
            self._begun = self._trained(
                network, {}, step, self.before(step, state.pixels.dtype, pool, context)
            )
        else:
            held = redrawn.network.state_dict()
            network = redrawn.holding({name: state.tensors[PREFIX + name] for name in held})
        network.train()
        _calibrate(network, step, pool, context, state.pixels.dtype)
        return network

    def advance(self, step: int, state: State, pool: ClassPool, context: Context) -> None:
        """Train the network, and keep its weights for the next step of the round; at its end, forget them."""
        kept = {name: tensor for name, tensor in state.tensors.items() if not name.startswith(PREFIX)}
        if (step + 1) % self._steps:
            network = self._built.on(context).network
            held = named_with(_VELOCITY, state.tensors) if step % self._steps else self._begun
            velocities = self._trained(network, held, step, self.batches(step, state, pool, context))
            kept |= {PREFIX + name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
            kept |= {_VELOCITY + name: velocity for name, velocity in velocities.items()}
        state.tensors = kept

    def _trained(
        self,
        network: nn.Module,
        velocities: Mapping[str, Tensor],
        step: int,
        batches: Iterator[tuple[Tensor, Targets]],
    ) -> dict[str, Tensor]:
        """The velocities after a training of the network in place, which goes on with those that are given."""
        training = self._training = of_network(self._training, network.train(), self._descent)
        training.begin(velocities)
        loss: Tensor | None = None
        for images, targets in batches:
            loss, _ = training.step(images, targets)
        if loss is not None:
            check_training(loss, step, self._descent)
        return training.velocities()

    def close(self) -> None:
        """See `Networks`."""
        self._training = None


def of_network(training: Training | None, network: nn.Module, descent: Descent) -> Training:
    """The training of a network: what there is, where it is its own."""
    return training if training is not None and training.network is network else Training(network, descent)


def named_with(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names open with the prefix, by what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class OnSynthetic(Trained):
    """Trained on the synthetic images of all classes: epochs over them in random batches (DC, DSA).

    Args:
        arch: of the networks.
        steps: of the pixels, in a round.
        epochs: over the synthetic images, after a step.
        batch: images in a step of the network.
        descent: of the network.
        decode: pixels to normalised images, class by class.
        augment: of a batch; None for none.
    """

    def __init__(
        self,
        arch: str,
        steps: int,
        epochs: int,
        batch: int,
        descent: Descent,
        decode: Callable[[Tensor, Context], Tensor],
        augment: Augment | None,
    ) -> None:
        super().__init__(arch, steps, descent)
        self._epochs, self._batch, self._decode, self._augment = epochs, batch, decode, augment

    def batches(
        self, step: int, state: State, pool: ClassPool, context: Context
    ) -> Iterator[tuple[Tensor, Targets]]:
        """See `Trained`."""
        with torch.no_grad():
            images = self._decode(state.pixels, context)
        each = len(images) // len(state.group.classes)
        labels = torch.tensor(state.group.classes).repeat_interleave(each)
        draws = generator(context.seed, "training", step)
        for _ in range(self._epochs):
            for places in torch.randperm(len(images), generator=draws).split(self._batch):
                batch = images[to_device(places, images.device)]
                batch = batch if self._augment is None else self._augment(batch, draws)
                yield batch, (to_device(labels[places], context.device),)


class OnReal(Trained):
    """Trained on real images of all classes, with CutMix on half of the batches (IDC).

    Args:
        arch: of the networks.
        steps: of the pixels, in a round.
        samples: real images after a step, rounded up to whole batches.
        batch: images in a step of the network.
        descent: of the network.
        augment: of a batch.
        epochs: over the real images, that a new network trains for before its first step.
    """

    def __init__(
        self,
        arch: str,
        steps: int,
        samples: int,
        batch: int,
        descent: Descent,
        augment: Augment,
        epochs: int = 0,
    ) -> None:
        super().__init__(arch, steps, descent)
        self._samples, self._batch, self._augment, self._epochs = samples, batch, augment, epochs

    def batches(
        self, step: int, state: State, pool: ClassPool, context: Context
    ) -> Iterator[tuple[Tensor, Targets]]:
        """See `Trained`."""
        for number in range(-(-self._samples // self._batch)):
            draws = generator(context.seed, "training", step, number)
            found, labels = real_batch(pool, self._batch, draws)
            images = self._augment(normalised(found, context, state.pixels.dtype), draws)
            yield _cut_mixed(images, labels, derived_seed(context.seed, "cutmix", step, number), context)

    def before(
        self, step: int, dtype: torch.dtype, pool: ClassPool, context: Context
    ) -> Iterator[tuple[Tensor, Targets]]:
        """See `Trained`. A batch that is not full is left out where there are others."""
        for epoch in range(self._epochs):
            draws = generator(context.seed, "pretraining", step, epoch)
            order = torch.randperm(len(pool.labels), generator=draws)
            if len(order) > self._batch:
                order = order[: len(order) // self._batch * self._batch]
            for number, (_, found, labels) in enumerate(pool.batches(order, self._batch)):
                images = self._augment(normalised(found, context, dtype), draws)
                seed = derived_seed(context.seed, "cutmix", "pretraining", step, epoch, number)
                yield _cut_mixed(images, labels, seed, context)


def check_training(loss: Tensor, step: int, descent: Descent) -> None:
    """Refuse a network whose training after a step of the pixels ended in a loss that is not finite.

    Raises:
        DivergedError: what to lower.
    """
    if not math.isfinite(value := loss.item()):
        raise DivergedError(
            f"the training of the networks became {value} after step {step}: lower {argument('lr_net')}, now "
            f"{descent.lr:g}; what was made before that step is kept"
        )


def real_batch(pool: ClassPool, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Different images of a pool, whatever their classes: uint8 [count, 3, S, S], labels int64 [count].

    Raises:
        UsageError: none of those drawn can be read.
    """
    order = torch.randperm(len(pool.labels), generator=draws)
    for _, images, labels in pool.batches(order[: 2 * count], count):
        return images, labels
    raise UsageError(f"none of {min(2 * count, len(order))} images that were drawn can be read")


def _cut_mixed(images: Tensor, labels: Tensor, seed: int, context: Context) -> tuple[Tensor, Targets]:
    """CutMix on half of the batches, as IDC trains and evaluates."""
    draws, protocol = np.random.default_rng(seed), PROTOCOLS["idc"]
    own = to_device(labels, context.device)
    if draws.random() >= protocol.mix_probability:
        return images, (own,)
    top, left, bottom, right = protocol.cutmix_box(images.shape[-1], draws)
    partner = torch.from_numpy(draws.permutation(len(images)))
    share = (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[to_device(partner, images.device), :, top:bottom, left:right]
    shares = torch.tensor([1 - share, share], dtype=images.dtype)
    return mixed, (own, to_device(labels[partner], context.device), to_device(shares, context.device))


@torch.no_grad()
def _calibrate(network: nn.Module, step: int, pool: ClassPool, context: Context, dtype: torch.dtype) -> None:
    """Measure BatchNorm's statistics on real images and freeze them; nothing happens to a network without."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    drawn = [
        pool.draw(label, _CALIBRATION, generator(context.seed, "statistics", label, step))
        for label in range(context.classes)
    ]
    network(normalised(torch.cat(drawn), context, dtype))
    for norm in norms:
        norm.eval()
