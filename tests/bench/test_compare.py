import csv
import json

from bench.__main__ import main
from bench.arms import Arm
from tests.methods.conftest import toy_folder, toy_teacher, toy_test, toy_train

__all__ = ["toy_folder", "toy_teacher", "toy_test", "toy_train"]


def test_an_arm_is_a_method_with_settings_and_perhaps_a_name():
    assert Arm.parse("rded") == Arm("rded", "rded", {})
    assert Arm.parse("infoutil alpha=0.5 crops=1 correct_only=true crop_frac=0.75") == Arm(
        "infoutil alpha=0.5 crops=1 correct_only=true crop_frac=0.75",
        "infoutil",
        {"alpha": 0.5, "crops": 1, "correct_only": True, "crop_frac": "0.75"},
    )
    assert Arm.parse("to the letter = infoutil preset=paper") == Arm(
        "to the letter", "infoutil", {"preset": "paper"}
    )


def test_compare_writes_a_row_a_student_and_keeps_what_is_finished(toy_folder, toy_teacher, tmp_path, capsys):
    words = [
        *("compare", "--data", toy_folder, "--teacher", toy_teacher, "--arch", "convnet3", "--width", 8),
        *(
            "--ipc",
            "1,2",
            "--epochs",
            "2,2:1",
            "--seeds",
            2,
            "--images-per-class",
            12,
            "--precision",
            "float32",
        ),
        *("--arm", "random", "--arm", "spread = infoutil rank_by=quantiles"),
        *("--work", tmp_path / "work", "--out", tmp_path / "table"),
    ]
    assert main([str(word) for word in words]) == 0
    table = (tmp_path / "table.md").read_text()
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(row["arm"], row["ipc"], row["seed"]) for row in rows] == [
        (arm, ipc, seed) for arm in ("random", "spread") for ipc in "12" for seed in "01"
    ]
    assert {row["epochs"] for row in rows if row["ipc"] == "2"} == {"1"}
    assert json.loads(rows[-1]["options"])["rank_by"] == "quantiles"
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "students").glob("*.json")}
    assert main([str(word) for word in words]) == 0
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "students").glob("*.json")
    } == stamps
    assert (tmp_path / "table.md").read_text() == table
    assert "| spread |" in capsys.readouterr().out
