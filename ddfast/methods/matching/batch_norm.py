"""How far the statistics of a batch lie from those that BatchNorm has kept of the training, layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from ddfast.models.frozen import frozen
from ddfast.training.device import memory_layout


def has_statistics(model: nn.Module) -> bool:
    """Whether a network has a BatchNorm that keeps mean and variance of its training."""
    return any(_keeps(module) for module in model.modules())


def _keeps(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


class StatisticsNetwork:
    """A frozen copy of a network that tells, with its logits, what its BatchNorm layers see.

    Args:
        model: with a BatchNorm that keeps statistics; it is left as it is.
        device: where the copy is to be.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._layout = memory_layout(model, device)
        self._network = frozen(model, device, self._layout)
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._norms: list[_BatchNorm] = []
        watched: dict[nn.Module, nn.Module] = {}
        for module in list(self._network.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, _BatchNorm) and _keeps(child):
                    if child not in watched:
                        watched[child] = _Watched(child, len(self._norms), self._seen)
                        self._norms.append(child)
                    module._modules[name] = watched[child]
        if isinstance(self._network, _BatchNorm):
            raise ValueError("the network must be more than a BatchNorm")

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and distances of normalised images [N, 3, S, S], both differentiable in them.

        Returns:
            logits [N, C], and float32 [L] (float64 for float64): of each of the L layers, in the order of
            `modules()`, ||mu - mean||_2 + ||var - variance||_2, where mu and var are the mean and the biased variance
            of its input over batch and places, mean and variance what it keeps.
        """
        self._seen.clear()
        logits = self._network(images.contiguous(memory_format=self._layout))
        places = sorted(self._seen)
        norms = [self._norms[place] for place in places]
        found = [self._seen[place] for place in places]
        means = _distances([mean for mean, _ in found], [norm.running_mean for norm in norms])
        variances = _distances([variance for _, variance in found], [norm.running_var for norm in norms])
        self._seen.clear()
        return logits, means + variances


def _distances(found: list[Tensor], kept: list[Any]) -> Tensor:
    """Euclidean distances of pairs of vectors, all layers in a launch where the device has such kernels: [L]."""
    return torch.stack(torch._foreach_norm(torch._foreach_sub(found, kept)))


class _Watched(nn.Module):
    """A BatchNorm in eval mode that leaves mean and variance of its input in `seen`, under its number."""

    def __init__(self, norm: _BatchNorm, number: int, seen: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.norm, self._number, self._seen = norm, number, seen

    def forward(self, input: Tensor) -> Tensor:
        output, mean, variance = _watched(self.norm, input)
        self._seen[self._number] = mean, variance
        return output


def _watched(norm: Any, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What BatchNorm makes of its input, and the input's mean and variance [C]."""
    if type(norm) is nn.BatchNorm2d and input.dtype in (torch.float32, torch.float64):
        return _WatchedNorm.apply(
            input, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
        )
    others = [dim for dim in range(input.ndim) if dim != 1]
    wide = input if input.dtype == torch.float64 else input.float()
    variance, mean = torch.var_mean(wide, dim=others, correction=0)
    return norm(input), mean, variance


class _WatchedNorm(torch.autograd.Function):
    """BatchNorm2d in eval mode with the statistics of its input, which autograd would keep and read many times.

    With n values a channel, d mean / d x = 1 / n and d var / d x = 2 (x - mean) / n, so that the gradient in x is a
    multiple of the output's plus a line in x, for each channel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        kept_mean: Tensor,
        kept_variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = torch.batch_norm_update_stats(input, None, None, 0.0)
        output = functional.batch_norm(input, kept_mean, kept_variance, weight, bias, False, 0.0, eps)
        scale = torch.rsqrt(kept_variance + eps)
        ctx.save_for_backward(input, mean, scale if weight is None else scale * weight)
        return output, mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, of_mean: Tensor, of_variance: Tensor) -> Any:  # type: ignore[override]
        input, mean, scale = ctx.saved_tensors
        count = input.numel() // input.shape[1]
        slope = of_variance * (2 / count)
        offset = torch.addcmul(of_mean / count, slope, mean, value=-1)
        slope, offset, scale = (each.view(1, -1, 1, 1) for each in (slope, offset, scale))
        return torch.addcmul(offset, slope, input).addcmul_(scale, gradient), None, None, None, None, None
