"""The study of IGDS, at a size that measures nothing."""

import csv

import ddfast
from bench.studies import arms, igds
from tests.methods.diffusion.conftest import estimator, prior

__all__ = ["estimator", "prior"]


def test_it_trains_every_arm_once_and_pairs_the_gains(
    toy_folder, toy_teacher, prior, estimator, tmp_path, monkeypatch, capsys
):
    words = [
        *("--data", str(toy_folder), "--teacher", str(toy_teacher), "--prior", str(prior)),
        *("--estimator", str(estimator), "--ipc", "2", "--steps", "2", "--betas", "0,1", "--sets", "2"),
        *("--students", "1", "--epochs", "1", "--images-per-class", "20", "--levels", "2", "--plain", "1"),
        *("--work", str(tmp_path / "work"), "--out", str(tmp_path / "page")),
    ]
    assert igds.main(words) == 0
    with (tmp_path / "page.csv").open() as file:
        rows = list(csv.DictReader(file))
    counted = {}
    for row in rows:
        key = row["arm"], row["beta"], row["ipc"], row["labels"]
        counted[key] = counted.get(key, 0) + 1
    assert counted == {
        **{(arm, "", "2", labels): 2 for arm in igds.ARMS for labels in ("hard", "soft")},
        **{("guided", beta, "2", "hard"): 2 for beta in "01"},
    }
    page = (tmp_path / "page.md").read_text()
    assert "over 2 sets (" in page
    assert "| unguided | soft, protocol rded |" in page
    assert "| IPC | beta 0 | beta 1 |" in page
    assert page.count("\n| 2 | ") == 1 + 2
    assert "of the prior's plain samples as their class" in page
    assert (tmp_path / "page.png").is_file()
    assert "hard labels at IPC 2 1 epoch, soft labels at IPC 2 1 epoch" in page
    assert "1 sample an image" in page
    for module in (arms, ddfast):  # everything is kept
        monkeypatch.setattr(module, "evaluate", lambda *_, **__: 1 / 0)
    assert igds.main(words) == 0
    assert (tmp_path / "page.md").read_text() == page
