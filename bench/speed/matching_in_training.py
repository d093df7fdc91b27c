"""Speed entries of the methods that match on networks in training, DSA, IDC and IDM, against their authors' own loops.

The gates hold whole steps, trained networks among them, against that code: same draws, same weights, the pixels after.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import ddfast
from bench.speed.matching import SIDE, Images, context_of, normalised
from bench.speed.measuring import synchronise
from bench.speed.peer_loops import ENDLESS, PeerLoop, add_to_queue, dsa_loops, idc_loops, idm_loop
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
from ddfast.methods.matching import base, networks, pixels, queue, trained
from ddfast.methods.matching.base import Matching
from ddfast.methods.matching.dsa import DSA
from ddfast.methods.matching.idc import IDC
from ddfast.methods.matching.idm import IDM
from ddfast.methods.matching.real import normalised as on_device
from ddfast.methods.matching.real import standardised
from ddfast.methods.matching.trained import real_batch
from ddfast.methods.synthesis import State
from ddfast.seeding import derived_seed, generator, seeded

ARCH = "convnet3_in"
_SIZE = (SIDE, SIDE)
# Of the gates: classes (IDC counts the best five), images per class, real images of a class in a step, steps.
_CLASSES, _IPC, _REAL, _STEPS = 5, 2, 6, 2
# In float64 on PyTorch's own layers, which shows that the methods are the same, and in float32 on the fused ones: there
# a ReLU whose input is within rounding of zero may flip. That changes a gradient by a thousandth, and training carries
# it on.
_ALLOWED = {torch.float64: 1e-9, torch.float32: 5e-2}


@speed_entry(
    "dsa_iteration",
    what="an iteration of DSA, its networks' training among it, against the reference repository's own loop",
    minutes=1.5,
    targets={"cpu": {"ddfast": Target(1.8)}},
)
def dsa_iteration(settings: Settings) -> Iterator[Measurable]:
    """256 real and 10 synthetic images a class, ConvNet-3 with InstanceNorm.

    An outer iteration is 10 steps of the pixels with 50 epochs of the network between them, 450 in all. What is timed
    is a tenth: a step and 45 epochs; on a CPU with 4 classes, as ten take minutes.
    """
    classes, each, real, ipc, epochs = settings.size(
        (4, 512, 256, 10, 45), quick=(2, 8, 4, 2, 2), gpu=(10, 5000, 256, 10, 45)
    )
    pool, context = Images(each, classes), context_of(settings.device, ipc, classes)
    method = _method(DSA, ipc, real_batch=real, outer_loop=ENDLESS, inner_loop=epochs)
    start = method.begin(method.groups(classes, ipc)[0], pool, context)
    images = normalised(pool.images.flatten(0, 1), settings.device)
    first, peer = dsa_loops(images, pool.labels, start.pixels, ipc, real, 1, epochs)
    first.step()
    first.names["args"].outer_loop = ENDLESS
    yield Contest(
        f"DSA, a step and {epochs} epochs, {classes} classes, {real} real and {ipc} synthetic images each",
        ours=[Contender("ddfast", _endless(method, start, pool, context))],
        peer=Contender("DatasetCondensation, main.py", peer.step),
        gate=lambda: _in_both(dsa_checks, settings.device),
        unit="steps",
        rounds=3,
        long=True,
    )


@speed_entry(
    "idc_step",
    what="an inner step of IDC, its network's training among it, against its authors' own loop",
    minutes=1.5,
    targets={"cpu": {"ddfast": Target(1.8)}},
)
def idc_step(settings: Settings) -> Iterator[Measurable]:
    """64 real and 10 x 4 synthetic images a class, 10 classes, 2,000 real images of training, ConvNet-3."""
    classes, each, real, ipc, samples = settings.size(
        (10, 512, 64, 10, 2000), quick=(5, 16, 4, 2, 8), gpu=(10, 5000, 64, 10, 2000)
    )
    pool, context = Images(each, classes), context_of(settings.device, ipc, classes)
    method = _method(
        IDC, ipc, real_batch=real, inner_loop=ENDLESS, net_samples=samples, net_batch=real, iterations=1
    )
    start = method.begin(method.groups(classes, ipc)[0], pool, context)
    images = pool.images.flatten(0, 1).float().to(settings.device) / 255
    first, peer = idc_loops(images, pool.labels, start.pixels, ipc, real, 2, 1, samples)
    first.step()
    yield Contest(
        f"IDC, a step, {classes} classes, {real} real and {ipc} x 4 synthetic images each",
        ours=[Contender("ddfast", _endless(method, start, pool, context))],
        peer=Contender("Efficient-Dataset-Condensation, condense.py", peer.step),
        gate=lambda: _in_both(idc_checks, settings.device),
        unit="steps",
        rounds=3,
        long=True,
    )


@speed_entry(
    "idm_iteration",
    what="an iteration of IDM, its queue's training among it, against its authors' own loop",
    minutes=1.5,
    targets={"cpu": {"ddfast": Target(2.5)}},
)
def idm_iteration(settings: Settings) -> Iterator[Measurable]:
    """256 real and 10 x 4 synthetic images a class, ConvNet-3 with InstanceNorm, a queue of 100 networks.

    On a CPU a fifth of it: 2 of 10 classes, and two networks train 2 of 10 steps of 256 images each.
    """
    classes, each, real, ipc, steps, queue = settings.size(
        (2, 2560, 256, 10, 2, 100), quick=(2, 16, 4, 2, 1, 4), gpu=(10, 5000, 256, 10, 10, 100)
    )
    pool, context = Images(each, classes), context_of(settings.device, ipc, classes)
    batch = min(256, classes * each)
    method = _method(IDM, ipc, real_batch=real, net_steps=steps, net_batch=batch)
    start = method.begin(method.groups(classes, ipc)[0], pool, context)
    method.step(0, start, pool, context)
    for name, tensor in start.tensors.items():
        if name.startswith(
            "network."
        ):  # of the four networks that there are as many copies as fill the queue
            start.tensors[name] = torch.cat([tensor] * (queue // len(tensor)))
    images = normalised(pool.images.flatten(0, 1), settings.device)
    peer = idm_loop(images, pool.labels, start.pixels, ipc, real, steps, batch)
    add_to_queue(peer, [_network(peer, context, "queue", number % 4) for number in range(queue)])
    yield Contest(
        f"IDM, {classes} classes, {real} real and {ipc} x 4 synthetic images each, {steps} steps of two networks",
        ours=[Contender("ddfast", _endless(method, start, pool, context))],
        peer=Contender("IDM, IDM_cifar10.py", peer.step),
        gate=lambda: _in_both(idm_checks, settings.device),
        unit="iterations",
        rounds=3,
        long=True,
    )


def _in_both(checks: Callable[[torch.device, torch.dtype], list[Check]], device: torch.device) -> list[Check]:
    """The checks of a gate, in float64 on PyTorch's own layers and in float32 on the fused ones."""
    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(networks, "fuse", lambda network: network.double()))
        for module in (base, pixels, queue, trained):
            patched.enter_context(mock.patch.object(module, "normalised", _in_float64))
        # The training of DatasetCondensation takes images to float32.
        patched.enter_context(mock.patch.object(Tensor, "float", Tensor.double))
        plain = checks(device, torch.float64)
    told = [(plain, "float64"), (checks(device, torch.float32), "fused float32")]
    return [dataclasses.replace(each, what=f"{each.what}, {of}") for group, of in told for each in group]


def _in_float64(images: Tensor, context: Context, dtype: torch.dtype = torch.float64) -> Tensor:
    return on_device(images, context, torch.float64)


def dsa_checks(device: torch.device, dtype: torch.dtype) -> list[Check]:
    """An outer iteration of DSA of both: two steps of the pixels, two epochs of two batches between them."""
    epochs, batch = 2, 8
    pool, context = Images(2 * _REAL, _CLASSES), context_of(device, _IPC, _CLASSES)
    method = _method(
        DSA, _IPC, real_batch=_REAL, outer_loop=_STEPS, inner_loop=epochs, net_batch=batch, iterations=1
    )
    start, state, weights = _ours(method, pool, context, dtype)
    images = on_device(pool.images.flatten(0, 1), context, dtype)
    peer, _ = dsa_loops(images, pool.labels, start.pixels, _IPC, _REAL, _STEPS, epochs, batch)
    names = peer.names
    now = _Now()
    training = method.training()
    assert training is not None

    def get_images(label: int, count: int) -> Tensor:
        now.label = label
        drawn = pool.draw(label, count, generator(context.seed, "real", label, names["ol"]))
        return on_device(drawn, context, dtype)

    def augment(given: Tensor, strategy: str, seed: int = -1, param: object = None) -> Tensor:
        if seed == -1:
            return training(given, now.draws).contiguous()
        return method.augmentation(_SIZE, generator(context.seed, "augment", now.label, names["ol"]))(given)

    kind: Any = names["TensorDataset"]

    class Shuffled(kind):
        """Images in the order of ours, whichever their loader asks for."""

        def __init__(self, *tensors: Tensor) -> None:
            super().__init__(*tensors)
            self.left: list[int] = []
            now.draws = generator(context.seed, "training", names["ol"])

        def __getitem__(self, _: int) -> Any:
            if not self.left:
                self.left = torch.randperm(len(self), generator=now.draws).tolist()
            return super().__getitem__(self.left.pop(0))

    names |= {
        "get_images": get_images,
        "DiffAugment": augment,
        "TensorDataset": Shuffled,
        "get_network": lambda *_: _network(peer, context, "network", 0, dtype),
    }
    first = _weights(_network(peer, context, "network", 0, dtype))
    peer.step()
    return [
        _pixels_check(start, state, peer, dtype),
        _weights_check(weights[-1], _weights(names["net"]), first, dtype),
    ]


def idc_checks(device: torch.device, dtype: torch.dtype) -> list[Check]:
    """An outer iteration of IDC of both: two steps of the pixels, four batches of training after each."""
    batch, samples = 8, 26
    pool, context = Images(2 * _REAL, _CLASSES), context_of(device, _IPC, _CLASSES)
    method = _method(
        IDC,
        _IPC,
        real_batch=_REAL,
        inner_loop=_STEPS + 1,
        net_samples=samples,
        net_batch=batch,
        iterations=1,
    )
    start, state, weights = _ours(method, pool, context, dtype)
    images = pool.images.flatten(0, 1).to(device, dtype) / 255
    peer, _ = idc_loops(images, pool.labels, start.pixels, _IPC, _REAL, 2, _STEPS, samples)
    names, now = peer.names, _Now()

    class Loader:
        """Batches of ours, and what is drawn for them."""

        def __init__(self) -> None:
            self.device = device  # no string: their training copies to a GPU where this is "cpu"

        def class_sample(self, label: int) -> tuple[Tensor, Tensor]:
            now.label = label
            drawn = pool.draw(label, _REAL, generator(context.seed, "real", label, names["ot"]))
            return drawn.to(device, dtype) / 255, torch.full((_REAL,), label, device=device)

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(ENDLESS):
                now.draws = generator(context.seed, "training", names["ot"], number)
                found, labels = real_batch(pool, batch, now.draws)
                mixing = np.random.default_rng(derived_seed(context.seed, "cutmix", names["ot"], number))
                now.mixed, now.share = mixing.random(), 0.0
                if now.mixed < names["args"].mix_p:
                    now.share = mixing.beta(1.0, 1.0)
                    now.centre = [int(mixing.integers(SIDE)), int(mixing.integers(SIDE))]
                    now.partner = torch.from_numpy(mixing.permutation(len(found)))
                yield found.to(device, dtype) / 255, labels.to(device)

    def aug(given: Tensor) -> Tensor:
        drawn = generator(context.seed, "augment", now.label, names["ot"])
        return method.augmentation(_SIZE, drawn)(standardised(given, context)).contiguous()

    drawing = types.SimpleNamespace(rand=lambda _: now.mixed, beta=lambda *_: now.share)
    centres = types.SimpleNamespace(randint=lambda _: now.centre.pop(0))
    names |= {
        "loader_real": Loader(),
        "aug": aug,
        "aug_rand": lambda given: method._for_training(standardised(given, context), now.draws).contiguous(),
        "random_indices": lambda *_, **__: now.partner,
        "np": types.SimpleNamespace(random=drawing),
        "define_model": lambda *_: _network(peer, context, "network", 0, dtype),
    }
    # Their own boxes, around centres of ours.
    of_boxes = names["rand_bbox"].__globals__
    of_boxes["np"] = types.SimpleNamespace(random=centres, int=int, sqrt=np.sqrt, clip=np.clip)
    first = _weights(_network(peer, context, "network", 0, dtype))
    peer.step()
    return [
        _pixels_check(start, state, peer, dtype),
        _weights_check(weights[-1], _weights(names["model"]), first, dtype),
    ]


def idm_checks(device: torch.device, dtype: torch.dtype) -> list[Check]:
    """Two iterations of IDM of both, on a queue of four networks, whose accuracies weigh the cross-entropy."""
    batch, steps = 8, 2
    pool, context = Images(2 * _REAL, _CLASSES), context_of(device, _IPC, _CLASSES)
    method = _method(IDM, _IPC, real_batch=_REAL, net_steps=steps, net_batch=batch, iterations=_STEPS)
    start, state, _ = _ours(method, pool, context, dtype)
    images = on_device(pool.images.flatten(0, 1), context, dtype)
    peer = idm_loop(images, pool.labels, start.pixels, _IPC, _REAL, steps, batch)
    add_to_queue(peer, [_network(peer, context, "queue", number, dtype) for number in range(3)])
    names, now = peer.names, _Now()

    def get_images(c: int | None = None, n: int = 0) -> Any:
        if c is not None:
            now.label = c
            drawn = pool.draw(c, n, generator(context.seed, "real", c, names["it"]))
            return on_device(drawn, context, dtype)
        place, number = now.trained[now.batches // steps], now.batches % steps
        now.batches += 1
        draws = generator(context.seed, "training", names["it"], place, number)
        found, labels = real_batch(pool, n, draws)
        return on_device(found, context, dtype), labels.to(device)

    def shuffle(places: list[int]) -> None:
        """First which network the pixels are matched on, then which ones train."""
        if now.batches == 0 and not now.chosen:
            drawn = torch.randint(len(places), (), generator=generator(context.seed, "network", names["it"]))
            places.insert(0, places.pop(int(drawn)))
            now.chosen = True
        else:
            order = torch.randperm(len(places), generator=generator(context.seed, "training", names["it"]))
            places[:] = now.trained = order.tolist()

    def augment(given: Tensor, *_: object, **__: object) -> Tensor:
        return method.augmentation(_SIZE, generator(context.seed, "augment", now.label, names["it"]))(given)

    names |= {
        "get_images": get_images,
        "DiffAugment": augment,
        "random": types.SimpleNamespace(shuffle=shuffle),
        "get_network": lambda *_: _network(peer, context, "queue", 3, dtype),
    }
    for number in range(_STEPS):
        now.batches, now.chosen = 0, False
        peer.step(number)
    held = [each for name, each in state.tensors.items() if name.startswith("network.weights.")]
    found = torch.stack([_by_kind([each[place] for each in held], context) for place in range(4)])
    theirs = torch.stack([_weights(network) for network in names["net_list"]])
    first = torch.stack([_weights(_network(peer, context, "queue", n, dtype)) for n in range(4)])
    right = state.tensors["network.right"] / state.tensors["network.seen"].clamp(min=1)
    meters = [meter.value()[0] / 100 if meter.n else 0.0 for meter in names["acc_meters"]]
    return [
        _pixels_check(start, state, peer, dtype),
        _weights_check(found, theirs, first, dtype),
        Check("accuracies of the networks", float((right.cpu() - torch.tensor(meters)).abs().max()), 0.05),
    ]


class _Now(types.SimpleNamespace):
    """What a gate knows of the place that the loop of a peer is at."""

    label: int
    draws: torch.Generator


def _method(kind: type[Matching], ipc: int, **options: Any) -> Any:
    method = kind.from_options({"arch": ARCH, "init": "mix" if kind is not DSA else "real", **options})
    return method.resolved(method.factor, ipc)


def _endless(method: Matching, start: State, pool: Images, context: Context) -> Callable[[], None]:
    """Steps from a state on, one after another."""
    state = State(start.group, {name: tensor.clone() for name, tensor in start.tensors.items()})
    numbers = iter(range(1 if "network.seen" in state.tensors else 0, ENDLESS))

    def step() -> None:
        method.step(next(numbers), state, pool, context)
        synchronise(context.device)

    if "network.seen" not in state.tensors:
        step()  # makes the network
    return step


def _ours(
    method: Matching, pool: Images, context: Context, dtype: torch.dtype
) -> tuple[State, State, list[Tensor]]:
    """The start, the state after the steps of a gate, and the weights of the network after each."""
    start = method.begin(method.groups(_CLASSES, _IPC)[0], pool, context)
    start.tensors = {name: tensor.to(dtype) for name, tensor in start.tensors.items()}
    state = State(start.group, {name: tensor.clone() for name, tensor in start.tensors.items()})
    weights = []
    for number in range(_STEPS):
        method.step(number, state, pool, context)
        held = [
            tensor
            for name, tensor in state.tensors.items()
            if name.startswith("network.") and "velocity" not in name
        ]
        if held and held[0].shape == (128, 3, 3, 3):  # a single network
            weights.append(_by_kind(held, context))
    return start, state, weights


def _network(
    peer: PeerLoop, context: Context, purpose: str, number: int, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A network of theirs with the weights that ours has under a key."""
    theirs: nn.Module = peer.names["make_network"]().to(dtype)
    with seeded(context.seed, purpose, number):
        ours = ddfast.create_model(ARCH, context.classes, context.image_size)
    with torch.no_grad():
        for mine, other in zip(_parameters(ours), _parameters(theirs), strict=True):
            other.copy_(mine)
    return theirs.to(context.device)


def _parameters(network: nn.Module) -> list[Tensor]:
    """Of the convolutions, then of the norms, then of the rest: the codes list them in different orders."""
    modules = [each for each in network.modules() if list(each.parameters(recurse=False))]
    kinds = (nn.Conv2d, nn.GroupNorm)
    modules.sort(key=lambda each: next((n for n, kind in enumerate(kinds) if isinstance(each, kind)), 2))
    return [parameter for each in modules for parameter in each.parameters()]


def _weights(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in _parameters(network)])


def _by_kind(tensors: Sequence[Tensor], context: Context) -> Tensor:
    """The weights of a network of ours, in the order of its state dict, as `_weights`."""
    network = ddfast.create_model(ARCH, context.classes, context.image_size).to(tensors[0].dtype)
    network.load_state_dict(dict(zip(network.state_dict(), tensors, strict=True)))
    return _weights(network)


def _pixels_check(start: State, state: State, peer: PeerLoop, dtype: torch.dtype) -> Check:
    moved = relative_error(state.pixels - start.pixels, peer.pixels - start.pixels)
    return Check(f"change of the pixels in {_STEPS} steps", moved, _ALLOWED[dtype])


def _weights_check(found: Tensor, theirs: Tensor, first: Tensor, dtype: torch.dtype) -> Check:
    return Check(
        "change of the trained weights", relative_error(found - first, theirs - first), _ALLOWED[dtype]
    )
