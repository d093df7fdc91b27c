"""The accuracies that the InfoUtil paper prints (`reported.csv`), as printed, and which of them a run of ours meets.

Known slips of the tables, kept as they stand: Table 6's column "ImageWoof, IPC 1" has the scale of IPC 10; the rows of
Tiny-ImageNet under Herding in Table 9 repeat Random; Tables 1, 2, 5 and 8 give ImageNet-1K at IPC 10 four values.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

# Part of a data set's file name -> its name in the paper. The first that fits counts.
_DATA = {
    "cifar100": "CIFAR-100",
    "cifar10": "CIFAR-10",
    "nette": "ImageNette",
    "woof": "ImageWoof",
    "tiny": "Tiny-ImageNet",
    "imagenet100": "ImageNet-100",
    "imagenet": "ImageNet-1K",
}
_MODELS = {
    "convnet": "ConvNet",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "resnet101": "ResNet-101",
    "mobilenet_v2": "MobileNet-V2",
    "vgg11": "VGG-11",
    "swin_v2_t": "Swin-V2-Tiny",
}


@dataclass(frozen=True)
class Reported:
    """One accuracy of the paper.

    Attributes:
        table: `table1`, ...
        data: the data set's name in the paper.
        distilled_with: the teacher's architecture.
        student: the student's.
        ipc: images per class.
        method: the row or column it stands in.
        top1: percent.
        std: its deviation, None where none is printed.
    """

    table: str
    data: str
    distilled_with: str
    student: str
    ipc: int
    method: str
    top1: float
    std: float | None

    @property
    def where(self) -> tuple[str, str, str, int]:
        """What it was measured on."""
        return self.data, self.distilled_with, self.student, self.ipc


@functools.cache
def reported(table: str) -> tuple[Reported, ...]:
    """All accuracies of a table, in the order of its rows."""
    with (Path(__file__).parent / "reported.csv").open(newline="", encoding="utf-8") as file:
        return tuple(
            Reported(
                **{name: row[name] for name in ("table", "data", "distilled_with", "student", "method")},
                ipc=int(row["ipc"]),
                top1=float(row["top1"]),
                std=float(row["std"]) if row["std"] else None,
            )
            for row in csv.DictReader(file)
            if row["table"] == table
        )


def data_name(data: str) -> str:
    """The paper's name of a data set of ours, or its own file name."""
    plain = Path(data).name.lower().replace("-", "").replace("_", "")
    return next((name for part, name in _DATA.items() if part in plain), Path(data).stem)


def model_name(arch: str) -> str:
    """The paper's name of an architecture of ours, or our own."""
    return next((name for start, name in _MODELS.items() if arch.startswith(start)), arch)


def met(table: str, data: str, teacher: str, student: str, ipc: int, method: str) -> Reported | None:
    """What the paper prints for a run of ours, or None where it has not measured that.

    Args:
        table: name of the table.
        data: our data set.
        teacher: our teacher's architecture.
        student: our student's.
        ipc: images per class.
        method: the row's name in `reported.csv`.
    """
    where = (data_name(data), model_name(teacher), model_name(student), ipc)
    return next((each for each in reported(table) if (*each.where, each.method) == (*where, method)), None)


def gains(table: str, method: str, base: str) -> list[tuple[Reported, float]]:
    """By how much `method` is ahead of `base` in points, wherever the table has both: (of `method`, gain)."""
    bases = {each.where: each.top1 for each in reported(table) if each.method == base}
    return [
        (each, each.top1 - bases[each.where])
        for each in reported(table)
        if each.method == method and each.where in bases
    ]
