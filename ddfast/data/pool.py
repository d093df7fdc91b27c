"""The images that a run may choose from: decoded once into memory where they fit, else anew on every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from ddfast.data.samples import Sample, SampleList
from ddfast.errors import BadImage
from ddfast.philox import philox4x32
from ddfast.progress import say
from ddfast.seeding import stream
from ddfast.settings import POOL_MEMORY
from ddfast.wording import plural

if TYPE_CHECKING:
    from ddfast.data.loading import Loaded

MEMORY_LIMIT = POOL_MEMORY << 30  # bytes of decoded training images that are held at once
_DRAWS = 1 << 16  # ids whose shuffle keys are drawn at once, which bounds the memory


def drawn_places(samples: SampleList, classes: int, per_class: int, seed: int) -> np.ndarray:
    """Places in `samples` of the first `per_class` of each class by a seeded shuffle, int64 in the order of their ids.

    The shuffle depends on the ids alone.
    """
    ids, labels = samples.ids, samples.labels
    starts = np.searchsorted(labels, np.arange(classes + 1))
    kept, first = [], 0
    while first < len(starts) - 1:  # some whole classes at a time
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + _DRAWS, side="right")) - 1)
        block = slice(starts[first], starts[last])
        kept.append(starts[first] + _first_drawn(ids[block], labels[block] - first, per_class, seed))
        first = last
    pool = np.concatenate(kept)
    return pool[np.argsort(ids[pool], kind="stable")]


def _first_drawn(ids: np.ndarray, labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Places of the first `per_class` samples of each class by their draws, ties by id."""
    keys = [_draws(ids[first : first + _DRAWS], seed) for first in range(0, len(ids), _DRAWS)]
    order = np.lexsort((ids, np.concatenate(keys), labels)) if keys else np.empty(0, dtype=np.int64)
    starts = np.searchsorted(labels, np.arange(labels[-1] + 1 if len(labels) else 0))
    return order[np.arange(len(order)) - starts[labels] < per_class]


def _draws(ids: np.ndarray, seed: int) -> np.ndarray:
    """A 64-bit draw of each id: the first two words of Philox under the seed's stream `pool`."""
    given = torch.from_numpy(np.array(ids, dtype=np.int64))
    counters = torch.stack((given & 0xFFFFFFFF, (given >> 32) & 0xFFFFFFFF, given * 0, given * 0), dim=1)
    words = philox4x32(counters, stream(seed, "pool")).numpy().astype(np.uint64)
    return words[:, 0] << np.uint64(32) | words[:, 1]


class Pool(Protocol):
    """The images that a run may choose from, N of them in the order of their ids.

    Attributes:
        labels: int64 [N].
        classes: number of classes.
    """

    labels: Tensor
    classes: int

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(places int64 [B], images uint8 [B, 3, S, S], labels int64 [B]) of the places `order`, batch by batch.

        A file that cannot be decoded is left out, and the next one takes its place.
        """
        ...

    def say(self, message: str) -> None:
        """Tell the user how far it is, where the run is not quiet."""
        ...


class ClassPool(Pool, Protocol):
    """A pool that also gives images of one class."""

    def draw(self, label: int, count: int, generator: torch.Generator) -> Tensor:
        """`count` different images of a class, uint8 [count, 3, S, S]: the first readable ones of a shuffle of it.

        They are the same whether the pool is held in memory or decoded anew. Fewer where the class has no more.
        """
        ...


class DecodedPool:
    """Images of a source: decoded once and held where they fit in memory, else decoded whenever they are asked for.

    Args:
        samples: of the source.
        places: int64 [N], which of them make up the pool, in the order of their ids.
        classes: number of classes.
        size: side of the decoded images in pixels.
        load: decodes samples at that size, in order.
        quiet: `say` says nothing.
        memory_limit: bytes of decoded images up to which they are held.
    """

    def __init__(
        self,
        samples: SampleList,
        places: np.ndarray,
        classes: int,
        size: int,
        load: Callable[[Iterable[Sample]], Iterable[Loaded]],
        *,
        quiet: bool = False,
        memory_limit: int | None = None,
    ) -> None:
        self._samples, self._places, self._load, self._quiet = samples, places, load, quiet
        self.labels = torch.from_numpy(samples.labels[places].astype(np.int64))
        self.classes = classes
        self._size = size
        self._images: Tensor | None = None
        self._tried = torch.zeros(len(self.labels), dtype=torch.bool)
        self._unreadable: set[int] = set()  # places in the pool
        # Places of each class: its run in the places sorted by label.
        self._by_class = torch.argsort(self.labels, stable=True)
        self._starts = torch.searchsorted(self.labels[self._by_class], torch.arange(classes + 1))
        limit = MEMORY_LIMIT if memory_limit is None else memory_limit
        if len(self.labels) * 3 * self._size**2 <= limit:
            self._hold()

    @property
    def held(self) -> bool:
        """Whether the decoded images are held in memory."""
        return self._images is not None

    def _hold(self) -> None:
        count = len(self.labels)
        images = torch.zeros(count, 3, self._size, self._size, dtype=torch.uint8)
        self._readable = torch.zeros(count, dtype=torch.bool)
        for place, image in self._decoded(torch.arange(count)):
            images[place], self._readable[place] = image, True
        self._images = images
        if bad := count - int(self._readable.sum()):
            self.say(f"left out: {plural(bad, 'file')} that cannot be decoded")

    def _decoded(self, order: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(place, image) of the places `order`, without those that cannot be decoded."""
        loaded = self._load(self._samples[int(place)] for place in self._places[order.numpy()])
        for place, (_, image) in zip(order.tolist(), loaded, strict=True):
            self._tried[place] = True
            if isinstance(image, BadImage):
                self._unreadable.add(place)
            else:
                yield place, image

    def unreadable(self, classes: Sequence[int]) -> set[int]:
        """Places in the source of the files of these classes that cannot be decoded; tries all that were not."""
        members = torch.isin(self.labels, torch.tensor(list(classes)))
        for _ in self._decoded((members & ~self._tried).nonzero().flatten()):
            pass
        return {int(self._places[place]) for place in self._unreadable if members[place]}

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """See `Pool`."""
        if self._images is not None:
            for places in order[self._readable[order]].split(batch_size):
                yield places, self._images[places], self.labels[places]
            return
        held: list[tuple[int, Tensor]] = []
        for pair in self._decoded(order):
            held.append(pair)
            if len(held) == batch_size:
                yield self._batch(held)
                held = []
        if held:
            yield self._batch(held)

    def draw(self, label: int, count: int, generator: torch.Generator) -> Tensor:
        """See `ClassPool`."""
        members = self._by_class[self._starts[label] : self._starts[label + 1]]
        order = members[torch.randperm(len(members), generator=generator)]
        if self._images is not None:
            return self._images[order[self._readable[order]][:count]]
        found: list[Tensor] = []
        while len(found) < count and len(order):
            wanted, order = order.split(
                [min(count - len(found), len(order)), max(0, len(order) - count + len(found))]
            )
            found.extend(image for _, image in self._decoded(wanted))
        return torch.stack(found) if found else torch.zeros(0, 3, self._size, self._size, dtype=torch.uint8)

    def say(self, message: str) -> None:
        """See `Pool`."""
        say(message, quiet=self._quiet)

    def _batch(self, held: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        places = torch.tensor([place for place, _ in held])
        return places, torch.stack([image for _, image in held]), self.labels[places]
