"""A few faults of every kind that `bench/trials/faults.py` injects; the bench runs them all."""

import subprocess
import sys
from pathlib import Path

from bench.trials.faults import Outcome, _with_earlier, page, summary

ROOT = Path(__file__).resolve().parents[3]


def test_one_fault_of_every_kind_is_survived(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench.trials.faults", "--work", str(tmp_path / "faults"), "--each", "1"),
            *("--only", "writes,ranks,world,disk,shards,sources,data,swaps"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    total = next(line for line in done.stdout.splitlines() if line.startswith("| all |"))
    assert int(total.split("|")[2]) >= 12
    assert total.endswith("| 0 |")


def test_the_summary_counts_what_was_lost():
    table = summary(
        [("kill", "a", "same bytes"), ("kill", "b", "lost: hung"), ("disk", "c", "one clear error")]
    )
    assert table.splitlines()[2:] == [
        "| kill | 2 | 1 | 0 | 0 | 1 |",
        "| disk | 1 | 0 | 0 | 1 | 0 |",
        "| all | 3 | 1 | 0 | 1 | 1 |",
    ]


def test_a_family_takes_the_place_of_its_earlier_results(tmp_path):
    path = tmp_path / "faults.csv"
    _with_earlier(path, [("kill", "a", "lost: hung"), ("disk", "b", "one clear error")], "one")
    rows = _with_earlier(path, [("kill", "a", "same bytes")], "two")
    assert rows == [["disk", "b", "one clear error", "one"], ["kill", "a", "same bytes", "two"]]
    assert path.read_text().splitlines() == ["fault,what,end,commit", *(",".join(row) for row in rows)]
    text = page(rows, path.name, 0)
    assert "| all | 2 | 1 | 0 | 1 | 0 |" in text
    assert "Run at one: disk; two: kill." in text


def test_a_refusal_is_a_line_and_exit_code_2():
    assert Outcome([2, -9], ["ddfast: no space left"]).refused
    assert not Outcome([2], []).refused
    assert not Outcome([1], ["Traceback"]).refused
    assert not Outcome([2], ["ddfast: x"], hung=True).refused
    assert not Outcome([0], []).refused
