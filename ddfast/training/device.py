"""The device a training runs on, and how a network lies in its memory."""

from __future__ import annotations

import torch
from torch import nn

from ddfast.errors import UsageError
from ddfast.wording import argument, did_you_mean, plural


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU.

    Raises:
        UsageError: neither of these, or a GPU that this machine has not.

    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = argument("device")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        near = did_you_mean(device, ("auto", "cpu", "cuda"))
        raise UsageError(f"unknown device {str(device)!r}: {name} must be auto, cpu, cuda or cuda:N{near}")
    if chosen.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(f"{name} {device} was asked for, but torch sees no GPU: give auto or cpu")
    if chosen.index is not None and chosen.index >= torch.cuda.device_count():
        seen = plural(torch.cuda.device_count(), "GPU")
        raise UsageError(f"{name} {device} was asked for, but torch sees {seen}, numbered from 0")
    return chosen


def memory_layout(model: nn.Module, device: torch.device) -> torch.memory_format:
    """The layout in which a network is fastest: give it both the network and its inputs.

    Channels last, in which convolutions, BatchNorm and pooling are up to 1.9 times as fast on a CPU; but not for
    GroupNorm there, whose kernels take 2.7 times as long in it (ConvNet-3 with InstanceNorm, bfloat16, AVX-512).
    """
    grouped = device.type == "cpu" and any(isinstance(module, nn.GroupNorm) for module in model.modules())
    return torch.contiguous_format if grouped else torch.channels_last
