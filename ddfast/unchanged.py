"""Models that nobody changes for a while, so that what is found of one holds and is looked for once.

`shapley` and `grad_norm` look at a model anew in every call: whether it is in eval mode, whether its weights are those
of the last call, whether what was prepared for it gives what it gives. A run that calls them ten thousand times with a
model of its own says so once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HELD = threading.local()


@contextmanager
def unchanged(*models: Any) -> Iterator[None]:
    """Context in which the caller changes none of the models, in this thread: no weight, no setting, no mode."""
    before: dict[int, dict[Any, Any]] = getattr(_HELD, "found", {})
    _HELD.found = {**before, **{id(model): before.get(id(model), {}) for model in models}}
    try:
        yield
    finally:
        _HELD.found = before


@contextmanager
def still_unchanged(model: Any, found: dict[Any, Any]) -> Iterator[None]:
    """`unchanged` for a model that was not changed since an earlier one either, with what was found then."""
    with unchanged(model):
        _HELD.found[id(model)] = found
        yield


def found_of(model: Any) -> dict[Any, Any] | None:
    """What was found of a model since its `unchanged` began, to be read and added to; None outside of one."""
    found: dict[int, dict[Any, Any]] = getattr(_HELD, "found", {})
    return found.get(id(model))
