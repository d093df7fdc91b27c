"""Captum's Shapley explainers with Captum's signatures and shapes, many times faster.

`KernelShap`, `ShapleyValueSampling` and `ShapleyValues` take the place of those of `captum.attr`. See
`ddfast.captum.explainers` for what is the same and what is not, and `ddfast.accelerate` to serve code that
imports Captum itself.
"""

try:
    import captum.attr as _captum_attr  # noqa: F401
except ImportError as error:
    raise ImportError(
        "ddfast.captum needs captum, which is not installed: pip install 'ddfast[bench]'"
    ) from error

from ddfast.captum.explainers import KernelShap, ShapleyValues, ShapleyValueSampling

__all__ = ["KernelShap", "ShapleyValueSampling", "ShapleyValues"]
