"""DM with and without the CMI regulariser, random images and herding beside them: accuracy, and CMI's own values.

    python -m bench.studies cmi --data cifar10-jpeg.zip --teacher teacher.safetensors --proxies PROXIES --ipc 1,10,50 \
        --iterations 300 --real-batch 64 --cmi-every 5 --cmi 8000,50:2000 --sets 3,50:1 --students 3,50:1

All arms have the same images to choose from, the same labels (the classes, no soft ones), students, seeds and epochs.
DM and DM + CMI of one set share every draw: images to begin with, real batches, augmentations, networks. So the paired
delta, set by set, is what the regulariser does. The paper ("Going Beyond Feature Similarity: Effective Dataset
Distillation based on Class-aware Conditional Mutual Information") has 20,000 iterations of 256 real images a class.
Writes `<out>.csv`, a row a student, and `<out>.md`. What is finished is kept in `--work`.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ddfast
from bench import facts
from bench.studies.arguments import study_parser, told
from bench.studies.arms import Arm, Setup, Training, at_ipc, by_ipc, set_of, train_students
from bench.studies.compare import integers, made_with, teacher_fact
from ddfast.files import atomic_write_text, make_folder
from ddfast.models.registry import features
from ddfast.output.pixels import read_curve, read_pixels
from ddfast.progress import duration
from ddfast.training import load_proxies
from ddfast.training.proxies import proxies_identity

TITLE = "DM with the CMI regulariser (CMI, Tables 1 and 10)"
ARMS = ("random", "herding", "DM", "DM + CMI")
# Table 1 and Table 9 of its predecessors: CIFAR-10, ConvNet-3, top-1 in percent at IPC 1, 10, 50.
PAPER: dict[str, dict[int, float]] = {
    "random": {1: 14.4, 10: 26.0, 50: 43.4},
    "herding": {1: 21.5, 10: 31.6, 50: 40.4},
    "DM": {10: 48.9, 50: 63.0},
    "DM + CMI": {10: 52.9, 50: 65.8},
}
# Table 10, CIFAR-10, IPC 10: CMI at the start, at the end of DM, at the end of DM + CMI, and the accuracy of the last.
PAPER_CMI = {
    "ConvNet": (0.1045, 0.0866, 0.0326, 51.2),
    "ResNet-18": (0.0016, 0.0066, 0.0004, 52.9),
}


@dataclass(frozen=True)
class Found:
    """The students of one arm at one IPC.

    Attributes:
        arm: one of `ARMS`.
        ipc: images per class.
        sets: for each set the results of its students, as `train_students` puts them together.
        seconds: of the distillation, mean over the sets.
        start, end: CMI in nats of the images that a set began with and of those it ended with; see `_cmi_of`.
    """

    arm: str
    ipc: int
    sets: Sequence[Mapping[str, Any]]
    seconds: float
    start: float | None = None
    end: float | None = None

    @property
    def means(self) -> list[float]:
        """Mean top-1 of each set's students."""
        return [statistics.mean(each["top1"]) for each in self.sets]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options of the study."""
    parser = study_parser("cmi", __doc__)
    parser.add_argument("--proxies", type=Path, required=True, help="folder of ddfast train-proxies")
    parser.add_argument("--arch", default="convnet3_in", help="of the matched networks and of the students")
    parser.add_argument("--normalization", default="auto", help="of the matched pixels, that of the proxies")
    parser.add_argument("--arms", default=",".join(ARMS), help="only some of them, comma between")
    parser.add_argument("--ipc", type=integers, default=[1, 10, 50])
    parser.add_argument("--iterations", type=by_ipc, default={0: 20000}, help="20000, or by IPC: 300,50:100")
    parser.add_argument("--real-batch", type=int, default=256, help="real images a class and step")
    parser.add_argument("--cmi", type=by_ipc, default={0: 8000, 50: 2000}, help="lambda; by IPC as above")
    parser.add_argument("--cmi-every", type=int, default=1)
    parser.add_argument("--sets", type=by_ipc, default={0: 3}, help="distilled sets an arm; by IPC as above")
    parser.add_argument("--students", type=by_ipc, default={0: 3}, help="students a set; by IPC as above")
    parser.add_argument("--epochs", type=by_ipc, default={}, help="of students; default the protocol's 1000")
    arguments = parser.parse_args(argv)
    if len(arguments.teacher) != 1:
        parser.error("herding chooses by a teacher's features: give one --teacher")
    arguments.arms = [arm.strip() for arm in arguments.arms.split(",")]
    if unknown := [arm for arm in arguments.arms if arm not in ARMS]:
        parser.error(f"unknown arms {', '.join(unknown)}; known: {', '.join(ARMS)}")
    arguments.images_per_class = arguments.images_per_class or 300
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the study; the page is written anew after every arm."""
    arguments = parse(argv)
    found: list[Found] = []
    for ipc in arguments.ipc:
        for arm in arguments.arms:
            if arm == "DM + CMI" and ipc == 1:
                continue  # the mean of a single image is the image: CMI is 0
            found.append(_trained(arm, ipc, arguments))
            page = _write(found, arguments, argv)
    print(page)
    return 0


def _arm(name: str, ipc: int, seed: int, arguments: argparse.Namespace) -> Arm:
    if not name.startswith("DM"):
        return Arm(name, name, {"seed": seed})
    settings: dict[str, Any] = {
        "seed": seed,
        "arch": arguments.arch,
        "normalization": arguments.normalization,
        "iterations": at_ipc(arguments.iterations, ipc),
        "real_batch": arguments.real_batch,
        "proxies": str(arguments.proxies),  # without a weight CMI is measured and does not act
    }
    if name == "DM + CMI":
        settings |= {
            "cmi": float(at_ipc(arguments.cmi, ipc) or 0),
            "cmi_every": arguments.cmi_every,
        }
    return Arm(f"{name}, set {seed}", "dm", settings)


def _trained(name: str, ipc: int, arguments: argparse.Namespace) -> Found:
    """The sets of an arm and their students."""
    setup = Setup(
        arguments.data,
        arguments.teacher[0],
        arguments.work,
        1,
        arguments.images_per_class,
        "float32",
    )
    training = Training(
        arguments.arch, labels="hard", protocol="dsa", epochs=at_ipc(arguments.epochs, ipc), last_only=True
    )
    sets, seconds, starts, ends = [], [], [], []
    for seed in range(at_ipc(arguments.sets, ipc) or 1):
        arm = _arm(name, ipc, seed, arguments)
        students = range(at_ipc(arguments.students, ipc) or 1)
        result = train_students(arm, ipc, setup, training, students)
        sets.append(result)
        seconds.append(sum(result["seconds"].values()))
        if name.startswith("DM"):
            folder = set_of(arm, ipc, setup, training, 0).folder
            ends.append(_cmi_of(folder, arguments.proxies))
            starts += [row["cmi"] for row in read_curve(folder)[:1] if row.get("cmi") is not None]
    mean = statistics.mean
    return Found(
        name, ipc, sets, mean(seconds), mean(starts) if starts else None, mean(ends) if ends else None
    )


@torch.no_grad()
def _cmi_of(folder: Path, proxies: Path) -> float:
    """CMI of a set's images, mean over all proxies, in nats."""
    pixels = read_pixels(folder)
    distilled = ddfast.DistilledSet(folder)
    networks = load_proxies(
        proxies,
        class_names=distilled.class_names,
        image_size=distilled.image_size,
        mean=distilled.mean,
        std=distilled.std,
    )
    return statistics.mean(
        float(ddfast.cmi(features(network, pixels.images), pixels.labels)) for network in networks
    )


def _write(found: Sequence[Found], arguments: argparse.Namespace, argv: Sequence[str]) -> str:
    out = arguments.out or facts.RESULTS / "paper" / f"cmi_{Path(arguments.data).stem}_{arguments.arch}"
    make_folder(out.parent)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arm", "ipc", "set", "seed", "epochs", "top1", "commits"))
    for each in found:
        for number, result in enumerate(each.sets):
            for seed, top1 in zip(result["seeds"], result["top1"], strict=True):
                writer.writerow(
                    (
                        each.arm,
                        each.ipc,
                        number,
                        seed,
                        result["epochs"],
                        f"{top1:.2f}",
                        " ".join(result["commits"]),
                    )
                )
    atomic_write_text(out.with_suffix(".csv"), text.getvalue())
    page = _page(found, arguments, argv)
    atomic_write_text(out.with_suffix(".md"), page)
    return page


def _page(found: Sequence[Found], arguments: argparse.Namespace, argv: Sequence[str]) -> str:
    ipcs = list(dict.fromkeys(each.ipc for each in found))
    at = {(each.arm, each.ipc): each for each in found}
    lines = [
        f"# {TITLE}",
        "",
        told("cmi", argv),
        "Test top-1 in percent after the last epoch, hard labels, protocol dsa: mean over sets and students ± "
        "deviation over the sets' means (one set: over its students). In brackets the paper's.",
        "",
        "| method | " + " | ".join(f"IPC {ipc}" for ipc in ipcs) + " |",
        "| --- |" + " --- |" * len(ipcs),
    ]
    for arm in arguments.arms:
        cells = [_cell(at[arm, ipc]) if (arm, ipc) in at else "" for ipc in ipcs]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    deltas = [
        _delta(at["DM", ipc], at["DM + CMI", ipc])
        for ipc in ipcs
        if ("DM", ipc) in at and ("DM + CMI", ipc) in at
    ]
    if deltas:
        lines += ["", "What CMI adds, set by set with the same draws in both arms:", "", *deltas]
    lines += ["", *_cmi_table(found, arguments), "", *_budget(found, arguments), ""]
    return "\n".join(lines)


def _cell(each: Found) -> str:
    means = each.means
    spread = means if len(means) > 1 else each.sets[0]["top1"]
    deviation = f" ± {statistics.stdev(spread):.1f}" if len(spread) > 1 else ""
    paper = PAPER[each.arm].get(each.ipc)
    return f"{statistics.mean(means):.1f}{deviation}" + ("" if paper is None else f" ({paper})")


def _delta(base: Found, with_cmi: Found) -> str:
    """One line: the gain of every set, their mean and deviation, and the paper's."""
    gains = [ours - theirs for ours, theirs in zip(with_cmi.means, base.means, strict=True)]
    text = f"- IPC {base.ipc}: {statistics.mean(gains):+.2f}"
    if len(gains) > 1:
        each = ", ".join(f"{gain:+.2f}" for gain in gains)
        text += f" ± {statistics.stdev(gains):.2f} over {len(gains)} sets ({each})"
    theirs, ours = PAPER["DM"].get(base.ipc), PAPER["DM + CMI"].get(base.ipc)
    return text if theirs is None or ours is None else f"{text}; the paper {ours - theirs:+.1f}"


def _cmi_table(found: Sequence[Found], arguments: argparse.Namespace) -> list[str]:
    """CMI's values beside the paper's Table 10."""
    lines = [
        "CMI in nats. At the start: on the proxy that the first step draws; at the end: mean over all proxies.",
        "",
        "| proxy | IPC | start | end of DM | end of DM + CMI |",
        "| --- | --- | --- | --- | --- |",
    ]
    arch = proxies_identity(arguments.proxies)[0]["arch"]
    for ipc in dict.fromkeys(each.ipc for each in found):
        base, ours = (
            next((each for each in found if (each.arm, each.ipc) == (arm, ipc)), None)
            for arm in ("DM", "DM + CMI")
        )
        if base is not None and ours is not None:
            lines.append(
                f"| {arch} | {ipc} | {_number(ours.start)} | {_number(base.end)} | {_number(ours.end)} |"
            )
    for proxy, (start, plain, end, _) in PAPER_CMI.items():
        lines.append(f"| {proxy}, the paper | 10 | {start} | {plain} | {end} |")
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _budget(found: Sequence[Found], arguments: argparse.Namespace) -> list[str]:
    """How the numbers were made, a line each."""
    proxies = proxies_identity(arguments.proxies)
    reads = [proxy["top1"] for proxy in proxies if proxy["top1"] is not None]
    seconds = ", ".join(
        f"IPC {each.ipc} {duration(each.seconds)}" for each in found if each.arm.startswith("DM")
    )
    results = [result for each in found for result in each.sets]
    ipcs = list(dict.fromkeys(each.ipc for each in found))
    lines = [f"{at_ipc(arguments.iterations, ipc)} iterations at IPC {ipc}" for ipc in ipcs]
    weights = ", ".join(f"{at_ipc(arguments.cmi, ipc):g} at IPC {ipc}" for ipc in ipcs if ipc > 1)
    return [
        f"- {', '.join(lines)} (the paper 20,000), {arguments.real_batch} real images a class (256)",
        f"- lambda {weights or 'none'}, CMI every {arguments.cmi_every} iterations, {len(proxies)} proxies "
        f"{proxies[0]['arch']}, test top-1 "
        + (f"{min(reads):.1f} to {max(reads):.1f}" if reads else "not measured"),
        *(
            [f"- herding by the features of {teacher_fact(arguments.teacher[0])}"]
            if "herding" in arguments.arms
            else []
        ),
        f"- seconds of the distillations of DM and DM + CMI: {seconds}",
        f"- students: {results[0]['epochs']} epochs; {made_with(results, 'float32')}",
    ]
