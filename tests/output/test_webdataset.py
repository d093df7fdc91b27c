from __future__ import annotations

import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from ddfast.data.archives import TarSource
from ddfast.data.decoding import decode
from ddfast.data.opening import open_source
from ddfast.errors import UsageError
from ddfast.output.distilled import DistilledSet
from ddfast.output.webdataset import export_webdataset
from tests.output.test_distilled import CLASSES, write_set


def samples_in(paths: list[Path]) -> dict[str, dict[str, bytes]]:
    """WebDataset's convention: key up to the first dot -> extension -> bytes."""
    found: dict[str, dict[str, bytes]] = defaultdict(dict)
    for path in paths:
        with tarfile.open(path) as shard:
            for info in shard:
                key, _, extension = info.name.partition(".")
                file = shard.extractfile(info)
                assert file is not None
                found[key][extension] = file.read()
    return found


@pytest.mark.parametrize(("format", "top_k"), [("png", None), ("jpeg", 2)])
def test_every_sample_is_there_with_image_label_and_soft_label(
    tmp_path: Path, format: str, top_k: int | None
) -> None:
    root = write_set(tmp_path / "set", format, top_k)
    opened = DistilledSet(root)
    paths = export_webdataset(root, tmp_path / "shards" / "x-{000..}.tar", images_per_shard=4)
    assert [path.name for path in paths] == ["x-000.tar", "x-001.tar"]
    found = samples_in(paths)
    assert list(found) == [f"{index:08d}" for index in range(6)]
    for index, files in enumerate(found.values()):
        image, label, _ = opened[index]
        assert torch.equal(decode(files["png" if format == "png" else "jpg"]), image)
        assert int(files["cls"]) == label
        record = json.loads(files["json"])
        assert record["label_name"] == CLASSES[label]
        assert record["tiles"] == opened.rows[index]["tiles"]
        assert record["temperature"] == 20.0
        soft = np.load(io.BytesIO(files["soft_label.npy"]), allow_pickle=False)
        assert soft.dtype == np.float16
        assert np.array_equal(soft, opened.stored.values[index].numpy())
        if top_k is not None:
            classes = np.load(io.BytesIO(files["classes.npy"]), allow_pickle=False)
            assert np.array_equal(classes, opened.stored.indices[index].numpy())  # type: ignore[index]
        assert len(files) == (4 if top_k is None else 5)


def test_equal_sets_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_webdataset(write_set(tmp_path / name), tmp_path / name / "one.tar")
    assert (tmp_path / "a" / "one.tar").read_bytes() == (tmp_path / "b" / "one.tar").read_bytes()


def test_the_shards_are_a_source(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    export_webdataset(root, tmp_path / "s" / "{00..}.tar", images_per_shard=2)
    source = open_source(tmp_path / "s" / "*.tar")
    assert isinstance(source, TarSource)
    assert source.class_names == sorted(CLASSES)
    assert len(source) == 6
    opened = DistilledSet(root)
    for sample in source.samples:
        index = int(sample.key.rpartition("/")[2].partition(".")[0])
        assert torch.equal(decode(source.read(sample)), opened[index][0])
        assert source.class_names[sample.label] == CLASSES[opened[index][1]]


def test_the_webdataset_library_reads_it(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    root = write_set(tmp_path / "set")
    paths = export_webdataset(root, tmp_path / "s.tar")
    opened = DistilledSet(root)
    loaded = webdataset.WebDataset(str(paths[0]), shardshuffle=False).decode("pil")
    count = 0
    for index, sample in enumerate(loaded):
        assert sample["cls"] == int(opened.labels[index])
        assert np.array_equal(np.array(sample["png"]), opened[index][0].permute(1, 2, 0).numpy())
        assert np.array_equal(sample["soft_label.npy"], opened.stored.values[index].numpy())
        count += 1
    assert count == 6


@pytest.mark.parametrize(
    ("out", "options", "words"),
    [
        ("x.zip", {}, "must be named .tar"),
        ("x.tar", {"images_per_shard": 1}, "6 shards need a number in their name"),
        ("{0..}.tar", {"images_per_shard": 0}, "at least 1, got 0"),
        ("taken.tar", {}, "exists already"),
    ],
)
def test_what_cannot_be_written_is_said(
    tmp_path: Path, out: str, options: dict[str, int], words: str
) -> None:
    root = write_set(tmp_path / "set")
    (tmp_path / "taken.tar").write_bytes(b"")
    with pytest.raises(UsageError, match=words):
        export_webdataset(root, tmp_path / out, **options)
    assert not (tmp_path / "classes.txt").exists()


def test_more_shards_than_digits(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", classes=[f"c{n}" for n in range(6)])
    with pytest.raises(UsageError, match="12 shards need more than the 1 digits"):
        export_webdataset(root, tmp_path / "{0..}.tar", images_per_shard=1)


def test_an_unfinished_set_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="not a distilled set, or an unfinished one"):
        export_webdataset(tmp_path / "empty", tmp_path / "x.tar")
