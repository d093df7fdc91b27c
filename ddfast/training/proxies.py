"""Proxies: the trained networks whose features CMI measures (ICLR 2025; its code's pretrain/pre_model.py).

Plainly trained: SGD at a constant rate, no augmentation. Each has a seed of its own, derived from (seed, "proxy",
number), so that a folder can be filled further later on. The proxies are ordinary teacher files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ddfast.arguments import positive_number
from ddfast.isolation import isolated
from ddfast.models.fusing import fuse
from ddfast.models.normalization import AUTO, Normalization
from ddfast.models.registry import COMMON_IMAGE
from ddfast.models.teacher import load_teacher
from ddfast.training.network_folder import (
    Kind,
    Network,
    NetworkFolder,
    check_fits,
    files_of,
    identity_of_file,
    train_networks,
)
from ddfast.training.teacher_config import TeacherConfig

PROXY = Kind("proxy", "proxies", "ddfast-proxies-1")


class Proxies(NetworkFolder):
    """A folder of proxies, as `train_proxies` leaves it."""

    kind = PROXY

    @property
    def proxies(self) -> list[Network]:
        """In the order of their numbers."""
        return self.networks


@isolated()
def train_proxies(
    data: Any,
    *,
    arch: str = "resnet18_in",
    count: int = 10,
    epochs: int = 20,
    out: str | Path,
    images_per_class: int | None = None,
    image_size: int | None = None,
    normalization: str | Normalization = "auto",
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-3,
    batch_size: int = 256,
    seed: int = 0,
    resume: bool = False,
    device: str = "auto",
    workers: int | None = None,
    quiet: bool = False,
    precision: str = "float32",
) -> Proxies:
    """Train CMI's networks on the training split of `data`, and write them into the folder `out`.

    It then holds `proxy-00000.safetensors` and so on, teacher files as `train_teacher` writes them, and the table of
    their accuracies as `proxies.json` and `proxies.md`. The data is decoded once. What the authors do is 1,000 networks
    and 40 epochs; 10 to 20 networks that reach 75% on CIFAR-10 will do.

    Args:
        data: an image folder, archive, named set, or images in memory, as `ddfast.data.open_source` takes it.
        arch: name for `create_model`.
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
        seed: each network's own seed is derived from it and its number.
        resume: continue a killed run from its last whole epoch; starts where there is nothing to continue, returns at
            once where all are trained, and trains further ones where `count` has grown.
        device: "auto", "cpu" or "cuda".
        workers: decoding workers; None: the loader's default.
        quiet: print nothing.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where it is faster.

    Raises:
        UsageError: bad arguments or data, a folder that holds something else, or with `resume` a run of other settings.
    """
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
        augment="none",
    )
    folder, networks = train_networks(
        PROXY,
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
    )
    return Proxies(folder, config.arch, networks)


@isolated()
def load_proxies(
    folder: str | Path,
    *,
    class_names: Sequence[str],
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    arch: str | None = None,
) -> list[nn.Module]:
    """All proxies of a folder, checked against the run that they serve.

    Args:
        folder: of `train_proxies`.
        class_names: of the run, in the order of its labels.
        image_size: of its images, in pixels.
        mean: of its normalisation.
        std: of its normalisation.
        arch: the architecture that the proxies must have; None: any.

    Returns:
        The networks in the order of their numbers: normalised images [B, 3, S, S] -> logits [B, C], eval mode, float32,
        on the CPU, frozen, their ConvNet blocks fused. Only images get gradients of them.

    Raises:
        UsageError: no such folder, no proxies in it, a damaged one, or one that does not fit the run.
    """
    networks = []
    for path in files_of(PROXY, folder):
        proxy = load_teacher(path)
        check_fits(PROXY, path, proxy, list(class_names), image_size, (mean, std), arch)
        networks.append(fuse(proxy.model.eval().requires_grad_(False)))
    return networks


def proxies_identity(folder: str | Path) -> list[dict[str, Any]]:
    """What a manifest says of the proxies of a folder, in the order of their numbers.

    Returns:
        A dictionary a proxy: "file", its name; "sha256" of its bytes; "arch"; "top1", percent or None.

    Raises:
        UsageError: no such folder, no proxies in it, or a damaged one.
    """
    return [identity_of_file(path) for path in files_of(PROXY, folder)]
