"""Draw layers, layouts and small networks at random, and hold their gradient norms against a float64 loop.

    python -m bench layers --draws 20000 --seed 0 --out bench/results/layers.md

Three families of kinds: one op of `ddfast.ops` on tensors of any layout; one layer as the ghost method serves it
(or, where it does not, as `ddfast.grad_norm` does); and a small network of several. A draw is decided by its kind,
its number and the seed alone, so `--draw conv2d:17` repeats one. A draw holds where every norm is that of a loop over
single images in float64, within what its precision allows, and where the model and the images are as they were. It
does not count where torch's own forward pass is not that of float64. Exits with 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from bench import facts

CLASSES = 3
TORCH = "torch's own forward pass is not that of float64"
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.08, torch.float16: 0.03}
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Draws:
    """Random choices and tensors of one draw."""

    def __init__(self, kind: str, number: int, seed: int) -> None:
        digest = hashlib.blake2b(f"{seed}/{kind}/{number}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little") >> 1
        self.python = random.Random(key)
        self.torch = torch.Generator().manual_seed(key)

    def of(self, *choices: Any) -> Any:
        """One of the choices."""
        return self.python.choice(choices)

    def size(self, most: int, least: int = 1) -> int:
        """A size that is often small and seldom large."""
        return self.python.randint(least, max(least, self.of(2, 3, 5, most)))

    def batch(self) -> int:
        """A number of samples."""
        return self.of(1, 2, 3, 5)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal values in a layout: contiguous, channels-last, a slice of something larger, expanded, transposed."""
        layout = self.of("contiguous", "contiguous", "last", "slice", "offset", "expanded", "transposed")
        made = list(shape)
        dim = self.python.randrange(len(made))
        if layout == "slice":
            made[dim] *= 2
        if layout == "offset":
            made[dim] += 3
        if layout == "expanded":
            made[dim] = 1
        if layout == "transposed":
            made.reverse()
        values = torch.randn(made, generator=self.torch, dtype=torch.float64).to(dtype)
        if layout == "last" and len(made) == 4:
            return values.contiguous(memory_format=torch.channels_last)
        if layout == "slice":
            return values.narrow(dim, 0, made[dim])[(slice(None),) * dim + (slice(None, None, 2),)]
        if layout == "offset":
            return values.narrow(dim, 2, shape[dim])
        if layout == "expanded":
            return values.expand(shape)
        return values.permute(*range(len(made) - 1, -1, -1)) if layout == "transposed" else values

    def labels(self, count: int) -> Tensor:
        """Classes."""
        return torch.randint(0, CLASSES, (count,), generator=self.torch)

    def settle(self, model: nn.Module) -> nn.Module:
        """The model in eval mode with every parameter and statistic drawn, so that a mistake in one shows."""
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=self.torch, dtype=torch.float64)
            spread = (
                values.abs() + 0.5
                if name.endswith("running_var")
                else values / max(1, tensor[0:1].numel()) ** 0.5
            )
            tensor.data.copy_(spread)
        return model.eval()


# One op --------------------------------------------------------------------------------------------------------------


def _linear_op(draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    from ddfast.ops import grad_sq_norm_linear

    lead = (draws.batch(), *(draws.size(70) for _ in range(draws.of(0, 1, 1, 2))))
    dtype, bias = draws.of(*DTYPES), draws.of(True, False)
    x, g = (
        draws.tensor(*lead, draws.size(150), dtype=dtype),
        draws.tensor(*lead, draws.size(150), dtype=dtype),
    )
    found = grad_sq_norm_linear(x, g, bias=bias)

    def exact(x: Tensor, g: Tensor) -> Tensor:
        x, g = (t.reshape(-1, t.shape[-1]) for t in (x, g))
        return (g.T @ x).square().sum() + bias * g.sum(0).square().sum()

    return found, *_exactly(exact, x, g)


def _conv2d_op(draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    from ddfast.ops import grad_sq_norm_conv2d

    kernel, stride, dilation = ((draws.of(1, 2, 3, 3, 5), draws.of(1, 2, 3)) for _ in range(3))
    stride, dilation = (draws.of(1, 1, 2, 3), draws.of(1, 1, 2)), (draws.of(1, 1, 2), draws.of(1, 1, 3))
    padding = (draws.of(0, 1, 2), draws.of(0, 1, 3))
    groups = draws.of(1, 1, 1, 2, 3, 8)
    each, outputs = draws.of(1, 1, 2, 3, 7, 16, 33, 64), draws.of(1, 1, 2, 5, 16, 40, 70)
    if groups > 1:
        each, outputs = min(each, 7), min(outputs, 5)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [n + draws.of(0, 1, 3, 6, 11) for n in least]
    made = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    batch, dtype, bias = draws.batch(), draws.of(*DTYPES), draws.of(True, False)
    x = draws.tensor(batch, groups * each, *size, dtype=dtype)
    g = draws.tensor(batch, groups * outputs, *made, dtype=dtype)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    found = grad_sq_norm_conv2d(x, g, kernel, bias=bias, **geometry)
    shape = (groups * outputs, each, *kernel)

    def exact(x: Tensor, g: Tensor) -> Tensor:
        weight = conv2d_weight(
            x[None].contiguous(), shape, g[None].contiguous(), stride, padding, dilation, groups
        )
        return weight.square().sum() + bias * g.sum((1, 2)).square().sum()

    return found, *_exactly(exact, x, g)


def _norm_op(draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    from ddfast.ops import grad_sq_norm_norm

    shape = (draws.batch(), *(draws.size(40) for _ in range(draws.of(1, 2, 3, 4))))
    first = draws.python.randint(1, len(shape) - 1)
    last = draws.python.randint(first, len(shape) - 1)
    dtype, weight, bias = draws.of(*DTYPES), draws.of(True, False), draws.of(True, False)
    x, g = draws.tensor(*shape, dtype=dtype), draws.tensor(*shape, dtype=dtype)
    found = grad_sq_norm_norm(x, g, (first, last), weight=weight, bias=bias)

    def exact(x: Tensor, g: Tensor) -> Tensor:
        others = [d for d in range(x.ndim) if not first - 1 <= d <= last - 1]
        sums = [(t.sum(others) if others else t).square().sum() for t in (x * g, g)]
        return weight * sums[0] + bias * sums[1]

    return found, *_exactly(exact, x, g)


def _embedding_op(draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    from ddfast.ops import grad_sq_norm_embedding

    lead = (draws.batch(), *(draws.size(30) for _ in range(draws.of(0, 1, 2))))
    rows, dtype, skip = draws.size(20), draws.of(*DTYPES), draws.of(None, 0, 1)
    ids = (draws.tensor(*lead).abs() * rows).long().clamp(max=rows - 1).to(draws.of(torch.int64, torch.int32))
    g = draws.tensor(*lead, draws.size(70), dtype=dtype)
    found = grad_sq_norm_embedding(ids, g, padding_idx=skip)

    def exact(ids: Tensor, g: Tensor) -> Tensor:
        table = g.new_zeros(rows + 2, g.shape[-1])
        table.index_add_(0, ids.reshape(-1).long(), g.reshape(-1, g.shape[-1]))
        if skip is not None:
            table[skip] = 0
        return table.square().sum()

    return found, *_exactly(exact, ids, g)


def _normalization_op(draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the norms; the gradient at the input joins them as one number a sample."""
    from ddfast.ops import normalization_backward

    groups, each = draws.of(1, 2, 3, 8), draws.of(1, 2, 5)
    shape = (draws.batch(), groups * each, *(draws.size(30) for _ in range(draws.of(0, 1, 2, 2, 3))))
    dtype, fixed = draws.of(*DTYPES), draws.of(True, False)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    x, g = draws.tensor(*shape, dtype=dtype), draws.tensor(*shape, dtype=dtype)
    statistics = (shape[1],) if fixed else (shape[0], groups)
    mean = draws.tensor(*statistics, dtype=sums)
    rstd = draws.tensor(*statistics, dtype=sums).abs() + 0.5
    weight = draws.of(None, draws.tensor(shape[1], dtype=sums))
    flags = {"weight_norm": draws.of(True, False), "bias_norm": draws.of(True, False)}
    grad, norms = normalization_backward(x, g, mean, rstd, weight, **flags)
    probe = torch.arange(grad[0].numel(), dtype=torch.float64).cos()
    found = torch.cat([norms.double(), grad.double().flatten(1) @ probe])
    if grad.shape != x.shape or grad.dtype != g.dtype:
        raise AssertionError(f"the gradient is {grad.dtype} {tuple(grad.shape)}")
    truth: list[Tensor] = []
    bound: list[Tensor] = []
    for absolute in (False, True):
        values = [t.double().abs() if absolute and t is not rstd else t.double() for t in (x, g, mean, rstd)]
        a, b, m, r = values
        if fixed:
            m, r = (t.view(1, -1, *[1] * (a.ndim - 2)) for t in (m, r))
        else:
            m, r = (t.repeat_interleave(each, 1).view(len(a), -1, *[1] * (a.ndim - 2)) for t in (m, r))
        normalized = (a + m) * r if absolute else (a - m) * r
        factor = torch.ones(shape[1], dtype=torch.float64) if weight is None else weight.double()
        factor = (factor.abs() if absolute else factor).view(1, -1, *[1] * (a.ndim - 2))
        others = list(range(2, a.ndim))
        total = [(t.sum(others) if others else t).square().sum(1) for t in (normalized * b, b)]
        squares = flags["weight_norm"] * total[0] + flags["bias_norm"] * total[1]
        at_input = factor * b
        if not fixed:
            grouped = at_input.reshape(len(a), groups, -1)
            unit = normalized.reshape(len(a), groups, -1)
            middle, slope = grouped.mean(2, keepdim=True), (grouped * unit).mean(2, keepdim=True)
            grouped = grouped + middle + slope * unit if absolute else grouped - middle - slope * unit
            at_input = grouped.reshape(a.shape)
        at_input = (at_input * r).flatten(1) @ (probe.abs() if absolute else probe)
        (bound if absolute else truth).append(torch.cat([squares, at_input]))
    steps = torch.finfo(dtype).eps / torch.finfo(sums).eps
    return (
        found,
        truth[0],
        bound[0] * torch.cat([torch.ones(shape[0]), torch.full((shape[0],), steps)]).double(),
    )


def _exactly(exact: Callable[[Tensor, Tensor], Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The truth, sample by sample, and what it would be if nothing cancelled."""
    wide = [t.double() if t.is_floating_point() else t for t in (x, g)]
    sizes = [t.abs() if t.is_floating_point() else t for t in wide]
    return tuple(torch.stack([exact(a, b) for a, b in zip(*pair, strict=True)]) for pair in (wide, sizes))  # type: ignore[return-value]


OPS: dict[str, Callable[[Draws], tuple[Tensor, Tensor, Tensor]]] = {
    "op linear": _linear_op,
    "op conv2d": _conv2d_op,
    "op norm": _norm_op,
    "op embedding": _embedding_op,
    "op normalization": _normalization_op,
}


# One layer, and networks of some --------------------------------------------------------------------------------------


class Logits(nn.Module):
    """Layers, and logits that are fixed mixtures of what they return."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, CLASSES]."""
        flat = self.layers(x).flatten(1)
        place = torch.arange(flat.shape[1], device=flat.device, dtype=torch.float64)
        mixture = torch.stack([(place * (k + 1) + k).cos() for k in range(CLASSES)])
        return flat @ mixture.to(flat.dtype).T / flat.shape[1] ** 0.5


def _conv(draws: Draws, channels: int, dims: int, size: int) -> nn.Module:
    """A convolution of any geometry that a map of `size` pixels a side allows."""
    groups = draws.of(1, 1, *(n for n in range(1, channels + 1) if channels % n == 0))
    kernel, dilation = [], []
    for _ in range(dims):
        kernel.append(draws.of(*(k for k in (1, 2, 3, 3, 5) if k <= size)))
        dilation.append(draws.of(1, 1, *(d for d in (2, 3) if d * (kernel[-1] - 1) < size)))
    padding = draws.of("same", "valid", 0, *([[draws.of(0, 1, 2) for _ in range(dims)]] * 3))
    stride = 1 if padding == "same" else [draws.of(1, 1, 2, 3) for _ in range(dims)]
    mode = draws.of("zeros", "zeros", "zeros", "reflect", "replicate", "circular") if size > 5 else "zeros"
    kinds: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d}
    outputs = groups * draws.of(1, 1, 2, 3, 5)
    return kinds[dims](
        channels,
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=draws.of(True, False),
        padding_mode=mode,
    )


def _norm(draws: Draws, channels: int, dims: int, size: int) -> nn.Module:
    kinds = ["batch", "instance", "tracked", "group", "layer", "rms"]
    kind = draws.of(*(k for k in kinds if dims > 0 or k not in ("instance", "tracked")))
    affine = draws.of(True, True, False)
    if kind == "batch":
        return {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](
            channels, affine=affine
        )
    if kind in ("instance", "tracked"):
        instance = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims]
        return instance(channels, affine=affine, track_running_stats=kind == "tracked")
    if kind == "group":
        most = channels if dims else channels // 2  # one value is nothing to normalise
        groups = draws.of(*(n for n in range(1, most + 1) if channels % n == 0))
        return nn.GroupNorm(groups, channels, affine=affine)
    shape = [channels, *[size] * dims][-draws.of(*range(1, dims + 2)) :]
    if kind == "rms":
        return nn.RMSNorm(shape, elementwise_affine=affine, eps=1e-5)
    return nn.LayerNorm(shape, elementwise_affine=affine, bias=draws.of(True, False))


def _layer_conv(draws: Draws, dims: int) -> tuple[nn.Module, Tensor]:
    channels, size = draws.of(1, 1, 2, 3, 4, 7, 16), draws.python.randint(3, 12)
    if dims == 2 and draws.of(*range(12)) == 0:  # what Winograd's algorithm takes
        wide = nn.Conv2d(64, draws.of(64, 128), 3, padding=1, bias=draws.of(True, False))
        return wide, draws.tensor(draws.batch(), 64, size, draws.python.randint(3, 12))
    return _conv(draws, channels, dims, size), draws.tensor(draws.batch(), channels, *[size] * dims)


def _layer_linear(draws: Draws) -> tuple[nn.Module, Tensor]:
    inputs = draws.size(40)
    extra = [draws.size(9) for _ in range(draws.of(0, 0, 1, 2))]
    return nn.Linear(inputs, draws.size(40), bias=draws.of(True, False)), draws.tensor(
        draws.batch(), *extra, inputs
    )


def _layer_norm(draws: Draws) -> tuple[nn.Module, Tensor]:
    dims, channels, size = draws.of(0, 1, 2, 2, 3), draws.of(1, 2, 3, 4, 6, 9, 16), draws.python.randint(2, 6)
    if dims == 0:
        channels += 2
    return _norm(draws, channels, dims, size), draws.tensor(draws.batch(), channels, *[size] * dims)


def _layer_embedding(draws: Draws) -> tuple[nn.Module, Tensor]:
    rows = draws.size(12, 3)
    lead = (draws.batch(), *(draws.size(9) for _ in range(draws.of(1, 1, 2))))
    ids = (draws.tensor(*lead).abs() * rows).long().clamp(max=rows - 1)
    return nn.Embedding(rows, draws.size(20), padding_idx=draws.of(None, 0, -1)), ids


def _layer_fallback(draws: Draws) -> tuple[nn.Module, Tensor]:
    channels, size, batch = draws.of(1, 2, 3, 6), draws.python.randint(3, 6), draws.batch()
    groups = draws.of(1, *(n for n in range(1, channels + 1) if channels % n == 0))
    geometry = {
        "stride": draws.of(1, 2),
        "padding": draws.of(0, 1),
        "groups": groups,
        "bias": draws.of(True, False),
    }
    dims = draws.of(1, 2, 3)
    kinds: dict[int, list[type[nn.Module]]] = {
        1: [nn.ConvTranspose1d],
        2: [nn.ConvTranspose2d],
        3: [nn.Conv3d, nn.ConvTranspose3d],
    }
    layer = draws.of(*kinds[dims])(channels, groups * draws.of(1, 2), draws.of(2, 3), **geometry)
    return layer, draws.tensor(batch, channels, *[size] * dims)


def _network(draws: Draws) -> tuple[nn.Module, Tensor]:
    """Convolutions, normalisations, activations and pools, one after another, some layers called again."""
    channels, size, batch = draws.of(1, 2, 3, 4), draws.of(8, 11, 16), draws.batch()
    images = draws.tensor(batch, channels, size, size)
    layers: list[nn.Module] = []
    x = images
    for _ in range(draws.python.randint(1, 4)):
        side = min(x.shape[2:])
        layer = _any_layer(draws, x, side)
        behind = draws.of(nn.GELU(), nn.Tanh(), nn.SiLU(inplace=True), nn.ELU(inplace=True), nn.Identity())
        added = [layer, behind]
        if isinstance(layer, nn.Conv2d) and layer.in_channels == layer.out_channels and draws.of(True, False):
            added = [layer, behind, layer]
        try:
            with torch.no_grad():
                after = nn.Sequential(*added).eval()(x.clone())
        except (RuntimeError, ValueError):
            continue
        # oneDNN crashes on strided 1x1 convolutions of padded channels-last maps that are one pixel wide.
        if after.numel() == 0 or min(after.shape[2:]) < 2:
            continue
        layers, x = [*layers, *added], after
    tail = draws.of("flat", "mean", "rows")
    if tail == "rows":
        layers += [nn.Flatten(2), nn.Linear(x.shape[2] * x.shape[3], draws.size(9))]
    elif tail == "mean":
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(x.shape[1], draws.size(9))]
    else:
        layers += [nn.Flatten(), nn.Linear(x.shape[1:].numel(), draws.size(9))]
    return nn.Sequential(*layers), images


def _any_layer(draws: Draws, x: Tensor, side: int) -> nn.Module:
    channels = x.shape[1]
    kind = draws.of("convolution", "convolution", "wide", "norm", "pool")
    if kind == "convolution":
        return _conv(draws, channels, 2, side)
    if kind == "wide":
        return nn.Conv2d(channels, draws.of(1, 3, 8, 64), 3, padding=1)
    if kind == "norm" and x.shape[2] == x.shape[3]:
        return _norm(draws, channels, 2, side)
    if kind == "norm":
        return nn.GroupNorm(1, channels)
    return draws.of(nn.MaxPool2d, nn.AvgPool2d)(2) if side > 3 else nn.GroupNorm(1, channels)


LAYERS: dict[str, Callable[[Draws], tuple[nn.Module, Tensor]]] = {
    "conv1d": lambda draws: _layer_conv(draws, 1),
    "conv2d": lambda draws: _layer_conv(draws, 2),
    "linear": _layer_linear,
    "norm": _layer_norm,
    "embedding": _layer_embedding,
}
WHOLE: dict[str, Callable[[Draws], tuple[nn.Module, Tensor]]] = {
    "fallback": _layer_fallback,
    "network": _network,
}

KINDS = (*OPS, *LAYERS, *WHOLE)
SHARES = {"fallback": 1, "network": 2, **dict.fromkeys(LAYERS, 4), **dict.fromkeys(OPS, 6)}  # draws of a kind


def _loop(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Norms in float64, one image at a time, on contiguous images."""
    model = copy.deepcopy(model).double().to(memory_format=torch.contiguous_format)
    norms = []
    for image, label in zip(inputs.split(1), labels.split(1), strict=True):
        image = image.contiguous().double() if image.is_floating_point() else image.contiguous()
        loss = functional.cross_entropy(model(image.clone()), label)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
        norms.append(sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5)
    return torch.tensor(norms, dtype=torch.float64)


def _torch_holds(model: nn.Module, inputs: Tensor) -> bool:
    """Whether the model's logits are those of float64, for the batch and for the first image."""
    exact = copy.deepcopy(model).double().to(memory_format=torch.contiguous_format)
    for some in (inputs, inputs[:1]):
        wide = some.contiguous().double() if some.is_floating_point() else some
        with torch.no_grad():
            found, truth = model(some.clone()).double(), exact(wide)
        if not torch.allclose(found, truth, rtol=0.05, atol=0.05):
            return False
    return True


def trial(kind: str, number: int, seed: int) -> str | None:
    """What is wrong with a draw; None where it holds, TORCH where it does not count."""
    draws = Draws(kind, number, seed)
    try:
        return _of_op(kind, draws) if kind in OPS else _of_model(kind, draws)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _of_op(kind: str, draws: Draws) -> str | None:
    found, truth, bound = OPS[kind](draws)
    rounding = 1e-12 if found.dtype == torch.float64 and kind != "op normalization" else 1e-5
    error = (found.double() - truth).abs()
    if bool((error <= rounding * truth.abs() + rounding * bound + 1e-30).all()):
        return None
    return f"{found.tolist()} where it is {truth.tolist()}"


def _of_model(kind: str, draws: Draws) -> str | None:
    from ddfast import grad_norm
    from ddfast.gradients.norms import ghost_norms

    made, inputs = (LAYERS | WHOLE)[kind](draws)
    dtype = draws.of(*DTYPES) if kind in LAYERS else draws.of(torch.float32, torch.float32, torch.float64)
    model = draws.settle(Logits(made)).to(dtype)
    if inputs.ndim == 4 and inputs.is_floating_point() and draws.of(True, False):
        model = model.to(memory_format=torch.channels_last)
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    labels, before = draws.labels(len(inputs)), inputs.clone()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = _loop(model, inputs, labels)
    if not _torch_holds(model, inputs):
        return TORCH
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in LAYERS:
            found = ghost_norms(model, inputs, labels)[0]
        else:
            method, chunk_size = draws.of("auto", "auto", "vmap", "loop"), draws.of(None, 1, 2)
            found = grad_norm(model, inputs, labels, method, chunk_size=chunk_size)
    same = torch.equal(inputs, before)
    same = same and all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    if not same:
        return "the images or the model have changed"
    rounding = ROUNDING[dtype]
    if torch.allclose(found.double(), expected, rtol=rounding, atol=rounding * 0.1):
        return None
    return f"{dtype} {found.tolist()} where it is {expected.tolist()}"


def numbers(draws: int) -> Iterator[tuple[str, int]]:
    """Kinds and numbers of a total of draws, in the kinds' shares."""
    total = sum(SHARES.values())
    for kind in KINDS:
        for number in range(max(1, draws * SHARES[kind] // total)):
            yield kind, number


def page(counts: dict[str, Counter[str]], failures: Sequence[str], asked: int, seed: int) -> str:
    """Counts of each kind, and the failures."""
    lines = [
        "# Random layers",
        "",
        f"`python -m bench layers --draws {asked} --seed {seed}`: gradient norms of randomly drawn ops, layers",
        "and small networks (kernels, strides, dilations, groups, paddings, channels, layouts in memory, dtypes,",
        "batches of 1, 2, 3 and 5) against a loop over single images in float64. Held: every norm is the loop's within",
        "what the precision allows, and model and images are as they were. Not counted: torch's own forward pass is",
        "not that of float64 (oneDNN's convolutions of one channel in channels-last memory).",
        "",
        f"torch {torch.__version__.partition('+')[0]}, {_body()}; commit {facts.commit()[0]}.",
        "",
        "| kind | draws | held | failed | not counted |",
        "| --- | --- | --- | --- | --- |",
        *(_row(kind, count) for kind, count in counts.items()),
        _row("all", sum(counts.values(), Counter())),
    ]
    return "\n".join([*lines, *(["", *(f"- {failure}" for failure in failures)] if failures else [])]) + "\n"


def _row(kind: str, count: Counter[str]) -> str:
    return f"| {kind} | {count.total()} | {count['held']} | {count['failed']} | {count['torch']} |"


def _body() -> str:
    from ddfast.ops._dispatch import native_status
    from ddfast.ops._winograd import winograd_is_fast

    if not native_status()[0]:
        return "the reference bodies"
    return "the C++ bodies with AVX-512" if winograd_is_fast() else "the C++ bodies"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench layers", description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draw", metavar="KIND:NUMBER", help="repeat one draw")
    parser.add_argument("--out", type=Path, help="a page to write the counts to")
    options = parser.parse_args(arguments)
    if options.draw:
        kind, _, number = options.draw.partition(":")
        reason = trial(kind, int(number), options.seed)
        print(reason or "held")
        return int(reason is not None)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    failures = []
    for kind, number in numbers(options.draws):
        reason = trial(kind, number, options.seed)
        outcome = "held" if reason is None else "torch" if reason is TORCH else "failed"
        counts[kind][outcome] += 1
        if outcome == "failed":
            failures.append(f"{kind}:{number}: {reason}")
            print(failures[-1], flush=True)
    for kind, count in counts.items():
        print(f"{kind}: {count['held']} of {count.total()} held, {count['torch']} not counted")
    if options.out:
        options.out.write_text(page(counts, failures, options.draws, options.seed))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
