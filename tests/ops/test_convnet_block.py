import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from ddfast.ops import convnet_block, reference
from ddfast.ops._dispatch import native_status
from tests.ops.transforms import check_second, check_third, check_vmap

NATIVE = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
OP = torch.ops.ddfast.convnet_block.default
BACKWARD = torch.ops.ddfast.convnet_block_backward.default
ROOT = Path(__file__).parents[2]
SHAPES = [  # images, input channels, output channels, height, width
    (2, 3, 128, 32, 32),
    (3, 128, 128, 16, 16),
    (9, 128, 128, 8, 8),
    (2, 3, 33, 7, 9),
    (3, 1, 5, 6, 5),
    (2, 2, 16, 3, 3),
    (2, 4, 40, 2, 3),
    (2, 5, 130, 13, 3),
    (4, 20, 40, 9, 7),
    (1, 33, 7, 40, 21),  # more tiles than a block holds, of one image
    (16, 32, 32, 2, 2),
]


def case(images, inputs, outputs, height, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        numbers(images, inputs, height, width),
        numbers(outputs, inputs, 3, 3) * (2 / 9 / inputs) ** 0.5,
        numbers(outputs),
        numbers(outputs),
        numbers(outputs),
    )


def plain(input, weight, bias, norm_weight, norm_bias, eps=1e-5):
    conv = F.conv2d(input, weight, bias, padding=1)
    normal = F.group_norm(conv, weight.shape[0], norm_weight, norm_bias, eps)
    return F.avg_pool2d(normal.relu(), 2)


def with_gradients(function, tensors, seed=1):
    """The output and the gradients of all tensors for one gradient at the output."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output))]


def squared_errors(found, exact):
    return [
        (a.double() - b).square().sum() / (b.square().sum() + 1e-300)
        for a, b in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_four_layers(shape):
    tensors = case(*shape, dtype=torch.float64)
    for found, expected in zip(
        with_gradients(convnet_block, tensors), with_gradients(plain, tensors), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(shape):
    """Over four draws, because the errors of one are few numbers where the maps are small."""
    ours, plains = torch.zeros(6), torch.zeros(6)
    for seed in range(4):
        tensors = case(*shape, seed=seed)
        exact = with_gradients(plain, [tensor.double() for tensor in tensors])
        ours += torch.tensor(squared_errors(with_gradients(convnet_block, tensors), exact))
        plains += torch.tensor(squared_errors(with_gradients(plain, tensors), exact))
    error, plain_error = ours.sqrt(), plains.sqrt()
    named = [0, 1, 2, 4, 5]  # without the gradient of bias: zero, where plain PyTorch has noise
    floor = torch.finfo(torch.float32).eps
    assert (error[named] <= (2 * plain_error[named]).clamp(min=2 * floor)).all(), (error, plain_error)


def test_the_gradient_of_the_bias_is_zero():
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(
            with_gradients(convnet_block, case(2, 3, 8, 6, 6, dtype))[3], torch.zeros(8, dtype=dtype)
        )


@pytest.mark.parametrize("inputs", [3, 20])
@pytest.mark.parametrize("given", [(False, False, False), (True, False, True), (False, True, False)])
def test_parameters_may_be_absent(inputs, given):
    input, weight, *rest = case(2, inputs, 24, 9, 6)
    rest = [tensor if there else None for tensor, there in zip(rest, given, strict=True)]

    def through(function):
        return lambda x, w, *present: function(
            x, w, *(present[sum(given[:k])] if given[k] else None for k in range(3))
        )

    tensors = [input, weight, *(tensor for tensor in rest if tensor is not None)]
    for found, expected in zip(
        with_gradients(through(convnet_block), tensors), with_gradients(through(plain), tensors), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_normalised_in_float(dtype):
    tensors = case(2, 8, 16, 6, 7, dtype)
    conv = F.conv2d(*tensors[:3], padding=1).float()
    expected = F.avg_pool2d(F.group_norm(conv, 16, tensors[3].float(), tensors[4].float()).relu(), 2)
    found = with_gradients(convnet_block, tensors)
    torch.testing.assert_close(found[0], expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    exact = with_gradients(plain, [tensor.double() for tensor in tensors])
    error = squared_errors(found, exact)
    plain_error = squared_errors(with_gradients(plain, tensors), exact)
    assert all(error[k] <= 4 * plain_error[k] for k in (0, 1, 2, 4, 5))


@pytest.mark.parametrize("inputs", [3, 20])
def test_layouts_do_not_change_the_result(inputs):
    input, *parameters = case(3, inputs, 40, 9, 8)
    expected = with_gradients(convnet_block, (input, *parameters))
    for each in (
        input.contiguous(memory_format=torch.channels_last),
        torch.stack([input, input], -1)[..., 0],
        input.transpose(2, 3).contiguous().transpose(2, 3),
        input[:1].expand(3, -1, -1, -1),
    ):
        one = each.stride(0) == 0
        wanted = with_gradients(convnet_block, (each.contiguous(), *parameters)) if one else expected
        leaves = [tensor.detach().requires_grad_() for tensor in (each, *parameters)]
        output = convnet_block(*leaves)
        assert torch.equal(output, wanted[0])
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).float()
        grads = torch.autograd.grad(output, leaves, grad.contiguous(memory_format=torch.channels_last))
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted[1:], strict=True))


@NATIVE
@pytest.mark.parametrize("inputs", [3, 40])
def test_neighbours_and_threads_do_not_change_the_result(inputs):
    tensors = case(21, inputs, 40, 9, 10)
    together = with_gradients(convnet_block, tensors)
    for b in (0, 7, 20):
        assert torch.equal(convnet_block(tensors[0][b : b + 1], *tensors[1:]), together[0][b : b + 1])
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = with_gradients(convnet_block, tensors)
            assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))
    finally:
        torch.set_num_threads(before)


@NATIVE
@pytest.mark.parametrize("inputs", [3, 20])
@pytest.mark.parametrize("keep", [False, True])
def test_keeping_the_convolution_changes_rounding_only(inputs, keep):
    tensors = case(5, inputs, 33, 9, 7)
    pooled, mean, rstd, conv = OP(*tensors, 1e-5, keep)
    wide = reference.convnet_block(*(tensor.double() for tensor in tensors), 1e-5, True)
    torch.testing.assert_close(mean.double(), wide[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), wide[2], rtol=1e-5, atol=0)
    assert conv.shape == (wide[3].shape if keep else (0,))
    if keep:
        torch.testing.assert_close(conv.double(), wide[3], rtol=1e-5, atol=1e-5)
    grad = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0))
    found = BACKWARD(grad, *tensors, mean, rstd, conv, 1e-5, True, True)
    exact = reference.convnet_block_backward(
        grad.double(), *(tensor.double() for tensor in tensors), *wide[1:], 1e-5, True, True
    )
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@NATIVE
@pytest.mark.parametrize("inputs", [3, 20])
def test_every_element_is_written_and_nan_stays(inputs):
    input, *parameters = case(3, inputs, 33, 9, 7)
    poisoned = input.clone()
    poisoned[1, 0, 4, 4] = torch.nan
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        clean = with_gradients(convnet_block, (input, *parameters))
        kept = OP(input, *parameters, 1e-5, True)
        found = convnet_block(poisoned, *parameters)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(tensor.isnan().any() for tensor in (*clean, *kept))
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[0][[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [3, 20])
def test_no_images(inputs, dtype):
    output, *grads = with_gradients(convnet_block, case(0, inputs, 8, 6, 5, dtype))
    assert output.shape == (0, 8, 3, 2)
    assert grads[0].shape == (0, inputs, 6, 5)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads[1:])


@pytest.mark.parametrize("shape", [(2, 2, 3, 4, 5), (1, 5, 4, 3, 4)])
def test_first_and_second_derivatives(shape):
    tensors = tuple(tensor.requires_grad_() for tensor in case(*shape, dtype=torch.float64))
    assert gradcheck(convnet_block, tensors)
    assert gradgradcheck(convnet_block, tensors)
    without = (*tensors[:2], None, None, None)
    assert gradgradcheck(convnet_block, without)
    assert gradgradcheck(lambda *p: convnet_block(tensors[0].detach(), *p), tensors[1:])


@pytest.mark.parametrize("parts", [(0,), (1,), (3,), (4,), (0, 1, 3, 4)])
@pytest.mark.parametrize("shape", [(2, 2, 3, 4, 5), (3, 5, 4, 6, 7)])
def test_second_derivative_is_plain_pytorchs(shape, parts):
    tensors = [tensor.requires_grad_() for tensor in case(*shape, dtype=torch.float64)]
    check_second(convnet_block, plain, tensors, parts)


def test_third_derivative_is_plain_pytorchs():
    check_third(
        convnet_block, plain, [tensor.requires_grad_() for tensor in case(2, 2, 3, 4, 5, torch.float64)]
    )


@pytest.mark.parametrize("inputs", [3, 6])
def test_gradient_matching_in_float(inputs):
    """The gradient at the images of a distance between gradients of parameters: DC's step."""
    input, *parameters = case(2, inputs, 8, 8, 8)
    targets = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(k)) for k, t in enumerate(parameters)
    ]

    def step(function, dtype):
        images = input.to(dtype).requires_grad_()
        weights = [t.to(dtype).requires_grad_() for t in parameters]
        loss = function(images, *weights).square().sum()
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        distance = sum(F.mse_loss(g, t.to(dtype)) for g, t in zip(grads, targets, strict=True))
        return torch.autograd.grad(distance, images)[0]

    exact, same = step(plain, torch.float64), step(plain, torch.float32)
    error, plain_error = ((t.double() - exact).norm() for t in (step(convnet_block, torch.float32), same))
    assert error <= max(2 * plain_error, 1e-5 * exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [3, 5])
def test_opcheck(inputs, dtype):
    tensors = case(2, inputs, 4, 5, 6, dtype)
    opcheck(OP, (*tensors, 1e-5, True))
    opcheck(OP, (*(tensor.clone().requires_grad_() for tensor in tensors), 1e-5, inputs > 4))
    opcheck(OP, (tensors[0], tensors[1], None, None, None, 1e-5, False))
    pooled, *kept = OP(*tensors, 1e-5, inputs > 4)
    opcheck(BACKWARD, (torch.ones_like(pooled), *tensors, *kept, 1e-5, True, True))
    opcheck(BACKWARD, (torch.ones_like(pooled), *tensors, *kept, 1e-5, False, False))


@pytest.mark.parametrize(
    "in_dims", [(0, None, None, None, None), (1, 0, None, 1, 0), (None, 0, None, None, None)]
)
def test_vmap(in_dims):
    check_vmap(convnet_block, case(2, 5, 4, 5, 6), in_dims)


@pytest.mark.parametrize("inputs", [3, 5])
def test_torch_func(inputs):
    tensors = case(3, inputs, 4, 6, 6, torch.float64)
    names = ("weight", "bias", "norm_weight", "norm_bias")
    parameters = dict(zip(names, tensors[1:], strict=True))

    def loss(function, parameters, images):
        return function(images, **parameters).square().sum()

    def everything(function):
        def of(parameters, images):
            return loss(function, parameters, images)

        first = torch.func.grad(of)(parameters, tensors[0])
        per_sample = torch.func.vmap(torch.func.grad(of), (None, 0))(parameters, tensors[0][:, None])

        def squares(images):
            grads = torch.func.grad(of)(parameters, images)
            return sum(grad.square().sum() for grad in grads.values())

        return [*first.values(), *per_sample.values(), torch.func.grad(squares)(tensors[0])]

    def ordered(input, weight, bias, norm_weight, norm_bias):
        return plain(input, weight, bias, norm_weight, norm_bias)

    for found, expected in zip(everything(convnet_block), everything(ordered), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_compiled_as_one_graph():
    tensors = case(2, 5, 4, 6, 6)
    compiled = torch.compile(convnet_block, backend="aot_eager", fullgraph=True)
    for found, expected in zip(
        with_gradients(compiled, tensors), with_gradients(convnet_block, tensors), strict=True
    ):
        assert torch.equal(found, expected)


def test_autocast_keeps_the_dtypes():
    tensors = case(2, 3, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(convnet_block, tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, with_gradients(convnet_block, tensors), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(3, 8, 8)}, ValueError, r"input must be \[B, C, H, W\].*got \[3, 8, 8\]"),
        ({0: torch.zeros(2, 3, 1, 8)}, ValueError, "H and W at least 2"),
        ({0: torch.zeros(2, 3, 8, 8).long()}, TypeError, "must share one floating-point dtype"),
        ({1: torch.zeros(4, 2, 3, 3)}, ValueError, r"weight must be \[O, 3, 3, 3\], got \[4, 2, 3, 3\]"),
        ({1: torch.zeros(4, 3, 5, 5)}, ValueError, r"weight must be \[O, 3, 3, 3\]"),
        ({2: torch.zeros(5)}, ValueError, r"bias must be \[4\], got \[5\]"),
        ({3: torch.zeros(4).double()}, TypeError, "must share one floating-point dtype"),
        ({4: torch.zeros(1)}, ValueError, r"norm_bias must be \[4\], got \[1\]"),
    ],
)
def test_errors(change, error, message):
    tensors = [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(4, 3, 3, 3),
        torch.zeros(4),
        torch.zeros(4),
        torch.zeros(4),
    ]
    for place, tensor in change.items():
        tensors[place] = tensor
    with pytest.raises(error, match=message):
        convnet_block(*tensors)


@NATIVE
@pytest.mark.parametrize(
    "change",
    [
        {0: torch.zeros(2, 3, 8)},
        {1: torch.zeros(4, 2, 3, 3)},
        {2: torch.zeros(3)},
        {3: torch.zeros(4).double()},
    ],
)
def test_cpp_does_not_read_outside_arguments_that_skipped_the_face(change):
    tensors = [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(4, 3, 3, 3),
        torch.zeros(4),
        torch.zeros(4),
        torch.zeros(4),
    ]
    for place, tensor in change.items():
        tensors[place] = tensor
    with pytest.raises(RuntimeError, match="convnet_block: "):
        torch.ops.ddfast_native.convnet_block(*tensors, 1e-5, False)


@NATIVE
@pytest.mark.parametrize(("body", "lanes"), [("portable", 4), ("avx2", 8)])
def test_narrower_bodies(body, lanes):
    """In processes of their own, because which body runs is read once."""
    if torch.ops.ddfast_native.convnet_block_lanes() < lanes:
        lanes = torch.ops.ddfast_native.convnet_block_lanes()  # the CPU has no wider one
    tests = "error_is_at_most or neighbours or keeping or every_element or may_be_absent"
    program = (
        f"import pytest, torch, ddfast.ops; assert torch.ops.ddfast_native.convnet_block_lanes() == {lanes};"
        f"raise SystemExit(pytest.main(['-q', {__file__!r}, '-k', {tests!r}]))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", "import ddfast.ops._dispatch as d; d.native_status();" + program],
        env={**os.environ, "DDFAST_CPU_BODY": body, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-1000:]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    "shape", [(3, 7, 6, 5), (2, 32, 16, 16), (1, 16, 2, 2), (0, 4, 4, 4), (1, 5, 20, 37)]
)
def test_what_a_second_derivative_takes_from_the_maps_is_the_references(shape, given):
    batch, outputs, height, width = shape
    draws = torch.Generator().manual_seed(1)
    conv, mapped = (torch.randn(shape, generator=draws) for _ in range(2))
    grad = torch.randn(batch, outputs, height // 2, width // 2, generator=draws)
    mean, rstd = conv.mean((2, 3)), (conv.var((2, 3), correction=0) + 1e-5).rsqrt()
    vectors = [torch.randn(outputs, generator=draws) if given else None for _ in range(4)]
    arguments = (grad, conv, mapped, *vectors[:2], mean, rstd, *vectors[2:])
    exact = reference.convnet_block_curvature(*(t if t is None else t.double() for t in arguments))
    plain = reference.convnet_block_curvature(*arguments)
    found = torch.ops.ddfast.convnet_block_curvature(*arguments)
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        assert ours.shape == right.shape
        error, allowed = (ours - right).norm(), 2 * (theirs - right).norm()
        assert error <= allowed + 1e-7 * right.norm()
    torch.library.opcheck(torch.ops.ddfast.convnet_block_curvature.default, arguments)
