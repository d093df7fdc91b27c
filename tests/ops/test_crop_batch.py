import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn import functional

from ddfast.ops import crop_batch, crop_resize, reference
from ddfast.ops._dispatch import native_status
from tests.ops.boxes import random_boxes

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
NATIVE = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OP = torch.ops.ddfast.crop_batch.default


def random_images(*shape, dtype=torch.uint8, seed=0):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (images * 255).to(dtype) if dtype == torch.uint8 else images.to(dtype)


def random_source(count, images, seed=1):
    return torch.randint(0, images, (count,), generator=torch.Generator().manual_seed(seed))


def one_pass_at_a_time(images, boxes, source, size, padded, mean, std, dtype):
    """crop_resize, then scaling, normalisation, padding, cast and layout by torch."""
    tiles = crop_resize(images, boxes, size, source=source)
    pixels = tiles.float() / 255 if tiles.dtype == torch.uint8 else tiles
    mean, std = (
        torch.tensor(x, dtype=pixels.dtype, device=images.device)[:, None, None] for x in (mean, std)
    )
    pixels = (pixels - mean) / std
    top, left = (padded[0] - size[0]) // 2, (padded[1] - size[1]) // 2
    pixels = functional.pad(pixels, (left, padded[1] - size[1] - left, top, padded[0] - size[0] - top))
    return pixels.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize(("size", "padded"), [((8, 8), (8, 8)), ((5, 13), (9, 16)), ((30, 40), (31, 43))])
def test_is_its_passes_one_at_a_time(size, padded, dtype, device):
    images = random_images(4, 3, 29, 37).to(device)
    boxes, source = random_boxes(12, 29, 37, whole_pixels=False).to(device), random_source(12, 4).to(device)
    batch = crop_batch(images, boxes, size, source=source, padded=padded, mean=MEAN, std=STD, dtype=dtype)
    expected = one_pass_at_a_time(images, boxes, source, size, padded, MEAN, STD, dtype)
    assert batch.dtype == dtype
    assert batch.is_contiguous(memory_format=torch.channels_last)
    if device == "cpu":
        assert torch.equal(batch, expected)  # bytes round alike, and a byte has one normalised value
    else:
        assert ((batch - expected).abs() > 1e-2).double().mean() < 0.01


@NATIVE
@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
def test_cpp_agrees_with_the_reference(dtype):
    for out, layout, statistics in itertools.product(
        FLOATS, (torch.contiguous_format, torch.channels_last), (True, False)
    ):
        images = random_images(4, 3, 29, 37, dtype=dtype).contiguous(memory_format=layout)
        boxes, source = random_boxes(6, 29, 37, whole_pixels=False), random_source(6, 4)
        wide = torch.float64 if torch.float64 in (dtype, out) else torch.float32
        mean, std = (torch.tensor(x, dtype=wide) for x in (MEAN, STD))
        arguments = (images, boxes, source, *((mean, std) if statistics else (None, None)), 9, 7, 12, 10, out)
        batch = torch.ops.ddfast_native.crop_batch(*arguments)
        expected = reference.crop_batch(*arguments)
        assert (batch.dtype, batch.stride()) == (expected.dtype, expected.stride())
        if dtype == torch.uint8:
            apart = (batch.double() - expected.double()).abs() * (0.225 if statistics else 1)
            assert apart.max() < 1.01 / 255 + 2 * torch.finfo(out).eps
            assert (apart > 2 * torch.finfo(out).eps).double().mean() < 0.01
        else:
            tolerance = 8 * torch.finfo(out if out != torch.float64 else torch.float32).eps
            torch.testing.assert_close(batch, expected, rtol=tolerance, atol=tolerance)


@NATIVE
def test_cpp_itself_refuses_what_would_read_or_write_outside():
    images, box, source = torch.zeros(1, 1, 4, 4), torch.tensor([[0.0, 0, 5, 4]]), torch.tensor([0])
    with pytest.raises(RuntimeError, match="box 0 is not inside an image"):
        torch.ops.ddfast_native.crop_batch(images, box, source, None, None, 2, 2, 2, 2, torch.float32)
    with pytest.raises(RuntimeError, match="must fit into its padding"):
        torch.ops.ddfast_native.crop_batch(
            images, torch.tensor([[0.0, 0, 4, 4]]), source, None, None, 2, 2, 1, 2, torch.float32
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, device):
    images = random_images(4, 3, 32, 32, dtype=dtype)
    boxes, source = random_boxes(16, 32, 32, whole_pixels=True), random_source(16, 4)
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    exact = reference.crop_batch(images.double(), boxes, source, mean, std, 16, 16, 20, 20, torch.float64)
    batch = crop_batch(
        images.to(device),
        boxes.to(device),
        16,
        source=source.to(device),
        padded=20,
        mean=MEAN,
        std=STD,
    )
    plain = torch.zeros_like(exact, dtype=dtype)
    for m, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
        crop = images[source[m], :, y0:y1, x0:x1][None].float()  # torch has no 16-bit body on the CPU
        tile = functional.interpolate(crop, (16, 16), mode="bilinear", antialias=True)[0].to(dtype)
        plain[m, :, 2:18, 2:18] = (tile - mean.to(dtype)[:, None, None]) / std.to(dtype)[:, None, None]
    error, plain_error = ((x.double().cpu() - exact).norm() for x in (batch, plain))
    assert error <= 2 * plain_error


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_of_every_box_and_its_order(device):
    images = random_images(3, 3, 16, 16).to(device)
    boxes = random_boxes(6, 16, 16, whole_pixels=True).to(device)
    source = torch.tensor([0, 0, 1, 1, 2, 2], device=device)
    together = crop_batch(images, boxes.view(3, 2, 4), 5, padded=7)
    assert torch.equal(together, crop_batch(images, boxes, 5, source=source.int(), padded=(7, 7)))
    for m in range(6):  # a box owes nothing to its batch
        alone = crop_batch(images, boxes[m : m + 1].int(), 5, source=source[m : m + 1], padded=7)
        assert torch.equal(alone[0], together[m])
    assert torch.equal(
        crop_batch(images, boxes[::2], (5, 4)), crop_batch(images, boxes[::2], (5, 4), padded=(5, 4))
    )


@NATIVE
def test_threads_do_not_change_the_result():
    images, boxes = random_images(8, 3, 40, 40), random_boxes(64, 40, 40, whole_pixels=False)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(
                crop_batch(images, boxes, 20, source=random_source(64, 8), padded=32, mean=MEAN, std=STD)
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("statistics", [True, False])
def test_gradients(statistics, device):
    images = random_images(2, 2, 7, 6, dtype=torch.float64).to(device).requires_grad_()
    boxes = torch.tensor([[0, 0, 6, 7], [0.5, 1.25, 5.75, 6], [2, 2, 4, 4]]).to(device)
    source = torch.tensor([0, 1, 1], device=device)
    options = {"mean": (0.5, 0.4), "std": (0.25, 0.5)} if statistics else {}

    def function(images):
        return crop_batch(images, boxes, (3, 4), source=source, padded=(4, 7), **options)

    assert gradcheck(function, images)
    assert gradgradcheck(lambda x: function(x).square(), images)
    half = images.detach().to(torch.bfloat16).requires_grad_()
    crop_batch(half, boxes, 3, source=source, dtype=torch.float32).sum().backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    boxes = random_boxes(4, 9, 8, whole_pixels=False).to(device)
    source = random_source(4, 3).to(device)
    mean, std = torch.rand(2, device=device), torch.rand(2, device=device) + 1
    images = random_images(3, 2, 9, 8, dtype=torch.float32).to(device).requires_grad_()
    opcheck(OP, (images, boxes, source, mean, std, 3, 5, 4, 8, torch.float32))
    pixels = random_images(3, 2, 9, 8).to(device)
    opcheck(OP, (pixels, boxes, source, mean, None, 3, 5, 3, 5, torch.bfloat16))


@pytest.mark.parametrize("device", DEVICES)
def test_vmap(device):
    images = random_images(3, 2, 3, 8, 9).to(device)
    boxes = random_boxes(12, 8, 9, whole_pixels=False).view(3, 4, 4).to(device)
    source = random_source(12, 2).view(3, 4).to(device)

    def function(images, boxes, source):
        return crop_batch(images, boxes, (3, 4), source=source, padded=6, mean=MEAN, std=STD)

    for in_dims, arguments in [
        ((0, None, None), (images, boxes[0], source[0])),
        ((None, 0, 0), (images[0], boxes, source)),
        ((2, 1, None), (images.movedim(0, 2), boxes.movedim(0, 1), source[0])),
    ]:
        mapped = torch.vmap(function, in_dims)(*arguments)
        for i in range(3):
            one = [a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)]
            assert torch.equal(mapped[i], function(*one))
    means = torch.rand(3, 3, device=device)
    with pytest.raises(ValueError, match="mean and std are those of all images"):
        torch.vmap(lambda mean: OP(images[0], boxes[0], source[0], mean, None, 3, 4, 3, 4, torch.float32))(
            means
        )


def test_compiles_in_one_graph():
    images, boxes = random_images(4, 3, 12, 12), random_boxes(4, 12, 12, whole_pixels=True)

    def function(images, boxes):
        return crop_batch(images, boxes, 6, padded=8, mean=MEAN, std=STD) + 1

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(images, boxes), function(images, boxes))


def test_nothing_to_do():
    images, none = random_images(2, 3, 5, 5), torch.zeros(0, 4)
    source = torch.zeros(0, dtype=torch.int64)
    assert crop_batch(images, none, 4, source=source, padded=6).shape == (0, 3, 6, 6)
    assert crop_batch(images[:, :0], torch.tensor([[0, 0, 5, 5]] * 2), 4).shape == (2, 0, 4, 4)
    one = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    padded = crop_batch(one, torch.tensor([[0, 0, 1, 1]]), 1, padded=2)[0, 0]
    assert padded.tolist() == [[1.0, 0.0], [0.0, 0.0]]  # half a pixel up and left


IMAGES, BOXES = torch.zeros(2, 3, 8, 9), torch.tensor([[0, 0, 9, 8], [1, 1, 5, 5]])


@pytest.mark.parametrize(
    ("images", "boxes", "size", "options", "error", "message"),
    [
        (IMAGES[0], BOXES, 4, {}, ValueError, r"images must be \[B, C, H, W\], got \(3, 8, 9\)"),
        (IMAGES.int(), BOXES, 4, {}, TypeError, "images must be uint8 or floating point, got torch.int32"),
        (IMAGES, BOXES, 0, {}, ValueError, "size must be at least 1 and at most padded"),
        (IMAGES, BOXES, 4, {"padded": (4, 3)}, ValueError, "at most padded, got size 4 and padded 4 x 3"),
        (IMAGES, BOXES, 4, {"padded": 4.0}, ValueError, "padded must be an int or a pair of ints"),
        (IMAGES, BOXES, 4, {"mean": (0.5,)}, ValueError, "mean must have one number for each of 3 channels"),
        (IMAGES, BOXES, 4, {"dtype": torch.int32}, TypeError, "dtype must be a floating-point dtype"),
        (IMAGES, BOXES[:1], 4, {}, ValueError, r"boxes \(1, 4\) for 2 images need source"),
        (IMAGES, BOXES + 1, 4, {}, ValueError, r"inside 9 x 8 pixels .* got boxes\[0\]"),
        (IMAGES, BOXES.float().requires_grad_(), 4, {}, ValueError, "boxes must not require a gradient"),
    ],
)
def test_bad_arguments(images, boxes, size, options, error, message):
    with pytest.raises(error, match=message):
        crop_batch(images, boxes, size, **options)
