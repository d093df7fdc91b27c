from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from ddfast.data.decoding import decode
from ddfast.data.loading import load_all
from ddfast.data.named_sets import NAMED_SETS, NamedSource
from ddfast.data.opening import open_source
from ddfast.errors import BadImage, UsageError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar_batch(path: Path, images: np.ndarray, labels: list[int]) -> str:
    """Write one batch in CIFAR-10's own file format and return its MD5."""
    content = pickle.dumps({"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), "labels": labels})
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A small CIFAR-10 on disk, in torchvision's format and with matching checksums."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0)
    train = pixels.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    test = pixels.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    kind = torchvision.datasets.CIFAR10
    sums = [
        [
            f"data_batch_{b + 1}",
            cifar_batch(folder / f"data_batch_{b + 1}", train[6 * b : 6 * b + 6], [b, 9, 9, 0, 5, b]),
        ]
        for b in range(5)
    ]
    monkeypatch.setattr(kind, "train_list", sums)
    monkeypatch.setattr(
        kind, "test_list", [["test_batch", cifar_batch(folder / "test_batch", test, list(range(10)))]]
    )
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))
    meta = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})
    monkeypatch.setenv("DDFAST_DATA", str(tmp_path))
    return {"train": train, "test": test}


def test_cifar10_by_name(cifar: dict[str, np.ndarray]) -> None:
    source = open_source("cifar10")
    assert isinstance(source, NamedSource)
    assert (source.name, source.split) == ("cifar10", "train")
    assert source.class_names == CLASSES
    assert len(source) == 30
    assert source.counts() == [7, 2, 2, 2, 2, 5, 0, 0, 0, 10]
    assert source.samples[0].key == "airplane/0000000.png"
    for sample in source.samples:
        index = int(Path(sample.key).stem)
        expected = torch.from_numpy(cifar["train"][index]).permute(2, 0, 1)
        assert torch.equal(decode(source.read(sample)), expected)
    test = open_source("CIFAR10", "test")
    images, labels, bad = load_all(test, 32, workers=2)
    assert torch.equal(images, torch.from_numpy(cifar["test"]).permute(0, 3, 1, 2))
    assert labels.tolist() == list(range(10))
    assert bad == []


def test_the_fingerprint_tells_the_splits_apart(cifar: dict[str, np.ndarray]) -> None:
    train, again, test = open_source("cifar10"), open_source("cifar10"), open_source("cifar10", "test")
    assert train.fingerprint() == again.fingerprint() != test.fingerprint()


def test_a_named_set_pickles(cifar: dict[str, np.ndarray]) -> None:
    with open_source("cifar10") as source:
        copy = pickle.loads(pickle.dumps(source))
    assert copy.read(copy.samples[3]) == source.read(source.samples[3])


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(UsageError, match="no images in cifar10"):
        open_source("cifar10")


@pytest.mark.parametrize(
    "error", [OSError("<urlopen error timed out>"), RuntimeError("File not found"), KeyError("data")]
)
def test_a_set_that_cannot_be_had_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setenv("DDFAST_DATA", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", failing)
    with pytest.raises(UsageError) as caught:
        open_source("cifar100")
    message = str(caught.value)
    assert message.startswith(f"cannot load cifar100 from {tmp_path}: {error}; connect to the network once")
    assert "DDFAST_DATA" in message


class OddSet:
    """The irregularities of torchvision's sets: labels elsewhere, no class list, slashes, odd modes."""

    def __init__(self, root: str, split: str, download: bool) -> None:
        assert download
        self.split = split
        self._labels = [10, 0, 0] if split == "train" else [0]
        self.classes = [f"T-shirt/top {n}" for n in range(11)] if split == "train" else None

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 2:
            raise OSError("truncated file")
        return Image.new("L" if index else "CMYK", (4, 4), 0), self._labels[index]


def test_irregular_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "SVHN", OddSet)
    source = NamedSource("svhn", "train", tmp_path)
    assert source.class_names[10] == "T-shirt/top 10"
    assert [s.key for s in source.samples] == [
        "T-shirt-top 0/0000001.png",
        "T-shirt-top 0/0000002.png",
        "T-shirt-top 10/0000000.png",
    ]
    images, labels, bad = load_all(source, 4, workers=0)
    assert labels.tolist() == [0, 10]
    assert images[0].unique().tolist() == [0]
    assert images[1].unique().tolist() == [255]
    assert [(s.key, reason) for s, reason in bad] == [
        ("T-shirt-top 0/0000002.png", "cannot be read: truncated file")
    ]
    with pytest.raises(BadImage):
        source.read(source.samples[1])
    assert NamedSource("svhn", "test", tmp_path).class_names == ["0"]


def test_every_named_set_exists_and_takes_its_arguments() -> None:
    import inspect

    for kind, train, test in NAMED_SETS.values():
        parameters = inspect.signature(getattr(torchvision.datasets, kind).__init__).parameters
        assert {"root", "download"} <= set(parameters)
        assert set(train) == set(test) <= set(parameters)
        assert train != test
