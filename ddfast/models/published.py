"""Classifiers that others have published: torchvision's, timm's, and image classifiers of Hugging Face's Hub.

`torchvision:NAME`, `timm:NAME` and `hf:NAME` bring their weights, the normalisation and size of their images and the
names of their classes; a folder in the Hub's layout (`config.json` and weights) stands for `hf:FOLDER`. Weights come
through each library's own loader and cache, and nothing that is stored in them is run.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ddfast.errors import UsageError, one_line
from ddfast.fetching import in_silence
from ddfast.models.normalization import Normalization, three
from ddfast.models.registry import described_input
from ddfast.wording import argument, plural

KINDS = ("torchvision", "timm", "hf")
"""What a name may begin with, before a colon."""

NAMED = "torchvision:NAME, timm:NAME or hf:NAME"
"""The same in words, for a message that says what a teacher may be."""

_PROBE = 512  # side in pixels of the plain images that are shown to a processor
_COLOUR = (51, 102, 204)  # three levels that tell the channels apart

T = TypeVar("T")


@dataclass(frozen=True)
class Published:
    """A classifier and what its inputs and outputs mean.

    Attributes:
        model: normalised images [B, 3, S, S] -> logits [B, C].
        arch: name for `create_model` where it is known there.
        class_names: the C classes in the order of the outputs, as its publisher calls them.
        image_size: side S in pixels.
        mean: of each channel of pixels in [0, 1].
        std: deviation of each.
        top1: accuracy in percent that its publisher measured; None where it is not said.
    """

    model: nn.Module
    arch: str
    class_names: list[str]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    top1: float | None = None


def published(spec: object) -> tuple[str, str] | None:
    """(kind, name) of a teacher that others have published; None of any other.

    A folder with a `config.json` is one of the Hub's layout.
    """
    text = str(spec)
    kind, colon, name = text.partition(":")
    if colon and kind in KINDS:
        return kind, name
    if isinstance(spec, (str, Path)) and (Path(os.path.expanduser(spec)) / "config.json").is_file():
        return "hf", text
    return None


def load_published(
    spec: object, image_size: int | None = None, normalization: Normalization | None = None
) -> Published:
    """A published classifier in its own order of classes.

    Args:
        spec: of which `published` knows the kind.
        image_size: the side in pixels that is expected of it; None: its own.
        normalization: (mean, deviation) of its images where its publisher does not say them; None: they must be said.

    Raises:
        UsageError: in one line: no such model, weights that cannot be fetched, a library that is not installed, a model
            that is no classifier of square RGB images, or another image size.
    """
    kind, name = published(spec) or ("", str(spec))
    if not name:
        raise UsageError(f"{kind}: wants a name behind the colon, as {kind}:{_EXAMPLES[kind]}")
    with torch.random.fork_rng(devices=[]):  # initial weights are overwritten; keep the caller's generator
        found = _huggingface(name, normalization) if kind == "hf" else _LOADERS[kind](name)
    if image_size is not None and image_size != found.image_size:
        raise UsageError(f"{spec} reads {found.image_size} px, got image_size {image_size}")
    return found


_EXAMPLES = {"torchvision": "resnet18", "timm": "resnet18.a1_in1k", "hf": "microsoft/resnet-18"}


def _torchvision(name: str) -> Published:
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
    except ValueError as error:
        raise UsageError(f"torchvision has no model {name!r}; torchvision:resnet18 is one") from error
    said = described_input(f"torchvision:{name}")
    if said is None or "categories" not in weights.meta:
        raise UsageError(f"torchvision:{name} is no classifier of images; torchvision:resnet18 is one")
    model = _fetched(
        f"torchvision:{name}",
        lambda: torchvision.models.get_model(name, weights=weights),
        f"a file of them, with the architecture torchvision:{name}",
    )
    size, mean, std = said
    metrics = weights.meta.get("_metrics", {}).get("ImageNet-1K", {})
    return Published(model, name, list(weights.meta["categories"]), size, mean, std, metrics.get("acc@1"))


def _timm(name: str, source: str = "") -> Published:
    """timm's own, by its name; of a folder or repository in timm's layout by `source`, as timm's names begin."""
    shown = f"timm:{name}" if not source else f"hf:{name}"
    timm = _needed("timm", shown)
    if not source and not timm.is_model(name):
        near = difflib.get_close_matches(
            name, timm.list_pretrained() if "." in name else timm.list_models(), n=3
        )
        raise UsageError(
            f"timm has no model {name!r}{'; did you mean ' + ', '.join(near) + '?' if near else ''}"
        )
    if not source:
        try:
            there = timm.get_pretrained_cfg(name) if hasattr(timm, "get_pretrained_cfg") else None
        except RuntimeError as error:
            tags = [known for known in timm.list_pretrained() if known.split(".")[0] == name.split(".")[0]]
            raise UsageError(f"timm has no weights {name!r}; it has {', '.join(tags) or 'none'}") from error
        if there is None or not there.has_weights:
            raise UsageError(
                f"timm has no weights of {name!r}: give a file of them, with the architecture timm:{name}"
            )
    model = _fetched(
        shown,
        lambda: timm.create_model(source + name, pretrained=True),
        f"a file of them, with the architecture timm:{name}" if not source else "its folder as hf:FOLDER",
        expected=() if not source else (FileNotFoundError, KeyError, ValueError),
    )
    config: dict[str, Any] = dict(model.pretrained_cfg)
    classes = int(getattr(model, "num_classes", 0) or 0)
    if not classes:
        raise UsageError(f"{shown} has no classifier, only features: train one with ddfast train-teacher")
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise UsageError(
            f"{shown} reads {height} x {width} px in {plural(channels, 'channel')}, wanted square RGB"
        )
    arch = name if not source else str(config.get("architecture", name))
    return Published(
        model,
        f"timm:{arch}",
        _timm_classes(config, classes),
        int(height),
        three(config["mean"]),
        three(config["std"]),
    )


def _timm_classes(config: dict[str, Any], classes: int) -> list[str]:
    """Names that the configuration says, else the WordNet ids of an ImageNet of so many classes, else numbers."""
    said = config.get("label_names")
    if said and len(said) == classes:
        return [str(label) for label in said]
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is not None:
        ids = [str(label) for label in ImageNetInfo(subset).label_names()]
        if len(ids) == classes:
            return ids
    return [str(label) for label in range(classes)]


def _huggingface(name: str, normalization: Normalization | None = None) -> Published:
    """An image classifier by its name on the Hub, or by its folder."""
    folder = Path(os.path.expanduser(name))
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise UsageError(
            f"no folder {name}: give the folder of a config.json, or a name of the Hub as hf:OWNER/NAME"
        )
    if folder.is_dir():
        name = str(folder)
        config = folder / "config.json"
        if not config.is_file():
            raise UsageError(f"{name} has no config.json: give a folder that save_pretrained made")
        try:
            held = json.loads(config.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{config} cannot be read ({one_line(error)})") from error
        if isinstance(held, dict) and "architecture" in held and "model_type" not in held:
            return _timm(name, "local-dir:")
    elif name.startswith("timm/"):
        return _timm(name, "hf-hub:")
    transformers = _transformers(f"hf:{name}")
    refused = (ValueError, KeyError, TypeError, ImportError, OSError)

    def load() -> tuple[Any, Any]:
        with _quiet(transformers):
            # Said, as transformers would else ask at the terminal whether to run the code that a repository brings.
            model, told = transformers.AutoModelForImageClassification.from_pretrained(
                name, output_loading_info=True, trust_remote_code=False
            )
        lacking = sorted(told.get("missing_keys", ())) + [str(key) for key in told.get("mismatched_keys", ())]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise _Unfit(f"its weights lack {lacking[0]}{more}, so it is no trained classifier")
        if folder.is_dir() and not (folder / "preprocessor_config.json").is_file():
            return model, None
        return model, transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)

    model, processor = _fetched(f"hf:{name}", load, "its folder as hf:FOLDER", expected=refused)
    size, mean, std, turned = (
        _said(model.config, normalization, name) if processor is None else _reading(processor, name)
    )
    labels = {int(place): str(label) for place, label in (model.config.id2label or {}).items()}
    classes = int(model.config.num_labels)
    names = [labels.get(place, str(place)) for place in range(classes)]
    return Published(
        HuggingFaceLogits(model, turned), f"hf:{model.config.model_type}", names, size, mean, std
    )


class HuggingFaceLogits(nn.Module):
    """An image classifier of `transformers` as a plain module.

    Args:
        model: its `forward` takes `pixel_values` and returns an object with `logits`.
        turned: whether it reads blue, green, red.
    """

    def __init__(self, model: nn.Module, turned: bool = False) -> None:
        super().__init__()
        self.model = model
        self.turned = turned

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] in red, green, blue -> logits [B, C]."""
        found: Tensor = self.model(pixel_values=images.flip(1) if self.turned else images).logits
        return found


def _said(
    config: Any, normalization: Normalization | None, name: str
) -> tuple[int, tuple[float, float, float], tuple[float, float, float], bool]:
    """The same as `_reading` of a model without a processor, by what the caller says and its configuration."""
    size = getattr(config, "image_size", None)
    if normalization is None or not isinstance(size, int):
        lacking = argument("normalization") if normalization is None else "an image_size in its config.json"
        raise UsageError(
            f"hf:{name} has no preprocessor_config.json, which says how it reads pixels: give {lacking} as well"
        )
    return size, *normalization, False


def _reading(
    processor: Any, name: str
) -> tuple[int, tuple[float, float, float], tuple[float, float, float], bool]:
    """What a processor makes of an image: side in pixels, mean, deviation, and whether red and blue change places.

    Processors name these in many ways, so they are measured: of a plain image only its three levels change, each by a
    straight line. Black and white give the lines, a third colour tells the order of the channels.
    """

    def levels(*colour: int) -> tuple[np.ndarray, tuple[int, int]]:
        image = np.broadcast_to(np.array(colour, np.uint8), (_PROBE, _PROBE, 3))
        found = processor(images=np.ascontiguousarray(image), return_tensors="np")["pixel_values"]
        values = np.asarray(found, np.float64)
        if values.ndim != 4 or values.shape[:2] != (1, 3):
            raise UsageError(f"hf:{name} reads {list(values.shape)} of an image, wanted [1, 3, S, S]")
        middle = values[0][:, values.shape[2] // 2, values.shape[3] // 2]
        return middle, (values.shape[2], values.shape[3])

    black, (height, width) = levels(0, 0, 0)
    white, _ = levels(255, 255, 255)
    if height != width:
        raise UsageError(f"hf:{name} reads {height} x {width} px, wanted square images")
    slope = white - black
    if not (np.isfinite(slope).all() and (slope > 0).all()):
        raise UsageError(f"hf:{name} does not read pixels by a mean and a deviation of each channel")
    level, _ = levels(*_COLOUR)
    straight = black + slope * np.array(_COLOUR) / 255
    other_way = black + slope * np.array(_COLOUR[::-1]) / 255
    turned = not np.allclose(level, straight, atol=1e-3) and np.allclose(level, other_way, atol=1e-3)
    if not turned and not np.allclose(level, straight, atol=1e-3):
        raise UsageError(f"hf:{name} does not read pixels by a mean and a deviation of each channel")
    deviation = 1 / slope
    mean = -black * deviation
    if turned:
        mean, deviation = mean[::-1], deviation[::-1]
    return height, three(np.round(mean, 6) + 0.0), three(np.round(deviation, 6)), turned


def _transformers(shown: str) -> Any:
    """The package. It looks once for one named `kernels`, which from a checkout's root would be our folder."""
    ours, found = (find_spec(name) for name in ("ddfast.kernels", "kernels"))
    places = [Path(str(spec.origin)).resolve() for spec in (ours, found) if spec is not None]
    if len(places) < 2 or places[0] != places[1]:
        return _needed("transformers", shown)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        package = _needed("transformers", shown)
        getattr(package.utils, "is_kernels_available", bool)()  # it keeps the answer
    finally:
        del sys.modules["kernels"]
    return package


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's own warnings: what is wrong is said in one line."""
    logging = getattr(getattr(transformers, "utils", None), "logging", None)
    if logging is None:
        yield
        return
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


class _Unfit(Exception):
    """What was fetched is not what was wanted."""


def _needed(package: str, shown: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f"{shown} needs the package {package}: pip install {package}") from error


def _fetched(
    shown: str, fetch: Callable[[], T], otherwise: str, expected: tuple[type[Exception], ...] = ()
) -> T:
    """What a library fetches or finds in its cache.

    Args:
        shown: the model as the caller named it.
        fetch: gets it.
        otherwise: what may be given where there is no network.
        expected: errors of a model that is there and does not fit.
    """
    try:
        with in_silence():
            return fetch()
    except _Unfit as error:
        raise UsageError(f"{shown}: {error}") from error
    except Exception as error:  # each library, and each transport below it, has errors of its own
        said = one_line(error) or type(error).__name__
        if isinstance(error, expected) and not isinstance(error, OSError):
            raise UsageError(f"{shown} is no image classifier that can be read here: {said}") from error
        raise UsageError(
            f"the weights of {shown} could not be downloaded: {said}; where there is no network give {otherwise}"
        ) from error


_LOADERS: dict[str, Callable[[str], Published]] = {"torchvision": _torchvision, "timm": _timm}


def places_of(theirs: Sequence[str], ours: Sequence[str], spec: object) -> list[int]:
    """Which output of a published model is each of our classes.

    Names that the publisher knows, all or some of them, are looked up. Where they are of another language (words
    beside WordNet ids), as many classes are taken to stand in the same order, which the try of a teacher judges.

    Raises:
        UsageError: another number of classes, and names that its publisher does not know.
    """
    if len(set(theirs)) == len(theirs) and set(ours) <= set(theirs):
        place = {name: index for index, name in enumerate(theirs)}
        return [place[name] for name in ours]
    if len(theirs) == len(ours):
        return list(range(len(theirs)))
    unknown = next((name for name in ours if name not in set(theirs)), None)
    told = "" if unknown is None else f", of which it does not know {unknown!r} by this name"
    raise UsageError(f"{spec} has {plural(len(theirs), 'class')}, the data has {len(ours)}{told}")
