import pytest
import torch

from ddfast.ops import reference
from tests.kernels.harness import WHERE, compile_ahead, run

LAUNCHER = "masked_batch.masked_batch"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def case(shape, count, grid, dtype, *, image_dtype=torch.uint8, form=1, each=False, layout=None, plain=False):
    generator = torch.Generator().manual_seed(0)
    batch, channels, *_ = shape
    images = (torch.rand(shape, generator=generator) * 255).to(image_dtype)
    if layout is not None:
        images = images.contiguous(memory_format=layout)
    players = grid[0] * grid[1]
    coalitions = torch.rand((batch, count, players) if each else (count, players), generator=generator) < 0.5
    baseline = torch.randn((channels,) if form == 1 else shape[-form:], generator=generator)
    mean, std = (None, None) if plain else (MEAN[:channels], STD[:channels])
    return images, coalitions, baseline, mean, std, *grid, dtype


CASES = [
    *(case((2, 3, 13, 17), 5, (3, 4), torch.float32, image_dtype=dtype) for dtype in IMAGE_DTYPES),
    *(case((2, 3, 13, 17), 5, (3, 4), torch.float16, image_dtype=dtype) for dtype in IMAGE_DTYPES),
    *(case((2, 3, 8, 6), 3, (2, 2), torch.float64, image_dtype=dtype) for dtype in IMAGE_DTYPES),
    # Baselines and coalitions of every form, more than one tile an image.
    case((3, 3, 20, 21), 4, (4, 4), torch.float32, form=3, each=True),
    case((3, 3, 20, 21), 4, (4, 4), torch.float16, form=4, layout=torch.channels_last),
    # Other channel counts, sizes of one, no normalisation, only half of it.
    case((2, 1, 5, 5), 3, (5, 5), torch.float32),
    case((1, 4, 1, 1), 1, (1, 1), torch.float32, image_dtype=torch.float32, plain=True),
    (*case((1, 3, 9, 4), 2, (9, 1), torch.float32)[:3], MEAN, None, 9, 1, torch.float32),
    (*case((1, 3, 9, 4), 2, (9, 1), torch.float32)[:3], None, STD, 9, 1, torch.float32),
    # So many coalitions that a program takes more than one, and the last one fewer.
    case((3, 1, 2, 2), 343, (1, 2), torch.float32),
]


def strided():
    images, coalitions, baseline, *rest = case((4, 6, 14, 18), 8, (4, 3), torch.float32, form=4)
    baseline = baseline.half()
    return (
        images[::2, 1::2, 1:, :-1].transpose(2, 3),
        coalitions[::2].mT.contiguous().mT,
        baseline[1::2, ::2, :-1, 1:].transpose(2, 3),
        MEAN,
        STD,
        *rest[2:],
    )


BFLOAT16 = [case((2, 3, 13, 17), 5, (3, 4), torch.bfloat16, image_dtype=dtype) for dtype in IMAGE_DTYPES]

EMPTY = [
    case((0, 3, 8, 8), 4, (2, 2), torch.float32),
    case((2, 3, 8, 8), 0, (2, 2), torch.float32),
    case((2, 0, 8, 8), 3, (2, 2), torch.float32, plain=True),
]


@pytest.mark.parametrize("where", WHERE)
def test_has_the_bits_of_the_reference(where):
    cases = [*CASES, strided(), *BFLOAT16, *EMPTY]
    for arguments, masked in zip(cases, run(LAUNCHER, cases, where=where), strict=True):
        expected = reference.masked_batch(*arguments)
        assert masked.dtype == expected.dtype
        assert masked.shape == expected.shape
        assert masked.stride() == expected.stride()
        if masked.dtype == torch.bfloat16 and where == "interpreter":
            # The interpreter cuts float32 off to bfloat16 where a GPU rounds.
            torch.testing.assert_close(masked, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(masked, expected)


def test_compiles_for_every_gpu_with_wide_stores_and_no_spills():
    last = torch.channels_last
    cases = [
        case((2, 3, 224, 224), 32, (4, 4), torch.bfloat16),
        case((2, 3, 224, 224), 32, (4, 4), torch.float32),
        case((2, 3, 32, 32), 32, (4, 4), torch.float64, image_dtype=torch.float64, form=4, each=True),
        case((2, 3, 224, 224), 32, (4, 4), torch.float16, layout=last),
        case((2, 3, 224, 224), 32, (4, 4), torch.float32, image_dtype=torch.float32, layout=last, plain=True),
        case((2, 3, 13, 17), 5, (4, 4), torch.float32),  # no multiple of 16: narrow stores, the same result
    ]
    binaries = compile_ahead(LAUNCHER, cases)
    assert all(binary.spilled_bytes == 0 for binary in binaries)
    for binary in binaries:
        assert set(binary.store_bytes) == ({16} if binary.case < 5 else {4})
        assert " fma." not in binary.ptx
        if binary.case == 3:
            assert max(binary.load_bytes) == 8  # a thread's 8 pixels of uint8
        if binary.case == 4:
            assert max(binary.load_bytes) == 16
