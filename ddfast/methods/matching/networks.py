"""Which networks a matching method compares real and synthetic images on: the axis on which the papers differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

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
    def at(self, step: int, state: State, pool: ClassPool, context: Context) -> nn.Module:
        """The network of a step, counted from 0, on the context's device. Callers change neither it nor its mode.

        The state is left as it is.
        """

    def check(self, context: Context) -> None:  # noqa: B027 - most fit
        """Refuse networks that do not fit into memory, before anything is written. Raises `UsageError`."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back the memory of what was recorded on a GPU."""

    def advance(self, step: int, state: State, pool: ClassPool, context: Context) -> None:  # noqa: B027 - some rest
        """What happens to the networks after the pixels' update, training on synthetic or real images for example.

        Raises:
            DivergedError: a training loss is no longer finite.
        """


class Fresh(Networks):
    """A network of new random weights at every step, never trained, the same one for all groups of a step (DM).

    The weights are those of `create_model` under the key (seed, "network", step). A network is built once and its
    weights are drawn anew in place, where that gives the same ones.
    """

    def __init__(self, arch: str) -> None:
        self._built = Built(arch)

    def at(self, step: int, state: State, pool: ClassPool, context: Context) -> nn.Module:
        """See `Networks`: in train mode, without gradients of the parameters."""
        return self._built.on(context).drawn(context.seed, "network", step)


class Built:
    """A network of an architecture, built once for the runs that have the same classes, image size and device."""

    def __init__(self, arch: str, *, trained: bool = False) -> None:
        """`trained`: whether its parameters need gradients."""
        self._arch, self._trained = arch, trained
        self._held: tuple[tuple[int, int, torch.device], Redrawn] | None = None

    def on(self, context: Context) -> Redrawn:
        """The network for a context."""
        kind = (context.classes, context.image_size, context.device)
        if self._held is None or self._held[0] != kind:
            self._held = kind, Redrawn(self._arch, *kind)
            self._held[1].network.requires_grad_(self._trained)
        return self._held[1]


class Redrawn:
    """A fused network on a device, whose weights are drawn anew on the CPU for every key, or put in place."""

    def __init__(self, arch: str, classes: int, image_size: int, device: torch.device) -> None:
        self._arguments = (arch, classes, image_size)
        # On the CPU; its tensors are the network's where that is the device.
        self._source = self._created("example")
        self.network = fuse(self._source if device.type == "cpu" else self._created("example").to(device))
        self.network.train().requires_grad_(False)
        self._resets = self._is_redrawn_by_resets()

    def drawn(self, *key: int | str) -> nn.Module:
        """The network with the weights of a key."""
        if self._resets:
            with seeded(*key):
                _reset(self._source)
        else:
            _copy(self._created(*key), self._source)
        if next(self.network.parameters()) is not next(self._source.parameters()):
            _copy(self._source, self.network)
        return self.network

    @torch.no_grad()
    def holding(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """The network with these weights and buffers, by the names of its state dict."""
        to: dict[str, Tensor] = self.network.state_dict()
        for name, tensor in to.items():
            tensor.copy_(weights[name])
        return self.network

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
