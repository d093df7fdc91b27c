"""A queue of networks that train on real images while pixels are matched on them (IDM)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddfast.attribution.flight import free_memory
from ddfast.data.pool import ClassPool
from ddfast.errors import UsageError
from ddfast.methods.base import Context
from ddfast.methods.matching.networks import Built, Networks, Redrawn
from ddfast.methods.matching.real import normalised
from ddfast.methods.matching.trained import (
    PREFIX,
    Descent,
    Training,
    check_training,
    named_with,
    of_network,
    real_batch,
)
from ddfast.methods.synthesis import State
from ddfast.ops.transfer import to_device
from ddfast.seeding import generator
from ddfast.wording import argument

_BEGUN = 3  # networks before the first step
_TRAINED = 2  # networks that train after a step
_STACKED, _VELOCITY = f"{PREFIX}weights.", f"{PREFIX}velocity."
_RIGHT, _SEEN = f"{PREFIX}right", f"{PREFIX}seen"  # real images in training since the counts were reset


class Queue(Networks):
    """Networks of all ages: one joins every few steps, the oldest leaves, two train after every step (IDM, Sec. 3.2).

    All weights live in the state, stacked, the oldest first.

    Args:
        arch: of the networks.
        most: networks in the queue.
        joins_every: steps from one new network to the next.
        steps: that a network trains, in turn.
        batch: real images in a step of a network.
        descent: of a network.
        resets_every: steps after which the accuracies are counted anew.
    """

    def __init__(
        self,
        arch: str,
        most: int,
        joins_every: int,
        steps: int,
        batch: int,
        descent: Descent,
        resets_every: int,
    ) -> None:
        self._built = Built(arch, trained=True)
        self._most, self._joins_every, self._steps, self._batch = most, joins_every, steps, batch
        self._descent, self._resets_every = descent, resets_every
        self._training: Training | None = None
        self.accuracy = torch.zeros(())

    def check(self, context: Context) -> None:
        """Refuse a queue that memory cannot hold."""
        network = self._built.on(context).network
        needed = 2 * self._most * sum(each.numel() * each.element_size() for each in network.parameters())
        free = free_memory(context.device)
        if needed > free:
            raise UsageError(
                f"a queue of {self._most} networks takes {needed:,} bytes with their momentum, and {free:,} are "
                f"free: lower {argument('queue')} to {max(1, self._most * free // needed)}"
            )

    def at(self, step: int, state: State, pool: ClassPool, context: Context) -> nn.Module:
        """One of the queue, in eval mode, with gradients of the parameters; `accuracy` is its own."""
        tensors = self._joined(step, state.tensors, context)
        chosen = torch.randint(len(tensors[_SEEN]), (), generator=generator(context.seed, "network", step))
        seen = tensors[_SEEN][chosen].clamp(min=1)
        accuracy = (100 * tensors[_RIGHT][chosen].double() / seen).to(state.pixels.dtype)
        if (self.accuracy.dtype, self.accuracy.device) != (accuracy.dtype, accuracy.device):
            self.accuracy = accuracy
        self.accuracy.copy_(accuracy)  # in its place, where a recorded loss reads it
        return _holding(self._built.on(context), tensors, int(chosen)).eval()

    def advance(self, step: int, state: State, pool: ClassPool, context: Context) -> None:
        """Let a network join where it is time, then train two."""
        tensors = self._joined(step, state.tensors, context)
        order = torch.randperm(len(tensors[_SEEN]), generator=generator(context.seed, "training", step))
        places = order[:_TRAINED].tolist()
        trained = [self._trained(place, step, state.pixels.dtype, tensors, pool, context) for place in places]
        for place, found in zip(places, trained, strict=True):  # none of them diverged: the queue may change
            for name, value in found.items():
                tensors[name][place] = value
        others = {name: tensor for name, tensor in state.tensors.items() if not name.startswith(PREFIX)}
        state.tensors = others | tensors

    def close(self) -> None:
        """See `Networks`."""
        self._training = None

    def _joined(self, step: int, tensors: dict[str, Tensor], context: Context) -> dict[str, Tensor]:
        """The queue's tensors in a step: those after the one before, a network that joins, and counts of 0 where they
        begin anew."""
        held = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        new = ([] if held else list(range(_BEGUN))) + (
            [_BEGUN + step] if step % self._joins_every == 0 else []
        )
        for number in new:
            fresh = self._fresh(number, context)
            held = {name: torch.cat([held[name], fresh[name]]) if held else fresh[name] for name in fresh}
        if step % self._resets_every == 0:
            held |= {name: torch.zeros_like(held[name]) for name in (_RIGHT, _SEEN)}
        return {name: tensor[-self._most :] for name, tensor in held.items()}

    def _fresh(self, number: int, context: Context) -> dict[str, Tensor]:
        network = self._built.on(context).drawn(context.seed, "queue", number)
        weights = {
            _STACKED + name: each.detach()[None].clone() for name, each in network.state_dict().items()
        }
        velocity = {
            _VELOCITY + name: torch.zeros_like(each)[None] for name, each in network.named_parameters()
        }
        count = torch.zeros(1, dtype=torch.int64, device=context.device)
        return {**weights, **velocity, _RIGHT: count, _SEEN: count.clone()}

    def _trained(
        self,
        place: int,
        step: int,
        dtype: torch.dtype,
        tensors: dict[str, Tensor],
        pool: ClassPool,
        context: Context,
    ) -> dict[str, Tensor]:
        """What stands at a place of the queue after its network has trained on real images."""
        network = _holding(self._built.on(context), tensors, place).train()
        training = self._training = of_network(self._training, network, self._descent)
        training.begin({name: held[place] for name, held in named_with(_VELOCITY, tensors).items()})
        right, seen = tensors[_RIGHT][place].clone(), tensors[_SEEN][place].clone()
        loss = torch.zeros((), device=context.device)
        for number in range(self._steps):
            draws = generator(context.seed, "training", step, place, number)
            images, labels = real_batch(pool, self._batch, draws)
            targets = to_device(labels, context.device)
            loss, logits = training.step(normalised(images, context, dtype), (targets,))
            right += (logits.argmax(1) == targets).sum()
            seen += len(targets)
        check_training(loss, step, self._descent)
        weights = {_STACKED + name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        moved = {_VELOCITY + name: velocity for name, velocity in training.velocities().items()}
        return {**weights, **moved, _RIGHT: right, _SEEN: seen}


def _holding(redrawn: Redrawn, tensors: dict[str, Tensor], place: int) -> nn.Module:
    names = redrawn.network.state_dict()
    return redrawn.holding({name: tensors[_STACKED + name][place] for name in names})
