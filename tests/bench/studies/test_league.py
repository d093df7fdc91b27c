"""The league of all methods, at sizes that measure nothing."""

import csv
import json
import pickle

import pytest

import ddfast
from bench.studies import arms
from bench.studies.__main__ import main
from bench.studies.league import costs, league, roster
from ddfast.errors import UsageError


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_method_takes_the_same_steps_by_the_same_recipe(league_words, tmp_path, monkeypatch, capsys):
    words = ["league", *league_words, "--ipc", "2", "--sets", "1", "--here"]
    words += ["--labels", "soft", "--soft-epochs", "36"]
    words += ["--trained", "teacher=60,proxies=30", "--out", str(tmp_path / "page")]
    assert main(words) == 0
    rows = rows_of(tmp_path / "page.csv")
    assert [row["method"] for row in rows] == list(roster.NAMES)
    assert {(row["labels"], row["protocol"]) for row in rows} == {("soft", "rded")}
    assert {(row["steps"], row["batch_size"]) for row in rows} == {("36", "6")}
    random = float(rows[0]["top1"])
    assert rows[0]["over_random"] == ""
    for row in rows[1:]:
        assert float(row["over_random"]) == pytest.approx(float(row["top1"]) - random, abs=0.011)
    assert all(float(row["seconds"]) > 0 and int(row["image_bytes"]) > 0 for row in rows)
    page = (tmp_path / "page.md").read_text()
    assert "Left out" not in page
    assert "proxies 30s on a core" in page
    assert "experts not told" in page
    assert "- DSA + CMI: `dsa arch=convnet3_in cmi=50000.0 iterations=1 " in page
    assert "![soft labels: accuracy against time](page_soft.png)" in page
    assert (tmp_path / "page_soft.png").stat().st_size > 5_000
    monkeypatch.setattr(arms, "evaluate", lambda *_, **__: 1 / 0)  # everything is kept
    assert main(words) == 0
    assert (tmp_path / "page.md").read_text() == page


def test_tiles_and_regions_take_their_share_of_the_passes(league_words, tmp_path):
    words = [*league_words, "--methods", "random,IDC,UDD,MTT", "--ipc", "2", "--sets", "1", "--here"]
    words += ["--hard-epochs", "35", "--labels", "hard", "--out", str(tmp_path / "page")]
    assert main(["league", *words]) == 0
    rows = {row["method"]: row for row in rows_of(tmp_path / "page.csv")}
    assert {row["protocol"] for row in rows.values()} == {"dsa_frozen"}
    # 6 images, in one batch: one step a pass, of four tiles four, of an image and eight regions nine. DSA's pass behind
    # the last one is among them.
    assert {name: (row["steps"], row["epochs"], row["batch_size"]) for name, row in rows.items()} == {
        "random": ("36", "35", "6"),
        "IDC": ("36", "8", "6"),
        "UDD": ("36", "3", "6"),
        "MTT": ("36", "35", "6"),
    }


def test_students_of_a_frozen_protocol_take_no_rate_of_a_set(monkeypatch):
    assert arms.Training("convnet3_in", protocol="dsa").rules == ddfast.training.PROTOCOLS["dsa"]
    from ddfast.training.student import takes_learned_rate

    images = type("Images", (), {"learned_rate": 0.5})
    assert takes_learned_rate(arms.Training("convnet3_in", protocol="dsa").rules, images)
    frozen = arms.Training("convnet3_in", protocol="dsa" + arms.FROZEN)
    assert not takes_learned_rate(frozen.rules, images)
    assert frozen.hard


def test_each_student_has_a_set_of_its_own_and_rows_are_paired_by_seed(league_words, tmp_path):
    words = [
        *league_words,
        "--methods",
        "random,DM",
        "--ipc",
        "2",
        "--sets",
        "2",
        "--labels",
        "hard",
        "--here",
    ]
    words += [
        "--hard-epochs",
        "1",
        "--student",
        "convnet3_in",
        "--student",
        "convnet4_in",
        "--out",
        str(tmp_path / "x"),
    ]
    assert main(["league", *words]) == 0
    rows = rows_of(tmp_path / "x.csv")
    assert [(row["method"], row["student"], row["set"]) for row in rows] == [
        (method, student, seed)
        for method in ("random", "DM")
        for student in ("convnet3_in", "convnet4_in")
        for seed in "01"
    ]
    folders = [path for path in (tmp_path / "work").glob("dm-*") if path.is_dir()]
    assert sorted(json.loads((path / "manifest.json").read_text())["seed"] for path in folders) == [0, 1]
    page = (tmp_path / "x.md").read_text()
    assert page.count("over 2 sets (") == 2
    assert "## IPC 2, students convnet4_in" in page


def test_what_cannot_be_had_is_left_out_with_its_reason(toy_folder, toy_teacher, tmp_path):
    words = [
        "--data",
        str(toy_folder),
        "--teacher",
        str(toy_teacher),
        "--work",
        str(tmp_path / "work"),
        "--ipc",
        "1",
    ]
    words += [
        "--methods",
        "random,DM,DM + CMI,IDC + CMI,MTT,IGDS",
        "--leave-out",
        "idm=a day a set",
        "--sets",
        "1",
    ]
    words += [
        "--budget",
        "dm:iterations=1 real_batch=5000",
        "--hard-epochs",
        "1",
        "--labels",
        "hard",
        "--here",
    ]
    assert main(["league", *words, "--out", str(tmp_path / "x")]) == 0
    page = (tmp_path / "x.md").read_text()
    told = dict(
        line[2:].split(", IPC 1: ")
        for line in page.split("## Left out")[1].split("##")[0].strip().splitlines()
    )
    assert set(told) == {"DM", "DM + CMI", "IDC + CMI", "MTT", "IGDS", "IDM"}
    assert "draws 5000 different images" in told["DM"]
    assert told["DM + CMI"] == "no --proxies given (ddfast train-proxies)"
    assert told["MTT"] == "no --experts given (ddfast train-experts)"
    assert told["IGDS"].startswith("no --prior and no --estimator given")
    assert told["IDM"] == "a day a set"
    assert [row["method"] for row in rows_of(tmp_path / "x.csv")] == ["random"]


def test_the_regulariser_is_left_out_where_it_is_zero(league_words):
    arguments, rows = league.parse(league_words)
    lacking = {entry.name for entry in rows if entry.lacks(1, arguments) is not None}
    assert lacking == {f"{name} + CMI" for name in ("DM", "DC", "DSA", "MTT", "SRe2L")}  # one image, one view
    assert not [entry.name for entry in rows if entry.lacks(2, arguments) is not None]


def test_budgets_are_of_a_method_a_row_or_an_ipc(league_words):
    words = ["--budget", "dm@50:iterations=9", "--budget", "DM + CMI:cmi_every=5", "--cmi", "dm:7,50:3"]
    arguments, _ = league.parse([*league_words, *words])
    plain, with_cmi = roster.entries(["dm", "DM + CMI"])
    assert plain.settings(10, arguments)["iterations"] == 1
    assert plain.settings(50, arguments)["iterations"] == 9
    assert "cmi_every" not in plain.settings(50, arguments)
    settings = with_cmi.settings(50, arguments)
    assert (settings["iterations"], settings["cmi_every"], settings["cmi"]) == (9, 5, 3.0)
    assert with_cmi.settings(10, arguments)["cmi"] == 7.0


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--methods", "random,DSSA"], "unknown methods DSSA"),
        (["--budget", "dm:iteration=3"], "no option 'iteration'"),
        (["--budget", "dmm:iterations=3"], "unknown methods dmm"),
        (["--cmi", "rded:3"], "rded takes no regulariser"),
        (["--student", "convnet33"], "convnet33"),
    ],
)
def test_a_word_that_nothing_knows_stops_the_study(league_words, capsys, extra, said):
    assert main(["league", *league_words, *extra]) == 2
    assert said in capsys.readouterr().err


def test_a_set_made_alone_tells_the_memory_of_its_process(toy_folder, toy_teacher, tmp_path):
    setup = arms.Setup(str(toy_folder), toy_teacher, tmp_path / "work", images_per_class=12)
    distillation = arms.Distillation.of(arms.Arm("random", "random", {}), 2, setup)
    folder = costs.make_alone(distillation)
    cost = costs.cost_of(distillation)
    assert 50e6 < cost.peak_memory < 4e9
    files = [path.stat().st_size for path in folder.rglob("*.png") if path.parent.parent.name == "train"]
    assert len(files) == 6
    assert (cost.image_bytes, cost.label_bytes) == (sum(files), 6)
    assert cost.core_seconds == cost.seconds * cost.cores
    # The other IPC takes the table over; the seconds of scoring count for both.
    second = arms.Distillation.of(arms.Arm("random", "random", {}), 1, setup)
    second.make()
    scored = json.loads((folder / "run.json").read_text())["seconds"]["score"]
    assert costs.cost_of(second).seconds >= scored
    assert costs.cost_of(second).peak_memory is None
    # What stops the run there stops it here in the same words.
    error = pickle.loads(pickle.dumps(UsageError("a step draws 5000 images")))
    assert (type(error), str(error)) == (UsageError, "a step draws 5000 images")
