"""Every fused op on inputs of a representative size, beside the same maths in plain PyTorch.

One list serves the speed entry `ops`, the pytest-benchmark entries and the rooflines of `bench.gpu`. What an op must
move and compute at the least stands with it: `bytes` counts every input once and every output once, `operations` those
of its matrix product, 0 where it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bench.speed.attribution import player_map
from bench.speed.augmentation import plain as plain_augment
from bench.speed.registry import Check, Contender, Contest, Measurable, Settings, relative_error, speed_entry
from bench.speed.subjects import IMAGENET_MEAN, IMAGENET_STD
from ddfast import ops
from ddfast.training.differentiable import draw

Bodies = Callable[[], Tensor]

_CROPS = 640  # of a GPU's micro-batch of 128 sources


@dataclass(frozen=True)
class OpCase:
    """One op on given inputs.

    Attributes:
        op: name in `ddfast.ops`.
        case: the inputs, in words.
        ours, plain: the fused op and the plain version, without arguments.
        check: the error between the two and what it may be.
        bytes: read and written at the least.
        operations: multiplications and additions of the matrix product; 0 where the op has none.
        matrix: dtype whose matrix units the product runs on, "float32" being three TF32 products.
        binds: what limits the op on a GPU, from the kernel's docstring: "bytes", "operations" or "latency".
        peer: what the plain version is.
    """

    op: str
    case: str
    ours: Bodies
    plain: Bodies
    check: Callable[[], list[Check]]
    bytes: int
    operations: int = 0
    matrix: str = "float32"
    binds: str = "bytes"
    peer: str = "plain PyTorch"

    @property
    def name(self) -> str:
        """Op and case."""
        return f"{self.op}, {self.case}"


def op_cases(settings: Settings) -> Iterator[OpCase]:
    """All cases, one after another, so that the inputs of one are freed before the next are made."""
    for dtype in (torch.float32, torch.bfloat16):
        yield _masked_batch(settings, dtype)
    yield _assemble_masked_features(settings)
    yield _winograd_conv2d(settings)
    yield _add_bias_relu(settings)
    yield _shapley_heatmap(settings, "logit")
    yield _shapley_heatmap(settings, "prob")
    yield _noisy_crop_boxes(settings)
    yield _shapley_crop_boxes(settings)
    yield _crop_resize(settings, torch.uint8)
    yield _crop_resize(settings, torch.float32)
    yield _crop_batch(settings)
    yield _linear(settings)
    for channels, side in ((64, 28), (256, 7)):
        yield _conv2d(settings, channels, side)
    yield _norm(settings)
    yield _normalization_backward(settings)
    yield _embedding(settings)
    for inputs, side in ((3, 32), (128, 16)):
        for norm in ("instance", "batch"):
            yield _convnet_block(settings, inputs, side, norm, backward=False)
            yield _convnet_block(settings, inputs, side, norm, backward=True)
        yield _convnet_block_curvature(settings, side)
        yield _convnet_block(settings, inputs, side, "given", backward=False)
    yield _class_kl(settings)
    for backward in (False, True):
        yield _siamese_augment(settings, backward=backward)


@speed_entry("ops", what="every fused op against the same maths in plain PyTorch", minutes=1)
def fused_ops(settings: Settings) -> Iterator[Measurable]:
    """One contest an op. None has a target of its own: what counts is their share of a pass, see `score_pass`."""
    for case in op_cases(settings):
        yield Contest(
            case.name,
            ours=[Contender("float32" if "bfloat16" not in case.case else "bfloat16", case.ours)],
            peer=Contender(case.peer, case.plain),
            gate=case.check,
        )


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _generator(settings: Settings) -> torch.Generator:
    return torch.Generator(settings.device).manual_seed(0)


def _pixels(settings: Settings, count: int, size: int) -> Tensor:
    generator = _generator(settings)
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator, device=settings.device
    )


def _normal(settings: Settings, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=_generator(settings), device=settings.device).to(dtype)


def _close(ours: Bodies, plain: Bodies, what: str, allowed: float) -> list[Check]:
    return [Check(what, relative_error(ours(), plain()), allowed)]


# Attribution
# -----------------------------------------------------------------------------------------------------


def _masked_batch(settings: Settings, dtype: torch.dtype) -> OpCase:
    count, coalitions, size = settings.size((4, 32, 224), quick=(1, 4, 32), gpu=(64, 64, 224))
    images = _pixels(settings, count, size)
    masks = torch.rand(coalitions, 16, generator=_generator(settings), device=settings.device) < 0.5
    mean, std = _statistics(settings)
    players = player_map(4, 4, size, size).to(settings.device)

    def plain() -> Tensor:
        pixels = (images.float() / 255 - mean[:, None, None]) / std[:, None, None]
        masked = torch.where(masks[:, players][:, None], pixels[:, None], 0.0).flatten(0, 1)
        return masked.to(dtype, memory_format=torch.channels_last)

    ours = partial(ops.masked_batch, images, masks, grid=4, mean=mean, std=std, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    return OpCase(
        "masked_batch",
        f"{count} x {coalitions} masks of {size} px to {name}",
        ours,
        plain,
        lambda: _close(ours, plain, "pixels", 1e-6 if dtype == torch.float32 else 1e-2),
        bytes=_bytes(images) + images.numel() * coalitions * dtype.itemsize,
    )


def _statistics(settings: Settings) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(IMAGENET_MEAN, device=settings.device),
        torch.tensor(IMAGENET_STD, device=settings.device),
    )


def _winograd_conv2d(settings: Settings) -> OpCase:
    count, channels, side = settings.size((8, 64, 56), quick=(2, 32, 4), gpu=(128, 64, 56))
    x, other = (
        _normal(settings, count, channels, side, side).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight, bias = (
        _normal(settings, channels, channels, 3, 3) / (9 * channels) ** 0.5,
        _normal(settings, channels),
    )
    ours = partial(ops.winograd_conv2d, x, ops.winograd_weight(weight), bias, other, relu=True)
    last = weight.contiguous(memory_format=torch.channels_last)

    def plain() -> Tensor:
        return (functional.conv2d(x, last, bias, padding=1) + other).relu()

    return OpCase(
        "winograd_conv2d",
        f"{count} x {channels} channels of {side} px",
        ours,
        plain,
        lambda: _close(ours, plain, "features", 1e-5),
        bytes=3 * _bytes(x),
        operations=2 * 16 * count * (side // 2) ** 2 * channels**2,
        binds="operations",
    )


def _add_bias_relu(settings: Settings) -> OpCase:
    """In place: each call goes on from what the last one left, whose numbers stay finite."""
    count, channels, side = settings.size((32, 64, 56), quick=(2, 8, 4), gpu=(1024, 64, 56))
    x, other = (
        _normal(settings, count, channels, side, side).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    bias = _normal(settings, channels)
    kept = x.clone()

    def ours() -> Tensor:
        return ops.add_bias_relu_(x, bias, other)

    def plain() -> Tensor:
        return x.add_(bias[:, None, None]).add_(other).relu_()

    def check() -> list[Check]:
        found = ops.add_bias_relu_(kept.clone(), bias, other)
        wanted = kept.clone().add_(bias[:, None, None]).add_(other).relu_()
        return [Check("sums", relative_error(found, wanted), 1e-6)]

    return OpCase(
        "add_bias_relu_",
        f"{count} x {channels} channels of {side} px",
        ours,
        plain,
        check,
        bytes=_bytes(x, x, other),
    )


def _assemble_masked_features(settings: Settings) -> OpCase:
    count, coalitions, channels, side = settings.size(
        (4, 31, 64, 56), quick=(1, 4, 8, 8), gpu=(32, 62, 128, 28)
    )
    dtype = torch.float32 if settings.device.type == "cpu" else torch.bfloat16
    variants = _normal(settings, count * 16, channels, side, side, dtype=dtype)
    variants = variants.contiguous(memory_format=torch.channels_last).unflatten(0, (count, 16))
    masks = torch.rand(coalitions, 16, generator=_generator(settings), device=settings.device) < 0.5
    # A location sees the player of its cell and, beside a border, that of the next one: one of each parity class.
    own = player_map(4, 4, side, side)
    rows, cols = own // 4, own % 4
    table = torch.stack(
        [torch.where((rows % 2 == r) & (cols % 2 == c), own, -1) for r in (0, 1) for c in (0, 1)], -1
    )
    table = table.int().to(settings.device)

    def plain() -> Tensor:
        seen = masks[:, table.clamp(min=0)] & (table >= 0)  # [K, H, W, M]
        variant = (seen << torch.arange(4, device=settings.device)).sum(-1)
        index = variant[None, :, None].expand(count, -1, channels, -1, -1)
        gathered = variants.gather(1, index).flatten(0, 1)
        return gathered.contiguous(memory_format=torch.channels_last)

    ours = partial(ops.assemble_masked_features, variants, masks, table)
    return OpCase(
        "assemble_masked_features",
        f"{count} x {coalitions} maps of {channels} channels of {side} px",
        ours,
        plain,
        lambda: _close(ours, plain, "features", 0.0),
        bytes=_bytes(variants) + count * coalitions * channels * side**2 * dtype.itemsize,
    )


def _shapley_heatmap(settings: Settings, value: str) -> OpCase:
    count, coalitions, classes = settings.size((64, 32, 1000), quick=(4, 8, 10), gpu=(8192, 32, 1000))
    outputs = _normal(settings, count, coalitions, classes)
    labels = torch.arange(count, device=settings.device) % classes
    projection = _normal(settings, coalitions, 16)

    def plain() -> Tensor:
        scores = outputs.softmax(-1) if value == "prob" else outputs
        values = scores.gather(-1, labels[:, None, None].expand(-1, coalitions, 1)).squeeze(-1)
        return values @ projection

    ours = partial(ops.shapley_heatmap, outputs, labels, projection, value=value)
    read = _bytes(outputs) if value == "prob" else count * coalitions * 32  # a sector for each logit
    return OpCase(
        "shapley_heatmap",
        f"{value}, {count} x {coalitions} x {classes}",
        ours,
        plain,
        lambda: _close(ours, plain, "phi", 1e-5),
        bytes=read + _bytes(labels, projection) + count * 16 * 4,
        binds="bytes" if value == "prob" else "latency",
    )


def _windows_and_ids(settings: Settings, count: int) -> tuple[Tensor, Tensor]:
    return _normal(settings, count, 16), torch.arange(count, device=settings.device) * 2**33 + 5


def _plain_boxes(phi: Tensor, crops: int) -> Tensor:
    """Boxes of 112 px in 224 px by pooling, noise and argmax; the noise is torch's, the last crop has none."""
    pooled = functional.avg_pool2d(phi.view(-1, 1, 4, 4), 2, stride=1).flatten(1)
    noise = torch.randn(len(phi), crops, 9, device=phi.device)
    noise[:, -1] = 0
    best = (pooled[:, None] + 2.0 * pooled.std(1, correction=0)[:, None, None] * noise).argmax(-1)
    corner = torch.stack((best % 3, best // 3), dim=-1) * 56
    return torch.cat((corner, corner + 112), dim=-1).int()


def _same_clean_boxes(ours: Callable[[], Tensor], plain: Bodies) -> list[Check]:
    """Noise differs by design (counter-based here, a stream there), so the crops without noise are compared."""
    found, wanted = ours()[:, -1], plain()[:, -1]
    return [Check("share of clean crops that differ", float((found != wanted).any(-1).float().mean()), 1e-3)]


def _noisy_crop_boxes(settings: Settings) -> OpCase:
    count = settings.size(1024, quick=16, gpu=1 << 20)
    phi, ids = _windows_and_ids(settings, count)
    ours = partial(
        ops.noisy_crop_boxes, phi, ids, seed=7, grid=4, image_size=224, crop_size=112, pool=2, crops=5
    )
    plain = partial(_plain_boxes, phi, 5)
    return OpCase(
        "noisy_crop_boxes",
        f"{count} heatmaps, 5 crops",
        ours,
        plain,
        lambda: _same_clean_boxes(ours, plain),
        bytes=_bytes(phi, ids) + count * 5 * 16,
        binds="latency",
    )


def _shapley_crop_boxes(settings: Settings) -> OpCase:
    count, coalitions, classes = settings.size((64, 32, 1000), quick=(4, 8, 10), gpu=(8192, 32, 1000))
    outputs = _normal(settings, count, coalitions, classes)
    labels = torch.arange(count, device=settings.device) % classes
    projection = _normal(settings, coalitions, 16)
    _, ids = _windows_and_ids(settings, count)
    fused = partial(
        ops.shapley_crop_boxes,
        outputs,
        labels,
        projection,
        ids,
        seed=7,
        grid=4,
        image_size=224,
        crop_size=112,
    )

    def plain() -> Tensor:
        values = outputs.gather(-1, labels[:, None, None].expand(-1, coalitions, 1)).squeeze(-1)
        return _plain_boxes(values @ projection, 5)

    return OpCase(
        "shapley_crop_boxes",
        f"logit, {count} x {coalitions} x {classes}, 5 crops",
        lambda: fused()[1],
        plain,
        lambda: _same_clean_boxes(lambda: fused()[1], plain),
        bytes=count * (coalitions * 32 + 16 * 4 + 5 * 16 + 16) + _bytes(projection),
        binds="latency",
    )


# Crops
# -----------------------------------------------------------------------------------------------------


def _crop_resize(settings: Settings, dtype: torch.dtype) -> OpCase:
    count, size, tile = settings.size((16, 224, 112), quick=(2, 32, 16), gpu=(256, 224, 112))
    images = _pixels(settings, count, size)
    images = images if dtype == torch.uint8 else images.float() / 255
    crops = 5
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(tile // 2, size, (count, crops), generator=generator)
    corners = (torch.rand(count, crops, 2, generator=generator) * (size - sides)[..., None]).long()
    boxes = torch.cat((corners, corners + sides[..., None]), dim=-1)
    on_device = boxes.to(settings.device)
    ours = partial(ops.crop_resize, images, on_device, tile)
    listed = boxes.tolist()

    def plain() -> Tensor:
        from torchvision.transforms.v2 import functional as transforms

        tiles = [
            transforms.resize(image[:, y0:y1, x0:x1], [tile, tile], antialias=True)
            for image, of_image in zip(images, listed, strict=True)
            for x0, y0, x1, y1 in of_image
        ]
        return torch.stack(tiles).unflatten(0, (count, crops))

    def check() -> list[Check]:
        found, wanted = ours().float(), plain().float()
        if dtype == torch.uint8:
            return [Check("largest difference in grey levels", float((found - wanted).abs().max()), 1.0)]
        return [Check("pixels", relative_error(found, wanted), 1e-5)]

    covered = int((sides**2).sum()) * 3 * dtype.itemsize
    written = count * crops * 3 * tile**2 * dtype.itemsize
    return OpCase(
        "crop_resize",
        f"{count} x {crops} {str(dtype).removeprefix('torch.')} crops to {tile} px",
        ours,
        plain,
        check,
        bytes=covered + written + _bytes(on_device),
        peer="torchvision",
    )


def _crop_batch(settings: Settings) -> OpCase:
    count, size, tile = settings.size((16, 224, 112), quick=(2, 32, 16), gpu=(256, 224, 112))
    images = _pixels(settings, count, size)
    corners = torch.randint(0, size - tile, (count, 5, 2), generator=torch.Generator().manual_seed(0))
    boxes = torch.cat((corners, corners + tile), dim=-1)
    on_device = boxes.to(settings.device)
    mean, std = _statistics(settings)
    ours = partial(ops.crop_batch, images, on_device, tile, padded=size, mean=mean, std=std)
    listed = boxes.tolist()
    before = (size - tile) // 2
    margins = (before, size - tile - before) * 2

    def plain() -> Tensor:
        """The boxes have the tile's size, so a resize would change nothing and plain PyTorch does without it."""
        tiles = [
            image[:, y0:y1, x0:x1]
            for image, of_image in zip(images, listed, strict=True)
            for x0, y0, x1, y1 in of_image
        ]
        normal = (torch.stack(tiles).float() / 255 - mean[:, None, None]) / std[:, None, None]
        return functional.pad(normal, margins).contiguous(memory_format=torch.channels_last)

    return OpCase(
        "crop_batch",
        f"{count} x 5 uint8 crops of {tile} px in {size} px",
        ours,
        plain,
        lambda: _close(ours, plain, "pixels", 1e-6),
        bytes=count * 5 * 3 * (tile**2 + 4 * size**2) + _bytes(on_device),
    )


# Gradient norms
# -----------------------------------------------------------------------------------------------------


def _linear(settings: Settings) -> OpCase:
    count, positions, inputs, outputs = settings.size(
        (16, 49, 384, 384), quick=(2, 5, 8, 8), gpu=(128, 197, 768, 3072)
    )
    x, g = (_normal(settings, count, positions, features) for features in (inputs, outputs))

    def plain() -> Tensor:
        return (g.mT @ x).square().sum((1, 2)) + g.sum(1).square().sum(1)

    ours = partial(ops.grad_sq_norm_linear, x, g)
    return OpCase(
        "grad_sq_norm_linear",
        f"{count} x {positions} x {inputs} to {outputs}",
        ours,
        plain,
        lambda: _close(ours, plain, "squared norms", 1e-5),
        bytes=_bytes(x, g),
        operations=count * _product(positions, inputs, outputs),
        binds="operations",
    )


def _product(positions: int, inputs: int, outputs: int) -> int:
    """Operations of ||G^T X||^2 a sample in the cheaper of its forms: the product, or the two Gram matrices."""
    return min(2 * positions * inputs * outputs, positions**2 * (inputs + outputs))


def _conv2d(settings: Settings, channels: int, side: int) -> OpCase:
    count = settings.size(16, quick=2, gpu=_CROPS)
    channels = channels // settings.size(1, quick=8, gpu=1)
    x, g = (_normal(settings, count, channels, side, side) for _ in range(2))

    def plain() -> Tensor:
        columns = functional.unfold(x, 3, padding=1)  # [B, 9 C, T]
        flat = g.flatten(2)
        return (flat @ columns.mT).square().sum((1, 2)) + flat.sum(2).square().sum(1)

    # As the score pass has them, whose teacher runs in channels last.
    x_last, g_last = (each.contiguous(memory_format=torch.channels_last) for each in (x, g))
    ours = partial(ops.grad_sq_norm_conv2d, x_last, g_last, 3, padding=1)
    return OpCase(
        "grad_sq_norm_conv2d",
        f"{count} x {channels} channels of {side} px, 3x3",
        ours,
        plain,
        lambda: _close(ours, plain, "squared norms", 1e-5),
        bytes=_bytes(x, g),
        operations=count * _product(side * side, 9 * channels, channels),
        binds="operations",
    )


def _norm(settings: Settings) -> OpCase:
    count, channels, side = settings.size((16, 64, 56), quick=(2, 8, 4), gpu=(_CROPS, 64, 56))
    x, g = (_normal(settings, count, channels, side, side) for _ in range(2))

    def plain() -> Tensor:
        return (x * g).sum((2, 3)).square().sum(1) + g.sum((2, 3)).square().sum(1)

    ours = partial(ops.grad_sq_norm_norm, x, g, (1, 1))
    return OpCase(
        "grad_sq_norm_norm",
        f"{count} x {channels} channels of {side} px",
        ours,
        plain,
        lambda: _close(ours, plain, "squared norms", 1e-5),
        bytes=_bytes(x, g),
    )


def _normalization_backward(settings: Settings) -> OpCase:
    count, channels, side = settings.size((16, 64, 56), quick=(2, 8, 4), gpu=(_CROPS, 64, 56))
    groups = channels // 4
    x, g = (_normal(settings, count, channels, side, side) for _ in range(2))
    weight = _normal(settings, channels)
    flat = x.view(count, groups, -1)
    mean, rstd = flat.mean(2), (flat.var(2, correction=0) + 1e-5).rsqrt()

    def plain() -> Tensor:
        """GroupNorm's backward pass, and the norm of its parameters' gradients from the normalised input."""
        normal = ((flat - mean[..., None]) * rstd[..., None]).view_as(x)
        squares = (normal * g).sum((2, 3)).square().sum(1) + g.sum((2, 3)).square().sum(1)
        inner = (g * weight[:, None, None]).view(count, groups, -1)
        along = (inner * normal.view_as(inner)).mean(2, keepdim=True)
        grad = (inner - inner.mean(2, keepdim=True) - normal.view_as(inner) * along) * rstd[..., None]
        return torch.cat((grad.flatten(), squares))

    fused = partial(ops.normalization_backward, x, g, mean, rstd, weight)

    def check() -> list[Check]:
        grad, squares = fused()
        wanted = plain()
        return [
            Check("gradient", relative_error(grad.flatten(), wanted[:-count]), 1e-5),
            Check("squared norms", relative_error(squares, wanted[-count:]), 1e-5),
        ]

    return OpCase(
        "normalization_backward",
        f"GroupNorm, {count} x {channels} channels of {side} px",
        lambda: fused()[0],
        plain,
        check,
        bytes=3 * _bytes(x),
    )


def _embedding(settings: Settings) -> OpCase:
    count, positions, width, rows = settings.size(
        (16, 64, 256, 1000), quick=(2, 4, 8, 5), gpu=(256, 128, 768, 30000)
    )
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, rows, (count, positions), generator=generator).to(settings.device)
    g = _normal(settings, count, positions, width)

    def plain() -> Tensor:
        same = (indices[:, :, None] == indices[:, None]).float()
        return (same * (g @ g.mT)).sum((1, 2))

    ours = partial(ops.grad_sq_norm_embedding, indices, g)
    return OpCase(
        "grad_sq_norm_embedding",
        f"{count} x {positions} x {width}",
        ours,
        plain,
        lambda: _close(ours, plain, "squared norms", 1e-5),
        bytes=_bytes(indices, g),
    )


# Matching
# -----------------------------------------------------------------------------------------------------


def _convnet_block(settings: Settings, inputs: int, side: int, norm: str, *, backward: bool) -> OpCase:
    """A block of ConvNet-3 at 32 px, or its gradients: all of them behind the first block, the parameters' in it.

    With InstanceNorm, with BatchNorm, or with one in eval mode, whose statistics are given.
    """
    count, outputs = settings.size((64, 128), quick=(2, 8), gpu=(2560, 128))
    x = _normal(settings, count, inputs, side, side)
    x = x if inputs == 3 else x.contiguous(memory_format=torch.channels_last)
    weight = _normal(settings, outputs, inputs, 3, 3) / (9 * inputs) ** 0.5
    bias, scale, shift = (_normal(settings, outputs) for _ in range(3))
    mean, variance = bias, torch.ones_like(bias)
    leaves = [weight, scale, shift] if inputs == 3 else [x, weight, scale, shift]
    for leaf in leaves:
        leaf.requires_grad_(backward)
    grad = _normal(settings, count, outputs, side // 2, side // 2)

    def normal() -> Tensor:
        maps = functional.conv2d(x, weight, bias, padding=1)
        if norm == "instance":
            return functional.group_norm(maps, outputs, scale, shift)
        if norm == "batch":
            return functional.batch_norm(maps, None, None, scale, shift, training=True)
        return functional.batch_norm(maps, mean, variance, scale, shift)

    def four_layers() -> Tensor:
        return functional.avg_pool2d(normal().relu(), 2)

    # No gradient comes from cells in which rounding may decide what the ReLU lets through.
    with torch.no_grad():
        grad[functional.max_pool2d((normal().abs() < 1e-4).float(), 2) > 0] = 0

    def fused() -> Tensor:
        if norm == "instance":
            return ops.convnet_block(x, weight, bias, scale, shift)
        if norm == "batch":
            return ops.convnet_block_batch_norm(x, weight, bias, scale, shift)[0]
        return ops.convnet_block_batch_norm_eval(x, weight, bias, scale, shift, mean, variance)

    def run(block: Bodies) -> Tensor:
        if not backward:
            return block()
        return torch.cat([each.reshape(-1) for each in torch.autograd.grad(block(), leaves, grad)])

    ours, plain = partial(run, fused), partial(run, four_layers)
    products = 2 * 9 * inputs * outputs * count * side**2
    name = {"instance": "convnet_block", "batch": "convnet_block_batch_norm"}.get(
        norm, "convnet_block_batch_norm_eval"
    )
    return OpCase(
        f"{name}_backward" if backward else name,
        f"{'and forward, ' if backward else ''}{count} x {inputs} to {outputs} channels of {side} px",
        ours,
        plain,
        lambda: _close(ours, plain, "gradients" if backward else "features", 1e-4),
        bytes=(3 if backward else 1) * (_bytes(x) + 5 * _bytes(grad)),
        operations=((2 if inputs == 3 else 3) if backward else 1) * products,
        binds="bytes" if inputs == 3 else "operations",
    )


def _convnet_block_curvature(settings: Settings, side: int) -> OpCase:
    """What a second backward pass of a block of ConvNet-3 takes from the full-size maps."""
    count, outputs = settings.size((64, 128), quick=(2, 8), gpu=(2560, 128))

    def maps(height: int) -> Tensor:
        return _normal(settings, count, outputs, height, height).contiguous(memory_format=torch.channels_last)

    grad, conv, mapped = maps(side // 2), maps(side), maps(side)
    scale, shift, of_scale, of_shift = (_normal(settings, outputs) for _ in range(4))
    mean, rstd = conv.mean((2, 3)), conv.var((2, 3), correction=0).add(1e-5).rsqrt()
    given = (grad, conv, mapped, scale, shift, mean, rstd, of_scale, of_shift)

    def joined(body: Callable[..., tuple[Tensor, ...]]) -> Tensor:
        return torch.cat([each.reshape(-1) for each in body(*given)])

    ours = partial(joined, torch.ops.ddfast.convnet_block_curvature)
    plain = partial(joined, ops.reference.convnet_block_curvature)
    return OpCase(
        "convnet_block_curvature",
        f"{count} x {outputs} channels of {side} px",
        ours,
        plain,
        lambda: _close(ours, plain, "maps", 1e-4),
        bytes=5 * _bytes(conv) + 2 * _bytes(grad),
    )


def _siamese_augment(settings: Settings, *, backward: bool) -> OpCase:
    """A mirror, a colour and a small turn for each image of 32 px, as IDC trains students."""
    count = settings.size(256, quick=8, gpu=2560)
    images, grad = (_normal(settings, count, 3, 32, 32) for _ in range(2))
    images.requires_grad_(backward)
    draws = torch.Generator().manual_seed(0)
    drawn = [draw(operation, count, (32, 32), draws) for operation in ("flip", "colour", "rotation")]
    given = {name: value for each in drawn for name, value in each.given((32, 32)).items()}
    parameters = ops.augment_parameters(count, **given).to(settings.device)

    def steps() -> Tensor:
        made = images
        for each in drawn:
            made = plain_augment(each)(made)
        return made

    def run(augment: Bodies) -> Tensor:
        return torch.autograd.grad(augment(), images, grad)[0] if backward else augment()

    ours = partial(run, partial(ops.siamese_augment, images, parameters))
    plain = partial(run, steps)
    return OpCase(
        f"siamese_augment{'_backward' if backward else ''}",
        f"{'and forward, ' if backward else ''}{count} images of 32 px",
        ours,
        plain,
        lambda: _close(ours, plain, "gradients" if backward else "pixels", 1e-5),
        bytes=(4 if backward else 2) * _bytes(images) + _bytes(parameters),
    )


def _class_kl(settings: Settings) -> OpCase:
    rows, width = settings.size((500, 512), quick=(6, 8), gpu=(5000, 512))
    features = _normal(settings, rows, width)
    classes = min(10, rows // 2)
    labels = torch.arange(rows, device=settings.device) % classes

    def plain() -> Tensor:
        """The gradient by autograd, of the definition one class after another, as the authors have it."""
        leaf, total = features.clone().requires_grad_(), torch.zeros((), device=settings.device)
        for label in range(classes):
            of_class = leaf[labels == label]
            mean = of_class.softmax(1).mean(0, keepdim=True).expand_as(of_class)
            total = total + functional.kl_div(
                mean.log(), of_class.log_softmax(1), log_target=True, reduction="sum"
            )
        return torch.autograd.grad(total / rows, leaf)[0]

    def ours() -> Tensor:
        leaf = features.clone().requires_grad_()
        return torch.autograd.grad(ops.class_kl(leaf, labels), leaf)[0]

    return OpCase(
        "class_kl",
        f"value and gradient, {rows} x {width}",
        ours,
        plain,
        lambda: _close(ours, plain, "gradient", 1e-4),
        bytes=2 * _bytes(features),
        binds="latency",
    )
