"""Preparation: what a method must know of the whole pool before it can score the first image.

Rank 0 makes it once and writes `prepared.parquet`, a value an image, whose hash stands in the manifest; every rank
reads that file. The state on the way stands in a hidden file, so that a killed preparation goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ddfast.data.files import atomic_write_bytes
from ddfast.data.loading import Loaded
from ddfast.data.samples import Sample, SampleList
from ddfast.data.table import is_readable, make_table, read_facts, read_table, to_numpy, write_table
from ddfast.errors import BadImage
from ddfast.methods.base import Prepared
from ddfast.methods.run import Run, score_digest
from ddfast.models.teacher import read_tensors, serialize_tensors
from ddfast.progress import say
from ddfast.training.image_sets import MEMORY_LIMIT

PREPARED = "prepared.parquet"
PREPARED_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("value", pa.float32(), nullable=False),
    ]
)
"""One row an image of the pool, by ascending id; what the value is, the method says."""

_STATE = ".preparation"


def prepare(run: Run) -> None:
    """Make `prepared.parquet` where it is not there yet, and open it on every rank.

    Raises:
        UsageError: of the method; nothing is half-written.
    """
    run.ranks.on_main("prepare", lambda: _make(run))
    columns = run.ranks.together(
        "prepared", lambda: to_numpy(read_table(run.out / PREPARED, PREPARED_SCHEMA))
    )
    run.prepared = Prepared(columns["sample_id"], columns["value"])


def _make(run: Run) -> None:
    path, digest = run.out / PREPARED, score_digest(run.plan)
    if not is_readable(path, PREPARED_SCHEMA) or read_facts(path).get("scores") != digest:
        state = FileCheckpoint(run.out / _STATE, digest)
        values = run.method.prepare(run.decoded_pool(), run.context, state)
        ids = run.source.samples.ids[run.pool()]
        table = make_table({"sample_id": ids, "value": values.numpy()}, PREPARED_SCHEMA)
        write_table(path, table, {"scores": digest})
    (run.out / _STATE).unlink(missing_ok=True)
    run.plan["prepared"] = {"file": PREPARED, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    run.save()


class FileCheckpoint:
    """A state in one safetensors file, which says by its digest whose it is; see `Checkpoint`."""

    def __init__(self, path: Path, digest: str) -> None:
        self._path, self._digest = path, digest

    def load(self) -> dict[str, Tensor]:
        """What was saved last by this run; nothing where there is no such file."""
        if not self._path.is_file():
            return {}
        tensors, facts = read_tensors(self._path, self._path.read_bytes(), what="saved state")
        return tensors if facts.get("scores") == self._digest else {}

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the file anew, atomically."""
        atomic_write_bytes(self._path, serialize_tensors(tensors, {"scores": self._digest}))


class DecodedPool:
    """Images of a source: decoded once and held where that takes 4 GiB or less, else decoded in every pass.

    Args:
        samples: of the source.
        places: int64 [N], which of them make up the pool, in the order of their ids.
        classes: number of classes.
        size: side of the decoded images in pixels.
        load: decodes samples at that size, in order.
        quiet: `say` says nothing.
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
    ) -> None:
        self._samples, self._places, self._load, self._quiet = samples, places, load, quiet
        self.labels = torch.from_numpy(samples.labels[places].astype(np.int64))
        self.classes = classes
        self._size = size
        self._images: Tensor | None = None
        if len(self.labels) * 3 * self._size**2 <= MEMORY_LIMIT:
            self._hold()

    def _hold(self) -> None:
        count = len(self.labels)
        images = torch.zeros(count, 3, self._size, self._size, dtype=torch.uint8)
        self._readable = torch.zeros(count, dtype=torch.bool)
        for place, image in self._decoded(torch.arange(count)):
            images[place], self._readable[place] = image, True
        self._images = images

    def _decoded(self, order: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(place, image) of the places `order`, without those that cannot be decoded."""
        loaded = self._load(self._samples[int(place)] for place in self._places[order.numpy()])
        for place, (_, image) in zip(order.tolist(), loaded, strict=True):
            if not isinstance(image, BadImage):
                yield place, image

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

    def say(self, message: str) -> None:
        """See `Pool`."""
        say(message, quiet=self._quiet)

    def _batch(self, held: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        places = torch.tensor([place for place, _ in held])
        return places, torch.stack([image for _, image in held]), self.labels[places]
