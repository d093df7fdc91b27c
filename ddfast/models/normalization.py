"""Per-channel mean and standard deviation by name. A teacher and the images it labels must share one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ddfast.wording import did_you_mean

Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]

NORMALIZATIONS: dict[str, Normalization] = {
    # RDED normalises every data set with the statistics of ImageNet, and so does ddfast by default.
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # DC, DSA, DM, MTT, IDM and IDC on CIFAR-10.
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    # SRe2L on Tiny-ImageNet.
    "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def three(values: Iterable[float]) -> tuple[float, float, float]:
    """One number a channel as plain floats.

    Raises:
        ValueError: another number of them.
    """
    red, green, blue = values
    return float(red), float(green), float(blue)


AUTO = "imagenet"
"""What `auto` is, and what teachers are trained with where nothing else is said."""


def normalization(choice: str | tuple[Sequence[float], Sequence[float]]) -> Normalization:
    """(mean, std) of pixels in [0, 1].

    Args:
        choice: a name of `NORMALIZATIONS`, "auto", "mean,mean,mean/std,std,std" in numbers, or a pair of three numbers
            each.

    Raises:
        ValueError: unknown name, other than three numbers, or a standard deviation that is not positive.

    """
    if isinstance(choice, str) and "/" not in choice:
        name = AUTO if choice == "auto" else choice
        if name not in NORMALIZATIONS:
            raise ValueError(
                f"unknown normalization {choice!r}; known: {', '.join(NORMALIZATIONS)}, or mean,mean,mean/std,std,std"
                f"{did_you_mean(choice, NORMALIZATIONS)}"
            )
        return NORMALIZATIONS[name]
    parts = [part.split(",") for part in choice.split("/")] if isinstance(choice, str) else choice
    if not isinstance(parts, Sequence) or len(parts) != 2:
        raise ValueError(
            f"normalization must be one of {', '.join(NORMALIZATIONS)} or (mean, std), got {choice!r}"
        )
    try:
        mean, std = (tuple(float(value) for value in part) for part in parts)
    except (TypeError, ValueError):
        mean, std = (), ()
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError(f"normalization must be three means and three positive deviations, got {choice!r}")
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
