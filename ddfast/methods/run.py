"""A run: the folder it fills, the plan that fixes its result, and what it reads.

The plan stands in `manifest.json` from the first moment, with `"complete": false`. It holds everything that
decides a byte of the result, the arithmetic included, so that `--resume` continues exactly that run or
refuses. What may differ between two equal runs (paths, host, timings) stands in `run.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddfast import __version__
from ddfast.arguments import path_of, whole_number, whole_number_or
from ddfast.data.decoding import pixel_limit
from ddfast.data.distilled import FORMAT_VERSION, MANIFEST
from ddfast.data.files import atomic_write_text, make_folder, sweep_temporary
from ddfast.data.loaders import Loader, resolve_loader
from ddfast.data.loading import Loaded
from ddfast.data.samples import Sample, SampleList
from ddfast.data.sources import Source, file_limit, open_source
from ddfast.errors import UsageError
from ddfast.methods import get_method
from ddfast.methods.preparation import DecodedPool
from ddfast.methods.base import Context, Method, Prepared, stream
from ddfast.models import Teacher, load_teacher
from ddfast.models.teacher import is_named
from ddfast.ops._dispatch import cpu_body, triton_status
from ddfast.ops._philox import philox4x32
from ddfast.ops.precision import compute_dtype, cpu_instructions, cpu_multiplies_bfloat16, tf32
from ddfast.ranks import Ranks, join, usable_cores
from ddfast.training.device import resolve_device
from ddfast.wording import argument, on_command_line, plural, setting

TeacherChoice = str | Path | Teacher | Callable[[], Teacher]
"""A teacher by its file or name, a loaded one, or what loads it once the settings are checked."""
RUN = "run.json"
LABEL_TEMPERATURE = 20.0
SHARD_SOURCES = 256  # sources in one score shard, the unit of commit and of work for a rank
# Sources scored together; fixed when a run starts, because it decides the last bits. A GPU is kept busy by eight times
# as many: its host's work is that of a micro-batch, not of a source.
MICRO_BATCH = {"cpu": 16, "cuda": 128}
# What may change between the start of a run and its resumption without changing the result.
_RESULTS = ("complete", "counts", "quarantined", "prepared", "mixed_machines")
_ARITHMETIC = {
    **dict.fromkeys(("micro_batch", "forward_batch", "shard_sources", "threads"), int),
    **dict.fromkeys(("max_pixels", "max_file_bytes"), int),
    **dict.fromkeys(("precision", "device", "loader"), str),
}
# Of the arithmetic, what the machine decides; manifests of earlier versions do not have it.
_MACHINE = ("instructions", "ops", "tf32")
_SETTLED = ("threads", "compute_dtype", *_MACHINE)
_MOST_THREADS = {"cpu": 16, "cuda": 4}  # of a process by default; a GPU's process has little to do on the CPU
_MOST_FULL_LABELS = 2048  # classes up to which a soft label is stored whole by default
_LABEL_TOP_K = 256  # probabilities stored of a soft label above that
_DRAWS = 1 << 16  # ids whose shuffle keys are drawn at once, which bounds the memory


@dataclass
class Run:
    """One distillation, opened: folder, plan, data, teachers, method."""

    out: Path
    plan: dict[str, Any]
    source: Source
    teacher: Teacher
    label_teacher: Teacher
    method: Method
    device: torch.device
    loader: Loader
    in_flight: int
    workers: int | None
    quiet: bool
    ranks: Ranks = field(default_factory=Ranks)
    facts: dict[str, Any] = field(default_factory=dict)
    prepared: Prepared | None = None
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
        )

    @property
    def needed(self) -> int:
        """Crops that each class needs: IPC x tiles."""
        return int(self.plan["ipc"] * self.plan["factor"] ** 2)

    @property
    def complete(self) -> bool:
        """Whether every stage is done."""
        return bool(self.plan["complete"])

    def save(self) -> None:
        """Write the manifest and `run.json` atomically; rank 0 alone does."""
        if self.ranks.main:
            atomic_write_text(self.out / MANIFEST, json.dumps(self.plan, indent=2, ensure_ascii=False) + "\n")
            atomic_write_text(self.out / RUN, json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n")

    def pool(self) -> np.ndarray:
        """Places in `source.samples` of the sources to score, int64 in the order of their ids.

        Of each class they are the first `images_per_class` of a seeded shuffle that depends on their ids alone.
        """
        if self._pool is None:
            samples, classes = self.source.samples, len(self.source.class_names)
            self._pool = drawn_places(samples, classes, self.plan["images_per_class"], self.plan["seed"])
        return self._pool

    def decoded_pool(self) -> DecodedPool:
        """The images of `pool`, decoded as this run decodes."""
        return DecodedPool(
            self.source.samples,
            self.pool(),
            len(self.source.class_names),
            self.plan["image_size"],
            self.load,
            quiet=self.quiet,
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

    def set_arithmetic(self) -> None:
        """Fix the number of threads that the plan names: it changes the order of sums."""
        torch.set_num_threads(self.plan["arithmetic"]["threads"])


def drawn_places(samples: SampleList, classes: int, per_class: int, seed: int) -> np.ndarray:
    """Places in `samples` of the first `per_class` of each class by a seeded shuffle, int64 in the order of their ids.

    The shuffle depends on the ids alone.
    """
    ids, labels = samples.ids, samples.labels
    starts = np.searchsorted(labels, np.arange(classes + 1))
    kept, first = [], 0
    while first < len(starts) - 1:  # some whole classes at a time
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + _DRAWS, side="right")) - 1)
        block = slice(starts[first], starts[last])
        kept.append(starts[first] + _first_drawn(ids[block], labels[block] - first, per_class, seed))
        first = last
    pool = np.concatenate(kept)
    return pool[np.argsort(ids[pool], kind="stable")]


def _first_drawn(ids: np.ndarray, labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Places of the first `per_class` samples of each class by their draws, ties by id."""
    keys = [_draws(ids[first : first + _DRAWS], seed) for first in range(0, len(ids), _DRAWS)]
    order = np.lexsort((ids, np.concatenate(keys), labels)) if keys else np.empty(0, dtype=np.int64)
    starts = np.searchsorted(labels, np.arange(labels[-1] + 1 if len(labels) else 0))
    return order[np.arange(len(order)) - starts[labels] < per_class]


def _draws(ids: np.ndarray, seed: int) -> np.ndarray:
    """A 64-bit draw of each id: the first two words of Philox under the seed's stream `pool`."""
    given = torch.from_numpy(np.array(ids, dtype=np.int64))
    counters = torch.stack((given & 0xFFFFFFFF, (given >> 32) & 0xFFFFFFFF, given * 0, given * 0), dim=1)
    words = philox4x32(counters, stream(seed, "pool")).numpy().astype(np.uint64)
    return words[:, 0] << np.uint64(32) | words[:, 1]


def make_plan(
    method: Method,
    source: Source,
    teacher: Teacher,
    label_teacher: Teacher,
    *,
    preset: str | None,
    ipc: int,
    factor: int,
    image_size: int,
    images_per_class: int,
    image_format: str,
    seed: int,
    precision: str,
    device: torch.device,
    loader: str,
    threads: int,
    label_top_k: int | None,
    max_pixels: int,
) -> dict[str, Any]:
    """The manifest of a run before its first result."""
    return {
        "format_version": FORMAT_VERSION,
        "complete": False,
        "method": method.name,
        "preset": preset,
        "options": {
            "score": method.options_of_stage("score"),
            "select": method.options_of_stage("select"),
        },
        "seed": seed,
        "ipc": ipc,
        "factor": factor,
        "tiles": factor**2,
        "image_size": image_size,
        "images_per_class": images_per_class,
        "format": image_format,
        "class_names": source.class_names,
        "mean": list(label_teacher.mean),
        "std": list(label_teacher.std),
        "teacher": _identity(teacher),
        "label_teacher": _identity(label_teacher),
        "label_temperature": LABEL_TEMPERATURE,
        "label_top_k": label_top_k,
        "data": {"fingerprint": source.fingerprint(), "images": len(source.samples)},
        "arithmetic": {
            "micro_batch": MICRO_BATCH[device.type],
            "forward_batch": _forward_batch(image_size, device),
            "shard_sources": SHARD_SOURCES,
            "threads": threads,
            "precision": precision,
            "compute_dtype": compute_dtype(precision, device),
            "device": device.type,
            **machine_arithmetic(device),
            "loader": loader,
            "max_pixels": max_pixels,
            "max_file_bytes": file_limit(),
        },
        "versions": {"ddfast": __version__, "torch": torch.__version__},
        "counts": None,
        "quarantined": None,
    }


def machine_arithmetic(device: torch.device) -> dict[str, str]:
    """What of the arithmetic the machine decides, beside the type of its device.

    "instructions": the CPU's, or the GPU's architecture; "ops": the body of `ddfast.ops`; "tf32": what may round
    float32 to it.

    Raises:
        UsageError: DDFAST_CPU_BODY names no body of this CPU.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        instructions, ops = f"sm_{major}{minor}", "triton" if triton_status()[0] else "reference"
    else:
        body = cpu_body()
        instructions, ops = cpu_instructions(), body if body == "reference" else f"c++ {body}"
    return {"instructions": instructions, "ops": ops, "tf32": tf32(device)}


def dtype_of(plan: dict[str, Any]) -> str:
    """The precision that a run computes in, "float32" or "bfloat16": chosen when it started, for all its processes."""
    arithmetic = plan["arithmetic"]
    if "compute_dtype" in arithmetic or arithmetic["precision"] != "auto":
        return str(arithmetic.get("compute_dtype", arithmetic["precision"]))
    # A manifest of an earlier version, in which auto asked for less.
    multiplies = cpu_multiplies_bfloat16() if arithmetic["device"] == "cpu" else None
    if multiplies is None:
        return compute_dtype("auto", arithmetic["device"])
    return "bfloat16" if multiplies else "float32"


def check_machine(held: dict[str, Any], here: dict[str, Any], what: str) -> None:
    """Refuse a machine that would give a run other last bits, unless DDFAST_MIXED_MACHINES=1 asks for it.

    What a manifest does not say is not compared.

    Args:
        held, here: the arithmetic that the run began with, and that of this machine.
        what: the run, for the message.

    Raises:
        UsageError: they differ.
    """
    if mixes_machines():
        return
    for key in _MACHINE:
        if key in held and key in here and held[key] != here[key]:
            raise UsageError(
                f"{what} was started with {key} {held[key]!r} and would end in other bytes with {here[key]!r}: "
                "go on where it is the same, or set DDFAST_MIXED_MACHINES=1 to let the last bits differ"
            )


def mixes_machines() -> bool:
    """Whether DDFAST_MIXED_MACHINES=1 lets machines that round otherwise work on a run, whose manifest then says so."""
    return os.environ.get("DDFAST_MIXED_MACHINES", "0") == "1"


def _identity(teacher: Teacher) -> dict[str, Any]:
    order = {} if teacher.class_order is None else {"class_order": teacher.class_order}
    return {
        "arch": teacher.arch,
        "sha256": teacher.sha256,
        "top1": teacher.top1,
        "epoch": teacher.epoch,
        **order,
    }


def _forward_batch(image_size: int, device: torch.device) -> int:
    """Masked images or crops a forward pass: what keeps activations near the caches, or a GPU full."""
    if device.type == "cuda":
        return 4096 if image_size <= 64 else 1024
    return 128 if image_size <= 64 else 32


def threads_of(given: str | int, device: torch.device) -> int:
    """Threads of one process.

    `auto` is DDFAST_THREADS where that is set, else every core that the process may use, 16 at most, on a GPU 4. It
    depends neither on the number of processes nor on OMP_NUM_THREADS, which torchrun sets to 1 for several: the
    number stands in the manifest, since it may change the order of sums, and one process and many must agree.

    Raises:
        UsageError: neither `auto` nor a positive number.
    """
    if given != "auto":
        return int(whole_number_or(given, "threads", ("auto",)))
    said = os.environ.get("DDFAST_THREADS")
    if not said:
        return min(usable_cores(), _MOST_THREADS.get(device.type, 4))
    if not said.isdecimal() or int(said) < 1:
        raise UsageError(f"DDFAST_THREADS must be a positive number, got {said!r}")
    return int(said)


def pixel_limit_of(held: dict[str, Any] | None) -> int:
    """Pixels above which an image is quarantined: what a resumed run began with, unless `DDFAST_MAX_PIXELS` is set.

    It decides which files are left out, so a run keeps it.

    Args:
        held: the manifest of the run that is resumed, None for a new one.

    Raises:
        UsageError: the variable is not a positive whole number.
    """
    if held is None or "DDFAST_MAX_PIXELS" in os.environ:
        return pixel_limit()
    return int(held["arithmetic"]["max_pixels"])


def top_k_of(given: str | int, classes: int) -> int | None:
    """Probabilities stored of each soft label, None for all: `auto` is all of up to 2048 classes, else 256.

    A whole row of 21,000 classes is 42 kB in fp16, so that 10 images a class of 4 tiles would take 35 GB.

    Raises:
        UsageError: not `auto`, `all` or a positive number.
    """
    if given == "auto":
        return None if classes <= _MOST_FULL_LABELS else _LABEL_TOP_K
    if given == "all":
        return None
    count = int(whole_number_or(given, "label_top_k", ("auto", "all")))
    return None if count >= classes else count


def score_identity(plan: dict[str, Any]) -> dict[str, Any]:
    """The part of a plan that decides the score table: two runs that agree on it can share one."""
    keys = ("method", "seed", "factor", "image_size", "images_per_class", "class_names", "data", "arithmetic")
    teacher = plan["teacher"] if get_method(plan["method"]).needs_teacher else None
    # What the machine decides is checked apart: who may mix machines must find the shards of all of them.
    redundant = (*_MACHINE, *(() if plan["arithmetic"]["precision"] == "auto" else ("compute_dtype",)))
    arithmetic = {key: value for key, value in plan["arithmetic"].items() if key not in redundant}
    return {
        **{key: plan[key] for key in keys},
        "arithmetic": arithmetic,
        "options": plan["options"]["score"],
        "teacher": teacher,
    }


def score_digest(plan: dict[str, Any]) -> str:
    """32 hex digits of what decides the score table; they stand in every shard."""
    text = json.dumps(score_identity(plan), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def start(out: Path, plan: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Claim the output folder for `plan`, or find the run that it holds.

    Returns:
        The plan to follow: the given one, or on resumption the stored one, whose arithmetic stays.

    Raises:
        UsageError: the folder holds something else, a different run, or this run without `resume`.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; {argument('out')} must be a folder")
    held = read_plan(out)
    if held is None:
        check_folder(out)
        make_folder(out)
        sweep_temporary(out)
        return _noted(plan)
    difference = first_difference(held, plan)
    if difference is not None:
        again = ""
        if difference.startswith("ipc:"):
            again = f", or select again from its scores: {_select_again(out, plan['ipc'])}"
        raise UsageError(
            f"{out} already holds a different run ({difference}); choose another folder or delete it{again}"
        )
    if not resume:
        go_on = setting("resume", True)
        raise UsageError(
            f"{out} already holds a finished run of the same settings: use it, or give another "
            f"{argument('out')} to distil anew ({go_on} leaves it as it is)"
            if held["complete"]
            else f"{out} already holds an unfinished run of the same settings; continue it with {go_on}"
        )
    if not held["complete"]:
        check_machine(held["arithmetic"], plan["arithmetic"], f"the run in {out}")
    sweep_temporary(out)
    return _noted(held)


def _noted(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan, which says whether machines of different arithmetic were let in."""
    return {**plan, "mixed_machines": True} if mixes_machines() and not plan["complete"] else plan


def check_folder(out: Path) -> None:
    """Refuse a folder that holds something else than a run; what a killed start left does not count.

    Raises:
        UsageError: it does, or its manifest is damaged.
    """
    if read_plan(out) is not None or not out.is_dir():
        return
    if any(not (entry.name.startswith(".") and ".tmp-" in entry.name) for entry in out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no ddfast run; choose another folder")


def _select_again(out: Path, ipc: int) -> str:
    if on_command_line():
        return f"ddfast select {out} --ipc {ipc}"
    return f"ddfast.methods.pipeline.change_ipc(run, {ipc})"


def read_plan(out: Path) -> dict[str, Any] | None:
    """The manifest in a folder, or None where there is none.

    Raises:
        UsageError: the manifest is damaged.
    """
    path = out / MANIFEST
    if not path.is_file():
        return None
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is damaged: delete {out} and start again") from error
    if not isinstance(plan, dict) or plan.get("format_version") != FORMAT_VERSION or not _is_arithmetic(plan):
        raise UsageError(f"{path} is no manifest of this version of ddfast; choose another folder")
    return plan


def _is_arithmetic(plan: dict[str, Any]) -> bool:
    """Whether a manifest says all that decides the arithmetic."""
    said = plan.get("arithmetic")
    return (
        isinstance(said, dict)
        and all(isinstance(said.get(key), kind) for key, kind in _ARITHMETIC.items())
        and all(isinstance(said.get(key, ""), str) for key in _MACHINE)
        and said.get("compute_dtype", "float32") in ("float32", "bfloat16")
    )


def first_difference(
    held: dict[str, Any], wanted: dict[str, Any], *, settled: Sequence[str] = _SETTLED
) -> str | None:
    """The first setting in which two plans differ, in words.

    Results do not count, nor what of the arithmetic is settled when a run starts (the threads, the dtype that
    `auto` is) or is `check_machine`'s to say: `settled`.
    """

    def walk(a: Any, b: Any, place: str) -> str | None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in [*b, *(key for key in a if key not in b)]:
                if (place == "" and key in _RESULTS) or (place == "arithmetic" and key in settled):
                    continue
                found = walk(a.get(key), b.get(key), f"{place}.{key}" if place else key)
                if found:
                    return found
            return None
        return None if a == b else f"{place}: it has {_short(a)}, this one {_short(b)}"

    return walk(held, wanted, "")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


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


def check_teacher(teacher: Teacher, source: Source, *, role: str = "teacher") -> None:
    """Refuse a teacher whose outputs are not the classes of the data, in that order.

    Raises:
        UsageError: the counts or the orders differ.
    """
    theirs, ours = list(teacher.class_names), list(source.class_names)
    if len(theirs) != len(ours):
        raise UsageError(
            f"the {role} knows {plural(len(theirs), 'class')}, {source.name} has {len(ours)}: give its own teacher"
        )
    for index, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if a != b:
            raise UsageError(
                f"the {role}'s class {index} is {a!r}, that of {source.name} is {b!r}: the class order must match, or "
                f"be said with {argument('class_order' if role == 'teacher' else 'label_class_order')}"
            )


def check_teacher_choice(given: TeacherChoice | None, role: str) -> None:
    """Refuse what cannot be a teacher, a file that is not there among it; nothing is read yet."""
    if isinstance(given, torch.nn.Module):
        raise UsageError(
            f"{argument(role)} must be a ddfast Teacher, which knows classes and normalisation, got the bare module "
            f"{type(given).__name__}: write it with ddfast.models.save_teacher"
        )
    if isinstance(given, Teacher) or callable(given) or str(given).startswith("torchvision:"):
        return
    path = path_of(given, role)
    if path.is_dir():
        raise UsageError(f"{argument(role)} {path} is a folder: give a .safetensors file of train-teacher")
    if not path.is_file():
        raise UsageError(
            f"no teacher file {path}: give a .safetensors file of train-teacher, a .pt state dict "
            "or torchvision:NAME"
        )


def reopen(
    out: str | Path,
    *,
    data: str | Path | None = None,
    teacher: str | Path | None = None,
    label_teacher: str | Path | None = None,
    device: str = "auto",
    batch_size: str | int = "auto",
    workers: int | None = None,
    quiet: bool = False,
) -> Run:
    """Open the run in a folder again, with the paths of its `run.json` unless others are given.

    Raises:
        UsageError: no run there, or data or teachers are not those of the run.
    """
    ranks = join()
    run = ranks.together(
        "run",
        lambda: _reopened(
            Path(out),
            ranks,
            data,
            teacher,
            label_teacher,
            device,
            batch_size,
            workers,
            quiet or not ranks.main,
        ),
    )
    ranks.on_main("sweep", lambda: _swept(run.out))
    return run


def _swept(out: Path) -> None:
    sweep_temporary(out)


def _reopened(
    out: Path,
    ranks: Ranks,
    data: str | Path | None,
    teacher: str | Path | None,
    label_teacher: str | Path | None,
    device: str,
    batch_size: str | int,
    workers: int | None,
    quiet: bool,
) -> Run:
    plan = read_plan(out)
    if plan is None:
        raise UsageError(f"{out} holds no ddfast run: start one with ddfast score or ddfast distill")
    found_device = checked_device(plan, device, ranks)
    in_flight = images_in_flight(batch_size, plan["arithmetic"]["micro_batch"])
    threads = decoding_workers(workers, ranks)
    if not plan["complete"]:
        check_machine(plan["arithmetic"], machine_arithmetic(found_device), f"the run in {out}")
        plan = _noted(plan)
    facts = _facts_of(out, plan, data, teacher, label_teacher)
    for role, given in (("teacher", teacher), ("label_teacher", label_teacher)):
        _check_teacher_stands(given or facts[role], role, moved=given is None)
    try:
        source = open_source(data or facts["data"], "train")
    except UsageError as error:
        if data is not None:
            raise
        raise UsageError(f"{error} ({argument('data')} says where it is now)") from error
    main = _load_again(teacher or facts["teacher"], plan, "teacher")
    labels = label_teacher or facts["label_teacher"]
    run = Run(
        out=out,
        plan=plan,
        source=source,
        teacher=main,
        label_teacher=main if labels is None else _load_again(labels, plan, "label_teacher"),
        method=get_method(plan["method"]).from_options(
            {**plan["options"]["score"], **plan["options"]["select"]}
        ),
        device=found_device,
        loader=resolve_loader(plan["arithmetic"]["loader"], found_device),
        in_flight=in_flight,
        workers=threads,
        quiet=quiet,
        ranks=ranks,
        facts=facts,
    )
    for found, wanted, what in (
        (source.fingerprint(), plan["data"]["fingerprint"], f"the data {source.name}"),
        (main.sha256, plan["teacher"]["sha256"], f"the teacher {main.path}"),
        (
            run.label_teacher.sha256,
            plan["label_teacher"]["sha256"],
            f"the label teacher {labels or main.path}",
        ),
    ):
        if found != wanted:
            raise UsageError(f"{what} is not what {out} was started with: its content has changed")
    return run


def _load_again(spec: str | Path | None, plan: dict[str, Any], role: str) -> Teacher:
    """A teacher of a run by its file, with what the manifest says of it."""
    if spec is None:
        raise UsageError(
            f"the run was started with a teacher that has no file: give its file as {argument(role)}"
        )
    said: dict[str, Any] = {}
    if not is_named(spec) and not str(spec).startswith("torchvision:"):
        said = {
            "arch": plan[role]["arch"],
            "normalization": (plan["mean"], plan["std"]),
            "image_size": plan["image_size"],
        }
    return load_teacher(
        str(spec), class_names=plan["class_names"], class_order=plan[role].get("class_order"), **said
    )


def _check_teacher_stands(path: str | Path | None, role: str, *, moved: bool) -> None:
    if path is None:
        return
    try:
        check_teacher_choice(path, role)
    except UsageError as error:
        if not moved:
            raise
        raise UsageError(f"{error} ({argument(role)} says where it is now)") from error


def _facts_of(
    out: Path,
    plan: dict[str, Any],
    data: str | Path | None,
    teacher: str | Path | None,
    label_teacher: str | Path | None,
) -> dict[str, Any]:
    """`run.json` of a folder; where it is lost, what it would say of the paths that are given.

    Raises:
        UsageError: it is lost, and not all paths are given.
    """
    try:
        facts = json.loads((out / RUN).read_text(encoding="utf-8"))
        return {**{key: facts[key] for key in ("data", "teacher", "label_teacher")}, **facts}
    except (OSError, ValueError, KeyError, TypeError) as error:
        one = plan["label_teacher"]["sha256"] == plan["teacher"]["sha256"]
        given = {"data": data, "teacher": teacher, **({} if one else {"label_teacher": label_teacher})}
        missing = [argument(key) for key, value in given.items() if value is None]
        if missing:
            raise UsageError(f"{out / RUN} is missing or damaged: give {' and '.join(missing)}") from error
        return {
            key: None if value is None else str(value)
            for key, value in {"label_teacher": None, **given}.items()
        }


def rank_device(device: str, ranks: Ranks) -> torch.device:
    """The device of this process: of several on a host each takes the GPU of its local rank.

    Raises:
        UsageError: no such device.
    """
    found = resolve_device(device)
    if found.type == "cuda" and found.index is None and ranks.size > 1:
        found = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(found)
    return found


def decoding_workers(workers: int | None, ranks: Ranks) -> int | None:
    """Decoding threads of this process: the number given, else its part of the host's cores."""
    if workers is not None:
        return whole_number(workers, "workers", least=0)
    if ranks.size == 1:
        return None
    return max(1, min(16, usable_cores() // ranks.local_size))


def checked_device(plan: dict[str, Any], device: str, ranks: Ranks) -> torch.device:
    """The device of this process, which must be of the type that the plan fixed.

    Raises:
        UsageError: another device type.
    """
    found = rank_device(device, ranks)
    wanted = plan["arithmetic"]["device"]
    if found.type != wanted:
        raise UsageError(
            f"this run was started on {wanted} and would end in other bytes on {found.type}: "
            f"use {setting('device', wanted)}"
        )
    return found


def images_in_flight(batch_size: str | int, micro_batch: int) -> int:
    """Images decoded ahead of the model: whole micro-batches, at least one; `auto` is four.

    Raises:
        UsageError: neither `auto` nor a positive number.
    """
    if batch_size == "auto":
        return 4 * micro_batch
    count = int(whole_number_or(batch_size, "batch_size", ("auto",)))
    return -(-count // micro_batch) * micro_batch


def command_line() -> str:
    """The command as it was typed, for `run.json`."""
    return " ".join(sys.argv)
