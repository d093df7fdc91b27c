"""UDD: gradient matching of images and those of their regions that a network hardly uses, enlarged.

Wang, Zhang and Cheng, "UDD: Dataset Distillation via Mining Underutilized Regions", 2024. On the networks and the loop
of IDC; the contrastive loss of its Sec. 2.5 is in `ddfast.methods.matching.cfc`. The authors gave out no code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.arguments import one_of, positive_number, whole_number
from ddfast.data.pool import ClassPool
from ddfast.errors import UsageError
from ddfast.methods.base import Context
from ddfast.methods.matching.chooser import trained_on_real
from ddfast.methods.matching.idc import IDC, IDCOptions
from ddfast.methods.matching.objectives import MICRO_BATCH
from ddfast.methods.matching.options import begins_with, number_or_auto, weighs_contrast
from ddfast.methods.matching.real import on_channels
from ddfast.models.maps import activation_maps, map_gradients
from ddfast.ops import crop_resize
from ddfast.ops.graphs import Recorded
from ddfast.ops.transfer import to_device
from ddfast.output.pixels import Regions
from ddfast.seeding import generator, seeded
from ddfast.settings import option
from ddfast.wording import argument, setting

POLICIES = ("jitter", "gradient", "activation", "vote")
JITTERS = ("gaussian", "uniform", "salt_pepper")
SIZES = "1/3,1/2,2/3"
_HALVED = (
    Fraction(6, 10),
    Fraction(8, 10),
    Fraction(9, 10),
)  # 1200, 1600 and 1800 of 2000 iterations (App. A)


def sizes_of(given: Any, keyword: str) -> str:
    """Sides of windows as shares of an image's, ascending: `1/3,1/2,2/3` for what says the same.

    Raises:
        UsageError: no share of more than 0 and less than 1, or one twice.
    """
    parts = given.split(",") if isinstance(given, str) else given
    try:
        found = [Fraction(str(part).strip()).limit_denominator(1000) for part in parts]
    except (TypeError, ValueError, ZeroDivisionError):
        found = []
    if not found or not all(0 < part < 1 for part in found) or len(set(found)) < len(found):
        raise UsageError(
            f"{argument(keyword)} must be different shares of a side between 0 and 1 with commas between, {SIZES} for "
            f"example, got {given!r}"
        )
    return ",".join(map(str, sorted(found)))


@dataclass(frozen=True)
class UDDOptions(IDCOptions):
    """Options of UDD."""

    init: str = begins_with("real")
    cfc: float = weighs_contrast(1.0)
    policy: str = option(
        "jitter",
        "what tells that a region is used: how much noise changes the network's answer there; the gradient there; the "
        "answer; the votes of all three",
        stage="synthesize",
        choices=POLICIES,
    )
    sizes: str = option(
        SIZES,
        "sides of the candidate regions, which lie in the four corners, as shares of the image's",
        stage="synthesize",
        metavar="SHARE[,SHARE...]",
        check=sizes_of,
    )
    lowest: int | str = option(
        "auto",
        "regions of an image that are used least and join it, enlarged; auto: two thirds of the candidates",
        stage="synthesize",
        type=str,
        metavar="N",
        check=number_or_auto,
    )
    jitter: str = option(
        "gaussian", "noise of the policies jitter and vote", stage="synthesize", choices=JITTERS
    )
    jitter_size: float = option(
        0.1,
        "deviation of the noise in normalised pixels, or the share of pixels that salt_pepper turns black or white",
        stage="synthesize",
    )
    jitters: int = option(2, "noisy copies of an image in a search", stage="synthesize")
    chooser_steps: int = option(
        1000,
        "steps on real images of the network that chooses, at the end, the regions that students see; a teacher or "
        "proxies that are given choose in its place",
        stage="synthesize",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.policy, "policy", POLICIES)
        one_of(self.jitter, "jitter", JITTERS)
        self._set("sizes", sizes_of(self.sizes, "sizes"))
        self._set("lowest", number_or_auto(self.lowest, "lowest"))
        for name in ("jitters", "chooser_steps"):
            self._set(name, whole_number(getattr(self, name), name, least=1))
        self._set("jitter_size", positive_number(self.jitter_size, "jitter_size"))
        if self.jitter == "salt_pepper" and self.jitter_size > 1:
            raise UsageError(
                f"{argument('jitter_size')} of salt_pepper is a share of the pixels, got {self.jitter_size:g}"
            )
        if self.policy not in ("jitter", "vote"):
            for name in ("jitter", "jitter_size", "jitters"):
                if getattr(self, name) != self.__dataclass_fields__[name].default:
                    raise UsageError(
                        f"{argument(name)} is of no use with {setting('policy', self.policy)}, which makes no noise: "
                        "leave it out"
                    )
        if self.lowest != "auto" and not 1 <= int(self.lowest) <= self.candidates:
            raise UsageError(
                f"{argument('lowest')} must lie in 1..{self.candidates}, the corners of {argument('sizes')} "
                f"{self.sizes}, got {self.lowest}"
            )

    @property
    def candidates(self) -> int:
        """Candidate regions of an image."""
        return 4 * len(self.sizes.split(","))


class UDD(IDC):
    """Underutilised regions. The defaults are those of the paper on CIFAR-10, and IDC's where it says nothing."""

    name = "udd"
    summary = "gradient matching of images and their underutilised regions, enlarged (UDD, 2024)"
    Options: ClassVar[type] = UDDOptions
    uses_teacher: ClassVar[bool] = True
    factor = 1
    factors: ClassVar[tuple[int, ...]] = (1,)  # regions take the place of IDC's tiles
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "svhn": {"net_samples": 500},
        "imagenet10": IDC.presets["imagenet10"],
        # With the CMI regulariser, whose authors give no lambda for it: IDC's. Each needs `proxies`.
        "cifar10_ipc10_cmi": {"cmi": 100.0},
        "cifar10_ipc50_cmi": {"cmi": 50.0},
    }

    def resolved(self, factor: int, ipc: int) -> UDD:
        """Fix how many regions join an image."""
        options = self.options
        if options.lowest != "auto":
            return self
        return UDD(dataclasses.replace(options, lowest=round(2 * options.candidates / 3)))

    def check_ipc(self, ipc: int) -> None:
        """Nothing: a single image has regions beside it, so that CMI acts."""

    def rate(self, number: int, context: Context) -> float:
        """IDC's learning rate, halved three times (App. A)."""
        done = Fraction(number // int(self.options.inner_loop), int(self.options.iterations))
        return super().rate(number, context) / 2 ** sum(done >= share for share in _HALVED)

    def found(
        self, number: int, network: nn.Module, pixels: Tensor, classes: Sequence[int], context: Context
    ) -> dict[str, Tensor]:
        """The regions of each image that the step's network uses least: boxes int64 [C * n, P, 4] (Sec. 2.3)."""
        images = self.decoded(pixels, context)
        with seeded(context.seed, "search", number, device=context.device):
            lowest = self.searched(network, images, number, classes, context)
        return {"regions": to_device(self._windows(images), images.device)[lowest]}

    def formed(self, images: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """S_c^train: the images, then those of their regions that are used least, enlarged (Sec. 2.4)."""
        regions = crop_resize(images.flatten(0, 1), known["regions"], images.shape[-1])
        return torch.cat([images, regions.unflatten(0, images.shape[:2]).flatten(1, 2)], dim=1)

    def count_formed(self, images: int) -> int:
        """The images and their regions."""
        return images * (1 + int(self.options.lowest))

    def _chosen(self, made: int, label: int, number: int, context: Context) -> Tensor:
        """Places of 128 of a class: the images themselves, and as many regions as there is room for."""
        images, draws = context.ipc, generator(context.seed, "subsample", label, number)
        order = [
            torch.randperm(images, generator=draws),
            images + torch.randperm(made - images, generator=draws),
        ]
        return torch.cat(order)[: self.synthetic_batch]

    @torch.no_grad()
    def regions(self, images: Tensor, pool: Callable[[], ClassPool], context: Context) -> tuple[Regions, str]:
        """The regions that students see: chosen once, by a network that was trained on real images."""
        self.open(context)
        if context.teacher is not None:
            network, said = (
                context.teacher.model.to(context.device).eval(),
                f"the teacher, a {context.teacher.arch}",
            )
        elif self._regulariser is not None:
            network, said = self._regulariser.proxies[0], "the first of the proxies"
        else:
            network, said = trained_on_real(self.options.arch, self.options.chooser_steps, pool(), context)
        decoded, classes = self.decoded(to_device(images, context.device), context), range(context.classes)
        with seeded(context.seed, "search", self.steps, device=context.device):
            chosen = self.searched(network, decoded, self.steps, classes, context)
        return Regions(self._windows(decoded), chosen.cpu()), f"{said}; policy {self.options.policy}"

    def _windows(self, images: Tensor) -> Tensor:
        """The candidate regions of images of this size, int64 [N, 4]."""
        return corner_windows(images.shape[-1], self.options.sizes)

    def searched(
        self,
        network: nn.Module,
        images: Tensor,
        number: int,
        classes: Sequence[int],
        context: Context,
    ) -> Tensor:
        """The places of each image's P regions with the lowest utilisation, ascending, int64 [C * n, P]."""
        labels = torch.tensor(classes).repeat_interleave(len(images) // len(classes))
        noisy = self.options.policy in ("jitter", "vote")
        noise = self._noise(images, number, classes, context) if noisy else None
        return self._searching(network, images, to_device(labels, images.device), noise, context)

    @functools.cached_property
    def _searching(self) -> Recorded:
        return Recorded(self._searched, what="the search of udd")

    def close(self) -> None:
        """See `Matching`."""
        super().close()
        self._searching.forget()

    def _searched(
        self, network: nn.Module, images: Tensor, labels: Tensor, noise: Tensor | None, context: Context
    ) -> Tensor:
        """The same of tensors alone, so that a GPU records it."""
        windows, side = self._windows(images), images.shape[-1]

        def over(maps_of: Any, *rows: Tensor) -> Tensor:
            """The regions' means of maps [B, h, w], as one product; the images go through in pieces."""
            pieces = zip(*(tensor.split(MICRO_BATCH) for tensor in rows), strict=True)
            return region_means(torch.cat([maps_of(network, *piece) for piece in pieces]), windows, side)

        @functools.cache
        def by_activation() -> Tensor:
            return over(activation_maps, images)

        def by_gradient() -> Tensor:
            return over(map_gradients, images, labels)

        def by_jitter() -> Tensor:
            """sigma_n = | Lambda_n - 1/M sum_m Lambda^_nm | (Eqs. 2 to 4), with noise on the whole image."""
            assert noise is not None
            copies = over(activation_maps, torch.cat(self._jittered(images, noise, context)))
            return (by_activation() - copies.unflatten(0, (-1, len(images))).mean(dim=0)).abs()

        count = int(self.options.lowest)
        policy: dict[str, Callable[[], Tensor]] = {
            "activation": by_activation,
            "gradient": by_gradient,
            "jitter": by_jitter,
        }
        if self.options.policy == "vote":
            return lowest_of(votes([found() for found in policy.values()], count), count)
        return lowest_of(policy[self.options.policy](), count)

    def _noise(self, images: Tensor, number: int, classes: Sequence[int], context: Context) -> Tensor:
        """What M noisy copies of the images are made with, [M, C * n, 3, H, W]; uniform, of one channel, for salt."""
        each = len(images) // len(classes)
        shape = (int(self.options.jitters), each, *images.shape[1:])
        drawn = [generator(context.seed, "jitter", label, number) for label in classes]
        if self.options.jitter == "salt_pepper":
            noise = [torch.rand(*shape[:2], 1, *shape[3:], generator=draws) for draws in drawn]
        elif self.options.jitter == "uniform":
            noise = [(2 * torch.rand(shape, generator=draws) - 1) * 3**0.5 for draws in drawn]
        else:
            noise = [torch.randn(shape, generator=draws) for draws in drawn]
        return to_device(torch.cat(noise, dim=1), images.device).to(images.dtype)

    def _jittered(self, images: Tensor, noise: Tensor, context: Context) -> list[Tensor]:
        """M copies of the images with noise of their own (Eq. 2)."""
        size = float(self.options.jitter_size)
        if self.options.jitter != "salt_pepper":
            return list(torch.add(images, noise, alpha=size).unbind())
        mean, std = (torch.tensor(values) for values in (context.mean, context.std))
        black, white = (
            on_channels(tuple(values.tolist()), images.dtype, images.device)
            for values in (-mean / std, (1 - mean) / std)
        )
        salted = torch.where(noise < size / 2, black, images)
        return list(torch.where(noise > 1 - size / 2, white, salted).unbind())


# Regions -----------------------------------------------------------------------------------------------------


@functools.cache
def corner_windows(side: int, sizes: str) -> Tensor:
    """The candidate regions (Sec. 2.2): for each size a square in every corner, int64 [4 * sizes, 4].

    Args:
        side: of the images, in pixels.
        sizes: shares of it, with commas between; a window's side is rounded to whole pixels: 11, 16 and 21 of 32.

    Returns:
        x0, y0, x1, y1 in pixels, x1 and y1 exclusive: top left, top right, bottom left, bottom right of the first size,
        then those of the next.
    """
    found = []
    for share in map(Fraction, sizes.split(",")):
        size = min(max(int(share * side + Fraction(1, 2)), 1), side)
        far = side - size
        found += [(x, y, x + size, y + size) for y in (0, far) for x in (0, far)]
    return torch.tensor(found)


@functools.cache
def _window_matrix(
    windows: tuple[tuple[int, ...], ...],
    side: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """[height * width, N]: a map times this is the mean in each window of the map enlarged to the image."""
    places = height * width
    unit = torch.eye(places, dtype=torch.float64).view(places, 1, height, width)
    enlarged = F.interpolate(unit, size=(side, side), mode="bilinear", align_corners=False)[:, 0]
    means = [enlarged[:, y0:y1, x0:x1].mean(dim=(1, 2)) for x0, y0, x1, y1 in windows]
    return to_device(torch.stack(means, dim=1).to(dtype), device)


def region_means(maps: Tensor, windows: Tensor, side: int) -> Tensor:
    """Lambda_n: the mean of each map, enlarged bilinearly to the image, in each window: one product.

    Args:
        maps: float [B, h, w].
        windows: int64 [N, 4] as `corner_windows` gives them, on the CPU.
        side: of the images, in pixels.

    Returns:
        [B, N] in the dtype of `maps`.
    """
    key = tuple(tuple(window) for window in windows.tolist())
    return maps.flatten(1) @ _window_matrix(key, side, maps.shape[1], maps.shape[2], maps.dtype, maps.device)


def votes(responses: Sequence[Tensor], count: int) -> Tensor:
    """A utilisation [B, N] of several: low where many have a region among their `count` lowest.

    Regions with as many votes are in the order of the sum of their ranks.
    """
    ranks = torch.stack([response.argsort(dim=1, stable=True).argsort(dim=1) for response in responses])
    most = ranks.shape[-1] * len(responses)
    return ranks.sum(dim=0) - (ranks < count).sum(dim=0) * most


def lowest_of(response: Tensor, count: int) -> Tensor:
    """Places of the `count` lowest of each row, ascending, int64 [B, count]; of equals the first ones."""
    return response.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
