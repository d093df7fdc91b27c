"""The functions of the reference repository of dataset condensation, to be put in their place.

`DiffAugment`, `ParamDiffAug` and `match_loss` have the names, arguments, draws and numbers of those in `utils.py` of
github.com/VICO-UoE/DatasetCondensation (Zhao, Mopuri & Bilen, ICLR 2021; Zhao & Bilen, ICML 2021 and WACV 2023). Its
`main.py` and `main_DM.py`, and codes that were made from them, run faster to the same losses with two lines changed:
the import, which takes these from here in place of `utils`,

    from ddfast.condensation import DiffAugment, ParamDiffAug, match_loss, fuse

and the network of a step, whose blocks are computed by one op each:

    net = fuse(get_network(args.model, channel, num_classes, im_size).to(args.device))

The import at the end of `utils.py` serves its training loop (`epoch`) as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddfast.errors import UsageError
from ddfast.methods.matching.objectives import cosine_distance, row_distance
from ddfast.models import fuse
from ddfast.ops import augment_parameters, siamese_augment

__all__ = ["DiffAugment", "ParamDiffAug", "fuse", "match_loss"]

_PLACES = {"flip": 0, "color": 1, "crop": 2, "scale": 3, "rotate": 3, "cutout": 4}  # in one call of the op


class ParamDiffAug:
    """Strengths of the augmentations, with the reference's values; change any.

    Attributes:
        aug_mode: "S", one operation of the strategy a call, or "M", all of them in its order.
        prob_flip: how probable a mirror is.
        ratio_scale: most that an axis is scaled by, either way.
        ratio_rotate: most degrees, either way.
        ratio_crop_pad: most that an image is moved by, as a share of its side.
        ratio_cutout: side of the square that is cut out, as a share of the image's.
        brightness, saturation, contrast: (U - 1/2) * brightness is added, U * saturation and U + contrast are factors.
    """

    def __init__(self) -> None:
        self.aug_mode = "S"
        self.prob_flip = 0.5
        self.ratio_scale = 1.2
        self.ratio_rotate = 15.0
        self.ratio_crop_pad = 0.125
        self.ratio_cutout = 0.5
        self.brightness = 1.0
        self.saturation = 2.0
        self.contrast = 0.5
        # Of the call under way, as in the reference; `DiffAugment` sets them.
        self.latestseed = -1
        self.Siamese = False


def DiffAugment(x: Tensor, strategy: str = "", seed: int = -1, param: Any = None) -> Tensor:
    """Differentiable augmentation, siamese where a seed is given.

    It draws from torch's global generators, as the reference does: with the same state, or the same seed, both change
    the images in the same way. A seed is set on those generators, and raised by one, before every draw.

    Args:
        x: float [N, C, H, W]. float16 and bfloat16 are computed in float32.
        strategy: operations joined by "_": color, crop, cutout, flip, scale and rotate. "" and "none" give back x.
        seed: -1: parameters for each image. Any other: one set for all, the same for equal seeds, so that two calls
            change real and synthetic images alike.
        param: a `ParamDiffAug`, or anything with its attributes; the reference's values where it is None. Its
            `latestseed` and `Siamese` are set.

    Returns:
        [N, C, H, W], contiguous; differentiable any number of times with respect to x.

    Raises:
        UsageError: an unknown operation or mode.
    """
    if not strategy or strategy in ("None", "none"):
        return x
    param = ParamDiffAug() if param is None else param
    param.Siamese = seed != -1
    param.latestseed = seed
    operations = strategy.split("_")
    if unknown := [name for name in operations if name not in _PLACES]:
        raise UsageError(
            f"strategy must be operations among {', '.join(_PLACES)}, joined by _, got {unknown[0]!r} in {strategy!r}"
        )
    if param.aug_mode == "S":
        _set_seed(param)
        operations = [operations[int(torch.randint(0, len(operations), size=(1,)))]]
    elif param.aug_mode != "M":
        raise UsageError(f"aug_mode must be S or M, got {param.aug_mode!r}")
    given: dict[str, Any] = {}
    last = -1
    for name in operations:
        # The size alone decides what is drawn, so the draws may run ahead of the images.
        if _PLACES[name] <= last:
            x, given = _applied(x, given, param), {}
        given |= _DRAWS[name](x, param)
        last = _PLACES[name]
    return _applied(x, given, param).contiguous()


def match_loss(gw_syn: Sequence[Tensor], gw_real: Sequence[Tensor], args: Any) -> Tensor:
    """Distance of two lists of gradients, of the parameters of a network in order.

    Args:
        gw_syn: gradients on synthetic images; the distance is differentiable in them.
        gw_real: gradients on real images, of the same shapes.
        args: has `dis_metric`. "ours": the sum over layers, and over the rows of each [outputs, rest], of 1 - cosine,
            1e-6 added to the product of norms; vectors, such as biases, do not count. "mse": the sum of squared
            differences. "cos": 1 - cosine of all gradients as one vector. And `device`, where the distance is 0 if
            nothing counts.

    Returns:
        a scalar, of the gradients' dtype.

    Raises:
        UsageError: an unknown metric.
    """
    if args.dis_metric == "ours":
        rows = [(syn, real) for syn, real in zip(gw_syn, gw_real, strict=True) if real.ndim > 1]
        return row_distance(*zip(*rows, strict=True)) if rows else torch.tensor(0.0, device=args.device)
    if args.dis_metric == "cos":
        return cosine_distance(gw_syn, gw_real)
    if args.dis_metric == "mse":  # added up over all layers at once, as theirs
        real, syn = (torch.cat([grad.reshape(-1) for grad in grads]) for grads in (gw_real, gw_syn))
        return ((syn - real) ** 2).sum()
    raise UsageError(f"dis_metric must be ours, mse or cos, got {args.dis_metric!r}")


# The draws: the reference's calls of the generators, in its order
# -----------------------------------------------------------------------------------------------------


def _set_seed(param: Any) -> None:
    if param.latestseed != -1:
        _seeding()(int(param.latestseed))
        param.latestseed += 1


@functools.cache
def _seeding() -> Callable[[int], Any]:
    """What seeds torch's generators.

    `manual_seed` notes the call stack for accelerators that may come, which takes a tenth of a millisecond and more:
    longer than the op. Where there is none, the CPU's generator is all there is to seed.
    """
    return torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed


def _drawn(param: Any, draw: Callable[[], Tensor]) -> Tensor:
    """A draw behind a seed; its first number alone where all images share it."""
    _set_seed(param)
    values = draw().reshape(-1)
    return values[:1] if param.Siamese else values


def _uniform(x: Tensor, param: Any) -> Tensor:
    return _drawn(param, lambda: torch.rand(x.size(0), 1, 1, 1, dtype=x.dtype, device=x.device))


def _whole(x: Tensor, param: Any, low: int, high: int) -> Tensor:
    return _drawn(param, lambda: torch.randint(low, high, size=[x.size(0), 1, 1], device=x.device))


def _color(x: Tensor, param: Any) -> dict[str, Any]:
    return {
        "brightness": (_uniform(x, param) - 0.5) * param.brightness,
        "saturation": _uniform(x, param) * param.saturation,
        "contrast": _uniform(x, param) + param.contrast,
    }


def _crop(x: Tensor, param: Any) -> dict[str, Any]:
    most = [int(side * param.ratio_crop_pad + 0.5) for side in x.shape[2:]]
    return {"shift": [_whole(x, param, -m, m + 1) for m in most]}


def _cutout(x: Tensor, param: Any) -> dict[str, Any]:
    cut = [int(side * param.ratio_cutout + 0.5) for side in x.shape[2:]]
    ends = [side + (1 - c % 2) for side, c in zip(x.shape[2:], cut, strict=True)]
    top, left = (_whole(x, param, 0, end) - c // 2 for end, c in zip(ends, cut, strict=True))
    return {"cut": (top, left, top + cut[0], left + cut[1])}


def _flip(x: Tensor, param: Any) -> dict[str, Any]:
    draws = _drawn(param, lambda: torch.rand(x.size(0), 1, 1, 1, device=x.device))
    return {"mirrored": draws < param.prob_flip}


def _scale(x: Tensor, param: Any) -> dict[str, Any]:
    ratio = param.ratio_scale
    across, down = (
        _drawn(param, lambda: torch.rand(x.shape[0]) * (ratio - 1.0 / ratio) + 1.0 / ratio) for _ in range(2)
    )
    zero = torch.zeros_like(across)
    return {"theta": torch.stack([across, zero, zero, zero, down, zero], dim=1)}


def _rotate(x: Tensor, param: Any) -> dict[str, Any]:
    angle = _drawn(param, lambda: (torch.rand(x.shape[0]) - 0.5) * 2 * param.ratio_rotate / 180 * torch.pi)
    sine, cosine, zero = torch.sin(angle), torch.cos(angle), torch.zeros_like(angle)
    return {"theta": torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1)}


_DRAWS: dict[str, Callable[[Tensor, Any], dict[str, Any]]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}


def _applied(x: Tensor, given: dict[str, Any], param: Any) -> Tensor:
    rows = 1 if param.Siamese else len(x)
    if not given or len(x) == 0:
        return x
    return siamese_augment(x, augment_parameters(rows, device=x.device, **given))
