"""What a distillation method is: how it scores candidate crops, and how it ranks them.

A method sees micro-batches of decoded source images and returns candidate crops with their scores; the
pipeline turns those into rows of the score table. Selection is a sort over that table and never looks at a
pixel again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from ddfast.arguments import one_of, whole_number
from ddfast.errors import UsageError
from ddfast.ops._philox import philox4x32
from ddfast.wording import argument, did_you_mean

if TYPE_CHECKING:
    from ddfast.models import Teacher


def option(
    default: Any,
    help: str,
    *,
    stage: str = "score",
    choices: tuple[str, ...] | None = None,
    type: type | None = None,
) -> Any:
    """A field of a method's options: default, help text with unit, the stage it belongs to and its valid
    values."""
    metadata = {"help": help, "stage": stage, "choices": choices, "type": type}
    return dataclasses.field(default=default, metadata=metadata)


def stream(seed: int, name: str) -> int:
    """64-bit key of the random stream `name` under `seed`, so that no two uses of a seed share draws."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def drawn(ids: Tensor, seed: int, name: str) -> Tensor:
    """Uniform draws in [0, 1) of sample ids (int64 [M]) under a seed's stream: float64 [M], exact in float32."""
    low, high, zero = ids & 0xFFFFFFFF, (ids >> 32) & 0xFFFFFFFF, torch.zeros_like(ids)
    words = philox4x32(torch.stack((low, high, zero, zero), dim=1), stream(seed, name))[:, 0]
    return (words >> 8).double() / 2**24


@dataclass(frozen=True)
class Batch:
    """One micro-batch of decoded sources.

    Attributes:
        images: uint8 [M, 3, S, S], on the device.
        labels: int64 [M], on the host.
        ids: int64 [M], stable sample ids, on the host.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Candidates:
    """Candidate crops of a micro-batch, K an image.

    Attributes:
        boxes: int32 [M, K, 4], (x0, y0, x1, y1) in pixels of the fitted image, x1 and y1 exclusive.
        score: float32 [M, K] or None: what the method ranks by where neither norm nor loss is.
        grad_norm: float32 [M, K] or None, norm of the gradient of the teacher's cross-entropy on the crop.
        loss: float32 [M, K] or None, the teacher's cross-entropy on the crop, in nats.
        correct: bool [M, K] or None, whether the teacher's first choice on the crop is the label.
        phi: float32 [M, d] or None, attribution of the image's grid cells.
        features: float32 [M, F] or None, what the teacher's last layer sees of the image; K is 1 then.
        damaged: int64 [] or None, for how many images or crops the teacher returned NaN or infinity. Whoever reads the
            rows refuses them where it is not 0: on a GPU that is later, so that nothing waits for it.
    """

    boxes: Tensor
    score: Tensor | None = None
    grad_norm: Tensor | None = None
    loss: Tensor | None = None
    correct: Tensor | None = None
    phi: Tensor | None = None
    features: Tensor | None = None
    damaged: Tensor | None = None


def whole_images(batch: Batch) -> Tensor:
    """One crop an image, all of it: boxes int32 [M, 1, 4]."""
    height, width = batch.images.shape[-2:]
    return torch.tensor([0, 0, width, height], dtype=torch.int32).expand(len(batch.ids), 1, 4)


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


class Checkpoint(Protocol):
    """Where a preparation keeps its state, so that a killed run goes on from there."""

    def load(self) -> dict[str, Tensor]:
        """The tensors that were saved last; none at the start."""
        ...

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep these tensors in place of the last ones, whole or not at all."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A value for every image of the pool, from `Method.prepare`.

    Attributes:
        ids: int64 [N], ascending.
        values: float32 [N].
    """

    ids: np.ndarray
    values: np.ndarray

    def of(self, ids: Tensor) -> Tensor:
        """The values of these ids, float32 [M] on the CPU; NaN for an id that the pool has not."""
        wanted = ids.cpu().numpy()
        places = np.searchsorted(self.ids, wanted).clip(max=len(self.ids) - 1)
        return torch.from_numpy(np.where(self.ids[places] == wanted, self.values[places], np.float32("nan")))


@dataclass(frozen=True)
class Context:
    """What scoring needs beside the images: fixed at the start of a run and written in its manifest."""

    teacher: Teacher | None
    image_size: int
    factor: int
    seed: int
    precision: str
    forward_batch: int
    device: torch.device
    prepared: Prepared | None = None

    @property
    def tile(self) -> int:
        """Side of a tile in pixels."""
        return self.image_size // self.factor


class Table:
    """Columns of the score table as NumPy arrays, one row a candidate crop. Missing scores are NaN.

    `features` is float32 [rows, F], or None where the method keeps none; `seed` is the run's, for rules that draw.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], seed: int = 0) -> None:
        self.seed = seed
        self.features = columns.get("features")
        self.sample_id = columns["sample_id"]
        self.label = columns["label"]
        self.crop = columns["crop"]
        self.score = columns["score"]
        self.grad_norm = columns["grad_norm"]
        self.loss = columns["loss"]
        self.correct = columns["correct"]

    def best_within_source(self, key: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Row of the smallest `key` of each source, among `rows` (default all). Ties go to the lower crop number."""
        rows = np.arange(len(key)) if rows is None else rows
        order = rows[np.lexsort((self.crop[rows], key[rows], self.sample_id[rows]))]
        ids = self.sample_id[order]
        first = np.ones(len(order), dtype=bool)
        first[1:] = ids[1:] != ids[:-1]
        return order[first]

    def ranked_within_class(self, key: np.ndarray, rows: np.ndarray) -> dict[int, np.ndarray]:
        """For every class its `rows` in ascending order of `key`; ties go to the lower sample id."""
        order = rows[np.lexsort((self.sample_id[rows], key[rows], self.label[rows]))]
        labels = self.label[order]
        names, starts = np.unique(labels, return_index=True)
        return dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True)) if len(names) else {}


def _as_default(value: Any, default: Any, name: str) -> Any:
    """An option's value as the type of its default: numbers may be NumPy's, or text.

    Raises:
        UsageError: it cannot be one, or is not finite.
    """
    if isinstance(default, bool):
        if isinstance(value, (bool, np.bool_)):
            return bool(value)
        raise UsageError(f"{argument(name)} must be true or false, got {value!r}")
    if isinstance(default, int):
        return whole_number(value, name)
    if isinstance(default, float):
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise UsageError(f"{argument(name)} must be a finite number, got {value!r}")
        return found
    return value


class Method(ABC):
    """Base of every method: a name, a dataclass of options, a scoring rule and a ranking rule."""

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    needs_teacher: ClassVar[bool] = True
    # Whether `prepare` has something to do before images are scored.
    prepares: ClassVar[bool] = False
    # Whether the score table has a column of features, which `rank` chooses by.
    keeps_features: ClassVar[bool] = False
    # Which of the ranked crops share an image: "contiguous" puts ranks 0..k-1 in image 0 (InfoUtil, Algorithm
    # 1), "stride" puts rank r in image r mod IPC, so that the best-ranked crops open every image (RDED).
    layout: ClassVar[str] = "contiguous"

    def __init__(self, options: Any) -> None:
        self.options = options

    def prepare(self, pool: Pool, context: Context, checkpoint: Checkpoint) -> Tensor:
        """A value for every image of the pool, float32 [N], that only the whole pool can give (`prepares`).

        Done once, by rank 0; scoring finds it in `context.prepared`. What a kill must not lose goes to the
        checkpoint, and the result must be the same with and without one.
        """
        raise TypeError(f"method {self.name} has nothing to prepare")

    @abstractmethod
    def score(self, batch: Batch, context: Context) -> Candidates:
        """Propose and score candidate crops of a micro-batch. Must not depend on how sources are batched."""

    @abstractmethod
    def rank(self, table: Table, needed: int) -> tuple[dict[int, np.ndarray], np.ndarray]:
        """Rank candidates: for every class its rows, best first and at most one crop a source; and a score a
        row.

        Args:
            table: all rows of some classes; a class is ranked by its own rows alone.
            needed: crops that each class needs (IPC x tiles); a class may rank more.
        """

    def resolved(self, factor: int) -> Method:
        """This method with every `auto` option fixed for `factor` tiles per side."""
        return self

    @classmethod
    def from_options(cls, given: Mapping[str, Any], preset: str | None = None) -> Method:
        """Build a method from `given` option values over `preset` over the defaults.

        Raises:
            UsageError: unknown preset or option, or a value that the options refuse; the valid ones are
                listed.
        """
        if preset is not None and preset not in cls.presets:
            known = ", ".join(sorted(cls.presets)) or "none"
            near = did_you_mean(preset, cls.presets)
            raise UsageError(f"method {cls.name} has no preset {preset!r}; its presets: {known}{near}")
        fields = {field.name: field for field in dataclasses.fields(cls.Options)}
        for name in given:
            if name not in fields:
                valid = ", ".join(fields) or "none"
                near = did_you_mean(name, fields)
                raise UsageError(f"method {cls.name} has no option {name!r}; its options: {valid}{near}")
        values = {**(cls.presets[preset] if preset else {}), **given}
        for name, value in values.items():
            choices = fields[name].metadata.get("choices")
            if choices is not None:
                one_of(value, name, choices)
            else:
                values[name] = _as_default(value, fields[name].default, name)
        try:
            return cls(cls.Options(**values))
        except (TypeError, ValueError) as error:
            raise UsageError(f"options of {cls.name}: {error}") from error

    def check(self, image_size: int | None) -> None:  # noqa: B027 - most methods have nothing to refuse here
        """Refuse options that no run could use, before anything is read.

        Args:
            image_size: side of the images in pixels; None where it is not known yet.

        Raises:
            UsageError: what is wrong, and what would be right.
        """

    def options_of_stage(self, stage: str) -> dict[str, Any]:
        """Option values that decide `stage` ("score" or "select")."""
        return {
            field.name: getattr(self.options, field.name)
            for field in dataclasses.fields(self.options)
            if field.metadata["stage"] == stage
        }
