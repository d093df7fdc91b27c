"""Samples to tensors: a pool of threads decodes ahead, the results come in the order asked for."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from ddfast.data.decoding import decode_fit, pixel_limit
from ddfast.errors import BadImage, UsageError
from ddfast.wording import plural

if TYPE_CHECKING:
    from ddfast.data.samples import Sample
    from ddfast.data.sources import Source

Loaded = tuple["Sample", "Tensor | BadImage"]
Result = TypeVar("Result")


class Decode(Protocol):
    """`decode_fit` and its like: a file's bytes to uint8 [3, size, size], or `BadImage`."""

    def __call__(self, data: bytes, size: int, resize: int | None = None, *, max_pixels: int) -> Tensor:
        """Decode and fit."""
        ...


def default_workers() -> int:
    """Decoding threads used where nobody says otherwise: one for each usable core, at most 16."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 16)


def load(
    source: Source,
    samples: Iterable[Sample],
    size: int,
    *,
    resize: int | None = None,
    workers: int | None = None,
    ahead: int = 64,
    max_pixels: int | None = None,
    decode: Decode = decode_fit,
) -> Generator[Loaded, None, None]:
    """Read, decode and fit samples, in the order given.

    Args:
        source: where the samples are read from.
        samples: any iterable; it is consumed as the results are, `ahead` samples in advance at most.
        size: side of the square that comes out, in pixels; see `ddfast.data.fit` for `resize`.
        workers: decoding threads; 0 decodes in the calling thread. The result does not depend on it.
        ahead: how many decoded images may wait, which bounds the memory.
        max_pixels: refuse larger images; `ddfast.data.decoding.pixel_limit()` by default.
        decode: what makes the image of a file's bytes: `decode_fit`, or what keeps its promises.

    Yields:
        (sample, image): image is uint8 [3, size, size], or the `BadImage` that says why there is none.

    Raises:
        UsageError: the source itself failed (its folder or archive is gone).
        ValueError: `size`, `resize`, `workers` or `ahead` make no sense.

    Closing the generator, or an exception in the consumer, ends the threads before control returns.
    """
    workers = checked_workers(size, resize, workers, ahead)
    limit = pixel_limit() if max_pixels is None else max_pixels

    def load_one(sample: Sample) -> Loaded:
        try:
            return sample, decode(source.read(sample), size, resize, max_pixels=limit)
        except BadImage as error:
            return sample, error

    return in_order(load_one, samples, workers, ahead)


def checked_workers(size: int, resize: int | None, workers: int | None, ahead: int) -> int:
    """The number of threads; `ValueError` for arguments of `load` that make no sense."""
    workers = default_workers() if workers is None else workers
    if size < 1 or (resize is not None and resize < size):
        raise ValueError(
            f"size must be at least 1 and resize at least size, got size={size}, resize={resize}"
        )
    if workers < 0 or ahead < 1:
        raise ValueError(
            f"workers must be at least 0 and ahead at least 1, got workers={workers}, ahead={ahead}"
        )
    return workers


def load_all(
    source: Source,
    size: int,
    *,
    samples: Sequence[Sample] | None = None,
    resize: int | None = None,
    workers: int | None = None,
    max_pixels: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    loader: Load | None = None,
) -> tuple[Tensor, Tensor, list[tuple[Sample, str]]]:
    """Load a split into memory.

    Args:
        source: where the samples are read from.
        size: side of the images, in pixels; `resize`, `workers` and `max_pixels` are those of `load`.
        samples: which ones; all of `source.samples` by default.
        progress: called as `progress(done, total)` after every image, good or bad.
        loader: what decodes: `resolve_loader(...)` of `ddfast.data`; Pillow by default.

    Returns:
        images uint8 [N, 3, size, size] and labels int64 [N] of the N images that decode, in the order of the
        samples, and the others as (sample, reason).

    Raises:
        UsageError: there is not enough memory, or the source itself failed.
    """
    samples = source.samples if samples is None else samples
    total = len(samples)
    images_bytes = total * 3 * size * size
    try:
        images = torch.empty(total, 3, size, size, dtype=torch.uint8)
    except RuntimeError as error:
        raise UsageError(
            f"{plural(total, 'image')} of {size}x{size} need {images_bytes / 1e9:.1f} GB, more memory than there is"
        ) from error
    labels = torch.empty(total, dtype=torch.int64)
    bad: list[tuple[Sample, str]] = []
    good = 0
    loaded = (loader or load)(source, samples, size, resize=resize, workers=workers, max_pixels=max_pixels)
    for done, (sample, image) in enumerate(loaded, start=1):
        if isinstance(image, BadImage):
            bad.append((sample, str(image)))
        else:
            images[good] = image
            labels[good] = sample.label
            good += 1
        if progress is not None:
            progress(done, total)
    return images[:good], labels[:good], bad


def in_order(
    load_one: Callable[[Sample], Result], samples: Iterable[Sample], workers: int, ahead: int
) -> Generator[Result, None, None]:
    """Map over a thread pool, in order, `ahead` results at most in flight; small groups share a hand-over.

    With 0 workers the calling thread does it all.
    """
    if workers == 0:
        return (load_one(sample) for sample in samples)
    return _threaded(load_one, samples, workers, ahead)


def _threaded(
    load_one: Callable[[Sample], Result], samples: Iterable[Sample], workers: int, ahead: int
) -> Generator[Result, None, None]:
    group = max(1, min(8, ahead // (2 * workers)))
    remaining = iter(samples)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ddfast-decode")
    waiting: deque[Future[list[Result]]] = deque()

    def load_group(batch: list[Sample]) -> list[Result]:
        return [load_one(sample) for sample in batch]

    try:
        while True:
            while len(waiting) < max(1, ahead // group) and (batch := list(islice(remaining, group))):
                waiting.append(pool.submit(load_group, batch))
            if not waiting:
                return
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Load(Protocol):
    """The call that every loader is; `ddfast.data.loading.load` documents it."""

    def __call__(
        self,
        source: Source,
        samples: Iterable[Sample],
        size: int,
        *,
        resize: int | None = None,
        workers: int | None = None,
        ahead: int = 64,
        max_pixels: int | None = None,
    ) -> Generator[Loaded, None, None]:
        """Read, decode and fit samples, in the order given."""
        ...
