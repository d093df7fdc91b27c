"""A pool of random images in memory, and the context of a run on it."""

import pytest
import torch

from ddfast.methods.base import Context
from ddfast.methods.matching.networks import Built, Redrawn
from ddfast.models import create_model
from ddfast.seeding import seeded


class Exact(Built):
    """Stands in for a method's `Built`: PyTorch's own layers in float64."""

    def __init__(self, arch="convnet3_in"):
        super().__init__(arch, trained=True)

    def on(self, context):
        redrawn = super().on(context)
        if not isinstance(redrawn, _ExactRedrawn):
            redrawn.__class__ = _ExactRedrawn
            redrawn.network = redrawn._created("example").double()
        return redrawn


class _ExactRedrawn(Redrawn):
    def drawn(self, *key):
        return self.holding(self._created(*key).double().state_dict())


def exact(method, arch="convnet3_in"):
    """The method on networks in float64, and a state of it in float64."""
    method.networks._built = Exact(arch)
    return method


def begun_exactly(method, pool, context):
    """The start of a run in float64."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (context.mean, context.std))
    state = method.begin(method.groups(context.classes, context.ipc)[0], pool, context)
    pixels = state.pixels.double()
    if method.options.init != "noise":  # exact multiples of 1 / 255
        unit = pixels if method.space == "unit" else pixels * std + mean
        unit = (unit * 255).round() / 255
        pixels = unit if method.space == "unit" else (unit - mean) / std
    state.tensors = {"pixels": pixels, "momentum": torch.zeros_like(pixels)}
    return state


class TensorPool:
    """A `ClassPool` of tensors: `counts` images a class."""

    def __init__(self, counts, size):
        self.labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.classes = len(counts)
        draws = torch.Generator().manual_seed(3)
        self.images = torch.randint(0, 256, (len(self.labels), 3, size, size), generator=draws).byte()
        self.drawn = []

    def batches(self, order, batch_size):
        for places in order.split(batch_size):
            yield places, self.images[places], self.labels[places]

    def draw(self, label, count, generator):
        members = torch.nonzero(self.labels == label).flatten()
        chosen = members[torch.randperm(len(members), generator=generator)][:count]
        self.drawn.append((label, chosen.tolist()))
        return self.images[chosen]


def context_of(classes, *, ipc=2, size=16, seed=5, precision="float32"):
    return Context(
        teacher=None,
        image_size=size,
        factor=1,
        seed=seed,
        precision=precision,
        forward_batch=0,
        device=torch.device("cpu"),
        ipc=ipc,
        class_names=tuple(f"class {label}" for label in range(classes)),
        mean=(0.49, 0.48, 0.45),
        std=(0.20, 0.21, 0.22),
    )


def distilled(method, pool, context, *, state=None, group=0, steps=None):
    """The state of a group after some steps, from its beginning or from `state`."""
    state = state or method.begin(method.groups(context.classes, context.ipc)[group], pool, context)
    for _ in range(method.steps - state.step if steps is None else steps):
        method.step(state.step, state, pool, context)
        state.step += 1
    return state


@pytest.fixture
def pool():
    return TensorPool((9, 8, 12), 16)


@pytest.fixture
def proxies(monkeypatch):
    """Stands in for a folder of trained networks: two random ones, whatever the folder."""
    made = []
    for number in range(2):
        with seeded("proxy", number):
            made.append(create_model("convnet3_in", 3, 16, width=8))

    def load_proxies(folder, *, class_names, image_size, mean, std, arch):
        return made

    import sys
    import types

    module = types.ModuleType("ddfast.training.proxies")
    module.load_proxies = load_proxies
    monkeypatch.setitem(sys.modules, "ddfast.training.proxies", module)
    return made
