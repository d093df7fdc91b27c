"""Every setting of a run, once: default, help and check, from which flags, keywords and the manifest derive."""

from __future__ import annotations

import dataclasses
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    stage: str = "score",
    choices: tuple[str, ...] | None = None,
    type: type | None = None,
) -> Any:
    """A field of a method's options: default, help text with unit, the stage it belongs to and its valid
    values."""
    metadata = {"help": help, "stage": stage, "choices": choices, "type": type}
    return dataclasses.field(default=default, metadata=metadata)
