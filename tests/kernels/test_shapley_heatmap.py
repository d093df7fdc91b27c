import itertools

import pytest
import torch

from ddfast.ops import reference
from tests.kernels.harness import WHERE, compile_ahead, run

LAUNCHER = "shapley_heatmap.shapley_heatmap"
VALUES = ("logit", "prob", "logprob")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def case(batch, count, classes, players, value, dtype=torch.float32, per_image=False):
    generator = torch.Generator().manual_seed(count)
    outputs = (torch.randn(batch, count, classes, generator=generator) * 4).to(dtype)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    shape = (batch, count, players) if per_image else (count, players)
    projection = torch.randn(shape, generator=generator) / max(count, 1)
    return outputs, labels, projection.double() if dtype == torch.float64 else projection, value


LOGITS = [
    case(*size, "logit", dtype, per_image)
    for size, dtype, per_image in itertools.product(
        [(1, 1, 1, 1), (3, 37, 5, 9), (2, 33, 1000, 25)], DTYPES[:3], (False, True)
    )
]
SOFTMAX = [
    case(6, 20, classes, 16, value, dtype)
    for classes, value, dtype in itertools.product((10, 300), VALUES[1:], DTYPES[:3])
]
FLOAT64 = [case(2, 19, 300, 7, value, torch.float64) for value in VALUES]


def one_row(logits, label, value):
    return logits[None, None], torch.tensor([label]), torch.ones(1, 1), value


LADDER = torch.tensor([-torch.inf, 0.0, 1.0, 2.0])
LATE = torch.full((300,), -torch.inf)  # the first block of classes has no finite logit
LATE[290:] = torch.arange(10.0)
INFINITE = [
    *(one_row(LADDER, label, value) for value in VALUES[1:] for label in range(4)),
    *(one_row(LATE, 295, value) for value in VALUES),
]
UNLABELLED = [one_row(LADDER, label, value) for value in VALUES for label in (-1, 4)]


def strided():
    outputs, labels, projection, value = case(4, 12, 20, 10, "prob")
    return outputs[::2, 1::2, ::3], labels[::2] // 3, projection.mT[1::2, ::2].mT, value


EMPTY = [case(*sizes, "prob") for sizes in [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 5, 0)]]


@pytest.mark.parametrize("where", WHERE)
def test_against_the_reference(where):
    groups = [LOGITS, SOFTMAX, FLOAT64, [*INFINITE, strided()], EMPTY, UNLABELLED]
    results = iter(run(LAUNCHER, [arguments for group in groups for arguments in group], where=where))
    logits, softmax, float64, special, empty, unlabelled = [
        [next(results) for _ in group] for group in groups
    ]

    for arguments, phi in zip(LOGITS, logits, strict=True):
        assert torch.equal(phi, reference.shapley_heatmap(*arguments))

    for (outputs, labels, projection, value), phi in zip(SOFTMAX, softmax, strict=True):
        exact = reference.shapley_heatmap(outputs.double(), labels, projection.double(), value)
        plain = reference.coalition_values(outputs, labels, value) @ projection
        error, plain_error = ((x.double() - exact).norm() for x in (phi, plain))
        assert error <= 2 * plain_error

    for arguments, phi in zip(FLOAT64, float64, strict=True):
        torch.testing.assert_close(phi, reference.shapley_heatmap(*arguments), rtol=1e-13, atol=1e-14)

    for arguments, phi in zip([*INFINITE, strided()], special, strict=True):
        torch.testing.assert_close(phi, reference.shapley_heatmap(*arguments), rtol=1e-6, atol=1e-7)

    for arguments, phi in zip(EMPTY, empty, strict=True):
        assert torch.equal(phi, reference.shapley_heatmap(*arguments))

    assert all(phi.isnan().all() for phi in unlabelled)


def test_compiles_for_every_gpu_with_wide_loads_and_no_spills():
    cases = [
        case(2, 32, 10, 16, "prob", torch.float32),
        case(2, 32, 1000, 16, "logit", torch.bfloat16),
        case(2, 32, 1000, 16, "prob", torch.float32),
        case(2, 32, 1000, 16, "prob", torch.float64),
        case(2, 32, 1000, 196, "logprob", torch.float16, per_image=True),
    ]
    for binary in compile_ahead(LAUNCHER, cases):
        assert binary.spilled_bytes == 0
        assert " mma" not in binary.ptx
        if binary.case >= 2:
            assert max(binary.load_bytes) == 16  # although 1000 is a multiple of 8 only
