"""K-means: the image nearest each centre of a class's clusters.

Lloyd's algorithm on the features of each class with as many clusters as images are needed, from the seeds of k-means++
(Arthur & Vassilvitskii, SODA 2007), the best of several restarts. Another IPC makes other clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddfast.methods.selection.coreset import Coreset, squared_distances, unit_length_option
from ddfast.philox import philox4x32
from ddfast.settings import option


@dataclass(frozen=True)
class KMeansOptions:
    """Options of k-means."""

    unit_length: bool = unit_length_option()
    restarts: int = option(
        10, "clusterings from other seeds; the one with the least inertia counts", stage="select"
    )
    iterations: int = option(100, "most steps of Lloyd's algorithm in each", stage="select")

    def __post_init__(self) -> None:
        for name in ("restarts", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class KMeans(Coreset):
    """One image of each cluster."""

    name = "k_means"
    summary = "whole images nearest the centres of their class's clusters"
    Options = KMeansOptions

    def pick(self, features: Tensor, needed: int, key: int) -> tuple[Tensor, Tensor]:
        """Large clusters first. The score of a pick is minus its distance from the centre of its cluster."""
        tries = (self._clustered(features, needed, key, restart) for restart in range(self.options.restarts))
        _, best = min(tries, key=lambda found: found[0])
        centres, sizes = means(features, best, needed)
        own = (features - centres[best]).square().sum(dim=1)  # squared distance from the cluster's centre
        picks = torch.stack([own.masked_fill(best != c, torch.inf).argmin() for c in range(needed)])
        order = (
            picks.argsort()
        )  # clusters have no order of their own; of equally large ones the lower id is first
        order = order[sizes[order].argsort(descending=True, stable=True)]
        return picks[order], -own[picks[order]].sqrt()

    def _clustered(self, features: Tensor, clusters: int, key: int, restart: int) -> tuple[float, Tensor]:
        """Inertia, the sum of squared distances from the centres, and cluster of each image, int64 [n]."""
        seeds = seed_clusters(features, clusters, key, restart)
        cluster = lloyd(features, features[seeds], self.options.iterations)
        centres, _ = means(features, cluster, clusters)
        return float((features - centres[cluster]).square().sum()), cluster


def seed_clusters(features: Tensor, clusters: int, key: int, restart: int) -> Tensor:
    """k-means++: places int64 [clusters], each drawn with a chance that grows with its squared distance from those
    before it. The draw of step t is Philox(key, counter (restart, t, 0, 0)). Repeated images are drawn last."""
    counters = torch.zeros(clusters, 4, dtype=torch.int64)
    counters[:, 0], counters[:, 1] = restart, torch.arange(clusters)
    draws = philox4x32(counters, key)[:, 0].double() / 2**32
    chosen = torch.empty(clusters, dtype=torch.int64)
    weight = torch.ones(len(features), dtype=torch.float64)
    for t in range(clusters):
        if not bool(weight.any()):  # fewer distinct images than clusters
            weight = torch.ones_like(weight).index_fill_(0, chosen[:t], 0)
        total = weight.cumsum(dim=0)
        chosen[t] = torch.searchsorted(total, draws[t] * total[-1], right=True).clamp(max=len(features) - 1)
        away = squared_distances(features, features[chosen[t]])
        weight = away if t == 0 else torch.minimum(weight, away)
    return chosen


def lloyd(features: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Cluster of each image, int64 [n], after Lloyd's algorithm from `centres` [k, F]; no cluster is empty."""
    clusters = len(centres)
    before = None
    for _ in range(iterations):
        # ||x - c||^2 without ||x||^2, which is the same for every centre.
        apart = centres.square().sum(dim=1) - 2 * features @ centres.T
        cluster = apart.argmin(dim=1)
        _fill_empty(features, centres, cluster)
        if before is not None and torch.equal(cluster, before):
            break
        before = cluster
        centres, _ = means(features, cluster, clusters)
    return cluster


def _fill_empty(features: Tensor, centres: Tensor, cluster: Tensor) -> None:
    """Give every empty cluster the image that is farthest from its own centre and not alone there, in place."""
    sizes = torch.bincount(cluster, minlength=len(centres))
    for empty in torch.nonzero(sizes == 0).flatten().tolist():
        away = (features - centres[cluster]).square().sum(dim=1)
        away[sizes[cluster] < 2] = -1
        moved = away.argmax()
        sizes[cluster[moved]] -= 1
        sizes[empty] += 1
        cluster[moved] = empty


def means(features: Tensor, cluster: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Mean feature [clusters, F] and size int64 [clusters] of each cluster."""
    sizes = torch.bincount(cluster, minlength=clusters)
    sums = torch.zeros(clusters, features.shape[1], dtype=features.dtype).index_add_(0, cluster, features)
    return sums / sizes[:, None], sizes
