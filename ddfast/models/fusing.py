"""`fuse`: the same network, with its convolution blocks computed by one fused op each."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ddfast.ops import convnet_block, convnet_block_batch_norm, convnet_block_batch_norm_eval
from ddfast.ops._convnet import convnet_block_is_fast, is_differentiated

Model = TypeVar("Model", bound=nn.Module)

_LENGTH = 4
"""Layers of a block: convolution, norm, ReLU and pooling."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that computes the blocks among its layers by `ddfast.ops.convnet_block`.

    A block is `Conv2d(kernel 3, stride 1, padding 1) -> GroupNorm with a group a channel, or InstanceNorm2d without
    running statistics, or BatchNorm2d -> ReLU -> AvgPool2d(2)`. Its layers stay what and where they are, so names,
    parameters and their order are those of the plain module; they are looked at in every call, so what is changed
    later counts. A block whose layers have hooks runs as it is, and so does one on inputs that the op does not make
    faster: under autocast, in other dtypes than float32 on the CPU, on devices other than CPUs and CUDA. One with
    BatchNorm is computed by `ddfast.ops.convnet_block_batch_norm` on CPUs, in train mode with running statistics that
    move as PyTorch's do, and in eval mode where no gradient is asked for; it runs as it is under the transforms of
    `torch.func`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The layers' output; blocks in a row hand on channels-last maps, the last one's is as PyTorch's."""
        layers: list[Any] = list(self)
        place, in_row, layout = 0, False, torch.contiguous_format
        while place < len(layers):
            if _fits(input) and _is_block(block := layers[place : place + _LENGTH]) and _serves(block, input):
                layout = layout if in_row else _layout(input)
                input = _run(block, input)
                place, in_row = place + _LENGTH, True
                continue
            if in_row:
                input = input.contiguous(memory_format=layout)
            input = layers[place](input)
            place, in_row = place + 1, False
        return input.contiguous(memory_format=layout) if in_row else input


def fuse(model: Model) -> Model:
    """The model with its ConvNet blocks fused: same parameters, same results up to rounding.

    Serves `ddfast.create_model("convnet3_in")` and its like, the ConvNets of the reference repository of dataset
    condensation, and every `nn.Sequential` in which such blocks stand in a row (see `FusedSequential`), with BatchNorm
    on a CPU too. Everything else is left as it is.

    Args:
        model: any module. It is not modified.

    Returns:
        a copy of the model, in the same mode, that shares its parameters and buffers: the very objects, under the
        same names and in the same order, so that an optimizer of one trains both, and a state dict fits both.
    """
    hooks = (hook for module in model.modules() for kind in _HOOKS for hook in getattr(module, kind).values())
    shared: dict[int, Any] = {id(each): each for each in chain(model.parameters(), model.buffers(), hooks)}
    fused = copy.deepcopy(model, shared)
    if (replaced := _fused(fused)) is not fused:
        return replaced  # type: ignore[return-value]
    for module in list(fused.modules()):
        for name, child in list(module.named_children()):
            module._modules[name] = _fused(child)
    return fused


def _fused(module: nn.Module) -> nn.Module:
    """A `FusedSequential` of the same layers where the module is a plain `nn.Sequential` with a block in it."""
    if type(module) is not nn.Sequential:
        return module
    layers = list(module)
    if not any(_is_block(layers[place : place + _LENGTH]) for place in range(len(layers))):
        return module
    replacement = FusedSequential()
    replacement.__dict__.update(module.__dict__)
    return replacement


def _is_block(layers: list[Any]) -> bool:
    """Whether the layers are a block that nobody listens into."""
    if len(layers) != _LENGTH or any(_has_hooks(layer) for layer in layers):
        return False
    conv, norm, relu, pool = layers
    return _is_conv(conv) and _is_norm(norm, conv.out_channels) and type(relu) is nn.ReLU and _is_pool(pool)


def _is_conv(layer: Any) -> bool:
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (3, 3)
        and layer.stride == (1, 1)
        and layer.padding in ((1, 1), "same")
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )


def _is_norm(layer: Any, channels: int) -> bool:
    if type(layer) is nn.BatchNorm2d:
        return layer.num_features == channels
    if type(layer) is nn.GroupNorm:
        return layer.num_groups == layer.num_channels == channels
    return type(layer) is nn.InstanceNorm2d and layer.num_features == channels and layer.running_mean is None


def _is_pool(layer: Any) -> bool:
    return (
        type(layer) is nn.AvgPool2d
        and layer.kernel_size in (2, (2, 2))
        and layer.stride in (2, (2, 2))
        and layer.padding in (0, (0, 0))
        and not layer.ceil_mode
        and layer.divisor_override is None
    )


def _has_hooks(layer: nn.Module) -> bool:
    """Whether somebody listens into the layer, or gave this one a forward pass of its own."""
    return any(getattr(layer, kind) for kind in _HOOKS) or "forward" in vars(layer)


def _fits(input: Tensor) -> bool:
    """Whether the op takes the input and is faster than the layers."""
    return (
        isinstance(input, Tensor)
        and input.ndim == 4
        and min(input.shape[2:]) >= 2
        and convnet_block_is_fast(input.device, input.dtype)
        and not torch.is_autocast_enabled(input.device.type)
        and not _has_any_global_hook()
    )


def _serves(block: list[Any], input: Tensor) -> bool:
    """Whether there is an op for the block's norm in its mode."""
    conv, norm = block[:2]
    if type(norm) is not nn.BatchNorm2d:
        return True
    if input.device.type != "cpu" or len(input) == 0 or torch._C._are_functorch_transforms_active():
        return False
    if _takes_its_batch(norm):
        return True
    parameters = (input, conv.weight, conv.bias, norm.weight, norm.bias)
    if is_differentiated(*(each for each in parameters if each is not None)):
        return False
    return all(
        each is not None and each.dtype == input.dtype for each in (norm.running_mean, norm.running_var)
    )


def _takes_its_batch(norm: nn.BatchNorm2d) -> bool:
    """Whether it normalises by the statistics of its batch, and not by those that it holds."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _run(block: list[Any], input: Tensor) -> Tensor:
    """The block's output; the statistics of a BatchNorm in train mode move."""
    conv, norm = block[:2]
    weight, bias, scale, shift, eps = conv.weight, conv.bias, norm.weight, norm.bias, norm.eps
    if type(norm) is not nn.BatchNorm2d:
        return convnet_block(input, weight, bias, scale, shift, eps)
    if not _takes_its_batch(norm):
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None  # see _serves
        assert variance is not None
        return convnet_block_batch_norm_eval(input, weight, bias, scale, shift, mean, variance, eps)
    output, mean, variance = convnet_block_batch_norm(input, weight, bias, scale, shift, eps)
    if norm.training and norm.track_running_stats:
        _move_statistics(norm, mean, variance, input.shape[0] * input.shape[2] * input.shape[3])
    return output


@torch.no_grad()
def _move_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """What BatchNorm's forward pass does to its buffers; `variance` is that of `count` values, not of one less."""
    share = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the mean over all batches
            share = 1.0 / float(norm.num_batches_tracked)
    if norm.running_mean is not None:
        norm.running_mean.mul_(1 - share).add_(mean, alpha=share)
    if norm.running_var is not None:
        norm.running_var.mul_(1 - share).add_(variance, alpha=share * count / (count - 1))


def _layout(input: Tensor) -> torch.memory_format:
    """The memory format that PyTorch's layers would hand on."""
    last = not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
