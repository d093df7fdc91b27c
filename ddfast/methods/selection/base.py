"""What methods that choose crops share: batches, candidates, the score table they rank, and their base.

A method sees micro-batches of decoded source images and returns candidate crops with their scores; the pipeline turns
those into rows of the score table. Selection is a sort over that table and never looks at a pixel again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ddfast.data.pool import Pool
from ddfast.methods.base import Context, Method
from ddfast.state import Checkpoint


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


class Selection(Method):
    """Base of the methods that choose crops: a scoring rule and a ranking rule."""

    stages: ClassVar[tuple[str, ...]] = ("score", "select", "compose", "relabel")
    # Whether `prepare` has something to do before images are scored.
    prepares: ClassVar[bool] = False
    # Whether the score table has a column of features, which `rank` chooses by.
    keeps_features: ClassVar[bool] = False
    # Which of the ranked crops share an image: "contiguous" puts ranks 0..k-1 in image 0 (InfoUtil, Algorithm
    # 1), "stride" puts rank r in image r mod IPC, so that the best-ranked crops open every image (RDED).
    layout: ClassVar[str] = "contiguous"

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
