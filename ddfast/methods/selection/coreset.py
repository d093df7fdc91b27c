"""What the coresets share: whole images of each class, chosen by what the teacher's last layer sees of them.

The features phi(x), the input of the teacher's last linear layer, travel through the score table. A coreset is then a
rule on the features of one class; it never looks at labels of the other classes or at pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddfast.errors import UsageError
from ddfast.methods.base import Context
from ddfast.methods.selection.base import Batch, Candidates, Selection, Table, whole_images
from ddfast.ops import crop_batch
from ddfast.ops.precision import autocast
from ddfast.ops.transfer import to_device
from ddfast.seeding import stream
from ddfast.settings import option


def unit_length_option() -> Any:
    """The option that coresets on features share."""
    return option(False, "scale features to length 1 first, so that distances are angles", stage="select")


class Coreset(Selection):
    """A coreset by features: one file for each rule, which has only to `pick`."""

    keeps_features = True
    options: Any

    @abstractmethod
    def pick(self, features: Tensor, needed: int, key: int) -> tuple[Tensor, Tensor]:
        """Choose images of one class.

        Args:
            features: float64 [n, F] on the CPU, in the order of sample ids.
            needed: images to choose, at most n.
            key: 64-bit key for a rule that draws, another one for each class and seed.

        Returns:
            Chosen places int64 [needed], best first and each once; and a score of each, float64 [needed], higher is
            better. Of equal images the first is chosen.
        """

    def score(self, batch: Batch, context: Context) -> Candidates:
        """One candidate an image: all of it, with its features."""
        features, damaged = teacher_features(batch.images, context)
        return Candidates(boxes=whole_images(batch), features=features, damaged=damaged)

    def rank(self, table: Table, needed: int) -> tuple[dict[int, np.ndarray], np.ndarray]:
        """The chosen images of every class; a row that was not chosen has no score."""
        assert table.features is not None
        score = np.full(len(table.label), np.nan)
        ranked = {}
        in_id_order = table.ranked_within_class(np.zeros(len(table.label)), np.arange(len(table.label)))
        for label, rows in in_id_order.items():
            features = torch.from_numpy(table.features[rows]).double()
            if self.options.unit_length:
                features = torch.nn.functional.normalize(features, dim=1)
            key = stream(table.seed, f"{self.name}/{label}")
            picks, values = self.pick(features, min(needed, len(rows)), key)
            ranked[label] = rows[picks.numpy()]
            score[ranked[label]] = values.numpy()
        return ranked, score


def squared_distances(features: Tensor, point: Tensor) -> Tensor:
    """||phi_i - point||^2, float64 [n], of features [n, F]. Equal rows have equal distances, to the last bit."""
    return (features - point).square_().sum(dim=1)


def teacher_features(images: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Input of the teacher's last linear layer, float32 [M, F], on uint8 images [M, 3, S, S].

    And for how many images it is NaN or infinity, int64 on the device: who reads it refuses.

    Raises:
        UsageError: a teacher without a linear layer.
    """
    from ddfast.models.registry import features

    teacher = context.teacher
    assert teacher is not None
    size = context.image_size
    boxes = to_device(torch.tensor([0, 0, size, size]), images.device).expand(len(images), 4)
    source = torch.arange(len(images), device=images.device)
    found = []
    with torch.no_grad(), autocast(context.precision, images.device):
        for which in source.split(context.forward_batch):
            inputs = crop_batch(
                images,
                boxes[which],
                size,
                source=which,
                mean=teacher.mean,
                std=teacher.std,
                dtype=torch.float32,
            )
            try:
                found.append(features(teacher.model, inputs).float())
            except ValueError as error:
                raise UsageError(f"no coreset by features with this teacher: {error}") from error
    joined = torch.cat(found)
    return joined, (~joined.isfinite()).any(dim=1).sum()
