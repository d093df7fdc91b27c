"""Extension of the API pages: `ddfast.distill` with every setting of a run in its signature and documentation.

The decorator that puts them there works when the module is imported, which the pages are made without.
"""

from __future__ import annotations

import inspect
from typing import Any

import griffe


class SettingsOfARun(griffe.Extension):
    """Takes signature and documentation of decorated functions from the functions themselves."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Fill in what `ddfast.settings.described` adds."""
        if not any(str(each.value) == "described" for each in func.decorators):
            return
        from importlib import import_module

        told = getattr(import_module(func.module.path), func.name)
        if func.docstring is not None:
            func.docstring.value = inspect.getdoc(told) or ""
        func.parameters = griffe.Parameters(*map(_parameter, inspect.signature(told).parameters.values()))


def _parameter(given: inspect.Parameter) -> griffe.Parameter:
    kinds = {
        inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
        inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
        inspect.Parameter.VAR_KEYWORD: griffe.ParameterKind.var_keyword,
    }
    empty = inspect.Parameter.empty
    return griffe.Parameter(
        given.name,
        annotation=None if given.annotation is empty else str(given.annotation),
        kind=kinds[given.kind],
        default=None if given.default is empty else repr(given.default),
    )
