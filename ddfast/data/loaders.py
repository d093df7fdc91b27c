"""What decodes for a run: NVIDIA DALI, torchvision with Pillow, or Pillow alone, behind one call.

- On a GPU DALI is taken where it is installed: the GPU decodes, and the host's cores are left to the rest. The JPEG
  engine of an A100, H100, H200 or B200 decodes where `dali-hw` is asked for, and only there: its pixels are its own,
  and a run that is left alone can be continued on any GPU (`ddfast.data.dali`).
- On a CPU torchvision is taken even where DALI is installed: it is twice as fast as DALI's CPU pipeline and
  nearer to Pillow's pixels (`bench/results/loading.md`).
- Pillow alone is taken where torchvision was built without a JPEG decoder.

Whatever is chosen, only plain JPEGs go its way; other formats and damaged files go to Pillow, whose image or
reason counts, so that all three quarantine the same files. The choice depends on the device and on what is
installed, never on a measurement at run time: a machine always makes the same one. It decides bits, so it
stands in the manifest.

How much it decides, on 256 photographs at 64 px under a ConvNet of 82% training accuracy, against Pillow: with
torchvision pixels differ by 0.002 grey levels in the mean and by 1 at most, and all 1,280 noisy crops are the same;
with DALI on a CPU by 0.1 and 18, at the border, and 1,279 crops are the same.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ddfast.data.loading import Load
from ddfast.errors import UsageError
from ddfast.settings import LOADERS

if TYPE_CHECKING:
    import torch

    from ddfast.data.loading import Loaded
    from ddfast.data.samples import Sample
    from ddfast.data.sources import Source

_INSTALL = "pip install nvidia-dali-cuda130, or nvidia-dali-cuda120 with an older driver"


@dataclass(frozen=True)
class Loader:
    """A chosen decoder: `loader(source, samples, size, ...)` is `load(...)`.

    Attributes:
        name: "dali", "dali-hw", "torchvision" or "pillow", for the manifest.
        reason: why it was chosen, in a few words.
        load: the call itself; images come on the CPU.
        load_on_device: the same with images left on the device that decoded them; None where that is the CPU.
    """

    name: str
    reason: str
    load: Load
    load_on_device: Load | None = None

    def on_device(self) -> Loader:
        """The loader of the same bytes for a consumer on the device that decodes: images do not cross to the host.

        All its images are on that one device, Pillow's too.
        """
        return self if self.load_on_device is None else replace(self, load=self.load_on_device)

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
        name: one of `LOADERS`.
        device: where the model runs, "cpu" or "cuda" with or without an index. On a GPU DALI decodes there.

    Raises:
        UsageError: an unknown name, or what is asked for is not installed or not in this GPU.
    """
    from ddfast.data.loading import load
    from ddfast.data.native_jpeg import decode_fit_native, torchvision_decodes

    if name not in LOADERS:
        raise UsageError(f"--loader must be one of {', '.join(LOADERS)}, got {name!r}")
    on_gpu = str(device).startswith("cuda")
    missing = dali_missing()
    if name in ("dali", "dali-hw") or (name == "auto" and on_gpu and missing is None):
        if missing is not None:
            raise UsageError(f"the DALI loader is not available: {missing}; {_INSTALL}")
        return _dali(str(device) if on_gpu else None, engine=name == "dali-hw")
    wish = f"; for the GPU to decode, {_INSTALL}" if name == "auto" and on_gpu else ""
    if name == "pillow":
        return Loader("pillow", "asked for", load)
    if torchvision_decodes():
        native = partial(load, decode=decode_fit_native)
        return Loader("torchvision", f"torchvision decodes JPEGs, Pillow the rest{wish}", native)
    if name == "torchvision":
        raise UsageError(
            "this torchvision was built without JPEG: install another build, or use --loader pillow"
        )
    return Loader("pillow", f"this torchvision was built without JPEG{wish}", load)


def _dali(device: str | None, *, engine: bool) -> Loader:
    """DALI on a GPU, or on the CPU where that is None."""
    from ddfast.data.dali import dali_load, has_engine

    if not engine:
        reason = f"DALI decodes JPEGs on the {'GPU' if device else 'CPU'}"
        on_device = dali_load(device, on_device=True) if device else None
        return Loader("dali", reason, dali_load(device), on_device)
    if device is None or not has_engine(device):
        raise UsageError(
            f"--loader dali-hw decodes by a GPU's JPEG engine, which {device or 'a CPU'} has not: use --loader dali; "
            "a run that began with dali-hw goes on where there is an A100, H100, H200 or B200"
        )
    return Loader(
        "dali-hw",
        "DALI decodes JPEGs by the GPU's engine",
        dali_load(device, engine=True),
        dali_load(device, engine=True, on_device=True),
    )


def dali_missing() -> str | None:
    """Why DALI cannot be used; None where it is installed. It is not imported for the answer."""
    try:
        found = importlib.util.find_spec("nvidia.dali")
    except ModuleNotFoundError:
        found = None
    return None if found else "DALI is not installed"
