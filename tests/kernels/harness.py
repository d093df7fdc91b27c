"""Runs the Triton launchers of `ddfast.kernels` on a machine without a GPU.

A launcher is named "module.function", as in "masked_batch.masked_batch"; a case is the tuple of its
positional arguments, with CPU tensors. One call serves many cases, because every call starts a process:

    outputs = run("masked_batch.masked_batch", [(images, coalitions, ...), ...])     # the interpreter
    outputs = run("masked_batch.masked_batch", cases, where="cuda")                  # a real GPU
    binaries = compile_ahead("masked_batch.masked_batch", cases)                     # ptxas, without a GPU

`run` returns what the launcher returns (one that works in place: its first argument), on the CPU, one entry a case.
Memory that the launcher allocates
holds NaN (or the largest integer) beforehand, so that an element it forgets to write shows.

`compile_ahead` compiles what the launcher would launch, see `ddfast.kernels.ahead_of_time`. It returns one
`Binary` for each capability, case and kernel launched:

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
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ddfast.kernels.ahead_of_time import Binary, compile_launches

WHERE = [
    "interpreter",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
CAPABILITIES = (80, 90, 100)
TIMEOUT_SECONDS = 600


def run(launcher: str, cases: Sequence[tuple], *, where: str = "interpreter") -> list[Any]:
    """Call the launcher on every case, interpreted or on the GPU, and bring the outputs to the CPU."""
    if where == "cuda":
        on_gpu = [tuple(_to(argument, "cuda") for argument in case) for case in cases]
        return [_to(_poisoned(_launcher(launcher), case), "cpu") for case in on_gpu]
    return run_each([(launcher, case) for case in cases])


def run_each(calls: Sequence[tuple[str, tuple]], *, where: str = "interpreter") -> list[Any]:
    """As `run`, of several launchers in one process: pairs (launcher, case)."""
    if where == "cuda":
        return [run(launcher, [case], where=where)[0] for launcher, case in calls]
    return _in_process(
        "interpret", {"launcher": " and ".join(dict(calls)), "calls": list(calls)}, TRITON_INTERPRET="1"
    )


def compile_ahead(
    launcher: str, cases: Sequence[tuple], *, capabilities: Sequence[int] = CAPABILITIES
) -> list[Binary]:
    """Compile every kernel that the launcher launches on the cases, for the given compute capabilities."""
    return compile_each([(launcher, case) for case in cases], capabilities=capabilities)


def compile_each(
    calls: Sequence[tuple[str, tuple]], *, capabilities: Sequence[int] = CAPABILITIES
) -> list[Binary]:
    """As `compile_ahead`, of several launchers in one process: pairs (launcher, case)."""
    launchers = " and ".join(dict(calls))
    request = {"launcher": launchers, "calls": list(calls), "capabilities": list(capabilities)}
    binaries = [Binary(**fields) for fields in _in_process("compile", request, TRITON_INTERPRET="0")]
    assert {(binary.case, binary.capability) for binary in binaries} == {
        (case, capability) for case in range(len(calls)) for capability in capabilities
    }, f"{launchers} launched no kernel for some case"
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
        result = function(*arguments)
        return arguments[0] if result is None else result  # a launcher that works in place
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
    return [_poisoned(_launcher(launcher), case) for launcher, case in request["calls"]]


def _compile(request: dict[str, Any]) -> list[dict[str, Any]]:
    calls = [partial(_launcher(launcher), *case) for launcher, case in request["calls"]]
    return [asdict(binary) for binary in compile_launches(calls, request["capabilities"])]


if __name__ == "__main__":
    mode, question, answer = sys.argv[1:]
    torch.save({"interpret": _interpret, "compile": _compile}[mode](torch.load(question)), answer)
