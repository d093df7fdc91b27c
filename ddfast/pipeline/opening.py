"""Opening a run: every check that can be made before work begins, then the folder that it fills."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddfast.arguments import data_of, positive_number, whole_number, whole_number_or
from ddfast.crowding import Neighbours, warn_of_crowding
from ddfast.data.loaders import resolve_loader
from ddfast.data.opening import open_source
from ddfast.data.shown_names import check_shown_names, read_shown_names
from ddfast.data.sources import IN_MEMORY, check_outside, place_of
from ddfast.errors import BadImage, UsageError
from ddfast.files import make_folder, sweep_temporary
from ddfast.history import History, check_history
from ddfast.methods import get_method
from ddfast.methods.base import Method
from ddfast.methods.synthesis import Synthesis
from ddfast.ops._dispatch import say_slow_ops
from ddfast.pipeline.counting import check_counts, check_pool
from ddfast.pipeline.judging import check_judged
from ddfast.pipeline.plan import (
    check_machine,
    first_difference,
    machine_arithmetic,
    make_plan,
    mixes_machines,
    pixel_limit_of,
    read_plan,
    threads_of,
    top_k_of,
)
from ddfast.pipeline.run import RUN, Run, command_line, host_facts
from ddfast.pipeline.shared_scores import copy_scores, shared_scores
from ddfast.pipeline.teachers import (
    check_reads,
    check_stands,
    check_teachers,
    load_again,
    normalization_of,
    open_teachers,
    with_one_teacher,
)
from ddfast.progress import say
from ddfast.ranks import Ranks, join, usable_cores
from ddfast.settings import Settings
from ddfast.training.device import resolve_device
from ddfast.training.preflight import check_reading, drawn_places, images_to_try, read_images, try_teacher
from ddfast.training.teacher import native_size
from ddfast.wording import argument, on_command_line, plural, setting

SCORED_OF_A_CLASS = 300  # sources of a class that methods which choose crops score by default


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
        if difference.startswith("ipc:") and "select" in get_method(held["method"]).stages:
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


def reopen(
    out: str | Path,
    *,
    data: Any = None,
    teacher: str | Path | None = None,
    label_teacher: str | Path | None = None,
    device: str = "auto",
    batch_size: str | int = "auto",
    workers: int | None = None,
    pool_memory: float | None = None,
    quiet: bool = False,
) -> Run:
    """Open the run in a folder again, with the paths of its `run.json` unless others are given.

    Raises:
        UsageError: no run there, or data or teachers are not those of the run.
    """
    if pool_memory is not None:
        pool_memory = positive_number(pool_memory, "pool_memory", zero=True)
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
            pool_memory,
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
    data: Any,
    teacher: str | Path | None,
    label_teacher: str | Path | None,
    device: str,
    batch_size: str | int,
    workers: int | None,
    pool_memory: float | None,
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
    for role, given in (("teacher", teacher), ("label_teacher", label_teacher)):
        if given is not None and plan[role] is None:
            raise UsageError(f"the run in {out} has no {role.replace('_', ' ')}: leave {argument(role)} out")
    facts = _facts_of(out, plan, data, teacher, label_teacher)
    for role, given in (("teacher", teacher), ("label_teacher", label_teacher)):
        check_stands(given or facts[role], role, moved=given is None)
    place = facts["data"] if data is None else data_of(data)
    try:
        source = open_source(place, "train")
    except UsageError as error:
        if data is not None or str(place).startswith(IN_MEMORY):
            raise
        raise UsageError(f"{error} ({argument('data')} says where it is now)") from error
    main = None if plan["teacher"] is None else load_again(teacher or facts["teacher"], plan, "teacher")
    named = label_teacher or facts["label_teacher"]
    labels = None if plan["label_teacher"] is None else main
    if labels is not None and named is not None:
        labels = load_again(named, plan, "label_teacher")
    run = Run(
        out=out,
        plan=plan,
        source=source,
        teacher=main,
        label_teacher=labels,
        method=get_method(plan["method"])
        .from_options(
            {
                **{name: value for chosen in plan["options"].values() for name, value in chosen.items()},
                **{name: facts[name] for name in get_method(plan["method"]).place_names() if name in facts},
            }
        )
        .resolved(plan["factor"], plan["ipc"]),
        device=found_device,
        loader=resolve_loader(plan["arithmetic"]["loader"], found_device),
        in_flight=in_flight,
        workers=threads,
        quiet=quiet,
        ranks=ranks,
        facts=facts,
        data=place,
        pool_memory=None if pool_memory is None else int(pool_memory * 2**30),
    )
    held: list[tuple[Any, Any, str]] = [
        (source.fingerprint(), plan["data"]["fingerprint"], f"the data {source.name}")
    ]
    if main is not None:
        held.append((main.sha256, plan["teacher"]["sha256"], f"the teacher {main.path}"))
    if labels is not None:
        held.append((labels.sha256, plan["label_teacher"]["sha256"], f"the label teacher {labels.path}"))
    if not plan["complete"]:
        inputs = run.method.inputs()
        for name, wanted in (plan.get("inputs") or {}).items():
            held.append((inputs.get(name), wanted, f"{argument(name)} {getattr(run.method.options, name)}"))
    for found, wanted, what in held:
        if found != wanted:
            raise UsageError(f"{what} is not what {out} was started with: its content has changed")
    return run


def _facts_of(
    out: Path,
    plan: dict[str, Any],
    data: Any,
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
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        given: dict[str, Any] = {"data": None if data is None else place_of(data)}
        if plan["teacher"] is not None:
            given["teacher"] = teacher
        if plan["label_teacher"] is not None and plan["label_teacher"]["sha256"] != plan["teacher"]["sha256"]:
            given["label_teacher"] = label_teacher
        missing = [argument(key) for key, value in given.items() if value is None]
        if missing:
            raise UsageError(f"{out / RUN} is missing or damaged: give {' and '.join(missing)}") from error
        return {
            key: None if value is None else str(value)
            for key, value in {"teacher": None, "label_teacher": None, **given}.items()
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


def open_run(method: str, settings: Settings, options: Mapping[str, Any] | None = None) -> Run:
    """Check everything that can be checked, then claim the output folder.

    Of several processes rank 0 claims the folder, and the others see that it is the same one and the same data.

    Args:
        method: a name of `ddfast.methods.list_methods()`.
        settings: of the run, as they were given.
        options: of the method.

    Raises:
        UsageError: bad input; nothing is half-written.
    """
    ranks = join()
    neighbours = Neighbours()
    given = options or {}
    given_settings = settings

    def check_settings() -> tuple[type[Method], Settings]:
        known = get_method(method)
        known.from_options(given, given_settings.preset).check(None)
        checked = given_settings.checked()
        checked.check_taken(method, known.offers())
        if not known.requires_teacher():
            checked = with_one_teacher(checked)
        device = rank_device(checked.device, ranks)
        if checked.loader != "auto":
            resolve_loader(checked.loader, device)
        threads_of(checked.threads, device)
        check_folder(checked.out)
        check_history(checked.log_dir, checked.wandb, outside=checked.out)
        if checked.scores is not None and read_plan(checked.scores) is None:
            raise UsageError(f"{argument('scores')} {checked.scores} holds no ddfast run")
        check_teachers(checked, known)
        if checked.class_names is not None:
            check_shown_names(checked.class_names)
        return known, checked

    def plan_run() -> Run:
        check_outside(settings.out, source)
        chosen = known.from_options(given, settings.preset)
        teacher, label_teacher = open_teachers(settings, source, known)
        size = settings.image_size
        if size is None:
            size = teacher.image_size if teacher is not None else chosen.own_image_size()
        if size is None:
            size = native_size(source)
        factor = chosen.tiles_per_side(str(settings.factor), size)
        chosen = chosen.resolved(factor, settings.ipc)
        chosen.check(size)
        if isinstance(chosen, Synthesis):
            chosen.check_ipc(settings.ipc)
        for each in (teacher, label_teacher):
            if each is not None and size != each.image_size:
                check_reads(each, size)
        device = rank_device(settings.device, ranks)
        before = read_plan(settings.out)
        resumed = before is not None and settings.loader == "auto"
        loader = resolve_loader(
            before["arithmetic"]["loader"] if before and resumed else settings.loader, device
        )
        fixed = dataclasses.replace(
            settings,
            factor=factor,
            image_size=size,
            images_per_class=_images_per_class(settings, known),
            loader=loader.name,
            threads=threads_of(settings.threads, device),
            label_top_k=top_k_of(settings.label_top_k or "all", len(source.class_names)),
        )
        plan = make_plan(
            chosen,
            source,
            fixed,
            teacher,
            label_teacher,
            device=device,
            normalization=normalization_of(settings),
            max_pixels=pixel_limit_of(before),
            shown_names=None
            if settings.class_names is None
            else read_shown_names(settings.class_names, source.class_names),
        )
        run = Run(
            out=settings.out,
            plan=plan,
            source=source,
            teacher=teacher,
            label_teacher=label_teacher,
            method=chosen,
            device=device,
            loader=loader,
            in_flight=images_in_flight(settings.batch_size, plan["arithmetic"]["micro_batch"]),
            workers=decoding_workers(settings.workers, ranks),
            quiet=settings.quiet or not ranks.main,
            ranks=ranks,
            facts={
                **host_facts(),
                "command": command_line(),
                "data": place_of(settings.data),
                **(
                    {"class_names": place_of(settings.class_names)}
                    if isinstance(settings.class_names, str | Path)
                    else {}
                ),
                "teacher": None if teacher is None else place_of(teacher.path),
                "label_teacher": None
                if settings.label_teacher is None or label_teacher is None
                else place_of(label_teacher.path),
                "seconds": _earlier_seconds(settings.out),
                **{name: place_of(place) for name, place in chosen.places().items()},
                "ranks": ranks.size,
            },
            data=settings.data,
            pool_memory=int(settings.pool_memory * 2**30),
            history=History(
                settings.log_dir,
                settings.wandb if ranks.main else None,
                command="distill",
                run=str(settings.out),
                settings={"method": method, **settings.in_manifest(known.offers())},
            ),
        )
        if isinstance(chosen, Synthesis):
            chosen.open(run.context)
            check_judged(run, chosen)
        return run

    known, settings = ranks.together("settings", check_settings)
    source = ranks.main_first("data", lambda: open_source(settings.data, "train"))
    run = ranks.together("plan", plan_run)
    ranks.on_main("start", lambda: _claim(run, settings))
    ranks.together("folder", lambda: _follow(run, settings.device))
    run.set_arithmetic()
    say(f"loader: {run.loader.name} ({run.loader.reason})", quiet=run.quiet or run.complete)
    own = run.method.notes(run.context) if isinstance(run.method, Synthesis) else []
    for note in [*source.notes(), *own]:
        say(note, quiet=run.quiet or run.complete)
    say_slow_ops(run.device, quiet=run.quiet or run.complete)
    _warn_of_crowding(run, neighbours)
    return run


def _images_per_class(settings: Settings, method: type[Method]) -> int | str:
    """Sources of a class that the run may choose from, a number or "all"."""
    if settings.images_per_class != "auto":
        return settings.images_per_class
    return SCORED_OF_A_CLASS if "score" in method.stages else "all"


def _claim(run: Run, settings: Settings) -> None:
    """Rank 0: the checks that need data and teachers, then the folder with its manifest."""
    wanted = run.plan
    held = read_plan(run.out)
    if held is None:
        run.set_arithmetic()
        if "select" in run.method.stages:
            check_counts(run)
        if isinstance(run.method, Synthesis):
            check_pool(run, run.method)
        _check_outputs(run)
        if settings.preflight:
            _preflight(run)
    elif settings.threads != "auto" and held["arithmetic"]["threads"] != wanted["arithmetic"]["threads"]:
        raise UsageError(
            f"{run.out} was started with {setting('threads', held['arithmetic']['threads'])}, "
            "which decides its last bits: "
            "resume it with that number or without the option"
        )
    shared = shared_scores(Path(settings.scores), wanted) if settings.scores is not None else None
    run.plan = start(run.out, wanted, settings.resume)
    checked_device(run.plan, str(run.device), run.ranks)
    if not run.complete:
        run.save()
        if shared is not None:
            copy_scores(shared, run.out)


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


def _earlier_seconds(out: Path) -> dict[str, float]:
    try:
        return dict(json.loads((out / RUN).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _preflight(run: Run) -> None:
    """Try the teachers on training images: see `ddfast.training.preflight`."""
    if not run.teachers:
        return
    names = run.source.class_names
    count = images_to_try(run.plan["image_size"], run.device)
    places = drawn_places(run.source.samples.labels, len(names), count)
    loaded = run.load(run.samples(places))
    pairs = [(image, s.label) for s, image in loaded if not isinstance(image, BadImage)]
    if not pairs:
        return
    images = torch.stack([image for image, _ in pairs])
    labels = torch.tensor([label for _, label in pairs])
    for teacher, role in run.teachers:
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


def _check_outputs(run: Run) -> None:
    """See on two black images that the teachers return logits of their classes."""
    side, classes = run.plan["image_size"], len(run.source.class_names)
    for teacher, role in run.teachers:
        images = torch.zeros(2, 3, side, side, dtype=torch.uint8)
        try_teacher(
            teacher.model.to(run.device), images, teacher.mean, teacher.std, classes, run.device, role=role
        )
