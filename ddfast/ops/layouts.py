"""Models that call `Tensor.view` on feature maps, given channels-last batches: a view is answered by `reshape`.

Only for models that need it: modules look for such a mode, and attention for one takes another path under it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ENTERED = threading.local()
_NEEDY: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


class ViewsReshaped(TorchFunctionMode):
    """Context in which a view that the memory of a tensor does not allow is a copy of that shape."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not Tensor.view:
            return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if not _is_of_a_view(error):
                raise
            return Tensor.reshape(*args, **kwargs)


def called(model: Callable[[Tensor], Any], images: Tensor, run: Callable[[Tensor], Any] | None = None) -> Any:
    """What the model gives for the images, in `ViewsReshaped` where it has to be.

    Args:
        model: module or function; it may write to the images.
        images: a batch.
        run: calls the model in its own way; None: a plain call.
    """
    run = model if run is None else run
    needy = _NEEDY.get(model) if _can_be_kept(model) else None
    if needy is not None:
        with ViewsReshaped() if needy else nullcontext():
            return run(images)
    spare = images.clone()
    try:
        given = run(images)
    except RuntimeError as error:
        if not _is_of_a_view(error):
            raise
    else:
        _keep(model, False)
        return given
    _keep(model, True)
    with ViewsReshaped():
        return run(spare)


def with_views_reshaped(model: nn.Module, image_size: int) -> nn.Module:
    """The module, whose calls are in `ViewsReshaped` from now on if it needs that at this size. It is changed."""
    parameter = next(model.parameters(), torch.empty(0))
    images = torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device)
    try:
        with torch.no_grad():
            model(images.contiguous(memory_format=torch.channels_last))
    except Exception as error:  # whatever a caller's module may raise, whoever runs it in earnest will tell
        if isinstance(error, RuntimeError) and _is_of_a_view(error):
            model.register_forward_pre_hook(_enter)
            model.register_forward_hook(_leave, always_call=True)
    return model


def _is_of_a_view(error: RuntimeError) -> bool:
    return "view size is not compatible" in str(error)


def _can_be_kept(model: Any) -> bool:
    try:
        hash(model)
        weakref.ref(model)
    except TypeError:
        return False
    return True


def _keep(model: Any, needy: bool) -> None:
    if _can_be_kept(model):
        _NEEDY[model] = needy


def _enter(module: nn.Module, inputs: Any) -> None:
    mode = ViewsReshaped()
    mode.__enter__()
    if not hasattr(_ENTERED, "modes"):
        _ENTERED.modes = []
    _ENTERED.modes.append(mode)


def _leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
    _ENTERED.modes.pop().__exit__(None, None, None)
