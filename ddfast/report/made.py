"""What a report shows of images that were made: before and after, the curve, what 8 bits cost, how to open them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from ddfast.methods.diffusion.igds import default_beta
from ddfast.output.distilled import MANIFEST, METADATA, SOFT_LABELS
from ddfast.output.mosaic import mosaic_labels, read_mosaic, to_picture
from ddfast.output.pixels import BEFORE, CURVE_TABLE, PIXELS, Pixels, read_curve, to_unit
from ddfast.output.whitening import read_whitening
from ddfast.report.charts import Bar, bars
from ddfast.report.contents import Fact, number
from ddfast.report.curves import Line, line_chart, line_of
from ddfast.report.folder import Folder
from ddfast.report.parts import cell_side
from ddfast.report.pictures import data_uri
from ddfast.report.regions import regions_picture

_REGIONS_SIDE = 128  # pixels of an image whose regions are drawn
_SHOWN = 6  # images of a class before and after
_LEVEL = 1 / 255
_NOISE = 1e-3  # grey levels; float32 leaves [0, 1] by less than that without meaning it


# Facts -------------------------------------------------------------------------------------------------------


def facts(folder: Folder) -> list[Fact]:
    """The run in a handful of numbers; of what its settings do not name nothing is said."""
    plan, chosen = folder.manifest, _options(folder)
    classes = len(folder.class_names)
    preset = f"preset {plan['preset']}" if plan.get("preset") else "default settings"
    decoded = "stored as float32"
    if folder.factor > 1:
        decoded = (
            f"{folder.tiles} samples in each"
            if is_sampled(folder)
            else f"decoded to {folder.tiles} images each"
        )
    found = [
        Fact(
            "Method",
            str(plan["method"]).upper() if len(str(plan["method"])) < 5 else str(plan["method"]),
            preset,
        ),
        Fact("Images", f"{folder.images:,}", f"{plan['ipc']} per class × {classes} classes"),
        Fact("Image size", f"{folder.image_size} px", decoded),
    ]
    if chosen.get("iterations") is not None:
        start = {"real": "from real images", "noise": "from noise", "mix": "from mixed real images"}
        found.append(Fact("Iterations", _said(chosen["iterations"]), start.get(str(chosen.get("init")), "")))
    found += _sampler(plan, chosen)
    if chosen.get("real_batch") is not None:
        found.append(Fact("Real batch", _said(chosen["real_batch"]), "images per class and iteration"))
    if chosen.get("cmi"):
        found.append(Fact("CMI λ", f"{chosen['cmi']:g}", _proxies(plan, chosen)))
    elif chosen.get("cmi_ratio"):
        found.append(Fact("CMI's first gradient", f"{chosen['cmi_ratio']:g}", "of the loss's"))
    if chosen.get("cfc"):
        found.append(Fact("CFC weight", f"{chosen['cfc']:g}", "features of classes kept apart"))
    if folder.pixels is not None and folder.pixels.regions is not None:
        held = folder.pixels.regions
        found.append(
            Fact(
                "Regions",
                str(held.chosen.shape[1]),
                f"of {len(held.windows)} beside each image, for students",
            )
        )
    if plan.get("teacher"):
        top1 = plan["teacher"].get("top1")
        found.append(
            Fact(
                "Teacher", str(plan["teacher"].get("arch")), f"{top1:.1f}% top-1" if top1 is not None else ""
            )
        )
    if plan.get("seed") is not None:
        found.append(Fact("Seed", str(plan["seed"])))
    return found


def is_sampled(folder: Folder) -> bool:
    """Whether the images were sampled from a prior, not optimised from a start."""
    return "prior" in (folder.manifest.get("inputs") or {})


def _sampler(plan: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[Fact]:
    """What sampled the images, and what guided it."""
    if chosen.get("steps") is None:
        return []
    held = plan.get("inputs") or {}
    kind = str((held.get("prior") or {}).get("kind", "")).removesuffix("Pipeline")
    found = [Fact("Steps", _said(chosen["steps"]), f"of the sampler, {kind}" if kind else "of the sampler")]
    estimator = held.get("estimator") or {}
    if estimator:
        top1 = estimator.get("top1")
        reached = f"linear top-1 {top1:.1f}%" if isinstance(top1, (int, float)) else ""
        found.append(Fact("Estimator", str(estimator.get("arch")), reached))
    if chosen.get("eta") is not None:
        beta = f"{default_beta(int(plan['ipc'])) if chosen.get('beta') is None else chosen['beta']:g}"
        found.append(Fact("Guidance η", f"{chosen['eta']:g}", f"by {chosen.get('eta_schedule')}, β {beta}"))
    return found


def _options(folder: Folder) -> dict[str, Any]:
    found = (folder.manifest.get("options") or {}).get("synthesize")
    return found if isinstance(found, dict) else {}


def _said(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _proxies(plan: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """Whose features the CMI is of, in words."""
    held = (plan.get("inputs") or {}).get("proxies")
    count = len(held) if isinstance(held, (list, dict)) else held if isinstance(held, int) else None
    words = [] if count is None else [f"{count} {'proxy' if count == 1 else 'proxies'}"]
    arch = chosen.get("proxy_arch")
    if arch:
        words.append(str(arch))
    every = chosen.get("cmi_every")
    if isinstance(every, int) and every > 1:
        words.append(f"every {every} iterations")
    return ", ".join(words)


# Before and after --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassPair:
    """One class before and after: data URIs."""

    name: str
    before: list[str]
    after: list[str]


def pairs(folder: Folder) -> list[ClassPair]:
    """The first images of the classes that the mosaics show; without `before.png` the later ones alone."""
    begun = read_mosaic(folder.root / BEFORE)
    most = max(
        (len(folder.rows_of(label)[:_SHOWN]) for label in mosaic_labels(len(folder.class_names))), default=1
    )
    side = cell_side(most * (2 if begun else 1))
    found = []
    for label in mosaic_labels(len(folder.class_names)):
        places = folder.rows_of(label)[:_SHOWN]
        if places:
            found.append(
                ClassPair(
                    folder.class_names[label],
                    [data_uri(to_picture(image), side) for image in begun.get(label, [])[:_SHOWN]],
                    [data_uri(to_picture(folder.image(place)), side) for place in places],
                )
            )
    return found


def pairs_note(folder: Folder, shown: Sequence[ClassPair]) -> str:
    """What is shown, in a sentence or two."""
    start = {
        "real": "Real images are where it began.",
        "noise": "Noise is where it began.",
        "mix": "Mixed real images are where it began.",
    }
    said = []
    if is_sampled(folder):
        if any(pair.before for pair in shown):
            said.append(
                "Of each class come the samples without guidance, then those of the same noise with it."
            )
        if folder.factor > 1:
            said.append(f"Every image is composed of {folder.tiles} samples at half their size.")
    elif any(pair.before for pair in shown):
        said.append(start.get(str(_options(folder).get("init")), ""))
        said.append("Of each class come the images before, then the same ones after.")
    if folder.factor > 1 and not is_sampled(folder):
        said.append(f"Every image is stored as {folder.tiles} tiles; students see each as a whole image.")
    left_out = []
    if len(shown) < len(folder.class_names):
        left_out.append(f"{len(shown)} of {len(folder.class_names)} classes")
    most = max((len(folder.rows_of(label)) for label in mosaic_labels(len(folder.class_names))), default=0)
    if most > _SHOWN:
        left_out.append(f"the first {_SHOWN} of {most} images of each")
    if left_out:
        said.append(f"Shown: {', '.join(left_out)}.")
    return " ".join(filter(None, said))


@dataclass(frozen=True)
class ClassRegions:
    """The images of one class with their regions outlined: data URIs."""

    name: str
    images: list[str]


def regions(folder: Folder) -> list[ClassRegions]:
    """The first images of the shown classes with the regions that students see; none where they see none."""
    held = None if folder.pixels is None else folder.pixels.regions
    if held is None or folder.pixels is None:
        return []
    places_of: dict[int, list[int]] = defaultdict(list)
    for place, label in enumerate(folder.pixels.labels.tolist()):
        places_of[label].append(place)
    found = []
    for label in mosaic_labels(len(folder.class_names)):
        rows = zip(folder.rows_of(label)[:_SHOWN], places_of[label], strict=False)
        drawn = [
            data_uri(regions_picture(folder.image(row), held.windows[held.chosen[place]], side=_REGIONS_SIDE))
            for row, place in rows
        ]
        if drawn:
            found.append(ClassRegions(folder.class_names[label], drawn))
    return found


def regions_note(folder: Folder) -> str:
    """What chose the regions, and what becomes of them."""
    said = folder.manifest.get("regions")
    by = f" Chosen by {said['chosen_by']}." if isinstance(said, dict) and said.get("chosen_by") else ""
    return (
        "Each outlined region is enlarged to a whole image and joins the image in training; a colour for each size."
        + by
    )


# The curve ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One chart: its title, where it went, the chart, its lines' names where there are several, and a note."""

    title: str
    change: str
    chart: Markup
    legend: list[str]
    note: str


def figures(folder: Folder) -> list[Figure]:
    """A chart of everything that was measured while the images were made; none where there is no curve."""
    if not (folder.root / CURVE_TABLE).is_file():
        return []
    rows = read_curve(folder.root)

    def line(name: str, value: Callable[[dict[str, float]], float | None], scale: float = 1.0) -> Line | None:
        by_group: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            found = value(row)
            if found is not None:
                by_group[int(row["group"])].append((row["step"], scale * found))
        return line_of(name, by_group)

    def column(name: str) -> Callable[[dict[str, float]], float | None]:
        return lambda row: row.get(name)

    sampled = is_sampled(folder)
    of_loss = line("of the information" if sampled else "of the loss", column("gradient_norm"))
    of_cmi = line("of λ · CMI", column("cmi_gradient_norm"))
    of_cfc = line("of CFC, weighted", column("cfc_gradient_norm"))
    wanted: list[tuple[str, list[Line | None], str, bool]] = [
        ("Loss", [] if sampled else [line("loss", column("loss"))], "", False),
        (
            "I(X; Y), nats",
            [line("guided", column("information")), line("unguided", column("unguided_information"))],
            "Prototype information: how plain the classes are to the estimator, a bound from below.",
            False,
        ),
        (
            "H(X | Y), nats",
            [line("guided", column("context")), line("unguided", column("unguided_context"))],
            "Contextual information: how far the samples of a class differ, a bound from below.",
            False,
        ),
        (
            "What guidance moves",
            [line("share", column("moved"), 100)],
            "Its length over that of the sampler's whole step.",
            True,
        ),
        (
            "CMI, nats",
            [line("CMI", column("cmi"))],
            "Of the proxy's features, before it is weighted by λ.",
            False,
        ),
        (
            "Gradient in the samples" if sampled else "Gradient in the pixels",
            [of_loss, of_cmi] if of_cmi is not None or of_cfc is None else [],
            "Euclidean norms.",
            False,
        ),
        (
            "Gradient in the pixels, and CFC's",
            [of_loss, of_cfc] if of_cfc is not None else [],
            "Euclidean norms.",
            False,
        ),
        (
            "CMI's share of the gradient",
            [line("share", _share, 100)],
            "Norm of CMI's part over the sum of both norms.",
            True,
        ),
        (
            "CFC",
            [line("CFC", column("cfc"))],
            "Category-wise feature contrastive loss, summed over classes, before it is weighted.",
            False,
        ),
        (
            "Pixel variance",
            [line("variance", lambda row: row.get("pixel_variance") or None)],  # of one image it is 0
            "Over the images of a class, mean over pixels and classes.",
            False,
        ),
        (
            "Test accuracy",
            [line("accuracy", column("accuracy"))],
            "Of students trained on the images of that step.",
            True,
        ),
    ]
    return [
        _figure(title, [one for one in lines if one is not None], note, percent)
        for title, lines, note, percent in wanted
        if any(one is not None for one in lines)
    ]


def _share(row: dict[str, float]) -> float | None:
    own, cmi = row.get("gradient_norm"), row.get("cmi_gradient_norm")
    return cmi / (own + cmi) if own is not None and cmi is not None and own + cmi > 0 else None


def _figure(title: str, lines: list[Line], note: str, percent: bool) -> Figure:
    first = lines[0]
    unit = "%" if percent else ""
    start, end = (number(float(value)) + unit for value in (first.mean[0], first.mean[-1]))
    return Figure(
        title=title,
        change=f"from {start} to {end}" if len(first.mean) > 1 else end,
        chart=line_chart(lines, title, percent=percent),
        legend=[line.name for line in lines] if len(lines) > 1 else [],
        note=note,
    )


def curve_note(folder: Folder) -> str:
    """How the charts are to be read."""
    if not (folder.root / CURVE_TABLE).is_file():
        return ""
    rows = read_curve(folder.root)
    groups = len({row["group"] for row in rows})
    steps = sorted({row["step"] for row in rows})
    said = []
    if groups > 1:
        said.append(
            f"Lines are means over {groups} groups of classes, the bands reach from the lowest to the highest group."
        )
    one = line_of("", {0: [(step, 0.0) for step in steps]})
    if one is not None and one.averaged > 1:
        said.append(f"Where all {len(steps):,} steps were measured, a point is the mean of {one.averaged}.")
    return " ".join(said)


# Eight bits --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounding:
    """What 8 bits change, as (name, value, note), and in accuracy where it was measured."""

    facts: list[Fact]
    chart: Markup | None
    note: str


def rounding(folder: Folder, pixels: Pixels) -> Rounding:
    """What the PNGs lose against the pixels."""
    largest, mean, outside, total = _lost(folder, pixels)
    share = 100 * outside / total
    found = [
        Fact("Largest change", f"{number(largest)}", "grey levels of 255"),
        Fact("Mean change", f"{number(mean)}", "grey levels of 255"),
        Fact(
            "Outside [0, 1]",
            f"{share:.1f}%" if share >= 0.05 or not outside else f"{outside:,}",
            f"{outside:,} of {total:,} pixel values, clamped"
            if outside
            else "no pixel value had to be clamped",
        ),
    ]
    measured = folder.manifest.get("accuracy")
    rows = []
    if isinstance(measured, dict):
        for key, name in (("float32", "Pixels, float32"), ("8 bits", "The same images in 8 bits")):
            values = _accuracies(measured.get(key))
            if values:
                rows.append(Bar(name, values, strong=key == "float32"))
    if len(rows) < 2:
        return Rounding(found, None, "Students train on pixels.safetensors; the PNGs are for people.")
    lost = rows[0].mean - rows[1].mean
    how = "cost nothing" if abs(lost) < 0.05 else f"{'cost' if lost > 0 else 'gained'} {abs(lost):.1f} points"
    assert isinstance(measured, dict)
    note = f"Rounding {how} of test accuracy. {_students(measured['float32'])}"
    return Rounding(found, bars(rows), note.strip())


def _accuracies(found: Any) -> list[float]:
    """Test accuracies in percent of an evaluation: of each student, or their mean."""
    if not isinstance(found, dict):
        return []
    values = found.get("top1", found.get("mean"))
    values = values if isinstance(values, list) else [values]
    good = [float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    return good if len(good) == len(values) else []


def _students(found: Mapping[str, Any]) -> str:
    """Who was trained, and how, in a sentence; "" where it is not said."""
    parts = []
    if found.get("protocol"):
        parts.append(f"protocol {found['protocol']}")
    if found.get("epochs"):
        parts.append(f"{found['epochs']:,} epochs")
    if isinstance(found.get("seeds"), list):
        count = len(found["seeds"])
        parts.append(f"{count} student{'s' if count != 1 else ''} each")
    if not found.get("arch"):
        return ""
    return f"Students: {', '.join([str(found['arch']), *parts])}."


def _lost(folder: Folder, pixels: Pixels) -> tuple[float, float, int, int]:
    """Largest and mean absolute change in grey levels, values outside of [0, 1], and how many there are."""
    largest, total, outside, count = 0.0, 0.0, 0, 0
    whitening = read_whitening(folder.root)
    for part in pixels.images.split(256):
        unit = (
            to_unit(part, folder.manifest["mean"], folder.manifest["std"], pixels.space)
            if whitening is None
            else whitening.undone(part)
        )
        values: NDArray[np.float64] = unit.numpy().astype(np.float64)
        levels = 255 * values
        change = np.abs(levels - np.clip(np.rint(levels), 0, 255))
        largest, total = max(largest, float(change.max())), total + float(change.sum())
        outside += int(((levels < -_NOISE) | (levels > 255 + _NOISE)).sum())
        count += levels.size
    return largest, total / count, outside, count


# Files -------------------------------------------------------------------------------------------------------

_FILES = {
    PIXELS: "what students train on: images float32 [N, 3, H, W] and labels int64 [N]",
    SOFT_LABELS: "the teacher's probabilities of every image, or of every tile of it",
    "train": "the images in 8 bits, a folder a class",
    METADATA: "file name and label of every image, in the order of the pixels",
    CURVE_TABLE: "what was measured, by group of classes and step",
    BEFORE: "the images of the start",
    "mosaic.png": "the images of the end",
    MANIFEST: "every setting, and what decided the arithmetic",
    "run.json": "how long it took, and on which machine",
    "evaluations.json": "how students did that were trained on it",
}


def files(folder: Folder) -> list[tuple[str, str]]:
    """(name, what it is) of the files that are there; the mosaic is about to be."""
    names = {**_FILES, BEFORE: "the same noise without guidance"} if is_sampled(folder) else _FILES
    return [
        (name + "/" if (folder.root / name).is_dir() else name, said)
        for name, said in names.items()
        if name == "mosaic.png" or (folder.root / name).exists()
    ]


def _students_of(folder: Folder) -> str:
    """Arguments of an evaluation that suits the set: by its method's own protocol, or by RDED's where it has labels."""
    from ddfast.methods import get_method, list_methods

    method, hard = folder.manifest["method"], folder.soft_labels is None
    teacher = folder.manifest.get("teacher")
    arch = "convnet3_in" if teacher is None else teacher["arch"]
    own = get_method(method).protocol if method in list_methods() else "dsa"  # of another version's method
    return f"--arch {arch} --protocol {own if hard else 'rded'}"


def headings(folder: Folder, any_before: bool) -> tuple[str, str, str]:
    """The title above the images, and what stands above those before and those after."""
    if is_sampled(folder):
        return "Unguided and guided" if any_before else "The distilled images", "unguided", "guided"
    return "Before and after" if any_before else "The distilled images", "before", "after"


def ways_to_open(folder: Folder, pixels: Pixels) -> list[tuple[str, str]]:
    """(title, code) for those who train on the set."""
    into = "" if pixels.space == "normalized" else f"  # in [0, 1]: normalise with {MANIFEST}'s mean and std"
    return [
        (
            "PyTorch",
            'import ddfast\n\nset = ddfast.DistilledSet("distilled")\n'
            f"images, labels = set.pixels.images, set.pixels.labels{into}",
        ),
        (
            "safetensors alone",
            'from safetensors.torch import load_file\n\ntensors = load_file("distilled/pixels.safetensors")\n'
            'images, labels = tensors["images"], tensors["labels"]',
        ),
        (
            "Hugging Face datasets, 8 bits",
            "from datasets import load_dataset\n\n"
            'set = load_dataset(\n    "imagefolder", data_dir="distilled", split="train"\n)',
        ),
        (
            "Evaluate it",
            "ddfast evaluate --distilled distilled --data DATA \\\n    " + _students_of(folder) + "\n"
            "# the same on the PNGs: add --rounded",
        ),
    ]
