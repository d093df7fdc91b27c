"""The networks and images that the entries run on: seeded and rendered, or a teacher and a data set of yours.

A fresh checkout has no trained ImageNet-sized network, so the default is torchvision's ResNet-18 with seeded random
weights. How long a forward pass takes does not depend on the weights. How many evaluations an estimator needs does, so
the one entry that counts them (`captum`) should be read with a trained teacher too: `--teacher FILE --data D`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.speed.registry import Settings
from ddfast.errors import UsageError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CALIBRATION_IMAGES = 32


@dataclass(frozen=True)
class Subject:
    """A classifier in eval mode on the device, images to explain and what normalises them.

    Attributes:
        name: what it is, for the tables.
        model: normalised float images [B, 3, S, S] -> logits [B, C].
        images: uint8 [N, 3, S, S].
        labels: int64 [N].
        mean, std: per channel, of pixels in [0, 1].
    """

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalised(self, images: Tensor | None = None) -> Tensor:
        """Float32 images as the model takes them; all of the subject's by default."""
        images = self.images if images is None else images
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def to(self, device: torch.device) -> Subject:
        """The same on a device."""
        return Subject(
            self.name,
            self.model.to(device),
            self.images.to(device),
            self.labels.to(device),
            self.mean,
            self.std,
        )


def subject(settings: Settings, count: int, size: int) -> Subject:
    """`count` images of `size` pixels and ResNet-18: the teacher and data of the settings, else the seeded network.

    Raises:
        UsageError: a teacher without data, or data without a teacher.
    """
    if settings.teacher is not None or settings.data is not None:
        return _taught(settings, count).to(settings.device)
    images = rendered(count, size)
    model = random_resnet18(size)
    found = Subject("seeded ResNet-18", model, images, torch.zeros(count, dtype=torch.int64),
                    IMAGENET_MEAN, IMAGENET_STD).to(settings.device)  # fmt: skip
    with torch.no_grad():
        labels = torch.cat([found.model(found.normalised(part)).argmax(1) for part in found.images.split(32)])
    return Subject(found.name, found.model, found.images, labels, found.mean, found.std)


def _taught(settings: Settings, count: int) -> Subject:
    from ddfast.data import load_all, open_source
    from ddfast.models import load_teacher

    if settings.teacher is None or settings.data is None:
        raise UsageError("--teacher and --data go together: give both or neither")
    teacher = load_teacher(settings.teacher)
    source = open_source(settings.data, "test")
    samples = source.samples[:: max(1, len(source.samples) // count)][:count]
    images, labels, bad = load_all(source, teacher.image_size, samples=samples)
    if bad or len(images) < count:
        raise UsageError(f"{settings.data} has fewer than {count} readable test images")
    name = f"{teacher.arch} taught on {Path(settings.data).stem}"
    return Subject(name, teacher.model, images, labels, teacher.mean, teacher.std)


def rendered(count: int, size: int) -> Tensor:
    """The first `count` images of the demo's rendered set, uint8 [count, 3, size, size]; its classes in turn."""
    from ddfast.demo.shapes import CLASSES, ShapesConfig, render

    config = ShapesConfig(image_size=size)
    pictures = [
        render(index % len(CLASSES), index // len(CLASSES), "test", config)[0] for index in range(count)
    ]
    return torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures])


def random_resnet18(size: int, classes: int = 1000) -> nn.Module:
    """ResNet-18 in eval mode with seeded weights, and BatchNorm statistics of rendered images.

    Without statistics of real activations the residual sums grow from block to block and the network is nearly linear.
    """
    from torchvision.models import resnet18

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet18(num_classes=classes)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = None  # a cumulative mean
    images = rendered(_CALIBRATION_IMAGES, size)
    plain = Subject("", model, images, torch.empty(0), IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        model.train()(plain.normalised())
    for layer in layers:
        layer.momentum = 0.1
    return model.eval()


def group_norm_resnet18(classes: int = 1000) -> nn.Module:
    """ResNet-18 with GroupNorm in eval mode, seeded weights, and no operation in place, as Opacus asks.

    torchvision's blocks add the shortcut in place, into the output of a layer that Opacus has hooked.
    """
    from torchvision.models.resnet import BasicBlock, ResNet

    class Block(BasicBlock):
        """torchvision's block with an addition that makes a new tensor."""

        def forward(self, x: Tensor) -> Tensor:
            shortcut = x if self.downsample is None else self.downsample(x)
            inner = self.relu(self.bn1(self.conv1(x)))
            return self.relu(self.bn2(self.conv2(inner)) + shortcut)

    norm: Callable[..., nn.Module] = partial(nn.GroupNorm, 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNet(Block, [2, 2, 2, 2], num_classes=classes, norm_layer=norm)
    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return model.eval()
