"""The end of the score pass in one launch: from the model's outputs to Shapley values and to crop boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from ddfast.kernels.launching import Allocation, Launch, Run, prepared
from ddfast.kernels.noisy_crop_boxes import _place_boxes, blocks
from ddfast.kernels.shapley_heatmap import CLASSES, COALITIONS, _heatmap


@triton.jit(do_not_specialize=["seed"])
def _shapley_crop_boxes(
    outputs,
    labels,
    projection,
    partial,
    sample_ids,
    quantiles,
    phi,
    boxes,
    count,
    projection_image_stride,
    seed,
    alpha,
    coverage,
    rows,
    cols,
    crops,
    image_height,
    image_width,
    CLASS_COUNT: tl.constexpr,
    VALUE: tl.constexpr,
    COMPUTE: tl.constexpr,
    POOLS: tl.constexpr,
    CROP_HEIGHTS: tl.constexpr,
    CROP_WIDTHS: tl.constexpr,
    SIZES: tl.constexpr,
    CLEAN_LAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_CROPS: tl.constexpr,
):
    """One program an image: shapley_heatmap, then noisy_crop_boxes, with phi in registers between them.

    Bytes moved an image: K C e read for a softmax (e bytes a logit) or K sectors of 32 bytes for plain
    logits, 8 d of `partial`, K d 4 of the projection, which all images share in L2; 4 d and 16 crops written.
    Operations: two exponentials and about six others a logit for a softmax, 2 K d in float64, about 100
    integer operations a crop and window. For a softmax of many classes the reads bind; else the latency of
    the launch and of the dependent shuffles, which is why a second launch would have doubled the time.
    """
    image = tl.program_id(0).to(tl.int64)
    player = tl.arange(0, BLOCK_D)
    players = rows * cols
    cells = _heatmap(
        outputs + image * count * CLASS_COUNT,
        tl.load(labels + image),
        projection + image * projection_image_stride,
        count,
        players,
        CLASS_COUNT,
        VALUE,
        COMPUTE,
        BLOCK_K,
        BLOCK_C,
        BLOCK_D,
    )
    if partial is not None:
        earlier = tl.load(partial + image * players + player, mask=player < players, other=0.0)
        cells = (earlier + cells.to(tl.float64)).to(COMPUTE)
    tl.store(phi + image * players + player, cells, mask=player < players)
    _place_boxes(
        cells.to(tl.float32),
        tl.load(sample_ids + image),
        quantiles,
        boxes + image * crops * 4,
        seed,
        alpha,
        coverage,
        rows,
        cols,
        crops,
        image_height,
        image_width,
        POOLS,
        CROP_HEIGHTS,
        CROP_WIDTHS,
        SIZES,
        CLEAN_LAST,
        BLOCK_CROPS,
    )


@prepared
def shapley_crop_boxes(
    outputs: torch.Tensor,
    labels: torch.Tensor,
    projection: torch.Tensor,
    partial: torch.Tensor | None,
    value: str,
    sample_ids: torch.Tensor,
    quantiles: torch.Tensor,
    seed: int,
    rows: int,
    cols: int,
    pools: Sequence[int],
    crops: int,
    clean_last: bool,
    alpha: float,
    image_height: int,
    image_width: int,
    crop_heights: Sequence[int],
    crop_widths: Sequence[int],
    coverage: float,
) -> Run:
    """Launch the kernel; arguments and results are those of the op `ddfast::shapley_crop_boxes`."""
    batch, count, classes = outputs.shape
    double = outputs.dtype == torch.float64
    phi_dtype = torch.float64 if double else torch.float32
    new_phi = Allocation((batch, rows * cols), phi_dtype, outputs.device)
    new_boxes = Allocation((batch, crops, 4), torch.int32, outputs.device)
    if batch == 0:
        return lambda *_: (new_phi(), new_boxes())
    block, block_crops, warps = blocks(rows * cols, crops)
    launch = Launch(
        _shapley_crop_boxes,
        (batch,),
        (
            count,
            count * rows * cols if projection.ndim == 3 else 0,
            seed,
            alpha,
            coverage,
            rows,
            cols,
            crops,
            image_height,
            image_width,
        ),
        CLASS_COUNT=classes,
        VALUE=value,
        COMPUTE=tl.float64 if double else tl.float32,
        POOLS=tuple(pools[::-1]),
        CROP_HEIGHTS=tuple(crop_heights[::-1]),
        CROP_WIDTHS=tuple(crop_widths[::-1]),
        SIZES=len(pools),
        CLEAN_LAST=clean_last,
        BLOCK_K=COALITIONS,
        BLOCK_C=min(CLASSES, triton.next_power_of_2(max(classes, 1))),
        BLOCK_D=block,
        BLOCK_CROPS=block_crops,
        num_warps=warps if value == "logit" else 4,
        enable_fp_fusion=False,
    )

    def run(
        outputs: torch.Tensor,
        labels: torch.Tensor,
        projection: torch.Tensor,
        partial: torch.Tensor | None,
        value: str,
        sample_ids: torch.Tensor,
        quantiles: torch.Tensor,
        *_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        phi, boxes = new_phi(), new_boxes()
        launch(
            outputs.contiguous(),
            labels.contiguous(),
            projection.contiguous(),
            None if partial is None else partial.contiguous(),
            sample_ids.contiguous(),
            quantiles.contiguous(),
            phi,
            boxes,
        )
        return phi, boxes

    return run
