"""The study of UDD, at a size that measures nothing."""

import csv

import pytest

from bench.studies import udd
from ddfast.methods import get_method

SMALL = [
    *("--ipc", "1", "--ablation-ipc", "1", "--iterations", "1", "--inner-loop", "1", "--net-samples", "4"),
    *("--real-batch", "3", "--chooser-steps", "1", "--sets", "2", "--students", "1", "--epochs", "1"),
    *("--image-size", "8"),
]


def test_it_trains_every_arm_once_and_pairs_the_deltas(toy_folder, tmp_path, monkeypatch):
    rows = {**udd.ROWS, "main": (udd.IDC, udd.PLAIN), "mue": (udd.PLAIN,)}
    monkeypatch.setattr(udd, "ROWS", rows)
    monkeypatch.setattr(
        udd, "search_seconds", lambda policy, images, arch, side: 0.002 * images[0] * images[1]
    )
    place = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "page")]
    words = ["--data", str(toy_folder), "--tables", "main,regions,times,mue", *SMALL, *place]
    assert udd.main(words) == 0
    with (tmp_path / "page.csv").open() as file:
        counted = [(row["arm"], row["regions"], row["set"]) for row in csv.DictReader(file)]
    assert counted == [
        *(("IDC", "none", number) for number in "01"),
        *(("UDD", "chosen", number) for number in "01"),
        *(("UDD, images alone", "none", number) for number in "01"),
        *(("UDD, all regions", "all", number) for number in "01"),
    ]
    page = (tmp_path / "page.md").read_text()
    assert "- UDD less IDC, IPC 1: " in page
    assert "over 2 sets (" in page
    assert "| jitter | 2.0 | 17.2 | 6 | " in page
    assert page.count("| UDD | 0.") == 1
    monkeypatch.setattr(udd.ddfast, "evaluate", lambda *_, **__: 1 / 0)  # everything is kept
    monkeypatch.setattr(udd, "utilization", lambda *_, **__: 1 / 0)
    assert udd.main(words) == 0
    assert (tmp_path / "page.md").read_text() == page


def test_the_rows_are_methods_with_options_and_the_papers_deltas_stand():
    for arms in udd.ROWS.values():
        for arm in arms:
            options = {name: value for name, value in arm.settings.items() if name != "factor"}
            get_method(arm.method).from_options(options)
    paper = udd.PAPER["cifar10"]
    assert paper["UDD"][1] - paper["IDC"][1] == pytest.approx(4.0)
    assert paper["UDD"][10] - paper["IDC"][10] == pytest.approx(1.4)
    named = {arm.name for arms in udd.ROWS.values() for arm in arms}
    assert set(paper) <= named


def test_a_search_takes_time():
    assert 0 < udd.search_seconds("activation", (1, 1), repeats=1) < 60
