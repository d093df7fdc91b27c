"""The paper's Figure 1 on your data: InfoUtil's heatmaps and crops beside RDED's, on the same images.

    python -m bench.studies gallery --data DATA --teacher resnet18.safetensors --out bench/results/paper/gallery

Both methods score a small pool of every class, and both show the same images: the first readable ones of each class by
their ids, which are hashes, so nobody picked them. Writes `<out>.png` and `<out>.md`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import facts
from bench.studies.arguments import study_parser, told
from bench.studies.arms import Arm, Distillation, Setup, teacher_at
from bench.studies.compare import teacher_fact
from bench.studies.teachers import teachers
from ddfast.data import open_source
from ddfast.data.decoding import decode_fit
from ddfast.files import atomic_write_bytes, atomic_write_text, make_folder
from ddfast.methods import get_method
from ddfast.methods.selection.base import Selection, Table
from ddfast.output.table import read_tables, to_numpy
from ddfast.pipeline.plan import read_plan
from ddfast.report.pictures import display_side, heatmap_picture, png_bytes, resized, to_picture

POOL = 8  # sources scored of each class: a gallery shows a few
_PAPER, _INK, _FAINT = (250, 250, 248), (42, 46, 54), (107, 116, 128)
_COLUMNS_OF_CLASSES = 2


@dataclass(frozen=True)
class Reading:
    """What one method makes of one image.

    Attributes:
        boxes: float32 [K, 4], its candidate crops, (x0, y0, x1, y1) in pixels of the fitted image.
        chosen: the one of them that competes for the set.
        phi: float32 [rows, cols], attribution of the grid's cells, or None.
        loss: the teacher's cross-entropy on the chosen crop, in nats.
    """

    boxes: np.ndarray
    chosen: int
    phi: np.ndarray | None
    loss: float


@dataclass(frozen=True)
class Shown:
    """One image of the gallery: uint8 [3, S, S], its class, and both methods' readings."""

    key: str
    class_name: str
    image: Any
    infoutil: Reading
    rded: Reading


def main(argv: Sequence[str]) -> int:
    """Make the gallery."""
    parser = study_parser("gallery", __doc__)
    parser.add_argument("--images", type=int, default=1, help="of each class")
    parser.add_argument("--classes", type=int, default=10, help="classes at most")
    parser.add_argument("--arm", default="infoutil", help="method and options whose crops are shown")
    parser.add_argument("--side", type=int, default=128, help="side of a picture in pixels")
    arguments = parser.parse_args(argv)
    files = teachers(
        arguments.data,
        arguments.teacher,
        arguments.teacher_arch or ["convnet"],
        arguments.work,
        arguments.teacher_epochs,
    )
    setup = Setup(
        arguments.data,
        files[0],
        arguments.work,
        arguments.factor,
        arguments.images_per_class or POOL,
        arguments.precision,
    )
    shown = gather(setup, Arm.parse(arguments.arm), arguments.images, arguments.classes)
    out = arguments.out or facts.RESULTS / "paper" / f"gallery_{Path(arguments.data).stem}"
    make_folder(out.parent)
    atomic_write_bytes(out.with_suffix(".png"), png_bytes(picture(shown, arguments.side)))
    atomic_write_text(out.with_suffix(".md"), _page(shown, setup, arguments, out, argv))
    print(f"{len(shown)} images in {out.with_suffix('.png')}")
    return 0


def gather(setup: Setup, arm: Arm, images: int, classes: int) -> list[Shown]:
    """The first `images` of each of the first `classes`, by id, as both methods read them."""
    mine, theirs = _readings(arm, setup), _readings(Arm.parse("rded"), setup)
    source, size = open_source(setup.data, "train"), teacher_at(setup.teacher).image_size
    found: list[Shown] = []
    taken = dict.fromkeys(range(len(source.class_names)), 0)
    for sample_id in sorted(set(mine) & set(theirs)):
        sample = source.by_id(sample_id)
        if sample.label < classes and taken[sample.label] < images:
            taken[sample.label] += 1
            image = decode_fit(source.read(sample), size)
            name = source.class_names[sample.label]
            found.append(Shown(sample.key, name, image, mine[sample_id], theirs[sample_id]))
    return sorted(found, key=lambda each: each.key)


def _readings(arm: Arm, setup: Setup) -> dict[int, Reading]:
    """Every scored source's crops, and the one that the method's ranking lets compete."""
    folder = Distillation.of(arm, 1, setup).make()
    plan = read_plan(folder)
    assert plan is not None
    columns = to_numpy(read_tables(folder / "scores"))
    options = {**plan["options"]["score"], **plan["options"]["select"]}
    kind = get_method(arm.method)
    assert issubclass(kind, Selection)
    ranked, _ = kind.from_options(options).rank(Table(columns, plan["seed"]), 1)
    found = {}
    for row in np.concatenate(list(ranked.values())).tolist():
        same = np.flatnonzero(columns["sample_id"] == columns["sample_id"][row])
        same = same[np.argsort(columns["crop"][same])]
        phi = max((np.asarray(columns["phi"][one], np.float32) for one in same), key=len)
        side = math.isqrt(phi.size)
        found[int(columns["sample_id"][row])] = Reading(
            columns["box"][same],
            same.tolist().index(row),
            phi.reshape(side, side) if side and side * side == phi.size else None,
            float(columns["loss"][row]),
        )
    return found


def picture(shown: Sequence[Shown], side: int) -> Any:
    """The gallery, classes in two columns: image, heatmap and crops of InfoUtil, its crop; RDED's crops, its crop."""
    from PIL import Image, ImageDraw, ImageFont

    cell = display_side(shown[0].image.shape[-1], side)
    gap, margin, name_height, head = 6, 24, 22, 30
    titles = ("image", "Shapley values", "InfoUtil's crop", "RDED's crops", "RDED's crop")
    columns = min(_COLUMNS_OF_CLASSES, len(shown))
    rows = -(-len(shown) // columns)
    block = len(titles) * cell + (len(titles) - 1) * gap + 2 * gap  # a wider gap before RDED
    width = columns * block + (columns + 1) * margin
    height = head + rows * (cell + name_height + gap) + margin
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    font, small = ImageFont.load_default(14), ImageFont.load_default(13)
    for number, each in enumerate(shown):
        left = margin + (number // rows) * (block + margin)
        top = head + (number % rows) * (cell + name_height + gap)
        places = [left + place * (cell + gap) + (2 * gap if place > 2 else 0) for place in range(len(titles))]
        if number % rows == 0:
            for place, title in zip(places, titles, strict=True):
                draw.text((place + cell / 2, head - 8), title, font=small, fill=_FAINT, anchor="ms")
        for place, drawn in zip(places, _pictures(each, cell), strict=True):
            canvas.paste(drawn, (place, top))
        draw.text((left, top + cell + 3), each.class_name, font=font, fill=_INK)
        for place, reading in ((places[2], each.infoutil), (places[4], each.rded)):
            said = f"loss {reading.loss:.2f}"
            draw.text((place + cell, top + cell + 4), said, font=small, fill=_FAINT, anchor="ra")
    return canvas


def _pictures(each: Shown, cell: int) -> list[Any]:
    ours, theirs = each.infoutil, each.rded
    blank = np.zeros((1, 1))
    whole = to_picture(each.image)
    return [
        resized(whole, cell),
        heatmap_picture(
            each.image,
            blank if ours.phi is None else ours.phi,
            ours.boxes,
            ours.boxes[ours.chosen],
            side=cell,
        ),
        resized(whole.crop(_whole_pixels(ours.boxes[ours.chosen])), cell),
        heatmap_picture(each.image, blank, theirs.boxes, theirs.boxes[theirs.chosen], side=cell),
        resized(whole.crop(_whole_pixels(theirs.boxes[theirs.chosen])), cell),
    ]


def _whole_pixels(box: np.ndarray) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = (round(float(edge)) for edge in box)
    return x0, y0, x1, y1


def _page(
    shown: Sequence[Shown], setup: Setup, arguments: argparse.Namespace, out: Path, argv: Sequence[str]
) -> str:
    files = "".join(f"- {each.key}\n" for each in shown)
    return (
        f"# Heatmaps and crops, InfoUtil beside RDED\n\n![gallery]({out.with_suffix('.png').name})\n\n"
        "Orange cells speak for the class, blue ones against it; thin boxes are the candidates, the thick one competes "
        "for the set; the loss is the teacher's on that crop, in nats. The images are the first of each class by their "
        "ids, which are hashes.\n\n"
        f"- data {Path(setup.data).name}, teacher {teacher_fact(setup.teacher)}, "
        f"{setup.images_per_class} images a class scored\n"
        f"- InfoUtil: `{arguments.arm}`; RDED: `rded`\n\nImages:\n\n{files}\n{told('gallery', argv)}"
    )
