"""Tiny images and image sets for the tests of ddfast.data."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

REAL_ZIP = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10-jpeg.zip"


def smooth(width: int = 24, height: int = 16, seed: int = 0) -> np.ndarray:
    """A smooth colour gradient, uint8 [height, width, 3], which JPEG keeps well and which has no symmetry."""
    down, across = np.mgrid[0:height, 0:width].astype(np.float64)
    shift = np.random.default_rng(seed).uniform(20, 60, 3)
    channels = [
        40 + 150 * down / height + shift[0],
        220 - 160 * across / width - shift[1] / 4,
        30 + 120 * (down / height) * (across / width) + shift[2],
    ]
    return np.clip(np.stack(channels, axis=2), 0, 255).astype(np.uint8)


def encoded(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def png(seed: int = 0, width: int = 6, height: int = 5) -> bytes:
    return encoded(Image.fromarray(smooth(width, height, seed)), "PNG")


def small_set(classes: int = 2, each: int = 2, split: str = "train") -> dict[str, bytes]:
    """Relative path -> bytes of a set with classes c0, c1, ..."""
    return {
        f"{split}/c{label}/{index}.png": png(seed=100 * label + index)
        for label in range(classes)
        for index in range(each)
    }


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


def write_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name.rstrip("/"))
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
