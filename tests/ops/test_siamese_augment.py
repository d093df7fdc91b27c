import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from ddfast.ops import augment_parameters, reference, siamese_augment
from ddfast.ops._dispatch import native_status
from tests.ops.augmented import EXACT, OPERATIONS, plain, rows_of

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
NATIVE = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OP, BACKWARD = torch.ops.ddfast.siamese_augment.default, torch.ops.ddfast.siamese_augment_backward.default
SHAPES = [  # images, channels, height, width
    (6, 3, 32, 32),
    (6, 3, 7, 9),
    (6, 1, 13, 8),
    (6, 5, 4, 3),
    (6, 3, 1, 1),
    (6, 2, 1, 5),
    (6, 3, 6, 1),
]


def numbers(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_gradient(function, images, grad):
    """The output, and the gradient at the images for a gradient at the output."""
    images = images.detach().clone().requires_grad_()
    output = function(images)
    return output.detach(), torch.autograd.grad(output, images, grad.to(output))[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_is_what_pytorch_does_forward_and_backward(operation, rows, device):
    for seed, shape in enumerate(SHAPES):
        images, grad = numbers(*shape), numbers(*shape, seed=1)
        parameters = rows_of(operation, rows, shape[2:], seed)
        wanted = with_gradient(lambda x, p=parameters: plain(x, p), images, grad)
        found = with_gradient(lambda x, p=parameters: siamese_augment(x, p), images.to(device), grad)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation", EXACT)
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_computes_nothing_is_exact(operation, dtype, device):
    for seed, shape in enumerate(SHAPES):
        images, grad = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1)
        parameters = rows_of(operation, 6, shape[2:], seed)
        wanted = with_gradient(lambda x, p=parameters: plain(x, p), images, grad)
        found = with_gradient(lambda x, p=parameters: siamese_augment(x, p), images.to(device), grad)
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in EXACT])
def test_error_is_at_most_twice_that_of_plain_pytorch(operation, dtype, device):
    ours, plains = torch.zeros(2), torch.zeros(2)
    for seed, shape in enumerate(SHAPES[:4] * 2):
        images, grad = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1)
        # Rounded, so that all begin with the same numbers.
        parameters = rows_of(operation, 6, shape[2:], seed).float()
        exact = with_gradient(lambda x, p=parameters: plain(x, p), images.double(), grad)
        # In 16 bits PyTorch would round where it reads from, so it computes in float32 and rounds once.
        by_torch = with_gradient(lambda x, p=parameters: plain(x, p), images.float(), grad)
        found = with_gradient(lambda x, p=parameters: siamese_augment(x, p), images.to(device), grad)
        for k in range(2):
            assert found[k].dtype == dtype
            ours[k] += (found[k].cpu().double() - exact[k]).square().sum()
            plains[k] += (by_torch[k].to(dtype).double() - exact[k]).square().sum()
    assert (ours.sqrt() <= 2 * plains.sqrt()).all(), (ours.sqrt(), plains.sqrt())


@NATIVE
@pytest.mark.parametrize("dtype", FLOATS)
def test_cpp_agrees_with_the_reference(dtype):
    allowed = {"rtol": 0, "atol": 40 * torch.finfo(dtype).eps}
    for seed, operation in enumerate(OPERATIONS):
        for shape in SHAPES[1:5]:
            images, rows = numbers(*shape, dtype=dtype), rows_of(operation, 3, shape[2:], seed)
            rows = rows.to(reference.accumulation_dtype(dtype))
            for linear in (False, True):
                found = torch.ops.ddfast_native.siamese_augment(images, rows, linear)
                torch.testing.assert_close(found, reference.siamese_augment(images, rows, linear), **allowed)
            found = torch.ops.ddfast_native.siamese_augment_backward(images, rows)
            wanted = reference.siamese_augment_backward(images, rows)
            torch.testing.assert_close(found, wanted, rtol=0, atol=allowed["atol"] * wanted.abs().max())


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_is_the_transpose(device):
    """<A x, y> = <x, A' y>, and one applied to the other's gradient is the other."""
    for seed, operation in enumerate(OPERATIONS):
        rows = rows_of(operation, 2, (9, 12), seed).to(device)
        x, y = (numbers(4, 3, 9, 12, seed=k).to(device) for k in (3, 4))
        there, back = torch.ops.ddfast.siamese_augment(x, rows, True), BACKWARD(y, rows)
        torch.testing.assert_close((there * y).sum(), (x * back).sum(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_first_and_second_derivatives(operation):
    images = numbers(2, 2, 4, 3).requires_grad_()
    rows = rows_of(operation, 2, (4, 3), seed=2)
    assert gradcheck(lambda x: siamese_augment(x, rows), images)
    assert gradgradcheck(lambda x: siamese_augment(x, rows), images)
    assert gradgradcheck(lambda x: siamese_augment(x, rows).pow(3).sum(), images)


def test_the_gradient_of_the_gradient_is_the_op_without_brightness():
    images, rows = numbers(4, 3, 6, 7).requires_grad_(), rows_of("everything", 2, (6, 7))
    weight = numbers(4, 3, 6, 7, seed=1).requires_grad_()
    (first,) = torch.autograd.grad(siamese_augment(images, rows), images, weight, create_graph=True)
    direction = numbers(4, 3, 6, 7, seed=2)
    (second,) = torch.autograd.grad(first, weight, direction)
    brightness = siamese_augment(torch.zeros(4, 3, 6, 7, dtype=torch.float64), rows)
    torch.testing.assert_close(second, siamese_augment(direction, rows) - brightness, rtol=0, atol=1e-12)


def test_nothing_of_the_size_of_the_images_is_kept():
    kept = []
    images = numbers(6, 3, 8, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        output = siamese_augment(images, rows_of("everything", 6, (8, 8)))
        torch.autograd.grad(output, images, torch.ones_like(output), create_graph=True)
    assert max(kept) == 6 * 16


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_row_leaves_out_changes_no_bit(device):
    for dtype in FLOATS:
        images = numbers(4, 3, 5, 6, dtype=dtype).to(device)
        images[0, 0, 2, 3] = torch.inf
        images[1, 1, 1, 1] = torch.nan
        made = siamese_augment(images, augment_parameters())
        assert torch.equal(made.nan_to_num(7, 8, 9), images.nan_to_num(7, 8, 9))
        assert made.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_depends_on_no_other(device):
    images, rows = numbers(8, 3, 20, 17, dtype=torch.float32).to(device), rows_of("everything", 4, (20, 17))
    grad = numbers(8, 3, 20, 17, dtype=torch.float32, seed=1)
    together = with_gradient(lambda x: siamese_augment(x, rows), images, grad)
    for k in range(8):
        alone = with_gradient(
            lambda x, k=k: siamese_augment(x, rows[k // 2][None]), images[k : k + 1], grad[k : k + 1]
        )
        assert all(torch.equal(a[0], b[k]) for a, b in zip(alone, together, strict=True))


@NATIVE
def test_cpp_is_the_same_on_any_number_of_threads():
    images, rows = numbers(40, 3, 32, 32, dtype=torch.float32), rows_of("everything", 8, (32, 32)).float()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append((OP(images, rows, False), BACKWARD(images, rows)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(other, found[0], strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_channels_last_stays_channels_last(dtype, device):
    images, rows = numbers(4, 3, 6, 5, dtype=dtype).to(device), rows_of("everything", 2, (6, 5))
    grad = numbers(4, 3, 6, 5, dtype=dtype, seed=1).to(device)
    wanted = with_gradient(lambda x: siamese_augment(x, rows), images, grad)
    last = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    made = siamese_augment(last, rows)
    (back,) = torch.autograd.grad(made, last, grad.contiguous(memory_format=torch.channels_last))
    for found, expected in zip((made, back), wanted, strict=True):
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, expected)
    assert siamese_augment(images[:, :, ::2], rows).is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    for shape in ((4, 3, 6, 5), (2, 1, 1, 1)):
        for dtype in (torch.float64, torch.float32):
            images = numbers(*shape, dtype=dtype).to(device).requires_grad_()
            rows = rows_of("everything", 2, shape[2:]).to(images)
            opcheck(OP, (images, rows, False))
            opcheck(BACKWARD, (images, rows))
    last = numbers(4, 3, 6, 5).to(device).contiguous(memory_format=torch.channels_last)
    opcheck(OP, (last, rows_of("everything", 2, (6, 5)).to(last), True))
    opcheck(BACKWARD, (last, rows_of("everything", 2, (6, 5)).to(last)))


@pytest.mark.parametrize("device", DEVICES)
def test_vmap(device):
    images = numbers(3, 4, 2, 5, 6).to(device)
    rows = torch.stack([rows_of("everything", 2, (5, 6), seed) for seed in range(3)]).to(device)
    for in_dims, arguments in [
        ((0, None), (images, rows[0])),
        ((None, 0), (images[0], rows)),
        ((0, 0), (images, rows)),
        ((3, 1), (images.movedim(0, 3), rows.movedim(0, 1))),
    ]:
        for function in (lambda x, p: siamese_augment(x, p), BACKWARD):
            one_by_one = [
                function(
                    *(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True))
                )
                for i in range(3)
            ]
            assert torch.equal(torch.vmap(function, in_dims)(*arguments), torch.stack(one_by_one))


def test_functorch_gradients():
    images, rows = numbers(4, 2, 5, 6), rows_of("everything", 2, (5, 6))
    wanted = with_gradient(lambda x: siamese_augment(x, rows), images, torch.ones(4, 2, 5, 6))[1]
    found = torch.func.grad(lambda x: siamese_augment(x, rows).sum())(images)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_compiles_in_one_graph():
    images, rows = numbers(4, 3, 6, 5).requires_grad_(), rows_of("everything", 2, (6, 5))

    def augment(images, rows):
        return siamese_augment(images, rows) * 2

    compiled = torch.compile(augment, backend="aot_eager", fullgraph=True)
    grad = numbers(4, 3, 6, 5, seed=1)
    found = with_gradient(lambda x: compiled(x, rows), images, grad)
    wanted = with_gradient(lambda x: augment(x, rows), images, grad)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_autocast_changes_no_dtype():
    images, rows = numbers(2, 3, 6, 5, dtype=torch.float32), rows_of("everything", 2, (6, 5))
    with torch.autocast("cpu", torch.bfloat16):
        made = siamese_augment(images, rows)
    assert torch.equal(made, siamese_augment(images, rows))


def test_nothing_to_do():
    for shape in ((0, 3, 5, 5), (2, 0, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0)):
        images = torch.zeros(shape, requires_grad=True)
        made = siamese_augment(images, rows_of("everything", 2, (5, 5)))
        made.sum().backward()
        assert made.shape == images.grad.shape == shape
    assert siamese_augment(torch.zeros(0, 3, 5, 5), torch.zeros(0, 16)).shape == (0, 3, 5, 5)


def test_parameters_are_numbers_or_a_number_a_row():
    rows = augment_parameters(
        2,
        mirrored=True,
        saturation=torch.tensor([0.5, 2]),
        shift=(1, torch.tensor([[3], [4]])),
        theta=torch.eye(3)[:2],
        cut=(0, 1, 2, 3),
    )
    assert rows.dtype == torch.float64
    assert rows.tolist() == [
        [1, 0, factor, 1, 1, across, 1, 0, 0, 0, 1, 0, 0, 1, 2, 3] for factor, across in ((0.5, 3), (2, 4))
    ]


IMAGES, ROWS = torch.zeros(4, 3, 5, 6), augment_parameters(2)


def changed(place, value):
    rows = ROWS.clone()
    rows[1, place] = value
    return rows


@pytest.mark.parametrize(
    ("images", "parameters", "error", "message"),
    [
        (IMAGES.int(), ROWS, TypeError, "must be floating point, got torch.int32 and torch.float64"),
        (IMAGES, ROWS.long(), TypeError, "got torch.float32 and torch.int64"),
        (IMAGES[0], ROWS, ValueError, r"images must be \[N, C, H, W\], got \[3, 5, 6\]"),
        (IMAGES, ROWS[0], ValueError, r"parameters must be \[G, 16\], got \[16\]"),
        (IMAGES, ROWS[:, :12], ValueError, r"parameters must be \[G, 16\], got \[2, 12\]"),
        (IMAGES[:3], ROWS, ValueError, "2 rows of parameters do not divide 3 images: give a row an image"),
        (IMAGES, ROWS[:0], ValueError, "0 rows of parameters do not divide 4 images"),
        (IMAGES, ROWS.clone().requires_grad_(), ValueError, "parameters must not require a gradient"),
        (IMAGES, changed(0, 0.5), ValueError, "mirrored must be 0 or 1, got 0.5 in row 1 of parameters"),
        (IMAGES, changed(2, torch.nan), ValueError, "saturation must be finite, got nan in row 1"),
        (IMAGES, changed(7, torch.inf), ValueError, "xy must be finite, got inf in row 1"),
        (IMAGES, changed(5, 1.5), ValueError, "across must be a whole number of pixels, got 1.5 in row 1"),
        (IMAGES, changed(15, -torch.inf), ValueError, "right must be a whole number of pixels, got -inf"),
    ],
)
def test_bad_arguments(images, parameters, error, message):
    with pytest.raises(error, match=message):
        siamese_augment(images, parameters)
