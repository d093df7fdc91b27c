"""The fuzz run's parts: cases repeat, whole files are read, and a few damaged ones of each kind are read or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.trials import fuzz
from bench.trials.mutation import FILES, FORMATS


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDFAST_CACHE", "off")  # put back afterwards: a case sets it


def test_a_case_is_the_same_bytes_every_time() -> None:
    for kind in (*FORMATS, "zip", "tar", "shards"):
        assert fuzz.damaged((kind, 3), 0) == fuzz.damaged((kind, 3), 0)
        assert len({fuzz.damaged((kind, number), 0) for number in range(20)}) > 15
        assert fuzz.damaged((kind, 3), 0) != fuzz.damaged((kind, 3), 1)


def test_the_cases_are_as_many_as_asked_for() -> None:
    wanted = fuzz.cases(700)
    assert len(set(wanted)) == len(wanted) == 700 + len(FILES) * 28


@pytest.mark.parametrize("kind", [*FORMATS, *FILES])
def test_whole_files_are_read_and_damaged_ones_read_or_refused(kind: str, tmp_path: Path) -> None:
    outcomes = []
    for number in range(-1, 12):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcomes.append(fuzz.tried((kind, number), 0, folder))
    assert outcomes[0][0] == "read"
    assert {outcome for outcome, _ in outcomes} <= {"read", "refused"}, outcomes
    assert all(text for _, text in outcomes)


def test_a_case_that_ends_the_process_is_a_crash_and_one_that_waits_a_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker's own reports, from a process in its place."""

    class Silent:
        exitcode = -11

        def kill(self) -> None:
            return

        def join(self) -> None:
            return

    class Line:
        def __init__(self, answers: bool) -> None:
            self.answers = answers

        def send(self, case: fuzz.Case) -> None:
            return

        def poll(self, limit: float) -> bool:
            return self.answers

        def recv(self) -> None:
            raise EOFError

        def close(self) -> None:
            return

    monkeypatch.setattr(fuzz.Worker, "_start", lambda self: None)
    for answers, outcome in ((True, "crash"), (False, "hang")):
        worker = fuzz.Worker(0, 1.0)
        worker.process, worker.connection = Silent(), Line(answers)  # type: ignore[assignment]
        assert worker.run(("jpeg", 0))[0] == outcome


def test_the_page_counts_and_names_what_went_wrong() -> None:
    found = {
        ("jpeg", 0): ("read", "an image"),
        ("jpeg", 1): ("refused", "x"),
        ("zip", 0): ("crash", "exit code -11"),
    }
    page = fuzz.report(found, 0)
    assert "| jpeg | 2 | 1 | 1 | 0 | 0 | 0 |" in page
    assert "| all | 3 | 1 | 1 | 1 | 0 | 0 |" in page
    assert "- zip:0: crash, exit code -11" in page


def test_the_page_names_its_command_and_counts_by_family() -> None:
    found = {("jpeg", 0): ("read", "x"), ("state", 0): ("read", "x"), ("regions", 1): ("refused", "x")}
    page = fuzz.report(found, 3, ["--count", "9"])
    assert "Made by `python -m bench fuzz --count 9`." in page
    assert "Seed 3: 3 damaged files" in page
    assert "| matching | 2 | 1 | 1 | 0 | 0 | 0 |" in page
    assert "| all methods | 1 | 1 | 0 | 0 | 0 | 0 |" in page
    assert "commit " in page
