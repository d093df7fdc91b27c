"""`ddfast compare`, the results that `evaluate` keeps, and the recipe that says which results stand in one table."""

import csv
import json
import math
import shutil
import statistics
from dataclasses import replace

import pytest
import torch

import ddfast
from ddfast.cli import main
from ddfast.errors import UsageError
from ddfast.methods import list_methods
from ddfast.output import DistilledSet
from ddfast.output.evaluations import keep_evaluation, read_evaluations, set_digest
from ddfast.training import PROTOCOLS, DistilledImages, evaluate, train_student
from ddfast.training.comparison import Row, Table
from tests.conftest import digests
from tests.training.conftest import CLASSES, render

QUICK = ("--epochs", 2, "--seeds", 2, "--quiet")


def run(*words, capsys):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def sets(tmp_path_factory, toy_folder, toy_teacher):
    root = tmp_path_factory.mktemp("sets")
    common = {"data": toy_folder, "teacher": toy_teacher, "quiet": True, "images_per_class": 20}
    ddfast.distill("rded", out=root / "rded", ipc=2, crops=2, **common)
    ddfast.distill("rded", out=root / "one", ipc=1, crops=2, **common)
    hard = {"iterations": 2, "real_batch": 8, "arch": "convnet3"}
    ddfast.distill("dm", out=root / "dm", ipc=2, data=toy_folder, quiet=True, **hard)
    return root


def test_tiles_that_do_not_divide_the_image_are_padded_and_judged(toy_folder, tmp_path, capsys):
    """2 tiles per side of 15 px: four images, and as many random ones beside them."""
    shared = {"arch": "resnetap10", "image_size": 15, "iterations": 1, "inner_loop": 1, "real_batch": 4}
    made = ddfast.distill("idc", data=toy_folder, ipc=1, out=tmp_path / "idc", **shared)
    assert "15 px are no multiple of 2: images are padded with grey" in capsys.readouterr().err
    opened = DistilledSet(made)
    assert (len(opened), opened.factor) == (3, 2)
    student = {"arch": "resnetap10", "epochs": 1, "seeds": 1, "quiet": True}
    for rounded in (False, True):
        assert evaluate(opened, toy_folder, protocol="idc", rounded=rounded, **student).steps == 1
    compared = ddfast.compare(made, toy_folder, **student)
    (table,) = compared.tables
    assert [row.name for row in table.rows] == ["idc", "random"]
    assert any("beside idc stand as many whole images as it has tiles" in note for note in compared.notes)


def test_random_images_beside_tiles_are_seen_in_as_many_passes(toy_folder, tmp_path):
    """Passes go by images per class: those of a random set are no more for its tiles."""
    shared = {"arch": "convnet3_in", "image_size": 16, "iterations": 1, "inner_loop": 1, "real_batch": 4}
    made = ddfast.distill("idc", data=toy_folder, ipc=2, out=tmp_path / "idc", quiet=True, **shared)
    rules = replace(PROTOCOLS["igds"], name="mine", epochs_of_ipc={1: 2, 2: 3, 8: 4})
    compared = ddfast.compare(made, toy_folder, protocol=rules, seeds=1, quiet=True)
    (table,) = compared.tables
    results = [row.results["hard"] for row in table.rows]
    assert [(one.epochs, one.steps) for one in results] == [(3, 3)] * 2
    assert len({one.recipe for one in results}) == 1


def test_sets_of_other_normalisations_come_into_tables_of_their_own(toy_folder, tmp_path):
    shared = {"arch": "convnet3_in", "image_size": 16, "iterations": 1, "real_batch": 4, "quiet": True}
    made = [
        ddfast.distill("dm", data=toy_folder, ipc=1, out=tmp_path / name, normalization=name, **shared)
        for name in ("imagenet", "none")
    ]
    compared = ddfast.compare(made, toy_folder, epochs=1, seeds=1, quiet=True, out=tmp_path / "out")
    assert [[row.name.rpartition("/")[2] for row in table.rows] for table in compared.tables] == [
        ["imagenet", "random"],
        ["none", "random"],
    ]


# The recipe ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    held = render(4, seed=5)
    soft = torch.nn.functional.one_hot(held.labels, 3).float()[:, None]
    return DistilledImages(held.images, held.labels, CLASSES, (0.5,) * 3, (0.25,) * 3, soft_labels=soft)


def quick(images, test, **changed):
    given = {"arch": "convnet3", "arch_options": {"width": 8}, "epochs": 2, "seeds": 1, "quiet": True}
    return evaluate(images, test, **{**given, **changed})


def test_the_recipe_names_all_that_trains_a_student_but_its_data_and_seed(images, toy_test):
    base = quick(images, toy_test)
    assert len(base.recipe) == 12
    assert int(base.recipe, 16) >= 0
    other = replace(images, images=255 - images.images)
    for same in (quick(images, toy_test, seeds=[7]), quick(other, toy_test)):
        assert same.recipe == base.recipe
    found = [
        quick(images, toy_test, **changed).recipe
        for changed in (
            *({"epochs": 3}, {"batch_size": 4}, {"arch_options": {"width": 4}}, {"protocol": "dc"}),
            {"protocol": replace(PROTOCOLS["rded"], lr=0.5)},  # another one of the same name
            {"protocol": replace(PROTOCOLS["rded"], labels="hard")},
            {"autoaugment": True},
        )
    ]
    assert len({base.recipe, *found}) == 1 + len(found)


def test_the_digests_tell_images_labels_and_test_apart(images, toy_test):
    base = quick(images, toy_test).digests
    assert set(base) == {"images", "labels", "teacher", "test"}
    changed = {
        "images": (replace(images, images=255 - images.images), toy_test, {}),
        "labels": (replace(images, soft_labels=images.soft_labels.flip(0)), toy_test, {}),
        "test": (images, replace(toy_test, images=255 - toy_test.images), {}),
        "images, normalised otherwise": (replace(images, mean=(0.4,) * 3), toy_test, {}),
    }
    for name, (distilled, test, said) in changed.items():
        found = quick(distilled, test, **said).digests
        assert {key for key in base if base[key] != found[key]} == {name.partition(",")[0]}
    hard = replace(PROTOCOLS["rded"], labels="hard")
    held = [
        quick(each, toy_test, protocol=hard).digests["labels"]
        for each in (images, replace(images, soft_labels=images.soft_labels.flip(0)))
    ]
    assert held[0] == held[1]  # soft labels that were not used say nothing


def test_the_teacher_is_named_where_labels_are_soft(sets, toy_folder, toy_teacher):
    sha256 = DistilledSet(sets / "rded").manifest["label_teacher"]["sha256"]
    options = {"arch": "convnet3", "arch_options": {"width": 8}, "epochs": 1, "seeds": 1, "quiet": True}
    for said in ({}, {"teacher": toy_teacher}):
        assert evaluate(sets / "rded", toy_folder, **options, **said).digests["teacher"] == sha256[:12]
    hard = evaluate(sets / "rded", toy_folder, **options, protocol="dc")
    assert hard.digests["teacher"] is None


@pytest.mark.parametrize(("images_", "batch"), [(12, 5), (12, 11), (12, 12), (12, 1)])
def test_steps_are_the_updates_that_were_made(images, toy_test, monkeypatch, images_, batch):
    made = []
    step = torch.optim.AdamW.step

    def counted(self, *words, **named):
        made.append(1)
        return step(self, *words, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    if batch == 1:
        options = {"arch": "convnet3", "arch_options": {"width": 4}}
    else:
        options = {"arch": "convnet3", "arch_options": {"width": 8}}
    student = train_student(images, toy_test, epochs=2, batch_size=batch, quiet=True, **options)
    assert len(images.labels) == images_
    assert student.steps == len(made)


# What is kept ----------------------------------------------------------------------------------------------------


def test_evaluate_keeps_its_result_outside_the_identity_of_the_set(sets, toy_folder, tmp_path, capsys):
    out = tmp_path / "set"
    shutil.copytree(sets / "rded", out)
    before = digests(out)
    words = ("evaluate", "--distilled", out, "--data", toy_folder, "--arch", "convnet3", "--width", 8, *QUICK)
    for _ in range(2):  # the same again is the same result, and stands there once
        code, printed, err = run(
            *words, "--json", tmp_path / f"{len(list(tmp_path.iterdir()))}.json", capsys=capsys
        )
        assert code == 0, err
    assert printed.splitlines()[-1].startswith("top1 ")
    assert digests(out) == before
    (kept,) = read_evaluations(out)
    written = json.loads((tmp_path / "1.json").read_text())
    assert written.items() <= kept.items()
    assert f"recipe {kept['recipe']}" in printed
    run(*words, "--protocol", "dc", capsys=capsys)
    assert [one["labels"] for one in read_evaluations(out)] == ["stored", "hard"]
    code, _, err = run("report", out, "--data", toy_folder, capsys=capsys)
    assert code == 0, err
    page = (out / "report.html").read_text("utf-8")
    for one in read_evaluations(out):
        assert one["recipe"] in page
        assert f"{one['mean']:.1f}% ± {one['std']:.1f}" in page
    assert page.count("tested epoch</th>") == 2  # a table for each recipe


def test_results_of_another_set_in_the_same_folder_are_not_shown(sets, toy_folder, tmp_path, capsys):
    out = tmp_path / "set"
    shutil.copytree(sets / "rded", out)
    words = ("evaluate", "--distilled", out, "--data", toy_folder, "--arch", "convnet3", "--width", 8, *QUICK)
    assert run(*words, capsys=capsys)[0] == 0
    for stage in ("select", "compose", "relabel"):
        ipc = ("--ipc", 1) if stage == "select" else ()
        code, _, err = run(stage, out, *ipc, "--quiet", capsys=capsys)
        assert code == 0, err
    assert len(read_evaluations(out)) == 1
    assert "Students trained on it" not in (out / "report.html").read_text("utf-8")


def test_a_damaged_list_is_left_as_it_is_and_costs_no_result(sets, toy_folder, tmp_path, capsys):
    out = tmp_path / "set"
    shutil.copytree(sets / "rded", out)
    (out / "evaluations.json").write_text("[{")
    words = ("evaluate", "--distilled", out, "--data", toy_folder, "--arch", "convnet3", "--width", 8, *QUICK)
    code, printed, err = run(*words, capsys=capsys)
    assert code == 0
    assert printed.splitlines()[-1].startswith("top1 ")
    assert "not kept" in err
    assert (out / "evaluations.json").read_text() == "[{"
    digest = set_digest(out)
    for text in ("[{", "{}", "[1]", f'[{{"set": "{digest}"}}]', f'[{{"set": "{digest}", "digests": 3}}]'):
        (out / "evaluations.json").write_text(text)
        code, _, err = run("report", out, "--data", toy_folder, capsys=capsys)
        assert code == 2
        assert "evaluations.json is damaged" in err


def test_results_are_added_in_order(sets, tmp_path):
    shutil.copytree(sets / "one", tmp_path / "set")
    for number in (1, 2, 1):
        keep_evaluation(tmp_path / "set", {"top1": [number]})
    assert [one["top1"] for one in read_evaluations(tmp_path / "set")] == [[1], [2]]


# The comparison --------------------------------------------------------------------------------------------------


def test_a_set_stands_beside_random_coreset_and_teacher(sets, toy_folder, tmp_path, capsys):
    out, before = tmp_path / "out", digests(sets / "rded")
    code, printed, err = run(
        "compare", sets / "rded", "--data", toy_folder, *QUICK, "--out", out, capsys=capsys
    )
    assert code == 0, err
    rows = list(csv.DictReader((out / "comparison.csv").open()))
    assert [(row["name"], row["labels"]) for row in rows] == [
        *(("rded", "soft"), ("rded", "hard"), ("random", "soft"), ("random", "hard")),
        *(("herding", "soft"), ("herding", "hard"), ("teacher", "")),
    ]
    held = {(row["name"], row["labels"]): row for row in rows}
    for column in ("soft", "hard"):
        for name in (
            "recipe",
            "steps",
            "epochs",
            "batch_size",
            "arch",
            "test_sha256",
            "teacher_sha256",
            "images",
        ):
            assert len({held[each, column][name] for each in ("rded", "random", "herding")}) == 1
        assert len({held[each, column]["images_sha256"] for each in ("rded", "random", "herding")}) == 3
    assert held["rded", "soft"]["recipe"] != held["rded", "hard"]["recipe"]
    ours, other = held["rded", "soft"], held["random", "soft"]
    points = float(ours["top1"]) - float(other["top1"])
    error = math.sqrt((float(ours["top1_std"]) ** 2 + float(other["top1_std"]) ** 2) / 2)
    assert printed.splitlines()[-1] == f"better than random by {points:.2f} ± {error:.2f} points"
    assert float(held["teacher", ""]["top1"]) > 90
    for said in (ours["recipe"], held["rded", "hard"]["recipe"], "herding", "teacher"):
        assert said in printed
    random = DistilledSet(next(path for path in (out / "sets").iterdir() if path.name.startswith("random")))
    assert random.manifest["images_per_class"] == 20  # as the set itself could choose
    assert len(random) == len(DistilledSet(sets / "rded"))
    assert random.manifest["label_teacher"] == DistilledSet(sets / "rded").manifest["label_teacher"]
    alone = evaluate(
        random,
        toy_folder,
        arch="convnet3",
        arch_options={"width": 8},
        epochs=2,
        seeds=2,
        quiet=True,
    )
    assert statistics.fmean(alone.top1) == float(other["top1"])
    assert "than random by" in (out / "report.html").read_text("utf-8")
    assert digests(sets / "rded") == before
    kept = [one for one in read_evaluations(sets / "rded") if "better_than_random" in one]
    assert [one["better_than_random"]["points"] for one in kept] == [points]
    again = run("compare", sets / "rded", "--data", toy_folder, *QUICK, "--out", out, capsys=capsys)
    assert again[1] == printed  # with the sets that are there
    shutil.copytree(sets / "rded", tmp_path / "shown")
    assert run("report", tmp_path / "shown", "--data", toy_folder, capsys=capsys)[0] == 0
    assert "Better than random" in (tmp_path / "shown" / "report.html").read_text("utf-8")


def test_sets_of_other_sizes_come_into_tables_of_their_own(sets, toy_folder, tmp_path):
    found = ddfast.compare(
        [sets / "dm", sets / "one", sets / "rded"],
        toy_folder,
        out=tmp_path / "out",
        coreset="none",
        arch="convnet3",
        arch_options={"width": 4},
        epochs=1,
        seeds=1,
        quiet=True,
    )
    names = [[row.name for row in table.rows] for table in found.tables]
    assert names == [["rded", "dm", "random", "random, all a class"], ["one", "random"]]
    assert [one.name for one in found.better] == ["rded", "dm", "one"]
    assert [one.labels for one in found.better] == ["soft", "hard", "soft"]
    dm = found.tables[0].rows[1]
    assert set(dm.results) == {"hard"}
    assert dm.random == "random, all a class"
    assert found.csv.is_file()
    assert found.report.is_file()
    assert (found.out / "table-2" / "report.html").is_file()
    assert [line.split(",")[0] for line in str(found).splitlines()[-3:]] == ["rded", "dm", "one"]


def test_a_random_set_without_a_teacher_has_the_images_of_one_with(toy_folder, toy_teacher, tmp_path):
    common = {"data": toy_folder, "ipc": 2, "seed": 3, "images_per_class": 20, "factor": "2", "quiet": True}
    soft = ddfast.distill("random", out=tmp_path / "soft", teacher=toy_teacher, **common).set
    hard = ddfast.distill("random_hard", out=tmp_path / "hard", image_size=16, **common).set
    assert hard.stored is None
    assert hard.targets == soft.targets
    assert hard.manifest["counts"] == soft.manifest["counts"]
    assert hard.rows == soft.rows
    for (ours, *_), (theirs, *_) in zip(hard, soft, strict=True):
        assert torch.equal(ours, theirs)
    again = digests(hard.root)
    (hard.root / "train" / hard.rows[0]["file_name"]).unlink()
    manifest = json.loads((hard.root / "manifest.json").read_text())
    unfinished = {**manifest, "complete": False, "counts": None, "quarantined": None}
    (hard.root / "manifest.json").write_text(json.dumps(unfinished))
    ddfast.distill("random_hard", out=hard.root, image_size=16, resume=True, **common)
    assert digests(hard.root) == again
    assert "random_hard" not in list_methods()  # it serves comparisons


def test_without_a_teacher_there_is_no_coreset_and_it_says_so(sets, toy_folder, tmp_path, capsys):
    words = ("compare", sets / "dm", "--data", toy_folder, "--width", 4, *QUICK, "--out", tmp_path / "out")
    code, printed, err = run(*words, capsys=capsys)
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    assert [(row["name"], row["labels"]) for row in rows] == [("dm", "hard"), ("random", "hard")]
    assert "no herding coreset" in printed
    assert "soft labels" not in printed
    assert "better than random by" in printed.splitlines()[-1]


def test_a_teacher_that_moved_is_given_and_another_is_refused(
    sets, toy_folder, toy_teacher, tmp_path, capsys
):
    shutil.copytree(sets / "one", tmp_path / "one")
    facts = json.loads((tmp_path / "one" / "run.json").read_text())
    (tmp_path / "one" / "run.json").write_text(json.dumps({**facts, "teacher": str(tmp_path / "gone")}))
    quick = ("--epochs", 1, "--seeds", 1, "--quiet", "--coreset", "none", "--out", tmp_path / "out")
    words = ("compare", tmp_path / "one", "--data", toy_folder, "--arch", "convnet3", "--width", 4, *quick)
    code, printed, _ = run(*words, capsys=capsys)
    assert code == 0
    assert "hard labels only" in printed
    code, printed, _ = run(*words, "--teacher", toy_teacher, capsys=capsys)
    assert code == 0
    assert "by soft labels" in printed
    held = ddfast.compare(
        DistilledSet(tmp_path / "one"),
        toy_folder,
        teacher=ddfast.load_teacher(toy_teacher),
        out=tmp_path / "out",
        coreset="none",
        epochs=1,
        seeds=1,
        quiet=True,
    )
    assert held.tables[0].recipe("soft").arch_options == {"width": 8}  # the teacher's own
    early = next(path for path in toy_teacher.parent.glob("*.safetensors") if path != toy_teacher)
    code, _, err = run(*words, "--teacher", early, capsys=capsys)
    assert code == 2
    assert "is not the teacher of" in err


def test_two_recipes_are_never_put_in_one_table(images, toy_test, tmp_path):
    short, long = (quick(images, toy_test, epochs=epochs) for epochs in (1, 2))
    dark = quick(images, replace(toy_test, images=toy_test.images // 2), epochs=1)
    first = Row("a", "set", tmp_path, "rded", {"soft": short})
    assert Table([first, replace(first, name="b")], 4, 12, 16).recipe("soft") == short
    for other, what in ((long, "the recipe"), (dark, "test images")):
        with pytest.raises(UsageError, match=f"b and a cannot stand in one table: {what}"):
            Table([first, Row("b", "random", tmp_path, "random", {"soft": other})], 4, 12, 16)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--coreset", "herdin"), "--coreset must be one of"),
        (("--protocol", "rdd"), "unknown protocol"),
        (("--seeds", 0), "at least one seed"),
        (("--arch", "convnet"), "convnet"),
    ],
)
def test_what_cannot_be_compared_is_one_line(sets, toy_folder, tmp_path, capsys, words, said):
    code, printed, err = run(
        "compare", sets / "one", "--data", toy_folder, *words, "--out", tmp_path / "out", capsys=capsys
    )
    assert (code, printed) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_data_of_other_classes_are_refused_before_anything_is_made(sets, toy_folder, tmp_path, capsys):
    shutil.copytree(toy_folder, tmp_path / "data")
    for split in ("train", "test"):
        (tmp_path / "data" / split / "down").rename(tmp_path / "data" / split / "up")
    code, _, err = run(
        "compare", sets / "one", "--data", tmp_path / "data", "--out", tmp_path / "out", capsys=capsys
    )
    assert code == 2
    assert "give the data it was distilled from" in err
    assert not (tmp_path / "out").exists()
