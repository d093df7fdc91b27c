"""IGDS: the prior unguided and guided, random images beside them; a sweep of beta; H(X | Y) of subsets and accuracy.

    python -m bench.studies igds --data fashion_mnist:FOLDER --teacher teacher.safetensors --prior PRIOR \
        --estimator estimator.safetensors --ipc 1,10,50 --sets 3,50:1 --students 3

All arms have the same classes, students, seeds and epochs, once with hard labels (protocol igds) and once with the
teacher's (protocol rded). Unguided and guided sets of one seed come of the same noise, so that their difference, set by
set, is what guidance does. Then come Figure 3 (accuracy by beta and IPC), Figure 2 (H(X | Y) of drawn subsets of real
images and accuracy), how often the teacher reads a plain sample as its class, what an image takes beside Table 2, and
Figure 4's picture. The paper ("Information-Guided Diffusion Sampling for Dataset Distillation") has other data sets
at 256 px. Writes `<out>.csv`, `<out>.md` and `<out>.png`. What is finished is kept in `--work`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ddfast
from bench import facts
from bench.studies.arguments import study_parser, told
from bench.studies.arms import (
    Arm,
    Setup,
    Training,
    at_ipc,
    by_ipc,
    digest,
    fingerprint,
    set_of,
    teacher_at,
    test_set,
    train_students,
)
from bench.studies.compare import integers, made_with, teacher_fact
from bench.studies.tables import mean_and_spread, paired
from ddfast.files import atomic_write_bytes, atomic_write_text, make_folder
from ddfast.methods.diffusion.igds import IGDS
from ddfast.methods.synthesis import Group
from ddfast.models.diffusion import load_prior, sample
from ddfast.models.estimator import estimator_identity, load_estimator
from ddfast.output.mosaic import mosaic_labels, paired_mosaic_picture, png_bytes
from ddfast.output.pixels import read_curve
from ddfast.seeding import generator
from ddfast.training.distilled_images import DistilledImages
from ddfast.training.prior import to_levels
from ddfast.wording import plural

TITLE = "IGDS: guidance of a diffusion prior (IGDS, Tables 1 and 2, Figures 2 to 4)"
ARMS = ("random", "unguided", "guided")
LABELS = {"hard": "igds", "soft": "rded"}  # and the protocol of each
PAPER_MINUTES = {"ImageNette": 57, "ImageWoof": 53}  # Table 2: 100 images of 256 px on a V100, 250 steps


@dataclass(frozen=True)
class Found:
    """The students of one arm at one IPC: for each set the results as `train_students` puts them together.

    `beta` is that of a guided arm. `information` and `context` are the last ones of the sets' curves, mean over sets.
    """

    arm: str
    ipc: int
    labels: str
    sets: Sequence[Mapping[str, Any]]
    beta: float | None = None
    information: float | None = None
    context: float | None = None

    @property
    def means(self) -> list[float]:
        """Mean top-1 of each set's students."""
        return [statistics.mean(each["top1"]) for each in self.sets]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options of the study."""
    parser = study_parser("igds", __doc__)
    parser.add_argument(
        "--prior", required=True, help="folder of ddfast train-prior, or of a diffusers pipeline"
    )
    parser.add_argument("--estimator", type=Path, required=True, help="file of ddfast train-estimator")
    parser.add_argument("--arch", default="convnet3_in", help="of the students")
    parser.add_argument("--ipc", type=integers, default=[1, 10, 50])
    parser.add_argument("--labels", default="hard,soft", help="hard, soft, or both with a comma")
    parser.add_argument("--eta", type=float, default=None, help="default the method's")
    parser.add_argument("--eta-schedule", default=None, help="default the method's")
    parser.add_argument("--betas", default="0,0.1,0.5", help="of the sweep, comma between; empty: no sweep")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--sets", type=by_ipc, default={0: 3}, help="sets an arm: 3, or by IPC: 3,50:1")
    parser.add_argument("--students", type=by_ipc, default={0: 3}, help="students a set; by IPC as above")
    parser.add_argument("--epochs", type=by_ipc, default={}, help="of students; default the protocol's")
    parser.add_argument("--levels", type=int, default=5, help="levels of H(X | Y) of Figure 2; 0: none")
    parser.add_argument("--plain", type=int, default=10, help="plain samples a class that the teacher reads")
    arguments = parser.parse_args(argv)
    if len(arguments.teacher) != 1:
        parser.error("give one --teacher: it labels, and reads the prior's samples")
    arguments.labels = [word.strip() for word in arguments.labels.split(",")]
    if unknown := [word for word in arguments.labels if word not in LABELS]:
        parser.error(f"--labels: {unknown[0]!r} is neither hard nor soft")
    arguments.betas = [float(word) for word in arguments.betas.split(",") if word.strip()]
    arguments.images_per_class = arguments.images_per_class or 300
    whole = teacher_at(arguments.teacher[0]).image_size <= 64
    arguments.factor = (1 if whole else 2) if arguments.factor == "auto" else int(arguments.factor)
    # Students see samples that share an image one by one; real images that did would be another comparison.
    arguments.arms = [name for name in ARMS if arguments.factor == 1 or name != "random"]
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the study; the page is written anew after every arm."""
    arguments = parse(argv)
    found: list[Found] = []
    page = ""
    for ipc in arguments.ipc:
        for labels in arguments.labels:
            for arm in arguments.arms:
                found.append(_trained(arm, ipc, labels, None, arguments))
                page = _write(found, [], None, arguments, argv)
    for ipc in arguments.ipc:
        # Of a single sample a class H(X | Y) is 0, whatever its weight.
        for beta in arguments.betas if ipc * arguments.factor**2 > 1 else []:
            found.append(_trained("guided", ipc, arguments.labels[0], beta, arguments))
            page = _write(found, [], None, arguments, argv)
    subsets = [row for ipc in arguments.ipc for row in _subsets(ipc, arguments)] if arguments.levels else []
    page = _write(found, subsets, _plainness(arguments), arguments, argv)
    _picture(arguments)
    print(page)
    return 0


def _arm(name: str, seed: int, beta: float | None, arguments: argparse.Namespace) -> Arm:
    if name == "random":
        return Arm(name, name, {"seed": seed})
    settings: dict[str, Any] = {
        "seed": seed,
        "prior": arguments.prior,
        "estimator": str(arguments.estimator),
        "steps": arguments.steps,
        "unguided": False,
        "precision": arguments.precision,
        "factor": arguments.factor,
    }
    if name == "unguided":
        settings["eta"] = 0.0
    else:
        own = {"eta": arguments.eta, "eta_schedule": arguments.eta_schedule, "beta": beta}
        settings |= {key: value for key, value in own.items() if value is not None}
    return Arm(f"{name}, set {seed}", "igds", settings)


def _trained(name: str, ipc: int, labels: str, beta: float | None, arguments: argparse.Namespace) -> Found:
    """The sets of an arm and their students."""
    setup, training = _setup(arguments), _training(ipc, labels, arguments)
    sets, last = [], []
    for seed in range(at_ipc(arguments.sets, ipc) or 1):
        arm = _arm(name, seed, beta, arguments)
        sets.append(train_students(arm, ipc, setup, training, range(at_ipc(arguments.students, ipc) or 1)))
        if name != "random":
            rows = read_curve(set_of(arm, ipc, setup, training, 0).folder)
            end = max(row["step"] for row in rows)
            last += [row for row in rows if row["step"] == end]
    information, context = (
        statistics.mean(row[column] for row in last) if last and column in last[0] else None
        for column in ("information", "context")
    )
    return Found(name, ipc, labels, sets, beta, information, context)


def _setup(arguments: argparse.Namespace) -> Setup:
    return Setup(
        arguments.data,
        arguments.teacher[0],
        arguments.work,
        arguments.factor,
        arguments.images_per_class,
        arguments.precision,
    )


def _training(ipc: int, labels: str, arguments: argparse.Namespace) -> Training:
    return Training(
        arguments.arch,
        labels="hard" if labels == "hard" else "online",
        protocol=LABELS[labels],
        epochs=at_ipc(arguments.epochs, ipc),
        last_only=True,
    )


# Figure 2
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subset:
    """A drawn subset of real images: the level a that was aimed at, its H(X | Y) in nats, and accuracy in percent."""

    ipc: int
    level: float
    context: float
    top1: float


@torch.no_grad()
def _spreads(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Real images uint8 [N, 3, S, S] that the estimator reads right, their labels, KL to their class's Q, softmax."""
    from ddfast.data.pool import drawn_places
    from ddfast.training.image_sets import read_training_set

    estimator, teacher = load_estimator(arguments.estimator), teacher_at(arguments.teacher[0])
    source = ddfast.data.open_source(arguments.data, "train")
    places = drawn_places(source.samples, len(source.class_names), arguments.images_per_class, 0)
    real = read_training_set(
        source, teacher.image_size, samples=source.samples.take(places.tolist()), quiet=True
    )
    read = [estimator.read(part.float() / 127.5 - 1) for part in real.images.split(64)]  # type: ignore[union-attr]
    probabilities = torch.cat([(part[0] / estimator.tau).softmax(dim=1) for part in read]).double()
    logits = torch.cat([part[1] for part in read])[:, estimator.places_of(source.class_names)]
    labels: Tensor = real.labels  # type: ignore[union-attr]
    centres = torch.stack(
        [probabilities[labels == label].mean(dim=0) for label in range(len(source.class_names))]
    )
    spread = (probabilities * (probabilities / centres[labels]).clamp_min(1e-30).log()).sum(dim=1)
    right = logits.argmax(dim=1) == labels
    return real.images[right], labels[right], spread[right], probabilities[right]  # type: ignore[union-attr]


def _subsets(ipc: int, arguments: argparse.Namespace) -> list[Subset]:
    """Subsets drawn with probability proportional to exp(-(KL - a)^2), for levels a over the range of KL."""
    images, labels, spread, probabilities = _spreads(arguments)
    teacher = teacher_at(arguments.teacher[0])
    classes = len(teacher.class_names)
    test = test_set(arguments.data, teacher.image_size)
    low, high = (float(torch.quantile(spread, share)) for share in (0.05, 0.95))
    found = []
    for number, level in enumerate(np.linspace(low, high, arguments.levels).tolist()):
        chosen = []
        for label in range(classes):
            members = torch.nonzero(labels == label).flatten()
            weights = torch.exp(-((spread[members] - level) ** 2)).double()
            draws = generator(0, "subset", ipc, number, label)
            taken = torch.multinomial(weights, min(ipc, len(members)), generator=draws)
            chosen.append(members[taken])
        places, seeds = torch.cat(chosen), at_ipc(arguments.students, ipc) or 1
        distilled = DistilledImages(
            images=images[places],
            labels=labels[places],
            class_names=teacher.class_names,
            mean=teacher.mean,
            std=teacher.std,
        )
        training = _training(ipc, "hard", arguments)
        recipe = [training.arch, training.protocol, training.epochs, seeds, arguments.precision]
        kept = (
            arguments.work
            / "subsets"
            / f"{digest([_hashed(distilled), fingerprint(arguments.data), recipe])}.json"
        )
        if not kept.exists():
            result = ddfast.evaluate(
                distilled,
                test,
                arch=training.arch,
                seeds=seeds,
                protocol=training.rules,
                epochs=training.epochs,
                precision=arguments.precision,
                quiet=True,
            )
            make_folder(kept.parent)
            atomic_write_text(kept, json.dumps(result.mean))
        of_sets = [_context(probabilities[part]) for part in chosen]
        found.append(Subset(ipc, level, statistics.mean(of_sets), json.loads(kept.read_text("utf-8"))))
    return found


def _hashed(images: DistilledImages) -> str:
    """Of the images and their labels."""
    held = images.images.numpy().tobytes() + images.labels.numpy().tobytes()
    return hashlib.sha256(held).hexdigest()


def _context(probabilities: Tensor) -> float:
    """Mean KL of rows to their mean, in nats."""
    centre = probabilities.mean(dim=0)
    return float((probabilities * (probabilities / centre).clamp_min(1e-30).log()).sum(dim=1).mean())


# The prior by itself
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _plainness(arguments: argparse.Namespace) -> float | None:
    """How many of the prior's plain samples the teacher reads as their class, in percent."""
    teacher, prior = teacher_at(arguments.teacher[0]), load_prior(arguments.prior)
    own = prior.labels_of(teacher.class_names)
    if own is None or not arguments.plain:
        return None
    labels = torch.arange(len(own)).repeat_interleave(arguments.plain)
    right = 0
    for part in labels.split(64):
        draws = [generator(0, "plain", int(label), number) for number, label in enumerate(part)]
        images = sample(prior, torch.tensor(own)[part], draws, arguments.steps) / 2 + 0.5
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (teacher.mean, teacher.std))
        right += int((teacher.model((images - mean) / std).argmax(dim=1) == part).sum())
    return 100 * right / len(labels)


@torch.no_grad()
def _picture(arguments: argparse.Namespace) -> None:
    """Figure 4: the same noise unguided, at beta 0 and at a large beta."""
    teacher = teacher_at(arguments.teacher[0])
    size, names = load_prior(arguments.prior).image_size, list(teacher.class_names)
    shown = mosaic_labels(len(names))[:5]
    sets = []
    own = {"eta": arguments.eta, "eta_schedule": arguments.eta_schedule}
    for title, options in (("unguided", {"eta": 0.0}), ("beta 0", {"beta": 0.0}), ("beta 5", {"beta": 5.0})):
        given = {**{key: value for key, value in own.items() if value is not None}, **options}
        method = IGDS.from_options(
            {
                "prior": arguments.prior,
                "estimator": str(arguments.estimator),
                "steps": arguments.steps,
                "unguided": False,
                "class_batch": len(names),
                **given,
            }
        )
        assert isinstance(method, IGDS)
        context = ddfast.methods.base.Context(
            teacher=None,
            image_size=size,
            factor=1,
            seed=0,
            precision="float32",
            forward_batch=0,
            device=torch.device("cpu"),
            ipc=4,
            class_names=tuple(names),
        )
        state = method.begin(Group(0, tuple(shown)), None, context)  # type: ignore[arg-type]
        for number in range(method.steps):
            method.step(number, state, None, context)  # type: ignore[arg-type]
        labels = [label for label in range(len(shown)) for _ in range(4)]
        sets.append((title, to_levels(2 * state.pixels - 1), labels))
    picture = paired_mosaic_picture(sets, [names[label] for label in shown])
    atomic_write_bytes(_out(arguments).with_suffix(".png"), png_bytes(picture))


# The page
# ----------------------------------------------------------------------------------------------------------


def _out(arguments: argparse.Namespace) -> Path:
    name = Path(str(arguments.data).partition(":")[0]).stem
    out: Path = arguments.out or facts.RESULTS / "paper" / f"igds_{name}_{arguments.arch}"
    return out


def _write(
    found: Sequence[Found],
    subsets: Sequence[Subset],
    plain: float | None,
    arguments: argparse.Namespace,
    argv: Sequence[str],
) -> str:
    out = _out(arguments)
    make_folder(out.parent)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arm", "beta", "ipc", "labels", "set", "seed", "epochs", "top1", "commits"))
    for each in found:
        beta = "" if each.beta is None else f"{each.beta:g}"
        for number, result in enumerate(each.sets):
            for seed, top1 in zip(result["seeds"], result["top1"], strict=True):
                row = (each.arm, beta, each.ipc, each.labels, number, seed, result["epochs"], f"{top1:.2f}")
                writer.writerow((*row, " ".join(result["commits"])))
    atomic_write_text(out.with_suffix(".csv"), text.getvalue())
    page = _page(found, subsets, plain, arguments, argv)
    atomic_write_text(out.with_suffix(".md"), page)
    return page


def _page(
    found: Sequence[Found],
    subsets: Sequence[Subset],
    plain: float | None,
    arguments: argparse.Namespace,
    argv: Sequence[str],
) -> str:
    ipcs = list(dict.fromkeys(each.ipc for each in found))
    at = {(each.arm, each.ipc, each.labels): each for each in found if each.beta is None}
    lines = [
        f"# {TITLE}",
        "",
        told("igds", argv),
        "Test top-1 in percent after the last epoch: mean over sets and students ± deviation over the sets' means (one "
        "set: over its students).",
        "",
        "| images | labels | " + " | ".join(f"IPC {ipc}" for ipc in ipcs) + " |",
        "| --- | --- |" + " --- |" * len(ipcs),
    ]
    for labels in arguments.labels:
        for arm in arguments.arms:
            cells = [_cell(at[arm, ipc, labels]) if (arm, ipc, labels) in at else "" for ipc in ipcs]
            lines.append(f"| {arm} | {labels}, protocol {LABELS[labels]} | {' | '.join(cells)} |")
    gains = [
        _gain(at["unguided", ipc, labels], at["guided", ipc, labels])
        for labels in arguments.labels
        for ipc in ipcs
        if ("unguided", ipc, labels) in at and ("guided", ipc, labels) in at
    ]
    if gains:
        lines += ["", "What guidance adds, set by set from the same noise:", "", *gains]
    if swept := [each for each in found if each.beta is not None]:
        lines += ["", "Figure 3, accuracy by beta (labels " + arguments.labels[0] + "):", ""]
        betas = list(dict.fromkeys(each.beta for each in swept))
        lines += ["| IPC | " + " | ".join(f"beta {beta:g}" for beta in betas) + " |"]
        lines += ["| --- |" + " --- |" * len(betas)]
        for ipc in dict.fromkeys(each.ipc for each in swept):
            cells = [_cell(each) for each in swept if each.ipc == ipc]
            lines.append(f"| {ipc} | {' | '.join(cells)} |")
    if subsets:
        lines += ["", "Figure 2, subsets of real images drawn at levels of H(X \\| Y), hard labels:", ""]
        lines += ["| IPC | level | H(X \\| Y), nats | top-1 |", "| --- | --- | --- | --- |"]
        lines += [f"| {row.ipc} | {row.level:.3f} | {row.context:.3f} | {row.top1:.1f} |" for row in subsets]
    return "\n".join([*lines, "", *_how(found, plain, arguments), ""])


def _cell(each: Found) -> str:
    told_of = [
        f"{name} {value:.2f}"
        for name, value in (("I", each.information), ("H", each.context))
        if value is not None and math.isfinite(value)
    ]
    return mean_and_spread(each.means, each.sets[0]["top1"]) + (f" ({', '.join(told_of)})" if told_of else "")


def _gain(plain: Found, guided: Found) -> str:
    """One line: the gain of every set, their mean and deviation."""
    gains = [ours - theirs for ours, theirs in zip(guided.means, plain.means, strict=True)]
    return f"- IPC {plain.ipc}, {plain.labels} labels: {paired(gains)}"


def _how(found: Sequence[Found], plain: float | None, arguments: argparse.Namespace) -> list[str]:
    """How the numbers were made, a line each."""
    estimator = estimator_identity(arguments.estimator)
    reached = "not measured" if estimator["top1"] is None else f"{estimator['top1']:.1f}%"
    results = [result for each in found for result in each.sets]
    times = []
    for each in found:
        if each.arm != "random" and each.beta is None and each.labels == arguments.labels[0]:
            classes = len(results[0]["per_class"])
            seconds = statistics.mean(result["seconds"]["synthesize"] for result in each.sets)
            samples = classes * each.ipc * arguments.factor**2
            times.append(f"{each.arm} at IPC {each.ipc} {seconds / samples:.2f} s")
    paper = ", ".join(f"{name} {minutes * 60 / 100:.0f} s" for name, minutes in PAPER_MINUTES.items())
    says = (
        []
        if plain is None
        else [f"- the teacher reads {plain:.1f}% of the prior's plain samples as their class"]
    )
    return [
        "I and H: bounds of I(X; Y) and H(X \\| Y) in nats at the last step, of the samples before they are composed.",
        "",
        f"- {arguments.steps} steps; eta {'the default' if arguments.eta is None else f'{arguments.eta:g}'}; beta by "
        "IPC where none is named",
        f"- estimator {estimator['arch']}, lambda {estimator['lambda']}, linear top-1 {reached}",
        f"- teacher {teacher_fact(arguments.teacher[0])}",
        *says,
        f"- {plural(arguments.factor**2, 'sample')} an image; time a sample, of a set that was not interrupted: "
        f"{', '.join(times)} (the paper, 256 px on a V100: {paper})",
        f"- students: {', '.join(_epochs(found))}; {made_with(results, arguments.precision)}",
    ]


def _epochs(found: Sequence[Found]) -> list[str]:
    """Of the students, by labels and IPC."""
    passes = {(each.labels, each.ipc): each.sets[0]["epochs"] for each in found}
    return [
        f"{labels} labels at IPC {ipc} {plural(epochs, 'epoch')}" for (labels, ipc), epochs in passes.items()
    ]
