"""Training a prior: DDPM's loss, the moving average, a folder that diffusers opens, and kills that change no byte."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddfast.cli import main
from ddfast.errors import UsageError
from ddfast.models.diffusion import load_prior, sample
from ddfast.training import course as course_module
from ddfast.training import prior as module
from ddfast.training.prior import train_prior
from tests.training.conftest import CLASSES, render

TINY = {"epochs": 2, "width": 8, "batch_size": 32, "quiet": True, "sample_every": 2}


@pytest.fixture(scope="module", autouse=True)
def short_grids():
    """Pictures of two steps and one sample a class."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_GRID_STEPS", 2)
        patch.setattr(module, "_SHOWN", 1)
        yield


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """20 readable images a class, and one that is none."""
    root = tmp_path_factory.mktemp("stripes")
    images = render(20, seed=0)
    for number, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
        folder = root / "train" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:04d}.png")
    (root / "train" / "across" / "0000a.png").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def trained(stripes, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "prior"
    train_prior(stripes, out=out, **TINY)
    return out


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_the_folder_is_one_of_ours_and_of_diffusers(trained):
    from diffusers import DDPMPipeline

    assert set(contents(trained)) == {
        *("model_index.json", "prior.json", "samples/epoch-0002.png"),
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"),
    }
    pipeline = DDPMPipeline.from_pretrained(trained)
    prior = load_prior(trained)
    ours, theirs = prior.denoiser.state_dict(), pipeline.unet.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert prior.places == {"across": 0, "down": 1, "rising": 2}
    assert (prior.image_size, prior.classes) == (16, 3)
    said = json.loads((trained / "prior.json").read_text())
    assert (said["images"], said["unreadable"], said["training"]["epochs"]) == (60, 1, 2)


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way."""


@pytest.mark.parametrize(("step", "seconds"), [(1, 0.0), (2, 0.0), (3, 0.0), (3, 1e9)])  # of two an epoch
def test_killed_anywhere_it_resumes_to_the_same_bytes(trained, stripes, tmp_path, monkeypatch, step, seconds):
    monkeypatch.setattr(course_module, "_SAVE_SECONDS", seconds)
    original, left = module._Training.after_step, [step]

    def dying(self):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        original(self)

    monkeypatch.setattr(module._Training, "after_step", dying)
    with pytest.raises(Killed):
        train_prior(stripes, out=tmp_path / "p", **TINY)
    with (
        pytest.raises(UsageError, match=r"holds an unfinished run|is not empty")
        if (tmp_path / "p" / "training.state").exists()
        else pytest.raises(Killed)
    ):
        train_prior(stripes, out=tmp_path / "p", **TINY)
    left[0] = 10**9
    train_prior(stripes, out=tmp_path / "p", resume=True, **TINY)
    taken = 10**9 - left[0]
    assert taken == 4 - (step if seconds == 0 else step // 2 * 2)
    assert contents(tmp_path / "p") == contents(trained)


def test_kill_9_and_resume_give_the_same_bytes(trained, stripes, tmp_path):
    out = tmp_path / "p"
    flags = ["--epochs", "2", "--width", "8", "--batch-size", "32", "--sample-every", "0", "--quiet"]
    command = [
        sys.executable,
        "-m",
        "ddfast",
        "train-prior",
        "--data",
        str(stripes),
        "--out",
        str(out),
        *flags,
    ]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
    while not (out / "training.state").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "prior.json").exists()
    train_prior(stripes, out=out, resume=True, **{**TINY, "sample_every": 0})
    wanted = {name: data for name, data in contents(trained).items() if not name.startswith("samples/")}
    assert contents(out) == wanted


def test_a_kill_while_it_is_written_loses_nothing(trained, stripes, tmp_path, monkeypatch):
    save = module.save_prior

    def dying(folder, *given):
        save(folder, *given)
        (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(module, "save_prior", dying)
    with pytest.raises(Killed):
        train_prior(stripes, out=tmp_path / "p", **TINY)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_GRID_STEPS", 2)
    steps = []
    monkeypatch.setattr(module._Training, "after_step", lambda self: steps.append(1))
    train_prior(stripes, out=tmp_path / "p", resume=True, **TINY)
    assert not steps
    assert contents(tmp_path / "p") == contents(trained)


def test_finished_it_is_left_alone(trained, stripes):
    before = contents(trained)
    train_prior(stripes, out=trained, resume=True, **TINY)
    assert contents(trained) == before
    with pytest.raises(UsageError, match="holds a finished prior"):
        train_prior(stripes, out=trained, **TINY)
    with pytest.raises(UsageError, match="another width"):
        train_prior(stripes, out=trained, resume=True, **{**TINY, "width": 16})


def training_of(**settings):
    config = module.PriorConfig(**{"epochs": 1, "image_size": 16, "width": 8, **settings}).checked()
    return module._Training(module._untrained(config, 3), config, torch.device("cpu"), "float32")


def test_the_loss_is_that_of_ddpm():
    training = training_of(flip=False)
    images = render(2, seed=4)
    draws = torch.Generator().manual_seed(0)
    inputs, noise = training.prepare(images.images, images.labels, draws)
    noisy, timesteps, labels, _ = inputs
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)[timesteps]
    clean = images.images.double() / 127.5 - 1
    wanted = bar.sqrt()[:, None, None, None] * clean + (1 - bar).sqrt()[:, None, None, None] * noise.double()
    torch.testing.assert_close(noisy.double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, images.labels)
    said = training.fitting.model(*inputs)
    torch.testing.assert_close(training.loss(said, noise), (said[0] - noise).square().mean())


def test_samples_come_of_the_moving_average():
    training = training_of(ema=0.9)
    first = {name: value.clone() for name, value in training.fitting.model.state_dict().items()}
    for _ in range(3):
        with torch.no_grad():
            for value in training.fitting.model.parameters():
                value.add_(1.0)
        training.after_step()
    now = {name: value.clone() for name, value in training.fitting.model.state_dict().items()}
    with training.averaged() as model:
        assert not model.training
        averaged = {name: value.clone() for name, value in model.state_dict().items()}
    name = "conv_in.weight"
    assert ((averaged[name] > first[name]) & (averaged[name] < now[name])).all()
    assert torch.equal(training.fitting.model.state_dict()[name], now[name])
    assert training.fitting.model.training


def test_the_rate_rises_and_falls():
    training = training_of(lr=1.0)
    rates = [training.rate(share / 1000) for share in range(1000)]
    assert rates[0] < 0.05
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates.index(max(rates)) == pytest.approx(50, abs=2)
    assert rates[-1] < 1e-3


def test_it_learns_the_noise(stripes, tmp_path, capsys):
    settings = {**TINY, "epochs": 4, "quiet": False, "sample_every": 0, "batch_size": 8, "lr": 5e-3}
    train_prior(stripes, out=tmp_path / "p", **settings)
    losses = [
        float(line.rpartition(" ")[2]) for line in capsys.readouterr().err.splitlines() if ": loss" in line
    ]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]
    assert not (tmp_path / "p" / "samples").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"width": 12}, "width must be a multiple of 8, got 12"),
        ({"ema": 1.0}, "ema must be below 1"),
        ({"lr": 0}, "lr must be positive"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"images_per_class": 0}, "images_per_class must be at least 1"),
        ({"sample_every": -1}, "sample_every must be at least 0"),
        ({"precision": "half"}, "precision must be one of"),
        ({"image_size": 50}, "image_size 50 cannot be halved down"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(stripes, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        train_prior(stripes, out=tmp_path / "p", **{**TINY, **changes})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "p").exists()


def test_a_folder_of_others_is_left_alone(stripes, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UsageError, match="is not empty and holds no prior"):
            train_prior(stripes, out=tmp_path, resume=resume, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_loss_that_diverges_is_a_line(stripes, tmp_path):
    with pytest.raises(UsageError, match=r"the loss became (nan|inf) in epoch 1: lower lr"):
        train_prior(stripes, out=tmp_path / "p", **{**TINY, "lr": 1e30, "batch_size": 4})


def test_some_images_of_each_class_by_the_command(stripes, tmp_path, capsys):
    words = [
        "train-prior",
        "--data",
        str(stripes),
        "--epochs",
        "1",
        "--images-per-class",
        "4",
        "--width",
        "8",
    ]
    assert main([*words, "--no-flip", "--out", str(tmp_path / "p"), "--quiet"]) == 0
    assert capsys.readouterr().out == f"prior {tmp_path / 'p'}\nimages of 16 px, 3 classes\n"
    said = json.loads((tmp_path / "p" / "prior.json").read_text())
    assert said["images"] + said["unreadable"] == 12
    assert said["training"]["flip"] is False


def test_grey_images_are_learned_in_one_channel(stripes, tmp_path):
    for path in stripes.rglob("*.png"):
        if path.name == "0000a.png":
            continue
        grey = tmp_path / "grey" / path.relative_to(stripes)
        grey.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("L").save(grey)
    prior = train_prior(tmp_path / "grey", out=tmp_path / "prior", **TINY)
    assert prior.shape[0] == 1
    made = sample(prior, torch.tensor([0, 1]), [torch.Generator().manual_seed(n) for n in range(2)], 2)
    assert made.shape == (2, 3, *prior.shape[1:])
    assert torch.equal(made[:, :1].expand_as(made), made)
    shown = np.asarray(Image.open(tmp_path / "prior" / "samples" / "epoch-0002.png").convert("RGB"))
    assert (shown.max(axis=2) - shown.min(axis=2)).max() < 16  # the page is not quite white
