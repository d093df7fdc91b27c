"""What a distilled set costs: seconds and memory of its synthesis, and its bytes."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.studies.arms import Distillation
from ddfast.files import atomic_write_text
from ddfast.output.pixels import PIXELS
from ddfast.pipeline.plan import read_plan
from ddfast.pipeline.run import RUN, peak_memory

_OF_LABELS_AND_PAGES = ("relabel", "report")  # stages that make no image


@dataclass(frozen=True)
class Cost:
    """What one set took.

    Attributes:
        seconds: of the stages that make its images; a score table that it shares with another IPC counts for both.
        cores: that worked at once; 1 on a GPU, whose seconds count.
        device: "cpu" or "cuda".
        peak_memory: the most resident bytes of its process; None where it had none of its own.
        image_bytes: of the file that students are trained on, or of all pictures.
        label_bytes: of the classes, a byte each up to 256 of them.
    """

    seconds: float
    cores: int
    device: str
    peak_memory: int | None
    image_bytes: int
    label_bytes: int

    @property
    def core_seconds(self) -> float:
        """Seconds of all cores, or of the GPU."""
        return self.seconds * self.cores


def make_alone(distillation: Distillation) -> Path:
    """The distilled folder, made in a process of its own where it is not finished: its peak of memory is the run's.

    Raises:
        UsageError: of the run.
    """
    plan = read_plan(distillation.folder) if distillation.folder.exists() else None
    if plan is None or not plan["complete"]:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as process:
            process.submit(_make, distillation).result()
    return distillation.folder


def _make(distillation: Distillation) -> None:
    distillation.make()
    atomic_write_text(_told(distillation), json.dumps({"peak_memory": peak_memory()}) + "\n")


def _told(distillation: Distillation) -> Path:
    """Where the memory of a set is kept that was made in a process of its own."""
    return distillation.folder.with_name(f"{distillation.folder.name}.memory.json")


def cost_of(distillation: Distillation) -> Cost:
    """The cost of a finished set."""
    folder, told = distillation.folder, _told(distillation)
    plan = read_plan(folder)
    assert plan is not None, f"{folder} is not finished"
    arithmetic = plan["arithmetic"]
    classes = len(plan["class_names"])
    return Cost(
        seconds=sum(stages_of(distillation).values()),
        cores=arithmetic["threads"] if arithmetic["device"] == "cpu" else 1,
        device=arithmetic["device"],
        peak_memory=json.loads(told.read_text("utf-8"))["peak_memory"] if told.is_file() else None,
        image_bytes=image_bytes(folder),
        label_bytes=plan["ipc"] * classes * (1 if classes <= 256 else 2),
    )


def stages_of(distillation: Distillation) -> dict[str, float]:
    """Seconds of the stages that make images; those of a shared table are of the run that scored it."""
    folder = distillation.folder
    found: dict[str, float] = dict(_facts(folder)["seconds"])
    if "score" in distillation.identity:
        shared = folder.name.partition("-ipc")[0]
        for other in folder.parent.glob(f"{shared}-ipc*/{RUN}"):
            for stage in ("prepare", "score"):
                of_other = _facts(other.parent).get("seconds", {}).get(stage, 0.0)
                found[stage] = max(found.get(stage, 0.0), of_other)
    return {stage: seconds for stage, seconds in found.items() if stage not in _OF_LABELS_AND_PAGES}


def image_bytes(folder: Path) -> int:
    """Bytes of the images that students are trained on."""
    pixels = folder / PIXELS
    if pixels.is_file():
        return pixels.stat().st_size
    pictures = (path for path in (folder / "train").rglob("*") if path.suffix in (".png", ".jpg", ".jpeg"))
    return sum(path.stat().st_size for path in pictures)


def _facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / RUN).read_text("utf-8"))
    return found
