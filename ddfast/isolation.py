"""A call's own state of the process: what a caller has set neither changes a result nor is changed by it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from ddfast.random_states import kept_random_states


@contextmanager
def isolated() -> Iterator[None]:
    """Work in torch's usual state, and give the caller's back at the end, after an error too.

    Inside, the default dtype is float32, the default device the CPU, gradients are recorded, and neither inference
    mode nor autocast is on. Given back are these, the number of threads, the states of the generators of torch, NumPy
    and Python, and the warning filters and environment variables, which a first import of a library may change.
    """
    threads, dtype, environment = torch.get_num_threads(), torch.get_default_dtype(), dict(os.environ)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with ExitStack() as stack:
        stack.enter_context(kept_random_states(devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_without_autocast())
        stack.enter_context(warnings.catch_warnings())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(dtype)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            _put_back(environment)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Compute on `count` threads: their number changes the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Step out of every autocast that the caller is inside of.

    Switching it off is not enough: an inner autocast then forgets its copies of the weights only at the end of the
    caller's, so that a training would compute with the weights of its first step.
    """
    enabled = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}
    depth = torch.autocast_increment_nesting() - 1
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    for kind in enabled:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for _ in range(depth):
            torch.autocast_increment_nesting()
        for kind, was in enabled.items():
            torch.set_autocast_enabled(kind, was)


def _put_back(environment: dict[str, str]) -> None:
    for name in [name for name in os.environ if name not in environment]:
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
