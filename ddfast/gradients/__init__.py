"""Per-sample gradient norms: the utility score of InfoUtil, and the same number three ways."""

from ddfast.gradients.norms import METHODS, grad_norm

__all__ = ["METHODS", "grad_norm"]
