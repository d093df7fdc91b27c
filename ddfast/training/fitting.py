"""The one training loop: steps of an optimiser over batches that are handed in.

Teachers, students, proxies and the network of `forgetting` train by it. What tells them apart is handed in: the
batches (order, augmentation, labels), the loss, the learning rate and what is noted of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ddfast.errors import UsageError
from ddfast.models.fusing import FusedSequential, fuse
from ddfast.ops.precision import autocast
from ddfast.training.device import memory_layout
from ddfast.wording import argument, plural

Targets = TypeVar("Targets")
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Fitting:
    """A network on its way.

    ConvNet blocks are computed fused, which takes a fraction of the time; networks without them keep every bit of
    PyTorch's own results.

    Attributes:
        model: the network, on the device and in the layout that is fastest there.
        network: computes the same from the same parameters and buffers, fused (`ddfast.fuse`) where there are such
            blocks. Train and measure by this one; keep, save and hand out `model`.
        optimizer: of their parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        device: torch.device,
        precision: str = "float32",
    ) -> None:
        """`precision` as in `ddfast.ops.precision.autocast`, of the forward pass."""
        self.device, self.precision = device, precision
        self._layout = memory_layout(model, device)
        self.model = model.to(device=device).to(memory_format=self._layout)
        fused = fuse(self.model)
        gains = any(isinstance(module, FusedSequential) for module in fused.modules())
        self.network = fused if gains else self.model
        self._make_optimizer = make_optimizer
        self.renew_optimizer()

    def renew_optimizer(self) -> None:
        """Make the optimiser anew, which forgets its momentum."""
        self.optimizer = self._make_optimizer(self.model)

    def epoch(
        self,
        batches: Iterable[tuple[Tensor | tuple[Any, ...], Targets]],
        loss: Callable[[Any, Targets], Tensor],
        *,
        rate: Callable[[int], float],
        note: Callable[[Tensor, Targets], object] | None = None,
    ) -> Tensor:
        """One pass over `batches` in train mode, a step each.

        Args:
            batches: normalised images [B, 3, S, S] on the device, or a tuple of them and what else the network takes,
                and whatever `loss` compares their logits with. They are drawn one by one, each right before its step.
            loss: logits [B, C], and what came with their images, to a scalar.
            rate: learning rate of the step of that number, from 0.
            note: is told the logits of each batch, before its step.

        Returns:
            The losses, float32 [steps] on the device; nothing waits for them.

        Raises:
            UsageError: a batch of one image in which BatchNorm sees a single value of a channel.
        """
        losses = []
        self.network.train()
        for step, (inputs, targets) in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = rate(step)
            images, *others = inputs if isinstance(inputs, tuple) else (inputs,)
            with autocast(self.precision, self.device):
                logits = self._outputs(images, others)
            if note is not None:
                note(logits.detach(), targets)
            step_loss = loss(logits, targets)
            self.optimizer.zero_grad(set_to_none=True)
            step_loss.backward()
            self.optimizer.step()
            losses.append(step_loss.detach())
        return torch.stack(losses) if losses else torch.zeros(0, device=self.device)

    def _outputs(self, images: Tensor, others: list[Any]) -> Any:
        try:
            return self.network(images.contiguous(memory_format=self._layout), *others)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                f"BatchNorm has one value of each channel in a batch of {plural(len(images), 'image')}: give "
                f"{argument('batch_size')} of 2 or more, a larger set, or an architecture without it"
            ) from error

    def state(self) -> dict[str, Tensor]:
        """Weights, buffers and the optimiser's memory by name: all that the next epoch depends on."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for number, held in self.optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{number}.{name}": value for name, value in held.items() if value is not None
            }
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put what `state` gave back in place; other names are left alone."""
        self.model.load_state_dict(part(tensors, "model."))
        parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part(tensors, "optimizer.").items():
            number, name = key.split(".", 1)
            # In its parameter's memory layout, as in the run that is continued: it decides the rounding.
            like = parameters[int(number)]
            held = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
            state.setdefault(int(number), {})[name] = held.detach()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def finite_loss(loss: Tensor, advice: str, *, what: str = "the loss", when: str = "") -> float:
    """A training's loss as a number, where it is one; a scalar on any device, which is waited for.

    Raises:
        UsageError: it is infinite or NaN; the line ends in `advice`.
    """
    value = loss.item()
    if not math.isfinite(value):
        raise UsageError(f"{what} became {value}{when}: {advice}")
    return value


def constant(rate: float) -> Callable[[int], float]:
    """The same learning rate at every step."""
    return lambda step: rate


def cosine(progress: float) -> float:
    """Factor of a learning rate that falls from 1 to 0 as a cosine, at `progress` in [0, 1]."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
