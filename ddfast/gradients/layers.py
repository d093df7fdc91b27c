"""The layers whose parameters' per-sample gradients are known in closed form, one class for each function.

A layer object stands for one call of a function of `torch.nn.functional`; its constructor takes what that
function takes. Given the gradient at the call's output it has the squared norm of its parameters' gradient,
sample by sample, and, for a parameter that other calls use too, the per-sample gradient itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_weight
from typing_extensions import override

from ddfast import ops
from ddfast.ops._winograd import INPUTS, winograd_is_fast, winograd_pays
from ddfast.ops.reference import accumulation_dtype


class Layer(ABC):
    """One call of a layer's function. `grad` is the gradient at the call's output.

    Attributes:
        fused: whether the forward and the backward pass of this call are ours, not autograd's.
    """

    fused = False

    def __init__(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        self.input = input.detach()
        self.weight = weight
        self.bias = bias

    def refusal(self, batch: int) -> str | None:
        """Why this call cannot be served for a batch of `batch` samples; None where it can."""
        if self.input.ndim < 2 or self.input.shape[0] != batch:
            return f"runs on {tuple(self.input.shape)}, whose first dimension is not the batch of {batch}"
        return None

    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        """The layer's output, which `call` computes too."""
        return call()

    def backward(self, grad: Tensor, *, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
        """The gradient at the input where `fused`, and the squared norm [B] of the gradients asked for, if any."""
        if weight:
            return None, self.sq_norm(grad, bias=bias)
        return None, squared(self.bias_gradient(grad)) if bias else None

    @abstractmethod
    def sq_norm(self, grad: Tensor, *, bias: bool) -> Tensor:
        """Squared norm [B] of the gradient of the weight, and of the bias as well where `bias`."""

    @abstractmethod
    def weight_gradient(self, grad: Tensor) -> Tensor:
        """Per-sample gradient [B, *weight.shape], in float32 or float64."""

    @abstractmethod
    def bias_gradient(self, grad: Tensor) -> Tensor:
        """Per-sample gradient [B, *bias.shape], in float32 or float64."""


class Linear(Layer):
    """`functional.linear` on [B, ..., I]."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(input, weight, bias)

    @override
    def sq_norm(self, grad: Tensor, *, bias: bool) -> Tensor:
        return ops.grad_sq_norm_linear(self.input.to(grad.dtype), grad, bias=bias)

    @override
    def weight_gradient(self, grad: Tensor) -> Tensor:
        return _positions(grad).mT @ _positions(self.input)

    @override
    def bias_gradient(self, grad: Tensor) -> Tensor:
        return _positions(grad).sum(1)


class Conv2d(Layer):
    """`functional.conv2d` on [B, C, H, W]; `padding` may be "same" or "valid"."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> None:
        super().__init__(input, weight, bias)
        self.weight_shape = weight.shape
        self.stride, self.dilation, self.groups = _pair(stride), _pair(dilation), groups
        if isinstance(padding, str):
            if padding == "same":  # stride 1; the odd pixel, where there is one, is padded behind
                spare = [d * (k - 1) for k, d in zip(self.weight_shape[2:], self.dilation, strict=True)]
                margins = [(total // 2, total - total // 2) for total in spare]
                self.input = functional.pad(self.input, (*margins[1], *margins[0]))
            padding = 0
        self.padding = _pair(padding)

        self.fused = self._takes_winograd()

    @override
    def refusal(self, batch: int) -> str | None:
        if self.input.ndim != 4:
            return f"runs on {tuple(self.input.shape)}, one image without the batch"
        return super().refusal(batch)

    def _takes_winograd(self) -> bool:
        """Whether `ops.winograd_conv2d` serves this call and is faster than torch's convolution."""
        tensors = [tensor for tensor in (self.input, self.weight, self.bias) if tensor is not None]
        geometry = (*self.weight_shape[2:], *self.stride, *self.padding, *self.dilation, self.groups)
        return (
            geometry == (3, 3, 1, 1, 1, 1, 1, 1, 1)
            and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
            and not torch.is_autocast_enabled("cpu")
            and all(channels % INPUTS == 0 for channels in self.weight_shape[:2])
            and self.input.ndim == 4
            and winograd_pays(*self.input.shape[2:])
            and winograd_is_fast()
        )

    @override
    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        if not self.fused:
            return call()
        assert self.weight is not None
        bias = None if self.bias is None else self.bias.detach()
        return ops.winograd_conv2d(self.input, ops.winograd_weight(self.weight), bias)

    @override
    def backward(self, grad: Tensor, *, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
        squares = super().backward(grad, weight=weight, bias=bias)[1]
        if not self.fused:
            return None, squares
        assert self.weight is not None
        return ops.winograd_conv2d(grad, ops.winograd_weight(self.weight, transposed=True)), squares

    @override
    def sq_norm(self, grad: Tensor, *, bias: bool) -> Tensor:
        return ops.grad_sq_norm_conv2d(
            self.input.to(grad.dtype),
            grad,
            self.weight_shape[2:],
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=bias,
        )

    @override
    def weight_gradient(self, grad: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        gradients = [
            conv2d_weight(x[None], self.weight_shape, g[None], *geometry)
            for x, g in zip(_wide(self.input), _wide(grad), strict=True)
        ]
        return torch.stack(gradients)

    @override
    def bias_gradient(self, grad: Tensor) -> Tensor:
        return _wide(grad).sum((2, 3))


class Conv1d(Conv2d):
    """`functional.conv1d` on [B, C, L]: a convolution of images one pixel high."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> None:
        if not isinstance(padding, str):
            padding = (0, _single(padding))
        super().__init__(
            input.unsqueeze(-2),
            weight.unsqueeze(-2),
            None,
            (1, _single(stride)),
            padding,
            (1, _single(dilation)),
            groups,
        )
        self.weight, self.bias = weight, bias

    @override
    def sq_norm(self, grad: Tensor, *, bias: bool) -> Tensor:
        return super().sq_norm(grad.unsqueeze(-2), bias=bias)

    @override
    def weight_gradient(self, grad: Tensor) -> Tensor:
        return super().weight_gradient(grad.unsqueeze(-2)).squeeze(-2)

    @override
    def bias_gradient(self, grad: Tensor) -> Tensor:
        return _wide(grad).sum(2)


class Normalization(Layer):
    """A layer that computes normalized * weight + bias, with both over the dimensions `dims`."""

    dims = (1, 1)  # the channels

    @abstractmethod
    def normalized(self) -> Tensor:
        """The input after normalisation, before weight and bias."""

    @override
    def sq_norm(self, grad: Tensor, *, bias: bool) -> Tensor:
        return ops.grad_sq_norm_norm(self.normalized().to(grad.dtype), grad, self.dims, bias=bias)

    @override
    def weight_gradient(self, grad: Tensor) -> Tensor:
        return self._summed(_wide(self.normalized()) * _wide(grad))

    @override
    def bias_gradient(self, grad: Tensor) -> Tensor:
        return self._summed(_wide(grad))

    def _summed(self, gradient: Tensor) -> Tensor:
        """The sum over every dimension but the batch and `dims`."""
        first, last = (d % gradient.ndim for d in self.dims)
        others = [d for d in range(1, gradient.ndim) if not first <= d <= last]
        return gradient.sum(others) if others else gradient


class FusedNormalization(Normalization):
    """A normalisation whose whole backward pass is ours, where `fused`: it needs the sums that the norm needs.

    Attributes:
        statistics: the mean and the inverse of the standard deviation, [C] or [B, groups]; known after `forward`.
    """

    statistics: tuple[Tensor, Tensor]

    @override
    def backward(self, grad: Tensor, *, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
        if not self.fused:
            return super().backward(grad, weight=weight, bias=bias)
        return ops.normalization_backward(
            self.input.to(grad.dtype),
            grad,
            *self.statistics,
            None if self.weight is None else self.weight.detach(),
            weight_norm=weight,
            bias_norm=bias,
        )


class BatchNorm(FusedNormalization):
    """`functional.batch_norm` in eval mode, on [B, C, ...]."""

    def __init__(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(input, weight, bias)
        self.running_mean, self.running_var = running_mean, running_var
        self.training, self.eps = training, eps
        self.fused = running_mean is not None and running_var is not None

    @override
    def refusal(self, batch: int) -> str | None:
        if self.training:
            return "takes its statistics from the batch"
        return super().refusal(batch)

    @override
    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        self.statistics = self.running_mean, (self.running_var + self.eps).rsqrt()
        return call()

    @override
    def normalized(self) -> Tensor:
        return functional.batch_norm(self.input, self.running_mean, self.running_var, eps=self.eps)


class InstanceNorm(Normalization):
    """`functional.instance_norm` on [B, C, ...]."""

    def __init__(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(input, weight, bias)
        self.statistics = (None, None) if use_input_stats else (running_mean, running_var)
        self.use_input_stats, self.eps = use_input_stats, eps

    @override
    def normalized(self) -> Tensor:
        return functional.instance_norm(
            self.input, *self.statistics, use_input_stats=self.use_input_stats, eps=self.eps
        )


class GroupNorm(FusedNormalization):
    """`functional.group_norm` on [B, C, ...]."""

    def __init__(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(input, weight, bias)
        self.num_groups, self.eps = num_groups, eps
        dtypes = {tensor.dtype for tensor in (input, weight, bias) if tensor is not None}
        # In lower precision the statistics would be rounded.
        self.fused = dtypes in ({torch.float32}, {torch.float64}) and input.ndim > 1
        self.fused = self.fused and not torch.is_autocast_enabled(input.device.type)

    @override
    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        """What `functional.group_norm` does, keeping the statistics."""
        samples, channels = self.input.shape[:2]
        last = self.input.device.type == "cpu" and self.input.ndim == 4
        last = last and self.input.is_contiguous(memory_format=torch.channels_last)
        output, *statistics = torch.native_group_norm(
            self.input if last else self.input.contiguous(),
            None if self.weight is None else self.weight.detach(),
            None if self.bias is None else self.bias.detach(),
            samples,
            channels,
            self.input.shape[2:].numel(),
            self.num_groups,
            self.eps,
        )
        self.statistics = statistics[0], statistics[1]
        return output

    @override
    def normalized(self) -> Tensor:
        return functional.group_norm(self.input, self.num_groups, eps=self.eps)


class LayerNorm(Normalization):
    """`functional.layer_norm` on [B, ..., *normalized_shape]."""

    def __init__(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(input, weight, bias)
        self.normalized_shape, self.eps = tuple(normalized_shape), eps
        self.dims = (-len(self.normalized_shape), -1)

    @override
    def refusal(self, batch: int) -> str | None:
        if self.input.ndim == len(self.normalized_shape):
            return f"normalises all of {tuple(self.input.shape)}, the batch included"
        return super().refusal(batch)

    @override
    def normalized(self) -> Tensor:
        return functional.layer_norm(self.input, self.normalized_shape, eps=self.eps)


class RMSNorm(LayerNorm):
    """`functional.rms_norm` on [B, ..., *normalized_shape]."""

    def __init__(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> None:
        super().__init__(input, normalized_shape, weight)
        self.rms_eps = eps  # None is the smallest step of the dtype

    @override
    def normalized(self) -> Tensor:
        return functional.rms_norm(self.input, self.normalized_shape, eps=self.rms_eps)


class Embedding(Layer):
    """`functional.embedding` on [B, ...] row indices."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> None:
        super().__init__(input, weight, None)
        self.rows = weight.shape[0]
        self.padding_idx = None if padding_idx is None else padding_idx % self.rows
        self.max_norm, self.scale_grad_by_freq = max_norm, scale_grad_by_freq

    @override
    def refusal(self, batch: int) -> str | None:
        if self.max_norm is not None or self.scale_grad_by_freq:
            return "uses max_norm or scale_grad_by_freq"
        if self.input.ndim < 1 or self.input.shape[0] != batch:
            return f"runs on {tuple(self.input.shape)}, whose first dimension is not the batch of {batch}"
        return None

    @override
    def sq_norm(self, grad: Tensor, *, bias: bool) -> Tensor:
        return ops.grad_sq_norm_embedding(self.input, grad, padding_idx=self.padding_idx)

    @override
    def weight_gradient(self, grad: Tensor) -> Tensor:
        batch, width = grad.shape[0], grad.shape[-1]
        gradient = _wide(grad).new_zeros((batch, self.rows, width))
        index = self.input.reshape(batch, -1, 1).expand(-1, -1, width).to(torch.int64)
        gradient.scatter_add_(1, index, _positions(grad))
        if self.padding_idx is not None:
            gradient[:, self.padding_idx] = 0
        return gradient

    @override
    def bias_gradient(self, grad: Tensor) -> Tensor:
        raise TypeError("an embedding has no bias")


LAYERS: dict[Callable[..., Any], type[Layer]] = {
    functional.linear: Linear,
    functional.conv1d: Conv1d,
    functional.conv2d: Conv2d,
    functional.batch_norm: BatchNorm,
    functional.instance_norm: InstanceNorm,
    functional.group_norm: GroupNorm,
    functional.layer_norm: LayerNorm,
    functional.rms_norm: RMSNorm,
    functional.embedding: Embedding,
}


def squared(gradient: Tensor) -> Tensor:
    """Squared norm [B] of per-sample gradients [B, ...]."""
    return gradient.flatten(1).square().sum(1)


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that gradients are added up in."""
    return tensor.to(accumulation_dtype(tensor.dtype))


def _positions(tensor: Tensor) -> Tensor:
    """[B, ..., I] as [B, T, I], in the dtype that gradients are added up in."""
    return _wide(tensor).reshape(
        tensor.shape[0], tensor[0].numel() // max(tensor.shape[-1], 1), tensor.shape[-1]
    )


def _single(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else value[0]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])
