"""The device a training runs on, and how a network lies in its memory."""

from __future__ import annotations

import torch
from torch import nn

from ddfast.errors import UsageError


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU.

    Raises:
        UsageError: a CUDA device that this machine does not have, or a name torch does not know.

    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}: give auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device} was asked for, but torch sees no GPU: give auto or cpu")
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise UsageError(
            f"device {device} was asked for, but torch sees {torch.cuda.device_count()} GPUs, from cuda:0 on"
        )
    return chosen


def memory_layout(model: nn.Module, device: torch.device) -> torch.memory_format:
    """The layout in which a network is fastest: give it both the network and its inputs.

    Channels last, in which convolutions, BatchNorm and pooling are up to 1.9 times as fast on a CPU; but not for
    GroupNorm there, whose kernels take 2.7 times as long in it (ConvNet-3 with InstanceNorm, bfloat16, AVX-512).
    """
    grouped = device.type == "cpu" and any(isinstance(module, nn.GroupNorm) for module in model.modules())
    return torch.contiguous_format if grouped else torch.channels_last
