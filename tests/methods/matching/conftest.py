"""A pool of random images in memory, and the context of a run on it."""

import pytest
import torch

from ddfast.methods.base import Context
from ddfast.models import create_model
from ddfast.seeding import seeded


class TensorPool:
    """A `ClassPool` of tensors: `counts` images a class."""

    def __init__(self, counts, size):
        self.labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.classes = len(counts)
        draws = torch.Generator().manual_seed(3)
        self.images = torch.randint(0, 256, (len(self.labels), 3, size, size), generator=draws).byte()
        self.drawn = []

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
