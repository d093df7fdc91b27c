"""The game of feature masks, v(s) = f(inputs where a feature of s is, baselines elsewhere), many s in a pass.

The general form of the image game of `engine`: any number of input tensors, any grouping of their elements
into features (the players), any baselines, targets and further arguments. What it saves over one coalition a
pass is the passes, and the coalitions that were drawn more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.attribution.engine import ImageGame, compute_dtype
from ddfast.attribution.inspection import Inspection

MAX_KEYED_PLAYERS = 62
"""Up to here a coalition is one 64-bit number, and repeated coalitions are cheap to find."""

_MAX_GRID_SIDE = 64

# What a forward function may raise when it meets more rows at once than it was written for.
_REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


class CannotStackError(Exception):
    """The forward function does not give each row of a stacked batch what it gives the row alone."""


class Coalitions(Protocol):
    """Coalitions of d players, shared by all examples or each example's own, made on demand."""

    @property
    def size(self) -> int:
        """K, the number of coalitions (of each example)."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Coalitions `start` to `stop - 1`: bool [stop - start, d], or [B, stop - start, d]."""
        ...


@dataclass(frozen=True)
class KeyedCoalitions:
    """Coalitions as numbers int64 [K] or [B, K]: bit i says whether player i is there (d <= 62)."""

    keys: Tensor
    d: int

    @property
    def size(self) -> int:
        """K, the number of coalitions (of each example)."""
        return self.keys.shape[-1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Coalitions `start` to `stop - 1`: bool [(B,) stop - start, d]."""
        return (self.keys[..., start:stop, None] >> torch.arange(self.d)) & 1 == 1


@dataclass(frozen=True)
class HeldCoalitions:
    """Coalitions in memory, bool [K, d] or [B, K, d]."""

    held: Tensor

    @property
    def size(self) -> int:
        """K, the number of coalitions (of each example)."""
        return self.held.shape[-2]

    def rows(self, start: int, stop: int) -> Tensor:
        """Coalitions `start` to `stop - 1`: bool [(B,) stop - start, d]."""
        return self.held[..., start:stop, :]


@dataclass(frozen=True)
class PrefixCoalitions:
    """The d coalitions that grow along each of P orders: number p d + j holds the first j + 1 of order p.

    Attributes:
        joined: int64 [P, m], the time 0 .. d - 1 at which each of the m players joins.
        d: steps an order.
    """

    joined: Tensor
    d: int

    @property
    def size(self) -> int:
        """P d."""
        return len(self.joined) * self.d

    def rows(self, start: int, stop: int) -> Tensor:
        """Coalitions `start` to `stop - 1`: bool [stop - start, m]."""
        number = torch.arange(start, stop)
        return self.joined[number // self.d] <= (number % self.d)[:, None]


def distinct(coalitions: Tensor) -> tuple[Coalitions, Tensor]:
    """The coalitions that differ, each example's apart, and where each of the given ones went.

    Args:
        coalitions: bool [S, K, d].

    Returns:
        K' <= K coalitions a stream (streams with fewer are filled up with the empty one), and int64 [S, K],
        the place of each given coalition among them. Beyond 62 players nothing is merged.
    """
    streams, count, d = coalitions.shape
    if d > MAX_KEYED_PLAYERS:
        return HeldCoalitions(coalitions), torch.arange(count).expand(streams, count)
    ordered, origin = (coalitions.long() << torch.arange(d)).sum(dim=-1).sort(dim=-1)
    first_seen = torch.ones_like(ordered, dtype=torch.bool)
    first_seen[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = first_seen.long().cumsum(dim=-1) - 1
    keys = torch.zeros(streams, int(rank.max()) + 1 if rank.numel() else 0, dtype=torch.int64)
    place = torch.empty_like(rank).scatter_(1, origin, rank)
    return KeyedCoalitions(keys.scatter_(1, rank, ordered), d), place


@dataclass
class FeatureGame:
    """The game of B examples.

    Attributes:
        run: (inputs, target, additional arguments) -> output with the target selected; what is run.
        inputs: tensors [B, ...].
        baselines: for each input a number, or a tensor [1 or B, ...] that broadcasts to it.
        masks: for each input int64 [1 or B, ...], the player of each element, broadcastable to the input.
            Elements of a negative player always show the baseline.
        target: Captum's target: None, int, tuple, tensor, or list.
        additional: further arguments of the forward function, None or a tuple.
        d: number of players.
    """

    run: Callable[[tuple[Tensor, ...], Any, Any], Any]
    inputs: tuple[Tensor, ...]
    baselines: tuple[float | Tensor, ...]
    masks: tuple[Tensor, ...]
    target: Any
    additional: tuple[Any, ...] | None
    d: int

    def __post_init__(self) -> None:
        self.inspection: Inspection | None = (
            None  # of the model, where the full coalition went through it alone
        )
        # Player d is one that never joins.
        self._indices = tuple(torch.where(mask < 0, self.d, mask) for mask in self.masks)
        self._never = any(bool((mask < 0).any()) for mask in self.masks)

    @property
    def examples(self) -> int:
        """B."""
        return len(self.inputs[0])

    def values(
        self,
        coalitions: Coalitions,
        *,
        full_values: Tensor,
        rows_per_forward: int,
        advance: Callable[[int], object],
    ) -> Tensor:
        """Outputs of every example under every coalition, `rows_per_forward` rows a pass.

        The first pass also holds the full coalition, in the middle of the others. Where it does not give what
        it gave alone, the forward function mixes rows (it returns one value a batch, normalises over the batch,
        draws at random, ...) and nothing is returned.

        Args:
            coalitions: K of them, at least 1.
            full_values: [B, ...], what a plain call gave for the inputs themselves.
            rows_per_forward: rows of a pass, at least 1.
            advance: told of the number of rows after each pass.

        Returns:
            float64 [B, K, ...] on the CPU.

        Raises:
            CannotStackError: rows are not independent.
        """
        done = []
        together = max(1, rows_per_forward // max(1, coalitions.size))
        for begin in range(0, self.examples, together):
            which = slice(begin, min(begin + together, self.examples))
            parts = []
            for start in range(0, coalitions.size, rows_per_forward):
                block = coalitions.rows(start, min(start + rows_per_forward, coalitions.size))
                block = block if block.dim() == 2 else block[which]
                if begin == start == 0:
                    parts.append(self._checked(which, block, full_values))
                else:
                    parts.append(self._stacked(which, block))
                self._check_shape(parts[-1], full_values)
                advance((which.stop - which.start) * block.shape[-2])
            done.append(torch.cat(parts, dim=1))
        return torch.cat(done).cpu().double()

    def values_alone(self, coalitions: Coalitions, advance: Callable[[int], object]) -> Iterator[Any]:
        """Outputs of all examples together, one coalition a pass, arguments as they were given.

        Args:
            coalitions: K of them, shared by all examples.
            advance: told of 1 after each pass.

        Yields:
            K outputs of `run`.
        """
        for number in range(coalitions.size):
            coalition = coalitions.rows(number, number + 1).view(1, -1)
            inputs = self.perturbed(slice(None), coalition)
            yield self.run(inputs, self.target, self.additional)
            advance(1)

    def perturbed(self, which: slice, coalitions: Tensor) -> tuple[Tensor, ...]:
        """The examples `which` under coalitions bool [k, d] or [b, k, d]: each input as [b k, ...]."""
        rows = []
        if self._never:
            coalitions = F.pad(coalitions, (0, 1))
        for entire, base, players in zip(self.inputs, self.baselines, self._indices, strict=True):
            present = _present(coalitions.to(entire.device), _of(players, which))
            inputs = entire[which]
            if isinstance(base, Tensor):
                base = _of(base.to(entire.device), which).unsqueeze(1)
            rows.append(torch.where(present, inputs.unsqueeze(1), base).flatten(0, 1))
        return tuple(rows)

    def outputs(self, which: slice, coalitions: Tensor) -> Any:
        """Outputs [b k, ...] of the examples `which` under coalitions bool [k, d] or [b, k, d]."""
        example = torch.arange(self.examples)[which].repeat_interleave(coalitions.shape[-2])
        return self.run(self.perturbed(which, coalitions), *self._arguments(example))

    def _arguments(self, example: Tensor) -> tuple[Any, Any]:
        """Target and further arguments of rows that belong to the examples `example` int64 [R]."""
        target = self.target
        if isinstance(target, list):
            target = [target[i] for i in self._aligned(target, example).tolist()]
        elif isinstance(target, Tensor) and target.numel() > 1:
            target = target[self._aligned(target, example).to(target.device)]
        if self.additional is None:
            return target, None
        return target, tuple(
            value[self._aligned(value, example).to(value.device)]
            if isinstance(value, Tensor) and value.dim() > 0
            else value
            for value in self.additional
        )

    def _aligned(self, value: Tensor | list, example: Tensor) -> Tensor:
        if len(value) != self.examples:
            raise CannotStackError(f"an argument has {len(value)} entries for {self.examples} examples")
        return example

    def _stacked(self, which: slice, coalitions: Tensor) -> Tensor:
        """Outputs [b, k, ...]; a block that does not fit into the device's memory is halved."""
        try:
            outputs = self.outputs(which, coalitions)
        except torch.OutOfMemoryError:
            half = coalitions.shape[-2] // 2
            if not half:
                raise CannotStackError("one coalition does not fit into the device's memory") from None
            parts = coalitions[..., :half, :], coalitions[..., half:, :]
            return torch.cat([self._stacked(which, part) for part in parts], dim=1)
        except _REFUSALS as error:
            raise CannotStackError(str(error)) from error
        examples, rows = which.stop - which.start, coalitions.shape[-2]
        if not isinstance(outputs, Tensor) or outputs.dim() == 0 or len(outputs) != examples * rows:
            raise CannotStackError("the output has no entry for every row")
        return outputs.unflatten(0, (examples, rows))

    def _checked(self, which: slice, coalitions: Tensor, full_values: Tensor) -> Tensor:
        """Outputs [b, k, ...], after the full coalition in their midst gave what it gave alone."""
        middle = coalitions.shape[-2] // 2
        before, after = coalitions[..., :middle, :], coalitions[..., middle:, :]
        full = torch.ones_like(coalitions[..., :1, :])
        outputs = self._stacked(which, torch.cat([before, full, after], dim=-2))
        self._check_shape(outputs, full_values)
        wanted = full_values[which].to(outputs.device)
        found = outputs[:, middle].reshape(wanted.shape)
        # Batch sizes differ in their last bits only; TF32 and half precision round that much more coarsely.
        fine = outputs.device.type == "cpu" and outputs.dtype in (torch.float32, torch.float64)
        share = 1e-3 if fine and not torch.is_autocast_enabled(outputs.device.type) else 2e-2
        scale = torch.maximum(outputs.abs().amax(), wanted.abs().amax())
        if not bool(((found - wanted).abs() <= share * scale).all()):
            raise CannotStackError("rows of a stacked batch differ from the same rows alone")
        if bool(wanted.abs().amax() < 50 * share * scale):
            # What is near zero cannot tell that it was scaled. The largest output can.
            largest = outputs.reshape(*outputs.shape[:2], -1).abs().amax(dim=2)
            row, column = divmod(int(largest.argmax()), largest.shape[1])
            all_rows = torch.cat([before, full, after], dim=-2)
            coalition = (all_rows if all_rows.dim() == 2 else all_rows[row])[column : column + 1]
            alone = self._stacked(slice(which.start + row, which.start + row + 1), coalition)[0, 0]
            if not bool(((outputs[row, column] - alone).abs() <= share * scale).all()):
                raise CannotStackError("a row of a stacked batch differs from the same row alone")
        return torch.cat([outputs[:, :middle], outputs[:, middle + 1 :]], dim=1)

    @staticmethod
    def _check_shape(outputs: Tensor, full_values: Tensor) -> None:
        if outputs.shape[2:].numel() != full_values.shape[1:].numel():
            raise CannotStackError("the output of a stacked batch has another shape")
        if outputs.is_complex() or outputs.dtype == torch.bool:
            raise CannotStackError(f"outputs are {outputs.dtype}")


@dataclass
class GridGame(FeatureGame):
    """The game of images whose features are cells of a grid, or unions of cells: the engine's image game.

    Attributes:
        model: from images [n, C, H, W] to class scores [n, classes].
        select: (class scores [n, classes], target) -> the target's.
        grid: (rows, columns) of cells.
        players: int64 [rows * columns], the player of each cell.
        evaluations: coalitions an image, about. The engine decides by it what to reuse, and prepares the model
            anew for another number: it should not change from call to call.
    """

    model: Callable[[Tensor], Tensor]
    select: Callable[[Tensor, Any], Tensor]
    grid: tuple[int, int]
    players: Tensor
    evaluations: int

    def values(self, coalitions: Coalitions, *, rows_per_forward: int, **options: Any) -> Tensor:
        """As `FeatureGame.values`."""
        (images,), (baseline,) = self.inputs, self.baselines
        if isinstance(baseline, Tensor) and len(baseline) == 1:
            baseline = baseline[0]
        self._engine = ImageGame(
            self.model,
            images,
            torch.zeros(len(images), dtype=torch.int64, device=images.device),
            self.grid,
            "logit",
            baseline,
            None,
            None,
            "float32",
            evaluations=self.evaluations,
            chunk=rows_per_forward,
            compared=True,
            inspection=self.inspection,
        )
        return super().values(coalitions, rows_per_forward=rows_per_forward, **options)

    def outputs(self, which: slice, coalitions: Tensor) -> Any:
        """Outputs [b k] of the images `which` under coalitions bool [k, d] or [b, k, d]."""
        scores = self._engine.scores(which, coalitions[..., self.players])
        example = torch.arange(self.examples)[which].repeat_interleave(coalitions.shape[-2])
        return self.select(scores.flatten(0, 1), self._arguments(example)[0])


def as_grid_game(
    game: FeatureGame,
    model: Callable[[Tensor], Tensor],
    select: Callable[[Tensor, Any], Tensor],
    evaluations: int,
) -> GridGame | None:
    """The same game through the image engine, or None where it is not one of images and grid cells."""
    if len(game.inputs) != 1 or game.additional is not None or game.target is None:
        return None
    (images,), (baseline,), (mask,) = game.inputs, game.baselines, game.masks
    if images.dim() != 4 or not images.is_floating_point() or compute_dtype(model, images) != images.dtype:
        return None
    if isinstance(baseline, Tensor) and (
        baseline.dtype != images.dtype or baseline.shape[1:] != images.shape[1:]
    ):
        return None
    if images.device.type not in ("cpu", "cuda") or torch.is_autocast_enabled(images.device.type):
        return None
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        return None
    if mask.shape[0] != 1 or (mask != mask[:, :1]).any():
        return None
    found = find_grid(mask[0, 0].expand(images.shape[2:]))
    if found is None:
        return None
    grid, players = found
    fields = (game.run, game.inputs, game.baselines, game.masks, game.target, game.additional, game.d)
    found_game = GridGame(
        *fields, model=model, select=select, grid=grid, players=players, evaluations=evaluations
    )
    found_game.inspection = game.inspection
    return found_game


def find_grid(mask: Tensor) -> tuple[tuple[int, int], Tensor] | None:
    """The coarsest grid, split as `masked_batch` splits, of which every cell lies in a single feature.

    Args:
        mask: int [H, W], the feature of each pixel.

    Returns:
        (rows, columns) and the feature of each cell, int64 [rows * columns] on the CPU; None where no grid of
        up to 64 cells a side fits, or a pixel belongs to no feature.
    """
    mask = mask.cpu()
    if not mask.numel() or bool((mask < 0).any()):
        return None
    starts = [_grid_starts((mask != mask.roll(1, dims=axis)).any(dim=1 - axis)) for axis in (0, 1)]
    if starts[0] is None or starts[1] is None:
        return None
    return (len(starts[0]), len(starts[1])), mask[starts[0]][:, starts[1]].flatten()


def _grid_starts(changes: Tensor) -> Tensor | None:
    """First pixels floor(r length / R) of the fewest R cells whose ends hold all `changes` (bool [length])."""
    length = len(changes)
    changes = changes.clone()
    changes[0] = False  # roll() compared it with the last
    wanted = int(changes.sum())
    for cells in range(wanted + 1, min(length, _MAX_GRID_SIDE) + 1):
        starts = torch.arange(cells) * length // cells
        if int(changes[starts].sum()) == wanted:
            return starts
    return None


def _of(per_example: Tensor, which: slice) -> Tensor:
    """Of [B, ...] the examples `which`; [1, ...] serves them all."""
    return per_example if len(per_example) == 1 else per_example[which]


def _present(coalitions: Tensor, players: Tensor) -> Tensor:
    """Which elements are there: bool [b or 1, k, ...] from coalitions bool [(b,) k, d], players [b or 1, ...]."""
    if coalitions.dim() == 2:
        coalitions = coalitions.unsqueeze(0)
    shape = players.shape[1:]
    players = players.flatten(1)
    if len(players) == 1:
        return coalitions.index_select(2, players[0]).unflatten(2, shape)
    index = players.unsqueeze(1).expand(-1, coalitions.shape[1], -1)
    return coalitions.expand(len(players), -1, -1).gather(2, index).unflatten(2, shape)
