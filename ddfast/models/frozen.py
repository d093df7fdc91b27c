"""`frozen`: a network whose weights no longer change, for gradients in the images alone."""

from __future__ import annotations

import copy
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ddfast.ops import winograd_conv2d, winograd_weight
from ddfast.ops._winograd import INPUTS, winograd_is_fast, winograd_pays


def frozen(
    model: nn.Module, device: torch.device, layout: torch.memory_format = torch.channels_last
) -> nn.Module:
    """A copy of a network on a device, in eval mode, without gradients of its weights.

    On CPUs with AVX-512 its 3x3 convolutions of stride 1 and their gradients in the images are computed by
    `ddfast.ops.winograd_conv2d`, whose weights are made once here; elsewhere, and in other dtypes than float32, by
    torch. Either way the results are those of the model up to rounding.

    Args:
        model: any module; it is left as it is.
        device: where the copy is to be.
        layout: of its weights in memory; images are best in the same.
    """
    copied = copy.deepcopy(model).to(device).eval().requires_grad_(False)
    copied = copied.to(memory_format=layout)
    if device.type == "cpu" and winograd_is_fast():
        for module in list(copied.modules()):
            for name, child in list(module.named_children()):
                if _fits(child):
                    module._modules[name] = _FrozenConv2d(child)
    return copied


def _fits(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a convolution that Winograd's algorithm serves in both directions."""
    return (
        type(layer) is nn.Conv2d
        and layer.weight.dtype == torch.float32
        and layer.kernel_size == (3, 3)
        and layer.stride == (1, 1)
        and layer.padding in ((1, 1), "same")
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and layer.in_channels % INPUTS == layer.out_channels % INPUTS == 0
        and not any(getattr(layer, kind) for kind in ("_forward_hooks", "_forward_pre_hooks"))
    )


class _FrozenConv2d(nn.Module):
    """A convolution by transformed weights, forwards and, for the gradient in its input, backwards."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.plain = conv
        self._weights = winograd_weight(conv.weight), winograd_weight(conv.weight, transposed=True)

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != torch.float32 or input.ndim != 4 or not winograd_pays(*input.shape[2:]):
            return self.plain(input)
        if torch.is_autocast_enabled(input.device.type):
            return self.plain(input)
        return _Winograd.apply(input, self.plain.bias, *self._weights)


class _Winograd(torch.autograd.Function):
    """conv2d(input, w, bias, padding=1) and its gradient in `input`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, weight: Tensor, transposed: Tensor) -> Tensor:
        ctx.save_for_backward(transposed)
        return winograd_conv2d(input, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (transposed,) = ctx.saved_tensors
        return winograd_conv2d(gradient, transposed), None, None, None
