"""Speed entries of trainings that are differentiated: an iteration of MTT, `unrolled_gradient`, and its parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional

import ddfast
from bench.speed.measuring import synchronise
from bench.speed.peer_runs import TrajectoryLoop
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
from ddfast.gradients.directional import along, differentiable_gradients
from ddfast.methods.base import Context
from ddfast.methods.matching.mtt import MTT
from ddfast.methods.synthesis import Group, State

CLASSES, SIDE, RATE = 10, 32, 0.01
Weights = dict[str, Tensor]


@speed_entry(
    "mtt_iteration",
    what="an iteration of MTT against its authors' own loop: time, and peak memory",
    minutes=3,
    targets={"cpu": {"ddfast": Target(1 / 1.3, memory=0.15)}},
)
def mtt_iteration(settings: Settings) -> Iterator[Measurable]:
    """10 synthetic images a class, 10 classes, a student of 30 steps, ConvNet-3 with InstanceNorm, DSA."""
    steps, ipc, width = settings.size((30, 10, 128), quick=(3, 2, 128), gpu=(30, 10, 128))
    model = _convnet(width, torch.float32).to(settings.device)
    start, goal = _ends(model)
    pixels = torch.randn(CLASSES * ipc, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(settings.device)
    peer = _peer(pixels, ipc, start, goal, steps)
    method, context = _method(settings, steps, ipc, start, goal)
    numbers = itertools.count()
    zero = torch.zeros((), dtype=torch.float64, device=settings.device)
    state = State(
        Group(0, tuple(range(CLASSES))),
        {
            "pixels": pixels,
            "momentum": torch.zeros_like(pixels),
            "learned_rate": zero + RATE,
            "learned_rate_momentum": zero,
            "cmi_scale": zero,
        },
    )

    def ours() -> None:
        method.step(next(numbers), state, None, context)  # type: ignore[arg-type] # it draws no real images
        synchronise(settings.device)

    def gate() -> list[Check]:
        few, small = min(steps, 3), 2
        wide = _convnet(width, torch.float64).to(settings.device)
        first, last = _ends(wide)
        images = pixels[: CLASSES * small].double()
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            theirs = _peer(images, small, first, last, few, no_aug=True)
            theirs.step()
        finally:
            torch.set_default_dtype(before)
        labels = torch.arange(CLASSES, device=settings.device).repeat_interleave(small)
        found = ddfast.unrolled_gradient(
            wide,
            first,
            [(images, labels)] * few,
            lambda weights: distance_left(weights, first, last),
            lr=RATE,
        )
        gradient = torch.stack([each for each in found.images if each is not None]).sum(dim=0)
        return [
            Check(
                "gradient of the images, float64",
                relative_error(gradient, theirs.names["image_syn"].grad),
                1e-9,
            ),
            Check(
                "gradient of the rate, float64", relative_error(found.lr, theirs.names["syn_lr"].grad), 1e-9
            ),
        ]

    yield Contest(
        f"MTT, 10 classes, {ipc} synthetic images each, {steps} steps",
        ours=[Contender("ddfast", ours)],
        peer=Contender("mtt-distillation, distill.py", peer.step),
        gate=gate,
        unit="iterations",
        rounds=2,
        long=True,
    )


@speed_entry(
    "unrolled_gradient",
    what="the gradient through a training against autograd on its whole graph: time, and peak memory",
    minutes=2,
    targets={"cpu": {"fused blocks": Target(1 / 1.3, memory=0.3)}},
)
def unrolled_gradient(settings: Settings) -> Iterator[Measurable]:
    """10 steps on 50 images, ConvNet-3 with InstanceNorm, plain and with fused blocks."""
    steps, count, width = settings.size((10, 50, 128), quick=(2, 4, 16), gpu=(30, 100, 128))
    model = _convnet(width, torch.float32).to(settings.device)
    start, goal = _ends(model)
    batches = _batches(steps, count, settings.device)
    fused = ddfast.fuse(model)

    def ours(network: nn.Module, **how: Any) -> Tensor:
        found = ddfast.unrolled_gradient(
            network, start, batches, lambda weights: distance_left(weights, start, goal), lr=RATE, **how
        )
        return torch.stack([each for each in found.images if each is not None])

    def theirs() -> Tensor:
        return differentiate_whole_graph(model, start, goal, batches)

    def gate() -> list[Check]:
        wide = _convnet(8, torch.float64).to(settings.device)
        first, last = _ends(wide)
        few = [(images[:4].double(), labels[:4]) for images, labels in batches[:3]]
        found = ddfast.unrolled_gradient(
            wide, first, few, lambda weights: distance_left(weights, first, last), lr=RATE
        )
        exact = torch.stack([each for each in found.images if each is not None])
        return [
            Check(
                "plain, float64",
                relative_error(exact, differentiate_whole_graph(wide, first, last, few)),
                1e-10,
            ),
            # In float32 two exact routes differ where a ReLU flips.
            Check("fused, float32", relative_error(ours(fused), theirs()), 2e-2),
        ]

    yield Contest(
        f"ConvNet-3, {steps} steps on {count} images of {SIDE} px",
        ours=[
            Contender("plain", lambda: ours(model)),
            Contender("fused blocks", lambda: ours(fused)),
            Contender("fused blocks, steps kept", lambda: ours(fused, memory_budget=2**40)),
        ],
        peer=Contender("autograd", theirs),
        gate=gate,
        unit="gradients",
        rounds=3,
        long=True,
    )


@speed_entry(
    "directional",
    what="the derivative of a gradient along a direction: reverse over reverse, and forward over reverse",
    minutes=1,
)
def directional(settings: Settings) -> Iterator[Measurable]:
    """In the weights and the images, of ConvNet-3 with InstanceNorm on 50 images: what a step of the way back takes.

    PyTorch's GroupNorm has no forward mode for its backward pass, so for the peer the norm is made of plain operations.
    """
    count, width = settings.size((50, 128), quick=(4, 16), gpu=(100, 128))
    model = _convnet(width, torch.float32).to(settings.device)
    start, goal = _ends(model)
    ((images, labels),) = _batches(1, count, settings.device)
    direction = [goal[name] - start[name] for name in start]
    plain = _convnet(width, torch.float32).to(settings.device)
    assert isinstance(plain.blocks, nn.Sequential)
    plain.blocks = nn.Sequential(
        *(_PlainNorm(each) if isinstance(each, nn.GroupNorm) else each for each in plain.blocks)
    )

    def reverse(network: nn.Module) -> Sequence[Tensor]:
        leaves = [weight.clone().requires_grad_() for weight in start.values()]
        leaf = images.clone().requires_grad_()
        named = dict(zip(start, leaves, strict=True))
        gradients = differentiable_gradients(
            functional.cross_entropy(functional_call(network, named, (leaf,)), labels), leaves
        )
        return along(gradients, direction, [*leaves, leaf])

    def forward() -> Sequence[Tensor]:
        with forward_ad.dual_level():
            leaves = [
                forward_ad.make_dual(weight.clone().requires_grad_(), tangent)
                for weight, tangent in zip(start.values(), direction, strict=True)
            ]
            leaf = images.clone().requires_grad_()
            loss = functional.cross_entropy(
                functional_call(plain, dict(zip(start, leaves, strict=True)), (leaf,)), labels
            )
            found = torch.autograd.grad(loss, [*leaves, leaf])
            return [forward_ad.unpack_dual(each).tangent for each in found]

    def gate() -> list[Check]:
        wanted = _flat(reverse(model))
        return [
            Check("forward over reverse", relative_error(_flat(forward()), wanted), 1e-3),
            Check("fused blocks", relative_error(_flat(reverse(ddfast.fuse(model))), wanted), 1e-2),
        ]

    fused = ddfast.fuse(model)
    yield Contest(
        f"ConvNet-3, weights and {count} images of {SIDE} px",
        ours=[
            Contender("reverse over reverse", lambda: reverse(model)),
            Contender("reverse over reverse, norm of plain operations", lambda: reverse(plain)),
            Contender("reverse over reverse, fused blocks", lambda: reverse(fused)),
        ],
        peer=Contender("forward over reverse, norm of plain operations", forward),
        gate=gate,
        unit="derivatives",
        rounds=5,
        long=True,
    )


class _PlainNorm(nn.Module):
    """InstanceNorm in operations that have a forward mode of their own and of their backward pass."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self._eps = norm.weight, norm.bias, norm.eps

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W], each map normalised."""
        centred = maps - maps.mean(dim=(2, 3), keepdim=True)
        scaled = centred * (centred.square().mean(dim=(2, 3), keepdim=True) + self._eps).rsqrt()
        return scaled * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class _Held:
    """An expert in memory: the student's start and its goal."""

    whitening = None

    def __init__(self, start: Weights, goal: Weights) -> None:
        self._ends = (start, goal)

    def __len__(self) -> int:
        return 1

    def weights(self, expert: int, epoch: int) -> Weights:
        """After epoch 0 or 1."""
        return self._ends[epoch]


def _method(settings: Settings, steps: int, ipc: int, start: Weights, goal: Weights) -> tuple[MTT, Context]:
    method = MTT.from_options(
        {"experts": "in memory", "syn_steps": steps, "expert_epochs": 1, "max_start_epoch": 1, "lr_img": 1e-9}
    )
    assert isinstance(method, MTT)
    method._experts = _Held(start, goal)  # type: ignore[assignment]
    context = Context(
        teacher=None,
        image_size=SIDE,
        factor=1,
        seed=0,
        precision="float32",
        forward_batch=128,
        device=settings.device,
        ipc=ipc,
        class_names=tuple(map(str, range(CLASSES))),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    return method, context


def _peer(
    pixels: Tensor, ipc: int, start: Weights, goal: Weights, steps: int, **settings: Any
) -> TrajectoryLoop:
    trajectory = [list(start.values()), list(goal.values())]
    return TrajectoryLoop(pixels, ipc, trajectory, RATE, syn_steps=steps, expert_epochs=1, **settings)


def _convnet(width: int, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ddfast.create_model("convnet3_in", CLASSES, SIDE, width=width).to(dtype).requires_grad_(False)


def _ends(model: nn.Module) -> tuple[Weights, Weights]:
    """Weights to begin at, and weights nearby to end at."""
    draws = torch.Generator().manual_seed(1)
    start = {name: weight.detach() for name, weight in model.named_parameters()}
    noise = {name: torch.randn(weight.shape, generator=draws).to(weight) for name, weight in start.items()}
    return start, {name: weight + 0.01 * noise[name] for name, weight in start.items()}


def _batches(steps: int, count: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(count, 3, SIDE, SIDE, generator=draws).to(device),
            torch.randint(CLASSES, (count,), generator=draws).to(device),
        )
        for _ in range(steps)
    ]


def distance_left(weights: Weights, start: Weights, goal: Weights) -> Tensor:
    """Squared distance of the weights to the goal over that of the start: MTT's loss."""
    left = torch.stack([(weights[name] - goal[name]).square().sum() for name in goal]).sum()
    return left / torch.stack([(start[name] - goal[name]).square().sum() for name in goal]).sum()


def differentiate_whole_graph(
    model: nn.Module,
    start: Weights,
    goal: Weights,
    batches: Sequence[tuple[Tensor, Tensor]],
    rate: float = RATE,
) -> Tensor:
    """The gradient of `distance_left` in the images of all batches, by one graph of the whole training."""
    leaves = [images.clone().requires_grad_() for images, _ in batches]
    weights = {name: weight.clone().requires_grad_() for name, weight in start.items()}
    for images, (_, labels) in zip(leaves, batches, strict=True):
        loss = functional.cross_entropy(functional_call(model, weights, (images,)), labels)
        found = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {n: w - rate * g for (n, w), g in zip(weights.items(), found, strict=True)}
    return torch.stack(torch.autograd.grad(distance_left(weights, start, goal), leaves))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
