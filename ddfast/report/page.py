"""The report of one distilled set: `report.html` and `mosaic.png` in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddfast.files import atomic_write_bytes, atomic_write_text
from ddfast.output.mosaic import PIXELATED_UP_TO, mosaic_labels, write_mosaic
from ddfast.report import contents, made, samples, students
from ddfast.report.charts import histogram
from ddfast.report.folder import Folder, read_folder, shown_labels
from ddfast.report.parts import (
    MOSAIC,
    REPORT,
    gallery_note,
    layout_note,
    mosaic_images,
    render,
    source_cards,
)
from ddfast.report.pictures import mosaic_picture, png_bytes

if TYPE_CHECKING:
    from ddfast.data.sources import Source
    from ddfast.output.pixels import Pixels


def write_report(run_dir: str | Path, *, source: Source | None = None, title: str | None = None) -> Path:
    """Write `report.html` and `mosaic.png` of a distilled folder.

    The folder needs its images, `train/metadata.jsonl`, `manifest.json`, which may still be incomplete, and
    `selection.parquet` or `pixels.safetensors`; the score table, the soft labels, the curve, `before.png` and
    `evaluations.json` are shown where they stand. The same folder and data give the same bytes. Of a finished synthesis
    the page says how long it took as well.

    Args:
        run_dir: the folder.
        source: the data's training split, for the pictures of sources. Without it, or where a file is gone, the page
            says so in that place.
        title: heading; default: the numbers of images.

    Returns:
        Path of the page.

    Raises:
        UsageError: no such folder, or a part that is missing or damaged.
    """
    folder = read_folder(run_dir)
    if folder.pixels is not None:
        return _write_made(folder, folder.pixels, title)
    shown, note = contents.shown_images(folder)
    places = [place for _, row in shown for place in row]
    picture = mosaic_picture(
        [folder.image(place) for place in places],
        [folder.rows[place]["label"] for place in places],
        folder.class_names,
    )
    column = contents.score_column(folder)
    ranked_by = None if column is None else column.name
    explained = samples.explain(folder, source, samples.chosen_samples(folder))
    cards = source_cards(explained, folder.image_size, ranked_by=ranked_by)
    classes = contents.class_rows(folder)
    plan = folder.manifest
    quarantined = (plan.get("quarantined") or {}).get("files", [])
    page = render(
        "report.html",
        title=title or _heading(folder),
        lead=_lead(folder),
        verdict=students.verdict(folder.root, str(plan["method"])),
        facts=contents.facts(folder),
        pixelated=folder.image_size <= PIXELATED_UP_TO,
        students=students.student_tables(folder.root),
        student_columns=students.COLUMNS,
        mosaic=mosaic_images(folder, shown),
        mosaic_note=" ".join(filter(None, (layout_note(folder), note))),
        cards=cards,
        any_heat=any(card["heat"] for card in cards),
        any_boxes=any(card["boxes"] for card in cards),
        gallery_note=gallery_note(folder, cards, ranked_by),
        histogram=histogram(column.values, column.kept, column.name)
        if column is not None and column.values.size
        else None,
        scored_classes=_scored_classes(len(folder.class_names)),
        candidates=len(column.values) if column is not None else 0,
        kept=len(column.kept) if column is not None else 0,
        classes=classes,
        table_note=_table_note(len(folder.class_names)),
        has_score=any(row.score is not None for row in classes),
        has_read=any(row.read is not None for row in classes),
        has_own=any(row.own is not None for row in classes),
        quarantined=quarantined[: contents.SHOWN_QUARANTINED],
        quarantined_note=_quarantined_note(len(quarantined)),
        settings=contents.settings(folder),
    )
    atomic_write_bytes(folder.root / MOSAIC, png_bytes(picture))
    atomic_write_text(folder.root / REPORT, page)
    return folder.root / REPORT


def _write_made(folder: Folder, pixels: Pixels, title: str | None) -> Path:
    """The report of images that were made, not chosen."""
    shown = made.pairs(folder)
    any_before = any(pair.before for pair in shown)
    heading, before, after = made.headings(folder, any_before)
    quarantined = (folder.manifest.get("quarantined") or {}).get("files", [])
    page = render(
        "made.html",
        title=title or _made_heading(folder),
        lead=_lead(folder),
        verdict=students.verdict(folder.root, str(folder.manifest["method"])),
        facts=made.facts(folder),
        pixelated=folder.image_size <= PIXELATED_UP_TO,
        students=students.student_tables(folder.root),
        student_columns=students.COLUMNS,
        pairs=shown,
        any_before=any_before,
        pairs_heading=heading,
        before_word=before,
        after_word=after,
        images=max((len(pair.after) for pair in shown), default=1),
        pairs_note=made.pairs_note(folder, shown),
        regions=made.regions(folder),
        regions_note=made.regions_note(folder),
        figures=made.figures(folder),
        curve_note=made.curve_note(folder),
        rounding=made.rounding(folder, pixels),
        files=made.files(folder),
        ways=made.ways_to_open(folder, pixels),
        quarantined=quarantined[: contents.SHOWN_QUARANTINED],
        quarantined_note=_quarantined_note(len(quarantined)),
        settings=contents.settings(folder),
    )
    labels = mosaic_labels(len(folder.class_names))
    places = [place for label in labels for place in folder.rows_of(label)[: contents.SHOWN_IMAGES]]
    write_mosaic(
        folder.root / MOSAIC,
        [folder.image(place) for place in places],
        [folder.rows[place]["label"] for place in places],
        folder.class_names,
    )
    atomic_write_text(folder.root / REPORT, page)
    return folder.root / REPORT


def _made_heading(folder: Folder) -> str:
    real = (folder.manifest.get("data") or {}).get("images")
    images = f"{folder.images:,} image{'s' if folder.images != 1 else ''}"
    return f"{images} made from {real:,}" if isinstance(real, int) else f"{images}, made pixel by pixel"


def _heading(folder: Folder) -> str:
    scored = (folder.manifest.get("counts") or {}).get("sources")
    images = f"{folder.images:,} image{'s' if folder.images != 1 else ''}"
    return f"{images} in place of {scored:,}" if scored else f"{images}, distilled"


def _lead(folder: Folder) -> str:
    from ddfast.methods import get_method, list_methods

    method = folder.manifest["method"]
    if method == "infoutil":
        return (
            "Each image was asked where its class shows (Shapley values of a grid of cells under the teacher) and "
            f"cropped there; each class kept {_kept(folder.manifest['options']['select'])} (InfoUtil)."
        )
    if method == "rded":
        return "Random crops on which the teacher is most certain were kept (RDED)."
    if method in ("random", "random_hard"):
        return "Whole images, drawn uniformly from each class: the baseline that every method has to beat."
    if method in list_methods():
        summary = get_method(method).summary
        return f"{summary[0].upper()}{summary[1:]}."
    how = "Optimised" if folder.pixels is not None else "Distilled"
    return f"{how} with the method {method}."


def _kept(select: dict[str, Any]) -> str:
    """Which crops InfoUtil's options of selection keep, in words."""
    if select["rank_by"] == "random":
        return "crops drawn at random"
    if select["rank_by"] == "quantiles":
        return "crops spread over the quantiles of their gradient norms"
    measure = {"grad_norm": "gradient norm", "loss": "loss of the teacher"}[select["rank_by"]]
    return f"the crops with the {'highest' if select['order'] == 'high' else 'lowest'} {measure}"


def _scored_classes(classes: int) -> str:
    """Which classes the histogram counts, where it does not count all."""
    shown = len(shown_labels(classes))
    return "" if shown == classes else f" of {shown} of {classes:,} classes"


def _table_note(classes: int) -> str:
    if classes <= contents.SHOWN_TABLE_ROWS:
        return f"All {classes} classes."
    return f"The first {contents.SHOWN_TABLE_ROWS} of {classes:,} classes."


def _quarantined_note(count: int) -> str:
    said = f"{count:,} file{'s' if count != 1 else ''} could not be read as an image and took no part."
    if count > contents.SHOWN_QUARANTINED:
        said += f" The first {contents.SHOWN_QUARANTINED} are listed; manifest.json has all of them."
    return said
