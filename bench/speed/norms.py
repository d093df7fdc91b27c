"""Speed entries of per-sample gradient norms: against `torch.func`, and against Opacus."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

import ddfast
from bench.speed.measuring import fastest
from bench.speed.registry import (
    Check,
    Contender,
    Contest,
    Measurable,
    Settings,
    Target,
    relative_error,
    require,
    speed_entry,
)
from bench.speed.subjects import Subject, group_norm_resnet18, subject

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

CHUNK = 8  # images whose per-sample gradients vmap(grad) holds at a time


@speed_entry(
    "grad_norm",
    what="gradient norms of ResNet-18 against vmap(grad) in chunks of 8",
    minutes=0.5,
    targets={
        "cpu": {"float32": Target(5.0, memory=1 / 4)},
        "cuda": {"float32": Target(10.0, memory=1 / 10)},
    },
)
def grad_norm(settings: Settings) -> Iterator[Measurable]:
    """Batch 16 at 112 px on the CPU, batch 128 at 224 px on a GPU."""
    batch, size = settings.size((16, 112), quick=(4, 32), gpu=(128, 224))
    found = subject(settings, batch, size)
    pixels = found.normalised()
    yield Contest(
        f"ResNet-18, {batch} images of {pixels.shape[-1]} px",
        ours=[Contender("float32", partial(ddfast.grad_norm, found.model, pixels, found.labels), work=batch)],
        peer=Contender(
            f"vmap(grad), chunks of {CHUNK}", partial(_vmapped, found.model, pixels, found.labels), work=batch
        ),
        gate=lambda: _agreement(
            found.model, pixels, found.labels, _vmapped(found.model, pixels, found.labels)
        ),
        unit="images",
    )


def _vmapped(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Norms [B] from per-sample gradients by torch.func, the usual way."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, (parameters, buffers), (image[None],))
        return functional.cross_entropy(logits, label[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    norms = []
    for part, target in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
        gradients = per_sample(parameters, part, target)
        norms.append(torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0))
    return torch.cat(norms)


def _agreement(model: nn.Module, images: Tensor, labels: Tensor, peers: Tensor) -> Iterator[Check]:
    """Ours against the peer on all images, and against autograd in float64 on one."""
    ours = ddfast.grad_norm(model, images, labels)
    yield Check("norms against the peer's", relative_error(ours, peers), 1e-4)
    exact = autograd_norms(model, images[:1], labels[:1], torch.float64)
    yield Check("the first norm against float64 autograd", relative_error(ours[:1], exact), 1e-4)


def autograd_norms(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms [B] by one backward pass an image, in `dtype`: obviously right, and slow."""
    parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in model.named_parameters()}
    buffers = {name: b.to(dtype) if b.is_floating_point() else b for name, b in model.named_buffers()}
    norms = []
    for image, label in zip(images.to(dtype), labels, strict=True):
        logits = functional_call(model, (parameters, buffers), (image[None],))
        loss = functional.cross_entropy(logits, label[None])
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm())
    return torch.stack(norms)


# Opacus
# -----------------------------------------------------------------------------------------------------


@speed_entry(
    "grad_norm_opacus",
    what="gradient norms of a GroupNorm ResNet-18 against Opacus' fastest applicable mode",
    minutes=0.5,
    targets={"cpu": {"float32": Target(2.0)}, "cuda": {"float32": Target(3.0)}},
)
def grad_norm_opacus(settings: Settings) -> Iterator[Measurable]:
    """Opacus refuses BatchNorm, so the network has GroupNorm. All of its modes are tried and the fastest is timed."""
    require("opacus")
    batch, size = settings.size((16, 112), quick=(4, 32), gpu=(128, 224))
    shown: Subject = subject(settings, batch, size)
    pixels, labels = shown.normalised(), shown.labels
    model = group_norm_resnet18().to(settings.device)
    modes = {name: partial(run, pixels, labels) for name, run in _opacus_modes(settings.device)}
    fast, seconds = fastest(modes, settings.device)
    slower = ", ".join(f"{name} {seconds[name] / seconds[fast]:.1f}" for name in seconds if name != fast)
    yield Contest(
        f"GroupNorm ResNet-18, {batch} images of {pixels.shape[-1]} px",
        ours=[Contender("float32", partial(ddfast.grad_norm, model, pixels, labels), work=batch)],
        peer=Contender(f"Opacus, {fast}", modes[fast], work=batch, package="opacus"),
        gate=lambda: _agreement(model, pixels, labels, modes[fast]()),
        unit="images",
        note=f"time of Opacus' other modes over its fastest's: {slower}",
    )


Norms = Callable[[Tensor, Tensor], Tensor]


def _opacus_modes(device: torch.device) -> Iterator[tuple[str, Norms]]:
    """Opacus' ways to per-sample norms, each with a network of its own."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping, wrap_model

    for mode, name in (
        ("hooks", "hooks"),
        ("functorch", "functorch"),
        ("ew", "ExpandedWeights"),
    ):
        # Opacus records activations in training mode only, which GroupNorm does not notice.
        wrapped = wrap_model(
            group_norm_resnet18().to(device).train(), grad_sample_mode=mode, loss_reduction="sum"
        )
        yield name, partial(_materialised, wrapped)
    clipping = GradSampleModuleFastGradientClipping(
        group_norm_resnet18().to(device).train(),
        loss_reduction="sum",
        max_grad_norm=1.0,
        use_ghost_clipping=True,
    )
    yield "ghost clipping", partial(_ghost, clipping)


def _materialised(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    parameters: list[Any] = list(model.parameters())  # Opacus gives them `grad_sample`
    for parameter in parameters:
        parameter.grad_sample = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional.cross_entropy(model(images), labels, reduction="sum").backward()
    norms = [parameter.grad_sample.flatten(1).norm(dim=1) for parameter in parameters]
    return torch.stack(norms).norm(dim=0)


def _ghost(model: GradSampleModuleFastGradientClipping, images: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional.cross_entropy(model(images), labels, reduction="sum").backward()
    return model.get_norm_sample()
