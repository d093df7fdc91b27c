import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from ddfast.ops import reference, winograd_conv2d, winograd_weight
from ddfast.ops._winograd import winograd_is_fast

FAST = pytest.mark.skipif(not winograd_is_fast(), reason="no C++ extension, or no AVX-512")
OP = torch.ops.ddfast.winograd_conv2d.default


def case(batch, inputs, outputs, height, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weight = numbers(outputs, inputs, 3, 3) * (2 / 9 / inputs) ** 0.5
    return (
        numbers(batch, inputs, height, width),
        weight,
        numbers(outputs),
        numbers(batch, outputs, height, width),
    )


def direct(images, weight, bias, other, relu):
    result = F.conv2d(images, weight, bias, padding=1)
    result = result if other is None else result + other
    return result.relu() if relu else result


@pytest.mark.parametrize("shape", [(2, 3, 32, 6, 8), (1, 5, 64, 7, 9), (3, 4, 32, 1, 1), (1, 1, 32, 2, 5)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("given", [(True, True), (False, False), (True, False), (False, True)])
def test_is_the_convolution(shape, relu, given):
    images, weight, bias, other = case(*shape, dtype=torch.float64)
    bias, other = (t if there else None for t, there in zip((bias, other), given, strict=True))
    found = winograd_conv2d(images, winograd_weight(weight), bias, other, relu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, direct(images, weight, bias, other, relu), rtol=0, atol=1e-12)


@FAST
@pytest.mark.parametrize(
    "shape",
    [
        (2, 64, 32, 8, 8),
        (1, 128, 96, 7, 5),
        (3, 64, 64, 1, 1),
        (9, 64, 32, 7, 7),
        (2, 192, 32, 17, 30),  # more than one block, of tiles that no panel divides
        (0, 64, 32, 4, 4),
    ],
)
@pytest.mark.parametrize("given", [(True, True), (False, False)])
@pytest.mark.parametrize("relu", [False, True])
def test_cpp_is_the_reference(shape, given, relu):
    images, weight, bias, other = case(*shape)
    bias, other = (t if there else None for t, there in zip((bias, other), given, strict=True))
    found = torch.ops.ddfast_native.winograd_conv2d(images, winograd_weight(weight), bias, other, relu)
    doubled = (None if t is None else t.double() for t in (images, winograd_weight(weight), bias, other))
    expected = reference.winograd_conv2d(*doubled, relu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_transposed_weight_gives_the_gradient_at_the_input(dtype):
    images, weight, _, grad = case(2, 64, 128, 9, 6, dtype=dtype)
    found = winograd_conv2d(grad, winograd_weight(weight, transposed=True))
    images, weight, grad = images.double().requires_grad_(), weight.double(), grad.double()
    (expected,) = torch.autograd.grad(F.conv2d(images, weight, padding=1), images, grad)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@FAST
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_cpp_transforms_weights_to_the_same_bits(transposed, strided):
    _, weight, _, _ = case(1, 96, 160, 1, 1)
    weight = weight.contiguous(memory_format=torch.channels_last) if strided else weight
    found = winograd_weight(weight, transposed)
    assert torch.equal(found, winograd_weight(weight.double(), transposed).float())
    assert found.is_contiguous()


@FAST
@pytest.mark.parametrize(("channels", "size"), [(64, 28), (128, 14), (512, 7)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_error_is_at_most_twice_that_of_plain_pytorch(channels, size, layout):
    images, weight, bias, _ = case(2, channels, channels, size, size)
    images, weight = (t.contiguous(memory_format=layout) for t in (images.relu(), weight))
    exact = direct(images.double(), weight.double(), bias.double(), None, False)
    ours = winograd_conv2d(images, winograd_weight(weight), bias)
    plain = direct(images, weight, bias, None, False)
    error, plain_error = ((result.double() - exact).norm() for result in (ours, plain))
    assert error <= 2 * plain_error


@FAST
def test_neighbours_and_threads_do_not_change_the_result():
    images, weight, bias, other = case(40, 64, 32, 9, 10)
    weight = winograd_weight(weight)
    together = winograd_conv2d(images, weight, bias, other, True)
    for index in (0, 7, 39):
        one = slice(index, index + 1)
        assert torch.equal(winograd_conv2d(images[one], weight, bias, other[one], True), together[one])
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.equal(winograd_conv2d(images, weight, bias, other, True), together)
    torch.set_num_threads(threads)


def sharing(images, maps, tiles, generator):
    """Sets of players and what tiles read, at random, and for each map and tile the first map with the same set."""
    sets = torch.randint(0, 64, (images, maps), generator=generator)
    reads = torch.randint(0, 64, (tiles,), generator=generator) & torch.randint(
        0, 64, (tiles,), generator=generator
    )
    keys = sets[:, :, None] & reads
    first = (keys[:, :, None] == keys[:, None]).int().argmax(2)  # [images, maps, tiles]
    return sets, reads, first + torch.arange(images)[:, None, None] * maps


@FAST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(8, 6), (7, 9), (1, 1)])
def test_tiles_that_maps_share_are_computed_once(size, dtype):
    """What the promise does not hold for shows which map a tile was computed for."""
    images, weight, bias, other = case(2 * 5, 64, 32, *size)
    images, other, weight = images.to(dtype), other.to(dtype), winograd_weight(weight)
    rows, cols = (size[0] + 1) // 2, (size[1] + 1) // 2
    sets, reads, first = sharing(2, 5, rows * cols, torch.Generator().manual_seed(0))
    assert (first != torch.arange(10).view(2, 5, 1)).any()
    alone = winograd_conv2d(images, weight, bias, other, True)
    shared = winograd_conv2d(images, weight, bias, other, True, sets, reads)
    place = torch.arange(size[0])[:, None] // 2 * cols + torch.arange(size[1]) // 2
    source = first.flatten(0, 1)[:, place]  # [10, h, w]
    expected = alone.permute(0, 2, 3, 1)[source, torch.arange(size[0])[:, None], torch.arange(size[1])]
    assert torch.equal(shared, expected.permute(0, 3, 1, 2))


@FAST
def test_bfloat16_maps_are_rounded_once():
    images, weight, bias, other = case(2, 64, 32, 9, 8)
    images, other, weight = images.bfloat16(), other.bfloat16(), winograd_weight(weight)
    found = winograd_conv2d(images, weight, bias, other, True)
    wide = winograd_conv2d(images.float(), weight, bias, other.float(), True)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wide.bfloat16())
    images[1, 3, 4, 4] = torch.nan
    assert winograd_conv2d(images, weight).isnan().any(1)[1, 3:6, 3:6].all()


def test_sets_and_reads_are_checked():
    images, weight, _, _ = case(4, 3, 32, 5, 6)
    weight, sets, reads = winograd_weight(weight), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(9).long()
    assert torch.equal(
        winograd_conv2d(images, weight, sets=sets, reads=reads).isfinite(), torch.ones(4, 32, 5, 6).bool()
    )
    for wrong, message in (
        ((sets, None), "together"),
        ((sets[:1], reads), "sets must be"),
        ((sets.float(), reads), "sets must be"),
        ((sets, reads[:8]), "reads must be"),
    ):
        with pytest.raises(ValueError, match=message):
            winograd_conv2d(images, weight, None, None, False, *wrong)


@FAST
def test_layouts_do_not_change_the_result():
    images, weight, bias, other = case(2, 64, 32, 8, 6)
    weight = winograd_weight(weight)
    expected = winograd_conv2d(images, weight, bias, other)
    last = torch.channels_last
    found = winograd_conv2d(
        images.contiguous(memory_format=last), weight, bias, other.contiguous(memory_format=last)
    )
    assert torch.equal(found, expected)
    strided = torch.stack([images, images], -1)[..., 0]
    assert torch.equal(winograd_conv2d(strided, weight, bias, other), expected)


@FAST
def test_every_element_is_written_and_nan_stays():
    images, weight, bias, _ = case(3, 64, 32, 9, 7)
    images[1, 3, 4, 4] = torch.nan
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        found = winograd_conv2d(images, winograd_weight(weight), bias, relu=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.isnan().any(1)[1, 3:6, 3:6].all()
    assert not found[0].isnan().any()
    assert not found[2].isnan().any()


def test_opcheck():
    for dtype, inputs in ((torch.float32, 64), (torch.float64, 3)):
        images, weight, bias, other = case(2, inputs, 32, 3, 5, dtype)
        opcheck(OP, (images, winograd_weight(weight), bias, other, True))
        opcheck(OP, (images, winograd_weight(weight), None, None, False))


def test_there_is_no_gradient():
    images, weight, bias, _ = case(1, 64, 32, 4, 4)
    result = winograd_conv2d(images.requires_grad_(), winograd_weight(weight), bias)
    with pytest.raises(RuntimeError, match="winograd_conv2d has no backward pass"):
        result.sum().backward()


@pytest.mark.parametrize(
    "in_dims", [(0, None, None, None), (2, None, None, 1), (None, 0, None, None), (0, 1, 0, 0)]
)
def test_vmap(in_dims):
    images, weight, bias, other = case(2, 64, 32, 4, 3)
    arguments = (images, winograd_weight(weight), bias, other)
    mapped = tuple(
        t if d is None else torch.stack([t, t.flip(0), 2 * t], d)
        for t, d in zip(arguments, in_dims, strict=True)
    )
    found = torch.vmap(lambda *tensors: OP(*tensors, True), in_dims)(*mapped)
    for index in range(3):
        one = (t if d is None else t.select(d, index) for t, d in zip(mapped, in_dims, strict=True))
        torch.testing.assert_close(found[index], OP(*one, True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(2, 8, 4)}, ValueError, r"input must be \[B, C, H, W\], got \[2, 8, 4\]"),
        ({"input": torch.zeros(2, 9, 4, 4)}, ValueError, r"weight must be \[16, O / 32, 9, 32\]"),
        ({"weight": torch.zeros(16, 1, 8, 32).double()}, TypeError, "weight and bias must be"),
        ({"bias": torch.zeros(31)}, ValueError, r"bias must be \[32\], got \[31\]"),
        ({"other": torch.zeros(2, 32, 4, 5)}, ValueError, r"other must be \[2, 32, 4, 4\]"),
    ],
)
def test_errors(change, error, message):
    good = {"input": torch.zeros(2, 8, 4, 4), "weight": torch.zeros(16, 1, 8, 32), "bias": torch.zeros(32)}
    with pytest.raises(error, match=message):
        winograd_conv2d(**{**good, **change})
    with pytest.raises(ValueError, match=r"weight must be \[O, C, 3, 3\] with O a multiple of 32"):
        winograd_weight(torch.zeros(31, 8, 3, 3))


@FAST
@pytest.mark.parametrize(
    "change",
    [
        {0: torch.zeros(2, 64, 4)},
        {0: torch.zeros(2, 32, 4, 4)},
        {1: torch.zeros(16, 1, 64, 31)},
        {2: torch.zeros(31)},
        {3: torch.zeros(2, 32, 5, 4)},
        {0: torch.zeros(2, 64, 4, 4).double()},
    ],
)
def test_cpp_does_not_read_outside_arguments_that_skipped_the_face(change):
    good = [torch.zeros(2, 64, 4, 4), torch.zeros(16, 1, 64, 32), torch.zeros(32), None, True]
    for place, tensor in change.items():
        good[place] = tensor
    with pytest.raises(RuntimeError, match="winograd_conv2d: "):
        torch.ops.ddfast_native.winograd_conv2d(*good)
