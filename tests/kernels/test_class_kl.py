import pytest
import torch

from ddfast.ops import reference
from tests.kernels.harness import WHERE, compile_ahead, run

LAUNCHER = "class_kl.class_kl"


def case(dtype, rows, width, classes, by_class=False):
    generator = torch.Generator().manual_seed(0)
    features = 2 * torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    _, members, counts = labels.unique(return_inverse=True, return_counts=True)
    return features, members, counts, by_class


@pytest.mark.parametrize("where", WHERE)
def test_agrees_with_the_reference(where):
    cases = [
        case(torch.float64, 9, 5, 3),
        case(torch.float32, 30, 129, 4, True),
        case(torch.float16, 12, 64, 2),
        case(torch.float32, 3, 1, 2),
        case(torch.float32, 2, 9000, 1),  # wider than a program
        case(torch.float32, 300, 3, 150, True),  # more rows and classes than are looked at in one step
        case(torch.float16, 70, 600, 3),
        case(torch.float32, 1, 7, 1),
    ]
    cases[1][0][:, 7] = -500  # a probability that is 0
    cases[3][0][:] = 3
    for arguments, (value, gradient) in zip(cases, run(LAUNCHER, cases, where=where), strict=True):
        features, *rest = arguments
        exact, exact_gradient = reference.class_kl(features.double(), *rest)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(features.dtype, 1e-3)
        torch.testing.assert_close(value.double(), exact, rtol=tolerance, atol=1e-6)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=tolerance, atol=1e-6)
        assert (value.dtype, gradient.dtype) == (reference.accumulation_dtype(features.dtype), features.dtype)


def test_compiles_for_every_gpu_with_wide_accesses_and_no_spills():
    cases = [
        case(torch.float32, 64, 512, 10),
        case(torch.bfloat16, 64, 2048, 10),
        case(torch.float32, 16, 8192, 2),
    ]
    for binary in compile_ahead(LAUNCHER, cases):
        assert binary.spilled_bytes == 0
        assert max(binary.load_bytes) == 16
        assert max(binary.store_bytes) == 16
