"""Arms of a comparison: a method with settings, distilled once for each IPC, and the students trained on it.

Everything is kept in one work folder under the settings that decide it, so that whatever shares the folder, one
comparison or all of the paper's recipes, distils a set once, computes a score table once and trains a student once.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ddfast
from bench import facts
from ddfast.distillation import distill
from ddfast.errors import UsageError
from ddfast.files import atomic_write_text, make_folder
from ddfast.methods import get_method
from ddfast.methods.synthesis import Synthesis
from ddfast.models import Teacher, load_teacher
from ddfast.output.distilled import SCORES
from ddfast.output.table import read_table
from ddfast.pipeline.plan import read_plan
from ddfast.progress import say
from ddfast.training import EvaluationResult, ImageSet, evaluate
from ddfast.training.image_sets import read_test_set
from ddfast.training.protocol import Protocol, protocol_named
from ddfast.training.teacher import native_size

FROZEN = "_frozen"  # behind a protocol's name
# Settings of `distill` that an arm may name beside the options of its method.
_OF_DISTILL = ("seed", "factor", "images_per_class", "precision", "preset", "normalization")


@dataclass(frozen=True)
class Arm:
    """A method with settings: keys are options of the method, or of `distill` (`seed`, `factor`, `preset`, ...)."""

    name: str
    method: str
    settings: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Parse `method`, `method key=value` or `name = method key=value`.

        `scores=NAME` is taken and left out: score tables are shared without being asked to.
        """
        name, separator, rest = text.partition(" = ")
        words = (rest if separator else text).split()
        settings: dict[str, Any] = {}
        for word in words[1:]:
            key, _, value = word.partition("=")
            if key != "scores":
                settings[key] = _value(key, value)
        return cls(name.strip() if separator else text, words[0], settings)


def _value(key: str, text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if key == "crop_frac":
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class Setup:
    """What the arms of a comparison share: data, judging teacher, and how sources are scored.

    Attributes:
        data: as `ddfast.distill` takes it.
        teacher: teacher file; scores the sources, and labels where no other is named.
        work: folder of distilled sets and students.
        factor: tiles per side, or "auto".
        images_per_class: sources scored of each class.
        precision: of scoring and of the students, "auto" or "float32".
        own_sets: a set for each student, distilled with the student's seed, so that the deviation over students holds
            the luck of the pool and of the draws; else one set for all.
        held_out: judge students on so many training images of each class that were not scored, in place of the test
            split: what is chosen by them is not chosen on test data. 0: the test split.
    """

    data: str
    teacher: Path
    work: Path
    factor: str | int = "auto"
    images_per_class: int = 300
    precision: str = "auto"
    own_sets: bool = False
    held_out: int = 0


@dataclass(frozen=True)
class Training:
    """How students are trained on a distilled set.

    Attributes:
        arch: name for `create_model`.
        width: channels of a ConvNet's layers, None for the default.
        labels: "online" or "stored". A protocol with hard labels takes neither.
        label_teacher: labels in place of the judging teacher, a file; None for that one.
        protocol: a name of `ddfast.training.PROTOCOLS`; with `FROZEN` behind it, learning rates that come with images
            are not taken.
        autoaugment: AutoAugment on the students' images.
        epochs: passes over the set; None: the protocol's for the IPC.
        batch_size: images a step; None: the protocol's.
        last_only: test after the last epoch alone. The headline is the same; there is no best tested epoch then.
    """

    arch: str
    width: int | None = None
    labels: str = "online"
    label_teacher: Path | None = None
    protocol: str = "rded"
    autoaugment: bool = False
    epochs: int | None = None
    batch_size: int | None = None
    last_only: bool = False

    @property
    def rules(self) -> Protocol:
        """The protocol."""
        named = protocol_named(self.protocol.removesuffix(FROZEN))
        named = dataclasses.replace(named, name=self.protocol)
        return dataclasses.replace(named, test_from=1.0, tests=0) if self.last_only else named

    @property
    def hard(self) -> bool:
        """Whether the protocol trains on the classes and asks no teacher."""
        return self.rules.labels == "hard"


@dataclass(frozen=True)
class Distillation:
    """One arm at one IPC, settled: every option that decides its bytes.

    Attributes:
        arm: name of the arm.
        method: its method.
        arguments: keyword arguments of `distill`, the method's own options among them.
        identity: what decides the result, ready for JSON.
        folder: where it is kept.
    """

    arm: str
    method: str
    arguments: dict[str, Any] = field(hash=False)
    identity: dict[str, Any] = field(hash=False)
    folder: Path

    @classmethod
    def of(cls, arm: Arm, ipc: int, setup: Setup, label_teacher: Path | None = None) -> Distillation:
        """Settle an arm.

        Raises:
            UsageError: an unknown method or option.
        """
        teacher = teacher_at(setup.teacher)
        given = {
            "factor": setup.factor,
            "images_per_class": setup.images_per_class,
            "precision": setup.precision,
            "seed": 0,
            **arm.settings,
        }
        options = {key: value for key, value in given.items() if key not in _OF_DISTILL}
        factor = given["factor"] if given["factor"] != "auto" else (1 if teacher.image_size <= 64 else 2)
        try:
            method = get_method(arm.method).from_options(options, given.get("preset"))
            if isinstance(method, Synthesis):  # the tiles of its images are its own affair
                factor = method.tiles_per_side(str(arm.settings.get("factor", "auto")), teacher.image_size)
            method = method.resolved(int(factor), ipc)
        except UsageError as error:
            raise UsageError(f"arm {arm.name!r}: {error}") from error
        shared = {
            "data": fingerprint(setup.data),
            "method": arm.method,
            **{name: given[name] for name in ("images_per_class", "precision", "seed")},
            "factor": int(factor),
        }
        if isinstance(method, Synthesis):
            return cls._of_pixels(arm, ipc, setup, method, given, shared, label_teacher)
        scoring = {**shared, "teacher": teacher.sha256, "options": method.options_of_stage("score")}
        identity = {"score": scoring, "select": method.options_of_stage("select"), "ipc": ipc}
        if label_teacher is not None:
            identity["label_teacher"] = teacher_at(label_teacher).sha256
        folder = setup.work / f"{arm.method}-{digest(scoring)}-ipc{ipc}-{digest(identity)}"
        arguments = {**given, "data": setup.data, "teacher": setup.teacher, "ipc": ipc}
        arguments["threads"] = torch.get_num_threads()  # comparisons may share a machine
        if label_teacher is not None:
            arguments["label_teacher"] = label_teacher
        return cls(arm.name, arm.method, arguments, identity, folder)

    @classmethod
    def _of_pixels(
        cls,
        arm: Arm,
        ipc: int,
        setup: Setup,
        method: Synthesis,
        given: dict[str, Any],
        shared: dict[str, Any],
        label_teacher: Path | None,
    ) -> Distillation:
        """A method that makes pixels: all images, a teacher where it asks one, proxies by what is in their files."""
        options = {**method.options_of_stage("synthesize"), **method.inputs()}
        chosen = {**shared, "images_per_class": None, "options": options}
        chosen["normalization"] = given.get("normalization", "auto")
        size = teacher_at(setup.teacher).image_size
        if size != own_size(setup.data):
            chosen["image_size"] = size
        teachers = {}
        if method.requires_teacher():
            teachers = {"teacher": setup.teacher}
            if label_teacher is not None:
                teachers["label_teacher"] = label_teacher
        hashes = {role: teacher_at(path).sha256 for role, path in teachers.items()}
        identity = {"synthesize": chosen, "ipc": ipc, **hashes}
        folder = setup.work / f"{arm.method}-ipc{ipc}-{digest(identity)}"
        left_out = {"images_per_class"} | ({"factor"} - set(arm.settings))
        settings = {name: value for name, value in given.items() if name not in left_out}
        arguments = {
            **settings,
            **teachers,
            "data": setup.data,
            "ipc": ipc,
            "threads": torch.get_num_threads(),
        }
        arguments["image_size"] = size
        return cls(arm.name, arm.method, arguments, identity, folder)

    def make(self) -> Path:
        """The distilled folder: made now, or finished, or as an earlier try left it."""
        with alone(self.folder):
            plan = read_plan(self.folder)
            if plan is not None and plan["complete"]:
                return self.folder
            try:
                distill(self.method, out=self.folder, resume=True, scores=self._scored(), **self.arguments)
            except UsageError as error:
                raise type(error)(f"arm {self.arm!r}: {error}") from error
        return self.folder

    def _scored(self) -> Path | None:
        """A finished folder with the same score table: an arm's other IPCs, and arms that differ in selection."""
        if self.folder.exists() or "score" not in self.identity:
            return None
        shared = f"{self.method}-{digest(self.identity['score'])}-ipc*"
        for folder in sorted(self.folder.parent.glob(shared)):
            plan = read_plan(folder) if folder.is_dir() else None
            if plan is not None and plan["complete"]:
                return folder
        return None


def train_students(
    arm: Arm, ipc: int, setup: Setup, training: Training, seeds: Sequence[int]
) -> dict[str, Any]:
    """Distil an arm at one IPC, train a student for each seed, and put their accuracies together.

    Whatever an earlier run has finished is read. Returns `EvaluationResult.as_dict()` with, beside it: arm, ipc,
    options and preset of the method, seconds of the stages, the judging teacher's mean loss on the whole images in
    nats, and the commits that the students come from.
    """
    return combined([_student(arm, ipc, setup, training, seed) for seed in seeds], arm.name)


def student_path(arm: Arm, ipc: int, setup: Setup, training: Training, seed: int) -> Path:
    """Where the accuracy of one student is kept.

    One that is tested at the end alone serves no table of best epochs; one that was tested more often serves both.
    """
    path = _fully_tested_path(arm, ipc, setup, training, seed)
    return path.with_suffix(".last.json") if training.last_only and not path.exists() else path


def _fully_tested_path(arm: Arm, ipc: int, setup: Setup, training: Training, seed: int) -> Path:
    distillation = set_of(arm, ipc, setup, training, seed)
    asked = {"distilled": distillation.identity, "training": _identity(setup, training, ipc), "seed": seed}
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{arm.method}-ipc{ipc}-{training.arch}")
    return setup.work / "students" / f"{plain}-{digest(asked)}.json"


def _student(arm: Arm, ipc: int, setup: Setup, training: Training, seed: int) -> dict[str, Any]:
    with alone(_fully_tested_path(arm, ipc, setup, training, seed)):
        path = student_path(arm, ipc, setup, training, seed)
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
            return found
        folder = set_of(arm, ipc, setup, training, seed).make()
        online = training.labels == "online" and not training.hard
        evaluated = evaluate(
            folder,
            _judging_set(setup, folder),
            arch=training.arch,
            arch_options={} if training.width is None else {"width": training.width},
            batch_size=training.batch_size,
            seeds=[seed],
            teacher=teacher_at(training.label_teacher or setup.teacher) if online else None,
            epochs=training.epochs,
            protocol=training.rules,
            autoaugment=training.autoaugment,
            precision=setup.precision,
            quiet=True,
        )
        plan = read_plan(folder)
        assert plan is not None
        result = {
            "arm": arm.name,
            "ipc": ipc,
            "options": plan["options"],
            "preset": plan["preset"],
            **evaluated.as_dict(),
            "seconds": json.loads((folder / "run.json").read_text("utf-8"))["seconds"],
            "teacher_loss": teacher_loss(folder, setup.teacher),
            "last_only": training.last_only,
            "threads": torch.get_num_threads(),
            "commits": [facts.commit()[0]],
        }
        atomic_write_text(path, json.dumps(result, indent=1) + "\n")
        say(f"{arm.name}, IPC {ipc}, seed {seed}: top-1 {evaluated.mean:.2f}, best {evaluated.best_mean:.2f}")
    return result


def set_of(arm: Arm, ipc: int, setup: Setup, training: Training, seed: int) -> Distillation:
    """What the student of a seed is trained on."""
    if setup.own_sets:
        arm = dataclasses.replace(arm, settings={**arm.settings, "seed": seed})
    stored = training.labels == "stored" and not training.hard
    return Distillation.of(arm, ipc, setup, training.label_teacher if stored else None)


def _identity(setup: Setup, training: Training, ipc: int) -> dict[str, Any]:
    labelled = "hard" if training.hard else training.labels
    teacher = None
    if labelled == "online":
        teacher = teacher_at(training.label_teacher or setup.teacher).sha256
    return {
        "arch": training.arch,
        "width": training.width,
        "labels": labelled,
        "label_teacher": teacher,
        "protocol": training.protocol,
        "autoaugment": training.autoaugment,
        "epochs": training.epochs or training.rules.epochs_for(ipc),
        "batch_size": training.batch_size,
        "precision": setup.precision,
        **({"held_out": setup.held_out} if setup.held_out else {}),
    }


def combined(students: Sequence[Mapping[str, Any]], arm: str) -> dict[str, Any]:
    """The results of single students of one set as one result."""
    first = students[0]

    def joined(name: str) -> list[Any]:
        return [value for student in students for value in student[name]]

    classes = [student["per_class"] for student in students]
    together = EvaluationResult(
        arch=first["arch"],
        protocol=first["protocol"],
        labels=first["labels"],
        epochs=first["epochs"],
        batch_size=first["batch_size"],
        seeds=joined("seeds"),
        top1=joined("top1"),
        top5=joined("top5"),
        best=joined("best"),
        per_class=[float("nan") if None in of else sum(of) / len(of) for of in zip(*classes, strict=True)],
        arch_options=first["arch_options"],
        steps=first.get("steps", 0),
        recipe=first.get("recipe", ""),
        digests=first.get("digests", {}),
        regions=first.get("regions", "none"),
    )
    commits = list(dict.fromkeys(commit for student in students for commit in student["commits"]))
    last_only = any(student.get("last_only", False) for student in students)
    loss = sum(student["teacher_loss"] for student in students) / len(students)
    return {
        **first,
        **together.as_dict(),
        "arm": arm,
        "teacher_loss": loss,
        "last_only": last_only,
        "commits": commits,
    }


def by_ipc(text: str) -> dict[int, int]:
    """`300,50:60`: 60 at IPC 50 and 300 elsewhere, as {0: 300, 50: 60}."""
    pairs = [part.split(":") if ":" in part else ("0", part) for part in text.split(",")]
    return {int(ipc): int(value) for ipc, value in pairs}


def at_ipc(values: Mapping[int, int], ipc: int) -> int | None:
    """The value for an IPC: its own, or the one for all others, or None."""
    return values.get(ipc, values.get(0))


def digest(value: Any) -> str:
    """Ten hexadecimal digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process makes what `path` is to hold, and keep the others waiting."""
    make_folder(path.parent)
    with (path.parent / f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def own_size(data: str) -> int:
    """Side of the images of a data set, which a run has where no other is asked for."""
    return native_size(ddfast.data.open_source(data, "train"))


@functools.cache
def fingerprint(data: str) -> str:
    """Of the training split."""
    return ddfast.data.open_source(data, "train").fingerprint()


@functools.cache
def _opened(path: Path, changed: int) -> Teacher:
    return load_teacher(path)


def teacher_at(path: Path) -> Teacher:
    """The teacher of a file, read once."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no teacher at {path}: give the file that ddfast train-teacher wrote")
    return _opened(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def test_set(data: str, size: int) -> ImageSet:
    """The test split, decoded once."""
    return read_test_set(ddfast.data.open_source(data, "test"), size, quiet=True)


def _judging_set(setup: Setup, folder: Path) -> ImageSet:
    size = teacher_at(setup.teacher).image_size
    if not setup.held_out:
        return test_set(setup.data, size)
    scored = np.unique(
        np.concatenate(
            [
                read_table(part, columns=["sample_id"])["sample_id"]
                for part in (folder / SCORES).glob("part-*.parquet")
            ]
        )
    )
    return held_out_set(setup.data, size, setup.held_out, tuple(scored.tolist()))


@functools.lru_cache(maxsize=2)
def held_out_set(data: str, size: int, count: int, scored: tuple[int, ...]) -> ImageSet:
    """`count` training images of each class, in the order of their ids, without the scored ones; read as test images.

    Raises:
        UsageError: a class has too few that were not scored.
    """
    source = ddfast.data.open_source(data, "train")
    places = np.flatnonzero(~np.isin(source.samples.ids, scored))
    places = places[np.argsort(source.samples.ids[places], kind="stable")]
    labels = source.samples.labels[places]
    chosen = [places[labels == label][:count] for label in range(len(source.class_names))]
    for name, of_class in zip(source.class_names, chosen, strict=True):
        if len(of_class) < count:
            raise UsageError(
                f"class {name} has {len(of_class)} training images that were not scored, {count} are held out"
            )
    samples = [source.samples[place] for place in np.concatenate(chosen)]
    return read_test_set(source, size, samples=samples, quiet=True)


@functools.lru_cache(maxsize=256)
def teacher_loss(folder: Path, path: Path) -> float:
    """Mean cross-entropy of a teacher on the whole distilled images, in nats: how hard it finds them."""
    distilled = ddfast.DistilledSet(folder)
    teacher = teacher_at(path)
    mean, std = torch.tensor(teacher.mean).view(1, 3, 1, 1), torch.tensor(teacher.std).view(1, 3, 1, 1)
    images = torch.stack([distilled[i][0] for i in range(len(distilled))])
    with torch.no_grad():
        logits = torch.cat([teacher.model((part.float() / 255 - mean) / std) for part in images.split(64)])
    return float(torch.nn.functional.cross_entropy(logits, distilled.labels))
