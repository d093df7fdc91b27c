import pytest
import torch

from ddfast.ops import _dispatch, reference
from tests.ops import layouts


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(
    "op", sorted(op for op in _dispatch._OPS if not op.endswith("_"))
)  # not those in place
def test_every_argument_may_lie_in_memory_in_any_way(op):
    run = getattr(torch.ops.ddfast, op)
    for what, given in layouts.variants(op):
        dense = layouts.contiguous(given)
        expected = getattr(reference, op)(*dense)
        found = run(*given)
        for one, wanted in zip(outputs(found), outputs(expected), strict=True):
            assert one.shape == wanted.shape, what
            torch.testing.assert_close(
                one, wanted, rtol=1e-4, atol=1e-4, msg=lambda text, what=what: f"{what}: {text}"
            )
        for argument, copy in zip(given, dense, strict=True):
            assert not isinstance(argument, torch.Tensor) or torch.equal(argument, copy), f"{what}: changed"
