"""torchvision's sets by name: `cifar10` and the like, downloaded once."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from ddfast.data.sources import Sample, Source
from ddfast.errors import BadImage, UsageError, one_line

# name -> (class in torchvision.datasets, its arguments for train, its arguments for test)
NAMED_SETS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashionmnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "kmnist": ("KMNIST", {"train": True}, {"train": False}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "oxfordiiitpet": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "fgvcaircraft": ("FGVCAircraft", {"split": "trainval"}, {"split": "test"}),
    "dtd": ("DTD", {"split": "train"}, {"split": "test"}),
}

_IDX = ("mnist", "fashionmnist", "kmnist")  # sets whose files are IDX


class NamedSource(Source):
    """A set of `torchvision.datasets`. Keys are "class/index.png"; `read` gives a lossless PNG.

    The classes keep torchvision's order, which published teachers were trained in. Labels come from the set's
    own table, so opening it decodes nothing.
    """

    def __init__(
        self, name: str, split: str, root: str | os.PathLike[str] | None = None, *, download: bool = True
    ) -> None:
        """Load the set, downloading it where it is missing.

        Args:
            name: a key of `NAMED_SETS`.
            split: "train" or "test".
            root: where the files are; `$DDFAST_DATA`, or `~/.cache/ddfast`, by default.
            download: fetch what is missing there.

        Raises:
            UsageError: the set is neither there nor to be downloaded, or is damaged.
        """
        import torchvision.datasets

        kind, train_options, test_options = NAMED_SETS[name]
        root = os.fspath(root or os.environ.get("DDFAST_DATA") or Path.home() / ".cache" / "ddfast")
        try:
            os.makedirs(root, exist_ok=True)
            options = train_options if split == "train" else test_options
            self._set = getattr(torchvision.datasets, kind)(root, download=download, **options)
        except (
            OSError,
            RuntimeError,
            EOFError,
            ValueError,
            LookupError,
            ImportError,
            UnpicklingError,
        ) as error:
            raise UsageError(
                f"cannot load {name} from {root}: {one_line(error)}; connect to the network once, or put "
                f"torchvision's files there (DDFAST_DATA names another folder)"
            ) from error
        labels = [int(label) for label in _labels(self._set)]
        class_names = [str(class_name) for class_name in getattr(self._set, "classes", None) or ()]
        if not class_names:
            width = len(str(max(labels)))
            class_names = [f"{label:0{width}d}" for label in range(max(labels) + 1)]
        keys = [
            (f"{class_names[label].replace('/', '-')}/{index:07d}.png", label)
            for index, label in enumerate(labels)
        ]
        super().__init__(name, split, class_names, keys)

    def read(self, sample: Sample) -> bytes:
        """The image as PNG. Raises `BadImage` if torchvision cannot open it."""
        try:
            image = self._set[int(sample.key.rpartition("/")[2].removesuffix(".png"))][0]
        except (OSError, SyntaxError, ValueError) as error:
            raise BadImage(f"cannot be read: {one_line(error)}") from error
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            image = image.convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "png", compress_level=1)
        return buffer.getvalue()

    def size_of(self, sample: Sample) -> int:
        """Always -1: torchvision checks its own files, and the index stands in the key."""
        return -1

    def close(self) -> None:
        """Nothing stays open between reads."""


def idx_classes(name: str) -> list[str] | None:
    """The class names of a set of MNIST's family, in torchvision's order; None for any other."""
    import torchvision.datasets

    return list(getattr(torchvision.datasets, NAMED_SETS[name][0]).classes) if name in _IDX else None


def _labels(dataset: Any) -> Sequence[int]:
    """The labels in torchvision's attribute of many names; decoding every image is the last resort."""
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None:
            return labels
    return [label for _, label in dataset]
