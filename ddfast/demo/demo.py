"""`ddfast demo`: the whole way from images to a comparison, on a set that is rendered on the spot.

Renders a labelled set, trains a teacher, distils it with InfoUtil and with random images, trains students on
each at equal labels, and writes a page that shows both. Every stage keeps its result in the output folder;
the same demo run again takes up what is there and says so.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddfast.arguments import output_folder, whole_number
from ddfast.demo.shapes import Box, ShapesConfig, is_rendered, read_boxes, write_shapes
from ddfast.errors import UsageError
from ddfast.files import atomic_write_text, make_folder, sweep_temporary
from ddfast.progress import duration, say
from ddfast.version import __version__
from ddfast.wording import argument, plural

if TYPE_CHECKING:
    from ddfast.models import Teacher

RECORD = "demo.json"


@dataclass(frozen=True)
class Contestant:
    """One distilled set of the demo.

    Attributes:
        name: what it is called in the table.
        folder: where it stands in the output folder.
        method: as `ddfast.distill` takes it.
        factor: tiles per side.
        note: a few words for the page.
    """

    name: str
    folder: str
    method: str
    factor: int
    note: str


CONTESTANTS = (
    Contestant("InfoUtil", "infoutil", "infoutil", 2, "four attributed crops an image"),
    Contestant("random", "random", "random", 2, "four whole images, resized, an image"),
)


_STEPS = 3 + 2 * len(CONTESTANTS)  # that the demo counts: render, teacher, two a contestant, report


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo.

    The defaults put students mid-range, where a better set shows: a larger IPC or more steps bring both sets
    near the teacher, fewer than 800 steps leave both near the start. In the pilot (other pixels, 1,000 steps,
    two students each) attributed crops drawn at random gave 67 and 81%, those with the highest loss 70 and 74%,
    whole images in four tiles 48 and 48%, whole images at full size 58 and 44%.
    Measured with these defaults (3 students, float32 scores, bfloat16 training, one thread): seed 0, InfoUtil
    74.6 ± 7.6 against 45.8 ± 2.7 at random; seed 1, 73.0 ± 3.8 against 58.3 ± 9.0.

    Attributes:
        shapes: the rendered set.
        arch: architecture of the teacher and of the students.
        width: channels of its layers.
        teacher_epochs: passes over the training split.
        teacher_batch: images a step of the teacher.
        teacher_lr: SGD's learning rate, cosine to 0.
        images_per_class: sources that each method may choose from.
        ipc: distilled images a class.
        student_epochs: passes of a student over a distilled set, of one step each.
        students: students a set, one a seed.
    """

    shapes: ShapesConfig = field(
        default_factory=lambda: ShapesConfig(train_per_class=300, test_per_class=100)
    )
    arch: str = "convnet5"
    width: int = 32
    teacher_epochs: int = 14
    teacher_batch: int = 32
    teacher_lr: float = 0.02
    images_per_class: int = 100
    ipc: int = 2
    student_epochs: int = 1100
    students: int = 3


@dataclass(frozen=True)
class Standing:
    """How one set did.

    Attributes:
        name: of the contestant.
        top1: accuracy of each student on the test split, in percent.
        covered: share of the kept crops that hold the object's centre; None where a crop is a whole image.
    """

    name: str
    top1: list[float]
    covered: float | None

    @property
    def mean(self) -> float:
        """Mean of `top1`."""
        return statistics.fmean(self.top1)

    @property
    def std(self) -> float:
        """Sample deviation of `top1`; 0 for one student."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else 0.0


@dataclass(frozen=True)
class DemoResult:
    """What the demo found: the contestants in order, the teacher's accuracy in percent, and the page."""

    standings: list[Standing]
    teacher_top1: float
    report: Path


def run_demo(
    out: str | Path, *, seed: int = 0, quiet: bool = False, settings: DemoSettings | None = None
) -> DemoResult:
    """Render, train, distil, evaluate and compare; print the comparison.

    Args:
        out: output folder: `data/`, `teacher.safetensors`, one distilled folder a contestant, `report.html` and
            `mosaic.png`.
        seed: of the rendered set, the teacher and the distillation. Students have the seeds 0, 1, ...
        quiet: print nothing but the comparison.
        settings: sizes; the default takes a few minutes on two cores.

    Raises:
        UsageError: `out` holds something else, or a demo of another seed or of other settings.
    """
    seed = whole_number(seed, "seed", least=0, most=2**63 - 1)
    settings = settings or DemoSettings()
    settings = replace(settings, shapes=replace(settings.shapes, seed=seed))
    started = time.monotonic()
    out = _claim(output_folder(out), settings, seed)
    _render(out / "data", settings.shapes, quiet)
    teacher = _train_teacher(out, settings, seed, quiet)
    boxes = read_boxes(out / "data", "train")
    standings = []
    for place, contestant in enumerate(CONTESTANTS):
        _distil(out, contestant, settings, teacher, seed, f"[{3 + 2 * place}/{_STEPS}]", quiet)
        top1 = _evaluate(out, contestant, settings, teacher, f"[{4 + 2 * place}/{_STEPS}]", quiet)
        standings.append(Standing(contestant.name, top1, _covered(out / contestant.folder, boxes)))
    say(f"[{_STEPS}/{_STEPS}] report", quiet=quiet)
    assert teacher.top1 is not None  # the set has a test split
    result = DemoResult(standings, teacher.top1, _report(out, settings, teacher, standings, boxes))
    print(_table(result, out))
    say(f"the demo took {duration(time.monotonic() - started)}", quiet=quiet)
    return result


# Stages ------------------------------------------------------------------------------------------------------


def _claim(out: Path, settings: DemoSettings, seed: int) -> Path:
    """Make the output folder this demo's, or find that it already is.

    Raises:
        UsageError: it is a file, holds something else, or another demo.
    """
    import torch

    wanted = {
        "ddfast": __version__,
        "torch": torch.__version__,
        "seed": seed,
        "settings": asdict(settings),
        "contestants": [asdict(contestant) for contestant in CONTESTANTS],
    }
    text = json.dumps(wanted, indent=2) + "\n"
    record = out / RECORD
    if record.is_file():
        if record.read_text("utf-8", "replace") != text:
            raise UsageError(
                f"{out} holds a demo of another seed, version or settings: "
                f"delete it or choose another {argument('out')}"
            )
        sweep_temporary(out)
        return out
    if out.is_dir() and any(not (e.name.startswith(".") and ".tmp-" in e.name) for e in out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no ddfast demo: choose another {argument('out')}")
    make_folder(out)
    atomic_write_text(record, text)
    return out


def _render(data: Path, config: ShapesConfig, quiet: bool) -> None:
    images = 10 * (config.train_per_class + config.test_per_class)
    if is_rendered(data, config):
        say(f"[1/{_STEPS}] {images:,} images stand in {data}", quiet=quiet)
        return
    say(f"[1/{_STEPS}] rendering {images:,} images of {config.image_size} px into {data}", quiet=quiet)
    write_shapes(data, config)


def _train_teacher(out: Path, settings: DemoSettings, seed: int, quiet: bool) -> Teacher:
    from ddfast.training import train_teacher

    path = out / "teacher.safetensors"
    what = "teacher stands in" if path.is_file() else "training the teacher into"
    say(f"[2/{_STEPS}] {what} {path}", quiet=quiet)
    return train_teacher(
        out / "data",
        out=path,
        arch=settings.arch,
        arch_options={"width": settings.width},
        image_size=settings.shapes.image_size,
        epochs=settings.teacher_epochs,
        batch_size=settings.teacher_batch,
        lr=settings.teacher_lr,
        precision="auto",
        seed=seed,
        resume=True,
        quiet=quiet,
    )


def _distil(
    out: Path,
    contestant: Contestant,
    settings: DemoSettings,
    teacher: Teacher,
    seed: int,
    step: str,
    quiet: bool,
) -> None:
    from ddfast.distillation import distill

    images = settings.ipc * len(teacher.class_names)
    say(
        f"{step} {contestant.name}: distilling {plural(images, 'image')} into {out / contestant.folder}",
        quiet=quiet,
    )
    distill(
        contestant.method,
        data=out / "data",
        teacher=teacher,
        ipc=settings.ipc,
        out=out / contestant.folder,
        seed=seed,
        images_per_class=settings.images_per_class,
        factor=contestant.factor,
        resume=True,
        quiet=quiet,
    )


def _evaluate(
    out: Path, contestant: Contestant, settings: DemoSettings, teacher: Teacher, step: str, quiet: bool
) -> list[float]:
    """Accuracies of the students, kept in `evaluation-<folder>.json` with what they depend on."""
    from ddfast.training import PROTOCOLS, evaluate

    folder, path = out / contestant.folder, out / f"evaluation-{contestant.folder}.json"
    depends_on = {
        "manifest": hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest(),
        "teacher": teacher.sha256,
        "arch": settings.arch,
        "width": settings.width,
        "epochs": settings.student_epochs,
        "students": settings.students,
    }
    held = _read_json(path)
    if held is not None and held.get("depends_on") == depends_on:
        say(f"{step} {contestant.name}: the students' results stand in {path}", quiet=quiet)
        return [float(value) for value in held["result"]["top1"]]
    say(f"{step} {contestant.name}: training {plural(settings.students, 'student')} on it", quiet=quiet)
    result = evaluate(
        folder,
        out / "data",
        arch=settings.arch,
        arch_options={"width": settings.width},
        seeds=settings.students,
        teacher=teacher,
        epochs=settings.student_epochs,
        batch_size=settings.ipc * len(teacher.class_names),
        # RDED tests every tenth epoch near the end; here an epoch is one step.
        protocol=replace(PROTOCOLS["rded"], test_every=settings.student_epochs),
        precision="auto",
        quiet=quiet,
    )
    atomic_write_text(
        path, json.dumps({"depends_on": depends_on, "result": result.as_dict()}, indent=2) + "\n"
    )
    return result.top1


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


# Numbers -----------------------------------------------------------------------------------------------------


def _covered(folder: Path, boxes: Mapping[str, Box]) -> float | None:
    """Share of the tiles in a distilled folder whose crop holds the centre of its source's object."""
    from ddfast.output import DistilledSet

    distilled = DistilledSet(folder)
    tiles = [(tile["source"], tile["box"]) for row in distilled.rows for tile in row["tiles"]]
    if all(_area(box) >= distilled.image_size**2 for _, box in tiles):
        return None
    return statistics.fmean(holds(box, boxes[source].centre) for source, box in tiles)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def holds(box: Sequence[float], point: tuple[float, float]) -> bool:
    """Whether a box (x0, y0, x1, y1), x1 and y1 exclusive, holds a point (x, y)."""
    return box[0] <= point[0] < box[2] and box[1] <= point[1] < box[3]


def _table(result: DemoResult, out: Path) -> str:
    lines = [f"{'set':<10} {'top-1, mean ± std':<18} crop covers the object"]
    for one in result.standings:
        covered = "whole images" if one.covered is None else f"{100 * one.covered:.0f}%"
        lines.append(f"{one.name:<10} {f'{one.mean:.1f} ± {one.std:.1f}':<18} {covered}")
    lines.append(f"{'teacher':<10} {result.teacher_top1:.1f}")
    lines += [f"report  {result.report}", f"mosaic  {out / 'mosaic.png'}"]
    return "\n".join(lines)


def _report(
    out: Path,
    settings: DemoSettings,
    teacher: Teacher,
    standings: Sequence[Standing],
    boxes: Mapping[str, Box],
) -> Path:
    from ddfast.data import open_source
    from ddfast.report import Arm, write_comparison

    images = settings.ipc * len(teacher.class_names)
    pool = settings.images_per_class * len(teacher.class_names)
    arms = [
        Arm(one.name, out / contestant.folder, one.top1, one.covered, contestant.note)
        for one, contestant in zip(standings, CONTESTANTS, strict=True)
    ]
    ahead, behind = standings[0], max(standings[1:], key=lambda one: one.mean)
    title = f"{images} images by {ahead.name} teach {ahead.mean:.0f}%, {images} at random {behind.mean:.0f}%"
    facts = {
        "Data": f"{10 * settings.shapes.train_per_class:,} rendered images",
        "Classes": str(len(teacher.class_names)),
        "Image size": f"{settings.shapes.image_size} px",
        "Teacher": f"{teacher.arch}, {teacher.top1:.1f}% top-1",
        "Sources to choose from": f"{pool:,}",
        "Distilled": f"{images} images, {settings.ipc} per class",
        "Students": f"{settings.students} × {settings.arch}, {settings.student_epochs:,} steps",
        "Labels": "the same teacher's, online, T = 20",
    }
    with open_source(out / "data", "train") as source:
        return write_comparison(
            out,
            title=title,
            arms=arms,
            facts=facts,
            source=source,
            truth={key: (box.x0, box.y0, box.x1, box.y1) for key, box in boxes.items()},
            reference=("teacher", float(teacher.top1 or 0.0)),
            bars_note=(
                f"Top-1 on {10 * settings.shapes.test_per_class:,} test images after the last step; every dot is "
                f"one of {settings.students} students. Same teacher, same labels, same number of images and steps."
            ),
        )
