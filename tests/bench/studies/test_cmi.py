"""The study of DM with the CMI regulariser, at a size that measures nothing."""

import csv

from bench.studies import arms, cmi
from ddfast.training import train_proxies


def test_it_trains_every_arm_once_and_pairs_the_deltas(
    toy_folder, toy_teacher, tmp_path, monkeypatch, capsys
):
    train_proxies(
        toy_folder,
        out=tmp_path / "proxies",
        arch="convnet3_in",
        count=1,
        epochs=1,
        images_per_class=8,
        image_size=16,
        quiet=True,
    )
    words = [
        *("--data", str(toy_folder), "--teacher", str(toy_teacher), "--proxies", str(tmp_path / "proxies")),
        *("--ipc", "1,2", "--iterations", "2", "--real-batch", "8", "--cmi", "10", "--sets", "2,1:1"),
        *("--students", "1", "--epochs", "1", "--images-per-class", "20"),
        *("--work", str(tmp_path / "work"), "--out", str(tmp_path / "page")),
    ]
    assert cmi.main(words) == 0
    with (tmp_path / "page.csv").open() as file:
        rows = list(csv.DictReader(file))
    counted = {(row["arm"], row["ipc"]): 0 for row in rows}
    for row in rows:
        counted[row["arm"], row["ipc"]] += 1
    assert counted == {
        **dict.fromkeys([("random", "1"), ("herding", "1"), ("DM", "1")], 1),
        **dict.fromkeys([(arm, "2") for arm in cmi.ARMS], 2),
    }
    page = (tmp_path / "page.md").read_text()
    assert "over 2 sets (" in page
    assert "| convnet3_in | 2 | " in page
    monkeypatch.setattr(arms, "evaluate", lambda *_, **__: 1 / 0)  # everything is kept
    assert cmi.main(words) == 0
    assert (tmp_path / "page.md").read_text() == page
