"""A run: the folder it fills, the plan that fixes its result, and what it reads.

The plan stands in `manifest.json` from the first moment, with `"complete": false`. It holds everything that
decides a byte of the result, the arithmetic included, so that `--resume` continues exactly that run or
refuses. What may differ between two equal runs (paths, host, timings) stands in `run.json`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddfast.data.loaders import Loader
from ddfast.data.loading import Loaded
from ddfast.data.pool import DecodedPool, drawn_places
from ddfast.data.samples import Sample
from ddfast.data.sources import Source
from ddfast.errors import UsageError
from ddfast.files import atomic_write_text
from ddfast.history import History
from ddfast.methods.base import Context, Method, Prepared
from ddfast.methods.selection.base import Selection
from ddfast.methods.synthesis import Synthesis
from ddfast.models import Teacher
from ddfast.models.teacher import checked_logits
from ddfast.output.distilled import MANIFEST
from ddfast.pipeline.plan import dtype_of
from ddfast.progress import Outlook, ways_of_machine
from ddfast.ranks import Ranks, usable_cores
from ddfast.wording import setting

RUN = "run.json"


@dataclass
class Run:
    """One distillation, opened: folder, plan, data, teachers, method.

    `teacher` is what the method asks, None where it asks none; `label_teacher` labels the images, None where labels
    stay hard. `data` is what the source was opened of. `pool_memory` bounds the bytes of decoded images that are held,
    None: `ddfast.data.pool.MEMORY_LIMIT`.
    """

    out: Path
    plan: dict[str, Any]
    source: Source
    teacher: Teacher | None
    label_teacher: Teacher | None
    method: Method
    device: torch.device
    loader: Loader
    in_flight: int
    workers: int | None
    quiet: bool
    ranks: Ranks = field(default_factory=Ranks)
    facts: dict[str, Any] = field(default_factory=dict)
    data: Any = None
    prepared: Prepared | None = None
    pool_memory: int | None = None
    history: History | None = None
    _pool: np.ndarray | None = field(default=None, repr=False)

    @property
    def context(self) -> Context:
        """What scoring needs beside the images."""
        arithmetic = self.plan["arithmetic"]
        return Context(
            teacher=self.teacher,
            image_size=self.plan["image_size"],
            factor=self.plan["factor"],
            seed=self.plan["seed"],
            precision=dtype_of(self.plan),
            forward_batch=arithmetic["forward_batch"],
            device=self.device,
            prepared=self.prepared,
            ipc=self.plan["ipc"],
            class_names=tuple(self.plan["class_names"]),
            mean=tuple(self.plan["mean"]),
            std=tuple(self.plan["std"]),
        )

    @property
    def teachers(self) -> list[tuple[Teacher, str]]:
        """The teachers of the run with their roles; one that has both roles once."""
        held = [(self.teacher, "teacher")]
        if self.label_teacher is not self.teacher:
            held.append((self.label_teacher, "label teacher"))
        return [(teacher, role) for teacher, role in held if teacher is not None]

    @property
    def needed(self) -> int:
        """Crops that each class needs: IPC x tiles."""
        return int(self.plan["ipc"] * self.plan["factor"] ** 2)

    @property
    def complete(self) -> bool:
        """Whether every stage is done."""
        return bool(self.plan["complete"])

    @property
    def selection(self) -> Selection:
        """The method, of a run that chooses crops."""
        assert isinstance(self.method, Selection), f"{self.method.name} chooses no crops"
        return self.method

    @property
    def synthesis(self) -> Synthesis:
        """The method, of a run that makes pixels."""
        assert isinstance(self.method, Synthesis), f"{self.method.name} makes no pixels"
        return self.method

    def save(self) -> None:
        """Write the manifest and `run.json` atomically; rank 0 alone does."""
        if self.ranks.main:
            atomic_write_text(self.out / MANIFEST, json.dumps(self.plan, indent=2, ensure_ascii=False) + "\n")
            # In ASCII, as a path need not be valid Unicode.
            atomic_write_text(self.out / RUN, json.dumps(self.facts, indent=2) + "\n")

    def pool(self) -> np.ndarray:
        """Places in `source.samples` of the sources to score, int64 in the order of their ids.

        Of each class they are the first `images_per_class` of a seeded shuffle that depends on their ids alone, or all.
        """
        if self._pool is None:
            samples, classes = self.source.samples, len(self.source.class_names)
            most = self.plan["images_per_class"]
            each = max(len(samples), 1) if most == "all" else most
            self._pool = drawn_places(samples, classes, each, self.plan["seed"])
        return self._pool

    def decoded_pool(self, classes: Sequence[int] | None = None, *, held: bool = True) -> DecodedPool:
        """The images of `pool`, decoded as this run decodes: of these classes, or of all; `held` where they fit."""
        places = self.pool()
        if classes is not None:
            places = places[np.isin(self.source.samples.labels[places], np.asarray(classes))]
        return DecodedPool(
            self.source.samples,
            places,
            len(self.source.class_names),
            self.plan["image_size"],
            self.load,
            quiet=self.quiet,
            memory_limit=self.pool_memory if held else 0,
        )

    def load(self, samples: Iterable[Sample], *, on_device: bool = False) -> Generator[Loaded, None, None]:
        """Decode samples at the run's size with its loader, in order; see `ddfast.data.load`.

        `on_device`: images stay on the run's device where it is what decodes them, instead of coming to the CPU.
        """
        loader = self.loader.on_device() if on_device else self.loader
        return loader(
            self.source,
            samples,
            self.plan["image_size"],
            workers=self.workers,
            ahead=self.in_flight,
            max_pixels=self.plan["arithmetic"]["max_pixels"],
        )

    def samples(self, places: Iterable[int]) -> Iterator[Sample]:
        """The samples at these places of the source, one after the other."""
        return (self.source.samples[int(place)] for place in places)

    def outlook(self, *faster: str) -> Outlook:
        """Of one stage: what would make it shorter, beside what the machine has not."""
        threads, cores = self.plan["arithmetic"]["threads"], usable_cores() // self.ranks.local_size
        own = ways_of_machine(self.device.type, threads, cores, lambda free: setting("threads", free))
        return Outlook(1, [*faster, *own])

    def set_arithmetic(self) -> None:
        """Fix the number of threads that the plan names: it changes the order of sums."""
        torch.set_num_threads(self.plan["arithmetic"]["threads"])


def host_facts() -> dict[str, Any]:
    """What `run.json` says of the machine."""
    return {
        "host": platform.node(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def peak_memory() -> int | None:
    """The most resident bytes that this process has had, None where the system is not Linux.

    `getrusage` will not do: it counts what the process that started this one had.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def command_line() -> str:
    """The command as it was typed, for `run.json`."""
    return " ".join(sys.argv)


def _logits(teacher: Teacher, images: Tensor, run: Run) -> Tensor:
    """Float32 logits of uint8 images [N, 3, S, S], on the CPU."""
    mean = torch.tensor(teacher.mean, device=run.device).view(1, 3, 1, 1)
    std = torch.tensor(teacher.std, device=run.device).view(1, 3, 1, 1)
    return _normalized_logits(teacher, (images.to(run.device).float().div_(255) - mean) / std, run)


def _normalized_logits(teacher: Teacher, batch: Tensor, run: Run) -> Tensor:
    """Float32 logits of normalised images [N, 3, S, S] on the run's device, on the CPU."""
    with torch.no_grad():
        outputs = teacher.model.to(run.device)(batch.contiguous(memory_format=torch.channels_last))
        logits = checked_logits(outputs, len(teacher.class_names)).float().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise UsageError("the teacher returns NaN or infinity: its weights are damaged, train it again")
    return logits


def _shards(run: Run) -> int:
    """Shards of the score table."""
    return -(-len(run.pool()) // int(run.plan["arithmetic"]["shard_sources"]))


def clock(run: Run, stage: str, started: float) -> float:
    """Add the seconds of a stage and the memory of this process so far to `run.json`, and save.

    Returns the time, for a stage that tells its seconds on the way: one that is killed has those before.
    """
    now, seconds = time.monotonic(), run.facts.setdefault("seconds", {})
    seconds[stage] = round(seconds.get(stage, 0.0) + now - started, 3)
    run.facts["peak_memory"] = peak_memory()
    run.save()
    return now
