"""The CMI regulariser of every matching method: lambda times the spread of a trained network's features in a class.

"Going Beyond Feature Similarity: Effective Dataset Distillation based on Class-aware Conditional Mutual Information"
(CMI, Eq. 10 and Algorithm 1). A step draws one of the proxies, networks trained on the real images, and lowers the
conditional mutual information of its penultimate features and the classes. Images go in without augmentation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddfast.methods.base import Context
from ddfast.models.registry import features
from ddfast.ops import class_kl
from ddfast.ops.graphs import Recorded
from ddfast.seeding import generator

_ROWS = 128  # images that go through a proxy at once, or a class where it has more: what bounds the memory


class Regulariser:
    """CMI on proxies that stay loaded.

    Args:
        proxies: classifiers of normalised images, on the device, in the mode they are to run in.
    """

    def __init__(self, proxies: Sequence[nn.Module]) -> None:
        self._proxies = [proxy.requires_grad_(False) for proxy in proxies]
        self._kinds = [repr(proxy) for proxy in self._proxies]
        self._read: dict[str, nn.Module] = {}
        self._measuring = Recorded(_value_and_gradient, what="CMI")

    @property
    def proxies(self) -> Sequence[nn.Module]:
        """The classifiers."""
        return self._proxies

    @classmethod
    def load(cls, folder: str, arch: str | None, context: Context) -> Regulariser:
        """The proxies of a folder.

        Raises:
            UsageError: none there, or they are of other classes, another image size or another normalisation.
        """
        from ddfast.training.proxies import load_proxies

        proxies = load_proxies(
            folder,
            class_names=context.class_names,
            image_size=context.image_size,
            mean=context.mean,
            std=context.std,
            arch=arch,
        )
        return cls([proxy.to(context.device) for proxy in proxies])

    def value_and_gradient(
        self, images: Tensor, step: int, seed: int, *, wanted: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """CMI in nats of images [C, n, 3, H, W], a mean over all C * n, and its gradient in them.

        The proxy is drawn by (seed, "proxy", step).

        Args:
            images: normalised, not augmented.
            step: of the run.
            seed: of the run.
            wanted: whether the gradient is.

        Returns:
            a scalar, and the gradient as `images`, None where it is not wanted.
        """
        drawn = torch.randint(len(self._proxies), (), generator=generator(seed, "proxy", step))
        return self._measuring(self._at_its_place(int(drawn), images.device), images.detach(), wanted)

    def close(self) -> None:
        """Give back the memory of what was recorded on a GPU."""
        self._measuring.forget()
        self._read.clear()

    def _at_its_place(self, number: int, device: torch.device) -> nn.Module:
        """A proxy; on a GPU the one network that all proxies like it are read from, so that one is recorded."""
        proxy = self._proxies[number]
        if device.type == "cpu" or len(self._proxies) == 1:
            return proxy
        kind = self._kinds[number]
        if kind not in self._read:
            self._read[kind] = copy.deepcopy(proxy)
        tensors, places = ([*each.parameters(), *each.buffers()] for each in (proxy, self._read[kind]))
        with torch.no_grad():
            torch._foreach_copy_(places, tensors)
        return self._read[kind]


def _value_and_gradient(proxy: nn.Module, images: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """See `Regulariser`; of tensors alone, so that a GPU records it.

    A class counts by its own rows alone, so that whole classes go through the proxy one piece after the other, each
    with a backward pass for the images only.
    """
    classes, each = images.shape[:2]
    value = torch.zeros((), device=images.device)
    gradients = []
    for piece in images.split(max(1, _ROWS // each)):
        share = len(piece) / classes
        with torch.set_grad_enabled(wanted):
            rows = piece.flatten(0, 1).requires_grad_(wanted)
            places = torch.arange(len(rows), device=images.device)
            members, counts = places // each, torch.full_like(places[: len(piece)], each)
            spread = class_kl(features(proxy, rows), members, counts=counts) * share
        value = value + spread.detach()
        if wanted:
            gradients.append(torch.autograd.grad(spread, rows)[0].view_as(piece))
    return value, torch.cat(gradients) if wanted else None
