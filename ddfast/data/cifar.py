"""CIFAR's own Python files, `cifar-10-batches-py/` and `cifar-100-python/`: pickles, of which arrays alone are read."""

from __future__ import annotations

import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ddfast.data.memory import HeldArrays, MemorySource, source_of
from ddfast.errors import UsageError, one_line

_SIDE = 32
_FOLDERS = ("cifar-10-batches-py", "cifar-100-python")
# The globals by which NumPy's arrays are pickled, by its versions before and since 2.0; nothing else is looked up.
_CORES = ("numpy.core", "numpy._core")
_ALLOWED = frozenset(
    (
        *((f"{core}.multiarray", "_reconstruct") for core in _CORES),
        *((f"{core}.numeric", "_frombuffer") for core in _CORES),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),  # how protocol 2 writes bytes
    )
)


class _ArraysAlone(pickle.Unpickler):
    """Knows the globals of NumPy's arrays and no others, so that a file cannot run a program."""

    def find_class(self, module: str, name: str) -> Any:
        """A global of `_ALLOWED`. `UnpicklingError` for any other."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return super().find_class(module.replace("numpy._core", _installed_core()), name)


def _installed_core() -> str:
    return "numpy._core" if hasattr(np, "_core") else "numpy.core"


def cifar_folder(folder: Path) -> Path | None:
    """The folder of CIFAR's files: this one or one below it; None where there are none."""
    for place in (folder, *(folder / name for name in _FOLDERS)):
        if os.path.isfile(place / "data_batch_1") or (
            os.path.isfile(place / "meta") and os.path.isfile(place / "train")
        ):
            return place
    return None


def open_cifar(folder: Path, split: str, name: str) -> MemorySource:
    """One split of the folder that `cifar_folder` found, its classes in CIFAR's order.

    The keys are those of torchvision's `cifar10` and `cifar100`: images are numbered from the first batch on.

    Raises:
        UsageError: a file is missing, damaged, or holds something else than arrays, or as `open_source`.
    """
    ten = os.path.isfile(folder / "data_batch_1")
    names = _loaded(folder / ("batches.meta" if ten else "meta"))
    class_names = names.get("label_names" if ten else "fine_label_names")
    if not isinstance(class_names, list):
        raise UsageError(f"{folder} has no class names in its meta file; copy it again")
    if ten:
        batches = [f"data_batch_{n}" for n in range(1, 6)] if split == "train" else ["test_batch"]
    else:
        batches = [split]
    parts = [_batch(folder / batch, "labels" if ten else "fine_labels") for batch in batches]
    images = np.concatenate([images for images, _ in parts]) if len(parts) > 1 else parts[0][0]
    labels = [label for _, labels in parts for label in labels]
    return source_of(HeldArrays(images, labels, class_names, name), split, name=name)


def _batch(path: Path, field: str) -> tuple[np.ndarray, list[Any]]:
    """Images uint8 [N, 3, 32, 32] and labels of one file."""
    batch = _loaded(path)
    images, labels = batch.get("data"), batch.get(field)
    size = 3 * _SIDE * _SIDE
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.ndim != 2
        or images.shape[1] != size
    ):
        raise UsageError(f"cannot read {path}: wanted data as uint8 [N, {size}]; copy it again")
    if not isinstance(labels, list) or len(labels) != len(images):
        raise UsageError(
            f"cannot read {path}: wanted {field}, one for each of {len(images)} images; copy it again"
        )
    return images.reshape(-1, 3, _SIDE, _SIDE), labels


def _loaded(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        found = _ArraysAlone(io.BytesIO(data), encoding="latin1").load()
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing; copy all files of the set there") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {one_line(error)}") from error
    except (
        *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, ImportError, LookupError),
        *(ArithmeticError, MemoryError, RecursionError, struct.error, UnicodeError),
    ) as error:
        raise UsageError(
            f"cannot read {path}: not one of CIFAR's own files, or damaged ({one_line(error)}); copy it again"
        ) from error
    if not isinstance(found, dict):
        raise UsageError(f"cannot read {path}: not one of CIFAR's own files; copy it again")
    return found
