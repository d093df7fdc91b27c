"""A device that is not there: tensors that say they are on a GPU, computed on the CPU, with every crossing counted.

What a run does on a GPU is decided by the device of its tensors: which copies it makes, and where the host stops and
waits. On the device `mimic` all of that happens for real, only the arithmetic is the CPU's; so the results can be held
against those of the CPU to the bit, and what would wait for a GPU is known without one.

Inside of `recording` passes are recorded as on a GPU: a stand-in for CUDA graphs keeps the operations that were asked
for and does them again on the same memory, whatever the host would ask for by then.

It registers torch's device for backends written in Python, which cannot be taken back: use it in a process of its own.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from ddfast import philox
from ddfast.ops import _constants, graphs, transfer

NAME = "mimic"


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)

WAITS: list[str] = []
"""What the host has waited for, an entry each: the operation, and the lines of ddfast that asked for it."""

# Operations whose result the host reads, or whose shape it has to know.
_READ = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "unique_dim",
    "_unique2",
    "repeat_interleave",
)


class OnDevice(Tensor):
    """A tensor of the device; `inner` holds its numbers on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    # What torch answers from memory that is not there.
    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDevice:
        if id(self) not in memo:
            memo[id(self)] = OnDevice(self.inner.clone()).requires_grad_(self.requires_grad)
        return memo[id(self)]

    def set_(self, storage: torch.UntypedStorage, *geometry: Any) -> OnDevice:
        return OnDevice(self.inner.new_empty(0).set_(storage, *geometry))


class _Mode(TorchDispatchMode):
    """Puts what is made on the device, where no argument says so, there too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Pinned(Tensor):
    """A tensor in page-locked memory."""


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, (args, kwargs))
    there = any(isinstance(tensor, OnDevice) for tensor in found)
    name = func.__name__.partition(".")[0]
    goes_there, kwargs = there, dict(kwargs)
    if kwargs.get("device") is not None:
        goes_there = torch.device(kwargs["device"]).type == NAME
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    crosses = bool(found) and goes_there != there
    if name == "copy_":
        sides = [isinstance(tensor, OnDevice) for tensor in args[:2]]
        goes_there, crosses = sides[0], sides[0] != sides[1]
    free = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    pinned_memory = any(getattr(tensor, "pinned", False) for tensor in found)
    waits = crosses and not (free and pinned_memory)
    # Without output_size, repeat_interleave of a tensor of counts reads how much it will be.
    reads = name in _READ and there and not (name == "repeat_interleave" and kwargs.get("output_size"))
    # An index by a mask counts its places first.
    indices = tree_leaves(args[1]) if name in ("index", "index_put", "index_put_") else []
    reads = reads or any(
        isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in indices
    )
    if waits or reads:
        WAITS.append(f"{name}: {_place()}")
    args, kwargs = tree_map_only(OnDevice, lambda tensor: tensor.inner, (args, kwargs))
    graph = Graph.under_way if there or goes_there else None
    if graph is not None:
        if crosses or reads or torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        graph.before(args, kwargs)
    result = func(*args, **kwargs)
    if graph is not None:
        graph.after(func, args, kwargs, result)
    if not goes_there:
        if name == "copy_" and getattr(args[0], "pinned", False):
            return args[0]
        return result
    if name.endswith("_") and there and not name.startswith("_"):
        target = next(tensor for tensor in found if isinstance(tensor, OnDevice))
        if isinstance(result, Tensor) and result is target.inner:
            return target
    return tree_map_only(Tensor, OnDevice, result)


def _place() -> str:
    frames = [frame for frame in traceback.extract_stack() if "ddfast" in frame.filename.split("/")[-3:-1]
              or "/ddfast/" in frame.filename]  # fmt: skip
    return " < ".join(
        f"{frame.filename.rpartition('/ddfast/')[2]}:{frame.lineno}" for frame in frames[:-4:-1]
    )


def _marked(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.pinned = True  # type: ignore[attr-defined]
    return tensor


class _Event:
    def synchronize(self) -> None:
        WAITS.append(f"event: {_place()}")


class Graph:
    """Stands in for a CUDA graph.

    Recording leaves the memory that was there before as it was: on a GPU nothing is computed meanwhile.

    Attributes:
        changed: how many of the tensors that were there before, and were asked for, a replay changes.
        replays: how often it was replayed.
    """

    under_way: Graph | None = None
    all: ClassVar[list[Graph]] = []

    def __init__(self) -> None:
        self.changed = 0
        self.replays = 0
        self._tape: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()
        self._kept: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        Graph.all.append(self)

    def before(self, args: Any, kwargs: Any) -> None:
        """Keep what an operation may write to; not all say so."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and _memory(tensor) not in self._made:
                key = (_memory(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
                if key not in self._kept:
                    self._kept[key] = (tensor, tensor.clone())

    def after(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Keep an operation."""
        given = {_memory(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = {_memory(tensor) for tensor in tree_leaves(result) if isinstance(tensor, Tensor)}
        self._made |= made - given
        self._tape.append((func, args, kwargs, result))

    @torch.no_grad()
    def replay(self) -> None:
        """Everything once more, into the same memory."""
        self.replays += 1
        for func, args, kwargs, result in self._tape:
            again = func(*args, **kwargs)
            for place, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and _memory(place) != _memory(value):
                    place.copy_(value)

    @contextmanager
    def recorded(self, **options: Any) -> Iterator[None]:
        """Context in which it is recorded."""
        Graph.under_way = self
        try:
            yield
        finally:
            Graph.under_way = None
            with torch.no_grad():
                for tensor, value in reversed(self._kept.values()):
                    if not torch.equal(tensor, value):
                        self.changed += 1
                        tensor.copy_(value)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def recording() -> Iterator[list[Graph]]:
    """Context, inside of `mimic`, in which passes are recorded; its value is the graphs."""
    Graph.all = []
    with (
        mock.patch.object(graphs, "_DEVICE", NAME),
        mock.patch.object(torch.cuda, "device", nullcontext),
        mock.patch.object(torch.cuda, "graph", Graph.recorded),
        mock.patch.object(torch.cuda, "CUDAGraph", Graph),
        mock.patch.object(torch.cuda, "Event"),
        mock.patch.object(torch.cuda, "Stream"),
        mock.patch.object(torch.cuda, "current_stream"),
        mock.patch.object(torch.cuda, "set_stream"),
        mock.patch.object(torch.cuda, "synchronize"),
    ):
        yield Graph.all


@contextmanager
def mimic() -> Iterator[None]:
    """Context in which the device exists."""
    with (
        mock.patch.dict(philox._COPIES, {DEVICE: OnDevice(philox._QUANTILES)}),  # copied there once
        mock.patch.dict(_constants._KEPT),
        mock.patch.object(_constants, "_KINDS", (Tensor, OnDevice)),
        mock.patch.object(transfer, "pinned", _marked),
        mock.patch.object(transfer, "landing", lambda t: _marked(torch.empty(t.shape, dtype=t.dtype))),
        mock.patch.object(transfer, "copied", return_value=_Event()),
        _Mode(),
    ):
        yield


def moved(model: nn.Module) -> nn.Module:
    """The model, its tensors on the device. It is changed."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(OnDevice(parameter.detach()), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
    return model


def waits_of(call: Callable[[], Any]) -> list[str]:
    """What a call waits for."""
    before = len(WAITS)
    call()
    return WAITS[before:]
