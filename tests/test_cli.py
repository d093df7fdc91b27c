import subprocess
import sys

import pytest
import torch

from ddfast.cli import main
from ddfast.models import create_model
from tests.methods.conftest import toy_folder, toy_teacher, toy_test, toy_train

__all__ = ["toy_folder", "toy_teacher", "toy_test", "toy_train"]


def run(*words, capsys):
    """Exit code, standard output, standard error."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("distill",),
        ("distill", "infoutil"),
        ("distil", "infoutil"),
        ("distill", "infoutil", "--ipc", "ten", "--data", "d", "--teacher", "t", "--out", "o"),
        (
            "distill",
            "infoutil",
            "--ipc",
            "1",
            "--data",
            "d",
            "--teacher",
            "t",
            "--out",
            "o",
            "--estimator",
            "best",
        ),
        ("distill", "rded", "--ipc", "1", "--data", "d", "--teacher", "t", "--out", "o", "--alpha", "2"),
        ("train-teacher", "--data", "d"),
        ("evaluate",),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(words, capsys):
    code, out, err = run(*words, capsys=capsys)
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "export",
        "train-teacher",
        "distill",
        "evaluate",
        "attribute",
        "score",
        "select",
        "synthesize",
        "relabel",
        "report",
        "env",
    ],
)
def test_every_command_has_help(command, capsys):
    code, out, _ = run(command, "--help", capsys=capsys)
    assert code == 0
    assert command in out


def test_help_of_a_method_shows_its_options_with_defaults(capsys):
    _, out, _ = run("distill", "infoutil", "--help", capsys=capsys)
    assert "--n-samples" in out
    assert "(default: 32)" in " ".join(out.split())
    _, out, _ = run("distill", "rded", "--help", capsys=capsys)
    assert "--n-samples" not in out
    assert "--min-area" in out


@pytest.fixture
def broken(tmp_path, toy_folder, toy_teacher):
    """Inputs of `distill` that are each wrong in one way: name -> (changed arguments, words of the message)."""
    empty, single = tmp_path / "empty", tmp_path / "single"
    (empty / "train").mkdir(parents=True)
    (single / "train" / "only").mkdir(parents=True)
    (single / "train" / "only" / "a.png").write_bytes((toy_folder / "train/across/0000.png").read_bytes())
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(toy_teacher.read_bytes()[:-100])
    pickled = tmp_path / "pickled.safetensors"
    pickled.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.")
    return {
        "no such folder": ({"--data": tmp_path / "nowhere"}, "nowhere"),
        "no images": ({"--data": empty}, "no images"),
        "one class": ({"--data": single}, "one class"),
        "unknown method": ({"METHOD": "infoutill"}, "known methods: infoutil, rded, random"),
        "no such teacher": ({"--teacher": tmp_path / "t.safetensors"}, "no teacher file"),
        "truncated teacher": ({"--teacher": cut}, "cut.safetensors"),
        "pickled teacher": ({"--teacher": pickled}, "pickle"),
        "too few images": ({"--ipc": 70}, "class 'across'"),
        "ipc zero": ({"--ipc": 0}, "--ipc must be at least 1"),
        "unknown preset": ({"--preset": "papers"}, "its presets: paper"),
    }


def test_bad_input_is_one_line_exit_code_2_and_leaves_nothing(
    broken, toy_folder, toy_teacher, tmp_path, capsys
):
    for name, (changes, message) in broken.items():
        out = tmp_path / "out"
        arguments = {"--data": toy_folder, "--teacher": toy_teacher, "--ipc": 1, "--out": out, **changes}
        method = arguments.pop("METHOD", "infoutil")
        words = [word for pair in arguments.items() for word in pair]
        code, printed, err = run("distill", method, *words, "--quiet", capsys=capsys)
        assert code == 2, (name, err)
        assert printed == ""
        assert len(err.strip().splitlines()) == 1, (name, err)
        assert message in err, (name, err)
        assert not out.exists(), name


def test_distill_evaluate_and_report_by_command_line(toy_folder, toy_teacher, tmp_path, capsys):
    out = tmp_path / "run"
    common = ("--data", toy_folder, "--teacher", toy_teacher, "--quiet")
    code, printed, err = run(
        "distill", "rded", *common, "--ipc", 1, "--out", out, "--crops", 2, capsys=capsys
    )
    assert (code, printed.strip()) == (0, str(out)), err
    code, printed, err = run(
        *("evaluate", "--distilled", out, "--data", toy_folder, "--arch", "convnet3", "--seeds", 2),
        *("--epochs", 2, "--quiet"),
        capsys=capsys,
    )
    assert code == 0, err
    name, mean, plus, deviation = printed.strip().splitlines()[-1].split()
    assert (name, plus) == ("top1", "±")
    assert 0 <= float(mean) <= 100
    assert float(deviation) >= 0
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    code, printed, err = run("report", out, capsys=capsys)
    assert code == 0, err
    assert (out / "report.html").read_bytes() == before


def test_results_of_an_earlier_command_are_never_overwritten(toy_folder, toy_teacher, tmp_path, capsys):
    (tmp_path / "e.json").write_text("mine")
    before = toy_teacher.read_bytes()
    for words in (
        ("train-teacher", "--data", toy_folder, "--arch", "convnet3", "--epochs", 1, "--out", toy_teacher),
        (
            *("evaluate", "--distilled", tmp_path, "--data", toy_folder, "--arch", "convnet3"),
            *("--json", tmp_path / "e.json"),
        ),
        ("attribute", "--data", toy_folder, "--teacher", toy_teacher, "--out", tmp_path),
        ("demo", "--out", tmp_path),
    ):
        code, printed, err = run(*words, capsys=capsys)
        assert (code, printed, len(err.strip().splitlines())) == (2, "", 1), err
        assert "exists already" in err or "empty" in err
    assert toy_teacher.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]
    assert (tmp_path / "e.json").read_text() == "mine"


def test_an_interrupted_training_says_what_is_kept(toy_folder, tmp_path, capsys, monkeypatch):
    from ddfast.training import teacher

    original, epochs = teacher._train_epoch, [0]

    def interrupted(*arguments):
        if not epochs:
            raise KeyboardInterrupt
        epochs.pop()
        return original(*arguments)

    monkeypatch.setattr(teacher, "_train_epoch", interrupted)
    words = (
        "train-teacher",
        "--data",
        toy_folder,
        "--arch",
        "convnet3",
        "--epochs",
        3,
        "--quiet",
        "--resume",
    )
    words = (*words, "--out", tmp_path / "t.safetensors")
    assert (
        run(*words, capsys=capsys)[2]
        == "ddfast: interrupted; --resume continues behind the last whole epoch\n"
    )
    (tmp_path / "t.state").unlink()
    code, _, err = run(*words, capsys=capsys)
    assert (code, err) == (
        130,
        "ddfast: interrupted; no epoch was finished, so nothing was kept: start again\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_attribute_takes_a_state_dict_and_a_class_order(toy_folder, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(create_model("convnet3", 3, 16).state_dict(), tmp_path / "t.pt")
    (tmp_path / "order.txt").write_text("rising\ndown\nacross\n")
    words = ("attribute", "--data", toy_folder, "--teacher", tmp_path / "t.pt", "--teacher-arch", "convnet3")
    words = (*words, "--image-size", 16, "--limit", 2, "--quiet")
    code, _, err = run(*words, "--out", tmp_path / "a", capsys=capsys)
    assert code == 0, err
    code, _, err = run(
        *words, "--class-order", tmp_path / "order.txt", "--out", tmp_path / "b", capsys=capsys
    )
    assert code == 0, err
    one, two = ((tmp_path / name / "attribution.csv").read_text() for name in "ab")
    assert one != two
    assert [line.split(",")[1] for line in two.splitlines()] == [
        line.split(",")[1] for line in one.splitlines()
    ]


def test_env_names_every_op(capsys):
    from ddfast.ops import paths

    code, out, _ = run("env", capsys=capsys)
    assert code == 0
    for path in paths():
        assert path.op in out


def test_the_module_runs_as_torchrun_starts_it():
    found = subprocess.run(
        [sys.executable, "-m", "ddfast", "--version"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0
    assert found.stdout.startswith("ddfast ")
