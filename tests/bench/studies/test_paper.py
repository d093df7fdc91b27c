"""The recipes of the paper's studies: what they print beside what was run, at sizes that take seconds."""

import argparse
import csv

import numpy as np
import pytest
import torch

from bench.studies.__main__ import main
from bench.studies.arms import Arm, Setup
from bench.studies.charts import _apart
from bench.studies.grid import parse, rows_for
from bench.studies.infoutil import continual
from bench.studies.infoutil.continual import class_orders, seen_classes, seen_images, seen_teacher, seen_test
from bench.studies.infoutil.entropy import label_entropy
from bench.studies.infoutil.gallery import POOL, gather
from bench.studies.infoutil.recipes import LABELS_OF, RANDOM, RECIPES
from bench.studies.league import roster
from bench.studies.reported import data_name, gains, met, model_name, reported
from bench.studies.teachers import checkpoints, fitting
from ddfast.errors import UsageError
from ddfast.methods import list_methods
from ddfast.models import Teacher
from ddfast.training import DistilledImages, ImageSet


def words(toy_folder, toy_teacher, tmp_path, *more):
    """Arguments of a run of seconds: students of width 8 and two epochs on three classes of 16 px."""
    shared = ("--data", toy_folder, "--teacher", toy_teacher, "--work", tmp_path / "work")
    tiny = ("--width", 8, "--epochs", 2, "--seeds", 1, "--ipc", "1,2", "--images-per-class", 6)
    early = ("--early-teacher", toy_teacher.with_name("teacher-epoch2.safetensors"))
    return [str(word) for word in (*shared, *tiny, *early, "--out", tmp_path / "table", *more)]


@pytest.fixture(scope="module")
def shared_work(tmp_path_factory):
    """One folder for all recipes, as they are meant to be run: what two of them ask for is trained once."""
    return tmp_path_factory.mktemp("work")


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_runs(name, toy_folder, toy_teacher, tmp_path, shared_work, capsys):
    recipe = RECIPES[name]
    if unknown := {row.arm.split()[0] for row in recipe.rows} - set(list_methods()):
        pytest.skip(f"{', '.join(sorted(unknown))} not among the methods")
    students = ("--student", "convnet3") if recipe.students else ()
    run = words(toy_folder, toy_teacher, tmp_path, *students, "--work", shared_work)
    assert main([name, *run]) == 0
    table = (tmp_path / "table.md").read_text()
    assert recipe.title in table
    assert "![accuracy against IPC](table.png)" in table
    if name == "table1":  # ours is not among the paper's data sets: the range of its own
        assert "| 7 data sets, ConvNet: +0.2 to +13.5 at IPC 1, +0.6 to +12.6 at IPC 10, " in table
    command = table.rpartition("Made by `")[2]
    assert command.startswith(
        f"python -m bench.studies {name} --data {toy_folder.name} --teacher teacher.safetensors --width 8 "
    )
    assert not {"--work", "--out"} & set(command.split())
    assert "IPC 1: 2 of" in table
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    expected = [row.name for row in rows_for(recipe, toy_teacher, "")]
    assert [row["arm"] for row in rows] == [*expected, *expected]
    assert all(f"| {row} |" in table for row in expected)
    assert all(0 <= float(row["top1_last"]) <= 100 for row in rows)
    assert (tmp_path / "table.png").stat().st_size > 5_000
    drawn = (tmp_path / "table.svg").read_text()
    named = [row.partition(LABELS_OF)[0] for row in expected]  # the teacher's ages are places of the chart
    assert all(row.replace("'", "&#39;") in drawn or row in drawn for row in named)
    assert ("epoch 2" in drawn) == (name == "figure4")
    assert " students to train (" in capsys.readouterr().err


def test_a_second_run_trains_nothing_and_recipes_share(toy_folder, toy_teacher, tmp_path, capsys):
    assert main(["table11", *words(toy_folder, toy_teacher, tmp_path)]) == 0
    table = (tmp_path / "table.md").read_bytes()
    students = sorted((tmp_path / "work" / "students").glob("*.json"))
    stamps = [path.stat().st_mtime_ns for path in students]
    capsys.readouterr()
    assert main(["table11", *words(toy_folder, toy_teacher, tmp_path)]) == 0
    assert "0 sets to distil, 0 students to train (8 are kept)" in capsys.readouterr().err
    assert (tmp_path / "table.md").read_bytes() == table
    assert [path.stat().st_mtime_ns for path in students] == stamps
    # Table 7 shares three of its five arms with Table 11.
    assert main(["table7", "--cost", *words(toy_folder, toy_teacher, tmp_path)]) == 0
    assert "4 students to train (6 are kept)" in capsys.readouterr().err
    assert (tmp_path / "table.md").read_bytes() == table


def test_a_teacher_is_trained_once_where_none_is_given(toy_folder, tmp_path, capsys):
    given = ["--data", str(toy_folder), "--work", str(tmp_path / "work"), "--teacher-arch", "convnet"]
    tiny = ["--teacher-epochs", "20", "--width", "8", "--epochs", "1", "--seeds", "1", "--ipc", "1"]
    run = ["table11", *given, *tiny, "--rows", "random", "--out", str(tmp_path / "table")]
    assert main([*run, "--cost"]) == 0
    assert "1 teachers to train for 20 epochs: convnet3" in capsys.readouterr().err
    assert main(run) == 0
    made = (tmp_path / "work" / "teachers").glob("convnet3-20-*.safetensors")
    (file,) = (path for path in made if "epoch" not in path.name)
    stamp = file.stat().st_mtime_ns
    assert [path.stem.rpartition("-")[2] for path in checkpoints(file)] == ["epoch2", "epoch5", "epoch10"]
    assert main(run) == 0
    assert file.stat().st_mtime_ns == stamp


def test_rows_of_stages_are_the_checkpoints_and_then_the_teacher(toy_teacher):
    names = [row.name for row in rows_for(RECIPES["figure4"], toy_teacher, "RDED")]
    assert names == ["RDED, labels of epoch 2", "RDED, labels of the full teacher"]


def test_the_papers_numbers_stand_where_they_were_measured():
    found = met("table1", "/x/cifar10-jpeg.zip", "convnet3", "convnet3", 10, "InfoUtil")
    assert (found.top1, found.std) == (54.1, 0.5)
    assert met("table1", "clothing10.zip", "resnet18", "resnet18", 10, "InfoUtil") is None
    assert met("table1", "cifar10", "resnet18_small", "resnet101_small", 50, "RDED").top1 == 51.6
    gain = {each.where: round(value, 1) for each, value in gains("table6", "gradient norm", "RDED")}
    assert gain["ImageNette", "ResNet-18", "ResNet-18", 50] == 4.6
    assert gain["ImageNet-1K", "ResNet-18", "ResNet-18", 10] == 1.5
    # InfoUtil over RDED with ConvNet on CIFAR-10: 5.0, 3.9 and 1.4 points.
    cifar = [
        v
        for each, v in gains("table1", "InfoUtil", "RDED")
        if each.where[:3] == ("CIFAR-10", "ConvNet", "ConvNet")
    ]
    assert cifar == pytest.approx([5.0, 3.9, 1.4])


def test_every_claim_names_rows_that_are_there():
    for name, recipe in RECIPES.items():
        rows = {row.name for row in recipe.rows}
        assert len(rows) == len(recipe.rows)
        methods = {each.method for each in reported(name)}
        assert any(row.arm == RANDOM.arm for row in recipe.rows)
        for gain in recipe.gains:
            assert {gain.row, gain.base} <= rows
            assert not gain.method or {gain.method, gain.base_method} <= methods, (name, gain)


def test_labels_stand_apart_and_in_order():
    placed = _apart([10.0, 50.0, 10.5, 51.0, 30.0], gap=2.0)
    assert placed == [9.25, 49.5, 11.25, 51.5, 30.0]


def test_names_in_the_paper():
    assert [
        data_name(f"/a/{data}") for data in ("cifar10-jpeg.zip", "cifar-100", "imagenette2", "shoes.zip")
    ] == [
        "CIFAR-10",
        "CIFAR-100",
        "ImageNette",
        "shoes",
    ]
    assert model_name("convnet3") == "ConvNet"
    assert [fitting("convnet", size) for size in (32, 64, 128)] == ["convnet3", "convnet4", "convnet5"]
    assert [fitting("resnet18", size) for size in (32, 64, 224)] == [
        "resnet18_small",
        "resnet18_small",
        "resnet18",
    ]


def test_what_is_kept_makes_a_table_of_its_own(toy_folder, toy_teacher, tmp_path, capsys):
    run = words(toy_folder, toy_teacher, tmp_path)
    assert main(["table11", *run, "--kept"]) == 2
    assert "no student of table11 is kept" in capsys.readouterr().err
    assert main(["table11", *run, "--rows", "RDED", "--ipc", "1", "--seeds", "2"]) == 0
    assert main(["table11", *run, "--rows", "random", "--ipc", "1,2"]) == 0
    assert main(["table11", *run, "--kept", "--seeds", "3", "--ipc", "2,1"]) == 0
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(row["arm"], row["ipc"], row["seed"]) for row in rows] == [
        (RANDOM.name, "2", "0"),
        ("RDED", "1", "0"),
        ("RDED", "1", "1"),
        (RANDOM.name, "1", "0"),
    ]
    page = (tmp_path / "table.md").read_text()
    assert "| method | IPC 1 | IPC 2 | teacher's loss |" in page
    assert page.index("| RDED |") < page.index(f"| {RANDOM.name} |")
    assert "--kept" not in page
    assert "IPC 1: 2 of 300 epochs, 1 to 2 seeds for the paper's 3." in page
    assert "IPC 1: 2 epochs, batch 3, seeds 1 to 2" in page


def test_students_tested_once_serve_no_table_of_best_epochs(toy_folder, toy_teacher, tmp_path, capsys):
    run = words(toy_folder, toy_teacher, tmp_path, "--rows", "3,random", "--ipc", 1)
    assert main(["table11", *run, "--last-only"]) == 0
    last = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["arm"] for row in last] == ["RDED", RANDOM.name]
    assert {row["top1_best"] for row in last} == {""}
    assert main(["table11", *run]) == 0  # trained again, and tested more often
    both = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["top1_last"] for row in both] == [row["top1_last"] for row in last]
    assert "" not in {row["top1_best"] for row in both}
    capsys.readouterr()
    assert main(["table11", *run, "--last-only", "--cost"]) == 0
    assert "(2 are kept)" in capsys.readouterr().err


def test_every_student_may_have_a_set_of_its_own(toy_folder, toy_teacher, tmp_path, capsys):
    run = words(toy_folder, toy_teacher, tmp_path, "--rows", "RDED", "--ipc", 1, "--seeds", 2, "--own-sets")
    assert main(["table11", *run, "--cost"]) == 0
    assert "2 sets to distil, 2 students to train" in capsys.readouterr().err
    assert main(["table11", *run]) == 0
    assert len(list((tmp_path / "work").glob("rded-*/manifest.json"))) == 2
    page = (tmp_path / "table.md").read_text()
    assert "mean ± deviation over students, each on a set distilled with its seed" in page
    assert "--own-sets`" in page


def test_the_gallery_shows_both_methods_on_the_same_images(toy_folder, toy_teacher, tmp_path, capsys):
    given = ["--data", str(toy_folder), "--teacher", str(toy_teacher), "--work", str(tmp_path / "work")]
    assert main(["gallery", *given, "--images", "2", "--out", str(tmp_path / "gallery")]) == 0
    assert "6 images in" in capsys.readouterr().out
    from PIL import Image

    red, green, blue = np.asarray(Image.open(tmp_path / "gallery.png").convert("RGB"), dtype=int).transpose(
        2, 0, 1
    )
    chosen = (red > 200) & (green > 160) & (blue < 110)
    assert chosen.sum() > 12 * 4 * 40  # the sides of a box in each of 12 panels
    setup = Setup(str(toy_folder), toy_teacher, tmp_path / "work", images_per_class=POOL)
    for each in gather(setup, Arm.parse("infoutil"), 1, 3):
        assert each.infoutil.phi.shape == (4, 4)
        assert each.rded.phi is None
        assert (len(each.infoutil.boxes), len(each.rded.boxes)) == (5, 5)
        # The clean crop, the last, competes in InfoUtil; in RDED the one with the lowest loss does.
        assert each.infoutil.chosen == 4
        assert np.isfinite(each.rded.loss)


def test_entropy_of_labels_in_bits():
    labels = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.125, 0.125]])
    torch.testing.assert_close(label_entropy(labels), torch.tensor([0.0, 2.0, 1.75], dtype=torch.float64))


def test_the_entropy_study_has_a_row_a_checkpoint(toy_folder, toy_teacher, tmp_path):
    given = ["--data", str(toy_folder), "--teacher", str(toy_teacher), "--work", str(tmp_path / "work")]
    assert main(["entropy", *given, "--ipc", "2", "--out", str(tmp_path / "entropy")]) == 0
    rows = list(csv.DictReader((tmp_path / "entropy.csv").open()))
    assert [row["epoch"] for row in rows] == ["2", "8"]
    assert all(
        0 <= float(row["entropy_T1_mean"]) < float(row["entropy_T20_mean"]) <= np.log2(3) + 1e-4
        for row in rows
    )
    assert (tmp_path / "entropy.png").stat().st_size > 5_000
    assert "of a soft label, bits" in (tmp_path / "entropy.svg").read_text()


def test_classes_come_step_by_step():
    assert seen_classes([3, 0, 2, 1, 4], 5) == [[3], [0, 3], [0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert [len(seen) for seen in seen_classes(list(range(10)), 5)] == [2, 4, 6, 8, 10]
    assert [len(seen) for seen in seen_classes(list(range(7)), 3)] == [3, 5, 7]
    orders = class_orders(10, 5)
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert orders == class_orders(10, 5)


def test_sets_and_teachers_of_the_classes_seen():
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 4, 4)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    soft = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(8, 1, 4)
    distilled = DistilledImages(images, labels, list("abcd"), (0, 0, 0), (1, 1, 1), soft_labels=soft)
    part = seen_images(distilled, [1, 3]).checked()
    assert part.images[:, 0, 0, 0].tolist() == [2, 3, 6, 7]
    assert part.labels.tolist() == [0, 0, 1, 1]
    assert part.class_names == ["b", "d"]
    torch.testing.assert_close(part.soft_labels[0, 0], torch.tensor([1 / 3, 2 / 3]))
    test = seen_test(ImageSet(images, labels), [1, 3])
    assert (len(test), test.labels.tolist()) == (4, [0, 0, 1, 1])

    class Fixed(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(len(images), 4)

    teacher = Teacher(Fixed(), "convnet3", list("abcd"), 4, (0, 0, 0), (1, 1, 1), "")
    seen = seen_teacher(teacher, [1, 3])
    assert seen.class_names == ["b", "d"]
    probabilities = seen.model(torch.zeros(2, 3, 4, 4)).softmax(dim=1)
    torch.testing.assert_close(probabilities, torch.tensor([[1 / 3, 2 / 3]] * 2))


def test_continual_learning(toy_folder, toy_teacher, tmp_path, capsys):
    given = ["--data", str(toy_folder), "--teacher", str(toy_teacher), "--work", str(tmp_path / "work")]
    tiny = ["--width", "8", "--ipc", "2", "--epochs", "1", "--steps", "2", "--orders", "2"]
    run = ["table4", *given, *tiny, "--images-per-class", "6", "--out", str(tmp_path / "table4")]
    assert main(run) == 0
    assert "16 students to train (0 are kept)" in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "table4.csv").open()))
    assert len(rows) == 4 * 2 * 2
    assert [row["classes"] for row in rows[:4]] == ["2", "3", "2", "3"]
    page = (tmp_path / "table4.md").read_text()
    assert "| method | 2 classes | 3 classes | orders |" in page
    assert (tmp_path / "table4.png").stat().st_size > 5_000
    assert main([*run, "--cost"]) == 0
    assert "0 students to train (16 are kept)" in capsys.readouterr().err
    assert main(["table4", *given, "--steps", "4"]) == 2
    assert "--steps must be in 1..3" in capsys.readouterr().err


def test_continual_learning_takes_any_method_at_equal_steps(league_words, tmp_path):
    words = [*league_words, "--student", "convnet3_in", "--ipc", "2", "--steps", "2", "--orders", "1"]
    words += [
        "--methods",
        "random,UDD,IDC,IGDS",
        "--leave-out",
        "MTT=too long",
        "--epochs",
        "9",
        "--labels",
        "hard",
    ]
    assert main(["table4", *words, "--out", str(tmp_path / "table4")]) == 0
    rows = list(csv.DictReader((tmp_path / "table4.csv").open()))
    # Ten passes of one step, DSA's last one among them: of an image and eight regions one, of four tiles two.
    assert [(row["arm"], row["classes"], row["epochs"]) for row in rows] == [
        *(("random", "2", "9"), ("random", "3", "9"), ("UDD", "2", "1"), ("UDD", "3", "1")),
        *(("IDC", "2", "1"), ("IDC", "3", "1"), ("IGDS", "2", "1"), ("IGDS", "3", "1")),
    ]
    page = (tmp_path / "table4.md").read_text()
    assert "protocol dsa_frozen, 9 epochs of whole images" in page
    assert "- MTT: left out, too long" in page
    assert "- UDD: udd arch=convnet3_in iterations=1" in page
    with pytest.raises(UsageError, match="no method is left: MTT: left out, no --experts"):
        continual._arms(_asked(["--methods", "MTT"]))


def _asked(words):
    parser = argparse.ArgumentParser()
    roster.add_options(parser, ())
    return argparse.Namespace(**vars(parser.parse_args(words)), ipc=2)


def test_stages_of_every_method_are_measured_apart(toy_folder, toy_teacher, tmp_path, monkeypatch):
    from bench.studies.infoutil import stage_costs

    monkeypatch.setattr(stage_costs, "ARMS", stage_costs.ARMS[-1:])
    given = ["--data", str(toy_folder), "--teacher", str(toy_teacher), "--work", str(tmp_path / "work")]
    run = ["figure3", *given, "--images-per-class", "6", "--ipc", "1", "--rounds", "1"]
    assert main([*run, "--out", str(tmp_path / "figure3")]) == 0
    rows = list(csv.DictReader((tmp_path / "figure3.csv").open()))
    assert [row["arm"] for row in rows] == ["InfoUtil"]
    for row in rows:
        told = sum(float(row[f"{stage}_seconds"]) for stage in stage_costs.STAGES)
        assert 0 < told < float(row["process_seconds"])
        assert int(row["rss_bytes"]) > 50 << 20
    assert not (tmp_path / "work" / "stages").exists()
    assert (tmp_path / "figure3.png").stat().st_size > 5_000


def test_all_is_every_table(toy_folder, toy_teacher, tmp_path, capsys):
    run = words(toy_folder, toy_teacher, tmp_path, "--student", "convnet3", "--cost")
    place = run.index("--out")
    assert main(["all", *run[:place], *run[place + 2 :]]) == 0
    told = capsys.readouterr().err
    assert all(f"{recipe.title}: " in told for recipe in RECIPES.values())
    assert told.count(" sets to distil, ") == len(RECIPES)
    assert main(["all", *run]) == 2
    assert "leave --out out" in capsys.readouterr().err


def test_a_failed_distillation_is_told(toy_folder, toy_teacher, tmp_path, capsys):
    given = ["--data", str(toy_folder), "--teacher", str(toy_teacher), "--work", str(tmp_path / "work")]
    assert main(["figure3", *given, "--ipc", "0", "--out", str(tmp_path / "figure3")]) == 2
    assert "arm 'random images': " in capsys.readouterr().err


def test_what_is_unknown_is_refused_in_one_line(toy_folder, toy_teacher, tmp_path, capsys):
    assert main(["table3"]) == 2
    assert "unknown study 'table3'; known: table1, table2" in capsys.readouterr().err
    assert main(["table1", *words(toy_folder, toy_teacher, tmp_path, "--rows", "SRe2L")]) == 2
    assert "fits none of: InfoUtil;" in capsys.readouterr().err
    assert parse("table1", ["--dataset", "x.zip"]).data == "x.zip"
