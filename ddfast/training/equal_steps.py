"""Equal updates for students of sets whose images stand for several: for their tiles, or for themselves and regions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ddfast.training.distilled_images import DistilledImages
from ddfast.training.protocol import Protocol
from ddfast.training.student import steps_of_a_pass

VIEWS = (1, 4, 9)
"""What an image stands for: itself; 2 x 2 tiles (IDC, IDM, IGDS); itself and 8 regions (UDD)."""

_DEAREST = 10  # of whose steps one, at most, is given up for whole passes


@dataclass(frozen=True)
class EqualSteps:
    """So many updates of so many images, in whole passes over any set of one IPC.

    Attributes:
        steps: updates of a student's weights.
        batch_size: images of an update.
        passes_after: passes behind the nominal ones, as the protocol has them; they are among the steps.
    """

    steps: int
    batch_size: int
    passes_after: int

    @classmethod
    def of(
        cls,
        rules: Protocol,
        ipc: int,
        classes: int,
        image_size: int,
        *,
        arch: str,
        teacher_arch: str | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
    ) -> EqualSteps:
        """What a protocol spends on `ipc` whole images a class, lowered to whole passes over every kind of set.

        Where that would take more than a tenth of it, the passes of other kinds are rounded instead.

        Args:
            rules: the protocol.
            ipc, classes, image_size: of the set, the last in pixels.
            arch, teacher_arch: as `Protocol.batch_size_for` takes them.
            epochs: passes over a set of whole images; None: the protocol's.
            batch_size: None: the protocol's.
        """
        count = ipc * classes
        batch = batch_size or rules.batch_size_for(ipc, classes, image_size, arch, teacher_arch)
        batch = min(batch, count)
        single = steps_of_a_pass(count, batch)
        wanted = ((epochs or rules.epochs_for(ipc)) + rules.passes_after) * single
        unit = math.lcm(*(steps_of_a_pass(views * count, batch) for views in VIEWS))
        if wanted % unit * _DEAREST > wanted:
            unit = single
        return cls(wanted // unit * unit, batch, rules.passes_after)

    def epochs_of(self, images: int) -> int:
        """Passes over a set of so many images (see `images_of_a_pass`), as `train_student` takes them."""
        passes = round(self.steps / steps_of_a_pass(images, min(self.batch_size, images)))
        return max(passes - self.passes_after, 1)


def images_of_a_pass(distilled: DistilledImages, rules: Protocol) -> int:
    """Images that a student sees in one pass over a set: tiles and regions where it is decoded to them."""
    if distilled.boxes is not None:
        return len(distilled.labels) * (1 + distilled.boxes.shape[1])
    decoded = distilled.is_float or rules.decode
    return len(distilled.labels) * (distilled.factor**2 if decoded else 1)
