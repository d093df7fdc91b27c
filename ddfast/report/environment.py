"""`ddfast env`: versions, hardware, and the path that every op takes here, with the reason."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sysconfig
from collections.abc import Iterable, Sequence
from importlib import metadata

from ddfast.wording import plural

_PACKAGES = (
    *("torch", "torchvision", "triton", "numpy", "pillow", "pyarrow", "safetensors", "jinja2"),
    *("captum", "opacus", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
)
_OPTIONAL = ("captum", "opacus", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


def describe_environment() -> str:
    """Plain text of several lines, without a trailing newline.

    Of CUDA only `torch.cuda.is_available` and the number of devices are asked: no context is made.
    """
    import torch

    from ddfast.ops import paths
    from ddfast.version import __version__

    ops: dict[str, dict[str, tuple[str, str]]] = {}
    for path in paths():
        ops.setdefault(path.op, {})[path.device] = (path.body, path.reason)
    rows = [(op, *(_told(*by_device[device]) for device in ("cpu", "cuda"))) for op, by_device in ops.items()]
    facts = [
        ("ddfast", __version__),
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        *_versions(),
        ("cpu", _cpu()),
        ("gpu", _gpu(torch.version.cuda)),
        ("compiler", _compiler()),
        *_loaders(),
    ]
    return "\n".join([*_aligned(facts), "", *_aligned([("op", "cpu", "cuda"), *rows])])


def _told(body: str, reason: str) -> str:
    """Body and reason, once where they say the same."""
    same = {"c++": "C++ extension", "triton": "Triton kernel"}
    return body if same.get(body) == reason else f"{body} ({reason})"


def _versions() -> Iterable[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            if name not in _OPTIONAL:
                yield name, "not installed"


def _cpu() -> str:
    import torch

    from ddfast.ops._dispatch import cpu_body
    from ddfast.ops.precision import cpu_gains_from_bfloat16, cpu_multiplies_bfloat16

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bfloat16 = "in hardware" if cpu_multiplies_bfloat16() else "emulated"
    if not cpu_gains_from_bfloat16():
        slow = " but slow" if bfloat16 == "in hardware" else ""
        bfloat16 += f"{slow}, so precision auto is float32"
    return (
        f"{plural(usable, 'core')}, {plural(torch.get_num_threads(), 'thread')}, "
        f"{torch.backends.cpu.get_cpu_capability()}, bfloat16 {bfloat16}, ops {cpu_body()}"
    )


def _gpu(cuda: str | None) -> str:
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return f"{count} CUDA device{'s' if count != 1 else ''}, torch built for CUDA {cuda}"
    return f"none (torch built for CUDA {cuda})" if cuda else "none (torch built without CUDA)"


def _compiler() -> str:
    name = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
    return f"{name} found" if shutil.which(name) else f"no {name}: the C++ extension cannot be built here"


def _loaders() -> Iterable[tuple[str, str]]:
    """Which loader feeds a CPU and a GPU, why, and what Pillow decodes with."""
    from PIL import features

    from ddfast.data.loaders import resolve_loader

    for device in ("cpu", "cuda"):
        chosen = resolve_loader("auto", device)
        yield f"loader on {device}", f"{chosen.name} ({chosen.reason})"
    jpeg = features.version("jpg")
    kind = "libjpeg-turbo" if features.check("libjpeg_turbo") else "libjpeg"
    yield "pillow decodes with", f"{kind} {jpeg}" if jpeg else "no JPEG: install another build of Pillow"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns padded to their widest cell, two spaces between."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
