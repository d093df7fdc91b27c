"""Speed entries of the fused ConvNet blocks: forward pass and gradients of ConvNet-3 with InstanceNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
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
    speed_entry,
)

CLASSES = 10
LAST = torch.channels_last


@speed_entry(
    "convnet_forward",
    what="forward pass of ConvNet-3 with InstanceNorm against eager PyTorch",
    minutes=0.3,
    targets={"cpu": {"fused": Target(3.5)}},
)
def convnet_forward(settings: Settings) -> Iterator[Measurable]:
    """256 images of 32 px; the peer is the faster of contiguous and channels-last."""
    model, images, _ = _subject(settings)
    fused = partial(_forward, ddfast.fuse(model), images)
    eager = {name: partial(_forward, *each) for name, each in _layouts(model, images).items()}
    yield _contest(settings, "forward", images, fused, eager)


@speed_entry(
    "convnet_compiled",
    what="forward pass of ConvNet-3 with InstanceNorm against torch.compile",
    minutes=2,
    targets={"cpu": {"fused": Target(1.8)}},
)
def convnet_compiled(settings: Settings) -> Iterator[Measurable]:
    """The same images against the faster of both layouts, compiled."""
    model, images, _ = _subject(settings)
    fused = partial(_forward, ddfast.fuse(model), images)
    compiled = {
        f"torch.compile, {name}": partial(_forward, torch.compile(network), pixels)
        for name, (network, pixels) in _layouts(model, images).items()
    }
    yield _contest(settings, "forward", images, fused, compiled)


@speed_entry(
    "convnet_gradients",
    what="gradients of ConvNet-3's parameters against eager PyTorch",
    minutes=0.6,
    targets={"cpu": {"fused": Target(1.8)}},
)
def convnet_gradients(settings: Settings) -> Iterator[Measurable]:
    """What the matching methods take of 256 real images."""
    model, images, labels = _subject(settings)
    fused = partial(_gradients, ddfast.fuse(model), images, labels)
    eager = {name: partial(_gradients, *each, labels) for name, each in _layouts(model, images).items()}
    # A ReLU whose input is within rounding of zero may flip, in either: seen to move 1e-3 of a channels-last gradient.
    yield _contest(settings, "gradients of the parameters", images, fused, eager, allowed=5e-3)


def _subject(settings: Settings) -> tuple[nn.Module, Tensor, Tensor]:
    count, width = settings.size((256, 128), quick=(4, 16), gpu=(2560, 128))
    torch.manual_seed(0)
    model = ddfast.create_model("convnet3_in", CLASSES, 32, width=width).to(settings.device)
    images = torch.randn(count, 3, 32, 32).to(settings.device)
    return model, images, (torch.arange(count) % CLASSES).to(settings.device)


def _layouts(model: nn.Module, images: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    """The model and the images in both layouts; the channels-last model has parameters of its own."""
    last = ddfast.create_model("convnet3_in", CLASSES, 32, width=model.classifier.in_features // 16)
    last.load_state_dict(model.state_dict())
    return {
        "contiguous": (model, images),
        "channels-last": (last.to(images.device, memory_format=LAST), images.contiguous(memory_format=LAST)),
    }


@torch.no_grad()
def _forward(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def _gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """All parameters' gradients in one vector."""
    loss = functional.cross_entropy(model(images), labels)
    return torch.cat([grad.reshape(-1) for grad in torch.autograd.grad(loss, list(model.parameters()))])


def _contest(
    settings: Settings,
    case: str,
    images: Tensor,
    fused: Callable[[], Tensor],
    peers: dict[str, Callable[[], Tensor]],
    allowed: float = 1e-4,
) -> Contest:
    """Ours against the fastest of the peers, behind the agreement with it."""
    fast, seconds = fastest(peers, settings.device)
    slower = ", ".join(f"{name} {seconds[name] / seconds[fast]:.2f}" for name in seconds if name != fast)
    return Contest(
        f"ConvNet-3, {case}, {len(images)} images of 32 px",
        ours=[Contender("fused", fused, work=len(images))],
        peer=Contender(fast, peers[fast], work=len(images)),
        gate=lambda: [Check("against the peer's", relative_error(fused(), peers[fast]()), allowed)],
        unit="images",
        note=f"times of the other peers over this one's: {slower}",
    )
