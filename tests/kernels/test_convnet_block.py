import pytest
import torch

from ddfast.ops import reference
from tests.kernels.harness import WHERE, compile_ahead, run

FORWARD = "convnet_block.convnet_block"
BACKWARD = "convnet_block.convnet_block_backward"
PARAMETERS = ("bias", "norm_weight", "norm_bias")


def case(dtype, shape, *, keep=True, absent=()):
    images, inputs, outputs, height, width = shape
    generator = torch.Generator().manual_seed(0)

    def numbers(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    weight = numbers(outputs, inputs, 3, 3) * (2 / 9 / inputs) ** 0.5
    vectors = [None if name in absent else numbers(outputs) for name in PARAMETERS]
    return numbers(images, inputs, height, width), weight, *vectors, 1e-5, keep


def in_double(values):
    return [value.double() if isinstance(value, torch.Tensor) else value for value in values]


def backward_case(arguments, to_input=True, to_weight=True):
    """The backward pass's arguments after the reference's forward pass."""
    *tensors, eps, keep = arguments
    pooled, *rest = reference.convnet_block(*tensors, eps, keep)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(pooled.shape, generator=generator, dtype=torch.float64).to(pooled.dtype)
    return grad, *tensors, *rest, eps, to_input, to_weight


def agree(found, exact, dtype):
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 8 * torch.finfo(dtype).eps)
    assert (found.shape, found.stride()) == (exact.shape, exact.stride())
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


CASES = [
    *(case(dtype, (2, 3, 40, 8, 8)) for dtype in (torch.float32, torch.float64, torch.float16)),
    case(torch.float32, (2, 5, 33, 7, 9), keep=False),
    case(torch.float32, (3, 2, 5, 3, 2), absent=PARAMETERS),
    case(torch.float32, (2, 1, 4, 2, 2), absent=PARAMETERS[1:2]),
    case(torch.float32, (1, 2, 8, 90, 71)),  # more than the registers hold
    case(torch.float32, (0, 3, 4, 6, 6)),
]


@pytest.mark.parametrize("where", WHERE)
def test_forward_agrees_with_the_reference(where):
    for arguments, found in zip(CASES, run(FORWARD, CASES, where=where), strict=True):
        dtype = arguments[0].dtype
        exact = reference.convnet_block(*in_double(arguments))
        for one, other in zip(found, exact, strict=True):
            agree(one, other, dtype)
        assert [tensor.dtype for tensor in found[1:3]] == [reference.accumulation_dtype(dtype)] * 2


@pytest.mark.parametrize("where", WHERE)
def test_backward_agrees_with_the_reference(where):
    cases = [backward_case(arguments) for arguments in CASES]
    cases += [backward_case(CASES[0], to_input=False), backward_case(CASES[0], to_weight=False)]
    for arguments, found in zip(cases, run(BACKWARD, cases, where=where), strict=True):
        exact = reference.convnet_block_backward(*in_double(arguments))
        for one, other in zip(found, exact, strict=True):
            agree(one, other, arguments[0].dtype)


def test_compile_for_every_gpu_with_wide_accesses_and_no_spills():
    cases = [
        case(torch.float32, (4, 3, 128, 32, 32)),
        case(torch.float32, (4, 8, 128, 16, 16)),
        case(torch.bfloat16, (4, 3, 128, 32, 32)),
        case(torch.float32, (2, 3, 128, 64, 64)),
        case(torch.float32, (2, 3, 128, 112, 112)),
    ]
    for launcher, given in ((FORWARD, cases), (BACKWARD, [backward_case(each) for each in cases])):
        for binary in compile_ahead(launcher, given):
            assert binary.spilled_bytes == 0, (launcher, binary)
            assert max(binary.load_bytes) == 16, (launcher, binary)
            assert max(binary.store_bytes) == 16, (launcher, binary)
