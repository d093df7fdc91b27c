"""Three ways back through a training: error against its length, and memory.

    python -m bench.studies unrolled --data cifar10-jpeg.zip --steps 1,2,5,10,20,30,50

A ConvNet-3 trains on real images; the weights that it has after a while, and those it has as much later, are the ends
of a trajectory as MTT matches them. A student takes N steps from the first, on one real image of each class, and the
gradient of its distance to the second, in the pixels of all steps, is computed in three ways: by autograd on the graph
of all steps, by `ddfast.unrolled_gradient`, and by that with unroll="detached", which is what the code of TESLA (Cui et
al., ICML 2023) computes. Errors are relative, |ours - autograd's| / |autograd's|, and all in float64. Memory is the
peak of one call above what was held before it, of a network of full width in float32. Writes `<out>.csv`, `<out>.md`,
`<out>.png` and `<out>.svg`.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ddfast
from bench import facts
from bench.speed.measuring import extra_bytes
from bench.speed.registry import relative_error
from bench.speed.unrolled import differentiate_whole_graph, distance_left
from bench.studies.arguments import told
from bench.studies.charts import COLOURS, FAINT, GRID, figure
from bench.studies.compare import integers
from ddfast.data import open_source
from ddfast.errors import UsageError
from ddfast.files import atomic_write_text, make_folder
from ddfast.progress import say
from ddfast.training.augmentation import normalize
from ddfast.training.image_sets import ImageSet, read_training_set
from ddfast.wording import plural

TITLE = "Error and memory of three ways back through a training"
RATES = (0.01, 0.05)  # of the student, the first that of the memory
HALVES = (0.5,) * 3, (0.5,) * 3  # mean and standard deviation that images are normalised by
WARM_BATCH, WARM_RATE = 128, 0.01  # of the network that makes the trajectory
AUTOGRAD, EXACT, DETACHED = "autograd", "exact", "detached"
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """What was measured of one way back through `steps` steps.

    Attributes:
        way: autograd, exact or detached.
        steps: N.
        rate: of the student.
        error: relative, in float64; None for autograd, which the others are held to.
        bytes: peak memory in float32, at the first of `RATES`; None at the others.
    """

    way: str
    steps: int
    rate: float
    error: float | None
    bytes: int | None


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options of the study."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies unrolled",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="as ddfast distill takes it")
    parser.add_argument("--image-size", type=int, default=32, help="side in pixels")
    parser.add_argument("--steps", type=integers, default=[1, 2, 5, 10, 20, 30, 50], help="N, comma between")
    parser.add_argument("--width", type=int, default=32, help="channels of the network of the errors")
    parser.add_argument("--memory-width", type=int, default=128, help="channels of the network of the memory")
    parser.add_argument("--warm-steps", type=int, default=300, help="of the network, to each of the two ends")
    parser.add_argument("--out", type=Path, default=None, help="results, without ending")
    arguments = parser.parse_args(argv)
    if min(arguments.steps) < 1:
        parser.error(f"--steps must be at least 1, got {min(arguments.steps)}")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Measure, and write table, figure and page."""
    arguments = parse(argv)
    source = open_source(arguments.data, "train")
    images = read_training_set(source, arguments.image_size)
    if not isinstance(images, ImageSet):
        raise UsageError(f"{arguments.data} does not fit in memory at {arguments.image_size} px")
    classes = len(source.class_names)
    torch.manual_seed(0)
    rows = _measured(images, classes, arguments)
    out = arguments.out or facts.RESULTS / "paper" / f"unrolled_{Path(arguments.data).stem}"
    make_folder(out.parent)
    atomic_write_text(out.with_suffix(".csv"), _table(rows))
    draw(out, rows)
    page = _page(rows, arguments, argv, classes, out.with_suffix(".png").name)
    atomic_write_text(out.with_suffix(".md"), page)
    print(page)
    return 0


# Measuring ---------------------------------------------------------------------------------------------------


def _measured(images: ImageSet, classes: int, arguments: argparse.Namespace) -> list[Row]:
    side = arguments.image_size
    narrow, wide = (
        ddfast.create_model("convnet3_in", classes, side, width=width)
        for width in (arguments.width, arguments.memory_width)
    )
    start, goal = _trajectory(narrow, images, arguments.warm_steps)
    narrow.double()
    start, goal = ({name: weight.double() for name, weight in end.items()} for end in (start, goal))
    first = {name: weight.detach() for name, weight in wide.named_parameters()}
    last = {name: weight + 0.01 for name, weight in first.items()}
    pixels, labels = _one_of_each(images, classes)
    rows = []
    for steps in arguments.steps:
        for rate in RATES:
            exactly = [(pixels.double(), labels)] * steps
            wanted = _gradient(AUTOGRAD, narrow, (start, goal), exactly, rate)
            for way in (AUTOGRAD, EXACT, DETACHED):
                error = peak = None
                if way != AUTOGRAD:
                    error = relative_error(_gradient(way, narrow, (start, goal), exactly, rate), wanted)
                if rate == RATES[0]:
                    run = partial(_gradient, way, wide, (first, last), [(pixels, labels)] * steps, rate)
                    peak = extra_bytes(run, torch.device("cpu"))
                rows.append(Row(way, steps, rate, error, peak))
                say(
                    f"{way}, {plural(steps, 'step')} at {rate}: "
                    + ("the reference" if error is None else f"error {error:.1e}")
                    + ("" if peak is None else f", {peak / 2**20:,.0f} MiB")
                )
    return rows


def _trajectory(model: nn.Module, images: ImageSet, steps: int) -> tuple[Weights, Weights]:
    """The weights after `steps` steps of SGD on real images and after as many again."""
    optimizer = torch.optim.SGD(model.parameters(), lr=WARM_RATE)
    ends = []
    for _ in range(2):
        for _ in range(steps):
            rows = torch.randint(len(images), (WARM_BATCH,))
            loss = nn.functional.cross_entropy(model(_normalized(images.images[rows])), images.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
    return ends[0], ends[1]


def _one_of_each(images: ImageSet, classes: int) -> tuple[Tensor, Tensor]:
    """The first image of each class, float32 [C, 3, S, S], and its label."""
    rows = torch.stack([(images.labels == label).nonzero()[0, 0] for label in range(classes)])
    return _normalized(images.images[rows]), images.labels[rows]


def _normalized(images: Tensor) -> Tensor:
    """Not in channels last, in which InstanceNorm is slow on a CPU."""
    return normalize(images, *HALVES).contiguous()


def _gradient(
    way: str,
    model: nn.Module,
    ends: tuple[Weights, Weights],
    batches: Sequence[tuple[Tensor, Tensor]],
    rate: float,
) -> Tensor:
    """That of the distance left, in the images of all batches, [N, B, 3, S, S]."""
    start, goal = ends
    if way == AUTOGRAD:
        return differentiate_whole_graph(model, start, goal, batches, rate)
    found = ddfast.unrolled_gradient(
        model, start, batches, lambda weights: distance_left(weights, start, goal), lr=rate, unroll=way
    )
    return torch.stack([each for each in found.images if each is not None])


# Pages -------------------------------------------------------------------------------------------------------


def _table(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("way", "steps", "rate", "error", "bytes"))
    for row in rows:
        error = "" if row.error is None else f"{row.error:.3e}"
        writer.writerow((row.way, row.steps, row.rate, error, "" if row.bytes is None else row.bytes))
    return text.getvalue()


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Error against the number of steps, on a logarithmic axis, and beside it the memory."""
    with figure(path, 9.6, 3.7, 1, 2) as (errors, memory):
        for way, colour in ((DETACHED, COLOURS[1]), (EXACT, COLOURS[0])):
            for rate, line in zip(RATES, ("-", "--"), strict=True):
                of_way = [row for row in rows if (row.way, row.rate) == (way, rate)]
                x, y = [row.steps for row in of_way], [max(row.error or 0.0, 1e-17) for row in of_way]
                errors.plot(x, y, line, color=colour, marker="o", markersize=4, label=f"rate {rate}")
            _name(errors, way, x[-1], y[-1], colour)
        errors.set_yscale("log")
        handles, labels = errors.get_legend_handles_labels()
        errors.legend(handles[: len(RATES)], labels[: len(RATES)], loc="center", frameon=False, fontsize=8.5)
        errors.set_title("relative error of the gradient", loc="left", fontsize=9.5, color=FAINT)
        ways = ((AUTOGRAD, COLOURS[2], 0), (DETACHED, COLOURS[1], 8), (EXACT, COLOURS[0], -4))
        for way, colour, lift in ways:
            of_way = [row for row in rows if row.way == way and row.bytes is not None]
            x, y = [row.steps for row in of_way], [(row.bytes or 0) / 2**20 for row in of_way]
            memory.plot(x, y, color=colour, marker="o", markersize=4)
            _name(memory, f"{way}, {y[-1]:,.0f}", x[-1], y[-1], colour, lift)
        memory.set_ylim(bottom=0)
        memory.set_title("peak memory, MiB", loc="left", fontsize=9.5, color=FAINT)
        for axis in (errors, memory):
            axis.set_xlabel("steps of the training")
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
            axis.tick_params(length=0)


def _name(axis: Any, text: str, x: float, y: float, colour: str, lift: float = 0) -> None:
    """Beside the last point of a line, `lift` points higher."""
    place = {"xytext": (7, lift), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    axis.annotate(text, (x, y), color=colour, fontsize=8.5, **place)


def _page(
    rows: Sequence[Row], arguments: argparse.Namespace, argv: Sequence[str], classes: int, picture: str
) -> str:
    at = {(row.way, row.steps, row.rate): row for row in rows}
    heads = [f"{way}, rate {rate}" for rate in RATES for way in (DETACHED, EXACT)]
    ways = (AUTOGRAD, DETACHED, EXACT)
    lines = [
        f"# {TITLE}",
        "",
        told("unrolled", argv),
        "The gradient of a student's distance to a trajectory's end in its training images, through N steps of SGD. "
        "Error: relative to autograd's on the graph of all steps, float64. Memory: peak of one call, MiB, float32.",
        "",
        f"![error and memory against the number of steps]({picture})",
        "",
        "| N | "
        + " | ".join(f"error of {head}" for head in heads)
        + " | "
        + " | ".join(f"MiB of {way}" for way in ways)
        + " |",
        "| --- |" + " --- |" * (len(heads) + len(ways)),
    ]
    for steps in arguments.steps:
        errors = [at[way, steps, rate].error for rate in RATES for way in (DETACHED, EXACT)]
        sizes = [at[way, steps, RATES[0]].bytes for way in ways]
        cells = [f"{error:.1e}" if error is not None else "" for error in errors]
        cells += [f"{(size or 0) / 2**20:,.0f}" for size in sizes]
        lines.append(f"| {steps} | {' | '.join(cells)} |")
    commit, changed = facts.commit()
    device = facts.device_name(torch.device("cpu"))
    lines += [
        "",
        f"- errors: ConvNet-3 with InstanceNorm, width {arguments.width}, between its weights after "
        f"{arguments.warm_steps} and {2 * arguments.warm_steps} steps of SGD on real images ({WARM_BATCH} a step, rate "
        f"{WARM_RATE}); a student sees the same {classes} real images, one a class, in each of its steps",
        f"- memory: width {arguments.memory_width}, the same images",
        f"- {device}, {plural(torch.get_num_threads(), 'thread')}; commit {commit}{' and changes' if changed else ''}",
        "",
    ]
    return "\n".join(lines)
