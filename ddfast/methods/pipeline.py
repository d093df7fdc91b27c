"""The four stages of a distillation: score, select, synthesize, relabel.

Two passes over the data and a table between them. The score pass keeps rows, not pixels; selection sorts the
rows; the synthesis pass decodes only the sources that were selected. Every stage writes whole files by atomic
rename and skips what already stands, so that a run killed at any moment continues to the same bytes.

Several processes share a stage by number: rank r of n scores shards r, r + n, ... and writes images and labels in
the same way. What is one file (selection, metadata, manifest, report) is rank 0's.
"""

from __future__ import annotations

import copy
import dataclasses
import heapq
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddfast.arguments import one_of, output_folder, path_of, whole_number
from ddfast.crowding import Neighbours, warn_of_crowding
from ddfast.data.decoding import MAX_PIXELS, decode
from ddfast.data.distilled import (
    SOFT_LABELS,
    Tile,
    image_path,
    metadata_row,
    write_image,
    write_metadata,
)
from ddfast.data.files import atomic_folder, atomic_path, make_folder
from ddfast.data.label_parts import (
    is_whole_part,
    join_label_parts,
    largest_probabilities,
    write_label_part,
)
from ddfast.data.loaders import LOADERS, resolve_loader
from ddfast.data.samples import Sample
from ddfast.data.sources import open_source, reasons_in_words
from ddfast.data.table import (
    SCORE_SCHEMA,
    is_readable,
    make_table,
    part_path,
    read_facts,
    score_schema,
    write_table,
)
from ddfast.errors import BadImage, UsageError
from ddfast.methods import get_method
from ddfast.methods.base import Batch, Candidates
from ddfast.methods.preparation import PREPARED, prepare
from ddfast.methods.run import (
    LABEL_TEMPERATURE,
    RUN,
    Run,
    TeacherChoice,
    check_folder,
    check_machine,
    check_teacher,
    check_teacher_choice,
    checked_device,
    command_line,
    decoding_workers,
    first_difference,
    host_facts,
    images_in_flight,
    make_plan,
    peak_memory,
    pixel_limit_of,
    rank_device,
    read_plan,
    score_digest,
    score_identity,
    start,
    threads_of,
    top_k_of,
)
from ddfast.methods.selection import SELECTION, iter_selection, write_selection
from ddfast.models import Teacher, load_teacher
from ddfast.models.class_order import read_class_order
from ddfast.models.teacher import checked_logits, is_named, with_class_order, with_outputs_in
from ddfast.ops import crop_resize
from ddfast.ops.precision import PRECISIONS
from ddfast.ops.transfer import Arriving, to_device
from ddfast.progress import Progress, say
from ddfast.ranks import join, usable_cores
from ddfast.training.preflight import check_reading, drawn_places, images_to_try, read_images, try_teacher
from ddfast.unchanged import unchanged
from ddfast.wording import argument, is_argument, plural, setting

ClassOrder = str | Path | Sequence[str] | Mapping[Any, Any]

SCORES = "scores"
QUARANTINED = "quarantined.jsonl"
_LISTED_QUARANTINED = 1000  # files that the manifest names; the table beside it names all
_LABEL_PARTS = ".soft-labels"
_LABEL_BATCH = 64  # tiles labelled together; fixed, because it decides the last bits
_LABEL_PART = (
    2048  # most images in one part of the soft labels, the unit of resumption and of work for a rank
)
_LABEL_PART_BYTES = 8 << 20  # of logits, which bounds a part where there are many classes


def open_run(
    method: str,
    *,
    data: str | Path,
    teacher: TeacherChoice,
    ipc: int,
    out: str | Path,
    label_teacher: TeacherChoice | None,
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
    loader: str = "auto",
    threads: str | int = "auto",
    label_top_k: str | int = "auto",
    class_order: ClassOrder | None = None,
    label_class_order: ClassOrder | None = None,
) -> Run:
    """Check everything that can be checked, then claim the output folder. Arguments as `distill`.

    Of several processes rank 0 claims the folder, and the others see that it is the same one and the same data.
    """
    ranks = join()
    folder = Path()
    neighbours = Neighbours()

    def check_settings() -> None:
        nonlocal data, folder, ipc, seed, images_per_class, image_size, scores
        get_method(method).from_options(options, preset).check(None)
        ipc = whole_number(ipc, "ipc", least=1)
        seed = whole_number(seed, "seed", least=0, most=2**63 - 1)
        images_per_class = whole_number(images_per_class, "images_per_class", least=1)
        if image_size is not None:
            image_size = whole_number(image_size, "image_size", least=1)
        one_of(str(factor), "factor", ("auto", "1", "2"))
        one_of(image_format, "image_format", ("png", "jpeg"))
        one_of(precision, "precision", PRECISIONS)
        if one_of(loader, "loader", LOADERS) != "auto":
            resolve_loader(loader, rank_device(device, ranks))
        threads_of(threads, rank_device(device, ranks))
        top_k_of(label_top_k, 1)
        images_in_flight(batch_size, 1)
        decoding_workers(workers, ranks)
        folder = output_folder(out)
        check_folder(folder)
        if not isinstance(data, str):
            data = path_of(data, "data")
        if scores is not None:
            scores = path_of(scores, "scores")
            if read_plan(scores) is None:
                raise UsageError(f"{argument('scores')} {scores} holds no ddfast run")
        for given, role in ((teacher, "teacher"), (label_teacher, "label_teacher")):
            if given is not None or role == "teacher":
                check_teacher_choice(given, role)
        for order in (class_order, label_class_order):
            if order is not None:
                read_class_order(order)
        if label_class_order is not None and label_teacher is None:
            raise UsageError(
                f"{argument('label_class_order')} describes a label teacher: give {argument('label_teacher')} as well"
            )

    def plan_run() -> Run:
        names = source.class_names
        main = _teacher(teacher, names, class_order)
        order = label_class_order
        if (
            order is None
            and label_teacher is not None
            and not callable(label_teacher)
            and not is_named(label_teacher)
        ):
            order = class_order  # an early checkpoint of the same training
        same = label_teacher is None or (label_teacher is teacher and label_class_order is None)
        labels = main if same or label_teacher is None else _teacher(label_teacher, names, order)
        for held, role in ((main, "teacher"), (labels, "label teacher")):
            check_teacher(held, source, role=role)
        if (labels.image_size, labels.mean, labels.std) != (main.image_size, main.mean, main.std):
            raise UsageError(
                "the label teacher must share the teacher's image size and normalisation: "
                f"{_reads(labels)}, the teacher {_reads(main)}"
            )
        size = image_size or main.image_size
        tiles_per_side = (1 if size <= 64 else 2) if factor == "auto" else int(factor)
        if tiles_per_side not in (1, 2) or size % tiles_per_side:
            raise UsageError(
                f"{argument('factor')} must be auto, 1 or 2 and divide the image size {size}, got {factor}"
            )
        chosen = get_method(method).from_options(options, preset).resolved(tiles_per_side)
        chosen.check(size)
        if size != main.image_size:
            _check_reads(main, size)
            _check_reads(labels, size)
        found_device = rank_device(device, ranks)
        before = read_plan(folder)
        name = before["arithmetic"]["loader"] if before is not None and loader == "auto" else loader
        found_loader = resolve_loader(name, found_device)
        plan = make_plan(
            chosen,
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
            loader=found_loader.name,
            threads=threads_of(threads, found_device),
            label_top_k=top_k_of(label_top_k, len(source.class_names)),
            max_pixels=pixel_limit_of(before),
        )
        return Run(
            out=folder,
            plan=plan,
            source=source,
            teacher=main,
            label_teacher=labels,
            method=chosen,
            device=found_device,
            loader=found_loader,
            in_flight=images_in_flight(batch_size, plan["arithmetic"]["micro_batch"]),
            workers=decoding_workers(workers, ranks),
            quiet=quiet or not ranks.main,
            ranks=ranks,
            facts={
                **host_facts(),
                "command": command_line(),
                "data": str(data),
                "teacher": main.path,
                "label_teacher": None if label_teacher is None else labels.path,
                "seconds": _earlier_seconds(folder),
                "ranks": ranks.size,
            },
        )

    ranks.together("settings", check_settings)
    source = ranks.main_first("data", lambda: open_source(data, "train"))
    run = ranks.together("plan", plan_run)
    ranks.on_main("start", lambda: _claim(run, scores, resume, preflight, threads))
    ranks.together("folder", lambda: _follow(run, device))
    run.set_arithmetic()
    say(f"loader: {run.loader.name} ({run.loader.reason})", quiet=run.quiet or run.complete)
    for note in source.notes():
        say(note, quiet=run.quiet or run.complete)
    _warn_of_crowding(run, neighbours)
    return run


def _check_reads(teacher: Teacher, size: int) -> None:
    """Refuse an image size that the teacher's network cannot take, by one black image."""
    try:
        with torch.no_grad():
            teacher.model(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UsageError(
            f"the teacher {teacher.arch} reads {teacher.image_size} px and cannot read {size} px: leave "
            f"{argument('image_size')} out, or train one at that size"
        ) from error


def _reads(teacher: Teacher) -> str:
    numbers = (", ".join(f"{value:g}" for value in values) for values in (teacher.mean, teacher.std))
    return "reads {} px with mean {} and deviation {}".format(teacher.image_size, *numbers)


def _claim(run: Run, scores: str | Path | None, resume: bool, preflight: bool, threads: str | int) -> None:
    """Rank 0: the checks that need data and teachers, then the folder with its manifest."""
    wanted = run.plan
    held = read_plan(run.out)
    if held is None:
        run.set_arithmetic()
        _check_counts(run)
        _check_outputs(run)
        if preflight:
            _preflight(run)
    elif threads != "auto" and held["arithmetic"]["threads"] != wanted["arithmetic"]["threads"]:
        raise UsageError(
            f"{run.out} was started with {setting('threads', held['arithmetic']['threads'])}, "
            "which decides its last bits: "
            "resume it with that number or without the option"
        )
    shared = _shared_scores(Path(scores), wanted) if scores is not None else None
    run.plan = start(run.out, wanted, resume)
    checked_device(run.plan, str(run.device), run.ranks)
    if not run.complete:
        run.save()
        if shared is not None:
            _copy_scores(shared, run.out)


def _follow(run: Run, device: str) -> None:
    """The other ranks: take rank 0's plan, which must be what they would have made."""
    if run.ranks.main:
        return
    held = read_plan(run.out)
    if held is None:
        raise UsageError(
            f"rank {run.ranks.rank} does not see the manifest that rank 0 wrote to {run.out}: "
            f"{argument('out')} must be one folder for all ranks"
        )
    difference = first_difference(held, run.plan)
    if difference is not None:
        raise UsageError(f"rank {run.ranks.rank} sees another run than rank 0 ({difference})")
    check_machine(
        held["arithmetic"], run.plan["arithmetic"], f"rank {run.ranks.rank} is on another machine: the run"
    )
    run.plan = held
    checked_device(held, device, run.ranks)


def _warn_of_crowding(run: Run, neighbours: Neighbours) -> None:
    """Say in a line where threads will wait for cores: for each other's, or for those of other programs."""
    threads, ranks, cores = run.plan["arithmetic"]["threads"], run.ranks.local_size, usable_cores()
    fitting = max(1, cores // ranks)
    if run.device.type != "cpu" or run.quiet or run.complete:
        return
    if ranks > 1 and threads > fitting:
        say(
            f"{plural(ranks, 'rank')} of {plural(threads, 'thread')} share {plural(cores, 'core')}: "
            f"a new run would be faster with {setting('threads', fitting)}"
        )
    elif ranks == 1:
        warn_of_crowding(neighbours, threads, lambda free: setting("threads", free))


def _teacher(given: TeacherChoice, class_names: Sequence[str], class_order: ClassOrder | None) -> Teacher:
    """A teacher of this run's own, its outputs in the order of the data where their order was said.

    Its model is a copy where the caller holds it: a run moves it and sets its mode and layout.
    """
    if callable(given):
        given = given()
    if not isinstance(given, Teacher):
        names = None if class_order is None else class_names
        return load_teacher(str(given), class_order=class_order, class_names=names)
    held = dataclasses.replace(given, model=copy.deepcopy(given.model).float().eval())
    if class_order is not None:
        return with_class_order(held, class_order, class_names)
    if held.class_order is not None and set(held.class_names) == set(class_names):
        return with_outputs_in(held, class_names)
    return held


def _earlier_seconds(out: Path) -> dict[str, float]:
    try:
        return dict(json.loads((out / RUN).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _check_counts(run: Run) -> None:
    """Refuse a class that cannot give IPC x tiles crops; where it would be close, decode to be sure."""
    needed, most = run.needed, run.plan["images_per_class"]
    if needed > most:
        raise UsageError(
            f"{_ipc_and_tiles(run)} needs {plural(needed, 'image')} a class, {argument('images_per_class')} is {most}: "
            + ("raise it" if is_argument("images_per_class") else "distil anew into another folder with more")
        )
    pool = run.pool()
    labels = run.source.samples.labels[pool]
    counts = np.bincount(labels, minlength=len(run.source.class_names))
    for label in np.flatnonzero(counts < 2 * needed).tolist():
        samples = _samples(run, pool[labels == label])
        usable, reasons = 0, []
        loaded = run.load(samples)
        for _, image in loaded:
            if isinstance(image, BadImage):
                reasons.append(str(image))
            else:
                usable += 1
            if usable == needed:
                break
        loaded.close()
        if usable < needed:
            raise UsageError(
                f"class {run.source.class_names[label]!r} has {plural(usable, 'usable image')}, "
                f"{_ipc_and_tiles(run)} needs {needed}{reasons_in_words(reasons)}"
            )


def _ipc_and_tiles(run: Run) -> str:
    return f"IPC {run.plan['ipc']} x {plural(run.plan['tiles'], 'tile')}"


def _samples(run: Run, places: Iterable[int]) -> Iterator[Sample]:
    """The samples at these places of the source, one after the other."""
    return (run.source.samples[int(place)] for place in places)


def _preflight(run: Run) -> None:
    """Try the teachers on training images: see `ddfast.training.preflight`."""
    names = run.source.class_names
    count = images_to_try(run.plan["image_size"], run.device)
    places = drawn_places(run.source.samples.labels, len(names), count)
    loaded = run.load(_samples(run, places))
    pairs = [(image, s.label) for s, image in loaded if not isinstance(image, BadImage)]
    if not pairs:
        return
    images = torch.stack([image for image, _ in pairs])
    labels = torch.tensor([label for _, label in pairs])
    for teacher, role in _teachers(run):
        model = teacher.model.to(run.device)
        found = try_teacher(model, images, teacher.mean, teacher.std, len(names), run.device, role=role)
        check_reading(
            read_images(found, labels, len(names)),
            names,
            role=role,
            what="training image",
            top1=teacher.top1,
            quiet=run.quiet,
        )


def _teachers(run: Run) -> list[tuple[Teacher, str]]:
    """The teachers of a run with their roles; one that has both roles once."""
    if run.label_teacher is run.teacher:
        return [(run.teacher, "teacher")]
    return [(run.teacher, "teacher"), (run.label_teacher, "label teacher")]


def _check_outputs(run: Run) -> None:
    """See on two black images that the teachers return logits of their classes."""
    side, classes = run.plan["image_size"], len(run.source.class_names)
    for teacher, role in _teachers(run):
        images = torch.zeros(2, 3, side, side, dtype=torch.uint8)
        try_teacher(
            teacher.model.to(run.device), images, teacher.mean, teacher.std, classes, run.device, role=role
        )


def _logits(teacher: Teacher, images: Tensor, run: Run) -> Tensor:
    """Float32 logits of uint8 images [N, 3, S, S], on the CPU."""
    mean = torch.tensor(teacher.mean, device=run.device).view(1, 3, 1, 1)
    std = torch.tensor(teacher.std, device=run.device).view(1, 3, 1, 1)
    batch = (images.to(run.device).float().div_(255) - mean) / std
    with torch.no_grad():
        outputs = teacher.model.to(run.device)(batch.contiguous(memory_format=torch.channels_last))
        logits = checked_logits(outputs, len(teacher.class_names)).float().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise UsageError("the teacher returns NaN or infinity: its weights are damaged, train it again")
    return logits


# Score
# ----------------------------------------------------------------------------------------------------------


def score(run: Run) -> None:
    """Score pass: decode each source of the pool once, and keep rows of candidate crops in `scores/`.

    Where the method wants one, a preparation on the whole pool comes first.
    """
    started = time.monotonic()
    run.set_arithmetic()
    if run.method.prepares:
        prepare(run)
        clock(run, "prepare", started)
        started = time.monotonic()
    processor = time.process_time()
    make_folder(run.out / SCORES)
    pool, size = run.pool(), run.plan["arithmetic"]["shard_sources"]
    mine = run.ranks.share(_shards(run))
    digest = score_digest(run.plan)
    missing = [i for i in mine if not _is_committed(part_path(run.out / SCORES, i), i, digest)]
    if missing:
        for teacher in (run.teacher, run.label_teacher):
            teacher.model.to(device=run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        shards = [pool[i * size : (i + 1) * size] for i in missing]
        sources = sum(len(pool[i * size : (i + 1) * size]) for i in mine)
        wanted = sum(len(shard) for shard in shards)
        wished = (sample for shard in shards for sample in _samples(run, shard))
        label = "score" if run.ranks.size == 1 else f"score, rank 0 of {run.ranks.size}"
        progress = Progress(label, sources, "images", done=sources - wanted, quiet=run.quiet)
        with progress, unchanged(run.teacher.model, run.label_teacher.model):
            _warm(run, shards[0])
            loaded = _Awaited(run.load(wished, on_device=True))
            _score_shards(
                run,
                [
                    _Shard(run, index, len(shard), digest)
                    for index, shard in zip(missing, shards, strict=True)
                ],
                loaded,
                progress,
            )
        _note_rate(run, wanted, time.monotonic() - started, loaded.seconds, time.process_time() - processor)
    run.ranks.meet("score")
    clock(run, "score", started)


def _is_committed(path: Path, index: int, digest: str) -> bool:
    """Whether a file is shard `index` of this score table, every byte of it as it was written."""
    if not is_readable(path, SCORE_SCHEMA):
        return False
    facts = read_facts(path)
    return facts.get("shard") == index and facts.get("scores") == digest


def _shards(run: Run) -> int:
    """Shards of the score table."""
    return -(-len(run.pool()) // int(run.plan["arithmetic"]["shard_sources"]))


class _Awaited:
    """An iterator over loaded images that counts the seconds for which its consumer, the model, had to wait."""

    def __init__(self, loaded: Iterator[tuple[Sample, Tensor | BadImage]]) -> None:
        self._loaded = loaded
        self.seconds = 0.0

    def __iter__(self) -> _Awaited:
        return self

    def __next__(self) -> tuple[Sample, Tensor | BadImage]:
        started = time.monotonic()
        try:
            return next(self._loaded)
        finally:
            self.seconds += time.monotonic() - started


def _note_rate(run: Run, sources: int, seconds: float, waited: float, processor: float) -> None:
    """Keep in `run.json` how fast this pass of this rank was, and the share of it in which the model was busy.

    `processor` is the time of all its threads on a core, which neighbours on the machine do not lengthen.
    """
    run.facts["score"] = {
        "sources": sources,
        "seconds": round(seconds, 3),
        "processor_seconds": round(processor, 3),
        "waited_for_images": round(waited, 3),
        "busy": round(1 - waited / seconds, 4) if seconds > 0 else None,
    }


class _Shard:
    """A shard of the score table on its way to the disk, where it goes with its last micro-batch."""

    def __init__(self, run: Run, index: int, sources: int, digest: str) -> None:
        self.sources = sources
        self._path, self._facts = part_path(run.out / SCORES, index), {"shard": index, "scores": digest}
        self._columns: dict[str, list[Any]] = {}
        self._bad: list[dict[str, str]] = []
        self._left = sources

    def add(self, pairs: list[tuple[Sample, Tensor | BadImage]], candidates: Candidates | None) -> None:
        """The rows of its next micro-batch, on the host; files that could not be read stand in the footer."""
        self._bad += [
            {"path": s.key, "reason": str(image)} for s, image in pairs if isinstance(image, BadImage)
        ]
        if candidates is not None:
            if candidates.damaged is not None and int(candidates.damaged):
                raise UsageError(
                    "the teacher returns NaN or infinity for real images: its weights are damaged, train it again"
                )
            good = [i for i, (_, image) in enumerate(pairs) if not isinstance(image, BadImage)]
            _append_rows(self._columns, [pairs[i][0] for i in good], good, candidates)
        self._left -= len(pairs)
        if not self._left:
            self._commit()

    def _commit(self) -> None:
        rows = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        width = rows["features"].shape[1] if "features" in rows else 0
        table = make_table(rows, score_schema(width)) if rows else SCORE_SCHEMA.empty_table()
        write_table(self._path, table, {**self._facts, "quarantined": self._bad})


def _score_shards(
    run: Run,
    shards: Iterable[_Shard],
    loaded: Iterator[tuple[Sample, Tensor | BadImage]],
    progress: Progress,
) -> None:
    """Score loaded images, micro-batch by micro-batch.

    On a GPU the rows of a micro-batch are read when the next one is under way, so that the device never waits for the
    host to ask.
    """
    micro_batch = run.plan["arithmetic"]["micro_batch"]
    late = 0 if run.device.type == "cpu" else 1
    waiting: deque[tuple[_Shard, list[tuple[Sample, Tensor | BadImage]], _Rows | None]] = deque()

    def settle(most: int) -> None:
        while len(waiting) > most:
            shard, pairs, rows = waiting.popleft()
            shard.add(pairs, None if rows is None else rows.wait())
            progress.advance(len(pairs))

    for shard in shards:
        for first in range(0, shard.sources, micro_batch):
            pairs = [next(loaded) for _ in range(min(micro_batch, shard.sources - first))]
            rows = None
            if any(not isinstance(image, BadImage) for _, image in pairs):
                try:
                    rows = _Rows(run.method.score(_micro_batch(run, pairs, micro_batch), run.context))
                except ValueError as error:
                    raise UsageError(f"cannot score with this teacher: {error}") from error
            waiting.append((shard, pairs, rows))
            settle(late)
    settle(0)


def _warm(run: Run, places: np.ndarray) -> None:
    """Score the first images until a GPU has recorded the passes, before the loader's threads are there."""
    if run.device.type == "cpu":
        return
    micro_batch = run.plan["arithmetic"]["micro_batch"]
    loaded = run.load(_samples(run, places[:micro_batch]), on_device=True)
    pairs = list(loaded)
    if any(not isinstance(image, BadImage) for _, image in pairs):
        for _ in range(4):  # the first compiles, the second is watched, the third records
            _Rows(run.method.score(_micro_batch(run, pairs, micro_batch), run.context)).wait()


class _Rows:
    """Candidates on their way to the host."""

    def __init__(self, candidates: Candidates) -> None:
        held = {field.name: getattr(candidates, field.name) for field in dataclasses.fields(candidates)}
        self._names = [name for name, value in held.items() if value is not None]
        self._arriving = Arriving([held[name] for name in self._names])

    def wait(self) -> Candidates:
        """The candidates, their tensors on the host."""
        return Candidates(**dict(zip(self._names, self._arriving.wait(), strict=True)))


def _micro_batch(run: Run, pairs: list[tuple[Sample, Tensor | BadImage]], size: int) -> Batch:
    """A batch of fixed size: black images stand where a file is bad and behind the last one."""
    side = run.plan["image_size"]
    labels, ids = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    place = next(image.device for _, image in pairs if not isinstance(image, BadImage))
    images = [torch.zeros(3, side, side, dtype=torch.uint8, device=place)] * size
    for i, (sample, image) in enumerate(pairs):
        if not isinstance(image, BadImage):
            images[i], labels[i], ids[i] = image, sample.label, sample.id
    # One copy where the images lie, and none to the device where that is there.
    return Batch(to_device(torch.stack(images), run.device), labels, ids)


def _append_rows(
    columns: dict[str, list[Any]], samples: list[Sample], places: list[int], candidates: Candidates
) -> None:
    boxes = candidates.boxes.numpy()[places]
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
            rows[name] = values.numpy()[places].reshape(-1)
    if candidates.phi is not None:
        rows["phi"] = np.repeat(candidates.phi.float().numpy()[places], crops, axis=0)
    if candidates.features is not None:
        rows["features"] = np.repeat(candidates.features.numpy()[places], crops, axis=0)
    for name, values in rows.items():
        columns.setdefault(name, []).append(values)


def iter_quarantined(run: Run) -> Iterator[dict[str, str]]:
    """Files of the pool that could not be decoded, as {path, reason}, shard by shard."""
    for index in range(_shards(run)):
        yield from read_facts(part_path(run.out / SCORES, index)).get("quarantined", ())


def _shared_scores(folder: Path, plan: dict[str, Any]) -> Path:
    """Check that the score table of another run is the one this plan would compute."""
    held = read_plan(folder)
    if held is None:
        raise UsageError(f"{argument('scores')} {folder} holds no ddfast run")
    difference = first_difference(score_identity(held), score_identity(plan), settled=())
    if difference is not None:
        raise UsageError(
            f"{argument('scores')} {folder} was scored with other settings, data or teacher ({difference})"
        )
    check_machine(held["arithmetic"], plan["arithmetic"], f"{argument('scores')} {folder}")
    if not (folder / SELECTION).is_file():
        raise UsageError(f"{argument('scores')} {folder} is not scored to its end: finish that run first")
    return folder


def _copy_scores(folder: Path, out: Path) -> None:
    make_folder(out / SCORES)
    for path in sorted((folder / SCORES).glob("part-*")):
        if not (out / SCORES / path.name).exists():
            copy = out / SCORES / f".{path.name}.tmp-0"
            shutil.copyfile(path, copy)
            copy.replace(out / SCORES / path.name)
    if (folder / PREPARED).exists():
        copy = out / f".{PREPARED}.tmp-0"
        shutil.copyfile(folder / PREPARED, copy)
        copy.replace(out / PREPARED)


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
        UsageError: the pool is too small for it, or that folder exists; the run stays as it was.
    """
    ipc = whole_number(ipc, "ipc", least=1)
    if ipc == run.plan["ipc"]:
        return
    held = json.loads(json.dumps(run.plan))
    run.plan["ipc"] = ipc
    run.plan.update(complete=False, counts=None, quarantined=None)
    run.ranks.on_main("ipc", lambda: _drop_selected(run, held))


def _drop_selected(run: Run, held: dict[str, Any]) -> None:
    _check_counts(run)
    if held["complete"]:
        _keep_finished(run, held["ipc"])
    run.save()
    for folder in ("train", _LABEL_PARTS):
        shutil.rmtree(run.out / folder, ignore_errors=True)
    for name in (SELECTION, SOFT_LABELS, QUARANTINED, "report.html", "mosaic.png"):
        (run.out / name).unlink(missing_ok=True)


def _keep_finished(run: Run, ipc: int) -> None:
    """Keep the finished set of an IPC beside the run, before its own files go."""
    kept = run.out.with_name(f"{run.out.resolve().name}-ipc{ipc}")
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


# Synthesize
# -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """One image of the selection: its label, its number in its class, and its tiles in row-major order."""

    label: int
    index: int
    path: str
    ids: list[int]
    keys: list[str]
    boxes: np.ndarray
    scores: list[float]


def _chosen_images(run: Run) -> Iterator[_Chosen]:
    """The images of the selection in their order."""
    tiles, names = run.plan["tiles"], run.source.class_names
    for block in iter_selection(run.out):
        for first in range(0, len(block["label"]), tiles):
            rows = slice(first, first + tiles)
            label, index = int(block["label"][first]), int(block["image"][first])
            yield _Chosen(
                label=label,
                index=index,
                path=image_path(label, names[label], index, run.plan["format"]),
                ids=block["sample_id"][rows].tolist(),
                keys=[str(key) for key in block["key"][rows]],
                boxes=block["box"][rows],
                scores=[float(score) for score in block["score"][rows]],
            )


def synthesize(run: Run) -> None:
    """Synthesis pass: decode only the selected sources, cut and tile their crops, write the images."""
    started = time.monotonic()
    run.set_arithmetic()
    tiles, factor = run.plan["tiles"], run.plan["factor"]
    mine = run.ranks.share(len(run.source.class_names) * run.plan["ipc"])
    missing = _missing_images(run)
    samples = (run.source.by_id(i) for image in _picked(run, missing) for i in image.ids)
    loaded = run.load(samples)
    side = run.plan["image_size"] // factor
    done = len(mine) - int(missing.sum())
    with Progress("synthesize", len(mine), "images", done=done, quiet=run.quiet) as progress:
        for image in _picked(run, missing):
            sources = torch.stack([_decoded(*next(loaded)) for _ in range(tiles)])
            boxes = torch.from_numpy(image.boxes.copy())
            mosaic = crop_resize(sources, boxes, side, source=torch.arange(tiles), factor=factor)
            write_image(run.out / image.path, mosaic[0])
            progress.advance()
    loaded.close()
    run.ranks.meet("synthesize")
    run.ranks.on_main("metadata", lambda: write_metadata(run.out, _metadata_rows(run)))
    clock(run, "synthesize", started)


def _missing_images(run: Run) -> np.ndarray:
    """Which images are this rank's and not yet written whole, bool [images]."""
    missing = np.zeros(len(run.source.class_names) * run.plan["ipc"], dtype=bool)
    for number, image in enumerate(_chosen_images(run)):
        if number % run.ranks.size == run.ranks.rank:
            missing[number] = not _is_whole_image(run.out / image.path)
    return missing


def _picked(run: Run, wanted: np.ndarray) -> Iterator[_Chosen]:
    return (image for image, picked in zip(_chosen_images(run), wanted, strict=True) if picked)


def _is_whole_image(path: Path) -> bool:
    """Whether an image that an earlier run wrote has kept its end (and, as a PNG, its checksums)."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.verify()
        with open(path, "rb") as file:
            file.seek(-2, os.SEEK_END)
            return path.suffix != ".jpg" or file.read() == b"\xff\xd9"
    except (OSError, SyntaxError, ValueError):
        return False


def _metadata_rows(run: Run) -> Iterator[dict[str, Any]]:
    for image in _chosen_images(run):
        cut = [
            Tile(key, box.tolist(), score)
            for key, box, score in zip(image.keys, image.boxes, image.scores, strict=True)
        ]
        name = run.source.class_names[image.label]
        yield metadata_row(image.label, name, image.index, cut, run.plan["format"])


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
    run.ranks.on_main("counts", lambda: _count(run))
    clock(run, "relabel", started)


def _count(run: Run) -> None:
    """Count images, sources and quarantined files, and list these."""
    shutil.rmtree(run.out / _LABEL_PARTS, ignore_errors=True)
    bad = sum(1 for _ in iter_quarantined(run))
    if bad:
        with atomic_path(run.out / QUARANTINED) as temporary, open(temporary, "wb") as file:
            for row in iter_quarantined(run):
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))
    listed = heapq.nsmallest(_LISTED_QUARANTINED, iter_quarantined(run), key=lambda row: row["path"])
    images = len(run.source.class_names) * run.plan["ipc"]
    run.plan["counts"] = {"images": images, "sources": len(run.pool()) - bad, "quarantined": bad}
    run.plan["quarantined"] = {"count": bad, "files": listed}


def _write_labels(run: Run) -> None:
    """`soft_labels.safetensors` from the written images, part by part; finished parts survive a kill."""
    classes, tiles, top_k = len(run.source.class_names), run.plan["tiles"], run.plan["label_top_k"]
    images = classes * run.plan["ipc"]
    folder = make_folder(run.out / _LABEL_PARTS)
    size = _part_images(classes, tiles)
    parts = [folder / f"part-{index:06d}" for index in range(-(-images // size))]
    mine = run.ranks.share(len(parts))
    total = sum(min(size, images - index * size) for index in mine)
    with Progress("relabel", total, "images", quiet=run.quiet) as progress:
        for index in mine:
            names = [
                _image_path(run, number) for number in range(index * size, min((index + 1) * size, images))
            ]
            if is_whole_part(parts[index]):
                progress.advance(len(names))
            else:
                _label_part(run, parts[index], names, progress)
    run.ranks.meet("relabel")
    shape = (images, tiles, classes if top_k is None else top_k)
    run.ranks.on_main(
        "labels",
        lambda: join_label_parts(run.out, parts, shape, LABEL_TEMPERATURE, indexed=top_k is not None),
    )


def _image_path(run: Run, number: int) -> Path:
    """Path of image `number` of all, classes in label order."""
    label, index = divmod(number, run.plan["ipc"])
    return run.out / image_path(label, run.source.class_names[label], index, run.plan["format"])


def _part_images(classes: int, tiles: int) -> int:
    """Images of one part of the soft labels: whole batches, few where there are many classes."""
    images = _LABEL_BATCH // tiles
    return images * max(1, min(_LABEL_PART // images, _LABEL_PART_BYTES // (4 * classes * _LABEL_BATCH)))


def _label_part(run: Run, path: Path, names: list[Path], progress: Progress) -> None:
    """Write softmax(logits / T) of every tile of the named images; a tile is enlarged to the image."""
    size, factor = run.plan["image_size"], run.plan["factor"]
    per_batch = _LABEL_BATCH // factor**2
    found = []
    for first in range(0, len(names), per_batch):
        images = torch.stack([_written_image(name) for name in names[first : first + per_batch]])
        tiles = _tiles(images, factor)
        if factor > 1:
            tiles = crop_resize(
                tiles, torch.tensor([[0, 0, size // factor, size // factor]]).expand(len(tiles), 1, 4), size
            )[:, 0]
        full = torch.zeros(_LABEL_BATCH, 3, size, size, dtype=torch.uint8)
        full[: len(tiles)] = tiles
        logits = _logits(run.label_teacher, full, run)[: len(tiles)]
        probabilities = torch.softmax(logits / LABEL_TEMPERATURE, dim=1)
        stored = largest_probabilities(
            probabilities.view(len(images), factor**2, -1), run.plan["label_top_k"]
        )
        found.append(stored)
        progress.advance(len(images))
    values = torch.cat([values for values, _ in found])
    indices = [indices for _, indices in found if indices is not None]
    write_label_part(path, values, torch.cat(indices) if indices else None)


def _written_image(path: Path) -> Tensor:
    if not path.is_file():
        raise UsageError(f"{path} is missing: run the synthesize stage first")
    try:
        return decode(path.read_bytes(), max_pixels=MAX_PIXELS)
    except (OSError, BadImage) as error:
        raise UsageError(
            f"{path} cannot be read ({error}): delete it and run the synthesize stage again"
        ) from error


def _tiles(images: Tensor, factor: int) -> Tensor:
    """Images [N, 3, S, S] -> their tiles [N * factor^2, 3, S/factor, S/factor] in row-major order."""
    count, _, size, _ = images.shape
    side = size // factor
    split = images.view(count, 3, factor, side, factor, side).permute(0, 2, 4, 1, 3, 5)
    return split.reshape(count * factor**2, 3, side, side)


def clock(run: Run, stage: str, started: float) -> None:
    """Add the seconds of a stage and the memory of this process so far to `run.json`, and save."""
    seconds = run.facts.setdefault("seconds", {})
    seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - started, 3)
    run.facts["peak_memory"] = peak_memory()
    run.save()
