"""Conditional mutual information of features and classes."""

from __future__ import annotations

from torch import Tensor

from ddfast.ops import class_kl


def cmi(features: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Empirical conditional mutual information I(S; Y^ | Y) of features, to add to a distillation loss.

    With P_s = softmax(features_s) and Q_y the mean of P_s over class y, the mean of KL(P_s || Q_y) over rows, as in
    "Going Beyond Feature Similarity: Effective Dataset Distillation based on Class-aware Conditional Mutual
    Information" (CMI). Features are those of a network trained on the real data; the lower the value, the more
    alike the images of a class are to it. Differentiable in features, twice and more.

    Args:
        features: [n, M] floating point, n and M at least 1: penultimate features or logits of the synthetic images.
        labels: int64 [n].
        reduction: "mean" over rows, or "class": the mean over classes of each one's mean.

    Returns:
        a scalar in nats, float32 or float64 for float64.

    Raises:
        TypeError: features not floating point or labels not integer.
        ValueError: shapes that do not fit, or an unknown reduction.
    """
    return class_kl(features, labels, reduction)
