"""Selection: rank the candidate crops of each class and say which fills which tile of which image.

The score table is read once and never held whole. Its rows are dealt to groups of whole classes, in a scratch folder
where there are several; each group is ranked on its own, which is what ranking the whole table would give, since no
method compares crops of different classes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ddfast.arguments import whole_number
from ddfast.data.sources import reasons_in_words
from ddfast.errors import UsageError
from ddfast.files import atomic_folder, beside, explained, make_folder, temporary_path
from ddfast.methods.selection.base import Table
from ddfast.output.distilled import _LABEL_PARTS, QUARANTINED, SCORES, SELECTION, SOFT_LABELS
from ddfast.output.table import (
    FEATURES,
    SELECTION_SCHEMA,
    feature_width,
    iter_table,
    make_table,
    part_path,
    read_facts,
    read_table,
    table_writer,
    to_numpy,
)
from ddfast.pipeline.counting import check_counts
from ddfast.pipeline.run import Run, _shards, clock
from ddfast.pipeline.score import score_table
from ddfast.progress import say
from ddfast.wording import plural, setting

# Select
# ---------------------------------------------------------------------------------------------------------


def select(run: Run) -> None:
    """Rank the candidates and write `selection.parquet`: which crop fills which tile of which image."""
    started = time.monotonic()
    run.set_arithmetic()
    run.ranks.on_main("select", lambda: write_selection(run, run.out / SCORES, _shards(run)))
    clock(run, "select", started)


def change_ipc(run: Run, ipc: int) -> None:
    """Turn a scored run to another IPC: what was made from the old selection goes, a finished set apart.

    A finished set is kept whole in a folder beside the run's, `<out>-ipc<N>`, and can be read as any other.

    Raises:
        UsageError: the pool is too small for it, that folder exists, or the score table of a finished run is damaged
            or gone; the run stays as it was.
    """
    ipc = whole_number(ipc, "ipc", least=1)
    if ipc == run.plan["ipc"]:
        return
    held = json.loads(json.dumps(run.plan))
    run.plan["ipc"] = ipc
    run.plan.update(complete=False, counts=None, quarantined=None)
    run.ranks.on_main("ipc", lambda: _drop_selected(run, held))


def _drop_selected(run: Run, held: dict[str, Any]) -> None:
    check_counts(run)
    if held["complete"]:
        table = score_table(run)
        if table == "gone":
            raise UsageError(f"{run.out} has no score table any more: distil anew into another folder")
        if table == "damaged":
            raise UsageError(
                f"the score table of {run.out} is damaged: distil with {setting('resume', True)} mends it, then select"
            )
        _keep_finished(run, held["ipc"])
    run.save()
    for folder in ("train", _LABEL_PARTS):
        shutil.rmtree(run.out / folder, ignore_errors=True)
    for name in (SELECTION, SOFT_LABELS, QUARANTINED, "report.html", "mosaic.png"):
        (run.out / name).unlink(missing_ok=True)


def _keep_finished(run: Run, ipc: int) -> None:
    """Keep the finished set of an IPC beside the run, before its own files go."""
    kept = beside(run.out, f"-ipc{ipc}")
    if kept.exists():
        raise UsageError(
            f"the finished set of IPC {ipc} would be kept as {kept}, which exists: move or delete that first"
        )
    with atomic_folder(kept) as folder:
        for entry in sorted(run.out.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                shutil.copytree(entry, folder / entry.name, copy_function=_linked)
            else:
                _linked(entry, folder / entry.name)
    say(f"kept the finished set of IPC {ipc} as {kept}", quiet=run.quiet)


def _linked(source: str | Path, copy: str | Path) -> None:
    """A second name for a file that is only ever replaced whole; a copy where the file system has no links."""
    try:
        os.link(source, copy)
    except OSError:
        shutil.copyfile(source, copy)


_GROUP_SOURCES = 8192  # sources of one group, unless a single class has more
_BUFFERED_ROWS = 1 << 15  # rows held before they are dealt to the groups' files
_FEATURE_BYTES = 128 << 20  # of features in one group, unless a single class has more, and of those held
_ROW = np.dtype(
    [
        ("sample_id", np.int64),
        ("label", np.int32),
        ("crop", np.int16),
        ("box", np.float32, 4),
        ("score", np.float32),
        ("grad_norm", np.float32),
        ("loss", np.float32),
        ("correct", np.bool_),
    ]
)
"""What ranking needs of a row of the score table, features apart; the attribution, the most of its bytes, stays
behind."""


def write_selection(run: Run, scores: Path, parts: int) -> None:
    """Write `selection.parquet` from the score table's `parts` files in the folder `scores`.

    Raises:
        UsageError: a part is missing or damaged, or a class has too few usable images.
    """
    labels = run.source.samples.labels[run.pool()]
    widths = (
        feature_width(part_path(scores, index)) for index in range(parts) if run.selection.keeps_features
    )
    width = next((width for width in widths if width), 0)  # a shard without a readable image has none
    classes = class_groups(np.bincount(labels, minlength=len(run.source.class_names)), width)
    scratch = temporary_path(run.out / "groups")
    with explained(scratch):
        try:
            with table_writer(run.out / SELECTION, SELECTION_SCHEMA) as write:
                rows = _score_rows(scores, parts, _row(width))
                for names, group in zip(classes, _by_group(rows, classes, scratch, _row(width)), strict=True):
                    write(_selected(run, names, group, scores))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _row(width: int) -> np.dtype:
    """`_ROW`, with features of `width` numbers behind it where that is not 0."""
    return np.dtype([*_ROW.descr, (FEATURES, np.float32, width)]) if width else _ROW


def class_groups(sources: np.ndarray, width: int = 0) -> list[range]:
    """Consecutive classes in groups of at most 8192 sources, from the number of sources of each class.

    Features of `width` numbers a source make the groups smaller: 128 MiB of them at most. A larger class is a group.
    """
    most = min(_GROUP_SOURCES, _FEATURE_BYTES // (4 * width)) if width else _GROUP_SOURCES
    groups: list[range] = []
    first, held = 0, 0
    for label, count in enumerate(sources.tolist()):
        if held and held + count > most:
            groups.append(range(first, label))
            first, held = label, 0
        held += count
    return [*groups, range(first, len(sources))]


def _score_rows(scores: Path, parts: int, row: np.dtype) -> Iterator[np.ndarray]:
    """The rows of every part of the score table, as structured arrays [rows] of the dtype `row`."""
    assert row.names is not None
    for index in range(parts):
        path = part_path(scores, index)
        if not path.is_file():
            raise UsageError(
                f"{path} is missing: the score stage is not finished; run it again with {setting('resume', True)}"
            )
        table = read_table(path, columns=row.names)
        rows = np.empty(table.num_rows, dtype=row)
        if len(rows):
            columns = to_numpy(table)
            for name in row.names:
                rows[name] = columns[name]
        yield rows


def _by_group(
    rows: Iterable[np.ndarray], groups: list[range], scratch: Path, row: np.dtype
) -> Iterator[np.ndarray]:
    """Deal blocks of rows to the groups of classes; yields the rows of each group, in the order of the groups."""
    if len(groups) == 1:
        yield np.concatenate([np.empty(0, row), *rows])
        return
    make_folder(scratch)
    starts = np.array([group.start for group in groups])
    most = min(_BUFFERED_ROWS, _FEATURE_BYTES // row.itemsize)
    waiting: list[np.ndarray] = []
    held = 0
    for block in rows:
        waiting.append(block)
        held += len(block)
        if held >= most:
            _deal(np.concatenate(waiting), starts, scratch)
            waiting, held = [], 0
    if waiting:
        _deal(np.concatenate(waiting), starts, scratch)
    for index in range(len(groups)):
        path = scratch / f"{index:06d}"
        yield np.fromfile(path, dtype=row) if path.exists() else np.empty(0, row)
        path.unlink(missing_ok=True)


def _deal(rows: np.ndarray, starts: np.ndarray, scratch: Path) -> None:
    """Append rows to their groups' files."""
    group = np.searchsorted(starts, rows["label"], side="right") - 1
    order = np.argsort(group, kind="stable")
    numbers, first = np.unique(group[order], return_index=True)
    for number, part in zip(numbers.tolist(), np.split(rows[order], first[1:]), strict=True):
        with open(scratch / f"{number:06d}", "ab") as file:
            file.write(part.tobytes())


def _reasons(scores: Path, class_name: str) -> Iterator[str]:
    """Why files of a class could not be read when they were scored."""
    for part in sorted(scores.glob("part-*.parquet")):
        for row in read_facts(part).get("quarantined", ()):
            if row["path"].startswith(f"{class_name}/"):
                yield row["reason"]


def _selected(run: Run, labels: range, rows: np.ndarray, scores: Path) -> pa.Table:
    """The selection of some classes from all of their rows."""
    table = Table({name: rows[name] for name in rows.dtype.names or ()}, run.plan["seed"])
    ranked, values = run.selection.rank(table, run.needed)
    ipc, tiles = run.plan["ipc"], run.plan["tiles"]
    rank = np.arange(run.needed)
    if run.selection.layout == "contiguous":
        image, tile = rank // tiles, rank % tiles
    else:
        image, tile = rank % ipc, rank // ipc
    order = np.lexsort((tile, image))
    chosen = []
    for label in labels:
        found = ranked.get(label, np.empty(0, dtype=np.int64))
        if len(found) < run.needed:
            class_name = run.source.class_names[label]
            raise UsageError(
                f"class {class_name!r} has {plural(len(found), 'usable image')}, "
                f"IPC {ipc} x {plural(tiles, 'tile')} needs {run.needed}"
                f"{reasons_in_words(_reasons(scores, class_name))}"
            )
        chosen.append(found[: run.needed][order])
    places = np.concatenate(chosen)
    ids = rows["sample_id"][places]
    columns = {
        "label": rows["label"][places],
        "image": np.tile(image[order], len(labels)),
        "tile": np.tile(tile[order], len(labels)),
        "sample_id": ids,
        "key": [run.source.by_id(sample_id).key for sample_id in ids.tolist()],
        "box": rows["box"][places],
        "score": values[places].astype(np.float32),
    }
    return make_table(columns, SELECTION_SCHEMA)


def iter_selection(out: Path) -> Iterator[dict[str, np.ndarray]]:
    """The selection in blocks of whole classes, each as columns; see `SELECTION_SCHEMA`.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    if not os.path.isfile(out / SELECTION):
        raise UsageError(f"{out / SELECTION} is missing: run the select stage first")
    for block in iter_table(out / SELECTION, SELECTION_SCHEMA):
        yield to_numpy(block)
