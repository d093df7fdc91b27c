"""NumPy's `.npz`: images and labels of one split, or of several, as plain arrays."""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ddfast.data.memory import (
    ARRAYS_WANTED,
    NAMES_OF_ARRAYS,
    HeldArrays,
    MemorySource,
    arrays_by_split,
    source_of,
)
from ddfast.data.sources import SPLIT_FOLDERS
from ddfast.errors import UsageError, one_line, shown


def open_npz(path: Path, split: str, name: str) -> MemorySource:
    """One split of an `.npz`, whose arrays are read whole; arrays of Python objects, which are pickles, are not.

    An array is of the split that its name speaks of, as `x_train`, `test_images` or `val_labels`, and of the train
    split where it speaks of none, as `images` and `labels`. `class_names` are the names of the class numbers.

    Raises:
        UsageError: it is damaged, holds objects or no such arrays, or as `open_source`.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = arrays_by_split(arrays.files, name)
            if not found:
                raise UsageError(
                    f"{name} has no images with labels: wanted {ARRAYS_WANTED}, found {shown(arrays.files)}"
                )
            wanted = next((kind for kind in SPLIT_FOLDERS[split] if kind in found), None)
            if wanted is None:
                raise UsageError(
                    f"{name} has no {split} split: wanted {ARRAYS_WANTED}, found {shown(arrays.files)}"
                )
            class_names = next((arrays[key].tolist() for key in NAMES_OF_ARRAYS if key in arrays.files), None)
            images, labels = found[wanted]
            here = HeldArrays(arrays[images], arrays[labels], class_names, name)
            train = None
            if wanted != "train" and "train" in found:
                train = HeldArrays.of_labels(arrays[found["train"][1]], class_names, name)
    except UsageError:
        raise
    except (
        *(
            OSError,
            ValueError,
            EOFError,
            LookupError,
            zipfile.BadZipFile,
            zlib.error,
            RuntimeError,
            TypeError,
        ),
        *(SyntaxError, tokenize.TokenError, ArithmeticError, MemoryError, struct.error, lzma.LZMAError),
    ) as error:
        if "allow_pickle" in str(error):
            raise UsageError(
                f"cannot read {name}: it holds pickled objects, which may run programs; save plain arrays"
            ) from error
        raise UsageError(f"cannot read {name}: damaged .npz ({one_line(error)}); copy it again") from error
    return source_of(here, split, train, name=name)
