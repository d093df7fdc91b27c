"""Grad-CAM averaged over the cells of a grid, to stand beside Shapley values (InfoUtil, Table 8)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.attribution.engine import DEFAULT_CHUNK_SIZE, Channels, compute_dtype
from ddfast.attribution.validation import (
    as_tensors,
    check_chunk_size,
    check_finite,
    check_grid,
    check_images,
    check_labels,
    check_scores,
)
from ddfast.masked_forward.forward import check_model
from ddfast.ops import masked_batch
from ddfast.ops.layouts import called
from ddfast.ops.transfer import to_device
from ddfast.random_states import RandomStates


def grad_cam(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    layer: str | nn.Module | None = None,
    grid: int | tuple[int, int] = 4,
    *,
    relu: bool = True,
    mean: Channels = None,
    std: Channels = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Grad-CAM of the label's logit (Selvaraju et al., 2020), averaged over grid cells in the place of phi.

    Captum's `LayerGradCam` gives the map at the layer's resolution; it is enlarged to the image's size
    (bilinear) and averaged over each cell. Unlike Shapley values the cells do not sum to any change of the
    model's output.

    Args:
        model: module in eval mode from images [n, C, H, W] to class scores [n, classes].
        images: uint8 or float [B, C, H, W]. uint8 is scaled to [0, 1] first.
        labels: int64 [B], the class whose logit is explained.
        layer: module, or its dotted name, whose output [n, channels, h, w] is weighted; None is the last
            Conv2d.
        grid: cells per side, or (rows, columns).
        relu: keep only what speaks for the class, as the paper does. False keeps the sign.
        mean: channel means [C] to subtract; None leaves float images as they are.
        std: channel deviations [C] to divide by.
        chunk_size: images in one pass, 128 by default.

    Returns:
        float32 [B, d], cells in row-major order.

    Raises:
        ImportError: Captum is not installed.
        ValueError: arguments that do not fit, a model in training mode or without such a layer, or NaN or
            infinity from the model.
    """
    cells, bad = unread_grad_cam(
        model, images, labels, layer, grid, relu=relu, mean=mean, std=std, chunk_size=chunk_size
    )
    check_finite(int(bad), len(cells), "images")
    return cells


@torch.inference_mode(False)
def unread_grad_cam(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    layer: str | nn.Module | None = None,
    grid: int | tuple[int, int] = 4,
    *,
    relu: bool = True,
    mean: Channels = None,
    std: Channels = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`grad_cam` that waits for nothing on a GPU where labels are on the host, and the number of images that got NaN
    or infinity.

    Who reads that number, int64 on the device, has to refuse the rest where it is not 0.
    """
    try:
        from captum.attr import LayerGradCam
    except ImportError as error:
        raise ImportError(
            "grad_cam needs captum, which is not installed: pip install 'ddfast[bench]'"
        ) from error

    images, labels = as_tensors(images, labels)
    check_images(images, labels)
    check_model(model, images)
    rows, cols = check_grid(grid, images)
    chunk = check_chunk_size(DEFAULT_CHUNK_SIZE if chunk_size is None else chunk_size)
    # A copy, as what was made in inference mode is no part of a gradient's graph.
    targets = to_device(labels, images.device).clone()
    target = targets  # of the part that is under way
    not_finite = torch.zeros((), dtype=torch.int64, device=images.device)

    def checked_scores(inputs: Tensor) -> Tensor:
        scores = called(model, inputs.clone())  # it may write to what it is given
        check_scores(scores, len(inputs))
        check_labels(labels, scores.shape[1])
        not_finite.add_((~scores.isfinite()).any(dim=1).sum())
        return scores.gather(1, target[:, None])[:, 0]  # Captum would read the label of a single image

    explained = _find_layer(model, layer)
    if any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
        # Made in inference mode, they are no part of a gradient's graph; their copies are.
        place = [module is explained for module in model.modules()].index(True)
        model = copy.deepcopy(model)
        explained = list(model.modules())[place]
    cam = LayerGradCam(checked_scores, explained)
    everything_present = torch.ones(1, 1, dtype=torch.bool, device=images.device)
    average_rows = to_device(_cell_average(images.shape[2], rows), images.device)
    average_cols = to_device(_cell_average(images.shape[3], cols), images.device)

    cells = [torch.empty(0, rows * cols, dtype=torch.float32, device=images.device)]
    states = RandomStates()
    try:
        for part, of_part in zip(images.split(chunk), targets.split(chunk), strict=True):
            if not len(part):
                continue
            target = of_part  # which `checked_scores` reads
            with torch.no_grad():
                inputs = masked_batch(
                    part, everything_present, grid=1, mean=mean, std=std, dtype=compute_dtype(model, images)
                )
            # Captum differentiates with respect to the layer's output, which also needs a graph where weights are
            # frozen.
            with torch.enable_grad():
                heat = cam.attribute(inputs.detach().requires_grad_(), relu_attributions=relu)
            heat = F.interpolate(
                heat.detach().float(), size=images.shape[2:], mode="bilinear", align_corners=False
            )
            cells.append((average_rows @ heat[:, 0] @ average_cols.mT).flatten(1))
    finally:
        states.restore()
    return torch.cat(cells), not_finite


def _find_layer(model: nn.Module, layer: str | nn.Module | None) -> nn.Module:
    """The module that `layer` names; None is the last Conv2d in the order of registration."""
    if isinstance(layer, nn.Module):
        if all(layer is not module for module in model.modules()):
            raise ValueError("layer must be a module of the model, got one that is not part of it")
        return layer
    if isinstance(layer, str):
        modules = dict(model.named_modules())
        if layer not in modules:
            raise ValueError(
                f"layer must name a module of the model, got {layer!r}; see model.named_modules()"
            )
        return modules[layer]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise ValueError(
            "the model has no Conv2d: give the layer whose output [n, channels, h, w] is to be weighted"
        )
    return convolutions[-1]


def _cell_average(size: int, cells: int) -> Tensor:
    """Matrix float32 [cells, size] that averages pixels over cells, which end at floor(i * size / cells)."""
    ends = torch.arange(cells + 1) * size // cells
    pixel = torch.arange(size)
    inside = (pixel >= ends[:-1, None]) & (pixel < ends[1:, None])
    return inside.float() / inside.sum(dim=1, keepdim=True).float()
