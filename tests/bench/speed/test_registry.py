import math

import pytest
import torch

from bench.speed.measuring import Spread, extra_bytes, fastest
from bench.speed.registry import (
    Check,
    Contender,
    Contest,
    Entry,
    GateFailed,
    Measurement,
    Settings,
    Target,
    passed,
    relative_error,
)

CPU = torch.device("cpu")
QUICK = Settings(CPU, quick=True)


class Counted:
    """A contender's body that counts its calls."""

    def __init__(self, result):
        self.result = result
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.result


def contest(ours, peer):
    def gate():
        yield Check("values", relative_error(ours.result, peer.result), 1e-6)

    return Contest("case", ours=[Contender("float32", ours)], peer=Contender("peer", peer), gate=gate)


def test_a_wrong_contender_is_not_timed():
    ours, peer = Counted(torch.tensor([1.0, 2.01])), Counted(torch.tensor([1.0, 2.0]))
    with pytest.raises(GateFailed, match=r"case: the gate refuses to time: values: 0\.0045 exceeds 1e-06"):
        contest(ours, peer).measure(CPU, rounds=3, quick=False)
    assert (ours.calls, peer.calls) == (0, 0)


def test_a_right_contender_is_timed_beside_its_peer():
    ours, peer = Counted(torch.ones(2)), Counted(torch.ones(2))
    (row,) = contest(ours, peer).measure(CPU, rounds=3, quick=True)
    assert (ours.calls, peer.calls) == (4, 4)  # three rounds, and one for the memory
    assert row.ratio.p20 <= row.ratio.p50 <= row.ratio.p80
    assert row.gate == "values: 0 <= 1e-06"
    assert (row.rounds, row.peer, row.contender) == (3, "peer", "float32")


def test_a_long_contest_calls_each_contender_once_a_round():
    ours, peer = Counted(torch.ones(2)), Counted(torch.ones(2))
    long = Contest(
        "case",
        ours=[Contender("float32", ours, work=2)],
        peer=Contender("peer", peer),
        gate=lambda: [Check("nothing", 0.0, 0.0)],
        rounds=2,
        long=True,
    )
    (row,) = long.measure(CPU, rounds=None, quick=False)
    assert (ours.calls, peer.calls) == (2, 2)
    assert row.extra_bytes is not None


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 1.1])
def test_errors_that_never_pass(error):
    with pytest.raises(GateFailed):
        passed("case", [Check("fine", 0.0, 0.0), Check("values", error, 1.0)])


def test_a_gate_that_compares_nothing_does_not_pass():
    with pytest.raises(GateFailed, match="compares nothing"):
        passed("case", [])


def test_relative_error_notices_shapes_and_nan():
    ones = torch.ones(3)
    assert relative_error(ones, torch.ones(4)) == math.inf
    assert not relative_error(torch.tensor([1.0, float("nan"), 1.0]), ones) <= 1e9
    assert relative_error(ones * 1.5, ones) == 0.5


def measured(ratio=None, share=None, memory=(None, None), seconds=1.0):
    of = lambda value: None if value is None else Spread(value, value, value)  # noqa: E731
    return Measurement(
        "case", "float32", "peer", "images", "", 1,
        seconds=of(seconds), ratio=of(ratio), share=of(share),
        extra_bytes=memory[0], peer_extra_bytes=memory[1],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "target", "met"),
    [
        (measured(ratio=5.0), Target(5.0), True),
        (measured(ratio=4.9), Target(5.0), False),
        (measured(ratio=5.0, memory=(25, 100)), Target(5.0, memory=0.25), True),
        (measured(ratio=5.0, memory=(26, 100)), Target(5.0, memory=0.25), False),
        (measured(ratio=5.0), Target(5.0, memory=0.25), False),  # memory was not measured
        (measured(ratio=5.0, seconds=0.01), Target(4.0, rate=100), True),
        (measured(ratio=5.0, seconds=0.02), Target(4.0, rate=100), False),
        (measured(share=0.02), Target(share=0.02), True),
        (measured(share=0.021), Target(share=0.02), False),
        (measured(ratio=9.0), None, None),
    ],
)
def test_targets(row, target, met):
    assert row.meets(target) is met


def test_the_more_specific_target_comes_first():
    known = {"cpu": {"float32": Target(2.0), "case: float32": Target(3.0)}}
    entry = Entry("name", "what", 1.0, lambda settings: [], known)
    assert entry.target(CPU, measured()) == Target(3.0)
    assert entry.target(torch.device("cuda"), measured()) is None


def test_spread_interpolates_between_rounds():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    found = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.p20, found.p50, found.p80) == pytest.approx((1.8, 3.0, 4.2))
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_extra_bytes_finds_what_a_call_holds_at_its_peak():
    def allocates():
        held = torch.ones(64 * 2**20 // 4)
        del held

    found = extra_bytes(allocates, CPU)
    assert 60 * 2**20 <= found <= 90 * 2**20
    assert extra_bytes(lambda: None, CPU) < 8 * 2**20


def test_fastest_returns_one_of_the_settings_and_the_seconds_of_all():
    name, seconds = fastest({"a": lambda: None, "b": lambda: None}, CPU)
    assert name in seconds
    assert set(seconds) == {"a", "b"}
