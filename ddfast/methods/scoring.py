"""How crops meet the teacher when they are scored, and what it says of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ddfast.errors import UsageError
from ddfast.methods.base import Context
from ddfast.ops.precision import autocast


@dataclass(frozen=True)
class Verdict:
    """What the teacher says of crops [M, K]: cross-entropy in nats, correctness, and gradient norm where asked."""

    loss: Tensor
    correct: Tensor
    grad_norm: Tensor | None


def teacher_input(tiles: Tensor, context: Context, scoring_input: str) -> Tensor:
    """Normalise tiles uint8 [N, 3, t, t] and bring them to the teacher's size, float32 channels-last [N, 3, S, S].

    `pad` surrounds a smaller tile with zeros in normalised space, centred (RDED); `resize` enlarges it bilinearly.
    """
    teacher = context.teacher
    assert teacher is not None
    mean = torch.tensor(teacher.mean, device=tiles.device).view(1, 3, 1, 1)
    std = torch.tensor(teacher.std, device=tiles.device).view(1, 3, 1, 1)
    size, tile = context.image_size, tiles.shape[-1]
    images = tiles.float().div_(255)
    if tile < size and scoring_input == "resize":
        images = F.interpolate(
            images, size=(size, size), mode="bilinear", antialias=True, align_corners=False
        )
    images = (images - mean) / std
    if images.shape[-1] < size:
        before = (size - tile) // 2
        images = F.pad(images, (before, size - tile - before, before, size - tile - before))
    return images.contiguous(memory_format=torch.channels_last)


def judge(
    tiles: Tensor, labels: Tensor, context: Context, *, scoring_input: str, norm: str | None = None
) -> Verdict:
    """Score tiles uint8 [M, K, 3, t, t] against labels int64 [M].

    Args:
        tiles: crops at tile size.
        labels: class of each source.
        context: teacher, sizes, precision and the fixed number of images a forward pass.
        scoring_input: "pad" or "resize", see `teacher_input`.
        norm: None for no gradient norm, else a method of `ddfast.grad_norm`.

    Raises:
        UsageError: the teacher returned NaN or infinity.
    """
    from ddfast.gradients import grad_norm

    teacher = context.teacher
    assert teacher is not None
    count, crops = tiles.shape[:2]
    flat, repeated = tiles.flatten(0, 1), labels.repeat_interleave(crops)
    losses, corrects, norms = [], [], []
    for part, target in zip(
        flat.split(context.forward_batch), repeated.split(context.forward_batch), strict=True
    ):
        images = teacher_input(part, context, scoring_input)
        if norm is None:
            with torch.no_grad(), autocast(context.precision, images.device):
                logits = teacher.model(images)
        else:
            with autocast(context.precision, images.device):
                found, logits = grad_norm(
                    teacher.model, images, target, method=norm, chunk_size=len(images), return_logits=True
                )
            norms.append(found)
        logits = logits.float()
        if not bool(torch.isfinite(logits).all()):
            raise UsageError(
                "the teacher returns NaN or infinity on real crops: its weights are damaged, train it again"
            )
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        corrects.append(logits.argmax(dim=1) == target)
    shape = (count, crops)
    return Verdict(
        loss=torch.cat(losses).view(shape),
        correct=torch.cat(corrects).view(shape),
        grad_norm=torch.cat(norms).view(shape) if norms else None,
    )
