"""Op registration: one schema, three bodies.

`define` declares `ddfast::<name>` once and binds its bodies to the dispatcher:

- CPU:  the C++ op `ddfast_native::<name>` where the extension is loaded and accepts the arguments, else the
  reference;
- CUDA: the Triton launcher `ddfast.kernels.<module>.<name>` where Triton can be imported, else the reference
  on the GPU, either with the device of the arguments as the current one;
- Meta: the fake, which only computes shapes.

Which body an op takes on this machine, and why, is what `paths` reports and `ddfast env` prints.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ddfast.errors import UsageError
from ddfast.progress import say

LIBRARY = torch.library.Library("ddfast", "DEF")

CPU_BODIES = ("portable", "avx2", "avx512", "avx512_bf16")  # in the order of csrc/cpu_body.h

_OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Op:
    """One fused op: its name, its pure PyTorch reference and where its faster bodies live."""

    name: str
    reference: Callable[..., Any]
    native_accepts: Callable[..., bool] | None
    triton: str | None


@dataclass(frozen=True)
class Path:
    """The body that an op takes on a device type, with the reason where it is not the fastest one."""

    op: str
    device: str
    body: str
    reason: str


@functools.cache
def native_status() -> tuple[bool, str]:
    """Load the C++ extension once. Returns (loaded, reason)."""
    if os.environ.get("DDFAST_NATIVE", "1") == "0":
        return False, "switched off by DDFAST_NATIVE=0"
    if importlib.util.find_spec("ddfast._C") is None:
        return False, "the extension ddfast._C was not built (DDFAST_BUILD_EXT=1 and a C++ compiler build it)"
    try:
        importlib.import_module("ddfast._C")
    except (ImportError, OSError) as error:
        return False, f"the extension ddfast._C does not load: {str(error).splitlines()[0]}"
    return True, "C++ extension"


_SAID: set[str] = set()  # what this process was told once


def say_slow_ops(device: torch.device, *, quiet: bool = False) -> None:
    """Say in one line that ops run in plain PyTorch where C++ could run; once a process, at its first long run.

    Who switched the C++ bodies off with DDFAST_NATIVE=0 knows, and is told nothing.

    Args:
        device: of the run; beside a GPU the ops are Triton's.
        quiet: print nothing.
    """
    loaded, reason = native_status()
    if (
        quiet
        or loaded
        or device.type != "cpu"
        or os.environ.get("DDFAST_NATIVE", "1") == "0"
        or reason in _SAID
    ):
        return
    _SAID.add(reason)
    say(f"ops run in plain PyTorch, several times slower than in C++: {reason}; ddfast env tells more")


@functools.cache
def cpu_body() -> str:
    """What computes the ops on this CPU: "reference", or the C++ body for one of `CPU_BODIES`.

    They round in different orders. DDFAST_CPU_BODY chooses a lower one than the CPU's best, DDFAST_NATIVE=0 the
    reference.

    Raises:
        UsageError: DDFAST_CPU_BODY names no body, or one that this CPU cannot run.
    """
    if not native_status()[0]:
        return "reference"
    try:
        return CPU_BODIES[torch.ops.ddfast_native.cpu_body()]
    except RuntimeError as error:
        told = str(error).splitlines()[0]
        raise UsageError(told[max(told.find("DDFAST_CPU_BODY"), 0) :]) from error


@functools.cache
def triton_status() -> tuple[bool, str]:
    """Whether the Triton launchers can be imported here. Returns (available, reason)."""
    if os.environ.get("DDFAST_TRITON", "1") == "0":
        return False, "switched off by DDFAST_TRITON=0"
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    return True, "Triton kernel"


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: str | None = None,
    native_accepts: Callable[..., bool] | None = None,
    check: Callable[..., None] | None = None,
    native_checks: bool = False,
) -> None:
    """Declare `ddfast::<name>` and bind its bodies.

    Args:
        name: op name, the same in every namespace and module.
        schema: argument and return types, `(Tensor x, int k) -> Tensor`.
        reference: pure PyTorch body, correct on every device and in float64.
        fake: shape function for meta tensors and `torch.compile`.
        triton: module of `ddfast.kernels` that holds the launcher, a function called `name`.
        native_accepts: predicate on the op's arguments; true where the C++ body serves them. None: no C++
            body.
        check: raises ValueError for values inside tensors (an index out of range) that would make a body read
            outside its arguments. Called on the CPU only: a GPU would have to be waited for.
        native_checks: the C++ body refuses all that `check` does, with an error of its own. Then `check` is called
            before the reference, and where the C++ body has failed, to name the fault.
    """
    op = Op(name, reference, native_accepts, triton)
    _OPS[name] = op
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))

    def cpu(*args: Any, **kwargs: Any) -> Any:
        native = op.native_accepts is not None and native_status()[0] and op.native_accepts(*args, **kwargs)
        if check is not None and not (native and native_checks):
            check(*args, **kwargs)
        if not native:
            return op.reference(*args, **kwargs)
        try:
            return _native_op(name)(*args, **kwargs)
        except RuntimeError:
            if check is not None:
                check(*args, **kwargs)
            raise

    LIBRARY.impl(name, below_autocast(cpu, "cpu"), "CPU")
    LIBRARY.impl(name, below_autocast(functools.partial(_on_gpu, op), "cuda"), "CUDA")
    torch.library.register_fake(f"ddfast::{name}", fake, lib=LIBRARY)


def call(name: str, *args: Any) -> Any:
    """The op of these arguments, as every public function calls it; under forward-mode differentiation its reference.

    A registered op has no rule for tangents and would lose them without a word.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        return below_autocast(_OPS[name].reference, device)(*args)
    return getattr(torch.ops.ddfast, name)(*args)


def _on_gpu(op: Op, *args: Any, **kwargs: Any) -> Any:
    """The CUDA body of an op, with the device of its arguments as the current one: Triton launches on that."""
    index = _one_device(op.name, (*args, *kwargs.values()))
    body = _launcher(op.triton, op.name) if op.triton is not None and triton_status()[0] else op.reference
    if _gpus() == 1:
        return body(*args, **kwargs)
    with torch.cuda.device(index):
        return body(*args, **kwargs)


@functools.cache
def _launcher(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"ddfast.kernels.{module}"), name)


@functools.cache
def _gpus() -> int:
    """How many GPUs this process sees; asked when one of them is in use already."""
    return torch.cuda.device_count()


def _one_device(name: str, arguments: Iterable[Any]) -> int:
    """The index of the GPU that an op's tensors are on.

    Raises:
        ValueError: they are on several devices: a kernel would read memory that is not its own.
    """
    index = None
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            if index is None:
                index = argument.get_device()
            elif argument.get_device() != index:
                devices = [value.device for value in arguments if isinstance(value, torch.Tensor)]
                raise ValueError(
                    f"{name} takes tensors on one device, got {' and '.join(map(str, dict.fromkeys(devices)))}: "
                    "move them to one"
                )
    assert index is not None
    return index


@functools.cache
def _native_op(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.ddfast_native, name).default


def below_autocast(body: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The body with autocast suspended: what it calls must compute in the dtypes that the op was given."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(device):
            return body(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return body(*args, **kwargs)

    return run


def paths() -> list[Path]:
    """The body every op takes on the CPU and on CUDA on this machine, with the reason for each fallback."""
    rows = []
    for op in _OPS.values():
        loaded, reason = native_status()
        if op.native_accepts is None:
            rows.append(Path(op.name, "cpu", "reference", "no C++ body"))
        else:
            rows.append(Path(op.name, "cpu", "c++" if loaded else "reference", reason))
        available, reason = triton_status()
        if not torch.cuda.is_available():
            rows.append(Path(op.name, "cuda", "none", "no CUDA device"))
        elif op.triton is None:
            rows.append(Path(op.name, "cuda", "reference", "no Triton body"))
        else:
            rows.append(Path(op.name, "cuda", "triton" if available else "reference", reason))
    return rows
