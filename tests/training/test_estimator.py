"""Training an estimator: the loss of Algorithm 2, its moving average and queue, the classifier, and kills."""

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ddfast.cli import main
from ddfast.errors import UsageError
from ddfast.models.estimator import Encoder, load_estimator
from ddfast.training import course as course_module
from ddfast.training import estimator as module
from ddfast.training.estimator import contrast, spread, train_estimator
from tests.training.conftest import CLASSES, render

TINY = {"epochs": 2, "arch_options": {"width": 8}, "batch_size": 32, "queue": 48, "lr": 0.02, "quiet": True}


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """20 readable images a class and one that is none; 10 for the test."""
    root = tmp_path_factory.mktemp("stripes")
    for split, images in (("train", render(20, seed=0)), ("test", render(10, seed=1))):
        for number, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:04d}.png")
    (root / "train" / "across" / "0000a.png").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def trained(stripes, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "estimator.safetensors"
    train_estimator(stripes, out=out, **TINY)
    return out


def directions(count, seed):
    return F.normalize(
        torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def test_the_contrast_is_infonce_with_the_queue():
    query, keys, queue, tau = directions(3, 0), directions(3, 1), directions(5, 2), 0.07
    wanted = 0.0
    for q, k in zip(query, keys, strict=True):
        positive = math.exp(float(q @ k) / tau)
        wanted -= math.log(positive / (positive + sum(math.exp(float(q @ n) / tau) for n in queue))) / 3
    torch.testing.assert_close(float(contrast(query, keys, queue, tau)), wanted)


def test_the_spread_is_the_mean_kl_to_the_mean_of_both_views():
    query, keys, tau = directions(3, 0), directions(3, 1), 0.2
    wanted = torch.zeros((), dtype=torch.float64)
    leaf = query.clone().requires_grad_()
    for q, k in zip(leaf, keys, strict=True):
        views = [torch.softmax(view / tau, dim=0) for view in (q, k)]
        centre = (views[0] + views[1]) / 2
        wanted = wanted + sum((view * (view / centre).log()).sum() for view in views) / 6
    own = query.clone().requires_grad_()
    found = spread(own, keys, tau)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, own), torch.autograd.grad(wanted, leaf))
    assert 0 < found < math.log(2)
    assert float(spread(keys, keys, tau)) == pytest.approx(0.0, abs=1e-12)


def training_of(**settings):
    config = module.EstimatorConfig(
        **{"epochs": 1, "image_size": 16, "arch_options": {"width": 8}, "queue": 48, **settings}
    ).checked()
    return module._Training(module._untrained(config), config, torch.device("cpu"), "float32")


def test_lambda_0_is_moco():
    images = render(4, seed=2)
    losses = {}
    for kl in (0.0, 0.3):
        training = training_of(kl=kl)
        query, keys = training.prepare(images.images, images.labels, torch.Generator().manual_seed(0))
        seen = training.fitting.model(query)
        losses[kl] = training.loss(seen, keys)
        plain = contrast(seen, keys, training._queue, 0.07)
        torch.testing.assert_close(losses[kl], plain - kl * spread(seen, keys, 0.07))
    assert losses[0.3] < losses[0.0]


def test_the_average_follows_and_the_queue_moves_on():
    training, images = training_of(momentum_encoder=0.75), render(4, seed=2)
    _, keys = training.prepare(images.images, images.labels, torch.Generator().manual_seed(0))
    assert not keys.requires_grad
    before = [value.clone() for value in training._momentum.parameters()]
    queue = training._queue.clone()
    with torch.no_grad():
        for value in training.fitting.model.parameters():
            value.add_(1.0)
    training.after_step()
    for old, new, ours in zip(
        before, training._momentum.parameters(), training.fitting.model.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * ours)
    assert torch.equal(training._queue, torch.cat([queue[12:], keys]))
    torch.testing.assert_close(training._queue.norm(dim=1), torch.ones(48))


def test_views_differ_and_keys_of_batchnorm_are_shuffled():
    training = training_of(arch="resnet18_small", arch_options={})
    images = render(6, seed=2)
    query, keys = training.prepare(images.images, images.labels, torch.Generator().manual_seed(0))
    assert keys.shape == (18, 128)
    assert (query[0] != query[1]).any()
    whole = training._keys(query)
    pieces = training._encoded(query, torch.Generator().manual_seed(1))
    assert not torch.allclose(whole, pieces, atol=1e-3)  # statistics of other images
    training._keys.eval()
    torch.testing.assert_close(
        training._encoded(query, torch.Generator().manual_seed(1)),
        training._keys(query),
        rtol=1e-3,
        atol=1e-4,
    )


def test_the_classifier_reads_the_smoothed_encoder(trained, stripes):
    estimator = load_estimator(trained)
    assert estimator.class_names == CLASSES
    test = render(10, seed=1)
    _, logits = estimator.read(test.images.float() / 127.5 - 1)
    top1 = 100 * float((logits.argmax(dim=1) == test.labels).double().mean())
    assert estimator.top1 == pytest.approx(top1, abs=0.01)
    learned = render(20, seed=0)
    _, logits = estimator.read(learned.images.float() / 127.5 - 1)
    assert (logits.argmax(dim=1) == learned.labels).double().mean() > 0.7  # of 32 features; a third by chance
    assert (estimator.facts["images"], estimator.facts["unreadable"]) == (60, 1)


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way."""


@pytest.mark.parametrize(("step", "seconds"), [(1, 0.0), (3, 0.0), (3, 1e9)])  # of two an epoch
def test_killed_anywhere_it_resumes_to_the_same_bytes(trained, stripes, tmp_path, monkeypatch, step, seconds):
    monkeypatch.setattr(course_module, "_SAVE_SECONDS", seconds)
    original, left = module._Training.after_step, [step]

    def dying(self):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        original(self)

    monkeypatch.setattr(module._Training, "after_step", dying)
    out = tmp_path / "e.safetensors"
    with pytest.raises(Killed):
        train_estimator(stripes, out=out, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == (["e.state"] if seconds == 0 or step > 1 else [])
    left[0] = 10**9
    train_estimator(stripes, out=out, resume=True, **TINY)
    assert 10**9 - left[0] == 4 - (step if seconds == 0 else step // 2 * 2)
    assert out.read_bytes() == trained.read_bytes()
    assert not out.with_suffix(".state").exists()


def test_a_kill_in_the_classifier_loses_nothing(trained, stripes, tmp_path, monkeypatch):
    def dying(*given):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "_classifier", dying)
        with pytest.raises(Killed):
            train_estimator(stripes, out=tmp_path / "e.safetensors", **TINY)
    with pytest.raises(UsageError, match="holds an unfinished run"):
        train_estimator(stripes, out=tmp_path / "e.safetensors", **TINY)
    with pytest.raises(UsageError, match="another kl"):
        train_estimator(stripes, out=tmp_path / "e.safetensors", resume=True, **TINY, kl=0.5)
    train_estimator(stripes, out=tmp_path / "e.safetensors", resume=True, **TINY)
    assert (tmp_path / "e.safetensors").read_bytes() == trained.read_bytes()


def test_finished_it_is_left_alone(trained, stripes):
    before = trained.read_bytes()
    train_estimator(stripes, out=trained, resume=True, **TINY)
    assert trained.read_bytes() == before
    with pytest.raises(
        UsageError, match=r"exists already \(an estimator, convnet3_in, 2 epochs, linear top-1"
    ):
        train_estimator(stripes, out=trained, **TINY)


def test_it_starts_from_a_moco_checkpoint(stripes, tmp_path):
    """As MoCo's authors save it: wrapped, with the moving average, the queue and the projection as the last layer."""
    torch.manual_seed(0)
    donor = Encoder("resnet18_small", 16)
    held = {f"module.encoder_q.{name}": value for name, value in donor.network.state_dict().items()}
    held |= {f"module.encoder_q.fc.{name}": value for name, value in donor.projection.state_dict().items()}
    held |= {name.replace("encoder_q", "encoder_k"): value + 1 for name, value in held.items()}
    held["module.queue"] = torch.randn(128, 10)
    torch.save({"epoch": 3, "state_dict": held}, tmp_path / "moco.pth.tar")
    settings = {**TINY, "arch": "resnet18_small", "arch_options": None, "epochs": 0}
    found = train_estimator(
        stripes, out=tmp_path / "e.safetensors", weights=tmp_path / "moco.pth.tar", **settings
    )
    for name, value in donor.state_dict().items():
        assert torch.equal(found.encoder.state_dict()[name], value), name
    with pytest.raises(UsageError, match=r"does not fit the encoder convnet3_in"):
        train_estimator(
            stripes,
            out=tmp_path / "f.safetensors",
            weights=tmp_path / "moco.pth.tar",
            **{**TINY, "epochs": 1},
        )


def test_it_starts_from_a_teacher(stripes, toy_teacher, tmp_path):
    found = train_estimator(
        stripes,
        out=tmp_path / "e.safetensors",
        weights=toy_teacher,
        **{**TINY, "arch": "convnet3", "epochs": 0},
    )
    from ddfast.models import load_teacher

    wanted = load_teacher(toy_teacher).model.state_dict()
    held = found.encoder.network.state_dict()
    assert all(torch.equal(held[name], wanted[name]) for name in held)
    assert found.top1 > 80


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs 0 keeps weights as they are: give them as well"),
        ({"kl": -1}, "kl must be at least 0"),
        ({"tau": 0}, "tau must be positive"),
        ({"momentum_encoder": 1}, "momentum_encoder must be below 1"),
        ({"queue": 0}, "queue must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"arch": "convnet9"}, "unknown model 'convnet9'"),
        ({"arch": "timm:nonet"}, "timm has no model 'nonet'"),
        ({"weights": "nowhere.pt"}, "weights nowhere.pt is no file"),
        ({"normalization": "moon"}, "unknown normalization"),
        ({"out": "e.pt"}, "must end in .safetensors, got e.pt"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(stripes, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        train_estimator(stripes, **{"out": "e.safetensors", **TINY, **changes})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_by_the_command(stripes, tmp_path, capsys):
    out = tmp_path / "e.safetensors"
    words = [
        "train-estimator",
        "--data",
        str(stripes),
        "--epochs",
        "1",
        "--images-per-class",
        "5",
        "--kl",
        "0",
    ]
    assert main([*words, "--width", "8", "--batch-size", "8", "--no-flip", "--out", str(out), "--quiet"]) == 0
    estimator = load_estimator(out)
    assert capsys.readouterr().out == f"estimator {out}\ntop1 {estimator.top1:.2f}\n"
    held = estimator.facts["training"]
    assert (held["kl"], held["flip"], held["images_per_class"]) == (0.0, False, 5)
    assert held["arch_options"] == {"width": 8}


def test_a_queue_is_no_longer_than_a_quarter_of_the_images(stripes, tmp_path, capsys):
    train_estimator(stripes, out=tmp_path / "e.safetensors", **{**TINY, "queue": 4096, "quiet": False})
    assert "the queue holds 15 keys, not 4096: of 60 images" in capsys.readouterr().err
    train_estimator(stripes, out=tmp_path / "f.safetensors", **{**TINY, "queue": 15, "quiet": False})
    assert "the queue holds" not in capsys.readouterr().err
    given = [
        load_estimator(tmp_path / name).encoder.state_dict() for name in ("e.safetensors", "f.safetensors")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in given), strict=True))
