"""The Shapley engine: masked images through the model, their scores through the estimator's projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ddfast.attribution.estimators.plans import Plan, SampledPlan, make_plan
from ddfast.attribution.flight import Flight
from ddfast.attribution.inspection import Inspection, alike, check_rows, inspect, look
from ddfast.attribution.validation import (
    as_tensors,
    check_baseline,
    check_chunk_size,
    check_finite,
    check_grid,
    check_images,
    check_labels,
    check_scores,
    check_seed,
)
from ddfast.masked_forward.forward import Forward, assemble, check_model, made_up_image, players_of, prepare
from ddfast.ops import masked_batch, shapley_heatmap
from ddfast.ops._attribution import VALUES
from ddfast.ops.graphs import Recorded
from ddfast.ops.layouts import called
from ddfast.ops.precision import autocast, resolve_precision
from ddfast.ops.transfer import statistic, to_device
from ddfast.random_states import RandomStates
from ddfast.unchanged import found_of

DEFAULT_CHUNK_SIZE = 128

Channels = Tensor | Sequence[float] | None


@torch.inference_mode(False)
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
            for uint8), which are its own to write to. Its scores have to be a function of one image: not of the
            others of a batch, nor of chance.
        images: uint8 or float [B, C, H, W], a tensor, an array or a list. uint8 is scaled to [0, 1] first.
        labels: int64 [B], the class whose score is attributed.
        grid: cells per side, or (rows, columns). A grid that does not divide the image is split as evenly as
            possible.
        n_samples: model evaluations an image, the empty and the full image included. `exact` takes 2^d
            instead.
        estimator: "permutation" (antithetic pairs of orders), "designed" (the coalitions that tell the most under a
            prior over games, and what it expects of them), "gp" (the same prior on coalitions drawn at random),
            "paired", "leverage" and "enumerated" (constrained regression on complement pairs), "ramc" (unbiased
            regression-adjusted Monte Carlo), "kernel" (Captum's KernelShap, whose own budget is n_samples=25) or
            "exact" (d <= 20). Formulas and smallest budgets stand in `ddfast.attribution.estimators.plans`.
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
            mode, one whose scores depend on the batch or on random numbers, or NaN or infinity from the model.
        TypeError: a baseline tensor that is not floating point.
    """
    images, labels = as_tensors(images, labels)
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
    grid: int | tuple[int, int] = 4,
    n_samples: int = 32,
    estimator: str = "permutation",
    value: str = "logit",
    baseline: float | Tensor = 0.0,
    precision: str = "float32",
    seed: int | Tensor = 0,
    mean: Channels = None,
    std: Channels = None,
    chunk_size: int | None = None,
) -> tuple[ImageGame, Plan, int]:
    """Check the arguments of `shapley`, whose defaults are the same: the games of the images, the plan of their
    evaluation, and how many masked images a forward pass takes.

    Raises:
        ValueError, TypeError: as `shapley`.
    """
    check_images(images, labels)
    known = _known(model, images, grid, precision, baseline, mean, std)
    if known is None or known.inspection is None:
        check_model(model, images)
    rows, cols = check_grid(grid, images)
    resolve_precision(precision, images.device)
    if value not in VALUES:
        raise ValueError(f"value must be one of {', '.join(VALUES)}, got {value!r}")
    chunk = check_chunk_size(DEFAULT_CHUNK_SIZE if chunk_size is None else chunk_size)
    baseline = check_baseline(baseline, images)
    seed = check_seed(seed, len(images))
    game = ImageGame(
        model,
        images,
        to_device(labels, images.device),
        (rows, cols),
        value,
        baseline,
        *(_statistics(mean, std, images) if known is None else known.statistics),
        precision,
        chunk=chunk,
        known=known,
    )
    game.look()  # before a design is searched for, which may take seconds
    plan = make_plan(estimator, (rows, cols), n_samples, seed)
    if isinstance(plan, SampledPlan):
        plan = plan.on(images.device)
    game.evaluations = plan.size
    return game, plan, chunk


def _statistics(mean: Channels, std: Channels, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return statistic(mean, images.device), statistic(std, images.device)


@dataclass
class _Known:
    """What is known of a model that is held unchanged, for one kind of call: looked for in the first, then used.

    Attributes:
        statistics: mean and standard deviation, on the device.
        inspection: what was seen of the model.
        forwards: the model prepared, by the evaluations an image.
        empty: class scores [1, 1, classes] of the empty coalition, alike.
        batches: evaluations an image at which a large batch was held against the model itself.
        passes: whole passes over the images of a micro-batch, which a GPU records.
    """

    statistics: tuple[Tensor | None, Tensor | None]
    inspection: Inspection | None = None
    forwards: dict[int, Forward] = field(default_factory=dict)
    empty: dict[int, Tensor] = field(default_factory=dict)
    batches: set[int] = field(default_factory=set)
    passes: dict[tuple[Any, ...], Recorded] = field(default_factory=dict)


def _known(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    grid: int | tuple[int, int],
    precision: str,
    baseline: float | Tensor,
    mean: Channels,
    std: Channels,
) -> _Known | None:
    """What is known of a model for calls like this one; None where it may have changed since the last."""
    found = found_of(model)
    if found is None or any(isinstance(value, Tensor) for value in (baseline, mean, std)):
        return None
    settings = (tuple(images.shape[1:]), images.dtype, images.device, grid, precision, baseline)
    numbers = tuple(None if values is None else tuple(values) for values in (mean, std))
    key = ("shapley", *settings, *numbers)
    if key not in found:
        found[key] = _Known(_statistics(mean, std, images))
    return found[key]


def evaluations(
    game: ImageGame, plan: Plan, chunk: int, *, check: bool = True
) -> Iterator[tuple[slice, Tensor, Tensor, bool]]:
    """Run the plan, one forward pass after another.

    Without `check` nobody has looked yet whether the scores are numbers: `game.bad_scores` counts them.

    Yields:
        (which, scores, projection, last): class scores [b, k, classes] of the images `which` under k coalitions,
        the rows [k, d] or [b, k, d] of the estimator's projection that belong to them, and whether these were the
        last coalitions of those images.

    Raises:
        ValueError: at its end, NaN or infinity from the model.
    """
    states = RandomStates() if game.draws else None
    try:
        yield from _evaluations(game, plan, chunk)
        if check:
            game.check_finite()
    finally:
        if states is not None:
            states.restore()


def _evaluations(game: ImageGame, plan: Plan, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor, bool]]:
    images, first = len(game.images), 0
    if images and not game.baseline_per_image:
        # Nothing of an image shows in the empty coalition: one evaluation serves all.
        coalitions, projection = plan.rows(0, 1)
        scores = game.empty_scores(_of(slice(0, 1), coalitions))
        yield slice(None), scores.expand(images, -1, -1), projection, False
        first = 1
    chunks = _chunks(images, first, plan.size, chunk)

    def micro_batch(cut: tuple[slice, int, int]) -> MicroBatch:
        which, begin, end = cut
        return game.micro_batch(which, _of(which, plan.rows(begin, end)[0]))

    for (which, begin, end), scores in game.flight.run(chunks, micro_batch, game.run):
        projection = plan.rows(begin, end)[1]
        yield which, scores, _of(which, projection), end == plan.size


@dataclass(frozen=True)
class MicroBatch:
    """Masked images that go through the model at once.

    Attributes:
        count: coalitions of each of its images.
        assembled: whether the tensors are what the last stage of a `Forward` takes, or masked images.
        tensors: of b images under `count` coalitions.
        which: the images.
        coalitions: bool [count, d] or [b, count, d].
        sets: the coalitions, int64 [b, count] of `players_of`, where they are known on the CPU.
    """

    count: int
    assembled: bool
    tensors: tuple[Tensor, ...]
    which: slice
    coalitions: Tensor
    sets: Tensor | None = None


@dataclass
class ImageGame:
    """The games v(s) = f(x masked to s)_y of a batch of images (InfoUtil, Sec. 3.2.1).

    The model is inspected before its first pass, and what was prepared for it is compared with what it gives. Where
    the caller makes these comparisons on its own (`compared`), only the calls of its forward are looked at.
    """

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
    compared: bool = False
    known: _Known | None = None
    inspection: Inspection | None = None
    evaluated: int = 0
    not_finite: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dtype = compute_dtype(self.model, self.images)
        self.baseline_per_image = isinstance(self.baseline, Tensor) and self.baseline.dim() == 4
        self.forward: Forward | None = None
        self._planned = 0
        self._batch_compared = False
        self._variants: tuple[slice, tuple[Tensor, ...]] | None = None
        self.flight = Flight(self.images.device)

    def scores(self, which: slice, coalitions: Tensor) -> Tensor:
        """Class scores [b, k, classes] of the images `which` under coalitions bool [k, d] or [b, k, d]."""
        return self.run(self.micro_batch(which, coalitions))

    @property
    def is_settled(self) -> bool:
        """Whether all is known that is looked for at first, so that a pass is a function of tensors."""
        known = self.known
        settled = known is not None and self.evaluations in known.batches and self.evaluations in known.empty
        return settled and not self.draws and self.images.device.type != "cpu"

    def again(self) -> Callable[[Tensor, Tensor], ImageGame]:
        """The same game of other images and labels."""
        settings = (self.grid, self.value, self.baseline, self.mean, self.std, self.precision)
        evaluations, chunk, known = self.evaluations, self.chunk, self.known
        model = self.model

        def game(images: Tensor, labels: Tensor) -> ImageGame:
            return ImageGame(model, images, labels, *settings, evaluations, chunk, known=known)

        return game

    def recorded(self, key: tuple[Any, ...], run: Callable[..., tuple[Tensor, ...]]) -> Recorded:
        """A pass over tensors, made once for the settings of this game and `key`."""
        assert self.known is not None
        whole = (*key, self.evaluations, self.value, self.chunk)
        if whole not in self.known.passes:
            self.known.passes[whole] = Recorded(run)
        return self.known.passes[whole]

    def empty_scores(self, coalitions: Tensor) -> Tensor:
        """Class scores [1, 1, classes] of the empty coalition, in which nothing of any image shows."""
        if self.known is None:
            return self.scores(slice(0, 1), coalitions)
        if self.evaluations not in self.known.empty:
            self.known.empty[self.evaluations] = self.scores(slice(0, 1), coalitions)
        return self.known.empty[self.evaluations]

    @property
    def draws(self) -> bool:
        """Whether the model draws random numbers, if only such as do not count."""
        return self.inspection is not None and self.inspection.draws

    def look(self) -> None:
        """Inspect the model, once: as itself, on the first image, the last one masked, and one made up.

        Raises:
            ValueError: as `inspect`.
        """
        if self.known is not None and self.inspection is None:
            self.inspection = self.known.inspection
        if self.inspection is not None or not len(self.images):
            return
        d, last = self.grid[0] * self.grid[1], len(self.images) - 1
        full = self._masked(slice(0, 1), torch.ones(1, d, dtype=torch.bool), self.dtype)
        with autocast("float32", self.images.device):
            if self.compared:
                scores, calls = look(self.model, full)
                self.inspection = Inspection(full, scores, None, calls, False)
                return
            half = self._masked(slice(last, last + 1), (torch.arange(d) % 2 == 0)[None], self.dtype)
            if full.is_cuda:  # an index that a made-up value leads to may end the process there
                other = full.flip(-1)
            else:
                # Larger than the others, so that a maximum over the batch is seen as well as a mean.
                scale = 2 * torch.maximum(full.abs().amax(), half.abs().amax()).clamp(min=0.5)
                other = scale * made_up_image((full.shape[1], full.shape[2], full.shape[3]))[None].to(full)
            images = torch.cat([half, full, other]).contiguous(memory_format=torch.channels_last)
            self.inspection = inspect(self.model, images, self.labels, self.chunk)
        if self.known is not None:
            self.known.inspection = self.inspection

    def micro_batch(self, which: slice, coalitions: Tensor) -> MicroBatch:
        """The images `which` under coalitions bool [k, d] or [b, k, d], ready for the model."""
        count = coalitions.shape[-2]
        if self.forward is None or (not self.evaluations and count > self._planned):
            self._planned = self.evaluations or count
            self.forward = self._known_forward()
        cuts = self.forward.cuts
        maps = self._maps(which) if count > 1 and cuts else None
        if maps is None:
            masked = self._masked(which, coalitions, self.forward.dtype)
            return MicroBatch(count, False, (masked,), which, coalitions)
        tensors = assemble(cuts[-1], maps, coalitions)
        if self.images.device.type != "cpu":
            return MicroBatch(count, True, tensors, which, coalitions)
        sets = players_of(coalitions.cpu()).expand(len(tensors[0]) // count, -1)
        return MicroBatch(count, True, tensors, which, coalitions, sets)

    def _known_forward(self) -> Forward:
        if self.known is None:
            return self._prepared()
        if self._planned not in self.known.forwards:
            self.known.forwards[self._planned] = self._prepared()
        self._batch_compared = self._planned in self.known.batches
        return self.known.forwards[self._planned]

    def _prepared(self) -> Forward:
        """The model's `Forward`, which gives what the model gives for the inspected images."""
        self.look()
        seen = self.inspection
        assert seen is not None
        forward = self._prepare()
        if self.compared or self._gives(forward, seen):
            return forward
        forward = self._prepare(anew=True)
        if self._gives(forward, seen):
            return forward
        return self._prepare(as_it_is="what was prepared does not give what the model gives")

    def _prepare(self, *, anew: bool = False, as_it_is: str = "") -> Forward:
        assert self.inspection is not None
        return prepare(
            self.model,
            (self.images.shape[1], self.images.shape[2], self.images.shape[3]),
            self.grid,
            self._planned,
            dtype=self.dtype,
            device=self.images.device,
            precision=self.precision,
            images=self.inspection.images,
            calls=self.inspection.calls,
            anew=anew,
            as_it_is=as_it_is,
        )

    def _gives(self, forward: Forward, seen: Inspection) -> bool:
        if not forward.traced:
            return True
        given = forward.direct(seen.images[:2].to(forward.dtype, copy=True), once=True)
        wanted = seen.scores[:2]
        return given.shape == wanted.shape and alike(given, wanted, low=self._lowered(forward))

    def _lowered(self, forward: Forward) -> bool:
        return forward.dtype != self.dtype or forward.precision != "float32"

    def run(self, batch: MicroBatch) -> Tensor:
        """Class scores [b, k, classes] of a micro-batch."""
        assert self.forward is not None
        if batch.assembled:
            scores = self.forward.last(batch.tensors, batch.sets)
        else:
            scores = self.forward.direct(*batch.tensors)
        images = len(batch.tensors[0])
        check_scores(scores, images)
        if self.evaluated == 0 and self.compared:
            check_labels(self.labels, scores.shape[1])
        if not self.compared and not self._batch_compared and images > 3:
            scores = self._compared(batch, scores)
            self._batch_compared = True
            if self.known is not None:
                self.known.forwards[self._planned] = self.forward
                self.known.batches.add(self._planned)
        self.evaluated += images
        self.not_finite.append((~scores.isfinite()).any(dim=1).sum())
        return scores.unflatten(0, (-1, batch.count))

    def _compared(self, batch: MicroBatch, scores: Tensor) -> Tensor:
        """Scores of the first large batch, after one of its images got what the model gives it alone.

        Raises:
            ValueError: the model gives it something else in company.
        """
        assert self.forward is not None
        assert self.inspection is not None
        own = batch.coalitions if batch.coalitions.dim() == 2 else batch.coalitions[0]
        full = own.all(dim=1).nonzero()
        row = int(full[0]) if len(full) else len(own) - 1
        first = batch.which.indices(len(self.images))[0]
        device = self.images.device
        with autocast("float32", device):
            if first == 0 and len(full) and self.inspection.alone is not None:
                alone = self.inspection.alone
            else:
                masked = self._masked(slice(first, first + 1), own[row : row + 1], self.dtype)
                alone = called(self.model, masked)[0]
            lowered = self._lowered(self.forward)
            if alike(scores[row], alone, fine=not self.forward.traced and not lowered, low=lowered):
                return scores
            masked = self._masked(batch.which, batch.coalitions, self.dtype)
            check_rows(self.model, masked, row)
        if not self.forward.traced:
            return scores
        self._variants = None
        self.forward = self._prepare(as_it_is="what is assembled does not give what the model gives")
        masked = self._masked(batch.which, batch.coalitions, self.forward.dtype)
        return self.forward.direct(masked)

    def _masked(self, which: slice, coalitions: Tensor, dtype: torch.dtype) -> Tensor:
        """The images `which` under coalitions, normalised, [b k, C, H, W] channels-last."""
        baseline = self.baseline
        if isinstance(baseline, Tensor) and self.baseline_per_image:
            baseline = baseline[which]
        return masked_batch(
            self.images[which],
            to_device(coalitions, self.images.device),
            grid=self.grid,
            baseline=baseline,
            mean=self.mean,
            std=self.std,
            dtype=dtype,
        )

    def _maps(self, which: slice) -> tuple[Tensor, ...] | None:
        """Features of the variants of the images `which`, kept until others are asked for; None: no reuse."""
        forward = self.forward
        assert forward is not None
        if self._variants is None or self._variants[0] != which:
            self._variants = None
            images = len(self.images[which])
            cuts = forward.cuts
            maps = forward.variants(
                lambda patterns: self._masked(which, patterns, forward.dtype), images, self.chunk, cuts
            )
            start = which.indices(len(self.images))[0]
            first = slice(start, start + 1)
            if not forward.agrees(
                lambda s: self._masked(first, s, forward.dtype), maps, self.grid[0] * self.grid[1]
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
        check_finite(int(self.bad_scores()), self.evaluated, "masked images")

    def bad_scores(self) -> Tensor:
        """How many masked images got NaN or infinity so far, int64 on the device."""
        if not self.not_finite:
            return torch.zeros((), dtype=torch.int64, device=self.images.device)
        return torch.stack(self.not_finite).sum()


def weights(projection: Tensor, scores: Tensor) -> Tensor:
    """Rows of a projection on the device of the scores, in the dtype that `shapley_heatmap` takes with theirs."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return to_device(projection.to(dtype), scores.device)


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
