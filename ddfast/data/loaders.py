"""Which decoder feeds a run: Pillow, or NVIDIA DALI where it pays, behind one call.

On a GPU DALI is taken where it is installed: the GPU decodes, and the host's cores are left to the rest. On a
CPU Pillow is taken even where DALI is installed. Both decode with libjpeg-turbo, to the same bits; DALI
resizes only what the crop keeps and is some 1.2 times faster (`bench/results/loading.md`), but the score
pass waits for the model, not for either, and Pillow's verdict on a damaged file is the one that counts.

The choice depends on the device and on what is installed, never on a measurement at run time: a machine
always makes the same one. It decides bits, so it stands in the manifest.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ddfast.errors import UsageError

if TYPE_CHECKING:
    import torch

    from ddfast.data.loading import Loaded
    from ddfast.data.samples import Sample
    from ddfast.data.sources import Source

LOADERS = ("auto", "dali", "pillow")
"""What `resolve_loader` takes."""

_INSTALL = "pip install nvidia-dali-cuda130, or nvidia-dali-cuda120 with an older driver"


class Load(Protocol):
    """The call that every loader is; `ddfast.data.loading.load` documents it."""

    def __call__(
        self,
        source: Source,
        samples: Iterable[Sample],
        size: int,
        *,
        resize: int | None = None,
        workers: int | None = None,
        ahead: int = 64,
        max_pixels: int | None = None,
    ) -> Generator[Loaded, None, None]:
        """Read, decode and fit samples, in the order given."""
        ...


@dataclass(frozen=True)
class Loader:
    """A chosen decoder: `loader(source, samples, size, ...)` is `load(...)`.

    Attributes:
        name: "pillow" or "dali", for the manifest.
        reason: why it was chosen, in a few words.
        load: the call itself.
    """

    name: str
    reason: str
    load: Load

    def __call__(
        self,
        source: Source,
        samples: Iterable[Sample],
        size: int,
        *,
        resize: int | None = None,
        workers: int | None = None,
        ahead: int = 64,
        max_pixels: int | None = None,
    ) -> Generator[Loaded, None, None]:
        """Read, decode and fit samples, in the order given; see `ddfast.data.loading.load`."""
        return self.load(
            source, samples, size, resize=resize, workers=workers, ahead=ahead, max_pixels=max_pixels
        )


def resolve_loader(name: str = "auto", device: str | torch.device = "cpu") -> Loader:
    """The loader for a device.

    Args:
        name: "auto", "dali" or "pillow".
        device: where the model runs, "cpu" or "cuda" with or without an index. On a GPU DALI decodes there.

    Raises:
        UsageError: an unknown name, or DALI is asked for and not installed.
    """
    from ddfast.data.loading import load

    if name not in LOADERS:
        raise UsageError(f"--loader must be one of {', '.join(LOADERS)}, got {name!r}")
    on_gpu = str(device).startswith("cuda")
    missing = dali_missing()
    if name == "pillow":
        return Loader("pillow", "asked for", load)
    if name == "auto" and not on_gpu:
        return Loader("pillow", "it keeps ahead of a model on a CPU", load)
    if missing is not None:
        if name == "dali":
            raise UsageError(f"the DALI loader is not available: {missing}; {_INSTALL}")
        return Loader("pillow", f"{missing}: {_INSTALL}", load)
    return Loader(
        "dali", f"decodes on the {'GPU' if on_gpu else 'CPU'}", _dali(str(device) if on_gpu else None)
    )


def dali_missing() -> str | None:
    """Why DALI cannot be used; None where it is installed. It is not imported for the answer."""
    try:
        found = importlib.util.find_spec("nvidia.dali")
    except ModuleNotFoundError:
        found = None
    return None if found else "DALI is not installed"


def _dali(device: str | None) -> Load:
    from ddfast.data.dali import dali_load

    index = None if device is None else int(device.partition(":")[2] or _current_device())
    return dali_load(index)


def _current_device() -> int:
    import torch

    return torch.cuda.current_device()
