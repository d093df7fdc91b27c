import pytest
import torch

from ddfast.ops import add_bias_relu_
from tests.ops import layouts

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def case(dtype, shape=(2, 5, 3, 4), *, bias=True, other=True, layout=torch.channels_last):
    generator = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(*shape).contiguous(memory_format=layout)
    return x, normal(shape[1]) if bias else None, normal(*shape) if other else None


def exact(x, bias, other, relu):
    value = x.double()
    if bias is not None:
        value = value + bias.double()[:, None, None]
    if other is not None:
        value = value + other.double()
    return value.relu() if relu else value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("bias", "other"), [(True, True), (True, False), (False, True), (False, False)])
def test_is_rounded_once_and_written_over_the_input(dtype, relu, bias, other):
    x, *rest = case(dtype, bias=bias, other=other)
    wanted = exact(x, *rest, relu)
    assert add_bias_relu_(x, *rest, relu=relu) is x
    # The sum is float32 before it is rounded to the dtype.
    bound = torch.finfo(dtype).eps / 2 if dtype in (torch.float16, torch.bfloat16) else torch.finfo(dtype).eps
    assert (
        (x.double() - wanted).abs() <= bound * (1 + 2**-10) * wanted.abs() + 1e-6 * (dtype != torch.float64)
    ).all()


def test_float32_has_the_bits_of_the_separate_passes():
    x, bias, other = case(torch.float32)
    wanted = torch.relu((x + bias[:, None, None]) + other)
    assert torch.equal(add_bias_relu_(x, bias, other), wanted)


def test_nan_stays():
    x = torch.full((1, 2, 1, 1), float("nan"))
    assert add_bias_relu_(x, torch.zeros(2)).isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (1, 1, 1, 1), (2, 3, 0, 2)])
def test_small_and_empty(shape):
    x, bias, other = case(torch.float32, shape)
    wanted = exact(x, bias, other, True)
    torch.testing.assert_close(add_bias_relu_(x, bias, other).double(), wanted, rtol=1e-6, atol=1e-6)


def test_every_layout():
    for place in range(3):
        given = list(case(torch.float32))
        for name, tensor in list(layouts.others(given[place])):
            if place == 0 and "expanded" in name:
                with pytest.raises(ValueError, match="share memory"):
                    add_bias_relu_(tensor, *given[1:])
                continue
            arguments = [t.clone() for t in given]
            arguments[place] = tensor.clone(memory_format=torch.preserve_format) if place == 0 else tensor
            wanted = exact(*arguments, True)
            torch.testing.assert_close(add_bias_relu_(*arguments).double(), wanted, rtol=1e-6, atol=1e-6)


def test_opcheck():
    arguments = case(torch.float32)
    torch.library.opcheck(
        torch.ops.ddfast.add_bias_relu_.default,
        (*arguments, True),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_vmap_over_maps_and_biases():
    x, bias, other = case(torch.float32, (6, 5, 3, 4))
    maps, others = x.view(3, 2, 5, 3, 4).clone(), other.view(3, 2, 5, 3, 4)
    biases = torch.stack([bias, 2 * bias, -bias])
    wanted = torch.stack([exact(m, b, o, True) for m, b, o in zip(maps, biases, others, strict=True)])
    torch.vmap(lambda m, b, o: (torch.ops.ddfast.add_bias_relu_(m, b, o, True), m)[1])(maps, biases, others)
    torch.testing.assert_close(maps.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(1, 2, 3, 3, dtype=torch.int32),), TypeError, "got torch.int32"),
        ((torch.zeros(2, 3),), ValueError, r"must be \[B, C, H, W\], got \[2, 3\]"),
        ((torch.zeros(1, 2, 3, 3), torch.zeros(3)), ValueError, r"bias must be \[2\] for x"),
        ((torch.zeros(1, 2, 3, 3), torch.zeros(2).half()), TypeError, "bias must be torch.float32 as x is"),
        ((torch.zeros(1, 2, 3, 3), None, torch.zeros(1, 2, 3, 1)), ValueError, "other must be"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        add_bias_relu_(*arguments)


def test_a_gradient_is_refused():
    x, bias = torch.rand(2, 3, 4, 4), torch.zeros(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        add_bias_relu_(x, bias)
    with torch.no_grad():
        add_bias_relu_(x, bias)
