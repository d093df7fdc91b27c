"""How a teacher is trained: every setting, its default and what it may be."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ddfast.arguments import architecture_options, number_below_one, positive_number, whole_number
from ddfast.errors import UsageError
from ddfast.models.normalization import Normalization, normalization
from ddfast.ops.precision import PRECISIONS
from ddfast.wording import argument, did_you_mean

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "constant")
AUGMENTATIONS = ("crop-flip", "rrc-flip", "flip", "dsa", "dsa-no-flip", "none")
SMALL_IMAGE = 64  # pixels: up to here crop-flip, above it rrc-flip


@dataclass(frozen=True)
class TeacherConfig:
    """How a teacher is trained. Two runs with equal configurations and data write equal files.

    Attributes:
        arch: name for `create_model`.
        epochs: passes over the training split.
        image_size: side in pixels.
        arch_options: keyword arguments of `create_model`.
        optimizer: "sgd" (momentum, Nesterov off) or "adamw".
        lr: learning rate at the start. None: 0.05 for ConvNets and 0.1 for others with SGD, 0.001 with AdamW.
        schedule: "cosine" (to 0 over all steps) or "constant".
        batch_size: images a step; a last batch of one image is left out (BatchNorm).
        weight_decay: on every parameter.
        momentum: of SGD.
        seed: of the initial weights, the order of the images and the augmentation.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where it is faster.
        augment: "crop-flip" (black padding of 4 px, random crop, mirror), "rrc-flip" (RandomResizedCrop of
            scale (0.08, 1), mirror), "flip", "dsa" (of the matching methods: one of six operations for a batch),
            "dsa-no-flip" (without its mirror) or "none". None: crop-flip up to 64 px, rrc-flip above.
        normalization: name or (mean, std).

    """

    arch: str
    epochs: int
    image_size: int
    arch_options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "sgd"
    lr: float | None = None
    schedule: str = "cosine"
    batch_size: int = 128
    weight_decay: float = 5e-4
    momentum: float = 0.9
    seed: int = 0
    precision: str = "float32"
    augment: str | None = None
    normalization: str | Normalization = "imagenet"

    def resolved(self) -> TeacherConfig:
        """The same with every default filled in.

        Raises:
            UsageError: an unknown choice, or a number out of range.

        """
        for name, value, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, PRECISIONS),
            ("augment", self.augment, (None, *AUGMENTATIONS)),
        ):
            if value not in known:
                names = [name for name in known if name is not None]
                raise UsageError(
                    f"unknown {argument(name)} {value!r}; known: {', '.join(names)}{did_you_mean(value, names)}"
                )
        whole: dict[str, Any] = {
            name: whole_number(getattr(self, name), name, least=least, most=most)
            for name, least, most in (
                ("epochs", 1, None),
                ("batch_size", 2, None),
                ("image_size", 1, None),
                ("seed", 0, 2**63 - 1),
            )
        }
        lr = None if self.lr is None else positive_number(self.lr, "lr")
        decay = positive_number(self.weight_decay, "weight_decay", zero=True)
        momentum = number_below_one(self.momentum, "momentum")
        if lr is None:
            lr = 1e-3 if self.optimizer == "adamw" else 0.05 if self.arch.startswith("convnet") else 0.1
        augment = self.augment or ("crop-flip" if self.image_size <= SMALL_IMAGE else "rrc-flip")
        try:
            mean_std = normalization(self.normalization)
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error
        return replace(
            self,
            arch_options=architecture_options(self.arch_options),
            lr=lr,
            augment=augment,
            normalization=mean_std,
            weight_decay=decay,
            momentum=momentum,
            **whole,
        )

    @property
    def mean_std(self) -> Normalization:
        """Per-channel mean and standard deviation."""
        return normalization(self.normalization)

    @property
    def stored_size(self) -> int:
        """Side in pixels of the images to augment: RandomResizedCrop cuts from somewhat larger ones."""
        return max(self.image_size // 7 * 8, self.image_size) if self.enlarged_tests else self.image_size

    @property
    def enlarged_tests(self) -> bool:
        """Whether it is tested on the centre of larger images: where it was trained on cuts of such."""
        return self.augment == "rrc-flip"
