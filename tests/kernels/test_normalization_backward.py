import pytest
import torch

from ddfast.ops import reference
from tests.kernels.harness import WHERE, compile_ahead, run

LAUNCHER = "normalization_backward.normalization_backward"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAST = torch.channels_last


def case(dtype, shape, groups=None, *, weight=True, weight_norm=True, bias_norm=True, layout=None):
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    if layout is not None:
        x = x.contiguous(memory_format=layout)
    sums = reference.accumulation_dtype(dtype)
    statistics = (shape[1],) if groups is None else (shape[0], groups)
    mean = torch.randn(statistics, generator=generator, dtype=sums)
    rstd = torch.rand(statistics, generator=generator, dtype=sums) + 0.5
    factor = torch.randn(shape[1], generator=generator, dtype=sums) if weight else None
    return x, g, mean, rstd, factor, weight_norm, bias_norm


@pytest.mark.parametrize("where", WHERE)
def test_agrees_with_the_reference(where):
    cases = [
        *(case(dtype, (3, 20, 5, 6)) for dtype in DTYPES),
        *(case(dtype, (2, 20, 5, 6), 5, layout=LAST) for dtype in DTYPES),
        case(torch.float32, (2, 70, 9, 7), layout=LAST, weight=False),
        case(torch.float32, (2, 6, 40, 41), 3),  # a channel's positions go to several programs
        case(torch.float32, (1, 6, 40, 41), layout=LAST, bias_norm=False),
        case(torch.float32, (2, 17), weight_norm=False),
        case(torch.float32, (2, 4, 9), 4, weight=False),
        case(torch.float32, (0, 3, 4)),
        case(torch.float32, (2, 3, 0), 3),
    ]
    if where == "interpreter":  # its arithmetic on bfloat16 is wrong
        cases = [each for each in cases if each[0].dtype != torch.bfloat16]
    for arguments, (grad_input, norms) in zip(cases, run(LAUNCHER, cases, where=where), strict=True):
        dtype = arguments[0].dtype
        exact_input, exact_norms = reference.normalization_backward(
            *(a.double() if isinstance(a, torch.Tensor) else a for a in arguments)
        )
        assert (grad_input.dtype, norms.dtype) == (dtype, reference.accumulation_dtype(dtype))
        assert grad_input.stride() == exact_input.stride()
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
        torch.testing.assert_close(grad_input.double(), exact_input, rtol=tolerance, atol=tolerance)
        rtol = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(norms.double(), exact_norms, rtol=rtol, atol=0)


def test_compiles_for_every_gpu_with_wide_accesses_and_no_spills():
    cases = [
        case(torch.float32, (4, 64, 28, 28)),
        case(torch.float16, (4, 64, 28, 28), layout=LAST),
        case(torch.float32, (4, 64, 28, 28), 32),
    ]
    widest_store = {}
    for binary in compile_ahead(LAUNCHER, cases):
        assert binary.spilled_bytes == 0
        if binary.kernel == "_finish":  # adds up what the others leave in L2
            continue
        assert max(binary.load_bytes) == 16
        key = (binary.case, binary.capability)  # one launch or two; the one that writes the gradient
        widest_store[key] = max([widest_store.get(key, 0), *binary.store_bytes])
    assert set(widest_store.values()) == {16}
