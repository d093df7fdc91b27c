"""ResNets: torchvision's own classes without weights, and their variants for small images.

`resnet18_small` is the one RDED, SRe2L and InfoUtil train at 32 and 64 px: torchvision's ResNet-18 with a 3x3
stem of stride 1 and no max-pooling, so that the last feature map of a 32-px image is 4x4. `resnet50_small` and
`resnet101_small` have the same stem.
"""

from __future__ import annotations

from torch import nn


def resnet(name: str, num_classes: int) -> nn.Module:
    """Torchvision's `name` (resnet18, resnet50 or resnet101) without weights, with `num_classes` outputs."""
    import torchvision

    return getattr(torchvision.models, name)(weights=None, num_classes=num_classes)


def small_resnet(name: str, num_classes: int) -> nn.Module:
    """Torchvision's `name` with a 3x3 stride-1 stem and no max-pool, for images of about 32 to 64 px."""
    model = resnet(name, num_classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
