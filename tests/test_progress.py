import contextlib
import fcntl
import io
import os
import pty
import struct
import sys
import termios
import types

import pytest

from ddfast.progress import Outlook, Progress, ways_of_machine


def shown(total, done):
    with Progress("score", total, "images") as progress:
        for _ in range(done):
            progress.advance()


@pytest.mark.parametrize(
    ("environment", "columns", "bar"),
    [
        ({}, 80, True),
        ({"COLUMNS": "120"}, 80, True),
        ({}, 0, False),
        ({}, 12, False),
        ({"COLUMNS": "0"}, 80, False),
        ({"COLUMNS": "200"}, 0, False),
        ({"TERM": "dumb"}, 80, False),
    ],
)
def test_a_terminal_without_room_gets_lines(environment, columns, bar, monkeypatch):
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        shown(3, 3)
    said = ""
    with contextlib.suppress(OSError):  # the end of what a closed terminal was sent
        while part := os.read(reader, 10_000):
            said += part.decode()
    os.close(reader)
    assert ("100%" in said) == bar
    assert said == "score: 3/3 images in 0s\r\n" or bar


def test_a_file_gets_lines_and_one_is_singular(monkeypatch, capsys):
    shown(1, 1)
    assert capsys.readouterr().err == "score: 1/1 image in 0s\n"
    monkeypatch.setattr("ddfast.progress.LOG_INTERVAL", 0.0)
    shown(2, 1)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("score: 1/2 images, ")
    assert last == "score: 1/2 images in 0s"


def test_a_stream_that_is_no_terminal_at_all(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    shown(1, 1)
    assert stream.getvalue() == "score: 1/1 image in 0s\n"


# Of hours -----------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_a_stage_of_hours_says_after_a_minute_what_would_be_faster(capsys, monkeypatch):
    clock = Clock()
    outlook = Outlook(1, ["fewer --iterations", "a GPU", "more threads (--threads 8)"], clock=clock)
    with Progress("synthesize", 1000, "steps", done=100, outlook=outlook) as progress:
        for _ in range(9):
            clock.now += 10
            progress.advance()
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if "faster" in line]
    assert said == [
        "synthesize: about 2h29m left; faster with fewer --iterations, a GPU or more threads (--threads 8)"
    ]
    assert lines.index(said[0]) == 2  # behind the lines at 20 and 40 s
    assert lines[-1] == "synthesize: 109/1000 steps in 1m30s"


@pytest.mark.parametrize(
    ("steps", "seconds", "quiet"), [(300, 10, False), (1000, 10, True), (1000, 5, False), (61, 59, False)]
)
def test_a_stage_of_less_says_nothing(steps, seconds, quiet, capsys):
    clock = Clock()
    outlook = Outlook(1, ["fewer --iterations"], clock=clock)
    with Progress("synthesize", steps, "steps", quiet=quiet, outlook=outlook) as progress:
        for _ in range(8 if seconds > 5 else 11):
            clock.now += seconds
            progress.advance()
            if seconds == 59:
                break
    assert "faster" not in capsys.readouterr().err


def test_a_run_of_many_stages_tells_what_all_of_them_take(capsys):
    clock = Clock()
    outlook = Outlook(100, ["fewer --epochs"], clock=clock)
    for epoch in range(4):
        with Progress(f"epoch {epoch + 1}/100", 2, "images", outlook=outlook) as progress:
            for _ in range(2):
                clock.now += 20
                progress.advance()
        clock.now += 10  # of a test between two epochs
    assert capsys.readouterr().err.splitlines() == [
        "epoch 1/100: 1/2 images, 0.1/s, 20s left, 1h06m of the whole run",
        "epoch 1/100: 2/2 images in 40s",
        "epoch 2/100: about 1h16m left; faster with fewer --epochs",
        "epoch 2/100: 1/2 images, 0.1/s, 20s left, 1h16m of the whole run",
        "epoch 2/100: 2/2 images in 40s",
        "epoch 3/100: 1/2 images, 0.1/s, 20s left, 1h18m of the whole run",
        "epoch 3/100: 2/2 images in 40s",
        "epoch 4/100: 1/2 images, 0.1/s, 20s left, 1h18m of the whole run",
        "epoch 4/100: 2/2 images in 40s",
    ]


def test_only_what_a_machine_lacks_would_be_faster():
    said = "--threads {}".format
    assert ways_of_machine("cuda", 1, 8, said) == []
    assert ways_of_machine("cpu", 8, 8, said) == ["a GPU"]
    assert ways_of_machine("cpu", 2, 8, said) == ["a GPU", "more threads (--threads 8)"]
    assert Outlook(1).advice(0.0) is None


class Widget:
    """A bar that notes what it was told."""

    def __init__(self, **given):
        self.told = [given["total"]]
        type(self).last = self

    def update(self, units):
        self.told.append(units)

    def set_postfix_str(self, note, refresh):
        self.told.append(note)

    def write(self, line, file):
        self.told.append(line)

    def close(self):
        self.told.append("closed")


@pytest.mark.parametrize(
    ("shell", "widgets"), [("ZMQInteractiveShell", True), ("Other", True), ("Other", False)]
)
def test_a_notebook_has_tqdms_own_bar(shell, widgets, monkeypatch, capsys):
    found = type(shell, (), {})()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: found))
    monkeypatch.setitem(sys.modules, "tqdm.notebook", types.SimpleNamespace(tqdm=Widget))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: widgets or None)
    Widget.last = None
    clock = Clock()
    outlook = Outlook(2, ["a GPU"], clock=clock)
    with Progress("score", 200, "images", outlook=outlook) as progress:
        clock.now += 60
        progress.advance(note="loss 1")
    if shell == "Other":
        assert Widget.last is None
        assert (
            "score: 1/200 images, 0.0/s, 3h19m left, 6h39m of the whole run, loss 1"
            in capsys.readouterr().err
        )
    else:
        said = "score: about 6h39m left; faster with a GPU"
        assert Widget.last.told == [200, said, "loss 1, 6h39m of the whole run", 1, "closed"]
