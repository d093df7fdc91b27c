"""Speed entries of recovery from BatchNorm statistics: a step of SRe2L against its authors' own loop."""

from __future__ import annotations

import copy
import statistics
import types
from collections.abc import Iterator

import torch
from torch import nn

import ddfast
from bench.speed.matching import Images
from bench.speed.measuring import synchronise
from bench.speed.peer_runs import RecoveryLoop
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
from ddfast.methods.base import Context
from ddfast.methods.matching.sre2l import BETAS, SRe2L
from ddfast.methods.synthesis import State
from ddfast.models import Teacher
from ddfast.seeding import generator

SIDE, ITERATIONS = 32, 1000
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # their code holds them too
_NO_IMAGES = Images(0)  # a recovery starts from noise


@speed_entry(
    "sre2l_step",
    what="a recovery step of SRe2L against its authors' own loop",
    minutes=2,
    targets={"cpu": {"ddfast": Target(1.5)}},
)
def sre2l_step(settings: Settings) -> Iterator[Measurable]:
    """100 images of 32 px, one of each of 100 classes, through `resnet18_small`."""
    count = settings.size(100, quick=4, gpu=100)
    model = _trained(count, settings.device)
    method, context = (
        SRe2L.from_options({"iterations": ITERATIONS, "batch": count}),
        _context(model, settings),
    )
    assert isinstance(method, SRe2L)
    (group,) = method.groups(count, 1)
    start = method.begin(group, _NO_IMAGES, context)
    targets = torch.arange(count, device=settings.device)
    peer = RecoveryLoop(copy.deepcopy(model), start.pixels, targets, ITERATIONS)
    state, steps = _copied(start), iter(range(ITERATIONS))

    def ours() -> None:
        method.step(next(steps), state, _NO_IMAGES, context)
        synchronise(settings.device)

    def gate() -> list[Check]:
        theirs = RecoveryLoop(copy.deepcopy(model), start.pixels, targets, ITERATIONS)
        return _same_step(method, start, context, theirs)

    yield Contest(
        f"ResNet-18, {count} images of {SIDE} px",
        ours=[Contender("ddfast", ours)],
        peer=Contender("SRe2L, recover_cifar.py", peer.step),
        gate=gate,
        unit="steps",
        rounds=5,
        long=True,
    )


def _trained(classes: int, device: torch.device) -> nn.Module:
    """A ResNet-18 with random weights, and in its BatchNorm layers statistics of random images."""
    torch.manual_seed(0)
    model = ddfast.create_model("resnet18_small", classes, SIDE)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(16, 3, SIDE, SIDE))
    return model.eval().requires_grad_(False).to(device)


def _context(model: nn.Module, settings: Settings) -> Context:
    names = [f"{label:03d}" for label in range(model.get_parameter("fc.bias").numel())]
    return Context(
        teacher=Teacher(model, "resnet18_small", names, SIDE, MEAN, STD, sha256=""),
        image_size=SIDE,
        factor=1,
        seed=0,
        precision="float32",
        forward_batch=128,
        device=settings.device,
        ipc=1,
        class_names=tuple(names),
        mean=MEAN,
        std=STD,
    )


def _copied(state: State) -> State:
    return State(state.group, {name: tensor.clone() for name, tensor in state.tensors.items()})


def _same_step(method: SRe2L, start: State, context: Context, peer: RecoveryLoop) -> list[Check]:
    """The first step of both on the same images and offsets: the gradient, and the pixels after it."""
    state = _copied(start)
    method.step(0, state, _NO_IMAGES, context)
    draws = generator(context.seed, "augment", start.group.number, 0)
    offsets = iter(torch.randint(method.options.shift + 1, (2,), generator=draws).tolist())
    peer.names["random"] = types.SimpleNamespace(randint=lambda *_: next(offsets))
    peer.step()
    gradient = state.tensors["first_moment"] / (1 - BETAS[0])
    each = [relative_error(*pair) for pair in zip(gradient, peer.gradient, strict=True)]
    # A ReLU whose input is within rounding of zero may go either way, and with it the gradient of a single image; so
    # may Adam's first step, which is of one length for every pixel, where a gradient is that small.
    other = ((state.pixels - peer.pixels).abs() > 1e-4).double().mean()
    return [
        Check("gradient in the pixels, same offsets, median over the images", statistics.median(each), 1e-5),
        Check("gradient of all images", relative_error(gradient, peer.gradient), 1e-2),
        Check("share of the pixels that end elsewhere", float(other), 1e-2),
    ]
