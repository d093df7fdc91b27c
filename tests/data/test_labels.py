"""Labels to class names: no two classes become one."""

from __future__ import annotations

import pytest

from ddfast.data.labels import class_list, class_names_of, label_in_text
from ddfast.errors import UsageError


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("7\n", 7),
        ("0", 0),
        ("007", "007"),
        ("00", "00"),
        (" cat ", "cat"),
        ("\ufeff3", 3),
        ("", None),
        ("1.0", "1.0"),
    ],
)
def test_a_text_is_a_number_or_a_name(text: str, label: int | str | None) -> None:
    assert label_in_text(text) == label


def test_zeros_in_front_are_kept_without_a_class_list_and_read_with_one() -> None:
    assert class_names_of({"008", "009", "010"}, None, "x") == {c: c for c in ("008", "009", "010")}
    assert class_names_of({"08", "09", 10}, None, "x") == {"08": "08", "09": "09", 10: "10"}
    assert class_names_of({"00", "01"}, b"cat\ndog\n", "x") == {"00": "cat", "01": "dog"}
    assert class_names_of({0, "dog"}, b"cat\ndog\n", "x") == {0: "cat", "dog": "dog"}


@pytest.mark.parametrize("said", [[1, "01"], ["007", 7], ["7", 7, 10], ["07", "007"]])
def test_one_number_in_two_ways_is_refused(said: list[int | str]) -> None:
    with pytest.raises(UsageError, match="one number and two names: write it in one way"):
        class_names_of(said, None, "x")


def test_one_name_for_two_numbers_is_refused_where_one_occurs() -> None:
    for said in ([0, 2], [0], [2]):
        with pytest.raises(UsageError, match="names crane on lines 1 and 3, which are two classes"):
            class_names_of(said, b"crane\ntench\ncrane\n", "x")
    assert class_names_of([1], b"crane\ntench\ncrane\n", "x") == {1: "tench"}


def test_a_class_list_has_a_name_on_each_line() -> None:
    assert class_list("\ufeffcat\r\nice\x0bcream\n\n".encode()) == ["cat", "ice\x0bcream"]
