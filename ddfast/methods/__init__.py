"""Distillation methods: one file each, a small base class, a registry, and the pipeline that runs them."""

from __future__ import annotations

from ddfast.errors import UsageError
from ddfast.methods.base import Method
from ddfast.wording import did_you_mean

__all__ = ["Method", "get_method", "list_methods"]


def _registry() -> dict[str, type[Method]]:
    from ddfast.methods.diffusion.igds import IGDS
    from ddfast.methods.matching.dc import DC
    from ddfast.methods.matching.dm import DM
    from ddfast.methods.matching.dsa import DSA
    from ddfast.methods.matching.idc import IDC
    from ddfast.methods.matching.idm import IDM
    from ddfast.methods.matching.mtt import MTT
    from ddfast.methods.matching.sre2l import SRe2L
    from ddfast.methods.matching.udd import UDD
    from ddfast.methods.selection.forgetting import Forgetting
    from ddfast.methods.selection.herding import Herding
    from ddfast.methods.selection.infoutil import InfoUtil
    from ddfast.methods.selection.k_center import KCenter
    from ddfast.methods.selection.k_means import KMeans
    from ddfast.methods.selection.random import Random, RandomHard
    from ddfast.methods.selection.rded import RDED

    matching = (DM, DC, DSA, IDC, IDM, UDD, MTT, SRe2L)
    listed = (InfoUtil, RDED, Random, Herding, KCenter, KMeans, Forgetting, *matching, IGDS)
    return {method.name: method for method in (*listed, RandomHard)}


def list_methods() -> list[str]:
    """Names of the methods, the main one first."""
    return [name for name, method in _registry().items() if method.listed]


def get_method(name: str) -> type[Method]:
    """The method class called `name`.

    Raises:
        UsageError: unknown name; the message lists the known ones.
    """
    registry = _registry()
    if not isinstance(name, str) or name not in registry:
        known = list_methods()
        near = did_you_mean(name, known)
        raise UsageError(f"unknown method {name!r}; known methods: {', '.join(known)}{near}")
    return registry[name]
