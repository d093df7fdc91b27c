"""A distilled set trains as it is, shows what it is, and goes to Hugging Face with the names of its labels."""

import base64
import copy
import io
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import ddfast
from ddfast.cli import main
from ddfast.errors import UsageError
from ddfast.models import create_model
from ddfast.output import Distilled, DistilledSet, export_huggingface
from tests.output.made import MEAN, STD, write_made
from tests.output.test_distilled import CLASSES, pixels, write_set


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, toy_folder, toy_teacher):
    out = tmp_path_factory.mktemp("distilled") / "set"
    return ddfast.distill("random", data=toy_folder, teacher=toy_teacher, ipc=10, out=out, quiet=True)


def test_five_lines_train_a_network_on_it(distilled, toy_test):
    torch.manual_seed(0)
    model = create_model("convnet3", 3, 16, width=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(15):
        for images, _, soft_labels in DataLoader(DistilledSet(distilled, float=True), 10, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), soft_labels).backward()
            optimizer.step()
    with torch.no_grad():
        right = model.eval()(toy_test.images / 255).argmax(dim=1) == toy_test.labels
    assert right.float().mean() > 0.7  # a third by chance


def test_floats_are_the_bytes_over_255(tmp_path):
    root = write_set(tmp_path / "set")
    for whole, (image, _, _) in zip(DistilledSet(root), DistilledSet(root, float=True), strict=True):
        assert whole[0].dtype == torch.uint8
        assert image.dtype == torch.float32
        assert torch.equal(image, whole[0] / 255)


@pytest.mark.parametrize("space", ["normalized", "unit"])
def test_floats_of_optimised_images_are_the_stored_pixels(tmp_path, space):
    stored = write_made(tmp_path / "set", ["a", "b"], space=space)
    kept = stored.clone()
    unit = stored if space == "unit" else stored * _channels(STD) + _channels(MEAN)
    opened = DistilledSet(tmp_path / "set", float=True)
    for index in range(len(opened)):
        image = opened[index][0]
        torch.testing.assert_close(image, unit[index], rtol=0, atol=1e-6)
        image.zero_()  # what is handed out is the caller's own
    assert torch.equal(opened.pixels.images, kept)
    assert unit.max() > 1  # neither clipped ...
    assert DistilledSet(tmp_path / "set")[0][0].dtype == torch.uint8  # ... nor what is given unasked


def _channels(values):
    return torch.tensor(values).view(3, 1, 1)


def test_a_transform_takes_a_picture_or_the_floats(tmp_path):
    root = write_set(tmp_path / "set")
    picture = DistilledSet(root, transform=lambda image: image)[1][0]
    assert isinstance(picture, Image.Image)
    assert np.array_equal(np.asarray(picture), pixels(0, 1).permute(1, 2, 0).numpy())
    normalize = v2.Normalize([0.5, 0.4, 0.3], [0.25, 0.2, 0.1])
    image = DistilledSet(root, normalize, float=True)[1][0]
    wanted = (pixels(0, 1) / 255 - _channels([0.5, 0.4, 0.3])) / _channels([0.25, 0.2, 0.1])
    torch.testing.assert_close(image, wanted)


def test_classes_and_targets_are_those_of_torchvision(tmp_path):
    opened = DistilledSet(write_set(tmp_path / "set"))
    folder = ImageFolder(opened.root / "train")
    assert opened.targets == folder.targets == [0, 0, 1, 1, 2, 2]
    assert opened.classes == CLASSES
    assert opened.class_to_idx == {name: label for label, name in enumerate(CLASSES)}
    assert opened.labels.tolist() == opened.targets


def test_its_repr_says_what_it_is(tmp_path):
    said = repr(DistilledSet(write_set(tmp_path / "set")))
    for word in ("infoutil", "6 images", "3 classes", "16 px", "soft", str(tmp_path / "set")):
        assert word in said
    assert len(said.splitlines()) <= 2
    write_made(tmp_path / "made", ["a", "b"])
    said = repr(DistilledSet(tmp_path / "made"))
    for word in ("made_up", "4 images", "2 classes", "float32 pixels", "hard labels"):
        assert word in said


def test_a_notebook_shows_the_mosaic(tmp_path):
    root = write_set(tmp_path / "<b>")
    opened = DistilledSet(root)
    assert _picture(opened._repr_html_()) == (root / "mosaic.png").read_bytes()
    assert "/<b>" not in opened._repr_html_()
    (root / "mosaic.png").unlink()
    drawn = Image.open(io.BytesIO(_picture(opened._repr_html_())))
    assert drawn.width > 2 * 96  # two images a class


def _picture(page):
    return base64.b64decode(re.search('src="data:image/png;base64,([^"]+)"', page)[1])


def test_what_distill_returns_is_a_path_that_shows_its_set(distilled):
    folder = Path(str(distilled))
    assert isinstance(distilled, Distilled)
    assert isinstance(distilled, Path)
    assert distilled == folder
    assert folder == distilled
    assert hash(distilled) == hash(folder)
    assert {folder: 1}[distilled] == 1
    assert os.fspath(distilled) == str(folder)
    assert Path(distilled) == folder
    assert Path("/a") / distilled == folder
    assert f"{distilled}" == str(folder)
    assert sorted([distilled, folder / "a"]) == [folder, folder / "a"]
    assert json.loads((distilled / "manifest.json").read_text())["ipc"] == 10
    assert distilled.is_dir()
    for derived in (
        *(distilled / "train", distilled.parent, distilled.path, distilled.resolve()),
        *(distilled.with_name("x"), *distilled.iterdir(), distilled.relative_to(distilled.parent)),
    ):
        assert isinstance(derived, Path)
        assert not isinstance(derived, Distilled)
    assert distilled.path == folder
    assert len(distilled.set) == 30
    assert distilled.set is distilled.set
    assert distilled.report == folder / "report.html"
    assert distilled.report.is_file()
    assert _picture(distilled._repr_html_()) == (folder / "mosaic.png").read_bytes()
    for same in (copy.copy(distilled), copy.deepcopy(distilled), pickle.loads(pickle.dumps(distilled))):
        assert same == distilled
        assert len(same.set) == 30


def test_an_unfinished_folder_has_a_path_and_no_set(tmp_path, toy_folder):
    out = ddfast.distill("random_hard", data=toy_folder, ipc=1, out=tmp_path / "o", until="score", quiet=True)
    assert out == tmp_path / "o"
    assert "unfinished" in out._repr_html_()
    with pytest.raises(UsageError, match="unfinished"):
        out.set  # noqa: B018


# Hugging Face ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [None, 2])
def test_huggingface_reads_class_names_images_and_soft_labels(tmp_path, monkeypatch, top_k):
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    from datasets import ClassLabel, load_dataset

    opened = DistilledSet(write_set(tmp_path / "set", top_k=top_k))
    folder = export_huggingface(opened.root, tmp_path / "hub", images_per_file=4)
    assert sorted(path.name for path in (folder / "data").iterdir()) == [
        *("train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
    ]
    found = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(found.features["label"], ClassLabel)
    assert found.features["label"].names == CLASSES
    assert found["label"][:] == opened.targets
    assert found["label_name"][:] == [CLASSES[label] for label in opened.targets]
    for (image, _, soft), row in zip(opened, found, strict=True):
        assert np.array_equal(np.asarray(row["image"]), image.permute(1, 2, 0).numpy())
        assert row["soft_label"] == soft.tolist()


def test_the_card_says_what_it_is_and_how_it_is_loaded(tmp_path):
    card = (export_huggingface(write_set(tmp_path / "set"), tmp_path / "hub") / "README.md").read_text(
        "utf-8"
    )
    assert card.startswith("---\nlicense: other\n")
    for said in ("infoutil", "IPC 2", "dög & fox", "load_dataset", "data/train-*.parquet", "n<1K"):
        assert said in card
    assert "inherits that of the data" in card


def test_optimised_pixels_and_hard_labels_go_along(tmp_path):
    write_made(tmp_path / "set", ["same", "same", "other"])
    folder = export_huggingface(tmp_path / "set", tmp_path / "hub")
    for name in ("pixels.safetensors", "manifest.json"):
        assert (folder / name).read_bytes() == (tmp_path / "set" / name).read_bytes()
    schema = pq.read_schema(next((folder / "data").iterdir()))
    assert schema.names == ["image", "label", "label_name"]
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["names"] == ["same (0)", "same (1)", "other"]  # a ClassLabel takes no name twice


def test_export_to_huggingface_from_the_command_line(tmp_path, capsys):
    root = write_set(tmp_path / "set")
    words = ["export", str(root), "--to", "huggingface", "--out", str(tmp_path / "hub")]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'hub'}\n"
    before = (tmp_path / "hub" / "README.md").read_bytes()
    assert main(words) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "hub" / "README.md").read_bytes() == before
