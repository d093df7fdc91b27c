"""Teacher files: a model with everything that must match the data it labels.

A `.safetensors` file of ours holds the state dict and one metadata entry, `ddfast_teacher`: JSON with the
architecture and its options, class names in the order of the outputs, image size, mean, std, and facts such
as the test accuracy. The bytes depend on nothing but these. Weights-only `.pt` state dicts and torchvision's
published weights load as well.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddfast.data.files import atomic_write_bytes
from ddfast.errors import UsageError
from ddfast.models.normalization import normalization as resolve_normalization
from ddfast.models.registry import create_model
from ddfast.wording import plural

FORMAT = "ddfast-teacher-1"
METADATA_KEY = "ddfast_teacher"

NormalizationChoice = str | tuple[Sequence[float], Sequence[float]]


@dataclass
class Teacher:
    """A trained classifier and what its inputs and outputs mean.

    Attributes:
        model: eval mode, float32, on the CPU; normalised images [B, 3, S, S] -> logits [B, C].
        arch: name for `create_model`.
        class_names: the C classes in the order of the outputs.
        image_size: side S in pixels.
        mean: per-channel mean of pixels in [0, 1].
        std: per-channel standard deviation of pixels in [0, 1].
        sha256: hex digest of the file (of the weights, for torchvision's).
        top1: test accuracy in percent, or None where it was not measured.
        epoch: epochs it was trained for, or None where unknown.
        arch_options: keyword arguments of `create_model`.
        facts: further metadata of the file, such as the training configuration.
        path: what it was loaded from, a file or `torchvision:NAME`; None where it was made in memory.

    """

    model: nn.Module
    arch: str
    class_names: list[str]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sha256: str
    top1: float | None = None
    epoch: int | None = None
    arch_options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    path: str | None = None


def save_teacher(
    path: str | Path,
    model: nn.Module,
    *,
    arch: str,
    class_names: Sequence[str],
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    arch_options: Mapping[str, Any] | None = None,
    **facts: Any,
) -> str:
    """Write a teacher file by atomic rename and return its SHA-256 (hex).

    Equal arguments give equal bytes. `facts` are JSON values; `top1` (percent) and `epoch` have a place of
    their own in `Teacher`, the rest arrives in `Teacher.facts`.
    """
    header = {
        "format": FORMAT,
        "arch": arch,
        "arch_options": dict(arch_options or {}),
        "class_names": list(class_names),
        "image_size": image_size,
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        **facts,
    }
    data = serialize_tensors(model.state_dict(), {METADATA_KEY: header})
    atomic_write_bytes(Path(path), data)
    return hashlib.sha256(data).hexdigest()


def serialize_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Safetensors bytes of `tensors` with `metadata` values as JSON.

    Deterministic for a single metadata entry (the format's writer does not order several of them).
    """
    from safetensors.torch import save

    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(flat, {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()})


def load_teacher(
    spec: str | Path,
    arch: str | None = None,
    normalization: NormalizationChoice | None = None,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
) -> Teacher:
    """Load a teacher in eval mode, float32, on the CPU.

    Args:
        spec: a `.safetensors` file of ours; a `.pt` or `.pth` state dict (weights only); or
            `torchvision:NAME`, whose published weights torchvision downloads.
        arch: architecture of a `.pt` state dict. For a file of ours it may only repeat what the file says.
        normalization: name or (mean, std) for a `.pt` state dict; ImageNet's where None.
        class_names: classes in the order of the outputs, needed by a `.pt` state dict. `torchvision:NAME`
            brings its own, which `class_names` replaces.
        image_size: side in pixels, needed by a `.pt` state dict.

    Raises:
        UsageError: one line: no such file, truncated, a pickle, no metadata, weights that do not fit the
            architecture, or an argument that contradicts the file.

    """
    text = str(spec)
    if text.startswith("torchvision:"):
        return _load_torchvision(text.removeprefix("torchvision:"), class_names, image_size)
    path = Path(spec)
    if not path.is_file():
        raise UsageError(
            f"no teacher file {path}: give a .safetensors file of train-teacher, a .pt state dict "
            "or torchvision:NAME"
        )
    data = path.read_bytes()
    if path.suffix in (".pt", ".pth"):
        return _load_state_dict(path, data, arch, normalization, class_names, image_size)
    return _load_safetensors(path, data, arch, normalization, class_names, image_size)


def _load_safetensors(
    path: Path,
    data: bytes,
    arch: str | None,
    normalization: NormalizationChoice | None,
    class_names: Sequence[str] | None,
    image_size: int | None,
) -> Teacher:
    tensors, metadata = read_tensors(path, data, what="teacher file")
    header = metadata.get(METADATA_KEY)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UsageError(
            f"{path} has no {FORMAT} metadata, so its architecture and classes are unknown: "
            "make it with train-teacher or save_teacher, or give a .pt state dict with its architecture"
        )
    facts = dict(header)
    facts.pop("format")
    try:
        teacher = Teacher(
            model=nn.Identity(),
            arch=facts.pop("arch"),
            class_names=list(facts.pop("class_names")),
            image_size=int(facts.pop("image_size")),
            mean=_three(facts.pop("mean")),
            std=_three(facts.pop("std")),
            sha256=hashlib.sha256(data).hexdigest(),
            top1=facts.pop("top1", None),
            epoch=facts.pop("epoch", None),
            arch_options=dict(facts.pop("arch_options", {})),
            facts=facts,
            path=str(path),
        )
    except KeyError as error:
        raise UsageError(
            f"{path}: its metadata lacks {error.args[0]}; make the file again with save_teacher"
        ) from error
    wanted = (
        resolve_normalization(normalization) if normalization is not None else (teacher.mean, teacher.std)
    )
    for name, given, held in (
        ("arch", arch, teacher.arch),
        ("image_size", image_size, teacher.image_size),
        ("class_names", list(class_names) if class_names is not None else None, teacher.class_names),
        ("normalization", wanted, (teacher.mean, teacher.std)),
    ):
        if given is not None and given != held:
            raise UsageError(
                f"{path} was made with {name} {held}, got {given}: leave it out to use the file's own"
            )
    teacher.model = _fit(
        path, tensors, teacher.arch, len(teacher.class_names), teacher.image_size, teacher.arch_options
    )
    return teacher


def _load_state_dict(
    path: Path,
    data: bytes,
    arch: str | None,
    normalization: NormalizationChoice | None,
    class_names: Sequence[str] | None,
    image_size: int | None,
) -> Teacher:
    if arch is None or class_names is None or image_size is None:
        given = {"the architecture": arch, "class_names": class_names, "image_size": image_size}
        missing = ", ".join(name for name, value in given.items() if value is None)
        raise UsageError(f"{path} is a bare state dict: it needs {missing} as well")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols, ahead of the refusal below
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (  # torch.load takes the bytes of a damaged file as they come
        *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError),
        *(TypeError, OSError, ArithmeticError, AssertionError, MemoryError),
    ) as error:
        if _looks_pickled(data):
            reason = "holds Python objects, or is truncated; only tensors are read from such a file"
        else:
            reason = "is not a PyTorch file"
        raise UsageError(
            f"{path} {reason}: convert it with torch.save(model.state_dict(), ...) where it came from"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(
            f"{path} holds no state dict of tensors: convert it with torch.save(model.state_dict(), ...)"
        )
    tensors = {str(name).removeprefix("module."): value for name, value in state.items()}
    mean, std = resolve_normalization(normalization if normalization is not None else "imagenet")
    return Teacher(
        model=_fit(path, tensors, arch, len(class_names), image_size, {}),
        arch=arch,
        class_names=list(class_names),
        image_size=image_size,
        mean=mean,
        std=std,
        sha256=hashlib.sha256(data).hexdigest(),
        path=str(path),
    )


def _load_torchvision(name: str, class_names: Sequence[str] | None, image_size: int | None) -> Teacher:
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
    except ValueError as error:
        raise UsageError(f"torchvision has no model {name!r}; torchvision:resnet18 is one") from error
    transform = weights.transforms()
    if image_size is not None and image_size != transform.crop_size[0]:
        raise UsageError(f"torchvision:{name} reads {transform.crop_size[0]} px, got image_size {image_size}")
    categories = list(weights.meta["categories"])
    if class_names is not None and len(class_names) != len(categories):
        raise UsageError(
            f"torchvision:{name} has {plural(len(categories), 'class')}, the data has {len(class_names)}"
        )
    try:
        model = torchvision.models.get_model(name, weights=weights)
    except OSError as error:
        raise UsageError(f"the weights of torchvision:{name} could not be downloaded: {error}") from error
    metrics = weights.meta.get("_metrics", {}).get("ImageNet-1K", {})
    return Teacher(
        model=_ready(model),
        arch=name,
        class_names=list(class_names) if class_names is not None else categories,
        image_size=transform.crop_size[0],
        mean=_three(transform.mean),
        std=_three(transform.std),
        sha256=hashlib.sha256(serialize_tensors(model.state_dict(), {})).hexdigest(),
        top1=metrics.get("acc@1"),
        path=f"torchvision:{name}",
    )


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


def _fit(
    path: Path,
    tensors: Mapping[str, Tensor],
    arch: str,
    num_classes: int,
    image_size: int,
    options: Mapping[str, Any],
) -> nn.Module:
    """A model of `arch` holding `tensors`, or a UsageError that names the first weight that does not fit."""
    try:
        with torch.random.fork_rng(
            devices=[]
        ):  # initial weights are overwritten; keep the caller's generator
            model = create_model(arch, num_classes, image_size, **options)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    wanted = model.state_dict()
    for name in [*wanted, *tensors]:
        if name not in tensors:
            problem = f"it lacks {name}"
        elif name not in wanted:
            problem = f"it has {name}, which {arch} has not"
        elif tensors[name].shape != wanted[name].shape:
            problem = f"{name} is {list(tensors[name].shape)}, {arch} has {list(wanted[name].shape)}"
        else:
            continue
        raise UsageError(
            f"{path} does not fit {arch} with {plural(num_classes, 'class')} at {image_size} px: {problem}"
        )
    model.load_state_dict(dict(tensors))
    return _ready(model)


def _ready(model: nn.Module) -> nn.Module:
    return model.float().eval()


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = values
    return float(first), float(second), float(third)
