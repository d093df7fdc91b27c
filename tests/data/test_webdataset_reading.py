"""WebDataset's conventions: keys and extensions, class lists, shards of splits, archives behind one another."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from ddfast.data.opening import open_source
from tests.data.rendering import png, write_tar
from tests.data.test_sources import refusal


def pairs(
    image: str = ".png",
    label: str = ".cls",
    key: str = "{}",
    said: tuple[str, ...] = ("0", "1"),
    first: int = 0,
) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for n in range(first, first + 4):
        files[key.format(n) + image] = png(n)
        files[key.format(n) + label] = said[n % len(said)].encode()
    return files


def labels(data: str | Path, split: str = "train") -> dict[str, str]:
    """Path of every sample -> its class."""
    source = open_source(data, split)
    return {sample.key.partition("/")[2]: source.class_names[sample.label] for sample in source.samples}


@pytest.mark.parametrize(
    ("files", "ending"),
    [
        (pairs(".img.png"), ".img.png"),
        (pairs(".PNG", ".CLS"), ".PNG"),
        (pairs(".Img.JPEG", ".Cls"), ".Img.JPEG"),
        (pairs(".png", ".cls", "img.{}"), ".png"),
        (pairs(".input.png", ".cls", "v1.0.{}"), ".input.png"),
        (pairs(".png", ".cls", "00000/{}"), ".png"),
        (pairs(".png", ".cls", "a.b/{}"), ".png"),
        (pairs(said=("0\n", " 1\r\n")), ".png"),
        (pairs(said=("\ufeff0", "1")), ".png"),
        (pairs(".JPG", ".JSON", said=('{"label": 0}', '{"label": 1}')), ".JPG"),
        (pairs(".img.png") | {"0.mask.png": png(9), "1.depth.png": png(9)}, ".img.png"),
        (pairs() | {"__index__": b"0", "_gather": b"1", "0.__key__": b"0", "1.txt": b"a"}, ".png"),
    ],
)
def test_keys_and_extensions(tmp_path: Path, files: dict[str, bytes], ending: str) -> None:
    path = write_tar(tmp_path / "a.tar", files)
    found = labels(path)
    assert all(name.endswith(ending) for name in found)
    assert sorted(found.values()) == ["0", "0", "1", "1"]
    for name, label in found.items():
        assert label == str(int(name.removesuffix(ending)[-1]) % 2)
    assert open_source(path).notes() == []


def test_two_images_beside_one_label_are_refused(tmp_path: Path) -> None:
    message = refusal(write_tar(tmp_path / "a.tar", pairs(".left.png") | {"0.right.png": png()}))
    assert "0.left.png, 0.right.png beside one label: call the sample 0.img" in message


def test_some_images_without_a_json_are_named(tmp_path: Path) -> None:
    files = pairs(label=".json", said=('{"label": 0}', '{"label": 1}'))
    del files["3.json"]
    assert "has no label for 3.png" in refusal(write_tar(tmp_path / "a.tar", files))


@pytest.mark.parametrize("record", [{"caption": "x"}, {"label": 3}, {"label": "c"}, {"label": None}])
def test_sidecars_in_class_folders_leave_the_folders_the_classes(
    tmp_path: Path, record: dict[str, object]
) -> None:
    files = {}
    for label, class_name in enumerate(("cat", "dog")):
        mine = {**record, "label": label} if record.get("label") == "c" else record
        for n in range(2):
            files |= {
                f"train/{class_name}/{n}.png": png(n),
                f"train/{class_name}/{n}.txt": b"a",
                f"train/{class_name}/{n}.json": json.dumps(mine).encode(),
            }
    assert open_source(write_tar(tmp_path / "a.tar", files)).class_names == ["cat", "dog"]


def test_json_that_divides_folders_otherwise_is_webdatasets_label(tmp_path: Path) -> None:
    files = pairs(".png", ".json", "part{0}/x{0}", ('{"label": 0}', '{"label": 1}'))
    assert sorted(labels(write_tar(tmp_path / "a.tar", files)).values()) == ["0", "0", "1", "1"]


def test_shards_must_agree_on_the_class_list(tmp_path: Path) -> None:
    write_tar(tmp_path / "s0.tar", pairs() | {"classes.txt": b"cat\ndog\n"})
    write_tar(tmp_path / "s1.tar", pairs(first=4) | {"classes.txt": b"cat\r\ndog"})
    assert open_source(f"{tmp_path}/s*.tar").class_names == ["cat", "dog"]
    write_tar(tmp_path / "s1.tar", pairs(first=4) | {"classes.txt": b"dog\ncat\n"})
    message = refusal(f"{tmp_path}/s*.tar")
    assert (
        f"{tmp_path}/s0.tar/classes.txt and {tmp_path}/s1.tar/classes.txt differ in line 1, cat and dog"
        in message
    )
    write_tar(tmp_path / "s1.tar", pairs(first=4) | {"classes.txt": b"cat\ndog\nowl\n"})
    assert "have 2 and 3 lines" in refusal(f"{tmp_path}/s*.tar")
    (tmp_path / "classes.txt").write_text("cat\nhen\n")
    assert f"{tmp_path}/classes.txt differ in line 2" in refusal(f"{tmp_path}/s0.tar")


def test_archives_behind_one_another_are_one(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "a.tar", pairs()).read_bytes()
    second = write_tar(tmp_path / "b.tar", pairs(first=4)).read_bytes()
    both = tmp_path / "both.tar"
    both.write_bytes(first + second)
    source = open_source(both)
    assert len(source) == 8
    for sample in source.samples:
        assert source.read(sample) == png(int(Path(sample.key).stem))
    both.write_bytes(first + b"rubbish" * 99)
    assert len(open_source(both)) == 4
    damaged = bytearray(second)
    damaged[148:156] = b"99999999"  # the header's checksum
    both.write_bytes(first + damaged)
    assert f"damaged tar header at byte {len(first)}" in refusal(both)


def test_shards_named_after_splits_are_splits(tmp_path: Path) -> None:
    alone = open_source(write_tar(tmp_path / "train-000.tar", pairs()))
    write_tar(tmp_path / "val-000.tar", pairs(said=("1",)))
    for pattern in ("*.tar", "{train,val}-000.tar"):
        train, test = (open_source(f"{tmp_path}/{pattern}", split) for split in ("train", "test"))
        assert train.samples == alone.samples
        assert train.fingerprint() == alone.fingerprint()
        assert test.class_names == ["0", "1"]
        assert test.counts() == [0, 4]
    write_tar(tmp_path / "val-000.tar", pairs())
    assert len(open_source(tmp_path / "val-000.tar", "test")) == 4
    assert len(open_source(tmp_path / "val-000.tar")) == 4
    assert "has no test split" in refusal(tmp_path / "train-000.tar", "test")


def test_folders_in_shards_named_after_splits_count_first(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tar(
            tmp_path / f"{split}-0.tar", {f"{split}/{c}/{n}.png": png(n) for c in "ab" for n in range(2)}
        )
    for split in ("train", "test"):
        assert open_source(f"{tmp_path}/*.tar", split).counts() == [2, 2]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "*.tar.gz", "a.tar"])
def test_a_packed_tar_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name.replace("*", "a")).write_bytes(
        gzip.compress(write_tar(tmp_path / "x.tar", pairs()).read_bytes())
    )
    assert "unpack" in refusal(f"{tmp_path}/{name}")


def test_ranges_may_have_steps(tmp_path: Path) -> None:
    for n in range(4):
        write_tar(tmp_path / f"{n}.tar", pairs(first=4 * n))
    assert len(open_source(f"{tmp_path}/{{0..3..2}}.tar")) == 8


def test_a_folder_of_shards_says_how_they_are_given(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pairs())
    assert f"it holds 1 .tar, which are given as {tmp_path}/*.tar" in refusal(tmp_path)
