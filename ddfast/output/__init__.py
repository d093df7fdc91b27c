"""What a run leaves: the distilled set, optimised pixels, the score table, label parts, and export to WebDataset
and Hugging Face.

Nothing heavy is imported until one of these names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module that holds it. Loaded on first use, so that `import ddfast.output` stays cheap.
_LAZY = {
    "CURVE": "ddfast.output.pixels",
    "Distilled": "ddfast.output.distilled_folder",
    "DistilledSet": "ddfast.output.distilled",
    "Pixels": "ddfast.output.pixels",
    "SCORE_SCHEMA": "ddfast.output.table",
    "SELECTION_SCHEMA": "ddfast.output.table",
    "is_readable": "ddfast.output.table",
    "make_table": "ddfast.output.table",
    "read_curve": "ddfast.output.pixels",
    "read_pixels": "ddfast.output.pixels",
    "read_table": "ddfast.output.table",
    "read_tables": "ddfast.output.table",
    "to_bytes": "ddfast.output.pixels",
    "to_numpy": "ddfast.output.table",
    "to_unit": "ddfast.output.pixels",
    "write_before": "ddfast.output.pixels",
    "write_curve": "ddfast.output.pixels",
    "write_pixels": "ddfast.output.pixels",
    "write_table": "ddfast.output.table",
    "export_huggingface": "ddfast.output.huggingface",
    "export_webdataset": "ddfast.output.webdataset",
}

__all__ = [
    "CURVE",
    "SCORE_SCHEMA",
    "SELECTION_SCHEMA",
    "Distilled",
    "DistilledSet",
    "Pixels",
    "export_huggingface",
    "export_webdataset",
    "is_readable",
    "make_table",
    "read_curve",
    "read_pixels",
    "read_table",
    "read_tables",
    "to_bytes",
    "to_numpy",
    "to_unit",
    "write_before",
    "write_curve",
    "write_pixels",
    "write_table",
]

if TYPE_CHECKING:
    from ddfast.output.distilled import DistilledSet
    from ddfast.output.distilled_folder import Distilled
    from ddfast.output.huggingface import export_huggingface
    from ddfast.output.pixels import (
        CURVE,
        Pixels,
        read_curve,
        read_pixels,
        to_bytes,
        to_unit,
        write_before,
        write_curve,
        write_pixels,
    )
    from ddfast.output.table import (
        SCORE_SCHEMA,
        SELECTION_SCHEMA,
        is_readable,
        make_table,
        read_table,
        read_tables,
        to_numpy,
        write_table,
    )
    from ddfast.output.webdataset import export_webdataset


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ddfast.output' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
