"""Students trained on optimised pixels."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ddfast.errors import UsageError
from ddfast.models import Teacher, create_model
from ddfast.output.distilled import DistilledSet
from ddfast.output.pixels import to_bytes
from ddfast.training import DistilledImages, evaluate, train_student
from ddfast.training.augmentation import normalize, random_crop_flip
from ddfast.training.dd_ranking import measure_accuracies
from ddfast.training.evaluation import read_distilled
from ddfast.training.mixing import StudentAugmentation
from ddfast.training.protocol import PROTOCOLS
from tests.output.made import MEAN, STD, write_made
from tests.training.conftest import CLASSES, SIZE, render

OPTIONS = {"arch": "convnet3_in", "arch_options": {"width": 8}, "quiet": True}
HARD = [name for name, rules in PROTOCOLS.items() if rules.labels == "hard"]


@pytest.fixture(scope="module")
def pictures():
    """A set of 8 bits, with hard labels."""
    rendered = render(4, seed=11)
    return DistilledImages(rendered.images, rendered.labels, CLASSES, MEAN, STD)


@pytest.fixture(scope="module")
def in_float(pictures):
    """The same values, normalised."""
    return replace(pictures, images=normalize(pictures.images, MEAN, STD))


@pytest.fixture
def folder(tmp_path):
    stored = write_made(tmp_path / "set", CLASSES, ipc=4, size=SIZE)
    return tmp_path / "set", stored


def shown(distilled, protocol="dc", index=None, seed=0):
    """What a student sees of a set."""
    made = StudentAugmentation(
        distilled, PROTOCOLS[protocol], seed=seed, autoaugment=False, device=torch.device("cpu")
    )
    return made(torch.arange(len(distilled.labels)) if index is None else index).inputs


# What students see


@pytest.mark.parametrize("space", ["normalized", "unit"])
def test_students_see_the_stored_numbers(tmp_path, space):
    stored = write_made(tmp_path, CLASSES, size=SIZE, space=space)
    seen = shown(read_distilled(tmp_path))
    assert seen.equal(stored if space == "normalized" else normalize(stored, MEAN, STD))
    rounded = shown(read_distilled(tmp_path, rounded=True))
    assert rounded.equal(normalize(to_bytes(stored, MEAN, STD, space), MEAN, STD))
    assert not torch.allclose(seen, rounded, atol=1e-3)


@pytest.mark.parametrize("space", ["normalized", "unit"])
def test_an_image_decodes_to_its_tiles_without_rounding(tmp_path, space):
    stored = write_made(tmp_path, CLASSES, size=SIZE, space=space, factor=2)
    given = stored if space == "normalized" else normalize(stored, MEAN, STD)
    decoded = read_distilled(tmp_path).decoded()
    half = SIZE // 2
    tiles = [
        given[i : i + 1, :, top : top + half, left : left + half]
        for i in range(6)
        for top in (0, half)
        for left in (0, half)
    ]
    wanted = F.interpolate(torch.cat(tiles), size=SIZE, mode="bilinear", align_corners=False)
    assert torch.allclose(decoded.images, wanted, atol=1e-6)
    assert decoded.labels.tolist() == [label for label in (0, 0, 1, 1, 2, 2) for _ in range(4)]
    # The other arm differs by the rounding of the stored images alone.
    eight = read_distilled(tmp_path, rounded=True)
    assert eight.images.equal(normalize(to_bytes(stored, MEAN, STD, space), MEAN, STD))
    assert eight.decoded().images.dtype == torch.float32


def test_tiles_are_decoded_under_every_protocol(in_float, toy_test):
    tiled = replace(in_float, factor=2)
    apart = tiled.decoded()
    assert (apart.factor, len(apart.labels)) == (1, 48)
    for protocol in ("dsa", "idc"):
        ours = train_student(tiled, toy_test, protocol=protocol, epochs=2, **OPTIONS)
        theirs = train_student(
            apart, toy_test, protocol=protocol, epochs=2, batch_size=ours.batch_size, **OPTIONS
        )
        assert ours.final_loss == theirs.final_loss
        assert ours.batch_size == 48


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if name != "rded_plain"])
def test_eight_bits_and_the_same_numbers_in_float_are_augmented_alike(pictures, in_float, protocol):
    index = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    kept = in_float.images.clone()
    for seed in range(3):
        given, wanted = (shown(one, protocol, index, seed) for one in (in_float, pictures))
        assert torch.allclose(given, wanted, atol=2e-5)
        assert given.is_contiguous(memory_format=torch.channels_last)
    assert in_float.images.equal(kept)


def test_patches_of_float_images_are_those_of_the_same_picture(pictures, in_float):
    tiled = [replace(one, factor=2) for one in (pictures, in_float)]
    assert torch.allclose(*(shown(one, "rded") for one in tiled), atol=2e-5)


def test_black_is_that_of_the_normalised_space():
    images = torch.ones(8, 3, 6, 6)
    black = torch.tensor([-2.0, -3.0, 0.5])
    draws = [torch.Generator().manual_seed(5) for _ in range(2)]
    found = random_crop_flip(images, draws[0], black=black)
    plain = random_crop_flip(images, draws[1])
    for channel in range(3):
        assert found[:, channel][plain[:, channel] == 0].unique().tolist() == [float(black[channel])]
        assert found[:, channel][plain[:, channel] == 1].unique().tolist() == [1.0]


# Training


@pytest.mark.parametrize("protocol", ["dc", "dsa", "igds"])
def test_the_same_values_train_the_same_student(pictures, in_float, toy_test, protocol):
    one, other = (
        train_student(images, toy_test, protocol=protocol, epochs=3, **OPTIONS)
        for images in (pictures, in_float)
    )
    assert other.final_loss == pytest.approx(one.final_loss, rel=1e-4)
    assert other.top1 == pytest.approx(one.top1, abs=2.5)


def test_a_folder_trains_as_its_numbers_do(folder, toy_test):
    root, stored = folder
    options = {"seeds": 1, "epochs": 2, "protocol": "dsa", **OPTIONS}
    labels = torch.arange(3).repeat_interleave(4)
    result = evaluate(root, toy_test, **options)
    assert evaluate(DistilledImages(stored, labels, CLASSES, MEAN, STD), toy_test, **options) == result
    assert evaluate(DistilledSet(root), toy_test, **options) == result
    assert (result.images, result.labels, result.protocol) == ("pixels, float32", "hard", "dsa")
    rounded = evaluate(root, toy_test, rounded=True, **options)
    eight = DistilledImages(to_bytes(stored, MEAN, STD, "normalized"), labels, CLASSES, MEAN, STD)
    assert evaluate(eight, toy_test, **options) == rounded
    assert (
        evaluate(DistilledImages(stored, labels, CLASSES, MEAN, STD), toy_test, rounded=True, **options)
        == rounded
    )
    assert json.loads(json.dumps(rounded.as_dict()))["images"] == "8 bits"


def test_a_set_of_pictures_has_nothing_to_round(pictures, toy_test):
    options = {"seeds": 1, "epochs": 1, "protocol": "dc", **OPTIONS}
    plain = evaluate(pictures, toy_test, **options)
    assert plain.images == "8 bits"
    assert evaluate(pictures, toy_test, rounded=True, **options) == plain


@pytest.mark.parametrize("factor", [1, 2])
def test_a_teacher_labels_pixels_in_its_own_normalisation(in_float, toy_test, factor):
    torch.manual_seed(0)
    model = create_model("convnet3", 3, SIZE, width=8)
    teachers = [
        Teacher(
            model=model, arch="convnet3", class_names=CLASSES, mean=mean, std=std, image_size=SIZE, sha256=""
        )
        for mean, std in ((MEAN, STD), ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    ]
    tiled = replace(in_float, factor=factor)
    assert tiled.normalized_like(teachers[0]).images is tiled.images
    moved = tiled.normalized_like(teachers[1])
    unit = tiled.images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert torch.allclose(moved.images, normalize(unit, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]), atol=1e-6)
    result = evaluate(tiled, toy_test, seeds=1, epochs=1, teacher=teachers[1], preflight=False, **OPTIONS)
    assert (result.labels, result.protocol, result.images) == ("online", "rded", "pixels, float32")


# What cannot be served


def test_a_protocol_of_soft_labels_says_which_ones_work(folder, toy_test, tmp_path):
    root, _ = folder
    for data in (toy_test, tmp_path / "there is no data"):  # before any data is opened
        for protocol in ("rded", "sre2l", "rded_plain"):
            with pytest.raises(UsageError, match="holds no soft labels: give a teacher") as found:
                evaluate(root, data, protocol=protocol, **OPTIONS)
            assert str(found.value).endswith(f"({', '.join(HARD)}); {protocol} trains on soft ones")
            assert "\n" not in str(found.value)


def test_scores_that_need_soft_labels_are_refused_before_a_student_is_trained(folder, toy_test, monkeypatch):
    from ddfast.training import dd_ranking

    monkeypatch.setattr(dd_ranking, "evaluate", lambda *_, **__: pytest.fail("a student was trained"))
    with pytest.raises(UsageError, match="holds no soft labels"):
        measure_accuracies(folder[0], [folder[0]], toy_test, arch="convnet3_in", full_accuracy=90.0)


def test_autoaugment_wants_eight_bits(folder, toy_test):
    root, _ = folder
    options = {"seeds": 1, "epochs": 1, "protocol": "dc", "autoaugment": True, **OPTIONS}
    with pytest.raises(UsageError, match=r"AutoAugment works on 8-bit images.*, or add rounded$"):
        evaluate(root, toy_test, **options)
    tiled = replace(read_distilled(root), factor=2)
    with pytest.raises(UsageError, match=r"leave autoaugment out$"):
        evaluate(tiled, toy_test, rounded=True, **options)
    assert evaluate(root, toy_test, rounded=True, **options).images == "8 bits"
