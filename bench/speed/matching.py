"""Speed entries of the matching methods: an iteration of DM, with and without CMI, against its authors' own loops."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import ddfast
from bench.speed.measuring import synchronise
from bench.speed.peer_loops import PeerLoop, dm_loop
from bench.speed.registry import (
    Check,
    Contender,
    Contest,
    Measurable,
    Settings,
    Target,
    relative_error,
    speed_entry,
)
from ddfast.methods.base import Context
from ddfast.methods.matching.cmi import Regulariser
from ddfast.methods.matching.dm import DM
from ddfast.methods.matching.objectives import class_means
from ddfast.methods.synthesis import State
from ddfast.seeding import generator

CLASSES, SIDE = 10, 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Images:
    """A pool of rendered images in memory, `each` of every class; see `ClassPool`."""

    def __init__(self, each: int, classes: int = CLASSES) -> None:
        draws = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (classes, each, 3, SIDE, SIDE), generator=draws).byte()
        self.labels = torch.arange(classes).repeat_interleave(each)
        self.classes = classes

    def draw(self, label: int, count: int, draws: torch.Generator) -> Tensor:
        """The first `count` of a shuffle of the class."""
        return self.images[label][torch.randperm(self.images.shape[1], generator=draws)[:count]]

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """See `Pool`."""
        for places in order.split(batch_size):
            yield places, self.images.flatten(0, 1)[places], self.labels[places]

    def say(self, message: str) -> None:
        """Nothing: there is nobody to tell."""


@speed_entry(
    "dm_iteration",
    what="an iteration of DM against the reference repository's own loop",
    minutes=1.5,
    targets={"cpu": {"ddfast": Target(3.0)}},
)
def dm_iteration(settings: Settings) -> Iterator[Measurable]:
    """256 real and 10 synthetic images a class, 10 classes, ConvNet-3 with InstanceNorm."""
    yield from _against_peer(settings, "DatasetCondensation", None)


@speed_entry(
    "dm_cmi_iteration",
    what="an iteration of DM with CMI on a ResNet-18 against its authors' own loop",
    minutes=2,
    targets={"cpu": {"ddfast": Target(1.8)}},
)
def dm_cmi_iteration(settings: Settings) -> Iterator[Measurable]:
    """The same with a proxy `resnet18_in`; the authors' loop reads a proxy from disk in every iteration."""
    torch.manual_seed(0)
    yield from _against_peer(
        settings, "CMIDD", ddfast.create_model("resnet18_in", CLASSES, SIDE).to(settings.device)
    )


@speed_entry(
    "dm_real_side",
    what="features of the real images of a DM iteration against eager PyTorch: time, and peak memory",
    minutes=0.6,
    targets={"cpu": {"ddfast": Target(1.8, memory=0.5)}},
)
def dm_real_side(settings: Settings) -> Iterator[Measurable]:
    """Class means of the features of 10 x 256 images without gradients; eager PyTorch takes them class by class."""
    count, width = settings.size((256, 128), quick=(8, 16), gpu=(256, 128))
    torch.manual_seed(0)
    model = ddfast.create_model("convnet3_in", CLASSES, SIDE, width=width).to(settings.device)
    images = torch.randn(CLASSES, count, 3, SIDE, SIDE).to(settings.device)
    fused = ddfast.fuse(model)

    @torch.no_grad()
    def ours() -> Tensor:
        return class_means(fused, images)

    @torch.no_grad()
    def theirs() -> Tensor:
        from ddfast.models.registry import features

        return torch.stack([features(model, of_class).mean(dim=0) for of_class in images])

    yield Contest(
        f"ConvNet-3, features of {CLASSES} x {count} images of {SIDE} px",
        ours=[Contender("ddfast", ours, work=CLASSES * count)],
        peer=Contender("eager, class by class", theirs, work=CLASSES * count),
        gate=lambda: [Check("against the peer's", relative_error(ours(), theirs()), 1e-5)],
        unit="images",
        rounds=5,
        long=True,
    )


def _against_peer(settings: Settings, repository: str, proxy: nn.Module | None) -> Iterator[Contest]:
    each, real, ipc = settings.size((512, 256, 10), quick=(8, 4, 2), gpu=(5000, 256, 10))
    pool = Images(each)
    method, context = _ours(settings, ipc, real, proxy)
    start = method.begin(method.groups(CLASSES, ipc)[0], pool, context)
    peer = _peer(repository, pool, start.pixels, ipc, real, settings.device)
    with _proxies_on_disk(peer, proxy):
        steps = iter(range(1 << 30))
        state = State(start.group, {name: tensor.clone() for name, tensor in start.tensors.items()})

        def ours() -> None:
            method.step(next(steps), state, pool, context)
            synchronise(settings.device)

        yield Contest(
            f"DM{'' if proxy is None else ' with CMI'}, 10 classes, {real} real and {ipc} synthetic images each",
            ours=[Contender("ddfast", ours)],
            peer=Contender(f"{repository}, main_DM.py", peer.step),
            gate=lambda: _same_step(
                method,
                start,
                pool,
                context,
                _peer(repository, pool, start.pixels, ipc, real, settings.device),
            ),
            unit="iterations",
            rounds=5,
            long=True,
        )


def _ours(settings: Settings, ipc: int, real: int, proxy: nn.Module | None) -> tuple[DM, Context]:
    options = {"iterations": 20000, "real_batch": real}
    method = DM.from_options(options if proxy is None else {**options, "cmi": 8000.0, "proxies": "in memory"})
    assert isinstance(method, DM)
    if proxy is not None:
        method._regulariser = Regulariser([proxy.eval()])
    return method, context_of(settings.device, ipc, CLASSES)


def context_of(device: torch.device, ipc: int, classes: int) -> Context:
    """Of a run on images of 32 px."""
    return Context(
        teacher=None,
        image_size=SIDE,
        factor=1,
        seed=0,
        precision="float32",
        forward_batch=128,
        device=device,
        ipc=ipc,
        class_names=tuple(map(str, range(classes))),
        mean=MEAN,
        std=STD,
    )


def normalised(images: Tensor, device: torch.device) -> Tensor:
    """(x / 255 - mean) / std of uint8 images [..., 3, H, W]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((images.float() / 255 - mean) / std).to(device)


def _peer(
    repository: str, pool: Images, start: Tensor, ipc: int, real: int, device: torch.device
) -> PeerLoop:
    images = normalised(pool.images.flatten(0, 1), device)
    return dm_loop(repository, images, pool.labels, start, ipc, real)


def _same_step(method: DM, start: State, pool: Images, context: Context, peer: PeerLoop) -> list[Check]:
    """One iteration of both on the same images, augmentations and weights: the pixels after it."""
    state = State(start.group, {name: tensor.clone() for name, tensor in start.tensors.items()})
    method.step(0, state, pool, context)
    now: list[int] = []

    def get_images(label: int, count: int) -> Tensor:
        now[:] = [label]
        drawn = pool.draw(label, count, generator(context.seed, "real", label, 0))
        return normalised(drawn, context.device)

    def augment(images: Tensor, *_: object, **__: object) -> Tensor:
        return method.augmentation((SIDE, SIDE), generator(context.seed, "augment", now[0], 0))(images)

    made: Callable[..., nn.Module] = peer.names["get_network"]

    def get_network(name: str, *arguments: object) -> nn.Module:
        network = made(name, *arguments)
        if name == "ConvNet":
            copy_in_order(method.networks.at(0, state, pool, context), network)
        return network

    peer.names |= {"get_images": get_images, "DiffAugment": augment, "get_network": get_network}
    peer.step()
    moved = relative_error(state.pixels - start.pixels, peer.pixels - start.pixels)
    # A ReLU whose input is within rounding of zero may flip in either.
    return [Check("change of the pixels, same draws", moved, 5e-3)]


@torch.no_grad()
def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Parameters of one network into those of another that has them in the same order."""
    for theirs, ours in zip(target.parameters(), source.parameters(), strict=True):
        theirs.copy_(ours)


@contextmanager
def _proxies_on_disk(peer: PeerLoop, proxy: nn.Module | None) -> Iterator[None]:
    """The folder that their loop reads a proxy from in every iteration, `../CIFAR10_pre_res` from where it runs."""
    if proxy is None:
        yield
        return
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as root:
        theirs = peer.names["get_network"]("ResNet18", 3, CLASSES, (SIDE, SIDE))
        copy_in_order(proxy, theirs)
        (Path(root) / "CIFAR10_pre_res").mkdir()
        (Path(root) / "run").mkdir()
        torch.save(theirs.state_dict(), Path(root) / "CIFAR10_pre_res" / "0.pt")
        os.chdir(Path(root) / "run")
        try:
            yield
        finally:
            os.chdir(before)
