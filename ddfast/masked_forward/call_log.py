"""What a model's forward does to its images: every call of torch on what depends on them, in order.

A graph is faithful where it makes the calls that the model makes, and a graph that is kept is still the model's where
the model makes the calls that it made then. Neither asks what kind of thing decided a call: a branch, a setting in a
dict, a default argument, a function that was swapped. Calls are compared by their function, by the values that they
read of those before, and by their numbers, strings and constant tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Log = tuple[tuple[Any, ...], ...]


class CallLog(TorchFunctionMode):
    """Writes the calls down while it is entered. It runs each as it is and changes nothing.

    Args:
        image: the tensor on which a call has to depend to be written down.
        owned: parameters and buffers, which are told apart by name; of other constant tensors the content counts.
    """

    def __init__(self, image: Tensor, owned: dict[int, str]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self._owned = owned
        self._number = {id(image): 0}
        self._count = 0
        self._alive: list[Any] = [image]  # so that no identity is used twice

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        depends = any(id(t) in self._number for t in _tensors((args, kwargs)))
        # Described before it runs, as it may write to its arguments.
        read = (self._described(args), self._described(kwargs)) if depends else None
        result = function(*args, **kwargs)
        if read is None:
            return result
        given = list(_tensors(result))
        name = _name(function)
        if given or not name.endswith("__get__"):
            # A tracer looks up a shape only where it is used.
            self.calls.append((name, *read))
        for tensor in given:
            # Also where it is an argument that was written to: what is read from here on is another value.
            self._count += 1
            self._number[id(tensor)] = self._count
            self._alive.append(tensor)
        return result

    def _described(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) in self._number:
                return self._number[id(value)]
            return self._owned.get(id(value)) or _content(value)
        if isinstance(value, tuple | list):
            return (type(value).__name__, *map(self._described, value))
        if isinstance(value, dict):
            return ("dict", *((key, self._described(entry)) for key, entry in value.items()))
        if isinstance(value, slice):
            return ("slice", *map(self._described, (value.start, value.stop, value.step)))
        if isinstance(value, float):
            return repr(value)  # NaN is not equal to itself
        if isinstance(value, int | str | complex | torch.dtype | torch.device | torch.memory_format | None):
            return (type(value).__name__, value)
        return type(value).__name__


def recorded(function: Callable[[Tensor], Any], images: Tensor, model: nn.Module) -> tuple[Any, Log]:
    """`function(images)` and the calls that it makes on them; parameters and buffers are those of `model`."""
    owned = {
        id(t): name
        for named in (model.named_parameters, model.named_buffers)
        for name, t in named(remove_duplicate=True)
    }
    with CallLog(images, owned) as log:
        result = function(images)
    return result, tuple(log.calls)


def _name(function: Callable[..., Any]) -> str:
    """The name of a call, of an in-place one that of the call that returns a new tensor."""
    name = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":
        return f"{getattr(getattr(function, '__self__', None), '__name__', '')}.__get__"
    return name if name.startswith("__") else name.rstrip("_")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [t for entry in value for t in _tensors(entry)]
    if isinstance(value, dict):
        return [t for entry in value.values() for t in _tensors(entry)]
    return []


def _content(tensor: Tensor) -> Any:
    """Equal for tensors of equal shape, dtype and bytes."""
    try:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
    except (RuntimeError, TypeError):  # sparse, quantised: told apart by identity
        return ("tensor", tuple(tensor.shape), id(tensor))
    return ("tensor", tuple(tensor.shape), str(tensor.dtype), hash(raw))
