import pytest
import torch

from ddfast.ops import reference
from tests.kernels.harness import WHERE, compile_each, run_each
from tests.ops.augmented import OPERATIONS, rows_of

FORWARD = "siamese_augment.siamese_augment"
BACKWARD = "siamese_augment.siamese_augment_backward"
TOLERANCE = {
    torch.float16: 2**-9,
    torch.bfloat16: 2**-6,  # the interpreter cuts bfloat16 off where a GPU rounds
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}


def case(operation, shape, dtype=torch.float32, *, rows=2, seed=0, layout=None):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout is not None:
        images = images.contiguous(memory_format=layout)
    return images, rows_of(operation, rows, shape[2:], seed).to(reference.accumulation_dtype(dtype))


CASES = [
    *(case(operation, (4, 3, 7, 9), seed=seed) for seed, operation in enumerate(OPERATIONS)),
    *(case("everything", (2, 3, 6, 5), dtype) for dtype in TOLERANCE),
    case("everything", (3, 1, 5, 8), rows=1),
    case("everything", (2, 5, 4, 3), torch.float64),
    case("everything", (2, 3, 6, 5), layout=torch.channels_last),
    # More than one step of a program, and more than one program.
    case("everything", (1, 3, 40, 20), rows=1),
    *(case(operation, (2, 1, 66, 63), rows=2) for operation in ("color_crop_cutout", "flip")),
    case("everything", (2, 1, 1, 1)),
    case("everything", (2, 3, 1, 4)),
    case("color_crop", (1, 70, 3, 3), rows=1),  # channels for the reference
    case("flip", (0, 3, 4, 4), rows=1),
    case("flip", (2, 0, 4, 4)),
]


def nonsense():
    """Parameters that only a GPU lets pass: shifts past the numbers of an image, maps that are none."""
    rows = rows_of("everything", 6, (4, 4)).float()
    rows[0, 4:6] = torch.tensor([2.0**30, -(2.0**30)])
    rows[1, 6:12] = torch.nan
    rows[2, 6:12] = 1e30
    rows[3, 12:] = torch.tensor([-(2.0**30), -(2.0**30), 2.0**30, 2.0**30])
    rows[4, 6:12] = 0
    return torch.ones(6, 1, 4, 4), rows


@pytest.mark.parametrize("where", WHERE)
def test_agrees_with_the_reference_and_reads_nothing_outside(where):
    calls = [(FORWARD, (*arguments, linear)) for arguments in CASES for linear in (False, True)]
    calls += [(BACKWARD, arguments) for arguments in CASES]
    last = [(FORWARD, (*nonsense(), True)), (BACKWARD, nonsense())]
    *results, forward, backward = run_each([*calls, *last], where=where)
    for (launcher, arguments), found in zip(calls, results, strict=True):
        wanted = getattr(reference, launcher.split(".")[1])(*arguments)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.stride() == wanted.stride() or 0 in found.shape
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE[found.dtype] * max(1.0, largest))
    assert not forward[[0, 3]].any()
    assert not backward[3].any()
    assert forward[5].isfinite().all()
    assert backward[5].isfinite().all()


def test_compiles_for_every_gpu_with_wide_stores_and_no_spills():
    calls = []
    # A program an image, and several beside its mean.
    for dtype, side in ((torch.float32, 32), (torch.bfloat16, 32), (torch.float64, 128)):
        arguments = case("everything", (4, 3, side, side), dtype)
        calls += [(FORWARD, (*arguments, False)), (BACKWARD, arguments)]
    for binary in compile_each(calls):
        assert binary.spilled_bytes == 0
        if binary.kernel != "_means":
            assert max(binary.store_bytes) == 16
