"""The teachers that a recipe needs: files that are given, checkpoints beside them, or trained here once and kept."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench.studies.arms import alone, digest, fingerprint, teacher_at
from ddfast.data import open_source
from ddfast.data.decoding import decode
from ddfast.progress import say
from ddfast.training import train_teacher

EARLY_EPOCHS = 10
SMALL_IMAGE = 64  # pixels: up to here ResNets have a 3x3 stem
_KEPT_EPOCHS = (2, 5, 10, 20, 50)
_DEPTHS = ((32, 3), (64, 4))  # image side in pixels up to which a ConvNet has so many blocks; beyond them 5


def fitting(arch: str, image_size: int) -> str:
    """`convnet` at the depth that fits the image (InfoUtil, 4.1), a ResNet with the stem that does; or as it is."""
    if arch == "convnet":
        return f"convnet{next((depth for side, depth in _DEPTHS if image_size <= side), 5)}"
    if arch in ("resnet18", "resnet50", "resnet101") and image_size <= SMALL_IMAGE:
        return f"{arch}_small"
    return arch


def native_size(data: str) -> int:
    """Shorter side of the first training image, at most 224 pixels."""
    source = open_source(data, "train")
    image = decode(source.read(source.samples[0]))
    return min(int(min(image.shape[1:])), 224)


def teachers(
    data: str, given: Sequence[Path], archs: Sequence[str], work: Path, epochs: int, width: int | None = None
) -> list[Path]:
    """Files of the teachers: those given, or one of every architecture, trained once and kept in `work`.

    Args:
        data: what they are trained on.
        given: files; where there is one, nothing is trained.
        archs: names for `create_model`, or `convnet`.
        work: folder in which trained teachers are kept.
        epochs: of a training.
        width: channels of a ConvNet's layers.
    """
    if given:
        return list(given)
    size = native_size(data)
    return [_trained(data, fitting(arch, size), work, epochs, width) for arch in archs]


def teachers_to_train(
    data: str, archs: Sequence[str], work: Path, epochs: int, width: int | None = None
) -> list[str]:
    """Architectures whose teacher has still to be trained."""
    size = native_size(data)
    names = [fitting(arch, size) for arch in archs]
    return [name for name in names if not _kept(data, name, work, epochs, width).exists()]


def _kept(data: str, arch: str, work: Path, epochs: int, width: int | None) -> Path:
    told = digest([fingerprint(data), arch, epochs, width])
    return work / "teachers" / f"{arch}-{epochs}-{told}.safetensors"


def _trained(data: str, arch: str, work: Path, epochs: int, width: int | None) -> Path:
    path = _kept(data, arch, work, epochs, width)
    with alone(path):
        if not path.exists():
            say(f"training the teacher {arch}, {epochs} epochs, once: {path}")
        train_teacher(
            data,
            out=path,
            arch=arch,
            epochs=epochs,
            arch_options={} if width is None else {"width": width},
            checkpoint_epochs=[epoch for epoch in _KEPT_EPOCHS if epoch < epochs],
            precision="auto",
            resume=True,
        )
    return path


def checkpoints(teacher: Path) -> list[Path]:
    """Checkpoints beside a teacher file, `<stem>-epochN.safetensors`, the youngest first."""
    found = {}
    for path in teacher.parent.glob(f"{teacher.stem}-epoch*.safetensors"):
        epoch = re.fullmatch(r"-epoch(\d+)", path.stem.removeprefix(teacher.stem))
        if epoch:
            found[int(epoch[1])] = path
    return [found[epoch] for epoch in sorted(found)]


def early_teacher(data: str, teacher: Path, given: Path | None, work: Path) -> Path:
    """The label teacher of 10 epochs: the file that is given, the checkpoint beside the teacher, or one trained apart.

    The last is the paper's B.2: 10 epochs of SGD at a constant rate, 0.001 for images of up to 32 px and 0.01 beyond.
    """
    if given is not None:
        return given
    beside = teacher.with_name(f"{teacher.stem}-epoch{EARLY_EPOCHS}.safetensors")
    if beside.exists():
        return beside
    full = teacher_at(teacher)
    path = work / "teachers" / f"{full.arch}-early-{full.sha256[:10]}.safetensors"
    with alone(path):
        if not path.exists():
            say(f"training a label teacher {full.arch} for {EARLY_EPOCHS} epochs, once: {path}")
        train_teacher(
            data,
            out=path,
            arch=full.arch,
            arch_options=full.arch_options,
            epochs=EARLY_EPOCHS,
            image_size=full.image_size,
            normalization=(full.mean, full.std),
            lr=1e-3 if full.image_size <= 32 else 1e-2,
            schedule="constant",
            precision="auto",
            resume=True,
        )
    return path
