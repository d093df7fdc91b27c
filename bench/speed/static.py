"""Compile every Triton kernel ahead of time, without a GPU, and print what the compiler made of it.

    python -m bench static --out bench/results/static.md [--capability 80,90,100] [--processes 2]

For each kernel and compute capability: registers and spilled bytes a thread, shared memory a program, the widest load
and store a thread makes, and the matrix instructions. Exits with 1 where a register spills, or where accesses are
narrower than the case says they must be: 16 bytes, unless it gives a reason.

The cases have the sizes of the score pass: micro-batches of 16 and of 128 sources, which are 512 and 4,096 masked
images and 80 and 640 crops; and those of a matching step, 256 real images of a class and 2,560 of ten. Launchers choose
tiles by them, so a tile stands beside each kernel, and how many programs and waves of them either size launches: a wave
is as many programs as the registers, warps and shared memory of all multiprocessors hold at once, on the GPU named in
`GPUS`.

The cases call the ops' public faces, on tensors without memory ("meta"); what reaches the dispatcher is recorded and
handed to the launcher, so that every launch compiled is one that a caller would cause.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import math
import os
import pkgutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import facts
from ddfast import ops
from ddfast.files import atomic_write_text, make_folder

if TYPE_CHECKING:
    from ddfast.kernels.ahead_of_time import Binary

CAPABILITIES = (80, 90, 100)
SOURCES = (16, 128)  # of a micro-batch of the score pass
MATCHED = (256, 2560)  # images of a matching step
CROPS, COALITIONS = 5, 32  # of a source
WIDE = 16  # bytes a thread moves at a time where it can


@dataclass(frozen=True)
class Case:
    """One call of an op, and what its kernels must look like.

    Attributes:
        op: name of the op and of its launcher.
        what: the inputs, in words.
        call: makes the inputs for a number of sources, or images, and calls the op's face.
        load, store: bytes that the widest load and store of the main kernel must have at least.
        why: the reason where either is less than 16.
        matrix: whether the main kernel must use matrix instructions.
        main: the kernels that widths and matrix instructions are asked of; the op's own name by default.
        sizes: the numbers of sources or images.
    """

    op: str
    what: str
    call: Callable[[int], Any]
    load: int = WIDE
    store: int = WIDE
    why: str = ""
    matrix: bool = False
    main: tuple[str, ...] = ()
    sizes: tuple[int, ...] = SOURCES

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
    tile: str = ""
    programs: tuple[tuple[int, int], ...] = ()  # sources or images, and the programs that so many launch

    @property
    def waves(self) -> list[float]:
        """How often the programs of each size fill the GPU."""
        gpu = GPUS.get(self.capability)
        if gpu is None:
            return []
        return [count / (gpu.processors * gpu.resident(self)) for _, count in self.programs]


@dataclass(frozen=True)
class Gpu:
    """What bounds the programs that run at once: multiprocessors, and the bytes of shared memory of each."""

    name: str
    processors: int
    shared_bytes: int

    def resident(self, row: Row) -> int:
        """Programs of a kernel that a multiprocessor holds at once.

        It has 64 warps, 32 programs and 65,536 registers, handed out by 256 to a warp; of shared memory the system
        takes 1,024 bytes a program.
        """
        registers_a_warp = -(-max(row.registers, 1) * 32 // 256) * 256
        return max(
            1,
            min(
                32,
                64 // row.warps if row.warps else 32,
                65536 // (registers_a_warp * max(row.warps, 1)),
                self.shared_bytes // (row.shared_bytes + 1024),
            ),
        )


GPUS = {
    80: Gpu("A100", 108, 164 << 10),
    90: Gpu("H200", 132, 228 << 10),
    100: Gpu("B200", 148, 228 << 10),
}


# The cases
# -----------------------------------------------------------------------------------------------------


def _of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


_STATISTICS: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def _masked_batch(image_dtype: torch.dtype, dtype: torch.dtype, last: bool, sources: int) -> Tensor:
    images = _of(sources, 3, 224, 224, dtype=image_dtype)
    masks = _of(COALITIONS, 16, dtype=torch.bool)
    return ops.masked_batch(_last(images) if last else images, masks, grid=4, dtype=dtype, **_STATISTICS)


def _assemble(dtype: torch.dtype, sources: int) -> Tensor:
    variants = _of(sources, 14, 14, 16, 64, dtype=dtype).permute(0, 3, 4, 1, 2)
    variants = torch.stack([_last(each) for each in variants])
    table = _of(14, 14, 4, dtype=torch.int32)
    return ops.assemble_masked_features(variants, _of(COALITIONS, 16, dtype=torch.bool), table)


def _heatmap(value: str, dtype: torch.dtype, sources: int) -> Tensor:
    outputs = _of(sources, COALITIONS, 1000, dtype=dtype)
    return ops.shapley_heatmap(outputs, torch.arange(sources), _of(COALITIONS, 16), value=value)


def _boxes(sources: int) -> Tensor:
    return ops.noisy_crop_boxes(
        _of(sources, 16), torch.arange(sources), seed=1, grid=4, image_size=224, crop_size=112, crops=CROPS
    )


def _heatmap_boxes(value: str, sources: int) -> Any:
    labels = ids = torch.arange(sources)
    return ops.shapley_crop_boxes(
        _of(sources, COALITIONS, 1000), labels, _of(COALITIONS, 16), ids,
        value=value, seed=1, grid=4, image_size=224, crop_size=112, crops=CROPS,
    )  # fmt: skip


def _corners(sources: int, side: int) -> Tensor:
    """The same boxes for every source."""
    boxes = [[10 * n, 5 * n, 10 * n + side, 5 * n + side] for n in range(CROPS)]
    return torch.tensor(boxes).expand(sources, CROPS, 4).contiguous()


def _crops(dtype: torch.dtype, backward: bool, sources: int) -> Any:
    images = _of(sources, 3, 224, 224, dtype=dtype).requires_grad_(backward)
    tiles = ops.crop_resize(images, _corners(sources, 160), 112)
    return tiles.sum().backward() if backward else tiles


def _padded_crops(sources: int) -> Tensor:
    images = _of(sources, 3, 224, 224, dtype=torch.uint8)
    boxes = _corners(sources, 112)
    return ops.crop_batch(images, boxes, 112, padded=224, dtype=torch.bfloat16, **_STATISTICS)


def _linear(dtype: torch.dtype, sources: int) -> Tensor:
    x, g = (_of(CROPS * sources, 197, 384, dtype=dtype) for _ in range(2))
    return ops.grad_sq_norm_linear(x, g)


def _conv2d(dtype: torch.dtype, channels: int, side: int, sources: int) -> Tensor:
    x, g = (_last(_of(CROPS * sources, channels, side, side, dtype=dtype)) for _ in range(2))
    return ops.grad_sq_norm_conv2d(x, g, 3, padding=1)


def _stem(dtype: torch.dtype, sources: int) -> Tensor:
    """ResNet's first layer: 7 x 7 over 3 channels, every second pixel."""
    x, g = (_last(_of(CROPS * sources, *shape, dtype=dtype)) for shape in ((3, 224, 224), (64, 112, 112)))
    return ops.grad_sq_norm_conv2d(x, g, 7, stride=2, padding=3, bias=False)


def _epilogue(dtype: torch.dtype, sources: int) -> Tensor:
    x, other = (_last(_of(COALITIONS * sources, 64, 56, 56, dtype=dtype)) for _ in range(2))
    return ops.add_bias_relu_(x, _of(64, dtype=dtype), other)


def _norm(dtype: torch.dtype, dims: tuple[int, int], sources: int) -> Tensor:
    shape = (CROPS * sources, *((64, 56, 56) if dims == (1, 1) else (197, 384)))
    return ops.grad_sq_norm_norm(_of(*shape, dtype=dtype), _of(*shape, dtype=dtype), dims)


def _normalization(groups: int | None, sources: int) -> Any:
    x, g = (_of(CROPS * sources, 64, 56, 56) for _ in range(2))
    mean = _of(64) if groups is None else _of(CROPS * sources, groups)
    return ops.normalization_backward(x, g, mean, mean, _of(64))


def _convnet_block(
    dtype: torch.dtype, inputs: int, side: int, sources: int, *, backward: bool = False
) -> Any:
    weight = _of(128, inputs, 3, 3, dtype=dtype).requires_grad_(backward)
    vector = _of(128, dtype=dtype)
    pooled = ops.convnet_block(_of(sources, inputs, side, side, dtype=dtype), weight, vector, vector, vector)
    return pooled.sum().backward() if backward else pooled


def _class_kl(features: int, images: int) -> Tensor:
    members, counts = _of(images, dtype=torch.int64), _of(10, dtype=torch.int64)
    return torch.ops.ddfast.class_kl(_of(images, features), members, counts, True)


def _augment(dtype: torch.dtype, side: int, images: int, *, backward: bool) -> Any:
    """A row for each of ten classes."""
    x = _of(images, 3, side, side, dtype=dtype).requires_grad_(backward)
    made = ops.siamese_augment(x, ops.augment_parameters(10 if images % 10 == 0 else 1, device=x.device))
    return made.sum().backward() if backward else made


def _embedding(sources: int) -> Tensor:
    indices = _of(CROPS * sources, 64, dtype=torch.int64)
    return ops.grad_sq_norm_embedding(indices, _of(CROPS * sources, 64, 256))


_PLANES = "uint8 images in planes are gathered into channels-last order"
_BYTES = "a thread's 8 pixels of uint8 are 8 bytes"
_SECTORS = "a logit of each coalition is gathered"
_GATHERED = "pixels under the boxes are gathered, tap by tap"
_UNFOLDED = "an unfolded image is gathered, tap by tap, and a number a program is stored"
_NUMBER = "a number a program is stored"
_READ = "pixels are gathered from where a row of parameters says"
_CELLS = "a warp holds one heatmap, a cell a thread, and its boxes"


def cases() -> list[Case]:
    """Every op with a Triton body, on inputs as the engine gives them."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    return [
        Case(
            "masked_batch",
            "uint8 to bfloat16",
            partial(_masked_batch, torch.uint8, brain, False),
            load=4,
            why=_PLANES,
        ),
        Case(
            "masked_batch",
            "uint8 channels-last to float16",
            partial(_masked_batch, torch.uint8, half, True),
            load=8,
            why=_BYTES,
        ),
        Case("masked_batch", "float32 channels-last", partial(_masked_batch, single, single, True)),
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
            partial(_crops, torch.uint8, False),
            load=1,
            store=4,
            why=f"{_GATHERED}; a thread's 4 pixels of uint8 are 4 bytes",
        ),
        Case("crop_resize", "float32", partial(_crops, single, False), load=4, why=_GATHERED),
        Case("crop_batch", "uint8 to padded bfloat16", _padded_crops, load=4, why=_GATHERED),
        Case(
            "crop_resize_backward",
            "float32",
            partial(_crops, single, True),
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
            for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7))
            for dtype in (brain, single)
        ),
        *(
            Case(
                "grad_sq_norm_conv2d",
                f"3 channels of 224 px, 7x7, {_name(dtype)}",
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
        *(
            Case(
                f"convnet_block{'_backward' if backward else ''}",
                f"{inputs} to 128 channels of {side} px, {_name(dtype)}",
                partial(_convnet_block, dtype, inputs, side, backward=backward),
                main=("_backward" if backward else "_forward",),
                sizes=MATCHED,
            )
            for backward in (False, True)
            for inputs, side, dtype in (
                *((3, 32, single), (128, 16, single), (128, 8, single)),  # ConvNet-3
                *((3, 32, brain), (128, 16, brain), (128, 8, brain)),
                (3, 112, single),
            )
        ),
        *(
            Case(
                "class_kl",
                f"{features} features of 10 classes, float32",
                partial(_class_kl, features),
                sizes=MATCHED,
            )
            for features in (512, 2048)
        ),
        *(
            Case(
                f"siamese_augment{'_backward' if backward else ''}",
                f"{side} px, {_name(dtype)}",
                partial(_augment, dtype, side, backward=backward),
                load=2 if dtype == brain else 4,
                why=_READ,
                sizes=MATCHED,
            )
            for backward in (False, True)
            for side, dtype in ((32, single), (32, brain), (128, single))
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
    found: dict[str, ModuleType] = {}
    for info in pkgutil.iter_modules(ddfast.kernels.__path__, "ddfast.kernels."):
        module = importlib.import_module(info.name)
        functions = inspect.getmembers(module, inspect.isfunction)
        found |= {
            name: module
            for name, function in functions
            if name in names and function.__module__ == module.__name__
        }
    return found


def launches(case: Case, sources: int = SOURCES[0], device: str = "meta") -> list[Callable[[], Any]]:
    """The launches of the case's own op that calling its face causes, on tensors of a device.

    Raises:
        RuntimeError: the face never called the op.
    """
    modules = launchers()
    with torch.device(device), _Recorder([case.op]) as recorder:
        case.call(sources)
    if not recorder.calls:
        raise RuntimeError(f"{case.op}, {case.what}: the call never reached the op")
    return [partial(getattr(modules[name], name), *args) for name, args in recorder.calls]


def examine(case: Case, capabilities: Sequence[int]) -> list[Row]:
    """Compile a case for each capability, in a process for this alone: see `ddfast.kernels.ahead_of_time`."""
    from ddfast.kernels.ahead_of_time import compile_launches
    from triton.compiler.errors import CompilationError

    found: dict[Row, list[tuple[int, int]]] = {}
    for capability in capabilities:
        for sources in case.sizes:
            try:
                with _launched() as shapes:
                    binaries = compile_launches(launches(case, sources), [capability])
            except (CompilationError, RuntimeError) as error:  # the latter from a pass of the compiler
                fault = f"does not compile: {str(error).strip().splitlines()[-1]}"
                row = Row(case.op, case.what, case.kernels[0], capability, 0, 0, 0, 0, 0, 0, "", (fault,))
                found.setdefault(row, [])
                break
            for binary, (programs, tile) in zip(binaries, shapes, strict=True):
                found.setdefault(_row(case, binary, tile), []).append((sources, programs))
    rows = [dataclasses.replace(row, programs=tuple(dict.fromkeys(counts))) for row, counts in found.items()]
    missing = [
        capability
        for capability in capabilities
        if not any(row.capability == capability and row.kernel in case.kernels for row in rows)
    ]
    if missing:
        raise RuntimeError(
            f"{case.op}, {case.what}: none of {', '.join(case.kernels)} was launched for sm_{missing[0]}"
        )
    return rows


@contextmanager
def _launched() -> Iterator[list[tuple[int, str]]]:
    """Context whose value lists the launches in it: the number of programs, and the tile that each makes."""
    from triton.runtime.jit import JITFunction

    shapes: list[tuple[int, str]] = []
    launch = JITFunction.run

    def noted(self: Any, *args: Any, grid: Any, **options: Any) -> Any:
        programs = math.prod(grid(options) if callable(grid) else grid)
        sides = [(name, size) for name, size in options.items() if name.startswith("BLOCK")]
        shapes.append((programs, ", ".join(f"{name[6:] or 'all'} {size}" for name, size in sides)))
        return launch(self, *args, grid=grid, **options)

    with mock.patch.object(JITFunction, "run", noted):
        yield shapes


def _row(case: Case, binary: Binary, tile: str) -> Row:
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
        tile,
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
    "tile": lambda row: row.tile,
    "sources or images": lambda row: ", ".join(str(sources) for sources, _ in row.programs),
    "programs": lambda row: ", ".join(f"{count:,}".replace(",", " ") for _, count in row.programs),
    "waves": lambda row: ", ".join(f"{waves:.3g}" for waves in row.waves),
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
            "load and store are the bytes of the widest access of a thread to global memory. Programs and waves are "
            "those of micro-batches of so many sources; a wave fills "
            + ", ".join(f"the {g.processors} processors of {g.name} (sm_{c})" for c, g in GPUS.items())
            + ".\n",
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
        prog="python -m bench static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
