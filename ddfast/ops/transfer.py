"""Copies between the host and a GPU that nothing waits for: by way of pinned memory, in the order of the stream.

On a CPU every function here returns what it was given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. From the host it goes through pinned memory, and the host goes on at once.

    The pinned copy is the caching allocator's, which keeps it until the stream has read it.
    """
    if tensor.device == device or device.type == "cpu" or tensor.device.type != "cpu":
        return tensor if tensor.device == device else tensor.to(device)
    return pinned(tensor).to(device, non_blocking=True)


def statistic(values: Tensor | Sequence[float] | None, device: torch.device) -> Tensor | None:
    """Numbers of channels [C] on `device`, float64 where they are no tensor yet; None stays None."""
    if values is None:
        return None
    tensor = values if isinstance(values, Tensor) else torch.tensor(list(values), dtype=torch.float64)
    return to_device(tensor, device)


def pinned(tensor: Tensor) -> Tensor:
    """The tensor in page-locked memory, from which a GPU copies by itself; as it is where there is no GPU."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


class Arriving:
    """Tensors on their way to the host: `wait` has them, and is the only place that waits for the device.

    Args:
        tensors: of the host and of one device; what happens to those afterwards in its stream does not matter.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event = None
        away = [tensor for tensor in tensors if tensor.device.type != "cpu"]
        self._tensors = [
            tensor if tensor.device.type == "cpu" else landing(tensor).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        if away:
            self._event = copied(away[0].device)

    def wait(self) -> list[Tensor]:
        """The tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


def landing(tensor: Tensor) -> Tensor:
    """Page-locked memory on the host for a tensor of a device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def copied(device: torch.device) -> torch.Event:
    """An event behind all that the current stream of `device` was given so far."""
    event = torch.Event(device)
    event.record()
    return event
