import argparse
import dataclasses
import inspect

import numpy as np
import pytest
import torch

import ddfast
from ddfast import settings
from ddfast.cli import build_parser
from ddfast.commands.flags import add_options, given_options, given_settings
from ddfast.commands.parser import commands_of
from ddfast.errors import UsageError
from ddfast.methods import get_method, list_methods
from ddfast.pipeline.teachers import normalization_of
from ddfast.settings import Settings, described, fields, option

GIVEN = {"data": "photos", "ipc": 3, "out": "there"}
WORDS = ["distill", "random", "--data", "photos", "--ipc", "3", "--out", "there", "--teacher", "t"]


def test_the_signature_of_distill_is_the_settings():
    parameters = dict(inspect.signature(ddfast.distill).parameters)
    assert next(iter(parameters)) == "method"
    for field in fields():
        found = parameters.pop(field.name)
        assert found.kind is found.KEYWORD_ONLY
        required = field.default is dataclasses.MISSING
        assert found.default == (found.empty if required else field.default), field.name
        assert f"\n        {field.name}: " in ddfast.distill.__doc__
    assert set(parameters) == {"method", "until", "options"}
    with pytest.raises(TypeError, match="missing a required argument: 'ipc'"):
        ddfast.distill("random", data="photos", out="there")


def test_every_setting_is_a_flag_with_its_default():
    distill = commands_of(build_parser(WORDS))["distill"]
    arguments = distill.parse_args(WORDS[1:])
    found = given_settings(arguments)
    assert found.pop("teacher") == "t"
    wanted = {field.name: field.default for field in fields() if field.default is not dataclasses.MISSING}
    del wanted["teacher"]
    assert found == {**wanted, "data": "photos", "ipc": 3, "out": "there"}
    flags = distill.flags()
    assert flags["image_format"] == "--format"
    assert flags["no_preflight"] == "--no-preflight"
    changed = distill.parse_args(
        [*WORDS[1:], "--no-preflight", "--resume", "--format", "jpeg", "--seed", "4"]
    )
    found = given_settings(changed)
    assert (found["preflight"], found["resume"], found["image_format"], found["seed"]) == (
        False,
        True,
        "jpeg",
        4,
    )


def test_a_setting_more_is_one_line(monkeypatch):
    """A field is enough for the flag, the keyword, the check, the help and the manifest."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class More(Settings):
        patience: int = option(
            7, "steps that it waits", check=settings._whole(1), manifest="arithmetic.patience"
        )

    monkeypatch.setattr(settings, "Settings", More)

    @described
    def run(*, until: str | None = None, **given: object) -> object:
        """Run.

        Args:
            {settings}
        """
        return given

    assert inspect.signature(run).parameters["patience"].default == 7
    assert "            patience: steps that it waits.\n" in run.__doc__
    assert run(**GIVEN, patience=3) == {**GIVEN, "patience": 3}
    distill = commands_of(build_parser(WORDS))["distill"]
    assert given_settings(distill.parse_args([*WORDS[1:], "--patience", "9"]))["patience"] == 9
    assert "steps that it waits (default: 7)" in " ".join(distill.format_help().split())
    assert More(**GIVEN, patience="2").checked().patience == 2
    with pytest.raises(UsageError, match="patience must be at least 1, got 0"):
        More(**GIVEN, patience=0).checked()
    assert More(**GIVEN).in_manifest({"score"})["arithmetic.patience"] == 7


def test_checked_settings_are_plain(tmp_path):
    given = Settings(
        **{**GIVEN, "out": str(tmp_path / "out"), "ipc": torch.tensor(3)},
        seed=np.int64(5),
        factor=np.int64(2),
        images_per_class=4.0,
        threads=np.uint8(2),
        label_top_k="7",
        pool_memory=np.float32(0.5),
        resume=np.True_,
    )
    found = given.checked()
    wanted = {"ipc": 3, "seed": 5, "factor": "2", "images_per_class": 4, "threads": 2, "label_top_k": 7}
    wanted |= {"pool_memory": 0.5, "resume": True, "out": tmp_path / "out"}
    for name, value in wanted.items():
        assert getattr(found, name) == value
        assert type(getattr(found, name)) is type(value), name
    assert given.seed is not found.seed
    assert type(given.seed) is np.int64


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"factor": 3}, "factor must be one of auto, 1, 2, got '3'"),
        ({"factor": True}, "factor must be one of auto, 1, 2, got True"),
        ({"image_format": None}, "image_format must be one of png, jpeg, got None"),
        ({"image_format": "jpg"}, "did you mean jpeg"),
        ({"loader": "pilow"}, "did you mean pillow"),
        ({"precision": "half"}, "precision must be one of float32, bfloat16, auto, got 'half'"),
        ({"threads": 0}, "threads must be auto or a positive number, got 0"),
        ({"batch_size": "some"}, "batch_size must be auto or a positive number, got some"),
        ({"label_top_k": 0}, "label_top_k must be auto, all or a positive number, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"seed": 2**63}, "seed must be at most"),
        ({"data": 5}, "data must be a path, got 5"),
        ({"scores": 5}, "scores must be a path, got 5"),
        ({"pool_memory": float("nan")}, "pool_memory must be at least 0, got nan"),
    ],
)
def test_what_no_run_could_use_is_refused(tmp_path, changed, message):
    with pytest.raises(UsageError, match=message):
        Settings(**{**GIVEN, "out": tmp_path, **changed}).checked()


def test_no_option_of_a_method_hides_a_setting():
    names = {field.name for field in fields()} | {"until", "method"}
    for method in map(get_method, list_methods()):
        options = {field.name for field in dataclasses.fields(method.Options)}
        assert not options & names, method.name


def test_options_are_checked_and_shown_by_what_stands_at_them():
    @dataclasses.dataclass(frozen=True)
    class Options:
        share: float = option(0.5, "50% of them", check=lambda value, keyword: float(value) * 2)
        kind: str = option("a", "which", choices=("a", "b"))
        folder: str | None = option(None, "where", type=str, metavar="DIR")
        steps: int | None = option(None, "how many", type=int)
        flip: bool = option(True, "mirror")

    class Own(get_method("random")):
        name = "own"

    Own.Options = Options
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser.add_argument_group("options"), Options)
    text = " ".join(parser.format_help().split())
    for words in ("50% of them (default: 0.5)", "--folder DIR where", "--kind {a,b}", "--no-flip"):
        assert words in text
    assert given_options(parser.parse_args([]), Options) == {}
    found = given_options(
        parser.parse_args(["--share", ".25", "--steps", "3", "--no-flip", "--folder", "x"]), Options
    )
    assert found == {"share": 0.25, "steps": 3, "flip": False, "folder": "x"}
    assert Own.from_options(found).options == Options(0.5, "a", "x", 3, False)
    with pytest.raises(UsageError, match="kind must be one of a, b, got 'c'"):
        Own.from_options({"kind": "c"})


def test_auto_is_the_normalisation_of_teachers():
    from ddfast.training import TeacherConfig

    trained = TeacherConfig("convnet3", 1, 32).mean_std
    assert normalization_of(Settings(**GIVEN)) == trained
    assert normalization_of(Settings(**GIVEN, normalization="0,0,0/1,1,1")) == ((0, 0, 0), (1, 1, 1))
