"""Which networks a matching method compares real and synthetic images on: the axis on which the papers differ."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ddfast.data.pool import ClassPool
from ddfast.methods.base import Context
from ddfast.methods.synthesis import State
from ddfast.models.fusing import fuse
from ddfast.models.registry import create_model
from ddfast.ops.transfer import to_device
from ddfast.seeding import seeded


class Networks(ABC):
    """Where the network of a step comes from, and what becomes of it after the step.

    What a later step needs of an earlier one, weights that are trained on for example, lives in `state.tensors`
    under names that open with "network.", so that it survives a kill. What can be made again may be kept besides.
    """

    @abstractmethod
    def at(self, step: int, state: State, context: Context) -> nn.Module:
        """The network of a step, counted from 0, on the context's device. Callers change neither it nor its mode."""

    def advance(self, step: int, state: State, pool: ClassPool, context: Context) -> None:  # noqa: B027 - most rest
        """What happens to the networks after the pixels' update, training on synthetic or real images for example."""


class Fresh(Networks):
    """A network of new random weights at every step, never trained, the same one for all groups of a step (DM).

    The weights are those of `create_model` under the key (seed, "network", step). A network is built once and its
    weights are drawn anew in place, where that gives the same ones.
    """

    def __init__(self, arch: str) -> None:
        self._arch = arch
        self._built: tuple[tuple[int, int, torch.device], _Redrawn] | None = None

    def at(self, step: int, state: State, context: Context) -> nn.Module:
        """See `Networks`: in train mode, without gradients of the parameters."""
        kind = (context.classes, context.image_size, context.device)
        if self._built is None or self._built[0] != kind:
            self._built = kind, _Redrawn(self._arch, *kind)
        return self._built[1].drawn(context.seed, "network", step)


class _Redrawn:
    """A fused network on a device, whose weights are drawn anew on the CPU for every key."""

    def __init__(self, arch: str, classes: int, image_size: int, device: torch.device) -> None:
        self._arguments = (arch, classes, image_size)
        self._source = self._created(
            "example"
        )  # on the CPU; its tensors are the network's where that is the device
        self._network = fuse(self._source if device.type == "cpu" else self._created("example").to(device))
        self._network.train().requires_grad_(False)
        self._resets = self._is_redrawn_by_resets()

    def drawn(self, *key: int | str) -> nn.Module:
        """The network with the weights of a key."""
        if self._resets:
            with seeded(*key):
                _reset(self._source)
        else:
            _copy(self._created(*key), self._source)
        if next(self._network.parameters()) is not next(self._source.parameters()):
            _copy(self._source, self._network)
        return self._network

    def _created(self, *key: int | str) -> nn.Module:
        with seeded(*key):
            return create_model(*self._arguments)

    def _is_redrawn_by_resets(self) -> bool:
        """Whether the layers' own resets, in their order, draw what a new network has: not where it draws twice."""
        with seeded("another"):
            _reset(self._source)
        expected, found = self._created("another").state_dict(), self._source.state_dict()
        return all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def _reset(network: nn.Module) -> None:
    for module in network.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    """Parameters and buffers of one network into those of another."""
    to: dict[str, Tensor] = target.state_dict()
    for name, tensor in source.state_dict().items():
        to[name].copy_(to_device(tensor, to[name].device))
