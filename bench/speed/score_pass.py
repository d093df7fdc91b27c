"""Speed entry of InfoUtil's score pass, end to end and by stage, and what `auto` precision changes in it."""

from __future__ import annotations

import importlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, record_function

import ddfast
from bench.speed.measuring import Spread, seconds_of, synchronise
from bench.speed.norms import autograd_norms
from bench.speed.registry import (
    Check,
    Measurable,
    Measurement,
    Settings,
    Target,
    Unavailable,
    passed,
    relative_error,
    speed_entry,
)
from bench.speed.subjects import Subject, subject
from ddfast import ops
from ddfast.data import open_source
from ddfast.data.loaders import resolve_loader
from ddfast.methods.base import Context
from ddfast.methods.selection.base import Batch, Candidates
from ddfast.methods.selection.infoutil import InfoUtil
from ddfast.models import Teacher
from ddfast.pipeline.plan import MICRO_BATCH
from ddfast.unchanged import unchanged

# From the model's outputs to the crops' pixels. None of them runs inside of grad_norm.
TAIL = ("shapley_heatmap", "noisy_crop_boxes", "shapley_crop_boxes", "crop_resize", "crop_batch")
STAGES = ("decode", "attribution", "tail", "gradient norms")
ONCE = "recording, once a run"

# Where a part of the pass begins and ends: names that are looked up when they are called. They may lie inside of one
# another; what lies deeper counts.
SEAMS = {
    ONCE: ("ddfast.pipeline.score:_warm",),
    "wait for images": ("ddfast.pipeline.score:_Awaited.__next__",),
    "upload": ("ddfast.pipeline.score:_micro_batch",),
    "attribution": ("ddfast.attribution:unread_crops",),
    "attribution: masks": (
        "ddfast.attribution.engine:masked_batch",
        "ddfast.attribution.engine:assemble",
        "ddfast.masked_forward.forward:assemble",
    ),
    "attribution: forward": ("ddfast.masked_forward.forward:Forward._run",),
    "attribution: tail": (
        "ddfast.attribution.crops:shapley_crop_boxes",
        "ddfast.attribution.engine:shapley_heatmap",
    ),
    "norms": ("ddfast.methods.selection.infoutil:judge",),
    "norms: crops": (
        "ddfast.methods.selection.judging:crop_batch",
        "ddfast.methods.selection.judging:crop_resize",
    ),
    "norms: forward": ("ddfast.gradients.norms:ghost_squares",),
    "norms: backward with norms": ("torch.autograd:grad",),
    "rows back": ("ddfast.pipeline.score:_append_rows",),
    "commit": ("ddfast.pipeline.score:write_table",),
}


@dataclass(frozen=True)
class Pass:
    """InfoUtil with its default options over JPEG files, in one arithmetic.

    Attributes:
        case: as it stands in the tables.
        precision: "float32" or "auto".
        found: the teacher and the images.
        batch: images scored together.
    """

    case: str
    precision: str
    found: Subject
    batch: int
    forward_batch: int

    @property
    def context(self) -> Context:
        """What the pipeline gives the method."""
        found = self.found
        size = found.images.shape[-1]
        classes = 1 + int(found.labels.max())
        teacher = Teacher(
            found.model, "resnet18", [str(i) for i in range(classes)], size, found.mean, found.std, sha256=""
        )
        device = found.images.device
        return Context(teacher, size, 2, 0, self.precision, self.forward_batch, device)

    @property
    def method(self) -> InfoUtil:
        """InfoUtil as `ddfast distill infoutil` runs it."""
        return InfoUtil.from_options({}).resolved(2, 10)

    def micro_batch(self, images: Tensor) -> Batch:
        """Decoded images on the device, under stable ids."""
        labels = self.found.labels[: len(images)].cpu()
        return Batch(images.to(self.found.images.device), labels, torch.arange(len(images)) * 2**40 + 17)

    def measure(self, device: torch.device, rounds: int | None, quick: bool) -> list[Measurement]:
        """The pass from JPEG files with decoding threads, and one thread after another, cut into stages."""
        rounds = rounds or (1 if quick else 3)
        with tempfile.TemporaryDirectory() as folder:
            write_jpegs(Path(folder), self.found.images[: self.batch].cpu(), count=self.batch)
            gate = passed(self.case, self.checks())
            cuts = [self._stages(Path(folder)) for _ in range(rounds)]
            with unchanged(self.found.model):  # as a run holds its teacher
                overlapped = [seconds_of(lambda: self._whole(Path(folder)), device) for _ in range(rounds)]
        common: dict[str, Any] = {
            "contender": self.precision,
            "peer": "",
            "unit": "images",
            "gate": gate,
            "rounds": rounds,
        }
        scoring = [sum(cut.values()) - cut["decode"] for cut in cuts]
        whole = [seconds / self.batch for seconds in overlapped]
        rows = [
            Measurement("score pass, decoded images", seconds=_each(scoring, self.batch), **common),
            Measurement("score pass, JPEG files", seconds=Spread.of(whole), **common),
        ]
        for stage in STAGES:
            shares = [cut[stage] / sum(cut.values()) for cut in cuts]
            rows.append(Measurement(stage, share=Spread.of(shares), **common))
        return rows

    def checks(self) -> Iterator[Check]:
        """The crops lie in the image, and their norms are those of per-sample gradients."""
        candidates = self.method.score(self.micro_batch(self.found.images[: self.batch]), self.context)
        size = self.found.images.shape[-1]
        outside = (candidates.boxes < 0) | (candidates.boxes > size)
        yield Check("box corners outside the image", float(outside.sum()), 0.0)
        allowed = 1e-3 if self.precision == "float32" else 0.2
        yield Check("gradient norms", self._norm_error(candidates), allowed)

    def _norm_error(self, candidates: Candidates) -> float:
        """Relative error of the norms of the first image's crops, against autograd in float32."""
        assert candidates.grad_norm is not None
        found, size, tile = self.found, self.context.image_size, self.context.tile
        tiles = ops.crop_resize(found.images[:1], candidates.boxes[:1], tile)[0]
        before = (size - tile) // 2
        shown = functional.pad(found.normalised(tiles), (before, size - tile - before) * 2)
        wanted = autograd_norms(found.model, shown, found.labels[:1].expand(len(tiles)), torch.float32)
        return relative_error(candidates.grad_norm[0], wanted)

    def _stages(self, folder: Path) -> dict[str, float]:
        """Seconds of each stage of one micro-batch, decoded and scored in turn."""
        device = self.found.images.device
        decoded: list[Tensor] = []
        decode = seconds_of(lambda: decoded.extend(_decoded(folder, device, workers=0)), device)
        batch = self.micro_batch(torch.stack(decoded))
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        synchronise(device)
        with unchanged(self.found.model), _labelled_norms():
            self.method.score(batch, self.context)  # what a run does once
            synchronise(device)
            with profile(activities=activities) as profiled:
                with record_function("score"):
                    self.method.score(batch, self.context)
                synchronise(device)
        spent = _seconds_by_name(profiled, device)
        tail = sum(spent.get(f"ddfast::{name}", 0.0) for name in TAIL)
        return {
            "decode": decode,
            "attribution": spent["score"] - spent["grad_norm"] - tail,
            "tail": tail,
            "gradient norms": spent["grad_norm"],
        }

    def _whole(self, folder: Path) -> None:
        images = torch.stack(list(_decoded(folder, self.found.images.device, workers=None)))
        self.method.score(self.micro_batch(images), self.context)


def _each(values: list[float], count: int) -> Spread:
    return Spread.of([value / count for value in values])


@contextmanager
def _labelled_norms() -> Iterator[None]:
    """Context in which a profile shows the gradient norms of the crops, their passes included, as "grad_norm"."""
    from ddfast import gradients

    norms = gradients.grad_norm

    def labelled(*args: Any, **kwargs: Any) -> Any:
        with record_function("grad_norm"):
            return norms(*args, **kwargs)

    with mock.patch.object(gradients, "grad_norm", labelled):
        yield


@contextmanager
def parts(mark: Callable[[str], AbstractContextManager[Any]]) -> Iterator[list[str]]:
    """Context in which every part of `SEAMS` runs inside of `mark(its name)`.

    Its value lists the seams that are not there: what they would have marked counts to what lies around it.
    """
    missing = []
    with ExitStack() as stack:
        for part, seams in SEAMS.items():
            for seam in seams:
                module, _, path = seam.partition(":")
                *around, name = path.split(".")
                owner: Any = importlib.import_module(module)
                for step in around:
                    owner = getattr(owner, step, None)
                if not hasattr(owner, name):
                    missing.append(seam)
                    continue
                stack.enter_context(mock.patch.object(owner, name, _marked(getattr(owner, name), part, mark)))
        yield missing


def _marked(run: Callable[..., Any], part: str, mark: Callable[[str], AbstractContextManager[Any]]) -> Any:
    def marked(*args: Any, **kwargs: Any) -> Any:
        with mark(part):
            return run(*args, **kwargs)

    return marked


def _seconds_by_name(profiled: profile, device: torch.device) -> dict[str, float]:
    """Seconds of every profiled name, with all that ran inside it: of the GPU on a GPU, else of the CPU."""
    field = "device_time_total" if device.type == "cuda" else "cpu_time_total"
    return {event.key: getattr(event, field) / 1e6 for event in profiled.key_averages()}


def write_jpegs(folder: Path, images: Tensor, *, count: int, classes: Sequence[str] = ("0", "1")) -> None:
    """An ImageFolder of `count` files, a run of them for each class; where the images run out they begin again."""
    files = []
    for image in images:
        text = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(text, "JPEG", quality=90)
        files.append(text.getvalue())
    for number in range(count):
        inside = folder / "train" / classes[len(classes) * number // count]
        inside.mkdir(parents=True, exist_ok=True)
        (inside / f"{number:04d}.jpg").write_bytes(files[number % len(files)])


def _decoded(folder: Path, device: torch.device, workers: int | None) -> Iterator[Tensor]:
    """Images as a run on the device decodes them, on the device where that decodes."""
    source = open_source(folder, "train")
    size = Image.open(folder / "train" / "0" / "0000.jpg").width
    loader = resolve_loader("auto", device).on_device()
    for sample, image in loader(source, source.samples, size, workers=workers):
        if not isinstance(image, Tensor):
            raise Unavailable(f"{sample.key} does not decode: {image}")
        yield image


@speed_entry(
    "score_pass",
    what="InfoUtil's score pass: images a second, and the share of each stage",
    minutes=2,
    targets={
        device: {f"tail: {precision}": Target(share=0.02) for precision in ("float32", "auto")}
        for device in ("cpu", "cuda")
    },
)
def score_pass(settings: Settings) -> Iterator[Measurable]:
    """ResNet-18 at 224 px, default options: 32 evaluations an image, five crops, two by two tiles an image.

    The stages are timed one after another by PyTorch's profiler, decoding included, so that they add up to one; a run
    decodes in other threads while it scores, which is the rate of "JPEG files".
    """
    yield from passes(settings)


def passes(settings: Settings) -> Iterator[Pass]:
    """The score pass in every arithmetic, on one micro-batch of images."""
    batch = settings.size(MICRO_BATCH["cpu"], quick=2, gpu=MICRO_BATCH["cuda"])
    found = subject(settings, batch, settings.size(224, quick=32, gpu=224))
    found.model.to(memory_format=torch.channels_last)  # as the pipeline does
    for precision in settings.precisions():
        yield Pass("score pass", precision, found, batch, settings.size(32, quick=8, gpu=1024))


# What auto precision changes
# -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrecisionEffect:
    """How far phi and the chosen crops move from float32 to `auto`."""

    case: str
    found: Subject

    def measure(self, device: torch.device, rounds: int | None, quick: bool) -> list[Measurement]:
        """One row for phi, over images, and one for the crops with and without noise, over seeds."""
        ids = torch.arange(len(self.found.images), device=device) + 1000
        phi = {precision: self._phi(precision, ids) for precision in ("float32", "auto")}
        moved = (phi["auto"] - phi["float32"]).norm(dim=1) / phi["float32"].norm(dim=1)
        gate = passed(self.case, [Check("median relative difference of phi", float(moved.median()), 0.2)])
        kept: dict[str, list[float]] = {"clean": [], "noised": []}
        for seed in range(5):
            boxes = {
                name: ops.noisy_crop_boxes(
                    values, ids, seed=seed, grid=4, image_size=self.found.images.shape[-1],
                    crop_size=self.found.images.shape[-1] // 2,
                )
                for name, values in phi.items()
            }  # fmt: skip
            same = (boxes["auto"] == boxes["float32"]).all(-1)
            kept["clean"].append(float(same[:, -1].float().mean()))
            kept["noised"].append(float(same[:, :-1].float().mean()))
        common: dict[str, Any] = {
            "contender": "auto",
            "peer": "",
            "unit": "images",
            "gate": gate,
            "note": f"{len(ids)} images, {self.found.name}",
        }
        return [
            Measurement(
                "phi's relative difference from float32", share=Spread.of(moved.tolist()), rounds=1, **common
            ),
            *(
                Measurement(f"{name} crops that stay the same", share=Spread.of(shares), rounds=5, **common)
                for name, shares in kept.items()
            ),
        ]

    def _phi(self, precision: str, ids: Tensor) -> Tensor:
        found = self.found
        return ddfast.shapley(
            found.model, found.images, found.labels,
            n_samples=32, precision=precision, seed=ids, mean=found.mean, std=found.std,
        )  # fmt: skip


@speed_entry("precision", what="what precision=auto changes in phi and in the chosen crops", minutes=1)
def precision(settings: Settings) -> Iterator[Measurable]:
    """ResNet-18 at 224 px, 32 evaluations, half-side crops."""
    if "auto" not in settings.precisions():
        raise Unavailable("auto is float32 on this device")
    count = settings.size(32, quick=3, gpu=256)
    found = subject(settings, count, settings.size(224, quick=32, gpu=224))
    yield PrecisionEffect(found.name, found)
