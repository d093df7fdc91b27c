from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ddfast.data import loading
from ddfast.data.decoding import decode_fit
from ddfast.data.loading import default_workers, load, load_all
from ddfast.data.opening import open_source
from ddfast.data.samples import Sample, sample_id
from ddfast.data.sources import Source
from ddfast.errors import BadImage, UsageError
from tests.data.rendering import png, write_folder


class MemorySource(Source):
    """Images in memory; counts what is being read at this moment and what was read."""

    def __init__(self, images: dict[str, bytes]) -> None:
        super().__init__("memory", "train", ["a", "b"], [(key, int(key[0] == "b")) for key in images])
        self.images = images
        self.started: list[str] = []

    def read(self, sample: Sample) -> bytes:
        self.started.append(sample.key)
        data = self.images[sample.key]
        if data == b"gone":
            raise UsageError("the source has gone away")
        return data

    def size_of(self, sample: Sample) -> int:
        return len(self.images[sample.key])

    def close(self) -> None:
        self.images = {}


def memory(count: int = 50) -> MemorySource:
    return MemorySource({f"{'ab'[n % 2]}/{n:04d}.png": png(n, 6 + n % 5, 5 + n % 7) for n in range(count)})


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ddfast-decode")]


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("ahead", [1, 3, 64])
def test_results_are_in_order_and_independent_of_the_threads(workers: int, ahead: int) -> None:
    source = memory()
    order = source.samples[::-1] + source.samples[:7]
    found = list(load(source, order, 4, resize=5, workers=workers, ahead=ahead))
    assert [sample for sample, _ in found] == order
    for sample, image in found:
        assert isinstance(image, torch.Tensor)
        assert torch.equal(image, decode_fit(source.images[sample.key], 4, 5))
    assert decoding_threads() == []


@pytest.mark.parametrize("workers", [0, 3])
def test_bad_images_take_their_place_in_the_order(workers: int) -> None:
    source = memory(20)
    source.images["a/0004.png"] = b""
    source.images["b/0011.png"] = b"no image at all"
    found = list(load(source, source.samples, 4, workers=workers))
    assert [sample for sample, _ in found] == source.samples
    bad = {sample.key: str(image) for sample, image in found if isinstance(image, BadImage)}
    assert bad.keys() == {"a/0004.png", "b/0011.png"}
    assert bad["a/0004.png"] == "empty file"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_fails_ends_the_iteration(workers: int) -> None:
    source = memory(40)
    source.images[source.samples[25].key] = b"gone"
    results = load(source, source.samples, 4, workers=workers, ahead=8)
    seen: list[Sample] = []
    with pytest.raises(UsageError, match="the source has gone away"):
        seen.extend(sample for sample, _ in results)
    assert seen == source.samples[: len(seen)]
    assert 20 <= len(seen) <= 25
    assert decoding_threads() == []


@pytest.mark.parametrize(("workers", "ahead"), [(1, 4), (2, 8), (3, 64), (4, 1)])
def test_the_look_ahead_is_bounded(workers: int, ahead: int) -> None:
    source = memory(300)
    consumed = 0
    for _ in load(source, source.samples, 4, workers=workers, ahead=ahead):
        consumed += 1
        if consumed % 50 == 1:
            deadline = time.monotonic() + 0.05
            while time.monotonic() < deadline:
                assert len(source.started) <= consumed + ahead
                time.sleep(0.005)
    assert consumed == 300
    assert sorted(source.started) == sorted(source.images)


def test_samples_may_be_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    source = memory(3)
    drawn = 0

    def endless() -> Iterator[Sample]:
        nonlocal drawn
        while True:
            drawn += 1
            yield source.samples[drawn % 3]

    results = load(source, endless(), 4, workers=2, ahead=8)
    assert len([next(results) for _ in range(30)]) == 30
    results.close()
    assert drawn <= 30 + 16
    assert decoding_threads() == []


def test_closing_or_failing_ends_the_threads() -> None:
    source = memory(200)
    results = load(source, source.samples, 4, workers=3, ahead=16)
    next(results)
    assert decoding_threads()
    results.close()
    assert decoding_threads() == []

    def failing_consumer() -> None:
        for _ in load(source, source.samples, 4, workers=3, ahead=16):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_consumer()
    assert decoding_threads() == []


def test_nothing_to_load() -> None:
    assert list(load(memory(3), [], 4, workers=2)) == []
    images, labels, bad = load_all(memory(3), 4, samples=[], workers=2)
    assert images.shape == (0, 3, 4, 4)
    assert labels.shape == (0,)
    assert bad == []


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"size": 4, "resize": 3}, {"size": 4, "workers": -1}, {"size": 4, "ahead": 0}]
)
def test_arguments_are_checked_before_anything_is_read(options: dict[str, int]) -> None:
    source = memory(3)
    with pytest.raises(ValueError, match="must be at least"):
        load(source, source.samples, **options)
    assert source.started == []


def test_load_all_keeps_the_good_and_lists_the_bad() -> None:
    source = memory(30)
    source.images["b/0007.png"] = b"nonsense"
    source.images["a/0000.png"] = png(0)[:50]
    steps: list[tuple[int, int]] = []
    images, labels, bad = load_all(
        source, 4, workers=2, progress=lambda done, total: steps.append((done, total))
    )
    good = [s for s in source.samples if s.key not in ("b/0007.png", "a/0000.png")]
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert images.shape == (28, 3, 4, 4)
    assert labels.tolist() == [s.label for s in good]
    for image, sample in zip(images, good, strict=True):
        assert torch.equal(image, decode_fit(source.images[sample.key], 4))
    assert [sample.key for sample, _ in bad] == ["a/0000.png", "b/0007.png"]
    assert all(isinstance(reason, str) and reason for _, reason in bad)
    assert steps == [(n, 30) for n in range(1, 31)]


def test_more_images_than_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(loading.torch, "empty", no_memory)
    with pytest.raises(UsageError, match=r"4 images of 100x100 need 0\.0 GB, more memory than there is"):
        load_all(memory(4), 100)


def test_the_pixel_limit_arrives() -> None:
    images, _, bad = load_all(memory(10), 4, workers=0, max_pixels=40)
    assert len(images) + len(bad) == 10
    assert {reason.split(":")[0] for _, reason in bad} == {"too large"}


def test_there_is_at_least_one_worker() -> None:
    assert 1 <= default_workers() <= 16


def test_a_real_folder_with_everything_wrong_in_it(tmp_path: Path) -> None:
    good = {f"train/{name}/{n}.png": png(n) for name in ("a", "b") for n in range(3)}
    odd = {
        "train/a/empty.jpg": b"",
        "train/a/text.jpg": b"not an image",
        "train/b/cut.png": png(9)[:60],
        "train/b/wrong name.jpg": png(8),
    }
    source = open_source(write_folder(tmp_path, good | odd))
    images, labels, bad = load_all(source, 4)
    assert len(images) == 7
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert {sample.key: reason for sample, reason in bad} == {
        "a/empty.jpg": "empty file",
        "a/text.jpg": "not an image (JPEG, PNG, BMP, WebP, GIF, TIFF or PPM)",
        "b/cut.png": "truncated",
    }
    assert all(sample.id == sample_id(sample.key) for sample, _ in bad)
