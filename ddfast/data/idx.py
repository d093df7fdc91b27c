"""IDX files, the format of MNIST and its family: `train-images-idx3-ubyte` and the like, packed with gzip or not."""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddfast.data.memory import HeldArrays, MemorySource, source_of
from ddfast.errors import UsageError, one_line, shown

_FILE = re.compile(r"(?:.*[-_.])?(train|t10k|test)-(images|labels)[-.]idx([134])-ubyte(\.gz)?", re.IGNORECASE)
_PLACES = ("", "raw")
_UNSIGNED_BYTES = 8


def idx_files(folder: Path) -> dict[tuple[str, str], Path]:
    """("train" or "test", "images" or "labels") -> file, in the folder or in `raw/`; empty where there are none.

    Raises:
        UsageError: two files may be the same thing.
    """
    for place in _PLACES:
        found: dict[tuple[str, str], Path] = {}
        try:
            names = sorted(os.listdir(folder / place)) if (folder / place).is_dir() else []
        except OSError:
            names = []
        for file in names:
            if match := _FILE.fullmatch(file):
                split = "train" if match[1].lower() == "train" else "test"
                before = found.setdefault((split, match[2].lower()), folder / place / file)
                if file not in (before.name, before.name + ".gz"):  # sorted: the unpacked one comes first
                    raise UsageError(
                        f"{folder / place} has {before.name} and {file}, which may both be the {split} "
                        f"{match[2].lower()}: keep one set in a folder"
                    )
        if found:
            return found
    return {}


def open_idx(
    files: dict[tuple[str, str], Path], split: str, name: str, class_names: Sequence[str] | None = None
) -> MemorySource:
    """One split of what `idx_files` found; `class_names` of the class numbers where they are known.

    Raises:
        UsageError: a file is missing or damaged, or as `open_source`.
    """
    missing = [what for what in ("images", "labels") if (split, what) not in files]
    if missing:
        stem = "train" if split == "train" else "t10k"
        raise UsageError(
            f"{name} has no {split} split: {stem}-{missing[0]}-idx{3 if missing[0] == 'images' else 1}-ubyte is "
            f"missing beside {shown(sorted(path.name for path in files.values()))}"
        )
    here = HeldArrays(read_idx(files[split, "images"]), read_idx(files[split, "labels"]), class_names, name)
    train = None
    if split == "test" and ("train", "labels") in files:
        train = HeldArrays.of_labels(read_idx(files["train", "labels"]), class_names, name)
    return source_of(here, split, train, name=name)


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file of unsigned bytes (the only kind that the family has), uint8.

    Raises:
        UsageError: it is damaged, or holds something else.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"cannot read {path}: {one_line(error)}; copy it again") from error
    if len(data) < 4 or data[:2] != b"\0\0":
        raise UsageError(f"cannot read {path}: not an IDX file, which begins with two zeros; copy it again")
    if data[2] != _UNSIGNED_BYTES:
        raise UsageError(f"cannot read {path}: IDX values of type {data[2]}, wanted {_UNSIGNED_BYTES}, bytes")
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start]) if len(data) >= start else ()
    if not shape or math.prod(shape) != len(data) - start:
        raise UsageError(
            f"cannot read {path}: damaged, {len(data)} bytes do not hold what its header says, {list(shape)}; "
            "copy it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
