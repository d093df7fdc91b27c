"""Pictures of a study: accuracy against IPC with error bars, the paper's numbers as hollow marks. PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddfast.files import make_folder

INK, FAINT, GRID = "#22262b", "#6b7480", "#e6e9ee"
# Told apart by people who see colours differently, and in order of importance; grey is for random images.
COLOURS = (
    "#1f7a6d",
    "#c8612c",
    "#2f6db5",
    "#c9a227",
    "#5b4a8a",
    "#a3385b",
    "#4d9a3a",
    "#7b5b3a",
    "#2a9db0",
    "#96a03c",
)
GREY = "#8593a6"
_LINE_INCHES = 0.23  # height of one label
_PANELS_A_ROW = 3
# Places of a name beside its point: points to the right and up, and how the text is aligned there.
_BESIDE = (
    (7, 0, "left"),
    (-7, 0, "right"),
    (7, 9, "left"),
    (7, -9, "left"),
    (-7, 9, "right"),
    (-7, -9, "right"),
    (0, 14, "center"),
    (0, -14, "center"),
    (7, 18, "left"),
    (7, -18, "left"),
)


@dataclass(frozen=True)
class Line:
    """One row of a table over its IPCs.

    Attributes:
        name: what stands beside its last point.
        points: (IPC, mean top-1, deviation or 0, the paper's top-1 or None), percent.
        baseline: whether it is drawn in grey, as random images are.
    """

    name: str
    points: Sequence[tuple[int, float, float, float | None]]
    baseline: bool = False


@contextmanager
def figure(path: Path, width: float, height: float, rows: int = 1, columns: int = 1) -> Any:
    """Axes, row by row, of a figure (width, height in inches) that is written as PNG and SVG when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "font.size": 9.5,
        "font.family": "sans-serif",
        "axes.edgecolor": "#c9ced6",
        "text.color": INK,
        "axes.labelcolor": FAINT,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "svg.fonttype": "none",
        "svg.hashsalt": "ddfast",
    }
    make_folder(path.parent)
    with pyplot.rc_context(style):
        drawn, axes = pyplot.subplots(
            rows, columns, figsize=(width, height), squeeze=False, layout="constrained"
        )
        yield axes.ravel()
        drawn.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})
        drawn.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
        pyplot.close(drawn)


def accuracy_chart(
    path: Path, panels: Sequence[tuple[str, Sequence[Line]]], title: str, tick: str = "IPC {}"
) -> None:
    """Draw accuracy against IPC, one panel for each teacher and student.

    Args:
        path: of the picture, whose ending becomes .png and .svg.
        panels: heading and lines of each.
        title: heading of the whole.
        tick: what stands below each place; {} is the IPC, or what the lines count in its stead.
    """
    panels = [panel for panel in panels if any(line.points for line in panel[1])]
    if not panels:
        return
    columns = min(len(panels), _PANELS_A_ROW)
    rows = -(-len(panels) // columns)
    tall = max(3.6, 1.2 + _LINE_INCHES * max(len(lines) for _, lines in panels))
    with figure(path, 6.4 * columns, tall * rows, rows, columns) as axes:
        for axis, (heading, lines) in zip(axes, panels, strict=False):
            _panel(axis, heading if len(panels) > 1 else "", lines, tall, tick)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis in axes[::columns]:
            axis.set_ylabel("test top-1, %")
        axes[0].figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")


def _panel(axis: Any, heading: str, lines: Sequence[Line], tall: float, tick: str) -> None:
    ipcs = sorted({point[0] for line in lines for point in line.points})
    places = {ipc: place for place, ipc in enumerate(ipcs)}
    colours = iter(COLOURS * (len(lines) // len(COLOURS) + 1))
    ends: list[tuple[float, str, str]] = []
    width = 0.16 if len(ipcs) > 1 else 0.5  # over which the marks of one IPC are spread
    reported = False
    for number, line in enumerate(lines):
        colour = GREY if line.baseline else next(colours)
        nudge = width * ((number + 0.5) / len(lines) - 0.5)
        x = [places[ipc] + nudge for ipc, *_ in line.points]
        means, deviations = [point[1] for point in line.points], [point[2] for point in line.points]
        axis.errorbar(
            x,
            means,
            yerr=deviations,
            color=colour,
            linewidth=1.6,
            linestyle="--" if line.baseline else "-",
            marker="o",
            markersize=5,
            capsize=2.5,
            elinewidth=1,
            zorder=3,
        )
        for place, point in zip(x, line.points, strict=True):
            if point[3] is not None:
                reported = True
                axis.plot(place, point[3], "D", markersize=5, mfc="white", mec=colour, mew=1.2, zorder=2)
        ends.append((means[-1], line.name, colour))
    axis.set_xticks(range(len(ipcs)), [tick.format(ipc) for ipc in ipcs])
    axis.tick_params(length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    axis.set_xlim(-0.35, len(ipcs) - 1 + (0.35 if len(ipcs) > 1 else 0.5))
    low, high = axis.get_ylim()
    axis.set_ylim(low, high)
    gap = (high - low) * _LINE_INCHES / (tall - 1.0)
    for place, (value, name, colour) in zip(_apart([end[0] for end in ends], gap), ends, strict=True):
        axis.annotate(
            f"{name}  {value:.1f}",
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
            annotation_clip=False,
        )
    if heading:
        axis.set_title(heading, loc="left", fontsize=9.5, color=FAINT)
    if reported:
        axis.plot([], [], "D", markersize=5, mfc="white", mec=FAINT, mew=1.2, label="the paper's")
        axis.legend(loc="best", frameon=False, fontsize=8.5)


def name_points(axis: Any, points: Sequence[tuple[float, float, float, str, str]]) -> None:
    """Write names beside points, (x, y, deviation, name, colour): they cover no other name, point or error bar.

    The first place of `_BESIDE` that is free is taken, and the right where none is. Limits and scales of the axis have
    to be final.
    """
    axis.figure.draw_without_rendering()  # the layout decides how large a name is beside the axis
    along_bar = (-1.0, -0.5, 0.0, 0.5, 1.0)
    marks = axis.transData.transform(
        [(x, y + share * deviation) for x, y, deviation, *_ in points for share in along_bar]
    )
    taken: list[Any] = []
    for x, y, _, name, colour in sorted(points, key=lambda point: -point[1]):
        written: list[Any] = []
        for right, up, align in _BESIDE:
            text = axis.annotate(
                name,
                (x, y),
                xytext=(right, up),
                textcoords="offset points",
                ha=align,
                va="center",
                color=colour,
                fontsize=8.5,
            )
            box = text.get_window_extent()
            if not box.count_overlaps(taken) and not box.padded(2).count_contains(marks):
                for other in written:
                    other.remove()
                taken.append(box)
                break
            written.append(text)
        else:
            for other in written[1:]:
                other.remove()
            taken.append(written[0].get_window_extent())


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """The values, moved as little as keeps neighbours `gap` apart; their order stays."""
    order = sorted(range(len(values)), key=values.__getitem__)
    groups: list[tuple[float, list[int]]] = []  # centre and members, bottom up
    for index in order:
        groups.append((values[index], [index]))
        while len(groups) > 1:
            (below, lower), (above, upper) = groups[-2:]
            if above - below >= gap * (len(lower) + len(upper)) / 2:
                break
            members = [*lower, *upper]
            groups[-2:] = [(sum(values[one] for one in members) / len(members), members)]
    placed = [0.0] * len(values)
    for centre, members in groups:
        for number, index in enumerate(members):
            placed[index] = centre + gap * (number - (len(members) - 1) / 2)
    return placed
