"""Images labelled by metadata.jsonl or metadata.csv, as Hugging Face's imagefolder has them."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from ddfast.data.folders import FolderSource, MetadataSource
from ddfast.data.loading import load_all
from ddfast.data.opening import open_source
from ddfast.errors import BadImage, UsageError
from tests.data.rendering import png, small_set, write_folder, write_tar, write_zip


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rows(label: str = "label", values: tuple[object, ...] = ("cat", "dog", "cat", "dog")) -> bytes:
    return lines(*({"file_name": f"{n}.png", label: value, "x": [n]} for n, value in enumerate(values)))


def images(folder: str = "train/", count: int = 4) -> dict[str, bytes]:
    return {f"{folder}{n}.png": png(n) for n in range(count)}


def refusal(root: Path, split: str = "train") -> str:
    with pytest.raises(UsageError) as caught:
        open_source(root, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("label", ["label", "label_name", "class_name"])
@pytest.mark.parametrize("folder", ["train/", ""])
def test_labels_come_from_the_rows(tmp_path: Path, label: str, folder: str) -> None:
    root = write_folder(tmp_path, images(folder) | {f"{folder}metadata.jsonl": rows(label)})
    source = open_source(root)
    assert isinstance(source, MetadataSource)
    assert source.class_names == ["cat", "dog"]
    assert [s.key for s in source.samples] == ["cat/0.png", "cat/2.png", "dog/1.png", "dog/3.png"]
    assert [source.read(s) for s in source.samples] == [png(n) for n in (0, 2, 1, 3)]
    assert source.sizes().tolist() == [len(png(n)) for n in (0, 2, 1, 3)]
    assert source.counts() == [2, 2]


def test_csv_and_folders_below(tmp_path: Path) -> None:
    table = "file_name,label\nimages/a b.png,1\nimages/sub/c.png,0\n".encode("utf-8-sig")
    files = {"train/images/a b.png": png(1), "train/images/sub/c.png": png(2), "train/metadata.csv": table}
    source = open_source(write_folder(tmp_path, files | {"train/classes.txt": b"zebra\nape\n"}))
    assert source.class_names == ["ape", "zebra"]
    assert [s.key for s in source.samples] == ["ape/images/a b.png", "zebra/images/sub/c.png"]


def test_class_numbers_sort_as_numbers_over_both_splits(tmp_path: Path) -> None:
    train = lines(*({"file_name": f"{n}.png", "label": value} for n, value in enumerate((2, 10, 2, 7))))
    test = lines({"file_name": "0.png", "label": 7}, {"file_name": "1.png", "label": 2})
    files = images() | images("test/", 2) | {"train/metadata.jsonl": train, "test/metadata.jsonl": test}
    root = write_folder(tmp_path, files)
    assert open_source(root).class_names == ["02", "07", "10"]
    source = open_source(root, "test")
    assert source.class_names == ["02", "07", "10"]
    assert source.samples.labels.tolist() == [0, 1]


def test_class_folders_come_first(tmp_path: Path) -> None:
    root = write_folder(tmp_path, small_set() | {"train/metadata.jsonl": rows()})
    assert isinstance(open_source(root), FolderSource)


def test_a_row_without_a_file_is_a_sample_that_fails(tmp_path: Path) -> None:
    root = write_folder(tmp_path, images(count=3) | {"train/metadata.jsonl": rows()})
    os.mkfifo(root / "train" / "3.png")
    (root / "train" / "0.png").unlink()
    source = open_source(root)
    loaded, labels, bad = load_all(source, 4, workers=0)
    assert len(loaded) == 2
    assert labels.tolist() == [0, 1]
    assert {sample.key: reason for sample, reason in bad} == {
        "cat/0.png": "cannot be read: no such file or directory",
        "dog/3.png": "cannot be read: not a file",
    }
    with pytest.raises(BadImage):
        source.read(source.samples[0])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "cannot read .*metadata.jsonl"),
        (b"[1]\n", "no object"),
        (b"[" * 100_000, "cannot read .*metadata.jsonl"),
        (b"\xff\xfe", "cannot read .*metadata.jsonl"),
        (lines({"label": 1}), "row 1 of .* has no file_name"),
        (lines({"file_name": 7, "label": 1}), "row 1 of .* has no file_name"),
        (lines({"file_name": "0.png"}), "row 1 of .* has no label: wanted one of label_name"),
        (lines({"file_name": "0.png", "label": -1}), "row 1 of .* has no label"),
        (lines({"file_name": "../0.png", "label": 1}), "points outside of it: ../0.png; refused"),
        (lines({"file_name": "/etc/passwd", "label": 1}), "points outside"),
        (lines({"file_name": "a\0.png", "label": 1}), "points outside"),
        (lines({"file_name": "\ud800.png", "label": 1}), "points outside"),
        (lines({"file_name": "0.png", "label": 1}, {"file_name": "./0.png", "label": 0}), "0.png twice"),
        (lines({"file_name": "0.png", "label": "a"}), "one class only"),
        (lines({"file_name": "0.png", "label": "a/b"}), "one with a slash"),
        (lines({"file_name": "0.png", "label": "a\0"}), "slash or NUL"),
        (lines({"file_name": "0.png", "label": "\ud800"}), "no valid Unicode"),
        (lines({"file_name": ".", "label": "a"}), "points outside"),
        (b"", "no images in"),
    ],
)
def test_metadata_that_makes_no_sense(tmp_path: Path, content: bytes, words: str) -> None:
    root = write_folder(tmp_path, images() | {"train/metadata.jsonl": content})
    with pytest.raises(UsageError, match=words):
        open_source(root)
    assert refusal(root)


def test_what_hugging_face_writes_is_read(tmp_path: Path) -> None:
    """Its imagefolder reads the same labels from the same file."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    root = write_folder(tmp_path / "set", images() | {"train/metadata.jsonl": rows()})
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "cache")
    )
    source = open_source(root)
    assert sorted(row["label"] for row in loaded) == [source.class_names[s.label] for s in source.samples]


# Metadata beside, above and in several folders


PARTS = {f"train/part{p}/{n}.png": png(10 * p + n) for p in (1, 2) for n in (0, 1)}
DIVIDED = "".join(f"part{p}/{n}.png,{('cat', 'dog')[n]}\n" for p in (1, 2) for n in (0, 1))
HEAD = "file_name,label\n"


def as_table(text: str) -> bytes:
    """The rows of a CSV as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, *rows = (line.split(",") for line in text.splitlines())
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: [row[n] for row in rows] for n, name in enumerate(names)}), buffer)
    return buffer.getvalue()


LAYOUTS = {
    "beside": {"train/metadata.csv": (HEAD + DIVIDED).encode()},
    "parquet": {"train/metadata.parquet": as_table(HEAD + DIVIDED)},
    "above": {"metadata.csv": (HEAD + DIVIDED.replace("part", "train/part")).encode()},
    "in each": {f"train/part{p}/metadata.csv": f"{HEAD}0.png,cat\n1.png,dog\n".encode() for p in (1, 2)},
}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_metadata_that_divides_the_folders_labels_them(tmp_path: Path, kind: str, layout: str) -> None:
    files = PARTS | LAYOUTS[layout]
    folder = write_folder(tmp_path / "set", files)
    writers = {"zip": write_zip, "tar": write_tar}
    source = open_source(folder if kind == "folder" else writers[kind](tmp_path / f"a.{kind}", files))
    assert source.class_names == ["cat", "dog"]
    assert {sample.key: source.read(sample) for sample in source.samples} == {
        f"{('cat', 'dog')[n]}/part{p}/{n}.png": png(10 * p + n) for p in (1, 2) for n in (0, 1)
    }
    assert source.fingerprint() == open_source(folder).fingerprint()


@pytest.mark.parametrize(
    "table",
    [
        HEAD + "part1/0.png,cat\npart1/1.png,cat\npart2/0.png,dog\npart2/1.png,dog\n",
        "file_name,text\npart1/0.png,a\n",
        HEAD + "elsewhere/0.png,cat\nelsewhere/1.png,dog\n",
        HEAD,
        "no table",
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_metadata_that_agrees_or_says_nothing_leaves_the_folders(
    tmp_path: Path, kind: str, table: str
) -> None:
    files = PARTS | {"train/metadata.csv": table.encode()}
    data = write_folder(tmp_path / "a", files) if kind == "folder" else write_zip(tmp_path / "a.zip", files)
    source = open_source(data)
    assert source.class_names == ["part1", "part2"]
    assert source.counts() == [2, 2]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_metadata_of_some_images_only_is_refused_with_both_readings(tmp_path: Path, kind: str) -> None:
    files = PARTS | {"train/metadata.csv": f"{HEAD}part1/0.png,cat\npart1/1.png,dog\n".encode()}
    data = write_folder(tmp_path / "a", files) if kind == "folder" else write_zip(tmp_path / "a.zip", files)
    assert "metadata that divides part1/ but has no label for part2/0.png: label every image" in refusal(data)


def test_two_metadata_files_that_disagree_are_refused(tmp_path: Path) -> None:
    files = (
        PARTS
        | LAYOUTS["beside"]
        | {"train/metadata.jsonl": lines({"file_name": "part1/0.png", "label": "hen"})}
    )
    message = refusal(write_folder(tmp_path, files))
    assert "metadata.jsonl labels part1/0.png 'hen'" in message
    assert "metadata.csv 'cat': keep one of them" in message


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_the_test_split_follows_labels_of_the_train_split(tmp_path: Path, kind: str) -> None:
    files = PARTS | LAYOUTS["beside"] | {"test/dog/0.png": png(1), "test/cat/0.png": png(2)}
    data = write_folder(tmp_path / "a", files) if kind == "folder" else write_zip(tmp_path / "a.zip", files)
    source = open_source(data, "test")
    assert [(sample.key, sample.label) for sample in source.samples] == [("cat/0.png", 0), ("dog/0.png", 1)]


def test_a_row_without_a_file_in_an_archive_is_a_sample_that_fails(tmp_path: Path) -> None:
    files = images(count=3) | {"train/metadata.jsonl": rows()}
    source = open_source(write_zip(tmp_path / "a.zip", files))
    assert source.fingerprint() == open_source(write_folder(tmp_path / "a", files)).fingerprint()
    _, _, bad = load_all(source, 4, workers=0)
    assert [(sample.key, reason) for sample, reason in bad] == [
        ("dog/3.png", "cannot be read: no such file or directory")
    ]
