import re

import pytest
import torch
from torch.nn import functional

from ddfast.ops import reference
from tests.kernels.harness import WHERE, compile_ahead, run

LINEAR, CONV2D, NORM, EMBEDDING = (
    f"grad_sq_norm.grad_sq_norm_{layer}" for layer in ("linear", "conv2d", "norm", "embedding")
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def random(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear_case(dtype, lead, inputs, outputs, bias=True):
    return random((*lead, inputs), dtype), random((*lead, outputs), dtype, 1), bias


def conv2d_case(
    dtype, shape, outputs, kernel, stride=1, padding=0, dilation=1, groups=1, bias=True, layout=None
):
    images = random(shape, dtype)
    weight = torch.zeros(outputs, shape[1] // groups, *kernel)
    geometry = [v if isinstance(v, tuple) else (v, v) for v in (stride, padding, dilation)]
    made = functional.conv2d(images.float(), weight, None, *geometry, groups)
    grads = random(made.shape, dtype, 1)
    if layout is not None:
        images, grads = (x.contiguous(memory_format=layout) for x in (images, grads))
    return images, grads, kernel, *geometry, groups, bias


def norm_case(dtype, shape, dims, weight=True, bias=True):
    return random(shape, dtype), random(shape, dtype, 1), *dims, weight, bias


def embedding_case(dtype, lead, rows, width, padding_idx=-1):
    indices = torch.randint(0, rows, lead, generator=torch.Generator().manual_seed(2))
    return indices, random((*lead, width), dtype), padding_idx


def double(argument):
    return (
        argument.double() if isinstance(argument, torch.Tensor) and argument.is_floating_point() else argument
    )


def assert_agrees(launcher, cases, where):
    body = getattr(reference, launcher.split(".")[1])
    if where == "interpreter":  # its matrix product takes the bits of bfloat16 for integers
        cases = [case for case in cases if case[1].dtype != torch.bfloat16]
    for arguments, norms in zip(cases, run(launcher, cases, where=where), strict=True):
        dtype = arguments[1].dtype
        exact = body(*map(double, arguments))
        assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(norms.double(), exact, rtol=tolerance, atol=0)


@pytest.mark.parametrize("where", WHERE)
def test_linear(where):
    cases = [
        *(linear_case(dtype, (3, 5), 20, 18) for dtype in DTYPES),  # Gram
        *(linear_case(dtype, (2, 40), 20, 18) for dtype in DTYPES),  # direct
        linear_case(torch.float32, (3,), 33, 17),
        linear_case(torch.float32, (3,), 33, 17, bias=False),
        linear_case(torch.float32, (2, 2, 20), 70, 40, bias=False),
        linear_case(torch.float32, (2, 70), 200, 190),  # Gram of more than one tile
        linear_case(torch.float32, (0, 4), 3, 2),
        linear_case(torch.float32, (2, 0), 3, 2),
        linear_case(torch.float32, (2, 4), 0, 3),  # a bias alone
        linear_case(torch.float32, (2,), 0, 3),
        linear_case(torch.float16, (2,), 1100, 1030),
    ]
    strided = random((4, 12, 50), torch.float32)[::2, :, ::2].transpose(1, 2)
    cases.append((strided, random((2, 25, 9), torch.float32, 1), True))
    assert_agrees(LINEAR, cases, where)


@pytest.mark.parametrize("where", WHERE)
def test_conv2d(where):
    last = torch.channels_last
    cases = [
        *(conv2d_case(dtype, (2, 3, 9, 8), 5, (3, 3), padding=1) for dtype in DTYPES),
        conv2d_case(torch.float32, (2, 4, 9, 11), 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2, layout=last),
        conv2d_case(torch.float32, (2, 6, 7, 7), 6, (3, 3), padding=1, groups=6, bias=False),
        conv2d_case(torch.float32, (2, 1, 7, 6), 1, (3, 2), bias=False),  # one channel in and out
        conv2d_case(torch.float32, (1, 2, 5, 6), 3, (5, 5), 3, 4, 2),
        conv2d_case(torch.float32, (2, 20, 3, 3), 24, (3, 3), padding=1),  # Gram
        conv2d_case(torch.float32, (2, 20, 4, 4), 40, (3, 3), padding=1, groups=2, layout=last),
        conv2d_case(torch.float16, (2, 20, 4, 4), 40, (3, 3), padding=1, layout=last),
        conv2d_case(torch.float32, (0, 3, 5, 5), 2, (1, 1)),
        conv2d_case(torch.float32, (2, 20, 6, 5), 18, (1, 1), bias=False),  # one tap, whose pixels lie flat
        conv2d_case(torch.float32, (2, 20, 6, 5), 18, (1, 1), layout=last),
        conv2d_case(torch.float32, (2, 20, 7, 5), 18, (1, 1), 2, layout=last),
        conv2d_case(
            torch.float32, (2, 20, 6, 7), 18, (3, 2), (2, 1), (1, 0), (1, 2)
        ),  # tap by tap, two blocks
        conv2d_case(torch.float16, (1, 40, 6, 5), 70, (2, 2), groups=2, padding=1),  # more than one tile
        conv2d_case(torch.float32, (2, 3, 6, 6), 80, (3, 3), stride=3),  # Gram of a few channels
        conv2d_case(torch.float32, (1, 80, 9, 9), 90, (3, 3), padding=1),  # Gram of more than one tile
        conv2d_case(torch.float32, (2, 3, 20, 17), 40, (7, 7), 2, 3, bias=False, layout=last),  # rows of 21
        conv2d_case(torch.float32, (2, 3, 20, 17), 40, (7, 7), 2, 3),
        conv2d_case(torch.float16, (2, 3, 19, 14), 18, (7, 5), (1, 3), (4, 1), (1, 2), layout=last),
        conv2d_case(torch.float32, (2, 4, 8, 8), 18, (2, 2), layout=last),  # the bias begins a tile
        conv2d_case(torch.float32, (2, 3, 6, 6), 80, (3, 3), stride=3, bias=False),
        conv2d_case(torch.float32, (3, 3, 1, 9), 5, (3, 3), padding=1),
    ]
    assert_agrees(CONV2D, cases, where)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_without_channels_the_bias_alone_has_a_norm(layout):
    launchers = pytest.importorskip("ddfast.kernels.grad_sq_norm")
    grads = random((2, 3, 4, 5), torch.float32).contiguous(memory_format=layout)
    found = launchers.grad_sq_norm_conv2d(
        torch.empty(2, 0, 4, 5), grads, (1, 1), (1, 1), (0, 0), (1, 1), 1, True
    )
    torch.testing.assert_close(found, grads.sum((2, 3)).square().sum(1))


@pytest.mark.parametrize("where", WHERE)
def test_norm(where):
    cases = [
        *(norm_case(dtype, (3, 20, 5, 6), (1, 1)) for dtype in DTYPES),
        *(norm_case(dtype, (3, 7, 70), (2, 2)) for dtype in DTYPES),
        norm_case(torch.float32, (2, 17), (1, 1), bias=False),
        norm_case(torch.float32, (2, 3, 4, 5), (2, 3), weight=False),
        norm_case(torch.float32, (0, 3, 4), (1, 1)),
        norm_case(torch.float32, (2, 3, 0), (1, 1)),
    ]
    normalized, grads, *rest = norm_case(torch.float32, (2, 20, 5, 6), (1, 1))
    cases.append((normalized.contiguous(memory_format=torch.channels_last), grads, *rest))
    assert_agrees(NORM, cases, where)


@pytest.mark.parametrize("where", WHERE)
def test_embedding(where):
    cases = [
        *(embedding_case(dtype, (3, 40), 7, 20) for dtype in DTYPES),
        embedding_case(torch.float32, (2, 3, 4), 5, 9, padding_idx=2),
        embedding_case(torch.float32, (2,), 5, 9),
        embedding_case(torch.float32, (2, 0), 5, 9),
        embedding_case(torch.float32, (0, 3), 5, 9),
    ]
    assert_agrees(EMBEDDING, cases, where)


def matrix_instructions(ptx):
    return set(re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[.\w:]*", ptx))


def test_compiles_for_every_gpu_on_matrix_units_without_spills():
    operands = {
        torch.float16: r"f16\.f16",
        torch.bfloat16: r"bf16\.bf16",
        torch.float32: r"tf32\.tf32",  # three for each product
        torch.float64: r"f64\.f64",
    }
    last = torch.channels_last
    cases = [
        *(conv2d_case(dtype, (4, 64, 28, 28), 64, (3, 3), padding=1) for dtype in DTYPES),  # direct
        *(
            conv2d_case(dtype, (8, 256, 7, 7), 256, (3, 3), padding=1, layout=last) for dtype in DTYPES[1:3]
        ),  # Gram
    ]
    kernels = set()
    for binary in compile_ahead(CONV2D, cases):
        kernels.add(binary.kernel)
        assert binary.spilled_bytes == 0
        used = matrix_instructions(binary.ptx)
        assert used
        assert all(re.search(operands[cases[binary.case][0].dtype], instruction) for instruction in used)
    assert kernels == {"_direct", "_gram"}
    for binary in compile_ahead(EMBEDDING, [embedding_case(torch.float32, (3, 40), 7, 64)]):
        assert binary.spilled_bytes == 0
        assert matrix_instructions(binary.ptx)


def test_the_largest_tiles_compile_for_every_gpu_without_spills():
    """Those of whole micro-batches, whose shapes alone are looked at."""
    cases = []
    for dtype, channels, outputs, side, kernel in (
        (torch.float32, 128, 128, 28, 3),
        (torch.float32, 256, 256, 14, 3),
        (torch.bfloat16, 2048, 512, 7, 1),
    ):
        x, g = (
            torch.empty(640, size, side, side, dtype=dtype, device="meta").to(
                memory_format=torch.channels_last
            )
            for size in (channels, outputs)
        )
        cases.append((x, g, (kernel, kernel), (1, 1), (kernel // 2,) * 2, (1, 1), 1, True))
    for binary in compile_ahead(CONV2D, cases):
        assert binary.spilled_bytes == 0, (binary.kernel, binary.capability, binary.case)
        assert matrix_instructions(binary.ptx)


def test_a_stem_compiles_for_every_gpu_without_spills():
    last = torch.channels_last
    cases = [
        conv2d_case(dtype, (16, 3, *size), outputs, kernel, stride, padding, bias=bias, layout=last)
        for dtype in (torch.bfloat16, torch.float32)
        for size, outputs, kernel, stride, padding, bias in (
            ((112, 112), 64, (7, 7), 2, 3, False),
            ((32, 32), 128, (3, 3), 1, 1, True),
        )
    ]
    for binary in compile_ahead(CONV2D, cases):
        assert binary.kernel == "_direct"
        assert binary.spilled_bytes == 0
        assert matrix_instructions(binary.ptx)


@pytest.mark.parametrize(
    ("channels", "kernel", "samples"),
    [
        (3, (7, 7), 1024),
        (3, (7, 7), 32),
        (3, (5, 5), 256),
        (3, (3, 3), 256),
        (1, (7, 7), 256),
        (4, (4, 4), 256),
    ],
)
def test_three_quarters_of_a_stems_multiplications_are_useful(channels, kernel, samples):
    launchers = pytest.importorskip("ddfast.kernels.grad_sq_norm")
    features = channels * kernel[0] * kernel[1]
    _, tiles, constants = launchers.blocks(samples, 1024, channels, 64, kernel, 1, False, torch.float32)
    assert features * 64 >= 0.75 * tiles * constants["BLOCK_O"] * constants["BLOCK_I"]


def test_channels_are_loaded_16_bytes_at_a_time():
    cases = [
        conv2d_case(dtype, shape, shape[1], (3, 3), padding=1, bias=False, layout=layout)
        for dtype in (torch.bfloat16, torch.float32)
        for shape in ((16, 64, 28, 28), (8, 256, 7, 7))
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    for binary in compile_ahead(CONV2D, cases):
        assert max(binary.load_bytes) == 16
        if cases[binary.case][0].dtype == torch.bfloat16:
            # float32 is copied to shared memory turned round where the matrix units ask for it, 4 bytes at a time
            assert min(binary.load_bytes) == 16


def test_norm_compiles_for_every_gpu_with_wide_loads_and_no_spills():
    cases = [
        norm_case(torch.float32, (4, 64, 28, 28), (1, 1)),
        norm_case(torch.float16, (4, 64, 256), (2, 2)),
    ]
    for binary in compile_ahead(NORM, cases):
        assert binary.spilled_bytes == 0
        assert max(binary.load_bytes) == 16


def test_samples_beyond_32_bit_offsets_are_refused():
    launchers = pytest.importorskip("ddfast.kernels.grad_sq_norm")
    large = torch.empty((1, 3, 2**15, 2**15), device="meta")
    grads = torch.empty((1, 2, 2**15, 2**15), device="meta")
    with pytest.raises(
        ValueError, match=r"a sample must have fewer than 2\^31 elements, got \[32768, 32768, 3\]"
    ):
        launchers.grad_sq_norm_conv2d(large, grads, (1, 1), (1, 1), (0, 0), (1, 1), 1, True)
