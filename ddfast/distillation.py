"""`ddfast.distill`: the stages of a method in a row, and the report that closes a run."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ddfast.arguments import one_of
from ddfast.errors import UsageError
from ddfast.isolation import isolated
from ddfast.methods import get_method
from ddfast.output.distilled import SOFT_LABELS, DistilledSet
from ddfast.output.distilled_folder import Distilled
from ddfast.output.pixels import read_curve, read_pixels
from ddfast.pipeline.opening import open_run
from ddfast.pipeline.run import Run, clock
from ddfast.pipeline.score import score_table
from ddfast.pipeline.stages import stage_named
from ddfast.pipeline.synthesize import remove_state, write_pictures_again
from ddfast.progress import say
from ddfast.report import write_report
from ddfast.settings import Settings, described, fields


@described
@isolated()
def distill(method: str, *, until: str | None = None, **settings: Any) -> Distilled:
    """Distil a labelled image set into `ipc` images a class.

    Processes started by torchrun, or by a program that has set up `torch.distributed`, share one run: all of them
    make the same call, with `out` on storage that all of them see. The result has the bytes of one process's.

    Args:
        method: a name of `ddfast.methods.list_methods()`.
        until: last stage to run, one of the method's `stages`; default all, and the report.
        {settings}
        **options: of the method, the fields of its options dataclass.

    Returns:
        The output folder: a `Path` that shows itself in a notebook and has `.set`, the `DistilledSet` in it, and
        `.report`, its page. With `until` the folder is unfinished, and has no set yet.

    Raises:
        UsageError: bad input; nothing is half-written.
    """
    given = {field.name: settings.pop(field.name) for field in fields() if field.name in settings}
    stages = get_method(method).stages
    if until is not None:
        one_of(until, "until", stages)
    run = open_run(method, Settings(**given), settings)
    try:
        if run.complete:
            lost = run.ranks.together("whole", lambda: _lost(run.out))
            unscored = (
                "score" in stages and run.ranks.together("scores", lambda: score_table(run)) == "damaged"
            )
            if not lost and not unscored:
                say(f"{run.out} is finished", quiet=run.quiet)
                run.ranks.on_main("sweep", lambda: remove_state(run.out))
                return Distilled(run.out)
            stages = _to_make_again(run, lost) if lost else ()
            if unscored:
                say(
                    f"the score table of {run.out} is not whole: what it lacks is scored again",
                    quiet=run.quiet,
                )
                stages = ("score", *stages)
        with run.history or nullcontext():
            for number, stage in enumerate(stages, start=1):
                say(f"stage {number} of {len(stages)}: {stage}", quiet=run.quiet)
                started = time.monotonic()
                stage_named(stage)(run)
                if run.history is not None and run.ranks.main:
                    seconds = round(time.monotonic() - started, 3)
                    run.history.note("stage", number, stage=stage, seconds=seconds)
                if stage == until != stages[-1]:
                    return Distilled(run.out)
            finish(run)
    finally:
        run.ranks.leave()
    return Distilled(run.out)


def _lost(out: Path) -> str:
    """What a finished set lacks, or what of it is damaged, in words; nothing where it is whole."""
    try:
        held = DistilledSet(out)
        if held.pixels is not None:
            read_curve(out)
    except UsageError as error:
        return str(error).partition(": delete")[0].partition(": finish it")[0].removeprefix(f"{out} ")
    return ""


def _to_make_again(run: Run, lost: str) -> tuple[str, ...]:
    """The stages that give a finished set back what it lost: those behind its selection, its pixels, or all."""
    stages = run.method.stages
    if "compose" in stages:
        source, stages = "from its selection", stages[stages.index("compose") :]
    elif run.ranks.together("pixels", lambda: _pixels_are_whole(run.out)):
        source, stages = "from its pixels", tuple(stage for stage in stages if stage == "relabel")
        run.ranks.on_main("pictures", lambda: write_pictures_again(run))
    else:
        source = "from the beginning"
        run.plan["complete"] = False
        run.save()
    say(f"{run.out} is not whole ({lost}): made again {source}", quiet=run.quiet)
    run.ranks.on_main("labels", lambda: (run.out / SOFT_LABELS).unlink(missing_ok=True))
    return stages


def _pixels_are_whole(out: Path) -> bool:
    try:
        read_pixels(out)
        read_curve(out)
    except UsageError:
        return False
    return True


def finish(run: Run) -> None:
    """Write `report.html` and `mosaic.png`, then mark the run complete: the manifest is the last file to change."""

    def close() -> None:
        started = time.monotonic()
        write_report(run.out, source=run.source)
        run.plan["complete"] = True
        clock(run, "report", started)
        remove_state(run.out)

    run.ranks.on_main("report", close)
