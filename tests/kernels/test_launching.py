import importlib
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.test_layouts import OPS
from tests.ops import layouts

launching = pytest.importorskip("ddfast.kernels.launching")


class Kernel:
    """Stands in for a function under `triton.jit`; `calls` has what was launched, and whether Triton bound it."""

    arg_names = ("x", "out", "size", "extents", "BLOCK")

    def __init__(self, compiles=True):
        self.calls, self.compiles = [], compiles

    def __getitem__(self, grid):
        def bound(*arguments, **constants):
            self.calls.append(("bound", grid, arguments, constants))
            return Compiled(self) if self.compiles else None

        return bound


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.kernel.calls.append(("direct", grid, arguments, stream))


@pytest.fixture
def stream(monkeypatch):
    active = SimpleNamespace(get_current_stream=lambda device: ("stream of", device))
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))


def launcher_of(kernel, prepared):
    @launching.prepared
    def launcher(x, count, sizes=(1,)):
        prepared.append((tuple(x.shape), count))
        launch = launching.Launch(kernel, (3,), (x.numel(), x.stride()), BLOCK=8, num_warps=4)
        empty = launching.Allocation(x.shape, x.dtype, x.device)

        def run(x, count, sizes=(1,)):
            out = empty()
            launch(x, out)
            return out

        return run

    return launcher


def test_the_first_call_goes_through_triton_and_later_ones_call_what_it_compiled(stream):
    kernel, prepared = Kernel(), []
    launcher = launcher_of(kernel, prepared)
    x = torch.zeros(4, 2)
    outs = [launcher(x, 1, [3]) for _ in range(3)]
    assert prepared == [((4, 2), 1)]
    first, *rest = kernel.calls
    assert first[:2] == ("bound", (3,))
    assert first[2][0] is x
    assert first[2][2:] == (8, (2, 1))
    assert first[3] == {"BLOCK": 8, "num_warps": 4}
    for (how, grid, arguments, on), out in zip(rest, outs[1:], strict=True):
        assert (how, grid, on) == ("direct", (3, 1, 1), ("stream of", -1))
        assert arguments[0] is x
        assert arguments[1] is out
        assert arguments[2:] == (8, (2, 1), 8)  # constants too, in the order of the parameters
    assert len({out.data_ptr() for out in outs}) == 3


def test_without_a_compiled_kernel_every_call_goes_through_triton(stream):
    kernel = Kernel(compiles=False)
    launcher = launcher_of(kernel, [])
    for _ in range(3):
        launcher(torch.zeros(2), 1)
    assert [how for how, *_ in kernel.calls] == ["bound"] * 3


def at(offset, *size):
    """A tensor `offset` bytes behind a multiple of 16."""
    memory = torch.zeros(400, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + offset
    return memory[start : start + 4 * torch.Size(size).numel()].view(torch.float32).view(size)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((at(0, 4), 1), (at(4, 4), 1)),
        ((at(4, 4), 1), (at(8, 4), 1)),
        ((at(0, 4), 1), (at(0, 5), 1)),
        ((at(0, 4, 4), 1), (at(0, 4, 4).T, 1)),
        ((at(0, 4), 1), (at(0, 4).view(torch.int32), 1)),
        ((at(0, 4), 1), (at(0, 4), 2)),
        ((at(0, 4), 1, [1, 2]), (at(0, 4), 1, [2, 1])),
        ((at(0, 4), 1), (torch.zeros(4, device="meta").as_subclass(type("There", (torch.Tensor,), {})), 1)),
    ],
    ids=["aligned", "how far from alignment", "shape", "strides", "dtype", "number", "list", "device"],
)
def test_what_triton_compiles_for_is_prepared_apart(one, other, stream, monkeypatch):
    kernel, prepared = Kernel(), []
    launcher = launcher_of(kernel, prepared)
    if other[0].is_meta:
        monkeypatch.setattr(type(other[0]), "get_device", lambda self: 1, raising=False)
    for _ in range(2):
        launcher(*one)
        launcher(*other)
    assert len(prepared) == 2
    assert [how for how, *_ in kernel.calls] == ["bound", "bound", "direct", "direct"]


def test_arguments_may_be_named_and_kinds_are_forgotten(stream, monkeypatch):
    monkeypatch.setattr(launching, "MAX_KINDS", 3)
    prepared = []
    launcher = launcher_of(Kernel(), prepared)
    launcher(torch.zeros(1), count=1)
    launcher(count=1, x=torch.zeros(1))
    assert len(prepared) == 1
    for size in (1, 2, 3, 4, 1):
        assert launcher(torch.zeros(size), 1).shape == (size,)
    assert len(prepared) == 5  # the fourth kind made all of them be forgotten


def test_threads_share_a_launcher(stream):
    kernel = Kernel()
    launcher = launcher_of(kernel, [])
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            outs = list(threads.map(lambda n: launcher(torch.zeros(n % 5 + 1), n % 3), range(300)))
    finally:
        sys.setswitchinterval(before)
    assert [len(out) for out in outs] == [n % 5 + 1 for n in range(300)]
    for _, _, (x, out, size, *_), _ in kernel.calls:
        assert len(x) == len(out) == size


@pytest.mark.parametrize("op", sorted(OPS))
def test_a_launcher_keeps_no_tensor_and_binds_nothing_anew(op, stream, monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    steps = []

    class Forgetful:
        def __getitem__(self, grid):
            return lambda *arguments, stream: steps.append("direct")

    def run(self, *arguments, **options):
        steps.append("bound")
        return Forgetful()

    monkeypatch.setattr(jit.JITFunction, "run", run)
    module, function = OPS[op].split(".")
    launcher = getattr(importlib.import_module(f"ddfast.kernels.{module}"), function)

    def tensors(value):
        return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in tensors(v)]

    def call():
        given = layouts.arguments(op)
        results = tensors(launcher(*given))
        return [weakref.ref(t) for t in (*given, *results) if isinstance(t, torch.Tensor)]

    alive = [reference() for reference in call()]
    launches = len(steps)
    alive += [reference() for reference in call()]
    assert steps == ["bound"] * launches + ["direct"] * launches
    assert launches >= 1
    assert alive == [None] * len(alive)


def test_another_gpu_behind_the_same_device_is_prepared_for_anew(stream):
    prepared = []
    launcher = launcher_of(Kernel(), prepared)
    for _ in range(2):
        launcher(torch.zeros(4), 1)
    launching.forget()
    launcher(torch.zeros(4), 1)
    assert prepared == [((4,), 1)] * 2


def test_the_capability_is_that_of_the_gpu_and_0_without_one(monkeypatch):
    there = SimpleNamespace(get_current_target=lambda: SimpleNamespace(arch=90))
    monkeypatch.setattr(launching.triton.runtime, "driver", SimpleNamespace(active=there))
    assert launching.capability() == 90

    class Nowhere:
        @property
        def active(self):
            raise RuntimeError("0 active drivers ([]). There should only be one.")

    monkeypatch.setattr(launching.triton.runtime, "driver", Nowhere())
    assert launching.capability() == 0
