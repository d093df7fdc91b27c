import pytest

from ddfast.wording import (
    argument,
    did_you_mean,
    flags_of_command,
    is_argument,
    nearest,
    plural,
    setting,
    singular,
)


def test_one_is_singular_and_every_other_count_plural():
    nouns = ("image", "class", "usable image", "process", "core", "patch", "box")
    assert [plural(1, noun) for noun in nouns] == [f"1 {noun}" for noun in nouns]
    assert [plural(2, noun) for noun in nouns] == [
        *("2 images", "2 classes", "2 usable images", "2 processes", "2 cores", "2 patches", "2 boxes")
    ]
    assert plural(0, "epoch") == "0 epochs"
    assert plural(3, "entry", "entries") == "3 entries"


def test_a_singular_undoes_a_plural():
    for noun in ("image", "class", "epoch", "file", "box", "patch"):
        assert singular(plural(2, noun).removeprefix("2 ")) == noun


@pytest.mark.parametrize(
    ("word", "known", "found"),
    [
        ("infoutill", ("infoutil", "rded"), "infoutil"),
        ("RDED", ("infoutil", "rded"), "rded"),
        ("cos", ("cosine", "constant"), "cosine"),
        ("coreset", ("infoutil", "rded"), None),
        ("--ipc", ("--epochs", "--arch"), None),
        (None, ("rded",), None),
        ("", ("rded",), None),
    ],
)
def test_the_nearest_name_is_one_that_could_have_been_meant(word, known, found):
    assert nearest(word, known) == found
    assert did_you_mean(word, known) == (f"; did you mean {found}?" if found else "")


def test_an_argument_is_named_as_its_caller_typed_it():
    assert (argument("image_size"), setting("threads", 2), setting("resume", True)) == (
        *("image_size", "threads=2", "resume=True"),
    )
    assert is_argument("anything")
    with flags_of_command({"image_size": "--image-size", "image_format": "--format"}):
        assert argument("image_size") == "--image-size"
        assert argument("image_format") == "--format"
        assert setting("image_format", "png") == "--format png"
        assert (setting("threads", 2), setting("resume", True)) == ("--threads 2", "--resume")
        assert setting("preflight", False) == "--no-preflight"
        assert is_argument("image_size")
        assert not is_argument("ipc")
    assert argument("image_size") == "image_size"
