"""Options that matching methods share.

They stand in pieces, because a method takes the pieces that mean something to it. The fields of a dataclass come from
its last base to its first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ddfast.arguments import number_below_one, one_of, path_of, positive_number, whole_number, whole_number_or
from ddfast.errors import UsageError
from ddfast.methods.matching.initial import INITIAL
from ddfast.settings import option
from ddfast.wording import argument


def begins_with(default: str, *, help: str = "", choices: tuple[str, ...] = INITIAL) -> Any:
    """The option `init` with this default."""
    usual = "images to begin with: real ones, normal noise, or each a mix of 2 x 2 real ones at half size"
    return option(default, usual + help, stage="synthesize", choices=choices)


def weighs_contrast(default: float) -> Any:
    """The option `cfc` with this default."""
    return option(
        default,
        "weight of the category-wise feature contrastive loss (CFC), 0 for none; it takes all classes in one group",
        stage="synthesize",
    )


def number_or_auto(value: Any, keyword: str) -> int | str:
    """A whole number of at least 1, or auto."""
    return whole_number_or(value, keyword, ("auto",))


@dataclass(frozen=True)
class _Compared:
    arch: str = option(
        "convnet3_in",
        "architecture of the networks that images are compared on, one that ddfast train-teacher --help lists",
        stage="synthesize",
    )
    iterations: int = option(20000, "steps of the pixels", stage="synthesize")


@dataclass(frozen=True)
class _OfReal:
    real_batch: int = option(256, "real images of a class in a step", stage="synthesize")


@dataclass(frozen=True)
class _OfPixels:
    init: str = begins_with("real")
    lr_img: float = option(1.0, "learning rate of the pixels", stage="synthesize")
    momentum: float = option(0.5, "momentum of the pixels", stage="synthesize")
    flip: bool = option(
        True, "mirror images among the augmentations, which digits do not bear", stage="synthesize"
    )
    cmi: float = option(
        0.0,
        "weight of the regulariser by conditional mutual information (CMI), 0 for none; it needs --proxies",
        stage="synthesize",
    )
    proxies: str | None = option(
        None,
        "folder of networks trained on the real images (ddfast train-proxies), for --cmi; without that weight CMI is "
        "measured and does not act",
        stage="synthesize",
        type=str,
        metavar="FOLDER",
        is_place=True,
    )
    cmi_every: int = option(
        1, "steps from one in which CMI acts to the next, with the same weight", stage="synthesize"
    )
    proxy_arch: str | None = option(
        None, "take only the proxies of this architecture; default all", stage="synthesize", type=str
    )

    def __post_init__(self) -> None:
        for name in ("iterations", "real_batch", "cmi_every", "class_batch"):
            if hasattr(self, name):
                self._set(name, whole_number(getattr(self, name), name, least=1))
        self._set("lr_img", positive_number(self.lr_img, "lr_img"))
        self._set("momentum", number_below_one(self.momentum, "momentum"))
        for name in ("cmi", "cfc"):
            if hasattr(self, name):
                self._set(name, positive_number(getattr(self, name), name, zero=True))
        one_of(self.init, "init", self.__dataclass_fields__["init"].metadata["choices"])
        if self.proxies is not None:
            self._set("proxies", str(path_of(self.proxies, "proxies")))
        self._check_cmi()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # a frozen dataclass: numbers as the plain types that are meant

    def _check_cmi(self) -> None:
        if self.cmi and self.proxies is None:
            raise UsageError(
                f"{argument('cmi')} {self.cmi:g} needs {argument('proxies')}, a folder of networks trained on the "
                "real images: make it with ddfast train-proxies"
            )
        self._check_use("proxy_arch", None, "proxies")
        self._check_use("cmi_every", 1, "cmi")

    def _check_use(self, name: str, default: Any, needed: str) -> None:
        """Refuse an option that does nothing without another one."""
        if getattr(self, name) != default and not getattr(self, needed):
            raise UsageError(
                f"{argument(name)} is of no use without {argument(needed)}: give that as well, or leave it out"
            )


@dataclass(frozen=True)
class _OfClasses:
    cfc: float = weighs_contrast(0.0)
    class_batch: int = option(10, "classes that are matched together, by one process", stage="synthesize")


@dataclass(frozen=True)
class PixelOptions(_OfPixels, _Compared):
    """Options of every method that optimises pixels on networks."""


@dataclass(frozen=True)
class MatchingOptions(_OfClasses, _OfPixels, _OfReal, _Compared):
    """Options of every method that matches real images and synthetic ones, class by class."""
