"""Pure PyTorch references of every op: the only other implementation, correct on any device and in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- crop_resize and grad_sq_norm_* -----------------------------------------------------------------------------------


def triangle_filter(start: float, stop: float, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights [size, ceil(stop) - floor(start)] that resize the interval [start, stop) of a line of pixels to `size`.

    Antialiased linear interpolation as torch has it: output i sits at start + scale * (i + 1/2) with
    scale = (stop - start) / size, pixel j weighs max(0, 1 - |j + 1/2 - centre| / max(scale, 1)), and the weights of the
    pixels floor(start) .. ceil(stop) - 1, the only ones that exist for the crop, are divided by their sum.
    """
    first, last = math.floor(start), math.ceil(stop)
    scale = torch.tensor(stop - start, dtype=dtype, device=device) / size
    centre = (start - first) + scale * (torch.arange(size, dtype=dtype, device=device) + 0.5)
    pixel = torch.arange(last - first, dtype=dtype, device=device) + 0.5
    weights = (1 - (pixel - centre[:, None]).abs() / scale.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def crop_resize(images: Tensor, boxes: Tensor, source: Tensor, height: int, width: int, factor: int) -> Tensor:
    """Cut box m out of images[source[m]], resize each crop alone and lay factor x factor tiles into each mosaic."""
    dtype = accumulation_dtype(images.dtype)
    tiles = images.new_empty((boxes.shape[0], images.shape[1], height, width), dtype=dtype)
    for m, ((x0, y0, x1, y1), b) in enumerate(zip(boxes.tolist(), source.tolist(), strict=True)):
        crop = images[b, :, math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)].to(dtype)
        vertical = triangle_filter(y0, y1, height, dtype, images.device)
        horizontal = triangle_filter(x0, x1, width, dtype, images.device)
        tiles[m] = vertical @ crop @ horizontal.T
    grid = tiles.reshape(-1, factor, factor, *tiles.shape[1:])  # [N, tile row, tile column, C, height, width]
    mosaics = grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, images.shape[1], factor * height, factor * width)
    if not images.dtype.is_floating_point:
        mosaics = (mosaics + 0.5).floor().clamp(0, 255)
    return mosaics.to(images.dtype)


def crop_resize_backward(
    grad_output: Tensor, boxes: Tensor, source: Tensor, images: int, image_height: int, image_width: int, factor: int
) -> Tensor:
    """Transpose of `crop_resize`, which is linear in its images: [images, C, image_height, image_width]."""
    dtype = accumulation_dtype(grad_output.dtype)
    mosaics, channels, height, width = grad_output.shape
    height, width = height // factor, width // factor
    grid = grad_output.reshape(mosaics, channels, factor, height, factor, width).permute(0, 2, 4, 1, 3, 5)
    tiles = grid.reshape(-1, channels, height, width).to(dtype)
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
        x, g = x.reshape(-1, input.shape[-1]).to(dtype), g.reshape(-1, grad_output.shape[-1]).to(dtype)
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
    """Squared norm, per sample, of the gradient of a convolution's weight [O, C / groups, kh, kw] (and bias [O])."""
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
    """Squared norm, per sample, of the gradient of a normalisation's affine parameters over dims first..last."""
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
