import contextlib
import fcntl
import io
import os
import pty
import struct
import sys
import termios

import pytest

from ddfast.progress import Progress


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
