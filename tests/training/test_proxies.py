import hashlib
import json
import os

import pytest
import torch
from PIL import Image

from ddfast.data import open_source
from ddfast.data.pool import drawn_places
from ddfast.errors import UsageError
from ddfast.files import temporary_path
from ddfast.models import create_model, load_teacher, save_teacher
from ddfast.models.fusing import FusedSequential
from ddfast.models.normalization import normalization
from ddfast.seeding import derived_seed
from ddfast.training import fit_teacher, load_proxies, proxies_identity, train_proxies
from ddfast.training import network_folder as module
from ddfast.training import teacher as teacher_module
from ddfast.training.augmentation import normalize
from ddfast.training.image_sets import read_training_set
from tests.training.conftest import CLASSES, SIZE, render

TINY = {"arch": "convnet3_in", "count": 2, "epochs": 2, "batch_size": 32, "lr": 0.02, "quiet": True}
MEAN, STD = normalization("imagenet")
RUN = {"class_names": CLASSES, "image_size": SIZE, "mean": MEAN, "std": STD}


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
    return train_proxies(stripes, out=tmp_path_factory.mktemp("trained") / "proxies", **TINY)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_proxy_is_a_teacher_that_was_trained_plainly(trained, stripes, tmp_path):
    source = open_source(str(stripes), "train")
    for number, row in enumerate(trained.proxies):
        proxy = load_teacher(trained.folder / f"proxy-{number:05d}.safetensors")
        assert (proxy.arch, proxy.class_names, proxy.image_size) == ("convnet3_in", CLASSES, SIZE)
        assert (proxy.mean, proxy.std, proxy.epoch) == (MEAN, STD, 2)
        held = proxy.facts["training"]
        assert (held["optimizer"], held["schedule"], held["augment"]) == ("sgd", "constant", "none")
        assert (held["lr"], held["momentum"], held["weight_decay"]) == (0.02, 0.9, 1e-3)
        assert held["seed"] == row.seed == derived_seed(0, "proxy", number)
        assert (row.images, row.epochs, row.top1) == (60, 2, proxy.top1)
    # The second as a teacher by itself.
    config = teacher_module.TeacherConfig(
        "convnet3_in", 2, SIZE, schedule="constant", lr=0.02, weight_decay=1e-3, batch_size=32,
        seed=derived_seed(0, "proxy", 1), augment="none",
    )  # fmt: skip
    alone = tmp_path / "alone.safetensors"
    train, test = (read_training_set(open_source(str(stripes), split), SIZE) for split in ("train", "test"))
    fit_teacher(
        train, test, config, class_names=CLASSES, out=alone, data_fingerprint=source.fingerprint(), quiet=True
    )
    assert alone.read_bytes() == (trained.folder / "proxy-00001.safetensors").read_bytes()


def test_the_table_says_what_each_reaches(trained):
    names = ["proxies.json", "proxies.md", "proxy-00000.safetensors", "proxy-00001.safetensors"]
    assert sorted(contents(trained.folder)) == names
    rows = json.loads((trained.folder / "proxies.json").read_text())["proxies"]
    assert [row["top1"] for row in rows] == [proxy.top1 for proxy in trained.proxies]
    lines = str(trained).splitlines()
    assert lines[0].split() == ["number", "seed", "epochs", "images", "top-1", "%"]
    for line, proxy in zip(lines[1:], trained.proxies, strict=False):
        assert line.split() == [str(proxy.number), str(proxy.seed), "2", "60", f"{proxy.top1:.2f}"]
    mean = sum(proxy.top1 for proxy in trained.proxies) / 2
    assert lines[3:] == [f"2 proxies of convnet3_in, mean top-1 {mean:.2f}%"]
    readable = (trained.folder / "proxies.md").read_text()
    assert f"| 1 | {trained.proxies[1].seed} | 2 | 60 | {trained.proxies[1].top1:.2f} |" in readable


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way."""


def kill_in_batch(monkeypatch, batch):
    """Die in the middle of an epoch: at the cross-entropy of that batch, from 0, of all."""
    original, left = teacher_module._cross_entropy, [batch]

    def dying(logits, labels):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return original(logits, labels)

    monkeypatch.setattr(teacher_module, "_cross_entropy", dying)


@pytest.mark.parametrize("batch", [0, 3, 5])  # of 2 batches an epoch, 4 a proxy
def test_killed_in_an_epoch_it_resumes_to_the_same_bytes(trained, stripes, tmp_path, monkeypatch, batch):
    kill_in_batch(monkeypatch, batch)
    with pytest.raises(Killed):
        train_proxies(stripes, out=tmp_path / "p", **TINY)
    monkeypatch.undo()
    steps = []
    original = teacher_module._cross_entropy
    monkeypatch.setattr(teacher_module, "_cross_entropy", lambda *given: steps.append(1) or original(*given))
    again = train_proxies(stripes, out=tmp_path / "p", resume=True, **TINY)
    assert len(steps) == 8 - batch // 2 * 2  # whole epochs are not trained anew
    assert contents(tmp_path / "p") == contents(trained.folder)
    assert str(again) == str(trained)


def test_killed_at_any_write_it_resumes_to_the_same_bytes(trained, stripes, tmp_path, monkeypatch):
    out, kills = tmp_path / "p", 0
    replace = os.replace
    while True:
        renamed = [0]

        def dying(source, target, renamed=renamed):
            if renamed[0] == 1:
                temporary_path(out / "proxies.json").write_bytes(b"half")
                raise Killed
            renamed[0] += 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", dying)
        try:
            train_proxies(stripes, out=out, resume=True, **TINY)
            break
        except Killed:
            kills += 1
    # A table at the start; then a state, the file and both tables a proxy; at the ninth write it is done.
    assert kills == 8
    assert contents(out) == contents(trained.folder)


def test_a_state_that_outlived_its_proxy_goes(trained, stripes, tmp_path):
    for name, data in contents(trained.folder).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "proxy-00001.state").write_bytes(b"any")
    train_proxies(stripes, out=tmp_path, resume=True, **TINY)
    assert contents(tmp_path) == contents(trained.folder)


def test_a_finished_folder_returns_without_reading_the_images(trained, stripes, monkeypatch):
    before = contents(trained.folder)

    def never(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr(module, "read_training_set", never)
    monkeypatch.setattr(module, "fit_teacher", never)
    again = train_proxies(stripes, out=trained.folder, resume=True, **TINY)
    assert again == trained
    assert contents(trained.folder) == before


def test_the_images_are_decoded_once_for_all(stripes, tmp_path, monkeypatch):
    calls, original = [], module.read_training_set
    monkeypatch.setattr(module, "read_training_set", lambda *a, **k: calls.append(1) or original(*a, **k))
    train_proxies(stripes, out=tmp_path / "p", **{**TINY, "count": 3, "epochs": 1})
    assert calls == [1]


def test_more_can_be_added_and_the_old_ones_stay(trained, stripes, tmp_path):
    for name, data in contents(trained.folder).items():
        (tmp_path / name).write_bytes(data)
    more = train_proxies(stripes, out=tmp_path, resume=True, **{**TINY, "count": 3})
    assert more.proxies[:2] == trained.proxies
    assert len(proxies_identity(tmp_path)) == 3
    held = contents(tmp_path)
    assert all(held[name] == data for name, data in contents(trained.folder).items() if "proxy-" in name)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"holds 3 trained proxies, more than count 2: give count=3"):
        train_proxies(stripes, out=tmp_path, resume=True, **TINY)
    assert contents(tmp_path) == before


def test_a_run_goes_on_with_its_threads(trained, stripes, tmp_path):
    before = torch.get_num_threads()
    whole = train_proxies(stripes, out=tmp_path / "whole", **TINY)
    train_proxies(stripes, out=tmp_path / "part", **{**TINY, "count": 1})
    torch.set_num_threads(before + 1)
    try:
        train_proxies(stripes, out=tmp_path / "part", resume=True, **TINY)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "part") == contents(whole.folder) == contents(trained.folder)


def test_some_images_of_each_class_are_those_that_a_run_draws(stripes, tmp_path):
    result = train_proxies(stripes, out=tmp_path / "p", images_per_class=5, seed=3, **{**TINY, "count": 1})
    assert [proxy.images for proxy in result.proxies] == [15]
    source = open_source(str(stripes), "train")
    places = drawn_places(source.samples, 3, 5, 3)
    samples = source.samples.take(places)
    config = teacher_module.TeacherConfig(
        "convnet3_in", 2, SIZE, schedule="constant", lr=0.02, weight_decay=1e-3, batch_size=32,
        seed=derived_seed(3, "proxy", 0), augment="none",
    )  # fmt: skip
    train = read_training_set(source, SIZE, samples=samples)
    alone = fit_teacher(train, None, config, class_names=CLASSES, out=tmp_path / "a.safetensors", quiet=True)
    proxy = load_teacher(tmp_path / "p" / "proxy-00000.safetensors")
    for ours, theirs in zip(
        proxy.model.state_dict().values(), alone.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_more_images_than_a_class_has_are_all_of_them_and_said(trained, stripes, tmp_path, capsys):
    settings = {**TINY, "quiet": False}
    train_proxies(stripes, out=tmp_path / "p", images_per_class=21, **settings)
    said = capsys.readouterr().err
    assert "2 classes of" in said
    assert "have fewer than 21 images, the smallest is down with 20: all of theirs are taken" in said
    assert contents(tmp_path / "p") == contents(trained.folder)


def test_without_a_test_split_nothing_is_measured(stripes, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(stripes / "train")
    result = train_proxies(tmp_path / "data", out=tmp_path / "p", **{**TINY, "count": 1, "epochs": 1})
    assert result.proxies[0].top1 is None
    assert result.mean_top1 is None
    assert str(result).splitlines()[1].split()[-1] == "-"
    assert proxies_identity(tmp_path / "p")[0]["top1"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 1.5}, "count must be a whole number, got 1.5"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"arch": "resnet18_inn"}, "unknown model 'resnet18_inn'.*did you mean resnet18_in"),
        ({"images_per_class": 0}, "images_per_class must be at least 1"),
        ({"image_size": 20}, "must be a multiple of 8, got 20"),
        ({"lr": -1}, "lr must be"),
        ({"lr": None}, "lr must be"),
        ({"momentum": 1}, "momentum must be below 1"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"lr": 1e30}, r"the loss became (nan|inf) in epoch \d: lower lr \(now 1e\+30\)"),
    ],
)
def test_bad_settings_are_one_line(stripes, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as error:
        train_proxies(stripes, out=tmp_path / "p", **{**TINY, **changes})
    assert "\n" not in str(error.value)
    if "lr" not in changes:
        assert not (tmp_path / "p").exists()


def test_a_run_that_ended_before_its_first_epoch_stands_in_nobodys_way(trained, stripes, tmp_path):
    with pytest.raises(UsageError, match="the loss became"):
        train_proxies(stripes, out=tmp_path / "p", **{**TINY, "lr": 1e30})
    train_proxies(stripes, out=tmp_path / "p", **TINY)
    assert contents(tmp_path / "p") == contents(trained.folder)


def test_bad_data_and_folders_are_one_line_and_stay_as_they_are(trained, stripes, tmp_path):
    with pytest.raises(UsageError, match="no such"):
        train_proxies(tmp_path / "nowhere", out=tmp_path / "p", **TINY)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UsageError, match="is not empty and holds no proxies"):
            train_proxies(stripes, out=mine, resume=resume, **TINY)
        with pytest.raises(UsageError, match="is a file"):
            train_proxies(stripes, out=mine / "notes", resume=resume, **TINY)
    assert contents(mine) == {"notes": b"mine"}
    (mine / "notes").rename(mine / "proxies.json")
    with pytest.raises(UsageError, match="is no table of proxies, or damaged"):
        train_proxies(stripes, out=mine, resume=True, **TINY)

    before = contents(trained.folder)
    with pytest.raises(UsageError, match=r"holds 2 trained proxies already: continue with resume=True"):
        train_proxies(stripes, out=trained.folder, **TINY)
    for changes, message in (
        ({"lr": 0.5}, r"another lr \(0.02, now 0.5\)"),
        ({"epochs": 3}, r"another epochs \(2, now 3\)"),
        ({"arch": "convnet3"}, "another arch"),
        ({"seed": 1}, r"another seed \(0, now 1\)"),
        ({"images_per_class": 5}, r"another images_per_class \(None, now 5\)"),
        ({"image_size": 8}, "another image_size"),
        ({"precision": "bfloat16"}, "another precision"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            train_proxies(stripes, out=trained.folder, resume=True, **{**TINY, **changes})
        assert "\n" not in str(error.value)
    assert contents(trained.folder) == before


def test_a_run_of_other_images_is_refused(trained, stripes, tmp_path):
    (tmp_path / "train").mkdir()
    for name in CLASSES:
        (tmp_path / "train" / name).symlink_to(stripes / "test" / name)
    with pytest.raises(UsageError, match="another data"):
        train_proxies(tmp_path, out=trained.folder, resume=True, **TINY)


def test_proxies_are_loaded_frozen_fused_and_in_order(trained, toy_test):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    networks = load_proxies(trained.folder, arch="convnet3_in", **RUN)
    assert torch.equal(torch.get_rng_state(), state)
    for network, row in zip(networks, trained.proxies, strict=True):
        assert not network.training
        assert isinstance(network.blocks, FusedSequential)
        assert not any(parameter.requires_grad for parameter in network.parameters())
        plain = load_teacher(trained.folder / row.file).model
        inputs = normalize(toy_test.images, MEAN, STD)
        torch.testing.assert_close(network(inputs), plain(inputs), atol=1e-4, rtol=1e-4)
    images = torch.randn(2, 3, SIZE, SIZE, requires_grad=True)
    networks[0](images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_numbers_not_names_decide_the_order(trained, tmp_path):
    first, second = ((trained.folder / f"proxy-{number:05d}.safetensors").read_bytes() for number in (0, 1))
    (tmp_path / "proxy-100000.safetensors").write_bytes(first)
    (tmp_path / "proxy-00002.safetensors").write_bytes(second)
    (tmp_path / "proxy-00000-epoch1.safetensors").write_bytes(b"no proxy")
    found = proxies_identity(tmp_path)
    assert [row["file"] for row in found] == ["proxy-00002.safetensors", "proxy-100000.safetensors"]
    assert [row["sha256"] for row in found] == [hashlib.sha256(data).hexdigest() for data in (second, first)]
    assert {row["arch"] for row in found} == {"convnet3_in"}
    assert [row["top1"] for row in found] == [trained.proxies[1].top1, trained.proxies[0].top1]
    networks = load_proxies(tmp_path, **RUN)
    bias = load_teacher(trained.folder / "proxy-00001.safetensors").model.classifier.bias
    assert torch.equal(networks[0].classifier.bias, bias)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 32}, "takes images of 16 px, the run has 32 px"),
        ({"class_names": CLASSES[:2]}, "knows 3 classes, the run has 2"),
        ({"class_names": CLASSES[::-1]}, "has 'across' as class 0, the run has 'rising'"),
        ({"class_names": [*CLASSES[:2], "falling"]}, "has 'rising' as class 2, the run has 'falling'"),
        ({"mean": (0.5, 0.5, 0.5)}, r"normalised by \(0.485, 0.456, 0.406\).*the run's are by \(0.5, 0.5, 0.5\)"),
        ({"std": (0.25, 0.25, 0.25)}, "normalised by"),
        ({"arch": "resnet18_in"}, "is a convnet3_in, wanted resnet18_in"),
    ],
)  # fmt: skip
def test_proxies_that_do_not_fit_the_run_are_one_line_with_the_file(trained, changes, message):
    with pytest.raises(UsageError, match=message) as error:
        load_proxies(trained.folder, **{**RUN, **changes})
    assert "proxy-00000.safetensors" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_later_proxy_is_checked_too(trained, tmp_path):
    (tmp_path / "proxy-00000.safetensors").write_bytes(
        (trained.folder / "proxy-00000.safetensors").read_bytes()
    )
    other = create_model("convnet3", 3, SIZE, width=8)
    settings = {"arch_options": {"width": 8}, "class_names": CLASSES, "image_size": SIZE}
    save_teacher(tmp_path / "proxy-00001.safetensors", other, arch="convnet3", mean=MEAN, std=STD, **settings)
    assert len(load_proxies(tmp_path, **RUN)) == 2
    with pytest.raises(UsageError, match=r"proxy-00001.safetensors is a convnet3, wanted convnet3_in"):
        load_proxies(tmp_path, arch="convnet3_in", **RUN)


@pytest.mark.parametrize("call", [lambda folder: load_proxies(folder, **RUN), proxies_identity])
def test_folders_without_proxies_are_one_line(call, tmp_path):
    (tmp_path / "notes").write_text("mine")
    for folder, message in (
        (tmp_path / "nowhere", "nowhere is no folder: give one that"),
        (tmp_path / "notes", "notes is a file, not a folder of proxies"),
        (tmp_path, "holds no proxies"),
        ("", "proxies must be a path"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            call(folder)
        assert "\n" not in str(error.value)
    (tmp_path / "proxy-00000.safetensors").write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"proxy-00000.safetensors is no complete safetensors"):
        call(tmp_path)


def test_the_normalization_is_that_of_the_run(stripes, tmp_path):
    train_proxies(stripes, out=tmp_path / "p", normalization="cifar10", **{**TINY, "count": 1, "epochs": 1})
    mean, std = normalization("cifar10")
    assert len(load_proxies(tmp_path / "p", **{**RUN, "mean": mean, "std": std})) == 1
    with pytest.raises(UsageError, match="proxy-00000"):
        load_proxies(tmp_path / "p", **RUN)
