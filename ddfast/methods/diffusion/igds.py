"""IGDS: images sampled from a diffusion prior, guided by what the set of them tells of the data.

Ye et al., "Information-Guided Diffusion Sampling for Dataset Distillation". The images of a class are sampled jointly;
after every step of the sampler they move along the gradient of

    I(X; Y) + beta H(X | Y)

prototype information, which makes a class plain, and contextual information, which spreads its images. Both are read
from the denoised estimate of the images by an estimator (`ddfast.training.estimator`); the prior's network gets no
backward pass. The few images of a small set should be plain, the many of a large one should differ, so that beta grows
with IPC.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddfast.arguments import one_of, path_of, positive_number, whole_number
from ddfast.data.pool import ClassPool
from ddfast.data.shown_names import read_shown_names
from ddfast.errors import UsageError, one_line
from ddfast.methods.base import Context, Method
from ddfast.methods.diffusion.information import Information, information
from ddfast.methods.synthesis import Group, State, Synthesis
from ddfast.models.diffusion import Prior, load_prior, prior_identity
from ddfast.models.estimator import Estimator, estimator_identity, load_estimator
from ddfast.ops import crop_resize
from ddfast.ops.precision import autocast
from ddfast.output.pixels import GUIDED
from ddfast.seeding import generator
from ddfast.settings import option
from ddfast.wording import argument, setting

BETA_SCHEDULES = ("constant", "rising", "falling")
ETA_SCHEDULES = ("variance", "step", "constant")
_ROWS = {
    "cpu": 64,
    "cuda": 512,
}  # samples of up to 64 px that go through a network at once: what bounds the memory
_NOTES = 25  # times in a run that the unguided samples are measured, beside the last step


def default_beta(ipc: int) -> float:
    """beta at so many images a class: the values that Figure 6 shows, larger for larger sets."""
    return 0.0 if ipc < 10 else 0.1 if ipc < 50 else 0.5


@dataclass(frozen=True)
class IGDSOptions:
    """Options of IGDS."""

    prior: str | None = option(
        None,
        "folder of ddfast train-prior, or of a diffusers pipeline (DDPM, LDM, DiT), or the name of one to fetch",
        stage="synthesize",
        type=str,
        metavar="PRIOR",
        is_place=True,
    )
    estimator: str | None = option(
        None,
        "file of ddfast train-estimator, which says how much the images tell",
        stage="synthesize",
        type=str,
        metavar="FILE",
        is_place=True,
    )
    prior_classes: str | None = option(
        None,
        "file that says which class of the prior each class of the data is: in each line a class, and the prior's name "
        "or label of it; default the same names",
        stage="synthesize",
        type=str,
        metavar="FILE",
        is_place=True,
    )
    beta: float | None = option(
        None,
        "weight of H(X | Y); default by IPC: 0 below 10, 0.1 below 50, 0.5 from there",
        stage="synthesize",
        type=float,
    )
    beta_schedule: str = option(
        "constant",
        "beta over the steps: constant, rising from 0, or falling to 0",
        stage="synthesize",
        choices=BETA_SCHEDULES,
    )
    eta: float = option(3.0, "strength of the guidance, 0 for none", stage="synthesize")
    eta_schedule: str = option(
        "variance",
        "what eta is times: the variance of the step, the length of the step (eta is then the length of the guidance), "
        "or 1",
        stage="synthesize",
        choices=ETA_SCHEDULES,
    )
    clip: float = option(10.0, "longest gradient of an image, 0 for no limit", stage="synthesize")
    steps: int = option(250, "steps of the sampler, of the prior's timesteps", stage="synthesize")
    tau: float | None = option(
        None, "temperature of the softmax; default the estimator's", stage="synthesize", type=float
    )
    literal: bool = option(
        False,
        "read the information from the noisy images, not from the denoised ones",
        stage="synthesize",
    )
    unguided: bool = option(
        True,
        "sample the same noise without guidance beside, for the report; without it a run takes half the time",
        stage="synthesize",
    )
    cfg: float = option(
        1.0,
        "scale of classifier-free guidance, of priors that were trained for it (DiT: 4 is usual); 1 for none",
        stage="synthesize",
    )
    class_batch: int = option(10, "classes that are sampled together, by one process", stage="synthesize")

    def __post_init__(self) -> None:
        self._set("class_batch", whole_number(self.class_batch, "class_batch", least=1))
        self._set("steps", whole_number(self.steps, "steps", least=2))
        for name in ("eta", "clip"):
            self._set(name, positive_number(getattr(self, name), name, zero=True))
        self._set("cfg", positive_number(self.cfg, "cfg", zero=True))
        if self.beta is not None:
            self._set("beta", positive_number(self.beta, "beta", zero=True))
        if self.tau is not None:
            self._set("tau", positive_number(self.tau, "tau"))
        one_of(self.beta_schedule, "beta_schedule", BETA_SCHEDULES)
        one_of(self.eta_schedule, "eta_schedule", ETA_SCHEDULES)
        for name in ("prior", "estimator", "prior_classes"):
            if getattr(self, name) is not None:
                self._set(name, str(path_of(getattr(self, name), name)))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # a frozen dataclass: numbers as the plain types that are meant


class IGDS(Synthesis):
    """Information-guided diffusion sampling (Algorithm 1)."""

    name = "igds"
    summary = "images sampled from a diffusion prior, guided by what the set tells of the classes (IGDS)"
    Options: ClassVar[type] = IGDSOptions
    stages: ClassVar[tuple[str, ...]] = ("synthesize", "relabel")
    uses_teacher: ClassVar[bool] = True
    space: ClassVar[str] = "unit"
    protocol: ClassVar[str] = "igds"
    draws_images: ClassVar[bool] = False
    judged: ClassVar[bool] = False
    measures: ClassVar[Mapping[str, str]] = GUIDED
    lever: ClassVar[str] = "steps"

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._prior: Prior | None = None
        self._estimator: Estimator | None = None
        self._scheduler: Any = None
        self._labels: list[int] | None = None  # the prior's, of the run's classes
        self._places: list[int] = []  # the estimator's
        self._factor = 2

    @classmethod
    def requires_teacher(cls) -> bool:
        """Never: without one the labels are hard."""
        return False

    def check(self, image_size: int | None) -> None:
        """Refuse a run without a prior, or with guidance and without an estimator."""
        if self.options.prior is None:
            raise UsageError(
                f"{argument('prior')} is missing: give a folder of ddfast train-prior, or of a diffusers pipeline"
            )
        if self.options.estimator is None and self.options.eta:
            raise UsageError(
                f"{argument('estimator')} is missing: give a file of ddfast train-estimator, or "
                f"{setting('eta', 0)} for samples without guidance"
            )

    def resolved(self, factor: int, ipc: int) -> IGDS:
        """Fix beta for this number of images a class, and the samples of an image."""
        chosen = copy.copy(self)
        chosen._factor = factor
        if self.options.beta is None:
            chosen.options = dataclasses.replace(self.options, beta=default_beta(ipc))
        return chosen

    def check_ipc(self, ipc: int) -> None:
        """Refuse a weight of H(X | Y) where a class has a single sample."""
        if self.options.beta and ipc * self._factor**2 == 1:
            raise UsageError(
                f"H(X | Y) is 0 where a class has a single sample, so {argument('beta')} would do nothing: leave it "
                f"out, or give {argument('ipc')} at least 2"
            )

    def own_image_size(self) -> int | None:
        """That of the prior's images."""
        self.check(None)
        return self._loaded().image_size

    def tiles_per_side(self, factor: str, image_size: int) -> int:
        """Two, unless another factor is asked for: four images of half the side in one, as RDED."""
        even = "1" if image_size % 2 else "2"
        return Method.tiles_per_side(self, even if factor == "auto" else factor, image_size)

    def inputs(self) -> dict[str, Any]:
        """The prior's and the estimator's files."""
        found: dict[str, Any] = {"prior": prior_identity(self.options.prior)}
        if self.options.estimator is not None:
            found["estimator"] = estimator_identity(self.options.estimator)
        if self.options.prior_classes is not None:
            found["prior_classes"] = {"sha256": _digest(self.options.prior_classes)}
        return found

    def drawn_at_once(self, ipc: int) -> int:
        """No real image is drawn."""
        return 0

    @property
    def steps(self) -> int:
        """Steps of the sampler."""
        return int(self.options.steps)

    def groups(self, classes: int, ipc: int) -> list[Group]:
        """Consecutive classes, `class_batch` in a group."""
        starts = range(0, classes, self.options.class_batch)
        return [
            Group(number, tuple(range(start, min(start + self.options.class_batch, classes))))
            for number, start in enumerate(starts)
        ]

    # What it samples with
    # ------------------------------------------------------------------------------------------------------

    def _loaded(self) -> Prior:
        if self._prior is None:
            self._prior = load_prior(self.options.prior)
        return self._prior

    def open(self, context: Context) -> None:
        """Load prior and estimator, once in a process, and see that they fit the run."""
        if self._scheduler is not None:
            return
        self.check(context.image_size)
        prior = self._loaded()
        if prior.image_size != context.image_size:
            raise UsageError(
                f"the prior {prior.path} makes images of {prior.image_size} px, the run has {context.image_size} px: "
                f"give {setting('image_size', prior.image_size)}, or another prior"
            )
        names: Sequence[str] = context.class_names
        if self.options.prior_classes is not None:
            names = read_shown_names(self.options.prior_classes, names)
        self._labels = prior.labels_of(names, numbers=self.options.prior_classes is not None)
        if self.options.cfg != 1 and prior.no_class is None:
            raise UsageError(
                f"the prior {prior.path} was not trained for classifier-free guidance: leave {argument('cfg')} out"
            )
        if self._labels is None and not self.options.eta:
            raise UsageError(
                f"the prior {prior.path} knows no classes, so that its images have none without guidance: give "
                f"{argument('eta')} above 0, or a prior with classes"
            )
        if self.options.estimator is not None:
            estimator = load_estimator(self.options.estimator)
            self._places = estimator.places_of(context.class_names)
            self._estimator = estimator.to(context.device)
            estimator.check_gradients()
        prior.to(context.device)
        self._scheduler = prior.scheduler(self.steps)

    def _rows(self, context: Context) -> int:
        """Samples that go through a network at once, a multiple of four: fewer the larger the images are."""
        most = _ROWS.get(context.device.type, 64) // max(1, context.image_size // 64) ** 2
        return max(4, most // 4 * 4)

    def _read(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """The estimator's projections and logits of samples of the prior's space."""
        assert self._estimator is not None
        projections, logits = self._estimator.read(self._loaded().decode(samples))
        return projections.float(), logits.float()

    # The sampler
    # ------------------------------------------------------------------------------------------------------

    def begin(self, group: Group, pool: ClassPool, context: Context) -> State:
        """Noise, by class."""
        self.open(context)
        shape = (context.ipc * context.factor**2, *self._loaded().shape)
        start = [
            torch.randn(shape, generator=generator(context.seed, "start", label)) for label in group.classes
        ]
        noise = torch.cat(start).to(context.device)
        beside = {"unguided": noise.clone()} if self._compares else {}
        return State(group, {"samples": noise, **beside})

    @property
    def _compares(self) -> bool:
        return bool(self.options.unguided and self.options.eta)

    @torch.no_grad()
    def step(self, number: int, state: State, pool: ClassPool, context: Context) -> float:
        """See `Synthesis`. What is returned is less the information, I(X; Y) + beta H(X | Y), in nats."""
        self.open(context)
        tensors = {name: tensor.to(context.device) for name, tensor in state.tensors.items()}
        classes = torch.tensor(state.group.classes, device=context.device)
        labels = classes.repeat_interleave(context.ipc * context.factor**2)
        timestep = self._scheduler.timesteps[number]
        with autocast(context.precision, context.device):
            after, denoised = self._sampled(number, tensors["samples"], labels, state.group, context)
            measured: dict[str, Tensor] = {}
            moved = after
            informs = self.options.eta or self.is_noted(number, _NOTES)
            if self._estimator is not None and informs:
                found = self._informed(number, after if self.options.literal else denoised, labels, context)
                moved = self._guided(timestep, tensors["samples"], after, found, measured)
            made = {"samples": moved}
            if "unguided" in tensors:
                plain, clean = self._sampled(number, tensors["unguided"], labels, state.group, context)
                made["unguided"] = plain
                if self.is_noted(number, _NOTES) and self._estimator is not None:
                    beside = self._informed(
                        number, plain if self.options.literal else clean, labels, context, wanted=False
                    )
                    measured["unguided_information"] = beside.prototype
                    measured["unguided_context"] = beside.context
        row = self._checked(number, measured, moved)
        if "information" in row:
            row["loss"] = -row["information"] - self.beta_at(number, context.ipc) * row["context"]
        state.tensors = made if number < self.steps - 1 else self._finished(made, context)
        state.curve.append({"step": float(number), **row})
        return row.get("loss", 0.0)

    def _sampled(
        self, number: int, samples: Tensor, labels: Tensor, group: Group, context: Context
    ) -> tuple[Tensor, Tensor]:
        """x'_{t-1} and the denoised estimate x_0 of samples x_t (lines 4 to 7), with noise of the class and step."""
        prior, timestep = self._loaded(), self._scheduler.timesteps[number]
        own = None if self._labels is None else torch.tensor(self._labels, device=labels.device)[labels]
        rows = self._rows(context)
        said = torch.cat(
            [
                prior.predict(
                    piece,
                    timestep,
                    None if own is None else own[start * rows :][: len(piece)],
                    self.options.cfg,
                )
                for start, piece in enumerate(samples.split(rows))
            ]
        )
        draws = [generator(context.seed, "noise", label, number) for label in group.classes]
        each = len(samples) // len(draws)
        taken = self._scheduler.step(
            said, timestep, samples, generator=[draw for draw in draws for _ in range(each)]
        )
        return taken.prev_sample, taken.pred_original_sample

    def _informed(
        self, number: int, samples: Tensor, labels: Tensor, context: Context, *, wanted: bool | None = None
    ) -> Information:
        """What the samples tell (lines 8 to 12), and which way they would tell more."""
        assert self._estimator is not None
        return information(
            self._read,
            samples,
            labels,
            self._places,
            beta=self.beta_at(number, context.ipc),
            tau=self.options.tau or self._estimator.tau,
            rows=self._rows(context),
            wanted=bool(self.options.eta) if wanted is None else wanted,
        )

    def beta_at(self, number: int, ipc: int) -> float:
        """beta in step `number`."""
        beta = default_beta(ipc) if self.options.beta is None else self.options.beta
        share = number / max(self.steps - 1, 1)
        return (
            float(beta) * {"constant": 1.0, "rising": share, "falling": 1 - share}[self.options.beta_schedule]
        )

    def _guided(
        self, timestep: Tensor, before: Tensor, after: Tensor, found: Information, measured: dict[str, Tensor]
    ) -> Tensor:
        """x_{t-1} = x'_{t-1} + eta_t grad (line 13)."""
        measured["information"], measured["context"] = found.prototype, found.context
        if found.gradient is None:
            return after
        kept = self._scheduler.alphas_cumprod
        share = float(kept[timestep])
        # x_0 = x_t / sqrt(alpha bar_t) + ..., so that its gradient is one of x_t without a pass through the network.
        gradient = found.gradient if self.options.literal else found.gradient / math.sqrt(max(share, 1e-12))
        length = _lengths(gradient)
        if self.options.clip:
            gradient = gradient * (self.options.clip / length.clamp_min(self.options.clip))
        eta: Any = self.options.eta
        if self.options.eta_schedule == "variance":
            earlier = int(self._scheduler.previous_timestep(timestep))
            rest = float(kept[earlier]) if earlier >= 0 else 1.0
            eta = eta * (1 - rest) / (1 - share) * (1 - share / rest)
        elif self.options.eta_schedule == "step":
            eta = eta * _lengths(after - before) / _lengths(gradient).clamp_min(1e-12)
        added = eta * gradient
        measured["gradient_norm"] = torch.linalg.vector_norm(found.gradient)
        measured["moved"] = torch.linalg.vector_norm(added) / torch.linalg.vector_norm(after - before)
        return after + added

    def _checked(self, number: int, measured: Mapping[str, Tensor], moved: Tensor) -> dict[str, float]:
        """See `Synthesis.finite`."""
        lower = f"lower {argument('eta')}, now {self.options.eta:g}, or {argument('clip')}"
        advice = lower if self._estimator is not None else "train the prior again"
        return self.finite(number, measured, moved, _CALLED, advice)

    # What it leaves
    # ------------------------------------------------------------------------------------------------------

    def _finished(self, made: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        """The images of the last step, float32 [N, 3, S, S] in [0, 1], composed of tiles where there are several."""
        found = {"pixels": self._composed(made["samples"], context)}
        if "unguided" in made:
            found["before"] = self._composed(made["unguided"], context)
        return found

    def _composed(self, samples: Tensor, context: Context) -> Tensor:
        """Images of samples, each of `factor` x `factor` samples in a row."""
        prior, made = self._loaded(), []
        box = torch.tensor([[0, 0, context.image_size, context.image_size]], device=samples.device)
        for piece in samples.split(self._rows(context)):  # whole images: rows are a multiple of four
            images = (prior.decode(piece).float() / 2 + 0.5).clamp(0, 1).contiguous()
            if context.factor > 1:
                boxes = box.expand(len(images), 4).contiguous()
                images = crop_resize(images, boxes, context.tile, factor=context.factor).clamp(0, 1)
            made.append(images)
        return torch.cat(made)

    def before(self, state: State, pool: ClassPool, context: Context) -> Tensor | None:
        """The same noise without guidance; None where it was not sampled."""
        return state.tensors.get("before")


_CALLED = {
    "information": "I(X; Y)",
    "context": "H(X | Y)",
    "gradient_norm": "the gradient of the information",
    "moved": "the guidance",
    "unguided_information": "I(X; Y) without guidance",
    "unguided_context": "H(X | Y) without guidance",
    "made": "the samples",
}


def _digest(path: str) -> str:
    """SHA-256 of a small file."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{argument('prior_classes')} {path} cannot be read ({one_line(error)})") from error


def _lengths(samples: Tensor) -> Tensor:
    """Norm of every sample, [N, 1, 1, 1]."""
    return torch.linalg.vector_norm(samples.flatten(1), dim=1).view(-1, *[1] * (samples.ndim - 1))
