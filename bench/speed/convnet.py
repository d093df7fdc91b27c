"""Speed entries of the fused ConvNet blocks: ConvNet-3 with InstanceNorm, and ConvNet-4 with BatchNorm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
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


@speed_entry(
    "convnet_training",
    what="gradients of ConvNet-4 with BatchNorm in train mode against eager PyTorch",
    minutes=1,
    targets={"cpu": {"fused": Target(1.7)}},
)
def convnet_training(settings: Settings) -> Iterator[Measurable]:
    """What a step of a teacher takes of 128 images of 64 px, its running statistics moved."""
    model, images, labels = _batch_normed(settings)
    fused = partial(_gradients, ddfast.fuse(model), images.contiguous(memory_format=LAST), labels)
    eager = {name: partial(_gradients, *each, labels) for name, each in _layouts(model, images).items()}
    yield _contest(
        settings, "gradients in train mode", images, fused, eager, allowed=5e-3, network="ConvNet-4"
    )


@speed_entry(
    "convnet_eval",
    what="forward pass of ConvNet-4 with BatchNorm in eval mode against eager PyTorch",
    minutes=0.5,
    targets={"cpu": {"fused": Target(2.3)}},
)
def convnet_eval(settings: Settings) -> Iterator[Measurable]:
    """What measuring an accuracy takes of 128 images of 64 px."""
    model, images, _ = _batch_normed(settings)
    model(images)  # statistics that are not those of a new network
    model.eval()
    fused = partial(_forward, ddfast.fuse(model), images.contiguous(memory_format=LAST))
    eager = {name: partial(_forward, *each) for name, each in _layouts(model, images).items()}
    yield _contest(settings, "forward in eval mode", images, fused, eager, network="ConvNet-4")


def _subject(settings: Settings) -> tuple[nn.Module, Tensor, Tensor]:
    return _network_and_images(settings, "convnet3_in", 32, 256)


def _batch_normed(settings: Settings) -> tuple[nn.Module, Tensor, Tensor]:
    return _network_and_images(settings, "convnet4", 64, 128)


def _network_and_images(
    settings: Settings, arch: str, side: int, images: int
) -> tuple[nn.Module, Tensor, Tensor]:
    count, width = settings.size((images, 128), quick=(4, 16), gpu=(10 * images, 128))
    torch.manual_seed(0)
    model = ddfast.create_model(arch, CLASSES, side, width=width).to(settings.device)
    pixels = torch.randn(count, 3, side, side).to(settings.device)
    return model, pixels, (torch.arange(count) % CLASSES).to(settings.device)


def _layouts(model: nn.Module, images: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    """The model and the images in both layouts; the channels-last model has parameters of its own."""
    last = copy.deepcopy(model)
    return {
        "contiguous": (model, images),
        "channels-last": (last.to(memory_format=LAST), images.contiguous(memory_format=LAST)),
    }


@torch.no_grad()
def _forward(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
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
    peers: Mapping[str, Callable[[], Tensor]],
    allowed: float = 1e-4,
    network: str = "ConvNet-3",
) -> Contest:
    """Ours against the fastest of the peers, behind the agreement with it."""
    fast, seconds = fastest(peers, settings.device)
    slower = ", ".join(f"{name} {seconds[name] / seconds[fast]:.2f}" for name in seconds if name != fast)
    return Contest(
        f"{network}, {case}, {len(images)} images of {images.shape[-1]} px",
        ours=[Contender("fused", fused, work=len(images))],
        peer=Contender(fast, peers[fast], work=len(images)),
        gate=lambda: [Check("against the peer's", relative_error(fused(), peers[fast]()), allowed)],
        unit="images",
        note=f"times of the other peers over this one's: {slower}",
    )
