import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ddfast.ops import _dispatch, _philox


@pytest.fixture
def current(monkeypatch):
    """The stack of devices that `torch.cuda.device` has made current, without a GPU."""
    stack = [torch.device("cuda", 0)]

    @contextmanager
    def device(chosen):
        stack.append(torch.device(chosen))
        try:
            yield
        finally:
            stack.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return stack


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("op", sorted(_dispatch._OPS))
def test_an_op_runs_with_the_device_of_its_arguments_as_the_current_one(op, triton, current, monkeypatch):
    seen = []

    def body(*args, **kwargs):
        seen.append(current[-1])

    entry = _dispatch._OPS[op]
    launcher = ModuleType("launcher")
    setattr(launcher, op, body)
    monkeypatch.setitem(sys.modules, f"ddfast.kernels.{entry.triton}", launcher)
    monkeypatch.setattr(_dispatch, "triton_status", lambda: (triton, ""))
    entry = _dispatch.Op(op, body, entry.native_accepts, entry.triton)
    with FakeTensorMode():
        there = torch.empty(2, device="cuda:1")
        _dispatch._on_gpu(entry, there, 3, None)
        _dispatch._on_gpu(entry, None, labels=there)
    assert seen == [torch.device("cuda", 1)] * 2
    assert current == [torch.device("cuda", 0)]


def test_tensors_on_two_devices_are_refused_in_one_line(current):
    entry = _dispatch._OPS["masked_batch"]
    with FakeTensorMode():
        here, there = torch.empty(2, device="cuda:0"), torch.empty(2, device="cuda:1")
        with pytest.raises(ValueError, match="one device, got cuda:1 and cuda:0: move them"):
            _dispatch._on_gpu(entry, there, here)


def test_a_table_made_for_a_tracer_is_not_kept():
    device = torch.device("cuda", 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert _philox.quantile_table(device).device == device
    assert device not in _philox._COPIES


def test_a_table_made_under_inference_serves_training_too():
    meta = torch.device("meta")
    _philox._COPIES.pop(meta, None)
    with torch.inference_mode():
        assert _philox.quantile_table(meta).device == meta
    assert not _philox._COPIES[meta].is_inference()
    assert _philox.quantile_table(meta) is _philox.quantile_table(meta)
