import csv
import json

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.studies.arms import Arm, Setup, Training, held_out_set, set_of
from ddfast.data import open_source
from ddfast.errors import UsageError
from ddfast.training.image_sets import read_test_set


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


def test_an_arm_that_recovers_images_from_the_teacher(toy_folder, toy_teacher, tmp_path, capsys):
    words = [
        *("compare", "--data", toy_folder, "--teacher", toy_teacher, "--arch", "convnet3", "--width", 8),
        *("--ipc", 2, "--epochs", 1, "--seeds", 1, "--images-per-class", 12, "--precision", "float32"),
        *("--arm", "sre2l iterations=2 batch=6", "--arm", "rded"),
        *("--work", tmp_path / "work", "--out", tmp_path / "table"),
    ]
    for labels in ("online", "stored"):
        assert main([*map(str, words), "--labels", labels]) == 0
        rows = list(csv.DictReader((tmp_path / "table.csv").open()))
        assert [row["arm"] for row in rows] == ["sre2l iterations=2 batch=6", "rded"]
    (folder,) = (tmp_path / "work").glob("sre2l-ipc2-*")  # both kinds of labels are of one set
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["images_per_class"] == "all"
    other = set_of(
        Arm.parse("sre2l"), 2, Setup(str(toy_folder), toy_teacher, tmp_path), Training("convnet3"), 0
    )
    early = toy_teacher.with_name("teacher-epoch2.safetensors")
    assert (
        set_of(Arm.parse("sre2l"), 2, Setup(str(toy_folder), early, tmp_path), Training("convnet3"), 0).folder
        != other.folder
    )


def test_a_set_for_each_student_judged_on_what_was_not_scored(toy_folder, toy_teacher, tmp_path, capsys):
    words = [
        *("compare", "--data", toy_folder, "--teacher", toy_teacher, "--arch", "convnet3", "--width", 8),
        *("--ipc", 1, "--epochs", 1, "--seeds", 2, "--images-per-class", 12, "--precision", "float32"),
        *("--own-sets", "--held-out", 5, "--last-only", "--arm", "random"),
        *("--work", tmp_path / "work", "--out", tmp_path / "table"),
    ]
    assert main([str(word) for word in words]) == 0
    page = (tmp_path / "table.md").read_text()
    assert page.startswith("Top-1 in percent on 5 held-out training images of each class")
    assert "each on a set distilled with its seed" in page
    sets = sorted((tmp_path / "work").glob("random-*/manifest.json"))
    assert sorted(json.loads(path.read_text())["seed"] for path in sets) == [0, 1]


def test_a_seed_decides_the_set_only_where_each_student_has_its_own(toy_folder, toy_teacher, tmp_path):
    arm, training = Arm.parse("random"), Training("convnet3")
    shared = Setup(str(toy_folder), toy_teacher, tmp_path)
    own = Setup(str(toy_folder), toy_teacher, tmp_path, own_sets=True)
    assert set_of(arm, 1, shared, training, 0).folder == set_of(arm, 1, shared, training, 1).folder
    assert set_of(arm, 1, own, training, 0).folder == set_of(arm, 1, shared, training, 0).folder
    assert set_of(arm, 1, own, training, 1).folder != set_of(arm, 1, shared, training, 1).folder


def test_held_out_images_were_not_scored(toy_folder):
    source = open_source(str(toy_folder), "train")
    ids, labels = source.samples.ids, source.samples.labels
    pairs = [np.flatnonzero(labels == label)[3:5] for label in range(3)]
    left = [place for pair in pairs for place in sorted(pair, key=lambda place: ids[place])]
    scored = tuple(np.delete(ids, left).tolist())
    held_out = held_out_set(str(toy_folder), 16, 2, scored)
    expected = read_test_set(source, 16, samples=[source.samples[place] for place in left], quiet=True)
    assert held_out.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(held_out.images, expected.images)
    with pytest.raises(UsageError, match="has 2 training images that were not scored, 3 are held out"):
        held_out_set(str(toy_folder), 16, 3, scored)
