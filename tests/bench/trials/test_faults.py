"""A few faults of every kind that `bench/trials/faults.py` injects; the bench runs them all."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench import facts
from bench.trials.fault_kinds import damaged
from bench.trials.faults import page, summary, with_earlier
from bench.trials.processes import Outcome

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("family", "kinds", "least"),
    [
        ("selection", "writes,ranks,world,disk,files,sources,data,swaps", 12),
        ("matching,trajectory,diffusion", "writes,files", 9),
    ],
)
def test_one_fault_of_every_kind_is_survived(tmp_path, family, kinds, least):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench.trials.faults", "--work", str(tmp_path / "faults"), "--each", "1"),
            *("--methods", family, "--only", kinds, "--results", str(tmp_path / "faults.md")),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    total = next(line for line in done.stdout.splitlines() if line.startswith("| all | all |"))
    assert int(total.split("|")[3]) >= least
    assert total.endswith("| 0 |")
    text = (tmp_path / "faults.md").read_text()
    assert total in text
    assert f"--methods {family} --only {kinds}" in text
    assert f"- {facts.commit()[0]}" in text


def test_the_summary_counts_what_was_lost_by_family():
    table = summary(
        [
            ("matching", "kill", "a", "same bytes"),
            ("matching", "kill", "b", "lost: hung"),
            ("selection", "disk", "c", "one clear error"),
        ]
    )
    assert table.splitlines()[2:] == [
        "| matching (dm) | kill | 2 | 1 | 0 | 0 | 1 |",
        "| matching (dm) | all | 2 | 1 | 0 | 0 | 1 |",
        "| selection (infoutil) | disk | 1 | 0 | 0 | 1 | 0 |",
        "| selection (infoutil) | all | 1 | 0 | 0 | 1 | 0 |",
        "| all | all | 3 | 1 | 0 | 1 | 1 |",
    ]


def test_a_kind_takes_the_place_of_its_earlier_results(tmp_path):
    path = tmp_path / "faults.csv"
    earlier = [("matching", "kill", "a", "lost: hung"), ("matching", "disk", "b", "one clear error")]
    with_earlier(path, [*earlier, ("selection", "kill", "a", "same bytes")], "one")
    rows = with_earlier(path, [("matching", "kill", "a", "same bytes")], "two")
    assert rows == [
        ["matching", "disk", "b", "one clear error", "one"],
        ["selection", "kill", "a", "same bytes", "one"],
        ["matching", "kill", "a", "same bytes", "two"],
    ]
    assert path.read_text().splitlines() == ["family,fault,what,end,commit", *(",".join(row) for row in rows)]
    text = page(rows, path.name, ["--seed", "3"])
    assert "| all | all | 3 | 2 | 0 | 1 | 0 |" in text
    assert "Made by `python -m bench faults --seed 3`." in text
    assert "- one: matching: disk; selection: kill\n- two: matching: kill\n" in text


def test_results_of_the_time_when_all_faults_were_of_the_selection_are_kept(tmp_path):
    path = tmp_path / "faults.csv"
    path.write_text("fault,what,end,commit\nkill,a,same bytes,old\n")
    rows = with_earlier(path, [("matching", "kill", "a", "same bytes")], "new")
    assert rows[0] == ["selection", "kill", "a", "same bytes", "old"]


def test_damage_is_of_the_kind_that_was_asked_for():
    whole, draws = bytes(range(100)), random.Random(0)
    assert len(damaged(whole, "truncated", draws, b"x")) < 100
    flipped = damaged(whole, "bit flipped", draws, b"x")
    assert sum(bin(a ^ b).count("1") for a, b in zip(whole, flipped, strict=True)) == 1
    assert [damaged(whole, kind, draws, b"x") for kind in ("emptied", "swapped", "removed")] == [
        b"",
        b"x",
        None,
    ]


def test_a_refusal_is_a_line_and_exit_code_2():
    assert Outcome([2, -9], ["ddfast: no space left"]).refused
    assert not Outcome([2], []).refused
    assert not Outcome([1], ["Traceback"]).refused
    assert not Outcome([2], ["ddfast: x"], hung=True).refused
    assert not Outcome([0], []).refused
