import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn import functional

from ddfast.ops import crop_resize, reference
from ddfast.ops._dispatch import native_status
from tests.ops.boxes import random_boxes

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
NATIVE = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OP, BACKWARD = torch.ops.ddfast.crop_resize.default, torch.ops.ddfast.crop_resize_backward.default


def random_images(*shape, dtype=torch.float32, seed=0):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (images * 255).to(dtype) if dtype == torch.uint8 else images.to(dtype)


def random_source(count, images, seed=1):
    return torch.randint(0, images, (count,), generator=torch.Generator().manual_seed(seed))


def interpolated(images, boxes, source, size):
    """Each crop cut out and resized by torch alone, in the images' dtype."""
    tiles = []
    for (x0, y0, x1, y1), image in zip(boxes.int().tolist(), source.tolist(), strict=True):
        crop = images[image : image + 1, :, y0:y1, x0:x1]
        tiles.append(functional.interpolate(crop, size, mode="bilinear", antialias=True, align_corners=False))
    return torch.cat(tiles)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(8, 8), (5, 13), (40, 31), (1, 1)])
def test_is_interpolate_of_every_crop_alone(size, device):
    images = random_images(4, 3, 29, 37)
    boxes, source = random_boxes(12, 29, 37, whole_pixels=True), random_source(12, 4)
    expected = interpolated(images, boxes, source, size)
    tiles = crop_resize(images.to(device), boxes.to(device), size, source=source.to(device)).cpu()
    torch.testing.assert_close(tiles, expected, rtol=0, atol=1e-5)
    double = crop_resize(images.double().to(device), boxes.to(device), size, source=source.to(device)).cpu()
    exact = interpolated(images.double(), boxes, source, size)
    torch.testing.assert_close(double, exact, rtol=0, atol=1e-6)  # torch keeps the scale in float32
    pixels = random_images(4, 3, 29, 37, dtype=torch.uint8)
    rounded = (interpolated(pixels.float(), boxes, source, size) + 0.5).floor().clamp(0, 255)
    bytes_ = crop_resize(pixels.to(device), boxes.to(device), size, source=source.to(device)).cpu()
    assert bytes_.dtype == torch.uint8
    assert (bytes_.float() - rounded).abs().max() <= 1
    assert (bytes_ != rounded).float().mean() < 1e-2  # sums within rounding of one half


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
def test_a_crop_of_the_tiles_size_comes_out_unchanged(dtype, device):
    images = random_images(3, 3, 20, 23, dtype=dtype)
    boxes = torch.tensor([[0, 0, 11, 7], [12, 13, 23, 20], [5, 6, 16, 13]])
    tiles = crop_resize(images.to(device), boxes.to(device), (7, 11))
    expected = [images[m, :, y0:y1, x0:x1] for m, (x0, y0, x1, y1) in enumerate(boxes.tolist())]
    assert torch.equal(tiles.cpu(), torch.stack(expected))


@pytest.mark.parametrize("device", DEVICES)
def test_a_fractional_box_weighs_pixels_by_their_distance(device):
    """A ramp stays a ramp: away from the crop's edges the filter returns the value at each output's centre."""
    ramp = torch.arange(32, dtype=torch.float64).expand(1, 1, 4, 32) + 0.5
    for x0, x1, width in [(3.3, 28.6, 9), (0.25, 30.5, 20), (4.75, 20.25, 31)]:
        boxes = torch.tensor([[x0, 0.0, x1, 4.0]])
        tile = crop_resize(ramp.to(device), boxes.to(device), (4, width)).cpu()
        x0, x1 = boxes[0, 0].double(), boxes[0, 2].double()
        centres = x0 + (x1 - x0) / width * (torch.arange(width) + 0.5)
        inside = slice(width // 4, -(width // 4))
        reached = (
            (x1 - x0) / width if x1 - x0 > width else 0
        )  # a wide triangle sees few, unevenly placed pixels
        difference = (tile[0, 0, 0] - centres)[inside].abs().max()
        assert difference <= (1e-12 if reached == 0 else 0.05)
        constant = crop_resize(torch.ones_like(ramp).to(device), boxes.to(device), (4, width)).cpu()
        torch.testing.assert_close(constant, torch.ones_like(constant), rtol=1e-12, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_tiles_fill_mosaics_in_row_major_order(device):
    images = random_images(5, 3, 16, 18).to(device)
    boxes, source = random_boxes(18, 16, 18, whole_pixels=False).to(device), random_source(18, 5).to(device)
    tiles = crop_resize(images, boxes, (4, 6), source=source)
    mosaics = crop_resize(images, boxes, (4, 6), source=source, factor=3)
    assert mosaics.shape == (2, 3, 12, 18)
    for tile in range(18):
        row, column = divmod(tile % 9, 3)
        cell = mosaics[tile // 9, :, 4 * row : 4 * row + 4, 6 * column : 6 * column + 6]
        assert torch.equal(cell, tiles[tile])


def test_boxes_for_every_image_and_boxes_of_every_integer_type():
    images = random_images(3, 3, 16, 16)
    boxes = random_boxes(6, 16, 16, whole_pixels=True).view(3, 2, 4)
    tiles = crop_resize(images, boxes, 5)
    assert tiles.shape == (3, 2, 3, 5, 5)
    source = torch.tensor([0, 0, 1, 1, 2, 2])
    flat = crop_resize(images, boxes.view(6, 4), 5, source=source)
    assert torch.equal(tiles.view(6, 3, 5, 5), flat)
    for dtype in (torch.int32, torch.int64, torch.int16, torch.float64):
        assert torch.equal(crop_resize(images, boxes.to(dtype), 5), tiles)
    assert torch.equal(crop_resize(images, boxes.view(6, 4), 5, source=source.int()), flat)
    assert torch.equal(crop_resize(images, boxes[:, 0], 5), tiles[:, 0])


def test_a_pixel_outside_the_crop_changes_nothing():
    images = random_images(1, 1, 12, 12)
    box = torch.tensor([[3, 4, 9, 10]])
    poisoned = torch.full_like(images, float("nan"))
    poisoned[:, :, 4:10, 3:9] = images[:, :, 4:10, 3:9]
    assert torch.equal(crop_resize(poisoned, box, 4), crop_resize(images, box, 4))


def test_one_boxs_tile_does_not_depend_on_the_others():
    images = random_images(6, 3, 24, 24, dtype=torch.uint8)
    boxes = random_boxes(24, 24, 24, whole_pixels=False).view(6, 4, 4)
    together = crop_resize(images, boxes, 10)
    for b in range(6):
        for k in range(4):
            alone = crop_resize(images[b : b + 1], boxes[b : b + 1, k : k + 1], 10)
            assert torch.equal(alone[0, 0], together[b, k])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
@NATIVE
def test_cpp_agrees_with_the_reference(dtype, layout):
    for size, factor, count, whole in [((9, 7), 2, 8, True), ((40, 33), 1, 5, False), ((1, 1), 1, 3, True)]:
        images = random_images(4, 3, 29, 37, dtype=dtype).contiguous(memory_format=layout)
        boxes, source = random_boxes(count, 29, 37, whole_pixels=whole), random_source(count, 4)
        arguments = (images, boxes, source, *size, factor)
        tiles, expected = torch.ops.ddfast_native.crop_resize(*arguments), reference.crop_resize(*arguments)
        if dtype == torch.uint8:
            assert (tiles.int() - expected.int()).abs().max() <= 1
            continue
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
        torch.testing.assert_close(tiles, expected, **tolerance)
        grad = random_images(*expected.shape, dtype=dtype, seed=2)
        grads = torch.ops.ddfast_native.crop_resize_backward(grad, boxes, source, 4, 29, 37, factor)
        expected = reference.crop_resize_backward(grad, boxes, source, 4, 29, 37, factor)
        torch.testing.assert_close(grads, expected, rtol=8 * torch.finfo(dtype).eps, atol=tolerance["atol"])


@NATIVE
def test_cpp_is_the_same_on_any_number_of_threads():
    images, boxes = random_images(8, 3, 40, 40), random_boxes(64, 40, 40, whole_pixels=False)
    arguments = (images, boxes, random_source(64, 8), 20, 20, 1)
    grad = random_images(64, 3, 20, 20, seed=3)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            tiles = torch.ops.ddfast_native.crop_resize(*arguments)
            grads = torch.ops.ddfast_native.crop_resize_backward(grad, boxes, arguments[2], 8, 40, 40, 1)
            found.append((tiles, grads))
    finally:
        torch.set_num_threads(threads)
    for tiles, grads in found[1:]:
        assert torch.equal(tiles, found[0][0])
        assert torch.equal(grads, found[0][1])


@NATIVE
def test_cpp_itself_refuses_boxes_outside():
    with pytest.raises(RuntimeError, match="box 0 is not inside an image"):
        torch.ops.ddfast_native.crop_resize(
            torch.zeros(1, 1, 4, 4), torch.tensor([[0.0, 0, 5, 4]]), torch.tensor([0]), 2, 2, 1
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, device):
    images = random_images(4, 3, 32, 32, dtype=dtype)
    boxes, source = random_boxes(16, 32, 32, whole_pixels=True), random_source(16, 4)
    exact = reference.crop_resize(images.double(), boxes, source, 16, 16, 1)
    wide = images if dtype == torch.float64 else images.float()  # torch has no 16-bit body on the CPU
    plain = interpolated(wide, boxes, source, (16, 16)).to(dtype)
    tiles = crop_resize(images.to(device), boxes.to(device), 16, source=source.to(device)).cpu()
    error, plain_error = ((x.double() - exact).norm() for x in (tiles, plain))
    assert tiles.dtype == dtype
    assert error <= 2 * plain_error


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("factor", [1, 2])
def test_gradients(factor, device):
    images = random_images(2, 1, 7, 6, dtype=torch.float64).to(device).requires_grad_()
    boxes = torch.tensor([[0, 0, 6, 7], [0.5, 1.25, 5.75, 6], [2, 2, 4, 4], [0, 3, 2, 5]]).to(device)
    source = torch.tensor([0, 1, 1, 0], device=device)
    assert gradcheck(lambda x: crop_resize(x, boxes, (3, 4), source=source, factor=factor), images)
    assert gradgradcheck(lambda x: crop_resize(x, boxes, (3, 4), source=source, factor=factor), images)
    square = lambda x: crop_resize(x, boxes, (3, 4), source=source, factor=factor).square()  # noqa: E731
    assert gradgradcheck(square, images)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    boxes = random_boxes(4, 9, 8, whole_pixels=False).to(device)
    source = random_source(4, 3).to(device)
    images = random_images(3, 2, 9, 8, dtype=torch.float64).to(device).requires_grad_()
    opcheck(OP, (images, boxes, source, 3, 5, 2))
    opcheck(OP, (random_images(3, 2, 9, 8, dtype=torch.uint8).to(device), boxes, source, 3, 5, 1))
    grad = random_images(1, 2, 6, 10, dtype=torch.float64).to(device).requires_grad_()
    opcheck(BACKWARD, (grad, boxes, source, 3, 9, 8, 2))


@pytest.mark.parametrize("device", DEVICES)
def test_vmap(device):
    images, boxes = (
        random_images(3, 2, 2, 8, 9).to(device),
        random_boxes(12, 8, 9, whole_pixels=False).to(device),
    )
    boxes, source = boxes.view(3, 4, 4), random_source(12, 2).view(3, 4).to(device)

    def resize(images, boxes, source):
        return crop_resize(images, boxes, (3, 4), source=source, factor=2)

    def looped(in_dims, *arguments):
        return torch.stack(
            [
                resize(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
                for i in range(3)
            ]
        )

    for in_dims, arguments in [
        ((0, None, None), (images, boxes[0], source[0])),
        ((None, 0, 0), (images[0], boxes, source)),
        ((0, 0, 0), (images, boxes, source)),
        ((2, 1, None), (images.movedim(0, 2), boxes.movedim(0, 1), source[0])),
    ]:
        mapped = torch.vmap(resize, in_dims)(*arguments)
        assert torch.equal(mapped, looped(in_dims, *arguments))

    def backward(grad):
        return torch.ops.ddfast.crop_resize_backward(grad, boxes[0], source[0], 2, 8, 9, 2)

    grads = random_images(3, 1, 2, 6, 8, seed=4).to(device)
    assert torch.equal(torch.vmap(backward)(grads), torch.stack([backward(grad) for grad in grads]))


def test_compiles_in_one_graph():
    images, boxes = random_images(2, 3, 12, 12), random_boxes(4, 12, 12, whole_pixels=True)
    source = torch.tensor([0, 1, 1, 0])

    def resize(images, boxes, source):
        return crop_resize(images, boxes, 6, source=source, factor=2)

    compiled = torch.compile(resize, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(images, boxes, source), resize(images, boxes, source))


def test_nothing_to_do():
    images, none = random_images(2, 3, 5, 5), torch.zeros(0, 4)
    assert crop_resize(images, none, 4, source=torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 4, 4)
    assert crop_resize(images[:0], none, 4).shape == (0, 3, 4, 4)
    assert crop_resize(images[:0], torch.zeros(0, 5, 4), 4).shape == (0, 5, 3, 4, 4)
    assert crop_resize(images[:, :0], torch.tensor([[0, 0, 5, 5]] * 2), 4).shape == (2, 0, 4, 4)
    images.requires_grad_()
    crop_resize(images, none, 4, source=torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert torch.equal(images.grad, torch.zeros_like(images))


IMAGES, BOXES = torch.zeros(2, 3, 8, 9), torch.tensor([[0, 0, 9, 8], [1, 1, 5, 5]])


@pytest.mark.parametrize(
    ("images", "boxes", "size", "options", "error", "message"),
    [
        (IMAGES[0], BOXES, 4, {}, ValueError, r"images must be \[B, C, H, W\], got \(3, 8, 9\)"),
        (IMAGES.int(), BOXES, 4, {}, TypeError, "images must be uint8 or floating point, got torch.int32"),
        (IMAGES, BOXES[:, :3], 4, {}, ValueError, r"boxes must be \[M, 4\] or \[B, K, 4\], got \(2, 3\)"),
        (IMAGES, BOXES, 0, {}, ValueError, "size and factor must be at least 1, got size 0 and factor 1"),
        (IMAGES, BOXES, 4, {"factor": 0}, ValueError, "size and factor must be at least 1"),
        (IMAGES, BOXES, 4, {"factor": 2}, ValueError, "2 boxes do not fill mosaics of 2 x 2 tiles"),
        (IMAGES, BOXES[:1], 4, {}, ValueError, r"boxes \(1, 4\) for 2 images need source"),
        (IMAGES, BOXES, 4, {"source": torch.tensor([0])}, ValueError, "source must be 2 integers, one a box"),
        (IMAGES, BOXES, 4, {"source": torch.zeros(2)}, ValueError, "source must be 2 integers"),
        (IMAGES, BOXES, 4, {"source": torch.tensor([0, 2])}, ValueError, r"source must be in \[0, 2\), got .* 2"),
        (IMAGES, BOXES[:, None], 4, {"source": torch.tensor([0, 1])}, ValueError, "cut image b already"),
        (IMAGES, BOXES[:, None], 4, {"factor": 2}, ValueError, r"flatten them to \[M, 4\] for factor 2"),
        (IMAGES, BOXES + 1, 4, {}, ValueError, r"inside 9 x 8 pixels .* got boxes\[0\] = \[1.0, 1.0, 10.0, 9.0\]"),
        (IMAGES, BOXES[:, [2, 3, 0, 1]], 4, {}, ValueError, "at least one pixel wide and high"),
        (IMAGES, BOXES.float() * float("nan"), 4, {}, ValueError, "boxes must be x0, y0, x1, y1 inside"),
        (IMAGES, BOXES.float().requires_grad_(), 4, {}, ValueError, "boxes must not require a gradient"),
    ],
)  # fmt: skip
def test_bad_arguments(images, boxes, size, options, error, message):
    with pytest.raises(error, match=message):
        crop_resize(images, boxes, size, **options)
