"""Passes recorded as CUDA graphs, with a stand-in for what recording asks of torch.cuda."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from ddfast.ops import grad_sq_norm_linear, graphs


def test_recording_needs_a_gpu():
    recorded = graphs.Recorded(lambda x: (x + 1,))
    for _ in range(4):
        assert torch.equal(recorded(torch.ones(2))[0], torch.full((2,), 2.0))
    assert recorded._recorded == {}
    assert recorded.reason == ""


class OnGpu(torch.Tensor):
    """A tensor that says that it is on the second GPU."""

    device = property(lambda self: torch.device("cuda", 1))


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for what recording asks of torch.cuda; its value is what was asked."""
    asked = []

    @contextmanager
    def context(name, *arguments, **options):
        asked.append((name, *arguments, *options.items()))
        yield

    class Event:
        def record(self, stream=None):
            asked.append(("record", stream))

    class Stream:
        def wait_event(self, event):
            asked.append(("wait", event))

    class Graph:
        def __init__(self):
            Graph.last = self
            asked.append(("record a graph",))

        def replay(self):
            body, places, outputs = self.recorded
            time.sleep(0.001)  # another thread has time to come between
            for output, value in zip(tree_leaves(outputs), tree_leaves(body(*places)), strict=True):
                if isinstance(output, torch.Tensor):
                    output.detach().copy_(value)

    def recording(body):
        body = body or (lambda x: (x + 1,))

        def function(*places):
            outputs = body(*places)
            if asked and asked[-1][0] == "graph":
                Graph.last.recorded = (body, places, outputs)
            return outputs

        return function

    Graph.last = Graph()
    asked.clear()
    monkeypatch.setattr(
        graphs, "_device_type", lambda tensor: "cuda"
    )  # below its subclass a tensor is on the CPU
    monkeypatch.setattr(torch.cuda, "device", lambda device: context("device", device))
    monkeypatch.setattr(
        torch.cuda, "graph", lambda graph, **options: context("graph", *sorted(options.items()))
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("stream of", device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    return asked, lambda body=None, **options: graphs.Recorded(recording(body), **options)


def test_a_pass_is_recorded_on_its_device_and_beside_other_threads(gpu):
    asked, make = gpu
    recorded = make()
    for _ in range(4):
        (output,) = recorded(torch.ones(2).as_subclass(OnGpu))
    assert output.tolist() == [2, 2]
    second = torch.device("cuda", 1)
    graph = ("graph", ("capture_error_mode", "thread_local"), ("stream", ("stream of", second)))
    assert [each for each in asked if each[0] == "graph"] == [graph]
    assert [each for each in asked if each[0] == "device"] == [("device", second)] * 4
    assert recorded.reason == ""


def test_a_replay_waits_for_the_one_before(gpu):
    asked, make = gpu
    recorded = make()
    for _ in range(4):
        recorded(torch.ones(2).as_subclass(OnGpu))
    steps = [each[0] for each in asked if each[0] in ("wait", "record", "graph")]
    assert steps == ["graph", "record", "wait", "record", "wait", "record"]


def test_threads_take_turns_with_a_recording(gpu):
    recorded = gpu[1]()
    for _ in range(3):
        recorded(torch.zeros(2).as_subclass(OnGpu))

    def call(value):
        return [float(recorded(torch.full((2,), value).as_subclass(OnGpu))[0][0]) for _ in range(10)]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(call, (1.0, 2.0, 3.0, 4.0)))
    assert found == [[value] * 10 for value in (2.0, 3.0, 4.0, 5.0)]


def there(*values):
    return torch.tensor(values).as_subclass(OnGpu)


def recordings(asked):
    return sum(each == ("record a graph",) for each in asked)


def test_a_warm_function_is_replayed_at_its_first_call(gpu):
    asked, make = gpu
    calls = []
    recorded = make(lambda x: (calls.append(1), (x * 2, x + 1))[1])
    assert recorded.warm(there(0.0, 0.0))
    made, before = recordings(asked), len(calls)
    double, more = recorded(there(3.0, 5.0))
    assert (double.tolist(), more.tolist()) == ([6, 10], [4, 6])
    assert recordings(asked) == made == 1
    assert len(calls) == before + 1  # the stand-in's replay
    assert recorded.warm(there(0.0, 0.0))
    assert recordings(asked) == 1


def test_results_and_inputs_are_the_callers_own(gpu):
    recorded = gpu[1](lambda x: (x, x * 2))
    recorded.warm(there(0.0))
    given = there(1.0)
    first = recorded(given)
    second = recorded(there(2.0))
    first[0].add_(10)
    assert [float(t) for t in (*first, *second, given)] == [11, 2, 2, 4, 1]
    assert [float(t) for t in recorded(there(3.0))] == [3, 6]


def test_autograd_and_our_ops_run_inside(gpu):
    make = gpu[1]

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * 2 + grad_sq_norm_linear(x, grad, bias=False)[:, None]

    def gradient(x):
        x = torch.Tensor(x).detach().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(Doubled.apply(x).square().sum(), x)
        return (grad.as_subclass(OnGpu),)

    x = there([1.0, 2.0], [0.5, 3.0])
    wanted = gradient(x)[0].tolist()
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            if mode is torch.inference_mode:  # where autograd cannot run
                recorded = make(lambda x: (x * 3,))
                assert recorded.warm(x)
                assert recorded(x)[0].tolist() == (x * 3).tolist()
                continue
            recorded = make(gradient)
            assert recorded.warm(torch.zeros(2, 2).as_subclass(OnGpu)), recorded.reason
            (grad,) = recorded(x)
        assert grad.tolist() == wanted
        assert not grad.requires_grad


def test_modes_of_autograd_are_recorded_apart(gpu):
    asked, make = gpu
    recorded = make()
    with torch.inference_mode():
        recorded.warm(torch.zeros(2).as_subclass(OnGpu))
        recorded(torch.zeros(2).as_subclass(OnGpu))
    with torch.no_grad():
        for _ in range(4):
            (out,) = recorded(torch.zeros(2).as_subclass(OnGpu))
    assert recordings(asked) == 2
    assert not out.is_inference()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: (x + torch.rand(x.shape),), r"it draws random numbers \(aten::rand\)"),
        (lambda x: (torch.randn_like(x),), "draws random numbers"),
        (lambda x: (x + torch.randperm(2),), "draws random numbers"),
        (lambda x: (functional.dropout(x, 0.5, True),), "draws random numbers"),
        (lambda x: (x.clone().normal_(),), "draws random numbers"),
        (lambda x: (x * float(x.sum()),), "it waits for numbers from the GPU"),
        (
            lambda x: (x * torch.ones(2, requires_grad=True),),
            "its results require a gradient",
        ),
    ],
)
def test_what_a_replay_would_not_repeat_runs_as_it_is(function, reason, gpu):
    asked, make = gpu
    recorded = make(function)
    with torch.enable_grad():
        for _ in range(5):
            recorded(torch.ones(2).as_subclass(OnGpu))
        assert not recorded.warm(torch.ones(2).as_subclass(OnGpu))
    assert recordings(asked) == 0
    assert re.search(reason, recorded.reason)


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (lambda x: torch.tensor([1.0, 2.0], device="cuda"), "from the host to the GPU"),
        (lambda x: x + torch.ones(2).to("cuda"), "from the host to the GPU"),
        (lambda x: x.copy_(torch.ones(2)), "from the host to the GPU"),
        (lambda x: x.copy_(torch.tensor(2.0)), "from the host to the GPU"),
        (lambda x: x[torch.tensor([0])], "from the host to the GPU"),
        (lambda x: x.cpu(), "waits for numbers from the GPU"),
        (lambda x: torch.ones(2).copy_(x), "waits for numbers from the GPU"),
        (lambda x: x * torch.tensor(2.0), ""),
        (lambda x: functional.dropout(x, 0.5, False) + torch.native_dropout(x, 0.0, True)[0], ""),
        (lambda x: x.to(torch.float16) + torch.zeros(2, device="cuda") + x.clone().fill_(3), ""),
    ],
)
def test_copies_between_host_and_gpu_are_seen(function, fault):
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, device="cuda")
        with graphs._Watch() as watch:
            function(x)
    assert fault in watch.fault
    assert bool(fault) == bool(watch.fault)


def test_a_limited_number_of_kinds_is_recorded(gpu):
    asked, make = gpu
    recorded = make(limit=2)
    for size in (1, 2, 3):
        assert recorded.warm(torch.zeros(size).as_subclass(OnGpu)) == (size < 3)
    assert recordings(asked) == 2
    assert recorded(torch.zeros(3).as_subclass(OnGpu))[0].tolist() == [1, 1, 1]
    assert recorded.reason == "2 kinds of inputs are recorded, which is the limit"
    recorded.forget()
    assert recorded.warm(torch.zeros(3).as_subclass(OnGpu))


def test_a_failed_recording_gives_the_results_and_the_reason(gpu, monkeypatch):
    asked, make = gpu
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append(("synchronize",)))
    recorded = make()

    @contextmanager
    def graph(graph, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: asked.append(("stream", stream)))
    for _ in range(5):
        assert recorded(there(1.0, 2.0))[0].tolist() == [2, 3]
    assert [each for each in asked if each[0] == "stream"] == [("stream", "the caller's")]
    assert recorded.reason == "it cannot be recorded: operation not permitted when stream is capturing"
    assert ("synchronize",) in asked


def test_arguments_may_be_nested_and_other_values_have_recordings_of_their_own(gpu):
    asked, make = gpu
    made = []

    def scaled(given, factor, more):
        made.append(factor)
        return {"scaled": [given["x"] * factor, given["labels"] + 1], "more": more}

    recorded = make(scaled)
    for factor in (2.0, 3.0):
        for value in range(4):
            given = {"x": there(1.0 + value), "labels": torch.tensor([value]).as_subclass(OnGpu)}
            found = recorded(given, factor, None)
            assert found["scaled"][0].tolist() == [(1 + value) * factor]
            assert found["scaled"][1].tolist() == [value + 1]
            assert found["more"] is None
    assert recordings(asked) == 2
    assert given["x"].tolist() == [4]


def test_nothing_is_recorded_or_replayed_where_all_runs_as_it_is(gpu):
    asked, make = gpu
    calls = []
    recorded = make(lambda x: (calls.append(1), (x + 1,))[1])
    recorded.warm(there(0.0))
    before = len(calls)
    with graphs.unrecorded():
        assert float(recorded(there(1.0))[0]) == 2
        with graphs.unrecorded():
            pass
        other = make()
        for _ in range(4):
            other(there(1.0))
    assert len(calls) == before + 1
    assert recordings(asked) == 1


def test_a_refusal_names_what_runs_as_it_is(gpu, caplog):
    recorded = gpu[1](lambda x: (x * float(x.sum()),), what="the step of dm")
    with caplog.at_level("INFO", logger="ddfast.ops.graphs"):
        for _ in range(5):
            recorded(there(1.0))
    assert [record.getMessage() for record in caplog.records] == [
        "the step of dm runs without a CUDA graph: it waits for numbers from the GPU (aten::_local_scalar_dense)"
    ]


def test_calls_that_a_recording_cannot_serve_run_as_they_are(gpu, monkeypatch):
    asked, make = gpu
    recorded = make()
    assert recorded.warm(there(0.0, 0.0))
    with torch.enable_grad():
        leaf = there(1.0, 2.0).requires_grad_()
        assert recorded(leaf)[0].requires_grad
    assert recorded.reason == "its inputs require a gradient"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert recorded(there(1.0, 2.0))[0].tolist() == [2, 3]
    assert recorded.reason == "it is called under autocast"
    assert recorded(there(4.0, 2.0))[0].tolist() == [5, 3]
    assert recordings(asked) == 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: (x[x > 1],), "it waits to know how large a result is (aten::index)"),
        (lambda x: (x.clone().index_put_((x > 1,), x.new_zeros(())),), "(aten::index_put_)"),
        (lambda x: (x.nonzero(),), "it waits to know how large a result is (aten::nonzero)"),
        (lambda x: (x[torch.ones_like(x, dtype=torch.int64)],), ""),
        (lambda x: (x.repeat_interleave(2),), ""),
    ],
)
def test_results_whose_size_depends_on_numbers_are_refused(gpu, function, reason):
    recorded = gpu[1](function)
    for _ in range(4):
        recorded(there(1.0, 2.0))
    assert recorded.reason.endswith(reason) if reason else recorded.reason == ""
