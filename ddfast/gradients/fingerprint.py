"""What decides how a model computes, its weights' values aside: what equals in it is one and the same program."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_CONSTANTS = (type(None), bool, int, str)  # most attributes are
_CONTAINERS = (dict, OrderedDict, list, tuple, set)
_DEPTH = 6  # of containers and objects within each other
_COUNT = 100_000  # of values; beyond, an object is known by its identity


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Modules, their classes, attributes, hooks and functions, and the shapes and layouts of their tensors.

    Equal, unless the model was changed in between: a layer exchanged, a method replaced, a flag set. It sees what
    modules hold and functions name, not what those functions look up elsewhere.
    """
    view = _View()
    return tuple((name, id(module), view.module(module)) for name, module in model.named_modules())


class _View:
    """Values as something hashable: by content where that is plain, else by identity."""

    def __init__(self) -> None:
        self.left = _COUNT
        self.seen: dict[
            int, int
        ] = {}  # a tensor or an object by its place in the order of their first appearance

    def module(self, module: nn.Module) -> Any:
        kind = type(module)
        of_class = None if self._again(kind) else self._class(kind)
        if isinstance(module, torch.jit.ScriptModule):
            return id(kind), of_class, module.training
        return id(kind), of_class, self.value(vars(module), 0)

    def value(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in _CONSTANTS or (kind in _CONTAINERS and not value):
            return value if kind in _CONSTANTS else kind.__name__
        self.left -= 1
        if isinstance(value, _PLAIN):
            return type(value).__name__, repr(value) if isinstance(value, float | complex) else value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if depth > _DEPTH or self.left < 0 or isinstance(value, nn.Module | type | types.ModuleType):
            return id(value)
        if isinstance(value, dict):
            return tuple((self.value(k, depth + 1), self.value(v, depth + 1)) for k, v in value.items())
        if isinstance(value, list | tuple):
            return tuple(self.value(v, depth + 1) for v in value)
        if isinstance(value, set | frozenset):
            return frozenset(self.value(v, depth + 1) for v in value)
        if isinstance(value, types.MethodType):
            return id(value.__self__), self._function(value.__func__, depth)
        if isinstance(value, functools.partial):
            return tuple(self.value(v, depth + 1) for v in (value.func, value.args, value.keywords))
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if self._again(value) or not hasattr(value, "__dict__"):
            return id(value)
        return id(value), self.value(vars(value), depth + 1)

    def _tensor(self, tensor: Tensor) -> Any:
        """Which one it is, its shape and its layout; of a switch the position as well."""
        number = self.seen.setdefault(id(tensor), len(self.seen))
        if is_lazy(tensor):
            return number
        layout = tensor.stride() if tensor.layout == torch.strided else None
        switch = tensor.dtype == torch.bool and not tensor.is_meta and tensor.numel() == 1
        value = bool(tensor.item()) if switch else None
        return number, tuple(tensor.shape), tensor.dtype, tensor.device, layout, value

    def _function(self, function: Any, depth: int) -> Any:
        """A function's code, what it closes over and the plain globals that it names."""
        code = getattr(function, "__code__", None)
        if code is None or self._again(function):
            return id(function)
        cells = [self._cell(cell, depth) for cell in function.__closure__ or ()]
        names = function.__globals__
        named = [n for n in code.co_names if n in names and isinstance(names[n], _PLAIN)]
        plain = [(n, self.value(names[n], depth)) for n in named]
        defaults = self.value(function.__defaults__, depth + 1)
        return id(function), hash(code), tuple(cells), tuple(plain), defaults

    def _cell(self, cell: Any, depth: int) -> Any:
        try:
            return self.value(cell.cell_contents, depth + 1)
        except ValueError:  # an empty cell
            return None

    def _class(self, kind: type) -> Any:
        """The functions and the plain attributes of a class and its bases; of torch's own the forward alone."""
        found: list[Any] = []
        for base in kind.__mro__:
            if base.__module__.partition(".")[0] in ("torch", "builtins"):
                found.append((id(base), id(vars(base).get("forward"))))
                continue
            for name, value in list(vars(base).items()):
                if isinstance(value, types.FunctionType):
                    found.append((name, self._function(value, _DEPTH - 1)))
                elif isinstance(value, _PLAIN) and not name.startswith("__"):
                    found.append((name, self.value(value, 0)))
        return tuple(found)

    def _again(self, value: Any) -> bool:
        again = id(value) in self.seen
        self.seen.setdefault(id(value), len(self.seen))
        return again
