"""Stage synthesize: make the pixels of every group of classes, step by step, and write what students train on.

A group is the unit of work of a rank. Its state is one file under `state/`, written whole by rename every few seconds;
with draws that are keyed by the step it decides all that follows, so that a run killed at any moment ends in the same
bytes. Ranks share the groups by number and never exchange a tensor.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast.data.pool import DecodedPool
from ddfast.errors import BadImage, DivergedError
from ddfast.files import make_folder
from ddfast.methods.synthesis import Group, State, Synthesis
from ddfast.output.distilled import image_path, metadata_row, write_image, write_metadata
from ddfast.output.mosaic import mosaic_labels
from ddfast.output.pixels import read_pixels, to_bytes, write_before, write_curve, write_pixels
from ddfast.pipeline.judging import Judge
from ddfast.pipeline.plan import run_digest
from ddfast.pipeline.quarantine import note_counts
from ddfast.pipeline.run import Run, clock
from ddfast.progress import Progress
from ddfast.state import FileCheckpoint
from ddfast.wording import argument, plural

STATE = "state"
_SAVE_SECONDS = 15.0  # between two saved states; what a kill costs at most, beside a step
_COLUMN = "curve."  # opens the names of the curve's columns among a state's tensors
_UNREADABLE = "unreadable"  # name of their places among a state's tensors
_TOLD = {"pixel_variance", "accuracy", "unguided_context"}  # what makes a row worth telling the history of


def synthesize(run: Run) -> None:
    """Take every group through all its steps, then write pixels, images, metadata and curve.

    Raises:
        DivergedError: a loss is no longer finite. The state before that step is kept.
    """
    if run.complete:
        return  # its states are gone, and its pixels stand
    watch = _Watch(run)
    run.set_arithmetic()
    method = run.synthesis
    groups = method.groups(len(run.source.class_names), run.plan["ipc"])
    mine = [groups[number] for number in run.ranks.share(len(groups))]
    judge = Judge(run, method) if run.plan.get("evaluate_every") and mine else None
    run.ranks.together("synthesize", lambda: _take_steps(run, method, mine, judge, watch))
    run.ranks.on_main("pixels", lambda: _write(run, method, groups, judge))
    watch.tell()


class _Watch:
    """Tells `run.json` of the seconds of the stage, whenever a state is kept and at the end."""

    def __init__(self, run: Run) -> None:
        self._run, self._told = run, time.monotonic()

    def tell(self) -> None:
        """Add those since it told last."""
        self._told = clock(self._run, "synthesize", self._told)


def remove_state(out: Path) -> None:
    """Remove what a finished run no longer needs."""
    shutil.rmtree(out / STATE, ignore_errors=True)


# Steps
# ----------------------------------------------------------------------------------------------------------


def _take_steps(
    run: Run, method: Synthesis, groups: Sequence[Group], judge: Judge | None, watch: _Watch
) -> None:
    """The steps of this rank's groups, one group after the other."""
    states = {group.number: _to_go_on_from(run, group, method) for group in groups}
    done = sum(0 if state is None else state.step for state in states.values())
    if done == method.steps * len(groups) and None not in states.values():
        return
    unfinished = [group for group in groups if not _is_done(states[group.number], method)]
    pool = _pool_of(run, unfinished, held=method.draws_images)
    size, factor = run.plan["image_size"], run.plan["factor"]
    if size % factor:
        pool.say(
            f"{size} px are no multiple of {factor}: images are padded with grey before they are cut into tiles"
        )
    total, outlook = method.steps * len(groups), run.outlook(f"fewer {argument(method.lever)}")
    with (
        contextlib.closing(method),
        Progress("synthesize", total, "steps", done=done, quiet=run.quiet, outlook=outlook) as progress,
    ):
        for group in groups:
            state = states.pop(group.number)
            if not _is_done(state, method):
                state = state or method.begin(group, pool, run.context)
                _finish(run, method, state, pool, progress, judge, watch)


def _finish(
    run: Run,
    method: Synthesis,
    state: State,
    pool: DecodedPool,
    progress: Progress,
    judge: Judge | None,
    watch: _Watch,
) -> None:
    """The steps that a group still needs; its state is kept on the way and at the end."""
    kept = _checkpoint(run, state.group)
    saved = time.monotonic()
    while state.step < method.steps:
        try:
            loss = method.step(state.step, state, pool, run.context)
        except DivergedError:
            kept.save(_as_tensors(state))
            raise
        state.step += 1
        if judge is not None and judge.due(state.step):
            state.curve[-1]["accuracy"] = judge.accuracy(state)
        if time.monotonic() - saved >= _SAVE_SECONDS and state.step < method.steps:
            kept.save(_as_tensors(state))
            watch.tell()
            saved = time.monotonic()
        _tell(run, method, state)
        progress.advance(note=_note(loss, state))
    if method.draws_images:
        state.unreadable = pool.unreadable(state.group.classes)
    kept.save(_as_tensors(state))


def _tell(run: Run, method: Synthesis, state: State) -> None:
    """Add a step to the run's history where more was measured of it than the loss, and the last."""
    row = state.curve[-1]
    if run.history is not None and (_TOLD & row.keys() or _is_done(state, method)):
        run.history.note(
            "step", state.step, group=state.group.number, **{name: row.get(name) for name in method.measures}
        )


def _note(loss: float, state: State) -> str:
    """What stands behind the rate and the time left."""
    row = state.curve[-1] if state.curve else {}
    if "context" in row:
        return f"I(X;Y) {row['information']:.3g}, H(X|Y) {row['context']:.3g}"
    cmi = next((row["cmi"] for row in reversed(state.curve[-64:]) if "cmi" in row), None)
    return f"loss {loss:.4g}" + ("" if cmi is None else f", CMI {cmi:.3g}")


def _to_go_on_from(run: Run, group: Group, method: Synthesis) -> State | None:
    """The state that was saved last of a group; of a finished one the number of its steps alone, as there are many."""
    state = _restored(run, group)
    return State(group, {}, state.step) if state is not None and _is_done(state, method) else state


def _is_done(state: State | None, method: Synthesis) -> bool:
    return state is not None and state.step >= method.steps


def _pool_of(run: Run, groups: Iterable[Group], *, held: bool = True) -> DecodedPool:
    """The images of the groups' classes."""
    pool = run.decoded_pool(classes=[label for group in groups for label in group.classes], held=held)
    if held and not pool.held:
        pool.say(
            f"{plural(len(pool.labels), 'image')} of {run.plan['image_size']} px exceed "
            f"{argument('pool_memory')}: decoded anew in every step"
        )
    return pool


# States on disk
# ----------------------------------------------------------------------------------------------------------


def _checkpoint(run: Run, group: Group) -> FileCheckpoint:
    make_folder(run.out / STATE)
    return FileCheckpoint(run.out / STATE / f"group-{group.number:05d}.safetensors", run_digest(run.plan))


def _as_tensors(state: State) -> dict[str, Tensor]:
    """A state as named tensors: its own, the step, and the curve's columns, NaN where nothing was measured."""
    columns = {
        f"{_COLUMN}{name}": torch.tensor(
            [row.get(name, float("nan")) for row in state.curve], dtype=torch.float64
        )
        for name in dict.fromkeys(name for row in state.curve for name in row)
    }
    unreadable = torch.tensor(sorted(state.unreadable), dtype=torch.int64)
    return {**state.tensors, **columns, _UNREADABLE: unreadable, "step": torch.tensor(state.step)}


def _restored(run: Run, group: Group) -> State | None:
    """The state that was saved last of a group, None where there is none."""
    tensors = _checkpoint(run, group).load()
    if not tensors:
        return None
    step = int(tensors.pop("step"))
    unreadable = set(tensors.pop(_UNREADABLE, torch.zeros(0)).tolist())  # older states have none
    columns = {
        name.removeprefix(_COLUMN): tensors.pop(name).tolist()
        for name in [name for name in tensors if name.startswith(_COLUMN)]
    }
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    curve = [{name: value for name, value in row.items() if value == value} for row in rows]
    held = {name: tensor.to(run.device) for name, tensor in tensors.items()}
    return State(group, held, step, curve, unreadable)


# What is left behind
# ----------------------------------------------------------------------------------------------------------


def _write(run: Run, method: Synthesis, groups: Sequence[Group], judge: Judge | None) -> None:
    """Everything that a finished synthesis leaves, from the states of all groups."""
    pixels: list[Tensor] = []
    labels: list[int] = []
    rows: list[dict[str, float]] = []
    rate, unreadable = None, set[int]()
    for group in groups:
        state = _finished(run, group)
        rate = method.learned_rate(state)
        unreadable |= state.unreadable
        pixels.append(method.images(state).detach().float().cpu())
        labels += [label for label in group.classes for _ in range(len(pixels[-1]) // len(group.classes))]
        rows += [{"group": float(group.number), **row} for row in state.curve]
    images, names = _class_by_class(torch.cat(pixels), labels)
    found = method.regions(images, lambda: _pool_of(run, groups), run.context)
    regions = None if found is None else found[0]
    shape = {"space": method.space, "factor": run.plan["factor"]}
    write_pixels(run.out, images, names, **shape, learned_rate=rate, regions=regions)
    write_curve(run.out, rows, method.measures)
    if (whitening := method.whitening(run.context)) is not None:
        whitening.write(run.out)
    _write_images(run, method, images, names)
    _write_before(run, method, groups)
    bad = list(_with_reasons(run, unreadable))
    note_counts(run, lambda: bad)
    if found is not None:
        run.plan["regions"] = {"chosen_by": found[1]}
    if judge is not None:
        run.plan["accuracy"] = judge.after_rounding(_finished(run, groups[0]))
    run.save()


def _with_reasons(run: Run, unreadable: Iterable[int]) -> Iterator[dict[str, str]]:
    """Path and reason of the files at these places of the source, which are read again for it."""
    for sample, image in run.load(run.samples(sorted(unreadable))):
        if isinstance(image, BadImage):
            yield {"path": sample.key, "reason": str(image)}


def write_pictures_again(run: Run) -> None:
    """The images in 8 bits and their metadata, from the pixels of a finished run."""
    pixels = read_pixels(run.out)
    _write_images(run, run.synthesis, pixels.images, pixels.labels)


def _class_by_class(images: Tensor, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images and labels in the order of the classes, those of a class as they come: a class may be in many groups."""
    names, order = torch.tensor(labels).sort(stable=True)
    return images[order], names


def _finished(run: Run, group: Group) -> State:
    """The state of a group that has taken all its steps."""
    state = _restored(run, group)
    assert state is not None, f"group {group.number} is not finished"
    return state


def _write_images(run: Run, method: Synthesis, pixels: Tensor, labels: Tensor) -> None:
    """The images in 8 bits, for people, and their metadata."""
    classes, format = run.source.class_names, run.plan["format"]
    rows: list[dict[str, Any]] = []
    with Progress("write", len(labels), "images", quiet=run.quiet) as progress:
        for place, label, index in _numbered(labels):
            image = _pictured(run, method, pixels[place : place + 1])[0]
            write_image(run.out / image_path(label, classes[label], index, format), image)
            rows.append(metadata_row(label, classes[label], index, (), format))
            progress.advance()
    write_metadata(run.out, rows)


def _pictured(run: Run, method: Synthesis, pixels: Tensor) -> Tensor:
    """Images in 8 bits."""
    mean, std = run.plan["mean"], run.plan["std"]
    whitening = method.whitening(run.context)
    if whitening is not None:
        return to_bytes(whitening.undone(pixels), mean, std, "unit")
    return to_bytes(pixels, mean, std, method.space)


def _numbered(labels: Tensor) -> Iterator[tuple[int, int, int]]:
    """(place, label, number in its class) of every image."""
    seen: dict[int, int] = {}
    for place, label in enumerate(labels.tolist()):
        index = seen[label] = seen.get(label, -1) + 1
        yield place, label, index


def _write_before(run: Run, method: Synthesis, groups: Sequence[Group]) -> None:
    """`before.png`: the images that the shown classes began with, drawn again, or what else stands beside them."""
    shown = set(mosaic_labels(len(run.source.class_names)))
    pictured = [group for group in groups if shown.intersection(group.classes)]
    pool = _pool_of(run, pictured, held=False)
    images, labels = [], []
    for group in pictured:
        found = method.before(_finished(run, group), pool, run.context)
        if found is None:
            return
        begun = found.float().cpu()
        each = len(begun) // len(group.classes)
        for place, label in enumerate(group.classes):
            if label in shown:
                images.append(begun[place * each : (place + 1) * each])
                labels += [label] * each
    ordered, names = _class_by_class(torch.cat(images), labels)
    shown_names = run.plan.get("display_names") or run.source.class_names
    write_before(run.out, _pictured(run, method, ordered), names.tolist(), shown_names)
