"""The variational estimator of IGDS: an encoder, a projection of its features, and a linear classifier on them.

A class is read off the features, and so bounds I(X; Y) from below; the softmax of the projection spreads within a
class, which bounds H(X | Y). Trained by `ddfast.training.estimator`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ddfast.arguments import path_of
from ddfast.errors import UsageError, one_line, shown
from ddfast.models.registry import create_model
from ddfast.state import read_tensors, serialize_tensors
from ddfast.wording import argument, on_command_line, plural

FORMAT = "ddfast-estimator-1"
METADATA_KEY = "ddfast_estimator"
PROJECTION = 128  # MoCo v2: numbers of the projection, behind a layer as wide as the features
SOFTPLUS = 3.0  # sharpness of the Softplus that stands for ReLU where images get gradients


class Encoder(nn.Module):
    """A network of the registry without its last layer, and MoCo v2's projection of its features.

    Args:
        arch: name for `create_model`, `timm:NAME` or `torchvision:NAME`.
        image_size: side of the images in pixels.
    """

    def __init__(self, arch: str, image_size: int, **options: Any) -> None:
        super().__init__()
        network = _network(arch, image_size, options)
        name, last = [pair for pair in network.named_modules() if isinstance(pair[1], nn.Linear)][-1]
        self.width, self.last = last.in_features, name
        if name:
            network.set_submodule(name, nn.Identity())
        self.network = network
        self.projection = nn.Sequential(
            nn.Linear(self.width, self.width), nn.ReLU(), nn.Linear(self.width, PROJECTION)
        )

    def features(self, images: Tensor) -> Tensor:
        """The network's features [B, F] of normalised images [B, 3, S, S]."""
        return torch.flatten(self.network(images), 1)

    def project(self, features: Tensor) -> Tensor:
        """Projected features of length 1, float32 [B, 128]."""
        return F.normalize(self.projection(features).float(), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """`project` of `features`: what MoCo compares."""
        return self.project(self.features(images))


def _network(arch: str, image_size: int, options: dict[str, Any]) -> nn.Module:
    if arch.startswith("torchvision:"):
        import torchvision

        name = arch.removeprefix("torchvision:")
        try:
            network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
        except (ValueError, KeyError) as error:
            raise ValueError(f"torchvision has no model {name!r}") from error
    else:
        network = create_model(arch, 2, image_size, **options)
    if not any(isinstance(module, nn.Linear) for module in network.modules()):
        raise ValueError(f"{arch} has no linear layer, so no features for an estimator")
    return network


class Softplus(nn.Softplus):
    """log(1 + exp(beta x)) / beta; float32 on a CPU without the slow log1p of PyTorch's, to 1e-6 of the same."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Softplus`."""
        if input.dtype != torch.float32 or input.device.type != "cpu":
            return super().forward(input)
        found: Tensor = _Softplus.apply(input, self.beta)
        return found


class _Softplus(torch.autograd.Function):
    """-log(sigmoid(-beta x)) / beta, in one buffer; x itself where that is all that float32 tells."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, beta: float) -> Tensor:
        ctx.save_for_backward(input)
        ctx.beta = beta
        found = (input * -beta).sigmoid_().clamp_min_(1e-30).log_().mul_(-1 / beta)
        return torch.maximum(found, input, out=found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (input,) = ctx.saved_tensors
        return (input * ctx.beta).sigmoid_().mul_(grad), None


def smoothed(encoder: Encoder) -> Encoder:
    """A copy, which shares the parameters, with Softplus of sharpness 3 for every ReLU: smooth in the images."""
    shared: dict[int, Any] = {id(each): each for each in [*encoder.parameters(), *encoder.buffers()]}
    smooth = copy.deepcopy(encoder, shared)
    for module in list(smooth.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.ReLU, nn.ReLU6)):
                setattr(module, name, Softplus(beta=SOFTPLUS))
    return smooth


@dataclass
class Estimator:
    """A trained estimator.

    Attributes:
        encoder: with ReLU, as it was trained; eval mode, float32, on the CPU, frozen.
        classifier: linear, on the features of the smoothed encoder: [B, F] -> logits [B, C].
        arch: of the encoder.
        class_names: the C classes in the order of the logits.
        image_size: side of its images in pixels.
        mean, std: per channel, of images in [0, 1].
        tau: temperature of the contrast it was trained by, and of its softmax.
        top1: test accuracy of the classifier in percent, None where it was not measured.
        facts: all that the file says of it.
        path: what it was loaded from; None where it was made in memory.
    """

    encoder: Encoder
    classifier: nn.Linear
    arch: str
    class_names: list[str]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tau: float
    top1: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    path: str | None = None

    def __post_init__(self) -> None:
        self.smooth = smoothed(self.encoder)

    def to(self, device: torch.device) -> Estimator:
        """Move the networks to a device, and return the same estimator."""
        self.encoder.to(device)
        self.smooth = smoothed(self.encoder)
        self.classifier.to(device)
        return self

    def normalised(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [-1, 1] as the encoder takes them, resized where S is another; differentiable."""
        if images.shape[-1] != self.image_size:
            images = F.interpolate(
                images, size=self.image_size, mode="bilinear", align_corners=False, antialias=True
            )
        mean, std = (
            torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self.mean, self.std)
        )
        return (images * 0.5 + (0.5 - mean)) / std

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Projections [B, 128] of length 1, and logits [B, C], of images [B, 3, S, S] in [-1, 1]; differentiable."""
        features = self.smooth.features(self.normalised(images)).float()
        return self.smooth.project(features), self.classifier(features)

    def places_of(self, class_names: Sequence[str]) -> list[int]:
        """The logits of these classes.

        Raises:
            UsageError: it knows others.
        """
        if lacking := [name for name in class_names if name not in self.class_names]:
            raise UsageError(
                f"the estimator {self.path} does not know the class {shown(lacking[:1])}: it knows "
                f"{shown(self.class_names, 3)}; give one that was trained on this run's data"
            )
        return [self.class_names.index(name) for name in class_names]

    def check_gradients(self) -> None:
        """See on a grey image with noise that images get a gradient of what is read from them.

        Raises:
            UsageError: they get none.
        """
        draws = torch.Generator().manual_seed(0)
        images = 0.5 * torch.randn(2, 3, self.image_size, self.image_size, generator=draws)
        images = images.to(self.classifier.weight.device).requires_grad_()
        try:
            with torch.enable_grad():
                projections, logits = self.read(images)
                wanted = projections.square().sum(dim=0)[0] + logits.square().sum()
            (gradient,) = torch.autograd.grad(wanted, images)
            found = bool(gradient.isfinite().all()) and bool(gradient.any())
        except RuntimeError:
            found = False
        if not found:
            raise UsageError(
                f"the estimator {self.path} gives images no gradient (encoder {self.arch}), so it cannot guide: train "
                "one with another --arch"
            )


def estimator_bytes(
    encoder: Encoder,
    classifier: nn.Linear,
    *,
    arch: str,
    class_names: Sequence[str],
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    tau: float,
    **facts: Any,
) -> bytes:
    """The bytes of an estimator's file; equal arguments give equal bytes."""
    header = {
        "format": FORMAT,
        "arch": arch,
        "class_names": list(class_names),
        "image_size": image_size,
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "tau": tau,
        **facts,
    }
    tensors = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    tensors |= {f"classifier.{name}": value for name, value in classifier.state_dict().items()}
    return serialize_tensors(tensors, {METADATA_KEY: header})


def read_estimator_header(path: Path) -> dict[str, Any] | None:
    """What an estimator's file says of itself; None where there is none, or it is another file or damaged."""
    try:
        header = read_tensors(path, path.read_bytes(), what="estimator")[1].get(METADATA_KEY)
    except (UsageError, OSError):
        return None
    return header if isinstance(header, dict) and header.get("format") == FORMAT else None


def load_estimator(spec: str | Path) -> Estimator:
    """Load an estimator in eval mode, float32, on the CPU, frozen.

    Raises:
        UsageError: no such file, another kind of file, or a damaged one.
    """
    path = _file(spec)
    tensors, said = read_tensors(path, path.read_bytes(), what="estimator")
    header = said.get(METADATA_KEY)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UsageError(f"{path} is no estimator of this version: make one with {_advice()}")
    try:
        encoder = Encoder(header["arch"], header["image_size"], **header.get("arch_options", {}))
        classifier = nn.Linear(encoder.width, len(header["class_names"]))
        encoder.load_state_dict(_behind(tensors, "encoder."))
        classifier.load_state_dict(_behind(tensors, "classifier."))
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): copy it again, or train it anew") from error
    if any(not bool(value.isfinite().all()) for value in tensors.values() if value.is_floating_point()):
        raise UsageError(f"{path} holds NaN or infinity: train it anew")
    return Estimator(
        encoder.eval().requires_grad_(False),
        classifier.eval().requires_grad_(False),
        arch=header["arch"],
        class_names=[str(name) for name in header["class_names"]],
        image_size=int(header["image_size"]),
        mean=tuple(header["mean"]),
        std=tuple(header["std"]),
        tau=float(header["tau"]),
        top1=header.get("top1"),
        facts=header,
        path=str(path),
    )


def estimator_identity(spec: str | Path) -> dict[str, Any]:
    """What a manifest says of an estimator: "arch", "top1" in percent or None, "lambda", and the file's "sha256".

    Raises:
        UsageError: no such file, or it is no estimator.
    """
    path = _file(spec)
    header = read_estimator_header(path)
    if header is None:
        load_estimator(path)  # says what is wrong with it
        header = {}
    return {
        "arch": header.get("arch"),
        "top1": header.get("top1"),
        "lambda": header.get("training", {}).get("kl"),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def _file(spec: str | Path) -> Path:
    path = path_of(spec, "estimator")
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "is no file"
        raise UsageError(f"{argument('estimator')} {path} {what}: give one of {_advice()}")
    return path


def _advice() -> str:
    return "ddfast train-estimator" if on_command_line() else "ddfast.training.train_estimator"


def _behind(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def describe(header: dict[str, Any]) -> str:
    """An estimator's file in words."""
    reached = "" if header.get("top1") is None else f", linear top-1 {header['top1']:.2f}%"
    epochs = header.get("training", {}).get("epochs")
    return f"an estimator, {header.get('arch')}{'' if epochs is None else ', ' + plural(epochs, 'epoch')}{reached}"
