"""Charts as inline SVG: they take their colours and fonts from the page, so they follow its theme.

Places along a chart are percents of its width, all else is in pixels: text has the same size in every window.
Every function returns markup that is safe to place in a page: all text in it is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike, NDArray

from ddfast.report.colours import diverging, hexadecimal, opacity, scaled
from ddfast.report.contents import number

_BINS = 32
_HEAVY_TAIL = 30.0  # ratio of the 99th to the 10th percentile above which a positive axis is logarithmic


def histogram(values: ArrayLike, kept: ArrayLike, title: str) -> Markup:
    """Distribution of a score over all candidates, and of the kept ones in front of it.

    Both are drawn as shares of their own number, so that a few kept crops show beside many candidates. The axis is
    logarithmic where all values are positive and spread widely.

    Args:
        values: scores of all candidates, finite.
        kept: scores of the kept crops, finite.
        title: what the score is; it stands under the axis.
    """
    everything, chosen = np.asarray(values, np.float64), np.asarray(kept, np.float64)
    logarithmic = bool(everything.min() > 0) and _spread(everything) > _HEAVY_TAIL
    both = np.concatenate((everything, chosen))
    low, high = float(both.min()), float(both.max())
    if logarithmic:
        low = max(low, float(np.quantile(everything, 0.002)))
        edges = np.geomspace(low, high, _BINS + 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    height, bottom = 190, 30
    step = 100 / _BINS
    shares = [_shares(numbers, edges) for numbers in (everything, chosen)]
    tallest = max(float(share.max()) for share in shares)
    base = height - bottom
    parts = [f'<line class="axis" x1="0" x2="100%" y1="{base}" y2="{base}"/>']
    for share, kind, inset in ((shares[0], "all", 0.02 * step), (shares[1], "kept", 0.22 * step)):
        for index, value in enumerate(share):
            tall = (base - 8) * float(value) / tallest
            if tall > 0:
                parts.append(
                    f'<rect class="{kind}" x="{index * step + inset:.2f}%" y="{base - tall:.1f}" '
                    f'width="{step - 2 * inset:.2f}%" height="{tall:.1f}" rx="1.5"/>'
                )
    for index in range(0, _BINS + 1, _BINS // 4):
        anchor = "start" if index == 0 else "end" if index == _BINS else "middle"
        parts.append(
            f'<text x="{index * step:g}%" y="{base + 20}" text-anchor="{anchor}">{number(edges[index])}</text>'
        )
    label = f"{title}, logarithmic axis" if logarithmic else title
    return Markup(
        f'<svg class="chart" height="{height}" role="img" aria-label="Histogram: {escape(label)}">'
        + "".join(parts)
        + f'</svg><p class="axis-title">{escape(label)}</p>'
    )


def _spread(values: NDArray[np.float64]) -> float:
    low, high = np.quantile(values, (0.1, 0.99))
    return float(high / low) if low > 0 else math.inf


def _shares(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return counts / max(1, len(values))


@dataclass(frozen=True)
class Bar:
    """One bar of a comparison: `values` in percent, one a seed; `strong` for the one that the page is about."""

    name: str
    values: Sequence[float]
    strong: bool = False

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        """Sample deviation over the seeds; 0 for one seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0


def bars(rows: Sequence[Bar], reference: tuple[str, float] | None = None) -> Markup:
    """Horizontal bars from 0 to 100 percent, with a whisker of one deviation and a dot for every seed.

    Args:
        rows: from top to bottom.
        reference: name and value of a dashed line, the teacher's accuracy for example.
    """
    row, top = 64, 28 if reference is not None else 6
    height = top + row * len(rows) + 26

    def x(value: float) -> str:
        return f"{min(max(value, 0), 100):.2f}%"

    base = height - 26
    parts = []
    for tick in (0, 25, 50, 75, 100):
        anchor = "start" if tick == 0 else "end" if tick == 100 else "middle"
        parts.append(
            f'<line class="grid" x1="{tick}%" x2="{tick}%" y1="{top}" y2="{base}"/>'
            f'<text class="tick" x="{tick}%" y="{base + 20}" text-anchor="{anchor}">{tick}%</text>'
        )
    if reference is not None:
        place = x(reference[1])
        left = reference[1] < 50  # where there is more room beside the line
        parts.append(
            f'<line class="reference" x1="{place}" x2="{place}" y1="{top - 8}" y2="{base}"/>'
            f'<text class="tick" x="{place}" dx="{5 if left else -5}" y="{top - 11}" '
            f'text-anchor="{"start" if left else "end"}">{escape(reference[0])} {reference[1]:.1f}%</text>'
        )
    for index, bar in enumerate(rows):
        line, middle = top + row * index + 20, top + row * index + 42
        kind = "bar strong" if bar.strong else "bar"
        deviation = f'<tspan class="deviation"> ± {bar.std:.1f}</tspan>' if len(bar.values) > 1 else ""
        parts.append(
            f'<text class="name" x="6" y="{line}">{escape(bar.name)}'
            f'<tspan class="value" dx="12">{bar.mean:.1f}%{deviation}</tspan></text>'
            f'<rect class="{kind}" x="0" y="{middle - 12}" width="{x(bar.mean)}" height="24" rx="4"/>'
        )
        if bar.std:
            a, b = x(bar.mean - bar.std), x(bar.mean + bar.std)
            parts.append(
                f'<g class="whisker"><line x1="{a}" x2="{b}" y1="{middle}" y2="{middle}"/>'
                f'<line x1="{a}" x2="{a}" y1="{middle - 5}" y2="{middle + 5}"/>'
                f'<line x1="{b}" x2="{b}" y1="{middle - 5}" y2="{middle + 5}"/></g>'
            )
        parts += [f'<circle class="seed" cx="{x(value)}" cy="{middle}" r="3"/>' for value in bar.values]
    said = "; ".join(f"{bar.name} {bar.mean:.1f} ± {bar.std:.1f} percent" for bar in rows)
    return Markup(
        f'<svg class="chart bars" height="{height}" role="img" aria-label="{escape(said)}">'
        + "".join(parts)
        + "</svg>"
    )


def boxes_over(
    image_uri: str,
    size: int,
    boxes: Sequence[Sequence[float]],
    chosen: int | None,
    truth: Sequence[float] | None = None,
) -> Markup:
    """A picture with candidate crops over it: thin the others, thick the chosen one, dashed the known object.

    Args:
        image_uri: data URI of a square picture.
        size: side of the fitted source in pixels: the unit of the boxes.
        boxes: (x0, y0, x1, y1).
        chosen: index into `boxes`.
        truth: box of the object, where the data set knows it.
    """
    parts = [f'<image href="{escape(image_uri)}" width="{size}" height="{size}" preserveAspectRatio="none"/>']
    seen: dict[tuple[float, ...], int] = {}
    for index, box in enumerate(boxes):
        if index == chosen:
            continue
        # Equal boxes would hide one another: each further one is drawn a little inside the one before.
        inset = 0.012 * size * seen.get(tuple(box), 0)
        seen[tuple(box)] = seen.get(tuple(box), 0) + 1
        parts.append(_box(box, "other", inset))
    if truth is not None:
        parts.append(_box(truth, "truth"))
    if chosen is not None:
        parts.append(
            _box(boxes[chosen], "shadow", 0.012 * size) + _box(boxes[chosen], "chosen", 0.012 * size)
        )
    return _panel(parts, size, f"source with {len(boxes)} candidate crop{'s' if len(boxes) != 1 else ''}")


def heat_over(
    image_uri: str, size: int, phi: NDArray[np.float64], box: Sequence[float] | None = None
) -> Markup:
    """A picture in grey with its attribution over it, cell by cell; a cell's number stands in its tooltip.

    Args:
        image_uri: data URI of a square picture.
        size: side of the fitted source in pixels.
        phi: attributions [rows, cols]; the largest magnitude takes the strongest colour.
        box: the chosen crop.
    """
    rows, columns = phi.shape
    values = scaled(phi)
    parts = [
        f'<image class="grey" href="{escape(image_uri)}" width="{size}" height="{size}" preserveAspectRatio="none"/>'
    ]
    for r in range(rows):
        for c in range(columns):
            top, bottom = r * size // rows, (r + 1) * size // rows
            left, right = c * size // columns, (c + 1) * size // columns
            fill = hexadecimal(diverging(values[r, c]))
            parts.append(
                f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="{fill}" '
                f'fill-opacity="{float(opacity(values[r, c])):.2f}"><title>φ = {phi[r, c]:+.3g}</title></rect>'
            )
    if box is not None:
        parts.append(_box(box, "shadow", 0.012 * size) + _box(box, "chosen", 0.012 * size))
    return _panel(parts, size, "attribution of the source's cells")


def _box(box: Sequence[float], kind: str, inset: float = 0.0) -> str:
    x0, y0, x1, y1 = box
    return (
        f'<rect class="box {kind}" x="{x0 + inset:.2f}" y="{y0 + inset:.2f}" '
        f'width="{max(x1 - x0 - 2 * inset, 0):.2f}" height="{max(y1 - y0 - 2 * inset, 0):.2f}"/>'
    )


def _panel(parts: Sequence[str], size: int, said: str) -> Markup:
    return Markup(
        f'<svg class="panel" viewBox="0 0 {size} {size}" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'
    )
