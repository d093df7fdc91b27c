"""ConvNet-D, the plain convolutional network of the distillation literature.

D blocks of `Conv3x3 (stride 1, padding 1, bias) -> norm -> ReLU -> AvgPool 2x2`, then flatten and one linear
layer. BatchNorm as in RDED; the InstanceNorm variants (`convnet3_in`) use GroupNorm with one group a channel,
as DC, DSA, DM, MTT and IDC do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DEPTHS = (3, 4, 5, 6)


class ConvNet(nn.Module):
    """ConvNet of `depth` blocks and `width` channels for square RGB images.

    Args:
        num_classes: outputs of the last linear layer.
        image_size: side of the images in pixels; a multiple of 2 ** depth.
        depth: number of blocks, each of which halves the side.
        width: channels of every block.
        norm: "batch" (BatchNorm2d) or "instance" (GroupNorm(width, width), with affine parameters).

    Raises:
        ValueError: where 2 ** depth does not divide `image_size`, or `norm` is unknown.

    """

    def __init__(
        self, num_classes: int, image_size: int, *, depth: int = 3, width: int = 128, norm: str = "batch"
    ) -> None:
        super().__init__()
        if norm not in ("batch", "instance"):
            raise ValueError(f"norm must be 'batch' or 'instance', got {norm!r}")
        if image_size <= 0 or image_size % 2**depth:
            raise ValueError(
                f"a ConvNet of depth {depth} halves the image {depth} times: "
                f"image_size must be a multiple of {2**depth}, got {image_size}"
            )
        layers: list[nn.Module] = []
        for block in range(depth):
            layers += [
                nn.Conv2d(3 if block == 0 else width, width, kernel_size=3, padding=1),
                nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(width, width),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * (image_size // 2**depth) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of normalised images [B, 3, image_size, image_size]."""
        return self.classifier(torch.flatten(self.blocks(images), 1))
