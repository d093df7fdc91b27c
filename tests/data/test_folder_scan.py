"""The listing of class folders: the same from the cache as anew, and never believed when something changed."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ddfast.data import folder_scan
from ddfast.data.folders import FolderSource
from ddfast.data.opening import open_source
from ddfast.data.sources import Source
from ddfast.errors import BadImage, UsageError
from tests.data.rendering import png, small_set, write_folder


@pytest.fixture
def listings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Remember every tree, however small and however new; the class folders listed anew are written down."""
    monkeypatch.setenv("DDFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_scan, "CACHED_FROM", 1)
    monkeypatch.setattr(folder_scan, "_SETTLED_NS", 0)
    anew: list[str] = []
    original = folder_scan._list_class

    def noted(place: str, class_folder: str, *rest: object) -> folder_scan.ClassListing:
        anew.append(class_folder)
        return original(place, class_folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(folder_scan, "_list_class", noted)
    return anew


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = small_set(classes=3) | {"train/c1/deep/er/x.png": png(7), "train/c1/ünï.png": png(8)}
    return write_folder(tmp_path / "set", files)


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.npz"))


def contents(source: Source) -> list[tuple[str, int, int, bytes]]:
    return [(s.key, s.id, source.size_of(s), source.read(s)) for s in source.samples]


def test_a_second_opening_lists_nothing(root: Path, listings: list[str], tmp_path: Path) -> None:
    first = open_source(root)
    assert listings == ["c0", "c1", "c2"]
    assert len(cache_files(tmp_path)) == 1
    second = open_source(root)
    assert len(listings) == 3
    assert contents(second) == contents(first)
    assert second.fingerprint() == first.fingerprint()
    assert second.counts() == first.counts()


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "added": (lambda train: (train / "c1" / "new.png").write_bytes(png(9)), ["c1"]),
    "added deep": (lambda train: (train / "c1" / "deep" / "er" / "new.png").write_bytes(png(9)), ["c1"]),
    "removed": (lambda train: (train / "c2" / "0.png").unlink(), ["c2"]),
    "renamed": (lambda train: (train / "c0" / "0.png").rename(train / "c0" / "z.png"), ["c0"]),
    "new class": (lambda train: write_folder(train, {"c3/0.png": png(3)}), ["c3"]),
    "class gone": (lambda train: shutil.rmtree(train / "c2"), []),
    "class renamed": (lambda train: (train / "c2").rename(train / "d2"), ["d2"]),
    "replaced by another folder": (
        lambda train: (
            (train / "c2").rename(train.parent / "x"),
            shutil.copytree(train / "c1", train / "c2"),
        ),
        ["c2"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_listed_anew_and_nothing_else(
    root: Path, listings: list[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before = open_source(root)
    listings.clear()
    make, anew = CHANGES[change]
    make(root / "train")
    after = open_source(root)
    assert listings == anew
    monkeypatch.setenv("DDFAST_CACHE", "off")
    assert contents(after) == contents(open_source(root))
    assert after.fingerprint() != before.fingerprint()


def test_a_fresh_change_is_not_believed(
    root: Path, listings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_scan, "_SETTLED_NS", 3_600_000_000_000)
    open_source(root)
    open_source(root)
    assert listings == ["c0", "c1", "c2"] * 2


def test_a_file_overwritten_in_place_cannot_reach_a_result(
    root: Path, listings: list[str], tmp_path: Path
) -> None:
    """Its folder's times stay, so the listing is believed; reading it ends the run and drops the listing."""
    before = open_source(root).fingerprint()
    path = root / "train" / "c0" / "0.png"
    path.write_bytes(path.read_bytes() + b"more")
    held = open_source(root)
    assert held.fingerprint() == before
    with pytest.raises(
        UsageError, match=r"changed since it was listed: c0/0\.png had .* start again"
    ) as caught:
        held.read(held.samples[0])
    assert not isinstance(caught.value, BadImage)
    assert cache_files(tmp_path) == []
    fresh = open_source(root)
    assert fresh.fingerprint() != before
    assert fresh.read(fresh.samples[0]).endswith(b"more")


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other", "version", "outside", "short"])
def test_a_damaged_cache_costs_a_new_listing(
    root: Path, listings: list[str], tmp_path: Path, damage: str
) -> None:
    wanted = contents(open_source(root))
    (path,) = cache_files(tmp_path)
    data = path.read_bytes()
    if damage in ("version", "outside", "short"):
        with np.load(path) as held:
            arrays = {name: held[name] for name in held.files}
        if damage == "version":
            arrays["version"] = arrays["version"] + 1
        elif damage == "outside":
            evil = arrays["names"].tobytes().replace(b"0.png", b"../xx", 1)
            arrays["names"] = np.frombuffer(evil, np.uint8)
        else:
            arrays["sizes"] = arrays["sizes"][:-1]
        with open(path, "wb") as file:
            np.savez(file, **arrays)
    else:
        middle = len(data) // 2
        changed = {
            "empty": b"",
            "cut": data[:middle],
            "flipped": data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :],
            "other": b"PK\x03\x04 not a cache at all",
        }
        path.write_bytes(changed[damage])
    listings.clear()
    assert contents(open_source(root)) == wanted
    assert damage == "flipped" or listings == ["c0", "c1", "c2"]


def test_a_cache_that_cannot_be_written_is_done_without(
    root: Path, listings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DDFAST_CACHE", str(tmp_path / "file" / "below"))
    assert len(open_source(root)) == 8
    monkeypatch.setenv("DDFAST_CACHE", "off")
    assert len(open_source(root)) == 8
    assert cache_files(tmp_path) == []


def test_where_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DDFAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = folder_scan.cache_path(tmp_path / "a")
    assert path is not None
    assert path.parent == tmp_path / "xdg" / "ddfast" / "scans"
    assert path != folder_scan.cache_path(tmp_path / "b")
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert folder_scan.cache_path(tmp_path / "link") == folder_scan.cache_path(tmp_path / "a")


def test_small_trees_are_not_remembered(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DDFAST_CACHE", str(tmp_path / "cache"))
    open_source(root)
    assert cache_files(tmp_path) == []


def test_names_that_are_not_utf8_are_listed_each_time(root: Path, listings: list[str]) -> None:
    with open(os.fsencode(root / "train" / "c1") + b"/\xff.png", "wb") as file:
        file.write(png(5))
    first = open_source(root)
    listings.clear()
    second = open_source(root)
    assert listings == ["c1"]
    assert contents(second) == contents(first)


def test_many_folders_are_listed_by_many_threads_in_order(
    tmp_path: Path, listings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"train/c{label:03d}/{n}.png": png(n) for label in range(100) for n in range(2)}
    root = write_folder(tmp_path / "many", files)
    threads: set[str] = set()
    original = folder_scan._stamp

    def stamped(folder: str) -> tuple[int, int, int, int]:
        threads.add(threading.current_thread().name)
        return original(folder)

    monkeypatch.setattr(folder_scan, "_stamp", stamped)
    source = open_source(root)
    assert isinstance(source, FolderSource)
    assert len(threads) > 1
    assert all(name.startswith("ddfast-list") for name in threads)
    assert [s.key for s in source.samples] == sorted(name.removeprefix("train/") for name in files)
    assert open_source(root).fingerprint() == source.fingerprint()
    assert len(listings) == 100
