"""Models of every kind come out with the right norms, and as they went in."""

import random
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from ddfast import grad_norm

METHODS = ("auto", "vmap", "loop")  # auto begins with ghost


def definition(make, images, labels):
    """Norms by autograd, one image at a time, each on a model that no other image has seen."""
    norms = []
    for i in range(len(images)):
        one = make()
        parameters = [p.requires_grad_() for p in one.parameters()]
        loss = functional.cross_entropy(one(images[i : i + 1].clone()), labels[i : i + 1])
        squares = torch.zeros((), dtype=torch.float64)
        for gradient in torch.autograd.grad(loss, parameters, allow_unused=True):
            if gradient is not None:
                squares += gradient.to_dense().double().square().sum()
        norms.append(squares.sqrt())
    return torch.stack(norms)


def state(value, depth=0):
    """All of a model that can be told from outside: what is where, which one it is and what it holds."""
    if isinstance(value, torch.Tensor):
        values = value.detach().clone()
        hooks = list((value._backward_hooks or {}).values())
        place = (value.data_ptr(), value.stride(), value.dtype, value.requires_grad, value._version)
        return (
            id(value),
            type(value),
            place,
            values.flatten().tolist(),
            id(value.grad),
            hooks,
            list(vars(value)),
        )
    if isinstance(value, nn.Module):
        if isinstance(value, torch.jit.ScriptModule):  # its attributes are made when they are asked for
            return id(value), [(n, state(t)) for n, t in value.state_dict(keep_vars=True).items()]
        inside = state(vars(value), depth + 1) if depth < 20 else None
        return id(value), type(value), inside
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, types.SimpleNamespace):
        return id(value), state(vars(value), depth + 1)
    if isinstance(value, dict):
        return [(k, state(v, depth + 1)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [state(v, depth + 1) for v in value]
    return value if isinstance(value, int | float | str | bool | None) else id(value)


def surroundings():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002 - the stream that a caller may use
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


class Head(nn.Module):
    """Something on images [B, 3, 6, 6], or rows of them, then a linear layer."""

    def __init__(self, *layers, features=8, classes=4):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(features, classes)

    def body(self, x):
        return self.layers(x)

    def forward(self, x):
        x = self.body(x)
        return self.head(x.flatten(2).mean(2) if x.ndim > 2 else x)


def conv(*arguments, **keywords):
    return nn.Conv2d(3, 8, 3, *arguments, **keywords)


class TwoNames(Head):
    def __init__(self):
        shared = conv()
        super().__init__(shared, nn.ReLU())
        self.again = shared
        self.once_more = nn.ModuleList([shared])


class TiedAcross(Head):
    def __init__(self):
        super().__init__(conv(), nn.Tanh(), nn.Conv2d(8, 8, 1), nn.Tanh(), nn.Conv2d(8, 8, 1))
        self.layers[4].weight = self.layers[2].weight
        self.layers[4].bias = self.layers[2].bias


class InAList(Head):
    """A weight that is used from a plain list and by a closure."""

    def __init__(self):
        super().__init__(conv())
        self.kept = [self.layers[0].weight]
        weight = self.layers[0].weight
        self.scaled = lambda x: x * weight.square().sum()

    def body(self, x):
        return self.scaled(functional.conv2d(x, self.kept[0]).tanh()) + self.layers(x)


class Counting(Head):
    """Keeps count in every way there is."""

    def __init__(self):
        super().__init__(conv(), nn.ReLU())
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.plain, self.sums = torch.zeros(8), torch.zeros(8)
        self.log, self.sizes, self.names = [], {}, {"a"}
        self.settings = types.SimpleNamespace(passes=0, nested=[torch.zeros(2)])
        self.generator = torch.Generator()

    def body(self, x):
        x = super().body(x)
        self.calls += 1
        self.seen += len(x)
        self.mean.mul_(0.5).add_(x.detach().mean((0, 2, 3)) * 0.5)
        self.plain = self.plain + 1
        self.sums.add_(x.detach().mean((0, 2, 3)))
        self.log.append(x)
        self.sizes[len(self.log)] = x.shape
        self.names.add(len(self.log))
        self.settings.passes += 1
        self.settings.nested[0].add_(1)
        self.last = x
        torch.rand(1), torch.rand(1, generator=self.generator), random.random(), np.random.rand()  # noqa: NPY002
        return x + self.calls + self.plain[0]


class Views(Head):
    """A buffer that is a part of another's memory."""

    def __init__(self):
        super().__init__(conv())
        whole = torch.zeros(2, 8, 1, 1)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[1])

    def body(self, x):
        self.whole.add_(1)
        return self.layers(x) * self.part


class Clamped(Head):
    """Works on its weights themselves."""

    def __init__(self, how):
        super().__init__(conv(), nn.ReLU())
        self.how = how

    def body(self, x):
        weight = self.layers[0].weight
        if self.how == "data":
            weight.data.clamp_(-0.1, 0.1)
        else:
            with torch.no_grad():
                weight.clamp_(-0.1, 0.1)
        return super().body(x)


class Rows(nn.Module):
    """A recurrent layer, or a cell, over the rows of an image."""

    def __init__(self, kind, **keywords):
        super().__init__()
        self.cell = kind(18, 8, **keywords)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        rows = x.permute(2, 0, 1, 3).flatten(2)  # [H, B, 3 W]
        if isinstance(self.cell, nn.RNNBase):
            if self.cell.batch_first:
                rows = rows.transpose(0, 1)
            out = self.cell(rows)[0]
            return self.head(out[:, -1] if self.cell.batch_first else out[-1])
        hidden = None
        for row in rows:
            hidden = self.cell(row, hidden)
        return self.head(hidden[0] if isinstance(hidden, tuple) else hidden)


class Words(nn.Module):
    def __init__(self, **keywords):
        super().__init__()
        self.table = nn.Embedding(9, 8, **keywords)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.table(x).mean(1).tanh())


class Bag(Words):
    def __init__(self, **keywords):
        super().__init__()
        self.table = nn.EmbeddingBag(9, 8, **keywords)

    def forward(self, x):
        return self.head(self.table(x).tanh())


class Checkpointed(Head):
    def __init__(self, reentrant, everywhere=True):
        super().__init__(conv(), nn.Tanh(), nn.Conv2d(8, 8, 3))
        self.reentrant, self.everywhere = reentrant, everywhere

    def body(self, x):
        if self.everywhere:
            return checkpoint(self.layers, x, use_reentrant=self.reentrant)
        x = self.layers[:2](x)
        return checkpoint(self.layers[2], x, use_reentrant=self.reentrant)


class Branching(Head):
    """Takes one way or another by what it sees."""

    def body(self, x):
        x = self.layers(x)
        return x.sin() if x.mean().item() > 0 else x * 3


class BranchingOnAll(Head):
    def body(self, x):
        x = self.layers(x)
        return x.sin() if bool((x.sum((1, 2, 3)) > 0).all()) else x * 3


class Square(torch.autograd.Function):
    """Without setup_context, so torch.func refuses it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.square() * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return 2 * x * weight * grad, (grad * x.square()).sum((0, 2, 3), keepdim=True)[0]


class Custom(Head):
    def __init__(self):
        super().__init__(conv())
        self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def body(self, x):
        return Square.apply(self.layers(x), self.scale)


class Patched(Head):
    """Writes into a tensor of its own making, which vmap refuses."""

    def body(self, x):
        out = torch.zeros(len(x), 8, 4, 4)
        out[:] = self.layers(x)
        out[:, :, 0] *= 2
        return out


class Mixing(Head):
    """Every image sees the others, or would."""

    def __init__(self, how):
        super().__init__(conv(), nn.Tanh())
        self.how = how
        self.weight = nn.Parameter(torch.rand(8))

    def body(self, x):
        x = self.layers(x)
        if self.how == "mean":
            return x - x.mean(0) + x.square()
        if self.how == "statistics":
            return functional.batch_norm(x, None, None, self.weight, training=True)
        if self.how == "many":
            return x * x.mean(0) if len(x) > 3 else x
        return x.sort(0).values


class Forgiving(Head):
    """Tries one way and, where that raises, takes another."""

    def __init__(self):
        super().__init__(conv())
        self.gain = nn.Parameter(torch.rand(8, 1, 1))

    def body(self, x):
        x = self.layers(x)
        try:
            return x * self.gain
        except Exception:
            return x


class Renormalised(Head):
    def __init__(self):
        super().__init__(conv(), nn.ReLU())
        self.layers[0].weight.register_hook(lambda gradient: gradient * 0)


class Channels(Head):
    """Normalises channels-last maps of one image at a time."""

    def __init__(self, **keywords):
        layers = conv(), nn.InstanceNorm2d(8, **keywords), nn.ELU(inplace=True), nn.Conv2d(8, 8, 3)
        super().__init__(*layers)
        self.to(memory_format=torch.channels_last)


class Frozen(Head):
    def __init__(self):
        super().__init__(conv(), nn.ReLU())
        self.layers.requires_grad_(False)


class Partly(Head):
    """Its body takes no gradient."""

    def body(self, x):
        with torch.no_grad():
            return self.layers(x)


def traced():
    return torch.jit.trace(Head(conv(), nn.ReLU()).eval(), torch.rand(2, 3, 6, 6))


def with_traced_part():
    part = torch.jit.trace(nn.Sequential(conv(), nn.ReLU()), torch.rand(2, 3, 6, 6))
    return Head(part, nn.Tanh())


def with_graph():
    """Its parameters have been used, and that graph waits for its backward pass."""
    model = Head(conv(), nn.ReLU())
    model.kept = model(torch.rand(2, 3, 6, 6)).sum()
    return model


def half_inferred():
    with torch.inference_mode():
        return Head(conv(), nn.BatchNorm2d(8), nn.ReLU())


MODELS = {
    "plain": lambda: Head(conv(), nn.BatchNorm2d(8), nn.ReLU()),
    "two names": TwoNames,
    "tied": TiedAcross,
    "in a list": InAList,
    "counting": Counting,
    "views": Views,
    "data clamped": lambda: Clamped("data"),
    "clamped": lambda: Clamped("in place"),
    "parametrized weight norm": lambda: Head(parametrizations.weight_norm(conv()), nn.ReLU()),
    "parametrized spectral norm": lambda: Head(parametrizations.spectral_norm(conv()), nn.ReLU()),
    "orthogonal": lambda: Head(conv(), parametrizations.orthogonal(nn.Conv2d(8, 8, 1))),
    "hooked weight norm": lambda: Head(weight_norm(conv()), nn.ReLU()),
    "hooked spectral norm": lambda: Head(spectral_norm(conv()), nn.ReLU()),
    "works on its images": lambda: Head(nn.ReLU(inplace=True), conv(), nn.Hardtanh(inplace=True)),
    "gru": lambda: Rows(nn.GRU),
    "deep lstm": lambda: Rows(nn.LSTM, num_layers=2, batch_first=True),
    "lstm": lambda: Rows(nn.LSTM),
    "rnn": lambda: Rows(nn.RNN),
    "lstm cell": lambda: Rows(nn.LSTMCell),
    "gru cell": lambda: Rows(nn.GRUCell),
    "rnn cell": lambda: Rows(nn.RNNCell),
    "non-reentrant checkpoint": lambda: Checkpointed(False),
    "branching": lambda: Branching(conv()),
    "branching on all": lambda: BranchingOnAll(conv()),
    "custom function": Custom,
    "patched": lambda: Patched(conv()),
    "mean of the batch": lambda: Mixing("mean"),
    "statistics of the batch": lambda: Mixing("statistics"),
    "mixing when many": lambda: Mixing("many"),
    "sorted batch": lambda: Mixing("sort"),
    "forgiving": Forgiving,
    "channels-last instance norm": Channels,
    "channels-last affine instance norm": lambda: Channels(affine=True),
    "frozen": Frozen,
    "partly": lambda: Partly(conv()),
    "transposed": lambda: Head(nn.ConvTranspose2d(3, 8, 3, stride=2)),
    "volume": lambda: Head(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 8, (3, 2, 2))),
    "prelu": lambda: Head(conv(), nn.PReLU(8)),
    "dataparallel": lambda: nn.DataParallel(Head(conv(), nn.ReLU())),
    "dataparallel inside": lambda: Head(nn.DataParallel(conv()), nn.ReLU()),
    "traced": traced,
    "traced part": with_traced_part,
    "with a graph": with_graph,
    "compiled": lambda: torch.compile(Head(conv(), nn.ReLU()), backend="eager"),
    "compiled part": lambda: Head(torch.compile(conv(), backend="eager"), nn.ReLU()),
}
WORDS = {
    "words": Words,
    "padded words": lambda: Words(padding_idx=2),
    "sparse words": lambda: Words(sparse=True),
    "rescaled words": lambda: Words(max_norm=0.5),
    "frequent words": lambda: Words(scale_grad_by_freq=True),
    "sparse rescaled words": lambda: Words(max_norm=0.5, sparse=True),
    "bag of words": Bag,
    "sparse bag of words": lambda: Bag(sparse=True, mode="sum"),
}


def built(name):
    torch.manual_seed(0)
    model = {**MODELS, **WORDS}[name]().eval()
    inputs = torch.randint(0, 9, (5, 6)) if name in WORDS else torch.randn(5, 3, 6, 6)
    return model, inputs, torch.tensor([0, 1, 2, 3, 1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*MODELS, *WORDS])
def test_norms_are_right_and_nothing_has_changed(name, method):
    model, inputs, labels = built(name)
    expected = definition(lambda: built(name)[0], inputs, labels)
    before, images, around = state(model), inputs.clone(), surroundings()
    for chunk_size in (None, 2):
        norms = grad_norm(model, inputs, labels, method, chunk_size=chunk_size)
        torch.testing.assert_close(norms.double(), expected, rtol=1e-4, atol=1e-7)
    assert norms.dtype == torch.float32
    assert state(model) == before
    assert torch.equal(inputs, images)
    assert surroundings() == around
