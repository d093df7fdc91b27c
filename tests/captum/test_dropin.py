"""`ddfast.captum` in Captum's place: Captum is the oracle, with the same seed and so the same numbers."""

import inspect
import itertools
import math
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.futures import Future

pytest.importorskip("sklearn", reason="Captum solves KernelShap with scikit-learn (extra [dev])")
captum_attr = pytest.importorskip("captum.attr", reason="Captum is not installed (extra [dev])")

import ddfast.captum  # noqa: E402
from ddfast.captum import explainers as served  # noqa: E402
from ddfast.captum import feature_game  # noqa: E402

NAMES = ("KernelShap", "ShapleyValueSampling", "ShapleyValues")
MANY = "You are providing multiple inputs"


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=MANY)
        yield


@pytest.fixture
def handed(monkeypatch):
    """Names of the explainers whose calls went to Captum's own method."""
    names = []
    for explainer, attribute in served._CAPTUM_ATTRIBUTE.items():

        def counted(*args, _attribute=attribute, _name=explainer.__name__, **kwargs):
            names.append(_name)
            return _attribute(*args, **kwargs)

        monkeypatch.setitem(served._CAPTUM_ATTRIBUTE, explainer, counted)
    return names


def both(name, forward, *args, seed=0, **kwargs):
    """Captum's result and ours from the same seed, the generator left at the same place."""
    found = []
    for module in (captum_attr, ddfast.captum):
        torch.manual_seed(seed)
        found.append(getattr(module, name)(forward).attribute(*args, **kwargs))
        found.append(torch.get_rng_state())
    assert torch.equal(found[1], found[3])
    return found[0], found[2]


def both_or_neither(name, forward, **arguments):
    """`both`, or None where both raise the same kind of error."""
    try:
        return both(name, forward, **arguments)
    except (AssertionError, ValueError, RuntimeError) as error:
        kind = type(error)
    for module in (captum_attr, ddfast.captum):
        explainer = getattr(module, name)(forward)
        arguments.pop("seed", None)
        with pytest.raises(kind):
            explainer.attribute(**arguments)
    return None


def assert_same(theirs, ours, tolerance=1e-5):
    assert type(theirs) is type(ours)
    pairs = zip(theirs, ours, strict=True) if isinstance(theirs, tuple) else [(theirs, ours)]
    for wanted, got in pairs:
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def interactions(weights):
    """A forward function of flat inputs [n, m] with pairwise terms, so that orders matter: [n, classes]."""

    def forward(*inputs):
        x = torch.cat([t.reshape(len(t), -1).float() for t in inputs], dim=1)
        return torch.tanh(x @ weights) + (x[:, :1] * x[:, -1:]) * weights[0]

    return forward


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self, norm=False, drop=0.0, flat=False):
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(6 * 12 * 12, 5)
        self.flat = flat

    def forward(self, x):
        if self.flat:
            x = x.view(len(x), 3, 12 * 12).view(len(x), 3, 12, 12)  # refuses channels-last
        return self.head(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1))


def cells(rows, cols, side=12):
    pixel = torch.arange(side) + 1
    row, col = (pixel * rows - 1) // side, (pixel * cols - 1) // side
    return (row[:, None] * cols + col)[None, None]


# --- the shape of the interface


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_captums_with_its_signatures(name):
    theirs, ours = getattr(captum_attr, name), getattr(ddfast.captum, name)
    explainer = ours(lambda x: x)
    assert isinstance(explainer, theirs)
    assert isinstance(explainer, captum_attr.Attribution)
    assert ours.__name__ == theirs.__name__
    assert explainer.get_name() == theirs.get_name()
    for method in ("attribute", "__init__"):
        wanted = inspect.signature(getattr(theirs, method)).parameters
        got = dict(inspect.signature(getattr(ours, method)).parameters)
        extra = [got.pop(key) for key in list(got) if key not in wanted]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in extra)
        assert [(p.name, p.default, p.kind) for p in got.values()] == [
            (p.name, p.default, p.kind) for p in wanted.values()
        ]
    assert explainer.has_convergence_delta() is False
    assert explainer.multiplies_by_inputs == theirs(lambda x: x).multiplies_by_inputs
    assert hasattr(explainer, "compute_convergence_delta") == hasattr(theirs, "compute_convergence_delta")
    assert ours.attribute.__wrapped__ is not ours.attribute


@pytest.mark.parametrize("name", NAMES)
def test_the_undecorated_method_can_be_called(name):
    explainer = getattr(ddfast.captum, name)(lambda x: x.sum(1))
    found = type(explainer).attribute.__wrapped__(explainer, torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(found, torch.tensor([[3.0, 4.0]]))


def test_exact_values_are_a_kind_of_sampling_as_in_captum():
    assert issubclass(ddfast.captum.ShapleyValues, ddfast.captum.ShapleyValueSampling)


def test_futures_are_captums():
    weights = random(4, 2)

    def forward(x):
        future = Future()
        future.set_result(interactions(weights)(x))
        return future

    x = random(2, 4, seed=1)
    for name in NAMES[1:]:
        torch.manual_seed(0)
        future = getattr(ddfast.captum, name)(forward).attribute_future(x, target=1, n_samples=5)
        torch.manual_seed(0)
        options = {} if name == "ShapleyValues" else {"n_samples": 5}
        wanted = getattr(ddfast.captum, name)(interactions(weights)).attribute(x, target=1, **options)
        torch.testing.assert_close(future.wait(), wanted)
        with pytest.raises(AssertionError, match="must be a tensor, int, or float"):
            getattr(ddfast.captum, name)(forward).attribute(x, target=1)
    with pytest.raises(NotImplementedError):
        ddfast.captum.KernelShap(forward).attribute_future()


def test_without_captum_the_import_says_what_to_install():
    script = (
        "import sys; sys.modules['captum'] = None; sys.modules['captum.attr'] = None\n"
        "import ddfast\n"
        "for use in (lambda: ddfast.captum, lambda: ddfast.accelerate('captum')):\n"
        "    try: use()\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    message = "ddfast.captum needs captum, which is not installed: pip install 'ddfast[bench]'"
    assert done.stdout.splitlines() == [message, message]


# --- values, with Captum as the oracle


@st.composite
def calls(draw):
    """A forward function and the arguments of a call of `attribute`, in the forms that Captum documents."""
    integer = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    some = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    generator = torch.Generator().manual_seed(integer(0, 2**31))
    examples, count = some(1, 1, 2, 3), some(1, 1, 2, 3)
    shapes = [tuple(some(1, 2, 3) for _ in range(some(1, 1, 2, 3))) for _ in range(count)]
    inputs = tuple(
        torch.randint(-3, 4, (examples, *shape), generator=generator)
        if some(False, False, True)
        else torch.randn(examples, *shape, generator=generator)
        for shape in shapes
    )
    features = some(1, 2, 3, 4, 5)
    masks = tuple(
        torch.randint(0, features, (some(1, 1, examples), *shape), generator=generator) for shape in shapes
    )
    total = sum(math.prod(shape) for shape in shapes)
    if 1 < total <= 5 and some(False, True):
        masks = None
    baselines = None
    if some(False, True, True):
        baselines = tuple(
            some(0, -2, 0.5, torch.randn(some(1, examples), *shape, generator=generator)) for shape in shapes
        )
    additional = some(None, None, (2.0, torch.randn(examples, 8, generator=generator)))
    kind = some("classes", "classes", "planes", "one", "several", "batch", "number")
    inner = torch.randn(total, 8, generator=generator)
    outer = torch.randn(8, 8, generator=generator)

    def forward(*arguments):
        tensors, further = arguments[:count], arguments[count:]
        flat = torch.cat([t.reshape(len(t), -1).float() for t in tensors], dim=1)
        hidden = torch.tanh(flat @ inner)
        for value in further:
            hidden = hidden * value if isinstance(value, float) else hidden + value
        output = torch.tanh(hidden) @ outer
        if kind in ("batch", "number"):
            return output[:, 0].sum() if kind == "batch" else output[:, 0].sum().item()
        shaped = {"planes": output.view(-1, 2, 4), "one": output[:, 0], "several": output[:, :2]}
        return shaped.get(kind, output)

    target = None
    if kind == "classes":
        each = [integer(0, 7) for _ in range(examples)]
        target = some(3, torch.tensor([2]), torch.tensor(each), each)
    elif kind == "planes":
        target = some((1, 2), [(integer(0, 1), integer(0, 3)) for _ in range(examples)])
    arguments = {
        "inputs": inputs,
        "feature_mask": masks,
        "baselines": baselines,
        "target": target,
        "additional_forward_args": additional,
        "perturbations_per_eval": 1 if kind in ("batch", "number") else some(1, 1, 2, 5),
    }
    if count == 1 and some(False, True):
        for key in ("inputs", "feature_mask", "baselines"):
            arguments[key] = None if arguments[key] is None else arguments[key][0]
    return forward, arguments


PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@PROPERTY
@given(calls())
def test_exact_values_equal_captums(call):
    found = both_or_neither("ShapleyValues", call[0], **call[1])
    if found is not None:
        assert_same(*found)


@PROPERTY
@given(calls(), st.sampled_from([1, 3, 8]), st.integers(0, 1000))
def test_sampled_values_equal_captums(call, n_samples, seed):
    found = both_or_neither("ShapleyValueSampling", call[0], seed=seed, n_samples=n_samples, **call[1])
    if found is not None:
        assert_same(*found)


@PROPERTY
@given(calls(), st.sampled_from([1, 2, 3, 7, 30]), st.integers(0, 1000), st.booleans())
def test_kernel_shap_equals_captums(call, n_samples, seed, like_input):
    options = {"seed": seed, "n_samples": n_samples, "return_input_shape": like_input}
    found = both_or_neither("KernelShap", call[0], **options, **call[1])
    if found is not None:
        assert_same(*found, 2e-3)  # Captum solves its regression, with weights of 10^6, in float32


def test_few_features_are_evaluated_once_each():
    rows, passes = [], []

    def forward(x):
        rows.append(len(x))
        return (x[:, 0] * x[:, 1] + x[:, 2]).unsqueeze(1)

    for name, options in (
        ("KernelShap", {"n_samples": 500}),
        ("ShapleyValueSampling", {"n_samples": 500}),
        ("ShapleyValues", {}),
    ):
        rows.clear()
        torch.manual_seed(0)  # 500 orders err by more than the tolerance in one run of seven
        found = getattr(ddfast.captum, name)(forward).attribute(
            torch.tensor([[2.0, 3.0, 5.0]]), target=0, **options
        )
        torch.testing.assert_close(found, torch.tensor([[3.0, 3.0, 5.0]]), rtol=1e-3, atol=0.3)
        passes.append(len(rows))
        # 8 coalitions; the full one twice, alone and among the others.
        assert sum(rows) == 9
    assert passes == [2, 3, 3]


@pytest.mark.parametrize(
    "give", [float, int, lambda t: t, lambda t: t.reshape(1)], ids=["float", "int", "0d", "1d"]
)
@pytest.mark.parametrize("name", NAMES)
def test_one_value_a_batch(name, give, handed):
    x = torch.tensor([[1.0, 4.0, 2.0], [3.0, 1.0, 5.0]])
    mask = torch.tensor([[0, 1, 0]])

    def forward(inputs):
        return give((inputs[:, 0] * inputs[:, 1] * inputs[:, 2]).sum())

    options = {} if name == "ShapleyValues" else {"n_samples": 5000}
    found = getattr(ddfast.captum, name)(forward).attribute(x, feature_mask=mask, **options)
    # Both features are needed for the 8 + 15, so each has half of it.
    torch.testing.assert_close(found, torch.full((1, 3), 11.5), rtol=0.05, atol=0)
    assert not handed
    with pytest.raises(AssertionError):
        getattr(ddfast.captum, name)(forward).attribute(
            x, feature_mask=mask, perturbations_per_eval=2, **options
        )


def test_outputs_of_any_shape_come_first_in_sampled_values():
    weights = random(4, 6)

    def per_example(x):
        return interactions(weights)(x).view(-1, 2, 3)

    def per_batch(x):
        total = interactions(weights)(x).sum()
        return torch.stack([total, 2 * total, 3 * total])

    x = random(2, 4, seed=1)
    for name in NAMES[1:]:
        options = {} if name == "ShapleyValues" else {"n_samples": 4}
        assert_same(*both(name, per_example, x, **options))
        assert_same(*both(name, per_batch, x, **options))
        assert_same(*both(name, per_batch, random(3, 4, seed=2), **options))  # as many values as examples
    found = ddfast.captum.ShapleyValues(per_example).attribute(x)
    assert found.shape == (2, 2, 3, 4)
    torch.testing.assert_close(found.sum(-1), per_example(x) - per_example(torch.zeros_like(x)))


def test_inputs_without_elements_and_shared_features():
    def forward(first, second):
        return (2 * first).sum(1) + second.sum(1)

    first, second = torch.tensor([[3.0, 1.0, 2.0]]), torch.empty(1, 0)
    masks = torch.tensor([[0, 1, 1]]), torch.empty(1, 0, dtype=torch.int64)
    for name in NAMES:
        found = getattr(ddfast.captum, name)(forward).attribute((first, second), feature_mask=masks)
        torch.testing.assert_close(found[0], torch.tensor([[6.0, 6.0, 6.0]]), rtol=1e-4, atol=1e-4)
        assert found[1].shape == (1, 0)


def test_many_features_without_a_mask():
    x = random(2, 80, seed=1)
    forward = interactions(random(80, 3))
    theirs, ours = both("KernelShap", forward, x, target=[0, 2], n_samples=30, perturbations_per_eval=10)
    assert_same(theirs, ours, 2e-2)
    assert_same(*both("ShapleyValueSampling", forward, x, target=1, n_samples=2, perturbations_per_eval=16))


def test_kernel_shap_converges_to_the_exact_values():
    forward = interactions(random(5, 3))
    x = random(2, 5, seed=1)
    target = torch.tensor([2, 0])
    exact = ddfast.captum.ShapleyValues(forward).attribute(x, target=target)
    torch.manual_seed(0)
    found = ddfast.captum.KernelShap(forward).attribute(x, target=target, n_samples=4000)
    assert float((found - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_the_surrogate_stays_with_the_explainer():
    forward = interactions(random(4, 3))
    x = random(2, 4, seed=1)
    representations = []
    for module in (captum_attr, ddfast.captum):
        explainer = module.KernelShap(forward)
        torch.manual_seed(0)
        explainer.attribute(x, target=1, n_samples=20)
        model = explainer.interpretable_model
        representations.append((model.representation(), model.bias(), model(torch.ones(1, 4))))
    for wanted, got in zip(*representations, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_results_have_no_graph():
    x = random(1, 4).requires_grad_()
    forward = interactions(random(4, 3).requires_grad_())
    for name in NAMES:
        assert not getattr(ddfast.captum, name)(forward).attribute(x, target=1).requires_grad


# --- images


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("form", ["zeros", "number", "image", "images"])
def test_images_of_a_grid_go_through_the_engine(name, examples, form, monkeypatch, handed):
    used = []
    outputs = feature_game.GridGame.outputs
    monkeypatch.setattr(
        feature_game.GridGame, "outputs", lambda *args: used.append(1) or outputs(*args), raising=True
    )
    model, x = Net(norm=True).eval(), random(examples, 3, 12, 12)
    baselines = {"zeros": None, "number": 0.5, "image": random(1, 3, 12, 12, seed=2), "images": -x}[form]
    target = [2, 0, 4][:examples]
    options = {} if name == "ShapleyValues" else {"n_samples": 6}
    theirs, ours = both(
        name, model, x, baselines=baselines, target=target, feature_mask=cells(2, 2), **options
    )
    assert_same(theirs, ours, 5e-3 if name == "KernelShap" else 2e-5)
    assert used
    assert not handed


@pytest.mark.parametrize(
    "mask",
    [
        cells(3, 4).transpose(2, 3).contiguous(),  # numbered by columns
        cells(5, 5) % 3,  # features of several cells, a grid that does not divide
        cells(4, 4) // 2 * 2,  # some numbers missing
        cells(3, 3).expand(1, 3, 12, 12) * 3
        + torch.arange(3).view(1, 3, 1, 1),  # a feature a channel: no grid
        torch.randint(0, 6, (1, 1, 12, 12), generator=torch.Generator().manual_seed(1)),  # no grid
    ],
    ids=["columns", "unions", "missing", "channels", "scattered"],
)
@pytest.mark.filterwarnings("ignore:Feature mask is missing")
def test_images_under_other_masks(mask, handed):
    model, x = Net().eval(), random(2, 3, 12, 12)
    for name, options in (("KernelShap", {"n_samples": 60}), ("ShapleyValueSampling", {"n_samples": 2})):
        theirs, ours = both(name, model, x, target=torch.tensor([1, 3]), feature_mask=mask, **options)
        assert_same(theirs, ours, 5e-3)
    assert not handed


def test_masks_of_each_image():
    model, x = Net().eval(), random(2, 3, 12, 12)
    mask = torch.cat([cells(2, 2), cells(1, 3)])
    for name, options in (("KernelShap", {"n_samples": 12}), ("ShapleyValues", {})):
        theirs, ours = both(name, model, x, target=1, feature_mask=mask, **options)
        assert_same(theirs, ours, 5e-3)


def test_a_model_that_refuses_channels_last(handed):
    model, x = Net(flat=True).eval(), random(1, 3, 12, 12)
    theirs, ours = both("KernelShap", model, x, target=1, feature_mask=cells(3, 3), n_samples=40)
    assert_same(theirs, ours, 5e-3)
    assert not handed


def test_autocast_of_the_caller_holds():
    seen = []

    def forward(x):
        seen.append(torch.is_autocast_enabled("cpu"))
        return x.flatten(1)[:, :2].float()

    with torch.autocast("cpu", torch.bfloat16):
        ddfast.captum.KernelShap(forward).attribute(random(1, 3, 12, 12), target=1, feature_mask=cells(2, 2))
    assert seen
    assert all(seen)


# --- forward functions whose rows are not independent


@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize(
    "mix",
    [
        lambda y: y - y.mean(0, keepdim=True) + y.sum(1, keepdim=True),
        lambda y: y.softmax(0),
        lambda y: y.cumsum(0),
        lambda y: y.flip(0).cumsum(0).flip(0),
        lambda y: y * len(y),
    ],
    ids=["centred", "softmax", "cumulated", "cumulated backwards", "counted"],
)
@pytest.mark.parametrize("name", NAMES)
def test_mixed_rows_give_captums_numbers(name, mix, examples):
    weights = random(4, 3)
    forward = lambda x: mix(interactions(weights)(x))  # noqa: E731
    options = {} if name == "ShapleyValues" else {"n_samples": 12}
    theirs, ours = both(name, forward, random(examples, 4, seed=1) + 0.5, target=1, **options)
    assert_same(theirs, ours, 2e-3 if name == "KernelShap" else 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_functions_that_take_one_example_only(name, handed):
    weights = random(4, 3)

    def forward(x):
        if len(x) != 1:
            raise KeyError("one at a time")
        return interactions(weights)(x)

    options = {} if name == "ShapleyValues" else {"n_samples": 12}
    theirs, ours = both(name, forward, random(1, 4, seed=1), target=1, **options)
    assert_same(theirs, ours, 2e-3 if name == "KernelShap" else 1e-5)
    assert not handed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("net", [{"drop": 0.5}, {"norm": True}], ids=["dropout", "batch norm"])
def test_training_mode_is_left_to_captum(name, net, handed):
    x = random(2, 3, 12, 12)
    options = {} if name == "ShapleyValues" else {"n_samples": 4}
    theirs, ours = both(name, Net(**net).train(), x, target=1, feature_mask=cells(2, 2), **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    # Batch statistics are the same again if the batch is; dropout is another.
    assert handed or ("norm" in net and name != "KernelShap")


def test_arguments_that_follow_no_example_go_one_at_a_time():
    weights = random(4, 3)

    def forward(x, scale):
        return interactions(weights)(x) * scale.sum()

    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for name in NAMES:
        theirs, ours = both(name, forward, random(2, 4, seed=1), target=1, additional_forward_args=(scale,))
        assert_same(theirs, ours, 2e-3)


def test_values_that_are_not_finite_raise_as_in_captum():
    for module in (captum_attr, ddfast.captum):
        with pytest.raises(ValueError, match="NaN"):
            module.KernelShap(lambda x: x.sum(1) / 0 * 0).attribute(random(1, 3))


def test_errors_of_the_forward_function_come_out():
    def forward(x):
        raise ZeroDivisionError("mine")

    for name in NAMES:
        with pytest.raises(ZeroDivisionError, match="mine"):
            getattr(ddfast.captum, name)(forward).attribute(random(1, 3))


# --- hooks


class ReversedKernelShap(captum_attr.KernelShap):
    """A hook of Captum's overridden: singletons in place of draws."""

    def kernel_shap_perturb_generator(self, original_inp, **kwargs):
        d = kwargs["num_interp_features"]
        yield torch.ones(1, d, dtype=torch.long)
        yield torch.zeros(1, d, dtype=torch.long)
        while True:
            yield from torch.eye(d, dtype=torch.long).split(1)


class OurReversedKernelShap(ddfast.captum.KernelShap):
    kernel_shap_perturb_generator = ReversedKernelShap.kernel_shap_perturb_generator


def test_overridden_hooks_are_heeded(handed):
    forward = interactions(random(4, 3))
    x = random(1, 4, seed=1)
    options = {"target": 1, "n_samples": 6}
    wanted = ReversedKernelShap(forward).attribute(x, **options)
    torch.testing.assert_close(OurReversedKernelShap(forward).attribute(x, **options), wanted)
    explainer = ddfast.captum.KernelShap(forward)
    explainer.perturb_func = ReversedKernelShap(forward).perturb_func
    torch.testing.assert_close(explainer.attribute(x, **options), wanted)
    assert handed == ["KernelShap"] * 2
    # Heavier anchors are served: the weight is a number.
    both_weights = []
    for module in (captum_attr, ddfast.captum):
        explainer = module.KernelShap(forward)
        explainer.inf_weight = 10.0
        torch.manual_seed(0)
        both_weights.append(explainer.attribute(x, **options))
    assert_same(*both_weights, 1e-4)
    assert len(handed) == 2


def test_a_permutation_generator_of_the_users_is_heeded(handed):
    forward = interactions(random(3, 3))
    x = random(1, 3, seed=1)
    found = []
    for module in (captum_attr, ddfast.captum):
        explainer = module.ShapleyValueSampling(forward)
        explainer.permutation_generator = lambda d, n: iter([[2, 1, 0]])
        found.append(explainer.attribute(x, target=1))
    torch.testing.assert_close(found[1], found[0])
    assert handed == ["ShapleyValueSampling"]


# --- warnings and progress


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return {str(w.message) for w in caught if w.category is UserWarning}


MASKS_THAT_WARN = {
    "several examples": {},
    "shifted": {"feature_mask": torch.tensor([[1, 2, 4, 4]])},
    "missing": {"feature_mask": torch.tensor([[0, 3, 3, 5]]), "perturbations_per_eval": 2},
    "ten": {"feature_mask": torch.tensor([[0, 1, 9, 9]])},
}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param(name, arguments, id=f"{name}, {case}")
        for name in NAMES
        for case, arguments in MASKS_THAT_WARN.items()
        if (name, case) != ("ShapleyValues", "ten")  # Captum would walk 10! orders
    ],
)
def test_warnings_are_captums(name, arguments):
    forward = interactions(random(4, 3))
    x = random(2, 4, seed=1)

    def call(module):
        torch.manual_seed(0)
        options = {} if name == "ShapleyValues" else {"n_samples": 4}
        getattr(module, name)(forward).attribute(x, target=1, **arguments, **options)

    assert warned(lambda: call(ddfast.captum)) == warned(lambda: call(captum_attr))


def test_ten_features_warn_before_exact_values():
    explainer = ddfast.captum.ShapleyValues(lambda x: x.sum(1))
    assert any("at least 10" in text for text in warned(lambda: explainer.attribute(random(1, 10))))
    found = explainer.attribute(random(1, 10))
    torch.testing.assert_close(found, random(1, 10))


def test_ten_thousand_features_warn():
    explainer = ddfast.captum.KernelShap(lambda x: x.sum(1))
    texts = warned(lambda: explainer.attribute(random(1, 10001), n_samples=3))
    assert any("> 10000 features" in text for text in texts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("perturbations_per_eval", [1, 3])
def test_progress_reaches_its_end(name, perturbations_per_eval, capsys):
    explainer = getattr(ddfast.captum, name)(interactions(random(4, 3)))
    arguments = {"target": 1, "perturbations_per_eval": perturbations_per_eval}
    explainer.attribute(random(2, 4, seed=1), show_progress=True, **arguments)
    assert f"{explainer.get_name()} attribution: 100%" in capsys.readouterr().err
    explainer.attribute(random(2, 4, seed=1), **arguments)
    assert capsys.readouterr().err == ""


# --- what Captum does not have


def test_another_estimator_is_one_keyword_away():
    forward = interactions(random(6, 3))
    x, target = random(3, 6, seed=1), torch.tensor([0, 2, 1])
    exact = ddfast.captum.ShapleyValues(forward).attribute(x, target=target)
    found = ddfast.captum.KernelShap(forward, estimator="exact").attribute(x, target=target)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)

    def error(estimator):
        torch.manual_seed(0)
        explainer = ddfast.captum.KernelShap(forward, estimator=estimator)
        coefficients = explainer.attribute(x, target=target, n_samples=12, return_input_shape=False)
        assert coefficients.shape == (3, 6)
        return float((coefficients - exact).square().sum())

    assert error("permutation") < 0.2 * error("captum")
    # Efficiency holds exactly, and the draws follow torch's generator.
    explainer = ddfast.captum.KernelShap(forward, estimator="permutation")
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(explainer.attribute(x, target=target, n_samples=12))
    torch.testing.assert_close(found[0].sum(1), exact.sum(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_estimator_for_a_value_of_the_whole_batch():
    forward = interactions(random(4, 3))
    x = random(2, 4, seed=1)
    total = lambda inputs: forward(inputs)[:, 0].sum()  # noqa: E731
    found = ddfast.captum.KernelShap(total, estimator="exact").attribute(x)
    torch.testing.assert_close(found, ddfast.captum.ShapleyValues(total).attribute(x), rtol=1e-4, atol=1e-5)
    assert found.shape == (1, 4)


def test_estimators_that_cannot_serve_say_so():
    with pytest.raises(ValueError, match=r"estimator must be one of captum, .*permutation.*, got 'shapley'"):
        ddfast.captum.KernelShap(lambda x: x, estimator="shapley")
    explainer = ddfast.captum.KernelShap(lambda x: x.sum(1), estimator="permutation")
    with pytest.raises(ValueError, match="n_samples >= 5"):
        explainer.attribute(random(1, 4), n_samples=3)
    explainer = ddfast.captum.KernelShap(lambda x: x.softmax(0).sum(1), estimator="permutation")
    with pytest.raises(ValueError, match=r"cannot serve this call: .*use estimator='captum'"):
        explainer.attribute(random(2, 4))


@pytest.mark.parametrize("name", NAMES)
def test_rows_per_forward_bounds_a_pass(name):
    rows = []

    def forward(x):
        rows.append(len(x))
        return x[:, :2] * x[:, 2:]

    explainer = getattr(ddfast.captum, name)(forward, rows_per_forward=5)
    explainer.attribute(random(2, 4), target=1)
    assert max(rows) <= 7  # the first pass also holds the check of both examples
    with pytest.raises(ValueError, match="at least 1"):
        getattr(ddfast.captum, name)(forward, rows_per_forward=0)


def test_a_pass_that_does_not_fit_is_halved(handed):
    weights, rows = random(5, 3), []

    def forward(x):
        if len(x) > 6:
            raise torch.OutOfMemoryError("no memory")
        rows.append(len(x))
        return interactions(weights)(x)

    x = random(2, 5, seed=1)
    for name, options in (
        ("KernelShap", {"n_samples": 40}),
        ("ShapleyValueSampling", {}),
        ("ShapleyValues", {}),
    ):
        rows.clear()
        found = getattr(ddfast.captum, name)(forward)
        torch.manual_seed(0)
        found = found.attribute(x, target=1, **options)
        torch.manual_seed(0)
        wanted = getattr(ddfast.captum, name)(interactions(weights)).attribute(x, target=1, **options)
        torch.testing.assert_close(found, wanted)
        assert max(rows) <= 6
    assert not handed


# --- accelerate


@pytest.fixture
def own_methods():
    explainers = [getattr(captum_attr, name) for name in NAMES]
    before = [explainer.__dict__["attribute"] for explainer in explainers]
    yield before
    assert [explainer.__dict__["attribute"] for explainer in explainers] == before


def passes(explainer, **options):
    """Forward passes of a call with 3 features."""
    count = []
    forward = explainer.forward_func
    explainer.forward_func = lambda x: count.append(1) or forward(x)
    explainer.attribute(torch.tensor([[1.0, 2.0, 3.0]]), **options)
    explainer.forward_func = forward
    return len(count)


def test_accelerate_serves_classes_and_instances_made_earlier(own_methods):
    explainers = [getattr(captum_attr, name)(lambda x: x.prod(1)) for name in NAMES]
    before = [passes(explainer) for explainer in explainers]
    with ddfast.accelerate("captum"):
        assert [passes(explainer) for explainer in explainers] == [2, 3, 3]
        assert passes(captum_attr.KernelShap(lambda x: x.sum(1)), n_samples=300) == 2
        for explainer, own in zip(explainers, own_methods, strict=True):
            method = type(explainer).attribute
            assert method.__name__ == "attribute"
            assert method.__doc__ == own.__doc__
            assert inspect.signature(method) == inspect.signature(own)
            assert type(explainer).attribute.__wrapped__ is not own.__wrapped__
    assert [passes(explainer) for explainer in explainers] == before == [25, 76, 19]


def test_accelerate_gives_captums_numbers(own_methods):
    forward = interactions(random(4, 3))
    x = random(2, 4, seed=1)
    for name in NAMES:
        explainer = getattr(captum_attr, name)(forward)
        torch.manual_seed(0)
        wanted = explainer.attribute(x, target=1)
        with ddfast.accelerate("captum"):
            torch.manual_seed(0)
            assert_same(wanted, explainer.attribute(x, target=1), 2e-3)


def test_accelerate_nests_and_undoes_once(own_methods):
    explainer = captum_attr.KernelShap(lambda x: x.prod(1))
    first = ddfast.accelerate("captum")
    with ddfast.accelerate("captum") as second:
        assert passes(explainer) == 2
        second.undo()
        second.undo()
        assert passes(explainer) == 2
    assert passes(explainer) == 2
    first.undo()
    first.undo()
    assert passes(explainer) == 25
    with pytest.raises(RuntimeError, match="mine"), ddfast.accelerate("captum"):
        raise RuntimeError("mine")
    assert passes(explainer) == 25


def test_accelerate_leaves_a_later_patch_alone(monkeypatch):
    explainer = captum_attr.KernelShap(lambda x: x.prod(1))
    own = captum_attr.KernelShap.attribute
    acceleration = ddfast.accelerate("captum")
    below = captum_attr.KernelShap.attribute
    monkeypatch.setattr(captum_attr.KernelShap, "attribute", lambda *args, **kwargs: below(*args, **kwargs))
    assert passes(explainer) == 2
    acceleration.undo()
    assert passes(explainer) == 25  # theirs still stands, and ours below it only passes calls on
    monkeypatch.undo()
    captum_attr.KernelShap.attribute = own


def test_accelerate_heeds_subclasses(own_methods, handed):
    class Plain(captum_attr.KernelShap):
        def attribute(self, *args, **kwargs):
            return super().attribute(*args, **kwargs) * 2

    forward = interactions(random(4, 3))
    x = random(1, 4, seed=1)
    wanted = ReversedKernelShap(forward).attribute(x, target=1, n_samples=6)
    with ddfast.accelerate("captum"):
        torch.testing.assert_close(ReversedKernelShap(forward).attribute(x, target=1, n_samples=6), wanted)
        assert handed == ["KernelShap"]
        assert passes(Plain(lambda t: t.prod(1))) == 2
        # Lime, which KernelShap descends from, is not ours.
        assert passes(captum_attr.Lime(lambda t: t.prod(1)), n_samples=10) == 10
        # Our own classes stay as they are.
        assert passes(ddfast.captum.KernelShap(lambda t: t.prod(1), estimator="exact")) == 2


def test_accelerate_serves_captums_wrappers(own_methods):
    forward = interactions(random(4, 3))
    x = random(2, 4, seed=1)
    tunnel = captum_attr.NoiseTunnel(captum_attr.ShapleyValueSampling(forward))
    arguments = {"nt_type": "smoothgrad", "nt_samples": 2, "target": 1, "n_samples": 3}
    torch.manual_seed(0)
    wanted = tunnel.attribute(x, **arguments)
    with ddfast.accelerate("captum"):
        torch.manual_seed(0)
        torch.testing.assert_close(tunnel.attribute(x, **arguments), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "got"), [(("lime",), "'lime'"), ((), "no name"), (("captum", "shap"), "'shap'")]
)
def test_accelerate_knows_its_libraries(names, got, own_methods):
    with pytest.raises(ValueError, match=f"accelerate takes the names of libraries, captum, got {got}"):
        ddfast.accelerate(*names)


# --- the game below


def test_grids_are_found():
    for rows, cols in itertools.product((1, 2, 3, 5, 12), repeat=2):
        grid, players = feature_game.find_grid(cells(rows, cols)[0, 0])
        assert grid == (rows, cols)
        assert players.tolist() == list(range(rows * cols))
    grid, players = feature_game.find_grid(cells(4, 4)[0, 0] // 8)
    assert grid == (2, 1)
    assert players.tolist() == [0, 1]
    assert feature_game.find_grid(cells(2, 2)[0, 0] - 1) is None
    assert feature_game.find_grid(torch.arange(200 * 2).view(200, 2)) is None


@given(
    st.lists(st.integers(0, 3), min_size=12, max_size=12), st.lists(st.integers(0, 3), min_size=9, max_size=9)
)
def test_a_grid_gives_back_its_mask(down, across):
    mask = torch.tensor(down)[:, None] * 4 + torch.tensor(across)
    (rows, cols), players = feature_game.find_grid(mask)
    row = ((torch.arange(12) + 1) * rows - 1) // 12
    col = ((torch.arange(9) + 1) * cols - 1) // 9
    assert torch.equal(players.view(rows, cols)[row][:, col], mask)


def test_distinct_coalitions():
    coalitions = torch.rand(3, 50, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    table, place = feature_game.distinct(coalitions)
    assert table.size <= 16
    rows = table.rows(0, table.size)
    for stream in range(3):
        assert torch.equal(rows[stream][place[stream]], coalitions[stream])
        assert len(set(place[stream].tolist())) == len({tuple(c) for c in coalitions[stream].tolist()})
    wide = torch.rand(2, 5, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    table, place = feature_game.distinct(wide)
    assert torch.equal(table.rows(1, 3), wide[:, 1:3])
    assert place.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_prefixes_of_orders():
    orders = torch.tensor([[2, 0, 1], [1, 2, 0]])
    prefixes = feature_game.PrefixCoalitions(orders.argsort(dim=1), 3)
    assert prefixes.size == 6
    found = [[i for i in range(3) if row[i]] for row in prefixes.rows(0, 6).tolist()]
    assert found == [[2], [0, 2], [0, 1, 2], [1], [1, 2], [0, 1, 2]]
    assert torch.equal(prefixes.rows(2, 5), prefixes.rows(0, 6)[2:5])


@pytest.mark.parametrize("seed", range(12))
def test_a_forward_function_that_draws_is_captums(seed):
    """Two draws may agree by chance, so that comparing outputs does not find it."""
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, 2)).train()
    x = random(1, 6, seed=3)
    found = []
    for explain in (captum_attr.KernelShap, ddfast.captum.KernelShap):
        torch.manual_seed(seed)
        found.append(explain(net).attribute(x, target=1, n_samples=12))
    assert torch.equal(*found)
