"""The device a training runs on."""

from __future__ import annotations

import torch

from ddfast.errors import UsageError


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU.

    Raises:
        UsageError: a CUDA device on a machine without one, or a name torch does not know.

    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}: give auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device} was asked for, but torch sees no GPU: give auto or cpu")
    return chosen
