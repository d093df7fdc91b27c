"""Speed entry of recorded steps: the methods that make pixels, each step a few CUDA graphs, against the same steps as
they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import ddfast
from bench.speed.matching import Images, context_of
from bench.speed.measuring import synchronise
from bench.speed.registry import (
    Check,
    Contender,
    Contest,
    Measurable,
    Settings,
    Unavailable,
    relative_error,
    speed_entry,
)
from bench.speed.unrolled import CLASSES, SIDE, _batches, _convnet, _ends, distance_left
from ddfast.methods import get_method
from ddfast.methods.matching.base import Matching
from ddfast.methods.matching.cmi import Regulariser
from ddfast.ops.graphs import unrecorded
from ddfast.unchanged import still_unchanged

_WARM = 4  # steps: the third of a kind is recorded
_ENDLESS = 1 << 20
_IN_ROUNDS = {"inner_loop": _ENDLESS, "iterations": 1, "net_samples": 640, "net_batch": 64}
_QUICK = {"net_samples": 2, "net_batch": 2, "net_steps": 1}
_METHODS: dict[str, dict[str, Any]] = {
    "dm": {},
    "dm with CMI": {"cmi": 8000.0, "proxies": "in memory"},
    "dsa": {"outer_loop": _ENDLESS, "inner_loop": 5},
    "idc": _IN_ROUNDS,
    "udd": _IN_ROUNDS,
    "idm": {"net_steps": 10, "net_batch": 256},
}


@speed_entry(
    "recorded_steps",
    what="steps recorded as CUDA graphs against the same steps as they are",
    minutes=1,
)
def recorded_steps(settings: Settings) -> Iterator[Measurable]:
    """64 real and 10 synthetic images a class, 10 classes, ConvNet-3 with InstanceNorm; 30 steps of a training."""
    if settings.device.type != "cuda" and not settings.quick:
        raise Unavailable("a CPU records nothing: `python -m bench gpu`")
    for name, options in _METHODS.items():
        yield _method_contest(settings, name, options)
    yield _unrolled_contest(settings)


def _method_contest(settings: Settings, name: str, options: dict[str, Any]) -> Contest:
    classes, each, real, ipc = settings.size((0, 0, 0, 0), quick=(2, 10, 2, 2), gpu=(CLASSES, 500, 64, 10))
    if settings.quick:
        options = options | {key: value for key, value in _QUICK.items() if key in options}
    pool, context = Images(each, classes), context_of(settings.device, ipc, classes)

    def begun(recorded: bool) -> tuple[Callable[[], None], Callable[[], Tensor], Callable[[], str]]:
        kind = get_method(name.split()[0])
        method: Any = kind.from_options({"real_batch": real, "init": "real", **options})
        assert isinstance(method, Matching)
        method = method.resolved(method.factor, ipc)
        if "proxies" in options:
            torch.manual_seed(0)
            proxy = ddfast.create_model("resnet18_in", classes, SIDE).to(settings.device).eval()
            method._regulariser = Regulariser([proxy])
        state = method.begin(method.groups(classes, ipc)[0], pool, context)
        numbers = itertools.count()

        def step() -> None:
            with nullcontext() if recorded else unrecorded():
                method.step(next(numbers), state, pool, context)
            synchronise(settings.device)

        for _ in range(1 if settings.quick else _WARM):
            step()
        return step, lambda: state.pixels, lambda: method._matching.reason

    (ours, made, reason), (theirs, wanted, _) = begun(True), begun(False)
    return Contest(
        f"{name}, a step, {real} real and {ipc} synthetic images each",
        ours=[Contender("recorded", ours)],
        peer=Contender("as it is", theirs),
        gate=lambda: [
            Check(reason() or "recorded", float(bool(reason())), 0.0),
            Check("pixels after the same steps", relative_error(made(), wanted()), 1e-4),
        ],
        unit="steps",
    )


def _unrolled_contest(settings: Settings) -> Contest:
    steps, count, width = settings.size((0, 0, 0), quick=(2, 4, 16), gpu=(30, 100, 128))
    model = ddfast.fuse(_convnet(width, torch.float32).to(settings.device))
    start, goal = _ends(model)
    batches, known = _batches(steps, count, settings.device), {}  # type: ignore[var-annotated]

    def run() -> Tensor:
        with still_unchanged(model, known):
            found = ddfast.unrolled_gradient(
                model, start, batches, lambda weights: distance_left(weights, start, goal), lr=0.01
            )
        synchronise(settings.device)
        return torch.stack([each for each in found.images if each is not None])

    def as_it_is() -> Tensor:
        with unrecorded():
            return run()

    for _ in range(1 if settings.quick else _WARM):
        run()
    return Contest(
        f"unrolled_gradient, {steps} steps on {count} images of {SIDE} px",
        ours=[Contender("recorded", run)],
        peer=Contender("as it is", as_it_is),
        # In float32 the gradient of a training may differ where a ReLU flips.
        gate=lambda: [Check("gradient of the images", relative_error(run(), as_it_is()), 2e-2)],
        unit="gradients",
    )
