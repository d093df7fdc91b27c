"""`unrolled_gradient` against autograd through the whole training, and what it leaves alone."""

import math
import random
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import ddfast
from ddfast.gradients import unrolled
from ddfast.gradients.directional import along, differentiable_gradients
from ddfast.ops.graphs import Recorded
from ddfast.unchanged import unchanged

CLASSES, SIDE = 3, 8
ALLOWED = 1e-10


def convnet(width=4, dtype=torch.float64):
    torch.manual_seed(0)
    return ddfast.create_model("convnet3_in", CLASSES, SIDE, width=width).to(dtype)


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    layers = (
        nn.Flatten(),
        nn.Linear(3 * SIDE**2, 6),
        nn.Tanh(),
        nn.Linear(6, 5),
        nn.ReLU(),
        nn.Linear(5, CLASSES),
    )
    return nn.Sequential(*layers).to(dtype)


class Attending(nn.Module):
    """Attention over the rows of an image."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, images):
        rows = images.transpose(1, 2).flatten(2)
        return self.head(self.attention(rows, rows, rows, need_weights=False)[0].mean(dim=1))


NETWORKS = {"convnet": convnet, "mlp": mlp}


def batches_of(count, soft=False, dtype=torch.float64, size=4):
    draws = torch.Generator().manual_seed(count)
    found = []
    for _ in range(count):
        images = torch.randn(size, 3, SIDE, SIDE, generator=draws, dtype=dtype)
        if soft:
            targets = torch.randn(size, CLASSES, generator=draws, dtype=dtype).softmax(dim=1)
        else:
            targets = torch.randint(CLASSES, (size,), generator=draws)
        found.append((images, targets))
    return found


def start_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def distance_to(wanted):
    """What MTT asks of the final weights."""

    def objective(weights):
        return sum((weights[name] - w).square().sum() for name, w in wanted.items())

    return objective


def unrolled_by_autograd(model, params, batches, objective, lr, momentum=0.0, weight_decay=0.0, **how):
    """The definition: one graph of the whole training. `how`: what of the gradient is left out, and another loss."""
    loss = how.get("loss", functional.cross_entropy)
    leaves = [
        tuple(t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in batch)
        for batch in batches
    ]
    rate = torch.tensor(lr, dtype=next(iter(params.values())).dtype, requires_grad=True)
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in params.items()}
    velocity = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for number, (images, targets) in enumerate(leaves):
        if number == len(batches) - how.get("last", len(batches)):
            weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            velocity = {name: v.detach() for name, v in velocity.items()}
        at = (
            {name: w.detach().requires_grad_() for name, w in weights.items()}
            if how.get("detached")
            else weights
        )
        found = torch.autograd.grad(
            loss(functional_call(model, at, (images,)), targets), list(at.values()), create_graph=True
        )
        for (name, weight), gradient in zip(list(weights.items()), found, strict=True):
            velocity[name] = momentum * velocity[name] + gradient + weight_decay * at[name]
            weights[name] = weight - rate * velocity[name]
    value = objective(weights)
    inputs = [t for batch in leaves for t in batch if t.is_floating_point()]
    of_rate, *of_inputs = torch.autograd.grad(
        value, [rate, *inputs], allow_unused=True, materialize_grads=True
    )
    return value.detach(), of_rate, of_inputs, {name: w.detach() for name, w in weights.items()}


def apart(found, wanted):
    """Relative difference, against the larger scale of the two."""
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def assert_equal(found, wanted, allowed=ALLOWED):
    value, of_rate, of_inputs, weights = wanted
    assert apart(found.value, value) < allowed
    assert apart(found.lr, of_rate) < allowed
    returned = [t for pair in zip(found.images, found.targets, strict=True) for t in pair if t is not None]
    assert len(returned) == len(of_inputs)
    for one, other in zip(returned, of_inputs, strict=True):
        assert other.norm() > 0 or not one.any()
        assert apart(one, other) < allowed or not other.any()
    assert found.params.keys() == weights.keys()
    for name, weight in weights.items():
        assert apart(found.params[name], weight) < allowed


def both(model, batches, **settings):
    torch.manual_seed(1)
    params = start_of(model)
    objective = distance_to({name: torch.randn_like(weight) for name, weight in params.items()})
    settings = {"lr": 0.05, **settings}
    found = ddfast.unrolled_gradient(model, params, batches, objective, **settings)
    how = {"last": len(batches)}
    if (unroll := settings.pop("unroll", "exact")) == "detached":
        how["detached"] = True
    elif unroll != "exact":
        how["last"] = int(unroll.partition(":")[2])
    settings.pop("memory_budget", None)
    return found, unrolled_by_autograd(model, params, batches, objective, **settings, **how)


@pytest.mark.parametrize("steps", [1, 10, 30])
@pytest.mark.parametrize("network", NETWORKS)
def test_it_is_the_gradient_of_the_unrolled_training(network, steps):
    assert_equal(*both(NETWORKS[network](), batches_of(steps)))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.5, "weight_decay": 0.01, "unroll": "truncated:4"},
        {"unroll": "truncated:1"},
        {"unroll": "truncated:99"},
        {"unroll": "detached"},
        {"momentum": 0.9, "weight_decay": 0.1, "unroll": "detached"},
        {"momentum": 0.9, "memory_budget": 2**40},
        {"memory_budget": 150_000},
        {"momentum": 0.9, "weight_decay": 0.1, "lr": 0.0},
    ],
    ids=str,
)
def test_every_setting_of_the_training(network, settings):
    steps = 6 if "truncated:99" not in settings.values() else 3
    assert_equal(*both(NETWORKS[network](), batches_of(steps, soft=True), **settings))


def test_soft_labels_have_a_gradient_and_labels_have_none():
    found, wanted = both(convnet(), batches_of(4, soft=True), momentum=0.9)
    assert_equal(found, wanted)
    assert all(gradient.abs().max() > 0 for gradient in found.targets)
    assert both(convnet(), batches_of(4))[0].targets == [None] * 4


def test_a_batch_that_is_used_twice_has_a_gradient_for_each_use():
    model, (batch, other) = convnet(), batches_of(2)
    params = start_of(model)
    objective = distance_to({name: torch.zeros_like(weight) for name, weight in params.items()})
    found = ddfast.unrolled_gradient(model, params, [batch, other, batch], objective, lr=0.05)
    images = batch[0].clone().requires_grad_()
    weights = {name: weight.requires_grad_() for name, weight in start_of(model).items()}
    for x, y in ((images, batch[1]), other, (images, batch[1])):
        loss = functional.cross_entropy(functional_call(model, weights, (x,)), y)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {n: w - 0.05 * g for (n, w), g in zip(weights.items(), gradients, strict=True)}
    (wanted,) = torch.autograd.grad(objective(weights), images)
    assert apart(found.images[0] + found.images[2], wanted) < ALLOWED
    assert apart(found.images[0], wanted) > 0.1


def test_detached_is_not_exact():
    exact, detached = (both(convnet(), batches_of(30), unroll=kind)[0] for kind in ("exact", "detached"))
    difference = torch.stack(exact.images) - torch.stack(detached.images)
    assert difference.norm() / torch.stack(exact.images).norm() > 0.02


def test_fused_blocks_agree_with_float64():
    batches = batches_of(5, dtype=torch.float32, size=6)
    model = convnet(8, torch.float32)
    wide = convnet(8)
    wide.load_state_dict(model.state_dict())
    objective = distance_to({name: torch.full_like(w, 0.1) for name, w in start_of(model).items()})
    wanted = ddfast.unrolled_gradient(
        wide,
        start_of(wide),
        [(images.double(), targets) for images, targets in batches],
        lambda weights: sum((w - 0.1).square().sum() for w in weights.values()),
        lr=0.02,
    )
    for network in (model, ddfast.fuse(model)):
        found = ddfast.unrolled_gradient(network, start_of(model), batches, objective, lr=0.02)
        for one, other in zip(found.images, wanted.images, strict=True):
            assert one.dtype == torch.float32
            assert apart(one.double(), other) < 1e-3


class Drawing(nn.Module):
    """Dropout twice, once by numpy's global generator."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images):
        import numpy as np

        scale = 1 + float(np.random.rand())  # noqa: NPY002
        return self.body(functional.dropout(images, 0.3)) * scale


@pytest.mark.parametrize("budget", [0, 1, 30_000, 2**40])  # of five steps, none, and some, fit
def test_a_step_that_draws_is_computed_again_with_the_same_draws(budget):
    import numpy as np

    model, batches = Drawing(), batches_of(5)
    params = start_of(model)
    objective = distance_to({name: torch.zeros_like(weight) for name, weight in params.items()})

    def seed():
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002

    seed()
    found = ddfast.unrolled_gradient(model, params, batches, objective, lr=0.05, memory_budget=budget)
    after = torch.rand(1), np.random.rand()  # noqa: NPY002
    seed()
    wanted = unrolled_by_autograd(model, params, batches, objective, 0.05)
    assert after == (torch.rand(1), np.random.rand())  # noqa: NPY002
    assert_equal(found, wanted)


def test_parameters_that_are_left_out_stay():
    model, batches = mlp(), batches_of(3)
    params = {name: weight for name, weight in start_of(model).items() if not name.startswith("1.")}
    objective = distance_to({name: torch.zeros_like(weight) for name, weight in params.items()})
    found = ddfast.unrolled_gradient(model, params, batches, objective, lr=0.1)
    assert_equal(found, unrolled_by_autograd(model, params, batches, objective, 0.1))


def test_another_loss_and_integer_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2)).double()
    draws = torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(7, (5, 3), generator=draws), torch.randn(5, 2, generator=draws, dtype=torch.float64))
        for _ in range(4)
    ]
    found, wanted = both(model, batches, loss=functional.mse_loss)
    assert found.images == [None] * 4
    assert_equal(found, wanted)


def test_attention_is_differentiated_twice():
    torch.manual_seed(0)
    model = Attending().double()
    found = both_in_plain_attention(model, batches_of(3))
    assert_equal(*found)


def both_in_plain_attention(model, batches):
    """`both`, whose definition could not go through a fused attention either."""
    with sdpa_kernel(SDPBackend.MATH):
        wanted = both(model, batches, momentum=0.5)[1]
    torch.manual_seed(1)
    params = start_of(model)
    objective = distance_to({name: torch.randn_like(weight) for name, weight in params.items()})
    return ddfast.unrolled_gradient(model, params, batches, objective, lr=0.05, momentum=0.5), wanted


def test_an_objective_of_few_weights_or_of_none():
    model, batches = mlp(), batches_of(3)
    params = start_of(model)

    def of_one(weights):
        return weights["1.weight"].square().sum()

    found = ddfast.unrolled_gradient(model, params, batches, of_one, lr=0.1)
    assert_equal(found, unrolled_by_autograd(model, params, batches, of_one, 0.1))
    found = ddfast.unrolled_gradient(model, params, batches, lambda weights: torch.ones(()), lr=0.1)
    assert found.value == 1
    assert not any(gradient.any() for gradient in (*found.images, found.lr))
    found = ddfast.unrolled_gradient(model, params, [], of_one, lr=0.1)
    assert (found.images, found.targets, found.lr.item()) == ([], [], 0.0)
    assert torch.equal(found.params["1.weight"], params["1.weight"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_around_a_call(mode):
    wanted = both(convnet(), batches_of(3))[0]
    with mode():
        model = convnet()
        torch.manual_seed(1)
        params = start_of(model)
        ends = {name: torch.randn_like(weight) for name, weight in params.items()}
        if mode is torch.inference_mode:
            ends = {name: end.clone() for name, end in ends.items()}
        found = ddfast.unrolled_gradient(
            model,
            params,
            batches_of(3),
            lambda weights: sum(
                (weights[n] - torch.as_tensor(e.numpy())).square().sum() for n, e in ends.items()
            ),
            lr=0.05,
        )
    for one, other in zip(found.images, wanted.images, strict=True):
        assert not one.requires_grad
        assert apart(one, other) < ALLOWED


def test_what_is_handed_in_comes_back_as_it_was():
    model = ddfast.fuse(convnet())
    params = dict(model.named_parameters())
    for weight in params.values():
        weight.grad = torch.ones_like(weight)
    leaf = torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    batches = [(leaf * 2, torch.randint(CLASSES, (4,)))] * 3
    rate = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    kept = [t.detach().clone() for t in (*params.values(), leaf, batches[0][0], rate)]
    versions = [t._version for t in (*params.values(), leaf, batches[0][0], rate)]
    model.train()
    model.get_parameter(next(iter(params))).requires_grad_(False)
    flags = [weight.requires_grad for weight in params.values()]
    found = ddfast.unrolled_gradient(
        model, params, batches, lambda w: sum(t.square().sum() for t in w.values()), lr=rate, momentum=0.9
    )
    now = (*params.values(), leaf, batches[0][0], rate)
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    assert [t._version for t in now] == versions
    assert [weight.requires_grad for weight in params.values()] == flags
    assert all(torch.equal(weight.grad, torch.ones_like(weight)) for weight in params.values())
    assert model.training
    assert leaf.grad is None
    assert rate.grad is None
    assert found.lr.shape == (1,)
    assert all(found.params[name] is not weight for name, weight in params.items())
    torch.autograd.backward([b[0] for b in batches], found.images)  # the pixels behind the batches
    assert leaf.grad.abs().max() > 0


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors that are alive at once, of those that are made inside."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self._now = {}, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage):
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = weakref.finalize(storage, self._drop, key, storage.nbytes())
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)

    def _drop(self, key, size):
        del self.alive[key]
        self._now -= size


def test_memory_does_not_grow_with_the_steps():
    model = convnet(4, torch.float32)
    params = start_of(model)
    objective = distance_to({name: torch.zeros_like(weight) for name, weight in params.items()})
    one = batches_of(1, dtype=torch.float32, size=48)

    def peak(steps, **how):
        with PeakBytes() as bytes_:
            ddfast.unrolled_gradient(model, params, one * steps, objective, lr=0.01, **how)
        # What is returned is not working memory: a gradient for each batch.
        return bytes_.peak - steps * one[0][0].nbytes

    def unrolled(steps):
        with PeakBytes() as bytes_:
            unrolled_by_autograd(model, params, one * steps, objective, 0.01)
        return bytes_.peak

    assert peak(50) <= 1.3 * peak(5)
    assert unrolled(5) > 2 * peak(50)
    assert peak(5, memory_budget=2**40) > 2 * peak(5)  # what the budget is for
    assert peak(5, memory_budget=1) < 1.3 * peak(5)  # a step that did not fit is gone


def test_batchnorm_in_train_mode_is_refused_and_in_eval_mode_served():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES)
    ).double()
    arguments = (start_of(model), batches_of(2), lambda w: w["0.weight"].square().sum())
    with pytest.raises(
        ValueError, match="BatchNorm2d in train mode: its running statistics change"
    ) as refused:
        ddfast.unrolled_gradient(model, *arguments, lr=0.1)
    assert "\n" not in str(refused.value)
    assert not model[1].running_mean.any()
    model.eval()
    found = ddfast.unrolled_gradient(model, *arguments, lr=0.1)
    assert_equal(found, unrolled_by_autograd(model, *arguments, 0.1))
    # Without running statistics a batch alone decides, and train mode is as good.
    model[1] = nn.BatchNorm2d(4, track_running_stats=False).double()
    model.train()
    arguments = (start_of(model), *arguments[1:])
    found = ddfast.unrolled_gradient(model, *arguments, lr=0.1)
    assert_equal(found, unrolled_by_autograd(model, *arguments, 0.1))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        return self.body(images) * self.calls


def test_a_module_that_changes_its_own_buffer_is_refused():
    model = Counting()
    with pytest.raises(ValueError, match="changes its buffer calls in every pass"):
        ddfast.unrolled_gradient(
            model, start_of(model), batches_of(2), lambda w: w["body.1.weight"].sum(), lr=0.1
        )
    assert model.calls == 0


MODEL = mlp()
GOOD = {
    "model": MODEL,
    "params": start_of(MODEL),
    "batches": batches_of(2),
    "objective": lambda weights: weights["1.weight"].sum(),
    "lr": 0.1,
}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"params": {"weight": torch.zeros(1)}}, "has no parameter of that name"),
        ({"params": {}}, "params is empty"),
        ({"params": {"1.weight": torch.zeros(2, 2)}}, r"must be \[6, 192\] as in the model, got \[2, 2\]"),
        ({"params": {"1.weight": 3}}, "must be a floating-point tensor, got int"),
        ({"lr": "fast"}, "lr must be a finite number"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"lr": torch.zeros(2)}, "a floating-point tensor of one element"),
        ({"momentum": -0.1}, "momentum must be a number of at least 0"),
        ({"weight_decay": "much"}, "weight_decay must be a number of at least 0"),
        ({"unroll": "truncated"}, "exact, truncated:K with K of at least 1, or detached, got 'truncated'"),
        ({"unroll": "truncated:0"}, "exact, truncated:K"),
        ({"unroll": "all"}, "exact, truncated:K"),
        ({"memory_budget": "much"}, "memory_budget must be a number of bytes"),
        ({"batches": [torch.zeros(2, 3)]}, r"batches\[0\] must be a pair of tensors"),
        ({"batches": [(torch.zeros(2, 3, 8, 8), torch.zeros(3).long())]}, "2 images and 3 targets"),
        ({"objective": lambda weights: weights["1.weight"]}, "objective must return a scalar tensor"),
        ({"objective": lambda weights: 3.0}, "objective must return a scalar tensor, got float"),
        ({"loss": lambda outputs, targets: outputs.sum(dim=1)}, r"must be a scalar, got torch.float64 \[4\]"),
        ({"model": lambda images: images}, "model must be a torch module, got function"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else None,
)
def test_bad_arguments_get_one_line(wrong, said):
    with pytest.raises((ValueError, TypeError), match=said) as refused:
        ddfast.unrolled_gradient(**{**GOOD, **wrong})
    assert "\n" not in str(refused.value)


def test_a_directional_derivative_is_the_gradient_of_a_distance_of_gradients():
    """What gradient matching asks: D(g(images)) in the images, with v = dD/dg."""
    model, ((images, labels), (real, classes)) = convnet(), batches_of(2)
    weights = [weight.detach().requires_grad_() for weight in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def gradients(x, y):
        named = dict(zip(names, weights, strict=True))
        return differentiable_gradients(
            functional.cross_entropy(functional_call(model, named, (x,)), y), weights
        )

    def distance(found, wanted):
        return sum(
            1 - functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
            for a, b in zip(found, wanted, strict=True)
            if a.ndim > 1
        )

    wanted = [gradient.detach() for gradient in gradients(real, classes)]
    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(distance(gradients(leaf, labels), wanted), leaf)
    found = gradients(leaf, labels)
    free = [gradient.detach().requires_grad_() for gradient in found]
    direction = torch.autograd.grad(distance(free, wanted), free, allow_unused=True, materialize_grads=True)
    assert apart(along(found, direction, [leaf])[0], expected) < ALLOWED


# Recorded steps -----------------------------------------------------------------------------------------------


def test_steps_are_recorded_for_a_model_that_is_held_unchanged_and_hands_in_all_its_tensors():
    def recorded(model):
        names = tuple(name for name, _ in model.named_parameters())
        training = unrolled._training_of(model, names, functional.cross_entropy)
        return isinstance(training.recorded_forth, Recorded), training

    plain, with_buffers = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    assert not recorded(plain)[0]
    with unchanged(plain, with_buffers):
        first = recorded(plain)
        assert first[0]
        assert recorded(plain)[1] is first[1]
        assert not recorded(with_buffers)[0]
        assert not isinstance(
            unrolled._training_of(plain, ("weight",), functional.cross_entropy).recorded_back, Recorded
        )


def test_what_draws_on_the_host_is_not_recorded(monkeypatch):
    class Dropping(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 + random.random())

    torch.manual_seed(0)
    model, forth = Dropping(3, 2), []
    batches = [(torch.randn(2, 3), torch.tensor([0, 1])) for _ in range(4)]
    weights = {name: each.detach() for name, each in model.named_parameters()}
    with unchanged(model):
        training = unrolled._training_of(model, tuple(weights), functional.cross_entropy)
        monkeypatch.setattr(training, "recorded_forth", lambda *a: forth.append(1) or training.forth(*a))
        for _ in range(2):
            unrolled.unrolled_gradient(model, weights, batches, lambda w: w["weight"].sum(), 0.1)
        assert unrolled._training_of(model, tuple(weights), functional.cross_entropy) is training
    assert len(forth) == 1  # the first step drew
    assert not isinstance(training.recorded_back, Recorded)


def test_infinite_memory_keeps_everything_and_nan_in_a_buffer_is_no_change():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    model.register_buffer("unused", torch.tensor([math.nan]))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    batches = [(torch.randn(5, 4).double(), torch.randint(0, 3, (5,))) for _ in range(3)]

    def objective(final):
        return final["weight"].square().sum()

    found = [
        ddfast.unrolled_gradient(model, weights, batches, objective, 0.1, memory_budget=budget)
        for budget in (0, math.inf)
    ]
    assert all(torch.equal(one, other) for one, other in zip(found[0].images, found[1].images, strict=True))
    with pytest.raises(ValueError, match="memory_budget must be a number of bytes"):
        ddfast.unrolled_gradient(model, weights, batches, objective, 0.1, memory_budget=math.nan)
