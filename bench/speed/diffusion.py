"""Speed entry of IGDS: a guided step of the sampler, and each of its parts, against an unguided step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.speed.measuring import synchronise
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
from ddfast.data.pool import ClassPool
from ddfast.methods.base import Context
from ddfast.methods.diffusion.igds import IGDS
from ddfast.methods.diffusion.information import information
from ddfast.methods.synthesis import State
from ddfast.seeding import seeded

CLASSES = 10


@speed_entry(
    "igds_step",
    what="a guided step of IGDS, by part, against an unguided one of the same prior",
    minutes=1.0,
    targets={"cpu": {"guided step": Target(1 / 1.6)}},
)
def igds_step(settings: Settings) -> Iterator[Measurable]:
    """40 samples (10 classes, IPC 1, four in an image) of a UNet of 1.6 M parameters; the encoder is a ConvNet-3."""
    require("diffusers")
    side, width, channels, ipc = settings.size((32, 32, 128, 1), quick=(16, 8, 8, 1), gpu=(64, 128, 128, 10))
    with tempfile.TemporaryDirectory() as folder:
        guided, plain, context = _methods(Path(folder), settings, side, width, channels, ipc)
        pool: ClassPool = None  # type: ignore[assignment]
        start = guided.begin(guided.groups(CLASSES, ipc)[0], pool, context)
        unguided = plain.begin(plain.groups(CLASSES, ipc)[0], pool, context)
    labels = torch.arange(CLASSES, device=settings.device).repeat_interleave(4 * ipc)
    samples = start.tensors["samples"]
    number = guided.steps // 2

    def step_of(method: IGDS, begun: State) -> Tensor:
        state = State(begun.group, dict(begun.tensors))
        method.step(number, state, pool, context)
        synchronise(settings.device)
        return state.tensors["samples"]

    @torch.no_grad()
    def sampled() -> tuple[Tensor, Tensor]:
        found = guided._sampled(number, samples, labels, start.group, context)
        synchronise(settings.device)
        return found

    denoised = sampled()[1]

    @torch.no_grad()
    def measured() -> None:
        guided._informed(number, denoised, labels, context, wanted=False)
        synchronise(settings.device)

    def informed(rows: int = 1 << 20) -> Tensor:
        found = information(
            guided._read, denoised, labels, guided._places, beta=0.1, tau=0.07, rows=rows, wanted=True
        )
        synchronise(settings.device)
        assert found.gradient is not None
        return found.gradient

    def gate() -> Iterator[Check]:
        yield Check(
            "unguided step against the sampler's",
            relative_error(step_of(plain, unguided), sampled()[0]),
            1e-5,
        )
        yield Check("gradient in pieces against whole", relative_error(informed(7), informed()), 1e-3)

    count = len(samples)
    yield Contest(
        f"{count} samples of {side} px, {CLASSES} classes",
        ours=[
            Contender("guided step", lambda: step_of(guided, start), work=count),
            Contender("part: prior and scheduler", sampled, work=count),
            Contender("part: estimator, forward", measured, work=count),
            Contender("part: estimator, forward and backward", informed, work=count),
        ],
        peer=Contender("unguided step", lambda: step_of(plain, unguided), work=count),
        gate=gate,
        unit="samples",
        rounds=5,
        long=True,
    )


def _methods(
    folder: Path, settings: Settings, side: int, width: int, channels: int, ipc: int
) -> tuple[IGDS, IGDS, Context]:
    """The same sampler with and without guidance, both opened."""
    from ddfast.models.diffusion import new_denoiser, new_schedule, save_prior
    from ddfast.models.estimator import Encoder, estimator_bytes

    names = [str(label) for label in range(CLASSES)]
    with seeded("igds_step"):
        save_prior(folder / "prior", new_denoiser(side, CLASSES, width), new_schedule())
        encoder = Encoder("convnet3_in", side, width=channels)
        classifier = nn.Linear(encoder.width, CLASSES)
    path = folder / "estimator.safetensors"
    path.write_bytes(
        estimator_bytes(
            encoder,
            classifier,
            arch="convnet3_in",
            arch_options={"width": channels},
            class_names=names,
            image_size=side,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            tau=0.07,
        )
    )
    context = Context(
        teacher=None,
        image_size=side,
        factor=2,
        seed=0,
        precision="float32",
        forward_batch=0,
        device=settings.device,
        ipc=ipc,
        class_names=tuple(names),
    )
    options = {"prior": str(folder / "prior"), "estimator": str(path), "unguided": False}
    guided, plain = (
        IGDS.from_options({**options, **own})
        for own in ({"beta": 0.1}, {"prior": options["prior"], "eta": 0.0, "estimator": None})
    )
    assert isinstance(guided, IGDS)
    assert isinstance(plain, IGDS)
    for method in (guided, plain):
        method.open(context)
    return guided, plain, context
