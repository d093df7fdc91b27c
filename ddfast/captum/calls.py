"""What a call of Captum's Shapley explainers computes: its games, its draws and its regression.

`ddfast.captum.explainers` holds the classes. Here a call is read as Captum reads it, its coalitions are drawn as
Captum draws them, and the values come from `feature_game`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from captum._utils.common import _get_max_feature_index, _run_forward, _select_targets
from captum._utils.progress import progress
from captum.attr import ShapleyValueSampling as CaptumShapleyValueSampling
from captum.attr._core.shapley_value import _all_perm_generator, _perm_generator
from captum.attr._utils.common import _find_output_mode_and_verify, _tensorize_baseline
from torch import Tensor, nn

from ddfast.attribution.inspection import Inspection, look
from ddfast.captum.feature_game import (
    MAX_KEYED_PLAYERS,
    CannotStackError,
    Coalitions,
    FeatureGame,
    KeyedCoalitions,
    PrefixCoalitions,
    as_grid_game,
)
from ddfast.random_states import RandomStates, equal_states

_MAX_EXACT_PLAYERS = 20
_SINGULAR = 1e-6  # singular values below this share of the largest count as zero, as in scikit-learn's tol
_PLAN_ROWS = 1 << 14


class CaptumHasToServe(Exception):
    """This call is one that only Captum's own method answers as Captum does."""


class ShapleyCall:
    """One call of `attribute` on a game whose value is an output of any shape [E, ...], E = B or one a batch.

    The m players are the features that occur in the masks; d counts those that are missing among them too.
    """

    def __init__(
        self,
        explainer: CaptumShapleyValueSampling,
        inputs: tuple[Tensor, ...],
        baselines: tuple[Any, ...],
        target: Any,
        additional: tuple[Any, ...] | None,
        masks: tuple[Tensor, ...],
        n_samples: int,
        perturbations_per_eval: int,
        show_progress: bool,
    ) -> None:
        if not isinstance(perturbations_per_eval, int) or perturbations_per_eval < 1:
            raise CaptumHasToServe(f"perturbations_per_eval is {perturbations_per_eval}")
        if not isinstance(n_samples, int) or n_samples < 1:
            raise CaptumHasToServe(f"n_samples is {n_samples}")
        self.explainer = explainer
        self.n_samples = n_samples
        self.stacked_at_least = perturbations_per_eval
        self.show_progress = show_progress
        self.d = _get_max_feature_index(masks) + 1
        masks, self.player = _consecutive_players(masks, self.d)
        full_baselines = _tensorize_baseline(inputs, baselines)
        self.game = _feature_game(
            explainer.forward_func,
            inputs,
            # A number fills an integer input as an integer.
            tuple(
                number if entire.is_floating_point() else filled
                for number, filled, entire in zip(baselines, full_baselines, inputs, strict=False)
            ),
            target,
            additional,
            masks,
            int(self.player.max()) + 1,
        )
        # The forward function may write to what it is given.
        own = tuple(base.clone() for base in full_baselines)
        empty = _refusals_go_to_captum(self.game.run, own, target, additional)
        empty = empty.reshape(1) if isinstance(empty, Tensor) and empty.dim() == 0 else empty
        _find_output_mode_and_verify(
            empty, self.game.examples, perturbations_per_eval, masks, allow_multi_outputs=True
        )
        self.empty = _as_float64(empty)
        full = _as_float64(_full_output(self.game))
        self.full = full.reshape(1) if full.dim() == 0 else full
        if self.full.shape != self.empty.shape:
            raise CaptumHasToServe("the output changes its shape")
        if any(len(mask) > 1 for mask in masks) and len(self.empty) != self.game.examples:
            raise CaptumHasToServe("masks are one an example, outputs are not")

    def attributions(self) -> tuple[Tensor, ...]:
        """What `attribute` returns, an entry an input."""
        generator = self.explainer.permutation_generator
        if generator is _all_perm_generator:
            phi = self._exact()
            # A group of orders' steps may hold nothing but missing features: a short last group most easily.
            group = min(self.stacked_at_least, self.d % self.stacked_at_least or self.stacked_at_least)
            nothing_joins = self.d - self.game.d >= group
        elif generator is _perm_generator:
            orders = torch.stack([torch.randperm(self.d) for _ in range(self.n_samples)])
            steps = self.player[orders]  # -1 where a missing feature joins
            phi = self._along(steps)
            groups = (steps < 0).split(self.stacked_at_least, dim=1)
            nothing_joins = any(bool(group.all(dim=1).any()) for group in groups)
        else:
            raise CaptumHasToServe("permutation_generator is not Captum's")
        if nothing_joins:
            warnings.warn(
                "Feature mask is missing some integers between 0 and "
                "num_features, for optimal performance, make sure each"
                " consecutive integer corresponds to a feature.",
                stacklevel=2,
            )
        return tuple(
            self._spread(phi, mask, entire)
            for mask, entire in zip(self.game.masks, self.game.inputs, strict=True)
        )

    def _exact(self) -> Tensor:
        """phi [E, m, T] by enumeration: sum over s without i of (v(s + e_i) - v(s)) / (m binom(m - 1, |s|))."""
        m = self.game.d
        if m > _MAX_EXACT_PLAYERS:
            raise CaptumHasToServe(f"{m} features are too many to enumerate")
        values = self._keyed_values(torch.arange(1 << m))
        size = KeyedCoalitions(torch.arange(1 << m), m).rows(0, 1 << m).sum(dim=-1)
        weight = torch.tensor([1.0 / (m * math.comb(m - 1, k)) for k in range(m)], dtype=torch.float64)
        phi = []
        for i in range(m):
            without, with_i = values.unflatten(1, (-1, 2, 1 << i)).unbind(2)
            sizes = size.view(-1, 2, 1 << i)[:, 0]
            phi.append(torch.einsum("ehlt,hl->et", with_i - without, weight[sizes]))
        return torch.stack(phi, dim=1)

    def _along(self, steps: Tensor) -> Tensor:
        """phi [E, m, T]: mean change of the value as each player joins, over orders int64 [P, d] of players."""
        m = self.game.d
        joins = steps >= 0
        if m <= MAX_KEYED_PLAYERS:
            bits = torch.where(joins, torch.ones((), dtype=torch.int64) << steps.clamp(min=0), 0)
            keys, place = bits.cumsum(dim=1).unique(return_inverse=True)
            values = self._keyed_values(keys)
        else:
            joined = torch.empty(len(steps), m, dtype=torch.int64)
            joined[joins.nonzero()[:, 0], steps[joins]] = joins.nonzero()[:, 1]
            place = torch.arange(steps.numel()).view_as(steps)
            values = self._values(PrefixCoalitions(joined, self.d))
        after = values[:, place.flatten()].unflatten(1, place.shape)
        start = _rows_of(self.empty).unsqueeze(2).expand(-1, len(steps), -1, -1)
        change = after - torch.cat([start, after[:, :, :-1]], dim=2)
        phi = torch.zeros(len(values), m, values.shape[2], dtype=torch.float64)
        return phi.index_add_(1, steps[joins], change[:, joins]) / len(steps)

    def _keyed_values(self, keys: Tensor) -> Tensor:
        """Values float64 [E, K, T] of coalitions int64 [K], all different, of which two are known."""
        empty, full = keys == 0, keys == (1 << self.game.d) - 1
        values = torch.where(empty.unsqueeze(1), _rows_of(self.empty), _rows_of(self.full))
        others = ~(empty | full)
        values[:, others] = self._values(KeyedCoalitions(keys[others], self.game.d))
        return values

    def _values(self, coalitions: Coalitions) -> Tensor:
        """Values float64 [E, K, T] of K coalitions."""
        with _progress(self.explainer, coalitions.size * self.game.examples, self.show_progress) as advance:
            if coalitions.size and len(self.full) == self.game.examples:
                orders = (
                    self.n_samples if self.explainer.permutation_generator is _perm_generator else 1 << self.d
                )
                planned = min(orders * self.d, 1 << min(self.d, _MAX_EXACT_PLAYERS))
                stacked = _stacked_values(
                    self.explainer, self.game, coalitions, planned, self.full, self.stacked_at_least, advance
                )
                if stacked is not None:
                    return stacked.reshape(*stacked.shape[:2], -1)
            if coalitions.size and self.stacked_at_least > 1:
                raise CaptumHasToServe("coalitions do not share a forward pass")

            def advance_all(passes: int) -> None:
                advance(passes * self.game.examples)

            values = [_rows_of(self.full)[:, :0]]
            for output in self.game.values_alone(coalitions, advance_all):
                output = _as_float64(output)
                if output.numel() != self.full.numel():
                    raise CaptumHasToServe("the output changes its shape")
                values.append(_rows_of(output.reshape(self.full.shape)))
            _check_repeats(self.game, self.full)
        return torch.cat(values, dim=1)

    def _spread(self, phi: Tensor, mask: Tensor, entire: Tensor) -> Tensor:
        """phi [E, m, T] at every element of an input [B, ...]: float32 [output shape..., ...]."""
        phi = torch.nn.functional.pad(phi.mT.float(), (0, 1))  # player -1 of the mask has nothing
        players = torch.where(mask < 0, phi.shape[-1] - 1, mask).flatten(1).cpu()
        if len(players) == 1:
            spread = phi[..., players[0]]
        else:
            spread = phi.gather(2, players.unsqueeze(1).expand(-1, phi.shape[1], -1))
        spread = spread.view(*self.empty.shape, *mask.shape[1:])
        spread = spread.expand(*self.empty.shape, *entire.shape[1:])
        return spread.contiguous().to(self.game.inputs[0].device)


def _consecutive_players(masks: tuple[Tensor, ...], d: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Masks whose m features are numbered 0 .. m - 1, and the new number of each of the d, -1 for missing ones."""
    if any(mask.is_floating_point() or mask.is_complex() for mask in masks):
        raise CaptumHasToServe("a feature mask is not of integers")
    occurring = torch.cat([mask.flatten().cpu().long() for mask in masks]).unique()
    occurring = occurring[occurring >= 0]
    if not len(occurring):
        raise CaptumHasToServe("no feature occurs in the masks")
    player = torch.full((d + 1,), -1)
    player[occurring] = torch.arange(len(occurring))
    renumbered = tuple(player.to(mask.device)[torch.where(mask.long() < 0, d, mask.long())] for mask in masks)
    return renumbered, player[:d]


def _feature_game(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    baselines: tuple[Any, ...],
    target: Any,
    additional: tuple[Any, ...] | None,
    masks: tuple[Tensor, ...],
    d: int,
) -> FeatureGame:
    """The game of one call. Shapes that only Captum's own broadcasting explains are left to Captum."""
    examples = len(inputs[0]) if inputs and inputs[0].dim() else 0
    if not examples or any(entire.dim() == 0 or len(entire) != examples for entire in inputs):
        raise CaptumHasToServe("inputs differ in their number of examples")
    if not len(inputs) == len(baselines) == len(masks):
        raise CaptumHasToServe("inputs, baselines and masks differ in number")
    if any(mask.dtype not in (torch.int64, torch.int32) for mask in masks):
        raise CaptumHasToServe("a feature mask is not of integers")
    return FeatureGame(
        run=functools.partial(_run, forward_func),
        inputs=inputs,
        baselines=tuple(
            _aligned(base, entire) if isinstance(base, Tensor) else base
            for base, entire in zip(baselines, inputs, strict=True)
        ),
        masks=tuple(
            _aligned(mask, entire).to(entire.device, torch.int64)
            for mask, entire in zip(masks, inputs, strict=True)
        ),
        target=target,
        additional=additional,
        d=d,
    )


def _run(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    target: Any,
    additional: tuple[Any, ...] | None,
) -> Any:
    if additional is not None:
        # The forward function may write to them, and the next coalition needs them as they were.
        additional = tuple(value.clone() if isinstance(value, Tensor) else value for value in additional)
    return _run_forward(forward_func, inputs, target, additional)


def _aligned(tensor: Tensor, entire: Tensor) -> Tensor:
    """A mask or baseline that broadcasts to an input [B, ...], with all of its dimensions: [1 or B, ...]."""
    missing = entire.dim() - tensor.dim()
    if missing > 0 and len(entire) > 1 and (tensor.dim() == 0 or len(tensor) == len(entire)):
        raise CaptumHasToServe("a mask or baseline without a dimension of examples could be taken for one")
    if missing < 0:
        raise CaptumHasToServe("a mask or baseline has more dimensions than its input")
    tensor = tensor.reshape((1,) * missing + tensor.shape)
    if any(own not in (1, size) for own, size in zip(tensor.shape, entire.shape, strict=True)):
        raise CaptumHasToServe("a mask or baseline does not broadcast to its input")
    return tensor


def _stacked_values(
    explainer: Any,
    game: FeatureGame,
    coalitions: Coalitions,
    planned: int,
    full_values: Tensor,
    stacked_at_least: int,
    advance: Callable[[int], object],
) -> Tensor | None:
    """Values float64 [B, K, ...] with many rows in a pass, or None where the rows are not independent.

    `planned` is K before coalitions that were drawn twice became one: the same in calls with equal arguments.
    """
    rows = max(_rows_per_forward(explainer, game.inputs), stacked_at_least * game.examples)
    for stacked in (as_grid_game(game, explainer.forward_func, _select_targets, planned), game):
        if stacked is None:
            continue
        try:
            return stacked.values(coalitions, full_values=full_values, rows_per_forward=rows, advance=advance)
        except CannotStackError:
            continue
    return None


def _rows_per_forward(explainer: Any, inputs: tuple[Tensor, ...]) -> int:
    """What the explainer says, else as many rows as make up some megabytes of inputs.

    Integers may be tokens, whose embeddings are far larger than they are: few rows of those.
    """
    rows = getattr(explainer, "rows_per_forward", None)
    if rows is not None:
        return rows
    on_cpu = inputs[0].device.type == "cpu"
    if not all(entire.is_floating_point() for entire in inputs):
        return 16 if on_cpu else 64
    size = sum(entire[0].numel() * entire.element_size() for entire in inputs)
    budget, most = (32 << 20, 256) if on_cpu else (128 << 20, 512)
    return min(max(budget // max(size, 1), 16), most)


def _full_output(game: FeatureGame) -> Any:
    """What a plain call gives for the full coalition. A function that draws for it is Captum's to serve."""
    before = RandomStates.now()
    output = _plain_output(game)
    if not equal_states(RandomStates.now(), before):
        raise CaptumHasToServe("the forward function draws random numbers")
    return output


def _plain_output(game: FeatureGame) -> Any:
    inputs = game.perturbed(slice(None), torch.ones(1, game.d, dtype=torch.bool))
    function = game.run.args[0] if isinstance(game.run, functools.partial) else None
    if not isinstance(function, nn.Module) or len(inputs) > 1 or game.additional is not None:
        return _refusals_go_to_captum(game.run, inputs, game.target, game.additional)

    def watched(images: Tensor) -> Any:
        """The module's output. What it calls on the way tells whether what is kept of it is still of use."""
        before = images.clone()
        output, calls = look(function, images)
        if isinstance(output, Tensor):
            game.inspection = Inspection(before, output, None, calls, False)
        return output

    return _refusals_go_to_captum(_run, watched, inputs, game.target, None)


def _check_repeats(game: FeatureGame, full_values: Tensor) -> None:
    """The forward function gives the full coalition the value it gave before; else it draws at random."""
    again = _as_float64(_full_output(game)).reshape(full_values.shape)
    tolerance = 1e-4 * float(full_values.nan_to_num().abs().max())
    if not torch.allclose(again, full_values, rtol=1e-4, atol=tolerance, equal_nan=True):
        raise CaptumHasToServe("the forward function gives the same inputs different values")


def _refusals_go_to_captum(run: Callable[..., Any], *arguments: Any) -> Any:
    """`run(*arguments)`; what it raises, Captum's own method shall raise, or not."""
    try:
        return run(*arguments)
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError) as error:
        raise CaptumHasToServe(str(error)) from error


def _rows_of(output: Tensor) -> Tensor:
    """An output [E, ...] as [E, 1, T]."""
    return output.reshape(len(output), 1, -1)


def _as_float64(output: Any) -> Tensor:
    """An output, tensor or number, as float64 on the CPU."""
    if isinstance(output, Tensor) and not output.is_complex():
        return output.detach().cpu().double()
    if type(output) in (int, float):
        return torch.tensor([output], dtype=torch.float64)
    raise CaptumHasToServe(f"the forward function returned {type(output).__name__}")


def _like_input(coefficients: Tensor, mask: Tensor, entire: Tensor) -> Tensor:
    """Coefficients [S, d] at every element of an input [B, ...], float32; S = B or 1."""
    coefficients = coefficients.to(entire.device)
    players = mask.flatten(1)
    if len(coefficients) == 1:
        spread = coefficients[0][players]
    elif len(players) == 1:
        spread = coefficients[:, players[0]]
    else:
        spread = coefficients.gather(1, players)
    return torch.empty_like(entire, dtype=torch.float32).copy_(spread.view(len(spread), *mask.shape[1:]))


@contextmanager
def _progress(explainer: Any, total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar with Captum's label, or none. Gives the function that advances it."""
    if not shown:
        yield lambda rows: None
        return
    bar = progress(desc=f"{explainer.get_name()} attribution", total=total)
    try:
        yield bar.update
    finally:
        bar.close()
