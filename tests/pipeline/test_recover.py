"""SRe2L from the call to the folder: what it leaves, and that nothing stops it from getting there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ddfast
from ddfast.cli import main
from ddfast.errors import DivergedError, UsageError
from ddfast.methods.matching.sre2l import SRe2L
from ddfast.models import create_model, load_teacher, save_teacher
from ddfast.output.pixels import read_curve, read_pixels, to_bytes
from ddfast.pipeline import synthesize
from tests.conftest import digests

ROOT = Path(__file__).resolve().parents[2]
# Three classes of five images in batches of six: three batches of all classes, of one or two images each.
SETTINGS = {"ipc": 5, "iterations": 6, "batch": 6}
FLAGS = ["--ipc", "5", "--iterations", "6", "--batch", "6", "--quiet", "--no-preflight"]


def distil(folder, teacher, out, **settings):
    given = {"quiet": True, "preflight": False, **SETTINGS, **settings}
    return ddfast.distill("sre2l", data=folder, teacher=teacher, out=out, **given)


def command(folder, teacher, out, *words):
    return [
        *("distill", "sre2l", "--data", str(folder), "--teacher", str(teacher), "--out", str(out)),
        *FLAGS,
        *words,
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, toy_folder, toy_teacher):
    return distil(toy_folder, toy_teacher, tmp_path_factory.mktemp("sre2l") / "out")


def test_the_output_folder_is_the_contract(undisturbed):
    names = {path.relative_to(undisturbed).as_posix() for path in undisturbed.rglob("*") if path.is_file()}
    images = {name for name in names if name.startswith("train/") and name.endswith(".png")}
    assert len(images) == 15
    assert names - images == {
        *("manifest.json", "run.json", "report.html", "mosaic.png", "before.png"),
        *("pixels.safetensors", "soft_labels.safetensors", "curve.parquet", "train/metadata.jsonl"),
    }
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["teacher"]["sha256"] == manifest["label_teacher"]["sha256"]
    assert manifest["options"]["synthesize"]["batch"] == 6
    assert manifest["counts"]["images"] == 15
    curve = read_curve(undisturbed)
    assert [(row["group"], row["step"]) for row in curve] == [(g, s) for g in range(3) for s in range(6)]


def test_images_stand_class_by_class_and_can_be_shown(undisturbed):
    pixels, opened = read_pixels(undisturbed), ddfast.DistilledSet(undisturbed)
    assert pixels.labels.tolist() == opened.targets == [0] * 5 + [1] * 5 + [2] * 5
    shown = to_bytes(pixels.images, opened.mean, opened.std, pixels.space)
    for place in range(15):
        assert torch.equal(opened[place][0], shown[place])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (opened.mean, opened.std))
    unit = pixels.images * std + mean
    assert -1e-6 <= float(unit.min()) < 0.001  # clamped to what a picture can show
    assert 0.999 < float(unit.max()) <= 1 + 1e-6


def test_soft_labels_are_the_teachers_on_the_pixels_that_students_train_on(undisturbed, toy_teacher):
    opened, pixels = ddfast.DistilledSet(undisturbed), read_pixels(undisturbed)
    with torch.no_grad():
        logits = load_teacher(toy_teacher).model(pixels.images)
    wanted = torch.softmax(logits / opened.temperature, dim=1)
    torch.testing.assert_close(opened.stored.dense()[:, 0], wanted, rtol=0, atol=5e-4)


def test_the_teacher_reads_the_images_as_their_classes(toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "out", iterations=60, lr_img=0.1)
    pixels = read_pixels(out)
    with torch.no_grad():
        read = load_teacher(toy_teacher).model(pixels.images).argmax(1)
    assert (read == pixels.labels).float().mean() > 0.9
    losses = [row["loss"] for row in read_curve(out) if row["group"] == 1]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("stop", [1, 9, 18])
def test_a_run_that_stops_anywhere_resumes_to_the_same_bytes(
    stop, undisturbed, toy_folder, toy_teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr(synthesize, "_SAVE_SECONDS", 0.0)
    steps, step = [], SRe2L.step

    def stopping(self, *arguments):
        if len(steps) == stop:
            raise KeyboardInterrupt
        steps.append(arguments[0])
        return step(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(SRe2L, "step", stopping)
        if stop < 18:
            with pytest.raises(KeyboardInterrupt):
                distil(toy_folder, toy_teacher, tmp_path / "out")
        else:
            distil(toy_folder, toy_teacher, tmp_path / "out", until="synthesize")
    distil(toy_folder, toy_teacher, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_kill_9_and_resume_give_the_same_bytes(undisturbed, toy_folder, toy_teacher, tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "ddfast", *command(toy_folder, toy_teacher, out)]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE)
    while not (out / "state" / "group-00000.safetensors").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    done = subprocess.run([*words, "--resume"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(undisturbed)
    assert not (out / "state").exists()


def test_two_ranks_give_the_bytes_of_one_process(undisturbed, toy_folder, toy_teacher, tmp_path):
    out = tmp_path / "out"
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "ddfast", *command(toy_folder, toy_teacher, out)),
    ]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(undisturbed)


def test_stages_alone_do_what_distill_does(undisturbed, toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "out", until="synthesize")
    assert not (out / "soft_labels.safetensors").exists()
    assert main(["relabel", str(out), "--quiet"]) == 0
    assert digests(out) == digests(undisturbed)


def test_real_images_to_begin_with_and_cmi(toy_folder, toy_teacher, tmp_path):
    settings = {"init": "real", "cmi_ratio": 0.2, "ipc": 4, "batch": 12}
    out = distil(toy_folder, toy_teacher, tmp_path / "out", **settings)
    rows = read_curve(out)
    assert all("cmi" in row and "cmi_gradient_norm" in row for row in rows)
    first = rows[0]
    assert first["cmi_gradient_norm"] == pytest.approx(0.2 * first["gradient_norm"], rel=1e-4)


def test_students_train_by_the_papers_protocol_online_and_on_stored_labels(
    undisturbed, toy_folder, toy_teacher
):
    for given, labels in (({"teacher": toy_teacher}, "online"), ({}, "stored")):
        for protocol in ("sre2l", "sre2l_tiny", "rded"):
            found = ddfast.evaluate(
                undisturbed,
                toy_folder,
                arch="convnet3",
                arch_options={"width": 4},
                protocol=protocol,
                epochs=1,
                seeds=1,
                quiet=True,
                **given,
            )
            assert (found.labels, found.protocol, found.images) == (labels, protocol, "pixels, float32")


def test_students_are_judged_on_the_way_by_their_soft_labels(toy_folder, toy_teacher, tmp_path, monkeypatch):
    from ddfast.pipeline import judging

    asked = []
    inner = judging.evaluate
    monkeypatch.setattr(
        judging,
        "evaluate",
        lambda *a, **k: asked.append(k) or inner(*a, **{**k, "epochs": 1}),
    )
    settings = {"batch": 15, "evaluate_every": 3}
    out = distil(toy_folder, toy_teacher, tmp_path / "out", **settings)
    judged = {row["step"]: row["accuracy"] for row in read_curve(out) if row.get("accuracy") is not None}
    assert sorted(judged) == [2, 5]
    assert {(k["arch"], k["protocol"], k["teacher"].arch) for k in asked} == {
        ("convnet3", "rded", "convnet3")
    }
    with pytest.raises(UsageError, match="evaluate_every needs all 3 classes in one group: give batch=15"):
        distil(toy_folder, toy_teacher, tmp_path / "groups", evaluate_every=3)
    with pytest.raises(UsageError, match="give batch=15 and class_images=5"):
        distil(toy_folder, toy_teacher, tmp_path / "groups", evaluate_every=3, class_images=2)
    assert not (tmp_path / "groups").exists()


def test_a_loss_that_diverges_keeps_the_last_good_state(toy_folder, toy_teacher, tmp_path, capsys):
    with pytest.raises(DivergedError, match=r"step 0 of 6: lower bn_weight"):
        distil(toy_folder, toy_teacher, tmp_path / "out", bn_weight=3e38)
    assert (tmp_path / "out" / "state").is_dir()
    assert not json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"]
    words = command(toy_folder, toy_teacher, tmp_path / "words", "--bn-weight", "3e38")
    assert main(words) == 2
    err = capsys.readouterr().err.strip()
    assert "--bn-weight" in err
    assert len(err.splitlines()) == 1


def test_a_teacher_without_batchnorm_is_one_line_and_leaves_nothing(toy_folder, tmp_path, capsys):
    names = sorted(path.name for path in (toy_folder / "train").iterdir())
    teacher = tmp_path / "teacher.safetensors"
    facts = {"class_names": names, "image_size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    save_teacher(
        teacher,
        create_model("convnet3_in", 3, 16, width=8),
        arch="convnet3_in",
        arch_options={"width": 8},
        **facts,
    )
    assert main(command(toy_folder, teacher, tmp_path / "out")) == 2
    err = capsys.readouterr().err.strip()
    assert "the teacher convnet3_in keeps none" in err
    assert "convnet3 or resnet18_small" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "real", "ipc": 10_000}, r"begins with 10000 different images .* lower ipc to 60"),
        ({"cmi_ratio": 0.1, "ipc": 1}, "CMI is 0"),
        ({"teacher": None}, "teacher"),
        ({"factor": 2}, "factor"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(settings, message, toy_folder, toy_teacher, tmp_path):
    given = {"teacher": toy_teacher, **settings}
    with pytest.raises(UsageError, match=message) as caught:
        distil(toy_folder, out=tmp_path / "out", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_small_batch_is_told_of_once(toy_folder, toy_teacher, tmp_path, capsys):
    distil(toy_folder, toy_teacher, tmp_path / "out", quiet=False, iterations=1)
    told = capsys.readouterr().err
    assert told.count("BatchNorm statistics of fewer than 50 are noisy") == 1
    assert "a batch has 3 images" in told


def test_another_setting_is_refused_on_resumption(undisturbed, toy_folder, toy_teacher):
    with pytest.raises(UsageError, match=r"already holds a different run \(options.synthesize.shift"):
        distil(toy_folder, toy_teacher, undisturbed, shift=1, resume=True)
