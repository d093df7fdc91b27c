"""Compile every Triton kernel ahead of time, without a GPU, and print what the compiler made of it.

    python -m bench.static --out bench/results/static.md [--capability 80,90,100] [--processes 2]

For each kernel and compute capability: registers and spilled bytes a thread, shared memory a program, the widest load
and store a thread makes, and the matrix instructions. Exits with 1 where a register spills, or where accesses are
narrower than the case says they must be: 16 bytes, unless it gives a reason.

The cases call the ops' public faces; what reaches the dispatcher is recorded and handed to the launcher, so that every
launch compiled is one that a caller would cause.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import os
import pkgutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import facts
from ddfast import ops
from ddfast.data.files import atomic_write_text, make_folder

if TYPE_CHECKING:
    from ddfast.kernels.ahead_of_time import Binary

CAPABILITIES = (80, 90, 100)
WIDE = 16  # bytes a thread moves at a time where it can


@dataclass(frozen=True)
class Case:
    """One call of an op, and what its kernels must look like.

    Attributes:
        op: name of the op and of its launcher.
        what: the inputs, in words.
        call: makes the inputs and calls the op's face.
        load, store: bytes that the widest load and store of the main kernel must have at least.
        why: the reason where either is less than 16.
        matrix: whether the main kernel must use matrix instructions.
        main: the kernels that widths and matrix instructions are asked of; the op's own name by default.
    """

    op: str
    what: str
    call: Callable[[], Any]
    load: int = WIDE
    store: int = WIDE
    why: str = ""
    matrix: bool = False
    main: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.load, self.store) < WIDE and not self.why:
            raise ValueError(f"{self.op}, {self.what}: say why accesses may be narrower than {WIDE} bytes")

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the main kernels."""
        return self.main or (f"_{self.op}",)


@dataclass(frozen=True)
class Row:
    """One compiled kernel of one case."""

    op: str
    what: str
    kernel: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    load_bytes: int
    store_bytes: int
    matrix: str
    faults: tuple[str, ...]


# The cases
# -----------------------------------------------------------------------------------------------------


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _masked_batch(image_dtype: torch.dtype, dtype: torch.dtype, last: bool = False) -> Tensor:
    images = (_random(2, 3, 224, 224).abs() * 50).to(image_dtype)
    masks = torch.rand(32, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = _last(images) if last else images
    return ops.masked_batch(images, masks, grid=4, mean=statistics[0], std=statistics[1], dtype=dtype)


def _assemble(dtype: torch.dtype) -> Tensor:
    variants = _random(2, 14, 14, 16, 64, dtype=dtype).permute(0, 3, 4, 1, 2)
    variants = torch.stack([_last(each) for each in variants])
    table = torch.randint(-1, 16, (14, 14, 4), dtype=torch.int32)
    return ops.assemble_masked_features(variants, torch.rand(32, 16) < 0.5, table)


def _heatmap(value: str, dtype: torch.dtype) -> Tensor:
    labels = torch.arange(4)
    return ops.shapley_heatmap(_random(4, 32, 1000, dtype=dtype), labels, _random(32, 16), value=value)


def _boxes() -> Tensor:
    return ops.noisy_crop_boxes(
        _random(64, 16), torch.arange(64), seed=1, grid=4, image_size=224, crop_size=112
    )


def _heatmap_boxes(value: str) -> Any:
    outputs, labels, ids = _random(16, 32, 1000), torch.arange(16), torch.arange(16)
    return ops.shapley_crop_boxes(
        outputs, labels, _random(32, 16), ids, value=value, seed=1, grid=4, image_size=224, crop_size=112
    )


def _crops(dtype: torch.dtype, *, backward: bool = False) -> Any:
    images = (_random(2, 3, 224, 224).abs() * 50).to(dtype).requires_grad_(backward)
    boxes = torch.tensor([[[0, 0, 112, 112], [10, 20, 170, 180]], [[5, 6, 117, 118], [0, 0, 224, 224]]])
    tiles = ops.crop_resize(images, boxes, 112)
    return tiles.sum().backward() if backward else tiles


def _padded_crops() -> Tensor:
    boxes = torch.tensor([[[0, 0, 112, 112], [10, 20, 122, 132]], [[5, 6, 117, 118], [0, 0, 112, 112]]])
    images = (_random(2, 3, 224, 224).abs() * 50).to(torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return ops.crop_batch(images, boxes, 112, padded=224, mean=mean, std=std, dtype=torch.bfloat16)


def _linear(dtype: torch.dtype) -> Tensor:
    return ops.grad_sq_norm_linear(_random(8, 197, 384, dtype=dtype), _random(8, 197, 384, dtype=dtype))


def _conv2d(dtype: torch.dtype, channels: int, side: int) -> Tensor:
    x, g = (_last(_random(8, channels, side, side, dtype=dtype)) for _ in range(2))
    return ops.grad_sq_norm_conv2d(x, g, 3, padding=1)


def _stem(dtype: torch.dtype) -> Tensor:
    """The first layer of a ResNet."""
    x, g = _last(_random(16, 3, 112, 112, dtype=dtype)), _last(_random(16, 64, 56, 56, dtype=dtype))
    return ops.grad_sq_norm_conv2d(x, g, 7, stride=2, padding=3, bias=False)


def _epilogue(dtype: torch.dtype) -> Tensor:
    x, other = (_last(_random(8, 64, 28, 28, dtype=dtype)) for _ in range(2))
    return ops.add_bias_relu_(x, _random(64, dtype=dtype), other)


def _norm(dtype: torch.dtype, dims: tuple[int, int]) -> Tensor:
    shape = (8, 64, 28, 28) if dims == (1, 1) else (8, 64, 256)
    return ops.grad_sq_norm_norm(_random(*shape, dtype=dtype), _random(*shape, dtype=dtype), dims)


def _normalization(groups: int | None) -> Any:
    x, g = _random(4, 64, 28, 28), _random(4, 64, 28, 28)
    mean = _random(64) if groups is None else _random(4, groups)
    return ops.normalization_backward(x, g, mean, mean.abs() + 1, _random(64))


def _embedding() -> Tensor:
    return ops.grad_sq_norm_embedding(torch.randint(0, 50, (8, 64)), _random(8, 64, 256))


_PLANES = "uint8 images in planes are gathered into channels-last order"
_BYTES = "a thread's 8 pixels of uint8 are 8 bytes"
_SECTORS = "a logit of each coalition is gathered"
_GATHERED = "pixels under the boxes are gathered, tap by tap"
_UNFOLDED = "an unfolded image is gathered, tap by tap, and a number a program is stored"
_NUMBER = "a number a program is stored"
_CELLS = "a warp holds one heatmap, a cell a thread, and its boxes"


def cases() -> list[Case]:
    """Every op with a Triton body, on inputs as the engine gives them."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    return [
        Case(
            "masked_batch",
            "uint8 to bfloat16",
            partial(_masked_batch, torch.uint8, brain),
            load=4,
            why=_PLANES,
        ),
        Case(
            "masked_batch",
            "uint8 channels-last to float16",
            partial(_masked_batch, torch.uint8, half, last=True),
            load=8,
            why=_BYTES,
        ),
        Case("masked_batch", "float32 channels-last", partial(_masked_batch, single, single, last=True)),
        *(
            Case("assemble_masked_features", _name(dtype), partial(_assemble, dtype))
            for dtype in (half, brain, single)
        ),
        Case(
            "shapley_heatmap",
            "logit, float32",
            partial(_heatmap, "logit", single),
            load=4,
            store=4,
            why=_SECTORS,
        ),
        *(
            Case(
                "shapley_heatmap",
                f"prob, {_name(dtype)}",
                partial(_heatmap, "prob", dtype),
                store=4,
                why="16 numbers an image are stored",
            )
            for dtype in (single, brain)
        ),
        Case("noisy_crop_boxes", "4x4 cells, 5 crops", _boxes, load=4, store=4, why=_CELLS),
        Case("shapley_crop_boxes", "logit", partial(_heatmap_boxes, "logit"), load=4, store=4, why=_SECTORS),
        Case("shapley_crop_boxes", "prob", partial(_heatmap_boxes, "prob"), store=4, why=_CELLS),
        Case(
            "crop_resize",
            "uint8",
            partial(_crops, torch.uint8),
            load=1,
            store=4,
            why=f"{_GATHERED}; a thread's 4 pixels of uint8 are 4 bytes",
        ),
        Case("crop_resize", "float32", partial(_crops, single), load=4, why=_GATHERED),
        Case("crop_batch", "uint8 to padded bfloat16", _padded_crops, load=4, why=_GATHERED),
        Case(
            "crop_resize_backward",
            "float32",
            partial(_crops, single, backward=True),
            load=4,
            why="gradients of the boxes that cover a pixel are gathered",
        ),
        *(
            Case(
                "grad_sq_norm_linear",
                _name(dtype),
                partial(_linear, dtype),
                store=4,
                why=_NUMBER,
                matrix=True,
                main=("_direct", "_gram"),
            )
            for dtype in (half, single)
        ),
        *(
            Case(
                "grad_sq_norm_conv2d",
                f"{channels} channels of {side} px, {_name(dtype)}",
                partial(_conv2d, dtype, channels, side),
                load=8,
                store=4,
                why=_UNFOLDED,
                matrix=True,
                main=("_direct", "_gram"),
            )
            for channels, side in ((64, 28), (256, 7))
            for dtype in (brain, single)
        ),
        *(
            Case(
                "grad_sq_norm_conv2d",
                f"stem of 3 channels, 7x7, {_name(dtype)}",
                partial(_stem, dtype),
                store=4,
                why=_NUMBER,
                matrix=True,
                main=("_direct",),
            )
            for dtype in (brain, single)
        ),
        *(
            Case("add_bias_relu_", _name(dtype), partial(_epilogue, dtype), main=("_add_bias_relu",))
            for dtype in (brain, single)
        ),
        *(
            Case(
                "grad_sq_norm_norm",
                what,
                partial(_norm, single, dims),
                store=4,
                why=_NUMBER,
                main=("_affine",),
            )
            for what, dims in (("BatchNorm", (1, 1)), ("LayerNorm", (2, 2)))
        ),
        Case("normalization_backward", "BatchNorm", partial(_normalization, None), main=("_pass",)),
        Case(
            "normalization_backward",
            "GroupNorm",
            partial(_normalization, 32),
            store=4,
            why="the first of its two passes stores sums",
            main=("_pass",),
        ),
        Case(
            "grad_sq_norm_embedding",
            "float32",
            _embedding,
            store=4,
            why=_NUMBER,
            matrix=True,
            main=("_embedding",),
        ),
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# From a call of a face to the launches it causes
# -----------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Context in which the arguments of every call of an op that has a launcher are kept."""

    def __init__(self, known: Iterable[str]) -> None:
        super().__init__()
        self.known = set(known)
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("ddfast::")
        if func.namespace == "ddfast" and name in self.known:
            self.calls.append((name, args))
        return func(*args, **(kwargs or {}))


def launchers() -> dict[str, ModuleType]:
    """The launchers of `ddfast.kernels`, functions with the name of an op, and the modules that hold them."""
    import ddfast.kernels

    names = {path.op for path in ops.paths()}
    found = {}
    for info in pkgutil.iter_modules(ddfast.kernels.__path__, "ddfast.kernels."):
        module = importlib.import_module(info.name)
        functions = inspect.getmembers(module, inspect.isfunction)
        found |= {
            name: module
            for name, function in functions
            if name in names and function.__module__ == module.__name__
        }
    return found


def launches(case: Case) -> list[Callable[[], Any]]:
    """The launches of the case's own op that calling its face causes.

    Raises:
        RuntimeError: the face never called the op.
    """
    modules = launchers()
    with _Recorder([case.op]) as recorder:
        case.call()
    if not recorder.calls:
        raise RuntimeError(f"{case.op}, {case.what}: the call never reached the op")
    return [partial(getattr(modules[name], name), *args) for name, args in recorder.calls]


def examine(case: Case, capabilities: Sequence[int]) -> list[Row]:
    """Compile a case for each capability, in a process for this alone: see `ddfast.kernels.ahead_of_time`."""
    from ddfast.kernels.ahead_of_time import compile_launches
    from triton.compiler.errors import CompilationError

    calls = launches(case)
    rows = []
    for capability in capabilities:
        try:
            binaries = compile_launches(calls, [capability])
        except (CompilationError, RuntimeError) as error:  # the latter from a pass of the compiler
            fault = f"does not compile: {str(error).strip().splitlines()[-1]}"
            rows.append(Row(case.op, case.what, case.kernels[0], capability, 0, 0, 0, 0, 0, 0, "", (fault,)))
            continue
        rows += [_row(case, binary) for binary in binaries]
    missing = [
        capability
        for capability in capabilities
        if not any(row.capability == capability and row.kernel in case.kernels for row in rows)
    ]
    if missing:
        raise RuntimeError(
            f"{case.op}, {case.what}: none of {', '.join(case.kernels)} was launched for sm_{missing[0]}"
        )
    return list(dict.fromkeys(rows))


def _row(case: Case, binary: Binary) -> Row:
    instructions = binary.matrix_instructions
    row = Row(
        case.op,
        case.what,
        binary.kernel,
        binary.capability,
        binary.registers,
        binary.spilled_bytes,
        binary.shared_bytes,
        binary.warps,
        max(binary.load_bytes, default=0),
        max(binary.store_bytes, default=0),
        ", ".join(f"{count} {name}" for name, count in sorted(instructions.items())),
        (),
    )
    return dataclasses.replace(row, faults=faults(case, row))


def faults(case: Case, row: Row) -> tuple[str, ...]:
    """What a compiled kernel does that it must not do."""
    found = []
    if row.spilled_bytes:
        found.append(f"{row.spilled_bytes} bytes spilled")
    if row.kernel in case.kernels:
        for what, widest, least in (
            ("load", row.load_bytes, case.load),
            ("store", row.store_bytes, case.store),
        ):
            if widest < least:
                found.append(f"widest {what} {widest} bytes, {least} fit")
        if case.matrix and not row.matrix:
            found.append("no matrix instruction")
    return tuple(found)


def report(
    chosen: Sequence[Case], capabilities: Sequence[int] = CAPABILITIES, processes: int = 2
) -> Iterator[list[Row]]:
    """The rows of each case, in order, compiled in a pool of processes without a cache."""
    with tempfile.TemporaryDirectory() as cache:
        started = (cache,)
        with ProcessPoolExecutor(
            processes, mp_context=get_context("spawn"), initializer=_start, initargs=started
        ) as pool:
            yield from pool.map(
                partial(_examine_number, capabilities=tuple(capabilities)), map(_number, chosen)
            )


def _start(cache: str) -> None:
    """Settings of a worker, before it imports Triton."""
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_INTERPRET"] = "0"
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    torch.set_num_threads(1)


def _number(case: Case) -> tuple[str, str]:
    return case.op, case.what


def _examine_number(number: tuple[str, str], capabilities: Sequence[int]) -> list[Row]:
    """Examine the case of that op and description; cases hold closures, which do not travel between processes."""
    (case,) = (case for case in cases() if _number(case) == number)
    return examine(case, capabilities)


# Output
# -----------------------------------------------------------------------------------------------------

_COLUMNS = {
    "kernel": lambda row: f"`{row.kernel}`",
    "inputs": lambda row: f"{row.op}, {row.what}",
    "sm": lambda row: str(row.capability),
    "registers": lambda row: str(row.registers),
    "spilled": lambda row: str(row.spilled_bytes),
    "shared": lambda row: str(row.shared_bytes),
    "warps": lambda row: str(row.warps),
    "load": lambda row: str(row.load_bytes),
    "store": lambda row: str(row.store_bytes),
    "matrix instructions": lambda row: row.matrix,
    "fault": lambda row: "; ".join(row.faults),
}


def table(rows: Sequence[Row]) -> str:
    """The report in Markdown."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "| --- " * len(_COLUMNS) + "|"]
    lines += [f"| {' | '.join(cell(row) for cell in _COLUMNS.values())} |" for row in rows]
    return "\n".join(lines) + "\n"


def page(rows: Sequence[Row], chosen: Sequence[Case]) -> str:
    """The table, the reasons for narrow accesses, and the versions."""
    faulty = sum(bool(row.faults) for row in rows)
    reasons = {f"{case.op}, {case.what}": case.why for case in chosen if case.why}
    versions = ", ".join(f"{name} {version}" for name, version in facts.software().items())
    revision, dirty = facts.commit()
    return "\n".join(
        [
            "Kernels compiled ahead of time. Registers and spilled bytes are a thread's, shared bytes a program's; "
            "load and store are the bytes of the widest access of a thread to global memory.\n",
            f"{len(rows)} kernels, {faulty} with a fault.\n",
            table(rows),
            "Accesses narrower than 16 bytes, and why:\n",
            "".join(f"- {what}: {why}\n" for what, why in reasons.items()),
            f"- {versions}, commit {revision}{' with changes' if dirty else ''}\n",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, write; 1 where a kernel has a fault."""
    parser = argparse.ArgumentParser(
        prog="ddfast bench static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=None, help="a Markdown file; printed either way")
    parser.add_argument(
        "--capability", type=lambda text: [int(part) for part in text.split(",")], default=list(CAPABILITIES)
    )
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    chosen, rows = cases(), []
    for of_case in report(chosen, arguments.capability, arguments.processes):
        rows += of_case
        print(table(of_case).split("\n", 2)[2], end="", flush=True)
    text = page(rows, chosen)
    if arguments.out is not None:
        make_folder(arguments.out.parent)
        atomic_write_text(arguments.out, text)
    faulty = [row for row in rows if row.faults]
    for row in faulty:
        print(
            f"{row.kernel} ({row.op}, {row.what}, sm_{row.capability}): {'; '.join(row.faults)}",
            file=sys.stderr,
        )
    print(f"{len(rows)} kernels, {len(faulty)} with a fault, {time.monotonic() - started:.0f} s")
    return int(bool(faulty))


if __name__ == "__main__":
    raise SystemExit(main())
