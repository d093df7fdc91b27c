import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn import functional as F

import ddfast
from ddfast.ops import class_kl

OP = torch.ops.ddfast.class_kl.default
REDUCTIONS = ("mean", "class")
LABELS = torch.tensor([3, 0, 3, 7, 0, 3, 3])


def draw(rows=7, width=5, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(rows, width, generator=generator, dtype=torch.float64)).to(dtype)


def plain(features, labels, reduction):
    """As the definition reads, one class after another."""
    p, values = features.softmax(1), []
    for label in labels.unique():
        rows = p[labels == label]
        values.append((rows * (rows.log() - rows.mean(0).log())).sum(1))
    return torch.cat(values).mean() if reduction == "mean" else torch.stack([v.mean() for v in values]).mean()


def authors(features, labels):
    """As the code of the paper's authors has it."""
    total = 0
    for label in labels.unique():
        rows = features[labels == label]
        mean = rows.softmax(1).mean(0, keepdim=True).expand_as(rows)
        divergence = F.kl_div(mean.log(), rows.log_softmax(1), log_target=True, reduction="batchmean")
        total = total + divergence * len(rows)
    return total / len(features)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_value_and_gradient_are_those_of_the_definition(reduction):
    features = draw().requires_grad_()
    found, expected = class_kl(features, LABELS, reduction), plain(features, LABELS, reduction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    (grad,), (wanted,) = (torch.autograd.grad(3 * value, features) for value in (found, expected))
    torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-14)


def test_is_the_authors_form():
    features = draw().requires_grad_()
    found, expected = ddfast.cmi(features, LABELS), authors(features, LABELS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    (grad,), (wanted,) = (torch.autograd.grad(value, features) for value in (found, expected))
    torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-14)


def test_a_classs_value_is_a_difference_of_entropies():
    features = draw(4)
    p = features.softmax(1)

    def entropy(q):
        return -(q * q.log()).sum(-1)

    found = class_kl(features, torch.zeros(4, dtype=torch.int64), "class")
    torch.testing.assert_close(found, entropy(p.mean(0)) - entropy(p).mean(), rtol=1e-12, atol=1e-14)


def test_reductions_weigh_classes_apart():
    rows = draw(6)
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    each = [class_kl(rows[labels == k], labels[labels == k]) for k in (0, 1)]
    torch.testing.assert_close(class_kl(rows, labels), (4 * each[0] + 2 * each[1]) / 6)
    torch.testing.assert_close(class_kl(rows, labels, "class"), (each[0] + each[1]) / 2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives(reduction):
    features = draw(5, 4).requires_grad_()
    labels = LABELS[:5]
    assert gradcheck(lambda z: class_kl(z, labels, reduction), features)
    assert gradgradcheck(lambda z: class_kl(z, labels, reduction), features)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_row_alone_and_rows_alike_have_no_divergence(reduction):
    for features, labels in (
        (draw(3), torch.tensor([4, 1, 9])),
        (draw(1).expand(3, -1), torch.tensor([2, 2, 2])),
        (draw(3, 1), torch.tensor([0, 0, 1])),
    ):
        features = features.clone().requires_grad_()
        value = class_kl(features, labels, reduction)
        (grad,) = torch.autograd.grad(value, features)
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-15)
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_below_the_smallest_float_count(dtype):
    """Features 2000 apart: the third feature's probability is 0 in every row, its logarithm is not."""
    features = torch.tensor([[0.0, 1.0, -2000.0], [1.0, 0.0, -2000.0]], dtype=dtype).requires_grad_()
    labels = torch.zeros(2, dtype=torch.int64)
    value = class_kl(features, labels)
    (grad,) = torch.autograd.grad(value, features)
    torch.testing.assert_close(value, class_kl(features[:, :2], labels))
    assert grad.isfinite().all()
    absent = torch.tensor([[0.0, 1.0, -torch.inf], [1.0, 0.0, -torch.inf]], dtype=dtype)
    torch.testing.assert_close(class_kl(absent, labels), value.detach())
    opposite = torch.tensor([[0.0, 500.0], [500.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(class_kl(opposite, labels), torch.tensor(2.0, dtype=dtype).log())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_error_is_that_of_the_plain_computation(dtype, reduction):
    labels = torch.arange(60) % 7
    features = draw(60, 129, dtype).requires_grad_()
    exact_features = features.detach().double().requires_grad_()
    exact = plain(exact_features, labels, reduction)
    (exact_grad,) = torch.autograd.grad(exact, exact_features)
    errors = []
    for function in (class_kl, plain):
        value = function(features, labels, reduction)
        (grad,) = torch.autograd.grad(value, features)
        assert grad.dtype == dtype
        errors.append(
            ((value.double() - exact).abs() / exact, (grad.double() - exact_grad).norm() / exact_grad.norm())
        )
    assert class_kl(features, labels, reduction).dtype == torch.float32
    for ours, same in zip(*errors, strict=True):
        assert ours <= max(2 * same, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_opcheck(dtype):
    _, members, counts = LABELS.unique(return_inverse=True, return_counts=True)
    opcheck(OP, (draw(dtype=dtype), members, counts, True))
    opcheck(OP, (draw(dtype=dtype).requires_grad_(), members, counts, False))


def test_strided_features():
    features = draw(5, 7).T
    torch.testing.assert_close(
        class_kl(features, LABELS), class_kl(features.contiguous(), LABELS), rtol=0, atol=0
    )


def test_torch_func():
    features = draw()
    found = torch.func.grad(lambda z: class_kl(z, LABELS))(features)
    leaf = features.clone().requires_grad_()
    (expected,) = torch.autograd.grad(class_kl(leaf, LABELS), leaf)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ddfast.cmi(torch.zeros(2, 3).long(), torch.zeros(2).long()),
            TypeError,
            "got torch.int64 and",
        ),
        (lambda: ddfast.cmi(torch.zeros(2, 3), torch.zeros(2)), TypeError, "labels int64"),
        (lambda: ddfast.cmi(torch.zeros(2, 3), torch.zeros(3).long()), ValueError, r"got \[2, 3\] and \[3\]"),
        (lambda: ddfast.cmi(torch.zeros(0, 3), torch.zeros(0).long()), ValueError, "at least 1"),
        (lambda: ddfast.cmi(torch.zeros(2, 3, 4), torch.zeros(2).long()), ValueError, r"\[n, M\]"),
        (
            lambda: ddfast.cmi(torch.zeros(2, 3), torch.zeros(2).long(), "sum"),
            ValueError,
            "'mean' or 'class'",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_counts_that_are_known_give_the_same_bits():
    rows, labels = torch.randn(6, 9), torch.tensor([0, 2, 1, 0, 0, 2])
    for reduction in ("mean", "class"):
        known = class_kl(rows, labels, reduction, torch.tensor([3, 1, 2]))
        assert torch.equal(known, class_kl(rows, labels, reduction))
    with pytest.raises(ValueError, match=r"counts must be int64 \[C\]"):
        class_kl(rows, labels, counts=torch.ones(3))


def test_a_class_without_rows_is_none_of_those_that_are_averaged():
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0, 0, 0, 2, 2, 2])
    wanted = ddfast.ops.class_kl(features, labels, reduction="class")
    found = ddfast.ops.class_kl(features, labels, reduction="class", counts=torch.tensor([3, 0, 3]))
    assert torch.equal(found, wanted)
