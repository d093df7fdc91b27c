"""Small tensors that calls with equal settings share, so that a GPU is not sent the same numbers again and again."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

MAX_KEPT = 256
_KINDS: tuple[type, ...] = (torch.Tensor,)  # a stand-in of a tracer is good for one call alone
_KEPT: dict[Hashable, Tensor] = {}


def shared(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives, made once for each key: not to be written to, and not to be handed to a caller."""
    if torch.compiler.is_compiling():
        return make()
    kept = _KEPT.get(key)
    if kept is not None:
        return kept
    with torch.inference_mode(False):  # serves training too
        made = make()
    # What a CUDA graph is being recorded for is memory of that graph.
    recorded = made.is_cuda and torch.cuda.is_current_stream_capturing()
    if type(made) in _KINDS and not recorded:
        # Those of a GPU stay: a CUDA graph may read them. What finds no place beside them is made in every call.
        if len(_KEPT) >= MAX_KEPT:
            for each in [each for each, tensor in _KEPT.items() if not tensor.is_cuda]:
                del _KEPT[each]
        if len(_KEPT) < MAX_KEPT:
            _KEPT[key] = made
    return made
