"""Activation maps: what the last spatial layer of a network answers to an image, place by place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FOUND: WeakKeyDictionary[nn.Module, dict[torch.Size, str]] = WeakKeyDictionary()


@torch.no_grad()
def activation_maps(model: nn.Module, images: Tensor) -> Tensor:
    """Mean over the channels of what the last layer before the last pooling hands on.

    That is the last layer without layers of its own, poolings aside, whose output is maps of more than one place: the
    ReLU of a ConvNet's last block, the one behind a ResNet's last sum.

    Args:
        model: its mode is left as it is.
        images: normalised, float [B, 3, S, S].

    Returns:
        float32 [B, h, w] (float64 for float64).

    Raises:
        ValueError: a model whose layers hand on no maps.
    """
    seen: list[Tensor] = []
    handle = _map_layer(model, images).register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        model(images)
    finally:
        handle.remove()
    return _as_floats(seen[-1]).mean(dim=1)


def map_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Magnitude of the gradient of each image's cross-entropy at those maps, before their ReLU; mean over channels.

    Arguments beside `labels`, int64 [B], errors and what is returned as in `activation_maps`.
    """
    leaves: list[Tensor] = []

    def begin_here(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # which a layer may write to

    with torch.enable_grad():
        handle = _map_layer(model, images).register_forward_hook(begin_here)
        try:
            loss = F.cross_entropy(model(images), labels, reduction="sum")
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(loss, leaves[-1])
    # Behind a global pooling the gradient is the same in all places; before the ReLU it is 0 where nothing answers.
    return _as_floats(gradient.abs() * (leaves[-1].detach() > 0)).mean(dim=1)


def _as_floats(maps: Tensor) -> Tensor:
    return maps if maps.dtype == torch.float64 else maps.float()


def _map_layer(model: nn.Module, images: Tensor) -> nn.Module:
    """The layer, which is looked for once in a model."""
    known = _FOUND.setdefault(model, {})
    size = images.shape[-2:]
    if size not in known:
        known[size] = _last_map(model, images[:1].detach())
    return model.get_submodule(known[size])


@torch.no_grad()
def _last_map(model: nn.Module, image: Tensor) -> str:
    """Its name."""
    last = [""]

    def noting(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
                last[0] = name

        return note

    handles = [
        module.register_forward_hook(noting(name))
        for name, module in model.named_modules()
        if not any(module.children()) and type(module).__module__ != nn.MaxPool2d.__module__
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(image)  # which moves no statistics and draws nothing
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if not last[0]:
        raise ValueError(f"{type(model).__name__} has no layer that hands on maps [B, K, h, w]")
    return last[0]
