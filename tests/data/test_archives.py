from __future__ import annotations

import errno
import gzip
import io
import json
import os
import pickle
import random
import stat
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddfast.data.archives import TarSource, ZipSource
from ddfast.data.loading import load_all
from ddfast.data.opening import open_source
from ddfast.data.samples import Sample
from ddfast.data.sources import Source
from ddfast.errors import BadImage, UsageError
from tests.data.rendering import REAL_ZIP, png, small_set, write_folder, write_tar, write_zip
from tests.data.test_sources import refusal

WHOLE = small_set(3, 3) | small_set(3, 2, "test") | {"train/c1/deep/日本.png": png(5)}
WRITERS = {"zip": write_zip, "tar": write_tar}


def contents(data: str | Path, split: str = "train") -> dict[str, bytes]:
    with open_source(data, split) as source:
        return {sample.key: source.read(sample) for sample in source.samples}


@pytest.fixture(params=["zip", "tar"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


# The ImageFolder layout


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("root", ["", "./", "photos/", "my photos.v2/"])
def test_an_archive_and_a_folder_of_the_same_images_agree(
    tmp_path: Path, kind: str, split: str, root: str
) -> None:
    folder = open_source(write_folder(tmp_path / "folder", WHOLE), split)
    path = tmp_path / f"set.{kind}"
    WRITERS[kind](path, {root + name: data for name, data in WHOLE.items()})
    archive = open_source(path, split)
    assert isinstance(archive, ZipSource if kind == "zip" else TarSource)
    assert archive.samples == folder.samples
    assert archive.class_names == folder.class_names
    assert archive.counts() == folder.counts()
    assert archive.fingerprint() == folder.fingerprint()
    for sample in archive.samples:
        assert archive.read(sample) == folder.read(sample)
        assert archive.size_of(sample) == folder.size_of(sample)


def test_stored_and_deflated_members_are_read(tmp_path: Path) -> None:
    stored = write_zip(tmp_path / "a.zip", WHOLE, zipfile.ZIP_STORED)
    deflated = write_zip(tmp_path / "b.zip", WHOLE, zipfile.ZIP_DEFLATED)
    assert contents(stored) == contents(deflated)


def test_class_folders_alone_are_a_train_split_only(tmp_path: Path, kind: str) -> None:
    for number, root in enumerate(["", "outer/"]):
        path = WRITERS[kind](
            tmp_path / f"{number}.{kind}", {f"{root}a/1.png": png(), f"{root}b/1.png": png()}
        )
        assert open_source(path).class_names == ["a", "b"]
        assert "has no test split" in refusal(path, "test")


def test_clutter_is_ignored(tmp_path: Path, kind: str) -> None:
    clutter = {
        "__MACOSX/train/c0/._0.png": b"x",
        "train/.DS_Store": b"x",
        "train/c0/._0.png": b"x",
        "train/.cache/x.png": b"x",
        "train/c0/notes.txt": b"x",
        "README.md": b"x",
        "docs/": b"",
    }
    path = WRITERS[kind](tmp_path / f"set.{kind}", clutter | small_set())
    assert contents(path) == {name.removeprefix("train/"): data for name, data in small_set().items()}


def test_what_is_missing_is_said_as_for_folders(tmp_path: Path, kind: str) -> None:
    cases = {
        "no images in": {"train/a/x.txt": b"", "train/b/y.txt": b""},
        "one class only": {"train/a/1.png": png()},
        "class without images": small_set() | {"train/empty/": b""},
        "images without class folders": {"train/1.png": png()},
        "found train/": small_set(),
        "classes that the train split lacks: new": small_set()
        | {"test/new/1.png": png(), "test/c0/1.png": png()},
    }
    for number, (words, files) in enumerate(cases.items()):
        path = WRITERS[kind](tmp_path / f"{number}.{kind}", files)
        split = "test" if "found train" in words or "lacks" in words else "train"
        assert words in refusal(path, split)


def test_an_empty_archive_has_no_images(tmp_path: Path, kind: str) -> None:
    assert "no images in" in refusal(WRITERS[kind](tmp_path / f"empty.{kind}", {}))


@pytest.mark.parametrize(
    "name",
    [
        "../evil.png",
        "train/../../evil.png",
        "/etc/evil.png",
        "train\\..\\evil.png",
        "C:\\evil.png",
        "..",
        "\\x",
    ],
)
def test_members_that_point_outside_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    path = WRITERS[kind](tmp_path / f"evil.{kind}", small_set() | {name: png()})
    assert "points outside of it" in refusal(path)


def zip_link(path: Path, name: str, target: str) -> None:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, target)


def tar_link(path: Path, name: str, target: str, hard: bool = False) -> None:
    info = tarfile.TarInfo(name)
    info.type = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
    info.linkname = target
    with tarfile.open(path, "a") as archive:
        archive.addfile(info)


@pytest.mark.parametrize("target", ["../../../etc/passwd", "/etc/passwd", "../../.."])
def test_links_that_lead_outside_are_refused(tmp_path: Path, kind: str, target: str) -> None:
    path = WRITERS[kind](tmp_path / f"evil.{kind}", small_set())
    (zip_link if kind == "zip" else tar_link)(path, "train/c0/link.png", target)
    assert "link that points outside of it: train/c0/link.png" in refusal(path)


def test_links_within_are_followed_and_circles_end(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path / f"set.{kind}", small_set())
    link = zip_link if kind == "zip" else tar_link
    link(path, "train/c0/again.png", "../c1/0.png")
    link(path, "train/c0/chain.png", "again.png")
    link(path, "train/c0/ring1.png", "ring2.png")
    link(path, "train/c0/ring2.png", "ring1.png")
    link(path, "train/c0/broken.png", "nothing.png")
    found = contents(path)
    assert found["c0/again.png"] == found["c0/chain.png"] == found["c1/0.png"]
    assert not [key for key in found if "ring" in key or "broken" in key]


def test_hard_links_of_a_tar_are_named_from_its_root(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set.tar", small_set())
    tar_link(path, "train/c0/hard.png", "train/c1/1.png", hard=True)
    assert contents(path)["c0/hard.png"] == small_set()["train/c1/1.png"]


def test_archives_are_read_by_many_threads_at_once(tmp_path: Path, kind: str) -> None:
    files = {f"train/c{n % 2}/{n}.png": random.Random(n).randbytes(500 + 37 * n) for n in range(80)}
    source = open_source(WRITERS[kind](tmp_path / f"set.{kind}", files))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(source.read, list(source.samples) * 10))
    expected = [files[f"train/{sample.key}"] for sample in source.samples]
    assert read == expected * 10


def test_an_archive_closes_reopens_and_pickles(tmp_path: Path, kind: str) -> None:
    source = open_source(WRITERS[kind](tmp_path / f"set.{kind}", small_set()))
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    first = source.read(source.samples[0])
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(copy.samples[0]) == first
    copy.close()
    source.close()
    assert source.read(source.samples[0]) == first
    source.close()
    after = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    assert len(after) <= len(before)
    (tmp_path / f"set.{kind}").unlink()
    with pytest.raises(UsageError, match="has gone away"):
        source.read(source.samples[0])


# Damage


def test_a_zip_without_its_end_is_refused(tmp_path: Path) -> None:
    data = write_zip(tmp_path / "set.zip", small_set()).read_bytes()
    for length in (0, 10, len(data) // 2, len(data) - 5):
        (tmp_path / "cut.zip").write_bytes(data[:length])
        assert "cannot read" in refusal(tmp_path / "cut.zip")


def test_damage_inside_a_zip_member_is_a_bad_image(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        files = {f"train/c{n}/0.png": bytes(range(256)) * 4 for n in range(2)}
        path = write_zip(tmp_path / "set.zip", files, method)
        data = bytearray(path.read_bytes())
        data[45] ^= 0xFF  # within the first member's data
        path.write_bytes(data)
        source = open_source(path)
        with pytest.raises(BadImage, match="damaged in the archive"):
            source.read(source.samples[0])
        assert source.read(source.samples[1]) == files["train/c1/0.png"]


def test_a_member_that_unpacks_to_more_than_it_says_is_stopped(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", {"train/a/0.png": b"\0" * 5_000_000, "train/b/0.png": b"x"})
    data = path.read_bytes()
    size = (5_000_000).to_bytes(4, "little")
    assert data.count(size) == 2
    path.write_bytes(data.replace(size, (100).to_bytes(4, "little")))
    source = open_source(path)
    assert source.size_of(source.samples[0]) == 100
    with pytest.raises(BadImage, match="not the 100 bytes it should have"):
        source.read(source.samples[0])


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_lzma_and_bzip2_are_unpacked(tmp_path: Path, method: int) -> None:
    path = write_zip(tmp_path / "set.zip", WHOLE, method)
    assert contents(path) == contents(write_zip(tmp_path / "stored.zip", WHOLE, zipfile.ZIP_STORED))
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)
    source = open_source(path)
    first = data.index(b"train/c0/0.png")
    assert first < 60  # within the first member
    with pytest.raises(BadImage, match="damaged in the archive"):
        source.read(next(sample for sample in source.samples if sample.key == "c0/0.png"))


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_an_lzma_or_bzip2_member_larger_than_it_says_is_stopped(tmp_path: Path, method: int) -> None:
    files = {"train/a/0.png": b"\0" * 5_000_000, "train/b/0.png": b"x"}
    path = write_zip(tmp_path / "set.zip", files, method)
    path.write_bytes(
        path.read_bytes().replace((5_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    )
    source = open_source(path)
    with pytest.raises(BadImage, match="not the 100 bytes it should have"):
        source.read(source.samples[0])


def with_method(path: Path, method: int, flags: int = 0) -> Path:
    """The zip with another method and more flags in the central directory's entries."""
    data = bytearray(path.read_bytes())
    place = 0
    while (place := data.find(b"PK\x01\x02", place)) >= 0:
        data[place + 8] |= flags
        data[place + 10 : place + 12] = method.to_bytes(2, "little")
        place += 4
    path.write_bytes(data)
    return path


def test_what_python_cannot_unpack_gives_the_packings_name(tmp_path: Path) -> None:
    for method, words in ((9, "packed with Deflate64"), (98, "packed with PPMd"), (77, "an unknown method")):
        path = with_method(write_zip(tmp_path / f"{method}.zip", small_set(), zipfile.ZIP_STORED), method)
        source = open_source(path)
        with pytest.raises(BadImage, match=rf"{words} \(zip method {method}\); wanted stored, deflate"):
            source.read(source.samples[0])
    path = with_method(write_zip(tmp_path / "set.zip", small_set(), zipfile.ZIP_STORED), 0, flags=1)
    source = open_source(path)
    with pytest.raises(BadImage, match="encrypted"):
        source.read(source.samples[0])


def test_a_python_without_lzma_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write_zip(tmp_path / "set.zip", small_set(), zipfile.ZIP_LZMA))
    monkeypatch.setitem(sys.modules, "lzma", None)
    with pytest.raises(BadImage, match="packed with LZMA, which this Python was built without"):
        source.read(source.samples[0])


def renamed_in_zip(path: Path, names: list[bytes], system: int = 3) -> Path:
    """A zip of one image for each name, stored byte for byte and without the flag of UTF-8."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            info = zipfile.ZipInfo(chr(ord("A") + number) * len(name))
            info.create_system = system
            archive.writestr(info, png(number))
    data = path.read_bytes()
    for number, name in enumerate(names):
        data = data.replace(bytes([ord("A") + number]) * len(name), name)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("names", "system", "classes"),
    [
        (["train/café/1.png".encode(), "train/日本/11.png".encode()], 3, ["café", "日本"]),
        ([b"train/caf\x82/1.png", b"train/tea/111.png"], 3, ["café", "tea"]),
        ([b"train\\cat\\1.png", b"train\\doggy\\1.png"], 0, ["cat", "doggy"]),
    ],
)
def test_zip_names_without_the_flag_are_read_as_they_were_meant(
    tmp_path: Path, names: list[bytes], system: int, classes: list[str]
) -> None:
    source = open_source(renamed_in_zip(tmp_path / "set.zip", names, system))
    assert source.class_names == classes
    assert [source.read(sample) for sample in source.samples] == [png(0), png(1)]


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set.tar", {f"pool/{n}/{i}.png": png(i) for n in "ab" for i in range(2)})
    with tarfile.open(path, "a") as archive:
        for name, target in (("train/cat", "../pool/a"), ("train/dog", "../pool/b"), ("train/cat/up", "..")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    assert contents(path) == {f"{c}/{i}.png": png(i) for c in ("cat", "dog") for i in range(2)}


def test_of_two_zip_members_with_one_name_the_last_counts(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", small_set())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("train/c0/0.png", b"newer")
    assert contents(path)["c0/0.png"] == b"newer"


def test_a_zip_with_something_in_front_is_read(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", small_set())
    path.write_bytes(b"#!/bin/sh self-extracting stub\n" + path.read_bytes())
    assert contents(path) == {name.removeprefix("train/"): data for name, data in small_set().items()}


def test_a_zip_needs_no_zip_in_its_name(tmp_path: Path) -> None:
    assert len(open_source(write_zip(tmp_path / "photos.bin", small_set()))) == 4


def test_a_damaged_tar_is_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    data = bytearray(write_tar(tmp_path / "set.tar", small_set()).read_bytes())
    first_body = 512
    second_header = first_body + -(-len(small_set()["train/c0/0.png"]) // 512) * 512
    for place in (0, second_header):
        broken = bytearray(data)
        broken[place : place + 300] = b"\xaa" * 300
        (tmp_path / "broken.tar").write_bytes(broken)
        message = refusal(tmp_path / "broken.tar")
        assert "damaged" in message
    for length in (100, second_header - 50, second_header + 100):
        (tmp_path / "cut.tar").write_bytes(data[:length])
        assert "cannot read" in refusal(tmp_path / "cut.tar")


def test_a_tar_that_ends_behind_a_file_is_read_and_told(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "set.tar", small_set()).read_bytes()
    assert open_source(tmp_path / "set.tar").notes() == []
    blocks = -(-len(data.rstrip(b"\0")) // 512)
    (tmp_path / "cut.tar").write_bytes(data[: 512 * blocks])
    source = open_source(tmp_path / "cut.tar")
    assert len(source) == len(small_set())
    [note] = source.notes()
    assert "cut.tar ends without the zeros that close a tar" in note


def test_a_compressed_or_foreign_tar_is_refused(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "set.tar", small_set()).read_bytes()
    (tmp_path / "zipped.tar").write_bytes(gzip.compress(plain))
    assert "not an uncompressed tar" in refusal(tmp_path / "zipped.tar")
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(plain))
    assert "wanted a folder, a .zip or an uncompressed .tar" in refusal(tmp_path / "set.tar.gz")
    (tmp_path / "text.tar").write_bytes(b"hello" * 300)
    assert "not an uncompressed tar" in refusal(tmp_path / "text.tar")


@pytest.mark.parametrize("read_before", [False, True])
def test_an_archive_that_changes_while_it_is_in_use_ends_the_run(
    tmp_path: Path, kind: str, read_before: bool
) -> None:
    # Quarantining what was cut off would give the run another result.
    path = WRITERS[kind](tmp_path / f"set.{kind}", small_set())
    source = open_source(path)
    if read_before:
        source.read(source.samples[0])
    size = path.stat().st_size
    os.truncate(path, 100)
    with pytest.raises(
        UsageError, match=f"changed since it was listed: it had {size} bytes and has 100; put"
    ) as e:
        source.read(source.samples[-1])
    assert not isinstance(e.value, BadImage)


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddfast.data.archives._MOST_OPEN", 3)
    for number in range(12):
        write_tar(tmp_path / f"s{number:02d}.tar", {f"c{n}/{number}.png": png(number + n) for n in range(2)})
    source = open_source(str(tmp_path / "s{00..11}.tar"))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    wanted = [png(int(s.key[3:-4]) + s.label) for s in source.samples]
    most = 0

    def read(sample: Sample) -> bytes:
        nonlocal most
        data = source.read(sample)
        if os.path.isdir("/proc/self/fd"):
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
        return data

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, [*source.samples] * 10)) == wanted * 10
    assert most <= 3 + 4 + 4  # kept open, being read, and the listings of /proc/self/fd themselves
    source.close()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("failing", ["open", "pread"])
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE])
def test_a_failure_of_the_machine_is_no_fault_of_the_file(
    tmp_path: Path, kind: str, failing: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(WRITERS[kind](tmp_path / f"set.{kind}", small_set()))

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(
        UsageError, match=f"{os.strerror(code).lower()}; resume when that is mended"
    ) as caught:
        source.read(source.samples[0])
    assert not isinstance(caught.value, BadImage)


def opened_or_reason(path: Path) -> Source | str:
    """The source, or why there is none. Every other exception fails the test."""
    try:
        return open_source(path)
    except UsageError as error:
        return str(error)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    paired=st.booleans(),
    edits=st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 3000),
)
def test_a_mutated_archive_is_read_or_refused(
    tmp_path: Path, kind: str, paired: bool, edits: list[tuple[int, int]], cut: int
) -> None:
    files = (
        {"0.png": png(), "0.cls": b"1", "1.png": png(1), "1.json": b'{"label": 0}'} if paired else small_set()
    )
    path = tmp_path / f"set.{kind}"
    WRITERS[kind](path, files)
    data = bytearray(path.read_bytes())
    for place, value in edits:
        data[place % len(data)] = value
    path.write_bytes(data[: len(data) - cut] if cut % 4 == 0 else data)
    source = opened_or_reason(path)
    if isinstance(source, str):
        assert source
        assert "\n" not in source
        return
    images, labels, bad = load_all(source, 4, workers=0)
    assert len(images) + len(bad) == len(source)
    assert len(labels) == len(images)


# WebDataset


def pairs(count: int = 4, first: int = 0, folder: str = "") -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for n in range(first, first + count):
        files[f"{folder}{n:04d}.jpg"] = png(n)
        files[f"{folder}{n:04d}.cls"] = str(n % 3).encode()
    return files


def test_pairs_of_image_and_number(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", pairs()))
    assert source.class_names == ["0", "1", "2"]
    assert [(s.key, s.label) for s in source.samples] == [
        ("0/0000.jpg", 0),
        ("0/0003.jpg", 0),
        ("1/0001.jpg", 1),
        ("2/0002.jpg", 2),
    ]
    assert source.read(source.samples[1]) == png(3)


def test_numbers_sort_as_numbers(tmp_path: Path) -> None:
    files = {
        f"{n}.{ending}": data
        for n in range(12)
        for ending, data in (("png", png(n)), ("cls", str(n).encode()))
    }
    source = open_source(write_tar(tmp_path / "a.tar", files))
    assert source.class_names == [f"{n:02d}" for n in range(12)]
    assert [s.key for s in source.samples][10] == "10/10.png"


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_a_names_file_gives_the_classes_of_an_imagefolder(tmp_path: Path, place: str) -> None:
    names = b"zebra\ncat\nowl\n"
    files = pairs() | ({"classes.txt": names} if place == "inside" else {})
    if place == "beside":
        (tmp_path / "classes.txt").write_bytes(names)
    source = open_source(write_tar(tmp_path / "a.tar", files))
    folder = open_source(
        write_folder(
            tmp_path / "folder",
            {f"train/{('zebra', 'cat', 'owl')[n % 3]}/{n:04d}.jpg": png(n) for n in range(4)},
        )
    )
    assert source.class_names == ["cat", "owl", "zebra"]
    assert source.samples == folder.samples
    assert source.fingerprint() == folder.fingerprint()


@pytest.mark.parametrize(
    "records",
    [
        [{"label": 0}, {"label": 1}],
        [{"label": "0"}, {"label": "1"}],
        [{"cls": 0, "width": 3}, {"cls": 1}],
        [{"label": 1, "label_name": "0"}, {"label": 0, "label_name": "1"}],
    ],
)
def test_pairs_of_image_and_json(tmp_path: Path, records: list[dict[str, object]]) -> None:
    files: dict[str, bytes] = {}
    for n, record in enumerate(records):
        files |= {f"k{n}.png": png(n), f"k{n}.json": json.dumps(record).encode()}
    source = open_source(write_tar(tmp_path / "a.tar", files))
    assert [(s.key, s.label) for s in source.samples] == [("0/k0.png", 0), ("1/k1.png", 1)]


def test_json_beside_images_in_class_folders_is_no_label(tmp_path: Path) -> None:
    files = small_set() | {"train/c0/0.json": b'{"label": 5}'}
    assert open_source(write_tar(tmp_path / "a.tar", files)).class_names == ["c0", "c1"]


def test_splits_of_pairs(tmp_path: Path) -> None:
    files = pairs(folder="train/") | {"val/9.png": png(9), "val/9.cls": b"2"}
    path = write_tar(tmp_path / "a.tar", files)
    test = open_source(path, "test")
    assert test.class_names == open_source(path).class_names == ["0", "1", "2"]
    assert [(s.key, s.label) for s in test.samples] == [("2/9.png", 2)]
    assert "has no test split" in refusal(write_tar(tmp_path / "b.tar", pairs()), "test")


def test_names_of_pairs_may_hold_a_slash(tmp_path: Path) -> None:
    files = {"0.png": png(1), "0.cls": b"0", "1.png": png(2), "1.cls": b"1"}
    source = open_source(write_tar(tmp_path / "a.tar", files | {"classes.txt": b"T-shirt/top\n../coat\n"}))
    assert source.class_names == ["../coat", "T-shirt/top"]
    assert {s.key: s.label for s in source.samples} == {"T-shirt-top/0.png": 1, "..-coat/1.png": 0}


def test_only_the_image_named_by_its_key_is_a_sample(tmp_path: Path) -> None:
    files = pairs() | {"0000.mask.png": png(50), "0001.depth.tif": b"x"}
    assert len(open_source(write_tar(tmp_path / "a.tar", files))) == 4


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"x.jpg": png()}, "has no label for x.jpg: wanted a class number or name in x.cls"),
        ({"x.jpg": png(), "x.cls": b""}, "has no label for x.jpg"),
        ({"x.jpg": png(), "x.json": b"[]"}, "has no label for x.jpg"),
        ({"x.jpg": png(), "x.json": b"{" * 50}, "has no label for x.jpg"),
        ({"x.jpg": png(), "x.json": b'{"label": -1}'}, "has no label for x.jpg"),
        ({"x.jpg": png(), "x.json": b'{"label": true}'}, "has no label for x.jpg"),
        ({"x.jpg": png(), "x.cls": b"-1"}, "has no label for x.jpg"),
        ({"x.jpg": png(), "x.cls": b"a\0b"}, "an empty class name or one with NUL"),
        ({"classes.txt": b"one\ntwo\n"}, "has 2 lines, but class number 2 occurs"),
    ],
)
def test_labels_that_are_missing_or_make_no_sense(
    tmp_path: Path, extra: dict[str, bytes], words: str
) -> None:
    assert words in refusal(write_tar(tmp_path / "a.tar", pairs() | extra))


@pytest.mark.parametrize(
    "pattern", ["s-{000..002}.tar", "s-*.tar", "s-00[0-2].tar", "s-{000,001,002}.tar", "{s,}-00?.tar"]
)
def test_shards_by_pattern_are_one_source(tmp_path: Path, pattern: str) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"s-{shard:03d}.tar", pairs(4, 4 * shard))
    if pattern.startswith("{s,}"):
        write_tar(tmp_path / "-009.tar", pairs(1, 90))
    source = open_source(f"{tmp_path}/{pattern}")
    assert len(source) == (13 if pattern.startswith("{s,}") else 12)
    for sample in source.samples:
        assert source.read(sample) == png(int(Path(sample.key).stem))


def test_shards_of_the_imagefolder_layout(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", {f"train/c{shard}/x{n}.png": png(n) for n in range(2)})
    source = open_source(f"{tmp_path}/{{0..1}}.tar")
    assert [s.key for s in source.samples] == ["c0/x0.png", "c0/x1.png", "c1/x0.png", "c1/x1.png"]


def test_a_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pairs())
    write_tar(tmp_path / "1.tar", pairs())
    assert "has 0000.jpg twice; names must be unique over all shards" in refusal(f"{tmp_path}/{{0..1}}.tar")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{0..2}.tar", "no such shard: "),
        ("x*.tar", "no shard matches "),
        ("{5..2}.tar", "must run upwards"),
        ("{0..99999999999}.tar", "must run upwards, to at most 1000000 shards"),
        ("{0..9999}{0..9999}.tar", "at most 1000000 shards"),
        ("*.zip", "shards must be uncompressed .tar files"),
    ],
)
def test_shard_patterns_that_name_nothing(tmp_path: Path, pattern: str, words: str) -> None:
    write_tar(tmp_path / "0.tar", pairs())
    write_zip(tmp_path / "0.zip", small_set())
    assert words in refusal(f"{tmp_path}/{pattern}")


def test_a_sparse_tar_member_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("train/c0/s.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "512"}
    info.size = 512
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"0\n".ljust(512, b"\0")))
    assert "a sparse file" in refusal(tmp_path / "a.tar")


@pytest.mark.skipif(not REAL_ZIP.exists(), reason=f"{REAL_ZIP.name} is not beside the checkout")
def test_real_images_out_of_a_real_zip(tmp_path: Path) -> None:
    with open_source(REAL_ZIP) as source:
        assert source.counts() == [5000] * 10
        first = source.samples[:100]
        images, labels, bad = load_all(source, 32, samples=first, workers=2)
        write_folder(tmp_path, {f"train/{s.key}": source.read(s) for s in (*first, source.samples[-1])})
    assert images.shape == (100, 3, 32, 32)
    assert labels.tolist() == [0] * 100
    assert bad == []
    assert images.float().mean(dim=(0, 2, 3)).min() > 60
    folder = open_source(tmp_path)
    assert [s.key for s in folder.samples[:100]] == [s.key for s in first]
    assert [s.id for s in folder.samples[:100]] == [s.id for s in first]
    again, _, _ = load_all(folder, 32, samples=folder.samples[:100], workers=0)
    assert (again == images).all()
