"""Runs the Triton launchers of `ddfast.kernels` on a machine without a GPU.

A launcher is named "module.function", as in "masked_batch.masked_batch"; a case is the tuple of its
positional arguments, with CPU tensors. One call serves many cases, because every call starts a process:

    outputs = run("masked_batch.masked_batch", [(images, coalitions, ...), ...])     # the interpreter
    outputs = run("masked_batch.masked_batch", cases, where="cuda")                  # a real GPU
    binaries = compile_ahead("masked_batch.masked_batch", cases)                     # ptxas, without a GPU

`run` returns what the launcher returns, on the CPU, one entry a case. Memory that the launcher allocates
holds NaN (or the largest integer) beforehand, so that an element it forgets to write shows.

`compile_ahead` runs the launcher itself, with every kernel launch replaced by the compilation which that
launch would cause. So the signature, the constants, the number of warps and the alignment of the pointers
are those of a real launch, not a second description of them. It returns one `Binary` for each capability,
case and kernel launched:

    for binary in binaries:
        assert binary.spilled_bytes == 0
        assert max(binary.store_bytes) == 16

`WHERE` parametrizes a test over the interpreter and, where there is one, the GPU:

    @pytest.mark.parametrize("where", WHERE)

Interpretation and compilation need processes of their own: TRITON_INTERPRET is read when Triton is imported,
and decides for the whole process.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

WHERE = [
    "interpreter",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
CAPABILITIES = (80, 90, 100)
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Binary:
    """One kernel, compiled as one launch would compile it."""

    kernel: str
    case: int
    capability: int
    ptx: str
    registers: int
    spilled_bytes: int

    @property
    def load_bytes(self) -> list[int]:
        """Width of every load from global memory that a thread makes, in bytes."""
        return global_access_bytes(self.ptx, "ld")

    @property
    def store_bytes(self) -> list[int]:
        """Width of every store to global memory that a thread makes, in bytes."""
        return global_access_bytes(self.ptx, "st")


def global_access_bytes(ptx: str, instruction: str) -> list[int]:
    """Bytes of each `ld.global` or `st.global` instruction in the text of a PTX module."""
    found = re.findall(rf"\b{instruction}\.global(?:\.[a-zA-Z0-9_:]+)*? ", ptx)
    widths = []
    for text in found:
        vector = re.search(r"\.v(\d)\.", text)
        bits = re.search(r"\.[bfsu](\d+) $", text)
        assert bits is not None, f"no width in the PTX instruction {text!r}"
        widths.append(int(bits.group(1)) // 8 * (int(vector.group(1)) if vector else 1))
    return widths


def run(launcher: str, cases: Sequence[tuple], *, where: str = "interpreter") -> list[Any]:
    """Call the launcher on every case, interpreted or on the GPU, and bring the outputs to the CPU."""
    if where == "cuda":
        on_gpu = [tuple(_to(argument, "cuda") for argument in case) for case in cases]
        return [_to(_poisoned(_launcher(launcher), case), "cpu") for case in on_gpu]
    return _in_process("interpret", {"launcher": launcher, "cases": list(cases)}, TRITON_INTERPRET="1")


def compile_ahead(
    launcher: str, cases: Sequence[tuple], *, capabilities: Sequence[int] = CAPABILITIES
) -> list[Binary]:
    """Compile every kernel that the launcher launches on the cases, for the given compute capabilities."""
    request = {"launcher": launcher, "cases": list(cases), "capabilities": list(capabilities)}
    binaries = [Binary(**fields) for fields in _in_process("compile", request, TRITON_INTERPRET="0")]
    assert {(binary.case, binary.capability) for binary in binaries} == {
        (case, capability) for case in range(len(cases)) for capability in capabilities
    }, f"{launcher} launched no kernel for some case"
    return binaries


def _to(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    return value


def _launcher(name: str) -> Callable[..., Any]:
    module, function = name.split(".")
    return getattr(importlib.import_module(f"ddfast.kernels.{module}"), function)


def _poisoned(function: Callable[..., Any], arguments: tuple) -> Any:
    """`function(*arguments)` with uninitialised memory filled by torch with NaN or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return function(*arguments)
    finally:
        torch.use_deterministic_algorithms(before)


def _in_process(mode: str, request: dict[str, Any], **environment: str) -> Any:
    """Hand the request to this file, run as a script in a process of its own, and return its answer."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "request.pt"), Path(folder, "answer.pt")
        torch.save(request, question)
        finished = subprocess.run(
            [sys.executable, __file__, mode, question, answer],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "TRITON_CACHE_DIR": str(Path(folder, "cache")),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        assert finished.returncode == 0, f"{request['launcher']} ({mode}) failed:\n{finished.stderr[-6000:]}"
        return torch.load(answer)


def _interpret(request: dict[str, Any]) -> list[Any]:
    launcher = _launcher(request["launcher"])
    return [_poisoned(launcher, case) for case in request["cases"]]


def _compile(request: dict[str, Any]) -> list[dict[str, Any]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Target:
        """Stands in for the GPU driver. The capability doubles as the device index, which keys the caches."""

        def __init__(self, capability: int) -> None:
            self.capability = capability

        def get_current_device(self) -> int:
            return self.capability

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.capability, 32)

    compiled = []
    launch = JITFunction.run

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    JITFunction.run = compile_instead
    launcher = _launcher(request["launcher"])
    binaries = []
    for capability in request["capabilities"]:
        triton.runtime.driver.set_active(Target(capability))
        for index, case in enumerate(request["cases"]):
            compiled.clear()
            launcher(*case)
            for kernel in compiled:
                registers, spilled = _resources(kernel.asm["cubin"])
                binary = Binary(kernel.name, index, capability, kernel.asm["ptx"], registers, spilled)
                binaries.append(asdict(binary))
    return binaries


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory (spilled registers), of a thread of the one kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found)
    return registers, stack + local


if __name__ == "__main__":
    mode, question, answer = sys.argv[1:]
    torch.save({"interpret": _interpret, "compile": _compile}[mode](torch.load(question)), answer)
