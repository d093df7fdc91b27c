"""What a number depends on beside the code: device, versions, commit and time."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import ddfast

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "bench" / "results"
SHARED_DATA = CHECKOUT.parent / "shared" / "data"  # real images, where the checkout has them beside it
# What decides a speed: results and documents do not make a checkout dirty.
_DECISIVE = ("ddfast", "kernels", "csrc", "bench/*.py", "setup.py", "pyproject.toml")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the widest instructions that PyTorch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    bfloat16 = " with AVX-512 BF16" if "avx512_bf16" in text else ""
    return f"{name[1].strip() if name else os.uname().machine}{bfloat16}"


def version(package: str) -> str:
    """Installed version of a distribution, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def commit() -> tuple[str, bool]:
    """The checkout's commit, shortened, and whether code beside it changed; ("unknown", False) outside git."""
    found = _git("rev-parse", "--short=10", "HEAD")
    if found is None:
        return "unknown", False
    return found, bool(_git("status", "--porcelain", "--", *_DECISIVE))


def _git(*arguments: str) -> str | None:
    try:
        finished = subprocess.run(
            ["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return finished.stdout.strip() if finished.returncode == 0 else None


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def software() -> dict[str, str]:
    """Versions of what every entry uses."""
    return {
        "torch": torch.__version__,
        "triton": version("triton"),
        "ddfast": ddfast.__version__,
    }
