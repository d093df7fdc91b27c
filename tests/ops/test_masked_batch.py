import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from ddfast.ops import masked_batch, reference
from ddfast.ops._dispatch import native_status

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
NATIVE = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])
IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
OUTPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_images(*shape, dtype=torch.float32, seed=0):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 255).to(dtype)


def random_coalitions(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def by_hand(image, coalition, rows, cols, baseline):
    """One masked image, painted cell by cell: what the grid means, without the op's index arithmetic."""
    _, height, width = image.shape
    masked = baseline.expand_as(image).clone()
    for row, col in itertools.product(range(rows), range(cols)):
        if coalition[row * cols + col]:
            down = slice(row * height // rows, (row + 1) * height // rows)
            across = slice(col * width // cols, (col + 1) * width // cols)
            masked[:, down, across] = image[:, down, across]
    return masked


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((8, 8), (2, 2)),
        ((7, 5), (3, 2)),
        ((13, 17), (4, 4)),
        ((1, 1), (1, 1)),
        ((5, 9), (5, 9)),
        ((6, 4), (1, 3)),
    ],
)
def test_paints_cells(size, grid, device):
    images = random_images(2, 3, *size)
    coalitions = random_coalitions(2, 5, grid[0] * grid[1])
    baseline = torch.tensor([1.0, -2.0, 3.0])
    masked = masked_batch(images.to(device), coalitions.to(device), grid=grid, baseline=baseline)
    assert masked.shape == (10, 3, *size)
    assert masked.is_contiguous(memory_format=torch.channels_last)
    for b, k in itertools.product(range(2), range(5)):
        expected = by_hand(images[b], coalitions[b, k], *grid, baseline[:, None, None])
        assert torch.equal(masked[b * 5 + k].cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_normalises_as_torchvision_does(device):
    images = random_images(2, 3, 12, 12, dtype=torch.uint8)
    everything = torch.ones(1, 9, dtype=torch.bool)
    masked = masked_batch(images.to(device), everything, grid=3, mean=MEAN, std=STD)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    assert masked.dtype == torch.float32
    assert torch.equal(masked.cpu(), (images.float().div(255) - mean) / std)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", OUTPUT_DTYPES)
@pytest.mark.parametrize("image_dtype", IMAGE_DTYPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(image_dtype, dtype, device):
    images = random_images(2, 3, 11, 10, dtype=image_dtype)
    coalitions = random_coalitions(6, 6)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    baseline = random_images(3, 11, 10, seed=2)
    present = coalitions[:, reference.player_map(2, 3, 11, 10)][None, :, None]

    def unfused(compute):
        pixels = reference.normalise(images, mean, std, compute)[:, None]
        return torch.where(present, pixels, baseline.to(compute)).flatten(0, 1).to(dtype)

    masked = masked_batch(
        images.to(device), coalitions, grid=(2, 3), baseline=baseline, mean=mean, std=std, dtype=dtype
    )
    plain = unfused(torch.float64 if torch.float64 in (image_dtype, dtype) else torch.float32)
    exact = unfused(torch.float64).double()
    finite = exact.abs() < torch.finfo(dtype).max  # 255 / 0.229 squared overflows float16 alike on both sides
    error, plain_error = ((x.double() - exact)[finite].norm() for x in (masked.cpu(), plain))
    assert masked.dtype == dtype
    assert error <= 2 * plain_error


@NATIVE
@pytest.mark.parametrize("dtype", OUTPUT_DTYPES)
@pytest.mark.parametrize("image_dtype", IMAGE_DTYPES)
def test_cpp_has_the_bits_of_the_reference(image_dtype, dtype):
    images = random_images(3, 3, 13, 17, dtype=image_dtype)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    for baseline, coalitions, layout in itertools.product(
        (torch.randn(3), torch.randn(3, 13, 17, dtype=torch.float16), torch.randn(3, 3, 13, 17)),
        (random_coalitions(5, 12), random_coalitions(3, 5, 12)),
        (torch.contiguous_format, torch.channels_last),
    ):
        for statistics in ((mean, std), (None, std), (mean, None), (None, None)):
            arguments = (
                images.contiguous(memory_format=layout),
                coalitions,
                baseline,
                *statistics,
                3,
                4,
                dtype,
            )
            native = torch.ops.ddfast_native.masked_batch(*arguments)
            expected = reference.masked_batch(*arguments)
            assert native.stride() == expected.stride()
            assert torch.equal(native, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_images_and_baselines(device):
    wide = random_images(4, 6, 14, 18).to(device)
    images = wide[::2, 1::2, 1:, :-1].transpose(2, 3)  # [2, 3, 17, 13], no dimension dense
    coalitions = random_coalitions(8, 12).to(device)[::2, :]
    baseline = wide[1::2, ::2, :-1, 1:].transpose(2, 3)
    masked = masked_batch(images, coalitions, grid=(4, 3), baseline=baseline)
    expected = masked_batch(
        images.contiguous(), coalitions.contiguous(), grid=(4, 3), baseline=baseline.contiguous()
    )
    assert torch.equal(masked, expected)
    assert torch.equal(masked[5].cpu(), by_hand(images[1].cpu(), coalitions[1], 4, 3, baseline[1].cpu()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8)])
def test_empty_batches(shape, device):
    images = torch.zeros(shape, device=device)
    assert masked_batch(images, random_coalitions(5, 4), grid=2).shape == (shape[0] * 5, *shape[1:])


@pytest.mark.parametrize("device", DEVICES)
def test_no_coalitions(device):
    masked = masked_batch(torch.zeros(2, 3, 8, 8, device=device), random_coalitions(0, 4), grid=2)
    assert masked.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("device", DEVICES)
def test_every_element_is_written(device):
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        masked = masked_batch(random_images(2, 3, 31, 29).to(device), random_coalitions(9, 25), grid=5)
    finally:
        torch.use_deterministic_algorithms(False)
    assert masked.isfinite().all()


@pytest.mark.parametrize(
    "baseline",
    [
        torch.tensor(0.25),
        torch.tensor([0.25]),
        torch.full((3, 1, 1), 0.25),
        torch.full((6, 6), 0.25),
        torch.full((1, 3, 6, 6), 0.25),
        torch.full((2, 1, 1, 1), 0.25, dtype=torch.float16),
    ],
)
def test_forms_of_a_baseline(baseline):
    images, coalitions = random_images(2, 3, 6, 6), random_coalitions(4, 9)
    masked = masked_batch(images, coalitions, grid=3, baseline=baseline)
    assert torch.equal(masked, masked_batch(images, coalitions, grid=3, baseline=0.25))


@NATIVE
def test_threads_do_not_change_the_result():
    images, coalitions = random_images(3, 3, 64, 64), random_coalitions(16, 16)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(masked_batch(images, coalitions, grid=4, mean=MEAN, std=STD))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


OP = torch.ops.ddfast.masked_batch.default


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    coalitions = random_coalitions(4, 6).to(device)
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    images = torch.rand(2, 3, 5, 7, device=device)
    baselines = (torch.rand(3), torch.rand(3, 5, 7), torch.rand(2, 3, 5, 7))
    for baseline in baselines:
        arguments = (
            images.clone().requires_grad_(),
            coalitions,
            baseline.to(device).requires_grad_(),
            mean,
            std,
            2,
            3,
            torch.float32,
        )
        opcheck(OP, arguments)
    opcheck(
        OP,
        (
            images.byte(),
            coalitions.expand(2, 4, 6),
            baselines[0].to(device),
            None,
            None,
            2,
            3,
            torch.bfloat16,
        ),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["channel", "image", "batch"])
def test_gradients(form, device):
    shape = {"channel": (2,), "image": (2, 4, 3), "batch": (2, 2, 4, 3)}[form]
    images = torch.rand(2, 2, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    baseline = torch.rand(shape, dtype=torch.float64, device=device, requires_grad=True)
    coalitions = random_coalitions(2, 3, 4).to(device)
    std = torch.tensor([0.5, 2.0], device=device)

    def function(images, baseline):
        # Squared, so that the second derivative is not zero.
        return masked_batch(images, coalitions, grid=2, baseline=baseline, mean=(0.1, 0.2), std=std).square()

    assert gradcheck(function, (images, baseline))
    assert gradgradcheck(function, (images, baseline))


def test_gradients_of_half_precision_images_are_summed_in_float32():
    images = torch.ones(1, 1, 2, 2, dtype=torch.float16, requires_grad=True)
    coalitions = torch.ones(4096, 1, dtype=torch.bool)
    masked_batch(images, coalitions, grid=1).sum().backward()
    assert images.grad.dtype == torch.float16
    assert torch.equal(images.grad, torch.full_like(images, 4096))


def test_a_masked_pixel_has_no_gradient_even_where_the_incoming_one_is_infinite():
    images = torch.ones(1, 1, 2, 2, requires_grad=True)
    baseline = torch.ones(1, requires_grad=True)
    masked = masked_batch(images, torch.zeros(1, 1, dtype=torch.bool), grid=1, baseline=baseline)
    masked.backward(torch.full_like(masked, torch.inf))
    assert torch.equal(images.grad, torch.zeros_like(images))
    assert baseline.grad.isinf().all()


def unmapped(tensor, dim, index):
    return tensor if dim is None else tensor.select(dim, index)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "in_dims",
    [
        (0, None, None, None),
        (None, 0, None, None),
        (2, 1, 0, None),
        (None, None, 1, None),
        (0, None, None, 0),
    ],
)
@pytest.mark.parametrize("each", [False, True])
def test_vmap(in_dims, each, device):
    generator = torch.Generator().manual_seed(3)

    def random(dim, *shape):
        shape = list(shape)
        if dim is not None:
            shape.insert(dim, 4)
        return torch.rand(shape, generator=generator).to(device)

    images = random(in_dims[0], 2, 3, 6, 5)
    coalitions = random(in_dims[1], *((2, 7, 4) if each else (7, 4))) < 0.5
    baseline = random(in_dims[2], *((2, 3, 6, 5) if each else (3,)))
    mean = random(in_dims[3], 3)

    def function(images, coalitions, baseline, mean):
        std = mean + 1
        return torch.ops.ddfast.masked_batch(images, coalitions, baseline, mean, std, 2, 2, torch.float32)

    mapped = torch.vmap(function, in_dims)(images, coalitions, baseline, mean)
    assert mapped.shape == (4, 14, 3, 6, 5)
    for index in range(4):
        arguments = (images, coalitions, baseline, mean)
        expected = function(*(unmapped(x, dim, index) for x, dim in zip(arguments, in_dims, strict=True)))
        assert torch.equal(mapped[index], expected)


def test_compiles_without_a_graph_break():
    images, coalitions = random_images(2, 3, 8, 8), random_coalitions(4, 4)

    def function(images):
        return masked_batch(images, coalitions, grid=2, baseline=0.5, mean=MEAN, std=STD) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), function(images))


GOOD = {"images": torch.zeros(2, 3, 8, 8), "coalitions": torch.ones(4, 16, dtype=torch.bool), "grid": 4}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"images": torch.zeros(3, 8, 8)},
            ValueError,
            r"images must be a \[B, C, H, W\] tensor, got \[3, 8, 8\]",
        ),
        ({"images": "cat.png"}, ValueError, r"images must be a \[B, C, H, W\] tensor, got str"),
        (
            {"images": torch.zeros(2, 3, 8, 8, dtype=torch.int32)},
            TypeError,
            "uint8 or floating point, got torch.int32",
        ),
        ({"grid": 9}, ValueError, "1 to 8 rows and 1 to 8 columns for 8 x 8 images, got 9 x 9"),
        ({"grid": 0}, ValueError, "got 0 x 0"),
        ({"grid": (4, 4, 4)}, ValueError, "grid must be an int or a pair of ints"),
        ({"coalitions": torch.ones(4, 16)}, TypeError, "coalitions must be bool, got torch.float32"),
        (
            {"coalitions": torch.ones(4, 15, dtype=torch.bool)},
            ValueError,
            r"\[K, 16\] or \[2, K, 16\] for a 4 x 4 grid, got \[4, 15\]",
        ),
        ({"coalitions": torch.ones(3, 4, 16, dtype=torch.bool)}, ValueError, r"got \[3, 4, 16\]"),
        ({"coalitions": torch.ones(16, dtype=torch.bool)}, ValueError, r"got \[16\]"),
        (
            {"dtype": torch.int32},
            TypeError,
            "dtype must be a floating-point dtype of 16 to 64 bits, got torch.int32",
        ),
        (
            {"baseline": torch.zeros(4)},
            ValueError,
            r"baseline must be a number or \[3\], or expand to .* got \[4\]",
        ),
        (
            {"baseline": torch.zeros(3, dtype=torch.int64)},
            TypeError,
            "baseline must be a number or a floating",
        ),
        (
            {"mean": (0.5, 0.5)},
            ValueError,
            r"mean must have one number for each of 3 channels, got \(0.5, 0.5\)",
        ),
        (
            {"std": torch.ones(3, requires_grad=True)},
            ValueError,
            r"std is a constant of the op.*pass std\.detach\(\)",
        ),
    ],
)
def test_errors(change, error, message):
    arguments = {**GOOD, **change}
    images, coalitions = arguments.pop("images"), arguments.pop("coalitions")
    with pytest.raises(error, match=message):
        masked_batch(images, coalitions, **arguments)


@NATIVE
@pytest.mark.parametrize(
    ("images", "coalitions", "baseline"),
    [
        (torch.zeros(3, 8, 8), torch.ones(4, 4, dtype=torch.bool), torch.zeros(3)),
        (torch.zeros(2, 3, 8, 8), torch.ones(4, 5, dtype=torch.bool), torch.zeros(3)),
        (torch.zeros(2, 3, 8, 8), torch.ones(3, 4, 4, dtype=torch.bool), torch.zeros(3)),
        (torch.zeros(2, 3, 8, 8), torch.ones(4, 4, dtype=torch.bool), torch.zeros(2)),
        (torch.zeros(2, 3, 8, 8), torch.ones(4, 4, dtype=torch.bool), torch.zeros(3, 8, 7)),
    ],
)
def test_cpp_does_not_read_outside_arguments_that_skipped_the_face(images, coalitions, baseline):
    with pytest.raises(RuntimeError, match="masked_batch: "):
        torch.ops.ddfast_native.masked_batch(images, coalitions, baseline, None, None, 2, 2, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_offsets_past_2_to_the_31():
    images = torch.rand(1, 3, 224, 224, device="cuda")
    coalitions = random_coalitions(15000, 16)  # 15000 * 150528 elements
    masked = masked_batch(images, coalitions, grid=4, dtype=torch.float16)
    last = masked_batch(images, coalitions[-1:], grid=4, dtype=torch.float16)
    assert masked.numel() > 2**31
    assert torch.equal(masked[-1:], last)
