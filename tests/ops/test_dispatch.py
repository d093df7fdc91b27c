from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ddfast import ops, philox
from ddfast.ops import _constants, _dispatch


@pytest.fixture
def gpus(monkeypatch):
    """How many GPUs there are to see."""

    def see(count):
        monkeypatch.setattr(_dispatch, "_gpus", lambda: count)

    see(2)
    return see


@pytest.fixture
def current(gpus, monkeypatch):
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
    monkeypatch.setattr(_dispatch, "_launcher", lambda module, name: body)
    monkeypatch.setattr(_dispatch, "triton_status", lambda: (triton, ""))
    entry = _dispatch.Op(op, body, entry.native_accepts, entry.triton)
    with FakeTensorMode():
        there = torch.empty(2, device="cuda:1")
        _dispatch._on_gpu(entry, there, 3, None)
        _dispatch._on_gpu(entry, None, labels=there)
    assert seen == [torch.device("cuda", 1)] * 2
    assert current == [torch.device("cuda", 0)]


def test_the_only_gpu_is_not_made_current_at_every_call(gpus, current):
    gpus(1)
    entry = _dispatch.Op("op", lambda tensor: current[-1], None, None)
    current[-1] = "as it was"
    with FakeTensorMode():
        assert _dispatch._on_gpu(entry, torch.empty(2, device="cuda:0")) == "as it was"


@pytest.mark.parametrize("op", sorted(op.name for op in _dispatch._OPS.values() if op.triton))
def test_every_op_finds_its_launcher(op):
    pytest.importorskip("triton")
    assert _dispatch._launcher(_dispatch._OPS[op].triton, op).__name__ == op


def test_tensors_on_two_devices_are_refused_in_one_line(current):
    entry = _dispatch._OPS["masked_batch"]
    with FakeTensorMode():
        here, there = torch.empty(2, device="cuda:0"), torch.empty(2, device="cuda:1")
        with pytest.raises(ValueError, match="one device, got cuda:1 and cuda:0: move them"):
            _dispatch._on_gpu(entry, there, here)


def test_a_table_made_for_a_tracer_is_not_kept():
    device = torch.device("cuda", 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert philox.quantile_table(device).device == device
    assert device not in philox._COPIES


def test_a_table_made_under_inference_serves_training_too():
    meta = torch.device("meta")
    philox._COPIES.pop(meta, None)
    with torch.inference_mode():
        assert philox.quantile_table(meta).device == meta
    assert not philox._COPIES[meta].is_inference()
    assert philox.quantile_table(meta) is philox.quantile_table(meta)


def test_settings_are_sent_to_a_device_once():
    images, coalitions = torch.rand(2, 3, 4, 4), torch.ones(3, 4, dtype=torch.bool)
    _constants._KEPT.clear()

    def call(mean, baseline=0.5):
        return ops.masked_batch(images, coalitions, grid=2, mean=mean, baseline=baseline)

    first = call([0.1, 0.2, 0.3])
    kept = dict(_constants._KEPT)
    assert len(kept) == 2
    assert torch.equal(call([0.1, 0.2, 0.3]), first)
    assert {key: id(value) for key, value in _constants._KEPT.items()} == {k: id(v) for k, v in kept.items()}
    changed = call([0.1, 0.2, 0.4])
    assert torch.equal(changed[:, :2], first[:, :2])
    assert not torch.equal(changed[:, 2], first[:, 2])
    zeros = [ops.masked_batch(images, ~coalitions, grid=2, baseline=zero) for zero in (0.0, -0.0)]
    assert [bool(zero.signbit().all()) for zero in zeros] == [False, True]
    mean = torch.tensor([0.1, 0.2, 0.3])
    assert torch.equal(call(mean), first)
    mean += 1  # a tensor's values may change between calls
    torch.testing.assert_close(call(mean), first - 1)


def test_a_constant_made_under_inference_serves_training_and_one_of_a_tracer_is_not_kept():
    _constants._KEPT.clear()
    with FakeTensorMode():
        ops.crop_resize(torch.empty(2, 3, 8, 8), torch.empty(2, 2, 4), 4)
    assert _constants._KEPT == {}
    boxes = torch.tensor([[[0.0, 0, 4, 4], [1, 1, 8, 8]]] * 2)
    images = torch.rand(2, 3, 8, 8)
    with torch.inference_mode():
        ops.crop_resize(images, boxes, 4)
    assert [value.is_inference() for value in _constants._KEPT.values()] == [False]
    ops.crop_resize(images.requires_grad_(), boxes, 4).sum().backward()
    assert images.grad.shape == images.shape


def test_no_more_constants_are_kept_than_a_few(monkeypatch):
    monkeypatch.setattr(_constants, "MAX_KEPT", 2)
    _constants._KEPT.clear()
    for value in range(5):
        assert _constants.shared(value, lambda: torch.full((1,), float(value))).item() == value  # noqa: B023
        assert len(_constants._KEPT) <= 2
