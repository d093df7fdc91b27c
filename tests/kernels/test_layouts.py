import pytest
import torch

from ddfast.ops import _dispatch, reference
from tests.kernels.harness import WHERE, run_each
from tests.ops import layouts

OPS = {op.name: f"{op.triton}.{op.name}" for op in _dispatch._OPS.values() if op.triton is not None}


@pytest.mark.parametrize("where", WHERE)
def test_every_argument_may_lie_in_memory_in_any_way(where):
    cases = [(op, what, given) for op in sorted(OPS) for what, given in layouts.together(op)]
    results = run_each([(OPS[op], given) for op, _, given in cases], where=where)
    for (op, what, given), found in zip(cases, results, strict=True):
        expected = getattr(reference, op)(*layouts.contiguous(given))
        found, expected = (r if isinstance(r, tuple | list) else (r,) for r in (found, expected))
        for one, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(
                one, wanted, rtol=1e-4, atol=1e-4, msg=lambda text, at=f"{op}, {what}": f"{at}: {text}"
            )
