"""Registration and public faces of masked_batch, shapley_heatmap and noisy_crop_boxes.

A face checks its arguments, fills in defaults and calls the op; the op's bodies trust what they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddfast.ops import reference
from ddfast.ops._constants import shared
from ddfast.ops._dispatch import LIBRARY, call, define
from ddfast.ops._grid import player_map
from ddfast.ops.transfer import to_device
from ddfast.philox import as_signed_64_bit, quantile_table

VALUES = ("logit", "prob", "logprob")

ChannelStatistic: TypeAlias = Tensor | Sequence[float] | None

# What noisy_crop_boxes takes behind phi, and shapley_crop_boxes at its end.
CROP_BOX_SCHEMA = (
    "Tensor sample_ids, Tensor quantiles, int seed, int rows, int cols, int[] pools, int crops, "
    "bool clean_last, float alpha, int image_height, int image_width, int[] crop_heights, int[] crop_widths, "
    "float coverage"
)

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- masked_batch
# ---------------------------------------------------------------------------------------------


def masked_batch(
    images: Tensor,
    coalitions: Tensor,
    *,
    grid: int | tuple[int, int],
    baseline: float | Tensor = 0.0,
    mean: ChannelStatistic = None,
    std: ChannelStatistic = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Every image under every coalition of its grid cells, normalised and ready for a forward pass.

    Pixels of present players keep the image, those of absent players take the baseline (the value function of
    Lundberg and Lee, "A Unified Approach to Interpreting Model Predictions", NeurIPS 2017, Sec. 2). One pass
    writes what indexing, normalising, masking, casting and a change of layout would write five times.

    Args:
        images: [B, C, H, W] uint8 or float. uint8 is divided by 255 first; then (x - mean) / std.
        coalitions: bool [K, d], the same for every image, or [B, K, d]; True where the player is present. The
            d = rows * cols players are the cells of the grid, counted along its rows.
        grid: cells a side, or (rows, cols). Row r starts at pixel floor(r * H / rows), so that rows differ
            by at most one pixel where the grid does not divide the image; the same for columns.
        baseline: what absent players show, after normalisation: a number, [C], or any float tensor that
            broadcasts to [C, H, W] or [B, C, H, W].
        mean, std: [C], tensors or sequences, in units of the images (for uint8: of 1/255 of them), or None.
        dtype: floating dtype of the result. Default: that of float images, float32 for uint8.

    Returns:
        [B * K, C, H, W] in channels-last memory format; image b under coalition k is row b * K + k.
        Differentiable any number of times with respect to float images and to the baseline.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: shapes that do not fit, a grid finer than the image, a mean or std that requires a
            gradient.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise ValueError(f"images must be a [B, C, H, W] tensor, got {_describe(images)}")
    if images.dtype not in (torch.uint8, *_FLOATING):
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    batch, _, height, width = images.shape
    rows, cols = _pair(grid, "grid")
    if not (1 <= rows <= height and 1 <= cols <= width):
        raise ValueError(
            f"grid must have 1 to {height} rows and 1 to {width} columns for {height} x {width} images, "
            f"got {rows} x {cols}"
        )
    if coalitions.dtype != torch.bool:
        raise TypeError(f"coalitions must be bool, got {coalitions.dtype}")
    shapes = ((rows * cols,), (batch, rows * cols))
    if coalitions.ndim not in (2, 3) or (*coalitions.shape[:-2], coalitions.shape[-1]) not in shapes:
        raise ValueError(
            f"coalitions must be [K, {rows * cols}] or [{batch}, K, {rows * cols}] for a {rows} x {cols} "
            f"grid, got {list(coalitions.shape)}"
        )
    if dtype is None:
        dtype = images.dtype if images.is_floating_point() else torch.float32
    if dtype not in _FLOATING:
        raise TypeError(f"dtype must be a floating-point dtype of 16 to 64 bits, got {dtype}")
    precision = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32
    return call(
        "masked_batch",
        images,
        to_device(coalitions, images.device),
        _broadcast_baseline(baseline, images, precision),
        _channel_statistic("mean", mean, images, precision),
        _channel_statistic("std", std, images, precision),
        rows,
        cols,
        dtype,
    )


def _broadcast_baseline(baseline: float | Tensor, images: Tensor, precision: torch.dtype) -> Tensor:
    """The baseline in one of the op's three forms: [C], [C, H, W] or [B, C, H, W]."""
    channels = images.shape[1]
    if not isinstance(baseline, Tensor):
        device = images.device
        return shared(
            ("baseline", repr(baseline), channels, precision, device),
            lambda: torch.full((channels,), baseline, dtype=precision, device=device),
        )
    if baseline.dtype not in _FLOATING:
        raise TypeError(f"baseline must be a number or a floating-point tensor, got {baseline.dtype}")
    form: tuple[int, ...] = tuple(images.shape if baseline.ndim == 4 else images.shape[1:])
    if baseline.ndim <= 1:
        form = (channels,)
    try:
        return baseline.to(images.device).expand(form)
    except RuntimeError:
        raise ValueError(
            f"baseline must be a number or [{channels}], or expand to {list(images.shape[1:])} or "
            f"{list(images.shape)}, got {list(baseline.shape)}"
        ) from None


def _channel_statistic(
    name: str, statistic: ChannelStatistic, images: Tensor, precision: torch.dtype
) -> Tensor | None:
    if statistic is None:
        return None
    device = images.device
    if isinstance(statistic, list | tuple) and all(type(number) in (int, float) for number in statistic):
        tensor = shared(
            ("statistic", repr(statistic), precision, device),
            lambda: to_device(torch.tensor(statistic, dtype=precision), device),
        )
    else:
        tensor = to_device(torch.as_tensor(statistic, dtype=precision), device)
    if tensor.shape != images.shape[1:2]:
        raise ValueError(
            f"{name} must have one number for each of {images.shape[1]} channels, got {statistic}"
        )
    if tensor.requires_grad:
        raise ValueError(f"{name} is a constant of the op, but requires a gradient: pass {name}.detach()")
    return tensor


def _masked_batch_fake(
    images: Tensor,
    coalitions: Tensor,
    baseline: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    shape = (images.shape[0] * coalitions.shape[-2], *images.shape[1:])
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


def _masked_batch_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    images, coalitions, baseline, _, std, ctx.rows, ctx.cols, dtype = inputs
    ctx.save_for_backward(coalitions, std)
    ctx.image_dtype, ctx.baseline_dtype, ctx.baseline_shape = images.dtype, baseline.dtype, baseline.shape
    ctx.image_shape, ctx.compute = images.shape, reference.masking_dtype(images, baseline, dtype)


def _masked_batch_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The transpose of an affine map, in differentiable operations: a second derivative runs through them."""
    coalitions, std = ctx.saved_tensors
    batch, _, height, width = ctx.image_shape
    players = player_map(ctx.rows, ctx.cols, height, width, grad.device)
    present = coalitions[..., players].unsqueeze(-3)  # [(B,) K, 1, H, W]
    grad = grad.unflatten(0, (batch, coalitions.shape[-2]))
    zero = grad.new_zeros(())
    grad_images = grad_baseline = None
    if ctx.needs_input_grad[0]:
        grad_images = torch.where(present, grad, zero).sum(1, dtype=ctx.compute)
        if std is not None:
            grad_images = grad_images / std.to(ctx.compute)[:, None, None]
        grad_images = grad_images.to(ctx.image_dtype)
    if ctx.needs_input_grad[2]:
        grad_baseline = torch.where(present, zero, grad).sum(1, dtype=ctx.compute)
        if len(ctx.baseline_shape) == 1:
            grad_baseline = grad_baseline.sum((0, 2, 3))
        elif len(ctx.baseline_shape) == 3:
            grad_baseline = grad_baseline.sum(0)
        grad_baseline = grad_baseline.to(ctx.baseline_dtype)
    return grad_images, None, grad_baseline, None, None, None, None, None


def _masked_batch_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    images: Tensor,
    coalitions: Tensor,
    baseline: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> tuple[Tensor, int]:
    """Fold the mapped dimension into the batch of images."""
    size = info.batch_size
    images_dim, coalitions_dim, baseline_dim, mean_dim, std_dim = in_dims[:5]
    images = _mapped_first(images, images_dim, size)
    if mean_dim is not None or std_dim is not None:
        # One set of channel statistics serves the whole op, so several are applied to the images beforehand.
        compute = reference.masking_dtype(images, baseline, dtype)
        mean = None if mean is None else _mapped_first(mean, mean_dim, size).unsqueeze(1)
        std = None if std is None else _mapped_first(std, std_dim, size).unsqueeze(1)
        images = reference.normalise(images, mean, std, compute)
        mean = std = None
    batch = images.shape[1]
    if coalitions_dim is not None or coalitions.ndim == 3:
        coalitions = _mapped_first(coalitions, coalitions_dim, size)
        if coalitions.ndim == 3:
            coalitions = coalitions.unsqueeze(1).expand(-1, batch, -1, -1)
        coalitions = coalitions.flatten(0, 1)
    if baseline_dim is not None or baseline.ndim == 4:
        baseline = _mapped_first(baseline, baseline_dim, size)
        if baseline.ndim == 2:
            baseline = baseline[:, :, None, None]
        if baseline.ndim == 4:
            baseline = baseline.unsqueeze(1)
        baseline = baseline.expand(images.shape).flatten(0, 1)
    masked = torch.ops.ddfast.masked_batch(
        images.flatten(0, 1), coalitions, baseline, mean, std, rows, cols, dtype
    )
    return masked.unflatten(0, (size, batch * coalitions.shape[-2])), 0


# --- shapley_heatmap
# ------------------------------------------------------------------------------------------


def shapley_heatmap(outputs: Tensor, labels: Tensor, projection: Tensor, value: str = "logit") -> Tensor:
    """Attribution of each player from the model's outputs under all coalitions.

    Every estimator in `ddfast.attribution` is linear in the coalitions' values, so that one projection turns
    values into Shapley values: phi[b, i] = sum over k of projection[(b,) k, i] * value(outputs[b, k],
    labels[b]).

    Args:
        outputs: [B, K, C] floating point, the model's logits for K coalitions of each image.
        labels: [B] int64, the class whose score is attributed.
        projection: [K, d], the same for every image, or [B, K, d]; float32, or float64 with float64 outputs.
        value: the score. "logit" is the output itself, "prob" its softmax, "logprob" its log-softmax.

    Returns:
        phi [B, d] float32 (float64 for float64 outputs). Values are taken in that dtype, products and sums
        over k in float64, in ascending order of k. Differentiable any number of times with respect to
        outputs and projection.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: shapes that do not fit, an unknown value, on the CPU also a label outside [0, C). A GPU
            is not asked, because reading labels back would stall it: there such a label makes phi NaN.
    """
    check_coalitions(outputs, labels, projection, value)
    return call("shapley_heatmap", outputs, labels, projection, value)


def check_coalitions(outputs: Tensor, labels: Tensor, projection: Tensor, value: str) -> None:
    """Raise TypeError or ValueError where shapley_heatmap cannot take these arguments."""
    if value not in VALUES:
        raise ValueError(f"value must be one of {', '.join(VALUES)}, got {value!r}")
    if not isinstance(outputs, Tensor) or outputs.ndim != 3:
        raise ValueError(f"outputs must be a [B, K, C] tensor, got {_describe(outputs)}")
    if outputs.dtype not in _FLOATING:
        raise TypeError(f"outputs must be floating point, got {outputs.dtype}")
    batch, count, _ = outputs.shape
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != (batch,):
        raise ValueError(
            f"labels must be [{batch}] for outputs {list(outputs.shape)}, got {list(labels.shape)}"
        )
    wanted = reference.accumulation_dtype(outputs.dtype)
    if projection.dtype != wanted:
        raise TypeError(f"projection must be {wanted} with {outputs.dtype} outputs, got {projection.dtype}")
    if projection.ndim not in (2, 3) or tuple(projection.shape[:-1]) not in ((count,), (batch, count)):
        raise ValueError(
            f"projection must be [{count}, d] or [{batch}, {count}, d] for outputs {list(outputs.shape)}, "
            f"got {list(projection.shape)}"
        )


def _check_labels(outputs: Tensor, labels: Tensor, projection: Tensor, value: str) -> None:
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < outputs.shape[-1]:
        raise ValueError(
            f"labels must be in [0, {outputs.shape[-1]}), got {int(labels.min())} to {int(labels.max())}"
        )


def _shapley_heatmap_fake(outputs: Tensor, labels: Tensor, projection: Tensor, value: str) -> Tensor:
    dtype = reference.accumulation_dtype(outputs.dtype)
    return outputs.new_empty((outputs.shape[0], projection.shape[-1]), dtype=dtype)


def _shapley_heatmap_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    outputs, labels, projection, ctx.value = inputs
    ctx.save_for_backward(outputs, labels, projection)


def _shapley_heatmap_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of outputs and projection, in differentiable operations."""
    outputs, labels, projection = ctx.saved_tensors
    per_image = "b" if projection.ndim == 3 else ""
    grad_outputs = grad_projection = None
    if ctx.needs_input_grad[0]:
        weights = torch.einsum(f"bi,{per_image}ki->bk", grad, projection)[..., None]  # d loss / d value
        logits = outputs.to(grad.dtype)
        index = labels[:, None, None].expand(-1, outputs.shape[1], 1)
        if ctx.value == "prob":
            weights = weights * logits.softmax(-1).gather(-1, index)
        grad_outputs = torch.zeros_like(logits).scatter(-1, index, weights)
        if ctx.value != "logit":
            grad_outputs = grad_outputs - weights * logits.softmax(-1)
        grad_outputs = grad_outputs.to(outputs.dtype)
    if ctx.needs_input_grad[2]:
        values = reference.coalition_values(outputs, labels, ctx.value)
        grad_projection = torch.einsum(f"bk,bi->{per_image}ki", values, grad)
    return grad_outputs, None, grad_projection, None


def _shapley_heatmap_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    outputs: Tensor,
    labels: Tensor,
    projection: Tensor,
    value: str,
) -> tuple[Tensor, int]:
    """Fold the mapped dimension into the batch of images."""
    size = info.batch_size
    outputs, labels = _mapped_first(outputs, in_dims[0], size), _mapped_first(labels, in_dims[1], size)
    batch = outputs.shape[1]
    if in_dims[2] is not None or projection.ndim == 3:
        projection = _mapped_first(projection, in_dims[2], size)
        if projection.ndim == 3:
            projection = projection.unsqueeze(1).expand(-1, batch, -1, -1)
        projection = projection.flatten(0, 1)
    phi = torch.ops.ddfast.shapley_heatmap(outputs.flatten(0, 1), labels.flatten(0, 1), projection, value)
    return phi.unflatten(0, (size, batch)), 0


# --- noisy_crop_boxes
# -----------------------------------------------------------------------------------------


Size: TypeAlias = int | tuple[int, int]


def noisy_crop_boxes(
    phi: Tensor,
    sample_ids: Tensor,
    *,
    seed: int,
    grid: Size,
    image_size: Size,
    crop_size: Size | Sequence[Size],
    pool: int | Sequence[int] = 2,
    crops: int = 5,
    alpha: float = 2.0,
    clean_last: bool = True,
    coverage: float = 1.0,
) -> Tensor:
    """Crop boxes around the most informative windows of a heatmap, made diverse by noise.

    InfoUtil, Sec. 3.2.1: average-pool the heatmap with windows of pool x pool cells, stride 1; for each crop
    add normal noise of alpha times the standard deviation of the pooled map; centre the crop on the largest
    window. The noise of a crop is a function of (seed, sample id, crop, window), so that it depends neither
    on the batch nor on the device, and the boxes have the same bits everywhere for the same bits of phi.

    With a list of pools the size of the window follows the image: it takes the smallest one whose best place
    holds `coverage` of the positive phi, and the largest where none does.

    Args:
        phi: [B, rows * cols] float32, the heatmap, along its rows.
        sample_ids: [B] int64, any 64 bits that name the sample.
        seed: any 64-bit integer.
        grid: cells a side of the heatmap, or (rows, cols).
        image_size: pixels a side of the image, or (height, width).
        crop_size: pixels a side of the crop, or (height, width); with a list of pools, a list of as many.
        pool: cells a side of a window, or an ascending list of them.
        crops: number of crops K.
        alpha: noise, in standard deviations of the pooled map.
        clean_last: the last crop has no noise: it is the most informative window itself.
        coverage: with a list of pools, the share of the sum of positive phi that a window must hold.

    Returns:
        [B, K, 4] int32 boxes (x0, y0, x1, y1) in pixels, x1 and y1 exclusive, inside the image. Where a
        value is NaN its window counts as minus infinity; of equal windows the first wins. Not
        differentiable.

    Raises:
        TypeError: phi that is not float32 or sample_ids that are not int64.
        ValueError: shapes or sizes that do not fit, a seed of more than 64 bits, alpha below 0, coverage
            outside [0, 1].
    """
    if phi.dtype != torch.float32:
        raise TypeError(f"phi must be float32, got {phi.dtype}")
    rows, cols = _pair(grid, "grid")
    if phi.ndim != 2 or phi.shape[1] != rows * cols:
        raise ValueError(f"phi must be [B, {rows * cols}] for a {rows} x {cols} grid, got {list(phi.shape)}")
    arguments = crop_box_arguments(
        sample_ids,
        phi,
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
    return torch.ops.ddfast.noisy_crop_boxes(phi, *arguments)


def crop_box_arguments(
    sample_ids: Tensor,
    samples: Tensor,
    *,
    seed: int,
    grid: Size,
    image_size: Size,
    crop_size: Size | Sequence[Size],
    pool: int | Sequence[int],
    crops: int,
    alpha: float,
    clean_last: bool,
    coverage: float,
) -> tuple[Any, ...]:
    """The arguments of the op noisy_crop_boxes behind phi, checked, for the samples of a tensor [B, ...].

    Raises:
        TypeError, ValueError: as noisy_crop_boxes.
    """
    rows, cols = _pair(grid, "grid")
    image_height, image_width = _pair(image_size, "image_size")
    if isinstance(pool, int):
        pools, crop_sizes = [pool], [_pair(crop_size, "crop_size")]
    else:
        sizes = list(crop_size) if isinstance(crop_size, Sequence) else []
        pools, crop_sizes = list(pool), [_pair(size, "crop_size") for size in sizes]
        if not pools or len(pools) != len(crop_sizes):
            raise ValueError(
                f"a list of pools needs as many crop sizes, at least one, got {pool!r} and {crop_size!r}"
            )
        if sorted(set(pools)) != pools:
            raise ValueError(f"a list of pools must ascend, got {pools}")
    if sample_ids.dtype != torch.int64:
        raise TypeError(f"sample_ids must be int64, got {sample_ids.dtype}")
    if sample_ids.shape != samples.shape[:1]:
        raise ValueError(
            f"sample_ids must be [{samples.shape[0]}], one a heatmap, got {list(sample_ids.shape)}"
        )
    if not (1 <= rows <= image_height and 1 <= cols <= image_width):
        raise ValueError(
            f"grid must be no finer than the image, got {rows} x {cols} cells "
            f"for {image_height} x {image_width} pixels"
        )
    for size, (crop_height, crop_width) in zip(pools, crop_sizes, strict=True):
        if not 1 <= size <= min(rows, cols):
            raise ValueError(
                f"pool must be 1 to {min(rows, cols)} cells for a {rows} x {cols} grid, got {size}"
            )
        if not (1 <= crop_height <= image_height and 1 <= crop_width <= image_width):
            raise ValueError(
                f"crop_size must lie within the image, got {crop_height} x {crop_width} "
                f"for {image_height} x {image_width} pixels"
            )
    if crops < 0:
        raise ValueError(f"crops must not be negative, got {crops}")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be a finite number of standard deviations, at least 0, got {alpha}")
    if not 0 <= coverage <= 1:
        raise ValueError(f"coverage must be a share in [0, 1], got {coverage}")
    return (
        sample_ids,
        quantile_table(samples.device),
        as_signed_64_bit(seed),
        rows,
        cols,
        pools,
        crops,
        clean_last,
        float(alpha),
        image_height,
        image_width,
        [height for height, _ in crop_sizes],
        [width for _, width in crop_sizes],
        float(coverage),
    )


def _noisy_crop_boxes_fake(
    phi: Tensor,
    sample_ids: Tensor,
    quantiles: Tensor,
    seed: int,
    rows: int,
    cols: int,
    pools: Sequence[int],
    crops: int,
    *rest: Any,
) -> Tensor:
    return phi.new_empty((phi.shape[0], crops, 4), dtype=torch.int32)


def _noisy_crop_boxes_vmap(
    info: Any, in_dims: tuple[int | None, ...], phi: Tensor, sample_ids: Tensor, quantiles: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    """Fold the mapped dimension into the batch of heatmaps."""
    if in_dims[2] is not None:
        raise ValueError("quantiles is one table for all heatmaps and cannot be mapped over")
    size = info.batch_size
    phi, sample_ids = _mapped_first(phi, in_dims[0], size), _mapped_first(sample_ids, in_dims[1], size)
    boxes = torch.ops.ddfast.noisy_crop_boxes(phi.flatten(0, 1), sample_ids.flatten(0, 1), quantiles, *rest)
    return boxes.unflatten(0, (size, phi.shape[1])), 0


# --- shared
# ---------------------------------------------------------------------------------------------------


def _pair(size: Any, name: str) -> tuple[int, int]:
    """(rows, columns) of a size given as one integer or as two."""
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(side, int) for side in pair):
        raise ValueError(f"{name} must be an int or a pair of ints (vertical, horizontal), got {size!r}")
    return pair[0], pair[1]


def _describe(value: object) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A vmapped argument with its mapped dimension first; one that is not mapped is expanded."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _always(*args: Any) -> bool:
    return True


define(
    "masked_batch",
    "(Tensor images, Tensor coalitions, Tensor baseline, Tensor? mean, Tensor? std, int rows, int cols, "
    "ScalarType dtype) -> Tensor",
    reference=reference.masked_batch,
    fake=_masked_batch_fake,
    triton="masked_batch",
    native_accepts=_always,
)
define(
    "shapley_heatmap",
    "(Tensor outputs, Tensor labels, Tensor projection, str value) -> Tensor",
    reference=reference.shapley_heatmap,
    fake=_shapley_heatmap_fake,
    triton="shapley_heatmap",
    native_accepts=_always,
    check=_check_labels,
    native_checks=True,
)
define(
    "noisy_crop_boxes",
    f"(Tensor phi, {CROP_BOX_SCHEMA}) -> Tensor",
    reference=reference.noisy_crop_boxes,
    fake=_noisy_crop_boxes_fake,
    triton="noisy_crop_boxes",
    native_accepts=_always,
)
torch.library.register_autograd(
    "ddfast::masked_batch", _masked_batch_backward, setup_context=_masked_batch_context, lib=LIBRARY
)
torch.library.register_autograd(
    "ddfast::shapley_heatmap", _shapley_heatmap_backward, setup_context=_shapley_heatmap_context, lib=LIBRARY
)
torch.library.register_vmap("ddfast::masked_batch", _masked_batch_vmap, lib=LIBRARY)
torch.library.register_vmap("ddfast::shapley_heatmap", _shapley_heatmap_vmap, lib=LIBRARY)
torch.library.register_vmap("ddfast::noisy_crop_boxes", _noisy_crop_boxes_vmap, lib=LIBRARY)
