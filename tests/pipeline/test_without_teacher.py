"""A run of a method that makes pixels and asks no teacher, from its opening to its last stage."""

import json
import shutil
import sys
import types
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import ddfast
from ddfast.arguments import whole_number
from ddfast.cli import main
from ddfast.data.pool import MEMORY_LIMIT
from ddfast.errors import UsageError
from ddfast.methods import _registry
from ddfast.methods.synthesis import Group, State, Synthesis
from ddfast.models import create_model, save_teacher
from ddfast.pipeline.opening import open_run, reopen
from ddfast.pipeline.plan import read_plan, run_digest
from ddfast.pipeline.run import clock
from ddfast.settings import Settings, option

NAMES = ["ant", "bee", "cat"]
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@dataclass(frozen=True)
class FirstOptions:
    iterations: int = option(3, "steps", check=lambda value, keyword: whole_number(value, keyword, least=1))
    proxies: str | None = option(None, "folder")
    experts: int = option(0, "of the preparation", stage="prepare")


class First(Synthesis):
    """The first real images of each class, which no step changes."""

    name = "first"
    summary = "the first images"
    Options = FirstOptions

    @property
    def steps(self):
        return self.options.iterations

    def groups(self, classes, ipc):
        return [Group(0, tuple(range(classes)))]

    def begin(self, group, pool, context):
        drawn = [pool.draw(label, context.ipc, torch.Generator().manual_seed(0)) for label in group.classes]
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (context.mean, context.std))
        return State(group, {"pixels": (torch.cat(drawn) / 255 - mean) / std})

    def step(self, number, state, pool, context):
        return 0.0


class Prepared(First):
    name = "prepared"
    stages: ClassVar = ("prepare", "synthesize")


class Asking(First):
    name = "asking"
    uses_teacher = True


class Labelled(First):
    name = "labelled"
    stages: ClassVar = ("synthesize", "relabel")


@pytest.fixture
def seen(monkeypatch):
    """The runs that the stage synthesize was given; the methods of this file are known."""
    runs = []

    def synthesize(run):
        runs.append(run)
        run.begun = run.method.begin(run.method.groups(3, 1)[0], run.decoded_pool(), run.context)
        clock(run, "synthesize", 0.0)

    known = {**_registry(), **{method.name: method for method in (First, Prepared, Asking, Labelled)}}
    monkeypatch.setattr("ddfast.methods._registry", lambda: known)
    stage = types.ModuleType("ddfast.pipeline.synthesize")
    stage.synthesize = synthesize
    monkeypatch.setitem(sys.modules, "ddfast.pipeline.synthesize", stage)
    monkeypatch.setattr("ddfast.distillation.write_report", lambda *_, **__: None)
    monkeypatch.setattr("ddfast.distillation._lost", lambda out: "")  # its stage writes nothing
    return runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images of 20 x 12 px in each of three classes."""
    root, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in NAMES:
        (root / "train" / name).mkdir(parents=True)
        for index in range(6):
            pixels = draw.integers(0, 256, (12, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{index}.png")
        shutil.copytree(root / "train" / name, root / "test" / name)
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "t.safetensors"
    torch.manual_seed(0)
    save_teacher(
        path,
        create_model("convnet3", 3, 16),
        arch="convnet3",
        class_names=NAMES,
        image_size=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    return path


def opened(folder, out, method="first", options=None, **given):
    settings = {"data": folder, "ipc": 2, "out": out, "quiet": True, **given}
    return open_run(method, Settings(**settings), options)


def test_distill_opens_a_method_without_a_teacher(seen, folder, tmp_path):
    out = ddfast.distill("first", data=folder, ipc=2, out=tmp_path / "run", quiet=True, iterations="5")
    context = seen[0].context
    assert (context.teacher, context.image_size, context.factor, context.ipc) == (None, 12, 1, 2)
    assert (context.class_names, context.classes) == (tuple(NAMES), 3)
    assert (context.mean, context.std) == tuple(map(tuple, IMAGENET))
    assert seen[0].begun.pixels.shape == (6, 3, 12, 12)
    assert len(seen[0].pool()) == 18
    plan = json.loads((out / "manifest.json").read_text())
    wanted = {
        "complete": True,
        "method": "first",
        "factor": 1,
        "tiles": 1,
        "image_size": 12,
        "ipc": 2,
        "teacher": None,
        "label_teacher": None,
        "label_temperature": None,
        "label_top_k": None,
        "mean": IMAGENET[0],
        "std": IMAGENET[1],
        "images_per_class": "all",
        "evaluate_every": 0,
        "options": {"synthesize": {"iterations": 5, "proxies": None, "experts": 0}},
    }
    assert {key: plan[key] for key in wanted} == wanted
    assert "pool_memory" not in plan
    facts = json.loads((out / "run.json").read_text())
    assert (facts["teacher"], facts["label_teacher"]) == (None, None)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("cifar10", ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))),
        ("none", ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))),
        (".1,.2,.3/.4,.5,.6", ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
        (([0.1, 0.2, 0.3], np.array([0.5, 0.5, 0.5])), ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))),
    ],
)
def test_the_normalisation_is_a_setting(seen, folder, tmp_path, given, wanted):
    run = opened(folder, tmp_path / "run", normalization=given)
    assert (run.context.mean, run.context.std) == wanted
    again = reopen(tmp_path / "run", quiet=True)
    assert (again.context.mean, again.context.std) == wanted


def test_settings_decide_what_they_say(seen, folder, tmp_path):
    run = opened(
        folder,
        tmp_path / "run",
        image_size=np.int64(8),
        images_per_class="4",
        pool_memory="0.5",
        evaluate_every=10,
        options={"proxies": "there"},
    )
    assert (run.context.image_size, run.plan["images_per_class"], len(run.pool())) == (8, 4, 12)
    assert (run.plan["evaluate_every"], run.pool_memory) == (10, 2**29)
    assert run.method.options.proxies == "there"
    assert reopen(run.out).pool_memory is None
    assert Settings(data="", ipc=1, out="").pool_memory * 2**30 == MEMORY_LIMIT


def test_the_pool_gives_the_same_images_of_some_classes_and_without_memory(seen, folder, tmp_path):
    run = opened(folder, tmp_path / "run")
    whole, some, streamed = (
        run.decoded_pool(),
        run.decoded_pool(classes=[1]),
        run.decoded_pool(classes=[1], held=False),
    )
    assert [len(pool.labels) for pool in (whole, some, streamed)] == [18, 6, 6]
    images = [pool.draw(1, 3, torch.Generator().manual_seed(1)) for pool in (whole, some, streamed)]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_a_digest_changes_with_all_that_decides_pixels_and_nothing_else(seen, folder, tmp_path):
    def digest(name, options=None, **given):
        return run_digest(opened(folder, tmp_path / name, options=options, **given).plan)

    first = digest("a")
    assert len(first) == 32
    for number, given in enumerate(
        (
            {"workers": 1},
            {"pool_memory": 0},
            {"batch_size": 8},
            {"evaluate_every": 5},
            {"image_format": "jpeg"},
        )
    ):
        assert digest(f"same{number}", **given) == first, given
    changes = (
        *({"ipc": 1}, {"seed": 1}, {"image_size": 8}, {"images_per_class": 5}, {"normalization": "none"}),
        *({"options": {"iterations": 4}}, {"options": {"experts": 1}}, {"precision": "bfloat16"}),
    )
    others = {digest(f"other{number}", **given) for number, given in enumerate(changes)}
    assert first not in others
    assert len(others) == len(changes)


def test_options_stand_under_the_stages_of_the_method(seen, folder, tmp_path):
    run = opened(folder, tmp_path / "run", "prepared", options={"experts": 2})
    assert run.plan["options"] == {
        "prepare": {"experts": 2},
        "synthesize": {"iterations": 3, "proxies": None},
    }
    assert reopen(run.out, quiet=True).method.options == run.method.options


def test_a_method_may_use_a_teacher_without_needing_one(seen, folder, teacher, tmp_path):
    assert opened(folder, tmp_path / "without", "asking").context.teacher is None
    run = opened(folder, tmp_path / "with", "asking", teacher=teacher, preflight=False)
    assert (run.context.image_size, run.context.mean) == (16, (0.5, 0.5, 0.5))
    assert (run.teacher.arch, run.label_teacher) == ("convnet3", None)
    assert (run.plan["teacher"]["arch"], run.plan["label_teacher"]) == ("convnet3", None)
    assert run.plan["label_temperature"] is None
    again = reopen(run.out, quiet=True)
    assert (again.teacher.sha256, again.label_teacher) == (run.teacher.sha256, None)
    assert run_digest(again.plan) == run_digest(run.plan)


def test_soft_labels_need_a_teacher(seen, folder, teacher, tmp_path):
    with pytest.raises(UsageError, match="teacher must be a path, got None: labelled needs one"):
        opened(folder, tmp_path / "run", "labelled")
    run = opened(folder, tmp_path / "run", "labelled", teacher=teacher, preflight=False)
    assert run.label_teacher is run.teacher
    assert run.plan["label_temperature"] == 20


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": "TEACHER"}, "teacher is nothing to first, which uses no teacher: leave it out"),
        ({"label_teacher": "TEACHER"}, "label_teacher is nothing to first, which keeps hard labels"),
        ({"label_top_k": 3}, "label_top_k is nothing to first, which keeps hard labels"),
        ({"scores": "OUT"}, "scores is nothing to first, which scores no images"),
        ({"class_order": NAMES}, "class_order is nothing to first, which uses no teacher"),
        ({"factor": 2}, "factor of first is 1, got 2: leave it out"),
        ({"normalization": "mnist"}, "normalization: unknown normalization 'mnist'"),
        ({"normalization": "1,2,3/0,1,1"}, "three means and three positive deviations"),
        ({"normalization": "1,2/1,1"}, "three means and three positive deviations"),
        ({"normalization": "a,b,c/1,1,1"}, "three means and three positive deviations"),
        ({"normalization": 5}, "normalization must be one of"),
        ({"pool_memory": -1}, "pool_memory must be at least 0"),
        ({"pool_memory": "much"}, "pool_memory must be a number, got 'much'"),
        ({"evaluate_every": 1.5}, "evaluate_every must be a whole number"),
        ({"images_per_class": 0}, "images_per_class must be at least 1, got 0"),
        ({"images_per_class": "some"}, "images_per_class must be a whole number, got 'some'"),
        ({"options": {"iterations": 0}}, "iterations must be at least 1, got 0"),
        ({"options": {"iteration": 1}}, "has no option 'iteration'.*did you mean iterations"),
        ({"preset": "paper"}, "its presets: none"),
    ],
)
def test_what_means_nothing_to_the_method_is_one_line(seen, folder, teacher, tmp_path, given, message):
    places = {"TEACHER": teacher, "OUT": tmp_path}
    given = {
        key: places.get(value, value) if isinstance(value, str) else value for key, value in given.items()
    }
    with pytest.raises(UsageError, match=message) as found:
        opened(folder, tmp_path / "run", **given)
    assert len(str(found.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_setting_of_pixels_is_nothing_to_a_method_that_chooses_crops(folder, teacher, tmp_path):
    with pytest.raises(UsageError, match="evaluate_every is nothing to rded, which makes no pixels"):
        ddfast.distill("rded", data=folder, teacher=teacher, ipc=1, out=tmp_path / "run", evaluate_every=2)
    with pytest.raises(UsageError, match="normalization differs from the teacher's, which reads 16 px"):
        ddfast.distill(
            "rded", data=folder, teacher=teacher, ipc=1, out=tmp_path / "run", normalization="cifar10"
        )
    assert not (tmp_path / "run").exists()


def test_every_image_of_a_class_can_be_asked_for(folder, teacher, tmp_path):
    common = {
        "data": folder,
        "teacher": teacher,
        "ipc": 1,
        "quiet": True,
        "preflight": False,
        "until": "score",
    }
    plans = [
        read_plan(ddfast.distill("random", out=tmp_path / str(given), images_per_class=given, **common))
        for given in ("all", "auto")
    ]
    assert [plan["images_per_class"] for plan in plans] == ["all", 300]
    assert [list(plan["options"]) for plan in plans] == [["score", "select"]] * 2


# The command line


def run_command(*words, capsys):
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_the_commands_of_a_method_that_makes_pixels(seen, folder, teacher, tmp_path, capsys):
    out = tmp_path / "run"
    words = ("first", "--data", folder, "--ipc", 2, "--out", out, "--normalization", "cifar10", "--quiet")
    words = (*words, "--iterations", 4, "--evaluate-every", 2, "--pool-memory", 0)
    assert run_command("distill", *words, capsys=capsys) == (0, f"{out}\n", "")
    assert (seen[0].method.steps, seen[0].plan["evaluate_every"], seen[0].pool_memory) == (4, 2, 0)
    assert run_command("distill", *words, capsys=capsys)[0] == 2
    assert run_command("distill", *words, "--resume", capsys=capsys)[:2] == (0, f"{out}\n")
    code, _, err = run_command("distill", *words, "--resume", "--seed", 3, capsys=capsys)
    assert (code, "seed: it has 0, this one 3" in err) == (2, True)
    code, _, err = run_command("distill", *words, "--resume", "--ipc", 3, capsys=capsys)
    assert code == 2
    assert err.endswith("(ipc: it has 2, this one 3); choose another folder or delete it\n")
    assert run_command("synthesize", out, "--quiet", "--pool-memory", 1, capsys=capsys)[:2] == (0, f"{out}\n")
    assert (len(seen), seen[-1].pool_memory) == (2, 2**30)
    for command, message in (
        (("select", out), "a run of first has no stage select; it has synthesize"),
        (("select", out, "--ipc", 1), "a run of first has no stage select; it has synthesize"),
        (("prepare", out), "a run of first has no stage prepare; it has synthesize"),
        (("relabel", out, "--teacher", teacher), f"the run in {out} has no teacher: leave --teacher out"),
        (("score", *words[:-6]), "a run of first has no stage score; it has synthesize"),
        (("distill", *words, "--teacher", teacher), "--teacher is nothing to first, which uses no teacher"),
        (
            ("distill", *words, "--teacher-arch", "convnet3"),
            "--teacher-arch describes a teacher: give --teacher",
        ),
        (("distill", *words, "--class-order", teacher), "--class-order describes a teacher: give --teacher"),
        (("distill", *words, "--crops", 2), "--crops is an option of infoutil and rded, not of first"),
        (("distill", *words, "--normalization", "1,1,1"), "--normalization: unknown normalization '1,1,1'"),
    ):
        code, printed, err = run_command(*command, capsys=capsys)
        assert (code, printed, len(err.splitlines())) == (2, "", 1), (command, err)
        assert message in err, command
    assert read_plan(out)["ipc"] == 2


def test_the_help_of_a_method_shows_what_it_takes(seen, capsys):
    _, out, _ = run_command("distill", "first", "--help", capsys=capsys)
    assert "--iterations" in out
    assert "--normalization" in out
    for flag in ("--scores", "--label-teacher", "--label-top-k", "--teacher TEACHER"):
        assert flag not in out.split("positional arguments")[1], flag
    _, out, _ = run_command("distill", "rded", "--help", capsys=capsys)
    assert "--scores" in out
    assert "--evaluate-every" not in out.split("positional arguments")[1]


def test_a_lost_run_json_asks_for_what_there_was(seen, folder, tmp_path):
    run = opened(folder, tmp_path / "run")
    (run.out / "run.json").unlink()
    with pytest.raises(UsageError, match=r"run\.json is missing or damaged: give data$"):
        reopen(run.out)
    assert reopen(run.out, data=folder, quiet=True).teacher is None


def test_proxies_are_trained_by_a_command(folder, tmp_path, capsys, monkeypatch):
    calls = []
    module = types.ModuleType("ddfast.training.proxies")
    module.train_proxies = lambda data, **settings: calls.append((data, settings)) or "a table"
    monkeypatch.setitem(sys.modules, "ddfast.training.proxies", module)
    words = ("train-proxies", "--data", folder, "--out", tmp_path / "p")
    assert run_command(*words, capsys=capsys) == (0, "a table\n", "")
    wanted = {
        "arch": "resnet18_in",
        "count": 10,
        "epochs": 20,
        "out": str(tmp_path / "p"),
        "images_per_class": None,
        "image_size": None,
        "seed": 0,
        "resume": False,
        "device": "auto",
        "workers": None,
        "quiet": False,
    }
    assert calls == [(str(folder), wanted)]
    more = (
        "--lr",
        0.5,
        "--batch-size",
        8,
        "--images-per-class",
        4,
        "--image-size",
        16,
        "--resume",
        "--quiet",
    )
    assert run_command(*words, *more, "--count", 2, capsys=capsys)[0] == 0
    assert calls[1][1] == {
        **wanted,
        "lr": 0.5,
        "batch_size": 8,
        "images_per_class": 4,
        "image_size": 16,
        "resume": True,
        "quiet": True,
        "count": 2,
    }
    code, _, err = run_command(*words, "--count", "two", capsys=capsys)
    assert (code, err) == (2, "ddfast train-proxies: argument --count: wanted a whole number, got 'two'\n")
