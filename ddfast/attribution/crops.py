"""Crops by attribution: the model's evaluations end in crop boxes, without a heatmap on its way through memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddfast.attribution.engine import ImageGame, evaluations, start, weights
from ddfast.attribution.estimators.plans import Plan, SampledPlan
from ddfast.attribution.validation import as_tensors, check_finite
from ddfast.ops import noisy_crop_boxes, shapley_crop_boxes
from ddfast.ops.transfer import to_device


@dataclass(frozen=True)
class CropRule:
    """How a heatmap becomes crops; the fields are the options of `ddfast.ops.noisy_crop_boxes`."""

    seed: int
    crop_size: int | tuple[int, int] | Sequence[int | tuple[int, int]]
    pool: int | Sequence[int] = 2
    crops: int = 5
    alpha: float = 2.0
    clean_last: bool = True
    coverage: float = 1.0

    def boxes(
        self, phi: Tensor, sample_ids: Tensor, grid: int | tuple[int, int], image_size: int | tuple[int, int]
    ) -> Tensor:
        """Boxes int32 [B, crops, 4] of heatmaps phi [B, d], for `sample_ids` int64 [B]."""
        return noisy_crop_boxes(phi.float(), sample_ids, grid=grid, image_size=image_size, **asdict(self))


def shapley_crops(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    rule: CropRule,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """`ddfast.shapley` and the crops that its heatmaps ask for, with the bits of the one after the other.

    The last forward pass of an image ends in `ddfast.ops.shapley_crop_boxes`: one launch from the model's outputs
    to phi and boxes.

    Args:
        model, images, labels: those of `shapley`.
        sample_ids: int64 [B], any 64 bits that name the image; the noise of its crops follows from them.
        rule: window, size, number and noise of the crops.
        settings: grid, n_samples, estimator, value, baseline, precision, seed, mean, std and chunk_size of `shapley`.

    Returns:
        phi [B, d], as `shapley`; and boxes int32 [B, crops, 4], (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.

    Raises:
        ValueError, TypeError: as `shapley` and `noisy_crop_boxes`.
    """
    phi, boxes, _ = unread_crops(model, images, labels, sample_ids, rule, check=True, **settings)
    return phi, boxes


@torch.inference_mode(False)
@torch.no_grad()
def unread_crops(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    rule: CropRule,
    *,
    check: bool = False,
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`shapley_crops` that waits for nothing on a GPU, and the number of masked images that got NaN or infinity.

    Who reads that number, int64 on the device, has to refuse the rest where it is not 0; with `check` it is done here.
    """
    images, labels = as_tensors(images, labels)
    sample_ids = torch.as_tensor(sample_ids)
    if sample_ids.shape != (len(images),):
        raise ValueError(f"sample_ids must be [{len(images)}], one an image, got {list(sample_ids.shape)}")
    game, plan, chunk = start(model, images, labels, **settings)
    sample_ids = to_device(sample_ids, images.device)
    if isinstance(plan, SampledPlan) and game.is_settled:
        given = (game.images, game.labels, plan.coalitions, plan.projection, sample_ids)
        phi, placed, bad = game.recorded(
            ("crops", repr(rule)), partial(_of_tensors, game.again(), rule, chunk)
        )(*given)
    else:
        phi, placed, bad = _placed(game, plan, chunk, sample_ids, rule, check=check)
    if check:
        check_finite(int(bad), game.evaluated, "masked images")
    return phi, placed, bad


def _of_tensors(
    game: Callable[[Tensor, Tensor], ImageGame],
    rule: CropRule,
    chunk: int,
    images: Tensor,
    labels: Tensor,
    coalitions: Tensor,
    projection: Tensor,
    sample_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole pass as a function of tensors, which a GPU can record."""
    return _placed(game(images, labels), SampledPlan(coalitions, projection), chunk, sample_ids, rule)


def _placed(
    game: ImageGame, plan: Plan, chunk: int, sample_ids: Tensor, rule: CropRule, *, check: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """phi, boxes and the number of masked images that got no number."""
    image_size = (game.images.shape[2], game.images.shape[3])
    so_far = game.nothing()
    dtype = torch.float64 if game.dtype == torch.float64 else torch.float32
    heatmaps: list[Tensor] = []
    boxes: list[Tensor] = []
    for which, scores, projection, last in evaluations(game, plan, chunk, check=check):
        if not last:
            so_far[which] += game.project(which, scores, projection)
            continue
        phi, placed = shapley_crop_boxes(
            scores,
            game.labels[which],
            weights(projection, scores),
            sample_ids[which],
            value=game.value,
            partial=so_far[which],
            grid=game.grid,
            image_size=image_size,
            **asdict(rule),
        )
        heatmaps.append(phi.to(dtype))
        boxes.append(placed)
    if not heatmaps:
        heatmaps = [so_far.to(dtype)]
        boxes = [rule.boxes(heatmaps[0], sample_ids, game.grid, image_size)]
    phi, placed = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (heatmaps, boxes))
    return phi, placed, game.bad_scores()
