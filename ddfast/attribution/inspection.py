"""A look at a model before its game is played: what it gives for a few of the user's own masked images.

Shapley values are defined for a function of one image. A model whose scores depend on the other images of a batch, or
that draws random numbers, has none: its numbers would change with the size of a forward pass. And what was prepared
for a model has to give what the model gives. Both are looked at in every call, on the image itself and on one masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddfast.attribution.validation import check_labels, check_scores
from ddfast.masked_forward.call_log import Log, recorded
from ddfast.masked_forward.tracing import is_compiled
from ddfast.ops.layouts import called
from ddfast.random_states import RandomStates, equal_states

_RUNS = 8
_SMALL_DRAW = (
    4096  # numbers; a call that draws fewer is repeated often, as one rare event may decide its result
)

_BATCH_ADVICE = (
    "Shapley values are of one image at a time: give layers that normalise over the batch running statistics, "
    "or give a function that takes each image alone"
)


@dataclass(frozen=True)
class Inspection:
    """What was seen.

    Attributes:
        images: [n, C, H, W], the masked images that the model was given.
        scores: [n, classes], what it gave.
        alone: [classes], what it gave for the second of them alone; None: not tried.
        calls: what its forward called; None: not recorded.
        draws: whether it draws random numbers, of which its scores are independent.
    """

    images: Tensor
    scores: Tensor
    alone: Tensor | None
    calls: Log | None
    draws: bool


def inspect(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, chunk: int) -> Inspection:
    """Run the model on three masked images, and on the second of them alone.

    Args:
        model: module in eval mode, or function.
        images: [3, C, H, W] as the model takes them, the last one made up; no two alike.
        labels: int64 [B], which have to be classes of the model.
        chunk: masked images in one forward pass, later on.

    Raises:
        ValueError: no class scores, labels that are no classes, scores that depend on other images of the batch, or
            on random numbers.
    """
    states = RandomStates()
    try:
        before = states.now()
        alone = _alone(model, images)
        check_labels(labels, alone.shape[1])
        scores, calls, images = _together(model, images, alone if chunk == 1 else None)
        check_scores(scores, 3)
        draws = states.differ(before)
        if draws and _draws_decide(model, images):
            raise ValueError(
                "the model draws random numbers in eval mode, so that its scores are no function of the image: "
                "switch its dropout or noise off, or give a function that seeds the generator in every call"
            )
        if not alike(scores[1], alone[0], fine=True):
            check_rows(model, images, 1)
    finally:
        states.restore()
    return Inspection(images, scores, alone[0], calls, draws)


def look(model: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Any, Log | None]:
    """Scores of masked images, which the model may write to, and the calls of a module's forward."""
    if isinstance(model, nn.Module) and not is_compiled(model):
        scores, calls = called(model, images.clone(), lambda batch: recorded(model, batch, model))
    else:
        scores, calls = called(model, images.clone()), None
    # It may be the model's own memory, which its next call writes to.
    return scores.clone() if isinstance(scores, Tensor) else scores, calls


def check_rows(model: Callable[[Tensor], Tensor], images: Tensor, row: int) -> None:
    """What the model gives for one image of a batch depends on that image alone.

    In a batch of the same size whose other images are copies of this one, no bit should change; a batch of another
    size may be rounded otherwise.

    Raises:
        ValueError: it depends on what else is in the batch, on their number, or on chance.
    """
    first, again = _row(model, images, row), _row(model, images, row)
    if not alike(first, again, fine=True):
        raise ValueError(
            "the model gives the same images different scores, so that they are no function of the image: "
            "switch off what is random or kept from call to call"
        )
    copies = images.clone()
    copies[:] = images[row]
    if not alike(first, _row(model, copies, row), fine=True):
        raise ValueError(
            f"the model's scores of an image depend on the other images of the batch. {_BATCH_ADVICE}"
        )
    alone = _row(model, images[row : row + 1], 0)
    if not alike(first, alone) and float((first - alone).abs().amax()) > 10 * _rounding(model, images, row):
        raise ValueError(
            f"the model's scores of an image depend on the batch's size or on its place in it. {_BATCH_ADVICE}"
        )


def _rounding(model: Callable[[Tensor], Tensor], images: Tensor, row: int) -> float:
    """How far scores move where pixels do by about a rounding error: far, where a layer normalises what is constant."""
    given, moved = _row(model, images, row), 0.0
    size = max(float(images[row].abs().amax()), 1.0) * torch.finfo(images.dtype).eps * 8
    for phase in range(3):
        pattern = (
            torch.arange(images[row].numel(), device=images.device).add(phase).sin().view(images[row].shape)
        )
        other = images.clone()
        other[row] += (size * pattern).to(images.dtype)
        moved = max(moved, float((_row(model, other, row) - given).abs().amax()))
    return moved


def alike(given: Tensor, wanted: Tensor, *, fine: bool = False, low: bool = False) -> bool:
    """Whether scores agree but for rounding; where one is not finite, others will say so.

    Args:
        given, wanted: of equal shape.
        fine: they should agree to the bit, or nearly.
        low: one of them was computed in a low precision.
    """
    half = wanted.dtype.itemsize == 2 or given.dtype.itemsize == 2
    allowed = 0.05 if half or wanted.is_cuda else 1e-3
    if fine:
        allowed = 1e-2 if half else 1e-4 if wanted.is_cuda else 1e-5
    if low:
        allowed = 0.2
    given, wanted = given.double(), wanted.double()
    difference, scale = (given - wanted).abs(), wanted.abs().amax()
    return not bool((difference > allowed * scale.clamp(min=1e-30)).any())


def _together(
    model: Callable[[Tensor], Tensor], images: Tensor, alone: Tensor | None
) -> tuple[Any, Log | None, Tensor]:
    """Scores of the images together, the calls, and the images; `alone`: scores for a model that takes one only."""
    try:
        return *look(model, images), images
    except Exception as error:
        try:
            # Perhaps the one that is made up has values that no image has: the second, mirrored, in its place.
            images = images.clone()
            images[2] = images[1].flip(-1)
            return *look(model, images), images
        except Exception:
            if alone is None:
                raise error from None
            # Every pass takes one image, and one is all that the model takes.
            return alone.expand(3, -1), None, images


def _alone(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    try:
        scores = _scores(model, images[1:2])
    except Exception as error:
        try:
            _scores(model, images)
        except Exception:
            raise error from None
        raise ValueError(
            f"the model takes several images but not a single one ({_first_line(error)}). {_BATCH_ADVICE}"
        ) from error
    check_scores(scores, 1)
    return scores.clone()


def _row(model: Callable[[Tensor], Tensor], images: Tensor, row: int) -> Tensor:
    scores = _scores(model, images)
    check_scores(scores, len(images))
    return scores[row].clone()


def _scores(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What the model gives for a copy of the images, which it may write to."""
    return called(model, images.clone())


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# --- random numbers


def _draws_decide(model: Callable[[Tensor], Tensor], images: Tensor) -> bool:
    """Whether the scores of a model that draws random numbers depend on them."""
    first = called(model, images.clone())
    first = first.clone()
    after = torch.get_rng_state()
    for _ in range(_RUNS):
        torch.rand(1)
        if not alike(called(model, images.clone()), first, fine=True):
            return True
    if torch.equal(torch.get_rng_state(), after):
        return False  # it seeds the generator itself
    with _Chance() as chance:
        scores = called(model, images.clone())
    return chance.decided or id(scores) in chance.tainted


@dataclass(eq=False)
class _Chance(TorchFunctionMode):
    """Follows what depends on torch's random numbers.

    Attributes:
        decided: whether a number or a truth value that left torch did.
        tainted: the tensors that do, by identity.
    """

    decided: bool = False
    tainted: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read = _tensors_of((args, kwargs))
        kept = [t.clone() for t in read]
        state = _device_states()
        result = function(*args, **kwargs)
        depends = any(id(t) in self.tainted for t in read)
        if not depends and not equal_states(_device_states(), state):
            depends = any(map(_changed, read, kept)) or _varies(function, args, kwargs, result)
        if depends:
            given = _tensors_of(result)
            self.decided |= not given and getattr(function, "__name__", "") != "__get__"
            self.tainted.update((id(t), t) for t in given)
        return result


def _device_states() -> tuple[Any, ...]:
    return (torch.get_rng_state(), *RandomStates.now()[3:])


def _changed(now: Tensor, before: Tensor) -> bool:
    return not torch.equal(now, before)


def _varies(function: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> bool:
    """Whether a call that draws gives something else in one of many attempts."""
    given = _tensors_of(result)
    times = 512 if sum(t.numel() for t in given) < _SMALL_DRAW else _RUNS
    for _ in range(times):
        other = _tensors_of(function(*args, **kwargs))
        if any(_changed(a, b) for a, b in zip(given, other, strict=True)):
            return True
    return False


def _tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [t for entry in value for t in _tensors_of(entry)]
    return []
