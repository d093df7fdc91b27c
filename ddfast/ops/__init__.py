"""The op layer: one documented face for each fused op `ddfast::<name>`."""

from ddfast.ops import _attribution, _crops, _gradients
from ddfast.ops._dispatch import paths

__all__ = ["paths"]
