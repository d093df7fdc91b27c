"""Named tensors that survive a kill: whole files, written by rename."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ddfast.errors import UsageError
from ddfast.files import atomic_write_bytes
from ddfast.progress import say

_CHECKSUM = "blake2b"


def serialize_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Safetensors bytes of `tensors` with `metadata` values as JSON.

    Deterministic for a single metadata entry (the format's writer does not order several of them).
    """
    from safetensors.torch import save

    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(flat, {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()})


def read_tensors(
    path: Path, data: bytes, *, what: str, advice: str = "copy it again"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON-decoded metadata of safetensors bytes; `path`, `what` and `advice` only stand in errors.

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
    except (SafetensorError, struct.error, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no complete safetensors {what} ({len(data)} bytes): {advice}") from error
    metadata: dict[str, Any] = {}
    for key, value in raw.items():
        try:
            metadata[key] = json.loads(value)
        except (ValueError, RecursionError):
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


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b-128 of names, dtypes, shapes and bytes, as hex digits."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class StateFile:
    """Tensors with what is said of them, in one file that is written whole or not at all.

    A checksum goes with it: such a file lies on a disk for as long as a run takes, and a bit that changes there would
    change the result. Files of versions that had none are read as they are.

    Args:
        path: of the file, safetensors.
        key: of its one metadata entry, a JSON value.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self._key = path, key

    def read(self, what: str = "saved state") -> tuple[dict[str, Tensor], Any]:
        """The tensors and what is said of them, None where nothing is; ({}, None) where there is no file.

        Raises:
            UsageError: damaged, or no such file at all; `what` names it.
        """
        if not self.path.is_file():
            return {}, None
        data, advice = self.path.read_bytes(), "delete it to begin anew"
        tensors, metadata = read_tensors(self.path, data, what=what, advice=advice)
        held = metadata.get(self._key)
        if not isinstance(held, dict) or held.keys() != {"said", _CHECKSUM}:
            return tensors, held
        if held[_CHECKSUM] != _checksum(tensors):
            raise UsageError(f"{self.path} is damaged, its bytes are not those that were written: {advice}")
        return tensors, held["said"]

    def write(self, tensors: Mapping[str, Tensor], said: Any) -> None:
        """Put these in place of what stands there."""
        held = {"said": said, _CHECKSUM: _checksum(tensors)}
        atomic_write_bytes(self.path, serialize_tensors(tensors, {self._key: held}))


class FileCheckpoint:
    """A state in one safetensors file, which says whose it is; see `Checkpoint`.

    Args:
        path: of the file, whose name says which state of the run it is.
        digest: of the run.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self._file, self._digest = StateFile(path, "scores"), digest
        self._own = {"run": digest, "file": path.name}

    def load(self) -> dict[str, Tensor]:
        """What was saved last by this run; nothing where there is no such file, or a damaged one, which is told."""
        try:
            tensors, whose = self._file.read()
        except UsageError as error:
            say(f"{str(error).rpartition(': ')[0]}: what it held is made anew")
            return {}
        # Versions without a checksum said of which run it was, and no more.
        return tensors if whose in (self._own, self._digest) else {}

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the file anew, atomically."""
        self._file.write(tensors, self._own)
