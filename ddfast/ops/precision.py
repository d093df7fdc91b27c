"""Which dtype a forward pass computes in: float32, or bfloat16 autocast where that is faster."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ddfast.settings import PRECISIONS


def resolve_precision(precision: str, device: torch.device | str) -> torch.dtype | None:
    """The autocast dtype that `precision` means on `device`; None is plain float32.

    Args:
        precision: "float32" never autocasts, "bfloat16" does on every CPU and GPU. "auto" is bfloat16 where it is
            known to be faster: on a CPU with AMX, on one of AMD's with AVX-512 BF16, and on a GPU with native
            bfloat16 (compute capability 8.0 or later). It is float32 everywhere else: emulated, and on Intel's
            CPUs with AVX-512 BF16 but without AMX, bfloat16 takes 1.2 to 1.9 times as long. The rule asks for the
            hardware alone and measures nothing, so that equal machines choose alike. TF32 on a GPU is torch's own
            switch (`torch.backends`), which this leaves as it stands.
        device: where the model runs.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "float32":
        return None
    device = torch.device(device)
    if precision == "bfloat16":
        return torch.bfloat16 if device.type in ("cpu", "cuda") else None
    if device.type == "cpu" and cpu_gains_from_bfloat16():
        return torch.bfloat16
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return None


def compute_dtype(precision: str, device: torch.device | str) -> str:
    """What `precision` means on `device` by its name in `PRECISIONS`, "float32" or "bfloat16".

    Whoever chooses once, for many processes or for a run that goes on elsewhere, hands this on in place of "auto".

    Raises:
        ValueError: an unknown precision.
    """
    return "float32" if resolve_precision(precision, device) is None else "bfloat16"


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


@contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """Let cuDNN take those of its algorithms in a block that give the same bits every time, and always the same ones.

    Its default for the gradient in a convolution's input may add in any order. On a CPU nothing changes.
    """
    backend = torch.backends.cudnn
    before = backend.deterministic, backend.benchmark
    backend.deterministic, backend.benchmark = True, False
    try:
        yield
    finally:
        backend.deterministic, backend.benchmark = before


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 dot products in hardware (AVX-512 BF16 or AMX)."""
    return any(_bfloat16_units())


def cpu_gains_from_bfloat16() -> bool:
    """Whether bfloat16 is known to be faster than float32 on this CPU: with AMX, or AVX-512 BF16 on AMD's."""
    avx512, amx = _bfloat16_units()
    return amx or (avx512 and cpu_vendor() == "AuthenticAMD")


def _bfloat16_units() -> tuple[bool, bool]:
    """Whether this CPU has (AVX-512 BF16, AMX)."""
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.11 and later
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16")), bool(capabilities.get("amx_bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported()), bool(torch.cpu._is_amx_tile_supported())


@functools.cache
def cpu_vendor() -> str:
    """The CPU's name for its maker, "GenuineIntel" or "AuthenticAMD" on x86-64; empty where the system tells none."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:  # not Linux: the last word on Windows
        return platform.processor().rpartition(" ")[2]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cpu_instructions() -> str:
    """The instruction sets of this CPU that decide how torch sums: what its kernels are built for, and its
    bfloat16 units.

    "AVX512 avx512_bf16", for example; `ATEN_CPU_CAPABILITY` lowers the first.
    """
    names = zip(("avx512_bf16", "amx_bf16"), _bfloat16_units(), strict=True)
    return " ".join([torch.backends.cpu.get_cpu_capability(), *(name for name, there in names if there)])


def tf32(device: torch.device | str) -> str:
    """What may round float32 to TF32 on a device: "convolutions", "products", both with a comma, or "none"."""
    if torch.device(device).type != "cuda":
        return "none"
    flags = {
        "convolutions": (torch.backends.cudnn, "conv"),
        "products": (torch.backends.cuda.matmul, None),
    }
    return ", ".join(name for name, where in flags.items() if _allows_tf32(*where)) or "none"


def _allows_tf32(backend: Any, operation: str | None) -> bool:
    """A switch of `torch.backends`; the old name of one fails where the new names were set apart."""
    try:
        return bool(backend.allow_tf32)
    except RuntimeError:
        return bool((getattr(backend, operation) if operation else backend).fp32_precision == "tf32")
