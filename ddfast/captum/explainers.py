"""Captum's Shapley explainers, evaluated as this package evaluates games: many coalitions a pass, none twice.

`KernelShap`, `ShapleyValueSampling` and `ShapleyValues` are Captum's classes (Kokhlikyan et al., 2020), that
is subclasses of them, with `attribute` done anew: the same arguments, shapes, warnings and, after the same
`torch.manual_seed`, the same draws and so the same numbers up to rounding. What differs is how they come about:

- rows of many coalitions, and of several examples, share a forward pass whatever `perturbations_per_eval` is;
- a coalition that is drawn twice is evaluated once; `ShapleyValues` evaluates 2^d coalitions, not d! d;
- images whose feature mask is a grid go through the engine of `ddfast.shapley`;
- the regression of KernelSHAP is solved for all examples at once, in float64.

Every call first proves that rows may share a pass: one coalition is evaluated alone and again among others, and
the two have to agree. Where they do not (one output a batch, batch statistics, dropout), the coalitions go one
at a time, and where the forward function draws at random, or a hook of Captum's class is overridden (such as
`kernel_shap_perturb_generator`), Captum's own method serves the call.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from captum._utils.common import (
    _format_additional_forward_args,
    _format_feature_mask,
    _format_output,
    _get_max_feature_index,
    _is_tuple,
)
from captum._utils.models.linear_model import SkLearnLinearRegression
from captum.attr import KernelShap as CaptumKernelShap
from captum.attr import ShapleyValues as CaptumShapleyValues
from captum.attr import ShapleyValueSampling as CaptumShapleyValueSampling
from captum.attr._core.lime import construct_feature_mask, default_from_interp_rep_transform
from captum.attr._core.shapley_value import _shape_feature_mask
from captum.attr._utils.common import _format_input_baseline
from captum.log import log_usage
from torch import Tensor, nn

from ddfast.attribution.estimators.plans import list_estimators
from ddfast.attribution.validation import check_chunk_size
from ddfast.captum.calls import CaptumHasToServe, ShapleyCall
from ddfast.captum.kernel_shap import KernelShapCall

__all__ = ["KernelShap", "ShapleyValueSampling", "ShapleyValues"]

# Captum's own methods, as they were when this module was imported.
_CAPTUM_ATTRIBUTE = {
    explainer: explainer.attribute.__wrapped__
    for explainer in (CaptumKernelShap, CaptumShapleyValueSampling, CaptumShapleyValues)
}
# What a subclass or a user may replace to change the method itself.
_KERNEL_HOOKS = (
    "kernel_shap_similarity_kernel",
    "kernel_shap_perturb_generator",
    "_attribute_kwargs",
    "_convert_output_shape",
    "_evaluate_batch",
    "_get_perturb_generator_func",
)
_SAMPLING_HOOKS = (
    "_update_current_tensors",
    "_construct_selected_mask",
    "_perturbation_generator",
    "_strict_run_forward",
)
_CAPTUM_HOOKS = {
    (explainer, name): getattr(explainer, name)
    for explainer, names in (
        (CaptumKernelShap, _KERNEL_HOOKS),
        (CaptumShapleyValueSampling, _SAMPLING_HOOKS),
    )
    for name in names
}


class KernelShap(CaptumKernelShap):
    """Captum's `KernelShap` (Lundberg & Lee, 2017), many coalitions a forward pass.

    Args:
        forward_func: what Captum takes: a module or function whose output, after selecting the target, is one
            number an example, or one number a batch.
        estimator: "captum", the default, is Captum's sampling law and regression with n_samples evaluations an
            example. Any estimator of `ddfast.shapley` takes the place of both: at 32 evaluations of 16 features
            "permutation" errs as "captum" does at 256. Its streams are seeded from torch's generator, one an
            example, and where the features are the cells of a grid, the estimator is told so.
        rows_per_forward: rows of a forward pass where rows are independent; None sizes it by the bytes of a
            row. `perturbations_per_eval` of `attribute` is a lower bound: that many coalitions of every
            example always share a pass.

    Raises:
        ValueError: an unknown estimator, or rows_per_forward below 1.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        estimator: str = "captum",
        rows_per_forward: int | None = None,
    ) -> None:
        super().__init__(forward_func)
        names = ["captum", *list_estimators()]
        if estimator not in names:
            raise ValueError(f"estimator must be one of {', '.join(names)}, got {estimator!r}")
        self.estimator = estimator
        self.rows_per_forward = None if rows_per_forward is None else check_chunk_size(rows_per_forward)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        n_samples: int = 25,
        perturbations_per_eval: int = 1,
        return_input_shape: bool = True,
        show_progress: bool = False,
    ) -> Any:
        """Attributions of the features, with the arguments of Captum's `KernelShap.attribute`.

        Args:
            inputs: tensor [B, ...], or a tuple of them.
            baselines: what absent features show: None (zeros), a number, a tensor that broadcasts to the
                input, or a tuple of such, one an input.
            target: which output is explained: None, int, tuple, tensor or list, one for all examples or one
                each.
            additional_forward_args: further arguments of the forward function; tensors are split by example.
            feature_mask: integer tensors, one an input, that name each element's feature; None makes every
                element a feature.
            n_samples: evaluations an example, the empty and the full coalition included.
            perturbations_per_eval: fewest coalitions that share a pass. It must be 1 where the forward
                function returns one value a batch.
            return_input_shape: give every element its feature's coefficient; False gives the coefficients.
            show_progress: draw a progress bar.

        Returns:
            float32 like the inputs (first dimension 1 where the forward function returns one value a batch),
            or the coefficients [B, features].

        Raises:
            AssertionError: as in Captum, an output that is neither one number an example nor one a batch.
            ValueError: a budget that the estimator cannot serve, or a forward function that draws at random
                under an estimator other than "captum".
        """
        return _kernel_shap(
            self,
            inputs,
            baselines,
            target,
            additional_forward_args,
            feature_mask,
            n_samples,
            perturbations_per_eval,
            return_input_shape,
            show_progress,
        )


class ShapleyValueSampling(CaptumShapleyValueSampling):
    """Captum's `ShapleyValueSampling` (Castro et al., 2009), many coalitions a forward pass.

    Args:
        forward_func: what Captum takes: a module or function from the inputs to outputs of any shape, one an
            example or one a batch.
        rows_per_forward: rows of a forward pass where rows are independent, as in `KernelShap`.

    Raises:
        ValueError: rows_per_forward below 1.
    """

    def __init__(self, forward_func: Callable[..., Any], *, rows_per_forward: int | None = None) -> None:
        super().__init__(forward_func)
        self.rows_per_forward = None if rows_per_forward is None else check_chunk_size(rows_per_forward)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        n_samples: int = 25,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Any:
        """Attributions of the features, with the arguments of Captum's `ShapleyValueSampling.attribute`.

        Args:
            inputs: tensor [B, ...], or a tuple of them.
            baselines: what absent features show: None (zeros), a number, a tensor [1 or B, ...], or a tuple
                of such, one an input.
            target: which output is explained: None, int, tuple, tensor or list.
            additional_forward_args: further arguments of the forward function; tensors are split by example.
            feature_mask: integer tensors, one an input, that name each element's feature; None makes every
                element a feature.
            n_samples: orders in which the features join.
            perturbations_per_eval: fewest coalitions that share a pass. It must be 1 where the forward
                function returns one value a batch.
            show_progress: draw a progress bar.

        Returns:
            float32 [output shape..., input shape without its first dimension...] for each input: like the
            inputs where the forward function returns one value an example.

        Raises:
            AssertionError: as in Captum, arguments that do not fit.
        """
        return _shapley_values(
            self,
            inputs,
            baselines,
            target,
            additional_forward_args,
            feature_mask,
            n_samples,
            perturbations_per_eval,
            show_progress,
        )


class ShapleyValues(ShapleyValueSampling, CaptumShapleyValues):
    """Captum's `ShapleyValues`: exact, from all 2^d coalitions of d features instead of all d! orders.

    Args:
        forward_func: as in `ShapleyValueSampling`.
        rows_per_forward: as in `KernelShap`.

    Raises:
        ValueError: rows_per_forward below 1.
    """

    @log_usage(part_of_slo=True)
    def attribute(  # type: ignore[override]
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Any:
        """Attributions of the features, with the arguments of Captum's `ShapleyValues.attribute`.

        Arguments, results and errors are those of `ShapleyValueSampling.attribute`, without `n_samples`. Up
        to 20 features are enumerated; Captum's own method, which never ends there, serves more.
        """
        return _exact_shapley_values(
            self,
            inputs,
            baselines,
            target,
            additional_forward_args,
            feature_mask,
            perturbations_per_eval,
            show_progress,
        )


def replacements() -> dict[Any, Callable[..., Any]]:
    """Captum's classes and the `attribute` that serves any instance of each, for `ddfast.accelerate`."""
    return {
        CaptumKernelShap: _kernel_shap,
        CaptumShapleyValueSampling: _shapley_values,
        CaptumShapleyValues: _exact_shapley_values,
    }


def _kernel_shap(
    explainer: CaptumKernelShap,
    inputs: Any,
    baselines: Any = None,
    target: Any = None,
    additional_forward_args: Any = None,
    feature_mask: Any = None,
    n_samples: int = 25,
    perturbations_per_eval: int = 1,
    return_input_shape: bool = True,
    show_progress: bool = False,
) -> Any:
    """`KernelShap.attribute` of any instance of Captum's class, by Captum's own method where it has to be."""
    estimator = getattr(explainer, "estimator", "captum")
    state = torch.get_rng_state()
    try:
        if estimator == "captum" and not _kernel_hooks_are_captums(explainer):
            raise CaptumHasToServe("a hook of KernelShap is overridden")
        if estimator == "captum" and not isinstance(additional_forward_args, (type(None), tuple, int, float)):
            # KernelShap takes a bare tensor apart along its first dimension, against its documentation.
            raise CaptumHasToServe("the additional argument is not in a tuple")
        formatted, formatted_baselines = _format_input_baseline(inputs, baselines)
        masks, d = construct_feature_mask(feature_mask, formatted)
        if feature_mask is not None:
            # Captum's own method, should it have to serve, need not warn of the shift again.
            feature_mask = _format_output(_is_tuple(feature_mask), masks)
        with torch.no_grad():
            return KernelShapCall(
                explainer,
                formatted,
                formatted_baselines,
                target,
                additional_forward_args,
                masks,
                d,
                n_samples,
                perturbations_per_eval,
                show_progress,
            ).attributions(estimator, return_input_shape, _is_tuple(inputs))
    except CaptumHasToServe as reason:
        if estimator != "captum":
            raise ValueError(
                f"estimator {estimator!r} cannot serve this call: {reason}; use estimator='captum'"
            ) from reason
        torch.set_rng_state(state)
    return _by_captum(
        CaptumKernelShap,
        explainer,
        inputs,
        baselines,
        target,
        additional_forward_args,
        feature_mask,
        n_samples,
        perturbations_per_eval,
        return_input_shape,
        show_progress,
    )


def _exact_shapley_values(
    explainer: CaptumShapleyValues,
    inputs: Any,
    baselines: Any = None,
    target: Any = None,
    additional_forward_args: Any = None,
    feature_mask: Any = None,
    perturbations_per_eval: int = 1,
    show_progress: bool = False,
) -> Any:
    """`ShapleyValues.attribute` of any instance of Captum's class."""
    formatted = inputs if _is_tuple(inputs) else (inputs,)
    masks = _format_feature_mask(feature_mask, formatted)
    if _get_max_feature_index(masks) + 1 >= 10:
        warnings.warn(
            "You are attempting to compute Shapley Values with at least 10 "
            "features, which will likely be very computationally expensive."
            "Consider using Shapley Value Sampling instead.",
            stacklevel=2,
        )
    return _shapley_values(
        explainer,
        inputs,
        baselines,
        target,
        additional_forward_args,
        feature_mask,
        25,
        perturbations_per_eval,
        show_progress,
    )


def _shapley_values(
    explainer: CaptumShapleyValueSampling,
    inputs: Any,
    baselines: Any = None,
    target: Any = None,
    additional_forward_args: Any = None,
    feature_mask: Any = None,
    n_samples: int = 25,
    perturbations_per_eval: int = 1,
    show_progress: bool = False,
) -> Any:
    """`ShapleyValueSampling.attribute`, and what `ShapleyValues.attribute` comes down to, of any instance.

    Which of the two it is says the explainer's `permutation_generator`, as in Captum.
    """
    state = torch.get_rng_state()
    try:
        if not _sampling_hooks_are_captums(explainer):
            raise CaptumHasToServe("a hook of ShapleyValueSampling is overridden")
        formatted, formatted_baselines = _format_input_baseline(inputs, baselines)
        masks = _shape_feature_mask(_format_feature_mask(feature_mask, formatted), formatted)
        with torch.no_grad():
            attributions = ShapleyCall(
                explainer,
                formatted,
                formatted_baselines,
                target,
                _format_additional_forward_args(additional_forward_args),
                masks,
                n_samples,
                perturbations_per_eval,
                show_progress,
            ).attributions()
        return _format_output(_is_tuple(inputs), attributions)
    except CaptumHasToServe:
        torch.set_rng_state(state)
    return _by_captum(
        CaptumShapleyValueSampling,
        explainer,
        inputs,
        baselines,
        target,
        additional_forward_args,
        feature_mask,
        n_samples,
        perturbations_per_eval,
        show_progress,
    )


def _by_captum(captum_class: type, explainer: Any, *arguments: Any) -> Any:
    """Captum's own method, with a forward function that is given copies: it may write to its arguments.

    It serves a copy of the explainer, as another thread may use the explainer itself meanwhile.
    """
    function = explainer.forward_func

    def forward(*values: Any) -> Any:
        return function(*(value.clone() if isinstance(value, Tensor) else value for value in values))

    if not isinstance(function, nn.Module):
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            # Captum calls a function without parameters without arguments.
            forward.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    serving = copy.copy(explainer)
    serving.forward_func = forward
    try:
        return _CAPTUM_ATTRIBUTE[captum_class](serving, *arguments)
    finally:
        vars(explainer).update({k: v for k, v in vars(serving).items() if k != "forward_func"})


def _kernel_hooks_are_captums(explainer: CaptumKernelShap) -> bool:
    """Whether nothing that decides the result of Captum's own method has been replaced."""
    surrogate = explainer.interpretable_model
    return (
        _hooks_are_captums(explainer, CaptumKernelShap, _KERNEL_HOOKS)
        and _function(explainer.perturb_func) is _hook(CaptumKernelShap, "kernel_shap_perturb_generator")
        and _function(explainer.similarity_func) is _hook(CaptumKernelShap, "kernel_shap_similarity_kernel")
        and explainer.perturb_interpretable_space
        and explainer.from_interp_rep_transform is default_from_interp_rep_transform
        and type(surrogate) is SkLearnLinearRegression
        and not surrogate.construct_kwargs
        and "fit" not in vars(surrogate)
    )


def _sampling_hooks_are_captums(explainer: CaptumShapleyValueSampling) -> bool:
    """The same of `ShapleyValueSampling` and `ShapleyValues`."""
    return _hooks_are_captums(explainer, CaptumShapleyValueSampling, _SAMPLING_HOOKS)


def _hooks_are_captums(explainer: Any, captum_class: type, names: tuple[str, ...]) -> bool:
    return all(_function(getattr(explainer, name)) is _hook(captum_class, name) for name in names)


def _hook(captum_class: type, name: str) -> FunctionType:
    return _CAPTUM_HOOKS[captum_class, name]


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)
