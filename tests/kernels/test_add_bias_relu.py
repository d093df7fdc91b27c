import pytest
import torch

from ddfast.ops import reference
from tests.kernels.harness import WHERE, compile_ahead, run_each
from tests.ops.test_add_bias_relu import DTYPES, case

LAUNCHER = "add_bias_relu.add_bias_relu_"


@pytest.mark.parametrize("where", WHERE)
def test_agrees_with_the_reference(where):
    cases = [
        *((*case(dtype), True) for dtype in DTYPES),
        (*case(torch.float32, bias=False), False),
        (*case(torch.float32, other=False), True),
        (*case(torch.float32, layout=torch.contiguous_format), True),
        (*case(torch.float16, (3, 37, 5, 9)), True),  # more than one program
        (*case(torch.float32, (0, 3, 2, 2)), True),
    ]
    if where == "interpreter":  # its arithmetic on bfloat16 is wrong
        cases = [each for each in cases if each[0].dtype != torch.bfloat16]
    for arguments, written in zip(
        cases, run_each([(LAUNCHER, each) for each in cases], where=where), strict=True
    ):
        wanted = arguments[0].clone(memory_format=torch.preserve_format)
        reference.add_bias_relu_(wanted, *arguments[1:])
        assert torch.equal(written, wanted)
        assert written.stride() == wanted.stride()


def test_compiles_for_every_gpu_with_wide_accesses_and_no_spills():
    cases = [
        (*case(dtype, (8, 64, 14, 14)), True) for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    for binary in compile_ahead(LAUNCHER, cases):
        assert binary.spilled_bytes == 0
        assert min(binary.store_bytes) == 16
        assert max(binary.load_bytes) == 16
