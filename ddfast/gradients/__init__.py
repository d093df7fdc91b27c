"""Per-sample gradient norms, the utility score of InfoUtil, and the exact gradient through a training."""

from ddfast.gradients.norms import METHODS, grad_norm
from ddfast.gradients.unrolled import UnrolledGradient, unrolled_gradient

__all__ = ["METHODS", "UnrolledGradient", "grad_norm", "unrolled_gradient"]
