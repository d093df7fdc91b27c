"""Distribution matching from the call to the folder: what it leaves, and that nothing stops it from getting there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddfast
from ddfast.cli import main
from ddfast.errors import DivergedError, UsageError
from ddfast.methods import get_method
from ddfast.methods.matching.dm import DM
from ddfast.output.pixels import read_curve, read_pixels, to_bytes
from ddfast.pipeline import synthesize
from ddfast.training import evaluation, train_proxies
from ddfast.training.student import train_student
from tests.conftest import digests

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "ipc": 2,
    "iterations": 6,
    "real_batch": 8,
    "image_size": 16,
    "class_batch": 1,
    "arch": "convnet3_in",
}
FLAGS = [
    "--ipc",
    "2",
    "--iterations",
    "6",
    "--real-batch",
    "8",
    "--image-size",
    "16",
    "--class-batch",
    "1",
    "--arch",
    "convnet3_in",
    "--quiet",
]


def distil(folder, out, **settings):
    return ddfast.distill("dm", data=folder, out=out, quiet=True, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, toy_folder):
    return distil(toy_folder, tmp_path_factory.mktemp("dm") / "out")


def test_the_output_folder_is_the_contract(undisturbed):
    names = {path.relative_to(undisturbed).as_posix() for path in undisturbed.rglob("*") if path.is_file()}
    images = {name for name in names if name.startswith("train/") and name.endswith(".png")}
    assert len(images) == 6
    assert names - images == {
        *("manifest.json", "run.json", "report.html", "mosaic.png", "before.png"),
        *("pixels.safetensors", "curve.parquet", "train/metadata.jsonl", "quarantined.jsonl"),
    }
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["teacher"] is None
    assert manifest["label_teacher"] is None
    assert manifest["options"]["synthesize"]["iterations"] == 6
    assert manifest["counts"] == {"images": 6, "sources": 180, "quarantined": 2}
    assert {file["path"] for file in manifest["quarantined"]["files"]} == {
        "across/0000a.png",
        "down/empty.png",
    }
    curve = read_curve(undisturbed)
    assert [(row["group"], row["step"]) for row in curve] == [(g, s) for g in range(3) for s in range(6)]
    assert all(row["loss"] > 0 and row["gradient_norm"] > 0 for row in curve)


def test_the_images_are_the_pixels_in_8_bits_and_open_as_a_set(undisturbed):
    pixels, opened = read_pixels(undisturbed), ddfast.DistilledSet(undisturbed)
    assert pixels.images.shape == (6, 3, 16, 16)
    assert pixels.labels.tolist() == [0, 0, 1, 1, 2, 2]
    shown = to_bytes(pixels.images, opened.mean, opened.std, pixels.space)
    for place in range(6):
        assert torch.equal(opened[place][0], shown[place])
        assert int(opened[place][1]) == pixels.labels[place]
    before = np.asarray(Image.open(undisturbed / "before.png"))
    after = np.asarray(Image.open(undisturbed / "mosaic.png"))
    assert before.shape == after.shape
    assert (before != after).any()


def test_the_pixels_move_from_real_images(undisturbed, toy_folder, tmp_path):
    still = distil(toy_folder, tmp_path / "still", iterations=1, lr_img=1e-30)
    begun, ended = read_pixels(still), read_pixels(undisturbed)
    image = to_bytes(begun.images, *_normalisation(still), begun.space)
    back = (image.float() / 255 - _column(_normalisation(still)[0])) / _column(_normalisation(still)[1])
    torch.testing.assert_close(back, begun.images, atol=1e-5, rtol=0)  # whole grey levels: real images
    assert (ended.images - begun.images).abs().amax() > 1e-3


def _normalisation(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest["mean"], manifest["std"]


def _column(values):
    return torch.tensor(values).view(1, 3, 1, 1)


@pytest.mark.parametrize("stop", [1, 4, 7, 18])
def test_a_run_that_stops_anywhere_resumes_to_the_same_bytes(
    stop, undisturbed, toy_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(synthesize, "_SAVE_SECONDS", 0.0)
    steps, step = [], DM.step

    def stopping(self, *arguments):
        if len(steps) == stop:
            raise KeyboardInterrupt
        steps.append(arguments[0])
        return step(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(DM, "step", stopping)
        if stop < 18:
            with pytest.raises(KeyboardInterrupt):
                distil(toy_folder, tmp_path / "out")
        else:
            distil(toy_folder, tmp_path / "out")
    distil(toy_folder, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_kill_9_and_resume_give_the_same_bytes(undisturbed, toy_folder, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ddfast", "distill", "dm", "--data", str(toy_folder), "--out", str(out)]
    process = subprocess.Popen([*command, *FLAGS], cwd=ROOT, stderr=subprocess.PIPE)
    while not (out / "state" / "group-00000.safetensors").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    done = subprocess.run([*command, *FLAGS, "--resume"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(undisturbed)
    assert not (out / "state").exists()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_the_bytes_of_one_process(ranks, undisturbed, toy_folder, tmp_path):
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        *("-m", "ddfast", "distill", "dm", "--data", str(toy_folder), "--out", str(out), *FLAGS),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(undisturbed)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dsa", {"iterations": 2, "outer_loop": 3, "inner_loop": 1}),
        ("idc", {"iterations": 2, "inner_loop": 3, "net_samples": 8, "net_batch": 4}),
        ("idm", {"iterations": 6, "queue_every": 2, "net_steps": 1, "net_batch": 4}),
    ],
)
def test_networks_in_training_survive_a_stop_and_leave_the_same_bytes(
    method, settings, toy_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(synthesize, "_SAVE_SECONDS", 0.0)
    known = get_method(method)

    def run(out, **more):
        given = {**SETTINGS, "real_batch": 4, **settings, **more}
        return ddfast.distill(method, data=toy_folder, out=tmp_path / out, quiet=True, **given)

    whole = run("whole", class_batch=2)
    steps, step = [], known.step

    def stopping(self, *arguments):
        if len(steps) in (2, 5):
            steps.append(None)
            raise KeyboardInterrupt
        steps.append(arguments[0])
        return step(self, *arguments)

    monkeypatch.setattr(known, "step", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run("stopped", resume=(tmp_path / "stopped").exists(), class_batch=2)
    run("stopped", resume=True, class_batch=2)
    assert digests(tmp_path / "stopped") == digests(whole)
    opened = ddfast.DistilledSet(whole)
    assert opened.factor == {"dsa": 1, "idc": 2, "idm": 2}[method]
    assert read_pixels(whole).space == ("unit" if method == "idc" else "normalized")


def test_a_pool_that_does_not_fit_gives_the_same_bytes(undisturbed, toy_folder, tmp_path, capsys):
    streamed = distil(toy_folder, tmp_path / "out", pool_memory=0)
    assert digests(streamed) == digests(undisturbed)


def test_the_stage_alone_does_what_distill_does(undisturbed, toy_folder, tmp_path):
    out = distil(toy_folder, tmp_path / "out", until="synthesize")
    assert digests(out) == digests(undisturbed)
    assert main(["synthesize", str(out), "--quiet"]) == 0
    assert digests(out) == digests(undisturbed)


def test_the_stage_alone_refuses_proxies_that_changed(toy_folder, tmp_path, monkeypatch, capsys):
    def train(count, **more):
        kept = {"arch": "convnet3_in", "epochs": 1, "image_size": 16, "out": tmp_path / "proxies"}
        train_proxies(toy_folder, count=count, quiet=True, **kept, **more)

    def stopping(self, number, *arguments):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number, *arguments)

    train(1)
    step = DM.step
    with monkeypatch.context() as stopped:
        stopped.setattr(DM, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            distil(toy_folder, tmp_path / "out", cmi=1.0, proxies=tmp_path / "proxies")
    held = digests(tmp_path / "out")
    train(2, resume=True)
    assert main(["synthesize", str(tmp_path / "out"), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "proxies is not what" in line
    assert digests(tmp_path / "out") == held


def test_a_loss_that_diverges_keeps_the_last_good_state(toy_folder, tmp_path):
    with pytest.raises(DivergedError, match=r"step \d+.*lr_img"):
        distil(toy_folder, tmp_path / "out", lr_img=1e30, iterations=50)
    assert (tmp_path / "out" / "state").is_dir()
    assert not json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"]


def test_students_are_judged_on_the_way(toy_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(DM, "protocol", "dc")
    settings = {"class_batch": 3, "evaluate_every": 3, "arch": "convnet3_in"}
    out = distil(toy_folder, tmp_path / "out", **settings)
    judged = {row["step"]: row["accuracy"] for row in read_curve(out) if row.get("accuracy") is not None}
    assert sorted(judged) == [2, 5]
    told = json.loads((out / "manifest.json").read_text())["accuracy"]
    assert told["float32"]["top1"] == [judged[5]]
    assert told["float32"]["images"] == "pixels, float32"
    assert told["8 bits"]["images"] == "8 bits"
    with pytest.raises(UsageError, match="evaluate_every needs all 3 classes in one group"):
        distil(toy_folder, tmp_path / "groups", evaluate_every=3)
    assert not (tmp_path / "groups").exists()


@pytest.mark.parametrize(
    ("method", "given", "protocol"),
    [
        ("idm", {"net_steps": 1, "net_batch": 8}, "dsa"),
        ("idm", {"net_steps": 1, "net_batch": 8, "flip": False}, "dsa_no_flip"),
        ("idc", {"inner_loop": 1, "net_samples": 8}, "idc"),
    ],
)
def test_students_of_rounded_tiles_are_trained_as_those_of_the_pixels(
    method, given, protocol, toy_folder, tmp_path, monkeypatch
):
    seen = []

    def trained(images, *arguments, **settings):
        seen.append(images.decoded().images)
        return train_student(images, *arguments, **{**settings, "epochs": 2})

    monkeypatch.setattr(evaluation, "train_student", trained)
    settings = {**SETTINGS, "class_batch": 3, "iterations": 1, "real_batch": 4, "evaluate_every": 1}
    out = ddfast.distill(method, data=toy_folder, out=tmp_path / "out", quiet=True, **{**settings, **given})
    told = json.loads((out / "manifest.json").read_text())["accuracy"]
    fixed = ("protocol", "steps", "batch_size", "recipe")
    assert [told["8 bits"][name] for name in fixed] == [told["float32"][name] for name in fixed]
    assert told["float32"]["protocol"] == protocol
    pixels, rounded = seen[-2:]
    assert pixels.shape == rounded.shape == (3 * 2 * 4, 3, 16, 16)
    assert 0 < (pixels - rounded).abs().max() < 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"real_batch": 10_000}, r"a step draws 10000 different images .* lower real_batch to 60"),
        ({"ipc": 1, "cmi": 10.0, "proxies": "PROXIES"}, "CMI is 0"),
        ({"cmi": 10.0}, "proxies"),
        ({"cmi": -1.0}, "cmi"),
        ({"iterations": 0}, "iterations"),
        ({"pool_memory": -1}, "pool_memory"),
        ({"init": "zeros"}, "init must be one of"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(settings, message, toy_folder, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        distil(toy_folder, tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_setting_is_refused_on_resumption(undisturbed, toy_folder):
    with pytest.raises(UsageError, match=r"already holds a different run \(options.synthesize.real_batch"):
        distil(toy_folder, undisturbed, real_batch=7, resume=True)


def test_a_method_gives_back_what_it_holds_at_the_end_and_where_it_fails(toy_folder, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(DM, "close", lambda self: closed.append(self.name))
    distil(toy_folder, tmp_path / "out", iterations=1)
    assert closed == ["dm"]

    def diverging(self, number, state, pool, context):
        raise DivergedError("no")

    monkeypatch.setattr(DM, "step", diverging)
    with pytest.raises(DivergedError, match="no"):
        distil(toy_folder, tmp_path / "failing", iterations=1)
    assert closed == ["dm", "dm"]


def test_an_interrupted_synthesis_tells_the_seconds_before(toy_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesize, "_SAVE_SECONDS", 0.0)
    step = DM.step

    def stopping(self, number, *arguments):
        if number == 4:
            raise KeyboardInterrupt
        time.sleep(0.05)
        return step(self, number, *arguments)

    def told():
        return json.loads((tmp_path / "out" / "run.json").read_text())["seconds"]["synthesize"]

    with monkeypatch.context() as stopped:
        stopped.setattr(DM, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            distil(toy_folder, tmp_path / "out", class_batch=3)
    before = told()
    assert before >= 4 * 0.05
    distil(toy_folder, tmp_path / "out", class_batch=3, resume=True)
    assert told() > before
