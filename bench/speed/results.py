"""Where measurements go: one CSV an entry, a Markdown table and a plot of all of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import facts
from bench.speed.measuring import Spread
from bench.speed.registry import Entry, Measurement, Target, clock
from ddfast.files import atomic_write_text, make_folder

RESULTS = facts.RESULTS
SPREADS = ("seconds", "peer_seconds", "ratio", "share")
COLUMNS = (
    *("entry", "case", "contender", "peer", "unit"),
    *(f"{name}_p{level}" for name in SPREADS for level in (20, 50, 80)),
    *("extra_bytes", "peer_extra_bytes"),
    *("target_ratio", "target_memory", "target_rate", "target_share", "met", "gate", "rounds", "note"),
    *("device", "device_name", "threads", "torch", "triton", "ddfast", "peer_version"),
    *("commit", "dirty", "date"),
)


def rows_of(entry: Entry, measurements: Iterable[Measurement], device: torch.device) -> list[dict[str, str]]:
    """Measurements as rows of the CSV, every value a string; empty where there is none."""
    revision, dirty = facts.commit()
    common = {
        "device": device.type,
        "device_name": facts.device_name(device),
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        **facts.software(),
        "commit": revision,
        "dirty": str(dirty).lower(),
        "date": clock(),
    }
    rows = []
    for each in measurements:
        target = entry.target(device, each)
        met = each.meets(target)
        row = {
            "entry": entry.name,
            **{name: getattr(each, name) for name in ("case", "contender", "peer", "unit", "gate", "note")},
            **_spreads(each),
            "extra_bytes": _text(each.extra_bytes),
            "peer_extra_bytes": _text(each.peer_extra_bytes),
            **_targets(target),
            "met": "" if met is None else str(met).lower(),
            "rounds": str(each.rounds),
            "peer_version": facts.version(each.peer_package) if each.peer_package else "",
            **common,
        }
        rows.append({column: row[column] for column in COLUMNS})
    return rows


def _spreads(measurement: Measurement) -> dict[str, str]:
    cells = {}
    for name in SPREADS:
        spread: Spread | None = getattr(measurement, name)
        for level in (20, 50, 80):
            cells[f"{name}_p{level}"] = "" if spread is None else f"{getattr(spread, f'p{level}'):.6g}"
    return cells


def _targets(target: Target | None) -> dict[str, str]:
    return {
        f"target_{name}": "" if target is None else _text(getattr(target, name))
        for name in ("ratio", "memory", "rate", "share")
    }


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"


def write_csv(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write rows; those of another type of device that the file holds already stay, before or behind them."""
    devices = {row["device"] for row in rows}
    kept = [row for row in read_csv(path) if row["device"] not in devices] if path.exists() else []
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted([*kept, *rows], key=lambda row: row["device"]))
    make_folder(path.parent)
    atomic_write_text(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a file that `write_csv` wrote.

    Raises:
        ValueError: the columns are others.
    """
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path} does not have the columns of a speed entry: delete it and measure again"
            )
        return list(reader)


# The table
# -----------------------------------------------------------------------------------------------------


def summary(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown page: the table of ratios and of shares, and what it was measured on."""
    compared = [row for row in rows if row["ratio_p50"]]
    shares = [row for row in rows if row["share_p50"]]
    alone = [row for row in rows if row["seconds_p50"] and not row["ratio_p50"]]
    parts = [
        "How many times faster ddfast is than its peer, on the same inputs in the same process: the median over rounds "
        "(20th to 80th percentile). Memory is the peak above what was held before, ours over the peer's.\n"
    ]
    if compared:
        lines = [
            "| entry | what | ddfast | peer | times faster | target | a second | memory |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row['entry']} | {row['case']} | {row['contender']} | {row['peer']} | {_ratio(row)} | {_target(row)} | "
            f"{_rate(row)} | {_memory(row)} |"
            for row in compared
        ]
        parts.append("\n".join(lines) + "\n")
    if alone:
        lines = ["| entry | what | arithmetic | a second |", "| --- | --- | --- | --- |"]
        lines += [f"| {row['entry']} | {row['case']} | {row['contender']} | {_rate(row)} |" for row in alone]
        parts.append("\n".join(lines) + "\n")
    if shares:
        lines = ["| entry | what | arithmetic | percent | target |", "| --- | --- | --- | --- | --- |"]
        for row in shares:
            low, middle, high = (100 * float(row[f"share_p{level}"]) for level in (20, 50, 80))
            target = f"≤ {100 * float(row['target_share']):g}" if row["target_share"] else ""
            lines.append(
                f"| {row['entry']} | {row['case']} | {row['contender']} | {middle:.2f} ({low:.2f} to {high:.2f}) | "
                f"{target}{_missed(row)} |"
            )
        parts.append("\n".join(lines) + "\n")
    parts.append("".join(f"- {line}\n" for line in _conditions(rows)))
    notes = dict.fromkeys((row["entry"], row["note"]) for row in rows if row["note"])
    if notes:
        parts.append("Notes:\n\n" + "".join(f"- {entry}: {note}\n" for entry, note in notes))
    parts.append("Gates passed before timing:\n\n" + "".join(f"- {line}\n" for line in _gates(rows)))
    return "\n".join(parts)


def _gates(rows: Sequence[dict[str, str]]) -> list[str]:
    """What every contest was held to, once; a gate that serves several rows names the entry alone."""
    served: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        key = (row["entry"], row["gate"], "" if row["peer"] else row["contender"])
        served.setdefault(key, []).append(row["case"])
    lines = []
    for (entry, gate, contender), cases in served.items():
        case = cases[0] if len(set(cases)) == 1 else contender
        lines.append(f"{entry}, {case}: {gate}")
    return lines


def _ratio(row: dict[str, str]) -> str:
    low, middle, high = (float(row[f"ratio_p{level}"]) for level in (20, 50, 80))
    return f"**{middle:.3g}** ({low:.3g} to {high:.3g})"


def _target(row: dict[str, str]) -> str:
    wanted = []
    if row["target_ratio"]:
        wanted.append(f"≥ {float(row['target_ratio']):g}")
    if row["target_rate"]:
        wanted.append(f"≥ {float(row['target_rate']):,.0f} a second")
    if row["target_memory"]:
        wanted.append(f"memory ≤ {float(row['target_memory']):.2g}")
    return ", ".join(wanted) + _missed(row)


def _missed(row: dict[str, str]) -> str:
    return " (missed)" if row["met"] == "false" else ""


def _rate(row: dict[str, str]) -> str:
    rate = 1 / float(row["seconds_p50"])
    return f"{rate:,.0f} {row['unit']}" if rate >= 100 else f"{rate:.3g} {row['unit']}"


def _memory(row: dict[str, str]) -> str:
    if not row["extra_bytes"] or not row["peer_extra_bytes"]:
        return ""
    ours, peers = (int(row[name]) / 2**20 for name in ("extra_bytes", "peer_extra_bytes"))
    ratio = f"{ours / peers:.2f} " if peers > 0 else ""
    return f"{ratio}({ours:,.0f} of {peers:,.0f} MiB)"


def _conditions(rows: Sequence[dict[str, str]]) -> list[str]:
    """What the numbers were measured on, a line for every combination among the rows."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        threads = f", {row['threads']} threads" if row["threads"] else ""
        changed = " with changes" if row["dirty"] == "true" else ""
        line = (
            f"{row['device_name']}{threads}; torch {row['torch']}, triton {row['triton']}, ddfast {row['ddfast']}, "
            f"commit {row['commit']}{changed}, {row['date'][:10]}"
        )
        lines.setdefault(line, []).append(row["entry"])
    peers = dict.fromkeys((row["peer"], row["peer_version"]) for row in rows if row["peer_version"])
    told = [
        line if len(lines) == 1 else f"{', '.join(dict.fromkeys(entries))}: {line}"
        for line, entries in lines.items()
    ]
    return [*told, *(f"{peer}: {version}" for peer, version in peers)]


# The plot
# -----------------------------------------------------------------------------------------------------

_MET, _MISSED, _NEUTRAL, _INK, _FAINT = "#1f7a6d", "#c8612c", "#8593a6", "#22262b", "#6b7480"
_STAGES = ("#8593a6", "#2f6db5", "#c9a227", "#5b4a8a")
_BAR_INCHES, _FRAME_INCHES = 0.4, 0.75  # of a bar, and of a panel's title and axis
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def plot(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Draw what `summary` lists (PNG): ratios behind a target, the other ratios, and the stages of the score pass.

    A bar ends at the median, its whisker goes from the 20th to the 80th percentile, a thick mark stands at the target.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    aimed = [row for row in rows if row["ratio_p50"] and row["target_ratio"]]
    aimless = [row for row in rows if row["ratio_p50"] and not row["target_ratio"]]
    stages = [row for row in rows if row["share_p50"] and row["entry"] == "score_pass"]
    arithmetics = list(dict.fromkeys(row["contender"] for row in stages))
    panels = [
        (len(aimed), lambda axis: _bars(axis, aimed, "Times faster than the peer, and the target")),
        (len(aimless), lambda axis: _bars(axis, aimless, "Times faster than the peer, op by op")),
        (len(arithmetics), lambda axis: _stacks(axis, stages, arithmetics)),
    ]
    panels = [(bars, draw) for bars, draw in panels if bars]
    if not panels:
        return
    heights = [_BAR_INCHES * bars + _FRAME_INCHES for bars, _ in panels]
    with pyplot.rc_context(
        {"font.size": 9, "font.family": "sans-serif", "axes.edgecolor": "#c9ced6", "text.color": _INK}
    ):
        figure, axes = pyplot.subplots(
            len(panels),
            1,
            figsize=(10, sum(heights) + 0.4),
            gridspec_kw={"height_ratios": heights},
            squeeze=False,
            layout=ConstrainedLayoutEngine(hspace=0.06),
        )
        for axis, (_, draw) in zip(axes[:, 0], panels, strict=True):
            draw(axis)
            axis.tick_params(length=0)
            axis.spines[["top", "right", "left"]].set_visible(False)
        threads = f", {rows[0]['threads']} threads" if rows[0]["threads"] else ""
        figure.suptitle(f"{rows[0]['device_name']}{threads}", x=0.01, ha="left", fontsize=9, color=_FAINT)
        make_folder(path.parent)
        figure.savefig(path, dpi=130, metadata={"Software": None})
        pyplot.close(figure)


def _bars(axis: Any, rows: Sequence[dict[str, str]], title: str) -> None:
    colours = {"true": _MET, "false": _MISSED, "": _NEUTRAL}
    for place, row in enumerate(rows):
        low, middle, high = (float(row[f"ratio_p{level}"]) for level in (20, 50, 80))
        axis.barh(place, middle - 1, left=1, height=0.58, color=colours[row["met"]], zorder=2)
        axis.plot([low, high], [place, place], color=_INK, linewidth=1, zorder=4)
        axis.scatter([low, high], [place, place], marker="|", s=36, color=_INK, linewidth=1, zorder=4)
        furthest = max(high, 1.0)
        if row["target_ratio"]:
            target = float(row["target_ratio"])
            furthest = max(furthest, target)
            axis.plot([target, target], [place - 0.4, place + 0.4], color=_INK, linewidth=2.6, zorder=3)
        axis.annotate(f"{middle:.3g}×", (furthest, place), (8, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(rows)), [""] * len(rows))
    for place, row in enumerate(rows):
        for text, up, colour, size in ((row["case"], 1, _INK, 9), (_contest(row), -9, _FAINT, 7.5)):
            axis.annotate(
                text, (0, place), (-10, up), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", color=colour, fontsize=size,
            )  # fmt: skip
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xscale("log")
    ends = [
        float(row[name]) for row in rows for name in ("ratio_p20", "ratio_p80", "target_ratio") if row[name]
    ]
    low, high = min([*ends, 0.9]) / 1.1, max([*ends, 2.0]) * 1.7
    axis.set_xlim(low, high)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks], color=_FAINT)
    axis.minorticks_off()
    axis.axvline(1, color=_INK, linewidth=0.8, zorder=3)
    axis.grid(axis="x", color="#e6e9ee", linewidth=0.8, zorder=0)
    _titled(axis, title, _ratio_legend(rows))


def _contest(row: dict[str, str]) -> str:
    return f"{row['entry']} · {row['contender']} against {row['peer']}"


def _titled(axis: Any, title: str, handles: list[Any]) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=20)
    if handles:
        axis.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=8,
            handlelength=1.1, columnspacing=1.4, borderpad=0.1, borderaxespad=0.3,
        )  # fmt: skip


def _ratio_legend(rows: Sequence[dict[str, str]]) -> list[Any]:
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = {"true": Patch(color=_MET, label="met"), "false": Patch(color=_MISSED, label="missed")}
    handles: list[Artist] = [
        handle for met, handle in kinds.items() if any(row["met"] == met for row in rows)
    ]
    if any(row["target_ratio"] for row in rows):
        handles.append(Line2D([], [], color=_INK, linewidth=2.6, label="target"))
    return [*handles, Line2D([], [], color=_INK, linewidth=1, label="20th to 80th percentile")]


def _stacks(axis: Any, rows: Sequence[dict[str, str]], arithmetics: Sequence[str]) -> None:
    """One bar an arithmetic, cut into the shares of the stages."""
    from matplotlib.patches import Patch

    stages = list(dict.fromkeys(row["case"] for row in rows))
    colours = dict(zip(stages, _STAGES, strict=False))
    for place, arithmetic in enumerate(arithmetics):
        left = 0.0
        for row in (row for row in rows if row["contender"] == arithmetic):
            share = 100 * float(row["share_p50"])
            axis.barh(place, share, left=left, height=0.58, color=colours.get(row["case"], _NEUTRAL))
            if share >= 5:
                axis.annotate(
                    f"{share:.0f}", (left + share / 2, place), ha="center", va="center", color="white"
                )
            left += share
    axis.set_yticks(range(len(arithmetics)), arithmetics)
    axis.set_ylim(len(arithmetics) - 0.4, -0.6)
    axis.set_xlim(0, 100)
    axis.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)], color=_FAINT)
    legend = [Patch(color=colours.get(stage, _NEUTRAL), label=stage) for stage in stages]
    _titled(axis, "Stages of InfoUtil's score pass", legend)
