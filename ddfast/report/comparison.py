"""A page that compares distilled arms of the same data: accuracy, images side by side, and how the first one chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddfast.files import atomic_write_bytes, atomic_write_text, make_folder
from ddfast.output.mosaic import PIXELATED_UP_TO
from ddfast.report import contents, samples
from ddfast.report.charts import Bar, bars
from ddfast.report.contents import Fact
from ddfast.report.folder import Folder, read_folder
from ddfast.report.parts import (
    MOSAIC,
    REPORT,
    gallery_note,
    layout_note,
    mosaic_images,
    render,
    source_cards,
)
from ddfast.report.pictures import paired_mosaic_picture, png_bytes

if TYPE_CHECKING:
    from ddfast.data.sources import Source

_MOSAIC_IMAGES = 6  # of a class in each half of mosaic.png


@dataclass(frozen=True)
class Arm:
    """One distilled set in a comparison.

    Attributes:
        name: what it is called on the page.
        folder: the output folder of its distillation.
        top1: test accuracy of each student, in percent; at least one.
        covered: share in [0, 1] of the kept crops that cover the object; None where it is not known.
        note: a few words on how the set was made.
    """

    name: str
    folder: str | Path
    top1: Sequence[float]
    covered: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not len(self.top1):
            raise ValueError(f"arm {self.name!r} needs the accuracy of at least one student")
        if self.covered is not None and not 0 <= self.covered <= 1:
            raise ValueError(f"covered must be a share in [0, 1], got {self.covered}")

    @property
    def bar(self) -> Bar:
        """Its bar, weak."""
        return Bar(self.name, self.top1)


def write_comparison(
    out_dir: str | Path,
    *,
    title: str,
    arms: Sequence[Arm],
    facts: Mapping[str, str],
    source: Source | None = None,
    lead: str = "",
    truth: Mapping[str, Sequence[float]] | None = None,
    reference: tuple[str, float] | None = None,
    bars_note: str = "",
) -> Path:
    """Write `report.html` and `mosaic.png` that compare distilled arms of the same data.

    Args:
        out_dir: folder for both files, made where it is missing.
        title: heading.
        arms: the arms; the first is the one that the page is about, and its sources fill the gallery.
        facts: how it was made, name -> value.
        source: the data's training split, for the gallery. Without it the page says so.
        lead: paragraph below the heading; default: who is ahead, in one sentence.
        truth: box (x0, y0, x1, y1) of the object in a source, by its key, in pixels of the fitted source.
        reference: name and accuracy in percent of a line in the chart, the teacher's for example.
        bars_note: sentence above the chart: students, seeds, labels.

    Returns:
        Path of the page.

    Raises:
        UsageError: a folder is missing or damaged.
        ValueError: fewer than two arms.
    """
    if len(arms) < 2:
        raise ValueError(f"a comparison needs at least two arms, got {len(arms)}")
    folders = [read_folder(arm.folder) for arm in arms]
    main = folders[0]
    mosaics, pictured = [], []
    for arm, folder in zip(arms, folders, strict=True):
        shown, _ = contents.shown_images(folder)
        mosaics.append(
            {"name": arm.name, "note": f"top-1 {_accuracy(arm)}", "rows": mosaic_images(folder, shown)}
        )
        pictured.append(shown)
    explained = samples.explain(main, source, samples.chosen_samples(main))
    column = contents.score_column(main) if main.pixels is None else None
    ranked_by = None if column is None else column.name
    cards = source_cards(explained, main.image_size, truth or {}, ranked_by)
    page = render(
        "comparison.html",
        eyebrow="ddfast · comparison",
        title=title,
        lead=lead or _lead(arms),
        headline=_headline(arms),
        bars=bars([Bar(c.name, c.top1, strong=i == 0) for i, c in enumerate(arms)], reference),
        bars_note=bars_note,
        mosaics=mosaics,
        pixelated=main.image_size <= PIXELATED_UP_TO,
        mosaic_note=layout_note(main),
        cards=cards,
        any_heat=any(card["heat"] for card in cards),
        any_boxes=any(card["boxes"] for card in cards),
        any_truth=bool(truth) and any(card["boxes"] for card in cards),
        gallery_title=f"How {arms[0].name} chose",
        gallery_note=gallery_note(main, cards, ranked_by),
        columns_of_table=["top-1, mean ± deviation", "seeds", "images", "kept crops that cover the object"],
        table=[
            {
                "name": arm.name,
                "note": arm.note,
                "strong": index == 0,
                "values": (
                    f"{arm.bar.mean:.1f}% ± {arm.bar.std:.1f}",
                    len(arm.top1),
                    folder.images,
                    "–" if arm.covered is None else f"{100 * arm.covered:.0f}%",
                ),
            }
            for index, (arm, folder) in enumerate(zip(arms, folders, strict=True))
        ],
        facts=[Fact(name, str(value)) for name, value in facts.items()],
    )
    out = make_folder(out_dir)
    atomic_write_bytes(out / MOSAIC, png_bytes(_side_by_side(arms, folders, pictured)))
    atomic_write_text(out / REPORT, page)
    return out / REPORT


def _accuracy(arm: Arm) -> str:
    return f"{arm.bar.mean:.1f}% ± {arm.bar.std:.1f}"


@dataclass(frozen=True)
class _Headline:
    value: str
    note: str
    strong: bool = False


def _headline(arms: Sequence[Arm]) -> list[_Headline]:
    found = [
        _Headline(f"{arm.bar.mean:.1f}%", f"top-1 of students trained on {arm.name}", index == 0)
        for index, arm in enumerate(arms)
    ]
    if arms[0].covered is not None:
        found.append(
            _Headline(f"{100 * arms[0].covered:.0f}%", f"of the crops {arms[0].name} kept cover the object")
        )
    return found


def _lead(arms: Sequence[Arm]) -> str:
    """Who is ahead, in one sentence."""
    first, others = arms[0], arms[1:]
    best = max(others, key=lambda arm: arm.bar.mean)
    ahead = first.bar.mean - best.bar.mean
    if abs(ahead) < 0.05:
        return f"Students trained on {first.name} and on {best.name} read the test images equally well."
    said = "more" if ahead > 0 else "fewer"
    return (
        f"Students trained on {first.name} read {abs(ahead):.1f} percentage points {said} of the test images "
        f"correctly than those trained on {best.name}."
    )


def _side_by_side(
    arms: Sequence[Arm], folders: Sequence[Folder], pictured: Sequence[list[tuple[str, list[int]]]]
) -> Any:
    """The mosaics of all sets in one picture, each under its name."""
    parts = []
    for arm, folder, shown in zip(arms, folders, pictured, strict=True):
        places = [place for _, row in shown for place in row[:_MOSAIC_IMAGES]]
        labels = [folder.rows[place]["label"] for place in places]
        title = f"{arm.name}   {_accuracy(arm)}"
        parts.append((title, [folder.image(place) for place in places], labels))
    return paired_mosaic_picture(parts, folders[0].class_names)
