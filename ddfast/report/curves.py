"""Line charts as inline SVG, in the colours of the page; see `charts`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from ddfast.report.contents import number

_POINTS = 160  # of a line at most; more steps than that are averaged
_WIDE = 30.0  # ratio of the largest to the smallest value above which a positive axis is logarithmic
_DOTS = 24  # points up to which each is marked


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: in the legend, where there are several.
        steps: float64 [M], ascending.
        mean: float64 [M], over the groups and over the steps that a point stands for.
        low: float64 [M], of the group whose mean is lowest there.
        high: float64 [M], of the highest.
        groups: how many there are.
        averaged: steps that a point stands for.
        first: the first step that was measured.
        last: the last one.
    """

    name: str
    steps: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    groups: int
    averaged: int
    first: float
    last: float


def line_of(name: str, by_group: Mapping[int, Sequence[tuple[float, float]]]) -> Line | None:
    """The mean over groups of what was measured, and its spread; None where nothing was.

    Args:
        name: of the line.
        by_group: (step, value) of every group, ascending by step.
    """
    measured = {group: points for group, points in by_group.items() if points}
    steps = sorted({step for points in measured.values() for step, _ in points})
    if not steps:
        return None
    each = -(-len(steps) // _POINTS)
    place = {step: index // each for index, step in enumerate(steps)}
    count = place[steps[-1]] + 1
    sums, counts = np.zeros((len(measured), count)), np.zeros((len(measured), count))
    for row, points in enumerate(measured.values()):
        for step, value in points:
            sums[row, place[step]] += value
            counts[row, place[step]] += 1
    with np.errstate(invalid="ignore"):
        means = sums / counts  # NaN where a group has no point: `nanmin` and the like leave it out
    at = np.array([np.mean(steps[first : first + each]) for first in range(0, len(steps), each)])
    mean, low, high = np.nanmean(means, axis=0), np.nanmin(means, axis=0), np.nanmax(means, axis=0)
    return Line(name, at, mean, low, high, len(measured), each, steps[0], steps[-1])


def line_chart(lines: Sequence[Line], said: str, *, percent: bool = False) -> Markup:
    """Lines over steps, with a band from the lowest to the highest group around each.

    The axis is logarithmic where all values are positive and spread widely.

    Args:
        lines: at least one; the first is drawn strong.
        said: what the chart shows, for who cannot see it.
        percent: values are percents, and are written so.
    """
    height, top, bottom = 220, 10, 28
    left, right = 14.0, 98.5  # percents of the width: beside the line stand its numbers
    tall = height - top - bottom
    values = np.concatenate([np.concatenate((line.low, line.high)) for line in lines])
    low, high = float(values.min()), float(values.max())
    logarithmic = low > 0 and high / low > _WIDE
    ticks = _decades(low, high) if logarithmic else _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first, last = min(line.first for line in lines), max(line.last for line in lines)

    def along(step: float) -> float:
        return (step - first) / (last - first) if last > first else 0.5

    def x(step: float) -> float:
        return left + (right - left) * along(step)

    def up(value: float) -> float:
        return math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)

    def y(value: float) -> float:
        return top + tall * (1 - up(value))

    parts = []
    for tick, name in zip(ticks, _written(ticks, percent), strict=True):
        parts.append(
            f'<line class="grid" x1="{left}%" x2="{right}%" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text class="tick" x="{left}%" dx="-8" y="{y(tick) + 4.5:.1f}" text-anchor="end">'
            f"{name}</text>"
        )
    for tick in _steps(first, last):
        anchor = "end" if along(tick) > 0.96 else "middle"
        parts.append(
            f'<text class="tick" x="{x(tick):.2f}%" y="{height - 7}" text-anchor="{anchor}">{tick:,.0f}</text>'
        )
    # Paths know no percents: they are drawn in a field of 1000 by 1000 that is stretched over the chart.
    drawn, dots = [], []
    for index, line in reversed(list(enumerate(lines))):
        kind = "strong" if index == 0 else "weak"
        points = [(1000 * along(s), 1000 * (1 - up(v))) for s, v in zip(line.steps, line.mean, strict=True)]
        if line.groups > 1:
            edge = [(1000 * along(s), 1000 * (1 - up(v))) for s, v in zip(line.steps, line.high, strict=True)]
            edge += [
                (1000 * along(s), 1000 * (1 - up(v)))
                for s, v in zip(line.steps[::-1], line.low[::-1], strict=True)
            ]
            drawn.append(f'<path class="band {kind}" d="{_path(edge)}Z"/>')
        drawn.append(f'<path class="line {kind}" d="{_path(points)}"/>')
        if len(points) <= _DOTS:
            dots += [
                f'<circle class="point {kind}" cx="{x(s):.2f}%" cy="{y(v):.1f}" r="2.75"/>'
                for s, v in zip(line.steps, line.mean, strict=True)
            ]
    field = (
        f'<svg x="{left}%" y="{top}" width="{right - left}%" height="{tall}" viewBox="0 0 1000 1000" '
        f'preserveAspectRatio="none" overflow="visible">{"".join(drawn)}</svg>'
    )
    scale = ", logarithmic axis" if logarithmic else ""
    return Markup(
        f'<svg class="chart lines" height="{height}" role="img" '
        f'aria-label="{escape(said)} over steps{scale}">{"".join(parts)}{field}{"".join(dots)}</svg>'
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that enclose a range: multiples of 1, 2 or 5 times a power of ten, about `wanted` steps."""
    if high - low <= 1e-12 * max(
        abs(low), abs(high), 1e-300
    ):  # one value, up to rounding: it stands in the middle
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten that enclose a positive range, every second or third of very many."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    every = -(-(last - first) // 5)
    return [10.0**power for power in range(first, last + every, every)]


def _steps(first: float, last: float) -> list[float]:
    """Steps that are written under the axis: round ones inside the range."""
    inside = [tick for tick in _ticks(first, last, 4) if first <= tick <= last and tick == int(tick)]
    return inside if last > first and inside else [first]


def _written(ticks: Sequence[float], percent: bool) -> list[str]:
    """The ticks of an axis in words, all with as many decimals as their distance needs."""
    largest = max(abs(tick) for tick in ticks)
    least = min(b - a for a, b in itertools.pairwise(ticks))
    even = math.isclose(ticks[1] - ticks[0], ticks[-1] - ticks[-2])
    if not even or largest >= 1e5 or least < 1e-4:
        return [number(tick, 1 if not even else 3) + ("%" if percent else "") for tick in ticks]
    decimals = max(0, -math.floor(math.log10(least) + 1e-9))
    return [f"{tick:,.{decimals}f}{'%' if percent else ''}".replace("-", "\N{MINUS SIGN}") for tick in ticks]
