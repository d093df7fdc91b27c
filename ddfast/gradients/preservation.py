"""A caller's model runs, and nothing of it is changed by that.

A forward pass may do more than compute: count its calls, move a running average, rescale an embedding's rows, keep its
last features, draw random numbers. `untouched` takes all of that back. `substituted` lets a model run on other tensors
than its own, without a thought to how often a module or a tensor is registered.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import is_
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
_TENSORS = tuple(t for t in (Tensor, nn.Parameter, getattr(nn, "Buffer", None)) if t is not None)


_LOCKS: weakref.WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = weakref.WeakKeyDictionary()
_ASKING = threading.Lock()
Function = TypeVar("Function", bound=Callable[..., Any])


def one_call_a_model(function: Function) -> Function:
    """The function, whose first argument is a model: threads that call it with one model wait for each other.

    For the time of a call the model's tensors may have other memory, or other switches, than those of its caller.
    """

    @functools.wraps(function)
    def called(model: Any, *args: Any, **kwargs: Any) -> Any:
        with _ASKING:
            lock = (
                _LOCKS.setdefault(model, threading.RLock()) if isinstance(model, nn.Module) else nullcontext()
            )
        with lock:
            return function(model, *args, **kwargs)

    return cast(Function, called)


@contextmanager
def untouched(model: nn.Module, *, parameters: bool) -> Iterator[None]:
    """Context that a model leaves as it entered it: attributes, hooks, buffers and, where `parameters`, parameters.

    Values stay in the memory that they have: for the time of the context the model's tensors have copies of them.
    """
    containers = _containers(model)
    saved = _Saved(containers)
    own = {id(parameter): parameter for parameter in model.parameters()}
    tensors = {id(t): t for t in _tensors(model, containers) if parameters or id(t) not in own}
    values: list[tuple[Tensor, Tensor, int]] = []
    generators = [(g, g.get_state()) for c in containers for g in _items(c) if type(g) is torch.Generator]
    memory: dict[int, torch.UntypedStorage] = {}  # copies, which tensors share where they shared the original
    try:
        for tensor in tensors.values():
            if _copies(tensor):
                value = tensor.data
                storage = value.untyped_storage()
                if storage._cdata not in memory:
                    memory[storage._cdata] = storage.clone()
                copy = value.new_empty(0).set_(
                    memory[storage._cdata], value.storage_offset(), value.size(), value.stride()
                )
                values.append((tensor, value, tensor._version))
                tensor.data = copy
        yield
    finally:
        for tensor, value, version in values:
            tensor.data = value
            if (
                tensor._version != version
            ):  # a graph that waits for its backward pass would take it for changed
                torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
        for generator, state in generators:
            generator.set_state(state)
        saved.restore()


@contextmanager
def substituted(model: nn.Module, substitutes: Mapping[int, Tensor]) -> Iterator[None]:
    """Context in which a model runs on other tensors.

    Args:
        model: any, but TorchScript keeps its tensors to itself.
        substitutes: what stands for a tensor of the model, by the tensor's `id`, wherever the model keeps it: under
            several names, or in a list as a recurrent layer does.
    """
    containers = [container for container in _containers(model) if container]
    saved = _Saved(containers)
    try:
        for container in containers:
            if isinstance(container, dict):
                for name, value in container.items():
                    container[name] = _substitute(value, substitutes)
            elif isinstance(container, list):
                container[:] = [_substitute(value, substitutes) for value in container]
        yield
    finally:
        saved.restore()


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Every tensor that a model keeps: its parameters and buffers, and those in its attributes."""
    return list(_tensors(model, _containers(model)))


@contextmanager
def without_inference_tensors(model: nn.Module) -> Iterator[None]:
    """Context in which copies stand for a model's inference tensors, which autograd cannot save."""
    tensors = {id(t): t for t in tensors_of(model) if t.is_inference()}
    if not tensors:
        yield
        return
    with torch.no_grad():
        copies = {key: tensor.clone() for key, tensor in tensors.items()}
    with substituted(model, copies):
        yield


@contextmanager
def differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Context in which parameters require gradients, and no hook of theirs sees one."""
    saved = [(p, p.requires_grad, p._backward_hooks) for p in parameters]
    try:
        for parameter, _, hooks in saved:
            if hooks:
                parameter._backward_hooks = None
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag, hooks in saved:
            parameter.requires_grad_(flag)
            if hooks:
                parameter._backward_hooks = hooks


def _containers(model: nn.Module) -> list[Any]:
    """Every container that the modules' attributes are, or hold through containers alone."""
    found: list[Any] = []
    waiting: list[Any] = [vars(m) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    seen = {id(container) for container in waiting}
    while waiting:
        container = waiting.pop()
        found.append(container)
        for value in container.values() if isinstance(container, dict) else container:
            kind = type(value)
            if kind is SimpleNamespace:
                value, kind = vars(value), dict
            if kind is tuple:
                waiting.append(value)
            elif kind in _CONTAINERS and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value) if value else found.append(value)
    return [container for container in found if type(container) is not tuple]


def _tensors(model: nn.Module, containers: list[Any]) -> Iterator[Tensor]:
    for container in containers:
        for value in _items(container) if container else ():
            if isinstance(value, Tensor):
                yield value
            elif type(value) is tuple:
                yield from (v for v in value if isinstance(v, Tensor))
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            yield from module.parameters(recurse=False)
            yield from module.buffers(recurse=False)


def _items(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


def _copies(tensor: Tensor) -> bool:
    """Whether a tensor's values may be exchanged for a copy of them."""
    plain = type(tensor) in _TENSORS and tensor.layout == torch.strided and not tensor.is_quantized
    return plain and tensor.grad_fn is None and not tensor.is_inference() and not tensor.is_meta


class _Saved:
    """What containers hold."""

    def __init__(self, containers: list[Any]) -> None:
        self.empty = [container for container in containers if not container]
        self.filled = [
            (container, dict(container) if isinstance(container, dict) else type(container)(container))
            for container in containers
            if container
        ]

    def restore(self) -> None:
        """Make the containers hold that again, each in its place in memory."""
        for container in self.empty:
            if container:
                container.clear()
        for container, copy in self.filled:
            if _same(container, copy):
                continue
            container.clear()
            if isinstance(container, dict | set):
                container.update(copy)
            else:
                container.extend(copy)


def _same(container: Any, copy: Any) -> bool:
    if len(container) != len(copy):
        return False
    if isinstance(container, set):
        return container == copy
    if isinstance(container, dict):
        return container.keys() == copy.keys() and all(map(is_, container.values(), copy.values()))
    return all(map(is_, container, copy))


def _substitute(value: Any, substitutes: Mapping[int, Tensor]) -> Any:
    if type(value) is tuple:
        return tuple(_substitute(item, substitutes) for item in value)
    return substitutes.get(id(value), value) if isinstance(value, Tensor) else value
