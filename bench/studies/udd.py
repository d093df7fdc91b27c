"""UDD beside IDC: accuracy, policies, noise, sizes of regions, the time of a search, and how evenly images are used.

    python -m bench.studies udd --data cifar10-jpeg.zip --iterations 20 --sets 2 --students 2
    python -m bench.studies udd --data fashion_mnist --ipc 1 --tables main --iterations 20

All arms have the same number of iterations, the same networks, real batches and augmentations in every step (draws are
keyed by seed, class and step), and students of the same seeds, protocol, updates and images in an update: those that
--epochs passes over whole images take. An image that stands for four tiles (IDC), or for itself and its regions (UDD),
is seen in fewer passes. The paper ("UDD: Dataset Distillation via Mining
Underutilized Regions") has 2,000 iterations. Writes `<out>.csv`, a row a student, and `<out>.md`, anew after every arm.
What is finished is kept in `--work`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ddfast
from bench import facts
from bench.studies.arguments import told
from bench.studies.arms import at_ipc, by_ipc
from bench.studies.compare import integers
from bench.studies.tables import mean_and_spread, paired
from ddfast.files import atomic_write_text, make_folder
from ddfast.methods import get_method
from ddfast.methods.base import Context
from ddfast.methods.matching.udd import POLICIES, UDD
from ddfast.models.fusing import fuse
from ddfast.output.evaluations import evaluations_of_set, keep_evaluation
from ddfast.progress import duration, say
from ddfast.report.utilization import utilization
from ddfast.training.equal_steps import EqualSteps, images_of_a_pass
from ddfast.training.evaluation import read_distilled
from ddfast.training.protocol import PROTOCOLS

TITLE = "UDD: Tables 1 to 5 on CIFAR-10, MNIST or FashionMNIST, the time of a search, and mUE"
TABLES = ("main", "policies", "jitters", "sizes", "regions", "times", "mue")


@dataclass(frozen=True)
class Arm:
    """A row of a table: a method with settings, and what students see beside its images."""

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    regions: str = "chosen"


PLAIN = Arm("UDD", "udd")
IDC = Arm("IDC", "idc")
ROWS: dict[str, tuple[Arm, ...]] = {
    "main": (
        Arm("IDC without tiles", "idc", {"factor": 1}),
        IDC,
        Arm("IDC + CFC", "idc", {"cfc": 1.0}),
        Arm("UDD without CFC", "udd", {"cfc": 0.0}),
        PLAIN,
    ),
    "policies": (PLAIN, *(Arm(f"{name}", "udd", {"policy": name}) for name in POLICIES if name != "jitter")),
    "jitters": (PLAIN, *(Arm(name, "udd", {"jitter": name}) for name in ("uniform", "salt_pepper"))),
    "sizes": (
        *(
            Arm(sizes, "udd", {"sizes": sizes})
            for sizes in ("1/3", "1/2", "2/3", "1/3,1/2", "1/3,2/3", "1/2,2/3")
        ),
        PLAIN,
    ),
    "regions": (
        Arm("UDD, images alone", "udd", {}, "none"),
        PLAIN,
        Arm("UDD, all regions", "udd", {}, "all"),
    ),
    "mue": (Arm("DC", "dc"), IDC, PLAIN),
}
# Top-1 in percent that the paper prints, by data, arm and IPC (Tables 1 to 5); policies, noise and sizes at IPC 10.
PAPER: dict[str, dict[str, dict[int, float]]] = {
    "cifar10": {
        "IDC": {1: 50.6, 10: 67.5, 50: 74.5},
        "IDC + CFC": {10: 67.8},
        "UDD without CFC": {10: 68.5},
        "UDD": {1: 54.6, 10: 68.9, 50: 75.4},
        **{name: {10: value} for name, value in (("gradient", 68.1), ("activation", 68.3), ("vote", 69.1))},
        **{name: {10: value} for name, value in (("uniform", 68.6), ("salt_pepper", 68.7))},
        **{name: {10: value} for name, value in (("1/3", 66.4), ("1/2", 67.5), ("2/3", 67.8))},
        **{name: {10: value} for name, value in (("1/3,1/2", 67.9), ("1/3,2/3", 68.0), ("1/2,2/3", 68.3))},
    },
    "fashion": {"IDC": {1: 81.0, 10: 86.0, 50: 86.2}, "UDD": {1: 82.3, 10: 86.6, 50: 86.8}},
    "mnist": {"IDC": {1: 94.2, 10: 98.4, 50: 99.1}, "UDD": {1: 95.6, 10: 98.4, 50: 99.1}},
}
PAPER_MS = {"jitter": 17.2, "gradient": 14.6, "activation": 15.8, "vote": 20.1}  # Table 2, of one image


@dataclass(frozen=True)
class Found:
    """The students of one arm at one IPC: for each set the results of its students, and the sets' folders."""

    arm: Arm
    ipc: int
    sets: list[list[dict[str, Any]]]
    folders: list[Path]

    @property
    def means(self) -> list[float]:
        """Mean top-1 of each set's students."""
        return [statistics.mean(top1 for one in each for top1 in one["top1"]) for each in self.sets]

    @property
    def seconds(self) -> float:
        """Of a distillation, mean over the sets."""
        told = [json.loads((folder / "run.json").read_text("utf-8"))["seconds"] for folder in self.folders]
        return statistics.mean(sum(each.values()) for each in told)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options of the study."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies udd", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True, help="as ddfast distill takes it")
    parser.add_argument("--tables", default=",".join(TABLES), help="only some of them, comma between")
    parser.add_argument("--ipc", type=integers, default=[1, 10], help="of the main table")
    parser.add_argument("--ablation-ipc", type=int, default=10, help="of the other tables")
    parser.add_argument("--arch", default="convnet3_in", help="of the matched networks and of the students")
    parser.add_argument(
        "--image-size", type=int, default=None, help="side in pixels; default that of the images"
    )
    parser.add_argument("--iterations", type=by_ipc, default={0: 2000}, help="2000, or by IPC: 20,50:5")
    parser.add_argument("--inner-loop", type=int, default=100, help="steps of the pixels on a network")
    parser.add_argument(
        "--net-samples", type=int, default=2000, help="real images a network trains on between"
    )
    parser.add_argument("--real-batch", type=int, default=64, help="real images a class and step")
    parser.add_argument(
        "--chooser-steps", type=int, default=1000, help="of the network that chooses at the end"
    )
    parser.add_argument("--sets", type=by_ipc, default={0: 2}, help="distilled sets an arm; by IPC as above")
    parser.add_argument("--students", type=by_ipc, default={0: 2}, help="students a set; by IPC as above")
    parser.add_argument("--epochs", type=by_ipc, default={}, help="of students; default the protocol's")
    parser.add_argument(
        "--protocol",
        default="idc",
        choices=("idc", "idc_no_flip"),
        help="of students; digits take idc_no_flip",
    )
    parser.add_argument("--work", type=Path, default=Path("runs/udd"), help="sets, students and numbers")
    parser.add_argument("--out", type=Path, default=None, help="results, without ending")
    arguments = parser.parse_args(argv)
    arguments.tables = [name.strip() for name in arguments.tables.split(",")]
    if unknown := [name for name in arguments.tables if name not in TABLES]:
        parser.error(f"unknown tables {', '.join(unknown)}; known: {', '.join(TABLES)}")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the study; the page is written anew after every arm."""
    arguments = parse(argv)
    found: dict[tuple[str, int, str], Found] = {}
    page = ""
    for table in arguments.tables:
        for ipc in arguments.ipc if table == "main" else [arguments.ablation_ipc]:
            for arm in ROWS.get(table, ()):
                if (arm.name, ipc, arm.regions) not in found and table != "mue":
                    found[arm.name, ipc, arm.regions] = _trained(arm, ipc, arguments)
                    page = _write(found, arguments, argv)
    page = _write(found, arguments, argv, last=True)
    print(page)
    return 0


# Sets and students -------------------------------------------------------------------------------------------


def _settings(arm: Arm, ipc: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    iterations = at_ipc(arguments.iterations, ipc)
    shared: dict[str, Any] = {"seed": seed, "arch": arguments.arch, "iterations": iterations}
    shared |= {"real_batch": arguments.real_batch, "image_size": arguments.image_size}
    if arm.method == "dc":  # iterations are networks of `outer_loop` steps: as many steps as the others take
        outer = get_method("dc").from_options({}).resolved(1, ipc).options.outer_loop
        networks = -(-(iterations or 1) * arguments.inner_loop // int(outer))
        return {**shared, "iterations": networks, **arm.settings}
    shared |= {"inner_loop": arguments.inner_loop, "net_samples": arguments.net_samples}
    if arm.method == "udd":
        shared["chooser_steps"] = arguments.chooser_steps
    return {**shared, **arm.settings}


def _made(arm: Arm, ipc: int, seed: int, arguments: argparse.Namespace) -> Path:
    """The folder of a set: made now, or finished by an earlier run."""
    settings = _settings(arm, ipc, seed, arguments)
    asked = json.dumps([arm.method, ipc, Path(arguments.data).name, settings], sort_keys=True)
    folder: Path = arguments.work / f"{arm.method}-ipc{ipc}-{hashlib.sha256(asked.encode()).hexdigest()[:10]}"
    make_folder(arguments.work)
    say(f"{arm.name}, IPC {ipc}, set {seed}: {folder}")
    ddfast.distill(arm.method, data=arguments.data, ipc=ipc, out=folder, resume=True, **settings)
    return folder


def _trained(arm: Arm, ipc: int, arguments: argparse.Namespace) -> Found:
    """The sets of an arm and their students."""
    sets, folders = [], []
    for number in range(at_ipc(arguments.sets, ipc) or 1):
        folder = _made(arm, ipc, number, arguments)
        students = range(at_ipc(arguments.students, ipc) or 1)
        sets.append([_student(folder, arm, ipc, seed, arguments) for seed in students])
        folders.append(folder)
    return Found(arm, ipc, sets, folders)


def _student(folder: Path, arm: Arm, ipc: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    seen = arm.regions if arm.method == "udd" else "chosen"
    regions = arm.regions if arm.method == "udd" else "none"
    steps, epochs = _spent(folder, ipc, seen, arguments)
    asked = {
        "arch": arguments.arch,
        "protocol": arguments.protocol,
        "epochs": epochs,
        "batch_size": steps.batch_size,
        "seeds": [seed],
        "regions": regions,
    }
    for held in evaluations_of_set(folder):
        if all(held.get(name) == value for name, value in asked.items()):
            return held
    found = ddfast.evaluate(
        folder,
        arguments.data,
        arch=arguments.arch,
        seeds=[seed],
        epochs=epochs,
        batch_size=steps.batch_size,
        protocol=arguments.protocol,
        regions=seen,
        quiet=True,
    )
    say(f"{arm.name}, IPC {ipc}, student {seed}: top-1 {found.mean:.2f}")
    keep_evaluation(folder, found.as_dict())
    return found.as_dict()


def _spent(folder: Path, ipc: int, seen: str, arguments: argparse.Namespace) -> tuple[EqualSteps, int]:
    """The updates that every set of an IPC gets, and the passes over this one that make them."""
    images, rules = read_distilled(folder, regions=seen), PROTOCOLS[arguments.protocol]
    shape = images.num_classes, images.image_size
    steps = EqualSteps.of(rules, ipc, *shape, arch=arguments.arch, epochs=at_ipc(arguments.epochs, ipc))
    return steps, steps.epochs_of(images_of_a_pass(images, rules))


# Pages -------------------------------------------------------------------------------------------------------


def _write(
    found: dict[tuple[str, int, str], Found],
    arguments: argparse.Namespace,
    argv: Sequence[str],
    *,
    last: bool = False,
) -> str:
    out = arguments.out or facts.RESULTS / "paper" / f"udd_{Path(arguments.data).stem}_{arguments.arch}"
    make_folder(out.parent)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arm", "ipc", "regions", "set", "seed", "epochs", "steps", "batch_size", "top1"))
    for each in found.values():
        for number, students in enumerate(each.sets):
            for one in students:
                row = (
                    each.arm.name,
                    each.ipc,
                    one["regions"],
                    number,
                    one["seeds"][0],
                    one["epochs"],
                    one["steps"],
                    one["batch_size"],
                )
                writer.writerow((*row, f"{one['top1'][0]:.2f}"))
    atomic_write_text(out.with_suffix(".csv"), text.getvalue())
    lines = [
        f"# {TITLE}",
        "",
        told("udd", argv),
        f"Test top-1 in percent after the last epoch, hard labels, protocol {arguments.protocol}: mean over sets and "
        "students ± deviation over the sets' means. In brackets the paper's.",
    ]
    for table in arguments.tables:
        if table in ("times", "mue"):
            lines += [] if not last else _times(found, arguments) if table == "times" else _mue(arguments)
        else:
            lines += _table(table, found, arguments)
    lines += ["", *_budget(found, arguments), ""]
    page = "\n".join(lines)
    atomic_write_text(out.with_suffix(".md"), page)
    return page


_HEADS = {
    "main": ("IDC and UDD (Tables 1 and 4)", "method"),
    "policies": ("Policies of the search (Table 2)", "policy; UDD has jitter"),
    "jitters": ("Noise (Table 3)", "noise; UDD has gaussian"),
    "sizes": ("Sizes of regions (Table 5)", "sizes; UDD has all three"),
    "regions": ("What students see", "beside the images"),
}


def _table(table: str, found: dict[tuple[str, int, str], Found], arguments: argparse.Namespace) -> list[str]:
    ipcs = arguments.ipc if table == "main" else [arguments.ablation_ipc]
    title, head = _HEADS[table]
    lines = ["", f"## {title}", "", f"| {head} | " + " | ".join(f"IPC {ipc}" for ipc in ipcs) + " |"]
    lines += ["| --- |" + " --- |" * len(ipcs)]
    for arm in ROWS[table]:
        cells = [_cell(found.get((arm.name, ipc, arm.regions)), arguments) for ipc in ipcs]
        lines.append(f"| {arm.name} | {' | '.join(cells)} |")
    if table == "main":
        deltas = []
        for base, ours in (
            ("IDC", "UDD"),
            ("IDC", "IDC + CFC"),
            ("UDD without CFC", "UDD"),
            ("IDC without tiles", "UDD"),
        ):
            deltas += [line for ipc in ipcs if (line := _delta(base, ours, ipc, found, arguments))]
        said = (
            "Set by set; real batches, augmentations and networks are the same in both arms, and IDC alone begins with "
            "mosaics:"
        )
        lines += ["", said, "", *deltas] if deltas else []
    return lines


def _paper(name: str, ipc: int, arguments: argparse.Namespace) -> float | None:
    data = Path(arguments.data).name.lower()
    known = next((values for part, values in PAPER.items() if part in data), {})
    return known.get(name, {}).get(ipc)


def _cell(each: Found | None, arguments: argparse.Namespace) -> str:
    if each is None:
        return ""
    paper = _paper(each.arm.name, each.ipc, arguments) if each.arm.regions == "chosen" else None
    return mean_and_spread(each.means) + ("" if paper is None else f" ({paper})")


def _delta(
    base: str, ours: str, ipc: int, found: dict[tuple[str, int, str], Found], arguments: argparse.Namespace
) -> str:
    """One line: the gain of every set, their mean and deviation, and the paper's."""
    pair = [found.get((name, ipc, "chosen")) for name in (base, ours)]
    if pair[0] is None or pair[1] is None:
        return ""
    gains = [new - old for old, new in zip(pair[0].means, pair[1].means, strict=True)]
    text = f"- {ours} less {base}, IPC {ipc}: {paired(gains)}"
    old, new = (_paper(name, ipc, arguments) for name in (base, ours))
    return text if old is None or new is None else f"{text}; the paper {new - old:+.1f}"


def _budget(found: dict[tuple[str, int, str], Found], arguments: argparse.Namespace) -> list[str]:
    """How the numbers were made."""
    ipcs = sorted({each.ipc for each in found.values()})
    lines = ", ".join(f"{at_ipc(arguments.iterations, ipc):,} at IPC {ipc}" for ipc in ipcs) or "none"
    commit, changed = facts.commit()
    took = ", ".join(f"{e.arm.name} at IPC {e.ipc} {duration(e.seconds)}" for e in found.values())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    code = f"commit {commit}{' and changes' if changed else ''}"
    return [
        f"- iterations: {lines} (the paper 2,000), each of {arguments.inner_loop} steps of the pixels (100 in IDC), "
        f"{arguments.real_batch} real images a class (64); networks train on {arguments.net_samples:,} real images "
        "between two steps (2,000)",
        "- UDD takes IDC's learning rate, which it halves at 60, 80 and 90% of the iterations, and IDC's momentum and "
        "evaluation, which its paper does not give; regions for "
        f"students are chosen by a network of {arguments.chooser_steps:,} steps on real images",
        f"- students: {'; '.join(_updates(found)) or 'none'}, the same for all arms",
        f"- a distillation: {took or 'none'}",
        f"- {facts.device_name(device)}, {torch.get_num_threads()} threads; {code}",
    ]


def _updates(found: dict[tuple[str, int, str], Found]) -> list[str]:
    """Of a student, at every IPC; arms differ where passes over their images are not whole."""
    lines = []
    for ipc in sorted({each.ipc for each in found.values()}):
        students = [one for each in found.values() if each.ipc == ipc for of in each.sets for one in of]
        steps = sorted({one["steps"] for one in students})
        several = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        batches = "/".join(str(size) for size in sorted({one["batch_size"] for one in students}))
        lines.append(f"at IPC {ipc} {several} steps of {batches} images")
    return lines


# Times, and mUE ----------------------------------------------------------------------------------------------


def _times(found: dict[tuple[str, int, str], Found], arguments: argparse.Namespace) -> list[str]:
    """A search by every policy, of one image and of a step's, beside a step."""
    ipc, data = arguments.ablation_ipc, found.get(("UDD", arguments.ablation_ipc, "chosen"))
    step, classes, side = None, 10, 32
    if data is not None:
        opened = ddfast.DistilledSet(data.folders[0])
        classes, side = len(opened.class_names), opened.image_size
        told = [json.loads((folder / "run.json").read_text("utf-8"))["seconds"] for folder in data.folders]
        steps = (at_ipc(arguments.iterations, ipc) or 1) * arguments.inner_loop
        step = statistics.mean(each["synthesize"] for each in told) / steps
    lines = [
        "",
        "## Time of a search",
        "",
        f"| policy | one image, ms | the paper, ms | {classes * ipc} images, ms | of a step |",
    ]
    lines += ["| --- | --- | --- | --- | --- |"]
    for policy in POLICIES:
        one, all_of_them = (
            search_seconds(policy, each, arguments.arch, side) for each in ((1, 1), (classes, ipc))
        )
        share = "" if step is None else f"{100 * all_of_them / step:.2f}%"
        lines.append(
            f"| {policy} | {1000 * one:.1f} | {PAPER_MS[policy]} | {1000 * all_of_them:.0f} | {share} |"
        )
    said = "" if step is None else f" A step of all {classes} classes takes {step:.2f} s."
    return [*lines, "", f"Median of 9, {side} px, noise and ranking included.{said}"]


def search_seconds(
    policy: str, images: tuple[int, int], arch: str = "convnet3_in", side: int = 32, *, repeats: int = 9
) -> float:
    """Median seconds of one search on random images of `side` px: so many classes of so many images each."""
    classes, ipc = images
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = UDD.from_options({"policy": policy, "arch": arch}).resolved(1, ipc)
    assert isinstance(method, UDD)
    network = fuse(ddfast.create_model(arch, max(classes, 2), side)).to(device)
    drawn = torch.randn(classes * ipc, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    context = Context(
        teacher=None,
        image_size=side,
        factor=1,
        seed=0,
        precision="float32",
        forward_batch=0,
        device=device,
        class_names=tuple(map(str, range(classes))),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )

    def search(number: int) -> None:
        method.searched(network, drawn, number, range(classes), context)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return _median(search, repeats)


def _median(call: Callable[[int], None], repeats: int) -> float:
    call(0)
    taken = []
    for number in range(repeats):
        started = time.perf_counter()
        call(number)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _mue(arguments: argparse.Namespace) -> list[str]:
    """mUE of the first set of each method, by one network that was trained on real images."""
    ipc = arguments.ablation_ipc
    lines = ["", f"## How evenly images are used (mUE, Eqs. 11 and 12), IPC {ipc}", ""]
    lines += ["| method | mUE | as printed | min to max |", "| --- | --- | --- | --- |"]
    network = ""
    for arm in ROWS["mue"]:
        folder = _made(arm, ipc, 0, arguments)
        kept = arguments.work / f"{folder.name}-mue-{arguments.chooser_steps}.json"
        if not kept.exists():
            picture = kept.with_suffix(".png")
            measured = utilization(
                folder,
                arch=arguments.arch,
                data=arguments.data,
                steps=arguments.chooser_steps,
                picture=picture,
            )
            atomic_write_text(kept, json.dumps(measured.as_dict(), indent=1) + "\n")
        told = json.loads(kept.read_text("utf-8"))
        network = told["network"]
        lines.append(f"| {arm.name} | {told['mue']:.3f} | {told['printed']:.5f} | {told['min_max']:.3f} |")
    said = (
        f"DC has as many steps of the pixels, from noise. Measured by {network}. As printed, the measure falls where "
        "use is more even: see `ddfast utilization`."
    )
    return [*lines, "", said]
