"""Files that could not be decoded: counted in the manifest, and listed beside it."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable

from ddfast.files import atomic_path
from ddfast.output.distilled import QUARANTINED
from ddfast.pipeline.run import Run

_LISTED = 1000  # files that the manifest names; the table beside it names all


def note_counts(run: Run, unreadable: Callable[[], Iterable[dict[str, str]]]) -> None:
    """Count images, sources and files that could not be decoded in the plan, and write these down.

    Args:
        run: whose plan is filled in; it is not saved.
        unreadable: iterates over {path, reason} of every such file; called once for each pass over them.
    """
    bad = sum(1 for _ in unreadable())
    if bad:
        with atomic_path(run.out / QUARANTINED) as temporary, open(temporary, "wb") as file:
            for row in unreadable():
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))
    listed = heapq.nsmallest(_LISTED, unreadable(), key=lambda row: row["path"])
    images = len(run.source.class_names) * run.plan["ipc"]
    run.plan["counts"] = {"images": images, "sources": len(run.pool()) - bad, "quarantined": bad}
    run.plan["quarantined"] = {"count": bad, "files": listed}
