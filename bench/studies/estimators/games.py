"""Whole games of real images: the value of every coalition of a 4 x 4 grid, kept on disk once computed.

With the table of a game every estimator is a product of matrices, and the exact Shapley values another one. The logit
of a network whose features see no further than the neighbouring cells, such as a ConvNet-3 at 32 px, is a sum of games
of the 3 x 3 windows; then 1,808 evaluations complete the table by inclusion and exclusion. Whether that holds is tried
on coalitions drawn at random, image by image; where it does not, all 65,536 are evaluated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddfast.attribution.estimators.coalitions import all_coalitions, leverage_pairs, shapley_weights
from ddfast.attribution.estimators.game_prior import GamePrior
from ddfast.data.loading import load
from ddfast.data.sources import Sample, Source
from ddfast.errors import BadImage
from ddfast.files import atomic_path, make_folder
from ddfast.models import Teacher
from ddfast.ops import masked_batch
from ddfast.ops.precision import autocast
from ddfast.progress import say

SIDE = 4
PLAYERS = SIDE * SIDE
COALITIONS = 1 << PLAYERS

_CHUNK = 128
_TRIED = 256
_SAMPLED = 5  # seed of the coalitions of `sampled_games`
# Completed values may be off by this share of the game's spread: the rounding of nine float32 logits.
_COMPLETE = 1e-4


@dataclass(frozen=True)
class Games:
    """Values float32 [N, 65536] of N images by coalition number (bit i is player i), and their keys."""

    values: Tensor
    keys: tuple[str, ...]

    @property
    def phi(self) -> Tensor:
        """Exact Shapley values, float64 [N, 16] (InfoUtil Eq. 4)."""
        weights = shapley_weights(all_coalitions(PLAYERS, 0, COALITIONS))
        return torch.stack([game.double() @ weights for game in self.values])

    def of(self, coalitions: Tensor) -> Tensor:
        """Values float64 [N, K] of coalitions bool [K, 16]."""
        return self.values[:, numbers(coalitions)].double()


def numbers(coalitions: Tensor) -> Tensor:
    """Bool [..., 16] to the numbers of coalitions, int64 [...]."""
    return (coalitions.long() << torch.arange(coalitions.shape[-1])).sum(dim=-1)


def pick_keys(source: Source, path: Path) -> list[Sample]:
    """The samples whose keys a file lists, one a line."""
    wanted = set(path.read_text("utf-8").split("\n"))
    return [sample for sample in source.samples if sample.key in wanted]


def pick(source: Source, images: int, skip: int = 0) -> list[Sample]:
    """`images` samples, the classes in turn, each from its sample number `skip` on."""
    of_class: dict[int, list[Sample]] = {}
    for sample in source.samples:
        of_class.setdefault(sample.label, []).append(sample)
    rounds = max(len(samples) for samples in of_class.values())
    turn = [samples[i] for i in range(skip, rounds) for samples in of_class.values() if i < len(samples)]
    return turn[:images]


def whole_games(
    teacher: Teacher, source: Source, samples: Sequence[Sample], size: int, precision: str, work: Path
) -> Games:
    """The games v(s) = logit of the true class under s, baseline 0, of images at `size` px.

    Each is written to `work` when it is finished and read from there the next time.
    """
    values, keys = _kept(
        source,
        samples,
        size,
        lambda sample: work / f"{_identity(teacher, size, precision, sample)}.npy",
        lambda image, sample: _table(teacher, image, sample.label, precision),
    )
    return Games(values, keys)


def _kept(
    source: Source,
    samples: Sequence[Sample],
    size: int,
    path_of: Callable[[Sample], Path],
    values_of: Callable[[Tensor, Sample], Tensor],
) -> tuple[Tensor, tuple[str, ...]]:
    """Values of each image's game [N, ...] and the images' keys; a file is written when its game is finished."""
    values: list[Tensor] = []
    keys: list[str] = []
    for sample, image in load(source, samples, size, workers=0):
        if isinstance(image, BadImage):
            continue
        path = path_of(sample)
        if not path.exists():
            found = values_of(image, sample)
            make_folder(path.parent)
            with atomic_path(path) as unfinished, unfinished.open("wb") as file:
                np.save(file, found.numpy())
            say(f"{len(keys) + 1}/{len(samples)} {sample.key}")
        values.append(torch.from_numpy(np.load(path)))
        keys.append(sample.key)
    return torch.stack(values), tuple(keys)


def sampled_games(
    teacher: Teacher,
    source: Source,
    samples: Sequence[Sample],
    size: int,
    precision: str,
    work: Path,
    evaluations: int,
) -> Games:
    """Games of which so many coalitions are evaluated, completed by what a prior over games expects of the rest.

    Good enough to fit to, not to report: with 2,048 evaluations phi of a ResNet-18 at 96 px is off by 1e-4 of its
    square, and 1 to 2% of the game's variance, interactions of high order, is smoothed away.
    """
    half = leverage_pairs(torch.tensor([_SAMPLED]), evaluations // 2 - 1, PLAYERS)[0]
    anchors = torch.tensor([False, True])[:, None].expand(2, PLAYERS)
    seen = torch.cat([anchors, half, ~half])
    values, keys = _kept(
        source,
        samples,
        size,
        lambda sample: work / f"{_identity(teacher, size, precision, sample)}-{evaluations}.npy",
        lambda image, sample: _values(teacher, image, sample.label, numbers(seen), precision),
    )
    return Games(_completed(seen, values.double()).float(), keys)


def _completed(seen: Tensor, values: Tensor) -> Tensor:
    """Expected values [N, 65536] given those of the coalitions seen, [N, K], the first the empty one."""
    prior = GamePrior(PLAYERS, (SIDE, SIDE))
    precision, _ = prior.given(seen)
    gain = precision @ (values[:, 1:] - values[:, :1]).mT
    first = prior.covariance(seen[:1], seen)
    parts = []
    for start in range(0, COALITIONS, 256):
        part = prior.covariance(all_coalitions(PLAYERS, start, start + 256), seen)
        parts.append((part - part[:, :1] - first + first[:, :1])[:, 1:] @ gain)
    completed = values[:, :1] + torch.cat(parts).mT
    completed[:, numbers(seen)] = values
    return completed


def _identity(teacher: Teacher, size: int, precision: str, sample: Sample) -> str:
    """Name of a game's file: a hash of all that decides its values."""
    identity = f"{teacher.sha256} {size} {precision} {sample.key} {sample.label}"
    return hashlib.sha256(identity.encode()).hexdigest()[:20]


def _table(teacher: Teacher, image: Tensor, label: int, precision: str) -> Tensor:
    """Values float32 [65536] of one image uint8 [3, S, S]."""
    everything = torch.arange(COALITIONS)
    needed, terms = _window_terms()
    some = torch.zeros(COALITIONS, dtype=torch.float64)
    some[needed] = _values(teacher, image, label, needed, precision).double()
    completed = sum(sign * some[everything & mask] for mask, sign in terms)
    assert isinstance(completed, Tensor)
    tried = torch.randperm(COALITIONS, generator=torch.Generator().manual_seed(0))[:_TRIED]
    found = _values(teacher, image, label, tried, precision).double()
    if float((completed[tried] - found).abs().max()) <= _COMPLETE * float(found.std()):
        return completed.float()
    return _values(teacher, image, label, everything, precision)


@torch.no_grad()
def _values(teacher: Teacher, image: Tensor, label: int, number: Tensor, precision: str) -> Tensor:
    mean, std = torch.tensor(teacher.mean), torch.tensor(teacher.std)
    values = []
    for part in number.split(_CHUNK):
        coalitions = (part[:, None] >> torch.arange(PLAYERS)) & 1 == 1
        masked = masked_batch(image[None], coalitions, grid=SIDE, mean=mean, std=std)
        with autocast(precision, masked.device):
            values.append(teacher.model(masked)[:, label].float())
    return torch.cat(values)


def _window_terms() -> tuple[Tensor, list[tuple[int, int]]]:
    """What a sum of games of the four 3 x 3 windows is made of.

    Returns:
        The coalitions that lie in one of the windows, and (mask, sign) such that v(s) is the sum of sign * v(s & mask):
        the windows, less where two neighbours meet, plus the middle, which has then been taken off once too often.
    """

    def cells(top: int, bottom: int, left: int, right: int) -> int:
        return sum(1 << (SIDE * r + c) for r in range(top, bottom) for c in range(left, right))

    windows = [(cells(r, r + 3, c, c + 3), 1) for r in (0, 1) for c in (0, 1)]
    meetings = [(cells(1, 3, c, c + 3), -1) for c in (0, 1)] + [(cells(r, r + 3, 1, 3), -1) for r in (0, 1)]
    terms = [*windows, *meetings, (cells(1, 3, 1, 3), 1)]
    everything = torch.arange(COALITIONS)
    return torch.unique(torch.cat([everything & mask for mask, _ in windows])), terms
