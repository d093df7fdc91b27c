"""Opening a run: every check that can be made before work begins, then the folder that it fills."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddfast.arguments import one_of, output_folder, path_of, whole_number, whole_number_or
from ddfast.crowding import Neighbours, warn_of_crowding
from ddfast.data.loaders import LOADERS, resolve_loader
from ddfast.data.opening import open_source
from ddfast.data.sources import Source, reasons_in_words
from ddfast.errors import BadImage, UsageError
from ddfast.files import make_folder, sweep_temporary
from ddfast.methods import get_method
from ddfast.models import Teacher, load_teacher
from ddfast.models.class_order import read_class_order
from ddfast.models.teacher import is_named, with_class_order, with_outputs_in
from ddfast.ops.precision import PRECISIONS
from ddfast.output.distilled import PREPARED, SCORES, SELECTION
from ddfast.pipeline.plan import (
    check_machine,
    first_difference,
    machine_arithmetic,
    make_plan,
    mixes_machines,
    pixel_limit_of,
    read_plan,
    score_identity,
    threads_of,
    top_k_of,
)
from ddfast.pipeline.run import RUN, Run, command_line, host_facts
from ddfast.progress import say
from ddfast.ranks import Ranks, join, usable_cores
from ddfast.training.device import resolve_device
from ddfast.training.preflight import check_reading, drawn_places, images_to_try, read_images, try_teacher
from ddfast.wording import argument, is_argument, on_command_line, plural, setting

TeacherChoice = str | Path | Teacher | Callable[[], Teacher]
"""A teacher by its file or name, a loaded one, or what loads it once the settings are checked."""


def start(out: Path, plan: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Claim the output folder for `plan`, or find the run that it holds.

    Returns:
        The plan to follow: the given one, or on resumption the stored one, whose arithmetic stays.

    Raises:
        UsageError: the folder holds something else, a different run, or this run without `resume`.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; {argument('out')} must be a folder")
    held = read_plan(out)
    if held is None:
        check_folder(out)
        make_folder(out)
        sweep_temporary(out)
        return _noted(plan)
    difference = first_difference(held, plan)
    if difference is not None:
        again = ""
        if difference.startswith("ipc:"):
            again = f", or select again from its scores: {_select_again(out, plan['ipc'])}"
        raise UsageError(
            f"{out} already holds a different run ({difference}); choose another folder or delete it{again}"
        )
    if not resume:
        go_on = setting("resume", True)
        raise UsageError(
            f"{out} already holds a finished run of the same settings: use it, or give another "
            f"{argument('out')} to distil anew ({go_on} leaves it as it is)"
            if held["complete"]
            else f"{out} already holds an unfinished run of the same settings; continue it with {go_on}"
        )
    if not held["complete"]:
        check_machine(held["arithmetic"], plan["arithmetic"], f"the run in {out}")
    sweep_temporary(out)
    return _noted(held)


def _noted(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan, which says whether machines of different arithmetic were let in."""
    return {**plan, "mixed_machines": True} if mixes_machines() and not plan["complete"] else plan


def check_folder(out: Path) -> None:
    """Refuse a folder that holds something else than a run; what a killed start left does not count.

    Raises:
        UsageError: it does, or its manifest is damaged.
    """
    if read_plan(out) is not None or not out.is_dir():
        return
    if any(not (entry.name.startswith(".") and ".tmp-" in entry.name) for entry in out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no ddfast run; choose another folder")


def _select_again(out: Path, ipc: int) -> str:
    if on_command_line():
        return f"ddfast select {out} --ipc {ipc}"
    return f"ddfast.pipeline.select.change_ipc(run, {ipc})"


def check_teacher(teacher: Teacher, source: Source, *, role: str = "teacher") -> None:
    """Refuse a teacher whose outputs are not the classes of the data, in that order.

    Raises:
        UsageError: the counts or the orders differ.
    """
    theirs, ours = list(teacher.class_names), list(source.class_names)
    if len(theirs) != len(ours):
        raise UsageError(
            f"the {role} knows {plural(len(theirs), 'class')}, {source.name} has {len(ours)}: give its own teacher"
        )
    for index, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if a != b:
            raise UsageError(
                f"the {role}'s class {index} is {a!r}, that of {source.name} is {b!r}: the class order must match, or "
                f"be said with {argument('class_order' if role == 'teacher' else 'label_class_order')}"
            )


def check_teacher_choice(given: TeacherChoice | None, role: str) -> None:
    """Refuse what cannot be a teacher, a file that is not there among it; nothing is read yet."""
    if isinstance(given, torch.nn.Module):
        raise UsageError(
            f"{argument(role)} must be a ddfast Teacher, which knows classes and normalisation, got the bare module "
            f"{type(given).__name__}: write it with ddfast.models.save_teacher"
        )
    if isinstance(given, Teacher) or callable(given) or str(given).startswith("torchvision:"):
        return
    path = path_of(given, role)
    if path.is_dir():
        raise UsageError(f"{argument(role)} {path} is a folder: give a .safetensors file of train-teacher")
    if not path.is_file():
        raise UsageError(
            f"no teacher file {path}: give a .safetensors file of train-teacher, a .pt state dict "
            "or torchvision:NAME"
        )


def reopen(
    out: str | Path,
    *,
    data: str | Path | None = None,
    teacher: str | Path | None = None,
    label_teacher: str | Path | None = None,
    device: str = "auto",
    batch_size: str | int = "auto",
    workers: int | None = None,
    quiet: bool = False,
) -> Run:
    """Open the run in a folder again, with the paths of its `run.json` unless others are given.

    Raises:
        UsageError: no run there, or data or teachers are not those of the run.
    """
    ranks = join()
    run = ranks.together(
        "run",
        lambda: _reopened(
            Path(out),
            ranks,
            data,
            teacher,
            label_teacher,
            device,
            batch_size,
            workers,
            quiet or not ranks.main,
        ),
    )
    ranks.on_main("sweep", lambda: _swept(run.out))
    return run


def _swept(out: Path) -> None:
    sweep_temporary(out)


def _reopened(
    out: Path,
    ranks: Ranks,
    data: str | Path | None,
    teacher: str | Path | None,
    label_teacher: str | Path | None,
    device: str,
    batch_size: str | int,
    workers: int | None,
    quiet: bool,
) -> Run:
    plan = read_plan(out)
    if plan is None:
        raise UsageError(f"{out} holds no ddfast run: start one with ddfast score or ddfast distill")
    found_device = checked_device(plan, device, ranks)
    in_flight = images_in_flight(batch_size, plan["arithmetic"]["micro_batch"])
    threads = decoding_workers(workers, ranks)
    if not plan["complete"]:
        check_machine(plan["arithmetic"], machine_arithmetic(found_device), f"the run in {out}")
        plan = _noted(plan)
    facts = _facts_of(out, plan, data, teacher, label_teacher)
    for role, given in (("teacher", teacher), ("label_teacher", label_teacher)):
        _check_teacher_stands(given or facts[role], role, moved=given is None)
    try:
        source = open_source(data or facts["data"], "train")
    except UsageError as error:
        if data is not None:
            raise
        raise UsageError(f"{error} ({argument('data')} says where it is now)") from error
    main = _load_again(teacher or facts["teacher"], plan, "teacher")
    labels = label_teacher or facts["label_teacher"]
    run = Run(
        out=out,
        plan=plan,
        source=source,
        teacher=main,
        label_teacher=main if labels is None else _load_again(labels, plan, "label_teacher"),
        method=get_method(plan["method"]).from_options(
            {**plan["options"]["score"], **plan["options"]["select"]}
        ),
        device=found_device,
        loader=resolve_loader(plan["arithmetic"]["loader"], found_device),
        in_flight=in_flight,
        workers=threads,
        quiet=quiet,
        ranks=ranks,
        facts=facts,
    )
    for found, wanted, what in (
        (source.fingerprint(), plan["data"]["fingerprint"], f"the data {source.name}"),
        (main.sha256, plan["teacher"]["sha256"], f"the teacher {main.path}"),
        (
            run.label_teacher.sha256,
            plan["label_teacher"]["sha256"],
            f"the label teacher {labels or main.path}",
        ),
    ):
        if found != wanted:
            raise UsageError(f"{what} is not what {out} was started with: its content has changed")
    return run


def _load_again(spec: str | Path | None, plan: dict[str, Any], role: str) -> Teacher:
    """A teacher of a run by its file, with what the manifest says of it."""
    if spec is None:
        raise UsageError(
            f"the run was started with a teacher that has no file: give its file as {argument(role)}"
        )
    said: dict[str, Any] = {}
    if not is_named(spec) and not str(spec).startswith("torchvision:"):
        said = {
            "arch": plan[role]["arch"],
            "normalization": (plan["mean"], plan["std"]),
            "image_size": plan["image_size"],
        }
    return load_teacher(
        str(spec), class_names=plan["class_names"], class_order=plan[role].get("class_order"), **said
    )


def _check_teacher_stands(path: str | Path | None, role: str, *, moved: bool) -> None:
    if path is None:
        return
    try:
        check_teacher_choice(path, role)
    except UsageError as error:
        if not moved:
            raise
        raise UsageError(f"{error} ({argument(role)} says where it is now)") from error


def _facts_of(
    out: Path,
    plan: dict[str, Any],
    data: str | Path | None,
    teacher: str | Path | None,
    label_teacher: str | Path | None,
) -> dict[str, Any]:
    """`run.json` of a folder; where it is lost, what it would say of the paths that are given.

    Raises:
        UsageError: it is lost, and not all paths are given.
    """
    try:
        facts = json.loads((out / RUN).read_text(encoding="utf-8"))
        return {**{key: facts[key] for key in ("data", "teacher", "label_teacher")}, **facts}
    except (OSError, ValueError, KeyError, TypeError) as error:
        one = plan["label_teacher"]["sha256"] == plan["teacher"]["sha256"]
        given = {"data": data, "teacher": teacher, **({} if one else {"label_teacher": label_teacher})}
        missing = [argument(key) for key, value in given.items() if value is None]
        if missing:
            raise UsageError(f"{out / RUN} is missing or damaged: give {' and '.join(missing)}") from error
        return {
            key: None if value is None else str(value)
            for key, value in {"label_teacher": None, **given}.items()
        }


def rank_device(device: str, ranks: Ranks) -> torch.device:
    """The device of this process: of several on a host each takes the GPU of its local rank.

    Raises:
        UsageError: no such device.
    """
    found = resolve_device(device)
    if found.type == "cuda" and found.index is None and ranks.size > 1:
        found = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(found)
    return found


def decoding_workers(workers: int | None, ranks: Ranks) -> int | None:
    """Decoding threads of this process: the number given, else its part of the host's cores."""
    if workers is not None:
        return whole_number(workers, "workers", least=0)
    if ranks.size == 1:
        return None
    return max(1, min(16, usable_cores() // ranks.local_size))


def checked_device(plan: dict[str, Any], device: str, ranks: Ranks) -> torch.device:
    """The device of this process, which must be of the type that the plan fixed.

    Raises:
        UsageError: another device type.
    """
    found = rank_device(device, ranks)
    wanted = plan["arithmetic"]["device"]
    if found.type != wanted:
        raise UsageError(
            f"this run was started on {wanted} and would end in other bytes on {found.type}: "
            f"use {setting('device', wanted)}"
        )
    return found


def images_in_flight(batch_size: str | int, micro_batch: int) -> int:
    """Images decoded ahead of the model: whole micro-batches, at least one; `auto` is four.

    Raises:
        UsageError: neither `auto` nor a positive number.
    """
    if batch_size == "auto":
        return 4 * micro_batch
    count = int(whole_number_or(batch_size, "batch_size", ("auto",)))
    return -(-count // micro_batch) * micro_batch


ClassOrder = str | Path | Sequence[str] | Mapping[Any, Any]


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
        samples = run.samples(pool[labels == label])
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


def _preflight(run: Run) -> None:
    """Try the teachers on training images: see `ddfast.training.preflight`."""
    names = run.source.class_names
    count = images_to_try(run.plan["image_size"], run.device)
    places = drawn_places(run.source.samples.labels, len(names), count)
    loaded = run.load(run.samples(places))
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
