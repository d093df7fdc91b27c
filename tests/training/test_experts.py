"""Experts: networks with their weights after every epoch, in a folder that a kill does not harm."""

import json
import os

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ddfast.cli import main
from ddfast.errors import UsageError
from ddfast.files import temporary_path
from ddfast.models import create_model, load_teacher
from ddfast.models.normalization import normalization
from ddfast.output.whitening import Whitening, read_whitening
from ddfast.seeding import derived_seed, generator, seeded
from ddfast.training import experts_identity, load_experts, train_experts
from ddfast.training.augmentation import normalize
from ddfast.training.differentiable import DSA, draw_one
from tests.training.conftest import CLASSES, SIZE, render

TINY = {"arch": "convnet3_in", "count": 2, "epochs": 2, "batch_size": 32, "lr": 0.02, "quiet": True}
MEAN, STD = normalization("imagenet")
RUN = {
    "class_names": CLASSES,
    "image_size": SIZE,
    "mean": MEAN,
    "std": STD,
    "arch": "convnet3_in",
    "epochs": 2,
}


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    root = tmp_path_factory.mktemp("stripes")
    for split, images in (("train", render(12, seed=0)), ("test", render(5, seed=1))):
        for number, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:04d}.png")
    return root


@pytest.fixture(scope="module")
def trained(stripes, tmp_path_factory):
    return train_experts(stripes, out=tmp_path_factory.mktemp("trained") / "experts", **TINY)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_an_expert_is_a_network_with_its_weights_after_every_epoch(trained):
    assert sorted(contents(trained.folder)) == [
        *("expert-00000.safetensors", "expert-00001.safetensors", "experts.json", "experts.md"),
        *("trajectory-00000.safetensors", "trajectory-00001.safetensors"),
    ]
    for number, row in enumerate(trained.experts):
        expert = load_teacher(trained.folder / row.file)
        held = expert.facts["training"]
        assert (held["optimizer"], held["schedule"], held["augment"]) == ("sgd", "constant", "dsa")
        assert (held["lr"], held["momentum"], held["weight_decay"]) == (0.02, 0.0, 0.0)
        assert held["seed"] == row.seed == derived_seed(0, "expert", number)
        weights = load_file(trained.folder / f"trajectory-{number:05d}.safetensors")
        with seeded(row.seed, "weights"):
            new = create_model("convnet3_in", len(CLASSES), SIZE)
        for name, parameter in expert.model.named_parameters():
            assert weights[name].shape == (3, *parameter.shape)
            assert torch.equal(weights[name][0], new.get_parameter(name))
            assert torch.equal(weights[name][2], parameter)
        assert any(not torch.equal(w[0], w[1]) and not torch.equal(w[1], w[2]) for w in weights.values())


def test_an_epoch_is_plain_sgd_on_augmented_images(stripes, tmp_path):
    """One whole batch: the step by hand, from the same order and the same augmentation."""
    train_experts(stripes, out=tmp_path / "e", **{**TINY, "count": 1, "epochs": 1, "batch_size": 36})
    seed = derived_seed(0, "expert", 0)
    weights = load_file(tmp_path / "e" / "trajectory-00000.safetensors")
    order = torch.randperm(36, generator=generator(seed, "order", 1))
    draws = generator(seed, "augmentation", 1)
    from ddfast.data import open_source
    from ddfast.training.image_sets import read_training_set

    images = read_training_set(open_source(str(stripes), "train"), SIZE, quiet=True)
    inputs = draw_one(DSA, 36, (SIZE, SIZE), draws)(normalize(images.images[order], MEAN, STD))
    model = create_model("convnet3_in", len(CLASSES), SIZE)
    model.load_state_dict({name: weight[0] for name, weight in weights.items()})
    torch.nn.functional.cross_entropy(model(inputs), images.labels[order]).backward()
    for name, parameter in model.named_parameters():
        moved = weights[name][1] - weights[name][0]
        torch.testing.assert_close(moved, -0.02 * parameter.grad, atol=2e-6, rtol=1e-3)


def test_the_table_says_what_each_reaches(trained):
    rows = json.loads((trained.folder / "experts.json").read_text())["experts"]
    assert [row["top1"] for row in rows] == [expert.top1 for expert in trained.experts]
    assert str(trained).splitlines()[-1].startswith("2 experts of convnet3_in, mean top-1 ")


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way."""


@pytest.mark.parametrize("writes", [3, 4])  # that an attempt makes; a whole epoch takes three
def test_killed_at_any_write_it_resumes_to_the_same_bytes(trained, stripes, tmp_path, monkeypatch, writes):
    out, kills = tmp_path / "e", 0
    replace = os.replace
    while kills < 40:
        renamed = [0]

        def dying(source, target, renamed=renamed):
            if renamed[0] == writes:
                temporary_path(out / "experts.json").write_bytes(b"half")
                raise Killed
            renamed[0] += 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", dying)
        try:
            train_experts(stripes, out=out, resume=True, **TINY)
            break
        except Killed:
            kills += 1
    assert kills > 3
    assert contents(out) == contents(trained.folder)


@pytest.mark.parametrize("writes", [4, 5])
def test_whitened_experts_survive_a_kill(stripes, tmp_path, monkeypatch, writes):
    settings = {**TINY, "zca": True, "images_per_class": 6}
    whole = train_experts(stripes, out=tmp_path / "whole", **settings)
    out, replace, kills = tmp_path / "e", os.replace, 0
    while kills < 40:
        left = [writes]

        def dying(source, target, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", dying)
        try:
            train_experts(stripes, out=out, resume=True, **settings)
            break
        except Killed:
            kills += 1
    monkeypatch.undo()
    assert kills > 3
    assert contents(out) == contents(whole.folder)
    whitening = read_whitening(out)
    assert load_experts(out, **{**RUN, "mean": (0, 0, 0), "std": (1, 1, 1)}).whitening is not None
    assert whitening.mean.shape == (3, SIZE, SIZE)
    assert [row["file"] for row in experts_identity(out)][2:] == ["zca.safetensors"]
    with pytest.raises(UsageError, match="trained on whitened images: give normalization='none'"):
        load_experts(out, **RUN)
    (out / "zca.safetensors").unlink()
    with pytest.raises(UsageError, match="does not belong to expert-00000"):
        load_experts(out, **{**RUN, "mean": (0, 0, 0), "std": (1, 1, 1)})


def test_whitening_takes_the_place_of_a_normalisation(stripes, trained, tmp_path):
    with pytest.raises(UsageError, match="zca takes the place of a normalisation"):
        train_experts(stripes, out=tmp_path / "e", normalization="cifar10", zca=True, **TINY)
    with pytest.raises(UsageError, match="another"):
        train_experts(stripes, out=trained.folder, resume=True, zca=True, **TINY)
    # What a run of other images left before its first epoch is not taken for this run's.
    (tmp_path / "e").mkdir()
    Whitening.fit(torch.randint(0, 256, (9, 3, SIZE, SIZE)).byte()).write(tmp_path / "e")
    (tmp_path / "e" / "experts.json").write_text((trained.folder / "experts.json").read_text())
    settings = {**TINY, "count": 1, "epochs": 1, "zca": True}
    train_experts(stripes, out=tmp_path / "e", **settings)
    train_experts(stripes, out=tmp_path / "f", **settings)
    assert contents(tmp_path / "e") == contents(tmp_path / "f")


def test_more_can_be_added_and_a_lost_trajectory_is_told(trained, stripes, tmp_path):
    for name, data in contents(trained.folder).items():
        (tmp_path / name).write_bytes(data)
    more = train_experts(stripes, out=tmp_path, resume=True, **{**TINY, "count": 3})
    assert more.experts[:2] == trained.experts
    (tmp_path / "trajectory-00001.safetensors").unlink()
    with pytest.raises(
        UsageError, match=r"trajectory-00001.safetensors is missing: delete .*expert-00001"
    ) as error:
        train_experts(stripes, out=tmp_path, resume=True, **{**TINY, "count": 3})
    assert "\n" not in str(error.value)
    (tmp_path / "trajectory-00001.safetensors").write_bytes(b"half")
    with pytest.raises(
        UsageError, match=r"trajectory-00001.safetensors is damaged .*: delete .*expert-00001"
    ):
        train_experts(stripes, out=tmp_path, resume=True, **{**TINY, "count": 3})
    (tmp_path / "expert-00001.safetensors").unlink()
    train_experts(stripes, out=tmp_path, resume=True, **{**TINY, "count": 3})  # as the message says
    for name, data in contents(trained.folder).items():
        if name.startswith(("expert-", "trajectory-")):
            assert (tmp_path / name).read_bytes() == data


def test_weights_are_read_by_epoch(trained):
    experts = load_experts(trained.folder, **RUN)
    assert (len(experts), experts.epochs) == (2, 2)
    weights = load_file(trained.folder / "trajectory-00001.safetensors")
    found = experts.weights(1, 1)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name][1]) for name in found)
    rows = experts_identity(trained.folder)
    assert [row["file"] for row in rows] == [expert.file for expert in trained.experts]
    assert len({row["trajectory"] for row in rows}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 32}, "takes images of 16 px, the run has 32 px"),
        ({"class_names": CLASSES[:2]}, "knows 3 classes, the run has 2"),
        ({"class_names": CLASSES[::-1]}, "has 'across' as class 0, the run has 'rising'"),
        ({"mean": (0.5, 0.5, 0.5)}, "normalised by"),
        ({"arch": "convnet4_in"}, "is a convnet3_in, wanted convnet4_in"),
        ({"epochs": 3}, r"has 2 epochs, the run goes to epoch 3 .*: lower max_start_epoch, or .* epochs=3"),
    ],
)  # fmt: skip
def test_experts_that_do_not_fit_the_run_are_one_line(trained, changes, message):
    with pytest.raises(UsageError, match=message) as error:
        load_experts(trained.folder, **{**RUN, **changes})
    assert "\n" not in str(error.value)


def test_a_damaged_folder_is_one_line(trained, tmp_path):
    for name, data in contents(trained.folder).items():
        (tmp_path / name).write_bytes(data)
    path = tmp_path / "trajectory-00000.safetensors"
    for damage, message in (
        (lambda: path.unlink(), "is missing"),
        (lambda: path.write_bytes(b"half"), "is damaged"),
        (lambda: save_file({"weight": torch.zeros(3, 2)}, path), "holds other weights than its expert"),
    ):
        damage()
        with pytest.raises(UsageError, match=message) as error:
            load_experts(tmp_path, **RUN)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="holds no experts"):
        load_experts(tmp_path.parent, **RUN)
    with pytest.raises(UsageError, match="is no folder"):
        experts_identity(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "convnet3"}, "convnet3 has BatchNorm.*take convnet3_in"),
        ({"arch": "resnet18"}, "resnet18 has BatchNorm"),
        ({"arch": "convnet3_inn"}, "unknown model"),
        ({"augment": "dca"}, "unknown augment 'dca'"),
        ({"count": 0}, "count must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": 1e30}, r"the loss became (nan|inf) in epoch \d: lower lr"),
    ],
)
def test_bad_settings_are_one_line(stripes, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as error:
        train_experts(stripes, out=tmp_path / "e", **{**TINY, **changes})
    assert "\n" not in str(error.value)
    if "lr" in changes:
        train_experts(stripes, out=tmp_path / "e", **{**TINY, "count": 1, "epochs": 1})


def test_the_command(stripes, tmp_path, capsys):
    words = [
        "train-experts",
        "--data",
        str(stripes),
        "--count",
        "1",
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "e"),
    ]
    assert main([*words, "--augment", "dsa-no-flip", "--images-per-class", "6", "--quiet"]) == 0
    assert "1 expert of convnet3_in, mean top-1 " in capsys.readouterr().out
    assert json.loads((tmp_path / "e" / "experts.json").read_text())["settings"]["augment"] == "dsa-no-flip"
