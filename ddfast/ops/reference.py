"""The fused ops in plain PyTorch: what each one means, on any device and in float64.

Arguments are those of the op's schema, already validated by its public face. Every other body of an op is
tested against the function here, which is also what runs where that body cannot. Those of winograd_conv2d and
convnet_block stand in `ddfast.ops.reference_convnet`, that of siamese_augment in `ddfast.ops.reference_augment`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ddfast.ops._grid import part_start, player_map
from ddfast.ops.precision import accumulation_dtype as accumulation_dtype
from ddfast.ops.reference_augment import siamese_augment as siamese_augment
from ddfast.ops.reference_augment import siamese_augment_backward as siamese_augment_backward
from ddfast.ops.reference_convnet import RECOMPUTED_INPUTS as RECOMPUTED_INPUTS
from ddfast.ops.reference_convnet import channels_last_strides as channels_last_strides
from ddfast.ops.reference_convnet import convnet_block as convnet_block
from ddfast.ops.reference_convnet import convnet_block_backward as convnet_block_backward
from ddfast.ops.reference_convnet import convnet_block_batch_norm as convnet_block_batch_norm
from ddfast.ops.reference_convnet import (
    convnet_block_batch_norm_backward as convnet_block_batch_norm_backward,
)
from ddfast.ops.reference_convnet import (
    convnet_block_batch_norm_eval as convnet_block_batch_norm_eval,
)
from ddfast.ops.reference_convnet import (
    convnet_block_batch_norm_gradients as convnet_block_batch_norm_gradients,
)
from ddfast.ops.reference_convnet import convnet_block_curvature as convnet_block_curvature
from ddfast.ops.reference_convnet import convnet_block_gradients as convnet_block_gradients
from ddfast.ops.reference_convnet import convnet_block_layers as convnet_block_layers
from ddfast.ops.reference_convnet import convnet_block_second_gradients as convnet_block_second_gradients
from ddfast.ops.reference_convnet import winograd_conv2d as winograd_conv2d
from ddfast.philox import QUANTILE_BITS, philox4x32

# --- masked_batch, shapley_heatmap, noisy_crop_boxes and shapley_crop_boxes ---------------------------------


def masked_batch(
    images: Tensor,
    coalitions: Tensor,
    baseline: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    """Every image under every coalition: its present players' pixels normalised, the baseline elsewhere."""
    batch, channels, height, width = images.shape
    count, compute = coalitions.shape[-2], masking_dtype(images, baseline, dtype)
    players = player_map(rows, cols, height, width, images.device)
    present = coalitions[..., players].unsqueeze(-3)  # [(B,) K, 1, H, W]
    pixels = normalise(images, mean, std, compute).unsqueeze(1)  # [B, 1, C, H, W]
    absent = _baseline_planes(baseline).to(compute)
    masked = torch.empty(
        (batch * count, channels, height, width),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last,
    )
    masked.unflatten(0, (batch, count)).copy_(torch.where(present, pixels, absent))
    return masked


def masking_dtype(images: Tensor, baseline: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that masked_batch computes in: float64 where anything is float64, else float32."""
    return torch.float64 if torch.float64 in (images.dtype, baseline.dtype, dtype) else torch.float32


def normalise(images: Tensor, mean: Tensor | None, std: Tensor | None, compute: torch.dtype) -> Tensor:
    """(x - mean) / std, channel by channel, of [..., C, H, W] images; uint8 is divided by 255 first."""
    pixels = images.to(compute)
    if images.dtype == torch.uint8:
        pixels = pixels / _divisor(255, pixels)
    if mean is not None:
        pixels = pixels - mean.to(compute)[..., None, None]
    if std is not None:
        pixels = pixels / std.to(compute)[..., None, None]
    return pixels


def _divisor(number: int, like: Tensor) -> Tensor:
    """`number` as a tensor, because on a GPU torch multiplies by the reciprocal of a Python number."""
    return torch.full((), number, dtype=like.dtype, device=like.device)


def _baseline_planes(baseline: Tensor) -> Tensor:
    """A [C], [C, H, W] or [B, C, H, W] baseline in a shape that broadcasts against [B, K, C, H, W]."""
    if baseline.ndim == 1:
        return baseline[:, None, None]
    return baseline if baseline.ndim == 3 else baseline.unsqueeze(1)


def shapley_heatmap(outputs: Tensor, labels: Tensor, projection: Tensor, value: str) -> Tensor:
    """phi[b, i] = sum over k of projection[(b,) k, i] * (value of coalition k for the label of image b).

    Products and sums are in float64, over k in ascending order, and rounded once at the end. A product of
    two float32 is exact there, so that the result does not depend on whether a machine fuses the two
    operations: given the same values, every body of this op gives the same bits. In float32 the rounding
    errors of 65,536 additions in a row would show.
    """
    values = coalition_values(outputs, labels, value)
    weights = projection.to(torch.float64)
    phi = torch.zeros(outputs.shape[0], projection.shape[-1], dtype=torch.float64, device=outputs.device)
    for k, value_k in enumerate(values.to(torch.float64).unbind(1)):
        phi = phi + weights[..., k, :] * value_k[:, None]
    return phi.to(values.dtype)


def coalition_values(outputs: Tensor, labels: Tensor, value: str) -> Tensor:
    """[B, K] value of each coalition: the label's logit, probability or log-probability.

    Computed in float64 for float64 outputs [B, K, C], else in float32.
    """
    logits = outputs.to(accumulation_dtype(outputs.dtype))
    if value == "prob":
        logits = logits.softmax(-1)
    elif value == "logprob":
        logits = logits.log_softmax(-1)
    return logits.gather(-1, labels[:, None, None].expand(-1, outputs.shape[1], 1)).squeeze(-1)


def noisy_crop_boxes(
    phi: Tensor,
    sample_ids: Tensor,
    quantiles: Tensor,
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
) -> Tensor:
    """Boxes of the windows that win once scaled normal noise is added to the pooled heatmap.

    Of several sizes of window an image takes the first whose best place holds `coverage` of the positive phi,
    and the last where none does. Written out one IEEE operation at a time, in a fixed order, so that every
    body of this op gives the same bits.
    """
    heatmap = phi.unflatten(1, (rows, cols))
    positive = torch.where(heatmap > 0, heatmap, torch.zeros_like(heatmap))
    total = _sum_in_order(positive.flatten(1))
    wanted = torch.full_like(total, coverage) * total
    boxes = torch.empty(phi.shape[0], crops, 4, dtype=torch.int32, device=phi.device)
    undecided = torch.ones(phi.shape[0], dtype=torch.bool, device=phi.device)
    for size, (pool, crop_height, crop_width) in enumerate(
        zip(pools, crop_heights, crop_widths, strict=True), start=1
    ):
        held = _window_sums(positive, pool).flatten(1).amax(1)
        takes = undecided if size == len(pools) else undecided & (total > 0) & (held >= wanted)
        pooled = (_window_sums(heatmap, pool) / _divisor(pool * pool, phi)).flatten(1)  # [B, windows]
        best = _noisy_argmax(pooled, sample_ids, quantiles, seed, crops, clean_last, alpha)
        across = cols - pool + 1
        y0 = _crop_starts(best // across, pool, rows, image_height, crop_height)
        x0 = _crop_starts(best % across, pool, cols, image_width, crop_width)
        placed = torch.stack((x0, y0, x0 + crop_width, y0 + crop_height), dim=-1).to(torch.int32)
        boxes = torch.where(takes[:, None, None], placed, boxes)
        undecided = undecided & ~takes
    return boxes


def _window_sums(cells: Tensor, pool: int) -> Tensor:
    """Sums over the pool x pool windows of [B, rows, cols], stride 1, each added up row by row."""
    down, across = cells.shape[1] - pool + 1, cells.shape[2] - pool + 1
    sums = torch.zeros_like(cells[:, :down, :across])
    for row in range(pool):
        for col in range(pool):
            sums = sums + cells[:, row : row + down, col : col + across]
    return sums


def _noisy_argmax(
    pooled: Tensor,
    sample_ids: Tensor,
    quantiles: Tensor,
    seed: int,
    crops: int,
    clean_last: bool,
    alpha: float,
) -> Tensor:
    """[B, crops] int64: the first largest of the windows pooled [B, windows], to which each crop adds noise
    of alpha standard deviations of them."""
    (images, windows), device = pooled.shape, pooled.device
    mean = _sum_in_order(pooled) / _divisor(windows, pooled)
    deviations = pooled - mean[:, None]
    variance = _sum_in_order(deviations * deviations) / _divisor(windows, pooled)
    # A float32 square root by way of float64 is correctly rounded whatever library computes it.
    scale = torch.full_like(variance, alpha) * variance.to(torch.float64).sqrt().to(pooled.dtype)

    # One Philox counter for each image, crop and window.
    counters = torch.empty(images, crops, windows, 4, dtype=torch.int64, device=device)
    counters[..., 0] = (sample_ids & 0xFFFFFFFF)[:, None, None]
    counters[..., 1] = (sample_ids >> 32 & 0xFFFFFFFF)[:, None, None]
    counters[..., 2] = torch.arange(crops, device=device)[:, None]
    counters[..., 3] = torch.arange(windows, device=device)
    words = philox4x32(counters, seed)[..., 0]
    noisy = pooled[:, None] + scale[:, None, None] * quantiles[words >> 32 - QUANTILE_BITS]
    if clean_last and crops > 0:
        noisy[:, -1] = pooled
    return noisy.masked_fill(noisy.isnan(), -torch.inf).argmax(-1)  # the first of equal values


def _sum_in_order(values: Tensor) -> Tensor:
    """Sum over the last dimension, added one value after another; `Tensor.sum` does not promise an order."""
    total = torch.zeros_like(values[..., 0])
    for value in values.unbind(-1):
        total = total + value
    return total


def _crop_starts(first_part: Tensor, pool: int, parts: int, length: int, crop: int) -> Tensor:
    """First pixels, along one axis, of crops centred on windows of `pool` parts and kept inside the image."""
    centres = [
        part_start(part, length, parts) + part_start(part + pool, length, parts)
        for part in range(parts - pool + 1)
    ]  # twice the centre of each window
    doubled = torch.tensor(centres, device=first_part.device)[first_part]
    return ((doubled - crop) // 2).clamp(0, length - crop)


def shapley_crop_boxes(
    outputs: Tensor,
    labels: Tensor,
    projection: Tensor,
    partial: Tensor | None,
    value: str,
    *crop_box_arguments: Any,
) -> tuple[Tensor, Tensor]:
    """shapley_heatmap, whose result is added to `partial` in float64, then noisy_crop_boxes of it in float32."""
    phi = shapley_heatmap(outputs, labels, projection, value)
    if partial is not None:
        phi = (partial + phi.to(torch.float64)).to(phi.dtype)
    return phi, noisy_crop_boxes(phi.to(torch.float32), *crop_box_arguments)


# --- crop_resize and grad_sq_norm_*
# -----------------------------------------------------------------------------------


def triangle_filter(start: float, stop: float, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights [size, ceil(stop) - floor(start)] that resize the interval [start, stop) of a line of pixels
    to `size`.

    Antialiased linear interpolation as torch has it: output i sits at start + scale * (i + 1/2) with scale =
    (stop - start) / size, pixel j weighs max(0, 1 - |j + 1/2 - centre| / max(scale, 1)), and the weights of
    the pixels floor(start) .. ceil(stop) - 1, the only ones that exist for the crop, are divided by their
    sum.
    """
    first, last = math.floor(start), math.ceil(stop)
    scale = torch.tensor(stop - start, dtype=dtype, device=device) / size
    centre = (start - first) + scale * (torch.arange(size, dtype=dtype, device=device) + 0.5)
    pixel = torch.arange(last - first, dtype=dtype, device=device) + 0.5
    weights = (1 - (pixel - centre[:, None]).abs() * (1 / scale.clamp(min=1))).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def crop_resize(
    images: Tensor, boxes: Tensor, source: Tensor, height: int, width: int, factor: int
) -> Tensor:
    """Cut box m out of images[source[m]], resize it to a tile, lay factor x factor tiles into each mosaic."""
    dtype = accumulation_dtype(images.dtype)
    tiles = images.new_empty((boxes.shape[0], images.shape[1], height, width), dtype=dtype)
    for m, ((x0, y0, x1, y1), b) in enumerate(zip(boxes.tolist(), source.tolist(), strict=True)):
        crop = images[b, :, math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)].to(dtype)
        vertical = triangle_filter(y0, y1, height, dtype, images.device)
        horizontal = triangle_filter(x0, x1, width, dtype, images.device)
        tiles[m] = vertical @ crop @ horizontal.T
    count, channels = tiles.shape[0] // factor**2, tiles.shape[1]
    grid = tiles.reshape(count, factor, factor, channels, height, width)  # mosaic, tile row, tile column
    mosaics = grid.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, factor * height, factor * width)
    if not images.dtype.is_floating_point:
        mosaics = (mosaics + 0.5).floor().clamp(0, 255)
    return mosaics.to(images.dtype)


def crop_batch(
    images: Tensor,
    boxes: Tensor,
    source: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    height: int,
    width: int,
    padded_height: int,
    padded_width: int,
    dtype: torch.dtype,
) -> Tensor:
    """crop_resize, normalised, in the middle of zeros, in `dtype` and channels last."""
    compute = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32
    pixels = images if images.dtype == torch.uint8 else images.to(compute)
    tiles = normalise(crop_resize(pixels, boxes, source, height, width, 1), mean, std, compute)
    batch = torch.empty(
        (boxes.shape[0], images.shape[1], padded_height, padded_width),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last,
    ).zero_()
    top, left = (padded_height - height) // 2, (padded_width - width) // 2
    batch[:, :, top : top + height, left : left + width] = tiles
    return batch


def crop_resize_backward(
    grad_output: Tensor,
    boxes: Tensor,
    source: Tensor,
    images: int,
    image_height: int,
    image_width: int,
    factor: int,
) -> Tensor:
    """Transpose of `crop_resize`, which is linear in its images: [images, C, image_height, image_width]."""
    dtype = accumulation_dtype(grad_output.dtype)
    count, channels, height, width = grad_output.shape
    height, width = height // factor, width // factor
    grid = grad_output.reshape(count, channels, factor, height, factor, width).permute(0, 2, 4, 1, 3, 5)
    tiles = grid.reshape(boxes.shape[0], channels, height, width).to(dtype)
    grad_images = grad_output.new_zeros((images, channels, image_height, image_width), dtype=dtype)
    for tile, (x0, y0, x1, y1), b in zip(tiles, boxes.tolist(), source.tolist(), strict=True):
        vertical = triangle_filter(y0, y1, height, dtype, grad_output.device)
        horizontal = triangle_filter(x0, x1, width, dtype, grad_output.device)
        rows, columns = slice(math.floor(y0), math.ceil(y1)), slice(math.floor(x0), math.ceil(x1))
        grad_images[b, :, rows, columns] += vertical.T @ tile @ horizontal
    return grad_images.to(grad_output.dtype)


def grad_sq_norm_linear(input: Tensor, grad_output: Tensor, bias: bool) -> Tensor:
    """Squared norm, per sample, of the gradient of a linear layer's weight [O, I] (and bias [O])."""
    dtype = accumulation_dtype(input.dtype)
    norms = input.new_zeros(input.shape[0], dtype=dtype)
    for b, (x, g) in enumerate(zip(input, grad_output, strict=True)):
        positions = x.shape[:-1].numel()
        x, g = (t.reshape(positions, t.shape[-1]).to(dtype) for t in (x, g))
        norms[b] = (g.T @ x).square().sum()
        if bias:
            norms[b] += g.sum(0).square().sum()
    return norms


def grad_sq_norm_conv2d(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> Tensor:
    """Squared norm, per sample, of the gradient of a convolution's weight [O, C / groups, kh, kw] (and bias
    [O])."""
    dtype = accumulation_dtype(input.dtype)
    norms = input.new_zeros(input.shape[0], dtype=dtype)
    for b in range(input.shape[0]):
        columns = functional.unfold(
            input[b : b + 1].to(dtype), tuple(kernel_size), tuple(dilation), tuple(padding), tuple(stride)
        )
        g = grad_output[b].to(dtype).flatten(1)  # [O, L]
        columns = columns.reshape(groups, -1, columns.shape[-1])  # [groups, C / groups * kh * kw, L]
        norms[b] = (g.reshape(groups, -1, g.shape[-1]) @ columns.mT).square().sum()
        if bias:
            norms[b] += g.sum(1).square().sum()
    return norms


def grad_sq_norm_norm(
    normalized: Tensor, grad_output: Tensor, first_dim: int, last_dim: int, weight: bool, bias: bool
) -> Tensor:
    """Squared norm, per sample, of the gradient of a normalisation's affine parameters over dims
    first..last."""
    dtype = accumulation_dtype(normalized.dtype)
    x, g = normalized.to(dtype), grad_output.to(dtype)
    summed = [d for d in range(1, x.ndim) if not first_dim <= d <= last_dim]
    norms = x.new_zeros(x.shape[0])
    for present, gradient in ((weight, x * g), (bias, g)):
        if present:
            gradient = gradient.sum(summed) if summed else gradient
            norms += gradient.flatten(1).square().sum(1)
    return norms


def grad_sq_norm_embedding(indices: Tensor, grad_output: Tensor, padding_idx: int) -> Tensor:
    """Squared norm, per sample, of the gradient of an embedding table; padding_idx < 0 is none."""
    dtype = accumulation_dtype(grad_output.dtype)
    norms = grad_output.new_zeros(indices.shape[0], dtype=dtype)
    for b, (index, g) in enumerate(zip(indices, grad_output, strict=True)):
        index, g = index.reshape(-1), g.reshape(-1, grad_output.shape[-1]).to(dtype)
        rows, position = index.unique(return_inverse=True)
        gradient = g.new_zeros((rows.numel(), g.shape[1])).index_add_(0, position, g)
        norms[b] = gradient[rows != padding_idx].square().sum()
    return norms


# --- assemble_masked_features -------------------------------------------------------------------------------


def assemble_masked_features(variants: Tensor, coalitions: Tensor, table: Tensor) -> Tensor:
    """For every coalition and location, the variant that agrees with the coalition on what is seen there."""
    batch, _, channels, height, width = variants.shape
    count = coalitions.shape[-2]
    which = variant_at_location(coalitions, table)  # [(B,) K, H, W]
    which = which.expand(batch, count, height, width).unsqueeze(2)
    assembled = torch.empty(
        (batch * count, channels, height, width),
        dtype=variants.dtype,
        device=variants.device,
        memory_format=torch.channels_last,
    )
    picked = variants.gather(1, which.expand(batch, count, channels, height, width))
    assembled.unflatten(0, (batch, count)).copy_(picked)
    return assembled


def variant_at_location(coalitions: Tensor, table: Tensor) -> Tensor:
    """int64 [(B,) K, H, W]: the bits of the players that table [H, W, M] names, -1 counting as absent."""
    present = coalitions[..., table.long().clamp(min=0)] & (table >= 0)  # [(B,) K, H, W, M]
    weight = 2 ** torch.arange(table.shape[-1], device=table.device)
    return (present * weight).sum(-1)


# --- normalization_backward
# -----------------------------------------------------------------------------------


def normalization_backward(
    input: Tensor,
    grad_output: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    weight_norm: bool,
    bias_norm: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient at the input of a normalisation, and the squared norm per sample of its parameters' gradient."""
    dtype = accumulation_dtype(grad_output.dtype)
    of_sample = mean.ndim == 2  # [B, groups]
    groups = mean.shape[1] if of_sample else input.shape[1]
    x, g = (t.to(dtype)[..., None].flatten(2).unflatten(1, (groups, -1)) for t in (input, grad_output))
    centre, scale = (
        s.to(dtype)[(..., None, None)] for s in (mean, rstd)
    )  # x and g are [B, groups, C', positions]
    normalized = (x - centre) * scale
    factor = 1 if weight is None else weight.to(dtype).unflatten(0, (groups, -1))[..., None]
    norms = input.new_zeros(input.shape[0], dtype=dtype)
    for wanted, gradient in ((weight_norm, normalized * g), (bias_norm, g)):
        if wanted:
            norms += gradient.sum(3).square().sum((1, 2))
    grad_input = factor * g
    if of_sample and x.numel() > 0:
        slope = (grad_input * normalized).mean((2, 3), keepdim=True)
        grad_input = grad_input - grad_input.mean((2, 3), keepdim=True) - slope * normalized
    grad_input = (grad_input * scale).reshape(input.shape)
    last = input.ndim == 4 and not input.is_contiguous()
    last = last and input.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return grad_input.to(grad_output.dtype).contiguous(memory_format=layout), norms


# --- class_kl -----------------------------------------------------------------------------------------------


def class_kl(features: Tensor, members: Tensor, counts: Tensor, by_class: bool) -> tuple[Tensor, Tensor]:
    """The mean divergence of rows from their class's mean, and its gradient at the features."""
    divergence, gradient = class_kl_terms(features, members, counts, by_class)
    return divergence, gradient.to(features.dtype)


def class_kl_terms(
    features: Tensor, members: Tensor, counts: Tensor, by_class: bool
) -> tuple[Tensor, Tensor]:
    """The same in the dtype of sums, in operations that can be differentiated."""
    logits = features.to(accumulation_dtype(features.dtype))
    log_p = logits.log_softmax(1)
    index = members[:, None].expand_as(log_p)
    # The logarithm of the class's mean probability, from logarithms: a probability below the smallest float counts.
    lowest = torch.finfo(logits.dtype).min
    top = torch.full((len(counts), logits.shape[1]), lowest, dtype=logits.dtype, device=logits.device)
    top = top.scatter_reduce(0, index, log_p.detach(), "amax")
    sums = torch.zeros_like(top).scatter_add(0, index, (log_p - top[members]).exp())
    log_q = top + sums.log() - counts.to(logits.dtype)[:, None].log()
    p, excess = log_p.exp(), (log_p - log_q[members]).masked_fill(log_p == -torch.inf, 0)
    divergences = (p * excess).sum(1)
    rows = counts.to(logits.dtype)[members] * (counts > 0).sum() if by_class else len(members)
    weights = torch.ones_like(divergences) / rows
    return (divergences * weights).sum(), p * (excess - divergences[:, None]) * weights[:, None]


# --- add_bias_relu_ -----------------------------------------------------------------------------------------


def add_bias_relu_(x: Tensor, bias: Tensor | None, other: Tensor | None, relu: bool) -> None:
    """relu(x + bias + other), written over x; rounded once."""
    value = x.to(accumulation_dtype(x.dtype), copy=True)
    if bias is not None:
        value += bias[:, None, None]
    if other is not None:
        value += other
    x.copy_(value.relu_() if relu else value)
