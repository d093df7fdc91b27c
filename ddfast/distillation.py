"""`ddfast.distill`: the stages of a method in a row, and the report that closes a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ddfast.arguments import one_of
from ddfast.isolation import isolated
from ddfast.methods import get_method
from ddfast.pipeline.opening import ClassOrder, TeacherChoice, open_run
from ddfast.pipeline.run import Run, clock
from ddfast.pipeline.stages import stage_named
from ddfast.progress import say
from ddfast.report import write_report


@isolated()
def distill(
    method: str,
    *,
    data: str | Path,
    teacher: TeacherChoice,
    ipc: int,
    out: str | Path,
    label_teacher: TeacherChoice | None = None,
    seed: int = 0,
    images_per_class: int = 300,
    factor: str | int = "auto",
    image_size: int | None = None,
    image_format: str = "png",
    preset: str | None = None,
    precision: str = "float32",
    device: str = "auto",
    batch_size: str | int = "auto",
    workers: int | None = None,
    loader: str = "auto",
    threads: str | int = "auto",
    label_top_k: str | int = "auto",
    scores: str | Path | None = None,
    resume: bool = False,
    preflight: bool = True,
    class_order: ClassOrder | None = None,
    label_class_order: ClassOrder | None = None,
    quiet: bool = False,
    until: str | None = None,
    **options: Any,
) -> Path:
    """Distil a labelled image set into `ipc` images a class.

    Processes started by torchrun, or by a program that has set up `torch.distributed`, share one run: all of them
    make the same call, with `out` on storage that all of them see. The result has the bytes of one process's.

    Args:
        method: a name of `ddfast.methods.list_methods()`; `options` are the fields of its options dataclass.
        data: ImageFolder root, zip, tar shards, or a torchvision set by name.
        teacher: teacher file, `torchvision:NAME`, a loaded `Teacher` that knows its file, or a function without
            arguments that loads one once the other settings are checked.
        ipc: images per class.
        out: output folder, made here; see the README for what it holds.
        label_teacher: another teacher for the soft labels, an early checkpoint for example.
        seed: decides the pool, the coalitions, the noise and the random draws.
        images_per_class: sources scored of each class.
        factor: tiles per side of an image; "auto" is 1 up to 64 px and 2 above (InfoUtil 4.1).
        image_size: side of the distilled images in pixels; default the teacher's.
        image_format: "png" or "jpeg".
        preset: named option values of the method, such as "paper".
        precision: "float32", "bfloat16", or "auto", bfloat16 where it is known to be faster; chosen once for all
            processes of a run.
        device: "auto", "cpu" or "cuda".
        batch_size: images in flight; never changes the result.
        workers: decoding threads; default one a core.
        loader: "auto", "torchvision", "pillow", "dali", or "dali-hw" for a GPU's JPEG engine; on resumption "auto" is
            what the run began with.
        threads: CPU threads of one process, part of the arithmetic; "auto" is `DDFAST_THREADS` or every usable core
            (16 at most, 4 beside a GPU), for one process and for many, and on resumption what the run began with.
        label_top_k: probabilities stored of each soft label: a number, "all", or "auto", all of up to 2048 classes
            and else 256.
        scores: folder of an earlier run whose score table has the same settings; it is copied, not computed.
        resume: continue an unfinished run, start a missing one, leave a finished one.
        preflight: try the teacher on 64 to 512 training images first, and refuse it where they speak for another
            class order or no better than chance.
        class_order: the classes in the order of the teacher's outputs where that is not the data's: names, {index:
            name}, or a text or JSON file of them. The outputs are put into the data's order.
        label_class_order: the same of the label teacher; None: `class_order` too where its file does not name its
            classes.
        quiet: print nothing.
        until: last stage to run, one of the method's `stages`; default all, and the report.
        **options: of the method.

    Returns:
        The output folder.

    Raises:
        UsageError: bad input; nothing is half-written.
    """
    stages = get_method(method).stages
    if until is not None:
        one_of(until, "until", stages)
    run = open_run(
        method,
        data=data,
        teacher=teacher,
        ipc=ipc,
        out=out,
        label_teacher=label_teacher,
        seed=seed,
        images_per_class=images_per_class,
        factor=factor,
        image_size=image_size,
        image_format=image_format,
        preset=preset,
        precision=precision,
        device=device,
        batch_size=batch_size,
        workers=workers,
        scores=scores,
        resume=resume,
        preflight=preflight,
        class_order=class_order,
        label_class_order=label_class_order,
        quiet=quiet,
        options=options,
        loader=loader,
        threads=threads,
        label_top_k=label_top_k,
    )
    try:
        if run.complete:
            say(f"{run.out} is finished", quiet=run.quiet)
            return run.out
        for stage in stages:
            stage_named(stage)(run)
            if stage == until != stages[-1]:
                return run.out
        finish(run)
    finally:
        run.ranks.leave()
    return run.out


def finish(run: Run) -> None:
    """Write `report.html` and `mosaic.png`, then mark the run complete: the manifest is the last file to change."""

    def close() -> None:
        started = time.monotonic()
        write_report(run.out, source=run.source)
        run.plan["complete"] = True
        clock(run, "report", started)

    run.ranks.on_main("report", close)
