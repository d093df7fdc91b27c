import copy
import json
import re
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddfast.errors import UsageError
from ddfast.ops.precision import PRECISIONS, compute_dtype
from ddfast.output.distilled import (
    DistilledSet,
    Tile,
    image_path,
    metadata_row,
    write_image,
    write_metadata,
    write_soft_labels,
)
from ddfast.training import DistilledImages, EvaluationResult, ImageSet, evaluate, fit_teacher, train_student
from ddfast.training.teacher_config import TeacherConfig
from tests.training.conftest import CLASSES, SIZE, render

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def distilled():
    images = render(8, seed=11)
    soft = torch.nn.functional.one_hot(images.labels, 3).float()[:, None] * 0.97 + 0.01
    return DistilledImages(images.images, images.labels, CLASSES, MEAN, STD, soft_labels=soft)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, toy_train, toy_test):
    out = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    config = TeacherConfig(arch="convnet3", epochs=4, image_size=SIZE, arch_options={"width": 16})
    return fit_teacher(toy_train, toy_test, config, class_names=CLASSES, out=out, quiet=True), out


def test_one_student_a_seed_and_their_statistics(distilled, toy_test):
    options = {"arch": "convnet3", "epochs": 2, "quiet": True}
    result = evaluate(distilled, toy_test, seeds=[4, 9], **options)
    alone = [train_student(distilled, toy_test, seed=seed, **options) for seed in (4, 9)]
    assert result.top1 == [student.top1 for student in alone]
    assert result.seeds == [4, 9]
    assert result.mean == pytest.approx(statistics.fmean(result.top1))
    assert result.std == pytest.approx(statistics.stdev(result.top1))
    classes = [(a + b) / 2 for a, b in zip(alone[0].per_class, alone[1].per_class, strict=True)]
    assert result.per_class == pytest.approx(classes)
    assert (result.labels, result.protocol, result.epochs, result.batch_size) == ("stored", "rded", 2, 10)


def test_students_take_the_options_of_their_architecture(distilled, toy_test):
    options = {"arch": "convnet3", "epochs": 1, "quiet": True}
    narrow = train_student(distilled, toy_test, arch_options={"width": 8}, **options)
    assert narrow.model.classifier.in_features == 8 * (SIZE // 8) ** 2
    result = evaluate(distilled, toy_test, seeds=1, arch_options={"width": 8}, **options)
    assert result.top1 == [narrow.top1]
    assert result.as_dict()["arch_options"] == {"width": 8}
    with pytest.raises(UsageError, match="does not take the option depth"):
        evaluate(distilled, toy_test, seeds=1, arch_options={"depth": 8}, **options)


def test_the_last_epoch_is_the_headline_and_the_best_stands_beside_it():
    result = EvaluationResult(
        "a", "rded", "stored", 300, 50, [0, 1], [50.0, 53.0], [99.0, 99.0], [54.0, 55.0], [1.0]
    )
    assert str(result) == "top1 51.50 ± 2.12"
    assert (result.best_mean, round(result.best_std, 4)) == (54.5, 0.7071)
    one = replace(result, seeds=[0], top1=[50.0], best=[54.0], per_class=[float("nan"), 2.0])
    assert str(one) == "top1 50.00 ± 0.00"
    assert json.loads(json.dumps(one.as_dict(), allow_nan=False))["per_class"] == [None, 2.0]
    assert one.as_dict()["mean"] == 50.0


def test_best_is_the_best_of_the_tested_epochs(distilled, toy_test):
    student = train_student(distilled, toy_test, arch="convnet3", epochs=45, batch_size=24, quiet=True)
    assert sorted(student.curve) == [39, 44]
    assert student.best == max(student.curve.values())
    assert student.curve[student.best_epoch] == student.best
    assert student.top1 == student.curve[44]


def test_a_teacher_relabels_online(distilled, toy_folder, teacher):
    opened, path = teacher
    without = replace(distilled, soft_labels=None)
    options = {"arch": "convnet3", "seeds": 1, "epochs": 2, "workers": 0, "quiet": True}
    result = evaluate(without, toy_folder, teacher=opened, **options)
    assert result.labels == "online"
    assert evaluate(without, toy_folder, teacher=path, **options) == result
    assert opened.model.blocks[0].weight.is_contiguous()  # the caller's teacher is left as it was


@pytest.fixture
def distilled_folder(tmp_path):
    """Four images of 2 x 2 tiles each, 32 px, as `distill` writes them."""
    draws = torch.Generator().manual_seed(0)
    labels = [0, 1, 2, 2]
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=draws, dtype=torch.uint8)
    soft = torch.softmax(torch.randn(4, 4, 3, generator=draws), dim=2)
    rows = []
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        write_image(tmp_path / image_path(label, CLASSES[label], index), image)
        tiles = [Tile("across/0.png", (0, 0, 16, 16))] * 4
        rows.append(metadata_row(label, CLASSES[label], index, tiles))
    write_metadata(tmp_path, rows)
    write_soft_labels(tmp_path, soft, temperature=20.0)
    manifest = {
        "format_version": 1,
        "complete": True,
        "class_names": CLASSES,
        "image_size": 32,
        "mean": MEAN,
        "std": STD,
        "counts": {"images": 4},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path, images, torch.tensor(labels), soft


def test_a_folder_is_evaluated_as_its_images_in_memory(distilled_folder, toy_folder):
    root, images, labels, soft = distilled_folder
    memory = DistilledImages(
        images, labels, CLASSES, MEAN, STD, factor=2, soft_labels=soft.half().float(), temperature=20.0
    )
    options = {"arch": "convnet3", "seeds": 2, "epochs": 3, "workers": 0, "quiet": True}
    expected = evaluate(memory, toy_folder, **options)
    assert evaluate(root, toy_folder, **options) == expected
    assert evaluate(DistilledSet(root, transform=lambda picture: picture), toy_folder, **options) == expected
    assert expected.batch_size == 3


def test_an_image_of_another_size_in_the_folder_is_refused(distilled_folder, toy_folder):
    root, images, _, _ = distilled_folder
    write_image(root / image_path(0, CLASSES[0], 0), images[0, :, :16])
    with pytest.raises(UsageError, match=r"000000.png is 32x16, manifest.json says 32"):
        evaluate(root, toy_folder, arch="convnet3", workers=0, quiet=True)


def test_seeds_make_different_students_and_log_lines(distilled, toy_test, capsys):
    result = evaluate(distilled, toy_test, arch="convnet3", seeds=2, epochs=1)
    assert result.seeds == [0, 1]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("convnet3 seed")]
    assert lines[0] == f"convnet3 seed 0: top-1 {result.top1[0]:.2f}% after epoch 1, best " + (
        f"{result.best[0]:.2f}% after epoch 1"
    )
    assert len(lines) == 2


def test_data_of_other_classes_is_refused(distilled, toy_folder):
    other = replace(distilled, class_names=["a", "b", "c"])
    with pytest.raises(UsageError, match="classes that are not the distilled set's"):
        evaluate(other, toy_folder, arch="convnet3", workers=0, quiet=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "at least one seed, got 0"),
        ({"seeds": []}, "at least one seed, got 0"),
        ({"protocol": "e-rded"}, "unknown protocol 'e-rded'; known: rded"),
        ({"teacher": "nowhere.safetensors"}, "no teacher file nowhere.safetensors"),
        ({"class_order": CLASSES}, "class_order describes a teacher: give teacher as well"),
        ({"seeds": [3, 1, 3]}, "seeds has 3 twice"),
        ({"teacher": torch.nn.Flatten()}, "got the bare module Flatten: wrap it in ddfast.Teacher"),
        (
            {"arch": "resnet18", "batch_size": 1},
            "BatchNorm has one value of each channel in a batch of 1 image",
        ),
    ],
)
def test_bad_options_are_usage_errors(distilled, toy_test, options, message):
    with pytest.raises(UsageError, match=message):
        evaluate(distilled, toy_test, **{"arch": "convnet3", "quiet": True, **options})


def test_test_images_of_another_size_are_refused(distilled, toy_test):
    large = replace(toy_test, images=toy_test.images.repeat_interleave(2, 2).repeat_interleave(2, 3))
    with pytest.raises(UsageError, match=r"test images must be \[N, 3, 16, 16\].* got \[\d+, 3, 32, 32\]"):
        evaluate(distilled, large, arch="convnet3", quiet=True)


def test_auto_is_the_precision_that_it_means(distilled, toy_test):
    recipes = {
        precision: evaluate(
            distilled, toy_test, arch="convnet3", epochs=1, seeds=1, precision=precision, quiet=True
        ).recipe
        for precision in PRECISIONS
    }
    assert recipes["auto"] == recipes[compute_dtype("auto", "cpu")]
    assert recipes["float32"] != recipes["bfloat16"]


@pytest.fixture(scope="module")
def skilled(tmp_path_factory, toy_train):
    config = TeacherConfig(
        arch="convnet3", epochs=6, image_size=SIZE, arch_options={"width": 16}, batch_size=32
    )
    out = tmp_path_factory.mktemp("skilled") / "teacher.safetensors"
    return fit_teacher(toy_train, None, config, class_names=CLASSES, out=out, quiet=True)


def in_order(teacher, places):
    """A teacher file's copy with its outputs in another order than it says."""
    model = copy.deepcopy(teacher.model)
    with torch.no_grad():
        for parameter in (model.classifier.weight, model.classifier.bias):
            parameter.copy_(parameter[places].clone())
    return replace(teacher, model=model)


def test_a_teacher_in_another_class_order_is_refused_or_put_right(distilled, skilled, toy_test, capsys):
    options = {"arch": "convnet3", "epochs": 1, "seeds": 1}
    right = evaluate(distilled, toy_test, teacher=skilled, **options)
    assert re.search(r"^teacher reads [789]\d of 90 test images \(\d+%\)$", capsys.readouterr().err, re.M)
    turned = in_order(skilled, [2, 0, 1])
    with pytest.raises(
        UsageError, match=r"reads '\w+' images as '\w+'.*another class order.*with class_order"
    ):
        evaluate(distilled, toy_test, teacher=turned, **options)
    order = [CLASSES[place] for place in (2, 0, 1)]
    mended = evaluate(distilled, toy_test, teacher=turned, class_order=order, **options)
    assert mended.top1 == pytest.approx(right.top1, abs=2)
    evaluate(distilled, toy_test, teacher=turned, preflight=False, **options)


def test_a_teacher_that_returns_no_logits_is_one_line(distilled, teacher, toy_test):
    class InTuple(torch.nn.Module):
        def forward(self, images):
            return teacher[0].model(images), None

    wrong = replace(teacher[0], model=InTuple())
    for preflight in (True, False):
        with pytest.raises(UsageError, match="returns a tuple, wanted logits"):
            evaluate(distilled, toy_test, arch="convnet3", teacher=wrong, epochs=1, preflight=preflight)


def test_a_default_dtype_of_float64_changes_nothing(distilled, teacher, toy_test):
    options = {"arch": "convnet3", "epochs": 2, "seeds": 1, "teacher": teacher[1], "quiet": True}
    expected = evaluate(distilled, toy_test, **options)
    torch.set_default_dtype(torch.float64)
    try:
        found = evaluate(distilled, toy_test, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected


def test_labels_of_a_test_set_that_do_not_fit_are_refused(distilled, toy_test):
    for labels, message in (
        (toy_test.labels + 1, r"must lie in 0\.\.2, got 1\.\.3"),
        (toy_test.labels - 1, r"must lie in 0\.\.2, got -1\.\.1"),
        (toy_test.labels.float(), "int64 label for every image, got torch.float32"),
        (toy_test.labels[:5], "int64 label for every image"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(distilled, ImageSet(toy_test.images, labels), arch="convnet3", epochs=1, quiet=True)


def test_seeds_are_a_number_of_students_or_their_seeds(distilled, toy_test):
    options = {"arch": "convnet3", "arch_options": {"width": 8}, "epochs": "1", "quiet": True}
    for given, seeds in ((np.int64(2), [0, 1]), ("1", [0]), ([np.int64(4)], [4]), (np.array([3]), [3])):
        found = evaluate(distilled, toy_test, seeds=given, **options)
        assert found.seeds == seeds
        assert json.loads(json.dumps(found.as_dict()))["seeds"] == seeds
    for given in (True, 1.5, "x", [True], [-1], [], 0):
        with pytest.raises(UsageError, match="seed"):
            evaluate(distilled, toy_test, seeds=given, **options)
