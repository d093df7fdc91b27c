"""How crops meet the teacher when they are scored, and what it says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.methods.base import Context
from ddfast.ops import crop_batch, crop_resize
from ddfast.ops.graphs import Recorded
from ddfast.ops.precision import autocast
from ddfast.ops.transfer import to_device
from ddfast.unchanged import found_of


@dataclass(frozen=True)
class Verdict:
    """What the teacher says of crops [M, K]: cross-entropy in nats, correctness, and gradient norm where asked.

    `damaged` counts the crops for which it returned NaN or infinity, int64 on the device: who reads it refuses.
    """

    loss: Tensor
    correct: Tensor
    grad_norm: Tensor | None
    damaged: Tensor


def teacher_input(
    images: Tensor, boxes: Tensor, source: Tensor, context: Context, scoring_input: str
) -> Tensor:
    """Crops as the teacher meets them: cut, resized to a tile, normalised and brought to the teacher's size.

    `pad` surrounds a smaller tile with zeros in normalised space, centred (RDED); `resize` enlarges it bilinearly.

    Args:
        images: uint8 [M, 3, S, S].
        boxes: [N, 4] in pixels.
        source: int64 [N], the image of each box.
        context: teacher and sizes.
        scoring_input: "pad" or "resize".

    Returns:
        float32 [N, 3, S, S], channels last.
    """
    teacher = context.teacher
    assert teacher is not None
    size, tile = context.image_size, context.tile
    if tile < size and scoring_input == "resize":  # the tile itself is enlarged, rounded as it is stored
        images = crop_resize(images, boxes, tile, source=source)
        boxes = torch.zeros(4, dtype=torch.int64, device=images.device)
        boxes[2:] = tile
        boxes = boxes.expand(len(images), 4)
        source, tile = torch.arange(len(images), device=images.device), size
    return crop_batch(
        images,
        boxes,
        tile,
        source=source,
        padded=size,
        mean=teacher.mean,
        std=teacher.std,
        dtype=torch.float32,
    )


def judge(
    images: Tensor,
    boxes: Tensor,
    labels: Tensor,
    context: Context,
    *,
    scoring_input: str,
    norm: str | None = None,
) -> Verdict:
    """Score the crops of images against their labels.

    Args:
        images: uint8 [M, 3, S, S].
        boxes: [M, K, 4], the crops of each image, in pixels.
        labels: int64 [M] on the host, class of each image.
        context: teacher, sizes, precision and the fixed number of images a forward pass.
        scoring_input: "pad" or "resize", see `teacher_input`.
        norm: None for no gradient norm, else a method of `ddfast.grad_norm`.
    """
    assert context.teacher is not None
    found = found_of(context.teacher.model)
    run: Callable[..., tuple[Tensor, ...]] = partial(_judged, context, scoring_input, norm)
    if found is not None and images.device.type != "cpu":  # recorded where the teacher is held unchanged
        key = (
            "judge",
            scoring_input,
            norm,
            context.precision,
            context.forward_batch,
            context.image_size,
            context.tile,
        )
        run = found.setdefault(key, Recorded(run))
    loss, correct, damaged, *norms = run(images, boxes, to_device(labels, images.device))
    return Verdict(loss, correct, norms[0] if norms else None, damaged)


def _judged(
    context: Context, scoring_input: str, norm: str | None, images: Tensor, boxes: Tensor, labels: Tensor
) -> tuple[Tensor, ...]:
    """Loss, correctness, how many crops got no number, and the gradient norm where asked."""
    from ddfast.gradients import grad_norm

    teacher = context.teacher
    assert teacher is not None
    count, crops = boxes.shape[:2]
    source = torch.arange(count, device=images.device).repeat_interleave(crops)
    targets = labels.repeat_interleave(crops)
    outputs, norms = [], []
    for first in range(0, count * crops, context.forward_batch):
        which = slice(first, first + context.forward_batch)
        tiles = teacher_input(images, boxes.flatten(0, 1)[which], source[which], context, scoring_input)
        if norm is None:
            with torch.no_grad(), autocast(context.precision, images.device):
                outputs.append(teacher.model(tiles))
        else:
            with autocast(context.precision, images.device):
                found, logits = grad_norm(
                    teacher.model,
                    tiles,
                    targets[which],
                    method=norm,
                    chunk_size=len(tiles),
                    return_logits=True,
                )
            outputs.append(logits)
            norms.append(found)
    logits = torch.cat(outputs).float()
    loss = F.cross_entropy(logits, targets, reduction="none").view(count, crops)
    correct = (logits.argmax(dim=1) == targets).view(count, crops)
    damaged = (~logits.isfinite()).any(dim=1).sum()
    return (loss, correct, damaged, *((torch.cat(norms).view(count, crops),) if norms else ()))
