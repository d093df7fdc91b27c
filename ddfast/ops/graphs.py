"""Whole passes on a GPU without the host's work: recorded as CUDA graphs where shapes repeat, and replayed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

log = logging.getLogger(__name__)

_DEVICE = "cuda"  # the type of device that records
_RUNS_BEFORE = 2  # as it is: the first compiles and allocates what is kept, the second is watched
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::lift_fresh", "aten::lift_fresh_copy")


@dataclass
class _Recording:
    """A recorded pass: the graph, what it reads and writes, and the moment at which that was last in use."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: _Nest
    done: torch.cuda.Event

    @torch.no_grad()
    def replay(self, inputs: tuple[Tensor, ...]) -> Any:
        """The outputs for these inputs, behind every earlier replay, whatever stream that one is on."""
        stream = torch.cuda.current_stream(self.inputs[0].device)
        stream.wait_event(self.done)
        _copy(self.inputs, inputs)
        self.graph.replay()
        outputs = [torch.empty_like(output) for output in self.outputs.tensors]
        _copy(outputs, self.outputs.tensors)
        self.done.record(stream)
        return self.outputs.with_tensors(outputs)


def _copy(places: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy tensors to their places, all of a dtype in one launch."""
    for dtype in {place.dtype for place in places}:
        chosen = [number for number, place in enumerate(places) if place.dtype == dtype]
        torch._foreach_copy_([places[number] for number in chosen], [tensors[number] for number in chosen])


class _UnderWay(threading.local):
    """Whether this thread is inside of a pass that may be recorded as a whole."""

    inside = False


_UNDER_WAY = _UnderWay()


@contextmanager
def unrecorded() -> Iterator[None]:
    """Context in which every pass of this thread runs as it is, none is recorded or replayed."""
    before = _UNDER_WAY.inside
    _UNDER_WAY.inside = True
    try:
        yield
    finally:
        _UNDER_WAY.inside = before


class Recorded:
    """Calls of a function on a GPU, recorded where shapes repeat and then replayed without the host's work.

    The first two calls with tensors of a kind (shapes, strides, dtypes, device) run as they are, the third one is
    recorded; `warm` does all of it at once. Kernels and results are the same. Results are copies of their own.

    The function takes tensors on one GPU and returns some, in nests of tuples, lists and dicts. Among its arguments may
    be other values, numbers and modules for example, which are a part of the kind, so they must be hashable. It may run
    autograd inside (`torch.autograd.grad`, custom functions), but its results carry no gradient. Whatever else it reads
    is fixed by the recording: tensors by where they lie (weights may change in place, inside of it as well), numbers by
    their value. What it does besides on the host, as logging or counting, is not done again.

    A function that draws random numbers or sends numbers from the host would repeat those of the recording: it runs as
    it is, as does one that waits for the GPU. So do calls under autocast, whose copies of weights would come to lie in
    the recording, and calls whose inputs require a gradient.

    One may be called inside of another, and is then a part of that one.

    Threads may share one: they take turns with a recording, whose tensors are the same for all of them. Other threads
    may use the GPU while one records.

    Args:
        function: of tensors, to tensors.
        limit: so many kinds are recorded, each of which holds the memory of a pass; others run as they are.
        what: it is, for the line that says why it runs without a graph.

    Attributes:
        reason: why the last call that could not be replayed ran as it is; "" where none had to.
    """

    def __init__(self, function: Callable[..., Any], *, limit: int = 4, what: str = "a pass") -> None:
        self.function = function
        self.limit = limit
        self.what = what
        self.reason = ""
        self._refused = False  # for good
        self._calls: dict[tuple, int] = {}
        self._seen: set[tuple] = set()  # kinds whose calls were watched
        self._recorded: dict[tuple, _Recording] = {}
        self._turn = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        """The function of these arguments."""
        if _UNDER_WAY.inside or self._refused:
            return self.function(*inputs)
        given = _Nest.of(inputs)
        if not self._may_be_recorded(given.tensors):
            return self.function(*inputs)
        kind = given.kind()
        with self._turn, torch.cuda.device(given.tensors[0].device):
            recording = self._recorded.get(kind)
            if recording is None and self._is_due(kind):
                recording = self._record(kind, given)
            if recording is not None:
                return recording.replay(given.tensors)
            unseen = self._calls.get(kind, 0) >= _RUNS_BEFORE and kind not in self._seen
        return self._watched(kind, inputs) if unseen else self._run(inputs)

    def warm(self, *inputs: Any) -> bool:
        """Record the function of such tensors now, unless it is recorded; their values do not matter.

        To be called before other threads use the function, so that none of them waits for the recording.

        Returns:
            whether it is recorded; where not, `reason` says why.
        """
        given = _Nest.of(inputs)
        if self._refused or not self._may_be_recorded(given.tensors):
            return False
        kind = given.kind()
        for _ in range(_RUNS_BEFORE + 1):
            if self._refused or kind in self._recorded:
                break
            self(*inputs)
        return kind in self._recorded

    def forget(self) -> None:
        """Let go of all recordings and of their memory; what the function reads may lie elsewhere afterwards."""
        with self._turn:
            self._recorded.clear()
            self._calls.clear()
            self._seen.clear()

    def _may_be_recorded(self, inputs: tuple[Tensor, ...]) -> bool:
        devices = {tensor.device for tensor in inputs}
        if any(device.type != _DEVICE for device in devices) or not devices:
            return False
        if len(devices) > 1:
            self.reason = "its inputs are on several GPUs"
        elif torch.is_autocast_enabled("cuda"):
            self.reason = "it is called under autocast"
        elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            self.reason = "its inputs require a gradient"
        else:
            return True
        return False

    def _is_due(self, kind: tuple) -> bool:
        """Whether a call of this kind, which has no recording, is to be recorded; counts it."""
        if self._refused:
            return False
        if len(self._recorded) >= self.limit:
            self.reason = f"{self.limit} kinds of inputs are recorded, which is the limit"
            return False
        calls = self._calls[kind] = self._calls.get(kind, 0) + 1
        return calls > _RUNS_BEFORE and kind in self._seen

    def _run(self, inputs: tuple[Any, ...]) -> Any:
        """The function as it is; what is recorded apart inside of it is a part of this pass."""
        _UNDER_WAY.inside = True
        try:
            return self.function(*inputs)
        finally:
            _UNDER_WAY.inside = False

    def _watched(self, kind: tuple, inputs: tuple[Any, ...]) -> Any:
        """The function of these tensors, refused from now on where a recording would not repeat it."""
        watch = _Watch()
        with watch:
            outputs = self._run(inputs)
        fault = watch.fault
        if not fault and any(
            isinstance(each, Tensor) and each.requires_grad for each in tree_leaves(outputs)
        ):
            fault = "its results require a gradient"
        if fault:
            self._refuse(fault)
        with self._turn:
            self._seen.add(kind)
        return outputs

    def _record(self, kind: tuple, given: _Nest) -> _Recording | None:
        with torch.inference_mode(False), torch.no_grad():  # tensors that may be written to in any mode
            places = tuple(tensor.detach().clone() for tensor in given.tensors)
        graph, done = torch.cuda.CUDAGraph(), torch.cuda.Event()
        before = torch.cuda.current_stream(places[0].device)
        # A stream of this device: torch would share one of the device that was recorded on first. Another thread, a
        # loader that decodes on the GPU, may allocate meanwhile: only what this one does can spoil the recording.
        stream = torch.cuda.Stream(places[0].device)
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                outputs = self._run(given.with_tensors([place.detach() for place in places]))
        except RuntimeError as error:
            self._refuse(f"it cannot be recorded: {str(error).splitlines()[0]}")
            torch.cuda.set_stream(before)  # torch leaves a thread on the stream of a recording that failed
            torch.cuda.synchronize()
            return None
        done.record()
        recording = _Recording(graph, places, _Nest.of(tree_map_only(Tensor, torch.detach, outputs)), done)
        self._recorded[kind] = recording
        return recording

    def _refuse(self, reason: str) -> None:
        self._refused, self.reason = True, reason
        log.info("%s runs without a CUDA graph: %s", self.what, reason)


@dataclass(frozen=True)
class _Nest:
    """Arguments or results: what stands in them, tensors or not, and how they are nested."""

    leaves: tuple[Any, ...]
    nest: Any

    @classmethod
    def of(cls, values: Any) -> _Nest:
        leaves, nest = tree_flatten(values)
        return cls(tuple(leaves), nest)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    def with_tensors(self, tensors: Iterable[Tensor]) -> Any:
        """The same with other tensors."""
        left = iter(tensors)
        leaves = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.nest)

    def kind(self) -> tuple:
        """What a recording of them is good for."""
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        what = (
            (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
            for leaf in self.leaves
        )
        return (modes, self.nest, *what)


class _Watch(TorchDispatchMode):
    """Sees what a function asks of torch, and keeps the first thing that a replay would not repeat."""

    fault = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.fault:
            self.fault = _fault(func, args, kwargs, result)
        return result


def _fault(func: Any, args: Any, kwargs: Any, result: Any) -> str:
    """Why a replay would not repeat a call of an op; "" where it would."""
    name = func.name().partition(".")[0]
    if torch.Tag.nondeterministic_seeded in func.tags and not _draws_nothing(func, args, kwargs):
        return f"it draws random numbers ({name})"
    copies = name in _COPIES
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    made = {_device_type(t) for t in tree_leaves(result) if isinstance(t, Tensor)}
    # A single number from the host is an argument of a launch, which a recording keeps by its value.
    host = any(_device_type(t) == "cpu" and (t.ndim or copies) for t in given)
    gpu = any(_device_type(t) == _DEVICE for t in given)
    if _DEVICE in made and (host or name.startswith("aten::lift_fresh")):
        return f"it sends numbers from the host to the GPU ({name})"
    if gpu and _reads_a_shape(func, name, args, kwargs):
        return f"it waits to know how large a result is ({name})"
    if gpu and ("cpu" in made or name == "aten::_local_scalar_dense"):
        return f"it waits for numbers from the GPU ({name})"
    return ""


def _reads_a_shape(func: Any, name: str, args: Any, kwargs: Any) -> bool:
    """Whether the size of an op's result depends on numbers: of places where a mask is true, for example."""
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        places = tree_leaves(args[1])
        return any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in places)
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is not None:
        return False
    return torch.Tag.dynamic_output_shape in func.tags


def _device_type(tensor: Tensor) -> str:
    return tensor.device.type


def _draws_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an op that may draw random numbers does not: dropout of probability 0, or outside of training."""
    values = {argument.name: argument.default_value for argument in func._schema.arguments}
    values |= dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    shares = [values[name] for name in ("p", "dropout_p", "dropout") if values.get(name) is not None]
    return values.get("train") is False or values.get("training") is False or 0 in shares
