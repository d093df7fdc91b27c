import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ddfast.arguments import (
    architecture_options,
    one_of,
    output_file,
    output_folder,
    path_of,
    positive_number,
    whole_number,
    whole_number_or,
)
from ddfast.errors import UsageError


@pytest.mark.parametrize("value", [3, "3", 3.0, np.int64(3), np.uint8(3), np.float32(3), torch.tensor(3)])
def test_every_kind_of_whole_number_is_served_as_an_int(value):
    found = whole_number(value, "ipc", least=1)
    assert type(found) is int
    assert found == 3


@pytest.mark.parametrize(
    "value",
    [2.5, True, np.True_, None, [3], (3,), "x", "", "3.5", float("nan"), float("inf"), np.array([1, 2])],
)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(UsageError, match="ipc must be a whole number, got"):
        whole_number(value, "ipc")


def test_bounds_are_named():
    with pytest.raises(UsageError, match="ipc must be at least 1, got 0"):
        whole_number(0, "ipc", least=1)
    with pytest.raises(UsageError, match="ipc must be at most 4, got 5"):
        whole_number(5, "ipc", most=4)


def test_a_word_may_stand_for_a_number():
    assert whole_number_or("auto", "threads", ("auto",)) == "auto"
    assert whole_number_or(np.int64(2), "threads", ("auto",)) == 2
    for value in (0, "x", True, None, 1.5):
        with pytest.raises(UsageError, match="threads must be auto or a positive number, got"):
            whole_number_or(value, "threads", ("auto",))


@pytest.mark.parametrize("value", [0.5, "0.5", np.float32(0.5), torch.tensor(0.5)])
def test_numbers_are_floats(value):
    found = positive_number(value, "lr")
    assert type(found) is float
    assert found == 0.5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "lr must be positive, got nan"),
        (float("inf"), "lr must be finite, got inf"),
        (0, "lr must be positive, got 0"),
        (True, "lr must be a number, got True"),
        ("fast", "lr must be a number, got 'fast'"),
    ],
)
def test_what_is_no_positive_number_is_refused(value, message):
    with pytest.raises(UsageError, match=message):
        positive_number(value, "lr")


def test_a_choice_lists_what_is_known():
    assert one_of("png", "image_format", ("png", "jpeg")) == "png"
    with pytest.raises(UsageError, match=r"must be one of png, jpeg, got 'jpg'; did you mean jpeg\?"):
        one_of("jpg", "image_format", ("png", "jpeg"))
    with pytest.raises(UsageError, match="got None"):
        one_of(None, "image_format", ("png", "jpeg"))


def test_paths(tmp_path):
    assert path_of("a/b", "out") == path_of(b"a/b", "out") == path_of(Path("a/b"), "out") == Path("a/b")
    for value in (None, 5, ["a"], "", "a\0b"):
        with pytest.raises(UsageError, match="out must be a path, got"):
            path_of(value, "out")
    (tmp_path / "file").write_bytes(b"")
    assert output_folder(tmp_path / "new" / "er") == tmp_path / "new" / "er"
    assert output_file(tmp_path / "new" / "t.json") == tmp_path / "new" / "t.json"
    for check, path, message in (
        (output_folder, tmp_path / "file", "is a file; out must be a folder"),
        (output_folder, tmp_path / "file" / "x", "is a file, not a folder; choose another out"),
        (output_file, tmp_path, "is a folder; out must be a file"),
        (output_file, tmp_path / "file" / "x", "is a file, not a folder"),
    ):
        with pytest.raises(UsageError, match=message):
            check(path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ddfast.arguments.tempfile.TemporaryFile", denied)
    with pytest.raises(UsageError, match=r"cannot write .*: permission denied in .*; choose another out"):
        output_folder(tmp_path / "new")


def test_options_of_an_architecture_are_plain():
    assert architecture_options(None) == {}
    found = architecture_options({"width": np.int64(8), "rate": np.float64(0.5), "name": "x"})
    assert found == {"width": 8, "rate": 0.5, "name": "x"}
    assert [type(value) for value in found.values()] == [int, float, str]
    assert architecture_options({"width": "8"}) == {"width": 8}
    for value in ([("width", 8)], "x", {3: 4}):
        with pytest.raises(UsageError, match="arch_options must be a mapping"):
            architecture_options(value)
    with pytest.raises(UsageError, match=r"width must be a whole number, got 8\.5"):
        architecture_options({"width": 8.5})
