import json
import sys
import types

import pytest

import ddfast
from ddfast.cli import main
from ddfast.errors import UsageError
from ddfast.history import History, check_history
from ddfast.output import CURVE
from tests.conftest import digests


def lines(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text("utf-8").splitlines()]


OPENING = ["command", "run", "event", "step"]


def test_a_training_tells_every_epoch_and_the_teacher_is_the_same(toy_folder, tmp_path, capsys):
    settings = {"arch": "convnet3", "epochs": 3, "image_size": 16, "arch_options": {"width": 8}}
    ddfast.train_teacher(toy_folder, out=tmp_path / "plain.safetensors", quiet=True, **settings)
    words = ("--data", toy_folder, "--arch", "convnet3", "--epochs", 3, "--image-size", 16, "--width", 8)
    words = (
        *words,
        "--precision",
        "float32",
        "--out",
        tmp_path / "t.safetensors",
        "--log-dir",
        tmp_path / "log",
    )
    assert main([str(word) for word in ("train-teacher", *words, "--quiet")]) == 0
    assert (tmp_path / "t.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    told = lines(tmp_path / "log")
    assert [list(line) for line in told] == [[*OPENING, "loss", "top1", "images_per_second", "time"]] * 3
    assert [(line["event"], line["step"]) for line in told] == [("epoch", 1), ("epoch", 2), ("epoch", 3)]
    assert told[0]["command"] == "train-teacher"
    assert told[0]["run"] == str(tmp_path / "t.safetensors")
    assert told[-1]["top1"] == ddfast.load_teacher(tmp_path / "t.safetensors").top1
    assert all(line["loss"] > 0 for line in told)


def test_a_distillation_tells_noted_steps_and_stages_outside_of_its_identity(toy_folder, tmp_path):
    settings = {
        "data": toy_folder,
        "ipc": 1,
        "iterations": 3,
        "real_batch": 2,
        "class_batch": 2,
        "quiet": True,
    }
    plain = ddfast.distill("dm", out=tmp_path / "plain", **settings)
    told = ddfast.distill("dm", out=tmp_path / "told", log_dir=tmp_path / "log", **settings)
    assert digests(told) == digests(plain)
    found = lines(tmp_path / "log")
    steps = [line for line in found if line["event"] == "step"]
    keys = ["group", *CURVE]
    assert {"loss", "cmi", "accuracy"} < set(keys)
    assert {tuple(line) for line in steps} == {(*OPENING, *keys, "time")}
    assert [(line["group"], line["step"]) for line in steps] == [(g, s) for g in (0, 1) for s in (1, 2, 3)]
    assert all(line["loss"] > 0 and line["cmi"] is None for line in steps)
    (stage,) = [line for line in found if line["event"] == "stage"]
    assert list(stage) == [*OPENING, "stage", "seconds", "time"]
    assert (stage["step"], stage["stage"], stage["command"]) == (1, "synthesize", "distill")


def test_an_evaluation_tells_every_student_and_adds_to_what_stands(toy_folder, toy_teacher, tmp_path):
    out = ddfast.distill(
        "random", data=toy_folder, teacher=toy_teacher, ipc=1, out=tmp_path / "run", quiet=True
    )
    settings = {"arch": "convnet3", "arch_options": {"width": 8}, "epochs": 2, "quiet": True}
    for seeds in ([3, 5], [7]):
        result = ddfast.evaluate(out, toy_folder, seeds=seeds, log_dir=tmp_path / "log", **settings)
        found = lines(tmp_path / "log")[-len(seeds) :]
        assert [line["top1"] for line in found] == result.top1
        assert [line["seed"] for line in found] == seeds
        assert [line["step"] for line in found] == list(range(1, len(seeds) + 1))
    told = lines(tmp_path / "log")
    keys = ["seed", "arch", "top1", "top5", "best", "best_epoch", "epochs", "loss"]
    assert {tuple(line) for line in told} == {(*OPENING, *keys, "time")}
    assert {(line["command"], line["event"], line["run"]) for line in told} == {
        ("evaluate", "student", str(out))
    }
    with pytest.raises(UsageError, match="whose content is the result alone"):
        ddfast.evaluate(out, toy_folder, log_dir=out / "log", **settings)


@pytest.mark.parametrize("log_dir", ["out", "out/log", "out/../out/log"])
def test_no_history_stands_in_an_output_folder(log_dir, toy_folder, tmp_path, capsys):
    words = ["distill", "dm", "--data", str(toy_folder), "--ipc", "1", "--out", str(tmp_path / "out")]
    assert main([*words, "--log-dir", str(tmp_path / log_dir)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "lies inside of" in err
    assert "--log-dir" in err
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_one_line(toy_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = ["train-teacher", "--data", str(toy_folder), "--arch", "convnet3", "--epochs", "1"]
    assert main([*words, "--out", str(tmp_path / "t.safetensors"), "--wandb", "mine"]) == 2
    err = capsys.readouterr().err
    assert err == (
        "ddfast: --wandb needs the package wandb, which is not installed: pip install wandb, or leave it out\n"
    )
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="log_dir must be a folder"):
        check_history(tmp_path / "file", None)
    with pytest.raises(UsageError, match="log_dir must be a path"):
        check_history(5, None)
    with pytest.raises(UsageError, match="wandb must be the name of a project, got ''"):
        check_history(None, "")


class Board:
    """TensorBoard's writer and a run of Weights & Biases: what they were told."""

    def __init__(self, *given, **named):
        self.given, self.named, self.told = given, named, []
        type(self).last = self

    def add_scalar(self, name, value, step):
        self.told.append((name, value, step))

    def log(self, values):
        self.told.append(values)

    def close(self):
        self.told.append("closed")

    def finish(self, exit_code):
        self.told.append(exit_code)


def test_tensorboard_and_wandb_are_told_the_same(tmp_path, monkeypatch):
    class Project(Board):
        pass

    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Board))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Project))
    check_history(tmp_path / "log", "mine")
    with History(tmp_path / "log", "mine", command="evaluate", run="run", settings={"seed": 3}) as history:
        history.note("student", 2, top1=50.0, arch="convnet3", best=float("nan"))
    assert Board.last.given == (str(tmp_path / "log"),)
    assert Board.last.told == [("student/top1", 50.0, 2), "closed"]
    assert Project.last.named == {"project": "mine", "name": "run", "config": {"seed": 3}}
    assert Project.last.told == [{"student/step": 2, "student/top1": 50.0}, 0]
    (line,) = lines(tmp_path / "log")
    assert line.pop("time") > 0
    assert line == {
        "command": "evaluate",
        "run": "run",
        "event": "student",
        "step": 2,
        "top1": 50.0,
        "arch": "convnet3",
        "best": None,
    }


def test_without_tensorboard_there_is_the_history_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with History(tmp_path / "log", None, command="distill", run="o") as history:
        history.note("stage", 1, stage="score")
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["history.jsonl"]
    with History(None, None, command="distill", run="o") as history:
        history.note("stage", 1, stage="score")
    assert not history.wanted


def test_attribute_and_export_from_python(toy_folder, toy_teacher, tmp_path):
    count = ddfast.attribute(toy_folder, teacher=str(toy_teacher), out=tmp_path / "a", limit=2, quiet=True)
    assert count == len(list((tmp_path / "a/heatmaps").iterdir())) == 2
    with pytest.raises(UsageError, match="no teacher file"):
        ddfast.attribute(toy_folder, teacher=tmp_path / "t.safetensors", out=tmp_path / "b", quiet=True)
    assert not (tmp_path / "b").exists()
    out = ddfast.distill(
        "random", data=toy_folder, teacher=toy_teacher, ipc=1, out=tmp_path / "run", quiet=True
    )
    assert ddfast.export(out, tmp_path / "run.tar") == [tmp_path / "run.tar"]
