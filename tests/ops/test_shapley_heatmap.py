import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from ddfast.ops import reference, shapley_heatmap
from ddfast.ops._dispatch import native_status

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
NATIVE = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])
VALUES = ("logit", "prob", "logprob")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def random_case(batch, count, classes, players, dtype=torch.float32, per_image=False, scale=4.0, seed=0):
    """Outputs, labels and a projection. Weights have the size of an estimator's: about 1 / K."""
    generator = torch.Generator().manual_seed(seed)
    outputs = (torch.randn(batch, count, classes, generator=generator) * scale).to(dtype)
    labels = torch.randint(0, max(classes, 1), (batch,), generator=generator)
    shape = (batch, count, players) if per_image else (count, players)
    projection = torch.randn(shape, generator=generator) / max(count, 1)
    return outputs, labels, projection.double() if dtype == torch.float64 else projection


def unfused(outputs, labels, projection, value):
    """The same maths in plain PyTorch, at the dtypes it is given."""
    if value == "prob":
        outputs = outputs.softmax(-1)
    elif value == "logprob":
        outputs = outputs.log_softmax(-1)
    values = outputs[torch.arange(len(labels)), :, labels]
    return torch.einsum("bk,bki->bi", values, projection.expand(len(labels), -1, -1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("value", VALUES)
def test_is_the_projection_of_the_values(value, per_image, device):
    case = random_case(5, 33, 7, 16, torch.float64, per_image)
    phi = shapley_heatmap(*(x.to(device) for x in case), value)
    assert phi.dtype == torch.float64
    torch.testing.assert_close(phi.cpu(), unfused(*case, value), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("value", VALUES)
def test_error_is_at_most_twice_that_of_plain_pytorch(value, dtype, classes, device):
    outputs, labels, projection = random_case(64, 32, classes, 16, dtype)
    exact = unfused(outputs.double(), labels, projection.double(), value)
    plain = unfused(outputs.float(), labels, projection, value)
    phi = shapley_heatmap(outputs.to(device), labels.to(device), projection.to(device), value)
    error, plain_error = ((x.double().cpu() - exact).norm() for x in (phi, plain))
    assert phi.dtype == torch.float32
    assert error <= 2 * plain_error


@pytest.mark.parametrize("device", DEVICES)
def test_many_coalitions_lose_nothing(device):
    outputs, labels, projection = random_case(1, 4096, 2, 4)
    phi = shapley_heatmap(outputs.to(device), labels.to(device), projection.to(device))
    exact = unfused(outputs.double(), labels, projection.double(), "logit")
    assert torch.equal(phi.cpu(), exact.float())


@NATIVE
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpp_has_the_bits_of_the_reference_for_logits(dtype, per_image):
    for batch, count, classes, players in [(1, 1, 1, 1), (3, 31, 17, 9), (4, 64, 1000, 16)]:
        case = random_case(batch, count, classes, players, dtype, per_image)
        phi = torch.ops.ddfast_native.shapley_heatmap(*case, "logit")
        expected = reference.shapley_heatmap(*case, "logit")
        if dtype == torch.float64:  # products of two float64 are rounded, or fused
            torch.testing.assert_close(phi, expected, rtol=1e-14, atol=1e-15)
        else:
            assert torch.equal(phi, expected)


@NATIVE
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", ["prob", "logprob"])
def test_cpp_softmax(value, dtype, classes):
    case = random_case(3, 7, classes, 5, dtype)
    phi = torch.ops.ddfast_native.shapley_heatmap(*case, value)
    double = torch.finfo(phi.dtype).eps < 1e-10
    expected = reference.shapley_heatmap(*case, value)
    torch.testing.assert_close(phi, expected, rtol=1e-13 if double else 2e-6, atol=1e-14 if double else 2e-6)


@NATIVE
@pytest.mark.parametrize("value", ["prob", "logprob"])
@pytest.mark.parametrize(
    "logits",
    [
        [0.0, -1000.0, -87.5, -200.0],
        [3e38, -3e38, 0.0, 1.0],
        [-torch.inf, 0.0, 1.0, 2.0],
        [torch.inf, 0.0, 1.0, 2.0],
        [torch.nan, 0.0, 1.0, 2.0],
        [-torch.inf] * 4,
    ],
)
def test_cpp_softmax_at_the_ends_of_the_range(logits, value):
    for label in range(4):
        case = (torch.tensor([[logits]]), torch.tensor([label]), torch.ones(1, 1))
        phi = torch.ops.ddfast_native.shapley_heatmap(*case, value)
        expected = reference.shapley_heatmap(*case, value)
        torch.testing.assert_close(phi, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


@NATIVE
def test_threads_do_not_change_the_result():
    case = random_case(37, 50, 100, 16)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(shapley_heatmap(*case, "prob"))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", VALUES)
def test_an_image_owes_nothing_to_its_batch(value, device):
    outputs, labels, projection = (x.to(device) for x in random_case(9, 40, 30, 16))
    phi = shapley_heatmap(outputs, labels, projection, value)
    assert torch.equal(phi[3:4], shapley_heatmap(outputs[3:4], labels[3:4], projection, value))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", VALUES)
def test_strided_arguments(value, device):
    outputs, labels, projection = (x.to(device) for x in random_case(4, 12, 20, 10))
    strided = (outputs[::2, 1::2, ::3], labels[::2] // 3, projection.mT[1::2, ::2].mT)
    dense = tuple(x.contiguous() for x in strided)
    assert torch.equal(shapley_heatmap(*strided, value), shapley_heatmap(*dense, value))
    once = outputs[:1].expand(4, -1, -1)  # one evaluation for all images, as the empty coalition has it
    assert torch.equal(
        shapley_heatmap(once, labels, projection, value),
        shapley_heatmap(once.clone(), labels, projection, value),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_sizes_of_zero(device):
    for batch, count, players in [(0, 3, 4), (2, 0, 4), (2, 3, 0)]:
        outputs, labels, projection = (x.to(device) for x in random_case(batch, count, 5, players))
        phi = shapley_heatmap(outputs, labels, projection)
        assert torch.equal(phi.cpu(), torch.zeros(batch, players))


OP = torch.ops.ddfast.shapley_heatmap.default


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", VALUES)
def test_opcheck(value, device):
    for dtype, per_image in [(torch.float32, False), (torch.bfloat16, True), (torch.float64, False)]:
        outputs, labels, projection = (x.to(device) for x in random_case(2, 5, 6, 4, dtype, per_image))
        opcheck(OP, (outputs.requires_grad_(), labels, projection.requires_grad_(), value))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("value", VALUES)
def test_gradients(value, per_image, device):
    outputs, labels, projection = (
        x.to(device) for x in random_case(2, 3, 4, 5, torch.float64, per_image, scale=1.0)
    )

    def function(outputs, projection):
        return shapley_heatmap(outputs, labels, projection, value)

    arguments = (outputs.requires_grad_(), projection.requires_grad_())
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", VALUES)
def test_float32_gradients_against_autograd(value, device):
    outputs, labels, projection = random_case(3, 6, 10, 4)
    cotangent = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    exact = outputs.double().requires_grad_()
    unfused(exact, labels, projection.double(), value).backward(cotangent.double())
    fused = outputs.to(device).requires_grad_()
    shapley_heatmap(fused, labels.to(device), projection.to(device), value).backward(cotangent.to(device))
    torch.testing.assert_close(fused.grad.cpu().double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("in_dims", [(0, 0, None), (2, None, None), (None, 0, 1), (1, 0, 0)])
def test_vmap(in_dims, per_image, device):
    cases = [random_case(2, 6, 5, 3, per_image=per_image, seed=seed) for seed in range(4)]
    arguments = [
        torch.stack([case[i] for case in cases], dim) if dim is not None else cases[0][i]
        for i, dim in enumerate(in_dims)
    ]
    mapped = torch.vmap(lambda *x: shapley_heatmap(*x, "prob"), in_dims)(*(x.to(device) for x in arguments))
    assert mapped.shape == (4, 2, 3)
    for index in range(4):
        case = [x if d is None else x.select(d, index) for x, d in zip(arguments, in_dims, strict=True)]
        assert torch.equal(mapped[index], shapley_heatmap(*(x.to(device) for x in case), "prob"))


def test_compiles_without_a_graph_break():
    case = random_case(3, 6, 10, 4)

    def function(*case):
        return shapley_heatmap(*case, "logprob") + 1

    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(*case), function(*case))


OUTPUTS, LABELS, PROJECTION = torch.zeros(2, 3, 4), torch.tensor([0, 3]), torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((OUTPUTS[0], LABELS, PROJECTION), ValueError, r"outputs must be a \[B, K, C\] tensor, got \[3, 4\]"),
        ((OUTPUTS.int(), LABELS, PROJECTION), TypeError, "outputs must be floating point, got torch.int32"),
        ((OUTPUTS, LABELS.int(), PROJECTION), TypeError, "labels must be int64, got torch.int32"),
        (
            (OUTPUTS, LABELS[:1], PROJECTION),
            ValueError,
            r"labels must be \[2\] for outputs \[2, 3, 4\], got \[1\]",
        ),
        ((OUTPUTS, torch.tensor([0, 4]), PROJECTION), ValueError, r"labels must be in \[0, 4\), got 0 to 4"),
        (
            (OUTPUTS, torch.tensor([-1, 0]), PROJECTION),
            ValueError,
            r"labels must be in \[0, 4\), got -1 to 0",
        ),
        (
            (OUTPUTS, LABELS, PROJECTION.double()),
            TypeError,
            "projection must be torch.float32 with torch.float32",
        ),
        (
            (OUTPUTS.double(), LABELS, PROJECTION),
            TypeError,
            "projection must be torch.float64 with torch.float64",
        ),
        (
            (OUTPUTS, LABELS, PROJECTION[:2]),
            ValueError,
            r"projection must be \[3, d\] or \[2, 3, d\] .* got \[2, 5\]",
        ),
        ((OUTPUTS, LABELS, PROJECTION.expand(3, 3, 5)), ValueError, r"got \[3, 3, 5\]"),
        (
            (OUTPUTS, LABELS, PROJECTION, "margin"),
            ValueError,
            "must be one of logit, prob, logprob, got 'margin'",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        shapley_heatmap(*arguments)


@NATIVE
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((OUTPUTS, torch.tensor([0, 4]), PROJECTION, "logit"), r"label 4 is not in \[0, 4\)"),
        ((OUTPUTS, LABELS[:1], PROJECTION, "logit"), "labels must be"),
        ((OUTPUTS, LABELS, PROJECTION[:2], "logit"), "projection must be"),
        ((OUTPUTS, LABELS, PROJECTION, "margin"), "value must be"),
    ],
)
def test_cpp_does_not_read_outside_arguments_that_skipped_the_face(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ddfast_native.shapley_heatmap(*arguments)
