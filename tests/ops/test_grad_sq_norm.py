from itertools import product

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional

from ddfast.ops import (
    grad_sq_norm_conv2d,
    grad_sq_norm_embedding,
    grad_sq_norm_linear,
    grad_sq_norm_norm,
    reference,
)
from ddfast.ops._dispatch import native_status

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
NATIVE = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPS = torch.ops.ddfast

# kernel, stride, padding, dilation, groups, channels, outputs, height, width
CONVOLUTIONS = [
    ((3, 3), (1, 1), (1, 1), (1, 1), 1, 3, 8, 12, 10),
    ((3, 2), (2, 3), (1, 0), (1, 2), 2, 6, 4, 13, 11),
    ((3, 3), (1, 1), (1, 1), (1, 1), 8, 8, 8, 9, 9),  # depthwise
    ((3, 3), (1, 1), (1, 1), (1, 1), 1, 64, 48, 4, 4),  # few positions: Gram
    ((1, 1), (2, 2), (0, 0), (1, 1), 2, 64, 64, 7, 7),
    ((5, 5), (3, 3), (4, 4), (2, 2), 1, 5, 3, 9, 8),  # padding wider than the kernel's reach
    ((2, 2), (1, 1), (0, 0), (3, 3), 1, 4, 4, 4, 4),  # one position
    ((3, 3), (2, 2), (5, 0), (1, 1), 1, 2, 3, 3, 8),  # rows that see nothing but padding
    ((3, 3), (2, 2), (1, 1), (1, 1), 1, 64, 66, 7, 6),  # Gram of pixels, every other one in the middle
    ((3, 2), (1, 1), (2, 1), (2, 1), 2, 130, 66, 5, 4),  # Gram of pixels, group by group
    ((3, 3), (1, 2), (0, 3), (1, 2), 1, 48, 80, 4, 19),  # Gram of pixels, some seen by no position
    ((4, 4), (4, 4), (0, 0), (1, 1), 1, 6, 70, 12, 12),  # patches: Gram of positions
    ((3, 3), (3, 4), (1, 2), (2, 1), 2, 40, 80, 8, 11),  # the same with padding and groups
    ((7, 7), (2, 2), (3, 3), (1, 1), 1, 3, 32, 30, 33),  # as in a stem
    ((3, 3), (1, 1), (1, 1), (2, 2), 20, 20, 40, 9, 9),  # one input and two outputs a group
    ((3, 3), (1, 2), (1, 1), (1, 1), 40, 40, 40, 10, 9),  # depthwise
    ((3, 3), (1, 1), (1, 1), (1, 1), 1, 17, 50, 31, 33),  # several blocks of positions
]


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_autograd(layer, parameters, inputs, grads):
    """Squared norm, one sample at a time, of what autograd gives the parameters."""
    norms = []
    for x, grad in zip(inputs, grads, strict=True):
        given = torch.autograd.grad(layer(x[None], *parameters), parameters, grad[None])
        norms.append(sum(g.square().sum() for g in given))
    return torch.stack(norms)


def parameters(*shapes):
    return [random(*shape, seed=9 + i).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(5,), (3, 4), (3, 2, 50), (2, 1), (2, 1, 1)])
def test_linear_is_autograds(lead, bias, device):
    inputs, grads = random(*lead, 9), random(*lead, 7, seed=1)
    expected = by_autograd(functional.linear, parameters((7, 9), *[(7,)] * bias), inputs, grads)
    norms = grad_sq_norm_linear(inputs.to(device), grads.to(device), bias=bias)
    torch.testing.assert_close(norms.cpu(), expected, rtol=1e-12, atol=0)


def test_linear_takes_the_gram_matrices_where_they_are_cheaper_to_the_same_result():
    for inputs, outputs in [(300, 200), (20, 18)]:
        x, g = random(2, 12, inputs), random(2, 12, outputs, seed=1)
        expected = by_autograd(functional.linear, parameters((outputs, inputs), (outputs,)), x, g)
        torch.testing.assert_close(grad_sq_norm_linear(x, g), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_conv2d_is_autograds(convolution, bias, device):
    kernel, stride, padding, dilation, groups, channels, outputs, height, width = convolution
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    weights = parameters((outputs, channels // groups, *kernel), *[(outputs,)] * bias)

    def layer(x, weight, bias=None):
        return functional.conv2d(x, weight, bias, **geometry)

    for layout in (torch.contiguous_format, torch.channels_last):
        images = random(2, channels, height, width).contiguous(memory_format=layout)
        grads = random(*layer(images, *weights).shape, seed=1).contiguous(memory_format=layout)
        expected = by_autograd(layer, weights, images, grads)
        norms = grad_sq_norm_conv2d(images.to(device), grads.to(device), kernel, **geometry, bias=bias)
        torch.testing.assert_close(norms.cpu(), expected, rtol=1e-12, atol=0)


def test_conv2d_takes_ints_for_pairs():
    images, grads = random(2, 3, 8, 8), random(2, 4, 4, 4, seed=1)
    square = grad_sq_norm_conv2d(images, grads, 3, stride=2, padding=1)
    pairs = grad_sq_norm_conv2d(images, grads, (3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1))
    assert torch.equal(square, pairs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_conv2d_in_every_layout_errs_as_plain_pytorch(convolution, dtype, device):
    kernel, stride, padding, dilation, groups, channels, outputs, height, width = convolution
    images = random(3, channels, height, width).to(dtype)
    made = functional.conv2d(
        images.double(), random(outputs, channels // groups, *kernel), None, stride, padding, dilation, groups
    )
    grads = random(*made.shape, seed=1).to(dtype)
    geometry = (kernel, stride, padding, dilation, groups, True)
    exact = reference.grad_sq_norm_conv2d(images.double(), grads.double(), *geometry)
    plain = reference.grad_sq_norm_conv2d(images, grads, *geometry).double()
    allowed = max(2 * (plain - exact).norm(), 2 * torch.finfo(torch.float32).eps * exact.norm())
    layouts = (torch.contiguous_format, torch.channels_last)
    for image_layout, grad_layout in product(layouts, layouts):
        norms = OPS.grad_sq_norm_conv2d(
            images.to(device).contiguous(memory_format=image_layout),
            grads.to(device).contiguous(memory_format=grad_layout),
            *geometry,
        )
        assert norms.dtype == torch.float32
        assert (norms.cpu().double() - exact).norm() <= allowed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lead", [(2, 5), (2, 301)])
def test_linear_errs_as_plain_pytorch(lead, dtype, device):
    for inputs, outputs in [(70, 90), (65, 33)]:
        x, g = random(*lead, inputs).to(dtype), random(*lead, outputs, seed=1).to(dtype)
        exact = reference.grad_sq_norm_linear(x.double(), g.double(), True)
        plain = reference.grad_sq_norm_linear(x, g, True).double()
        norms = grad_sq_norm_linear(x.to(device), g.to(device)).cpu().double()
        allowed = max(2 * (plain - exact).norm(), 2 * torch.finfo(torch.float32).eps * exact.norm())
        assert (norms - exact).norm() <= allowed


@NATIVE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threads", [1, 2])
def test_bytes_do_not_depend_on_the_batch_or_the_threads(threads, dtype):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        calls = []
        for kernel, stride, padding, dilation, groups, channels, outputs, height, width in CONVOLUTIONS[8:13]:
            images = random(5, channels, height, width, dtype=dtype)
            made = functional.conv2d(
                images.float(),
                torch.zeros(outputs, channels // groups, *kernel),
                None,
                stride,
                padding,
                dilation,
                groups,
            )
            grads = random(*made.shape, dtype=dtype, seed=1)
            geometry = (kernel, stride, padding, dilation, groups, True)
            calls.append((OPS.grad_sq_norm_conv2d, images, grads, geometry))
        for positions in (3, 200):
            x, g = random(5, positions, 30, dtype=dtype), random(5, positions, 40, dtype=dtype, seed=1)
            calls.append((OPS.grad_sq_norm_linear, x, g, (True,)))
        for op, first, second, rest in calls:
            together = op(first, second, *rest)
            for b in range(5):
                assert torch.equal(op(first[b : b + 1], second[b : b + 1], *rest)[0], together[b])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("shape", "dims"),
    [((3, 5), (1, 1)), ((3, 5, 4, 2), (1, 1)), ((3, 7, 5), (-1, -1)), ((2, 3, 4, 5), (-2, -1))],
)
def test_norm_is_autograds(shape, dims, weight, bias, device):
    first, last = (d % len(shape) for d in dims)
    affine = [n if first <= d <= last else 1 for d, n in enumerate(shape)]

    def layer(x, *given):
        given = list(given)
        scaled = x * given.pop(0) if weight else x
        return scaled + given.pop(0) if bias else scaled

    normalized, grads = random(*shape), random(*shape, seed=1)
    expected = by_autograd(layer, parameters(*[affine] * (weight + bias)), normalized, grads)
    for layout in (lambda x: x, lambda x: x.mT.contiguous().mT):
        norms = grad_sq_norm_norm(
            layout(normalized).to(device), layout(grads).to(device), dims, weight=weight, bias=bias
        )
        torch.testing.assert_close(norms.cpu(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("lead", [(3,), (3, 20), (2, 3, 10)])
def test_embedding_is_autograds(lead, padding_idx, device):
    indices = torch.randint(0, 6, lead, generator=torch.Generator().manual_seed(3))
    grads = random(*lead, 5)

    def layer(x, table):
        return functional.embedding(x, table, padding_idx)

    expected = by_autograd(layer, parameters((6, 5)), indices, grads)
    for given in (indices, indices.int()):
        norms = grad_sq_norm_embedding(given.to(device), grads.to(device), padding_idx=padding_idx)
        torch.testing.assert_close(norms.cpu(), expected, rtol=1e-12, atol=1e-12)


def all_ops(dtype):
    """One call of each op: name and arguments."""
    kernel, stride, padding, dilation, groups, channels, outputs, height, width = CONVOLUTIONS[1]
    images = random(3, channels, height, width, dtype=dtype)
    made = functional.conv2d(
        images.double(), random(outputs, channels // groups, *kernel), None, stride, padding, dilation, groups
    )
    indices = torch.randint(0, 6, (3, 10), generator=torch.Generator().manual_seed(3))
    return {
        "grad_sq_norm_linear": (random(3, 8, 5, dtype=dtype), random(3, 8, 4, dtype=dtype, seed=1), True),
        "grad_sq_norm_conv2d": (
            images,
            random(*made.shape, dtype=dtype, seed=1),
            list(kernel),
            list(stride),
            list(padding),
            list(dilation),
            groups,
            True,
        ),
        "grad_sq_norm_norm": (
            random(3, 5, 8, dtype=dtype),
            random(3, 5, 8, dtype=dtype, seed=1),
            1,
            1,
            True,
            True,
        ),
        "grad_sq_norm_embedding": (indices, random(3, 10, 7, dtype=dtype), 2),
    }


NAMES = list(all_ops(torch.float32))


def moved(arguments, device):
    return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_error_is_that_of_float32_sums(name, dtype, device):
    arguments = all_ops(dtype)[name]
    body = getattr(reference, name)
    exact = body(
        *(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments)
    )
    norms = getattr(OPS, name)(*moved(arguments, device)).cpu()
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    plain = body(*arguments).double()
    error, plain_error = (norms.double() - exact).norm(), (plain - exact).norm()
    assert error <= max(2 * plain_error, torch.finfo(norms.dtype).eps * exact.norm())


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_cpp_agrees_with_the_reference(name, dtype):
    arguments = all_ops(dtype)[name]
    norms = getattr(torch.ops.ddfast_native, name)(*arguments)
    expected = getattr(reference, name)(*arguments)
    assert norms.dtype == expected.dtype
    torch.testing.assert_close(norms, expected, rtol=8 * torch.finfo(norms.dtype).eps, atol=0)


@NATIVE
def test_cpp_works_in_tiles_of_a_large_layer():
    """More unfolded pixels, weights or groups than one tile holds, directly and by Gram matrices."""
    generator = torch.Generator().manual_seed(0)
    for channels, outputs, size, groups in [(64, 8, 90, 1), (1200, 1000, 1, 1), (48, 48, 60, 12)]:
        images = torch.randn(1, channels, size, size, generator=generator)
        grads = torch.randn(1, outputs, size, size, generator=generator)
        arguments = (images, grads, [3, 3], [1, 1], [1, 1], [1, 1], groups, True)
        norms = torch.ops.ddfast_native.grad_sq_norm_conv2d(*arguments)
        torch.testing.assert_close(norms, reference.grad_sq_norm_conv2d(*arguments), rtol=1e-5, atol=0)
    inputs, grads = (
        torch.randn(1, 1500, 1100, generator=generator),
        torch.randn(1, 1500, 1200, generator=generator),
    )
    norms = torch.ops.ddfast_native.grad_sq_norm_linear(inputs, grads, True)
    torch.testing.assert_close(norms, reference.grad_sq_norm_linear(inputs, grads, True), rtol=1e-5, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_one_sample_does_not_depend_on_the_others(name, device):
    first, second, *rest = moved(all_ops(torch.float32)[name], device)
    together = getattr(OPS, name)(first, second, *rest)
    for b in range(3):
        alone = getattr(OPS, name)(first[b : b + 1], second[b : b + 1], *rest)
        torch.testing.assert_close(alone[0], together[b], rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    for dtype in (torch.float32, torch.float64):
        opcheck(getattr(OPS, name).default, moved(all_ops(dtype)[name], device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_vmap(name, device):
    first, second, *rest = moved(all_ops(torch.float32)[name], device)
    op = getattr(OPS, name)
    firsts = torch.stack([first, first.flip(0)], 1)
    seconds = torch.stack([second, -2 * second])
    mapped = torch.vmap(lambda x, g: op(x, g, *rest), (1, 0))(firsts, seconds)
    looped = torch.stack([op(firsts[:, i], seconds[i], *rest) for i in range(2)])
    torch.testing.assert_close(mapped, looped, rtol=1e-6, atol=0)
    shared = torch.vmap(lambda g: op(first, g, *rest))(seconds)
    torch.testing.assert_close(shared[1], 4 * shared[0], rtol=1e-6, atol=0)
    assert torch.vmap(lambda g: op(first[:0], g, *rest))(seconds[:, :0]).shape == (2, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_through_a_norm_is_refused(name):
    first, second, *rest = all_ops(torch.float32)[name]
    norms = getattr(OPS, name)(first, second.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match=f"ddfast::{name} cannot be differentiated"):
        norms.sum().backward()


def test_nothing_to_sum():
    for norms in (
        grad_sq_norm_linear(torch.zeros(0, 3), torch.zeros(0, 2)),
        grad_sq_norm_conv2d(torch.zeros(0, 3, 4, 4), torch.zeros(0, 2, 4, 4), 1),
        grad_sq_norm_norm(torch.zeros(0, 3, 4), torch.zeros(0, 3, 4), (1, 1)),
        grad_sq_norm_embedding(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3, 2)),
    ):
        assert norms.shape == (0,)
        assert norms.dtype == torch.float32
    for norms in (
        grad_sq_norm_linear(torch.ones(2, 0, 3), torch.ones(2, 0, 2)),
        grad_sq_norm_norm(torch.ones(2, 3, 0), torch.ones(2, 3, 0), (1, 1)),
        grad_sq_norm_embedding(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, 2)),
    ):
        assert torch.equal(norms, torch.zeros(2))


X = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: grad_sq_norm_linear(X, X.double()), TypeError, "share one floating-point dtype"),
        (lambda: grad_sq_norm_linear(X.int(), X.int()), TypeError, "share one floating-point dtype"),
        (lambda: grad_sq_norm_linear(X[0, 0, 0], X[0, 0, 0]), ValueError, r"must be \[B, ..., I\]"),
        (lambda: grad_sq_norm_linear(X, X[:, :3]), ValueError, r"got \(2, 4, 8, 8\) and \(2, 3, 8, 8\)"),
        (lambda: grad_sq_norm_conv2d(X[0], X[0], 1), ValueError, r"must be \[B, C, H, W\]"),
        (lambda: grad_sq_norm_conv2d(X, X[:1], 1), ValueError, r"must be \[B, C, H, W\]"),
        (lambda: grad_sq_norm_conv2d(X, X, 1, groups=3), ValueError, "groups 3 must divide 4"),
        (lambda: grad_sq_norm_conv2d(X, X, 3), ValueError, r"makes \(6, 6\) of \(8, 8\)"),
        (lambda: grad_sq_norm_norm(X, X[:, :2], (1, 1)), ValueError, "must have one shape"),
        (
            lambda: grad_sq_norm_norm(X, X, (0, 1)),
            ValueError,
            "dims must be an interval of dimensions 1 to 3",
        ),
        (
            lambda: grad_sq_norm_norm(X, X, (2, 1)),
            ValueError,
            "dims must be an interval of dimensions 1 to 3",
        ),
        (
            lambda: grad_sq_norm_norm(X, X, (1, 4)),
            ValueError,
            "dims must be an interval of dimensions 1 to 3",
        ),
        (lambda: grad_sq_norm_embedding(X, X), TypeError, "indices must be int64 or int32"),
        (lambda: grad_sq_norm_embedding(X.long(), X), ValueError, r"must be \[B, ...\] and \[B, ..., D\]"),
        (
            lambda: grad_sq_norm_embedding(X[..., 0].long(), X, padding_idx=-1),
            ValueError,
            "padding_idx must be None or at least 0",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
