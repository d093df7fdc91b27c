"""What the pages share: the frame, the mosaic, the cards of sources.

A page is one file. File names, class names and reasons come from other people's data, so nothing of them is trusted:
Jinja escapes every value, and the only markup passed through is built in `charts` from numbers and escaped text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddfast.report.charts import boxes_over, heat_over
from ddfast.report.colours import diverging, hexadecimal, opacity
from ddfast.report.contents import number
from ddfast.report.folder import Folder
from ddfast.report.pictures import data_uri, to_picture
from ddfast.report.samples import Explained
from ddfast.version import __version__

REPORT = "report.html"
MOSAIC = "mosaic.png"
_WIDE = 1400  # pixels of a page in a wide window, which a row of images shares
_CELL = (128, 320)  # least and most pixels a side that a large distilled image is stored with
_RAMP_STOPS = 17


def layout_note(folder: Folder) -> str:
    """How the mosaic is laid out, in a sentence."""
    if folder.factor == 1:
        return "One row a class."
    if folder.pixels is not None:
        return f"One row a class; every image holds {folder.tiles} tiles that students see as whole images."
    return f"One row a class; every image holds {folder.tiles} tiles, each from another source."


def gallery_note(folder: Folder, cards: Sequence[Mapping[str, Any]], ranked_by: str | None = None) -> str:
    """What the gallery shows, in a few sentences; `cards` are those of `source_cards`."""
    said = f"A fixed sample: {len(cards)} of the {folder.images * folder.tiles:,} kept crops."
    if all(card["boxes"] is None for card in cards) and cards:
        return f"{said} Sources are not shown: {cards[0]['reason']}."
    if ranked_by is not None and ranked_by != "score":
        said += f" Beside the class stands what it was ranked by: {ranked_by}."
    if folder.soft_labels is not None:
        said += (
            f" The bars are the tile's soft label at T = {folder.soft_labels.temperature:g}, the teacher's largest "
            "probabilities, all on one scale from 0 to 1."
        )
    return said


def cell_side(images: int) -> int:
    """Longest side in pixels that is stored of an image of which so many share a row."""
    least, most = _CELL
    return min(max(_WIDE // max(images, 1), least), most)


def mosaic_images(folder: Folder, shown: Sequence[tuple[str, list[int]]]) -> list[tuple[str, list[str]]]:
    """Rows of (class name, data URIs) from rows of (class name, places in `folder.rows`)."""

    side = cell_side(max((len(places) for _, places in shown), default=1))

    def uri(place: int) -> str:
        return data_uri(to_picture(folder.image(place)), side)

    return [(name, [uri(place) for place in places]) for name, places in shown]


def source_cards(
    explained: Sequence[Explained],
    size: int,
    truth: Mapping[str, Sequence[float]] | None = None,
    ranked_by: str | None = None,
) -> list[dict[str, Any]]:
    """What the template shows of each sampled source; `ranked_by` says what its score is, as `ScoreColumn.name`."""
    word = (ranked_by or "score").split(",")[0].removesuffix(" of the teacher's loss")
    cards = []
    for one in explained:
        boxes = heat = None
        if one.source is not None:
            uri = data_uri(to_picture(one.source))
            boxes = boxes_over(uri, size, one.boxes, one.chosen, (truth or {}).get(one.selected.key))
            if one.phi is not None:
                heat = heat_over(uri, size, one.phi, None if one.chosen is None else one.boxes[one.chosen])
        score = one.selected.score
        if score is not None and word == "teacher's loss":  # it ranks by its negative
            score = abs(score)
        cards.append(
            {
                "title": one.class_name,
                "score": None if score is None else number(score),
                "score_name": word,
                "file": one.selected.key,
                "reason": one.reason,
                "boxes": boxes,
                "heat": heat,
                "tile": data_uri(to_picture(one.tile), _CELL[0]),
                "measured": [(name, value) for name, value in one.measured if name != word or score is None],
                "labels": [(n, share, n == one.class_name) for n, share in one.labels],
            }
        )
    return cards


def render(template: str, **values: Any) -> str:
    """A page from a template beside this file; every value is escaped unless it is markup of `charts`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        number=number,
        version=__version__,
        ramp=_ramp(),
        columns=lambda rows: max((len(images) for _, images in rows), default=1),
        style=_style(here / "page.css"),
    )
    return environment.get_template(template).render(**values) + "\n"


def _style(path: Path) -> Any:
    from markupsafe import Markup

    return Markup(path.read_text("utf-8"))


def _ramp() -> str:
    """CSS colour stops of the attribution's colours, from -1 to 1, as opaque as they are over a picture."""
    stops = []
    for stop in range(_RAMP_STOPS):
        value = -1 + 2 * stop / (_RAMP_STOPS - 1)
        stops.append(f"{hexadecimal(diverging(value))}{round(255 * float(opacity(value))):02x}")
    return ", ".join(stops)
