import pytest

from ddfast import crowding
from ddfast.crowding import Neighbours, crowded, seconds_worked, warn_of_crowding

STAT = """cpu  100 0 100 1000 50 5 5 0 0 0
cpu0 60 1 30 500 25 4 3 7 0 0
cpu1 40 0 20 500 25 1 2 0 0 0
intr 12345
"""


def test_seconds_worked_are_those_of_the_usable_cores():
    assert seconds_worked(STAT, {0, 1}, 100) == pytest.approx((60 + 1 + 30 + 4 + 3 + 40 + 20 + 1 + 2) / 100)
    assert seconds_worked(STAT, {1}, 100) == pytest.approx(0.63)
    assert seconds_worked(STAT, {7}, 100) == 0


@pytest.mark.parametrize(
    ("busy", "threads", "cores", "expected"),
    [
        (0, 2, 2, False),
        (1, 2, 2, True),
        (1, 1, 2, False),
        (2, 4, 16, False),
        (13, 4, 16, True),
        (0.4, 2, 2, False),
    ],
)
def test_threads_are_crowded_where_others_leave_too_few_cores(busy, threads, cores, expected):
    assert crowded(busy, threads, cores) == expected


def looking(monkeypatch, others, own):
    """Neighbours on a clock of ours: in two seconds `others` seconds of work by others, `own` by this process."""
    state = {"now": 0.0, "own": 0.0, "worked": 50.0}
    monkeypatch.setattr(crowding.time, "monotonic", lambda: state["now"])
    monkeypatch.setattr(crowding.time, "process_time", lambda: state["own"])
    monkeypatch.setattr(crowding, "_worked", lambda: state["worked"])
    found = Neighbours()
    state.update(now=2.0, own=own, worked=50.0 + others + own)
    return found


def test_own_work_does_not_count(monkeypatch):
    assert looking(monkeypatch, 0.0, 4.0).busy_cores() == 0
    assert looking(monkeypatch, 3.0, 1.0).busy_cores() == pytest.approx(1.5)


def test_the_warning_says_what_was_seen_and_what_to_set(monkeypatch, capsys):
    monkeypatch.setattr(crowding, "usable_cores", lambda: 4)
    warn_of_crowding(looking(monkeypatch, 4.0, 0.0), 4, "--threads {}".format)
    assert capsys.readouterr().err == (
        "other programs keep 2.0 of 4 cores busy and 4 threads of this run would wait for them: wait until they are "
        "done, or start anew with --threads 2\n"
    )
    warn_of_crowding(looking(monkeypatch, 4.0, 0.0), 4, "--threads {}".format, quiet=True)
    warn_of_crowding(looking(monkeypatch, 0.0, 8.0), 4, "--threads {}".format)
    warn_of_crowding(looking(monkeypatch, 8.0, 0.0), 1, "--threads {}".format)
    assert capsys.readouterr().err == ""


def test_a_system_that_does_not_say_is_not_crowded(monkeypatch, tmp_path):
    monkeypatch.setattr(crowding, "_STAT", tmp_path / "stat")
    assert Neighbours().busy_cores() == 0
