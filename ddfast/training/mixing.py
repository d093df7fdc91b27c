"""A student's batches: augmented, mixed, and labelled to match."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.data.sources import composed
from ddfast.errors import UsageError
from ddfast.models.teacher import Teacher, checked_logits
from ddfast.ops.precision import autocast
from ddfast.seeding import derived_seed, generator
from ddfast.training.augmentation import (
    normalize,
    random_crop_flip,
    random_flip,
    random_resized_boxes,
    resize_boxes,
    shuffle_patches,
)
from ddfast.training.device import memory_layout
from ddfast.training.differentiable import dsa, idc
from ddfast.training.distilled_images import DistilledImages
from ddfast.training.protocol import PROTOCOLS, Protocol
from ddfast.wording import argument


@dataclass(frozen=True)
class MixedBatch:
    """Augmented and mixed images, and what they are made of.

    Attributes:
        inputs: float32 [B, 3, S, S], normalised, channels-last.
        index: int64 [B], which distilled images these were.
        coverage: float32 [B, factor^2], share of the crop's area that shows each tile, before CutMix; rows
            sum to 1.
        partner: int64 [B], place in the batch of the image that was mixed in.
        share: the partner's share of the image: of its area under CutMix, of its colours under MixUp.

    """

    inputs: Tensor
    index: Tensor
    coverage: Tensor
    partner: Tensor
    share: float


class StudentAugmentation:
    """A protocol's augmentation of whole batches.

    In order: AutoAugment where asked for, the protocol's geometry, normalise, its colours, its mixing. RDED's are
    ShufflePatches, RandomResizedCrop of scale (1/factor, 1), mirror, and CutMix on every batch; at factor 1 the crop of
    scale (1, 1) is the whole image, whatever aspect ratio is drawn, so it is left out.

    Args:
        distilled: the set. Optimised images stand for themselves: they are normalised already, and their black is
            that of the normalisation.
        protocol: names the steps and gives the laws of mixing.
        seed: of all draws.
        autoaugment: torchvision's AutoAugment first, which takes 8-bit images. It draws from torch's global generator:
            seed that too.
        device: where the batches are made.

    """

    def __init__(
        self,
        distilled: DistilledImages,
        protocol: Protocol,
        *,
        seed: int,
        autoaugment: bool,
        device: torch.device,
    ) -> None:
        check_autoaugment(distilled, autoaugment)
        self.distilled, self.protocol, self.device = distilled, protocol, device
        self.images = distilled.images if autoaugment else distilled.images.to(device)
        self._draws = generator(seed, "augmentation")
        self._mixing_draws = np.random.default_rng(derived_seed(seed, "cutmix"))
        self._autoaugment = _autoaugment(distilled.image_size) if autoaugment else None

    def __call__(self, index: Tensor) -> MixedBatch:
        """The batch of the images `index`, int64 [B] on the CPU."""
        images = self.images[index.to(self.images.device)]
        if self._autoaugment is not None:
            images = torch.stack([self._autoaugment(image) for image in images]).to(self.device)
        images, coverage = self._geometry(images)
        if self.distilled.is_float:
            inputs = images.contiguous(memory_format=torch.channels_last)
        else:
            inputs = normalize(images, self.distilled.mean, self.distilled.std)
        if self.protocol.colour != "none":
            colour = dsa if self.protocol.colour.startswith("dsa") else idc
            flip = not self.protocol.colour.endswith("_no_flip")
            inputs = colour(inputs, self._draws, flip=flip).contiguous(memory_format=torch.channels_last)
        inputs, partner, share = self._mixed(inputs)
        return MixedBatch(inputs, index, coverage, partner, share)

    def _geometry(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and the share of each tile that they show, [B, factor^2]."""
        factor, size, kind = self.distilled.factor, self.distilled.image_size, self.protocol.geometry
        tiles = torch.arange(factor**2).view(1, factor, factor).expand(len(images), -1, -1)
        coverage = torch.full((len(images), factor**2), 1 / factor**2)
        if kind == "none":
            return images, coverage
        if kind == "padded_crop":
            return random_crop_flip(images, self._draws, black=self._black()), coverage
        if kind == "patches":
            images, tiles = shuffle_patches(images, factor, self._draws)
            least = 1 / factor
        else:
            least = 0.5 if kind == "resized_crop" else 0.08
        if least < 1:
            boxes = random_resized_boxes(len(images), size, self._draws, scale=(least, 1.0))
            images = resize_boxes(images if self.distilled.is_float else images.float() / 255, boxes, size)
            coverage = tile_coverage(boxes, tiles, size)
        return random_flip(images, self._draws), coverage

    def _black(self) -> Tensor | None:
        """What black is in the images, [3]; None for 0."""
        if not self.distilled.is_float:
            return None
        return -torch.tensor(list(self.distilled.mean)) / torch.tensor(list(self.distilled.std))

    def _mixed(self, inputs: Tensor) -> tuple[Tensor, Tensor, float]:
        """Mixed images, the partner of each and the partner's share."""
        if self.protocol.mix == "none":
            return inputs, torch.arange(len(inputs)), 0.0
        partner = torch.randperm(len(inputs), generator=self._draws)
        if self.protocol.mix_probability < 1 and self._mixing_draws.random() >= self.protocol.mix_probability:
            return inputs, partner, 0.0
        others = inputs[partner.to(self.device)]
        if self.protocol.mix == "mixup":
            share = 1 - float(self._mixing_draws.beta(self.protocol.mix_alpha, self.protocol.mix_alpha))
            return torch.lerp(inputs, others, share), partner, share
        size = self.distilled.image_size
        top, left, bottom, right = self.protocol.cutmix_box(size, self._mixing_draws)
        inputs[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        return inputs, partner, (bottom - top) * (right - left) / size**2


def tile_coverage(boxes: Tensor, tiles: Tensor, size: int) -> Tensor:
    """Share of each box's area that shows each tile.

    Args:
        boxes: int [B, 4], (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.
        tiles: int64 [B, factor, factor], the tile at each place of the image.
        size: side of the image in pixels, a multiple of factor.

    Returns:
        float32 [B, factor^2], in the order of the tiles' numbers; rows sum to 1.

    """
    factor = tiles.shape[1]
    starts = torch.arange(factor) * (size // factor)
    ends = starts + size // factor

    def overlap(low: Tensor, high: Tensor) -> Tensor:
        return (torch.minimum(ends, high[:, None]) - torch.maximum(starts, low[:, None])).clamp(min=0)

    x0, y0, x1, y1 = boxes.long().unbind(dim=1)
    area = overlap(y0, y1)[:, :, None] * overlap(x0, x1)[:, None, :]
    share = area.flatten(1).float() / ((y1 - y0) * (x1 - x0))[:, None]
    return torch.zeros_like(share).scatter(1, tiles.flatten(1), share)


def mixed_soft_labels(tile_labels: Tensor, coverage: Tensor, partner: Tensor, share: float) -> Tensor:
    """Stored soft labels of a mixed batch: tiles by the area the crop shows of them, then CutMix by its box's
    area.

    Args:
        tile_labels: probabilities [B, factor^2, C].
        coverage: [B, factor^2], rows sum to 1.
        partner: int64 [B].
        share: area of CutMix's box as a share of the image.

    Returns:
        probabilities [B, C].

    """
    whole = torch.einsum("bt,btc->bc", coverage, tile_labels)
    return (1 - share) * whole + share * whole[partner]


def check_labels(has_soft: bool, protocol: Protocol) -> None:
    """Refuse a protocol of stored soft labels for a set without any.

    Raises:
        UsageError: it names the protocols that train on hard labels.
    """
    if protocol.labels == "soft" and not has_soft:
        hard = ", ".join(name for name, rules in PROTOCOLS.items() if rules.labels == "hard")
        raise UsageError(
            f"the distilled set holds no soft labels: give a teacher ({argument('teacher')}), or a "
            f"{argument('protocol')} that trains on hard ones ({hard}); {protocol.name} trains on soft ones"
        )


def check_autoaugment(distilled: DistilledImages, autoaugment: bool) -> None:
    """Refuse AutoAugment, which is defined on 8 bits, for images in float32. Raises `UsageError`."""
    if autoaugment and distilled.is_float:
        raise UsageError(
            f"AutoAugment works on 8-bit images, and these are float32: leave {argument('autoaugment')} out"
            + (f", or add {argument('rounded')}" if distilled.factor == 1 else "")
        )


def _stored_labels(
    distilled: DistilledImages, protocol: Protocol, device: torch.device
) -> Callable[[MixedBatch], Tensor]:
    check_labels(distilled.soft_labels is not None, protocol)
    soft = distilled.soft_labels
    assert soft is not None
    probabilities = soft.float()

    def labels(batch: MixedBatch) -> Tensor:
        tile_labels = probabilities[batch.index]
        return mixed_soft_labels(tile_labels, batch.coverage, batch.partner, batch.share).to(device)

    return labels


def _hard_labels(distilled: DistilledImages, device: torch.device) -> Callable[[MixedBatch], Tensor]:
    def labels(batch: MixedBatch) -> Tensor:
        own = F.one_hot(distilled.labels[batch.index], distilled.num_classes).float()
        return ((1 - batch.share) * own + batch.share * own[batch.partner]).to(device)

    return labels


def _online_labels(
    distilled: DistilledImages, teacher: Teacher, temperature: float, precision: str, device: torch.device
) -> Callable[[MixedBatch], Tensor]:
    if composed(teacher.class_names) != composed(distilled.class_names):
        raise UsageError(
            f"the teacher's classes ({len(teacher.class_names)}) are not the distilled set's "
            f"({distilled.num_classes}), or stand in another order: give the teacher of this data"
        )
    if teacher.image_size != distilled.image_size:
        raise UsageError(
            f"the teacher reads {teacher.image_size} px, the distilled images have {distilled.image_size} px"
        )
    layout = memory_layout(teacher.model, device)
    model = copy.deepcopy(teacher.model).float().to(device=device).to(memory_format=layout).eval()

    def labels(batch: MixedBatch) -> Tensor:
        with torch.no_grad(), autocast(precision, device):
            logits = checked_logits(
                model(batch.inputs.contiguous(memory_format=layout)), distilled.num_classes
            )
        return F.softmax(logits.float() / temperature, dim=1)

    return labels


def _autoaugment(image_size: int) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    return AutoAugment(AutoAugmentPolicy.CIFAR10 if image_size <= 32 else AutoAugmentPolicy.IMAGENET)
