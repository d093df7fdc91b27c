"""The stages of a run by name. Which of them a method goes through, and in which order, its `stages` say."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from ddfast.pipeline.run import Run

STAGES = ("prepare", "score", "select", "compose", "relabel", "synthesize")
"""Every stage: a module of this folder with a function of the same name, which takes a run and does its share."""


def stage_named(name: str) -> Callable[[Run], None]:
    """The function of a stage."""
    stage: Callable[[Run], None] = getattr(importlib.import_module(f"ddfast.pipeline.{name}"), name)
    return stage
