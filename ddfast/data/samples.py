"""Samples and their stable ids, kept as arrays: 14 million of them are not 14 million Python objects."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

_CHUNK = 4096  # samples made at a time when iterating


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image file, known but not read.

    `key` is "class/relative path" with forward slashes, `id` the signed 64-bit `sample_id(key)` that seeds
    its noise, `label` the index of its class in `Source.class_names`.
    """

    id: int
    key: str
    label: int


def sample_id(key: str) -> int:
    """Stable signed 64-bit id of a sample: BLAKE2b with an 8-byte digest of the UTF-8 key, little endian."""
    return int.from_bytes(digest_of(key.encode("utf-8")), "little", signed=True)


def digest_of(key: bytes) -> bytes:
    """The 8 bytes of `sample_id` of a UTF-8 key."""
    return hashlib.blake2b(key, digest_size=8).digest()


def sample_ids(keys: Iterable[bytes]) -> np.ndarray:
    """`sample_id` of many UTF-8 keys, int64 [N]."""
    return np.frombuffer(b"".join(map(digest_of, keys)), "<i8").astype(np.int64, copy=False)


class SampleList(Sequence[Sample]):
    """Samples in a fixed order, 30 bytes and a key each; a `Sample` is made when one is asked for.

    A slice is a plain list, and `==` compares with any sequence of samples.

    Attributes:
        ids: int64 [N], read-only.
        labels: int32 [N], read-only.
        keys: the UTF-8 keys, NUL between them.
    """

    def __init__(self, keys: bytes, labels: np.ndarray, ids: np.ndarray | None = None) -> None:
        """`keys` holds N keys with N - 1 NULs between them, `labels` N integers.

        `ids` are computed where they are not given.

        Raises:
            ValueError: as many keys as labels and ids were wanted.
            DuplicateId: two keys share an id.
        """
        self.keys = keys
        self.labels = np.ascontiguousarray(labels, np.int32)
        self.ids = sample_ids(keys.split(b"\0")) if ids is None and len(labels) else _int64(ids)
        ends = np.flatnonzero(np.frombuffer(keys, np.uint8) == 0)
        # One more than the place of the NUL behind each key.
        self._starts = np.concatenate(([0], ends + 1, [len(keys) + 1])).astype(np.int64)
        if len(labels) == 0:
            self._starts = self._starts[:1]
        if not len(self.labels) == len(self.ids) == len(self._starts) - 1:
            raise ValueError(
                f"keys, labels and ids must be as many, got {len(self._starts) - 1}, {len(self.labels)} and "
                f"{len(self.ids)}"
            )
        self._order = np.argsort(self.ids, kind="stable")
        self._sorted = self.ids[self._order]
        for array in (self.ids, self.labels):
            array.flags.writeable = False
        twins = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(twins):
            place = int(twins[0])
            raise DuplicateId([self[int(self._order[place])].key, self[int(self._order[place + 1])].key])

    @classmethod
    def of(cls, keys: Iterable[tuple[str, int]]) -> SampleList:
        """From (key, label) pairs in any order: sorted by label, then key. Errors as the constructor."""
        ordered = sorted((label, key.encode("utf-8")) for key, label in keys)
        if any(b"\0" in key for _, key in ordered):
            raise ValueError("a key must not hold NUL")
        labels = np.fromiter((label for label, _ in ordered), np.int32, len(ordered))
        return cls(b"\0".join(key for _, key in ordered), labels)

    def position(self, id: int) -> int:
        """Index of the sample with this id. Raises `KeyError` if there is none."""
        place = int(np.searchsorted(self._sorted, np.int64(id)))
        if place == len(self._sorted) or self._sorted[place] != id:
            raise KeyError(id)
        return int(self._order[place])

    def take(self, indices: Iterable[int]) -> list[Sample]:
        """The samples at `indices`, a list or an integer array, in that order."""
        return [self[int(index)] for index in indices]

    def key_at(self, index: int) -> str:
        """Key of the sample at a place from 0 on."""
        return self.keys[self._starts[index] : self._starts[index + 1] - 1].decode("utf-8")

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"sample {place} of {len(self)}")
        place %= len(self)
        return Sample(int(self.ids[place]), self.key_at(place), int(self.labels[place]))

    def __iter__(self) -> Iterator[Sample]:
        for first in range(0, len(self), _CHUNK):
            last = min(first + _CHUNK, len(self))
            keys = self.keys[self._starts[first] : self._starts[last] - 1].decode("utf-8").split("\0")
            columns = self.ids[first:last].tolist(), keys, self.labels[first:last].tolist()
            yield from map(Sample, *columns)

    def __contains__(self, sample: object) -> bool:
        if not isinstance(sample, Sample):
            return False
        try:
            return self[self.position(sample.id)] == sample
        except (KeyError, OverflowError):
            return False

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SampleList):
            return self.keys == other.keys and np.array_equal(self.labels, other.labels)
        if isinstance(other, list | tuple):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SampleList({len(self)} samples)"


class DuplicateId(ValueError):
    """Two keys with one id; `keys` are they."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__(f"two keys share one id: {keys}")
        self.keys = keys


def _int64(ids: np.ndarray | None) -> np.ndarray:
    return np.zeros(0, np.int64) if ids is None else np.ascontiguousarray(ids, np.int64)
