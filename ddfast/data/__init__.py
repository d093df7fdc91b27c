"""Images in: sources, decoding, loading, pools.

Nothing heavy is imported until one of these names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module that holds it. Loaded on first use, so that `import ddfast.data` stays cheap.
_LAZY = {
    "Sample": "ddfast.data.samples",
    "Source": "ddfast.data.sources",
    "open_source": "ddfast.data.opening",
    "sample_id": "ddfast.data.samples",
    "decode": "ddfast.data.decoding",
    "decode_fit": "ddfast.data.decoding",
    "fit": "ddfast.data.decoding",
    "load": "ddfast.data.loading",
    "load_all": "ddfast.data.loading",
    "resolve_loader": "ddfast.data.loaders",
}
# What stood here before `ddfast.output` did, for code that still asks for it here.
_MOVED = (
    "SCORE_SCHEMA",
    "SELECTION_SCHEMA",
    "DistilledSet",
    "export_webdataset",
    "is_readable",
    "make_table",
    "read_table",
    "read_tables",
    "to_numpy",
    "write_table",
)

__all__ = [
    "Sample",
    "Source",
    "decode",
    "decode_fit",
    "fit",
    "load",
    "load_all",
    "open_source",
    "resolve_loader",
    "sample_id",
]

if TYPE_CHECKING:
    from ddfast.data.decoding import decode, decode_fit, fit
    from ddfast.data.loaders import resolve_loader
    from ddfast.data.loading import load, load_all
    from ddfast.data.opening import open_source
    from ddfast.data.samples import Sample, sample_id
    from ddfast.data.sources import Source


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MOVED:
        return getattr(importlib.import_module("ddfast.output"), name)
    raise AttributeError(f"module 'ddfast.data' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
