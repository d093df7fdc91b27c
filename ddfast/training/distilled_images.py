"""A distilled set in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddfast.data.tiles import enlarged_tiles
from ddfast.errors import UsageError
from ddfast.models.teacher import Teacher
from ddfast.ops import crop_resize
from ddfast.output.pixels import to_bytes, to_unit
from ddfast.output.whitening import Whitening
from ddfast.training.augmentation import normalize


@dataclass(frozen=True)
class DistilledImages:
    """A distilled set in memory.

    Attributes:
        images: uint8 [N, 3, S, S], or optimised ones, float32, normalised by `mean` and `std`: students see these
            as they are, decoded by `factor` and never rounded.
        labels: int64 [N].
        class_names: the C classes in label order.
        mean: per-channel mean for pixels in [0, 1].
        std: per-channel standard deviation for pixels in [0, 1].
        factor: tiles a side in every image.
        boxes: int64 [N, P, 4] in pixels, x0, y0, x1, y1: regions of each image that students see beside it, enlarged
            to its size; None: the images alone. Only images of factor 1 have some.
        soft_labels: probabilities [N, factor^2, C] of every tile, row-major, or None: they come from a
            teacher.
        temperature: T of the softmax that made them.
        learned_rate: learning rate that was optimised with the images, None where none was.
        whitening: that the images, float32, have gone through in place of a normalisation, and that test images go
            through; None where they are normalised.

    """

    images: Tensor
    labels: Tensor
    class_names: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]
    factor: int = 1
    soft_labels: Tensor | None = None
    temperature: float = 20.0
    boxes: Tensor | None = None
    learned_rate: float | None = None
    whitening: Whitening | None = None

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def is_float(self) -> bool:
        """Whether the images are float32, as a method optimised them, and not pictures of 8 bits."""
        return self.images.dtype != torch.uint8

    @property
    def image_size(self) -> int:
        """S in pixels."""
        return self.images.shape[-1]

    @property
    def ipc(self) -> int:
        """Images a class, rounded down where classes differ, at least 1."""
        return max(len(self.labels) // self.num_classes, 1)

    def decoded(self) -> DistilledImages:
        """The set of its tiles, each enlarged to a whole image (bilinear): IDC's decoding. Labels follow.

        Of images that have regions beside them: each image, then its regions, enlarged (UDD).
        """
        if self.boxes is not None:
            return self._with_regions(self.boxes)
        if self.factor == 1:
            return self
        grey = (
            normalize(torch.full((1, 3, 1, 1), 0.5), self.mean, self.std).flatten()
            if self.is_float
            else 127.5
        )
        large = enlarged_tiles(self.images.float(), self.factor, grey)
        tiles_an_image = self.factor**2
        soft = self.soft_labels
        return replace(
            self,
            images=large if self.is_float else large.round_().clamp_(0, 255).to(torch.uint8),
            labels=self.labels.repeat_interleave(tiles_an_image),
            factor=1,
            soft_labels=None if soft is None else soft.reshape(-1, 1, soft.shape[-1]),
        )

    def _with_regions(self, boxes: Tensor) -> DistilledImages:
        large = crop_resize(self.images, boxes.to(self.images.device), self.image_size)
        each = 1 + boxes.shape[1]
        soft = self.soft_labels
        return replace(
            self,
            images=torch.cat([self.images[:, None], large], dim=1).flatten(0, 1),
            labels=self.labels.repeat_interleave(each),
            boxes=None,
            soft_labels=None if soft is None else soft.repeat_interleave(each, dim=0),
        )

    def normalized_like(self, teacher: Teacher) -> DistilledImages:
        """The same set with the mean and deviation of its teacher: teacher and student must share them."""
        if self.whitening is not None:
            raise UsageError("the set is whitened, which no teacher is: leave the teacher out")
        ours, theirs = (self.mean, self.std), (teacher.mean, teacher.std)
        if not self.is_float or all(list(a) == list(b) for a, b in zip(ours, theirs, strict=True)):
            return replace(self, mean=teacher.mean, std=teacher.std)
        images = to_unit(self.images, self.mean, self.std, "normalized")
        return replace(
            self, images=normalize(images, teacher.mean, teacher.std), mean=teacher.mean, std=teacher.std
        )

    def rounded(self) -> DistilledImages:
        """The same set in 8 bits, as its pictures are.

        Tiles and regions are enlarged in float from the rounded images, so that rounding is all that differs.
        """
        if not self.is_float:
            return self
        if self.whitening is not None:
            shown = to_bytes(self.whitening.undone(self.images), self.mean, self.std, "unit")
            return replace(self, images=self.whitening(shown))
        images = to_bytes(self.images, self.mean, self.std, "normalized")
        whole = self.factor == 1 and self.boxes is None
        return replace(self, images=images if whole else normalize(images, self.mean, self.std))

    def checked(self) -> DistilledImages:
        """Self, after a look at shapes and values.

        Raises:
            UsageError: a shape, dtype or label that does not fit.

        """
        count, classes = len(self.labels), self.num_classes
        known = self.images.dtype in (torch.uint8, torch.float32)
        if not known or self.images.shape[1:] != (3, self.image_size, self.image_size):
            raise UsageError(
                "distilled images must be uint8 [N, 3, S, S], or float32 and normalised, "
                f"got {self.images.dtype} {list(self.images.shape)}"
            )
        if self.is_float and not bool(torch.isfinite(self.images).all()):
            raise UsageError("distilled images hold NaN or infinity: distil the set again")
        if count == 0 or len(self.images) != count:
            raise UsageError(f"wanted one label for each distilled image, got {len(self.images)} and {count}")
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise UsageError(
                f"labels of the distilled set must be int64 [N], got {self.labels.dtype} {list(self.labels.shape)}"
            )
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < classes:
            least, most = int(self.labels.min()), int(self.labels.max())
            raise UsageError(f"labels must lie in 0..{classes - 1}, got {least}..{most}")
        # Pixels are padded before they are cut into tiles; pictures have whole tiles with labels of their own.
        if not 1 <= self.factor <= self.image_size or (self.image_size % self.factor and not self.is_float):
            raise UsageError(f"factor must divide the image size {self.image_size}, got {self.factor}")
        if self.boxes is not None and (
            self.factor != 1 or self.boxes.ndim != 3 or self.boxes.shape[::2] != (count, 4)
        ):
            raise UsageError(
                f"boxes must be [{count}, P, 4] of images of factor 1, got {list(self.boxes.shape)} and {self.factor}"
            )
        if self.soft_labels is not None:
            wanted = (count, self.factor**2, classes)
            if tuple(self.soft_labels.shape) != wanted:
                raise UsageError(f"soft labels must be {list(wanted)}, got {list(self.soft_labels.shape)}")
            if not torch.isfinite(self.soft_labels).all():
                raise UsageError("soft labels hold NaN or infinity: relabel the distilled set")
        return self
