"""Named tensors that survive a kill: whole files, written by rename."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ddfast.errors import UsageError
from ddfast.files import atomic_write_bytes


def serialize_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Safetensors bytes of `tensors` with `metadata` values as JSON.

    Deterministic for a single metadata entry (the format's writer does not order several of them).
    """
    from safetensors.torch import save

    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(flat, {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()})


def read_tensors(path: Path, data: bytes, *, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON-decoded metadata of safetensors bytes; `path` and `what` only name them in errors.

    Raises:
        UsageError: truncated, a pickle, or not safetensors at all.

    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if _looks_pickled(data):
        raise UsageError(
            f"{path} is a pickle, not a safetensors {what}: convert it with save_teacher, "
            "or name a weights-only state dict .pt and give its architecture"
        )
    try:
        tensors = load(data)
        length = struct.unpack("<Q", data[:8])[0]
        raw = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, struct.error, ValueError) as error:
        raise UsageError(
            f"{path} is no complete safetensors {what} ({len(data)} bytes): copy it again"
        ) from error
    metadata: dict[str, Any] = {}
    for key, value in raw.items():
        try:
            metadata[key] = json.loads(value)
        except ValueError:
            metadata[key] = value
    return tensors, metadata


def _looks_pickled(data: bytes) -> bool:
    """Whether the bytes start like a zip of torch.save or like a bare pickle of protocol 2 or later."""
    # The ninth byte of a safetensors file opens its JSON header; the eight before are a length, any number.
    return data[8:9] != b"{" and (data[:4] == b"PK\x03\x04" or data[:1] == b"\x80")


class Checkpoint(Protocol):
    """Where a preparation keeps its state, so that a killed run goes on from there."""

    def load(self) -> dict[str, Tensor]:
        """The tensors that were saved last; none at the start."""
        ...

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep these tensors in place of the last ones, whole or not at all."""
        ...


_STATE = ".preparation"


class FileCheckpoint:
    """A state in one safetensors file, which says by its digest whose it is; see `Checkpoint`."""

    def __init__(self, path: Path, digest: str) -> None:
        self._path, self._digest = path, digest

    def load(self) -> dict[str, Tensor]:
        """What was saved last by this run; nothing where there is no such file."""
        if not self._path.is_file():
            return {}
        tensors, facts = read_tensors(self._path, self._path.read_bytes(), what="saved state")
        return tensors if facts.get("scores") == self._digest else {}

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the file anew, atomically."""
        atomic_write_bytes(self._path, serialize_tensors(tensors, {"scores": self._digest}))
