"""Evaluation protocols: how a student is trained on a distilled set, number by number.

`rded` is the protocol of RDED (validation/main.py, validation/utils.py and argument.py of its repository), which
InfoUtil follows. `dc`, `dsa`, `idc` and `igds` are those of the matching methods and of IGDS, with hard labels;
`sre2l` and `sre2l_tiny` are SRe2L's on CIFAR and on Tiny-ImageNet, with a teacher's labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

SCHEDULES = ("half_cosine", "cosine", "steps", "constant")
GEOMETRIES = ("none", "patches", "padded_crop", "resized_crop", "full_resized_crop")
COLOURS = ("none", "dsa", "idc", "dsa_no_flip", "idc_no_flip")
MIXES = ("none", "cutmix", "mixup")
_OF_RDED = ("rded", "rded_plain")


@dataclass(frozen=True)
class Protocol:
    """Numbers of a student's training.

    Attributes:
        name: key in `PROTOCOLS`.
        labels: "soft" (a teacher's, online or stored) or "hard" (the class).
        epochs: passes over the distilled set, where `epochs_of_ipc` names no other.
        epochs_of_ipc: passes at the IPC values of the reference; between them the next smaller one counts.
        passes_after: passes behind the nominal ones (DC's loop runs once more).
        optimizer: "adamw", "adam" or "sgd" (momentum 0.9).
        lr: learning rate, where `lr_of_arch` names no other.
        lr_of_arch: learning rates of single architectures.
        betas: of AdamW and Adam.
        weight_decay: on which parameters `decay_all` says.
        decay_all: decay every parameter; else only weights of two or more dimensions.
        schedule: "half_cosine" is RDED's 0.5 (1 + cos(pi e / 2E)), which ends near one half; "cosine" falls to
            zero, "steps" by `step_factor` at the shares `steps` of the epochs, "constant" not at all.
        steps: shares of the epochs behind which the rate falls.
        step_factor: what the rate is multiplied by there.
        restart: make the optimiser anew at a step, which forgets its momentum (DC).
        warmup: epochs of a linear rise from 0.01 of the rate, before the schedule begins.
        temperature: T of teacher and student in the loss, which is KL(teacher || student), summed over
            classes and averaged over the batch. Hard labels take the cross-entropy at T = 1.
        scale_by_temperature: multiply the loss by T^2.
        geometry: what happens to the uint8 image. "patches": ShufflePatches, then RandomResizedCrop of scale
            (1 / factor, 1), then mirror. "padded_crop": pad by 4, crop, mirror. "resized_crop":
            RandomResizedCrop of scale (0.5, 1), mirror. "full_resized_crop": the same of scale (0.08, 1).
        colour: differentiable augmentation of the normalised image: "dsa", one operation for the batch, or
            "idc", all that are listed; with "_no_flip" behind it without the mirror.
        mix: "cutmix", "mixup" or "none".
        mix_alpha: lambda is drawn from Beta(alpha, alpha).
        mix_probability: share of the batches that are mixed.
        decode: train on the tiles, enlarged to whole images, in place of the images (IDC).
        statistics_twice: every step moves BatchNorm's statistics twice (RDED's second forward pass).
        batch_size_of_ipc: images a step at the IPC values of the reference.
        test_every: the student is tested after every so many epochs ...
        test_from: ... in the last part of the training, later than this share of the epochs, and after the
            last.
        tests: in place of the two above, this many evenly spaced tests (IDC).
        enlarged_tests: test on the centre of images whose shorter side is 8/7 of the students' (RDED and the codes
            that follow it), which changes nothing at 32 px; else on whole images (DC and those that follow it).

    """

    name: str
    labels: str = "soft"
    epochs: int = 300
    epochs_of_ipc: dict[int, int] = field(default_factory=dict)
    passes_after: int = 0
    optimizer: str = "adamw"
    lr: float = 1e-3
    lr_of_arch: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    decay_all: bool = False
    schedule: str = "half_cosine"
    steps: tuple[float, ...] = ()
    step_factor: float = 0.1
    restart: bool = False
    warmup: int = 0
    temperature: float = 20.0
    scale_by_temperature: bool = False
    geometry: str = "patches"
    colour: str = "none"
    mix: str = "cutmix"
    mix_alpha: float = 1.0
    mix_probability: float = 1.0
    decode: bool = False
    statistics_twice: bool = True
    batch_size_of_ipc: dict[int, int] = field(default_factory=lambda: {1: 10, 10: 50, 50: 100})
    test_every: int = 10
    test_from: float = 0.8
    tests: int = 0
    enlarged_tests: bool = True

    def __post_init__(self) -> None:
        for what, given, known in (
            ("labels", self.labels, ("soft", "hard")),
            ("optimizer", self.optimizer, ("adamw", "adam", "sgd")),
            ("schedule", self.schedule, SCHEDULES),
            ("geometry", self.geometry, GEOMETRIES),
            ("colour", self.colour, COLOURS),
            ("mix", self.mix, MIXES),
        ):
            if given not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}, got {given!r}")

    def epochs_for(self, ipc: int) -> int:
        """Passes over a set of `ipc` images a class."""
        listed = [epochs for limit, epochs in sorted(self.epochs_of_ipc.items()) if limit <= max(ipc, 1)]
        return listed[-1] if listed else self.epochs

    def lr_factor(self, epoch: int, epochs: int) -> float:
        """Share of the learning rate in `epoch` (from 0) of `epochs`."""
        if epoch < self.warmup:
            return 0.01 + 0.99 * epoch / self.warmup
        done = (epoch - self.warmup) / max(epochs - self.warmup, 1)
        if self.schedule == "half_cosine":
            return 0.5 * (1 + math.cos(math.pi * done / 2))
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return self.step_factor ** sum(first <= epoch for first in self.stepped_epochs(epochs))

    def stepped_epochs(self, epochs: int) -> list[int]:
        """First epochs (from 0) of each lower rate."""
        # DC lowers its rate behind epoch E // 2 + 1; the others' milestones are first epochs of the new rate.
        return [int(share * epochs + 1e-9) + (2 if self.restart else 0) for share in self.steps]

    def tested_epochs(self, epochs: int) -> list[int]:
        """Epochs (from 0) after which the student is tested: RDED's 249, 259, ..., 299 of 300; always the last."""
        last = epochs + self.passes_after - 1
        if self.tests:
            return sorted({max(epochs * k // self.tests - 1, 0) for k in range(1, self.tests + 1)} | {last})
        every = (e for e in range(last + 1) if e % self.test_every == self.test_every - 1 or e == last)
        return [e for e in every if e > epochs * self.test_from or e == last]

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The protocol's optimiser of a model's parameters."""
        groups = self.parameter_groups(model.named_parameters())
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        return kind(groups, lr=lr, betas=self.betas, fused=True)

    def lr_for(self, arch: str, teacher_arch: str | None, num_classes: int, image_size: int) -> float:
        """Learning rate of a student. RDED doubles it for ConvNet-3 from ConvNet-3 on CIFAR-100."""
        if self.name in _OF_RDED and _is_cifar100_convnet(arch, teacher_arch, num_classes, image_size):
            return 2 * self.lr
        return self.lr_of_arch.get(arch, self.lr)

    def batch_size_for(
        self, ipc: int, num_classes: int, image_size: int, arch: str = "", teacher_arch: str | None = None
    ) -> int:
        """Images a step: RDED's 10, 50 and 100 at IPC 1, 10 and 50, and never more than the set holds.

        RDED doubles these for 100 and 1,000 classes, takes 100 for the 200 classes of Tiny-ImageNet at any
        IPC, and 25 for ConvNet-3 from ConvNet-3 on CIFAR-100. It fixes no other IPC: ddfast takes the size of
        the largest listed IPC that is not above (so 10 at IPC 2 to 9, and 100 beyond 50).
        """
        listed = [size for limit, size in sorted(self.batch_size_of_ipc.items()) if limit <= max(ipc, 1)]
        size = listed[-1]
        if self.name in _OF_RDED:
            if _is_cifar100_convnet(arch, teacher_arch, num_classes, image_size):
                size = 25
            elif num_classes == 200:
                size = 100
            elif num_classes in (100, 1000):
                size *= 2
        return min(size, ipc * num_classes)

    def parameter_groups(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, object]]:
        """The optimiser's groups: decay for weights of two or more dimensions, none for norm parameters and biases;
        with `decay_all` for all."""
        if self.decay_all:
            return [{"params": [parameter for _, parameter in named], "weight_decay": self.weight_decay}]
        decayed: list[nn.Parameter] = []
        spared: list[nn.Parameter] = []
        for name, parameter in named:
            (decayed if "weight" in name and parameter.ndim > 1 else spared).append(parameter)
        return [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ]

    def cutmix_box(self, size: int, draws: np.random.Generator) -> tuple[int, int, int, int]:
        """CutMix's box (top, left, bottom, right) in a square image of `size` px, clipped at the border.

        Its sides are twice int(size sqrt(1 - lambda)) // 2 before clipping, around a uniform centre; the area
        that is left after clipping, not lambda, is what the labels are mixed by.
        """
        cut = int(size * math.sqrt(1.0 - draws.beta(self.mix_alpha, self.mix_alpha))) // 2
        row, column = draws.integers(size), draws.integers(size)
        top, left, bottom, right = (
            int(np.clip(value, 0, size)) for value in (row - cut, column - cut, row + cut, column + cut)
        )
        return top, left, bottom, right


def _is_cifar100_convnet(arch: str, teacher_arch: str | None, num_classes: int, image_size: int) -> bool:
    return arch == teacher_arch == "convnet3" and num_classes == 100 and image_size == 32


PROTOCOLS: dict[str, Protocol] = {
    "rded": Protocol(
        "rded",
        lr_of_arch={
            "vgg11": 5e-4,
            "efficientnet_b0": 2e-3,
            "mobilenet_v2": 2.5e-3,
            "alexnet": 1e-4,
            "swin_v2_t": 1e-4,
        },
    ),
}

_MATCHING = Protocol(
    "dc",
    labels="hard",
    passes_after=1,
    optimizer="sgd",
    lr=0.01,
    weight_decay=5e-4,
    decay_all=True,
    schedule="steps",
    steps=(0.5,),
    restart=True,
    geometry="none",
    mix="none",
    statistics_twice=False,
    batch_size_of_ipc={1: 256},
    enlarged_tests=False,
)
PROTOCOLS |= {
    # DC (VICO's main.py) without its augmentation, DSA with one random operation a batch for 1000 epochs.
    "dc": _MATCHING,
    "dsa": replace(_MATCHING, name="dsa", epochs=1000, colour="dsa"),
    # IDC's train.py and test.py on images of up to 64 px.
    "idc": replace(
        _MATCHING,
        name="idc",
        epochs=1000,
        passes_after=0,
        steps=(2 / 3, 5 / 6),
        step_factor=0.2,
        restart=False,
        colour="idc",
        mix="cutmix",
        mix_probability=0.5,
        decode=True,
        batch_size_of_ipc={1: 64},
        tests=4,
    ),
    # SRe2L's small-dataset folder (CIFAR), and the Tiny-ImageNet recipe of the same authors.
    "sre2l": Protocol(
        "sre2l",
        epochs=400,
        decay_all=True,
        schedule="cosine",
        temperature=30.0,
        geometry="padded_crop",
        mix="mixup",
        mix_alpha=0.8,
        statistics_twice=False,
        batch_size_of_ipc={1: 128},
    ),
    "sre2l_tiny": Protocol(
        "sre2l_tiny",
        epochs=100,
        optimizer="sgd",
        lr=0.2,
        weight_decay=1e-4,
        decay_all=True,
        schedule="cosine",
        warmup=5,
        scale_by_temperature=True,
        geometry="full_resized_crop",
        mix="none",
        statistics_twice=False,
        batch_size_of_ipc={1: 256},
    ),
    # IGDS, Table 8: Adam at a fixed rate. Batch size and crop scale are those of the code that it builds on
    # (MinimaxDiffusion): 64 images, scale (0.5, 1).
    "igds": Protocol(
        "igds",
        labels="hard",
        epochs=2000,
        epochs_of_ipc={1: 2000, 20: 1500, 100: 1000},
        optimizer="adam",
        lr=0.01,
        weight_decay=0.0,
        schedule="constant",
        geometry="resized_crop",
        statistics_twice=False,
        batch_size_of_ipc={1: 64},
    ),
}


# Digits bear no mirror images: the codes of DSA and of IDC leave them out for MNIST and SVHN.
for _name in ("dsa", "idc"):
    PROTOCOLS[f"{_name}_no_flip"] = replace(
        PROTOCOLS[_name], name=f"{_name}_no_flip", colour=f"{_name}_no_flip"
    )

# RDED's on the images as they are: DD-Ranking asks what a set gains without augmentation.
PROTOCOLS["rded_plain"] = replace(PROTOCOLS["rded"], name="rded_plain", geometry="none", mix="none")


def protocol_named(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ValueError: an unknown name; lists the known ones.

    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
