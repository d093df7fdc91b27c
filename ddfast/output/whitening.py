"""ZCA whitening: pixels whose covariance is nearly the identity, fitted once on real images and kept with what uses it.

x -> U (S + eps)^(-1/2) U^T (x - mean), with U S U^T the covariance of the images' pixels in [0, 1] (eps = 0.1 in the
code of MTT, which takes it from kornia). It takes the place of a normalisation: what trains on whitened images sees
them as they are, with a mean of 0 and a deviation of 1.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from ddfast.errors import UsageError
from ddfast.files import atomic_write_bytes
from ddfast.state import read_tensors, serialize_tensors

WHITENING = "zca.safetensors"
EPS = 0.1
_ROWS = 1000  # images whose products are added up at a time


class Whitening:
    """The transform of images of one size.

    Attributes:
        mean: float32 [3, H, W], of the pixels in [0, 1].
        basis: float32 [D, D], the eigenvectors of their covariance as columns, with D = 3 H W.
        variances: float32 [D], the eigenvalues.
        eps: added to them.
    """

    def __init__(self, mean: Tensor, basis: Tensor, variances: Tensor, eps: float) -> None:
        self.mean, self.basis, self.variances, self.eps = mean, basis, variances, eps

    @classmethod
    def fit(cls, images: Tensor, eps: float = EPS) -> Whitening:
        """That of images, uint8 [N, 3, H, W] with N at least 2; sums are taken in float64."""
        flat = images.flatten(1)
        mean = flat.sum(dim=0, dtype=torch.float64) / (255 * len(flat))
        products = torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64)
        for rows in flat.split(_ROWS):
            centred = rows.double() / 255 - mean
            products += centred.T @ centred
        variances, basis = torch.linalg.eigh(products / (len(flat) - 1))
        size = images.shape[1:]
        return cls(mean.view(size).float(), basis.float(), variances.clamp_min(0).float(), float(eps))

    @functools.cached_property
    def _forth(self) -> Tensor:
        return (self.basis * (self.variances + self.eps).rsqrt()) @ self.basis.T

    @functools.cached_property
    def _back(self) -> Tensor:
        return (self.basis * (self.variances + self.eps).sqrt()) @ self.basis.T

    def __call__(self, images: Tensor) -> Tensor:
        """Whitened images float [N, 3, H, W] of uint8 ones, or of floating point ones in [0, 1]; differentiable."""
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        centred = pixels - self.mean.to(pixels)
        return (centred.flatten(1) @ self._forth.to(centred)).view_as(pixels)

    def undone(self, whitened: Tensor) -> Tensor:
        """Pixels in [0, 1], where they can be shown, of whitened images [N, 3, H, W]; differentiable."""
        back = (whitened.flatten(1) @ self._back.to(whitened)).view_as(whitened)
        return back + self.mean.to(whitened)

    def write(self, folder: Path) -> None:
        """Write `zca.safetensors` into a folder, atomically; equal transforms give equal bytes."""
        tensors = {"mean": self.mean, "basis": self.basis, "variances": self.variances}
        atomic_write_bytes(folder / WHITENING, serialize_tensors(tensors, {"zca": {"eps": self.eps}}))


def read_whitening(folder: Path) -> Whitening | None:
    """The transform that a folder holds, None where it holds none.

    Raises:
        UsageError: it is damaged.
    """
    path = folder / WHITENING
    if not path.is_file():
        return None
    tensors, said = read_tensors(path, path.read_bytes(), what="whitening")
    try:
        mean, basis, variances = (tensors[name] for name in ("mean", "basis", "variances"))
        eps = float(said["zca"]["eps"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is no whitening: make the folder anew") from error
    size = mean.numel()
    fits = mean.ndim == 3 and basis.shape == (size, size) and variances.shape == (size,) and eps > 0
    if not fits or not all(bool(torch.isfinite(tensor).all()) for tensor in (mean, basis, variances)):
        shapes = json.dumps([list(tensor.shape) for tensor in (mean, basis, variances)])
        raise UsageError(f"{path} is no whitening, its tensors are {shapes}: make the folder anew")
    return Whitening(mean, basis, variances, eps)
