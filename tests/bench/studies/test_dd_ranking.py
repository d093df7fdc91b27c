import csv
import json

from bench.__main__ import commands, main


def words(toy_folder, toy_teacher, tmp_path, *extra):
    return [
        str(word)
        for word in (
            *("dd_ranking", "--data", toy_folder, "--teacher", toy_teacher, "--arch", "convnet3"),
            *(
                "--ipc",
                "2",
                "--epochs",
                "1",
                "--seeds",
                2,
                "--images-per-class",
                12,
                "--precision",
                "float32",
            ),
            *("--work", tmp_path / "work", "--out", tmp_path / "scores", *extra),
        )
    ]


def test_dd_ranking_scores_arms_and_keeps_their_students(toy_folder, toy_teacher, tmp_path, capsys):
    asked = words(
        toy_folder, toy_teacher, tmp_path, "--width", 8, "--arm", "herding", "--arm", "two = rded crops=2"
    )
    assert main(asked) == 0
    assert "| two | 2 |" in capsys.readouterr().out
    document = json.loads((tmp_path / "scores.json").read_text())
    assert [(row["arm"], row["ipc"]) for row in document["scores"]] == [("herding", 2), ("two", 2)]
    for row in document["scores"]:
        assert [len(row[which][recipe]) for which in ("distilled", "random") for recipe in row[which]] == [
            2
        ] * 6
        recovery = [row["full_hard"] - value for value in row["distilled"]["hard"]]
        assert abs(row["soft"]["hard_label_recovery_mean"] - sum(recovery) / 2) < 1e-9
    assert document["scores"][0]["random"] == document["scores"][1]["random"]
    rows = list(csv.DictReader((tmp_path / "scores" / "two-ipc2" / "obj_scores.csv").open()))
    assert len(rows) == 2
    students = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "students").glob("*.json")}
    # 3 recipes x 2 seeds of 2 arms and of the random images.
    assert len(students) == 18
    page = (tmp_path / "scores.md").read_text()
    assert main(asked) == 0
    assert {path: path.stat().st_mtime_ns for path in students} == students
    assert (tmp_path / "scores.md").read_text() == page
    assert "dd_ranking" in commands()


def test_the_accuracy_of_the_whole_data_set_must_be_known(toy_folder, toy_teacher, tmp_path, capsys):
    assert main(words(toy_folder, toy_teacher, tmp_path, "--width", 4, "--arm", "random")) == 2
    assert "give --full-accuracy in percent" in capsys.readouterr().err


def test_any_method_of_the_league_is_scored_on_sets_of_its_own_at_equal_steps(
    league_words, toy_teacher, tmp_path, capsys
):
    asked = ["dd_ranking", *league_words, "--arch", "convnet3_in", "--methods", "IDC,DM,MTT", "--ipc", "2"]
    asked += [
        "--epochs",
        "8",
        "--seeds",
        "1",
        "--own-sets",
        "--full-accuracy",
        "90",
        "--leave-out",
        "UDD=too long",
    ]
    assert main([*asked, "--out", str(tmp_path / "scores")]) == 0
    document = json.loads((tmp_path / "scores.json").read_text())
    assert [row["arm"] for row in document["scores"]] == ["IDC", "DM", "MTT"]
    assert document["scores"][0]["random"] == document["scores"][1]["random"]
    students = [json.loads(path.read_text()) for path in (tmp_path / "work" / "students").glob("*.json")]
    steps = {}
    for student in students:
        steps.setdefault(student["protocol"], []).append((student["steps"], student["epochs"]))
    # 8 passes of a step, or 2 of four: DC's has one more, and the nearest of four tiles is 8.
    assert sorted(steps["rded"]) == sorted(steps["rded_plain"]) == [(8, 2), (8, 8), (8, 8), (8, 8)]
    assert sorted(steps["dc"]) == [(8, 1), (9, 8), (9, 8), (9, 8)]
    page = (tmp_path / "scores.md").read_text()
    assert "- UDD, IPC 2: left out, too long" in page
    assert "- DM, IPC 2: `dm arch=convnet3_in iterations=1 real_batch=8`" in page
    assert "Made by `python -m bench dd_ranking --data " in page


def test_without_a_method_there_is_nothing_to_score(toy_folder, toy_teacher, tmp_path, capsys):
    assert main(words(toy_folder, toy_teacher, tmp_path)) == 2
    assert "give --arm or --methods" in capsys.readouterr().err
