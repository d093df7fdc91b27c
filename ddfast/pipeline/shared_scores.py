"""The score table of another run, taken over in place of scoring again (`--scores`)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ddfast.errors import UsageError
from ddfast.files import make_folder
from ddfast.output.distilled import PREPARED, SCORES, SELECTION
from ddfast.pipeline.plan import check_machine, first_difference, read_plan, score_identity
from ddfast.wording import argument


def shared_scores(folder: Path, plan: dict[str, Any]) -> Path:
    """Check that the score table of another run is the one this plan would compute."""
    held = read_plan(folder)
    if held is None:
        raise UsageError(f"{argument('scores')} {folder} holds no ddfast run")
    difference = first_difference(score_identity(held), score_identity(plan), settled=())
    if difference is not None:
        raise UsageError(
            f"{argument('scores')} {folder} was scored with other settings, data or teacher ({difference})"
        )
    check_machine(held["arithmetic"], plan["arithmetic"], f"{argument('scores')} {folder}")
    if not (folder / SELECTION).is_file():
        raise UsageError(f"{argument('scores')} {folder} is not scored to its end: finish that run first")
    return folder


def copy_scores(folder: Path, out: Path) -> None:
    """Copy its table into another run, each file whole."""
    make_folder(out / SCORES)
    for path in sorted((folder / SCORES).glob("part-*")):
        if not (out / SCORES / path.name).exists():
            copy = out / SCORES / f".{path.name}.tmp-0"
            shutil.copyfile(path, copy)
            copy.replace(out / SCORES / path.name)
    if (folder / PREPARED).exists():
        copy = out / f".{PREPARED}.tmp-0"
        shutil.copyfile(folder / PREPARED, copy)
        copy.replace(out / PREPARED)
