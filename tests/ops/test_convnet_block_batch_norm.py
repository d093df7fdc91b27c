import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from ddfast.ops import convnet_block_batch_norm, convnet_block_batch_norm_eval, reference
from ddfast.ops._convnet import differentiable_in_images
from tests.ops.test_convnet_block import NATIVE, case, squared_errors, with_gradients
from tests.ops.transforms import check_second, check_third, check_vmap

OP = torch.ops.ddfast.convnet_block_batch_norm.default
EVAL = torch.ops.ddfast.convnet_block_batch_norm_eval.default
BACKWARD = torch.ops.ddfast.convnet_block_batch_norm_backward.default
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
    (1, 33, 40, 40, 21),  # more tiles than a block holds, of one image
    (1, 6, 3, 2, 2),
]


def block(*arguments):
    return convnet_block_batch_norm(*arguments)[0]


def plain(input, weight, bias, norm_weight, norm_bias, eps=1e-5):
    conv = F.conv2d(input, weight, bias, padding=1)
    normal = F.batch_norm(conv, None, None, norm_weight, norm_bias, True, 0.1, eps)
    return F.avg_pool2d(normal.relu(), 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_four_layers(shape):
    tensors = case(*shape, dtype=torch.float64)
    for found, expected in zip(with_gradients(block, tensors), with_gradients(plain, tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(shape):
    """Over four draws, because the errors of one are few numbers where the maps are small."""
    ours, plains = torch.zeros(6), torch.zeros(6)
    for seed in range(4):
        tensors = case(*shape, seed=seed)
        exact = with_gradients(plain, [tensor.double() for tensor in tensors])
        ours += torch.tensor(squared_errors(with_gradients(block, tensors), exact))
        plains += torch.tensor(squared_errors(with_gradients(plain, tensors), exact))
    error, plain_error = ours.sqrt(), plains.sqrt()
    named = [0, 1, 2, 4, 5]  # without the gradient of bias: zero, where plain PyTorch has noise
    floor = torch.finfo(torch.float32).eps
    assert (error[named] <= (2 * plain_error[named]).clamp(min=2 * floor)).all(), (error, plain_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [3, 20])
def test_statistics_are_the_batchs(inputs, dtype):
    tensors = case(5, inputs, 33, 9, 7, dtype)
    wide = F.conv2d(*(tensor.double() for tensor in tensors[:3]), padding=1)
    _, mean, variance = convnet_block_batch_norm(*(t.requires_grad_() for t in tensors))
    assert not mean.requires_grad
    assert not variance.requires_grad
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance.double(), wide.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("inputs", [3, 20])
def test_a_mean_far_from_zero_costs_no_digits(inputs):
    input, weight, bias, *affine = case(3, inputs, 16, 8, 8)
    tensors = (input, weight, bias + 1000, *affine)
    exact = with_gradients(plain, [tensor.double() for tensor in tensors])
    error = squared_errors(with_gradients(block, tensors), exact)
    plain_error = squared_errors(with_gradients(plain, tensors), exact)
    assert all(error[k] <= 4 * plain_error[k] for k in (0, 1, 2, 4, 5))


def test_the_gradient_of_the_bias_is_zero():
    for dtype in (torch.float32, torch.float64):
        found = with_gradients(block, case(2, 3, 8, 6, 6, dtype))[3]
        assert torch.equal(found, torch.zeros(8, dtype=dtype))


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
        with_gradients(through(block), tensors), with_gradients(through(plain), tensors), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_normalised_in_float(dtype):
    tensors = case(2, 8, 16, 6, 7, dtype)
    conv = F.conv2d(*tensors[:3], padding=1).float()
    normal = F.batch_norm(conv, None, None, tensors[3].float(), tensors[4].float(), True)
    found, mean, variance = convnet_block_batch_norm(*tensors)
    expected = F.avg_pool2d(normal.relu(), 2).to(dtype)
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    assert mean.dtype == variance.dtype == torch.float32


@pytest.mark.parametrize("inputs", [3, 20])
def test_layouts_do_not_change_the_result(inputs):
    input, *parameters = case(3, inputs, 40, 9, 8)
    expected = with_gradients(block, (input, *parameters))
    for each in (
        input.contiguous(memory_format=torch.channels_last),
        torch.stack([input, input], -1)[..., 0],
        input.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        leaves = [tensor.detach().requires_grad_() for tensor in (each, *parameters)]
        output = block(*leaves)
        assert torch.equal(output, expected[0])
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).float()
        grads = torch.autograd.grad(output, leaves, grad.contiguous(memory_format=torch.channels_last))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected[1:], strict=True))


@NATIVE
@pytest.mark.parametrize("inputs", [3, 40])
def test_threads_do_not_change_the_result(inputs):
    tensors = case(21, inputs, 40, 9, 10)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(with_gradients(block, tensors))
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, found[0], strict=True))


@NATIVE
@pytest.mark.parametrize("inputs", [3, 20])
def test_every_element_is_written_and_nan_stays(inputs):
    input, *parameters = case(3, inputs, 33, 9, 7)
    poisoned = input.clone()
    poisoned[1, 0, 4, 4] = torch.nan
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        clean = with_gradients(block, (input, *parameters))
        kept = OP(input, *parameters, 1e-5)
        found, mean, variance = convnet_block_batch_norm(poisoned, *parameters)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(tensor.isnan().any() for tensor in (*clean, *kept))
    assert all(
        tensor.isnan().all() for tensor in (found, mean, variance)
    )  # it is in every channel's statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [3, 20])
def test_no_images(inputs, dtype):
    tensors = case(0, inputs, 8, 6, 5, dtype)
    output, mean, variance = convnet_block_batch_norm(*tensors)
    assert output.shape == (0, 8, 3, 2)
    assert mean.isnan().all()
    assert variance.isnan().all()


@pytest.mark.parametrize("shape", [(2, 2, 2, 2, 3), (1, 5, 2, 3, 2)])
def test_first_and_second_derivatives(shape):
    tensors = tuple(tensor.requires_grad_() for tensor in case(*shape, dtype=torch.float64))
    assert gradcheck(block, tensors)
    assert gradgradcheck(block, tensors)
    assert gradgradcheck(block, (*tensors[:2], None, None, None))


@pytest.mark.parametrize("parts", [(0,), (1,), (3,), (4,), (0, 1, 3, 4)])
@pytest.mark.parametrize("shape", [(2, 2, 3, 4, 5), (3, 5, 4, 6, 7)])
def test_second_derivative_is_plain_pytorchs(shape, parts):
    tensors = [tensor.requires_grad_() for tensor in case(*shape, dtype=torch.float64)]
    check_second(block, plain, tensors, parts)


def test_third_derivative_is_plain_pytorchs():
    check_third(block, plain, [tensor.requires_grad_() for tensor in case(2, 2, 3, 4, 5, torch.float64)])


@pytest.mark.parametrize("inputs", [3, 6])
@pytest.mark.parametrize("alone", [False, True])
def test_gradient_matching_in_float(inputs, alone):
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
    if alone:
        with differentiable_in_images():
            found = step(block, torch.float32)
    else:
        found = step(block, torch.float32)
    error, plain_error = ((t.double() - exact).norm() for t in (found, same))
    assert error <= max(2 * plain_error, 1e-5 * exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [3, 5])
def test_opcheck(inputs, dtype):
    tensors = case(2, inputs, 4, 5, 6, dtype)
    opcheck(OP, (*tensors, 1e-5))
    opcheck(OP, (*(tensor.clone().requires_grad_() for tensor in tensors), 1e-5))
    opcheck(OP, (tensors[0], tensors[1], None, None, None, 1e-5))
    pooled, *kept = OP(*tensors, 1e-5)
    opcheck(BACKWARD, (torch.ones_like(pooled), *tensors, *kept, 1e-5, True, True))
    opcheck(BACKWARD, (torch.ones_like(pooled), *tensors, *kept, 1e-5, False, False))


@pytest.mark.parametrize(
    "in_dims", [(0, None, None, None, None), (1, 0, None, 1, 0), (None, 0, None, None, None)]
)
def test_vmap(in_dims):
    check_vmap(convnet_block_batch_norm, case(2, 5, 4, 5, 6), in_dims)


@pytest.mark.parametrize("inputs", [3, 5])
def test_torch_func(inputs):
    tensors = case(3, inputs, 4, 6, 6, torch.float64)

    def first(function):
        return torch.func.grad(lambda *given: function(*given).square().sum(), (0, 1, 3, 4))(*tensors)

    for found, expected in zip(first(block), first(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_compiled_as_one_graph():
    tensors = case(2, 5, 4, 6, 6)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for found, expected in zip(
        with_gradients(compiled, tensors), with_gradients(block, tensors), strict=True
    ):
        assert torch.equal(found, expected)


def test_autocast_keeps_the_dtypes():
    tensors = case(2, 3, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(block, tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, with_gradients(block, tensors), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(3, 8, 8)}, ValueError, r"input must be \[B, C, H, W\].*got \[3, 8, 8\]"),
        ({0: torch.zeros(2, 3, 8, 8).long()}, TypeError, "must share one floating-point dtype"),
        ({1: torch.zeros(4, 2, 3, 3)}, ValueError, r"weight must be \[O, 3, 3, 3\], got \[4, 2, 3, 3\]"),
        ({4: torch.zeros(1)}, ValueError, r"norm_bias must be \[4\], got \[1\]"),
    ],
)
def test_errors(change, error, message):
    tensors = [torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3), *(torch.zeros(4) for _ in range(3))]
    for place, tensor in change.items():
        tensors[place] = tensor
    with pytest.raises(error, match=message):
        convnet_block_batch_norm(*tensors)


@NATIVE
def test_cpp_does_not_read_outside_arguments_that_skipped_the_face():
    tensors = case(2, 5, 4, 6, 6)
    native = torch.ops.ddfast_native
    for place, wrong in (
        (0, torch.zeros(2, 5, 6)),
        (0, torch.zeros(0, 5, 6, 6)),
        (1, torch.zeros(4, 2, 3, 3)),
        (2, torch.zeros(3)),
        (3, torch.zeros(4).double()),
    ):
        given = (*tensors[:place], wrong, *tensors[place + 1 :])
        with pytest.raises(RuntimeError, match="convnet_block"):
            native.convnet_block_batch_norm(*given, 1e-5)
    pooled, mean, variance, conv = native.convnet_block_batch_norm(*tensors, 1e-5)
    right = (torch.ones_like(pooled), *tensors, mean, variance, conv)
    for place, wrong in (
        (0, pooled[:1]),
        (6, mean[:1]),
        (7, variance.double()),
        (8, conv[:, :1]),
        (8, conv.new_empty(0)),
    ):
        given = (*right[:place], wrong, *right[place + 1 :])
        with pytest.raises(RuntimeError, match="convnet_block_batch_norm_backward: "):
            native.convnet_block_batch_norm_backward(*given, 1e-5, True, True)


@NATIVE
@pytest.mark.parametrize(("body", "lanes"), [("portable", 4), ("avx2", 8)])
def test_narrower_bodies(body, lanes):
    """In processes of their own, because which body runs is read once."""
    lanes = min(lanes, torch.ops.ddfast_native.convnet_block_lanes())  # the CPU may have no wider one
    some = "(error_is_at_most or eval_is) and (shape3 or shape7 or shape8)"
    tests = f"({some}) or threads_do or every_element or may_be_absent"
    program = (
        "import ddfast.ops._dispatch as d; d.native_status();"
        f"import pytest, torch; assert torch.ops.ddfast_native.convnet_block_lanes() == {lanes};"
        f"raise SystemExit(pytest.main(['-q', {__file__!r}, '-k', {tests!r}]))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "DDFAST_CPU_BODY": body, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-1000:]


def test_reference_and_backward_agree_on_what_is_kept():
    """Few input channels: the convolution is computed again."""
    for inputs, kept in ((4, (0,)), (5, (2, 3, 4, 6))):
        tensors = case(2, inputs, 3, 4, 6)
        assert OP(*tensors, 1e-5)[3].shape == kept
        assert reference.convnet_block_batch_norm(*tensors, 1e-5)[3].shape == kept


# --- eval mode


def with_statistics(*shape, dtype=torch.float32, seed=0):
    """Arguments of a block, and a mean and a variance that are not the batch's."""
    tensors = case(*shape, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(100 + seed)
    mean, variance = (torch.randn(shape[2], generator=generator, dtype=torch.float64) for _ in range(2))
    return *tensors, mean.to(dtype), (variance.abs() + 0.1).to(dtype)


def plain_eval(input, weight, bias, norm_weight, norm_bias, mean, variance, eps=1e-5):
    conv = F.conv2d(input, weight, bias, padding=1)
    return F.avg_pool2d(F.batch_norm(conv, mean, variance, norm_weight, norm_bias, False, 0.1, eps).relu(), 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_eval_is_the_four_layers(shape):
    wide = with_statistics(*shape, dtype=torch.float64)
    expected = plain_eval(*wide)
    torch.testing.assert_close(convnet_block_batch_norm_eval(*wide), expected, rtol=1e-10, atol=1e-10)
    tensors = with_statistics(*shape)
    error = (convnet_block_batch_norm_eval(*tensors).double() - expected).norm()
    plain_error = (plain_eval(*tensors).double() - expected).norm()
    assert error <= max(2 * plain_error, 2 * torch.finfo(torch.float32).eps * expected.norm())


@pytest.mark.parametrize("inputs", [3, 20])
def test_eval_takes_absent_parameters_any_layout_and_no_images(inputs):
    input, weight, _, _, _, mean, variance = with_statistics(2, inputs, 24, 9, 6)
    given = (weight, None, None, None, mean, variance)
    expected = convnet_block_batch_norm_eval(input, *given)
    torch.testing.assert_close(expected, plain_eval(input, *given), rtol=1e-4, atol=1e-5)
    turned = input.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(convnet_block_batch_norm_eval(turned, *given), expected)
    assert convnet_block_batch_norm_eval(input[:0], *given).shape == (0, 24, 4, 3)


@NATIVE
@pytest.mark.parametrize("inputs", [3, 40])
def test_neighbours_and_threads_do_not_change_eval(inputs):
    tensors = with_statistics(21, inputs, 40, 9, 10)
    together = convnet_block_batch_norm_eval(*tensors)
    before = torch.get_num_threads()
    try:
        for count, b in ((1, 0), (2, 7), (3, 20)):
            torch.set_num_threads(count)
            assert torch.equal(convnet_block_batch_norm_eval(*tensors), together)
            one = convnet_block_batch_norm_eval(tensors[0][b : b + 1], *tensors[1:])
            assert torch.equal(one, together[b : b + 1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [3, 5])
def test_eval_opcheck(inputs, dtype):
    arguments = (*with_statistics(2, inputs, 4, 5, 6, dtype=dtype), 1e-5)
    # It has no derivative, so there is none to be checked.
    opcheck(EVAL, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("in_dims", [(0, *[None] * 6), (1, 0, None, 1, 0, None, 0)])
def test_eval_vmap(in_dims):
    check_vmap(convnet_block_batch_norm_eval, with_statistics(2, 5, 4, 5, 6), in_dims)


def test_eval_has_no_backward_pass_and_refuses_statistics_that_do_not_fit():
    tensors = with_statistics(2, 3, 4, 5, 6)
    output = convnet_block_batch_norm_eval(tensors[0].clone().requires_grad_(), *tensors[1:])
    with pytest.raises(RuntimeError, match="has no backward pass"):
        output.sum().backward()
    with pytest.raises(TypeError, match=r"mean must be torch.float32, as input is, got torch.float64"):
        convnet_block_batch_norm_eval(*tensors[:5], tensors[5].double(), tensors[6])
    with pytest.raises(ValueError, match=r"variance must be \[4\], got \[3\]"):
        convnet_block_batch_norm_eval(*tensors[:6], tensors[6][:3])


@NATIVE
def test_eval_in_cpp_does_not_read_outside_arguments_that_skipped_the_face():
    tensors = with_statistics(2, 3, 4, 5, 6)
    for place, wrong in ((0, tensors[0][0]), (5, tensors[5][:1]), (6, tensors[6].double())):
        with pytest.raises(RuntimeError, match="convnet_block"):
            torch.ops.ddfast_native.convnet_block_batch_norm_eval(
                *tensors[:place], wrong, *tensors[place + 1 :], 1e-5
            )
