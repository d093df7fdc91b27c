"""`.npz`, IDX files, CIFAR's own pickles and Parquet: the same images as in memory, and damaged files in one line."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision.datasets

from ddfast.data import parquet
from ddfast.data.decoding import decode, encode_image
from ddfast.data.loading import load_all
from ddfast.data.opening import open_source
from ddfast.data.sources import Source
from ddfast.errors import UsageError

DRAWN = np.random.default_rng(0)
X = DRAWN.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
Y = np.arange(9) % 3
GREY = X[..., 0]


def images(source: Source) -> dict[str, np.ndarray]:
    return {s.key: decode(source.read(s)).permute(1, 2, 0).numpy() for s in source.samples}


def same(source: Source, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether a source holds these images, with these labels."""
    numbers = {int(s.key[-11:-4]): s for s in source.samples}
    assert sorted(numbers) == list(range(len(x)))
    wanted = x if x.ndim == 4 else np.repeat(x[..., None], 3, axis=3)
    found = images(source)
    return all(np.array_equal(found[s.key], wanted[n]) and s.label == y[n] for n, s in numbers.items())


# .npz


@pytest.mark.parametrize(
    "keys",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "val_images", "val_labels"),
        ("images", "labels", "test_images", "test_labels"),
        ("X_train", "Y_train", "X_test", "Y_test"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, keys: tuple[str, ...], save: Callable[..., None]) -> None:
    path = tmp_path / "set.npz"
    save(path, **dict(zip(keys, (X, Y[:, None], X[:4], Y[:4]), strict=True)))
    train, test = open_source(path), open_source(str(path), "test")
    assert train.name == str(path)
    assert train.class_names == test.class_names == ["0", "1", "2"]
    assert same(train, X, Y)
    assert same(test, X[:4], Y[:4])
    assert train.fingerprint() == open_source((X, Y)).fingerprint()


def test_npz_with_class_names_and_a_split_alone(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, images=np.moveaxis(X, 3, 1), labels=Y, class_names=np.array(["c", "b", "a"]))
    assert open_source(path).class_names == ["c", "b", "a"]
    assert same(open_source(path), X, Y)
    with pytest.raises(UsageError, match=r"has no test split: .*found images, labels, class_names"):
        open_source(path, "test")


def save_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


class Program:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-300])
    return path


def overwritten(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[200:900] = bytes(700)
    path.write_bytes(data)
    return path


def replaced(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


BAD_NPZ = {
    "header": (lambda p: replaced(save_npz(p, images=X, labels=Y), b"(9, 32", b")9, 32"), "damaged .npz"),
    "cut": (lambda p: cut(save_npz(p, images=X, labels=Y)), "damaged .npz"),
    "overwritten": (lambda p: overwritten(save_npz(p, images=X, labels=Y)), "damaged .npz"),
    "no zip": (lambda p: p.write_bytes(b"text") and p, "damaged .npz|pickled objects"),
    "objects": (
        lambda p: save_npz(p, images=X[:1], labels=np.array([Program()], object)),
        "it holds pickled objects, which may run programs",
    ),
    "other names": (lambda p: save_npz(p, a=X, b=Y), "no images with labels: wanted x_train, .*, found a, b"),
    "images alone": (lambda p: save_npz(p, x_train=X), "no images with labels"),
    "unequal": (lambda p: save_npz(p, x=X, y=Y[:3]), "9 images and 3 labels"),
    "two of one": (lambda p: save_npz(p, x=X, images=X, y=Y), "has x and images, either of which"),
}


@pytest.mark.parametrize("kind", BAD_NPZ)
def test_a_bad_npz_gets_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = BAD_NPZ[kind]
    with pytest.raises(UsageError, match=message) as caught:
        open_source(make(tmp_path / "set.npz"))
    assert "set.npz" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


# IDX


def idx(array: np.ndarray) -> bytes:
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def write_idx(folder: Path, packed: bool = True, style: str = "{}-{}-idx{}-ubyte") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 9), ("t10k", 4)):
        for what, array in (("images", GREY[:count]), ("labels", Y[:count])):
            data = idx(array)
            name = style.format(split, what, array.ndim) + (".gz" if packed else "")
            (folder / name).write_bytes(gzip.compress(data) if packed else data)
    return folder


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "style", ["{}-{}-idx{}-ubyte", "{}-{}.idx{}-ubyte", "emnist-letters-{}-{}-idx{}-ubyte"]
)
@pytest.mark.parametrize("below", ["", "raw"])
def test_idx(tmp_path: Path, packed: bool, style: str, below: str) -> None:
    write_idx(tmp_path / below, packed, style)
    train, test = open_source(tmp_path), open_source(tmp_path, "test")
    assert train.class_names == test.class_names == ["0", "1", "2"]
    assert same(train, GREY, Y)
    assert same(test, GREY[:4], Y[:4])
    assert train.fingerprint() == open_source((torch.from_numpy(GREY), Y)).fingerprint()


@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw"])
def test_a_set_of_the_family_by_name_has_its_class_names(tmp_path: Path, below: str) -> None:
    write_idx(tmp_path / below)
    for name in ("fashion_mnist", "FashionMNIST", "fashion-mnist"):
        source = open_source(f"{name}:{tmp_path}")
        assert source.class_names == ["T-shirt/top", "Trouser", "Pullover"]
        assert same(source, GREY, Y)
    assert open_source(f"mnist:{tmp_path / below}", "test").class_names[0] == "0 - zero"


def change(folder: Path, name: str, data: bytes | None) -> Path:
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)
    return folder


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
BAD_IDX = {
    "cut": (IMAGES, gzip.compress(idx(GREY))[:-50], "cannot read .*train-images"),
    "short": (IMAGES, gzip.compress(idx(GREY)[:-1]), r"do not hold what its header says, \[9, 32, 32\]"),
    "long": (IMAGES, idx(GREY) + b"\0", r"do not hold what its header says"),
    "empty": (LABELS, b"", "not an IDX file"),
    "text": (LABELS, b"hello, this is text", "not an IDX file"),
    "header cut": (LABELS, b"\0\0\x08\x03\0\0", "do not hold what its header says"),
    "floats": (IMAGES, b"\0\0\x0d\x03" + idx(GREY)[4:], "IDX values of type 13, wanted 8, bytes"),
    "missing": (LABELS, None, "has no train split: train-labels-idx1-ubyte is missing"),
    "unequal": (LABELS, idx(Y[:5]), "9 images and 5 labels"),
    "flat": (IMAGES, idx(Y), r"images must be \[N, 3, H, W\]"),
}


@pytest.mark.parametrize("kind", BAD_IDX)
def test_a_bad_idx_file_gets_one_line(kind: str, tmp_path: Path) -> None:
    name, data, message = BAD_IDX[kind]
    change(write_idx(tmp_path), name, data)
    with pytest.raises(UsageError, match=message) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_two_sets_in_one_folder_are_refused_and_a_packed_twin_is_not_read(tmp_path: Path) -> None:
    write_idx(tmp_path, packed=False)
    (tmp_path / IMAGES).write_bytes(b"damaged")
    assert same(open_source(tmp_path), GREY, Y)
    write_idx(tmp_path, style="emnist-letters-{}-{}-idx{}-ubyte")
    with pytest.raises(UsageError, match="which may both be the test images: keep one set in a folder"):
        open_source(tmp_path)


def test_a_named_folder_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no IDX files in .*: wanted train-images-idx3-ubyte.gz"):
        open_source(f"kmnist:{tmp_path}")
    with pytest.raises(UsageError, match=r"no such folder: .*nowhere, in which mnist was to lie"):
        open_source(f"mnist:{tmp_path / 'nowhere'}")


# CIFAR's own files

TEN = ["airplane", "automobile", "bird"]


def write_cifar10(folder: Path, protocol: int = 2) -> Path:
    folder.mkdir(parents=True)
    flat = X.transpose(0, 3, 1, 2).reshape(9, -1)
    for number in range(1, 6):
        part = slice(2 * number - 2, 9 if number == 5 else 2 * number)
        batch = {"batch_label": "one", "data": flat[part], "labels": Y[part].tolist()}
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(batch, protocol))
    (folder / "test_batch").write_bytes(pickle.dumps({"data": flat[:4], "labels": Y[:4].tolist()}, protocol))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": TEN}, protocol))
    return folder


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cifar10_of_its_own_files(tmp_path: Path, protocol: int) -> None:
    folder = write_cifar10(tmp_path / "cifar-10-batches-py", protocol)
    for data in (folder, tmp_path, f"cifar10:{tmp_path}", f"CIFAR-10:{folder}"):
        train, test = open_source(data), open_source(data, "test")
        assert train.class_names == test.class_names == TEN
        assert same(train, X, Y)
        assert same(test, X[:4], Y[:4])
    assert train.samples[0].key == "airplane/0000000.png"


def test_a_pickle_that_python_2_wrote(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path / "cifar-10-batches-py")
    flat = X[:1].transpose(0, 3, 1, 2).tobytes()
    # What Python 2 and the NumPy of its time write: text and bytes are one type, `str`.
    old = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b"
        b"\x87Rq\x05(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff"
        b"\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + flat + b"tbU\x06labelsq\x08]q\tK\x01au."
    )
    (folder / "data_batch_1").write_bytes(old)
    source = open_source(folder)
    assert np.array_equal(images(source)["automobile/0000000.png"], X[0])


def test_cifar100_of_its_own_files(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    flat = X.transpose(0, 3, 1, 2).reshape(9, -1)
    for split, count in (("train", 9), ("test", 4)):
        batch = {"data": flat[:count], "fine_labels": Y[:count].tolist(), "coarse_labels": [0] * count}
        (folder / split).write_bytes(pickle.dumps(batch, 2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bear", "cup"]}, 2))
    for data in (folder, tmp_path, f"cifar100:{tmp_path}"):
        assert open_source(data).class_names == ["apple", "bear", "cup"]
        assert same(open_source(data), X, Y)
        assert same(open_source(data, "test"), X[:4], Y[:4])


BAD_CIFAR = {
    "program": (pickle.dumps({"data": Program()}), r"it asks for (os|posix|nt)\.mkdir, which is no array"),
    "builtin": (b"cbuiltins\neval\n(S'1'\ntR.", "it asks for builtins.eval"),
    "dotted": (b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.sort\x93.", "it asks for numpy.ndarray.sort"),
    "cut": (pickle.dumps({"data": X.reshape(9, -1), "labels": [0]})[:-200], "or damaged"),
    "text": (b"hello", "not one of CIFAR's own files"),
    "empty": (b"", "or damaged"),
    "a list": (pickle.dumps([1]), "not one of CIFAR's own files; copy it again"),
    "floats": (
        pickle.dumps({"data": X.reshape(9, -1) / 255, "labels": [0] * 9}),
        r"wanted data as uint8 \[N, 3072\]",
    ),
    "no labels": (pickle.dumps({"data": X.reshape(9, -1)}), "wanted labels, one for each of 9 images"),
    "missing": (None, "data_batch_2 is missing"),
    "label": (
        pickle.dumps({"data": X.reshape(9, -1), "labels": [7] * 9}),
        "has the label 7, and there are 3 classes",
    ),
}


@pytest.mark.parametrize("kind", BAD_CIFAR)
def test_a_bad_pickle_runs_nothing_and_gets_one_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, message = BAD_CIFAR[kind]
    change(write_cifar10(tmp_path / "cifar-10-batches-py"), "data_batch_2", data)
    with pytest.raises(UsageError, match=message) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


# Parquet

NAMES = ["owl", "cat", "ant"]


def hub(count: int = 9) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    files = [{"bytes": encode_image(torch.from_numpy(x).permute(2, 0, 1)), "path": None} for x in X[:count]]
    return datasets.Dataset.from_dict({"image": files, "label": Y[:count].tolist()}, features=features)


def write_hub(folder: Path, where: str = "data/{}-{:05d}-of-00002.parquet") -> Path:
    for split, count in (("train", 9), ("test", 4)):
        for part in range(2):
            path = folder / where.format(split, part)
            path.parent.mkdir(parents=True, exist_ok=True)
            hub(count).shard(2, part, contiguous=True).to_parquet(path, batch_size=2)
    return folder


@pytest.mark.parametrize("where", ["data/{}-{:05d}-of-00002.parquet", "{}-{}.parquet", "{}/{:04d}.parquet"])
def test_parquet_of_the_hubs_layout(tmp_path: Path, where: str) -> None:
    write_hub(tmp_path, where)
    for data in (tmp_path, f"{tmp_path}/**/*.parquet"):
        train, test = open_source(data), open_source(data, "test")
        assert train.class_names == test.class_names == NAMES
        assert same(train, X, Y)
        assert same(test, X[:4], Y[:4])
    assert train.samples == open_source(hub()).samples
    assert pickle.loads(pickle.dumps(train)).read(train.samples[3]) == train.read(train.samples[3])
    assert train.fingerprint() == open_source(tmp_path).fingerprint() != test.fingerprint()


def test_one_parquet_file_and_its_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    hub().to_parquet(path)
    assert same(open_source(path), X, Y)
    assert same(open_source(path, "test"), X, Y)
    before = open_source(path).fingerprint()
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 8), path)
    assert open_source(path).fingerprint() != before
    hub().to_parquet(tmp_path / "set.parquet")
    with pytest.raises(UsageError, match="has no test split"):
        open_source(tmp_path / "set.parquet", "test")


def test_parquet_by_other_tools(tmp_path: Path) -> None:
    files = [encode_image(torch.from_numpy(x).permute(2, 0, 1)) for x in X]
    pq.write_table(pa.table({"img": files, "label": [NAMES[y] for y in Y]}), tmp_path / "a.parquet")
    source = open_source(tmp_path)
    assert source.class_names == sorted(NAMES)
    (tmp_path / "b.png").write_bytes(files[0])
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "b.png"}] * 2, "label": [0, 1]}), path)
    assert open_source(path).read(open_source(path).samples[0]) == files[0]


def test_row_groups_are_held_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set.parquet"
    hub().to_parquet(path, batch_size=2)
    monkeypatch.setattr(
        parquet, "_MOST_HELD", 2 * len(open_source(path).read(open_source(path).samples[0])) + 500
    )
    source = open_source(path)
    assert same(source, X, Y)
    assert len(source._held._held) < 5  # type: ignore[attr-defined]
    assert "are read faster" in source.notes()[0]


def test_a_folder_of_images_beside_a_table_stays_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_bytes(
            encode_image(torch.from_numpy(X[0]).permute(2, 0, 1))
        )
    for place in ("train", "."):
        pq.write_table(pa.table({"score": [1]}), tmp_path / place / "scores.parquet")
        assert open_source(tmp_path).class_names == ["a", "b"]
        assert open_source(tmp_path / "train").class_names == ["a", "b"]


BAD_PARQUET: dict[str, tuple[Any, str]] = {
    "cut": (lambda p: cut(p), "not a Parquet file, or damaged"),
    "text": (lambda p: p.write_bytes(b"hello"), "not a Parquet file, or damaged"),
    "no image": (
        lambda p: pq.write_table(pa.table({"text": ["a"], "label": [0]}), p),
        "no image column: wanted Image or a column named image, found text, label",
    ),
    "numbers": (
        lambda p: pq.write_table(pa.table({"image": [1], "label": [0]}), p),
        "the column image is int64",
    ),
    "no label": (lambda p: pq.write_table(pa.table({"image": [b""], "x": [0]}), p), "no label column"),
    "null": (
        lambda p: pq.write_table(pa.table({"image": [b"", b""], "label": [0, None]}), p),
        "has the label None",
    ),
    "one class": (
        lambda p: pq.write_table(pa.table({"image": [b"", b""], "label": [1, 1]}), p),
        "one class only",
    ),
    "empty": (lambda p: hub().select([]).to_parquet(p), "no images"),
}


@pytest.mark.parametrize("kind", BAD_PARQUET)
def test_a_bad_parquet_file_gets_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    hub().to_parquet(path)
    make, message = BAD_PARQUET[kind]
    make(path)
    with pytest.raises(UsageError, match=message) as caught:
        open_source(path)
    assert "set.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_row_group_stops_with_a_line(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    hub().to_parquet(path, batch_size=2)
    source = open_source(path)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"cannot read .*set.parquet: not a Parquet file, or damaged"):
        images(source)


def test_a_set_by_name_and_folder_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(root: str, **options: Any) -> None:
        raise RuntimeError(json.dumps([root, options["download"]]))

    monkeypatch.setattr(torchvision.datasets, "SVHN", opened)
    with pytest.raises(UsageError, match=r"cannot load svhn from .*, false\]"):
        open_source(f"svhn:{tmp_path}")


def test_a_parquet_row_reads_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    inside = encode_image(torch.from_numpy(X[0]).permute(2, 0, 1))
    (tmp_path / "secret.png").write_bytes(inside)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.png").write_bytes(inside)
    paths = ["mine.png", "../secret.png", str(tmp_path / "secret.png"), "/dev/zero"]
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "label": [0, 1, 0, 1]}
    pq.write_table(pa.table(rows), tmp_path / "set" / "train.parquet")
    source = open_source(tmp_path / "set" / "train.parquet")
    _, _, bad = load_all(source, 8)
    assert [reason for _, reason in bad] == ["it names a file outside of the folder"] * 3
