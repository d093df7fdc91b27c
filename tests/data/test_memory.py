"""Images in memory: what is one with files, with each other, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

import ddfast
from ddfast.data.decoding import decode, decode_fit, encode_image
from ddfast.data.labels_in_memory import distinct
from ddfast.data.loading import load_all
from ddfast.data.opening import open_source
from ddfast.data.sources import Source, described
from ddfast.errors import BadImage, UsageError
from ddfast.models import create_model, save_teacher
from ddfast.pipeline.opening import reopen
from ddfast.training.evaluation import EvaluationResult

NAMES = ["owl", "cat", "ant/bee"]


def images(count: int = 12, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def labels(count: int = 12) -> torch.Tensor:
    return torch.arange(count) * 7 % 3


def picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def rows(x: torch.Tensor, y: torch.Tensor, names: list[str] | None = None) -> datasets.Dataset:
    kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    return datasets.Dataset.from_dict(
        {"image": list(map(picture, x)), "label": y.tolist()}, features=features
    )


class Counted(Dataset[Any]):
    """(image, label) pairs that count how often each is asked for."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y, self.reads = x, y, [0] * len(x)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        self.reads[index] += 1
        return self.x[index], self.y[index]


def decoded(source: Source) -> dict[str, list[int]]:
    return {sample.key: decode(source.read(sample)).flatten().tolist() for sample in source.samples}


X, Y = images(), labels()
SAME = {
    "tensors": lambda: (X, Y),
    "arrays": lambda: (X.permute(0, 2, 3, 1).numpy(), Y.numpy()),
    "channels first": lambda: (X.numpy(), Y.tolist()),
    "float32": lambda: (X.float() / 255, Y),
    "float64": lambda: (X.permute(0, 2, 3, 1).double().numpy() / 255, Y.numpy().astype(np.float32)),
    "half": lambda: (X.float().div(255).half(), Y.int()),
    "whole numbers": lambda: (X.long(), Y[:, None].numpy()),
    "one-hot": lambda: (X, torch.nn.functional.one_hot(Y).float()),
    "strided": lambda: (images(24).mul_(0)[::2].add_(X), Y.to(torch.uint8)),
    "lists": lambda: ([picture(x) for x in X], [np.int64(y) for y in Y]),
    "objects": lambda: (list(X.numpy()), tuple(Y.tolist())),
    "pairs": lambda: [(picture(x), y) for x, y in zip(X, Y, strict=True)],
    "a list of both": lambda: [X, Y],
    "one-hot pairs": lambda: TensorDataset(X, torch.nn.functional.one_hot(Y)),
    "TensorDataset": lambda: TensorDataset(X, Y),
    "Dataset": lambda: Counted(X, Y),
    "Subset": lambda: Subset(TensorDataset(torch.cat((X * 0, X)), Y.repeat(2)), range(12, 24)),
    "ConcatDataset": lambda: ConcatDataset([TensorDataset(X[:5], Y[:5]), Counted(X[5:], Y[5:])]),
    "dicts": lambda: [{"image": x, "label": y} for x, y in zip(X, Y, strict=True)],
    "a dict of arrays": lambda: {"x_train": X, "y_train": Y, "x_test": X[:3], "y_test": Y[:3]},
    "images and labels": lambda: {"images": X, "labels": Y},
    "a dict": lambda: {"train": (X, Y), "test": (X[:3], Y[:3])},
}


@pytest.mark.parametrize("kind", SAME)
def test_equal_images_are_one_set_however_they_are_held(kind: str) -> None:
    source = open_source(SAME[kind]())
    wanted = open_source((X, Y))
    assert source.class_names == ["0", "1", "2"]
    assert source.counts() == [4, 4, 4]
    assert source.samples == wanted.samples
    assert source.fingerprint() == wanted.fingerprint()
    assert source.notes() == []
    for sample in source.samples:
        index = int(sample.key[2:9])
        assert sample.key == f"{int(Y[index])}/{index:07d}.png"
        assert torch.equal(decode(source.read(sample)), X[index])
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()


def test_what_agrees_with_a_folder_of_the_same_images(tmp_path: Path) -> None:
    source = open_source(rows(X, Y, ["ant", "bee", "cat"]))
    for sample in source.samples:
        path = tmp_path / "train" / sample.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(X[int(sample.key[-11:-4])]))
    folder = open_source(tmp_path)
    assert folder.class_names == source.class_names
    assert folder.samples == source.samples  # ids, keys and labels
    assert decoded(folder) == decoded(source)
    # Of files sizes are hashed, of images in memory their content.
    assert folder.fingerprint() != source.fingerprint()
    trained = open_source(torchvision.datasets.ImageFolder(str(tmp_path / "train")))
    assert trained.class_names == folder.class_names
    assert list(decoded(trained).values()) == list(decoded(folder).values())


def test_the_fingerprint_tells_content_labels_and_classes_apart() -> None:
    other = X.clone()
    other[7, 1, 3, 3] ^= 1
    held = [(X, Y), (other, Y), (X, Y.flip(0)), (X[:11], Y[:11]), (X.flip(0), Y), (X.transpose(2, 3), Y)]
    held += [(X.view(12, 3, 4, 16), Y), (X, [f"c{y}" for y in Y.tolist()])]
    assert len({open_source(one).fingerprint() for one in held}) == len(held)


def test_each_image_is_read_once_for_labels_and_fingerprint() -> None:
    data = Counted(X, Y)
    source = open_source(data)
    assert source.fingerprint() == source.fingerprint()
    assert data.reads == [1] * 12
    source.read(source.samples[0])
    assert sum(data.reads) == 13


def test_nothing_of_the_callers_is_changed_or_copied() -> None:
    x, y = X.float() / 255, Y.clone()
    keep = x.clone()
    hugging = rows(X, Y, ["a", "b", "c"]).with_format("torch")
    fingerprint = hugging._fingerprint
    grey = Image.new("LA", (4, 4), (7, 0))
    for data in ((x, y), hugging, [(grey, 0), (picture(X[0]), 1)]):
        source = open_source(data)
        source.fingerprint()
        load_all(source, 8, workers=2)
    assert torch.equal(x, keep)
    assert torch.equal(y, Y)
    assert hugging.format["type"] == "torch"
    assert hugging._fingerprint == fingerprint
    assert grey.mode == "LA"
    held = open_source((X, Y))._held  # type: ignore[attr-defined]
    assert held._images is X


def test_grey_transparent_and_deep_images_become_rgb_as_files_do() -> None:
    grey = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    kinds = [grey, grey[None], grey[..., None], Image.fromarray(grey), torch.from_numpy(grey)]
    kinds += [grey.astype(np.float32) / 255, np.repeat(grey[..., None], 3, axis=2)]
    source = open_source([(one, place % 2) for place, one in enumerate(kinds)])
    found = [decode(source.read(sample)) for sample in source.samples]
    assert all(torch.equal(image, torch.from_numpy(grey).expand(3, 28, 28)) for image in found)
    clear = np.dstack([np.full((4, 4, 3), 9, np.uint8), np.zeros((4, 4, 1), np.uint8)])
    bits = np.eye(4, dtype=bool)
    deep = Image.fromarray(np.full((4, 4), 0x1234, np.uint16))
    turned = Image.new("RGB", (2, 4), "red")
    turned.getexif()[0x0112] = 6
    source = open_source(([clear, bits, deep, turned], [0, 1, 0, 1]))
    found = {sample.key[2:9]: decode(source.read(sample)) for sample in source.samples}
    assert (found["0000000"] == 255).all()
    assert found["0000001"][0].tolist() == (bits * 255).tolist()
    assert (found["0000002"] == 0x12).all()
    assert found["0000003"].shape == (3, 2, 4)
    assert turned.size == (2, 4)


@pytest.mark.parametrize(("shape", "wanted"), [((3, 5, 3), (5, 3)), ((3, 3, 5), (3, 5)), ((4, 4, 3), (4, 4))])
def test_an_ambiguous_tensor_has_its_channels_first_and_an_array_last(
    shape: tuple[int, ...], wanted: tuple[int, int]
) -> None:
    image = torch.arange(np.prod(shape)).view(shape).to(torch.uint8)
    first, last = (open_source([(one, 0), (one, 1)]) for one in (image, image.numpy()))
    found = decode(first.read(first.samples[0])), decode(last.read(last.samples[0]))
    assert found[0].shape[1:] == wanted
    if shape[-1] == 3:
        assert torch.equal(found[1], image.permute(2, 0, 1))


def test_two_pairs_are_two_images() -> None:
    for pairs in (
        [(X[0], Y[0]), (X[1], Y[1])],
        ((X[0], np.int64(0)), (X[1], 1)),
        [(picture(X[0]), "0"), (X[1], "1")],
    ):
        source = open_source(pairs)
        assert [decode(source.read(s)).tolist() for s in source.samples] == [X[0].tolist(), X[1].tolist()]
    assert open_source([[picture(X[0]), X[1]], [0, 1]]).counts() == [1, 1]


def test_a_transform_of_rows_is_left_out_and_said() -> None:
    data = rows(X, Y).with_transform(lambda batch: {"image": [None] * 12, "label": batch["label"]})
    source = open_source(data)
    assert torch.equal(decode(source.read(source.samples[0])), X[0])
    assert "its transform is not applied" in source.notes()[0]


def test_class_names_and_their_order() -> None:
    def classes(data: Any, split: str = "train") -> list[str]:
        return open_source(data, split).class_names

    assert classes(rows(X, Y, NAMES)) == NAMES
    assert [s.key for s in open_source(rows(X, Y, NAMES)).samples][-1].startswith("ant-bee/")
    assert classes((X, [NAMES[y] for y in Y])) == ["ant/bee", "cat", "owl"]
    assert classes((X, Y + 9)) == ["09", "10", "11"]
    assert classes((X, Y == 1)) == ["0", "1"]
    assert classes((X, np.array(["b", "a"] * 6))) == ["a", "b"]
    twins = type("Twins", (list,), {"classes": ["crane", "crane", ("x", "y")]})(zip(X, Y, strict=True))
    assert classes(twins) == ["crane (0)", "crane (1)", "x, y"]
    some = open_source(rows(X, Y, [*NAMES, "dog"]).filter(lambda row: row["label"] != 1))
    assert some.class_names == ["owl", "ant/bee"]
    assert some.notes() == [
        "in memory: datasets.Dataset of 8 rows: left out 2 classes of 4, which have no images: cat, dog"
    ]


def test_a_test_split_has_the_classes_of_its_train_split() -> None:
    train = rows(X, Y, NAMES)
    for test in (
        rows(X[:3], torch.tensor([2, 2, 0]), NAMES),
        (X[:3], [2, 2, 0]),
        (X[:3], [NAMES[2]] * 2 + [NAMES[0]]),
    ):
        source = open_source({"train": train, "test": test}, "test")
        assert source.class_names == NAMES
        assert source.counts() == [1, 0, 2]
    other = rows(X[:3], torch.tensor([0, 0, 1]), ["cat", "owl"])
    assert open_source({"train": train, "test": other}, "test").counts() == [1, 2, 0]
    both = datasets.DatasetDict({"train": train, "validation": train.select([0]), "extra": train})
    assert open_source(both, "test").counts() == [1, 0, 0]
    assert open_source(both).counts() == [4, 4, 4]
    named = {"train": (X[:6], Y[:6] % 2), "test": other}  # the test split's names are those of the numbers
    assert open_source(named).class_names == open_source(named, "test").class_names == ["cat", "owl"]
    assert open_source({"train": (X, Y), "test": (X[:1], [2])}, "test").counts() == [0, 0, 1]
    with pytest.raises(UsageError, match=r"classes that the train split lacks: 3$"):
        open_source({"train": (X, Y), "test": (X[:1], [3])}, "test")


class Unlabelled(Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> torch.Tensor:
        return X[index]


class Broken(Unlabelled):
    def __getitem__(self, index: int) -> torch.Tensor:
        raise OSError("disk on\nfire")


PLAIN = rows(X, Y)
BAD = {
    "floats of 255": ((X.float(), Y), "image 0 holds floats from .*: wanted 0 to 1; divide them by 255"),
    "normalised": (
        (X.float() / 255 - 0.5, Y),
        r"in memory: float32 tensor \[12, 3, 8, 8\]: image 0 holds floats from -0.*give them before normalisation",
    ),
    "nan": ((X.float() * torch.nan, Y), "image 0 holds floats from nan to nan"),
    "too large": ((X.int() + 256, Y), "holds whole numbers from .*: wanted 0 to 255"),
    "complex": ((X.to(torch.complex64), Y), "is no image but complex64 values"),
    "two channels": ((X[:, :2], Y), r"image 0 has the shape \[2, 8, 8\]: wanted \[3, H, W\]"),
    "vectors": ((X.flatten(1), Y), r"images must be \[N, 3, H, W\].*got \[12, 192\]"),
    "no pixels": ((X[:, :, :0], Y), r"has the shape \[3, 0, 8\]"),
    "words": ((["a", "b"], [0, 1]), "image 0 is no image but a str"),
    "unequal": ((X, Y[:5]), "12 images and 5 labels: wanted one label for each image"),
    "negative": ((X, Y - 2), "image 0 has the label -2: class numbers count from 0"),
    "no label": ((X, Y * 0 - 1), "the label -1, which stands for none"),
    "fractions": ((X, Y + 0.5), r"image 0 has the label 0.5: wanted a class number or a class name"),
    "soft": ((X, torch.rand(12, 3)), r"labels must be \[N\] class numbers or names, got \[12, 3\]"),
    "mixed": ((X[:2], [0, "a"]), "has class numbers and class names among its labels"),
    "empty name": ((X[:2], ["", "a"]), "the label '', which is no class name"),
    "one class": ((X, Y * 0), "one class only, 0; wanted at least two"),
    "none": ((X[:0], Y[:0]), "no images"),
    "images alone": (X, r"uint8 tensor \[12, 3, 8, 8\] has no labels: give \(images, labels\)"),
    "no labels": (Unlabelled(), r"item 0 is a Tensor: wanted \(image, label\) in each"),
    "triples": ([(X[0], 0, 1)] * 3, "item 0 is a tuple of 3"),
    "broken": (Broken(), r"image 0 cannot be read \(OSError: disk on fire\)"),
    "loader": (DataLoader(TensorDataset(X, Y)), "got a DataLoader: give the Dataset that it loads"),
    "stream": (PLAIN.to_iterable_dataset(), "is streamed: give a Dataset"),
    "no image column": (PLAIN.remove_columns("image"), "no image column: wanted Image"),
    "no label column": (PLAIN.rename_column("label", "x"), "no label column: wanted ClassLabel"),
    "sparse": ((X.float().to_sparse(), Y), "is no image but a Tensor"),
    "two train splits": (
        {"train_a": (X, Y), "train_b": (X, Y)},
        "two of which may be the train split: call one",
    ),
    "keys": ({"a": (X, Y)}, r"the data have the keys a: wanted splits"),
    "test alone": ({"test": (X, Y)}, "has no train split: wanted train, found test"),
    "number": (5, "data must be a path, a name or images in memory, got an? int"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_get_one_clear_line(kind: str) -> None:
    data, message = BAD[kind]

    def read_all() -> None:
        source = open_source(data)
        source.fingerprint()

    with pytest.raises(UsageError, match=message) as caught:
        read_all()
    assert "\n" not in str(caught.value)


def test_a_label_out_of_range_and_several_label_columns() -> None:
    holder = type("Named", (list,), {"classes": ["a", "b"]})([(X[0], 0), (X[1], 2)])
    with pytest.raises(UsageError, match="image 1 has the label 2, and there are 2 classes, 0 to 1"):
        open_source(holder)
    names = datasets.ClassLabel(names=["a", "b", "c"])
    two = rows(X, Y).rename_column("label", "fine").cast_column("fine", names)
    two = two.add_column("coarse", Y.tolist()).cast_column("coarse", names)
    with pytest.raises(UsageError, match="has 2 columns of labels, fine, coarse: keep one of them"):
        open_source(two)
    assert open_source(two.remove_columns("coarse")).counts() == [4, 4, 4]


def test_data_that_change_are_told_of() -> None:
    class Noisy(Counted):
        def __getitem__(self, index: int) -> tuple[Any, Any]:
            return super().__getitem__(index)[0] ^ (self.reads[index] % 2), self.y[index]

    source = open_source(Noisy(X, Y))
    with pytest.raises(UsageError, match="image 0 is not what it was when it was first read"):
        source.read(source.samples[0])
    data = Counted(X, Y.clone())
    source = open_source(data)
    data.y[0] = 2
    with pytest.raises(UsageError, match=r"image 0 has the label .* and had 0 before"):
        source.read(source.samples[0])


def test_rows_keep_their_files_and_a_damaged_one_is_set_aside(tmp_path: Path) -> None:
    good = tmp_path / "a.png"
    good.write_bytes(encode_image(X[0]))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    files: list[Any] = [
        str(good),
        {"bytes": b"no image", "path": None},
        str(tmp_path / "gone.png"),
        str(good),
    ]
    data = datasets.Dataset.from_dict({"image": files, "label": [0, 0, 1, 1]}, features=features)
    source = open_source(data)
    assert source.read(source.samples[0]) == good.read_bytes()
    assert len(source.fingerprint()) == 32
    _, _, bad = load_all(source, 8)
    assert [reason for _, reason in bad][1] == "cannot be read: no such file or directory"
    assert len(bad) == 2
    with pytest.raises(BadImage):
        source.read(source.samples[2])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("teacher") / "t.safetensors"
    torch.manual_seed(0)
    save_teacher(
        path,
        create_model("convnet3", 3, image_size=16, width=8),
        arch="convnet3",
        arch_options={"width": 8},
        class_names=["0", "1", "2"],
        image_size=16,
        mean=[0.5] * 3,
        std=[0.25] * 3,
    )
    return path


def test_distil_and_evaluate_from_tensors(trained: Path, tmp_path: Path) -> None:
    x, y = images(30, 16), labels(30)
    given = {"ipc": 2, "factor": 1, "quiet": True, "preflight": False}
    data = {"train": (x, y), "test": (x[:9], y[:9])}
    out = ddfast.distill("rded", data=data, teacher=trained, out=tmp_path / "rded", **given)
    assert json.loads((out / "run.json").read_text("utf-8"))["data"] == described(data)
    assert (
        described(data) == "in memory: train uint8 tensor [30, 3, 16, 16], test uint8 tensor [9, 3, 16, 16]"
    )
    assert len(ddfast.DistilledSet(out)) == 6
    students = {"arch": "convnet3", "arch_options": {"width": 8}, "seeds": 1, "epochs": 1, "quiet": True}
    results = [
        ddfast.evaluate(out, test, **students).top1
        for test in (
            data,
            (x[:9], y[:9]),
            {"x_test": x[:9], "y_test": y[:9]},
            TensorDataset(x[:9] / 255, y[:9]),
        )
    ]
    assert all(result == results[0] for result in results)
    ddfast.distill("rded", data=data, teacher=trained, out=out, resume=True, **given)
    with pytest.raises(
        UsageError, match=r"the images were held in memory: train uint8 .*: give the data again"
    ):
        reopen(out)
    assert reopen(out, data=copy.deepcopy(data)).complete
    with pytest.raises(UsageError, match=r"is not what .* was started with: its content has changed"):
        reopen(out, data=(x.flip(3), y))
    with pytest.raises(UsageError, match="has classes that the distilled set lacks: dog"):
        ddfast.evaluate(out, (x[:1], ["dog"]), **students)


def test_train_a_teacher_and_proxies_from_memory(tmp_path: Path) -> None:
    x, y = images(12, 16), labels(12)
    data = {"train": TensorDataset(x, y), "test": (x[:3], y[:3])}
    teacher = ddfast.train_teacher(
        data, arch="convnet3", arch_options={"width": 4}, epochs=1, out=tmp_path / "t.safetensors", quiet=True
    )
    assert teacher.class_names == ["0", "1", "2"]
    assert teacher.top1 is not None
    assert teacher.image_size == 16
    options = {"arch": "convnet3_in", "count": 1, "epochs": 1, "out": tmp_path / "proxies", "quiet": True}
    proxies = ddfast.training.train_proxies(data, **options)
    assert proxies.proxies[0].top1 is not None


def test_a_synthesis_is_judged_on_the_test_split_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result(distilled: Any, test: Any, **options: Any) -> EvaluationResult:
        tested.append((test.images, test.labels.tolist()))
        return EvaluationResult("convnet3_in", "dsa", "hard", 1, 1, [0], [50.0], [50.0], [50.0], [50.0] * 3)

    tested: list[Any] = []
    monkeypatch.setattr("ddfast.pipeline.judging.evaluate", result)
    x, y = images(12, 8), labels(12)
    given: dict[str, Any] = {"ipc": 1, "quiet": True, "arch": "convnet3_in", "iterations": 1, "real_batch": 2}
    data = {"train": (x, y), "test": rows(x[:3], y[:3])}
    ddfast.distill("dm", data=data, out=tmp_path / "dm", evaluate_every=1, **given)
    assert torch.equal(tested[0][0], x[:3][y[:3].argsort()])
    assert tested[0][1] == [0, 1, 2]
    with pytest.raises(UsageError, match="is one split, so that all of it is train"):
        ddfast.distill("dm", data=(x, y), out=tmp_path / "other", evaluate_every=1, **given)
    assert not (tmp_path / "other").exists()


class Shuffled:
    """As a pandas Series that was reordered: places by `iloc`, the index's labels by `[...]`."""

    def __init__(self, values, index):
        self.iloc, self._index = values, index

    def __len__(self):
        return len(self.iloc)

    def __getitem__(self, label):
        return self.iloc[self._index.index(label)]


def test_images_of_a_reordered_table_are_read_by_place():
    images = [np.full((8, 8, 3), 10 * n, np.uint8) for n in range(4)]
    source = open_source((Shuffled(images, [2, 0, 3, 1]), [0, 0, 1, 1]))
    values = [int(decode_fit(source.read(sample), 8)[0, 0, 0]) for sample in source.samples]
    assert dict(zip(values, source.samples.labels.tolist(), strict=True)) == {0: 0, 10: 0, 20: 1, 30: 1}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("cat,dog", "class names must be a list"),
        (["", "dog"], "class number 0 has an empty name"),
        (["c\0t", "dog"], "give it one of valid Unicode without NUL"),
        (["\ud800", "dog"], "give it one of valid Unicode without NUL"),
        (["a", "a", "a (0)"], "two classes have the name 'a (0)'"),
    ],
)
def test_class_names_that_are_none(names, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        distinct(names)


def test_class_names_may_be_bytes():
    assert distinct(np.array([b"cat", "café".encode()])) == ["cat", "café"]
