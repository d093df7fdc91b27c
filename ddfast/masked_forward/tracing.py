"""The graph of a model: its calls of layers and functions in order, free of in-place updates.

What changes how a model is run, and what needs to know which part of it reads which, works on this graph. The
user's model is never touched: the graph belongs to a copy that shares only its tensors. A model that cannot be
traced faithfully is refused with a reason, and then runs as it is.
"""

from __future__ import annotations

import copy
import inspect
import operator
import threading
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_hooks

from ddfast.masked_forward.call_log import recorded
from ddfast.random_states import RandomStates

# A forward written for tensors may raise anything when it meets the tracer's stand-ins.
TRACE_ERRORS = (Exception,)

# The tracer replaces `nn.Module.__call__` while it runs; two at once would not put it back.
_ONE_TRACE = threading.RLock()

_OUT_OF_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
}


class CannotTraceError(Exception):
    """The model has no graph that stands for it; the message says why."""


class _Entry(nn.Module):
    """Calls the model with images alone, so that further arguments keep the defaults they have."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


class _Tracer(fx.Tracer):
    """Traces what its own thread calls. Modules that other threads run meanwhile stay as they are."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def trace(model: Callable[[Tensor], Tensor], images: Tensor | None = None) -> fx.GraphModule:
    """The graph of a model that takes images [n, C, H, W], with layers of `torch.nn` as its nodes.

    Args:
        model: module in eval mode.
        images: on these the graph has to make the calls that the model makes. None: nothing is compared.

    Returns:
        A graph module that shares the model's parameters and buffers, in eval mode, without in-place calls.

    Raises:
        CannotTraceError: a function, hooks, control flow that depends on tensors or on the tracer, a forward that
            keeps what it is given or draws random numbers, or an in-place call that cannot be taken out of place.
    """
    if not isinstance(model, nn.Module):
        raise CannotTraceError("the model is a function, not a module")
    if isinstance(model, torch.jit.ScriptModule) or is_compiled(model):
        raise CannotTraceError("the model is compiled already")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise CannotTraceError(f"module {name!r} has forward hooks")
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        raise CannotTraceError("there are forward hooks of all modules")
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        entry = _Entry(copy.deepcopy(model, memo=dict(tensors)))
    except TRACE_ERRORS as error:
        raise CannotTraceError(f"the model cannot be copied: {_first_line(error)}") from error
    if {id(module) for module in model.modules()} & {id(module) for module in entry.modules()}:
        raise CannotTraceError("the model's modules do not let themselves be copied")
    before = _kept(entry)
    states = RandomStates()
    drawn = states.now()
    try:
        with _ONE_TRACE:
            graph = _Tracer().trace(entry)
    except TRACE_ERRORS as error:
        raise CannotTraceError(f"torch.fx cannot trace the model: {_first_line(error)}") from error
    if states.differ(drawn):
        states.restore()
        raise CannotTraceError("the model's forward draws random numbers")
    changed = [name for name, value in _kept(entry).items() if before.get(name) != value]
    if changed:
        raise CannotTraceError(f"the model's forward changes its attribute {changed[0]!r}")
    if images is not None:
        _compare_calls(model, fx.GraphModule(entry, graph).eval(), images)
    _take_out_of_place(graph, dict(entry.named_modules()))
    for node in graph.nodes:
        # The same values of tensors that are laid out as the model expects; of channels-last ones besides.
        if node.op == "call_method" and node.target == "view" and torch.dtype not in map(type, node.args):
            node.target = "reshape"
    traced = fx.GraphModule(entry, graph).eval()
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has taken the model, or a part of it."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


def _compare_calls(model: nn.Module, graph: fx.GraphModule, images: Tensor) -> None:
    """Raise where the graph does not make the model's calls: a stand-in passed for a tensor, or did not."""
    try:
        given, made = recorded(graph, images.clone(), model)
    except TRACE_ERRORS:
        return  # whoever runs it node by node says which one fails
    result, wanted = recorded(model, images.clone(), model)
    if isinstance(given, Tensor) and isinstance(result, Tensor) and not torch.equal(given, result):
        allowed = 1e-3 * result.abs().amax()
        if given.shape != result.shape or bool(((given - result).abs() > allowed).any()):
            raise CannotTraceError("the traced graph does not give what the model gives")
    for call, own in zip_longest(made, wanted):
        if call != own:
            name = (own or call)[0]
            raise CannotTraceError(
                f"the model's forward does otherwise than its trace, at its call of {name}"
            )


def fingerprint(model: nn.Module) -> int:
    """A number that changes with the structure of a model: its modules, their settings and tensors' places.

    The values of tensors do not enter. An address in memory can be used again once its owner is gone, so this
    guards against changes of a living model, not against another model.
    """
    parts: list[Any] = []
    for name, module in model.named_modules():
        parts.append((name, id(module), type(module)))
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                parts.extend((k, id(v), getattr(v, "dtype", None)) for k, v in value.items())
            elif key.endswith("_hooks"):
                parts.append((key, len(value) if hasattr(value, "__len__") else None))
            else:
                parts.append((key, _settings(value)))
    return hash(tuple(parts))


def _settings(value: Any) -> Any:
    """A hashable stand-in: numbers and strings as they are, other objects by identity."""
    if isinstance(value, tuple):
        return tuple(map(_settings, value))
    return value if isinstance(value, int | float | str | bool | None) else id(value)


def _kept(entry: nn.Module) -> dict[str, Any]:
    """What a forward could change: numbers and text by value, containers by length, other objects by identity."""
    kept: dict[str, Any] = {}
    for name, module in entry.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            size = len(value) if isinstance(value, list | dict | set) else 0
            kept[f"{name}.{key}".removeprefix("model.")] = (_settings(value), size)
    return kept


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _take_out_of_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Replace every in-place call by the call that returns a new tensor, which later readers then read.

    Views of what is updated are not followed; the caller compares the graph's output with the model's.
    """
    for node in list(graph.nodes):
        if not _is_in_place(node, modules):
            continue
        updated = node.args[0] if node.args else None
        if not isinstance(updated, fx.Node):
            raise CannotTraceError(f"the in-place call {node.target} cannot be followed")
        updated.replace_all_uses_with(node, delete_user_cb=set(_after(node)).__contains__)


def _is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a call updates its first argument; the node is changed to the call that does not."""
    target: Any = node.target
    if node.op == "call_module":
        module = modules[target]
        if getattr(module, "inplace", False) is True:
            vars(module)["inplace"] = False
            for other in node.graph.nodes:  # the module may be called more than once
                if other is not node and other.op == "call_module" and modules[other.target] is module:
                    other.meta["in_place"] = True
            return True
        return bool(node.meta.get("in_place"))
    if node.op == "call_method":
        if target in ("__setitem__", "set_", "resize_", "copy_"):
            raise CannotTraceError(f"the model's forward calls {target}")
        if target.endswith("_") and not target.endswith("__"):
            if not hasattr(Tensor, target[:-1]):
                raise CannotTraceError(f"the model's forward calls {target}, which has no out-of-place form")
            node.target = target[:-1]
            return True
        return False
    if node.op != "call_function":
        return False
    if target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[target]
        return True
    name = getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        home = inspect.getmodule(target) or torch
        plain = getattr(home, name[:-1], None) or getattr(torch, name[:-1], None)
        if plain is None:
            raise CannotTraceError(f"the model's forward calls {name}, which has no out-of-place form")
        node.target = plain
        return True
    return _drop_in_place_argument(node)


def _drop_in_place_argument(node: fx.Node) -> bool:
    """Set an argument `inplace=True` of a function to False. Returns whether there was one."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False  # a builtin, which takes no such argument
    if bound.arguments.get("inplace") is not True:
        return False
    bound.arguments["inplace"] = False
    node.args, node.kwargs = bound.args, bound.kwargs
    return True


def _after(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that run after this one."""
    later = node.next
    while later.op != "root":
        yield later
        later = later.next
