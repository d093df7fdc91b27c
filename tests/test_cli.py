import argparse
import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from ddfast.cli import build_parser, main
from ddfast.commands.config import with_config
from ddfast.commands.flags import given_options
from ddfast.commands.parser import check_flags, commands_of
from ddfast.methods import get_method, list_methods
from ddfast.models import create_model


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
        "compare",
        "attribute",
        "score",
        "select",
        "compose",
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
    (out / "evaluations.json").rename(tmp_path / "evaluations.json")
    code, printed, err = run("report", out, capsys=capsys)
    assert code == 0, err
    assert (out / "report.html").read_bytes() == before
    (tmp_path / "evaluations.json").rename(out / "evaluations.json")
    code, printed, err = run("report", out, capsys=capsys)
    assert code == 0, err
    assert f"{float(mean):.1f}% ± " in (out / "report.html").read_text("utf-8")


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
        == "ddfast: interrupted; the same command with --resume continues after the last whole epoch\n"
    )
    (tmp_path / "t.state").unlink()
    code, _, err = run(*words, capsys=capsys)
    assert (code, err) == (
        130,
        "ddfast: interrupted; no epoch was finished, so the training starts from its beginning again\n",
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


# Words --------------------------------------------------------------------------------------------------------


@pytest.fixture
def unopened(monkeypatch):
    """Fail where data is opened or a file is decoded: every option is to be refused before."""
    import ddfast.data.decoding
    import ddfast.pipeline.opening
    import ddfast.report.attribute

    def opened(*_, **__):
        raise AssertionError("data was opened before the options were checked")

    for name, module in list(sys.modules.items()):
        if name.startswith("ddfast.") and "open_source" in vars(module):
            monkeypatch.setattr(module, "open_source", opened)
    monkeypatch.setattr(ddfast.data, "open_source", opened, raising=False)
    monkeypatch.setattr(ddfast.data.decoding, "decode", opened)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory, toy_folder, toy_teacher):
    """A finished run of RDED at IPC 1."""
    from ddfast import distill

    out = tmp_path_factory.mktemp("run") / "out"
    return distill(
        "rded", data=toy_folder, teacher=toy_teacher, ipc=1, out=out, images_per_class=12, quiet=True
    )


DEVICES = {
    "--device mps": "unknown device 'mps': --device must be auto, cpu, cuda or cuda:N",
    "--device cudaa": "unknown device 'cudaa': --device must be auto, cpu, cuda or cuda:N; did you mean cuda?",
    "--device meta": "unknown device 'meta'",
    "--workers -1": "--workers must be at least 0, got -1",
    "--workers two": "--workers: wanted a whole number, got 'two'",
}
OUTS = {
    "--out FILE/below": "is a file, not a folder",
    "--out /proc/below": "cannot write /proc/below",
}
REFUSED = {
    "train-teacher --data DATA --arch convnet3 --epochs 2 --out OUT.safetensors": {
        **DEVICES,
        "--arch convnet33": "did you mean convnet3?",
        "--arch resnet-18": "did you mean resnet18?",
        "--epochs 0": "--epochs must be at least 1, got 0",
        "--epochs 1.5": "--epochs: wanted a whole number, got '1.5'",
        "--optimizer adam": "known: sgd, adamw; did you mean adamw?",
        "--schedule cos": "did you mean cosine?",
        "--augment crop": "did you mean crop-flip?",
        "--lr nan": "--lr must be positive, got nan",
        "--lr inf": "--lr must be finite, got inf",
        "--weight-decay -1": "--weight-decay must be at least 0, got -1",
        "--batch-size 1": "--batch-size must be at least 2, got 1",
        "--image-size 0": "--image-size must be at least 1, got 0",
        "--image-size 1": "--image-size must be a multiple of 8, got 1",
        "--width 0": "--width must be at least 1, got 0",
        "--precision fp16": "known: float32, bfloat16, auto",
        "--seed -1": "--seed must be at least 0, got -1",
        "--checkpoint-epochs 1,3": "must lie in 1..2, got 3",
        "--out FILE/t.safetensors": "is a file, not a folder",
        "--out teacher.pt": "must end in .safetensors",
        "--optimiser sgd": "unknown option --optimiser; did you mean --optimizer?",
        "--n-samples 3": "--n-samples is an option of ddfast attribute",
    },
    "evaluate --data DATA --distilled RUN --arch convnet3": {
        **DEVICES,
        "--arch convnett": "unknown model 'convnett'",
        "--seeds 0": "at least one seed, got 0",
        "--epochs 0": "--epochs must be at least 1, got 0",
        "--protocol rde": "did you mean rded?",
        "--batch-size 0": "--batch-size must be at least 1, got 0",
        "--precision half": "--precision must be one of float32, bfloat16, auto, got 'half'",
        "--width 0": "--width must be at least 1, got 0",
        "--json FILE/r.json": "choose another --json",
        "--json DATA": "is a folder; --json must be a file",
        "--teacher nowhere": "no teacher file nowhere",
        "--teacher DATA": "is a folder: give a .safetensors file",
        "--teacher-arch convnet3": "--teacher-arch describes a teacher: give --teacher as well",
        "--class-order FILE": "--class-order describes a teacher: give --teacher as well",
        "--teacher TEACHER --class-order nowhere": "class order nowhere cannot be read",
        "--teacher WEIGHTS.pt": "is a bare state dict: give its architecture as --teacher-arch\n",
        "--distilled FILE": "is a file; wanted the output folder",
        "--resume": "--resume is an option of ddfast train-teacher, ddfast distill, ddfast score, ddfast "
        "train-proxies, ddfast train-experts, ddfast train-prior and ddfast train-estimator",
        "--protocol dc --teacher TEACHER": "trains on hard labels",
    },
    "distill rded --data DATA --teacher TEACHER --ipc 1 --out OUT": {
        **DEVICES,
        **OUTS,
        "--out DATA": "is not empty and holds no ddfast run",
        "--ipc 0": "--ipc must be at least 1, got 0",
        "--seed 9223372036854775808": "--seed must be at most",
        "--images-per-class 0": "--images-per-class must be at least 1, got 0",
        "--image-size -3": "--image-size must be at least 1, got -3",
        "--factor 3": "--factor: got '3'; choices: auto, 1, 2",
        "--format jpg": "did you mean jpeg?",
        "--preset papers": "its presets: none",
        "--precision fp16": "--precision must be one of float32, bfloat16, auto",
        "--batch-size 0": "--batch-size must be auto or a positive number, got 0",
        "--loader pilow": "did you mean pillow?",
        "--threads 0": "--threads must be auto or a positive number, got 0",
        "--label-top-k some": "--label-top-k must be auto, all or a positive number, got some",
        "--scores nowhere": "--scores nowhere holds no ddfast run",
        "--label-teacher nowhere": "no teacher file nowhere",
        "--class-order nowhere": "class order nowhere cannot be read",
        "--label-class-order FILE": "describes a label teacher: give --label-teacher as well",
        "--label-teacher TEACHER --label-class-order nowhere": "class order nowhere cannot be read",
        "--label-teacher WEIGHTS.pt": "give its architecture as --teacher-arch and its image size as --image-size",
        "--teacher-arch convnett": "--teacher-arch: unknown model",
        "--normalization mnist": "unknown normalization 'mnist'",
        "--crops 0": "crops must be at least 1, got 0",
        "--min-area nan": "--min-area must be a finite number, got nan",
        "--n-samples 64": "--n-samples is an option of infoutil, not of rded",
        "--restarts 2": "--restarts is an option of k_means, not of rded",
        "--ipcs 3": "unknown option --ipcs; did you mean --ipc?",
        "--protocol rded": "--protocol is an option of ddfast evaluate and ddfast compare, not of ddfast distill",
    },
    "distill infoutil --data DATA --teacher TEACHER --ipc 1 --out OUT": {
        "--n-samples 1": "n_samples >= 3",
        "--estimator exact --grid 6": "exact",
        "--alpha nan": "--alpha must be a finite number, got nan",
        "--baseline inf": "--baseline must be a finite number, got inf",
        "--preset papers": "did you mean paper?",
    },
    "distill forgetting --data DATA --teacher TEACHER --ipc 1 --out OUT": {
        "--arch convnett": "--arch of forgetting: unknown model 'convnett'",
        "--lr inf": "--lr must be a finite number, got inf",
    },
    "attribute --data DATA --teacher TEACHER --out OUT": {
        **DEVICES,
        **OUTS,
        "--out DATA": "is not an empty folder; give --out a new one",
        "--grid 0": "--grid must be at least 1, got 0",
        "--grid 99": "n_samples >= 9802",
        "--n-samples 1": "n_samples >= 17",
        "--estimator paird": "did you mean paired?",
        "--value logits": "did you mean logit?",
        "--limit 0": "--limit must be at least 1, got 0",
        "--seed -1": "--seed must be at least 0, got -1",
        "--teacher nowhere": "no teacher file nowhere",
        "--class-order nowhere": "class order nowhere cannot be read",
        "--teacher WEIGHTS.pt --teacher-arch convnet3": "give its image size as --image-size",
        "--normalization mnist": "unknown normalization 'mnist'",
        "--ipc 2": "--ipc is an option of ddfast distill, ddfast score and ddfast select",
    },
    "select RUN": {
        **DEVICES,
        "--ipc 0": "--ipc must be at least 1, got 0",
        "--teacher nowhere": "no teacher file nowhere",
        "--images-per-class 9": "--images-per-class is an option of ddfast distill",
        "--resume": "--resume is an option of",
    },
    "relabel DATA": {"": "holds no ddfast run"},
    "export RUN --out x.tar": {
        "--images-per-shard 0": "--images-per-shard must be at least 1, got 0",
        "--out x.zip": "must be named .tar",
        "--out FILE/x.tar": "is a file, not a folder",
    },
    "report FILE": {"": "is a file; wanted the output folder"},
    "demo --out OUT": {
        "--seed -1": "--seed must be at least 0, got -1",
        "--out FILE": "--out must be a folder",
    },
    "env": {"--verbos": "unknown option --verbos", "now": "does not know what to do with 'now'"},
    "": {"--verison": "did you mean --version?", "distil": "did you mean distill?"},
    "distill": {
        "infoutill": "unknown method 'infoutill'; known methods: infoutil, rded, random, herding, k_center, "
        "k_means, forgetting, dm, dc, dsa, idc, idm, udd, mtt, sre2l, igds; did you mean infoutil?",
        "--n-samples 64": "--n-samples is an option of infoutil: name it",
        "rded --n-samples 64": "--n-samples is an option of infoutil, not of rded",
    },
}


@pytest.mark.parametrize("command", REFUSED)
def test_every_option_is_checked_before_data_is_opened(
    command, unopened, toy_folder, toy_teacher, toy_run, tmp_path, tmp_path_factory, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    weights = tmp_path_factory.mktemp("weights") / "t.pt"
    weights.write_bytes(b"")
    places = {
        "OUT.safetensors": tmp_path / "out.safetensors",
        "DATA": toy_folder,
        "TEACHER": toy_teacher,
        "RUN": toy_run,
        "FILE": tmp_path / "file",
        "WEIGHTS.pt": weights,
        "OUT": tmp_path / "out",
    }

    def words(text):
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text.split()

    for changed, message in REFUSED[command].items():
        code, printed, err = run(*words(command), *words(changed), capsys=capsys)
        assert code == 2, (changed, err)
        assert printed == "", changed
        assert len(err.splitlines()) == 1, (changed, err)
        assert message in err, (changed, err)
        assert [path.name for path in tmp_path.iterdir()] == ["file"], changed


def test_a_gpu_that_is_not_there_is_one_line(
    unopened, toy_folder, toy_teacher, tmp_path, capsys, monkeypatch
):
    common = ("--data", toy_folder, "--teacher", toy_teacher, "--ipc", 1, "--out", tmp_path / "out")
    for gpus, device, message in (
        (0, "cuda", "torch sees no GPU"),
        (0, "cuda:7", "torch sees no GPU"),
        (1, "cuda:7", "torch sees 1 GPU, numbered from 0"),
        (2, "cuda:2", "torch sees 2 GPUs, numbered from 0"),
    ):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpus=gpus: gpus > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        code, _, err = run("distill", "rded", *common, "--device", device, capsys=capsys)
        assert code == 2
        assert err.startswith(f"ddfast: --device {device} was asked for")
        assert message in err


def test_the_method_is_the_first_word_that_is_no_flags_value(toy_folder, toy_teacher, capsys, tmp_path):
    words = (
        "--out",
        "random",
        "--crops",
        0,
        "--data",
        toy_folder,
        "rded",
        "--teacher",
        toy_teacher,
        "--ipc",
        1,
    )
    code, _, err = run("distill", *words, capsys=capsys)
    assert (code, err) == (2, "ddfast: options of rded: crops must be at least 1, got 0\n")


def test_what_is_left_to_do_is_said(toy_folder, toy_teacher, tmp_path, capsys):
    out = tmp_path / "run"
    settings = (
        "--data",
        toy_folder,
        "--teacher",
        toy_teacher,
        "--ipc",
        1,
        "--images-per-class",
        12,
        "--out",
        out,
    )
    code, _, err = run("score", "rded", *settings, capsys=capsys)
    assert code == 0
    assert f"next run ddfast select {out} and then ddfast compose {out} and then ddfast relabel {out}" in err
    assert "1 image " not in err
    code, _, err = run("relabel", out, capsys=capsys)
    assert code == 2
    assert "000000.png is missing: run the compose stage first" in err
    code, _, err = run("distill", "rded", *settings, capsys=capsys)
    assert code == 2
    assert "an unfinished run of the same settings; continue it with --resume" in err
    assert run("distill", "rded", *settings, "--resume", "--quiet", capsys=capsys)[0] == 0
    code, _, err = run("distill", "rded", *settings, capsys=capsys)
    assert code == 2
    assert "a finished run of the same settings: use it, or give another --out to distil anew" in err
    assert "continue" not in err
    code, printed, err = run("distill", "rded", *settings, "--resume", capsys=capsys)
    assert (code, printed) == (0, f"{out}\n")
    assert err == f"{out} is finished\n"
    code, _, err = run("select", out, "--ipc", 13, capsys=capsys)
    assert code == 2
    assert "images_per_class is 12: distil anew into another folder with more" in err
    code, _, err = run("select", out, "--ipc", 2, capsys=capsys)
    assert code == 0
    assert f"next run ddfast compose {out} and then ddfast relabel {out}" in err
    code, _, err = run(
        "evaluate", "--distilled", out, "--data", toy_folder, "--arch", "convnet3", capsys=capsys
    )
    assert code == 2
    assert "its IPC is 2 now" in err
    assert "ddfast compose and ddfast relabel" in err
    code, _, err = run("distill", "rded", *settings, "--resume", capsys=capsys)
    assert code == 2
    assert f"ddfast select {out} --ipc 1" in err
    code, _, err = run("compose", out, capsys=capsys)
    assert code == 0
    assert f"next run ddfast relabel {out}" in err
    code, _, err = run("relabel", out, capsys=capsys)
    assert code == 0
    assert "next run" not in err


def test_an_image_size_that_the_teacher_cannot_read_is_refused(toy_folder, toy_teacher, tmp_path, capsys):
    settings = ("--data", toy_folder, "--teacher", toy_teacher, "--ipc", 1, "--out", tmp_path / "run")
    code, _, err = run("distill", "random", *settings, "--image-size", 64, capsys=capsys)
    assert code == 2
    assert err == (
        "ddfast: the teacher convnet3 reads 16 px and cannot read 64 px: leave --image-size out, or train one at "
        "that size\n"
    )


def test_a_run_whose_teacher_has_moved_or_whose_paths_are_lost(
    toy_run, toy_teacher, toy_folder, tmp_path, capsys
):
    out, moved = tmp_path / "run", tmp_path / "moved.safetensors"
    shutil.copytree(toy_run, out)
    shutil.copy(toy_teacher, moved)
    facts = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**facts, "teacher": str(tmp_path / "gone.safetensors")}))
    code, _, err = run("select", out, capsys=capsys)
    assert code == 2
    assert "--teacher says where it is now" in err
    assert run("select", out, "--teacher", moved, capsys=capsys)[0] == 0
    (out / "run.json").unlink()
    code, _, err = run("select", out, capsys=capsys)
    assert (code, err) == (
        2,
        f"ddfast: {out / 'run.json'} is missing or damaged: give --data and --teacher\n",
    )
    assert run("select", out, "--teacher", moved, "--data", toy_folder, capsys=capsys)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("distill rded --data DATA --teacher TEACHER --ipc 1 --no-preflight --out NEW", "--resume continues"),
        (
            "distill rded --data DATA --teacher TEACHER --ipc 1 --out nowhere/NEW",
            "nothing has been written yet",
        ),
        ("train-teacher --data DATA --arch convnet3 --epochs 1 --out NEW.safetensors", "from its beginning"),
        ("evaluate --data DATA --distilled RUN --arch convnet3", "nothing has been written"),
        ("attribute --data DATA --teacher TEACHER --out NEW", "nothing has been written"),
        ("demo --out NEW", "the same command continues"),
    ],
)
def test_an_interrupted_command_says_what_has_become_of_the_work(
    words, message, toy_folder, toy_teacher, toy_run, tmp_path, capsys, monkeypatch
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddfast.progress.Progress.advance", interrupted)
    monkeypatch.setattr("ddfast.demo.demo.write_shapes", interrupted)
    if "nowhere" in words:
        monkeypatch.setattr("ddfast.pipeline.opening._preflight", interrupted)
    for name, place in {"DATA": toy_folder, "TEACHER": toy_teacher, "RUN": toy_run}.items():
        words = words.replace(name, str(place))
    code, _, err = run(*words.split(), "--quiet", capsys=capsys)
    assert code == 130
    assert err.startswith("ddfast: interrupted; ")
    assert message in err
    assert ("--resume" in err) == ("--resume" in message)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            PermissionError(13, "Permission denied", "/there"),
            2,
            "ddfast: cannot read or write /there: permission denied\n",
        ),
        (
            IsADirectoryError(21, "Is a directory", b"/there"),
            2,
            "ddfast: cannot read or write /there: is a directory\n",
        ),
        (
            OSError(28, "No space left on device"),
            2,
            "ddfast: cannot read or write: no space left on device\n",
        ),
        (MemoryError(), 1, "ddfast: out of memory\n"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            1,
            "ddfast: out of memory: Default",
        ),
    ],
)
def test_a_failing_machine_is_one_line(error, code, message, monkeypatch, capsys):
    def failing():
        raise error

    monkeypatch.setattr("ddfast.report.environment.describe_environment", failing)
    found, _, err = run("env", capsys=capsys)
    assert found == code
    assert err.startswith(message)
    assert len(err.splitlines()) == 1


def test_an_interruption_with_words_of_its_own_keeps_them(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt("half of it is kept")

    monkeypatch.setattr("ddfast.report.environment.describe_environment", interrupted)
    assert run("env", capsys=capsys) == (130, "", "ddfast: interrupted; half of it is kept\n")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, capsys):
    def failing():
        raise KeyError("a fault")

    monkeypatch.setattr("ddfast.report.environment.describe_environment", failing)
    with pytest.raises(KeyError, match="a fault"):
        run("env", capsys=capsys)


def test_a_reader_that_has_gone_is_no_error_message():
    script = "import sys; from ddfast.cli import main; sys.exit(main(['env']))"
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer.stdout.close()
    said = writer.stderr.read()
    writer.stderr.close()
    assert (writer.wait(), said) == (1, b"")


# Help ---------------------------------------------------------------------------------------------------------


def commands_and_methods():
    """Every command as the words that its help is asked for by; those of a method once for every method."""
    for name in commands_of(build_parser([])):
        yield (name,)
        if name in ("distill", "score"):
            yield from ((name, method) for method in list_methods())


def help_of(words):
    """The parser of a command, with the options of its method."""
    return commands_of(build_parser(words))[words[0]] if words else build_parser([])


@pytest.mark.parametrize("words", [*commands_and_methods()], ids=" ".join)
def test_every_option_says_what_it_takes_and_what_holds_without_it(words):
    parser = help_of(words)
    formatter = parser._get_formatter()
    for action in parser._actions:
        if not action.option_strings or action.help == argparse.SUPPRESS or action.dest == "help":
            continue
        told = formatter._expand_help(action)
        assert "default" in told or told.endswith("(required)"), action.option_strings
        assert not ("(required)" in told and "default" in told), told
        if action.nargs != 0:
            assert action.choices or action.metavar, action.option_strings
    told = parser.format_help()
    for shorthand in ("None", "()", "Table", "Figure", "paper's", "the paper", "InfoUtil 4", "rank_by"):
        assert shorthand not in told, shorthand


@pytest.mark.parametrize("words", [(), *commands_and_methods()], ids=" ".join)
def test_every_help_ends_with_two_examples_that_are_commands(words):
    told = help_of(words).format_help().split("examples:\n")[1].splitlines()
    assert len(told) == 2
    for line in told:
        typed = shlex.split(line)
        typed = typed[typed.index("ddfast") + 1 :]
        assert tuple(typed[: len(words)]) == words or words == ()
        parser = build_parser(typed)
        check_flags(parser, typed, lambda: build_parser([]))
        found = parser.parse_args(typed)
        if typed[0] in ("distill", "score"):
            method = get_method(typed[1])
            method.from_options(given_options(found, method.Options), found.preset)


def test_help_without_a_method_tells_the_methods(capsys):
    code, out, _ = run("distill", "--help", capsys=capsys)
    assert code == 0
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    for name in list_methods():
        assert [name, get_method(name).summary] in lines
    assert "ddfast distill METHOD --help shows" in out
    _, out, _ = run("score", "--help", capsys=capsys)
    assert "  rded  " in out
    assert "  dm  " not in out


def test_help_of_a_method_without_a_teacher_tells_of_none(capsys):
    _, out, _ = run("distill", "dm", "--help", capsys=capsys)
    assert "--teacher" not in out
    assert "--no-preflight" not in out
    _, out, _ = run("distill", "rded", "--help", capsys=capsys)
    assert "--teacher-arch NAME" in out
    assert "--no-preflight" in out
    assert "--preset" not in out


# A run as a file ----------------------------------------------------------------------------------------------


def printed(*words, capsys):
    """The flags that a command line comes to, as `--print-config` tells them."""
    code, out, err = run(*words, "--print-config", capsys=capsys)
    assert code == 0, err
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in out.splitlines())}


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json", "toml"])
def test_a_file_of_flags_holds_those_that_were_given(suffix, tmp_path, capsys, monkeypatch):
    if suffix == "toml" and sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "yaml", None)  # what was written needs no library
    words = (
        "--data",
        "the données",
        "--ipc",
        "3",
        "--lr-img",
        "1e-3",
        "--no-flip",
        "--factor",
        "1",
        "--quiet",
    )
    flags = {"data": "the données", "ipc": 3, "factor": "1", "quiet": True, "lr-img": 0.001, "flip": False}
    code, out, err = run("distill", "dm", *words, "--write-config", f"run.{suffix}", capsys=capsys)
    assert (code, out, err) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == [f"run.{suffix}"]
    assert printed("distill", "--config", f"run.{suffix}", capsys=capsys) == {"method": "dm", **flags}
    changed = printed("distill", "--ipc", "5", f"--config=run.{suffix}", "--flip", capsys=capsys)
    assert changed == {"method": "dm", **flags, "ipc": 5, "flip": True}
    code, _, err = run("distill", "dm", "--write-config", f"run.{suffix}", capsys=capsys)
    assert code == 2
    assert "exists already" in err
    found = build_parser(["distill", "dm"])
    typed = with_config(found, ["distill", "--config", f"run.{suffix}", "--out", "o"], build_parser)
    given = build_parser(typed).parse_args(typed)
    assert (given.method, given.data, given.ipc, given.factor) == ("dm", "the données", 3, "1")
    assert (given.lr_img, given.flip, given.quiet, given.out) == (0.001, False, True, "o")


def test_keys_are_flags_with_hyphens_or_underscores_and_files_may_follow_each_other(tmp_path, capsys):
    pytest.importorskip("yaml")
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("# mine\nmethod: rded\nimage_size: 32\npreflight: false\nresume: no\nseed: null\nipc: 1\n")
    two.write_text("{image-size: 64, min_area: 1e-2, no-preflight: false}")
    flags = {"method": "rded", "image-size": 32, "no-preflight": True, "ipc": 1}
    assert printed("distill", "--config", one, capsys=capsys) == flags
    flags |= {"image-size": 64, "min-area": 0.01}
    assert printed("distill", "--config", one, "--config", two, capsys=capsys) == flags
    assert printed("distill", "random", "--config", one, capsys=capsys)["method"] == "random"
    (tmp_path / "t.yaml").write_text("arch: convnet3\ncheckpoint_epochs: [1, 3]\nlr: 0.1\n")
    flags = {"arch": "convnet3", "checkpoint-epochs": [1, 3], "lr": 0.1, "epochs": 3}
    assert printed("train-teacher", "--epochs", 3, "--config", tmp_path / "t.yaml", capsys=capsys) == flags
    (tmp_path / "t.yaml").write_text("epochs: !!int 1\nepochs: 2\n")
    code, _, err = run("train-teacher", "--config", tmp_path / "t.yaml", "--print-config", capsys=capsys)
    assert (code, "t.yaml is no YAML: 'epochs' is given twice" in err) == (2, True)
    (tmp_path / "empty.yaml").write_text("")
    assert printed("evaluate", "--config", tmp_path / "empty.yaml", capsys=capsys) == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.json",
            '{"ipcs": 1}',
            "unknown key 'ipcs': ddfast distill rded has no such flag; did you mean ipc?",
        ),
        ("a.json", '{"image-sizes": 1}', "did you mean image-size?"),
        ("a.json", '{"n_samples": 1}', "--n-samples is an option of infoutil, not of rded"),
        ("a.json", '{"xyzzy": 1}', "unknown option --xyzzy; ddfast distill --help lists the options"),
        ("a.json", '{"config": "b.json"}', "unknown key 'config'"),
        ("a.json", '{"image-size": 1, "image_size": 1}', "'image-size' and 'image_size' are the same flag"),
        ("a.json", '{"ipc": 1, "ipc": 2}', "a.json is no JSON: 'ipc' is given twice"),
        ("a.yaml", "ipc: 1\nipc: 2\n", "a.yaml is no YAML: 'ipc' is given twice"),
        ("a.json", '{"resume": 1}', "'resume' must be true or false, got 1"),
        ("a.json", '{"ipc": true}', "'ipc' must be one value, got true"),
        ("a.json", '{"ipc": {"train": 1}}', "'ipc' must be one value"),
        ("a.json", '{"ipc": "ten"}', "argument --ipc: wanted a whole number, got 'ten'"),
        ("a.json", "[1]", "must hold a flag and its value on each line"),
        ("a.json", "{", "a.json is no JSON"),
        ("a.toml", "ipc 3", "a.toml is no TOML"),
        ("a.ini", "ipc = 3", "--config must end in .yaml, .yml, .json or .toml"),
        ("a.yaml", "- ipc", "pip install pyyaml, or write it as .json"),
        ("nowhere.json", None, "nowhere.json cannot be read: no such file or directory"),
    ],
)
def test_a_file_of_flags_that_cannot_be_followed_is_one_line(
    name, text, message, tmp_path, capsys, monkeypatch
):
    if name == "a.toml" and sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    monkeypatch.setitem(sys.modules, "yaml", None)
    if text is not None:
        (tmp_path / name).write_text(text)
    words = ("--data", "d", "--teacher", "t", "--ipc", "1", "--out", tmp_path / "o")
    code, out, err = run("distill", "rded", *words, "--config", tmp_path / name, capsys=capsys)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


def test_a_manifest_is_a_file_of_flags(toy_run, toy_teacher, toy_folder, tmp_path, capsys):
    out, config = tmp_path / "again", toy_run / "manifest.json"
    code, _, err = run("distill", "--config", config, "--out", out, "--quiet", capsys=capsys)
    assert code == 0, err
    assert (out / "manifest.json").read_bytes() == config.read_bytes()
    alone = tmp_path / "alone.json"
    alone.write_bytes(config.read_bytes())
    code, _, err = run("distill", "--config", alone, "--out", tmp_path / "o", capsys=capsys)
    assert code == 2
    assert "required: --data, --teacher" in err
    paths = ("--data", toy_folder, "--teacher", toy_teacher, "--out", tmp_path / "o")
    found = printed("distill", "--config", alone, *paths, "--ipc", 2, capsys=capsys)
    wanted = {"method": "rded", "ipc": 2, "images-per-class": "12", "crops": 5, "label-top-k": "all"}
    assert found.items() >= wanted.items()
    code, _, err = run("evaluate", "--config", config, capsys=capsys)
    assert code == 2
    assert "the manifest of a run, which ddfast distill and ddfast score take" in err


def test_the_manifest_of_a_method_without_a_teacher_tells_the_pixels(tmp_path, toy_folder, capsys):
    words = ("--data", toy_folder, "--ipc", 1, "--iterations", 1, "--real-batch", 2, "--no-flip", "--quiet")
    words = (*words, "--normalization", "0.1,0.2,0.3/0.25,0.5,1", "--out", tmp_path / "one")
    assert run("distill", "dm", *words, "--class-batch", 3, capsys=capsys)[0] == 0
    config = tmp_path / "one/manifest.json"
    code, _, err = run("distill", "--config", config, "--out", tmp_path / "two", "--quiet", capsys=capsys)
    assert code == 0, err
    assert (tmp_path / "two/manifest.json").read_bytes() == config.read_bytes()


# Of hours -----------------------------------------------------------------------------------------------------


def test_every_long_command_tells_its_stage_and_what_would_be_faster(
    toy_folder, toy_teacher, toy_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("ddfast.progress._FIRST_MINUTE", 0.0)
    monkeypatch.setattr("ddfast.progress._LONG", -1.0)
    data = ("--data", toy_folder)
    run_of = (*data, "--ipc", 1, "--images-per-class", 12)
    commands = {
        (
            "distill",
            "infoutil",
            *run_of,
            "--teacher",
            toy_teacher,
            "--n-samples",
            18,
            "--out",
            tmp_path / "a",
        ): [
            "stage 1 of 4: score",
            "left; faster with fewer --images-per-class, fewer --n-samples",
            "stage 2 of 4: select",
            "stage 4 of 4: relabel",
        ],
        ("distill", "dm", *data, "--ipc", 1, "--iterations", 1, "--real-batch", 2, "--out", tmp_path / "b"): [
            "stage 1 of 1: synthesize",
            "left; faster with fewer --iterations",
        ],
        ("train-teacher", *data, "--arch", "convnet3", "--epochs", 1, "--out", tmp_path / "t.safetensors"): [
            "left; faster with fewer --epochs"
        ],
        (
            "train-proxies",
            *data,
            "--arch",
            "convnet3",
            "--count",
            1,
            "--epochs",
            1,
            "--out",
            tmp_path / "p",
        ): ["left; faster with fewer --epochs, a smaller --count"],
        ("evaluate", *data, "--distilled", toy_run, "--arch", "convnet3", "--epochs", 1, "--seeds", 2): [
            "left; faster with fewer --seeds, fewer --epochs"
        ],
    }
    for words, wanted in commands.items():
        code, _, err = run(*words, capsys=capsys)
        assert code == 0, err
        for line in wanted:
            assert line in err, err
        assert err.count("faster with fewer --epochs") <= 1
