"""Train a teacher on a labelled image set, with checkpoints on the way and a run that survives being killed.

Every random draw of an epoch comes from a generator keyed by (seed, purpose, epoch), so the state after an
epoch is the weights, the optimiser's buffers and the epoch's number; resuming from it gives the bytes of an
undisturbed run on the same machine with the same number of threads.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.arguments import data_of, output_file, path_of, whole_number
from ddfast.crowding import Neighbours, warn_of_crowding
from ddfast.errors import UsageError
from ddfast.files import atomic_write_bytes, explained, make_folder, sweep_temporary_of
from ddfast.history import History, check_history
from ddfast.isolation import isolated, on_threads
from ddfast.models.registry import COMMON_IMAGE, check_model, create_model
from ddfast.models.teacher import Teacher, load_teacher, read_header, teacher_bytes
from ddfast.ops._dispatch import say_slow_ops
from ddfast.ops.precision import compute_dtype
from ddfast.progress import Outlook, Progress, say, ways_of_machine
from ddfast.ranks import usable_cores
from ddfast.seeding import generator, seeded
from ddfast.state import StateFile
from ddfast.training.augmentation import (
    normalize,
    random_crop_flip,
    random_flip,
    random_resized_boxes,
    resize_boxes,
)
from ddfast.training.device import resolve_device
from ddfast.training.differentiable import DSA, draw_one, without_flip
from ddfast.training.fitting import Fitting, cosine, finite_loss
from ddfast.training.image_sets import (
    ImageSet,
    StreamedSet,
    measure_accuracy,
    native_size,
    read_test_set,
    read_training_set,
)
from ddfast.training.teacher_config import SMALL_IMAGE, TeacherConfig
from ddfast.wording import argument, did_you_mean, plural, setting

STATE_FORMAT = "ddfast-training-state-1"
STATE_KEY = "ddfast_training_state"

# Augmentations of normalised images: one operation for a batch, parameters for each image.
DIFFERENTIABLE = {"dsa": DSA, "dsa-no-flip": without_flip(DSA)}


@isolated()
def train_teacher(
    data: Any,
    *,
    out: str | Path,
    image_size: int | None = None,
    checkpoint_epochs: Sequence[int] = (),
    device: str = "auto",
    workers: int | None = None,
    resume: bool = False,
    quiet: bool = False,
    log_dir: str | Path | None = None,
    wandb: str | None = None,
    **settings: Any,
) -> Teacher:
    """Train a network on the training split of `data` and write a teacher file to `out`.

    The test split, where there is one, is read after every epoch; the accuracy of the last epoch, in float32,
    stands in the file as `top1`. Images that cannot be decoded are left out and counted.

    Args:
        data: an image folder, archive, named set, or images in memory, as `ddfast.data.open_source` takes it.
        out: the teacher file, `.safetensors`. Checkpoints stand beside it as `<stem>-epoch<N>.safetensors`. Neither
            may exist yet, unless `resume` finds that they are of this run.
        image_size: side in pixels; None: the shorter side of the first training image, at most 224.
        checkpoint_epochs: epochs after which a checkpoint is written.
        device: "auto", "cpu" or "cuda".
        workers: decoding workers; None: the loader's default.
        resume: continue a killed run from its last whole epoch, with its number of threads; starts where there
            is nothing to continue, and returns at once where `out` was finished by the same configuration.
        quiet: print nothing.
        log_dir: folder of `history.jsonl`, a line an epoch (loss, top1 in percent, images_per_second), and of
            TensorBoard's files where it is installed.
        wandb: project of Weights & Biases that gets the same numbers.
        settings: the other fields of `TeacherConfig`; `arch` and `epochs` are required.

    Raises:
        UsageError: bad arguments or data, files of an earlier run in the way, or with `resume` a run of another
            configuration.

    """
    from ddfast.data import open_source

    neighbours = Neighbours()
    out = path_of(out, "out")
    if out.suffix != ".safetensors":
        raise UsageError(f"the teacher file must end in .safetensors, got {out}")
    output_file(out)
    unknown = sorted(set(settings) - {field.name for field in fields(TeacherConfig)})
    if unknown:
        valid = [field.name for field in fields(TeacherConfig)]
        raise UsageError(
            f"train_teacher has no setting {unknown[0]!r}; its settings: {', '.join(valid)}"
            f"{did_you_mean(unknown[0], valid)}"
        )
    for name in ("arch", "epochs"):
        if name not in settings:
            raise UsageError(f"train_teacher needs {argument(name)}")
    if image_size is not None:
        image_size = whole_number(image_size, "image_size", least=1)
    tried = TeacherConfig(image_size=image_size or COMMON_IMAGE, **settings).resolved()
    check_model(tried.arch, image_size, **tried.arch_options)
    checkpoint_epochs = _checked_epochs(checkpoint_epochs, tried.epochs)
    if not resume:
        _check_free(out, checkpoint_epochs)
    check_history(log_dir, wandb)
    where = resolve_device(device)
    if workers is not None:
        workers = whole_number(workers, "workers", least=0)
    data = data_of(data)
    source = open_source(data, "train")
    for note in source.notes():
        say(note, quiet=quiet)
    config = TeacherConfig(image_size=image_size or native_size(source), **settings).resolved()
    check_model(config.arch, config.image_size, **config.arch_options)
    options: dict[str, Any] = {
        "class_names": source.class_names,
        "out": out,
        "checkpoint_epochs": checkpoint_epochs,
        "data_fingerprint": source.fingerprint(),
        "device": device,
        "resume": resume,
        "quiet": quiet,
    }
    if resume and out.exists():
        return _finished(out, identity_of(config, options["data_fingerprint"]), checkpoint_epochs, quiet)
    try:
        test_source = open_source(data, "test")
    except UsageError as error:
        say(f"the accuracy will not be measured: {error}", quiet=quiet)
        test = None
    else:
        test = read_test_set(
            test_source, config.image_size, enlarged=config.enlarged_tests, workers=workers, quiet=quiet
        )
    train = read_training_set(source, config.stored_size, workers=workers, quiet=quiet)
    say_slow_ops(where, quiet=quiet)
    if where.type == "cpu":
        warn_of_crowding(neighbours, torch.get_num_threads(), "OMP_NUM_THREADS={}".format, quiet=quiet)
    said = {**asdict(config), "data": str(data)}
    with History(log_dir, wandb, command="train-teacher", run=str(out), settings=said) as history:
        return fit_teacher(train, test, config, history=history, **options)


@isolated()
def fit_teacher(
    train: ImageSet | StreamedSet,
    test: ImageSet | None,
    config: TeacherConfig,
    *,
    class_names: Sequence[str],
    out: Path,
    checkpoint_epochs: Sequence[int] = (),
    data_fingerprint: str = "",
    device: str = "auto",
    resume: bool = False,
    watch: bool = True,
    quiet: bool = False,
    outlook: Outlook | None = None,
    history: History | None = None,
    after_epoch: Callable[[int, nn.Module], None] | None = None,
) -> Teacher:
    """`train_teacher` on decoded sets: training images of `config.stored_size`, test images of `image_size`.

    `data_fingerprint` names the data in the file and in the check of a resumed run. Without `watch` the accuracy is
    measured only where a file is written. `outlook` is that of several trainings; `history` is told of every epoch.
    `after_epoch` is called with 0 and the new network, and with the number of every epoch and the network after it,
    before anything says that the epoch is done; a run that was killed calls it for the epochs that it trains again.
    Errors as `train_teacher`.
    """
    config = config.resolved()
    where = resolve_device(device)
    checkpoint_epochs = _checked_epochs(checkpoint_epochs, config.epochs)
    if len(train) < 2:
        raise UsageError(f"training needs at least 2 images, got {len(train)}")
    mean, std = config.mean_std
    identity = identity_of(config, data_fingerprint)
    state = _state_file(out)
    if not resume:
        _check_free(out, checkpoint_epochs)
    elif out.exists():
        _state_header(state, strict=True)
        return _finished(out, identity, checkpoint_epochs, quiet)
    if isinstance(train, ImageSet):
        train = train.on(where)
    model = _initial_model(config, len(class_names))
    make_folder(out.parent)  # before the work, not after it
    for path in (out, state.path, *_checkpoint_paths(out, checkpoint_epochs)):
        sweep_temporary_of(path)
    arithmetic: dict[str, Any] = {
        "arithmetic": compute_dtype(config.precision, where),
        "threads": torch.get_num_threads(),
        "device": where.type,
    }
    header = _state_header(state, strict=True) if resume else None
    if not resume:
        _keep_foreign(state.path, quiet)
    elif header:
        check_identity(state.path, header["training"], identity)
        arithmetic = continued(state.path, header, arithmetic)
    epochs_done = int(header["epoch"]) if header else 0
    config = replace(config, precision=arithmetic["arithmetic"])  # what a run began with, wherever it goes on
    fitting = Fitting(model, partial(_optimizer, config=config), where, config.precision)
    if header:
        fitting.restore(state.read()[0])
        say(f"continuing {out} behind epoch {epochs_done} of {config.epochs}", quiet=quiet)
    elif resume:
        say(f"nothing to resume at {out}: starting", quiet=quiet)
    if resume:
        _check_checkpoints(out, checkpoint_epochs, identity, epochs_done)
    facts = {
        "training": identity,
        "arithmetic": arithmetic["arithmetic"],
        "threads": arithmetic["threads"],
    }

    def accuracy(precision: str) -> float:
        assert test is not None
        return measure_accuracy(fitting.network, test, mean, std, where, precision).top1

    def write(path: Path, epoch: int) -> None:
        top1 = None if test is None else round(accuracy("float32"), 4)
        data = teacher_bytes(
            fitting.model,
            arch=config.arch,
            class_names=class_names,
            image_size=config.image_size,
            mean=mean,
            std=std,
            arch_options=config.arch_options,
            top1=top1,
            epoch=epoch,
            images=len(train) - (len(train.bad) if isinstance(train, StreamedSet) else 0),
            unreadable=len(train.bad),
            **facts,
        )
        atomic_write_bytes(path, data)
        reached = "" if top1 is None else f", test top-1 {top1:.2f}%"
        say(f"wrote {path}{reached}", quiet=quiet)

    say(
        f"training {config.arch} for {plural(config.epochs, 'epoch')} on {plural(len(train), 'image')} of "
        f"{config.image_size} px "
        f"({where.type}, {arithmetic['arithmetic']}, {config.optimizer} lr {config.lr:g} {config.schedule})",
        quiet=quiet,
    )
    outlook = outlook or Outlook(config.epochs - epochs_done, _ways(config, where, arithmetic["threads"]))
    if after_epoch is not None and not epochs_done:
        after_epoch(0, fitting.model)
    with on_threads(arithmetic["threads"]):
        for epoch in range(epochs_done + 1, config.epochs + 1):
            start = time.perf_counter()
            loss = _train_epoch(fitting, train, config, epoch, quiet, outlook)
            rate = len(train) / (time.perf_counter() - start)
            reached, top1 = "", None
            told = history is not None and history.wanted
            if test is not None and watch and (told or not quiet):
                top1 = round(accuracy(config.precision), 4)
                reached = f", test top-1 {top1:.2f}%"
            if history is not None:
                history.note("epoch", epoch, loss=loss, top1=top1, images_per_second=round(rate, 1))
            say(f"epoch {epoch}/{config.epochs}: loss {loss:.4f}{reached}, {rate:.0f} images/s", quiet=quiet)
            if after_epoch is not None:
                after_epoch(epoch, fitting.model)
            if epoch in checkpoint_epochs:
                write(_checkpoint_path(out, epoch), epoch)
            if epoch < config.epochs:
                said = {
                    "format": STATE_FORMAT,
                    "training": identity,
                    "arithmetic": arithmetic,
                    "epoch": epoch,
                }
                state.write(fitting.state(), said)
        write(out, config.epochs)
    if train.bad:
        say(f"left out {plural(len(train.bad), 'training image')} that cannot be decoded", quiet=quiet)
    state.path.unlink(missing_ok=True)
    return load_teacher(out)


def _ways(config: TeacherConfig, device: torch.device, threads: int) -> list[str]:
    """What would make a training shorter."""
    smaller = [f"a smaller {argument('image_size')}"] if config.image_size > SMALL_IMAGE else []
    own = ways_of_machine(device.type, threads, usable_cores(), "OMP_NUM_THREADS={}".format)
    return [f"fewer {argument('epochs')}", *smaller, *own]


def _checked_epochs(given: Sequence[int] | int, epochs: int) -> tuple[int, ...]:
    """Epochs after which a checkpoint is written, as ints of 1..epochs; one alone is welcome."""
    several = given if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    found = tuple(whole_number(epoch, "checkpoint_epochs") for epoch in several)
    if wrong := sorted(epoch for epoch in found if not 1 <= epoch <= epochs):
        raise UsageError(f"checkpoint epochs must lie in 1..{epochs}, got {', '.join(map(str, wrong))}")
    return found


def _train_epoch(
    fitting: Fitting,
    train: ImageSet | StreamedSet,
    config: TeacherConfig,
    epoch: int,
    quiet: bool,
    outlook: Outlook,
) -> float:
    """One pass; returns the mean cross-entropy over its images."""
    device, seed = fitting.device, config.seed
    order = torch.randperm(len(train), generator=generator(seed, "order", epoch))
    draws = generator(seed, "augmentation", epoch)
    steps = math.ceil(len(train) / config.batch_size)
    sizes: list[int] = []
    label = f"epoch {epoch}/{config.epochs}"
    progress = Progress(label, len(train), "images", quiet=quiet, outlook=outlook)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in train.batches(order, config.batch_size):
            if len(labels) == 1:  # BatchNorm has no statistics of one value
                continue
            inputs = normalize(_augment(images, config, draws).to(device), *config.mean_std)
            if config.augment in DIFFERENTIABLE:
                size = (inputs.shape[-2], inputs.shape[-1])
                inputs = draw_one(DIFFERENTIABLE[config.augment], len(inputs), size, draws)(inputs)
            yield inputs, labels.to(device)
            sizes.append(len(labels))
            progress.advance(len(labels))

    def rate(step: int) -> float:
        assert config.lr is not None
        if config.schedule == "constant":
            return config.lr
        return config.lr * cosine((epoch - 1 + step / steps) / config.epochs)

    with seeded(seed, "dropout", epoch, device=device), progress:
        losses = fitting.epoch(batches(), _cross_entropy, rate=rate)
    if not sizes:
        raise UsageError(f"none of the {plural(len(train), 'training image')} can be decoded")
    weights = torch.tensor(sizes, dtype=losses.dtype, device=device)
    return finite_loss(
        (losses * weights).sum() / weights.sum(),
        f"lower {argument('lr')} (now {config.lr:g})",
        when=f" in epoch {epoch}",
    )


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def _augment(images: Tensor, config: TeacherConfig, draws: torch.Generator) -> Tensor:
    if config.augment == "crop-flip":
        return random_crop_flip(images, draws)
    if config.augment == "rrc-flip":
        boxes = random_resized_boxes(len(images), images.shape[-1], draws)
        return random_flip(resize_boxes(images, boxes, config.image_size), draws)
    return random_flip(images, draws) if config.augment == "flip" else images


def _initial_model(config: TeacherConfig, num_classes: int) -> nn.Module:
    try:
        with seeded(config.seed, "weights"):
            return create_model(config.arch, num_classes, config.image_size, **config.arch_options)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _optimizer(model: nn.Module, *, config: TeacherConfig) -> torch.optim.Optimizer:
    assert config.lr is not None
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )


def identity_of(config: TeacherConfig, data_fingerprint: str) -> dict[str, Any]:
    """What decides the weights, as JSON gives it back: a resumed run must agree with it."""
    return json.loads(json.dumps({**asdict(config), "data": data_fingerprint}))


def _checkpoint_path(out: Path, epoch: int) -> Path:
    return out.with_name(f"{out.stem}-epoch{epoch}.safetensors")


def _checkpoint_paths(out: Path, epochs: Sequence[int]) -> list[Path]:
    return [_checkpoint_path(out, epoch) for epoch in epochs]


def _check_free(out: Path, checkpoint_epochs: Sequence[int]) -> None:
    """Refuse to write over what stands, a teacher, a checkpoint or a run that can be continued."""
    for path in (out, *_checkpoint_paths(out, checkpoint_epochs)):
        if path.is_dir():
            raise UsageError(
                f"the teacher file {path} is a folder: give a file name that ends in .safetensors"
            )
        if path.exists():
            raise UsageError(
                f"{path} exists already ({_described(path)}): give another {argument('out')}, delete it to train anew, "
                f"or use {setting('resume', True)} if it is of this run"
            )
    state = _state_file(out)
    header = _state_header(state)
    if header is not None:
        raise UsageError(
            f"{state.path} holds an unfinished run, {header['epoch']} of "
            f"{plural(header['training'].get('epochs'), 'epoch')}: continue it with {setting('resume', True)}, give "
            f"another {argument('out')}, or delete it to train anew"
        )


def _described(path: Path) -> str:
    """What a file in the way is, in words."""
    header = read_header(path)
    if header is None:
        return "not a teacher file"
    reached = "" if header.get("top1") is None else f", top-1 {header['top1']:.2f}%"
    epochs = "" if header.get("epoch") is None else f", {plural(header['epoch'], 'epoch')}"
    return f"a teacher, {header.get('arch')}{epochs}{reached}"


def _keep_foreign(state_file: Path, quiet: bool) -> None:
    """Put a file that is no training state, or a damaged one, out of the way of the state."""
    if not state_file.exists():
        return
    number = 1
    while (kept := state_file.with_name(f"{state_file.name}.kept-{number}")).exists():
        number += 1
    with explained(kept):
        state_file.rename(kept)
    say(f"{state_file} is no training state that can be continued: kept as {kept.name}", quiet=quiet)


def _finished(out: Path, identity: dict[str, Any], checkpoint_epochs: Sequence[int], quiet: bool) -> Teacher:
    """The teacher of a finished run of this configuration."""
    if out.is_dir():
        raise UsageError(f"the teacher file {out} is a folder: give a file name that ends in .safetensors")
    _check_teacher_identity(out, identity)
    _check_checkpoints(out, checkpoint_epochs, identity, identity["epochs"])
    state = _state_file(out)
    if _state_header(state) is not None:
        state.path.unlink()
    say(f"{out} is finished", quiet=quiet)
    return load_teacher(out)


def _check_checkpoints(
    out: Path, checkpoint_epochs: Sequence[int], identity: dict[str, Any], epochs_done: int
) -> None:
    """Of a resumed run: past checkpoints are there, and none that will be written belongs to another run."""
    for epoch in checkpoint_epochs:
        path = _checkpoint_path(out, epoch)
        if path.exists():
            _check_teacher_identity(path, identity)
        elif epoch <= epochs_done:
            raise UsageError(
                f"{out} is past epoch {epoch}, but has no checkpoint of epoch {epoch}: leave that out, or give "
                f"another {argument('out')} to train anew"
            )


def _check_teacher_identity(path: Path, wanted: dict[str, Any]) -> None:
    header = read_header(path)
    if header is None or not isinstance(header.get("training"), dict):
        kind = "is no teacher file" if header is None else "was not made by train-teacher"
        raise UsageError(f"{path} {kind}, so it cannot be resumed: give another {argument('out')}")
    check_identity(path, header["training"], wanted)


def check_identity(path: Path, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to go on with what `identity_of` tells apart from the run that is asked for.

    Raises:
        UsageError: names the first setting that differs.
    """
    if different := [name for name in wanted if held.get(name) != wanted[name]]:
        name = different[0]
        raise UsageError(
            f"{path} belongs to a run with another {argument(name)} ({held.get(name)}, now {wanted[name]}): "
            f"give the same settings, or another {argument('out')} to train anew"
        )


def continued(path: Path, header: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The arithmetic that a run began with: its precision and its threads stay, its device must be there.

    Raises:
        UsageError: it was begun on another kind of device.
    """
    held = {**now, **header.get("arithmetic", {})}
    if held["device"] != now["device"]:
        raise UsageError(
            f"{path} was begun with device {held['device']} and would end in other bytes with {now['device']}: resume "
            f"it where it was begun, or give another {argument('out')} to train anew"
        )
    return held


def _state_file(out: Path) -> StateFile:
    return StateFile(out.with_suffix(".state"), STATE_KEY)


def _state_header(state: StateFile, *, strict: bool = False) -> dict[str, Any] | None:
    """What a training state says of itself; None where there is no such file, or without `strict` where it is another.

    Raises:
        UsageError: with `strict`, a file that is damaged or no training state.
    """
    try:
        header = state.read("training state")[1]
    except (UsageError, OSError):
        if strict:
            raise
        return None
    if isinstance(header, dict) and header.get("format") == STATE_FORMAT:
        return header
    if strict and state.path.exists():
        raise UsageError(
            f"{state.path} is not a training state of this version: delete it, or leave out {setting('resume', True)}"
        )
    return None
