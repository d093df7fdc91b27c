"""IGDS from the call to the folder: what it leaves, the same bytes however it got there, and soft labels."""

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
from ddfast.methods.diffusion.igds import IGDS
from ddfast.output.pixels import GUIDED, read_curve, read_pixels, to_bytes
from ddfast.pipeline import synthesize
from tests.conftest import digests
from tests.methods.diffusion.conftest import estimator, prior

__all__ = ["estimator", "prior"]

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"ipc": 2, "steps": 4, "class_batch": 1}
FLAGS = ["--ipc", "2", "--steps", "4", "--class-batch", "1", "--quiet"]


@pytest.fixture(scope="module")
def places(prior, estimator):
    return {"prior": str(prior), "estimator": str(estimator)}


def distil(folder, out, places, **settings):
    return ddfast.distill("igds", data=folder, out=out, quiet=True, **{**SETTINGS, **places, **settings})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, toy_folder, places):
    return distil(toy_folder, tmp_path_factory.mktemp("igds") / "out", places)


def test_the_output_folder_is_the_contract(undisturbed, places):
    names = {path.relative_to(undisturbed).as_posix() for path in undisturbed.rglob("*") if path.is_file()}
    images = {name for name in names if name.startswith("train/") and name.endswith(".png")}
    assert len(images) == 6
    assert names - images == {
        *("manifest.json", "run.json", "report.html", "mosaic.png", "before.png"),
        *("pixels.safetensors", "curve.parquet", "train/metadata.jsonl"),
    }
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["complete"]
    assert (manifest["image_size"], manifest["factor"], manifest["tiles"]) == (16, 2, 4)
    assert manifest["teacher"] is None
    assert manifest["inputs"]["prior"]["kind"] == "DDPMPipeline"
    assert manifest["inputs"]["estimator"]["arch"] == "convnet3_in"
    assert not set(places) & manifest["options"]["synthesize"].keys()
    curve = read_curve(undisturbed)
    assert [(row["group"], row["step"]) for row in curve] == [(g, s) for g in range(3) for s in range(4)]
    assert all({"group", "step", *GUIDED} == row.keys() for row in curve)


def test_the_images_are_the_pixels_and_train_students(undisturbed, toy_folder):
    pixels, opened = read_pixels(undisturbed), ddfast.DistilledSet(undisturbed)
    assert (pixels.space, pixels.factor, pixels.images.shape) == ("unit", 2, (6, 3, 16, 16))
    assert pixels.labels.tolist() == [0, 0, 1, 1, 2, 2]
    shown = to_bytes(pixels.images, opened.mean, opened.std, "unit")
    assert all(torch.equal(opened[place][0], shown[place]) for place in range(6))
    for protocol in ("igds", "dsa"):
        settings = {"arch": "convnet3_in", "arch_options": {"width": 8}, "protocol": protocol, "epochs": 1}
        found = ddfast.evaluate(undisturbed, toy_folder, seeds=1, quiet=True, **settings)
        assert found.images == "pixels, float32"


def test_the_report_shows_unguided_beside_guided(undisturbed):
    page = (undisturbed / "report.html").read_text()
    assert "Unguided and guided" in page
    assert "<b>unguided</b><b>guided</b>" in page
    assert 'alt="across unguided, image 1"' in page
    for title in ("I(X; Y), nats", "H(X | Y), nats", "What guidance moves", "Estimator", "4 samples in each"):
        assert title in page
    assert "Before and after" not in page
    assert "--protocol igds" in page


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_run_that_stops_anywhere_resumes_to_the_same_bytes(
    stop, undisturbed, toy_folder, places, tmp_path, monkeypatch
):
    monkeypatch.setattr(synthesize, "_SAVE_SECONDS", 0.0)
    taken, step = [], IGDS.step

    def stopping(self, *arguments):
        if len(taken) == stop:
            raise KeyboardInterrupt
        taken.append(arguments[0])
        return step(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(IGDS, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            distil(toy_folder, tmp_path / "out", places)
    again = []
    monkeypatch.setattr(IGDS, "step", lambda self, *given: again.append(given[0]) or step(self, *given))
    distil(toy_folder, tmp_path / "out", places, resume=True)
    assert len(again) == 12 - stop
    assert digests(tmp_path / "out") == digests(undisturbed)


def command(folder, out, places):
    flags = [word for name, value in places.items() for word in (f"--{name}", value)]
    return ["-m", "ddfast", "distill", "igds", "--data", str(folder), "--out", str(out), *flags, *FLAGS]


def test_kill_9_and_resume_give_the_same_bytes(undisturbed, toy_folder, places, tmp_path):
    out = tmp_path / "out"
    words = command(toy_folder, out, places)
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE)
    while not (out / "state" / "group-00000.safetensors").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    distil(toy_folder, out, places, resume=True)
    assert digests(out) == digests(undisturbed)
    assert not (out / "state").exists()


def test_ranks_give_the_bytes_of_one_process(undisturbed, toy_folder, places, tmp_path):
    out = tmp_path / "out"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *words, *command(toy_folder, out, places)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(undisturbed)


@pytest.mark.parametrize("role", ["teacher", "label_teacher"])
def test_a_teacher_gives_soft_labels(role, undisturbed, toy_folder, toy_teacher, places, tmp_path):
    out = distil(toy_folder, tmp_path / "out", places, **{role: toy_teacher})
    opened = ddfast.DistilledSet(out)
    assert opened.soft_labels.shape == (6, 4, 3)
    torch.testing.assert_close(opened.soft_labels.sum(dim=2), torch.ones(6, 4), atol=2e-3, rtol=0)
    assert torch.equal(read_pixels(out).images, read_pixels(undisturbed).images)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["teacher"]["sha256"] == manifest["label_teacher"]["sha256"]
    assert manifest["counts"] == {"images": 6, "sources": 182, "quarantined": 0}
    assert not (out / ".soft-labels").exists()
    assert "--protocol rded" in (out / "report.html").read_text()


def test_the_stages_alone_do_what_distill_does(undisturbed, toy_folder, places, tmp_path):
    out = distil(toy_folder, tmp_path / "out", places, until="synthesize")
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    assert main(["relabel", str(out), "--quiet"]) == 0
    assert digests(out) == digests(undisturbed)
    assert main(["synthesize", str(out), "--quiet"]) == 0
    assert digests(out) == digests(undisturbed)


def test_without_the_unguided_samples_nothing_stands_beside(undisturbed, toy_folder, places, tmp_path):
    out = distil(toy_folder, tmp_path / "out", places, unguided=False)
    assert not (out / "before.png").exists()
    assert torch.equal(read_pixels(out).images, read_pixels(undisturbed).images)
    page = (out / "report.html").read_text()
    assert "The distilled images" in page
    assert "<b>unguided</b>" not in page


def test_samples_without_guidance_need_no_estimator(toy_folder, places, tmp_path):
    out = distil(toy_folder, tmp_path / "out", {"prior": places["prior"]}, eta=0)
    assert read_pixels(out).images.shape == (6, 3, 16, 16)
    assert "I(X; Y)" not in (out / "report.html").read_text()


def test_guidance_that_diverges_keeps_the_last_good_state(toy_folder, places, tmp_path):
    with pytest.raises(DivergedError, match=r"of igds .* at step \d of 4: lower eta") as caught:
        distil(toy_folder, tmp_path / "out", places, eta=1e38, clip=0, eta_schedule="constant")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out" / "state" / "group-00000.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -1}, "beta must be at least 0, got -1"),
        ({"image_size": 32}, "makes images of 16 px, the run has 32 px: give image_size=16"),
        ({"prior": "nowhere at all"}, "the prior nowhere at all is no folder"),
        ({"estimator": "nowhere"}, "nowhere is no file"),
        ({"evaluate_every": 2}, "evaluate_every is nothing to igds, whose images are whole only at the end"),
        ({"steps": 2000}, r"steps must lie in 2\.\.1000"),
        ({"factor": 3}, "factor"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(settings, message, toy_folder, places, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        distil(toy_folder, tmp_path / "out", places, **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_prior_is_refused_on_resumption(undisturbed, toy_folder, places, tmp_path):
    import shutil

    changed = tmp_path / "prior"
    shutil.copytree(places["prior"], changed)
    (changed / "prior.json").write_text('{"class_names": ["across", "down", "rising"]}')
    with pytest.raises(UsageError, match=r"already holds a different run \(inputs.prior.sha256"):
        distil(toy_folder, undisturbed, {**places, "prior": str(changed)}, resume=True)
