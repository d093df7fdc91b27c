"""NumPy's `.npz`: images and labels of one split, or of several, as plain arrays."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ddfast.data.memory import HeldArrays, MemorySource, source_of
from ddfast.data.sources import SPLIT_FOLDERS
from ddfast.data.splits import split_word
from ddfast.errors import UsageError, one_line, shown

_IMAGES = frozenset(("x", "image", "images", "img", "imgs", "data"))
_LABELS = frozenset(("y", "label", "labels", "target", "targets"))
_NAMES = ("class_names", "classes", "label_names")
_WANTED = "x_train, y_train, x_test and y_test, or images and labels"


def open_npz(path: Path, split: str, name: str) -> MemorySource:
    """One split of an `.npz`, whose arrays are read whole; arrays of Python objects, which are pickles, are not.

    An array is of the split that its name speaks of, as `x_train`, `test_images` or `val_labels`, and of the train
    split where it speaks of none, as `images` and `labels`. `class_names` are the names of the class numbers.

    Raises:
        UsageError: it is damaged, holds objects or no such arrays, or as `open_source`.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = _arrays_of(arrays.files, name)
            wanted = next((kind for kind in SPLIT_FOLDERS[split] if kind in found), None)
            if wanted is None:
                raise UsageError(
                    f"{name} has no {split} split: wanted {_WANTED}, found {shown(arrays.files)}"
                )
            class_names = next((arrays[key].tolist() for key in _NAMES if key in arrays.files), None)
            images, labels = found[wanted]
            here = HeldArrays(arrays[images], arrays[labels], class_names, name)
            train = None
            if wanted != "train" and "train" in found:
                train = HeldArrays.of_labels(arrays[found["train"][1]], class_names, name)
    except UsageError:
        raise
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    ) as error:
        if "allow_pickle" in str(error):
            raise UsageError(
                f"cannot read {name}: it holds pickled objects, which may run programs; save plain arrays"
            ) from error
        raise UsageError(f"cannot read {name}: damaged .npz ({one_line(error)}); copy it again") from error
    return source_of(here, split, train, name=name)


def _arrays_of(keys: list[str], name: str) -> dict[str, tuple[str, str]]:
    """Split -> the names of its images and of its labels."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        words = set(re.split(r"[^a-z]+", key.casefold()))
        said = split_word(key)
        what: Any = "images" if words & _IMAGES else "labels" if words & _LABELS else None
        if what is None or (said is None and len(words) > 1):
            continue
        arrays = found.setdefault(said[0] if said else "train", {})
        if what in arrays:
            raise UsageError(
                f"{name} has {arrays[what]} and {key}, either of which may be the {what}: keep one"
            )
        arrays[what] = key
    whole = {kind: (a["images"], a["labels"]) for kind, a in found.items() if len(a) == 2}
    if not whole:
        raise UsageError(f"{name} has no images with labels: wanted {_WANTED}, found {shown(keys)}")
    return whole
