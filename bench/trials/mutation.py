"""Whole files of every kind that ddfast reads, and seeded damage to them."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.trials import made_files

FORMATS = {
    "jpeg": "jpg",
    "png": "png",
    "gif": "gif",
    "bmp": "bmp",
    "webp": "webp",
    "tiff": "tif",
    "ppm": "ppm",
}
FILES = (
    "zip",
    "tar",
    "shards",
    "manifest",
    "metadata",
    "soft labels",
    "scores",
    "listing",
    "labels",
    "teacher",
    "state dict",
    *made_files.KINDS,
)
"""Kinds that are no image; "shards" is a tar with .cls and .json labels, "labels" the metadata of a folder."""

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1)
_WORDS = (
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"[]",
    b"{}",
    b'""',
    b"true",
    b"9" * 400,
    b"[" * 3000,
    b'"\\u0000"',
    b'"\\ud800"',
)
_TEXT = ("manifest", "metadata", "labels", *made_files.TEXT)


# Whole files ------------------------------------------------------------------------------------------------


def _picture(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def _encoded(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


@cache
def whole_images(format: str) -> tuple[bytes, ...]:
    """Small images of one format in its usual and its odd variants."""
    rgb, gray = _picture(0), _picture(1, mode="L")
    deep = Image.fromarray((np.arange(40 * 30, dtype=np.uint16) * 53).reshape(30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [_picture(n, mode="P") for n in range(3)]
    if format == "jpeg":
        return (
            _encoded(rgb, "JPEG", quality=90),
            _encoded(rgb, "JPEG", quality=60, progressive=True),
            _encoded(rgb, "JPEG", restart_marker_blocks=1, subsampling=0),
            _encoded(gray, "JPEG"),
            _encoded(rgb.convert("CMYK"), "JPEG"),
            _encoded(rgb, "JPEG", exif=exif),
            _encoded(_picture(3, (200, 150)), "JPEG", quality=85),
        )
    if format == "png":
        return (
            _encoded(rgb, "PNG"),
            _encoded(gray, "PNG"),
            _encoded(deep, "PNG"),
            _encoded(rgb.convert("P"), "PNG"),
            _encoded(rgb.convert("RGBA"), "PNG"),
            _encoded(gray.convert("1"), "PNG"),
            _encoded(rgb, "PNG", exif=exif),
        )
    if format == "gif":
        animated = _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        return _encoded(frames[0], "GIF"), animated, _encoded(frames[1], "GIF", transparency=3)
    if format == "bmp":
        return tuple(_encoded(picture, "BMP") for picture in (rgb, gray, rgb.convert("P"), gray.convert("1")))
    if format == "webp":
        return (
            _encoded(rgb, "WEBP"),
            _encoded(rgb, "WEBP", lossless=True),
            _encoded(rgb.convert("RGBA"), "WEBP"),
            _encoded(rgb, "WEBP", save_all=True, append_images=[_picture(4)], exif=exif),
        )
    if format == "tiff":
        packed = [
            _encoded(rgb, "TIFF", compression=name) for name in ("raw", "tiff_lzw", "tiff_deflate", "jpeg")
        ]
        pages = _encoded(gray, "TIFF", save_all=True, append_images=[rgb])
        return (*packed, pages, _encoded(deep, "TIFF"), _encoded(gray.convert("F"), "TIFF"))
    return (
        _encoded(rgb, "PPM"),
        _encoded(gray, "PPM"),
        _encoded(gray.convert("1"), "PPM"),
        b"P3 2 1 255 1 2 3 4 5 6 ",
    )


def _class_files() -> dict[str, bytes]:
    images = [whole_images("jpeg")[0], whole_images("png")[0]]
    return {
        f"train/{name}/{n}.{'jp' if n == 0 else 'pn'}g": images[n] for name in ("a", "b") for n in range(2)
    }


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("train/a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.png"
        if any(name.startswith("train/") for name in files):
            archive.addfile(link)
    return buffer.getvalue()


def _zip(files: dict[str, bytes], method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def write_distilled(root: Path) -> Path:
    """A small distilled set: 2 classes, 4 images, 4 tiles each."""
    from ddfast.output.distilled import (
        Tile,
        image_path,
        metadata_row,
        write_image,
        write_metadata,
        write_soft_labels,
    )

    rows = []
    for label, name in enumerate(("a", "b")):
        for index in range(2):
            image = torch.full((3, 16, 16), 40 * label + index, dtype=torch.uint8)
            write_image(root / image_path(label, name, index), image)
            rows.append(
                metadata_row(label, name, index, [Tile(f"{name}/{n}.jpg", (0, 0, 8, 8)) for n in range(4)])
            )
    write_metadata(root, rows)
    write_soft_labels(root, torch.rand(4, 4, 2, generator=torch.Generator().manual_seed(0)).softmax(2), 20.0)
    manifest = {
        "format_version": 1,
        "complete": True,
        "method": "infoutil",
        "class_names": ["a", "b"],
        "tiles": 4,
        "image_size": 16,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "arithmetic": {
            "micro_batch": 16,
            "forward_batch": 16,
            "shard_sources": 256,
            "threads": 1,
            "max_pixels": 1 << 26,
            "max_file_bytes": 1 << 26,
            "precision": "float32",
            "device": "cpu",
            "loader": "pillow",
        },
        "counts": {"images": 4, "sources": 9, "quarantined": 0},
        "quarantined": {"count": 0, "files": []},
    }
    (root / "manifest.json").write_text(json.dumps(manifest, indent=2), "utf-8")
    return root


@cache
def whole_files(kind: str) -> tuple[bytes, ...]:
    """Whole files of one of `FILES`."""
    if kind in made_files.KINDS:
        return (made_files.whole_file(kind),)
    if kind == "zip":
        return _zip(_class_files(), zipfile.ZIP_DEFLATED), _zip(_class_files(), zipfile.ZIP_STORED)
    if kind == "tar":
        return (_tar(_class_files()),)
    if kind == "shards":
        image = whole_images("jpeg")[0]
        files = {f"{n}.{ending}": image for n in range(4) for ending in ("jpg",)}
        files |= {f"{n}.cls": str(n % 2).encode() for n in range(3)} | {"3.json": b'{"label": 1, "x": [1]}'}
        return (_tar(files),)
    if kind == "labels":
        rows = [
            {"file_name": f"{n}.jpg", "label": n % 2, "label_name": "ab"[n % 2], "x": None} for n in range(4)
        ]
        return (
            "".join(json.dumps(row) + "\n" for row in rows).encode(),
            b"file_name,label\n0.jpg,a\n1.jpg,b\n",
        )
    with tempfile.TemporaryDirectory() as folder:
        return _written(kind, Path(folder))


def _written(kind: str, folder: Path) -> tuple[bytes, ...]:
    from ddfast.models import create_model
    from ddfast.models.teacher import save_teacher
    from ddfast.output.table import make_table, write_table

    if kind in ("manifest", "metadata", "soft labels"):
        path = {
            "manifest": "manifest.json",
            "metadata": "train/metadata.jsonl",
            "soft labels": "soft_labels.safetensors",
        }
        return ((write_distilled(folder) / path[kind]).read_bytes(),)
    if kind == "scores":
        rows = {
            "sample_id": [1, 2],
            "key": ["a/1", "b/2"],
            "label": [0, 1],
            "crop": [0, 1],
            "box": np.zeros((2, 4)),
        }
        write_table(folder / "x.parquet", make_table(rows))
        write_table(folder / "y.parquet", make_table({**rows, "phi": np.ones((2, 16)), "score": [0.5, 1.5]}))
        return (folder / "x.parquet").read_bytes(), (folder / "y.parquet").read_bytes()
    model = create_model("convnet3", num_classes=2, image_size=16, width=8)
    if kind == "teacher":
        facts: dict[str, Any] = {
            "arch": "convnet3",
            "class_names": ["a", "b"],
            "image_size": 16,
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
        }
        save_teacher(folder / "t.safetensors", model, arch_options={"width": 8}, **facts)
        return ((folder / "t.safetensors").read_bytes(),)
    torch.save(create_model("convnet3", num_classes=2, image_size=16).state_dict(), folder / "t.pt")
    return ((folder / "t.pt").read_bytes(),)


def write_listing(folder: Path) -> Path:
    """A folder `set`, and what is remembered of it; returns the file that remembers."""
    from ddfast.data import folder_scan, open_source

    os.environ["DDFAST_CACHE"] = str(folder / "cache")
    for name, data in _class_files().items():
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "set" / name).write_bytes(data)
    held = folder_scan.CACHED_FROM, folder_scan._SETTLED_NS
    folder_scan.CACHED_FROM, folder_scan._SETTLED_NS = 1, 0
    try:
        open_source(folder / "set")
    finally:
        folder_scan.CACHED_FROM, folder_scan._SETTLED_NS = held
    path = folder_scan.cache_path(folder / "set" / "train")
    if path is None:
        raise RuntimeError("nothing is remembered")
    return path


def mutated_member(archive: bytes, draws: random.Random) -> bytes:
    """A zip with one member damaged and every checksum right."""
    with zipfile.ZipFile(io.BytesIO(archive)) as held:
        members = {name: held.read(name) for name in held.namelist()}
    name = draws.choice(sorted(members))
    members[name] = mutated(name, (members[name],), draws)
    return _zip(members, zipfile.ZIP_STORED)


# Damage -----------------------------------------------------------------------------------------------------


def mutated(kind: str, wholes: tuple[bytes, ...], draws: random.Random) -> bytes:
    """One of `wholes` with one to three damages, drawn by `draws`; some checksums made to fit again."""
    data = bytearray(draws.choice(wholes))
    for _ in range(draws.choice((1, 1, 1, 2, 3))):
        damages = [*_DAMAGES, *([_swap_word] * 6 if kind in _TEXT else [])]
        draws.choice(damages)(data, draws, wholes)
    if kind == "png" and draws.random() < 0.7:
        _mend_png(data)
    if kind in ("tar", "shards") and draws.random() < 0.7:
        _mend_tar(data)
    return bytes(data)


def _place(data: bytearray, draws: random.Random) -> int:
    """A place, half the time in the first 80 bytes, where headers are."""
    limit = min(len(data), 80) if draws.random() < 0.5 else len(data)
    return draws.randrange(limit) if limit else 0


def _flip_bits(data: bytearray, draws: random.Random, wholes: tuple[bytes, ...]) -> None:
    for _ in range(draws.choice((1, 2, 8, 32)) if data else 0):
        data[_place(data, draws)] ^= 1 << draws.randrange(8)


def _truncate(data: bytearray, draws: random.Random, wholes: tuple[bytes, ...]) -> None:
    del data[draws.randrange(len(data) + 1) :]


def _splice(data: bytearray, draws: random.Random, wholes: tuple[bytes, ...]) -> None:
    other = draws.choice(wholes)
    first = draws.randrange(len(other))
    data[_place(data, draws) :] = other[first:]


def _set_field(data: bytearray, draws: random.Random, wholes: tuple[bytes, ...]) -> None:
    width, order, place = draws.choice((1, 2, 4, 8)), draws.choice("<>"), _place(data, draws)
    number = draws.choice(_NUMBERS) & ((1 << 8 * width) - 1)
    data[place : place + width] = (
        struct.pack(f"{order}Q", number)[:width] if order == "<" else struct.pack(">Q", number)[-width:]
    )


def _overwrite(data: bytearray, draws: random.Random, wholes: tuple[bytes, ...]) -> None:
    place, length = _place(data, draws), draws.choice((4, 16, 64, 300))
    data[place : place + length] = draws.randbytes(length)


def _insert(data: bytearray, draws: random.Random, wholes: tuple[bytes, ...]) -> None:
    place = _place(data, draws)
    data[place:place] = draws.randbytes(draws.choice((1, 3, 40)))


def _delete(data: bytearray, draws: random.Random, wholes: tuple[bytes, ...]) -> None:
    place = _place(data, draws)
    del data[place : place + draws.choice((1, 2, 30))]


def _repeat(data: bytearray, draws: random.Random, wholes: tuple[bytes, ...]) -> None:
    place, length = _place(data, draws), draws.choice((4, 30, 500))
    data[place:place] = data[place : place + length] * draws.choice((1, 5))


def _swap_word(data: bytearray, draws: random.Random, wholes: tuple[bytes, ...]) -> None:
    """Replace what stands between two of JSON's separators."""
    ends = [place for place, byte in enumerate(data) if byte in b'{}[],:"\n']
    if len(ends) > 1:
        which = draws.randrange(len(ends) - 1)
        data[ends[which] + 1 : ends[which + 1]] = draws.choice(_WORDS)


_DAMAGES: tuple[Callable[[bytearray, random.Random, tuple[bytes, ...]], None], ...] = (
    *(_flip_bits, _flip_bits, _truncate, _splice, _set_field, _set_field),
    *(_overwrite, _insert, _delete, _repeat),
)


def _mend_png(data: bytearray) -> None:
    """Recompute the chunks' checksums, so that damage inside them is met and not only its checksum."""
    place = 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            return
        struct.pack_into(">I", data, end, zlib.crc32(data[place + 4 : end]))
        place = end + 4


def _mend_tar(data: bytearray) -> None:
    """Recompute the checksums of everything that looks like a header."""
    for place in range(0, len(data) - 511, 512):
        if data[place + 257 : place + 262] == b"ustar":
            data[place + 148 : place + 156] = b" " * 8
            data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
