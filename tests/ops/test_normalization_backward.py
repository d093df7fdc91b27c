import pytest
import torch
from torch.library import opcheck
from torch.nn import functional

from ddfast.ops import normalization_backward, reference
from ddfast.ops._dispatch import native_status

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
LAYOUTS = (torch.contiguous_format, torch.channels_last)
OP = torch.ops.ddfast.normalization_backward


def arguments(dtype, shape=(3, 8, 5, 6), groups=None, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    if len(shape) == 4:
        x = x.contiguous(memory_format=layout)
    sums = reference.accumulation_dtype(dtype)
    statistics = (shape[1],) if groups is None else (shape[0], groups)
    mean = torch.randn(statistics, generator=generator, dtype=sums)
    rstd = torch.rand(statistics, generator=generator, dtype=sums) + 0.5
    return x, g, mean, rstd, torch.randn(shape[1], generator=generator, dtype=sums), True, True


def moved(values, device):
    return tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in values)


def in_double(values):
    return tuple(v.double() if isinstance(v, torch.Tensor) else v for v in values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [None, 1, 4, 8])
def test_is_autograds(groups, layout, device):
    x, g, mean, rstd, weight, *_ = arguments(torch.float64, groups=groups, layout=layout)
    bias = torch.zeros_like(weight)
    if groups is None:

        def layer(x, weight, bias):
            return functional.batch_norm(x, mean, rstd**-2, weight, bias, eps=0.0)

    else:

        def layer(x, weight, bias):
            return functional.group_norm(x, groups, weight, bias, eps=1e-5)

        grouped = x.unflatten(1, (groups, -1)).flatten(2)
        mean = grouped.mean(2)
        rstd = (grouped.var(2, correction=0) + 1e-5).rsqrt()
    inputs, squares = [], []
    for one, grad in zip(x.split(1), g.split(1), strict=True):
        leaves = [tensor.detach().requires_grad_() for tensor in (one, weight, bias)]
        grad_x, *gradients = torch.autograd.grad(layer(*leaves), leaves, grad)
        inputs.append(grad_x)
        squares.append([gradient.square().sum() for gradient in gradients])
    for of_weight, of_bias in [(True, True), (True, False), (False, True), (False, False)]:
        grad_input, norms = normalization_backward(
            *moved((x, g, mean, rstd, weight), device), weight_norm=of_weight, bias_norm=of_bias
        )
        expected = torch.stack([of_weight * a + of_bias * b for a, b in squares])
        torch.testing.assert_close(norms.cpu(), expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(grad_input.cpu(), torch.cat(inputs), rtol=1e-10, atol=1e-12)
        assert grad_input.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_is_that_of_the_plain_computation(dtype, groups, layout, device):
    for shape in [(3, 8, 5, 6), (2, 24, 70, 61)]:
        values = arguments(dtype, shape, groups, layout)
        exact = reference.normalization_backward(*in_double(values))
        plain = reference.normalization_backward(*values)
        for got, same, truth in zip(OP(*moved(values, device)), plain, exact, strict=True):
            assert got.dtype == same.dtype
            error, plain_error = ((t.cpu().double() - truth).norm() for t in (got, same))
            assert error <= max(2 * plain_error, torch.finfo(got.dtype).eps * truth.norm())


@pytest.mark.skipif(not native_status()[0], reason=native_status()[1])
@pytest.mark.parametrize("threads", [1, 2])
def test_bytes_do_not_depend_on_the_batch_or_the_threads(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for groups in (None, 4):
            x, g, mean, rstd, weight, *_ = arguments(torch.float32, (5, 8, 21, 20), groups)
            together = normalization_backward(x, g, mean, rstd, weight)
            for b in range(5):
                statistics = (mean, rstd) if groups is None else (mean[b : b + 1], rstd[b : b + 1])
                alone = normalization_backward(x[b : b + 1], g[b : b + 1], *statistics, weight)
                assert all(torch.equal(a[0], t[b]) for a, t in zip(alone, together, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [None, 4])
def test_opcheck(groups, layout, device):
    for dtype in (torch.float32, torch.float64):
        opcheck(OP.default, moved(arguments(dtype, groups=groups, layout=layout), device))


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 7), (2, 8, 2, 3, 2)])
def test_any_number_of_dimensions(shape):
    for groups in (None, 4):
        values = arguments(torch.float64, shape, groups)
        for got, expected in zip(OP(*values), reference.normalization_backward(*values), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_vmap():
    x, g, mean, rstd, weight, *_ = arguments(torch.float64)
    many = torch.stack([x, 2 * x]), torch.stack([mean, -mean])
    mapped = torch.vmap(lambda x, m: OP(x, g, m, rstd, weight, True, True))(*many)
    for i in range(2):
        alone = OP(many[0][i], g, many[1][i], rstd, weight, True, True)
        assert all(torch.equal(m[i], a) for m, a in zip(mapped, alone, strict=True))


def test_nothing_to_sum():
    for shape in [(0, 8, 3), (2, 8, 0)]:
        for groups in (None, 4):
            grad_input, norms = OP(*arguments(torch.float32, shape, groups))
            assert grad_input.shape == shape
            assert torch.equal(norms, torch.zeros(shape[0]))


def test_a_gradient_through_it_is_refused():
    x, *rest = arguments(torch.float32)
    with pytest.raises(RuntimeError, match="ddfast::normalization_backward cannot be differentiated"):
        OP(x.requires_grad_(), *rest)[1].sum().backward()


X = torch.zeros(2, 6, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: normalization_backward(X, X.double(), X[0, :, 0, 0], X[0, :, 0, 0]), TypeError, "share one"),
        (lambda: normalization_backward(X, X[:1], X[0, :, 0, 0], X[0, :, 0, 0]), ValueError, "one shape"),
        (
            lambda: normalization_backward(X, X, torch.zeros(2, 4), torch.zeros(2, 4)),
            ValueError,
            r"must be \[6\] or \[2, groups\] with groups that divide 6, got \(2, 4\)",
        ),
        (lambda: normalization_backward(X, X, torch.zeros(6), torch.zeros(5)), ValueError, r"and \(5,\)"),
        (
            lambda: normalization_backward(X, X, torch.zeros(6), torch.zeros(6), torch.zeros(4)),
            ValueError,
            r"weight must be \[6\], got \(4,\)",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
