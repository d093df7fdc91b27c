"""How evenly a network uses distilled images: mUE, the entropy of its activation maps (UDD, Eqs. 11 and 12).

The formula that the paper prints falls where its text says that it rises, so three readings are told apart:

mUE            H_d / log d of the shares of a map in d intervals of equal width between 0 and the largest activation of
               the whole set, mean over d = 5, ..., 10 and over the images: 1 where all levels are equally common
as printed     1 - H_d / (|X| log d) of the same shares, |X| being the places of a map
min to max     as mUE, but with intervals between the smallest and the largest activation of each map
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ddfast.arguments import output_file, path_of, whole_number
from ddfast.data.pool import DecodedPool, drawn_places
from ddfast.errors import UsageError
from ddfast.files import atomic_write_bytes, make_folder
from ddfast.isolation import isolated
from ddfast.methods.base import Context
from ddfast.methods.matching.chooser import trained_on_real
from ddfast.methods.matching.udd import SIZES, corner_windows, lowest_of, region_means
from ddfast.models.maps import activation_maps
from ddfast.models.registry import check_model
from ddfast.models.teacher import Teacher, load_teacher
from ddfast.output.distilled import DistilledSet
from ddfast.output.pixels import to_bytes
from ddfast.report.colours import diverging
from ddfast.report.pictures import paired_mosaic_picture, png_bytes
from ddfast.report.regions import regions_picture
from ddfast.training.augmentation import normalize
from ddfast.training.device import resolve_device
from ddfast.training.evaluation import _matched_arch, read_distilled
from ddfast.wording import argument, plural

INTERVALS = (5, 6, 7, 8, 9, 10)
_AT_ONCE = 256  # images that go through the network at once
_SHOWN = 3  # images of a class in the picture
_CELL = 96  # side of one in pixels


@dataclass(frozen=True)
class Utilization:
    """How evenly the activations of a set's images are spread.

    Attributes:
        mue: mUE as it is meant.
        printed: as it is printed.
        min_max: with intervals of each map's own.
        by_intervals: number of intervals d -> the share H_d / log d, whose mean `mue` is.
        images: of the set.
        network: what looked at them, in words.
    """

    mue: float
    printed: float
    min_max: float
    by_intervals: dict[int, float]
    images: int
    network: str

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        by = ", ".join(f"{d}: {value:.3f}" for d, value in self.by_intervals.items())
        return "\n".join(
            (
                f"network: {self.network}",
                f"{plural(self.images, 'image')}; by number of intervals {by}",
                f"as printed {self.printed:.5f}, min to max {self.min_max:.3f}",
                f"mUE {self.mue:.3f}",
            )
        )


def utilization_of(maps: Tensor, network: str = "") -> Utilization:
    """The measures of a set's activation maps, float [N, h, w], none of them below 0 behind a ReLU."""
    values = maps.double().flatten(1)
    largest = values.amax().clamp(min=0)
    fixed = values / largest if largest > 0 else torch.zeros_like(values)
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    own = (values - low) / torch.where(high > low, high - low, 1)
    entropies = {d: _entropies(fixed, d) for d in INTERVALS}
    shares = {d: float((found / math.log(d)).mean()) for d, found in entropies.items()}
    places = values.shape[1]
    mean = math.fsum(shares.values()) / len(shares)
    return Utilization(
        mue=mean,
        printed=1 - mean / places,
        min_max=math.fsum(float((_entropies(own, d) / math.log(d)).mean()) for d in INTERVALS)
        / len(INTERVALS),
        by_intervals=shares,
        images=len(maps),
        network=network,
    )


def _entropies(values: Tensor, intervals: int) -> Tensor:
    """Entropy in nats of each row's shares in intervals of equal width in [0, 1], float64 [N]; below 0 counts as 0."""
    places = (values * intervals).long().clamp(0, intervals - 1)
    shares = F.one_hot(places, intervals).double().mean(dim=1)
    return -torch.special.xlogy(shares, shares).sum(dim=1)


@isolated()
def utilization(
    distilled: str | Path,
    *,
    arch: str | None = None,
    teacher: Teacher | str | Path | None = None,
    data: Any = None,
    steps: int = 1000,
    images_per_class: int = 500,
    seed: int = 0,
    picture: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    quiet: bool = False,
) -> Utilization:
    """Measure how evenly a network uses the images of a distilled set, and show it.

    The activation map of an image is the mean over channels of the last block's output before it is pooled, enlarged
    bilinearly to the image.

    Args:
        distilled: an output folder of any method.
        arch: of the network; None: what a set of pixels was matched on.
        teacher: a trained network, a file or an opened one; None: one of `arch` is trained on real images.
        data: the real data; None: where the run found them.
        steps: of that training, of 64 images each.
        images_per_class: real images that it draws from, at most.
        seed: of its weights and draws.
        picture: a .png to write, with some images of each class, their maps and the regions that are used least.
        device: "auto", "cpu" or "cuda".
        workers: decoding workers; None: the loader's default.
        quiet: print nothing.

    Raises:
        UsageError: no such set, or a network or data that do not fit it.
    """
    steps = whole_number(steps, "steps", least=1)
    images_per_class = whole_number(images_per_class, "images_per_class", least=1)
    seed = whole_number(seed, "seed", least=0)
    if picture is not None:
        output_file(picture, "picture")
    where = resolve_device(device)
    opened = DistilledSet(path_of(distilled, "distilled"))
    if teacher is not None:
        network, said, mean, std = _of_teacher(teacher, opened)
    else:
        arch = _matched_arch(opened) if arch is None else arch
        check_model(arch, opened.image_size)
        pool = _real(data, opened, images_per_class, seed, workers, quiet)
        network, said = trained_on_real(arch, steps, pool, _context(opened, seed, where))
        mean, std = opened.mean, opened.std
    images = read_distilled(opened, regions="none")
    shown = (
        images.images
        if not images.is_float
        else to_bytes(images.images, images.mean, images.std, "normalized")
    )
    if not images.is_float or (list(mean), list(std)) != (opened.mean, opened.std):
        inputs = normalize(shown, mean, std)
    else:
        inputs = images.images
    maps = torch.cat(
        [activation_maps(network.to(where), piece.to(where)).cpu() for piece in inputs.split(_AT_ONCE)]
    )
    enlarged = F.interpolate(maps[:, None], size=opened.image_size, mode="bilinear", align_corners=False)[
        :, 0
    ]
    found = utilization_of(enlarged, said)
    if picture is not None:
        windows, lowest = _regions(opened, maps)
        make_folder(Path(picture).parent)
        atomic_write_bytes(Path(picture), png_bytes(_picture(opened, shown, enlarged, windows, lowest)))
    return found


def _of_teacher(
    teacher: Teacher | str | Path, opened: DistilledSet
) -> tuple[nn.Module, str, Sequence[float], Sequence[float]]:
    held = teacher if isinstance(teacher, Teacher) else load_teacher(teacher)
    if held.image_size != opened.image_size:
        raise UsageError(
            f"the teacher reads {held.image_size} px, the distilled images have {opened.image_size} px: give "
            "another one"
        )
    reached = "" if held.top1 is None else f" that reads {held.top1:.1f}% of the test images"
    return held.model.eval(), f"{held.arch}, a teacher{reached}", held.mean, held.std


def _real(
    data: Any, opened: DistilledSet, images_per_class: int, seed: int, workers: int | None, quiet: bool
) -> DecodedPool:
    """Real images to train a network on."""
    import json

    from ddfast.data.loading import load
    from ddfast.data.opening import open_source
    from ddfast.pipeline.run import RUN

    if data is None:
        try:
            data = json.loads((opened.root / RUN).read_text("utf-8"))["data"]
        except (OSError, ValueError, KeyError, RecursionError):
            raise UsageError(
                f"{opened.root / RUN} names no data: give {argument('data')}, or a {argument('teacher')}"
            ) from None
    source = open_source(data, "train")
    if list(source.class_names) != opened.class_names:
        raise UsageError(
            f"{source.name} has other classes than {opened.root}: give the data it was distilled from"
        )
    places = drawn_places(source.samples, len(opened.class_names), images_per_class, seed)
    size = opened.image_size
    return DecodedPool(
        source.samples,
        places,
        len(opened.class_names),
        size,
        lambda samples: load(source, samples, size, workers=workers),
        quiet=quiet,
    )


def _context(opened: DistilledSet, seed: int, device: torch.device) -> Context:
    return Context(
        teacher=None,
        image_size=opened.image_size,
        factor=1,
        seed=seed,
        precision="float32",
        forward_batch=0,
        device=device,
        class_names=tuple(opened.class_names),
        mean=tuple(opened.mean),
        std=tuple(opened.std),
    )


def _regions(opened: DistilledSet, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Windows [K, 4] and the places of each image's [N, P]: those of the set, or the least active two thirds."""
    if opened.pixels is not None and opened.pixels.regions is not None:
        return opened.pixels.regions.windows, opened.pixels.regions.chosen
    windows = corner_windows(opened.image_size, SIZES)
    return windows, lowest_of(region_means(maps, windows, opened.image_size), round(2 * len(windows) / 3))


def _picture(
    opened: DistilledSet, images: Tensor, maps: Tensor, windows: Tensor, lowest: Tensor
) -> Image.Image:
    """Some images of each class, their maps from white at 0 to orange at the set's largest, and their regions."""
    seen: dict[int, list[int]] = {}
    for place, label in enumerate(opened.targets):
        seen.setdefault(label, []).append(place)
    places = [place for label in sorted(seen) for place in seen[label][:_SHOWN]]
    labels = [opened.targets[place] for place in places]
    limit = float(maps.max()) or 1.0

    def drawn(draw: Callable[[int], Image.Image]) -> list[Tensor]:
        return [torch.from_numpy(np.asarray(draw(place)).copy()).permute(2, 0, 1) for place in places]

    heat = drawn(lambda place: Image.fromarray(diverging(maps[place].numpy() / limit)))
    boxed = drawn(lambda place: regions_picture(images[place], windows[lowest[place]], side=_CELL))
    title = "regions" if opened.pixels is not None and opened.pixels.regions is not None else "least active"
    return paired_mosaic_picture(
        [
            ("images", [images[place] for place in places], labels),
            ("activation", heat, labels),
            (title, boxed, labels),
        ],
        opened.class_names,
        side=_CELL,
        max_images=_SHOWN,
    )
