"""Evaluation protocols: how a student is trained on a distilled set, number by number.

`rded` is the protocol of RDED (validation/main.py, validation/utils.py and argument.py of its repository),
which InfoUtil follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from torch import nn


@dataclass(frozen=True)
class Protocol:
    """Numbers of a student's training.

    Attributes:
        name: key in `PROTOCOLS`.
        epochs: passes over the distilled set.
        lr: AdamW's learning rate, where `lr_of_arch` names no other.
        lr_of_arch: learning rates of single architectures.
        betas: of AdamW.
        weight_decay: on weights of two or more dimensions; norm parameters and biases get none.
        temperature: T of teacher and student in the loss, which is KL(teacher || student), summed over
            classes, averaged over the batch and not multiplied by T^2.
        cutmix_alpha: CutMix with lambda from Beta(alpha, alpha) on every batch.
        batch_size_of_ipc: images a step at the IPC values of the reference.
        test_every: the student is tested after every so many epochs ...
        test_from: ... in the last part of the training, later than this share of the epochs, and after the
            last.

    """

    name: str
    epochs: int = 300
    lr: float = 1e-3
    lr_of_arch: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    temperature: float = 20.0
    cutmix_alpha: float = 1.0
    batch_size_of_ipc: dict[int, int] = field(default_factory=lambda: {1: 10, 10: 50, 50: 100})
    test_every: int = 10
    test_from: float = 0.8

    def lr_factor(self, epoch: int, epochs: int) -> float:
        """Share of the learning rate in `epoch` (from 0): 0.5 (1 + cos(pi e / 2E)), ending near one half."""
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs / 2))

    def tested_epochs(self, epochs: int) -> list[int]:
        """Epochs (from 0) after which the student is tested: 249, 259, ..., 299 of 300; always the last."""
        every = (e for e in range(epochs) if e % self.test_every == self.test_every - 1 or e == epochs - 1)
        return [e for e in every if e > epochs * self.test_from or e == epochs - 1]

    def lr_for(self, arch: str, teacher_arch: str | None, num_classes: int, image_size: int) -> float:
        """Learning rate of a student. RDED doubles it for ConvNet-3 from ConvNet-3 on CIFAR-100."""
        if _is_cifar100_convnet(arch, teacher_arch, num_classes, image_size):
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
        if _is_cifar100_convnet(arch, teacher_arch, num_classes, image_size):
            size = 25
        elif num_classes == 200:
            size = 100
        else:
            listed = [size for limit, size in sorted(self.batch_size_of_ipc.items()) if limit <= max(ipc, 1)]
            size = listed[-1] * (2 if num_classes in (100, 1000) else 1)
        return min(size, ipc * num_classes)

    def parameter_groups(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, object]]:
        """AdamW's groups: decay for weights of two or more dimensions, none for norm parameters and
        biases."""
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
        cut = int(size * math.sqrt(1.0 - draws.beta(self.cutmix_alpha, self.cutmix_alpha))) // 2
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


def protocol_named(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ValueError: an unknown name; lists the known ones.

    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
