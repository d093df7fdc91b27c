"""Experts: networks whose way through a training MTT makes synthetic images lead along (CVPR 2022; its buffer.py).

Plainly trained, as the authors do: SGD at a constant rate without momentum or weight decay, on images that DSA
augments. Beside each network stand its weights after every epoch, `trajectory-00000.safetensors`: for every parameter
one tensor [epochs + 1, ...], the start first.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddfast.arguments import path_of, positive_number
from ddfast.errors import UsageError, one_line
from ddfast.files import atomic_write_bytes
from ddfast.isolation import isolated
from ddfast.models.normalization import AUTO, Normalization
from ddfast.models.registry import COMMON_IMAGE, check_model, create_model
from ddfast.models.teacher import load_teacher
from ddfast.output.whitening import WHITENING, Whitening, read_whitening
from ddfast.state import read_tensors, serialize_tensors
from ddfast.training.image_sets import ImageSet, StreamedSet, whitened
from ddfast.training.network_folder import (
    Kind,
    Network,
    NetworkFolder,
    Recorder,
    check_fits,
    files_of,
    identity_of_file,
    is_work,
    train_networks,
)
from ddfast.training.teacher_config import TeacherConfig
from ddfast.wording import argument, plural, setting

_WHITENED = ", whitened by ZCA"  # in what a file says of its data

EXPERT = Kind("expert", "experts", "ddfast-experts-1")


class Experts(NetworkFolder):
    """A folder of experts, as `train_experts` leaves it."""

    kind = EXPERT

    @property
    def experts(self) -> list[Network]:
        """In the order of their numbers."""
        return self.networks


@isolated()
def train_experts(
    data: Any,
    *,
    arch: str = "convnet3_in",
    count: int = 10,
    epochs: int = 50,
    out: str | Path,
    images_per_class: int | None = None,
    image_size: int | None = None,
    normalization: str | Normalization = "auto",
    lr: float = 0.01,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch_size: int = 256,
    augment: str = "dsa",
    zca: bool = False,
    seed: int = 0,
    resume: bool = False,
    device: str = "auto",
    workers: int | None = None,
    quiet: bool = False,
    precision: str = "float32",
) -> Experts:
    """Train MTT's experts on the training split of `data`, and write them into the folder `out`.

    It then holds `expert-00000.safetensors` and so on, teacher files as `train_teacher` writes them, with
    `trajectory-00000.safetensors` and so on, the weights after every epoch, and the table of their accuracies as
    `experts.json` and `experts.md`. The data is decoded once. What the authors do is 100 experts of 50 epochs.

    Args:
        data: an image folder, archive, named set, or images in memory, as `ddfast.data.open_source` takes it.
        arch: name for `create_model`, a network without BatchNorm, as MTT trains its students step by step.
        count: how many networks.
        epochs: passes over the training images.
        out: the folder. It may not hold anything yet, unless `resume` finds that it is of this run.
        images_per_class: train on so many of each class, those that a run with this seed draws; None: all.
        image_size: side in pixels; None: the shorter side of the first training image, at most 224.
        normalization: of the pixels, a name or (mean, std); it must be that of the run that they serve.
        lr: learning rate of SGD, constant.
        momentum: of SGD.
        weight_decay: on every parameter.
        batch_size: images a step.
        augment: as in `TeacherConfig`; "dsa-no-flip" for digits.
        zca: whiten the images in place of a normalisation (`ddfast.output.whitening`). The transform is fitted on the
            training images, stands in the folder as `zca.safetensors`, and goes with the sets that are made by it.
        seed: each network's own seed is derived from it and its number.
        resume: continue a killed run from its last whole epoch; starts where there is nothing to continue, returns at
            once where all are trained, and trains further ones where `count` has grown.
        device: "auto", "cpu" or "cuda".
        workers: decoding workers; None: the loader's default.
        quiet: print nothing.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where it is faster.

    Raises:
        UsageError: bad arguments or data, a network with BatchNorm, a folder that holds something else, or with
            `resume` a run of other settings.
    """
    check_steps_alone(arch)
    if zca:
        if normalization not in ("auto", "none"):
            raise UsageError(
                f"{argument('zca')} takes the place of a normalisation: leave {argument('normalization')} out"
            )
        normalization = "none"
    config = TeacherConfig(
        arch=arch,
        epochs=epochs,
        image_size=image_size or COMMON_IMAGE,
        normalization=AUTO if normalization == "auto" else normalization,
        lr=positive_number(lr, "lr"),
        schedule="constant",
        batch_size=batch_size,
        weight_decay=weight_decay,
        momentum=momentum,
        seed=seed,
        precision=precision,
        augment=augment,
    )
    folder, networks = train_networks(
        EXPERT,
        data,
        config,
        count=count,
        out=out,
        images_per_class=images_per_class,
        image_size=image_size,
        resume=resume,
        device=device,
        workers=workers,
        quiet=quiet,
        recorder=lambda folder: _Trajectories(folder, zca=zca),
        noted=_WHITENED if zca else "",
    )
    return Experts(folder, config.arch, networks)


def check_steps_alone(arch: str) -> None:
    """Refuse a network whose steps leave something beside its weights: running statistics.

    Raises:
        UsageError: it has BatchNorm, or does not exist.
    """
    check_model(arch)
    network = create_model(arch, 2, COMMON_IMAGE)
    if any(getattr(module, "running_mean", None) is not None for module in network.modules()):
        near = (
            f": take {arch}_in"
            if arch.startswith("convnet")
            else ": take convnet3_in or another with InstanceNorm"
        )
        raise UsageError(
            f"{arch} has BatchNorm, whose running statistics are no part of the weights that are matched{near}"
        )


# Weights after every epoch
# ----------------------------------------------------------------------------------------------------------


class _Trajectories(Recorder):
    """Keeps the weights after every epoch, a file for each while a network is trained, then one file for all."""

    def __init__(self, out: Path, *, zca: bool) -> None:
        self._out, self._zca = out, zca

    def seen(self, train: ImageSet | StreamedSet, test: ImageSet | None) -> tuple[Any, ImageSet | None]:
        """See `Recorder`: whitened, where that is asked for, by the transform that the folder holds from then on."""
        if not any(is_work(EXPERT, entry.name) for entry in self._out.iterdir()):
            (self._out / WHITENING).unlink(
                missing_ok=True
            )  # of a run that ended before its first whole epoch
        if not self._zca:
            return train, test
        if not isinstance(train, ImageSet):
            raise UsageError(
                f"whitening is fitted on images that fit in memory: give fewer {argument('images_per_class')} or a "
                f"smaller {argument('image_size')}, or leave out {argument('zca')}"
            )
        whitening = read_whitening(self._out)
        if whitening is None:
            whitening = Whitening.fit(train.images)
            whitening.write(self._out)
        return whitened(train, whitening), None if test is None else whitened(test, whitening)

    def after(self, number: int) -> Callable[[int, nn.Module], None]:
        """See `Recorder`."""
        folder = self._folder(number)

        def keep(epoch: int, network: nn.Module) -> None:
            folder.mkdir(exist_ok=True)
            weights = {name: weight.detach() for name, weight in network.named_parameters()}
            atomic_write_bytes(folder / f"{epoch:05d}.safetensors", serialize_tensors(weights, {}))

        return keep

    def finish(self, number: int) -> None:
        """Put the weights of all epochs into one file; of an expert that was finished before it stands there."""
        path, folder = self._out / trajectory_file(number), self._folder(number)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            _epochs_in(path, None)
        else:
            epochs = [read_tensors(file, file.read_bytes(), what="epoch of an expert")[0] for file in files]
            stacked = {name: torch.stack([weights[name] for weights in epochs]) for name in epochs[0]}
            atomic_write_bytes(path, serialize_tensors(stacked, {}))
        shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, number: int) -> Path:
        return self._out / f"{EXPERT.noun}-{number:05d}.epochs"


def trajectory_file(number: int) -> str:
    """Name of the file of an expert's weights after every epoch."""
    return f"trajectory-{number:05d}.safetensors"


class Trajectories:
    """The experts of a folder, whose weights are read from disk when they are asked for.

    Attributes:
        epochs: that every one of them was trained for.
        whitening: of the images that they were trained on, None where they were normalised.
    """

    def __init__(self, paths: Sequence[Path], epochs: int, whitening: Whitening | None = None) -> None:
        from safetensors import safe_open

        self.epochs, self.whitening = epochs, whitening
        self._files = [safe_open(path, framework="pt") for path in paths]

    def __len__(self) -> int:
        return len(self._files)

    def weights(self, expert: int, epoch: int) -> dict[str, Tensor]:
        """Of an expert after an epoch, 0 for its start: float32, by the names of its parameters, on the CPU."""
        file = self._files[expert]
        return {name: file.get_slice(name)[epoch] for name in file.keys()}  # noqa: SIM118 - no dictionary


@isolated()
def load_experts(
    folder: str | Path,
    *,
    class_names: Sequence[str],
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    arch: str,
    epochs: int,
) -> Trajectories:
    """All experts of a folder, checked against the run that they serve.

    Args:
        folder: of `train_experts`.
        class_names: of the run, in the order of its labels.
        image_size: of its images, in pixels.
        mean: of its normalisation.
        std: of its normalisation.
        arch: of its students, which the experts must have.
        epochs: that the run goes along them, at most: start epoch and epochs behind it.

    Raises:
        UsageError: no such folder, no experts in it, a damaged one, one that does not fit the run, or one that was
            trained for fewer epochs.
    """
    paths, least = [], None
    files = files_of(EXPERT, folder)
    whitening = read_whitening(files[0].parent)
    if whitening is not None and (any(mean) or any(value != 1 for value in std)):
        raise UsageError(
            f"the experts in {folder} were trained on whitened images: give {setting('normalization', 'none')}"
        )
    for path in files:
        expert = load_teacher(path)
        if str(expert.facts.get("training", {}).get("data", "")).endswith(_WHITENED) != (
            whitening is not None
        ):
            raise UsageError(
                f"{path.parent / WHITENING} does not belong to {path.name}: train the experts anew"
            )
        check_fits(EXPERT, path, expert, class_names, image_size, (mean, std), arch)
        trajectory = path.with_name(trajectory_file(EXPERT.number(path.name) or 0))
        found = _epochs_in(trajectory, expert.model)
        if found < epochs:
            raise UsageError(
                f"{trajectory} has {plural(found, 'epoch')}, the run goes to epoch {epochs} "
                f"({argument('max_start_epoch')} - 1 + {argument('expert_epochs')}): lower "
                f"{argument('max_start_epoch')}, or train experts for {setting('epochs', epochs)}"
            )
        paths.append(trajectory)
        least = found if least is None else min(least, found)
    return Trajectories(paths, least or 0, whitening)


def experts_identity(folder: str | Path) -> list[dict[str, Any]]:
    """What a manifest says of the experts of a folder, in the order of their numbers.

    Returns:
        As `proxies_identity`, and "trajectory", the SHA-256 of the weights after every epoch; behind them "file" and
        "sha256" of the whitening, where there is one.

    Raises:
        UsageError: no such folder, no experts in it, or a damaged one.
    """
    found = []
    for path in files_of(EXPERT, folder):
        trajectory = path.with_name(trajectory_file(EXPERT.number(path.name) or 0))
        _epochs_in(trajectory, None)
        digest = hashlib.sha256(trajectory.read_bytes()).hexdigest()
        found.append({**identity_of_file(path), "trajectory": digest})
    if (whitening := path_of(folder, "experts") / WHITENING).is_file():
        found.append({"file": WHITENING, "sha256": hashlib.sha256(whitening.read_bytes()).hexdigest()})
    return found


def _epochs_in(path: Path, network: nn.Module | None) -> int:
    """Epochs of a trajectory, which must be of the network where that is given."""
    from safetensors import SafetensorError, safe_open

    number = path.stem.rpartition("-")[2]
    again = (
        f"delete {path.with_name(f'{EXPERT.noun}-{number}.safetensors')} and go on with {EXPERT.maker} and "
        f"{setting('resume', True)}, which trains this expert anew"
    )
    if not path.is_file():
        raise UsageError(f"{path} is missing: {again}")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): {again}") from error
    wanted = shapes if network is None else {name: tuple(w.shape) for name, w in network.named_parameters()}
    lengths = {shape[0] for shape in shapes.values() if shape}
    fits = network is None or {name: shape[1:] for name, shape in shapes.items()} == wanted
    if len(lengths) != 1 or not fits:
        raise UsageError(f"{path} holds other weights than its expert: {again}")
    return int(lengths.pop()) - 1
