"""What a call of Captum's Shapley explainers computes: its games, its draws and its regression.

`ddfast.attribution.captum` holds the classes. Here a call is read as Captum reads it, its coalitions are drawn as
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
from captum._utils.common import (
    _format_additional_forward_args,
    _format_output,
    _get_max_feature_index,
    _run_forward,
    _select_targets,
)
from captum._utils.models.linear_model import SkLearnLinearRegression
from captum._utils.progress import progress
from captum.attr import KernelShap as CaptumKernelShap
from captum.attr import ShapleyValueSampling as CaptumShapleyValueSampling
from captum.attr._core.shapley_value import _all_perm_generator, _perm_generator
from captum.attr._utils.common import _find_output_mode_and_verify, _tensorize_baseline
from torch import Tensor, nn
from torch.distributions.categorical import Categorical
from torch.utils.data import DataLoader

from ddfast.attribution.estimators import make_plan
from ddfast.attribution.feature_game import (
    MAX_KEYED_PLAYERS,
    CannotStackError,
    Coalitions,
    FeatureGame,
    KeyedCoalitions,
    PrefixCoalitions,
    as_grid_game,
    distinct,
)
from ddfast.attribution.inspection import Inspection, look

_MAX_EXACT_PLAYERS = 20
_SINGULAR = 1e-6  # singular values below this share of the largest count as zero, as in scikit-learn's tol
_PLAN_ROWS = 1 << 14


class CaptumHasToServe(Exception):
    """This call is one that only Captum's own method answers as Captum does."""


class KernelShapCall:
    """One call of `KernelShap.attribute` on S games: one an example, or a single one of the whole batch."""

    def __init__(
        self,
        explainer: CaptumKernelShap,
        inputs: tuple[Tensor, ...],
        baselines: tuple[Any, ...],
        target: Any,
        additional_forward_args: Any,
        masks: tuple[Tensor, ...],
        d: int,
        n_samples: int,
        perturbations_per_eval: int,
        show_progress: bool,
    ) -> None:
        if not isinstance(n_samples, int) or n_samples < 1:
            raise CaptumHasToServe(f"n_samples is {n_samples}")
        if not isinstance(perturbations_per_eval, int) or perturbations_per_eval < 1:
            raise CaptumHasToServe(f"perturbations_per_eval is {perturbations_per_eval}")
        additional = _format_additional_forward_args(additional_forward_args)
        if len(inputs[0]) > 1 and any(isinstance(value, list) for value in additional or ()):
            raise CaptumHasToServe("a list is among the additional arguments")
        self.explainer = explainer
        self.d = d
        self.n_samples = n_samples
        self.stacked_at_least = perturbations_per_eval
        self.show_progress = show_progress
        self.game = _feature_game(explainer.forward_func, inputs, baselines, target, additional, masks, d)
        self.full, self.per_example = self._full()
        self.streams = self.game.examples if self.per_example else 1

    def _full(self) -> tuple[Tensor, bool]:
        """Values float64 [S] of the full coalition, and whether they are one an example."""
        output = _full_output(self.game)
        examples = self.game.examples
        count = output.numel() if isinstance(output, Tensor) else 1
        if count not in (1, examples) or (examples > 1 and count == 1 and self.stacked_at_least > 1):
            raise CaptumHasToServe(f"the forward function returned {count} values for {examples} examples")
        return _as_float64(output).reshape(count), count == examples

    def attributions(self, estimator: str, return_input_shape: bool, is_inputs_tuple: bool) -> Any:
        """What `attribute` returns."""
        if estimator == "captum":
            coefficients, intercept, model = self._by_captums_law()
        else:
            coefficients, intercept = self._by_estimator(estimator)
            model = nn.Linear(self.d, 1)
        self._warn()
        # The surrogate of the last example stays with the explainer, as after Captum's own fit.
        surrogate = self.explainer.interpretable_model
        if isinstance(surrogate, SkLearnLinearRegression):
            model.weight.data = coefficients[-1:].float()
            model.bias.data = intercept[-1:].float()
            surrogate.norm, surrogate.linear = None, model
        coefficients = coefficients.float()
        if not return_input_shape:
            return coefficients
        whole_batch = not self.per_example
        return _format_output(
            is_inputs_tuple,
            tuple(
                _like_input(coefficients, mask, entire)[: 1 if whole_batch else None]
                for mask, entire in zip(self.game.masks, self.game.inputs, strict=True)
            ),
        )

    def _by_captums_law(self) -> tuple[Tensor, Tensor, nn.Linear]:
        """Coefficients [S, d] and intercepts [S] of Captum's regression, and the last surrogate model."""
        coalitions, model = _captums_coalitions(self.d, self.streams, self.n_samples)
        with self._progress(self.streams * self.n_samples) as advance:
            values = self._values(coalitions, advance, checked=True)
        if not values.isfinite().all():
            raise CaptumHasToServe("an output is NaN or infinite")
        size = coalitions.sum(dim=-1)
        anchor = (size == 0) | (size == self.d)
        weights = torch.ones(size.shape, dtype=torch.float64).masked_fill(anchor, self.explainer.inf_weight)
        return *_weighted_regression(coalitions.double(), values, weights), model

    def _by_estimator(self, estimator: str) -> tuple[Tensor, Tensor]:
        """Shapley values [S, d] by an estimator of `ddfast.shapley`, and the values [S] of the empty coalition."""
        seeds = torch.randint(-(2**63), 2**63 - 1, (self.streams,))
        grid_game = as_grid_game(self.game, self.explainer.forward_func, _select_targets, self.n_samples)
        cells = grid_game is not None and torch.equal(grid_game.players, torch.arange(self.d))
        plan = make_plan(estimator, grid_game.grid if grid_game and cells else self.d, self.n_samples, seeds)
        phi = torch.zeros(self.streams, self.d, dtype=torch.float64)
        empty = torch.zeros(0, dtype=torch.float64)
        with self._progress(self.streams * plan.size) as advance:
            for start in range(0, plan.size, _PLAN_ROWS):
                coalitions, projection = plan.rows(start, min(start + _PLAN_ROWS, plan.size))
                coalitions = coalitions.expand(self.streams, -1, -1)
                values = self._values(coalitions, advance, checked=False)
                phi += (values.unsqueeze(-2) @ projection).squeeze(-2)
                empty = values[:, 0] if start == 0 else empty
        return phi, empty

    def _values(self, coalitions: Tensor, advance: Callable[[int], object], *, checked: bool) -> Tensor:
        """Values float64 [S, K] of coalitions bool [S, K, d], each different one evaluated once.

        `checked` refuses a forward function that does not repeat itself.
        """
        full = coalitions.all(dim=-1)
        known = self.full.unsqueeze(-1).expand_as(full)
        if bool(full.all()):
            advance(full.numel())
            return known
        # In the place of the full coalition, which is known, stands the empty one, which is evaluated anyway.
        table, place = distinct(coalitions & ~full.unsqueeze(-1))
        evaluated = self._evaluate(table, advance, checked)
        advance(full.numel() - self.streams * table.size)
        return torch.where(full, known, evaluated.gather(1, place))

    def _evaluate(self, table: Coalitions, advance: Callable[[int], object], checked: bool) -> Tensor:
        """Values float64 [S, K'] of the coalitions of a table, with all rows or one coalition in a pass."""
        if self.per_example:
            stacked = _stacked_values(
                self.explainer, self.game, table, self.n_samples, self.full, self.stacked_at_least, advance
            )
            if stacked is not None:
                return stacked.reshape(self.streams, table.size)
            if self.game.examples > 1:
                raise CaptumHasToServe("examples do not share a forward pass")
        if self.stacked_at_least > 1:
            raise CaptumHasToServe("coalitions do not share a forward pass")
        outputs = [_as_float64(output) for output in self.game.values_alone(table, advance)]
        if any(output.numel() != 1 for output in outputs):
            raise CaptumHasToServe("the forward function did not return one value a coalition")
        if checked:
            _check_repeats(self.game, self.full)
        return torch.stack([output.reshape(()) for output in outputs]).unsqueeze(0)

    def _warn(self) -> None:
        """Captum's warnings, of many features and of several examples."""
        if self.d > 10000:
            warnings.warn(
                "Attempting to construct interpretable model with > 10000 features."
                "This can be very slow or lead to OOM issues. Please provide a feature"
                "mask which groups input features to reduce the number of interpretable"
                "features. ",
                stacklevel=2,
            )
        if self.game.examples > 1 and self.per_example:
            warnings.warn(
                "You are providing multiple inputs for Lime / Kernel SHAP "
                "attributions. This trains a separate interpretable model "
                "for each example, which can be time consuming. It is "
                "recommended to compute attributions for one example at a "
                "time.",
                stacklevel=2,
            )

    def _progress(self, total: int) -> Any:
        return _progress(self.explainer, total, self.show_progress)


def _captums_coalitions(d: int, streams: int, n_samples: int) -> tuple[Tensor, nn.Linear]:
    """Coalitions bool [S, n_samples, d] exactly as Captum draws them from torch's generator, one example after
    the other: all players, none, then subsets of a size from p(k) ∝ 1 / (k (d - k)), the players with the k
    largest of d normal draws.

    Captum fits each example's regression before it draws for the next, and that fit draws too: the loader its
    seed, the linear layer its initial weights. Both are done here in the same places, so the streams stay
    equal; the last layer is returned.
    """
    k = torch.arange(d, dtype=torch.float)
    law = torch.tensor(d - 1) / (k * (d - k))
    law[0] = 0.0
    law = Categorical(law).probs.reshape(-1, d)
    sizes, normals = [torch.empty(0, 1, dtype=torch.int64)], [torch.empty(0, d)]
    for _ in range(streams):
        for _ in range(n_samples - 2):
            sizes.append(torch.multinomial(law, 1, True))
            normals.append(torch.randn(1, d))
        iter(DataLoader([0]))  # type: ignore[arg-type]
        model = nn.Linear(d, 1)
    size, normal = torch.cat(sizes), torch.cat(normals)
    threshold = normal.sort(dim=-1).values.gather(-1, d - size - 1)
    subsets = (normal > threshold).view(streams, -1, d)
    anchors = torch.tensor([True, False])[:n_samples, None].expand(streams, -1, d)
    return torch.cat([anchors, subsets], dim=1), model


def _weighted_regression(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares with an intercept, of smallest norm where the samples do not determine it.

    Args:
        x: float64 [S, K, d].
        y: float64 [S, K].
        weights: float64 [S, K], positive.

    Returns:
        Coefficients [S, d] and intercepts [S]: scikit-learn's `LinearRegression`, solved in float64.
    """
    share = (weights / weights.sum(dim=-1, keepdim=True)).unsqueeze(-1)
    x_mean, y_mean = (share * x).sum(dim=1, keepdim=True), (share[..., 0] * y).sum(dim=1, keepdim=True)
    root = weights.sqrt()
    solved = torch.linalg.lstsq(
        root.unsqueeze(-1) * (x - x_mean),
        (root * (y - y_mean)).unsqueeze(-1),
        rcond=_SINGULAR,
        driver="gelsd",
    )
    coefficients = solved.solution.squeeze(-1)
    return coefficients, y_mean.squeeze(-1) - (x_mean.squeeze(1) * coefficients).sum(dim=-1)


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
    """What a plain call gives for the full coalition."""
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
