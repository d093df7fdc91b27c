"""Launches that are prepared once and then cost the host little more than the launch itself.

    @prepared
    def negated(x: torch.Tensor) -> Run:
        launch = Launch(_negated, (triton.cdiv(x.numel(), 1024),), (x.numel(),), BLOCK=1024)
        empty = Allocation(x.shape, x.dtype, x.device)

        def run(x: torch.Tensor) -> torch.Tensor:
            out = empty()
            launch(x.contiguous(), out)
            return out

        return run

The body runs at the first call with arguments of a kind: it looks at shapes, chooses blocks and grids and returns what
every call of that kind does. A kind is all that Triton compiles for, and all that the body may look at: shapes,
strides, dtypes, devices and where tensors lie relative to 16 bytes, and the values of all other arguments. It may ask
for the `capability` of the GPU too, which is that of the device.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import triton
from triton.runtime import driver

Run: TypeAlias = Callable[..., Any]

MAX_KINDS = 1024  # of arguments that a launcher remembers; then it starts anew

_REMEMBERED: list[dict[tuple, Run]] = []  # by every launcher


def capability() -> int:
    """Compute capability of the GPU that Triton launches on, 90 for 9.0; 0 where there is none."""
    try:
        return int(triton.runtime.driver.active.get_current_target().arch)
    except RuntimeError:  # no driver
        return 0


def forget() -> None:
    """Have every launcher prepare anew, for another GPU behind the same device."""
    for runs in _REMEMBERED:
        runs.clear()


def prepared(prepare: Callable[..., Run]) -> Callable[..., Any]:
    """A launcher from a function that, given the launcher's arguments, returns what a call with such arguments does.

    What it returns must hold no tensor. Threads may share a launcher: two that meet a new kind at once both prepare it.
    """
    runs: dict[tuple, Run] = {}
    _REMEMBERED.append(runs)
    signature = inspect.signature(prepare)

    @functools.wraps(prepare)
    def launcher(*arguments: Any, **named: Any) -> Any:
        if named:
            arguments = signature.bind(*arguments, **named).args
        kind = kind_of(arguments)
        run = runs.get(kind)
        if run is None:
            run = prepare(*arguments)
            if len(runs) >= MAX_KINDS:
                runs.clear()
            runs[kind] = run
        return run(*arguments)

    return launcher


def kind_of(arguments: Sequence[Any]) -> tuple:
    """All that decides how a launch goes, hashable."""
    kind: list[Any] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            kind += (
                argument.shape,
                argument.stride(),
                argument.dtype,
                argument.get_device(),
                argument.data_ptr() & 15,
            )
        else:
            kind.append(tuple(argument) if isinstance(argument, list) else argument)
    return tuple(kind)


class Launch:
    """A kernel with its grid, its numbers and its constants: called with its tensors, on the current stream.

    The first call goes through Triton, which compiles for these arguments; later ones call what it compiled. So one
    launch must see arguments of one kind only. Where Triton gives nothing to call, as its interpreter, every call goes
    through it.

    Args:
        kernel: a function under `triton.jit`, whose parameters are tensors (or None), numbers and constants, in this
            order.
        grid: programs along up to three axes.
        numbers: the parameters behind the tensors; tuples of numbers too.
        constants: the constants, and options of the compilation.
    """

    __slots__ = ("_again", "_behind", "_constants", "_grid", "_kernel", "_numbers")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[Any, ...], **constants: Any
    ) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, grid, numbers, constants
        named = [constants[name] for name in kernel.arg_names if name in constants]
        self._behind = (*numbers, *named)
        self._again: Callable[..., None] | None = None

    def __call__(self, *tensors: Any) -> None:
        """Launch it; the first argument is a tensor."""
        again = self._again
        if again is not None:
            stream = driver.active.get_current_stream(tensors[0].get_device())
            again(*tensors, *self._behind, stream=stream)
            return
        compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
        if compiled is not None:
            self._again = compiled[(*self._grid, 1, 1)[:3]]


class Allocation:
    """Memory for a tensor of a known kind, allocated anew at every call.

    Args:
        size: its shape.
        dtype, device: its dtype and device.
        strides: how it lies in memory; None: contiguous.
    """

    __slots__ = ("_empty",)

    def __init__(
        self,
        size: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        strides: Sequence[int] | None = None,
    ) -> None:
        if strides is None:
            strides = torch.empty(tuple(size), device="meta").stride()
        # Half a microsecond less than `torch.empty`.
        self._empty = functools.partial(
            torch.empty_strided, tuple(size), tuple(strides), dtype=dtype, device=device
        )

    def __call__(self) -> torch.Tensor:
        """A new one, whose values are whatever the memory held."""
        return self._empty()


def channels_last(size: Sequence[int]) -> tuple[int, ...]:
    """Strides of a channels-last tensor [N, C, H, W]."""
    _, channels, height, width = size
    return channels * height * width, 1, channels * width, channels
