"""What people look at: pictures, the report of a run, the page of a comparison, heatmaps, the environment.

Nothing heavy is imported until one of these names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module that holds it. Loaded on first use, so that `import ddfast.report` stays cheap.
_LAZY = {
    "write_report": "page",
    "Arm": "comparison",
    "write_comparison": "comparison",
    "heatmap_picture": "pictures",
    "mosaic_picture": "pictures",
}

__all__ = ["Arm", "heatmap_picture", "mosaic_picture", "write_comparison", "write_report"]

if TYPE_CHECKING:
    from ddfast.report.comparison import Arm, write_comparison
    from ddfast.report.page import write_report
    from ddfast.report.pictures import heatmap_picture, mosaic_picture


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"ddfast.report.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'ddfast.report' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
