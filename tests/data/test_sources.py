from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddfast.data import samples
from ddfast.data.folders import FolderSource
from ddfast.data.opening import open_source
from ddfast.data.samples import sample_id
from ddfast.data.sources import EXTENSIONS
from ddfast.errors import BadImage, UsageError, shown
from tests.data.rendering import png, small_set, write_folder, write_tar, write_zip


def refusal(data: str | Path, split: str = "train") -> str:
    with pytest.raises(UsageError) as caught:
        open_source(data, split)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Ids


def test_ids_are_the_little_endian_blake2b_of_the_key() -> None:
    digest = hashlib.blake2b(b"cat/001.jpg", digest_size=8).digest()
    unsigned = sum(byte << (8 * place) for place, byte in enumerate(digest))
    assert sample_id("cat/001.jpg") == (unsigned if unsigned < 2**63 else unsigned - 2**64)


def test_an_id_is_pinned() -> None:
    assert sample_id("cat/001.jpg") == -8102364247118382180


@given(st.text(max_size=40).filter(lambda text: not re.search("[\ud800-\udfff]", text)))
def test_ids_are_signed_64_bit_and_repeatable(key: str) -> None:
    assert -(2**63) <= sample_id(key) < 2**63
    assert sample_id(key) == sample_id(key)


def test_two_keys_with_one_id_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "digest_of", lambda key: bytes([len(key)] * 8))
    assert "c0/0.png, c0/1.png share one 64-bit id" in refusal(write_folder(tmp_path, small_set()))


# Folders


def test_a_folder_with_train_and_test(tmp_path: Path) -> None:
    files = {
        "train/dog/b.png": png(1),
        "train/dog/a.JPG": png(2),
        "train/cat/deep/er/x.webp": png(3),
        "test/dog/t.png": png(4),
        "test/cat/t.png": png(5),
    }
    write_folder(tmp_path, files)
    train = open_source(tmp_path)
    assert isinstance(train, FolderSource)
    assert (train.name, train.split) == (str(tmp_path), "train")
    assert train.class_names == ["cat", "dog"]
    assert [(s.key, s.label) for s in train.samples] == [
        ("cat/deep/er/x.webp", 0),
        ("dog/a.JPG", 1),
        ("dog/b.png", 1),
    ]
    assert train.counts() == [1, 2]
    assert len(train) == 3
    for sample in train.samples:
        assert sample.id == sample_id(sample.key)
        assert train.read(sample) == files[f"train/{sample.key}"]
        assert train.size_of(sample) == len(files[f"train/{sample.key}"])
        assert train.by_id(sample.id) == sample
    test = open_source(str(tmp_path), "test")
    assert [s.key for s in test.samples] == ["cat/t.png", "dog/t.png"]
    assert test.read(test.samples[1]) == files["test/dog/t.png"]
    with pytest.raises(KeyError):
        train.by_id(0)


def test_val_serves_as_test_and_test_comes_first(tmp_path: Path) -> None:
    write_folder(tmp_path, small_set() | {"val/c0/v.png": png(), "val/c1/v.png": png()})
    assert [s.key for s in open_source(tmp_path, "test").samples] == ["c0/v.png", "c1/v.png"]
    write_folder(tmp_path, {"test/c0/t.png": png(), "test/c1/t.png": png()})
    assert [s.key for s in open_source(tmp_path, "test").samples] == ["c0/t.png", "c1/t.png"]


def test_class_folders_alone_are_a_train_split_only(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/1.png": png(), "b/1.png": png(), "readme.txt": b"hi"})
    assert open_source(tmp_path).class_names == ["a", "b"]
    assert "has no test split: wanted test/ or val/, found no split folders" in refusal(tmp_path, "test")


def test_a_missing_split_names_what_exists(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", small_set())
    assert "wanted test/ or val/, found train/" in refusal(tmp_path / "a", "test")
    write_folder(tmp_path / "b", small_set(split="val"))
    assert "has no train split: wanted train/, found val/" in refusal(tmp_path / "b")
    assert len(open_source(tmp_path / "b", "test")) == 4


def test_classes_sort_as_plain_strings_in_any_script(tmp_path: Path) -> None:
    names = ["b", "B", "10", "9", "ä", "a b", "日本", "z"]
    write_folder(tmp_path, {f"train/{name}/ü {name}.png": png(seed) for seed, name in enumerate(names)})
    source = open_source(tmp_path)
    assert source.class_names == sorted(names)
    assert source.class_names == ["10", "9", "B", "a b", "b", "z", "ä", "日本"]
    assert source.samples[-1].key == "日本/ü 日本.png"
    assert all(source.read(sample) for sample in source.samples)


def test_labels_of_a_test_split_follow_the_train_split(tmp_path: Path) -> None:
    write_folder(tmp_path, small_set(classes=3) | {"test/c2/x.png": png(), "test/c0/x.png": png()})
    test = open_source(tmp_path, "test")
    assert test.class_names == ["c0", "c1", "c2"]
    assert [s.label for s in test.samples] == [0, 2]
    assert test.counts() == [1, 0, 1]
    write_folder(tmp_path, {"test/new/x.png": png()})
    assert "classes that the train split lacks: new" in refusal(tmp_path, "test")


def test_every_extension_counts_in_any_case_and_nothing_else(tmp_path: Path) -> None:
    images = [f"i{place}{ending}" for place, ending in enumerate(EXTENSIONS)]
    images += [f"j{place}{ending.upper()}" for place, ending in enumerate(EXTENSIONS)]
    others = ["notes.txt", "labels.csv", "jpg", "x.jpg.bak", ".hidden.png", "Thumbs.db", "._x.jpg"]
    write_folder(tmp_path, {f"train/a/{name}": b"x" for name in images + others} | {"train/b/x.png": png()})
    assert [s.key for s in open_source(tmp_path).samples if s.label == 0] == sorted(
        f"a/{name}" for name in images
    )


def test_hidden_and_macos_folders_are_no_classes(tmp_path: Path) -> None:
    extra = {
        "train/.git/x.png": png(),
        "train/__MACOSX/x.png": png(),
        "train/c0/.cache/x.png": png(),
        "train/x.txt": b"",
    }
    write_folder(tmp_path, small_set() | extra)
    source = open_source(tmp_path)
    assert source.class_names == ["c0", "c1"]
    assert len(source) == 4


def test_an_image_file_with_anything_in_it_is_a_sample(tmp_path: Path) -> None:
    write_folder(tmp_path, small_set() | {"train/c0/broken.jpg": b"no image", "train/c0/empty.jpg": b""})
    source = open_source(tmp_path)
    assert source.counts() == [4, 2]
    assert source.read(source.samples[2]) == b"no image"


# Refusals


def test_no_such_data_lists_the_ways(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert message.startswith(f"no such folder or archive: {tmp_path}/nowhere; wanted a folder, a .zip, .tar")
    assert "cifar10" in message


def test_strange_names_make_one_line(tmp_path: Path) -> None:
    assert "a\\nb\\x00c" in refusal("a\nb\0c")
    assert "no such folder" in refusal("x" * 5000)
    assert "no such folder" in refusal("")
    (tmp_path / "notes.txt").write_text("hi")
    assert "wanted a folder, a .zip or an uncompressed .tar" in refusal(tmp_path / "notes.txt")


def test_an_unknown_split_is_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        open_source(tmp_path, "val")


@pytest.mark.parametrize(
    "files", [{}, {"train/": b""}, {"train/a/": b"", "train/b/": b""}, {"train/a/x.txt": b""}]
)
def test_no_images_says_which_endings_were_looked_for(tmp_path: Path, files: dict[str, bytes]) -> None:
    message = refusal(write_folder(tmp_path / "d", files))
    assert message.startswith("no images in ")
    for ending in (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"):
        assert f"{ending}" in message


def test_images_without_class_folders_are_recognised(tmp_path: Path) -> None:
    assert "images without class folders" in refusal(write_folder(tmp_path / "a", {"1.png": png()}))
    message = refusal(write_folder(tmp_path / "b", {"train/1.png": png()}))
    assert message.startswith(f"images without class folders in {tmp_path}/b/train")


def test_one_class_is_refused(tmp_path: Path) -> None:
    assert "one class only in " in refusal(write_folder(tmp_path, {"train/a/1.png": png()}))


def test_a_folder_around_the_splits_is_pointed_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "outer", {f"photos/{name}": data for name, data in small_set().items()})
    message = refusal(tmp_path / "outer")
    assert (
        message
        == f"{tmp_path}/outer holds one folder, which has the splits: give {tmp_path}/outer/photos instead"
    )


def test_empty_classes_are_named(tmp_path: Path) -> None:
    write_folder(
        tmp_path, small_set() | {f"train/e{n}/": b"" for n in range(7)} | {"train/e0/notes.txt": b""}
    )
    message = refusal(tmp_path)
    assert "class without images in " in message
    assert "e0, e1, e2, e3, e4 and 2 more" in message


def test_names_in_messages_are_limited_and_escaped() -> None:
    assert shown(["a\nb", "ok", "tab\there"]) == "a\\nb, ok, tab\\there"
    assert shown(map(str, range(9)), limit=2) == "0, 1 and 7 more"


# Links and special files


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    write_folder(tmp_path, small_set() | {"store/x.png": png(7), "pool/p/y.png": png(8)})
    os.symlink(tmp_path / "store" / "x.png", tmp_path / "train" / "c0" / "link.png")
    os.symlink(tmp_path / "pool" / "p", tmp_path / "train" / "linked")
    source = open_source(tmp_path)
    assert source.class_names == ["c0", "c1", "linked"]
    data = {s.key: source.read(s) for s in source.samples}
    assert data["c0/link.png"] == png(7)
    assert data["linked/y.png"] == png(8)


def test_loops_of_links_do_not_hang_and_add_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path, small_set())
    train = tmp_path / "train"
    os.symlink(train / "c0", train / "c0" / "self")
    os.symlink("..", train / "c0" / "up")
    os.symlink(tmp_path, train / "c1" / "root")
    os.symlink(".", train / "loop")
    os.symlink("..", train / "parent")
    os.symlink("me", train / "me")
    os.symlink("ring2", train / "ring1")
    os.symlink("ring1", train / "ring2")
    source = open_source(tmp_path)
    assert source.class_names == ["c0", "c1"]
    assert [s.key for s in source.samples] == ["c0/0.png", "c0/1.png", "c1/0.png", "c1/1.png"]


def test_a_folder_linked_twice_is_read_once(tmp_path: Path) -> None:
    write_folder(tmp_path, small_set() | {"train/c0/real/x.png": png()})
    for name in ("l1", "l2", "real/l3"):
        os.symlink(tmp_path / "train" / "c0" / "real", tmp_path / "train" / "c0" / name)
    names = [s.key for s in open_source(tmp_path).samples if s.key.endswith("x.png")]
    assert len(names) == 1


def test_broken_links_are_samples_that_fail(tmp_path: Path) -> None:
    write_folder(tmp_path, small_set())
    os.symlink("gone.png", tmp_path / "train" / "c0" / "broken.png")
    os.symlink("itself.png", tmp_path / "train" / "c0" / "itself.png")
    source = open_source(tmp_path)
    broken = [s for s in source.samples if s.key in ("c0/broken.png", "c0/itself.png")]
    assert len(broken) == 2
    with pytest.raises(BadImage, match="cannot be read: no such file"):
        source.read(broken[0])
    with pytest.raises(BadImage, match="cannot be read: too many levels"):
        source.read(broken[1])
    assert source.size_of(broken[0]) == -1
    assert source.fingerprint()


def test_pipes_and_sockets_are_no_samples(tmp_path: Path) -> None:
    write_folder(tmp_path, small_set())
    os.mkfifo(tmp_path / "train" / "c0" / "pipe.png")
    previous = os.getcwd()
    os.chdir(tmp_path / "train" / "c1")
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.png")
            assert len(open_source(tmp_path)) == 4
    finally:
        os.chdir(previous)


def test_names_that_are_not_utf8_get_a_valid_key(tmp_path: Path) -> None:
    write_folder(tmp_path, small_set())
    folder = os.fsencode(tmp_path) + b"/train/\xe9t\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(png(9))
    source = open_source(tmp_path)
    assert source.class_names[0] == "\\xe9t\\xe9"
    sample = source.samples[0]
    assert sample.key == "\\xe9t\\xe9/\\xff.png"
    sample.key.encode("utf-8")
    assert source.read(sample) == png(9)


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    write_folder(tmp_path, small_set())
    with open(tmp_path / "train" / "c0" / "big.png", "wb") as file:
        file.truncate((1 << 30) + 1)
    source = open_source(tmp_path)
    with pytest.raises(BadImage, match="more than the limit"):
        source.read(next(s for s in source.samples if s.key == "c0/big.png"))


def test_a_file_or_a_folder_that_went_ends_the_run(tmp_path: Path) -> None:
    # Quarantining the file would give a removal in the middle of a run another result, and no word of it.
    source = open_source(write_folder(tmp_path / "d", small_set()))
    (tmp_path / "d" / "train" / "c0" / "0.png").unlink()
    with pytest.raises(UsageError, match=r"c0/0\.png is gone; put it back, or start again") as caught:
        source.read(source.samples[0])
    assert not isinstance(caught.value, BadImage)
    shutil.rmtree(tmp_path / "d")
    with pytest.raises(UsageError, match="has gone away") as caught:
        source.read(source.samples[1])
    assert not isinstance(caught.value, BadImage)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE])
def test_a_failure_of_the_machine_is_no_fault_of_the_file(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(write_folder(tmp_path, small_set()))

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(
        UsageError, match=f"{os.strerror(code).lower()}; resume when that is mended"
    ) as caught:
        source.read(source.samples[0])
    assert not isinstance(caught.value, BadImage)


# Fingerprints


def test_the_fingerprint_depends_on_content_not_on_place(tmp_path: Path) -> None:
    first = open_source(write_folder(tmp_path / "a", small_set())).fingerprint()
    assert re.fullmatch(r"[0-9a-f]{32}", first)
    assert open_source(write_folder(tmp_path / "b", small_set())).fingerprint() == first
    variants = [
        small_set(each=3),
        small_set(classes=3),
        {name: data + b"\0" if name.endswith("c1/1.png") else data for name, data in small_set().items()},
        {name.replace("c1", "c2"): data for name, data in small_set().items()},
    ]
    others = {open_source(write_folder(tmp_path / str(n), v)).fingerprint() for n, v in enumerate(variants)}
    assert len(others | {first}) == 5


def test_the_fingerprint_cannot_be_confused_by_names(tmp_path: Path) -> None:
    names = json.dumps(["a", "b"])
    first = write_folder(tmp_path / "x", {"train/a/1.png": b"1", "train/b/1.png": b"1"})
    second = write_folder(tmp_path / "y", {f"train/{names}/1.png": b"1", "train/b/1.png": b"1"})
    assert open_source(first).fingerprint() != open_source(second).fingerprint()


def test_sources_pickle_and_close(tmp_path: Path) -> None:
    with open_source(write_folder(tmp_path, small_set())) as source:
        again = pickle.loads(pickle.dumps(source))
        assert again.samples == source.samples
        assert again.read(again.samples[0]) == png(0)
        assert repr(source) == f"FolderSource({str(tmp_path)!r}, 'train', 2 classes, 4 samples)"


# Class names that look alike, and files that are left out


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("names", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_class_composed_here_and_decomposed_there_is_one(
    tmp_path: Path, kind: str, names: tuple[str, str]
) -> None:
    files = {
        f"{split}/{name}/{n}.png": png(n)
        for split, name in zip(("train", "test"), names, strict=True)
        for n in (0, 1)
    }
    files |= {"train/tea/0.png": png(7), "test/tea/0.png": png(8)}
    writers = {"folder": write_folder, "zip": write_zip, "tar": write_tar}
    source = open_source(writers[kind](tmp_path / f"set.{kind}", files), "test")
    assert source.class_names == sorted([names[0], "tea"])
    assert {sample.key: source.read(sample) for sample in source.samples} == {
        f"{names[0]}/0.png": png(0),
        f"{names[0]}/1.png": png(1),
        "tea/0.png": png(8),
    }
    assert [sample.id for sample in source.samples] == [sample_id(sample.key) for sample in source.samples]


def test_a_class_in_both_compositions_is_refused(tmp_path: Path) -> None:
    message = refusal(write_folder(tmp_path, {f"train/{c}/0.png": png() for c in (COMPOSED, DECOMPOSED)}))
    assert r"('cafe\u0301' and 'caf\xe9'): rename one" in message


def test_classes_that_differ_in_case_are_two_and_a_missing_one_says_so(tmp_path: Path) -> None:
    write_folder(
        tmp_path, {f"train/{c}/0.png": png() for c in ("Cat", "cat", "Dog")} | {"test/dog/0.png": png()}
    )
    assert open_source(tmp_path).class_names == ["Cat", "Dog", "cat"]
    assert "lacks: dog; the train split writes Dog, and upper and lower case differ" in refusal(
        tmp_path, "test"
    )


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_what_is_left_out_by_its_ending_is_counted_and_named(tmp_path: Path, kind: str) -> None:
    others = {f"train/c0/{n}.HEIC": b"x" for n in range(3)} | {
        "train/c1/deep/a.avif": b"x",
        "train/c1/raw": b"x",
    }
    silent = {"train/c0/a.txt": b"", "train/c0/.b.heic": b"", "train/c0/a.json": b"{}", "notes.docx": b""}
    writers = {"folder": write_folder, "zip": write_zip, "tar": write_tar}
    source = open_source(writers[kind](tmp_path / f"set.{kind}", small_set() | others | silent))
    assert source.left_out == {".heic": 3, ".avif": 1, "no ending": 1}
    (note,) = source.notes()
    assert (
        "left out 5 files of the train split by their ending: 3 .heic, 1 .avif, 1 no ending; images end in"
        in note
    )
    only = writers[kind](
        tmp_path / f"only.{kind}", {f"train/{c}/{n}.jxl": b"" for c in "ab" for n in range(2)}
    )
    assert "it holds 4 .jxl" in refusal(only)
    some = writers[kind](tmp_path / f"some.{kind}", {"train/a/0.png": png(), "train/b/0.heic": b""})
    assert "class without images" in refusal(some)
    assert "1 .heic" in refusal(some)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_class_list_beside_class_folders_is_remarked_on(tmp_path: Path, kind: str) -> None:
    files = {f"train/{n}/0.png": png(n) for n in range(12)} | {
        "classes.txt": b"".join(b"n%d\n" % n for n in range(12))
    }
    data = write_folder(tmp_path / "a", files) if kind == "folder" else write_zip(tmp_path / "a.zip", files)
    source = open_source(data)
    assert source.class_names[:4] == ["0", "1", "10", "11"]
    (note,) = source.notes()
    assert "sorted as text as torchvision's ImageFolder sorts them (0, 1, 10 and 9 more)" in note


def test_images_beside_masks_are_no_classes(tmp_path: Path) -> None:
    for n, names in enumerate([("images", "masks"), ("Images", "Annotations"), ("imgs", "labels", "masks")]):
        root = write_folder(tmp_path / str(n), {f"train/{c}/0.png": png() for c in names})
        assert "images beside masks or annotations, and no classes" in refusal(root)
    root = write_folder(tmp_path / "faces", {f"train/{c}/0.png": png() for c in ("masks", "mask")})
    assert open_source(root).class_names == ["mask", "masks"]
