"""The networks on which the matching methods train and compare (DC, DSA, DM, MTT, IDC and what followed them).

Small-image variants of known architectures, with InstanceNorm, realised as GroupNorm with one group a channel.
`alexnet_in`, `vgg11_in` and `resnet18_in` are those of DC's networks.py (AlexNet has no norm there; its name
only says which family it is of), `resnetap10` is IDC's ResNet-10 that pools where others stride.
"""

from __future__ import annotations

from torch import Tensor, nn

_VGG11 = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")


def _instance_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels, channels)


def _halved(name: str, image_size: int | None, times: int) -> int:
    """Side of the image after `times` halvings.

    Raises:
        ValueError: no image size, or one that cannot be halved so often.
    """
    if image_size is None or image_size <= 0 or image_size % 2**times:
        raise ValueError(
            f"{name} halves the image {times} times: image_size must be a multiple of {2**times}, got {image_size}"
        )
    return image_size // 2**times


def alexnet_in(num_classes: int, image_size: int | None) -> nn.Module:
    """AlexNet for small images: five convolutions, three max-pools, one linear layer; 3072 features at 32 px."""
    side = _halved("alexnet_in", image_size, 3)
    return nn.Sequential(
        nn.Conv2d(3, 128, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(128, 192, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(192, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 192, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(192, 192, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(192 * side**2, num_classes),
    )


def vgg11_in(num_classes: int, image_size: int | None) -> nn.Module:
    """VGG-11 with InstanceNorm and a single linear layer; 512 features at 32 px."""
    side = _halved("vgg11_in", image_size, 5)
    layers: list[nn.Module] = []
    channels = 3
    for entry in _VGG11:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(2))
        else:
            convolution = nn.Conv2d(channels, entry, kernel_size=3, padding=1)
            layers += [convolution, _instance_norm(entry), nn.ReLU(inplace=True)]
            channels = entry
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**2, num_classes))


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut. Halves the image by the first one's stride, or by pooling behind it."""

    def __init__(self, inputs: int, outputs: int, *, halve: bool, pooled: bool) -> None:
        super().__init__()
        stride = 2 if halve and not pooled else 1
        pool = nn.AvgPool2d(2) if halve and pooled else nn.Identity()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
            _instance_norm(outputs),
            nn.ReLU(inplace=True),
            pool,
            nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False),
            _instance_norm(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if halve or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False),
                pool,
                _instance_norm(outputs),
            )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H, W], or half of each side."""
        return self.activation(self.residual(x) + self.shortcut(x))  # type: ignore[no-any-return]


def _stages(widths: tuple[int, ...], blocks: int, *, pooled: bool) -> list[nn.Module]:
    """Stages of `blocks` blocks; every stage but the first halves the image. The stem has the first width."""
    layers: list[nn.Module] = []
    channels = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(_Block(channels, width, halve=stage > 0 and block == 0, pooled=pooled))
            channels = width
    return layers


def resnet18_in(num_classes: int, image_size: int | None) -> nn.Module:
    """ResNet-18 with InstanceNorm and a 3x3 stem of stride 1; 512 features at 32 px, 2048 at 64 px."""
    side = _halved("resnet18_in", image_size, 3)
    if side % 4:
        raise ValueError(
            f"resnet18_in pools 4x4 at the end: image_size must be a multiple of 32, got {image_size}"
        )
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False),
        _instance_norm(64),
        nn.ReLU(inplace=True),
        *_stages((64, 128, 256, 512), 2, pooled=False),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512 * (side // 4) ** 2, num_classes),
    )


def resnetap10(num_classes: int, image_size: int | None) -> nn.Module:
    """IDC's ResNetAP-10: one block a stage, average pooling instead of strides, InstanceNorm.

    Four stages of 32 to 256 channels up to 32 px, of 64 to 512 beyond. The stem keeps the side of images up to 64 px,
    halves it up to 128 px and quarters it beyond. Convolutions start He-normal by fan-out.
    """
    if image_size is None or image_size < 8:
        raise ValueError(f"resnetap10 needs image_size, at least 8 px, got {image_size}")
    widths = (32, 64, 128, 256) if image_size <= 32 else (64, 128, 256, 512)
    kernel, pool = (3, 1) if image_size <= 64 else (3, 2) if image_size <= 128 else (7, 4)
    model = nn.Sequential(
        nn.Conv2d(3, widths[0], kernel_size=kernel, padding=kernel // 2, bias=False),
        _instance_norm(widths[0]),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(pool) if pool > 1 else nn.Identity(),
        *_stages(widths, 1, pooled=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], num_classes),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
