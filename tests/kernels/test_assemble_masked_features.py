import pytest
import torch

from ddfast.ops import reference
from tests.kernels.harness import WHERE, compile_ahead, run

LAUNCHER = "assemble_masked_features.assemble_masked_features"


def case(shape, count, players, classes, dtype, *, each=False, last=True):
    generator = torch.Generator().manual_seed(0)
    batch, channels, height, width = shape
    variants = torch.randn(batch, 2**classes, channels, height, width, generator=generator).to(dtype)
    if last:
        variants = variants.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    rows = (batch, count, players) if each else (count, players)
    coalitions = torch.rand(rows, generator=generator) < 0.5
    table = torch.randint(-1, players, (height, width, classes), generator=generator, dtype=torch.int32)
    return variants, coalitions, table


CASES = [
    *(
        case((2, 16, 5, 7), 6, 16, 4, dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    ),
    case((3, 32, 4, 4), 5, 9, 4, torch.float16, each=True),
    case((2, 3, 9, 5), 4, 4, 2, torch.float32, last=False),
    case((1, 130, 3, 2), 3, 12, 6, torch.float32),  # two slabs of channels, the second nearly empty
    case((1, 1, 1, 1), 1, 1, 1, torch.float32),
    case((1, 4, 3, 3), 1100, 16, 4, torch.float32),  # a program takes more than one coalition, the last fewer
    case((1, 8, 2, 2), 5, 36, 9, torch.float32),
]
EMPTY = [
    case((0, 16, 4, 4), 3, 16, 4, torch.float32),
    case((2, 16, 4, 4), 0, 16, 4, torch.float32),
    case((2, 0, 4, 4), 3, 16, 4, torch.float32),
]


@pytest.mark.parametrize("where", WHERE)
def test_has_the_bits_of_the_reference(where):
    cases = [*CASES, *EMPTY]
    for arguments, assembled in zip(cases, run(LAUNCHER, cases, where=where), strict=True):
        expected = reference.assemble_masked_features(*arguments)
        assert assembled.dtype == expected.dtype
        assert assembled.stride() == expected.stride()
        assert torch.equal(assembled, expected)


def test_compiles_for_every_gpu_with_wide_accesses_and_no_spills():
    cases = [
        case((2, 64, 14, 14), 31, 16, 4, torch.bfloat16),
        case((2, 128, 28, 28), 31, 16, 4, torch.float16, each=True),
        case((2, 64, 14, 14), 31, 16, 4, torch.float32),
        case((1, 16, 5, 5), 31, 16, 9, torch.bfloat16),
        case((2, 3, 13, 17), 5, 16, 4, torch.float32),  # three channels: narrow accesses, the same result
    ]
    binaries = compile_ahead(LAUNCHER, cases)
    assert all(binary.spilled_bytes == 0 for binary in binaries)
    for binary in binaries:
        assert set(binary.store_bytes) == ({16} if binary.case < 4 else {4})
        if binary.case < 4:
            assert max(binary.load_bytes) == 16
