"""Proxies: the trained networks whose features CMI measures (ICLR 2025; its code's pretrain/pre_model.py).

Plainly trained: SGD at a constant rate, no augmentation. Each has a seed of its own, derived from (seed, "proxy",
number), so that a folder can be filled further later on. The proxies are ordinary teacher files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ddfast.arguments import data_of, output_folder, path_of, positive_number, whole_number
from ddfast.crowding import Neighbours, warn_of_crowding
from ddfast.data.pool import drawn_places
from ddfast.data.sources import Source
from ddfast.errors import UsageError
from ddfast.files import atomic_write_text, make_folder, sweep_temporary
from ddfast.isolation import isolated, on_threads
from ddfast.models.fusing import fuse
from ddfast.models.normalization import AUTO, Normalization
from ddfast.models.registry import COMMON_IMAGE, check_model
from ddfast.models.teacher import Teacher, load_teacher, read_header
from ddfast.ops._dispatch import say_slow_ops
from ddfast.ops.precision import compute_dtype
from ddfast.progress import Outlook, say, ways_of_machine
from ddfast.ranks import usable_cores
from ddfast.seeding import derived_seed
from ddfast.training.device import resolve_device
from ddfast.training.image_sets import ImageSet, StreamedSet, native_size, read_test_set, read_training_set
from ddfast.training.teacher import check_identity, continued, fit_teacher, identity_of
from ddfast.training.teacher_config import TeacherConfig
from ddfast.wording import argument, on_command_line, plural, setting

FORMAT = "ddfast-proxies-1"
TABLE = "proxies.json"
READABLE_TABLE = "proxies.md"
_FILE = re.compile(r"proxy-(\d+)\.safetensors")
_COLUMNS = ("number", "seed", "epochs", "images", "top-1 %")


@dataclass(frozen=True)
class Proxy:
    """One row of the table.

    Attributes:
        number: from 0.
        file: its name in the folder.
        seed: of its weights and the order of its images.
        epochs: passes over the training images.
        images: how many it was trained on.
        top1: test accuracy in percent, None where the data has no test split.
    """

    number: int
    file: str
    seed: int
    epochs: int
    images: int
    top1: float | None


@dataclass(frozen=True)
class Proxies:
    """A folder of proxies; `str()` of it is their table.

    Attributes:
        folder: where they lie.
        arch: their architecture.
        proxies: in the order of their numbers.
    """

    folder: Path
    arch: str
    proxies: list[Proxy]

    @property
    def mean_top1(self) -> float | None:
        """Mean test accuracy in percent; None where it was not measured."""
        measured = [proxy.top1 for proxy in self.proxies if proxy.top1 is not None]
        return math.fsum(measured) / len(measured) if measured else None

    def __str__(self) -> str:
        rows = [_COLUMNS, *map(_cells, self.proxies)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        proxies = plural(len(self.proxies), "proxy", "proxies")
        reached = "" if self.mean_top1 is None else f", mean top-1 {self.mean_top1:.2f}%"
        return f"{proxies} of {self.arch}{reached}"

    def _markdown(self) -> str:
        rows = [_COLUMNS, ("---:",) * len(_COLUMNS), *map(_cells, self.proxies)]
        return "\n".join([self._summary(), "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def _cells(proxy: Proxy) -> tuple[str, ...]:
    reached = "-" if proxy.top1 is None else f"{proxy.top1:.2f}"
    return str(proxy.number), str(proxy.seed), str(proxy.epochs), str(proxy.images), reached


@isolated()
def train_proxies(
    data: Any,
    *,
    arch: str = "resnet18_in",
    count: int = 10,
    epochs: int = 20,
    out: str | Path,
    images_per_class: int | None = None,
    image_size: int | None = None,
    normalization: str | Normalization = "auto",
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-3,
    batch_size: int = 256,
    seed: int = 0,
    resume: bool = False,
    device: str = "auto",
    workers: int | None = None,
    quiet: bool = False,
    precision: str = "float32",
) -> Proxies:
    """Train CMI's networks on the training split of `data`, and write them into the folder `out`.

    It then holds `proxy-00000.safetensors` and so on, teacher files as `train_teacher` writes them, and the table of
    their accuracies as `proxies.json` and `proxies.md`. The data is decoded once. What the authors do is 1,000 networks
    and 40 epochs; 10 to 20 networks that reach 75% on CIFAR-10 will do.

    Args:
        data: an image folder, archive, named set, or images in memory, as `ddfast.data.open_source` takes it.
        arch: name for `create_model`.
        count: how many networks.
        epochs: passes over the training images.
        out: the folder. It may not hold anything yet, unless `resume` finds that it is of this run.
        images_per_class: train on so many of each class, those that a run with this seed draws; None: all.
        image_size: side in pixels; None: the shorter side of the first training image, at most 224.
        normalization: of the pixels, a name or (mean, std); it must be that of the run that they serve.
        lr: learning rate of SGD, constant.
        momentum: of SGD.
        weight_decay: on every parameter.
        batch_size: images a step.
        seed: each network's own seed is derived from it and its number.
        resume: continue a killed run from its last whole epoch; starts where there is nothing to continue, returns at
            once where all are trained, and trains further ones where `count` has grown.
        device: "auto", "cpu" or "cuda".
        workers: decoding workers; None: the loader's default.
        quiet: print nothing.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where it is faster.

    Raises:
        UsageError: bad arguments or data, a folder that holds something else, or with `resume` a run of other settings.
    """
    from ddfast.data import open_source

    neighbours = Neighbours()
    out = output_folder(out)
    count = whole_number(count, "count", least=1)
    if images_per_class is not None:
        images_per_class = whole_number(images_per_class, "images_per_class", least=1)
    if image_size is not None:
        image_size = whole_number(image_size, "image_size", least=1)
    config = TeacherConfig(
        arch=arch,
        epochs=epochs,
        image_size=image_size or COMMON_IMAGE,
        normalization=AUTO if normalization == "auto" else normalization,
        lr=positive_number(lr, "lr"),
        schedule="constant",
        batch_size=batch_size,
        weight_decay=weight_decay,
        momentum=momentum,
        seed=seed,
        precision=precision,
        augment="none",
    ).resolved()
    check_model(config.arch, image_size)
    held = _held(out, count, resume)
    where = resolve_device(device)
    if workers is not None:
        workers = whole_number(workers, "workers", least=0)
    data = data_of(data)
    source = open_source(data, "train")
    for note in source.notes():
        say(note, quiet=quiet)
    config = replace(config, image_size=image_size or native_size(source))
    check_model(config.arch, config.image_size)
    places, drawn_from = _places(source, images_per_class, config.seed, quiet)
    settings = {
        **identity_of(config, source.fingerprint()),
        "images_per_class": None if places is None else images_per_class,
    }
    arithmetic: dict[str, Any] = {
        "arithmetic": compute_dtype(config.precision, where),
        "threads": torch.get_num_threads(),
        "device": where.type,
    }
    if held is not None:
        check_identity(out / TABLE, held["settings"], settings)
        arithmetic = continued(out / TABLE, held, arithmetic)
    config = replace(config, precision=arithmetic["arithmetic"])
    fingerprint = source.fingerprint() + drawn_from

    @functools.cache
    def decoded() -> tuple[ImageSet | StreamedSet, ImageSet | None]:
        """The training images and the test images, where there are any."""
        try:
            test_source = open_source(data, "test")
        except UsageError as error:
            say(f"the accuracy will not be measured: {error}", quiet=quiet)
            test = None
        else:
            test = read_test_set(test_source, config.image_size, workers=workers, quiet=quiet)
        samples = None if places is None else source.samples.take(places)
        train = read_training_set(source, config.image_size, samples=samples, workers=workers, quiet=quiet)
        say_slow_ops(where, quiet=quiet)
        if where.type == "cpu":
            warn_of_crowding(neighbours, torch.get_num_threads(), "OMP_NUM_THREADS={}".format, quiet=quiet)
        return train, test

    make_folder(out)
    sweep_temporary(out)
    result = Proxies(out, config.arch, [])
    if held is None:
        _write(result, settings, arithmetic)
    missing = [number for number in range(count) if not (out / f"proxy-{number:05d}.safetensors").exists()]
    threads = arithmetic["threads"]
    own_ways = ways_of_machine(where.type, threads, usable_cores(), "OMP_NUM_THREADS={}".format)
    outlook = Outlook(
        len(missing) * config.epochs,
        [f"fewer {argument('epochs')}", f"a smaller {argument('count')}", *own_ways],
    )
    for number in range(count):
        path = out / f"proxy-{number:05d}.safetensors"
        own = replace(config, seed=derived_seed(config.seed, "proxy", number))
        if not path.exists():
            train, test = decoded()
            say(f"proxy {number + 1} of {count}", quiet=quiet)
            with on_threads(arithmetic["threads"]):
                fit_teacher(
                    train,
                    test,
                    own,
                    class_names=source.class_names,
                    out=path,
                    data_fingerprint=fingerprint,
                    device=device,
                    resume=path.with_suffix(".state").exists(),
                    watch=False,
                    quiet=quiet,
                    outlook=outlook,
                )
        result.proxies.append(_row(path, number, own, identity_of(own, fingerprint)))
        path.with_suffix(".state").unlink(missing_ok=True)  # of a run killed right behind its last write
        if held is None or len(result.proxies) >= len(held["proxies"]):
            _write(result, settings, arithmetic)
    say(f"{out} holds {result._summary()}", quiet=quiet)
    return result


@isolated()
def load_proxies(
    folder: str | Path,
    *,
    class_names: Sequence[str],
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    arch: str | None = None,
) -> list[nn.Module]:
    """All proxies of a folder, checked against the run that they serve.

    Args:
        folder: of `train_proxies`.
        class_names: of the run, in the order of its labels.
        image_size: of its images, in pixels.
        mean: of its normalisation.
        std: of its normalisation.
        arch: the architecture that the proxies must have; None: any.

    Returns:
        The networks in the order of their numbers: normalised images [B, 3, S, S] -> logits [B, C], eval mode, float32,
        on the CPU, frozen, their ConvNet blocks fused. Only images get gradients of them.

    Raises:
        UsageError: no such folder, no proxies in it, a damaged one, or one that does not fit the run.
    """
    networks = []
    for path in _files(folder):
        proxy = load_teacher(path)
        _check_fits(path, proxy, list(class_names), image_size, (mean, std), arch)
        networks.append(fuse(proxy.model.eval().requires_grad_(False)))
    return networks


def proxies_identity(folder: str | Path) -> list[dict[str, Any]]:
    """What a manifest says of the proxies of a folder, in the order of their numbers.

    Returns:
        A dictionary a proxy: "file", its name; "sha256" of its bytes; "arch"; "top1", percent or None.

    Raises:
        UsageError: no such folder, no proxies in it, or a damaged one.
    """
    found = []
    for path in _files(folder):
        header = read_header(path)
        if header is None:
            load_teacher(path)  # says what is wrong with it
            header = {}
        found.append(
            {
                "file": path.name,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "arch": header.get("arch"),
                "top1": header.get("top1"),
            }
        )
    return found


def _files(folder: str | Path) -> list[Path]:
    """The proxies of a folder by their numbers; there is one at least."""
    folder = path_of(folder, "proxies")
    advice = "ddfast train-proxies" if on_command_line() else "ddfast.training.train_proxies"
    if not folder.is_dir():
        what = "is a file, not a folder of proxies" if folder.exists() else "is no folder"
        raise UsageError(f"{folder} {what}: give one that {advice} has filled")
    numbered = ((_FILE.fullmatch(path.name), path) for path in folder.iterdir())
    found = sorted((int(match[1]), path) for match, path in numbered if match)
    if not found:
        raise UsageError(f"{folder} holds no proxies (proxy-00000.safetensors ...): fill it with {advice}")
    return [path for _, path in found]


def _check_fits(
    path: Path,
    proxy: Teacher,
    class_names: list[str],
    image_size: int,
    mean_std: tuple[Sequence[float], Sequence[float]],
    arch: str | None,
) -> None:
    """Refuse a proxy of another architecture or of other data than the run's."""
    fault = None
    if arch is not None and proxy.arch != arch:
        fault = f"is a {proxy.arch}, wanted {arch}"
    elif proxy.image_size != image_size:
        fault = f"takes images of {proxy.image_size} px, the run has {image_size} px"
    elif len(proxy.class_names) != len(class_names):
        fault = f"knows {plural(len(proxy.class_names), 'class')}, the run has {len(class_names)}"
    elif different := [place for place, name in enumerate(class_names) if proxy.class_names[place] != name]:
        place = different[0]
        fault = f"has {proxy.class_names[place]!r} as class {place}, the run has {class_names[place]!r}"
    elif not all(
        np.allclose(theirs, ours, rtol=0, atol=1e-6)
        for theirs, ours in zip((proxy.mean, proxy.std), mean_std, strict=True)
    ):
        fault = (
            f"was trained on images normalised by {_numbers(proxy.mean)} and {_numbers(proxy.std)}, the run's are by "
            f"{_numbers(mean_std[0])} and {_numbers(mean_std[1])}"
        )
    if fault:
        raise UsageError(f"{path} {fault}: give proxies that were trained for this run's data and settings")


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{float(value):g}" for value in values) + ")"


def _held(out: Path, count: int, resume: bool) -> dict[str, Any] | None:
    """The table of a folder that may be gone on with; None where there is nothing yet.

    Raises:
        UsageError: the folder holds something else, or a run that must not be written over.
    """
    path = out / TABLE
    if not path.exists():
        left = [] if not out.exists() else [entry.name for entry in out.iterdir()]
        if any(not (name.startswith(".") and ".tmp-" in name) for name in left):
            raise UsageError(
                f"{out} is not empty and holds no proxies of train_proxies: choose another {argument('out')}"
            )
        return None
    try:
        held = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        held = None
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise UsageError(f"{path} is no table of proxies, or damaged: choose another {argument('out')}")
    if not resume and not any(entry.name.startswith("proxy-") for entry in out.iterdir()):
        return None  # a run that ended before its first whole epoch: nothing is lost
    done = plural(len(held["proxies"]), "trained proxy", "trained proxies")
    if not resume:
        raise UsageError(
            f"{out} holds {done} already: continue with {setting('resume', True)}, or choose another {argument('out')}"
        )
    if (least := len(held["proxies"])) > count:
        raise UsageError(
            f"{out} holds {done}, more than {argument('count')} {count}: give {setting('count', least)}, or choose "
            f"another {argument('out')}"
        )
    return held


def _places(
    source: Source, images_per_class: int | None, seed: int, quiet: bool
) -> tuple[list[int] | None, str]:
    """Which samples to train on, None for all, and what tells these from others in a file."""
    if images_per_class is None:
        return None, ""
    classes = len(source.class_names)
    held = np.bincount(source.samples.labels, minlength=classes)
    if smaller := int((held < images_per_class).sum()):
        least = int(held.argmin())
        say(
            f"{plural(smaller, 'class')} of {source.name} have fewer than {images_per_class} images, the smallest is "
            f"{source.class_names[least]} with {held[least]}: all of theirs are taken",
            quiet=quiet,
        )
    if held.max() <= images_per_class:
        return None, ""
    places = drawn_places(source.samples, classes, images_per_class, seed)
    return places.tolist(), f", {images_per_class} of each class by seed {seed}"


def _row(path: Path, number: int, config: TeacherConfig, identity: dict[str, Any]) -> Proxy:
    """The table's row of a finished proxy, which must be of this run."""
    header = read_header(path)
    if header is None:
        raise UsageError(f"{path} is no teacher file, or damaged: delete it to train this proxy anew")
    check_identity(path, header.get("training") or {}, identity)
    return Proxy(number, path.name, config.seed, config.epochs, header["images"], header["top1"])


def _write(result: Proxies, settings: dict[str, Any], arithmetic: dict[str, Any]) -> None:
    """Both forms of the table, where they do not stand already."""
    table = {
        "format": FORMAT,
        "settings": settings,
        "arithmetic": arithmetic,
        "proxies": [asdict(proxy) for proxy in result.proxies],
    }
    # The one by which a killed run is known comes first.
    for name, text in ((TABLE, json.dumps(table, indent=2) + "\n"), (READABLE_TABLE, result._markdown())):
        path = result.folder / name
        if not path.exists() or path.read_text("utf-8") != text:
            atomic_write_text(path, text)
