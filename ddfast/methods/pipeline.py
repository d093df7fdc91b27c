"""The four stages of a distillation: score, select, synthesize, relabel.

Two passes over the data and a table between them. The score pass keeps rows, not pixels; selection sorts the
rows; the synthesis pass decodes only the sources that were selected. Every stage writes whole files by atomic
rename and skips what already stands, so that a run killed at any moment continues to the same bytes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddfast.data.decoding import decode
from ddfast.data.distilled import (
    METADATA,
    SOFT_LABELS,
    Tile,
    image_path,
    metadata_row,
    write_image,
    write_metadata,
    write_soft_labels,
)
from ddfast.data.files import atomic_write_text, make_folder
from ddfast.data.loading import load
from ddfast.data.sources import Sample, open_source
from ddfast.data.table import (
    SCORE_SCHEMA,
    SELECTION_SCHEMA,
    is_readable,
    make_table,
    part_path,
    read_table,
    read_tables,
    to_numpy,
    write_table,
)
from ddfast.errors import BadImage, UsageError
from ddfast.methods import get_method
from ddfast.methods.base import Batch, Candidates, Table
from ddfast.methods.run import (
    LABEL_TEMPERATURE,
    RUN,
    Run,
    check_teacher,
    checked_device,
    command_line,
    host_facts,
    images_in_flight,
    make_plan,
    read_plan,
    score_identity,
    start,
)
from ddfast.models import Teacher, load_teacher
from ddfast.ops import crop_resize
from ddfast.progress import Progress
from ddfast.training.device import resolve_device

SCORES = "scores"
SELECTION = "selection.parquet"
_LABEL_PARTS = ".soft-labels"
_PREFLIGHT_IMAGES = 64
_LABEL_BATCH = 64  # tiles labelled together; fixed, because it decides the last bits
_LABEL_PART = 2048  # images of one part of the soft labels, the unit of resumption


def open_run(
    method: str,
    *,
    data: str | Path,
    teacher: str | Path | Teacher,
    ipc: int,
    out: str | Path,
    label_teacher: str | Path | Teacher | None,
    seed: int,
    images_per_class: int,
    factor: str | int,
    image_size: int | None,
    image_format: str,
    preset: str | None,
    precision: str,
    device: str,
    batch_size: str | int,
    workers: int | None,
    scores: str | Path | None,
    resume: bool,
    preflight: bool,
    quiet: bool,
    options: dict[str, Any],
) -> Run:
    """Check everything that can be checked, then claim the output folder. Arguments as `distill`."""
    chosen = get_method(method).from_options(options, preset)
    if ipc < 1:
        raise UsageError(f"--ipc must be at least 1, got {ipc}")
    if images_per_class < 1:
        raise UsageError(f"--images-per-class must be at least 1, got {images_per_class}")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed must be in [0, 2^63), got {seed}")
    if image_format not in ("png", "jpeg"):
        raise UsageError(f"--format must be png or jpeg, got {image_format!r}")
    if precision not in ("float32", "auto"):
        raise UsageError(f"--precision must be float32 or auto, got {precision!r}")
    flight, found_device = images_in_flight(batch_size), resolve_device(device)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; --out must be a folder")
    source = open_source(data, "train")
    main = _teacher(teacher)
    labels = main if label_teacher is None else _teacher(label_teacher)
    for held, role in ((main, "teacher"), (labels, "label teacher")):
        check_teacher(held, source, role=role)
    if (labels.image_size, labels.mean, labels.std) != (main.image_size, main.mean, main.std):
        raise UsageError("the label teacher must share the teacher's image size and normalisation")
    size = image_size or main.image_size
    tiles_per_side = (1 if size <= 64 else 2) if factor == "auto" else int(factor)
    if tiles_per_side not in (1, 2) or size % tiles_per_side:
        raise UsageError(f"--factor must be auto, 1 or 2 and divide the image size {size}, got {factor}")
    plan = make_plan(
        chosen.resolved(tiles_per_side),
        source,
        main,
        labels,
        preset=preset,
        ipc=ipc,
        factor=tiles_per_side,
        image_size=size,
        images_per_class=images_per_class,
        image_format=image_format,
        seed=seed,
        precision=precision,
        device=found_device,
    )
    run = Run(
        out=out,
        plan=plan,
        source=source,
        teacher=main,
        label_teacher=labels,
        method=chosen.resolved(tiles_per_side),
        device=found_device,
        in_flight=flight,
        workers=workers,
        quiet=quiet,
    )
    if read_plan(out) is None:
        _check_counts(run)
        if preflight:
            _preflight(run)
    shared = _shared_scores(Path(scores), plan) if scores is not None else None
    run.plan = start(out, plan, resume)
    checked_device(run.plan, device)
    run.facts = {
        **host_facts(),
        "command": command_line(),
        "data": str(data),
        "teacher": main.path,
        "label_teacher": None if label_teacher is None else labels.path,
        "seconds": _earlier_seconds(out),
    }
    if not run.complete:
        run.save()
        if shared is not None:
            _copy_scores(shared, out)
    return run


def _teacher(given: str | Path | Teacher) -> Teacher:
    return given if isinstance(given, Teacher) else load_teacher(str(given))


def _earlier_seconds(out: Path) -> dict[str, float]:
    try:
        return dict(json.loads((out / RUN).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _check_counts(run: Run) -> None:
    """Refuse a class that cannot give IPC x tiles crops; where it would be close, decode to be sure."""
    needed, pool = run.needed, run.plan["images_per_class"]
    if needed > pool:
        raise UsageError(
            f"IPC {run.plan['ipc']} x {run.plan['tiles']} tiles needs {needed} images a class, "
            f"--images-per-class is {pool}: raise it"
        )
    for name, samples in zip(run.source.class_names, run.shuffled(), strict=True):
        usable = len(samples)
        if usable < 2 * needed:
            loaded = load(
                run.source, samples, run.plan["image_size"], workers=run.workers, ahead=run.in_flight
            )
            usable = sum(not isinstance(image, BadImage) for _, image in loaded)
        if usable < needed:
            raise UsageError(
                f"class {name!r} has {usable} usable images, IPC {run.plan['ipc']} x {run.plan['tiles']} tiles "
                f"needs {needed}"
            )


def _preflight(run: Run) -> None:
    """Try the teachers on 64 training images: near chance means a class-order mismatch, the usual cause of
    failures."""
    size, classes = run.plan["image_size"], len(run.source.class_names)
    loaded = load(run.source, run.pool()[: 2 * _PREFLIGHT_IMAGES], size, workers=run.workers)
    pairs = [(image, s.label) for s, image in loaded if not isinstance(image, BadImage)][:_PREFLIGHT_IMAGES]
    if not pairs:
        return
    images = torch.stack([image for image, _ in pairs])
    labels = torch.tensor([label for _, label in pairs])
    for teacher, role in ((run.teacher, "teacher"), (run.label_teacher, "label teacher")):
        logits = _logits(teacher, images, run)
        hits = int((logits.argmax(dim=1) == labels).sum())
        if hits <= _chance_hits(len(pairs), classes):
            raise UsageError(
                f"the {role} reads {hits} of {len(pairs)} training images correctly, near chance for "
                f"{classes} classes: "
                "its class order or normalisation does not match the data (--no-preflight goes on regardless)"
            )


def _chance_hits(trials: int, classes: int, tail: float = 0.01) -> int:
    """The most hits that guessing reaches, but for a share `tail` of tries (binomial quantile)."""
    p = 1 / classes
    mass, total = (1 - p) ** trials, 0.0
    for hits in range(trials):
        total += mass
        if total >= 1 - tail:
            return hits
        mass *= (trials - hits) / (hits + 1) * p / (1 - p)
    return trials


def _logits(teacher: Teacher, images: Tensor, run: Run) -> Tensor:
    """Float32 logits of uint8 images [N, 3, S, S], on the CPU."""
    mean = torch.tensor(teacher.mean, device=run.device).view(1, 3, 1, 1)
    std = torch.tensor(teacher.std, device=run.device).view(1, 3, 1, 1)
    batch = (images.to(run.device).float().div_(255) - mean) / std
    with torch.no_grad():
        logits = (
            teacher.model.to(run.device)(batch.contiguous(memory_format=torch.channels_last)).float().cpu()
        )
    if not bool(torch.isfinite(logits).all()):
        raise UsageError("the teacher returns NaN or infinity: its weights are damaged, train it again")
    return logits


# Score
# ----------------------------------------------------------------------------------------------------------


def score(run: Run) -> None:
    """Score pass: decode each source of the pool once, and keep rows of candidate crops in `scores/`."""
    started = time.monotonic()
    run.set_arithmetic()
    make_folder(run.out / SCORES)
    pool = run.pool()
    size = run.plan["arithmetic"]["shard_sources"]
    shards = [pool[first : first + size] for first in range(0, len(pool), size)]
    missing = [i for i in range(len(shards)) if not is_readable(part_path(run.out / SCORES, i), SCORE_SCHEMA)]
    if not missing:
        return
    wanted = sum(len(shards[i]) for i in missing)
    for teacher in (run.teacher, run.label_teacher):
        teacher.model.to(device=run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    loaded = load(
        run.source,
        [sample for i in missing for sample in shards[i]],
        run.plan["image_size"],
        workers=run.workers,
        ahead=run.in_flight,
    )
    with Progress("score", len(pool), "images", done=len(pool) - wanted, quiet=run.quiet) as progress:
        for index in missing:
            _score_shard(run, index, len(shards[index]), loaded, progress)
    clock(run, "score", started)


def _score_shard(
    run: Run, index: int, sources: int, loaded: Iterator[tuple[Sample, Tensor | BadImage]], progress: Progress
) -> None:
    """Score the next `sources` loaded images and commit them as one shard, quarantined files beside it."""
    micro_batch = run.plan["arithmetic"]["micro_batch"]
    columns: dict[str, list[Any]] = {}
    bad: list[dict[str, str]] = []
    for first in range(0, sources, micro_batch):
        pairs = [next(loaded) for _ in range(min(micro_batch, sources - first))]
        bad += [{"path": s.key, "reason": str(image)} for s, image in pairs if isinstance(image, BadImage)]
        good = [i for i, (_, image) in enumerate(pairs) if not isinstance(image, BadImage)]
        if good:
            try:
                candidates = run.method.score(_micro_batch(run, pairs, micro_batch), run.context)
            except ValueError as error:
                raise UsageError(f"cannot score with this teacher: {error}") from error
            _append_rows(columns, [pairs[i][0] for i in good], good, candidates)
        progress.advance(len(pairs))
    if bad:
        text = json.dumps(bad, ensure_ascii=False, indent=1) + "\n"
        atomic_write_text(_quarantine_path(run.out, index), text)
    rows = {name: np.concatenate(parts) for name, parts in columns.items()}
    write_table(part_path(run.out / SCORES, index), make_table(rows) if rows else SCORE_SCHEMA.empty_table())


def _micro_batch(run: Run, pairs: list[tuple[Sample, Tensor | BadImage]], size: int) -> Batch:
    """A batch of fixed size: black images stand where a file is bad and behind the last one."""
    side = run.plan["image_size"]
    images = torch.zeros(size, 3, side, side, dtype=torch.uint8)
    labels, ids = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    for i, (sample, image) in enumerate(pairs):
        if not isinstance(image, BadImage):
            images[i], labels[i], ids[i] = image, sample.label, sample.id
    return Batch(images.to(run.device), labels.to(run.device), ids.to(run.device))


def _append_rows(
    columns: dict[str, list[Any]], samples: list[Sample], places: list[int], candidates: Candidates
) -> None:
    boxes = candidates.boxes.cpu().numpy()[places]
    crops = boxes.shape[1]
    rows: dict[str, np.ndarray] = {
        "sample_id": np.repeat(np.array([s.id for s in samples], dtype=np.int64), crops),
        "key": np.repeat(np.array([s.key for s in samples], dtype=object), crops),
        "label": np.repeat(np.array([s.label for s in samples], dtype=np.int32), crops),
        "crop": np.tile(np.arange(crops, dtype=np.int16), len(samples)),
        "box": boxes.reshape(-1, 4).astype(np.float32),
    }
    for name in ("score", "grad_norm", "loss", "correct"):
        values = getattr(candidates, name)
        if values is not None:
            rows[name] = values.cpu().numpy()[places].reshape(-1)
    if candidates.phi is not None:
        rows["phi"] = np.repeat(candidates.phi.float().cpu().numpy()[places], crops, axis=0)
    for name, values in rows.items():
        columns.setdefault(name, []).append(values)


def _quarantine_path(out: Path, index: int) -> Path:
    return part_path(out / SCORES, index).with_suffix(".quarantine.json")


def quarantined(out: Path) -> list[dict[str, str]]:
    """Files that could not be decoded, {path, reason} in the order of their paths."""
    found = [json.loads(path.read_text("utf-8")) for path in (out / SCORES).glob("part-*.quarantine.json")]
    return sorted((row for rows in found for row in rows), key=lambda row: row["path"])


def _shared_scores(folder: Path, plan: dict[str, Any]) -> Path:
    """Check that the score table of another run is the one this plan would compute."""
    held = read_plan(folder)
    if held is None:
        raise UsageError(f"--scores {folder} holds no ddfast run")
    if score_identity(held) != score_identity(plan):
        raise UsageError(f"--scores {folder} was scored with other settings, data or teacher")
    if not (folder / SELECTION).is_file():
        raise UsageError(f"--scores {folder} is not scored to its end")
    return folder


def _copy_scores(folder: Path, out: Path) -> None:
    make_folder(out / SCORES)
    for path in sorted((folder / SCORES).glob("part-*")):
        if not (out / SCORES / path.name).exists():
            copy = out / SCORES / f".{path.name}.tmp-0"
            shutil.copyfile(path, copy)
            copy.replace(out / SCORES / path.name)


# Select
# ---------------------------------------------------------------------------------------------------------


def select(run: Run) -> None:
    """Rank the candidates and write `selection.parquet`: which crop fills which tile of which image."""
    table = to_numpy(read_tables(run.out / SCORES))
    ranked, values = run.method.rank(Table(table), run.needed)
    ipc, tiles = run.plan["ipc"], run.plan["tiles"]
    rank = np.arange(run.needed)
    if run.method.layout == "contiguous":
        image, tile = rank // tiles, rank % tiles
    else:
        image, tile = rank % ipc, rank // ipc
    order = np.lexsort((tile, image))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SELECTION_SCHEMA.names}
    for label, name in enumerate(run.source.class_names):
        rows = ranked.get(label, np.empty(0, dtype=int))
        if len(rows) < run.needed:
            raise UsageError(
                f"class {name!r} has {len(rows)} usable images, IPC {ipc} x {tiles} tiles needs {run.needed}"
            )
        rows = rows[: run.needed][order]
        parts["label"].append(np.full(run.needed, label))
        parts["image"].append(image[order])
        parts["tile"].append(tile[order])
        for column in ("sample_id", "key", "box"):
            parts[column].append(table[column][rows])
        parts["score"].append(values[rows].astype(np.float32))
    columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    write_table(run.out / SELECTION, make_table(columns, SELECTION_SCHEMA))


def change_ipc(run: Run, ipc: int) -> None:
    """Turn a scored run to another IPC: what was made from the old selection goes.

    Raises:
        UsageError: the pool is too small for it; the run stays as it was.
    """
    if ipc == run.plan["ipc"]:
        return
    if ipc < 1:
        raise UsageError(f"--ipc must be at least 1, got {ipc}")
    run.plan["ipc"] = ipc
    _check_counts(run)
    run.plan.update(complete=False, counts=None, quarantined=None)
    run.save()
    shutil.rmtree(run.out / "train", ignore_errors=True)
    for name in (SELECTION, SOFT_LABELS, "report.html", "mosaic.png"):
        (run.out / name).unlink(missing_ok=True)


# Synthesize
# -----------------------------------------------------------------------------------------------------


def synthesize(run: Run) -> None:
    """Synthesis pass: decode only the selected sources, cut and tile their crops, write the images."""
    started = time.monotonic()
    run.set_arithmetic()
    chosen = to_numpy(read_table(run.out / SELECTION, SELECTION_SCHEMA))
    plan, tiles = run.plan, run.plan["tiles"]
    names, images = run.source.class_names, len(chosen["label"]) // tiles
    first = chosen["label"][::tiles]
    index = chosen["image"][::tiles]
    paths = [image_path(int(first[i]), names[first[i]], int(index[i]), plan["format"]) for i in range(images)]
    missing = [i for i in range(images) if not (run.out / paths[i]).exists()]
    samples = [
        run.source.by_id(int(chosen["sample_id"][i * tiles + t])) for i in missing for t in range(tiles)
    ]
    loaded = load(run.source, samples, plan["image_size"], workers=run.workers, ahead=run.in_flight)
    side = plan["image_size"] // plan["factor"]
    with Progress("synthesize", images, "images", done=images - len(missing), quiet=run.quiet) as progress:
        for i in missing:
            sources = torch.stack([_decoded(*next(loaded)) for _ in range(tiles)])
            boxes = torch.from_numpy(chosen["box"][i * tiles : (i + 1) * tiles].copy())
            mosaic = crop_resize(sources, boxes, side, source=torch.arange(tiles), factor=plan["factor"])
            write_image(run.out / paths[i], mosaic[0])
            progress.advance()
    rows = []
    for i in range(images):
        cut = [
            Tile(str(chosen["key"][r]), chosen["box"][r].tolist(), float(chosen["score"][r]))
            for r in range(i * tiles, (i + 1) * tiles)
        ]
        rows.append(metadata_row(int(first[i]), names[first[i]], int(index[i]), cut, plan["format"]))
    write_metadata(run.out, rows)
    clock(run, "synthesize", started)


def _decoded(sample: Sample, image: Tensor | BadImage) -> Tensor:
    if isinstance(image, BadImage):
        raise UsageError(f"{sample.key} could be read when it was scored and cannot now ({image})")
    return image


# Relabel
# --------------------------------------------------------------------------------------------------------


def relabel(run: Run) -> None:
    """Label every tile by the label teacher, and count in the manifest what the run holds."""
    started = time.monotonic()
    run.set_arithmetic()
    if not (run.out / SOFT_LABELS).exists():
        _write_labels(run)
    shutil.rmtree(run.out / _LABEL_PARTS, ignore_errors=True)
    bad = quarantined(run.out)
    rows = len((run.out / METADATA).read_text("utf-8").splitlines())
    run.plan["counts"] = {"images": rows, "sources": len(run.pool()) - len(bad), "quarantined": len(bad)}
    run.plan["quarantined"] = {"count": len(bad), "files": bad}
    clock(run, "relabel", started)


def _write_labels(run: Run) -> None:
    """`soft_labels.safetensors` from the written images; finished parts survive a kill."""
    rows = [json.loads(line) for line in (run.out / METADATA).read_text("utf-8").splitlines()]
    parts = make_folder(run.out / _LABEL_PARTS)
    labels = []
    with Progress("relabel", len(rows), "images", quiet=run.quiet) as progress:
        for first in range(0, len(rows), _LABEL_PART):
            path = parts / f"{first:08d}"
            names = [row["file_name"] for row in rows[first : first + _LABEL_PART]]
            if not (path / SOFT_LABELS).exists():
                write_soft_labels(make_folder(path), _label_part(run, names, progress), LABEL_TEMPERATURE)
            else:
                progress.advance(len(names))
            labels.append(_read_part(path, len(run.source.class_names)))
    write_soft_labels(run.out, torch.cat(labels), LABEL_TEMPERATURE)


def _read_part(path: Path, classes: int) -> Tensor:
    from ddfast.data.distilled import read_soft_labels

    return read_soft_labels(path, classes).values.float()


def _label_part(run: Run, names: list[str], progress: Progress) -> Tensor:
    """softmax(logits / T) of every tile of the named images, float32 [n, tiles, C]; a tile is enlarged to the image."""
    size, factor = run.plan["image_size"], run.plan["factor"]
    per_batch = _LABEL_BATCH // factor**2
    found = []
    for first in range(0, len(names), per_batch):
        images = torch.stack(
            [decode((run.out / "train" / n).read_bytes()) for n in names[first : first + per_batch]]
        )
        tiles = _tiles(images, factor)
        if factor > 1:
            tiles = crop_resize(
                tiles, torch.tensor([[0, 0, size // factor, size // factor]]).expand(len(tiles), 1, 4), size
            )[:, 0]
        full = torch.zeros(_LABEL_BATCH, 3, size, size, dtype=torch.uint8)
        full[: len(tiles)] = tiles
        found.append(_logits(run.label_teacher, full, run)[: len(tiles)])
        progress.advance(len(images))
    return torch.softmax(torch.cat(found) / LABEL_TEMPERATURE, dim=1).view(len(names), factor**2, -1)


def _tiles(images: Tensor, factor: int) -> Tensor:
    """Images [N, 3, S, S] -> their tiles [N * factor^2, 3, S/factor, S/factor] in row-major order."""
    count, _, size, _ = images.shape
    side = size // factor
    split = images.view(count, 3, factor, side, factor, side).permute(0, 2, 4, 1, 3, 5)
    return split.reshape(count * factor**2, 3, side, side)


def clock(run: Run, stage: str, started: float) -> None:
    """Add the seconds of a stage to `run.json` and save."""
    seconds = run.facts.setdefault("seconds", {})
    seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - started, 3)
    run.save()
