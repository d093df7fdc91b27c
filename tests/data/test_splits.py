"""Folders that are splits by other names than train, test and val."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddfast.data.opening import open_source
from ddfast.data.splits import split_word
from tests.data.rendering import png, write_folder, write_tar, write_zip
from tests.data.test_sources import refusal

WRITERS = {"folder": write_folder, "zip": write_zip, "tar": write_tar}


def two(*folders: str) -> dict[str, bytes]:
    """Two classes of two images in each folder."""
    return {f"{folder}/{c}/{n}.png": png(n) for folder in folders for c in ("cat", "dog") for n in range(2)}


def flat(*folders: str) -> dict[str, bytes]:
    return {f"{folder}/{n}.png": png(n) for folder in folders for n in range(2)}


@pytest.fixture(params=list(WRITERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training", "validation"),
        ("Train", "TEST"),
        ("train2017", "val2017"),
        ("seg_train", "seg_test"),
        ("train", "eval"),
        ("train", "dev"),
        ("train", "valid"),
        ("training", "val"),
        ("Training Set", "Test Set"),
        ("trainset", "testset"),
    ],
)
def test_other_spellings_are_splits(tmp_path: Path, kind: str, train: str, test: str) -> None:
    path = WRITERS[kind](tmp_path / f"set.{kind}", two(train, test) | {"docs/read.txt": b""})
    exact = WRITERS[kind](tmp_path / f"exact.{kind}", two("train", "test"))
    for split in ("train", "test"):
        source = open_source(path, split)
        assert source.class_names == ["cat", "dog"]
        assert source.samples == open_source(exact, split).samples
        assert all(source.read(sample) == png(int(sample.key[4])) for sample in source.samples)


def test_exact_names_and_test_before_validation_come_first(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](
        tmp_path / f"a.{kind}", two("training", "validation") | flat("testing/hen", "testing/cat")
    )
    assert "lacks: hen" in refusal(path, "test")
    path = WRITERS[kind](tmp_path / f"b.{kind}", two("train", "val") | flat("Train/x", "Train/y"))
    assert open_source(path).class_names == ["cat", "dog"]


@pytest.mark.parametrize("folders", [("val2014", "val2017"), ("test", "train1", "train2")])
def test_two_candidates_are_refused(tmp_path: Path, kind: str, folders: tuple[str, ...]) -> None:
    extra = () if "test" in folders else ("train",)
    path = WRITERS[kind](tmp_path / f"a.{kind}", two(*folders, *extra))
    split = "train" if "test" in folders else "test"
    assert f"each of which may be the {split} split" in refusal(path, split)


def test_one_folder_of_classes_is_a_split_by_its_name(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / f"a.{kind}", two("training"))
    assert open_source(path).class_names == ["cat", "dog"]
    assert "found training/" in refusal(path, "test")


def test_classes_that_are_called_like_splits_stay_classes(tmp_path: Path, kind: str) -> None:
    for number, names in enumerate([("running", "training"), ("crash-test", "smoke-test"), ("bus", "dev")]):
        path = WRITERS[kind](tmp_path / f"{number}.{kind}", flat(*names))
        assert open_source(path).class_names == list(names)
    path = WRITERS[kind](tmp_path / f"deep.{kind}", two("steam_train", "bus"))
    assert open_source(path).class_names == ["bus", "steam_train"]


def test_what_may_be_a_split_or_a_class_is_refused_with_both_readings(tmp_path: Path, kind: str) -> None:
    message = refusal(WRITERS[kind](tmp_path / f"a.{kind}", two("training", "running")))
    assert (
        "training/ beside running: it may be a split, the folders in it the classes, or a class of its"
        in message
    )
    message = refusal(WRITERS[kind](tmp_path / f"b.{kind}", flat("training", "validation")))
    assert "no class folders in training/, validation/, whose names are those of splits" in message


def test_words_in_a_name() -> None:
    assert split_word("Validation") == ("val", True)
    assert split_word("val2017") == ("val", True)
    assert split_word("my-train_set") == ("train", False)
    assert split_word("train_val") is None
    assert split_word("strainer") is None
