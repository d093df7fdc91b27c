"""Registration and public face of class_kl: the spread of features within classes, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddfast.ops import reference
from ddfast.ops._dispatch import LIBRARY, below_autocast, call, define

REDUCTIONS = ("mean", "class")


def class_kl(
    features: Tensor, labels: Tensor, reduction: str = "mean", counts: Tensor | None = None
) -> Tensor:
    """Mean KL(P_s || Q_y) over rows s, with P_s = softmax(features_s) and Q_y the mean of P over the rows of class y.

    The value and its gradient are made in one pass, by the closed form

        d / d features_s = P_s * (log P_s - log Q_y - KL_s) * weight_s,

    weight_s = 1 / n for n rows, or 1 / (classes * n_y): the term that comes of Q's dependence on P sums to zero. A
    class's value is H(Q_y) less the mean of H(P_s). All is computed from logarithms, so that no probability is too
    small. Differentiable twice and more, by plain PyTorch from the second derivative on.

    Args:
        features: [n, M] floating point, n and M at least 1. float16 and bfloat16 are computed in float32.
        labels: int64 [n], any values.
        reduction: "mean", over rows, or "class", the mean over the classes present of each one's mean.
        counts: int64 [C], how often each label stands there, where they are 0 to C - 1 and that is known: nothing
            then has to wait for a GPU to count them. None: they are counted.

    Returns:
        a scalar, float32 or float64 for float64.

    Raises:
        TypeError: features not floating point or labels not integer.
        ValueError: shapes that do not fit, or an unknown reduction.
    """
    if not features.is_floating_point() or labels.dtype != torch.int64:
        raise TypeError(
            f"features must be floating point and labels int64, got {features.dtype} and {labels.dtype}"
        )
    if features.ndim != 2 or 0 in features.shape or labels.shape != features.shape[:1]:
        raise ValueError(
            "features must be [n, M] with n and M at least 1 and labels [n], "
            f"got {list(features.shape)} and {list(labels.shape)}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be {' or '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    members = labels
    if counts is None:
        _, members, counts = labels.unique(return_inverse=True, return_counts=True)
    elif counts.ndim != 1 or counts.dtype != torch.int64:
        raise ValueError(f"counts must be int64 [C], got {counts.dtype} {list(counts.shape)}")
    if torch._C._are_functorch_transforms_active():  # register_autograd has no rule for them
        terms = below_autocast(reference.class_kl_terms, features.device.type)
        return terms(features, members, counts, reduction == "class")[0]
    return call("class_kl", features, members, counts, reduction == "class")[0]


def _fake(features: Tensor, members: Tensor, counts: Tensor, by_class: bool) -> tuple[Tensor, Tensor]:
    value = features.new_empty((), dtype=reference.accumulation_dtype(features.dtype))
    return value, features.new_empty(features.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, members, counts, ctx.by_class = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(features, members, counts, output[1])


def _gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    features, members, counts, gradient = ctx.saved_tensors
    if torch.is_grad_enabled():  # this gradient may be differentiated in turn
        gradient = reference.class_kl_terms(features, members, counts, ctx.by_class)[1]
    return (grad * gradient).to(features.dtype), None, None, None


define(
    "class_kl",
    "(Tensor features, Tensor members, Tensor counts, bool by_class) -> (Tensor, Tensor)",
    reference=reference.class_kl,
    fake=_fake,
    triton="class_kl",
)
torch.library.register_autograd("ddfast::class_kl", _gradient, setup_context=_save, lib=LIBRARY)
