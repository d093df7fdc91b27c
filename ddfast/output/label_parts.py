"""Soft labels written part by part: a run of 21,000 classes has more of them than memory.

A part holds the labels of consecutive images: fp16 values, then int32 class numbers where only the largest are
stored, then a checksum, for a part outlives a killed run. `join_label_parts` streams the parts into one
`soft_labels.safetensors`, with the bytes that `write_soft_labels` would give.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ddfast.errors import UsageError
from ddfast.files import atomic_path, atomic_write_bytes, explained
from ddfast.output.distilled import SOFT_LABELS

_CHECKSUM_BYTES = 16
_BLOCK = 1 << 20


def largest_probabilities(probabilities: Tensor, top_k: int | None) -> tuple[Tensor, Tensor | None]:
    """What is stored of float [n, tiles, C]: all as fp16, or the `top_k` largest and their classes, int32.

    In descending order, of equal ones the lower class first.

    Raises:
        ValueError: a value is not finite.
    """
    if not bool(torch.isfinite(probabilities).all()):
        raise ValueError("probabilities must be finite, got NaN or infinity")
    if top_k is None or top_k >= probabilities.shape[2]:
        return probabilities.to(torch.float16), None
    order = torch.argsort(probabilities, dim=2, descending=True, stable=True)[..., :top_k]
    return probabilities.gather(2, order).to(torch.float16), order.to(torch.int32)


def write_label_part(path: str | Path, values: Tensor, indices: Tensor | None) -> None:
    """Write the labels fp16 [n, tiles, k] of some images, and their classes int32 [n, tiles, k], atomically.

    Raises `UsageError` where the disk is full or the folder cannot be written.
    """
    data = b"".join(t.contiguous().numpy().tobytes() for t in (values, indices) if t is not None)
    atomic_write_bytes(path, data + _checksum(data))


def is_whole_part(path: str | Path) -> bool:
    """Whether a part is there and every byte of it what was written."""
    try:
        data = Path(path).read_bytes()
    except OSError:
        return False
    return len(data) >= _CHECKSUM_BYTES and _checksum(data[:-_CHECKSUM_BYTES]) == data[-_CHECKSUM_BYTES:]


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).digest()


def join_label_parts(
    root: str | Path,
    parts: Sequence[Path],
    shape: tuple[int, int, int],
    temperature: float,
    *,
    indexed: bool,
) -> None:
    """Write `soft_labels.safetensors` of an output folder from its parts, which may then be removed.

    Args:
        root: the output folder.
        parts: in the order of the images.
        shape: [N, tiles, k] of all labels together.
        temperature: what the logits were divided by; kept in the file's metadata.
        indexed: whether the parts hold class numbers.

    Raises:
        UsageError: no space, or the parts do not hold that many labels.
    """
    count = shape[0] * shape[1] * shape[2]
    tensors = [("indices", "I32", 4), ("soft_labels", "F16", 2)] if indexed else [("soft_labels", "F16", 2)]
    header: dict[str, Any] = {"__metadata__": {"temperature": repr(float(temperature))}}
    offset = 0
    for name, kind, size in tensors:
        header[name] = {
            "dtype": kind,
            "shape": list(shape),
            "data_offsets": [offset, offset + count * size],
        }
        offset += count * size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target = Path(root) / SOFT_LABELS
    with atomic_path(target, 8 + len(text) + offset) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, _, size in tensors:
            before = file.tell()
            for part in parts:
                _append(file, part, name == "indices", indexed)
            if file.tell() - before != count * size:
                raise UsageError(
                    f"the parts of {target} do not hold {shape[0]} images: delete them and resume"
                )


def _append(file: BinaryIO, part: Path, wants_indices: bool, indexed: bool) -> None:
    """Copy a part's values, or its class numbers, which take twice the bytes."""
    with explained(part), open(part, "rb") as stored:
        size = stored.seek(0, 2) - _CHECKSUM_BYTES
        values = size // 3 if indexed else size
        stored.seek(values if wants_indices else 0)
        left = size - values if wants_indices else values
        while left:
            block = stored.read(min(left, _BLOCK))
            if not block:
                raise UsageError(f"{part} is truncated: delete it and resume")
            file.write(block)
            left -= len(block)
