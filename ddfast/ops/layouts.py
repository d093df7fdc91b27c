"""Models that call `Tensor.view` on feature maps, given channels-last batches: a view is answered by `reshape`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ENTERED = threading.local()


class ViewsReshaped(TorchFunctionMode):
    """Context in which a view that the memory of a tensor does not allow is a copy of that shape."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not Tensor.view:
            return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
            return Tensor.reshape(*args, **kwargs)


def called(model: Callable[[Tensor], Any], images: Tensor) -> Any:
    """What the model gives for the images, in `ViewsReshaped`."""
    with ViewsReshaped():
        return model(images)


def reshape_views(model: nn.Module) -> nn.Module:
    """The module, whose calls are in `ViewsReshaped` from now on. It is changed."""
    model.register_forward_pre_hook(_enter)
    model.register_forward_hook(_leave, always_call=True)
    return model


def _enter(module: nn.Module, inputs: Any) -> None:
    mode = ViewsReshaped()
    mode.__enter__()
    if not hasattr(_ENTERED, "modes"):
        _ENTERED.modes = []
    _ENTERED.modes.append(mode)


def _leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
    _ENTERED.modes.pop().__exit__(None, None, None)
