"""Captum's KernelShap, call for call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from captum._utils.common import _format_additional_forward_args, _format_output, _select_targets
from captum._utils.models.linear_model import SkLearnLinearRegression
from captum.attr import KernelShap as CaptumKernelShap
from torch import Tensor, nn
from torch.distributions.categorical import Categorical
from torch.utils.data import DataLoader

from ddfast.attribution.estimators.plans import make_plan
from ddfast.captum.calls import (
    _PLAN_ROWS,
    _SINGULAR,
    CaptumHasToServe,
    _as_float64,
    _check_repeats,
    _feature_game,
    _full_output,
    _like_input,
    _progress,
    _stacked_values,
)
from ddfast.captum.feature_game import Coalitions, as_grid_game, distinct


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
