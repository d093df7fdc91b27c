"""Table 4: class-incremental learning in five steps, over several orders of the classes.

    python -m bench.studies table4 --data imagenette.zip --teacher resnet18.safetensors
    python -m bench.studies table4 --data cifar10-jpeg.zip --teacher teacher.safetensors --ipc 10 \
        --student convnet3_in --methods random,InfoUtil,DM,IDC --budget "dm:iterations=300" --work WORK

At each step new classes come, and a student is trained from scratch on the distilled images of all classes seen so
far, with as many outputs, and tested on the test images of those classes. The teacher was trained on all classes; its
labels are softmaxed over the classes seen. All students of a step take the same updates: images that stand for several
are seen in fewer passes. The paper repeats it with five orders at IPC 50 on ImageNette and says that InfoUtil is ahead
of RDED at every step. Without --methods it takes the paper's rows; with the options and the --work of the study
`league` the sets of that study's seed 0. Writes `<out>.csv`, `.md`, `.png` and `.svg`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import facts
from bench.facts import commit
from bench.studies.arguments import study_parser, told
from bench.studies.arms import FROZEN, Arm, Distillation, Setup, Training, alone, digest, teacher_at, test_set
from bench.studies.charts import Line, accuracy_chart
from bench.studies.compare import made_with, teacher_fact
from bench.studies.cost import forward_seconds, step_seconds
from bench.studies.infoutil.recipes import RANDOM
from bench.studies.league import roster
from bench.studies.teachers import teachers
from ddfast.errors import UsageError
from ddfast.files import atomic_write_text, make_folder
from ddfast.models import Teacher
from ddfast.progress import say
from ddfast.seeding import generator
from ddfast.training import DistilledImages, ImageSet, train_student
from ddfast.training.equal_steps import EqualSteps, images_of_a_pass
from ddfast.training.evaluation import read_distilled
from ddfast.training.student import steps_of_a_pass

ARMS = (
    Arm("InfoUtil", "infoutil", {}),
    Arm("InfoUtil, the paper's rules", "infoutil", {"preset": "paper"}),
    Arm("RDED", "rded", {}),
    Arm(RANDOM.name, "random", {}),
)
TITLE = "Table 4: class-incremental learning"
PROTOCOLS = {"soft": "rded", "hard": f"dsa{FROZEN}"}  # of the labels


def class_orders(classes: int, orders: int, seed: int = 0) -> list[list[int]]:
    """Random orders of the classes, the same for every arm."""
    return [
        torch.randperm(classes, generator=generator(seed, "classes", number)).tolist()
        for number in range(orders)
    ]


def seen_classes(order: Sequence[int], steps: int) -> list[list[int]]:
    """Classes seen at each step, ascending: the first ceil(s C / steps) of the order at step s."""
    counts = [math.ceil(step * len(order) / steps) for step in range(1, steps + 1)]
    return [sorted(order[:count]) for count in counts]


class SeenClasses(nn.Module):
    """Outputs [B, len(classes)] of a classifier for some of its classes."""

    def __init__(self, model: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("classes", torch.tensor(classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the seen classes: their softmax is the full one, renormalised."""
        return self.model(images)[:, self.classes]


def seen_teacher(teacher: Teacher, classes: Sequence[int]) -> Teacher:
    """A teacher of some of its classes."""
    names = [teacher.class_names[label] for label in classes]
    return dataclasses.replace(teacher, model=SeenClasses(teacher.model, classes).eval(), class_names=names)


def seen_images(distilled: DistilledImages, classes: Sequence[int]) -> DistilledImages:
    """The distilled images of some classes, labelled by their places among them."""
    rows = torch.isin(distilled.labels, torch.tensor(classes))
    soft = distilled.soft_labels
    if soft is not None:
        soft = soft[rows][..., classes].float()
        soft = soft / soft.sum(dim=-1, keepdim=True)
    return dataclasses.replace(
        distilled,
        images=distilled.images[rows],
        labels=_places(distilled.labels[rows], classes),
        class_names=[distilled.class_names[label] for label in classes],
        soft_labels=soft,
        boxes=None if distilled.boxes is None else distilled.boxes[rows],
    )


def seen_test(test: ImageSet, classes: Sequence[int]) -> ImageSet:
    """The test images of some classes, labelled by their places among them."""
    rows = torch.isin(test.labels, torch.tensor(classes))
    return ImageSet(test.images[rows], _places(test.labels[rows], classes))


def _places(labels: Tensor, classes: Sequence[int]) -> Tensor:
    return torch.searchsorted(torch.tensor(classes), labels)


@dataclass(frozen=True)
class Plan:
    """What the study trains: arms, IPC, orders and steps, and how."""

    setup: Setup
    training: Training
    ipc: int
    orders: tuple[tuple[int, ...], ...]
    steps: int
    arms: tuple[Arm, ...] = ARMS

    def path(self, arm: Arm, order: int, step: int) -> Path:
        """Where the accuracy of one student is kept."""
        identity = Distillation.of(arm, self.ipc, self.setup).identity
        training = dataclasses.asdict(self.training) | {"precision": self.setup.precision}
        if not self.training.hard:
            training["teacher"] = teacher_at(self.setup.teacher).sha256
        asked = [identity, training, seen_classes(self.orders[order], self.steps)[step], order]
        return self.setup.work / "students" / f"continual-{arm.method}-ipc{self.ipc}-{digest(asked)}.json"

    def student(self, arm: Arm, order: int, step: int) -> dict[str, Any]:
        """Train the student of one step, or read its accuracy."""
        path = self.path(arm, order, step)
        make_folder(path.parent)
        with alone(path):
            if path.exists():
                found: dict[str, Any] = json.loads(path.read_text("utf-8"))
                return found
            classes = seen_classes(self.orders[order], self.steps)[step]
            teacher = teacher_at(self.setup.teacher)
            distilled = read_distilled(Distillation.of(arm, self.ipc, self.setup).make())
            images = seen_images(distilled, classes)
            training = self.training_on(images)
            trained = train_student(
                images,
                seen_test(test_set(self.setup.data, teacher.image_size), classes),
                arch=training.arch,
                arch_options={} if training.width is None else {"width": training.width},
                teacher=None if training.hard else seen_teacher(teacher, classes),
                protocol=training.rules,
                epochs=training.epochs,
                batch_size=training.batch_size,
                seed=order,
                precision=self.setup.precision,
                quiet=True,
            )
            result = {
                "top1": trained.top1,
                "classes": classes,
                "epochs": trained.epochs,
                "steps": trained.steps,
                "threads": torch.get_num_threads(),
                "commits": [commit()[0]],
            }
            atomic_write_text(path, json.dumps(result) + "\n")
            say(f"{arm.name}, order {order}, {len(classes)} classes: top-1 {trained.top1:.2f}")
        return result

    def training_on(self, images: DistilledImages) -> Training:
        """The training of a student: with the passes of the protocol, or fewer where an image stands for several."""
        rules, whole = self.training.rules, len(images.labels)
        seen = images_of_a_pass(images, rules)
        if seen == whole:
            return self.training
        batch = rules.batch_size_for(images.ipc, images.num_classes, images.image_size)
        passes = (self.training.epochs or rules.epochs_for(images.ipc)) + rules.passes_after
        steps = EqualSteps(passes * steps_of_a_pass(whole, batch), batch, rules.passes_after)
        return dataclasses.replace(self.training, epochs=steps.epochs_of(seen), batch_size=batch)

    def cost(self) -> str:
        """Students that are missing, and minutes from a measured step."""
        teacher = teacher_at(self.setup.teacher)
        classes, size = len(teacher.class_names), teacher.image_size
        missing, seconds = 0, 0.0
        labeller = None if self.training.hard else self.setup.teacher
        epochs = self.training.epochs or self.training.rules.epochs_for(self.ipc)
        for arm in self.arms:
            for order in range(len(self.orders)):
                for step, seen in enumerate(seen_classes(self.orders[order], self.steps)):
                    if self.path(arm, order, step).exists():
                        continue
                    missing += 1
                    count = self.ipc * len(seen)
                    batch = self.training.rules.batch_size_for(self.ipc, len(seen), size)
                    took = step_seconds(self.training, batch, labeller, classes, size, self.setup.precision)
                    seconds += epochs * math.ceil(count / batch) * took
                    tested = len(test_set(self.setup.data, size)) * len(seen) / classes
                    width = self.training.width
                    precision = self.setup.precision
                    seconds += tested * forward_seconds(self.training.arch, width, classes, size, precision)
        total = len(self.arms) * len(self.orders) * self.steps
        return (
            f"{TITLE}: {missing} students to train ({total - missing} are kept), sets of {len(self.arms)} arms at IPC "
            f"{self.ipc}; about {seconds / 60:.0f} minutes with {torch.get_num_threads()} threads, distillation apart"
        )


def main(argv: Sequence[str]) -> int:
    """Run the study."""
    parser = study_parser("table4", __doc__)
    parser.add_argument("--student", default=None, help="architecture; default the teacher's")
    parser.add_argument("--width", type=int, default=None, help="channels of a ConvNet's layers")
    parser.add_argument("--ipc", type=int, default=50)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--orders", type=int, default=5, help="orders of the classes, each with one student a step"
    )
    parser.add_argument("--epochs", type=int, default=None, help="of whole images; default the protocol's")
    parser.add_argument(
        "--labels",
        default="soft",
        choices=tuple(PROTOCOLS),
        help="; ".join(f"{name}: protocol {protocol}" for name, protocol in PROTOCOLS.items()),
    )
    roster.add_options(parser, ())
    parser.add_argument("--cost", action="store_true", help="say what it would cost, and stop")
    arguments = parser.parse_args(argv)
    (file, *_) = teachers(
        arguments.data,
        arguments.teacher,
        arguments.teacher_arch or ["resnet18"],
        arguments.work,
        arguments.teacher_epochs,
        arguments.width,
    )
    classes = len(teacher_at(file).class_names)
    if not 1 <= arguments.steps <= classes:
        raise UsageError(f"--steps must be in 1..{classes}, the number of classes, got {arguments.steps}")
    if arguments.orders < 1:
        raise UsageError(f"--orders must be at least 1, got {arguments.orders}")
    setup = Setup(
        arguments.data,
        file,
        arguments.work,
        arguments.factor,
        arguments.images_per_class or 300,
        arguments.precision,
    )
    training = Training(
        arguments.student or teacher_at(file).arch,
        arguments.width,
        labels="online" if arguments.labels == "soft" else "hard",
        protocol=PROTOCOLS[arguments.labels],
        epochs=arguments.epochs,
        last_only=True,
    )
    orders = tuple(tuple(order) for order in class_orders(classes, arguments.orders))
    arms, notes = _arms(arguments)
    plan = Plan(setup, training, arguments.ipc, orders, arguments.steps, arms)
    say(plan.cost())
    if arguments.cost:
        return 0
    out = arguments.out or facts.RESULTS / "paper" / f"table4_{Path(arguments.data).stem}_{training.arch}"
    found: dict[str, list[list[dict[str, Any]]]] = {arm.name: [] for arm in arms}
    page = ""
    for order in range(len(orders)):
        for arm in arms:
            found[arm.name].append([plan.student(arm, order, step) for step in range(plan.steps)])
            page = write(found, plan, notes, out, argv)
    print(page)
    return 0


def _arms(arguments: argparse.Namespace) -> tuple[tuple[Arm, ...], list[str]]:
    """The arms, and a line on the settings of each, or on why it is left out.

    Raises:
        UsageError: none is left.
    """
    entries = roster.settle(arguments)
    if not entries:
        return ARMS, [f"{arm.name}: {' '.join([arm.method, *_options(arm)])}" for arm in ARMS]
    arms, notes = [], []
    for entry in entries:
        reason = entry.lacks(arguments.ipc, arguments)
        told = entry.spent(arguments.ipc, arguments) if reason is None else f"left out, {reason}"
        notes.append(f"{entry.name}: {told}")
        arms += [] if reason else [entry.arm(arguments.ipc, arguments)]
    if not arms:
        raise UsageError(f"no method is left: {'; '.join(notes)}")
    return tuple(arms), notes


def _options(arm: Arm) -> list[str]:
    return [f"{key}={value}" for key, value in arm.settings.items()]


def write(
    found: dict[str, list[list[dict[str, Any]]]],
    plan: Plan,
    notes: Sequence[str],
    out: Path,
    argv: Sequence[str],
) -> str:
    """Write the table, the page and the picture of what is finished; returns the page."""
    make_folder(out.parent)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "order", "step", "classes", "top1", "epochs", "classes_in_order"])
    lines, drawn = [], []
    counts = [len(seen) for seen in seen_classes(plan.orders[0], plan.steps)]
    for name, orders in found.items():
        for order, students in enumerate(orders):
            for step, student in enumerate(students):
                in_order = " ".join(map(str, plan.orders[order]))
                row = [len(student["classes"]), f"{student['top1']:.2f}", student["epochs"], in_order]
                writer.writerow([name, order, step + 1, *row])
        if not orders:
            continue
        columns = [[students[step]["top1"] for students in orders] for step in range(plan.steps)]
        spreads = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
        means = [statistics.fmean(column) for column in columns]
        cells = [
            f"{mean:.1f}" + (f" ± {spread:.1f}" if len(orders) > 1 else "")
            for mean, spread in zip(means, spreads, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(orders)} |")
        points = [
            (count, mean, spread, None) for count, mean, spread in zip(counts, means, spreads, strict=True)
        ]
        drawn.append(Line(name, points, name in (RANDOM.name, "random")))
    atomic_write_text(out.with_suffix(".csv"), text.getvalue())
    accuracy_chart(out, [("", drawn)], TITLE, "{} classes")
    students = [student for orders in found.values() for one in orders for student in one]
    head, most = " | ".join(f"{count} classes" for count in counts), max(each["epochs"] for each in students)
    page = (
        f"# {TITLE}\n\nTest top-1 in percent on the classes seen so far, mean ± deviation over orders of the classes. "
        "The paper repeats five orders on ImageNette at IPC 50 and has InfoUtil ahead of RDED at every step.\n\n"
        f"| method | {head} | orders |\n| --- |{' --- |' * (len(counts) + 1)}\n"
        + "\n".join(lines)
        + f"\n\n![accuracy]({out.with_suffix('.png').name})\n\n"
        f"- data {Path(plan.setup.data).name}, {plan.setup.images_per_class} images a class scored, IPC {plan.ipc}\n"
        f"- teacher {teacher_fact(plan.setup.teacher)}, labels {plan.training.labels} over the classes seen\n"
        f"- student {plan.training.arch}, protocol {plan.training.protocol}, {most} epochs of whole images\n"
        + "".join(f"- {note}\n" for note in notes)
        + f"- {made_with(students, plan.setup.precision)}\n\n{told('table4', argv)}"
    )
    atomic_write_text(out.with_suffix(".md"), page)
    return page
