"""The op layer: one documented face for each fused op `ddfast::<name>`."""

from ddfast.ops import _attribution
from ddfast.ops._crops import crop_resize
from ddfast.ops._dispatch import paths
from ddfast.ops._gradients import (
    grad_sq_norm_conv2d,
    grad_sq_norm_embedding,
    grad_sq_norm_linear,
    grad_sq_norm_norm,
)

__all__ = [
    "crop_resize",
    "grad_sq_norm_conv2d",
    "grad_sq_norm_embedding",
    "grad_sq_norm_linear",
    "grad_sq_norm_norm",
    "paths",
]
