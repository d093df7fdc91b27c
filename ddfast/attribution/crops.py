"""Crops by attribution: the model's evaluations end in crop boxes, without a heatmap on its way through memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ddfast.attribution.engine import Channels, evaluations, start, weights
from ddfast.attribution.validation import as_tensors
from ddfast.ops import noisy_crop_boxes, shapley_crop_boxes


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


@torch.inference_mode(False)
@torch.no_grad()
def shapley_crops(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    rule: CropRule,
    *,
    grid: int | tuple[int, int],
    n_samples: int,
    estimator: str,
    value: str,
    baseline: float | Tensor,
    precision: str,
    seed: int | Tensor,
    mean: Channels = None,
    std: Channels = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ddfast.shapley` and the crops that its heatmaps ask for, with the bits of the one after the other.

    The last forward pass of an image ends in `ddfast.ops.shapley_crop_boxes`: one launch from the model's outputs
    to phi and boxes.

    Args:
        model, images, labels, grid, n_samples, estimator, value, baseline, precision, seed, mean, std,
            chunk_size: those of `shapley`.
        sample_ids: int64 [B], any 64 bits that name the image; the noise of its crops follows from them.
        rule: window, size, number and noise of the crops.

    Returns:
        phi [B, d], as `shapley`; and boxes int32 [B, crops, 4], (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.

    Raises:
        ValueError, TypeError: as `shapley` and `noisy_crop_boxes`.
    """
    images, labels = as_tensors(images, labels)
    if sample_ids.shape != (len(images),):
        raise ValueError(f"sample_ids must be [{len(images)}], one an image, got {list(sample_ids.shape)}")
    game, plan, chunk = start(
        model,
        images,
        labels,
        grid=grid,
        n_samples=n_samples,
        estimator=estimator,
        value=value,
        baseline=baseline,
        precision=precision,
        seed=seed,
        mean=mean,
        std=std,
        chunk_size=chunk_size,
    )
    image_size = (images.shape[2], images.shape[3])
    partial, sample_ids = game.nothing(), sample_ids.to(images.device)
    dtype = torch.float64 if game.dtype == torch.float64 else torch.float32
    heatmaps = [partial[:0].to(dtype)]
    boxes = [rule.boxes(heatmaps[0], sample_ids[:0], game.grid, image_size)]
    for which, scores, projection, last in evaluations(game, plan, chunk):
        if not last:
            partial[which] += game.project(which, scores, projection)
            continue
        phi, placed = shapley_crop_boxes(
            scores,
            game.labels[which],
            weights(projection, scores),
            sample_ids[which],
            value=value,
            partial=partial[which],
            grid=game.grid,
            image_size=image_size,
            **asdict(rule),
        )
        heatmaps.append(phi.to(dtype))
        boxes.append(placed)
    return torch.cat(heatmaps), torch.cat(boxes)
