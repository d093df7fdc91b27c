"""Find a model's weights in what a training script saved: in containers, behind prefixes, beside other tensors.

A file of `torch.save` may hold the state dict itself, or one in a `state_dict`, `model` or `ema` of its own, with
names that begin with `module.` (DataParallel), `_orig_mod.` (torch.compile), `model.` (Lightning) or several of
these. No list of such names is kept: the weights are where all the names that the model has are found behind one
prefix.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Wrappers may also stand in the middle of a name, where only a part of a model was wrapped.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_AVERAGES = {"ema", "swa", "averaged", "average", "avg", "shadow"}
_OF_THE_OPTIMIZER = {"optimizer", "optimizers", "optim", "momentum", "grad", "grads", "gradients"}
_COUNTERS = {"n_averaged", "total_ops", "total_params"}  # by-products that tools register beside the weights
_DEPTH = 8  # containers in containers

Place = tuple[Tensor, str]
"""A tensor and the name of the container that it lies in."""


def find_weights(state: Any, wanted: Mapping[str, Tensor], arch: str, num_classes: int) -> dict[str, Tensor]:
    """The tensors for every name in `wanted`, from nested mappings of tensors and whatever else.

    The model's own weights are preferred to a moving average of them. `num_batches_tracked` may be missing.

    Args:
        state: what the file holds.
        wanted: state dict of the model.
        arch: its name, for the message.
        num_classes: of the model, for the message.

    Raises:
        ValueError: what is missing, left over or of another shape, or that two sets of weights fit.
    """
    found = dict(_tensors(state))
    if not found:
        raise ValueError(
            "it holds no state dict of tensors: convert it with torch.save(model.state_dict(), ...) where it came from"
        )
    readings = [found]
    unwrapped = _without_wrappers(found)
    if unwrapped is not None:
        readings.append(unwrapped)
    for places in readings:
        fitting = [
            prefix for prefix in _prefixes(places, wanted) if not _problems(places, prefix, wanted, arch)
        ]
        if fitting:
            return _weights(places, _preferred(fitting, places, wanted), wanted)
    nearest = [
        (prefixes.most_common(1)[0], places) for places in readings if (prefixes := _prefixes(places, wanted))
    ]
    (prefix, _), places = max(nearest, key=lambda near: near[0][1]) if nearest else (("", 0), found)
    problems = _problems(places, prefix, wanted, arch)
    raise ValueError("; ".join(problems) + _other_classes(places, prefix, wanted, num_classes))


def _tensors(state: Any, container: str = "", depth: int = 0) -> Iterator[tuple[str, Place]]:
    """Every tensor in nested mappings by its dotted name."""
    if not isinstance(state, Mapping) or depth > _DEPTH:
        return
    for key, value in state.items():
        name = f"{container}{key}"
        if isinstance(value, Tensor):
            yield name, (value, container)
        else:
            yield from _tensors(value, f"{name}.", depth + 1)


def _without_wrappers(found: Mapping[str, Place]) -> dict[str, Place] | None:
    """The same without the names of wrappers; None where that changes nothing or makes two names one."""
    bare = {_unwrapped(name): (tensor, _unwrapped(container)) for name, (tensor, container) in found.items()}
    return bare if len(bare) == len(found) and bare.keys() != found.keys() else None


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefixes(places: Mapping[str, Place], wanted: Mapping[str, Tensor]) -> Counter[str]:
    """Prefixes behind which names of the model stand, with how many of them."""
    counts: Counter[str] = Counter()
    for name in places:
        start = 0
        while True:
            if name[start:] in wanted:
                counts[name[:start]] += 1
            dot = name.find(".", start)
            if dot < 0:
                break
            start = dot + 1
    return counts


def _weights(places: Mapping[str, Place], prefix: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: places[prefix + name][0].reshape(held.shape) if prefix + name in places else held
        for name, held in wanted.items()
    }


def _problems(places: Mapping[str, Place], prefix: str, wanted: Mapping[str, Tensor], arch: str) -> list[str]:
    """Why the tensors behind a prefix are not the model's weights, in words."""
    there = {name for name in wanted if prefix + name in places}
    lacking = [name for name in wanted if name not in there and not name.endswith("num_batches_tracked")]
    problems = []
    if lacking:
        problems.append(f"it lacks {_some(lacking)}")
    if extra := _left_over(places, prefix, wanted, there):
        problems.append(f"it has {_some(extra)}, which {arch} has not")
    for name, held in wanted.items():
        if name in there:
            tensor = places[prefix + name][0]
            if tensor.shape != held.shape and not tensor.numel() == held.numel() == 1:
                problems.append(f"{name} is {list(tensor.shape)}, {arch} has {list(held.shape)}")
            elif held.is_floating_point() and not tensor.is_floating_point():
                problems.append(
                    f"{name} is {str(tensor.dtype).removeprefix('torch.')}, wanted floating point"
                )
    shapes = [text for text in problems if not text.startswith("it ")]
    return [text for text in problems if text.startswith("it ")] + (
        [*shapes[:2], f"and {len(shapes) - 2} more differ"] if len(shapes) > 2 else shapes
    )


def _left_over(
    places: Mapping[str, Place], prefix: str, wanted: Mapping[str, Tensor], there: set[str]
) -> list[str]:
    """Tensors behind the prefix in the weights' containers that are neither weights nor another copy of them."""
    containers = {places[prefix + name][1] for name in there} or {""}
    copies = [
        other
        for other, count in _prefixes(places, wanted).items()
        if other != prefix and other.startswith(prefix) and count >= len(there) > 0
    ]
    return [
        name
        for name, (_, container) in places.items()
        if name.startswith(prefix)
        and name.removeprefix(prefix) not in wanted
        and container in containers
        and name.rpartition(".")[2] not in _COUNTERS
        and not any(name.startswith(other) for other in copies)
    ]


def _preferred(prefixes: Sequence[str], places: Mapping[str, Place], wanted: Mapping[str, Tensor]) -> str:
    """The prefix of the model's own weights, of several that fit."""
    rank = {prefix: _rank(prefix) for prefix in prefixes}
    best = [prefix for prefix in prefixes if rank[prefix] == min(rank.values())]
    first = _weights(places, best[0], wanted)
    for other in best[1:]:
        weights = _weights(places, other, wanted)
        if any(not torch.equal(first[name], weights[name]) for name in wanted):
            raise ValueError(
                f"it holds two sets of weights that fit, {best[0] or 'its own'} and {other or 'its own'}: save the one "
                "that is meant alone"
            )
    return best[0]


def _rank(prefix: str) -> int:
    words = set(re.split(r"[^a-z]+", prefix.lower()))
    return 2 if words & _OF_THE_OPTIMIZER else 1 if words & _AVERAGES else 0


def _other_classes(
    places: Mapping[str, Place], prefix: str, wanted: Mapping[str, Tensor], num_classes: int
) -> str:
    """A remark where the only difference is the number of classes."""
    differing = [
        (places[prefix + name][0].shape, held.shape)
        for name, held in wanted.items()
        if prefix + name in places and places[prefix + name][0].shape != held.shape
    ]
    numbers = {given[0] for given, held in differing if len(given) == len(held) and held[0] == num_classes}
    if len(numbers) == 1 and all(
        len(given) == len(held) and given[1:] == held[1:] and held[0] == num_classes
        for given, held in differing
    ):
        return f" (weights of {numbers.pop()} classes)"
    return ""


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
