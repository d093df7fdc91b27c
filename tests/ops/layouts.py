"""Arguments of every op, and the same tensors laid out in memory in other ways."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddfast.ops import normal_quantiles, reference
from tests.ops.augmented import rows_of
from tests.ops.boxes import random_boxes

BOXES = (7, 2, 3, [1, 2], 3, True, 0.5, 20, 30, [6, 10], [7, 12], 0.5)

# Values that an op may not be given: boxes without an extent, tiles that differ where maps promise to share them.
_IMPOSSIBLE = {
    # Counts are those of the members; mean, deviation and convolution are those of what goes with them.
    *(
        (op, place, f"{what} expanded")
        for op, places in (
            ("class_kl", (1, 2)),
            ("convnet_block_backward", range(1, 9)),
            ("convnet_block_batch_norm_backward", range(1, 9)),
        )
        for place in places
        for what in (*(f"dimension {dim}" for dim in range(4)), "one number")
    ),
    *(
        (op, 1, f"{what} expanded")
        for op in ("crop_resize", "crop_resize_backward", "crop_batch")
        for what in ("dimension 1", "one number")
    ),
}


def arguments(op: str) -> tuple:
    """Arguments of the op `ddfast::<op>`, every tensor that it may take among them, contiguous."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def below(limit: int, *shape: int) -> Tensor:
        return torch.randint(0, limit, shape, generator=generator)

    coalitions = normal(2, 5, 6) < 0.3
    image_boxes = random_boxes(4, 8, 11, whole_pixels=False, least=3)
    outputs, labels, projection = normal(3, 5, 7), below(7, 3), normal(3, 5, 6)
    ids, quantiles = below(2**40, 3), normal_quantiles()
    mean, std = normal(3), normal(3).abs() + 0.5
    if op == "masked_batch":
        return normal(2, 3, 8, 9), coalitions, normal(2, 3, 8, 9), mean, std, 2, 3, torch.float32
    if op == "shapley_heatmap":
        return outputs, labels, projection, "prob"
    if op == "noisy_crop_boxes":
        return normal(3, 6), ids, quantiles, *BOXES
    if op == "shapley_crop_boxes":
        return outputs, labels, projection, normal(3, 6).double(), "logit", ids, quantiles, *BOXES
    if op == "assemble_masked_features":
        return normal(2, 4, 3, 5, 4), coalitions, below(7, 5, 4, 2).int() - 1
    if op == "crop_resize":
        return normal(3, 2, 8, 11), image_boxes, below(3, 4), 5, 7, 2
    if op == "crop_resize_backward":
        return normal(1, 2, 10, 14), image_boxes, below(3, 4), 3, 8, 11, 2
    if op == "crop_batch":
        return normal(3, 3, 8, 11), image_boxes, below(3, 4), mean, std, 5, 7, 9, 8, torch.float32
    if op == "grad_sq_norm_linear":
        return normal(2, 3, 4, 5), normal(2, 3, 4, 6), True
    if op == "grad_sq_norm_conv2d":
        return normal(2, 4, 6, 7), normal(2, 6, 6, 7), [3, 3], [1, 1], [1, 1], [1, 1], 2, True
    if op == "grad_sq_norm_norm":
        return normal(2, 6, 4, 5), normal(2, 6, 4, 5), 1, 1, True, True
    if op == "grad_sq_norm_embedding":
        return below(4, 2, 5), normal(2, 5, 6), 1
    if op == "add_bias_relu_":
        return normal(2, 3, 4, 5), normal(3), normal(2, 3, 4, 5), True
    if op == "normalization_backward":
        return normal(2, 6, 4, 5), normal(2, 6, 4, 5), normal(2, 3), normal(2, 3), normal(6), True, True
    if op == "winograd_conv2d":
        weight, sets, reads = normal(16, 1, 64, 32), below(4, 2, 2), below(4, 6)
        image = normal(2, 1, 64, 4, 5).expand(2, 2, 64, 4, 5).reshape(4, 64, 4, 5)
        return image, weight, normal(32), image[:, :32].contiguous(), True, sets, reads
    if op == "class_kl":
        return normal(5, 6), torch.tensor([0, 1, 0, 1, 1]), torch.tensor([2, 3]), True
    if op.startswith("siamese_augment"):
        rows = rows_of("everything", 2, (5, 6)).float()
        return (normal(4, 3, 5, 6), rows, *([] if op.endswith("_backward") else [False]))
    if op == "convnet_block":
        return normal(2, 5, 4, 6), normal(7, 5, 3, 3), normal(7), normal(7), normal(7), 1e-5, True
    if op == "convnet_block_backward":
        image, weight, bias = normal(2, 5, 4, 6), normal(7, 5, 3, 3), normal(7)
        affine = normal(7), normal(7)
        _, mean, rstd, conv = reference.convnet_block(image, weight, bias, *affine, 1e-5, True)
        given = (normal(2, 7, 2, 3), image, weight, bias, *affine, mean, rstd, conv.contiguous())
        return *given, 1e-5, True, True
    if op == "convnet_block_batch_norm":
        return normal(2, 5, 4, 6), normal(7, 5, 3, 3), normal(7), normal(7), normal(7), 1e-5
    if op == "convnet_block_batch_norm_eval":
        return *arguments("convnet_block_batch_norm")[:5], normal(7), normal(7).abs(), 1e-5
    if op == "convnet_block_batch_norm_backward":
        image, weight, bias = normal(2, 5, 4, 6), normal(7, 5, 3, 3), normal(7)
        affine = normal(7), normal(7)
        _, mean, variance, conv = reference.convnet_block_batch_norm(image, weight, bias, *affine, 1e-5)
        given = (normal(2, 7, 2, 3), image, weight, bias, *affine, mean, variance, conv.contiguous())
        return *given, 1e-5, True, True
    if op == "convnet_block_curvature":
        conv = normal(2, 7, 4, 6)
        mean, rstd = conv.mean((2, 3)), conv.var((2, 3), correction=0).add(1e-5).rsqrt()
        affine, given = (normal(7), normal(7)), (normal(7), normal(7))
        return normal(2, 7, 2, 3), conv, normal(2, 7, 4, 6), *affine, mean, rstd, *given
    raise ValueError(f"no arguments for the op {op}")


def others(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor in other layouts, each with its name; those that are expanded hold other values."""
    yield "every second element", torch.stack((tensor, torch.zeros_like(tensor)), -1)[..., 0]
    yield (
        "dimensions reversed",
        tensor.permute(*range(tensor.ndim)[::-1]).contiguous().permute(*range(tensor.ndim)[::-1]),
    )
    if tensor.ndim > 1:
        yield "last two transposed", tensor.mT.contiguous().mT
        yield "first two transposed", tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if tensor.ndim == 4:
        yield "channels last", tensor.contiguous(memory_format=torch.channels_last)
    yield "off the alignment", torch.cat((tensor.flatten()[:1], tensor.flatten()))[1:].view(tensor.shape)
    for dim in range(tensor.ndim):
        one = tensor.narrow(dim, 0, 1)
        yield f"dimension {dim} expanded", one.expand(tensor.shape)
    single = tensor.flatten()[0]
    yield "one number expanded", single.expand(tensor.shape)


def variants(op: str) -> Iterator[tuple[str, tuple]]:
    """The op's arguments with one tensor at a time in each other layout, and what is changed, in words."""
    given = arguments(op)
    for place, argument in enumerate(given):
        if isinstance(argument, Tensor):
            for name, tensor in others(argument):
                if (op, place, name) in _IMPOSSIBLE:
                    continue
                yield f"argument {place}, {name}", (*given[:place], tensor, *given[place + 1 :])


def together(op: str) -> Iterator[tuple[str, tuple]]:
    """The op's arguments with all tensors in another layout at once, and which, in words."""
    given = arguments(op)
    tensors = [dict(others(argument)) if isinstance(argument, Tensor) else None for argument in given]
    for name in ("every second element", "dimensions reversed"):
        yield name, tuple(a if t is None else t[name] for a, t in zip(given, tensors, strict=True))


def contiguous(given: tuple) -> tuple:
    """The same arguments, every tensor contiguous."""
    return tuple(
        a.clone(memory_format=torch.contiguous_format) if isinstance(a, Tensor) else a for a in given
    )
