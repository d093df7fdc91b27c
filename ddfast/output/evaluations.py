"""`evaluations.json`: how students did that were trained on a set; outside its identity, as `run.json` is.

A list with an object for each evaluation: what `EvaluationResult.as_dict` holds, and under "set" 12 hex digits of the
manifest's SHA-256. A folder that was selected from again is another set, and its old results are told apart by that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ddfast.errors import UsageError, one_line
from ddfast.files import atomic_write_text
from ddfast.output.distilled import MANIFEST

EVALUATIONS = "evaluations.json"


def set_digest(root: str | Path) -> str:
    """12 hex digits that say which set a folder holds.

    Raises:
        UsageError: it has no manifest.
    """
    path = Path(root) / MANIFEST
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({one_line(error)})") from error


def read_evaluations(root: str | Path) -> list[dict[str, Any]]:
    """The results that are kept in a folder, the oldest first; [] where there are none.

    Raises:
        UsageError: the file is damaged.
    """
    path = Path(root) / EVALUATIONS
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): mend or delete it") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UsageError(f"{path} is damaged (no list of objects): mend or delete it")
    return found


def evaluations_of_set(root: str | Path) -> list[dict[str, Any]]:
    """Those of the set that the folder holds now. Errors as `read_evaluations`."""
    found = read_evaluations(root)
    digest = set_digest(root) if found else ""
    return [one for one in found if one.get("set") == digest]


def keep_evaluation(root: str | Path, result: Mapping[str, Any]) -> None:
    """Add a result to `evaluations.json` of a folder atomically; one that is there already is not added twice.

    Args:
        root: the folder of a finished set.
        result: ready for JSON.

    Raises:
        UsageError: the file is damaged, which leaves it as it is, or cannot be written.
    """
    root = Path(root)
    record = json.loads(json.dumps({**result, "set": set_digest(root)}))
    with _one_at_a_time(root):
        held = read_evaluations(root)
        if record not in held:
            text = json.dumps([*held, record], indent=1, ensure_ascii=False)
            atomic_write_text(root / EVALUATIONS, text + "\n")


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Two evaluations that end at once both stay. Where the system has no such lock, the later one wins."""
    try:
        import fcntl

        held = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with suppress(OSError):  # a network file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)
