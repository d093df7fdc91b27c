"""Registration and public face of shapley_crop_boxes, the end of the score pass in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddfast.ops import reference
from ddfast.ops._attribution import (
    CROP_BOX_SCHEMA,
    Size,
    _check_labels,
    _mapped_first,
    _pair,
    _shapley_heatmap_backward,
    check_coalitions,
    crop_box_arguments,
)
from ddfast.ops._dispatch import LIBRARY, call, define


def shapley_crop_boxes(
    outputs: Tensor,
    labels: Tensor,
    projection: Tensor,
    sample_ids: Tensor,
    *,
    value: str = "logit",
    partial: Tensor | None = None,
    seed: int,
    grid: Size,
    image_size: Size,
    crop_size: Size | Sequence[Size],
    pool: int | Sequence[int] = 2,
    crops: int = 5,
    alpha: float = 2.0,
    clean_last: bool = True,
    coverage: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Shapley values of the cells and the crop boxes that they ask for, from the model's outputs at once.

    The same bits as `shapley_heatmap` followed by `noisy_crop_boxes`, without phi on its way through memory
    and without the second launch: InfoUtil, Sec. 3.2.1, from the evaluated coalitions to the crops.

    Args:
        outputs, labels, projection, value: those of `shapley_heatmap`, with d = rows * cols players.
        sample_ids: [B] int64, any 64 bits that name the sample.
        partial: [B, d] float64 or None: what coalitions that are not in `outputs` brought to phi. It is added
            in float64 to the float32 sum over those that are, and the result rounded once more.
        seed, grid, image_size, crop_size, pool, crops, alpha, clean_last, coverage: those of
            `noisy_crop_boxes`.

    Returns:
        phi [B, d] float32 (float64 for float64 outputs), differentiable any number of times with respect to
        outputs, projection and partial; and boxes [B, crops, 4] int32 of phi in float32, not differentiable.

    Raises:
        TypeError, ValueError: as `shapley_heatmap` and `noisy_crop_boxes`, or a partial that does not fit.
    """
    check_coalitions(outputs, labels, projection, value)
    batch, players = outputs.shape[0], projection.shape[-1]
    rows, cols = _pair(grid, "grid")
    if players != rows * cols:
        raise ValueError(
            f"projection must be [..., {rows * cols}] for a {rows} x {cols} grid, got {list(projection.shape)}"
        )
    if partial is not None and (partial.dtype != torch.float64 or partial.shape != (batch, players)):
        raise ValueError(
            f"partial must be float64 [{batch}, {players}], got {partial.dtype} {list(partial.shape)}"
        )
    arguments = crop_box_arguments(
        sample_ids,
        outputs,
        seed=seed,
        grid=grid,
        image_size=image_size,
        crop_size=crop_size,
        pool=pool,
        crops=crops,
        alpha=alpha,
        clean_last=clean_last,
        coverage=coverage,
    )
    return call("shapley_crop_boxes", outputs, labels, projection, partial, value, *arguments)


def _check(
    outputs: Tensor, labels: Tensor, projection: Tensor, partial: Tensor | None, value: str, *rest: Any
) -> None:
    _check_labels(outputs, labels, projection, value)


def _fake(
    outputs: Tensor,
    labels: Tensor,
    projection: Tensor,
    partial: Tensor | None,
    value: str,
    sample_ids: Tensor,
    quantiles: Tensor,
    seed: int,
    rows: int,
    cols: int,
    pools: Sequence[int],
    crops: int,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    batch, dtype = outputs.shape[0], reference.accumulation_dtype(outputs.dtype)
    phi = outputs.new_empty((batch, projection.shape[-1]), dtype=dtype)
    return phi, outputs.new_empty((batch, crops, 4), dtype=torch.int32)


def _context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    outputs, labels, projection, _, ctx.value, *_ = inputs
    ctx.save_for_backward(outputs, labels, projection)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_phi: Tensor, grad_boxes: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of shapley_heatmap; `partial` is added to phi, so its gradient is that of phi."""
    grad_outputs, _, grad_projection, _ = _shapley_heatmap_backward(ctx, grad_phi)
    grad_partial = grad_phi.to(torch.float64) if ctx.needs_input_grad[3] else None
    return (grad_outputs, None, grad_projection, grad_partial, *(None,) * 15)


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    outputs: Tensor,
    labels: Tensor,
    projection: Tensor,
    partial: Tensor | None,
    value: str,
    sample_ids: Tensor,
    quantiles: Tensor,
    *rest: Any,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Fold the mapped dimension into the batch of images."""
    if in_dims[6] is not None:
        raise ValueError("quantiles is one table for all heatmaps and cannot be mapped over")
    size = info.batch_size
    outputs, labels = _mapped_first(outputs, in_dims[0], size), _mapped_first(labels, in_dims[1], size)
    sample_ids = _mapped_first(sample_ids, in_dims[5], size)
    batch = outputs.shape[1]
    if in_dims[2] is not None or projection.ndim == 3:
        projection = _mapped_first(projection, in_dims[2], size)
        if projection.ndim == 3:
            projection = projection.unsqueeze(1).expand(-1, batch, -1, -1)
        projection = projection.flatten(0, 1)
    if partial is not None:
        partial = _mapped_first(partial, in_dims[3], size).flatten(0, 1)
    phi, boxes = torch.ops.ddfast.shapley_crop_boxes(
        outputs.flatten(0, 1),
        labels.flatten(0, 1),
        projection,
        partial,
        value,
        sample_ids.flatten(0, 1),
        quantiles,
        *rest,
    )
    return (phi.unflatten(0, (size, batch)), boxes.unflatten(0, (size, batch))), (0, 0)


define(
    "shapley_crop_boxes",
    "(Tensor outputs, Tensor labels, Tensor projection, Tensor? partial, str value, "
    f"{CROP_BOX_SCHEMA}) -> (Tensor, Tensor)",
    reference=reference.shapley_crop_boxes,
    fake=_fake,
    triton="shapley_crop_boxes",
    native_accepts=lambda *args: True,
    check=_check,
)
torch.library.register_autograd("ddfast::shapley_crop_boxes", _backward, setup_context=_context, lib=LIBRARY)
torch.library.register_vmap("ddfast::shapley_crop_boxes", _vmap, lib=LIBRARY)
