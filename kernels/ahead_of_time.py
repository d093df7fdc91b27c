"""Compiles the kernels that a call would launch on a GPU, on a machine without one, and reads what the compiler made.

    binaries = compile_launches([lambda: masked_batch(images, coalitions, ...)], capabilities=(80, 90, 100))

A call runs its launcher on CPU tensors, with every kernel launch replaced by the compilation which that launch would
cause. So the signature, the constants, the number of warps and the alignment of the pointers are those of a real
launch, not a second description of them. Nothing is computed: the launcher's outputs hold whatever memory held.

It needs a process of its own: it leaves a stand-in in the place of Triton's GPU driver, and TRITON_INTERPRET, which
must not be set, is read when Triton is imported and decides for the whole process.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from ddfast.kernels import launching
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

_MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_GLOBAL = {
    "ld": re.compile(r"\bld\.global(?:\.[a-zA-Z0-9_:]+)*? "),
    "st": re.compile(r"\bst\.global(?:\.[a-zA-Z0-9_:]+)*? "),
}
_ASYNC_COPY = re.compile(r"\bcp\.async\.\S+ \[[^\]]*\], \[[^\]]*\], (0x[0-9a-fA-F]+|\d+)")


@dataclass(frozen=True)
class Binary:
    """One kernel, compiled as one launch would compile it.

    Attributes:
        kernel: name of the Triton function.
        case: number of the call that launched it, from 0.
        capability: compute capability, 90 for 9.0.
        ptx: the text of its PTX module.
        registers: a thread uses.
        spilled_bytes: of local memory a thread uses, on the stack or beside it.
        shared_bytes: of shared memory a program uses.
        warps: of a program.
    """

    kernel: str
    case: int
    capability: int
    ptx: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int

    @property
    def load_bytes(self) -> list[int]:
        """Width of every access by which a thread reads global memory, in bytes: loads, and copies to shared memory."""
        copies = [int(width, 0) for width in _ASYNC_COPY.findall(self.ptx)]
        return _access_bytes(self.ptx, "ld") + copies

    @property
    def store_bytes(self) -> list[int]:
        """Width of every store to global memory that a thread makes, in bytes."""
        return _access_bytes(self.ptx, "st")

    @property
    def matrix_instructions(self) -> Counter[str]:
        """How many instructions of each family of matrix instructions the PTX holds."""
        return Counter(_MATRIX.findall(self.ptx))


def _access_bytes(ptx: str, instruction: str) -> list[int]:
    widths = []
    for text in _GLOBAL[instruction].findall(ptx):
        vector = re.search(r"\.v(\d)\.", text)
        bits = re.search(r"\.[bfsu](\d+) $", text)
        if bits is None:
            raise ValueError(f"no width in the PTX instruction {text!r}")
        widths.append(int(bits.group(1)) // 8 * (int(vector.group(1)) if vector else 1))
    return widths


def compile_launches(calls: Sequence[Callable[[], Any]], capabilities: Sequence[int]) -> list[Binary]:
    """Compile every kernel that the calls would launch, in that order, for each of the compute capabilities."""
    binaries = []
    for capability in capabilities:
        triton.runtime.driver.set_active(_Driver(capability))
        launching.forget()
        for case, call in enumerate(calls):
            with _compiling() as compiled:
                call()
            binaries += [_binary(kernel, case, capability) for kernel in compiled]
    return binaries


def _binary(kernel: Any, case: int, capability: int) -> Binary:
    registers, spilled = _resources(kernel.asm["cubin"])
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    return Binary(kernel.name, case, capability, kernel.asm["ptx"], registers, spilled, shared, warps)


class _Driver:
    """Stands in for the GPU driver. The capability doubles as the device index, which keys the caches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def _compiling() -> Iterator[list[Any]]:
    """Context in which a launch compiles; its value is the list of what was compiled."""
    compiled: list[Any] = []
    launch = JITFunction.run

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        # What was compiled is not returned: a prepared launch would call it the next time.
        compiled.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_instead
    try:
        yield compiled
    finally:
        JITFunction.run = launch


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory (spilled registers), of a thread of the one kernel in a cubin."""
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
