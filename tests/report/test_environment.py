import torch

from ddfast.ops import paths
from ddfast.report.environment import describe_environment


def test_every_op_and_every_fact_is_named():
    text = describe_environment()
    lines = text.splitlines()
    for op in {path.op for path in paths()}:
        assert any(line.split()[0] == op for line in lines if line)
    for fact in ("ddfast", "python", "torch", "triton", "pillow", "cpu", "gpu", "compiler", "loader"):
        assert any(line.split()[0] == fact for line in lines if line)
    assert torch.__version__.split("+")[0] in text


def test_cuda_is_not_initialised():
    describe_environment()
    assert not torch.cuda.is_initialized()


def test_a_fallback_is_given_its_reason(monkeypatch):
    from ddfast.ops import _dispatch

    monkeypatch.setattr(_dispatch, "native_status", lambda: (False, "switched off by DDFAST_NATIVE=0"))
    assert "reference (switched off by DDFAST_NATIVE=0)" in describe_environment()
