"""`accelerate`: serve existing code that calls another library's explainers, unchanged."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

_LIBRARIES = ("captum",)
_lock = threading.RLock()
_active = 0
_installed: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {}
"""Captum's class -> (its own `attribute`, the one that stands in its place)."""


class Acceleration:
    """What `accelerate` did. `undo()`, or leaving the `with` block, takes it back; a second time does nothing."""

    def __init__(self) -> None:
        self._done = False

    def undo(self) -> None:
        """Give the library its own methods back, unless another `accelerate` still holds them."""
        with _lock:
            if not self._done:
                self._done = True
                _release()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def accelerate(*libraries: str) -> Acceleration:
    """Let ddfast answer the calls of a library's explainers, in code that knows nothing of ddfast.

    "captum": `attribute` of `captum.attr.KernelShap`, `ShapleyValueSampling` and `ShapleyValues` is replaced in
    the classes themselves, so it serves instances made earlier, modules that imported the classes earlier, and
    subclasses. Arguments, shapes, warnings and random draws stay Captum's (see `ddfast.captum.explainers`).
    An overridden hook, or a call that ddfast cannot answer as Captum does, goes to Captum's own method.

    Use it as a context manager, `with ddfast.accelerate("captum"): ...`, or call it once and keep what it
    returns for `undo()`. Calls nest: the methods return when the last one is undone.

    Args:
        libraries: "captum".

    Raises:
        ValueError: no name, or an unknown one.
        ImportError: Captum is not installed.
    """
    unknown = [name for name in libraries if name not in _LIBRARIES]
    if unknown or not libraries:
        got = ", ".join(repr(name) for name in unknown) or "no name"
        raise ValueError(f"accelerate takes the names of libraries, {', '.join(_LIBRARIES)}, got {got}")
    with _lock:
        _hold()
    return Acceleration()


def _hold() -> None:
    global _active
    import ddfast.captum  # noqa: F401 - says what to install where Captum is missing
    from ddfast.captum import explainers as ours

    if not _active:
        for theirs, attribute in ours.replacements().items():
            own = theirs.__dict__["attribute"]
            _installed[theirs] = own, _standing_in(own, attribute)
            theirs.attribute = _installed[theirs][1]
    _active += 1


def _release() -> None:
    global _active
    _active -= 1
    if not _active:
        for theirs, (own, standing_in) in _installed.items():
            # Whoever patched the class in the meantime keeps their patch; below it, ours only passes calls on.
            if theirs.__dict__.get("attribute") is standing_in:
                theirs.attribute = own
        _installed.clear()


def _standing_in(own: Callable[..., Any], attribute: Callable[..., Any]) -> Callable[..., Any]:
    """`attribute` in the place of Captum's `own`: its name, documentation, signature and `__wrapped__` depth."""
    from captum.log import log_usage

    @functools.wraps(own)
    def served(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (attribute if _active else own)(self, *args, **kwargs)

    return log_usage(part_of_slo=True)(served)
