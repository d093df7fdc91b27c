"""The Shapley engine: masked images through the model, their scores through the estimator's projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ddfast.attribution.estimators import Plan, make_plan
from ddfast.attribution.flight import Flight
from ddfast.attribution.forward import Forward, assemble, players_of, prepare
from ddfast.attribution.validation import (
    check_baseline,
    check_chunk_size,
    check_finite,
    check_grid,
    check_images,
    check_labels,
    check_model,
    check_scores,
    check_seed,
)
from ddfast.ops import masked_batch, shapley_heatmap
from ddfast.ops._attribution import VALUES
from ddfast.ops.precision import resolve_precision

DEFAULT_CHUNK_SIZE = 128

Channels = Tensor | Sequence[float] | None


@torch.no_grad()
def shapley(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    grid: int | tuple[int, int] = 4,
    n_samples: int = 32,
    estimator: str = "permutation",
    value: str = "logit",
    baseline: float | Tensor = 0.0,
    precision: str = "float32",
    seed: int | Tensor = 0,
    *,
    mean: Channels = None,
    std: Channels = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Shapley values of the grid cells of images: the informativeness of InfoUtil, Sec. 3.2.1.

    The cells are the d players of the game v(s) = model(x masked to s)[label]; absent cells show the
    baseline.

    Args:
        model: module in eval mode, or function, from images [n, C, H, W] to class scores [n, classes]. It is
            given channels-last batches of its parameters' dtype (without parameters: of the images', float32
            for uint8).
        images: uint8 or float [B, C, H, W]. uint8 is scaled to [0, 1] first.
        labels: int64 [B], the class whose score is attributed.
        grid: cells per side, or (rows, columns). A grid that does not divide the image is split as evenly as
            possible.
        n_samples: model evaluations an image, the empty and the full image included. `exact` takes 2^d
            instead.
        estimator: "permutation" (antithetic pairs of orders), "designed" (the coalitions that tell the most under a
            prior over games, and what it expects of them), "gp" (the same prior on coalitions drawn at random),
            "paired", "leverage" and "enumerated" (constrained regression on complement pairs), "ramc" (unbiased
            regression-adjusted Monte Carlo), "kernel" (Captum's KernelShap, whose own budget is n_samples=25) or
            "exact" (d <= 20). Formulas and smallest budgets stand in `ddfast.attribution.estimators`.
        value: the score, "logit" (the model's output), "prob" (its softmax) or "logprob".
        baseline: what absent cells show, after normalisation: a number, one a channel [C], an image [C, H,
            W], or an image for each image [B, C, H, W].
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where it is faster.
        seed: int, one stream of coalitions for all images, or int64 [B], a stream an image.
        mean: channel means [C] to subtract; None leaves float images as they are.
        std: channel deviations [C] to divide by.
        chunk_size: masked images in one forward pass, 128 by default. The last bits of phi can depend on it,
            as on any batch size: fix it, and the composition of calls, where bytes have to agree.

    Returns:
        phi [B, d], cells in row-major order, float32 (float64 from a float64 model). It is a function of the
        arguments alone; with a stream an image, an image's phi owes nothing to the other images of the call.

    Raises:
        ValueError: arguments that do not fit (the message says which and what is valid), a model in training
            mode, or NaN or infinity from the model.
        TypeError: a baseline tensor that is not floating point.
    """
    game, plan, chunk = start(
        model,
        images,
        labels,
        grid=grid,
        n_samples=n_samples,
        estimator=estimator,
        value=value,
        baseline=baseline,
        precision=precision,
        seed=seed,
        mean=mean,
        std=std,
        chunk_size=chunk_size,
    )
    phi = game.nothing()
    for which, scores, projection, _ in evaluations(game, plan, chunk):
        phi[which] += game.project(which, scores, projection)
    return phi if game.dtype == torch.float64 else phi.float()


def start(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    grid: int | tuple[int, int],
    n_samples: int,
    estimator: str,
    value: str,
    baseline: float | Tensor,
    precision: str,
    seed: int | Tensor,
    mean: Channels,
    std: Channels,
    chunk_size: int | None,
) -> tuple[_ImageGame, Plan, int]:
    """Check the arguments of `shapley`: the games of the images, the plan of their evaluation, and how many
    masked images a forward pass takes.

    Raises:
        ValueError, TypeError: as `shapley`.
    """
    check_images(images, labels)
    check_model(model, images)
    rows, cols = check_grid(grid, images)
    resolve_precision(precision, images.device)
    if value not in VALUES:
        raise ValueError(f"value must be one of {', '.join(VALUES)}, got {value!r}")
    chunk = check_chunk_size(DEFAULT_CHUNK_SIZE if chunk_size is None else chunk_size)
    baseline = check_baseline(baseline, images)
    plan = make_plan(estimator, (rows, cols), n_samples, check_seed(seed, len(images)))

    game = _ImageGame(
        model,
        images,
        labels.to(images.device),
        (rows, cols),
        value,
        baseline,
        mean,
        std,
        precision,
        evaluations=plan.size,
        chunk=chunk,
    )
    return game, plan, chunk


def evaluations(game: _ImageGame, plan: Plan, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor, bool]]:
    """Run the plan, one forward pass after another.

    Yields:
        (which, scores, projection, last): class scores [b, k, classes] of the images `which` under k coalitions,
        the rows [k, d] or [b, k, d] of the estimator's projection that belong to them, and whether these were the
        last coalitions of those images.

    Raises:
        ValueError: at its end, NaN or infinity from the model.
    """
    images, first = len(game.images), 0
    if images and not game.baseline_per_image:
        # Nothing of an image shows in the empty coalition: one evaluation serves all.
        coalitions, projection = plan.rows(0, 1)
        scores = game.scores(slice(0, 1), _of(slice(0, 1), coalitions))
        yield slice(None), scores.expand(images, -1, -1), projection, False
        first = 1
    chunks = _chunks(images, first, plan.size, chunk)

    def micro_batch(cut: tuple[slice, int, int]) -> MicroBatch:
        which, begin, end = cut
        return game.micro_batch(which, _of(which, plan.rows(begin, end)[0]))

    for (which, begin, end), scores in game.flight.run(chunks, micro_batch, game.run):
        projection = plan.rows(begin, end)[1]
        yield which, scores, _of(which, projection), end == plan.size
    game.check_finite()


@dataclass(frozen=True)
class MicroBatch:
    """Masked images that go through the model at once.

    Attributes:
        count: coalitions of each of its images.
        assembled: whether the tensors are what the last stage of a `Forward` takes, or masked images.
        tensors: of b images under `count` coalitions.
        sets: the coalitions, int64 [b, count] of `players_of`, where they are known on the CPU.
    """

    count: int
    assembled: bool
    tensors: tuple[Tensor, ...]
    sets: Tensor | None = None


@dataclass
class _ImageGame:
    """The games v(s) = f(x masked to s)_y of a batch of images (InfoUtil, Sec. 3.2.1)."""

    model: Callable[[Tensor], Tensor]
    images: Tensor
    labels: Tensor
    grid: tuple[int, int]
    value: str
    baseline: float | Tensor
    mean: Channels
    std: Channels
    precision: str
    evaluations: int = 0  # an image, of the whole game; 0: a call's own count tells
    chunk: int = DEFAULT_CHUNK_SIZE
    evaluated: int = 0
    not_finite: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dtype = compute_dtype(self.model, self.images)
        self.baseline_per_image = isinstance(self.baseline, Tensor) and self.baseline.dim() == 4
        self.forward: Forward | None = None
        self._planned = 0
        self._variants: tuple[slice, tuple[Tensor, ...]] | None = None
        self.flight = Flight(self.images.device)

    def scores(self, which: slice, coalitions: Tensor) -> Tensor:
        """Class scores [b, k, classes] of the images `which` under coalitions bool [k, d] or [b, k, d]."""
        return self.run(self.micro_batch(which, coalitions))

    def micro_batch(self, which: slice, coalitions: Tensor) -> MicroBatch:
        """The images `which` under coalitions bool [k, d] or [b, k, d], ready for the model."""
        count = coalitions.shape[-2]
        if self.forward is None or (not self.evaluations and count > self._planned):
            self._planned = self.evaluations or count
            self.forward = prepare(
                self.model,
                (self.images.shape[1], self.images.shape[2], self.images.shape[3]),
                self.grid,
                self._planned,
                dtype=self.dtype,
                device=self.images.device,
                precision=self.precision,
            )
        maps = self._maps(which) if count > 1 and self.forward.cuts else None
        if maps is None:
            return MicroBatch(count, False, (self._masked(which, coalitions),))
        tensors = assemble(self.forward.cuts[-1], maps, coalitions)
        if self.images.device.type != "cpu":
            return MicroBatch(count, True, tensors)
        sets = players_of(coalitions.cpu()).expand(len(tensors[0]) // count, -1)
        return MicroBatch(count, True, tensors, sets)

    def run(self, batch: MicroBatch) -> Tensor:
        """Class scores [b, k, classes] of a micro-batch."""
        assert self.forward is not None
        if batch.assembled:
            scores = self.forward.last(batch.tensors, batch.sets)
        else:
            scores = self.forward.direct(*batch.tensors)
        images = len(batch.tensors[0])
        check_scores(scores, images)
        if self.evaluated == 0:
            check_labels(self.labels, scores.shape[1])
        self.evaluated += images
        self.not_finite.append((~scores.isfinite()).any(dim=1).sum())
        return scores.unflatten(0, (-1, batch.count))

    def _masked(self, which: slice, coalitions: Tensor) -> Tensor:
        """The images `which` under coalitions, normalised, [b k, C, H, W] channels-last."""
        assert self.forward is not None
        baseline = self.baseline
        if isinstance(baseline, Tensor) and self.baseline_per_image:
            baseline = baseline[which]
        return masked_batch(
            self.images[which],
            coalitions.to(self.images.device),
            grid=self.grid,
            baseline=baseline,
            mean=self.mean,
            std=self.std,
            dtype=self.forward.dtype,
        )

    def _maps(self, which: slice) -> tuple[Tensor, ...] | None:
        """Features of the variants of the images `which`, kept until others are asked for; None: no reuse."""
        assert self.forward is not None
        if self._variants is None or self._variants[0] != which:
            self._variants = None
            images = len(self.images[which])
            maps = self.forward.variants(lambda patterns: self._masked(which, patterns), images, self.chunk)
            if not self.forward.checked:
                start = which.indices(len(self.images))[0]
                first = slice(start, start + 1)
                if not self.forward.agrees(
                    lambda s: self._masked(first, s), maps, self.grid[0] * self.grid[1]
                ):
                    return None
            self._variants = which, maps
        return self._variants[1]

    def nothing(self) -> Tensor:
        """phi [B, d] before the first evaluation, float64: what the evaluations bring is added to it."""
        rows, cols = self.grid
        return torch.zeros(len(self.images), rows * cols, dtype=torch.float64, device=self.images.device)

    def project(self, which: slice, scores: Tensor, projection: Tensor) -> Tensor:
        """What these scores bring to phi [b, d] of the images `which`: sum_k projection[k, i] v(scores_k)."""
        return shapley_heatmap(scores, self.labels[which], weights(projection, scores), value=self.value)

    def check_finite(self) -> None:
        """Raise where a score was NaN or infinite. Read once, at the end: on a GPU every read waits."""
        bad = int(torch.stack(self.not_finite).sum()) if self.not_finite else 0
        check_finite(bad, self.evaluated, "masked images")


def weights(projection: Tensor, scores: Tensor) -> Tensor:
    """Rows of a projection on the device of the scores, in the dtype that `shapley_heatmap` takes with theirs."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return projection.to(scores.device, dtype)


def _chunks(images: int, first: int, size: int, chunk: int) -> Iterator[tuple[slice, int, int]]:
    """Cut images x plan rows `first` to `size - 1` into forward passes of at most `chunk` masked images."""
    together = max(1, chunk // (size - first))
    for begin in range(0, images, together):
        for start in range(first, size, chunk):
            yield slice(begin, min(begin + together, images)), start, min(start + chunk, size)


def _of(which: slice, rows: Tensor) -> Tensor:
    """Plan rows for the images `which`: [k, d] serves every image, of [B, k, d] each takes its own."""
    return rows if rows.dim() == 2 else rows[which]


def compute_dtype(model: Callable[[Tensor], Tensor], images: Tensor) -> torch.dtype:
    """Dtype of the model's first floating parameter, else of the images, else float32."""
    for parameter in model.parameters() if isinstance(model, nn.Module) else ():
        if parameter.is_floating_point():
            return parameter.dtype
    return images.dtype if images.is_floating_point() else torch.float32
