"""MTT: synthetic images that lead a network along the way that real images lead it.

Cazenavette, Wang, Torralba, Efros and Zhu, "Dataset Distillation by Matching Training Trajectories", CVPR 2022. Experts
are networks trained on the real images, with their weights after every epoch. A student begins at an expert's weights
after some epoch, takes N steps on the synthetic images, and should then stand where the expert stood M epochs later.

The authors unroll the N steps; here the gradient goes back through them a step at a time, exactly
(`ddfast.unrolled_gradient`), which takes the memory of one step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddfast.arguments import path_of, positive_number, whole_number
from ddfast.data.pool import ClassPool
from ddfast.errors import DivergedError, UsageError
from ddfast.gradients.unrolled import parsed_unroll, unrolled_gradient
from ddfast.methods.base import Context
from ddfast.methods.matching.networks import Networks
from ddfast.methods.matching.options import PixelOptions
from ddfast.methods.matching.pixels import PixelMethod
from ddfast.methods.synthesis import Group, State
from ddfast.models.fusing import fuse
from ddfast.models.registry import create_model
from ddfast.ops.precision import autocast, repeatable_convolutions
from ddfast.ops.transfer import to_device
from ddfast.output.pixels import WITH_RATE
from ddfast.output.whitening import Whitening
from ddfast.seeding import generator, seeded
from ddfast.settings import option
from ddfast.training.experts import Trajectories, check_steps_alone, experts_identity, load_experts
from ddfast.unchanged import still_unchanged
from ddfast.wording import argument


@dataclass(frozen=True)
class MTTOptions(PixelOptions):
    """Options of MTT. The defaults are its authors' for CIFAR-10 at 10 images per class."""

    iterations: int = option(5000, "steps of the pixels", stage="synthesize")
    lr_img: float = option(100.0, "learning rate of the pixels", stage="synthesize")
    cmi: float = option(
        0.0,
        "weight of the regulariser by conditional mutual information (CMI), 0 for none, as a share of the loss: its "
        "gradient's norm over the loss's in the first step, which fixes the weight; 0.1 to 0.3; it needs --proxies",
        stage="synthesize",
    )
    experts: str | None = option(
        None,
        "folder of networks with their weights after every epoch (ddfast train-experts); it must be given",
        stage="synthesize",
        type=str,
        metavar="FOLDER",
        is_place=True,
    )
    expert_epochs: int = option(
        2, "epochs of an expert (M) that a student's steps are to make up for", stage="synthesize"
    )
    max_start_epoch: int = option(
        20, "expert epochs that a student may begin after, 0 to one less (T+)", stage="synthesize"
    )
    syn_steps: int = option(30, "steps of a student on the synthetic images (N)", stage="synthesize")
    batch_syn: int = option(0, "synthetic images in a step of a student, 0 for all", stage="synthesize")
    lr_student: float = option(0.001, "learning rate of the students to begin with", stage="synthesize")
    lr_lr: float = option(1e-5, "learning rate of the students' learning rate", stage="synthesize")
    unroll: str = option(
        "exact",
        "how the gradient goes back through a student's steps: exact, truncated:K for the last K steps alone, or "
        "detached as TESLA has it, which leaves out how a step's gradient depends on the weights",
        stage="synthesize",
        metavar="{exact,truncated:K,detached}",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("expert_epochs", 1), ("max_start_epoch", 1), ("syn_steps", 1), ("batch_syn", 0)):
            self._set(name, whole_number(getattr(self, name), name, least=least))
        self._set("lr_student", positive_number(self.lr_student, "lr_student"))
        self._set("lr_lr", positive_number(self.lr_lr, "lr_lr", zero=True))
        if self.experts is not None:
            self._set("experts", str(path_of(self.experts, "experts")))
        try:
            parsed_unroll(self.unroll, self.syn_steps)
        except ValueError as error:
            raise UsageError(str(error).replace("unroll", argument("unroll"), 1)) from error


class MTT(PixelMethod):
    """Matching of training trajectories."""

    name = "mtt"
    summary = "synthetic images that train a network along the way that real ones train it (MTT, CVPR 2022)"
    Options = MTTOptions
    measures = WITH_RATE
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar10_ipc1": {
            "syn_steps": 50,
            "expert_epochs": 2,
            "max_start_epoch": 2,
            "lr_img": 100.0,
            "lr_lr": 1e-7,
            "lr_student": 0.01,
        },
        "cifar10_ipc10": {
            "syn_steps": 30,
            "expert_epochs": 2,
            "max_start_epoch": 20,
            "lr_img": 100.0,
            "lr_lr": 1e-5,
            "lr_student": 0.001,
        },
        # What others report to work as well at 10 images per class, with a rate that moves faster.
        "cifar10_ipc10_fast": {
            "syn_steps": 30,
            "expert_epochs": 2,
            "max_start_epoch": 20,
            "lr_img": 1000.0,
            "lr_lr": 1e-4,
            "lr_student": 0.01,
        },
        "cifar10_ipc50": {
            "syn_steps": 30,
            "expert_epochs": 2,
            "max_start_epoch": 40,
            "lr_img": 1000.0,
            "lr_lr": 1e-5,
            "lr_student": 0.001,
        },
        "tiny_imagenet_ipc1": {
            "arch": "convnet4_in",
            "syn_steps": 10,
            "expert_epochs": 2,
            "max_start_epoch": 10,
            "lr_img": 10000.0,
            "lr_lr": 1e-4,
            "lr_student": 0.01,
        },
        "tiny_imagenet_ipc10": {
            "arch": "convnet4_in",
            "syn_steps": 20,
            "expert_epochs": 2,
            "max_start_epoch": 40,
            "lr_img": 10000.0,
            "lr_lr": 1e-4,
            "lr_student": 0.01,
            "batch_syn": 200,
        },
        "tiny_imagenet_ipc50": {
            "arch": "convnet4_in",
            "syn_steps": 20,
            "expert_epochs": 2,
            "max_start_epoch": 40,
            "lr_img": 10000.0,
            "lr_lr": 1e-4,
            "lr_student": 0.01,
            "batch_syn": 300,
        },
    }

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._experts: Trajectories | None = None

    def make_networks(self) -> Networks:
        """A student, whose weights each step hands in."""
        return _Student(self.options.arch)

    @property
    def _student(self) -> _Student:
        assert isinstance(self.networks, _Student)
        return self.networks

    def loss(self, weights: dict[str, Tensor], start: dict[str, Tensor], goal: dict[str, Tensor]) -> Tensor:
        """||theta_{t+N} - theta*_{t+M}||^2 / ||theta*_t - theta*_{t+M}||^2 (Eq. 2)."""
        left = sum((weights[name] - goal[name]).square().sum() for name in goal)
        whole = sum((start[name] - goal[name]).square().sum() for name in goal)
        return torch.as_tensor(left / whole)

    @torch.enable_grad()
    @repeatable_convolutions()
    def step(self, number: int, state: State, pool: ClassPool, context: Context) -> float:
        """A student's training on the synthetic images, and the way back through it (Algorithm 1)."""
        self.open(context)
        group = state.group
        state.tensors = {name: tensor.to(context.device) for name, tensor in state.tensors.items()}
        start, goal = self._drawn(number, context)
        pixels = state.pixels.detach().requires_grad_()
        rate = state.tensors["learned_rate"]
        with (
            seeded(context.seed, "forward", group.number, number, device=context.device),
            autocast(context.precision, context.device),
        ):
            batches = self._batches(number, group, pixels, context)
            with self._student.unchanged(context) as student:
                found = unrolled_gradient(
                    student,
                    start,
                    [(images.detach(), labels) for images, labels in batches],
                    lambda weights: self.loss(weights, start, goal),
                    lr=rate,
                    unroll=self.options.unroll,
                )
            (gradient,) = torch.autograd.grad([images for images, _ in batches], pixels, found.images)
            measured = {"loss": found.value, "gradient_norm": torch.linalg.vector_norm(gradient)}
            scale, cmi_gradient = self._scaled_cmi(
                number, self._student.network(context), state, pixels, context, measured
            )
        if cmi_gradient is not None:
            gradient = gradient + cmi_gradient
        # SGD with momentum, of the pixels and of the students' learning rate. No bounds: pixels may leave the range.
        velocity = self.options.momentum * state.tensors["momentum"] + gradient
        moved = state.pixels.add(velocity, alpha=-self.options.lr_img)
        rate_velocity = self.options.momentum * state.tensors["learned_rate_momentum"] + found.lr
        moved_rate = rate - self.options.lr_lr * rate_velocity
        if self.is_noted(number):
            each = state.pixels.unflatten(0, (len(group.classes), -1))
            measured["pixel_variance"] = each.var(dim=1, correction=0).mean()
        row = self._checked(number, measured, moved)
        self._check_rate(number, float(moved_rate))
        state.tensors |= {
            "pixels": moved,
            "momentum": velocity,
            "learned_rate": moved_rate,
            "learned_rate_momentum": rate_velocity,
            "cmi_scale": scale,
        }
        state.curve.append({"step": float(number), **row, "learned_rate": float(rate)})
        return row["loss"]

    def _drawn(self, number: int, context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights of an expert after the epoch that the student begins at, and M epochs later."""
        experts = self._trajectories(context)
        draws = generator(context.seed, "expert", number)
        expert = int(torch.randint(len(experts), (), generator=draws))
        epoch = int(torch.randint(self.options.max_start_epoch, (), generator=draws))
        start, goal = (
            {name: to_device(weight, context.device) for name, weight in weights.items()}
            for weights in (
                experts.weights(expert, epoch),
                experts.weights(expert, epoch + self.options.expert_epochs),
            )
        )
        return start, goal

    def _batches(
        self, number: int, group: Group, pixels: Tensor, context: Context
    ) -> list[tuple[Tensor, Tensor]]:
        """The synthetic images of a student's steps, augmented, with their labels; differentiable in the pixels.

        All images are gone through in a random order, `batch_syn` in a step, before an order is drawn anew.
        """
        labels = torch.tensor(group.classes).repeat_interleave(len(pixels) // len(group.classes))
        size, count = (pixels.shape[-2], pixels.shape[-1]), self.options.batch_syn or len(pixels)
        orders = generator(context.seed, "order", number)
        waiting: list[Tensor] = []
        batches = []
        for step in range(self.options.syn_steps):
            waiting = waiting or list(torch.randperm(len(pixels), generator=orders).split(count))
            places = waiting.pop(0)
            draws = generator(context.seed, "augment", number, step)
            chosen = pixels[to_device(places, pixels.device)]
            augment = self.augmentation(size, draws, len(places))
            batches.append((augment(chosen), to_device(labels[places], pixels.device)))
        return batches

    def _scaled_cmi(
        self,
        number: int,
        network: nn.Module,
        state: State,
        pixels: Tensor,
        context: Context,
        measured: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """What CMI's gradient is multiplied by, and the product where CMI acts in this step.

        The factor is fixed in the first step in which CMI has a gradient: the norm of the product is then `cmi` times
        that of the loss's gradient.
        """
        scale = state.tensors["cmi_scale"]
        pulled = self._regularise(number, network, state.group, pixels, context, measured)
        if pulled is None:
            return scale, None
        norm = measured["cmi_gradient_norm"]
        share = self.options.cmi * measured["gradient_norm"] / norm
        scale = torch.where((scale == 0) & (norm > 0), share, scale)
        measured["cmi_gradient_norm"] = norm * scale
        return scale, pulled * scale

    def _check_rate(self, number: int, rate: float) -> None:
        if not (math.isfinite(rate) and rate > 0):
            raise DivergedError(
                f"the learning rate of the students would become {rate:.3g} at step {number} of {self.steps}: lower "
                f"{argument('lr_lr')}, now {self.options.lr_lr:g}; what was made before that step is kept"
            )

    def decode(self, pixels: Tensor) -> Tensor:
        """What CMI looks at: pictures, where the pixels are whitened, as its proxies know them."""
        whitening = self._experts.whitening if self._experts is not None else None
        return pixels if whitening is None else whitening.undone(pixels)

    def whitening(self, context: Context) -> Whitening | None:
        """That of the experts' images."""
        return self._trajectories(context).whitening

    def _initial(self, label: int, pool: ClassPool, context: Context) -> Tensor:
        """Real images whitened as the experts' were; noise is white as it is."""
        begun = super()._initial(label, pool, context)
        whitening = self.whitening(context)
        return begun if whitening is None or self.options.init == "noise" else whitening(begun)

    def learned_rate(self, state: State) -> float:
        """The students' learning rate that goes with the images."""
        return float(state.tensors["learned_rate"])

    # What a run begins with, and what it refuses ------------------------------------------------------------------

    def groups(self, classes: int, ipc: int) -> list[Group]:
        """One of all classes: a student trains on the whole synthetic set."""
        return [Group(0, tuple(range(classes)))]

    def begin(self, group: Group, pool: ClassPool, context: Context) -> State:
        """Pixels of the start, the students' learning rate, and no momentum of either."""
        state = super().begin(group, pool, context)
        rate = torch.full((), self.options.lr_student, dtype=torch.float64, device=context.device)
        return State(
            group,
            {
                **state.tensors,
                "learned_rate": rate,
                "learned_rate_momentum": torch.zeros_like(rate),
                "cmi_scale": torch.zeros((), device=context.device),
            },
        )

    def open(self, context: Context) -> None:
        """Load the experts and the proxies, once in a process."""
        super().open(context)
        self._trajectories(context)

    def _trajectories(self, context: Context) -> Trajectories:
        if self._experts is None:
            self._experts = load_experts(
                self._folder(),
                class_names=context.class_names,
                image_size=context.image_size,
                mean=context.mean,
                std=context.std,
                arch=self.options.arch,
                epochs=self.options.max_start_epoch - 1 + self.options.expert_epochs,
            )
        return self._experts

    def inputs(self) -> dict[str, Any]:
        """The experts' files, and the proxies'."""
        return {"experts": experts_identity(self._folder()), **super().inputs()}

    def check(self, image_size: int | None) -> None:
        """Refuse a run without experts, and an architecture that has BatchNorm."""
        super().check(image_size)
        check_steps_alone(self.options.arch)
        self._folder()

    def _folder(self) -> str:
        if self.options.experts is None:
            raise UsageError(
                f"{self.name} needs {argument('experts')}, a folder of networks with their weights after every epoch: "
                "make it with ddfast train-experts"
            )
        return str(self.options.experts)


class _Student(Networks):
    """The network that takes a student's steps, built once; it computes with the weights that it is handed."""

    def __init__(self, arch: str) -> None:
        self._arch = arch
        self._built: tuple[Any, nn.Module] | None = None
        self._found: dict[Any, Any] = {}

    def at(self, step: int, state: State, pool: ClassPool, context: Context) -> nn.Module:
        """See `Networks`."""
        return self.network(context)

    def network(self, context: Context) -> nn.Module:
        """The student on the context's device, in train mode."""
        kind = (context.classes, context.image_size, context.device)
        if self._built is None or self._built[0] != kind:
            with seeded("student"):
                network = create_model(self._arch, context.classes, context.image_size)
            self._built = kind, fuse(network.to(context.device)).train().requires_grad_(False)
            self._found = {}
        return self._built[1]

    @contextmanager
    def unchanged(self, context: Context) -> Iterator[nn.Module]:
        """The same, in a context that knows what was found of it in earlier steps: on a GPU, recorded steps."""
        network = self.network(context)
        with still_unchanged(network, self._found):
            yield network

    def close(self) -> None:
        """See `Networks`."""
        self._found = {}
