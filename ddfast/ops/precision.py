"""Which dtype a forward pass computes in: float32, or bfloat16 autocast where the hardware multiplies it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

PRECISIONS = ("float32", "auto")


def resolve_precision(precision: str, device: torch.device | str) -> torch.dtype | None:
    """The autocast dtype that `precision` means on `device`; None is plain float32.

    Args:
        precision: "float32" never autocasts. "auto" is bfloat16 on a CPU with AVX-512 BF16 or AMX and on a
            GPU with native bfloat16 (compute capability 8.0 or later), and float32 everywhere else, where
            bfloat16 would be emulated. TF32 on a GPU is torch's own switch (`torch.backends`), which this
            leaves as it stands.
        device: where the model runs.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "float32":
        return None
    device = torch.device(device)
    if device.type == "cpu" and cpu_multiplies_bfloat16():
        return torch.bfloat16
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return None


def autocast(precision: str, device: torch.device | str) -> AbstractContextManager[Any]:
    """Context in which a forward pass on `device` computes in `precision`.

    "float32" also suspends an autocast that the caller is inside of, so the name always holds.

    Raises:
        ValueError: an unknown precision.
    """
    device = torch.device(device)
    dtype = resolve_precision(precision, device)
    if device.type not in ("cpu", "cuda"):
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Let new tensors be float32 in a block, or in a decorated function, whatever `torch.set_default_dtype` says.

    The default decides the dtype of weights and of random draws, and with them the result. It is put back at the end.
    """
    before = torch.get_default_dtype()
    if before == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 dot products in hardware (AVX-512 BF16 or AMX)."""
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.11 and later
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
