"""A folder of networks that are trained alike, each from weights of its own: CMI's proxies, MTT's experts.

Each has a seed of its own, derived from (seed, noun, number), so that a folder can be filled further later on. The
networks are ordinary teacher files; a table of their accuracies says how they were trained.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ddfast.arguments import data_of, output_folder, path_of, whole_number
from ddfast.crowding import Neighbours, warn_of_crowding
from ddfast.data.pool import drawn_places
from ddfast.data.sources import Source
from ddfast.errors import UsageError
from ddfast.files import atomic_write_text, make_folder, sweep_temporary
from ddfast.isolation import on_threads
from ddfast.models.registry import check_model
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

_COLUMNS = ("number", "seed", "epochs", "images", "top-1 %")


@dataclass(frozen=True)
class Kind:
    """What the networks of a folder are called.

    Attributes:
        noun: of one, "proxy"; its files are `proxy-00000.safetensors` and so on.
        nouns: of several, "proxies"; its table is `proxies.json`, for people `proxies.md`.
        format: that the table names.
    """

    noun: str
    nouns: str
    format: str

    @property
    def table(self) -> str:
        """Name of the table."""
        return f"{self.nouns}.json"

    @property
    def readable_table(self) -> str:
        """Name of the table for people."""
        return f"{self.nouns}.md"

    @property
    def maker(self) -> str:
        """What fills such a folder, as the caller would call it."""
        return f"ddfast train-{self.nouns}" if on_command_line() else f"ddfast.training.train_{self.nouns}"

    def file(self, number: int) -> str:
        """Name of the file of a network."""
        return f"{self.noun}-{number:05d}.safetensors"

    def number(self, name: str) -> int | None:
        """The number of the network whose file has that name; None for another file."""
        match = re.fullmatch(rf"{self.noun}-(\d+)\.safetensors", name)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class Network:
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
class NetworkFolder:
    """A folder of networks; `str()` of it is their table.

    Attributes:
        folder: where they lie.
        arch: their architecture.
        networks: in the order of their numbers.
    """

    kind: ClassVar[Kind]
    folder: Path
    arch: str
    networks: list[Network]

    @property
    def mean_top1(self) -> float | None:
        """Mean test accuracy in percent; None where it was not measured."""
        return mean_top1(self.networks)

    def __str__(self) -> str:
        return table_text(self.kind, self.arch, self.networks)


class Recorder:
    """Sees the networks of a folder as they are trained; this one keeps nothing beside the networks."""

    def seen(self, train: ImageSet | StreamedSet, test: ImageSet | None) -> tuple[Any, ImageSet | None]:
        """The images as the networks are to see them, before they are normalised."""
        return train, test

    def after(self, number: int) -> Callable[[int, nn.Module], None] | None:
        """What is told of the epochs of a network, from 0 for its start: see `fit_teacher`."""
        return None

    def finish(self, number: int) -> None:
        """A network is trained; its file stands. Called again when a finished folder is gone through."""


# Tables
# ----------------------------------------------------------------------------------------------------------


def table_text(kind: Kind, arch: str, networks: Sequence[Network]) -> str:
    """The table and its summary, in columns."""
    rows = [_COLUMNS, *map(_cells, networks)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, summary(kind, arch, networks)])


def summary(kind: Kind, arch: str, networks: Sequence[Network]) -> str:
    """How many there are and what they reach, in a few words."""
    reached = mean_top1(networks)
    said = "" if reached is None else f", mean top-1 {reached:.2f}%"
    return f"{plural(len(networks), kind.noun, kind.nouns)} of {arch}{said}"


def mean_top1(networks: Sequence[Network]) -> float | None:
    """Mean test accuracy in percent; None where it was not measured."""
    measured = [network.top1 for network in networks if network.top1 is not None]
    return math.fsum(measured) / len(measured) if measured else None


def _cells(network: Network) -> tuple[str, ...]:
    reached = "-" if network.top1 is None else f"{network.top1:.2f}"
    return str(network.number), str(network.seed), str(network.epochs), str(network.images), reached


def _markdown(kind: Kind, arch: str, networks: Sequence[Network]) -> str:
    rows = [_COLUMNS, ("---:",) * len(_COLUMNS), *map(_cells, networks)]
    return "\n".join([summary(kind, arch, networks), "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def _write(
    kind: Kind,
    out: Path,
    arch: str,
    networks: Sequence[Network],
    settings: dict[str, Any],
    arithmetic: dict[str, Any],
) -> None:
    """Both forms of the table, where they do not stand already."""
    table = {
        "format": kind.format,
        "settings": settings,
        "arithmetic": arithmetic,
        kind.nouns: [asdict(network) for network in networks],
    }
    # The one by which a killed run is known comes first.
    for name, text in (
        (kind.table, json.dumps(table, indent=2) + "\n"),
        (kind.readable_table, _markdown(kind, arch, networks)),
    ):
        path = out / name
        if not path.exists() or path.read_text("utf-8") != text:
            atomic_write_text(path, text)


# Training
# ----------------------------------------------------------------------------------------------------------


def train_networks(
    kind: Kind,
    data: Any,
    config: TeacherConfig,
    *,
    count: int,
    out: str | Path,
    images_per_class: int | None,
    image_size: int | None,
    resume: bool,
    device: str,
    workers: int | None,
    quiet: bool,
    recorder: Callable[[Path], Recorder] = lambda out: Recorder(),
    noted: str = "",
) -> tuple[Path, list[Network]]:
    """Train the networks of a folder that are missing in it, on images that are decoded once.

    Args:
        kind: of the networks.
        data: an image folder, archive, named set, or images in memory, as `ddfast.data.open_source` takes it.
        config: of every network but for its seed and, where `image_size` is None, its image size.
        recorder: of the folder, makes what sees the networks as they are trained.
        noted: what the networks' images are besides the data's, for the check of a resumed run.
        count, out, images_per_class, image_size, resume, device, workers, quiet: as `train_proxies`.

    Returns:
        The folder, and its networks in the order of their numbers.

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
    config = config.resolved()
    check_model(config.arch, image_size, **config.arch_options)
    held = _held(kind, out, count, resume)
    where = resolve_device(device)
    if workers is not None:
        workers = whole_number(workers, "workers", least=0)
    data = data_of(data)
    source = open_source(data, "train")
    for note in source.notes():
        say(note, quiet=quiet)
    config = replace(config, image_size=image_size or native_size(source))
    check_model(config.arch, config.image_size, **config.arch_options)
    places, drawn_from = training_places(source, images_per_class, config.seed, quiet)
    settings = {
        **identity_of(config, source.fingerprint() + noted),
        "images_per_class": None if places is None else images_per_class,
    }
    arithmetic: dict[str, Any] = {
        "arithmetic": compute_dtype(config.precision, where),
        "threads": torch.get_num_threads(),
        "device": where.type,
    }
    if held is not None:
        check_identity(out / kind.table, held["settings"], settings)
        arithmetic = continued(out / kind.table, held, arithmetic)
    config = replace(config, precision=arithmetic["arithmetic"])
    fingerprint = source.fingerprint() + drawn_from + noted

    @functools.cache
    def decoded() -> tuple[ImageSet | StreamedSet, ImageSet | None]:
        """The training images and the test images, where there are any."""
        try:
            test_source = open_source(data, "test")
        except UsageError as error:
            say(f"the accuracy will not be measured: {error}", quiet=quiet)
            test = None
        else:
            test = read_test_set(
                test_source, config.image_size, enlarged=config.enlarged_tests, workers=workers, quiet=quiet
            )
        samples = None if places is None else source.samples.take(places)
        train = read_training_set(source, config.image_size, samples=samples, workers=workers, quiet=quiet)
        say_slow_ops(where, quiet=quiet)
        if where.type == "cpu":
            warn_of_crowding(neighbours, torch.get_num_threads(), "OMP_NUM_THREADS={}".format, quiet=quiet)
        with on_threads(arithmetic["threads"]):
            return records.seen(train, test)

    make_folder(out)
    sweep_temporary(out)
    networks: list[Network] = []
    if held is None:
        _write(kind, out, config.arch, networks, settings, arithmetic)
    records = recorder(out)
    missing = [number for number in range(count) if not (out / kind.file(number)).exists()]
    threads = arithmetic["threads"]
    own_ways = ways_of_machine(where.type, threads, usable_cores(), "OMP_NUM_THREADS={}".format)
    outlook = Outlook(
        len(missing) * config.epochs,
        [f"fewer {argument('epochs')}", f"a smaller {argument('count')}", *own_ways],
    )
    for number in range(count):
        path = out / kind.file(number)
        own = replace(config, seed=derived_seed(config.seed, kind.noun, number))
        if not path.exists():
            train, test = decoded()
            say(f"{kind.noun} {number + 1} of {count}", quiet=quiet)
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
                    after_epoch=records.after(number),
                )
        networks.append(_row(kind, path, number, own, identity_of(own, fingerprint)))
        path.with_suffix(".state").unlink(missing_ok=True)  # of a run killed right behind its last write
        records.finish(number)
        if held is None or len(networks) >= len(held[kind.nouns]):
            _write(kind, out, config.arch, networks, settings, arithmetic)
    say(f"{out} holds {summary(kind, config.arch, networks)}", quiet=quiet)
    return out, networks


def _held(kind: Kind, out: Path, count: int, resume: bool) -> dict[str, Any] | None:
    """The table of a folder that may be gone on with; None where there is nothing yet.

    Raises:
        UsageError: the folder holds something else, or a run that must not be written over.
    """
    path = out / kind.table
    if not path.exists():
        left = [] if not out.exists() else [entry.name for entry in out.iterdir()]
        if any(not (name.startswith(".") and ".tmp-" in name) for name in left):
            raise UsageError(
                f"{out} is not empty and holds no {kind.nouns} of train_{kind.nouns}: choose another {argument('out')}"
            )
        return None
    try:
        held = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        held = None
    if not isinstance(held, dict) or held.get("format") != kind.format:
        raise UsageError(f"{path} is no table of {kind.nouns}, or damaged: choose another {argument('out')}")
    if not resume and not any(is_work(kind, entry.name) for entry in out.iterdir()):
        return None  # a run that ended before its first whole epoch: nothing is lost
    done = plural(len(held[kind.nouns]), f"trained {kind.noun}", f"trained {kind.nouns}")
    if not resume:
        raise UsageError(
            f"{out} holds {done} already: continue with {setting('resume', True)}, or choose another {argument('out')}"
        )
    if (least := len(held[kind.nouns])) > count:
        raise UsageError(
            f"{out} holds {done}, more than {argument('count')} {count}: give {setting('count', least)}, or choose "
            f"another {argument('out')}"
        )
    return held


def is_work(kind: Kind, name: str) -> bool:
    """Whether a file is a network, or the state of one on its way."""
    return kind.number(name) is not None or (name.startswith(f"{kind.noun}-") and name.endswith(".state"))


def training_places(
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


def _row(kind: Kind, path: Path, number: int, config: TeacherConfig, identity: dict[str, Any]) -> Network:
    """The table's row of a finished network, which must be of this run."""
    header = read_header(path)
    if header is None:
        raise UsageError(f"{path} is no teacher file, or damaged: delete it to train this {kind.noun} anew")
    check_identity(path, header.get("training") or {}, identity)
    return Network(number, path.name, config.seed, config.epochs, header["images"], header["top1"])


# What is read back
# ----------------------------------------------------------------------------------------------------------


def files_of(kind: Kind, folder: str | Path) -> list[Path]:
    """The networks of a folder by their numbers; there is one at least.

    Raises:
        UsageError: no such folder, or none in it.
    """
    folder = path_of(folder, kind.nouns)
    if not folder.is_dir():
        what = f"is a file, not a folder of {kind.nouns}" if folder.exists() else "is no folder"
        raise UsageError(f"{folder} {what}: give one that {kind.maker} has filled")
    numbered = ((kind.number(path.name), path) for path in folder.iterdir())
    found = sorted((number, path) for number, path in numbered if number is not None)
    if not found:
        raise UsageError(f"{folder} holds no {kind.nouns} ({kind.file(0)} ...): fill it with {kind.maker}")
    return [path for _, path in found]


def identity_of_file(path: Path) -> dict[str, Any]:
    """What a manifest says of a network: "file", its name; "sha256" of its bytes; "arch"; "top1", percent or None.

    Raises:
        UsageError: damaged.
    """
    header = read_header(path)
    if header is None:
        load_teacher(path)  # says what is wrong with it
        header = {}
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "arch": header.get("arch"),
        "top1": header.get("top1"),
    }


def check_fits(
    kind: Kind,
    path: Path,
    network: Teacher,
    class_names: Sequence[str],
    image_size: int,
    mean_std: tuple[Sequence[float], Sequence[float]],
    arch: str | None,
) -> None:
    """Refuse a network of another architecture or of other data than the run's."""
    fault = None
    if arch is not None and network.arch != arch:
        fault = f"is a {network.arch}, wanted {arch}"
    elif network.image_size != image_size:
        fault = f"takes images of {network.image_size} px, the run has {image_size} px"
    elif len(network.class_names) != len(class_names):
        fault = f"knows {plural(len(network.class_names), 'class')}, the run has {len(class_names)}"
    elif different := [place for place, name in enumerate(class_names) if network.class_names[place] != name]:
        place = different[0]
        fault = f"has {network.class_names[place]!r} as class {place}, the run has {class_names[place]!r}"
    elif not all(
        np.allclose(theirs, ours, rtol=0, atol=1e-6)
        for theirs, ours in zip((network.mean, network.std), mean_std, strict=True)
    ):
        fault = (
            f"was trained on images normalised by {_numbers(network.mean)} and {_numbers(network.std)}, the run's are "
            f"by {_numbers(mean_std[0])} and {_numbers(mean_std[1])}"
        )
    if fault:
        raise UsageError(
            f"{path} {fault}: give {kind.nouns} that were trained for this run's data and settings"
        )


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{float(value):g}" for value in values) + ")"
