"""What a call owes its caller: their things as they were, the model's own numbers, or one line that says why not."""

import random
import threading
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddfast
from ddfast.attribution import (
    CropRule,
    grad_cam,
    list_estimators,
    locality_of,
    settled_shapley,
    shapley,
    shapley_crops,
)
from ddfast.masked_forward import forward

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2])
CELLS = torch.arange(4).view(1, 1, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)


class Written(nn.Module):
    """A network whose forward is the function it is given, with attributes besides."""

    def __init__(self, function, **attributes):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
            )
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)
        self.eval()

    def forward(self, x):
        return self.function(self, x)


def phi(model, images=IMAGES, labels=LABELS, **options):
    return shapley(model, images, labels, grid=2, estimator="exact", **options)


def one_by_one(model, images=IMAGES):
    """phi of a model that is never traced, never batched and never lets go of what it is given."""
    return phi(lambda x: torch.cat([model(each[None].clone()) for each in x]), images)


def agrees(model, images=IMAGES):
    torch.testing.assert_close(phi(model, images), one_by_one(model, images), rtol=1e-4, atol=1e-6)


# --- what the caller handed in


def subtracts(m, x):
    return m.net(x.sub_(0.5).div_(2))


def rectifies(m, x):
    return m.net(F.relu(x, inplace=True))


def adds(m, x):
    x += 1
    return m.net(x)


def writes_a_view(m, x):
    x[:, 0].add_(1.0)
    return m.net(x)


def assigns(m, x):
    x[:, 0] = 0
    return m.net(x)


def writes_past_autograd(m, x):
    x.data.mul_(2)
    return m.net(x)


IN_PLACE = [subtracts, rectifies, adds, writes_a_view, assigns, writes_past_autograd]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("function", IN_PLACE)
def test_a_model_that_writes_to_its_input_changes_nothing_of_the_callers(function, layout):
    model = Written(function)
    images = IMAGES.clone().contiguous(memory_format=layout)
    baselines = [torch.full((3, 16, 16), 0.3), torch.full((3, 3, 16, 16), 0.3)]
    torch.testing.assert_close(phi(model, images), one_by_one(model), rtol=1e-4, atol=1e-6)
    for baseline in baselines:
        phi(model, images, baseline=baseline)
    settled_shapley(model, images, LABELS, grid=2, n_samples=16)
    grad_cam(model, images, LABELS, grid=2)
    locality_of(model, 16)
    assert torch.equal(images, IMAGES)
    assert images.stride() == IMAGES.contiguous(memory_format=layout).stride()
    assert all(bool((baseline == 0.3).all()) for baseline in baselines)


def test_a_model_that_returns_its_own_memory_is_served():
    def kept(m, x):
        scores = m.net(x)
        memory = m.memory.setdefault(len(x), torch.empty_like(scores))
        return memory.copy_(scores)

    torch.testing.assert_close(phi(Written(kept, memory={})), phi(Written(lambda m, x: m.net(x))))


@pytest.mark.parametrize("explainer", ["KernelShap", "ShapleyValueSampling", "ShapleyValues"])
@pytest.mark.parametrize("per_batch", [False, True])
def test_captums_explainers_give_the_forward_function_its_own_tensors(explainer, per_batch):
    model, explainer = Written(subtracts), getattr(ddfast.captum, explainer)
    options = {} if explainer is ddfast.captum.ShapleyValues else {"n_samples": 12}

    def attribute(function, *tensors):
        images, baseline, extra = tensors
        torch.manual_seed(0)
        target = None if per_batch else LABELS
        return explainer(function).attribute(
            images,
            baseline,
            target=target,
            additional_forward_args=(extra,),
            feature_mask=CELLS,
            **options,
        )

    def writes(x, extra):
        scores = model(x) + extra.add_(1)
        return scores.sum() if per_batch else scores

    given = IMAGES.clone(), torch.full_like(IMAGES, 0.3), torch.zeros(3, 3)
    found = attribute(writes, *given)
    assert torch.equal(given[0], IMAGES)
    assert bool((given[1] == 0.3).all())
    assert not given[2].any()
    wanted = attribute(lambda x, extra: writes(x.clone(), extra.clone()), *(t.clone() for t in given))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_captums_own_method_is_given_copies_too():
    class Overridden(ddfast.captum.KernelShap):
        def kernel_shap_similarity_kernel(self, *arguments, **options):
            return super().kernel_shap_similarity_kernel(*arguments, **options)

    images, baseline = IMAGES.clone(), torch.zeros_like(IMAGES)
    explainer = Overridden(Written(subtracts))
    own = explainer.forward_func
    explainer.attribute(images, baseline, target=LABELS, feature_mask=CELLS, n_samples=6)
    assert explainer.forward_func is own
    assert torch.equal(images, IMAGES)
    assert not baseline.any()


def draws_for_nothing(m, x):
    torch.rand(3), np.random.uniform(), random.random()  # noqa: NPY002
    return m.net(x)


def test_states_flags_and_weights_are_left_as_they_were():
    model, images = Written(draws_for_nothing), IMAGES.clone().requires_grad_()
    model.net[0].weight.requires_grad_(False)
    before = [(p.requires_grad, p._version, p.stride()) for p in model.parameters()]
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    phi(model, images)
    settled_shapley(model, images, LABELS, grid=2, n_samples=16)
    grad_cam(model, images, LABELS)
    locality_of(model, 16)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
        phi(model, images, torch.tensor([0, 1, 9]))
    with pytest.raises(ValueError, match="draws random numbers"):
        phi(Written(lambda m, x: m.net(F.dropout(x))), images)
    assert torch.equal(numbers[0], torch.get_rng_state())
    assert numbers[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert before == [(p.requires_grad, p._version, p.stride()) for p in model.parameters()]
    assert images.requires_grad
    assert images.grad is None
    assert torch.is_grad_enabled()


def test_locality_of_leaves_running_statistics_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 196, 3))
    before = model[1].running_mean.clone()
    with pytest.raises(ValueError, match=r"in training mode: call model\.eval"):
        locality_of(model, 16)
    assert torch.equal(model[1].running_mean, before)


# --- what a trace was made from

SETTINGS = {"factor": 1.0}


def with_default(m, x, factor=[1.0]):  # noqa: B006 - the setting under test
    return m.net(x) * factor[0]


class WithFactor(Written):
    factor = 1.0


class Scale:
    def __call__(self, x):
        return x * 1.0

    go = __call__


def negate(model):
    model.forward = lambda x: -type(model).forward(model, x)


CHANGES = {
    "list": (lambda m, x: m.net(x) * m.own[0], lambda m: m.own.__setitem__(0, 3.0), [1.0]),
    "dict in a dict": (
        lambda m, x: m.net(x.clamp(max=m.own["a"]["b"])),
        lambda m: m.own["a"].update(b=0.5),
        {"a": {"b": 99.0}},
    ),
    "a bound that no image reaches": (
        lambda m, x: m.net(x.clamp(max=m.own[0])),
        lambda m: m.own.__setitem__(0, 0.5),
        [99.0],
    ),
    "namespace": (
        lambda m, x: m.net(x) / m.own.t,
        lambda m: setattr(m.own, "t", 4.0),
        types.SimpleNamespace(t=1.0),
    ),
    "plain tensor": (lambda m, x: m.net(x * m.own), lambda m: m.own.fill_(2.0), torch.ones(3, 1, 1)),
    "array": (lambda m, x: m.net(x) * float(m.own[0]), lambda m: m.own.fill(2.0), np.ones(1)),
    "index buffer": (
        lambda m, x: m.net(x[:, :, m.own]),
        lambda m: m.own.copy_(torch.tensor([0, 1, 2, 3] * 4)),
        nn.Buffer(torch.arange(16)),
    ),
    "mask": (
        lambda m, x: m.net(x * m.own),
        lambda m: m.own[:, :8].fill_(False),
        nn.Buffer(torch.ones(16, 16, dtype=torch.bool)),
    ),
    "method": (lambda m, x: m.own.go(m.net(x)), lambda m: setattr(m.own, "go", lambda x: 3 * x), Scale()),
    "function": (
        lambda m, x: m.net(m.own["pre"](x)),
        lambda m: m.own.update(pre=torch.abs),
        {"pre": torch.relu},
    ),
    "global": (lambda m, x: m.net(x) * SETTINGS["factor"], lambda m: SETTINGS.update(factor=5.0), None),
    "default": (with_default, lambda m: with_default.__defaults__[0].__setitem__(0, 2.0), None),
    "class attribute": (
        lambda m, x: m.net(x) * type(m).factor,
        lambda m: setattr(WithFactor, "factor", 4.0),
        None,
    ),
    "forward": (lambda m, x: m.net(x), negate, None),
    "weights past their versions": (
        lambda m, x: m.net(x),
        lambda m: m.net[0].weight.data.copy_(m.net[0].weight.data.flip(0)),
        None,
    ),
    "hook": (
        lambda m, x: m.net(x),
        lambda m: m.net[0].register_forward_hook(lambda mod, given, out: 2 * out),
        None,
    ),
    "layer": (
        lambda m, x: m.net(x),
        lambda m: m.net.__setitem__(1, nn.ELU().eval()),
        None,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_trace_does_not_outlive_what_it_was_made_from(change):
    function, apply, own = CHANGES[change]
    model = WithFactor(function, own=own)
    before = phi(model)
    apply(model)
    agrees(model)
    assert float((phi(model) - before).abs().max()) > 1e-4 * float(before.abs().max())


def test_a_hook_of_all_modules_is_heard():
    model = Written(lambda m, x: m.net(x))
    before = phi(model)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, given, out: 2 * out if isinstance(module, nn.Linear) else None
    )
    try:
        torch.testing.assert_close(phi(model), 2 * before)
    finally:
        hook.remove()


def test_an_unchanged_model_is_prepared_once():
    model = Written(lambda m, x: m.net(x) * m.own[0], own=[1.0])
    phi(model)
    (made,) = forward._PREPARED[model].forwards.values()
    phi(model)
    phi(model, IMAGES.flip(0))
    assert list(forward._PREPARED[model].forwards.values()) == [made]
    assert made.traced


# --- branches that depend on the tracer


def swallowed(m, x):
    try:
        if x.max() > 3:
            x = x * 0.1
    except Exception:
        pass
    return m.net(x)


BRANCHES = {
    "isinstance": lambda m, x: m.net(x.clamp(-2.5, 2.5) if isinstance(x, torch.Tensor) else x),
    "is_tensor": lambda m, x: m.net(x.clamp(-2.5, 2.5) if torch.is_tensor(x) else x),
    "type": lambda m, x: m.net(x.clamp(-2.5, 2.5) if type(x) is torch.Tensor else x),
    "hasattr": lambda m, x: m.net(x if hasattr(x, "mask") else x.clamp(-2.5, 2.5)),
    "getattr": lambda m, x: m.net(x) * (1.0 if isinstance(getattr(x, "scale", 1.0), float) else 2.0),
    "callable": lambda m, x: m.net(x if callable(x) else x.clamp(-2.5, 2.5)),
    "shape": lambda m, x: m.net(x.clamp(-2.5, 2.5) if isinstance(x.shape[-1], int) else x),
    "a number alone": lambda m, x: m.net(x.clamp(max=2.5 if isinstance(x, torch.Tensor) else 99.0)),
    "compiling": lambda m, x: m.net(x if torch.compiler.is_compiling() else x.clamp(-2.5, 2.5)),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_branch_is_the_one_that_tensors_take(branch):
    """Only one image has values that the branch makes a difference for, and it is not the first."""
    images = IMAGES / 4
    images[1] *= 20
    agrees(Written(BRANCHES[branch]), images)


def test_a_refusal_that_the_forward_swallows_is_seen():
    model = Written(swallowed)
    phi(model, IMAGES / 4)
    (made,) = forward._PREPARED[model].forwards.values()
    assert not made.traced


# --- scores that are no function of an image

NO_GAME = {
    "batch statistics": (
        lambda m, x: m.net(m.own(x)),
        "other images of the batch",
        nn.BatchNorm2d(3, track_running_stats=False),
    ),
    "mean": (lambda m, x: m.net(x - x.mean(0)), "other images of the batch", None),
    "maximum": (lambda m, x: m.net(x / x.abs().max()), "other images of the batch", None),
    "softmax": (lambda m, x: m.net(x).softmax(0), "other images of the batch", None),
    "place": (lambda m, x: m.net(x) * torch.arange(1, len(x) + 1)[:, None], "its place in it", None),
    "size": (lambda m, x: m.net(x) / x.shape[0], "the batch's size", None),
    "dropout": (lambda m, x: m.net(F.dropout(x)), "random", None),
    "noise": (lambda m, x: m.net(x) + 0.1 * torch.rand(1), "random", None),
    "a rare event": (lambda m, x: m.net(x) * float(torch.rand([]) > 0.05), "random", None),
    "depth": (lambda m, x: m.net(x * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.97))), "random", None),
    "numpy": (lambda m, x: m.net(x) * np.random.rand(), "random", None),  # noqa: NPY002
}


@pytest.mark.parametrize("images", [IMAGES, IMAGES[:1].expand(3, -1, -1, -1)], ids=["", "equal"])
@pytest.mark.parametrize("chunk_size", [1, 16])
@pytest.mark.parametrize("case", NO_GAME)
def test_scores_that_depend_on_the_batch_or_on_chance_are_refused(case, chunk_size, images):
    function, reason, own = NO_GAME[case]
    with pytest.raises(ValueError, match=reason) as raised:
        phi(Written(function, own=own), images, chunk_size=chunk_size)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("most", [4, 20])
def test_what_shows_in_large_batches_alone_is_refused(most):
    model = Written(lambda m, x: m.net(x - x.mean(0) if len(x) > most else x))
    with pytest.raises(ValueError, match="depend on the other images of the batch"):
        phi(model)


def test_a_model_that_counts_its_calls_is_refused():
    def counts(m, x):
        m.own[0] += 1
        return m.net(x) * m.own[0]

    with pytest.raises(ValueError, match="gives the same images different scores"):
        phi(Written(counts, own=[0.0]))


def seeds_itself(m, x):
    torch.manual_seed(0)
    return m.net(x + 0.1 * torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize(
    "function", [seeds_itself, draws_for_nothing, lambda m, x: F.dropout(m.net(x), 0.0, True)]
)
def test_draws_that_decide_nothing_are_served(function):
    agrees(Written(function))


def test_a_model_of_one_image_at_a_time_is_served_so():
    def alone(m, x):
        assert len(x) == 1
        return m.net(x)

    wanted = phi(Written(lambda m, x: m.net(x)))
    torch.testing.assert_close(phi(Written(alone), chunk_size=1), wanted, rtol=1e-4, atol=1e-6)


def test_a_layer_that_magnifies_rounding_is_not_taken_for_a_batchs():
    layers = [
        layer
        for channels in (3, 8, 8)
        for layer in (nn.Conv2d(channels, 8, 3, padding=1), nn.InstanceNorm2d(8))
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 256, 3)).eval()
    for colour in (0.0, 0.3):  # constant but for rounding, which the norms blow up
        assert phi(model, torch.full((3, 3, 16, 16), colour)).isfinite().all()


def test_pixels_that_are_indices_are_not_given_values_they_cannot_have():
    table = nn.Embedding(256, 4)
    agrees(Written(lambda m, x: m.net(m.own((x * 255).round().long()).mean(-1)), own=table), IMAGES.sigmoid())


# --- dtypes, modes and kinds of arguments


def everything(model):
    yield phi(model)
    yield shapley(model, IMAGES, LABELS, n_samples=64)
    for estimator in list_estimators():
        yield shapley(model, IMAGES, LABELS, 3, 40, estimator)
    yield settled_shapley(model, IMAGES, LABELS, grid=2, n_samples=16)[0]
    yield grad_cam(model, IMAGES, LABELS, grid=3)
    options = {"value": "logit", "baseline": 0.0, "precision": "float32", "seed": 0, "n_samples": 16}
    rule = CropRule(seed=1, crop_size=8)
    yield from shapley_crops(
        model, IMAGES, LABELS, torch.arange(3), rule, grid=2, estimator="exact", **options
    )
    yield phi(model, (IMAGES > 0).byte())
    yield shapley(lambda x: x.mean((2, 3)), IMAGES, LABELS, 2, 16)


@pytest.fixture
def float32_afterwards():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_decides_nothing(dtype, float32_afterwards):
    model = Written(lambda m, x: m.net(x))
    wanted = list(everything(model))
    forward._PREPARED.pop(model)
    torch.set_default_dtype(dtype)
    for found, expected in zip(everything(model), wanted, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert locality_of(model, 16).reason
    assert torch.get_default_dtype() == dtype


def test_inference_mode_decides_nothing_and_leaves_nothing_behind():
    model = Written(lambda m, x: m.net(x))
    with torch.inference_mode():
        inside = list(everything(model))
        images, labels, made = IMAGES * 1, LABELS * 1, Written(lambda m, x: m.net(x))
    for found, expected in zip(inside, everything(model), strict=True):
        assert torch.equal(found, expected)
    for other in (model, made):
        assert torch.equal(phi(other, images, labels), inside[0])
        assert torch.equal(grad_cam(other, images, labels, grid=3), grad_cam(model, IMAGES, LABELS, grid=3))
    model(IMAGES).sum().backward()


@pytest.mark.parametrize("estimator", list_estimators())
@pytest.mark.parametrize("labels", [[0, 1, 3], [-1, 0, 1]])
def test_labels_that_are_no_classes_are_refused_before_the_game(estimator, labels):
    seen = []

    def model(x):
        seen.append(len(x))
        return x.mean((2, 3))

    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2, the classes of the model"):
        shapley(model, IMAGES, torch.tensor(labels), 3, 40, estimator)
    assert seen == [1]


class Output(dict):
    """As the models of transformers return it."""

    logits = property(lambda self: self["logits"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: {"out": m.net(x)}, r"got dict: .* lambda x: model\(x\)\['out'\]"),
        (lambda m, x: Output(logits=m.net(x)), r"got Output: .* lambda x: model\(x\)\['logits'\]"),
        (lambda m, x: (m.net(x), x), r"got tuple: .* lambda x: model\(x\)\[0\]"),
        (lambda m, x: None, "got NoneType"),
        (lambda m, x: m.net(x).argmax(1), r"got \[1\]"),
        (lambda m, x: m.net(x).long(), r"in a floating dtype, got torch.int64"),
    ],
)
def test_models_that_return_no_scores_are_told_what_is_wanted(function, message):
    with pytest.raises(ValueError, match=r"must return class scores \[1, classes\].*" + message) as raised:
        phi(Written(function))
    assert "\n" not in str(raised.value)


def test_arrays_and_lists_are_served():
    model = Written(lambda m, x: m.net(x))
    wanted = phi(model)
    for images, labels in (
        (IMAGES.numpy(), LABELS.numpy()),
        (IMAGES.tolist(), LABELS.tolist()),
        (list(IMAGES), list(LABELS)),
    ):
        torch.testing.assert_close(phi(model, images, labels), wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(phi(model, IMAGES.mT.contiguous().mT), wanted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": None}, r"images must be a tensor \[B, C, H, W\], got NoneType"),
        ({"labels": "abc"}, r"labels must be a tensor \[B\], got str"),
        ({"model": None}, "model must be a module or a function of images, got NoneType"),
    ],
)
def test_what_is_no_tensor_is_refused_in_a_line(changed, message):
    arguments = {"model": Written(lambda m, x: m.net(x)), "images": IMAGES, "labels": LABELS, **changed}
    with pytest.raises(ValueError, match=message):
        shapley(**arguments)


# --- threads


def test_threads_do_not_mix():
    """One prepares the model again and again while others explain with it and run it as it is."""
    model = Written(lambda m, x: m.net(m.own(x)), own=nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)))
    wanted, failures, done = [phi(model, IMAGES), phi(model, IMAGES.flip(0))], [], threading.Event()

    def explain(which, afresh):
        try:
            for _ in range(4):
                if afresh:
                    forward._PREPARED.pop(model, None)
                found = phi(model, IMAGES.flip(0) if which else IMAGES)
                if not torch.equal(found, wanted[which]):
                    failures.append(found - wanted[which])
        except Exception as error:
            failures.append(error)

    def run():
        with torch.no_grad():
            scores = model(IMAGES)
            while not done.is_set():
                try:
                    if not torch.equal(model(IMAGES), scores):
                        failures.append("other scores")
                except Exception as error:
                    failures.append(error)

    own = nn.Module.__call__
    explaining = [threading.Thread(target=explain, args=(which, which == 0)) for which in (0, 0, 1)]
    running = threading.Thread(target=run)
    for thread in (*explaining, running):
        thread.start()
    for thread in explaining:
        thread.join()
    done.set()
    running.join()
    assert failures == []
    assert nn.Module.__call__ is own
