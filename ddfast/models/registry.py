"""One registry of architectures: `create_model(name, num_classes, image_size)`."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ddfast.errors import UsageError, one_line
from ddfast.models.condensation import alexnet_in, resnet18_in, resnetap10, vgg11_in
from ddfast.models.convnet import DEPTHS, ConvNet
from ddfast.models.normalization import three
from ddfast.models.resnet import resnet, small_resnet
from ddfast.ops.precision import float32_by_default
from ddfast.wording import argument, did_you_mean

Builder = Callable[..., nn.Module]

COMMON_IMAGE = 256  # pixels at which every architecture can be built
# Side in pixels below which a stack of strided layers leaves nothing to pool over.
_SMALLEST_IMAGE = {"alexnet": 63, "vgg11": 32}


def _convnet(
    num_classes: int, image_size: int | None, *, depth: int, norm: str, width: int = 128
) -> nn.Module:
    if image_size is None:
        raise ValueError("a ConvNet needs image_size (its last layer depends on it), got None")
    if width < 1:
        raise ValueError(f"{argument('width')} must be at least 1, got {width}")
    return ConvNet(num_classes, image_size, depth=depth, width=width, norm=norm)


def _resnet(num_classes: int, image_size: int | None, *, variant: str) -> nn.Module:
    plain = variant.removesuffix("_small")
    return resnet(plain, num_classes) if plain == variant else small_resnet(plain, num_classes)


def _torchvision(num_classes: int, image_size: int | None, *, variant: str) -> nn.Module:
    smallest = _SMALLEST_IMAGE.get(variant, 1)
    if image_size is not None and image_size < smallest:
        raise ValueError(f"{variant} needs images of at least {smallest} px, got image_size {image_size}")
    import torchvision

    return getattr(torchvision.models, variant)(weights=None, num_classes=num_classes)


def _any_torchvision(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    """A classifier that torchvision builds by this name."""
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"torchvision has no classifier {name!r}{did_you_mean(name, known)}")
    sized = {"image_size": image_size} if name.startswith("vit_") and image_size is not None else {}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **sized)


def _timm(name: str, num_classes: int, image_size: int | None, **options: Any) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"timm:{name} needs the package timm, which is not installed: pip install timm"
        ) from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"timm has no model {name!r}{'; did you mean ' + ', '.join(near) + '?' if near else ''}"
        )
    config = _timm_config(name)
    if config is not None and config.fixed_input_size and image_size not in (None, config.input_size[-1]):
        options = {"img_size": image_size, **options}
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    except AssertionError as error:
        raise ValueError(f"timm:{name} cannot be built for {image_size} px: {one_line(error)}") from error


def _timm_config(name: str) -> Any:
    """What timm says of a model's weights and images; None where it says nothing.

    Raises:
        ValueError: it has no weights of that tag.
    """
    import timm

    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:
        raise ValueError(f"timm: {one_line(error)}") from error


def described_input(name: str) -> tuple[int, tuple[float, float, float], tuple[float, float, float]] | None:
    """(side in pixels, mean, deviation) of the images that published weights of `timm:NAME` or `torchvision:NAME` read.

    None for any other architecture, and where its library says nothing or is not installed.
    """
    if name.startswith("torchvision:"):
        import torchvision

        plain = name.removeprefix("torchvision:")
        if plain not in torchvision.models.list_models(module=torchvision.models):
            return None
        transform = torchvision.models.get_model_weights(plain).DEFAULT.transforms()
        return int(transform.crop_size[0]), three(transform.mean), three(transform.std)
    if name.startswith("timm:"):
        try:
            config = _timm_config(name.removeprefix("timm:"))
        except (ImportError, ValueError):
            return None
        if config is None or config.input_size[0] != 3 or config.input_size[1] != config.input_size[2]:
            return None
        return int(config.input_size[1]), three(config.mean), three(config.std)
    return None


_BUILDERS: dict[str, Builder] = {
    **{f"convnet{d}": functools.partial(_convnet, depth=d, norm="batch") for d in DEPTHS},
    **{f"convnet{d}_in": functools.partial(_convnet, depth=d, norm="instance") for d in DEPTHS},
    **{
        name: functools.partial(_resnet, variant=name)
        for depth in (18, 50, 101)
        for name in (f"resnet{depth}", f"resnet{depth}_small")
    },
    **{
        name: functools.partial(_torchvision, variant=name)
        for name in ("mobilenet_v2", "vgg11", "alexnet", "swin_v2_t", "efficientnet_b0")
    },
    "alexnet_in": alexnet_in,
    "vgg11_in": vgg11_in,
    "resnet18_in": resnet18_in,
    "resnetap10": resnetap10,
}


def list_models() -> list[str]:
    """Names that `create_model` takes, sorted; `torchvision:NAME`, and `timm:NAME` where timm is installed, as well."""
    return sorted(_BUILDERS)


@float32_by_default()
def create_model(name: str, num_classes: int, image_size: int | None = None, **options: Any) -> nn.Module:
    """Build a freshly initialised classifier of normalised images [B, 3, S, S] -> logits [B, num_classes].

    Weights are drawn from torch's global generator, in train mode, float32.

    Args:
        name: one of `list_models()`, or any classifier of torchvision or timm as `torchvision:NAME` or `timm:NAME`.
        num_classes: number of outputs, at least 1.
        image_size: side S in pixels; ConvNets and the nets of `ddfast.models.condensation` need it, transformers of
            torchvision and timm are built for it, the others only check it.
        options: `width` (channels, default 128) of the ConvNets; timm's own arguments for `timm:NAME`.

    Raises:
        ValueError: unknown name (lists the known ones) or option, or an image size that does not fit.

    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), num_classes, image_size, **options)
    if name.startswith("torchvision:"):
        return _any_torchvision(name.removeprefix("torchvision:"), num_classes, image_size, **options)
    if name not in _BUILDERS:
        near = did_you_mean(name, _BUILDERS)
        raise ValueError(
            f"unknown model {name!r}; known: {', '.join(list_models())}, torchvision:NAME, timm:NAME{near}"
        )
    builder = _BUILDERS[name]
    fixed = builder.keywords if isinstance(builder, functools.partial) else {}
    allowed = set(inspect.signature(builder).parameters) - {"num_classes", "image_size", *fixed}
    if unknown := sorted(set(options) - allowed):
        takes = ", ".join(sorted(allowed)) or "none"
        raise ValueError(f"{name} does not take the option {', '.join(unknown)}; it takes: {takes}")
    return builder(num_classes, image_size, **options)


def check_model(name: str, image_size: int | None = None, *, what: str = "", **options: Any) -> None:
    """Refuse what `create_model` would refuse, without the memory and the random draws of a network.

    Args:
        name: as `create_model`.
        image_size: side in pixels; None where it is not known yet: then only name and options are looked at.
        what: opens the message.
        options: as `create_model`.

    Raises:
        UsageError: one line; it suggests the nearest known name.

    """
    try:
        if not isinstance(name, str):
            raise ValueError(f"the architecture must be a name, got {name!r}")
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            create_model(name, 2, image_size or (None if ":" in name else COMMON_IMAGE), **options)
    except (ValueError, TypeError) as error:
        raise UsageError(what + str(error).replace("image_size", argument("image_size"))) from error
    except (RuntimeError, NotImplementedError):
        return  # one that looks at its own numbers while it is built, which are not there


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Penultimate features [B, F] of normalised images [B, 3, S, S]: the input of the last linear layer.

    Gradients flow through; the model's mode is left as it is.

    Raises:
        ValueError: a model without a linear layer.

    """
    return features_and_logits(model, images)[0]


def features_and_logits(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one pass: see `features`; logits [B, C]."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"{type(model).__name__} has no linear layer, so no penultimate feature")
    seen: list[Tensor] = []
    handle = linears[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits: Tensor = model(images)
    finally:
        handle.remove()
    return torch.flatten(seen[-1], 1), logits
