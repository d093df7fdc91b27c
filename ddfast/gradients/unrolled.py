"""`unrolled_gradient`: the exact gradient through a training, in the memory of one of its steps.

A training of N steps of SGD makes theta_N of theta_0 and N batches. Unrolling it keeps the activations of all steps at
once. Going back a step at a time needs the weights before each step alone, as a step can be computed again from them.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddfast.gradients.directional import along, differentiable_gradients, inner
from ddfast.gradients.preservation import one_call_a_model, tensors_of, untouched, without_inference_tensors
from ddfast.ops.graphs import Recorded
from ddfast.random_states import RandomStates, kept_random_states
from ddfast.unchanged import found_of

_EVERYTHING = 2**63 - 1  # bytes
_KINDS = 8  # of steps that are recorded: batches of two sizes, the first step and the last

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class UnrolledGradient:
    """What `unrolled_gradient` returns; every tensor is free of a graph.

    Attributes:
        value: of the objective, scalar.
        images: its gradient in the images of each batch, beside the batches; None for images that are integers. A
            tensor that stands in several batches has a gradient in each, to be added up.
        targets: the same for soft labels; None for labels that are integers.
        lr: its gradient in the learning rate, in the shape, dtype and device of the rate where that is a tensor.
        params: the final weights theta_N, by name.
    """

    value: Tensor
    images: list[Tensor | None]
    targets: list[Tensor | None]
    lr: Tensor
    params: dict[str, Tensor]


@one_call_a_model
def unrolled_gradient(
    model: nn.Module,
    params: Mapping[str, Tensor],
    batches: Iterable[Batch],
    objective: Callable[[dict[str, Tensor]], Tensor],
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    *,
    loss: Loss = functional.cross_entropy,
    unroll: str = "exact",
    memory_budget: int = 0,
) -> UnrolledGradient:
    """The gradient of objective(theta_N) in the batches and the learning rate of the N steps of SGD that made theta_N.

    Step i, from 0, is that of `torch.optim.SGD`, with l_i the loss on batch i and g_i its gradient at theta_i:

        m_{i+1} = momentum * m_i + g_i + weight_decay * theta_i,  m_0 = 0
        theta_{i+1} = theta_i - lr * m_{i+1}

    With lambda = d objective / d theta_N and kappa = 0, the way back is, for i = N-1 ... 0:

        kappa  = lambda + momentum * kappa
        d images_i  = -lr * d<g_i, kappa> / d images_i,  and the same for soft labels
        d lr       -= <g_i + weight_decay * theta_i, kappa>
        lambda     -= lr * (H_i kappa + weight_decay * kappa)

    Both second derivatives, the Hessian's product H_i kappa and the one in the images, are one directional derivative
    of the gradient (`ddfast.gradients.directional`). The result is that of differentiating the unrolled training, up
    to rounding: float64 tests hold it to 1e-10. In float32 two exact routes may differ where a ReLU flips.

    It costs, for every layer and step, 3 products of the way there and 9 of the way back (forward and backward pass,
    and the backward pass of both), where an unrolled training takes 9; with a `memory_budget` for all steps 9 as well.
    It holds the weights of N + 1 steps, the gradients that it returns, and the activations of one step. ConvNets with
    InstanceNorm take a fraction of the time where the model is `ddfast.fuse(model)`.

    The random numbers that a model draws (dropout in train mode) are the same when a step is computed again. The
    model, its buffers and mode, `params` and the batches are left as they were; .grad of none is touched.

    Args:
        model: maps images [B, ...] to outputs; called by `torch.func.functional_call`, in the mode that it is in.
        params: start weights theta_0 by the names of `model.named_parameters()`, floating point. Parameters that are
            left out stay as the model has them and are not trained.
        batches: (images, targets) of each step. Targets are labels int64 [B], or soft labels [B, C], probabilities in
            floating point.
        objective: maps the final weights, a dict as `params`, to a scalar.
        lr: learning rate, a number or a tensor of one element.
        momentum: of SGD, at least 0.
        weight_decay: of SGD, at least 0, on every weight of `params`.
        loss: (outputs, targets) -> scalar, differentiable twice; default the mean cross-entropy.
        unroll: "exact"; "truncated:K" goes back through the last K steps alone, and what came before gets zeros;
            "detached" leaves H_i out, as if no gradient depended on the weights it is taken at: what the code of TESLA
            (Cui et al., ICML 2023) computes.
        memory_budget: bytes of activations that may be kept on the way there; the first steps whose activations fit
            are not computed twice. 0 keeps those of no step, infinity those of all.

    Returns:
        The objective's value, the gradients, and the final weights.

    A model that draws, by dropout in train mode for example, takes its draws from torch's global generator.

    Raises:
        TypeError: something that is no tensor, module or number where one is wanted.
        ValueError: names that the model does not have, a number out of range, an objective or a loss that is no scalar,
            BatchNorm in train mode, or another module that changes its own buffers.
    """
    training = _training_of(model, tuple(params), loss)
    start, batches, rate = _checked(model, params, batches, lr, momentum, weight_decay)
    mode, steps_back = parsed_unroll(unroll, len(batches))
    if not isinstance(memory_budget, numbers.Real) or not memory_budget >= 0:
        raise ValueError(f"memory_budget must be a number of bytes, at least 0, got {memory_budget!r}")
    budget = _Budget(int(min(memory_budget, _EVERYTHING)))
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),  # no other attention can be differentiated twice
        without_inference_tensors(model),
        untouched(model, parameters=True),
    ):
        steps, before, weights = _forth(
            training, start, batches, rate, momentum, weight_decay, budget, steps_back
        )
        value, adjoint = _objective(objective, training.names, weights)
        # Filled as the weights of the steps are given up, so that both are never held for all steps.
        images: list[Tensor | None] = [None] * len(batches)
        targets: list[Tensor | None] = [None] * len(batches)
        of_rate = torch.zeros((), dtype=torch.float64, device=value.device)
        velocity = [torch.zeros_like(w) for w in weights] if momentum else []
        last = len(batches) - steps_back
        for number in range(len(batches) - 1, last - 1, -1):
            step = steps.pop()
            # Nobody asks how the objective depends on the weights before the first of these steps.
            curved = mode == "exact" and number > last
            back = (adjoint, velocity, rate, momentum, weight_decay, curved)
            if step.kept is None and step.draws is None:
                found = training.recorded_back(step.weights, step.batch, *back)
            else:
                found = _back(step.kept or training.again(step), *back)
            adjoint, velocity, slopes, of_inputs = found
            images[number], targets[number] = of_inputs.get("images"), of_inputs.get("targets")
            for slope in slopes:
                of_rate = of_rate - slope
            del found, step, back
        for number in range(last):
            images[number], targets[number] = map(_zeros, batches[number])
        if before:  # what a truncated training moves on with
            of_rate = of_rate - momentum * inner(before, velocity)
    like = lr if isinstance(lr, Tensor) else start[0]
    shape = lr.shape if isinstance(lr, Tensor) else ()
    return UnrolledGradient(
        value=value,
        images=images,
        targets=targets,
        lr=of_rate.to(dtype=like.dtype, device=like.device).reshape(shape),
        params=dict(zip(training.names, weights, strict=True)),
    )


# Steps
# ----------------------------------------------------------------------------------------------------------


@dataclass
class _Taken:
    """A step's gradient with the graph that leads to it.

    Attributes:
        weights: leaves.
        inputs: "images" and "targets", leaves, where they are floating point.
        gradients: of the loss in the weights.
    """

    weights: list[Tensor]
    inputs: dict[str, Tensor]
    gradients: tuple[Tensor, ...]


@dataclass
class _Step:
    """What is needed to go back through a step: its weights and its batch, and its graph where that is kept."""

    weights: list[Tensor]
    batch: Batch
    draws: RandomStates | None = None
    kept: _Taken | None = None


@dataclass
class _Training:
    """A model that is trained from weights which are handed in."""

    model: nn.Module
    names: tuple[str, ...]
    loss: Loss

    def __post_init__(self) -> None:
        self.run_as_it_is()

    def run_as_it_is(self) -> None:
        """Record nothing, or nothing any more: a recording would not draw what a model draws from the host."""
        self.recorded_forth: Callable[..., Any] = self.forth
        self.recorded_back: Callable[..., Any] = self.back

    def record(self) -> None:
        """On a GPU, record a step of the way there, and one of the way back, for each kind of batch."""
        self.recorded_forth = Recorded(self.forth, limit=_KINDS, what="a step of unrolled_gradient")
        self.recorded_back = Recorded(self.back, limit=_KINDS, what="a step back of unrolled_gradient")

    def forth(
        self,
        weights: list[Tensor],
        velocity: list[Tensor],
        batch: Batch,
        rate: Tensor,
        momentum: float,
        weight_decay: float,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and velocity after a step."""
        return _moved(self.gradients(weights, batch), weights, velocity, rate, momentum, weight_decay)

    def back(self, weights: list[Tensor], batch: Batch, *rest: Any) -> _Back:
        """See `_back`."""
        return _back(self.taken(weights, batch), *rest)

    def gradients(self, weights: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...]:
        """Of the loss in the weights, without a graph."""
        leaves = [weight.detach().requires_grad_() for weight in weights]
        value = self._value(leaves, *batch)
        found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return tuple(found)

    def taken(self, weights: Sequence[Tensor], batch: Batch) -> _Taken:
        """The same with a graph, from leaves of its own."""
        leaves = [weight.detach().requires_grad_() for weight in weights]
        inputs = {
            kind: tensor.detach().requires_grad_()
            for kind, tensor in zip(("images", "targets"), batch, strict=True)
            if tensor.is_floating_point()
        }
        value = self._value(leaves, inputs.get("images", batch[0]), inputs.get("targets", batch[1]))
        return _Taken(leaves, inputs, differentiable_gradients(value, leaves))

    def again(self, step: _Step) -> _Taken:
        """A step once more, with the random numbers that it drew."""
        if step.draws is None:
            return self.taken(step.weights, step.batch)
        device = step.weights[0].device
        with kept_random_states([device] if device.type == "cuda" else []):
            step.draws.restore()
            return self.taken(step.weights, step.batch)

    def _value(self, weights: Sequence[Tensor], images: Tensor, targets: Tensor) -> Tensor:
        named = dict(zip(self.names, weights, strict=True))
        value = self.loss(functional_call(self.model, named, (images,)), targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"the loss of a step must be a scalar, got {_described(value)}")
        if not value.requires_grad:
            raise ValueError(
                "the loss of a step depends on none of the weights in params: nothing is trained"
            )
        return value


def _training_of(model: nn.Module, names: tuple[str, ...], loss: Loss) -> _Training:
    """A training of the model; where it is held unchanged, and has no tensor beside those weights, a recorded one.

    Recording costs more than the steps of one training, so that it pays over many.
    """
    known = found_of(model)
    if known is None:
        return _Training(model, names, loss)
    key = ("unrolled_gradient", names, loss)
    if key not in known:
        handed = {
            id(weight) for name, weight in model.named_parameters(remove_duplicate=False) if name in names
        }
        known[key] = _Training(model, names, loss)
        if all(id(tensor) in handed for tensor in tensors_of(model)):
            known[key].record()
    return known[key]


def _forth(
    training: _Training,
    start: list[Tensor],
    batches: Sequence[Batch],
    rate: Tensor,
    momentum: float,
    weight_decay: float,
    budget: _Budget,
    steps_back: int,
) -> tuple[list[_Step], list[Tensor], list[Tensor]]:
    """The last `steps_back` of the steps, the velocity before them where there is one, and the final weights."""
    steps: list[_Step] = []
    # Nobody else holds these: a model may write into the weights it is called with.
    weights = [weight.clone() for weight in start]
    velocity: list[Tensor] = []
    before: list[Tensor] = []
    for number, batch in enumerate(batches):
        drawn, states = RandomStates.now(), RandomStates()
        if number == len(batches) - steps_back:
            before = velocity
        step = _Step(weights, batch)
        seen = _Buffers(training.model) if number == 0 else None
        rest = (velocity, batch, rate, momentum, weight_decay)
        if number >= len(batches) - steps_back and budget.left:
            gradients, step.kept = budget.spent(training, weights, batch)
            moved = _moved(gradients, weights, velocity, *rest[2:])
        else:
            moved = training.recorded_forth(weights, *rest)
        if seen is not None:
            seen.check()
        step.draws = states if states.differ(drawn) else None
        if step.draws is not None:
            training.run_as_it_is()
        if number >= len(batches) - steps_back:
            steps.append(step)
        weights, velocity = moved
    return steps, before, weights


@torch.no_grad()
def _moved(
    gradients: Sequence[Tensor],
    weights: list[Tensor],
    velocity: list[Tensor],
    rate: Tensor,
    momentum: float,
    weight_decay: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and velocity after a step of SGD; the velocity is empty before the first, and without momentum."""
    moves = [
        gradient + weight_decay * weight if weight_decay else gradient
        for gradient, weight in zip(gradients, weights, strict=True)
    ]
    if momentum and velocity:
        moves = [move + momentum * v for move, v in zip(moves, velocity, strict=True)]
    moved = [weight - rate.to(weight) * move for weight, move in zip(weights, moves, strict=True)]
    return moved, moves if momentum else []


_Back = tuple[list[Tensor], list[Tensor], list[Tensor], dict[str, Tensor]]


def _back(
    taken: _Taken,
    adjoint: list[Tensor],
    velocity: list[Tensor],
    rate: Tensor,
    momentum: float,
    weight_decay: float,
    curved: bool,
) -> _Back:
    """A step of the way back.

    Args:
        taken: the step; its graph is used up.
        adjoint, velocity: lambda and kappa, the latter empty without momentum.
        rate, momentum, weight_decay: of SGD.
        curved: whether lambda before the step is wanted.

    Returns:
        lambda and kappa before the step; what the gradient of the rate falls by; and the gradients of the inputs.
    """
    kappa = [a + momentum * v for a, v in zip(adjoint, velocity, strict=True)] if momentum else adjoint
    slopes = [inner(taken.gradients, kappa)]
    if weight_decay:
        slopes.append(weight_decay * inner(taken.weights, kappa))
    found = along(taken.gradients, kappa, [*taken.inputs.values(), *(taken.weights if curved else [])])
    of_inputs = {
        kind: -rate.to(derivative) * derivative for kind, derivative in zip(taken.inputs, found, strict=False)
    }
    if curved:
        adjoint = [
            a - rate.to(a) * (h + weight_decay * k if weight_decay else h)
            for a, h, k in zip(adjoint, found[len(taken.inputs) :], kappa, strict=True)
        ]
    return adjoint, kappa if momentum else [], slopes, of_inputs


def _objective(
    objective: Callable[[dict[str, Tensor]], Tensor], names: Sequence[str], weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Its value at these weights, and its gradient in them."""
    leaves = [weight.detach().requires_grad_() for weight in weights]
    value = objective(dict(zip(names, leaves, strict=True)))
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"objective must return a scalar tensor, got {_described(value)}")
    if not value.requires_grad:
        return value.detach().reshape(()), [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return value.detach().reshape(()), list(found)


# Memory
# ----------------------------------------------------------------------------------------------------------


@dataclass
class _Budget:
    """Bytes of activations that may still be kept."""

    left: int

    def spent(
        self, training: _Training, weights: Sequence[Tensor], batch: Batch
    ) -> tuple[tuple[Tensor, ...], _Taken | None]:
        """A step's gradients, and the step with its graph where that may be kept.

        After the first one that may not be, none is tried.
        """
        size = _Measured()
        with size:
            taken = training.taken(weights, batch)
        gradients = tuple(gradient.detach() for gradient in taken.gradients)
        if size.bytes > self.left:
            self.left = 0
            return gradients, None
        self.left -= size.bytes
        return gradients, taken


class _Measured(torch.autograd.graph.saved_tensors_hooks):
    """Adds up the memory that a graph built inside keeps, every piece of it once."""

    def __init__(self) -> None:
        self._pieces: dict[int, int] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """Of the graph so far."""
        return sum(self._pieces.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            self._pieces[storage._cdata] = storage.nbytes()
        return tensor.detach()


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN among them."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


class _Buffers:
    """The buffers of a model before a pass."""

    def __init__(self, model: nn.Module) -> None:
        self._before = [(name, buffer, buffer.clone()) for name, buffer in model.named_buffers()]

    def check(self) -> None:
        """Refuse a model that has changed one: a step computed again would not be the step that was taken."""
        for name, buffer, before in self._before:
            if buffer.shape != before.shape or not _alike(buffer, before):
                raise ValueError(
                    f"the model changes its buffer {name} in every pass, so that a step cannot be computed again as "
                    "it was taken: put the module in eval mode"
                )


# Arguments
# ----------------------------------------------------------------------------------------------------------


def _checked(
    model: nn.Module,
    params: Mapping[str, Tensor],
    batches: Iterable[Batch],
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
) -> tuple[list[Tensor], list[Batch], Tensor]:
    """Start weights, batches and learning rate without a graph."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {_described(model)}")
    _check_statistics(model)
    known = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in params.items():
        if name not in known:
            raise ValueError(
                f"params holds {name!r}, the model has no parameter of that name: give its named_parameters"
            )
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError(f"params[{name!r}] must be a floating-point tensor, got {_described(weight)}")
        if weight.shape != known[name].shape:
            raise ValueError(
                f"params[{name!r}] must be {list(known[name].shape)} as in the model, got {list(weight.shape)}"
            )
    if not params:
        raise ValueError(
            "params is empty: give the start weights, dict(model.named_parameters()) for example"
        )
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        if not isinstance(value, numbers.Real) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(
                f"lr must be a number or a floating-point tensor of one element, got {_described(lr)}"
            )
        rate = _free(lr).reshape(())
    elif isinstance(lr, numbers.Real) and math.isfinite(lr):
        rate = torch.tensor(float(lr), dtype=torch.float64)
    else:
        raise ValueError(f"lr must be a finite number or a tensor of one element, got {lr!r}")
    start = [_free(weight) for weight in params.values()]
    return start, _checked_batches(batches), rate.to(start[0])


def _checked_batches(batches: Iterable[Batch]) -> list[Batch]:
    found = []
    for number, batch in enumerate(batches):
        if (
            not isinstance(batch, tuple | list)
            or len(batch) != 2
            or not all(isinstance(t, Tensor) for t in batch)
        ):
            raise TypeError(
                f"batches[{number}] must be a pair of tensors, (images, targets), got {_described(batch)}"
            )
        images, targets = map(_free, batch)
        if targets.ndim and images.ndim and len(targets) != len(images):
            raise ValueError(
                f"batches[{number}] has {len(images)} images and {len(targets)} targets: give a target for each image"
            )
        found.append((images, targets if targets.is_floating_point() else targets.long()))
    return found


def _check_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training and getattr(module, "running_mean", None) is not None:
            raise ValueError(
                f"{name or 'the model'} is {type(module).__name__} in train mode: its running statistics change in "
                "every pass and are no part of the final weights, so the gradient would leave them out; call .eval() "
                "on it, or train a network with InstanceNorm"
            )


def parsed_unroll(unroll: str, steps: int) -> tuple[str, int]:
    """What `unroll` means for a training of so many steps: "exact" or "detached", and the steps to go back through.

    Raises:
        ValueError: it means nothing.
    """
    kind, _, count = str(unroll).partition(":")
    if kind in ("exact", "detached") and not count:
        return kind, steps
    if kind == "truncated" and count.isdecimal() and int(count) > 0:
        return "exact", min(int(count), steps)
    raise ValueError(f"unroll must be exact, truncated:K with K of at least 1, or detached, got {unroll!r}")


def _free(tensor: Tensor) -> Tensor:
    """The same values without a graph; a copy of what inference mode made, as autograd cannot save that."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor.detach()


def _zeros(tensor: Tensor) -> Tensor | None:
    return torch.zeros_like(tensor) if tensor.is_floating_point() else None


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
