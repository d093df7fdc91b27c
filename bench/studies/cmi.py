"""A matching method with and without CMI, random images and herding beside them: accuracy, and CMI's own values.

    python -m bench.studies cmi --method dm --data cifar10-jpeg.zip --teacher teacher.safetensors --proxies PROXIES \
        --ipc 1,10,50 --iterations 300 --real-batch 64 --cmi-every 5 --cmi 8000,50:2000 --sets 3,50:1 --students 3,50:1

All arms have the same images to choose from, the same labels (the classes, no soft ones), students, seeds and epochs,
and the protocol that the method's authors evaluate by. The method and the method + CMI of one set share every draw:
images to begin with, real batches, augmentations, networks. So the paired delta, set by set, is what the regulariser
does. The paper is "Going Beyond Feature Similarity: Effective Dataset Distillation based on Class-aware Conditional
Mutual Information". Writes `<out>.csv`, a row a student, and `<out>.md`. What is finished is kept in `--work`, and what
several methods have in common, random images and herding, is there once for a protocol.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ddfast
from bench import facts
from bench.studies.arguments import study_parser, told, without_folders
from bench.studies.arms import Arm, Setup, Training, at_ipc, by_ipc, set_of, teacher_at, train_students
from bench.studies.compare import integers, made_with, teacher_fact
from bench.studies.league.costs import stages_of
from bench.studies.tables import mean_and_spread, paired, write_rows
from ddfast.errors import DivergedError
from ddfast.files import atomic_write_text
from ddfast.methods import get_method
from ddfast.methods.synthesis import Synthesis
from ddfast.models.registry import features
from ddfast.output.pixels import read_curve
from ddfast.progress import duration, say
from ddfast.training import load_proxies
from ddfast.training.evaluation import read_distilled
from ddfast.training.proxies import proxies_identity
from ddfast.training.student import steps_of_a_pass

TITLE = "A matching method with the CMI regulariser (CMI, Tables 1, 5 and 10)"
# Arms that choose images in place of making them, by the method's name: any protocol with hard labels suits them.
CHOSEN = {"random": "random", "herding": "herding", "RDED": "rded", "InfoUtil": "infoutil"}


@dataclass(frozen=True)
class Subject:
    """A method of the study.

    Attributes:
        name: as it stands in the tables.
        protocol: that its authors evaluate by.
        cmi: lambda by IPC, as `by_ipc` reads it; for IDM the middle of what the paper says to be as good.
        budget: what the paper spends, in words.
        paper, paper_with_cmi: top-1 in percent by IPC, without and with CMI: CIFAR-10, ConvNet-3 (CMI's Tables 1 and
            2, the methods' own repositories).
    """

    name: str
    protocol: str
    cmi: Mapping[int, float]
    budget: str
    paper: Mapping[int, float]
    paper_with_cmi: Mapping[int, float]

    @property
    def with_cmi(self) -> str:
        """The name of the arm with the regulariser."""
        return f"{self.name} + CMI"


SUBJECTS = {
    "dm": Subject(
        "DM",
        "dsa",
        {0: 8000, 50: 2000},
        "20,000 iterations of 256 real images a class",
        {10: 48.9, 50: 63.0},
        {10: 52.9, 50: 65.8},
    ),
    "dc": Subject(
        "DC",
        "dc",
        {0: 50000, 50: 10000},
        "1,000 networks, 256 real images a class",
        {1: 28.3, 10: 44.9, 50: 53.9},
        {},
    ),
    "dsa": Subject(
        "DSA",
        "dsa",
        {0: 50000, 50: 10000},
        "1,000 networks, 256 real images a class",
        {1: 28.8, 10: 52.1, 50: 60.6},
        {10: 54.7, 50: 66.1},
    ),
    "idc": Subject(
        "IDC",
        "idc",
        {0: 100, 50: 50},
        "2,000 networks of 100 steps, 64 real images a class",
        {1: 50.6, 10: 67.5, 50: 74.5},
        {1: 51.6, 10: 70.0, 50: 76.6},
    ),
    "idm": Subject(
        "IDM",
        "dsa",
        {0: 1000},
        "20,000 iterations of 256 real images a class",
        {1: 45.6, 10: 58.6, 50: 67.5},
        {1: 47.5, 10: 62.2, 50: 71.3},
    ),
    # MTT's authors whiten the images at IPC 1 and 10. CMI's give no lambda: a share of the loss's gradient.
    "mtt": Subject(
        "MTT",
        "dsa",
        {0: 0.2},
        "5,000 iterations, 100 experts of 50 epochs on all images; CMI's paper has no IPC 1",
        {1: 46.3, 10: 65.3, 50: 71.6},
        {10: 66.7, 50: 72.4},
    ),
}
# CIFAR-10, ConvNet-3, top-1 in percent at IPC 1, 10, 50 (CMI, Table 1, and InfoUtil, Table 9).
PAPER_CHOSEN: dict[str, dict[int, float]] = {
    "random": {1: 14.4, 10: 26.0, 50: 43.4},
    "herding": {1: 21.5, 10: 31.6, 50: 40.4},
}
# Table 5, CIFAR-10, IPC 10: students of other architectures.
PAPER_CROSS: dict[tuple[str, str], float] = {
    ("IDM", "alexnet_in"): 44.6,
    ("IDM", "vgg11_in"): 47.8,
    ("IDM", "resnet18_in"): 44.6,
    ("IDM + CMI", "alexnet_in"): 54.0,
    ("IDM + CMI", "vgg11_in"): 57.0,
    ("IDM + CMI", "resnet18_in"): 53.7,
    ("IDC", "alexnet_in"): 63.5,
    ("IDC", "vgg11_in"): 64.4,
    ("IDC", "resnet18_in"): 61.2,
    ("IDC + CMI", "alexnet_in"): 64.4,
    ("IDC + CMI", "vgg11_in"): 67.4,
    ("IDC + CMI", "resnet18_in"): 66.0,
}
# Tables 10 and 11, CIFAR-10, IPC 10: CMI at the start, at the end of the method alone, and with the regulariser.
PAPER_CMI = {
    ("DM", "ConvNet"): (0.1045, 0.0866, 0.0326),
    ("DM", "ResNet-18"): (0.0016, 0.0066, 0.0004),
    ("DSA", "ConvNet"): (0.1045, 0.0825, 0.0455),
    ("DSA", "ResNet-18"): (0.0016, 0.0051, 0.0004),
}


@dataclass(frozen=True)
class Found:
    """The students of one architecture on one arm at one IPC.

    Attributes:
        arm: its name.
        ipc: images per class.
        student: architecture of the students.
        sets: for each set the results of its students, as `train_students` puts them together.
        seconds: of each set's distillation.
        start, end: CMI in nats of the images that a set began with and of those it ended with; see `_cmi_of`.
        rates: learning rates that came with the sets, which their students take.
    """

    arm: str
    ipc: int
    student: str
    sets: Sequence[Mapping[str, Any]]
    seconds: Sequence[float]
    start: float | None = None
    end: float | None = None
    rates: Sequence[float] = ()

    @property
    def means(self) -> list[float]:
        """Mean top-1 of each set's students."""
        return [statistics.mean(each["top1"]) for each in self.sets]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options of the study."""
    parser = study_parser("cmi", __doc__)
    parser.add_argument("--method", default="dm", choices=tuple(SUBJECTS), help="default dm")
    parser.add_argument("--proxies", type=Path, required=True, help="folder of ddfast train-proxies")
    parser.add_argument("--arch", default="convnet3_in", help="of the matched networks")
    parser.add_argument(
        "--student", action="append", default=[], help="of the students, may be repeated; default --arch"
    )
    parser.add_argument("--normalization", default="auto", help="of the matched pixels, that of the proxies")
    parser.add_argument(
        "--arms",
        default="",
        help="only some of random, herding, RDED, InfoUtil, the method's and that with + CMI, comma between;\n"
        "default all but RDED and InfoUtil",
    )
    parser.add_argument("--ipc", type=integers, default=[1, 10, 50])
    parser.add_argument(
        "--iterations", type=by_ipc, default={}, help="default the method's; by IPC: 300,50:100"
    )
    parser.add_argument("--real-batch", type=int, default=None, help="real images a class and step")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another option of the method, as inner_loop=20; may be repeated",
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME: KEY=VALUE ...",
        help='another arm, the method with these options besides: "detached: unroll=detached"; may be repeated',
    )
    parser.add_argument(
        "--cmi", type=by_ipc, default={}, help="lambda, default the authors'; by IPC as above"
    )
    parser.add_argument("--cmi-every", type=int, default=1)
    parser.add_argument("--sets", type=by_ipc, default={0: 3}, help="distilled sets an arm; by IPC as above")
    parser.add_argument("--students", type=by_ipc, default={0: 3}, help="students a set; by IPC as above")
    parser.add_argument("--epochs", type=by_ipc, default={}, help="of students; default the protocol's")
    parser.add_argument("--protocol", default=None, help="of students; default the method's")
    arguments = parser.parse_args(argv)
    if len(arguments.teacher) != 1:
        parser.error("herding chooses by a teacher's features: give one --teacher")
    subject = SUBJECTS[arguments.method]
    arguments.also = dict(_also(text, parser) for text in arguments.also)
    known = (*CHOSEN, subject.name, *arguments.also, subject.with_cmi)
    usual = ",".join(name for name in known if name not in ("RDED", "InfoUtil"))
    arguments.arms = [arm.strip() for arm in (arguments.arms or usual).split(",")]
    if unknown := [arm for arm in arguments.arms if arm not in known]:
        parser.error(f"unknown arms {', '.join(unknown)}; known: {', '.join(known)}")
    if wrong := [text for text in arguments.option if "=" not in text]:
        parser.error(f"--option takes KEY=VALUE, got {wrong[0]}")
    arguments.images_per_class = arguments.images_per_class or 300
    arguments.student = arguments.student or [arguments.arch]
    arguments.cmi = arguments.cmi or subject.cmi
    arguments.protocol = arguments.protocol or subject.protocol
    return arguments


def _also(text: str, parser: argparse.ArgumentParser) -> tuple[str, list[str]]:
    """An arm of `--also` and its options."""
    name, separator, rest = text.partition(":")
    if not separator or not rest.split() or any("=" not in word for word in rest.split()):
        parser.error(f"--also takes NAME: KEY=VALUE ..., got {text!r}")
    return name.strip(), rest.split()


def main(argv: Sequence[str]) -> int:
    """Run the study; the page is written anew after every arm."""
    arguments = parse(argv)
    found: list[Found] = []
    left_out: dict[tuple[str, int], str] = {}
    kind = get_method(arguments.method)
    assert issubclass(kind, Synthesis)
    for ipc in arguments.ipc:
        for arm in arguments.arms:
            if arm.endswith("+ CMI") and ipc * kind.factor**2 == 1:
                continue  # the mean of a single image is the image: CMI is 0
            for student in arguments.student:
                try:
                    found.append(_trained(arm, ipc, student, arguments))
                except DivergedError as error:  # the other arms go on
                    left_out[arm, ipc] = " ".join(str(error).split())
                    say(f"{arm}, IPC {ipc}: left out, {left_out[arm, ipc]}")
                page = _write(found, left_out, arguments, argv)
    print(page)
    return 0


def _arm(name: str, ipc: int, seed: int, arguments: argparse.Namespace) -> Arm:
    if name in CHOSEN:
        return Arm(name, CHOSEN[name], {"seed": seed})
    settings: dict[str, Any] = {
        "seed": seed,
        "arch": arguments.arch,
        "normalization": arguments.normalization,
        "proxies": str(arguments.proxies),  # without a weight CMI is measured and does not act
    }
    given = {"iterations": at_ipc(arguments.iterations, ipc), "real_batch": arguments.real_batch}
    settings |= {key: value for key, value in given.items() if value is not None}
    given_besides = (*arguments.option, *arguments.also.get(name, ()))
    settings |= Arm.parse(" ".join((arguments.method, *given_besides))).settings
    if name.endswith("+ CMI"):
        settings |= {
            "cmi": float(at_ipc(arguments.cmi, ipc) or 0),
            "cmi_every": arguments.cmi_every,
        }
    return Arm(f"{name}, set {seed}", arguments.method, settings)


def _trained(name: str, ipc: int, student: str, arguments: argparse.Namespace) -> Found:
    """The sets of an arm and their students."""
    setup = Setup(
        arguments.data,
        arguments.teacher[0],
        arguments.work,
        1,
        arguments.images_per_class,
        "float32",
    )
    training = _training(name, ipc, student, arguments)
    sets, seconds, starts, ends, rates = [], [], [], [], []
    for seed in range(at_ipc(arguments.sets, ipc) or 1):
        arm = _arm(name, ipc, seed, arguments)
        students = range(at_ipc(arguments.students, ipc) or 1)
        result = train_students(arm, ipc, setup, training, students)
        sets.append(result)
        made = set_of(arm, ipc, setup, training, 0)
        seconds.append(sum(stages_of(made).values()))
        if name not in CHOSEN:
            folder = made.folder
            rate = read_distilled(folder).learned_rate
            rates += [] if rate is None else [rate]
            ends.append(_cmi_of(folder, arguments.proxies))
            starts += [row["cmi"] for row in read_curve(folder)[:1] if row.get("cmi") is not None]
    mean = statistics.mean
    return Found(
        name,
        ipc,
        student,
        sets,
        seconds,
        mean(starts) if starts else None,
        mean(ends) if ends else None,
        rates,
    )


def _training(name: str, ipc: int, student: str, arguments: argparse.Namespace) -> Training:
    """Students by the protocol; on chosen images as many updates as on images that decode to several."""
    training = Training(
        student,
        labels="hard",
        protocol=arguments.protocol,
        epochs=at_ipc(arguments.epochs, ipc),
        last_only=True,
    )
    kind = get_method(arguments.method)
    assert issubclass(kind, Synthesis)
    options = Arm.parse(" ".join((arguments.method, *arguments.option))).settings
    views = int(options.get("factor") or kind.factor) ** 2
    if name not in CHOSEN or views == 1:
        return training
    rules, teacher = training.rules, teacher_at(arguments.teacher[0])
    classes = len(teacher.class_names)
    batch = rules.batch_size_for(ipc * views, classes, teacher.image_size, student, None)
    passes = (training.epochs or rules.epochs_for(ipc)) + rules.passes_after
    decoded, whole = (
        steps_of_a_pass(count * classes, min(batch, count * classes)) for count in (ipc * views, ipc)
    )
    epochs = max(round(passes * decoded / whole) - rules.passes_after, 1)
    return dataclasses.replace(training, epochs=epochs, batch_size=batch)


@torch.no_grad()
def _cmi_of(folder: Path, proxies: Path) -> float:
    """CMI of a set's images, decoded, mean over all proxies, in nats."""
    images = read_distilled(folder).decoded()
    networks = load_proxies(
        proxies,
        class_names=images.class_names,
        image_size=images.image_size,
        mean=images.mean,
        std=images.std,
    )
    return statistics.mean(
        float(ddfast.cmi(features(network, images.images), images.labels)) for network in networks
    )


def _write(
    found: Sequence[Found],
    left_out: Mapping[tuple[str, int], str],
    arguments: argparse.Namespace,
    argv: Sequence[str],
) -> str:
    name = "cmi" if arguments.method == "dm" else f"cmi_{arguments.method}"
    out = arguments.out or facts.RESULTS / "paper" / f"{name}_{Path(arguments.data).stem}_{arguments.arch}"
    write_rows(out.with_suffix(".csv"), COLUMNS, _csv_rows(found, arguments))
    page = _page(found, left_out, arguments, argv)
    atomic_write_text(out.with_suffix(".md"), page)
    return page


def _csv_rows(found: Sequence[Found], arguments: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    for each in found:
        for number, (result, seconds) in enumerate(zip(each.sets, each.seconds, strict=True)):
            of_set = (each.arm, each.ipc, each.student, arguments.protocol, number)
            for seed, top1 in zip(result["seeds"], result["top1"], strict=True):
                made = (
                    result["epochs"],
                    result["steps"],
                    f"{top1:.2f}",
                    f"{seconds:.3f}",
                    " ".join(result["commits"]),
                )
                yield (*of_set, seed, *made)


COLUMNS = (
    "arm",
    "ipc",
    "student",
    "protocol",
    "set",
    "seed",
    "epochs",
    "steps",
    "top1",
    "seconds",
    "commits",
)


def _page(
    found: Sequence[Found],
    left_out: Mapping[tuple[str, int], str],
    arguments: argparse.Namespace,
    argv: Sequence[str],
) -> str:
    subject = SUBJECTS[arguments.method]
    lines = [
        f"# {TITLE.replace('A matching method', subject.name)}",
        "",
        told("cmi", argv),
        f"Test top-1 in percent after the last epoch, hard labels, protocol {arguments.protocol}: mean over sets and "
        "students ± deviation over the sets' means (one set: over its students). In brackets the paper's.",
        "",
    ]
    for student in arguments.student:
        of_student = [each for each in found if each.student == student]
        if len(arguments.student) > 1:
            lines += [f"## Students {student}", ""]
        lines += [*_table(of_student, subject, arguments), ""]
    if left_out:
        lines += [*(f"- {arm}, IPC {ipc}: left out, {why}" for (arm, ipc), why in left_out.items()), ""]
    first = [each for each in found if each.student == arguments.student[0]]
    if any(each.arm == subject.with_cmi for each in first):
        lines += [*_cmi_table(first, subject, arguments), ""]
    lines += [*_budget(found, subject, arguments), ""]
    return "\n".join(lines)


def _table(found: Sequence[Found], subject: Subject, arguments: argparse.Namespace) -> list[str]:
    """Arms down, IPCs across, and what CMI adds."""
    ipcs = list(dict.fromkeys(each.ipc for each in found))
    at = {(each.arm, each.ipc): each for each in found}
    lines = [
        "| method | " + " | ".join(f"IPC {ipc}" for ipc in ipcs) + " |",
        "| --- |" + " --- |" * len(ipcs),
    ]
    for arm in arguments.arms:
        cells = [_cell(at[arm, ipc], subject, arguments) if (arm, ipc) in at else "" for ipc in ipcs]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    deltas = [
        _delta(at[subject.name, ipc], at[subject.with_cmi, ipc], subject, arguments)
        for ipc in ipcs
        if (subject.name, ipc) in at and (subject.with_cmi, ipc) in at
    ]
    if deltas:
        lines += ["", "What CMI adds, set by set with the same draws in both arms:", "", *deltas]
    others = [
        f"- {name}, IPC {ipc}: {_paired(at[subject.name, ipc], at[name, ipc])}"
        for name in arguments.also
        for ipc in ipcs
        if (name, ipc) in at and (subject.name, ipc) in at
    ]
    if others:
        lines += ["", f"What else differs from {subject.name}, likewise:", "", *others]
    return lines


def _paper(arm: str, ipc: int, student: str, subject: Subject, arguments: argparse.Namespace) -> float | None:
    """The paper's top-1 on CIFAR-10; None where it has none."""
    if "cifar10" not in Path(arguments.data).stem.lower().replace("-", "").replace("cifar100", ""):
        return None
    if student != arguments.arch:
        return PAPER_CROSS.get((arm, student)) if ipc == 10 else None
    known = {
        **PAPER_CHOSEN,
        subject.name: subject.paper,
        subject.with_cmi: subject.paper_with_cmi,
    }
    return known.get(arm, {}).get(ipc) if arguments.arch == "convnet3_in" else None


def _cell(each: Found, subject: Subject, arguments: argparse.Namespace) -> str:
    paper = _paper(each.arm, each.ipc, each.student, subject, arguments)
    return mean_and_spread(each.means, each.sets[0]["top1"]) + ("" if paper is None else f" ({paper})")


def _delta(base: Found, with_cmi: Found, subject: Subject, arguments: argparse.Namespace) -> str:
    """One line: the gain of every set, their mean and deviation, and the paper's."""
    text = f"- IPC {base.ipc}: {_paired(base, with_cmi)}"
    theirs, ours = (
        _paper(found.arm, found.ipc, found.student, subject, arguments) for found in (base, with_cmi)
    )
    return text if theirs is None or ours is None else f"{text}; the paper {ours - theirs:+.1f}"


def _paired(base: Found, other: Found) -> str:
    """How much better an arm is than another, set by set."""
    return paired([ours - theirs for ours, theirs in zip(other.means, base.means, strict=True)])


def _cmi_table(found: Sequence[Found], subject: Subject, arguments: argparse.Namespace) -> list[str]:
    """CMI's values beside those of the paper's Tables 10 and 11."""
    lines = [
        "CMI in nats. At the start: on the proxy that the first step draws; at the end: mean over all proxies.",
        "",
        f"| proxy | IPC | start | end of {subject.name} | end of {subject.with_cmi} |",
        "| --- | --- | --- | --- | --- |",
    ]
    arch = proxies_identity(arguments.proxies)[0]["arch"]
    for ipc in dict.fromkeys(each.ipc for each in found):
        base, ours = (
            next((each for each in found if (each.arm, each.ipc) == (arm, ipc)), None)
            for arm in (subject.name, subject.with_cmi)
        )
        if base is not None and ours is not None:
            lines.append(
                f"| {arch} | {ipc} | {_number(ours.start)} | {_number(base.end)} | {_number(ours.end)} |"
            )
    for (method, proxy), (start, plain, end) in PAPER_CMI.items():
        if method == subject.name:
            lines.append(f"| {proxy}, the paper | 10 | {start} | {plain} | {end} |")
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _budget(found: Sequence[Found], subject: Subject, arguments: argparse.Namespace) -> list[str]:
    """How the numbers were made, a line each."""
    proxies = proxies_identity(arguments.proxies)
    reads = [proxy["top1"] for proxy in proxies if proxy["top1"] is not None]
    told_of = list({(each.arm, each.ipc): each for each in found}.values())
    seconds = ", ".join(
        f"{each.arm} at IPC {each.ipc} {duration(statistics.mean(each.seconds))}" for each in told_of
    )
    results = [result for each in found for result in each.sets]
    ipcs = list(dict.fromkeys(each.ipc for each in found))
    usual = get_method(arguments.method).from_options({}).options
    counts = [
        f"{at_ipc(arguments.iterations, ipc) or usual.iterations} iterations at IPC {ipc}" for ipc in ipcs
    ]
    batch = arguments.real_batch or getattr(usual, "real_batch", None)  # experts have seen MTT's
    of_real = f", {batch} real images a class" if batch else ""
    weights = ", ".join(f"{at_ipc(arguments.cmi, ipc):g} at IPC {ipc}" for ipc in ipcs)
    return [
        f"- {', '.join(counts)}{of_real}"
        + (f", {', '.join(map(without_folders, arguments.option))}" if arguments.option else "")
        + f" (the paper: {subject.budget})",
        *(f"- {name}: {', '.join(map(without_folders, words))}" for name, words in arguments.also.items()),
        *(
            [
                f"- lambda {weights or 'none'}, CMI every {arguments.cmi_every} iterations, {len(proxies)} proxies "
                f"{proxies[0]['arch']}, test top-1 "
                + (f"{min(reads):.1f} to {max(reads):.1f}" if reads else "not measured")
            ]
            if subject.with_cmi in arguments.arms
            else []
        ),
        *(
            [f"- chosen by {teacher_fact(arguments.teacher[0])}"]
            if {"herding", "RDED", "InfoUtil"} & set(arguments.arms)
            else []
        ),
        f"- a set's distillation takes, by the clock and without the training of proxies and teacher: {seconds}",
        f"- students: {'; '.join(_updates(told_of))}; {made_with(results, 'float32')}",
        *(
            f"- students of {each.arm} at IPC {each.ipc} learn at the rate of their images, "
            f"{statistics.mean(each.rates):.4f}, others at the protocol's"
            for each in told_of
            if each.rates
        ),
    ]


def _updates(found: Sequence[Found]) -> list[str]:
    """What students spend, and the arms that spend it."""
    arms: dict[tuple[int, int, int], list[str]] = {}
    for each in found:
        first = each.sets[0]
        arms.setdefault((each.ipc, first["steps"], first["batch_size"]), []).append(each.arm)
    return [
        f"at IPC {ipc} {steps:,} updates of {batch} images ({', '.join(names)})"
        for (ipc, steps, batch), names in arms.items()
    ]
