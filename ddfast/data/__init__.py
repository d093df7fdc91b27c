"""Images in and distilled sets out: sources, decoding, loading, the score table, and the output folder.

Nothing heavy is imported until one of these names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module that holds it. Loaded on first use, so that `import ddfast.data` stays cheap.
_LAZY = {
    "Sample": "samples",
    "Source": "sources",
    "open_source": "sources",
    "sample_id": "samples",
    "decode": "decoding",
    "decode_fit": "decoding",
    "fit": "decoding",
    "export_webdataset": "webdataset_export",
    "load": "loading",
    "load_all": "loading",
    "resolve_loader": "loaders",
    "SCORE_SCHEMA": "table",
    "SELECTION_SCHEMA": "table",
    "is_readable": "table",
    "make_table": "table",
    "read_table": "table",
    "read_tables": "table",
    "to_numpy": "table",
    "write_table": "table",
    "DistilledSet": "distilled",
}

__all__ = [
    "SCORE_SCHEMA",
    "SELECTION_SCHEMA",
    "DistilledSet",
    "Sample",
    "Source",
    "decode",
    "decode_fit",
    "export_webdataset",
    "fit",
    "is_readable",
    "load",
    "load_all",
    "make_table",
    "open_source",
    "read_table",
    "read_tables",
    "resolve_loader",
    "sample_id",
    "to_numpy",
    "write_table",
]

if TYPE_CHECKING:
    from ddfast.data.decoding import decode, decode_fit, fit
    from ddfast.data.distilled import DistilledSet
    from ddfast.data.loaders import resolve_loader
    from ddfast.data.loading import load, load_all
    from ddfast.data.samples import Sample, sample_id
    from ddfast.data.sources import Source, open_source
    from ddfast.data.table import (
        SCORE_SCHEMA,
        SELECTION_SCHEMA,
        is_readable,
        make_table,
        read_table,
        read_tables,
        to_numpy,
        write_table,
    )
    from ddfast.data.webdataset_export import export_webdataset


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"ddfast.data.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'ddfast.data' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
