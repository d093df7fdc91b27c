"""The plan of a run: everything that decides a byte of its result, as the manifest holds it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddfast.arguments import whole_number_or
from ddfast.data.decoding import pixel_limit
from ddfast.data.sources import Source, file_limit
from ddfast.errors import UsageError
from ddfast.methods import get_method
from ddfast.methods.base import Method
from ddfast.models import Teacher
from ddfast.models.normalization import Normalization
from ddfast.ops._dispatch import cpu_body, triton_status
from ddfast.ops.precision import compute_dtype, cpu_instructions, cpu_multiplies_bfloat16, tf32
from ddfast.output.distilled import FORMAT_VERSION, MANIFEST
from ddfast.ranks import usable_cores
from ddfast.settings import Settings
from ddfast.version import __version__
from ddfast.wording import argument

LABEL_TEMPERATURE = 20.0
SHARD_SOURCES = 256  # sources in one score shard, the unit of commit and of work for a rank
# Sources scored together; fixed when a run starts, because it decides the last bits. A GPU is kept busy by eight times
# as many: its host's work is that of a micro-batch, not of a source.
MICRO_BATCH = {"cpu": 16, "cuda": 128}
# What may change between the start of a run and its resumption without changing the result.
_RESULTS = ("complete", "counts", "quarantined", "prepared", "mixed_machines", "accuracy", "regions")
_ARITHMETIC = {
    **dict.fromkeys(("micro_batch", "forward_batch", "shard_sources", "threads"), int),
    **dict.fromkeys(("max_pixels", "max_file_bytes"), int),
    **dict.fromkeys(("precision", "device", "loader"), str),
}
# Of the arithmetic, what the machine decides; manifests of earlier versions do not have it.
_MACHINE = ("instructions", "ops", "tf32")
_SETTLED = ("threads", "compute_dtype", *_MACHINE)
_THREADS = 1024  # beyond, a system starts no more
_MOST_THREADS = {"cpu": 16, "cuda": 4}  # of a process by default; a GPU's process has little to do on the CPU
_MOST_FULL_LABELS = 2048  # classes up to which a soft label is stored whole by default
_LABEL_TOP_K = 256  # probabilities stored of a soft label above that


def make_plan(
    method: Method,
    source: Source,
    settings: Settings,
    teacher: Teacher | None,
    label_teacher: Teacher | None,
    *,
    device: torch.device,
    normalization: Normalization,
    max_pixels: int,
    shown_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The manifest of a run before its first result.

    Args:
        method: with its options.
        source: of the training images.
        settings: of the run, every `auto` replaced by what it stands for.
        teacher: what the method asks, if anything.
        label_teacher: what labels the images, None where labels stay hard.
        device: of the run.
        normalization: (mean, std) of the pixels where no teacher says it.
        max_pixels: above which an image is quarantined.
        shown_names: of the classes, where they are not their own.
    """
    mean, std = normalization if teacher is None else (teacher.mean, teacher.std)
    size = int(settings.image_size or 0)
    # The keys of settings are filled in below, new ones behind the last; here they only keep their places.
    plan: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "complete": False,
        "method": method.name,
        "preset": None,
        "options": {stage: method.options_of_stage(stage) for stage in method.stages_with_options()},
        "seed": None,
        "ipc": None,
        "factor": None,
        "tiles": int(settings.factor) ** 2,
        "image_size": None,
        "images_per_class": None,
        "format": None,
        "class_names": source.class_names,
        **({} if shown_names is None else {"display_names": list(shown_names)}),
        "mean": list(mean),
        "std": list(std),
        "teacher": None if teacher is None else _identity(teacher),
        "label_teacher": None if label_teacher is None else _identity(label_teacher),
        "label_temperature": None if label_teacher is None else LABEL_TEMPERATURE,
        "label_top_k": None,
        "data": {"fingerprint": source.fingerprint(), "images": len(source.samples)},
        "arithmetic": {
            "micro_batch": MICRO_BATCH[device.type],
            "forward_batch": _forward_batch(size, device),
            "shard_sources": SHARD_SOURCES,
            "threads": None,
            "precision": None,
            "compute_dtype": compute_dtype(settings.precision, device),
            "device": device.type,
            **machine_arithmetic(device),
            "loader": None,
            "max_pixels": max_pixels,
            "max_file_bytes": file_limit(),
        },
        "versions": {"ddfast": __version__, "torch": torch.__version__},
        "counts": None,
        "quarantined": None,
    }
    if inputs := method.inputs():
        plan["inputs"] = inputs
    for place, value in settings.in_manifest(method.offers()).items():
        *outer, key = place.split(".")
        table = plan
        for name in outer:
            table = table[name]
        table[key] = value
    return plan


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
        UsageError: neither `auto` nor a number from 1 to 1024.
    """
    if given != "auto":
        found = int(whole_number_or(given, "threads", ("auto",)))
        if found > _THREADS:
            raise UsageError(f"{argument('threads')} must be at most {_THREADS}, got {found}")
        return found
    said = os.environ.get("DDFAST_THREADS")
    if not said:
        return min(usable_cores(), _MOST_THREADS.get(device.type, 4))
    if not said.isdecimal() or not 1 <= int(said) <= _THREADS:
        raise UsageError(f"DDFAST_THREADS must be a number from 1 to {_THREADS}, got {said!r}")
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
    return {
        **{key: plan[key] for key in keys},
        "arithmetic": _shared_arithmetic(plan),
        "options": plan["options"]["score"],
        "teacher": teacher,
    }


def score_digest(plan: dict[str, Any]) -> str:
    """32 hex digits of what decides the score table; they stand in every shard."""
    return _digest(score_identity(plan))


def run_digest(plan: dict[str, Any]) -> str:
    """32 hex digits of everything that decides the pixels of a run; they stand in its saved states."""
    keys = (
        *("method", "options", "seed", "ipc", "factor", "image_size", "images_per_class", "class_names"),
        *("mean", "std", "data"),
    )
    teacher = plan["teacher"] and plan["teacher"]["sha256"]
    return _digest(
        {
            **{key: plan[key] for key in keys},
            **({"inputs": plan["inputs"]} if "inputs" in plan else {}),
            "teacher": teacher,
            "arithmetic": _shared_arithmetic(plan),
        }
    )


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


def _shared_arithmetic(plan: dict[str, Any]) -> dict[str, Any]:
    """The arithmetic without what the machine decides: who may mix machines must find the files of all of them."""
    redundant = (*_MACHINE, *(() if plan["arithmetic"]["precision"] == "auto" else ("compute_dtype",)))
    return {key: value for key, value in plan["arithmetic"].items() if key not in redundant}


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
    except (ValueError, RecursionError) as error:
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
