import pytest
import torch

from ddfast.ops import reference
from tests.kernels.harness import WHERE, compile_ahead, run
from tests.ops.boxes import random_boxes

FORWARD = "crop_resize.crop_resize"
BACKWARD = "crop_resize.crop_resize_backward"
BATCH = "crop_resize.crop_batch"
DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
TOLERANCE = {
    torch.float16: {"rtol": 2**-10, "atol": 2**-10},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},  # the interpreter cuts bfloat16 off where a GPU rounds
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}


def forward_case(dtype, tiles, height, width, factor, *, shape=(3, 2, 8, 11), whole_pixels=True, layout=None):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape, generator=generator)
    images = (images * 255).to(dtype) if dtype == torch.uint8 else images.to(dtype)
    if layout is not None:
        images = images.contiguous(memory_format=layout)
    boxes = random_boxes(tiles, *shape[2:], whole_pixels=whole_pixels, least=3)
    source = torch.randint(0, max(shape[0], 1), (tiles,), generator=generator)
    return images, boxes, source, height, width, factor


def backward_case(dtype, tiles, height, width, factor, *, shape=(3, 2, 8, 11), whole_pixels=True):
    forward = forward_case(
        torch.float32, tiles, height, width, factor, shape=shape, whole_pixels=whole_pixels
    )
    _, boxes, source, *_ = forward
    generator = torch.Generator().manual_seed(1)
    mosaics = (tiles // factor**2, shape[1], factor * height, factor * width)
    grad = torch.randn(mosaics, generator=generator, dtype=torch.float64).to(dtype)
    return grad, boxes, source, shape[0], *shape[2:], factor


@pytest.mark.parametrize("where", WHERE)
def test_forward_agrees_with_the_reference(where):
    cases = [
        *(forward_case(dtype, 4, 5, 7, 2) for dtype in DTYPES),
        *(forward_case(dtype, 4, 5, 7, 2, whole_pixels=False) for dtype in DTYPES),
        # More than one block of a tile, images in other layouts, one pixel, no tiles and no channels.
        forward_case(torch.float32, 2, 9, 70, 1, layout=torch.channels_last),
        forward_case(torch.uint8, 2, 16, 16, 1, layout=torch.channels_last, whole_pixels=False),
        forward_case(torch.float32, 3, 1, 1, 1),
        forward_case(torch.float32, 0, 4, 4, 1),
        forward_case(torch.float32, 2, 4, 4, 1, shape=(2, 0, 5, 5)),
    ]
    strided = torch.rand(6, 4, 11, 16)[::2, 1:3, :, ::2].transpose(2, 3)
    cases.append((strided, *cases[3][1:]))
    for arguments, tiles in zip(cases, run(FORWARD, cases, where=where), strict=True):
        expected = reference.crop_resize(*arguments)
        assert (tiles.dtype, tiles.shape) == (expected.dtype, expected.shape)
        if tiles.dtype == torch.uint8:
            assert (tiles.int() - expected.int()).abs().max() <= 1
            assert (tiles != expected).float().mean() < 0.01  # sums within rounding of one half
        else:
            torch.testing.assert_close(tiles, expected, **TOLERANCE[tiles.dtype])


@pytest.mark.parametrize("where", WHERE)
def test_backward_agrees_with_the_reference(where):
    cases = [
        *(backward_case(dtype, 4, 5, 7, 2) for dtype in DTYPES[1:]),
        backward_case(torch.float32, 4, 5, 7, 2, whole_pixels=False),
        backward_case(torch.float64, 4, 5, 7, 2, whole_pixels=False),
        # Enlarged, more than one block of an image, images without boxes, no boxes and no images.
        backward_case(torch.float32, 2, 12, 9, 1, shape=(4, 1, 6, 5)),
        backward_case(torch.float32, 2, 3, 4, 1, shape=(1, 1, 9, 70)),
        backward_case(torch.float32, 130, 1, 2, 1, shape=(3, 1, 3, 3)),  # tiles sorted in more than one step
        backward_case(torch.float32, 0, 4, 4, 1),
        backward_case(torch.float32, 0, 4, 4, 1, shape=(0, 2, 5, 5)),
    ]
    # Gradients are read where they lie: expanded from one number, turned round, every second column.
    grad, *rest = backward_case(torch.float32, 4, 5, 7, 2)
    cases.append((torch.tensor(0.5).expand(grad.shape), *rest))
    cases.append((grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), *rest))
    cases.append((grad.repeat_interleave(2, 3)[..., ::2], *rest))
    for arguments, grads in zip(cases, run(BACKWARD, cases, where=where), strict=True):
        expected = reference.crop_resize_backward(*arguments)
        assert (grads.dtype, grads.shape) == (expected.dtype, expected.shape)
        torch.testing.assert_close(grads, expected, **TOLERANCE[grads.dtype])


def batch_case(dtype, out, size, padded, *, shape=(3, 3, 9, 11), tiles=4, statistics=True, **options):
    images, boxes, source, height, width, _ = forward_case(dtype, tiles, *size, 1, shape=shape, **options)
    wide = torch.float64 if torch.float64 in (dtype, out) else torch.float32
    mean, std = torch.linspace(0.4, 0.5, shape[1]).to(wide), torch.linspace(0.2, 0.3, shape[1]).to(wide)
    return images, boxes, source, *((mean, std) if statistics else (None, None)), height, width, *padded, out


@pytest.mark.parametrize("where", WHERE)
def test_batch_agrees_with_the_reference(where):
    cases = [
        *(batch_case(torch.uint8, out, (5, 7), (9, 10)) for out in DTYPES[1:]),
        *(batch_case(dtype, torch.float32, (5, 7), (9, 10), whole_pixels=False) for dtype in DTYPES[1:]),
        batch_case(torch.float16, torch.bfloat16, (4, 4), (4, 4), statistics=False),
        # More than one block of rows and of columns, blocks of padding alone, enlarged and reduced.
        batch_case(torch.uint8, torch.float32, (12, 14), (40, 70), tiles=2),
        batch_case(torch.uint8, torch.float32, (17, 40), (17, 40), tiles=2, layout=torch.channels_last),
        batch_case(torch.float32, torch.float32, (2, 2), (3, 3), shape=(2, 1, 9, 8)),
        batch_case(torch.float32, torch.float32, (1, 1), (1, 2), shape=(2, 2, 3, 3), tiles=1),
        batch_case(torch.uint8, torch.float32, (4, 4), (6, 6), tiles=0),
    ]
    for arguments, batch in zip(cases, run(BATCH, cases, where=where), strict=True):
        expected = reference.crop_batch(*arguments)
        assert (batch.dtype, batch.shape, batch.stride()) == (
            expected.dtype,
            expected.shape,
            expected.stride(),
        )
        if arguments[0].dtype == torch.uint8:  # a sum within rounding of one half is a byte apart
            apart = (batch.double() - expected.double()).abs() > 2 * torch.finfo(batch.dtype).eps * 4
            assert apart.double().mean() < 0.01 or batch.numel() == 0
            assert ((batch.double() - expected.double()).abs() < 1.1 / 255 / 0.2 + 0.02).all()
        else:
            coarser = arguments[0].dtype if batch.dtype == torch.float32 else batch.dtype
            torch.testing.assert_close(batch, expected, **TOLERANCE[coarser])


@pytest.mark.parametrize("where", WHERE)
def test_boxes_and_sources_outside_read_nothing_outside(where):
    images = torch.full((2, 1, 6, 6), 1.0)
    boxes = torch.tensor([[0, 0, 6, 6], [-3, -3, 3, 3], [4, 4, 40, 9], [0, 0, float("nan"), 4], [0, 0, 4, 4]])
    source = torch.tensor([1, 0, 0, 0, 99])
    (tiles,) = run(FORWARD, [(images, boxes, source, 3, 3, 1)], where=where)
    torch.testing.assert_close(tiles[0], torch.ones(1, 3, 3))
    inside = tiles[1:][tiles[1:].isfinite()]
    torch.testing.assert_close(inside, torch.ones_like(inside))  # a mean of what is inside the image, or NaN


def test_compiles_for_every_gpu_with_wide_stores_and_no_spills():
    forward = [
        forward_case(dtype, 4, 112, 112, 2, shape=(2, 3, 224, 224)) for dtype in (torch.uint8, torch.float32)
    ]
    for binary in compile_ahead(FORWARD, forward):
        assert binary.spilled_bytes == 0
        assert set(binary.store_bytes) == {16}
    for binary in compile_ahead(
        BACKWARD, [backward_case(torch.float32, 4, 112, 112, 2, shape=(2, 3, 224, 224))]
    ):
        assert binary.spilled_bytes == 0
        if binary.kernel == "_crop_resize_backward":
            assert max(binary.store_bytes) == 16


def test_batch_compiles_for_every_gpu_with_wide_stores_and_no_spills():
    cases = [
        batch_case(torch.uint8, torch.float32, (112, 112), (224, 224), shape=(2, 3, 224, 224)),
        batch_case(torch.uint8, torch.bfloat16, (112, 112), (224, 224), shape=(2, 3, 224, 224)),
        batch_case(torch.uint8, torch.float32, (32, 32), (32, 32), shape=(2, 3, 32, 32)),
        batch_case(torch.float32, torch.float16, (224, 224), (224, 224), shape=(2, 3, 224, 224)),
    ]
    for binary in compile_ahead(BATCH, cases):
        assert binary.spilled_bytes == 0
        assert set(binary.store_bytes) == {16}
