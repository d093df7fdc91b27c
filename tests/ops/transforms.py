"""Checks of an op under torch's transforms: second and third backward passes against a plain expression, and vmap."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Op = Callable[..., Any]


def check_second(op: Op, plain: Op, tensors: Sequence[Tensor], parts: Sequence[int]) -> None:
    """That of the gradients in the inputs `parts`, with respect to everything, without the graph of a third."""

    def second(function: Op) -> tuple[Tensor, ...]:
        output = function(*tensors)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grad.requires_grad_()
        first = torch.autograd.grad(output, tensors, grad, create_graph=True)
        loss = sum(first[k].pow(3).sum() for k in parts)
        return torch.autograd.grad(loss, [grad, *tensors], allow_unused=True, materialize_grads=True)

    for found, expected in zip(second(op), second(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def check_third(op: Op, plain: Op, tensors: Sequence[Tensor]) -> None:
    """Of the gradient in the weights, then in the images, then in the scale: the inputs 1, 0 and 3."""

    def third(function: Op) -> Tensor:
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors[1], create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), tensors[0], create_graph=True)[0]
        return torch.autograd.grad(second.square().sum(), tensors[3])[0]

    torch.testing.assert_close(third(op), third(plain), rtol=1e-8, atol=1e-8)


def check_vmap(op: Op, tensors: Sequence[Tensor], in_dims: Sequence[int | None]) -> None:
    """Three variants of each tensor that is mapped: what vmap gives is what a call for each of them gives."""
    mapped = [
        t if d is None else torch.stack([t, t.flip(0), 2 * t], d)
        for t, d in zip(tensors, in_dims, strict=True)
    ]
    found = torch.vmap(op, tuple(in_dims))(*mapped)
    for index in range(3):
        one = op(*(t if d is None else t.select(d, index) for t, d in zip(mapped, in_dims, strict=True)))
        pairs = [(found, one)] if isinstance(one, Tensor) else zip(found, one, strict=True)
        for each, wanted in pairs:
            torch.testing.assert_close(each[index], wanted, rtol=1e-5, atol=1e-5)
