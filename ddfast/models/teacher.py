"""Teacher files: a model with everything that must match the data it labels.

A `.safetensors` file of ours holds the state dict and one metadata entry, `ddfast_teacher`: JSON with the
architecture and its options, class names in the order of the outputs, image size, mean, std, and facts such
as the test accuracy. The bytes depend on nothing but these. Weights-only state dicts load as well, and what
torchvision, timm and Hugging Face's Hub publish.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import math
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddfast.arguments import whole_number
from ddfast.errors import UsageError
from ddfast.files import atomic_write_bytes
from ddfast.models.checkpoint import find_weights
from ddfast.models.class_order import output_places, read_class_order
from ddfast.models.normalization import Normalization, three
from ddfast.models.normalization import normalization as resolve_normalization
from ddfast.models.published import NAMED, load_published, places_of, published
from ddfast.models.registry import create_model, described_input
from ddfast.ops.layouts import with_views_reshaped
from ddfast.state import _looks_pickled, read_tensors, serialize_tensors
from ddfast.wording import argument, on_command_line, plural

FORMAT = "ddfast-teacher-1"
_UNKNOWN = "?"  # the digest of a teacher that no file is of
METADATA_KEY = "ddfast_teacher"

STATE_DICT_ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".pt.tar", ".pth.tar")

NormalizationChoice = str | tuple[Sequence[float], Sequence[float]]


@dataclass
class Teacher:
    """A trained classifier and what its inputs and outputs mean.

    One of your own is `Teacher(model, class_names=[...], mean=[...], std=[...], image_size=32)`: a copy of the module,
    in eval mode and float32 on the CPU; the module that was given stays as it was.

    Attributes:
        model: eval mode, float32, on the CPU; normalised images [B, 3, S, S] -> logits [B, C].
        arch: name for `create_model`; of a module of your own that of its class.
        class_names: the C classes in the order of the outputs.
        image_size: side S in pixels.
        mean: per-channel mean of pixels in [0, 1].
        std: per-channel standard deviation of pixels in [0, 1].
        sha256: hex digest of the file (of the weights, for those that others have published, and your own).
        top1: test accuracy in percent, or None where it was not measured.
        epoch: epochs it was trained for, or None where unknown.
        arch_options: keyword arguments of `create_model`.
        facts: further metadata of the file, such as the training configuration.
        path: what it was loaded from, a file, or a name such as `timm:NAME`; None where it was made in memory.
        class_order: the order of the outputs in the file where `class_order=` said it; None where the file does.

    Raises:
        UsageError: of a module of your own: a setting is missing or makes no sense.

    """

    model: nn.Module
    arch: str = ""
    class_names: list[str] = field(default_factory=list)
    image_size: int = 0
    mean: tuple[float, float, float] = (math.nan,) * 3
    std: tuple[float, float, float] = (math.nan,) * 3
    sha256: str = _UNKNOWN
    top1: float | None = None
    epoch: int | None = None
    arch_options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    class_order: list[str] | None = None

    def __post_init__(self) -> None:
        """Settle what a caller gave of a module of their own, which no file says."""
        if self.sha256 != _UNKNOWN:
            return
        if not isinstance(self.model, nn.Module):
            raise UsageError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        self.class_names = [str(name) for name in self.class_names]
        if len(self.class_names) < 2 or len(set(self.class_names)) < len(self.class_names):
            raise UsageError(
                "class_names must hold the names of at least 2 classes in the order of the outputs, each once"
            )
        self.image_size = whole_number(self.image_size or None, "image_size", least=1)
        for name in ("mean", "std"):
            try:
                values = three(getattr(self, name))
            except (TypeError, ValueError):
                values = (math.nan,) * 3
            if not all(math.isfinite(value) for value in values) or (name == "std" and min(values) <= 0):
                positive = ", each above 0" if name == "std" else ""
                raise UsageError(
                    f"{name} must be three numbers, one a channel{positive}, got {getattr(self, name)!r}"
                )
            setattr(self, name, values)
        self.arch = self.arch or type(self.model).__name__
        self.model = with_views_reshaped(copy.deepcopy(self.model).cpu().float().eval(), self.image_size)
        self.sha256 = _weights_digest(self.model, self.arch)


def _weights_digest(model: nn.Module, arch: str) -> str:
    """Hex SHA-256 of what a module holds: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(arch.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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

    A file that an earlier `save_teacher` wrote is replaced; one that took training, or is no teacher file, stays.

    Raises:
        UsageError: `path` holds a teacher that `train_teacher` made, or something else, or cannot be written.
    """
    path = Path(path)
    if path.exists():
        held = read_header(path)
        if held is None:
            raise UsageError(f"{path} exists already and is no teacher file: give another path or delete it")
        if "training" in held:
            raise UsageError(
                f"{path} holds a teacher made by train-teacher ({held.get('arch')}, "
                f"{plural(held.get('epoch', 0), 'epoch')}): give another path or delete it"
            )
    data = teacher_bytes(
        model,
        arch=arch,
        class_names=class_names,
        image_size=image_size,
        mean=mean,
        std=std,
        arch_options=arch_options,
        **facts,
    )
    atomic_write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def teacher_bytes(
    model: nn.Module,
    *,
    arch: str,
    class_names: Sequence[str],
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    arch_options: Mapping[str, Any] | None = None,
    **facts: Any,
) -> bytes:
    """The bytes of a teacher file. Arguments as `save_teacher`."""
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
    return serialize_tensors(model.state_dict(), {METADATA_KEY: header})


def read_header(path: Path) -> dict[str, Any] | None:
    """The metadata of a teacher file of ours; None where there is none, or it is another file or damaged."""
    try:
        header = read_tensors(path, path.read_bytes(), what="teacher file")[1].get(METADATA_KEY)
    except (UsageError, OSError):
        return None
    return header if isinstance(header, dict) and header.get("format") == FORMAT else None


def load_teacher(
    spec: str | Path,
    arch: str | None = None,
    normalization: NormalizationChoice | None = None,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
    class_order: str | Path | Sequence[str] | Mapping[Any, Any] | None = None,
) -> Teacher:
    """Load a teacher in eval mode, float32, on the CPU.

    Args:
        spec: a `.safetensors` file of ours; a state dict or checkpoint of PyTorch (`.pt`, `.pth`, `.ckpt`, `.bin`;
            tensors and plain values only), whose wrappers (`module.`, `_orig_mod.`, ...) and containers
            (`state_dict`, `model`, ...) are looked through; or published weights, `torchvision:NAME`, `timm:NAME`,
            or `hf:NAME` of an image classifier on Hugging Face's Hub or of a folder in its layout.
        arch: architecture of a state dict. For a file of ours it may only repeat what the file says.
        normalization: name or (mean, std) for a state dict, and for a published model that does not say it; None: what
            timm or torchvision say of weights of `timm:NAME` or `torchvision:NAME`, ImageNet's for any other file.
        class_names: classes in the order of the outputs, needed by a state dict. Published weights bring their own:
            where they are known by these names, the outputs of `class_names` are taken in this order; as many other
            names replace them.
        image_size: side in pixels, needed by a state dict of any architecture but timm's and torchvision's.
        class_order: the classes in the order of the file's outputs, or a file of them (see `read_class_order`).
            The outputs of the model are then put into the order of `class_names`; without `class_names` they stay
            as they are and get these names.

    Raises:
        UsageError: one line: no such file, truncated, a pickle, no metadata, weights that do not fit the
            architecture or are NaN, an argument that contradicts the file, or a class order that does not fit.

    """
    order = None if class_order is None else read_class_order(class_order, class_names)
    if order is not None and class_names is not None:
        output_places(order, class_names)
    names = class_names if order is None else order
    if published(spec) is not None:
        teacher = _of_others(spec, names, image_size, normalization, in_order=order is not None)
    else:
        path = Path(spec)
        if not path.is_file():
            raise UsageError(
                f"no teacher file {path}: give a .safetensors file of train-teacher, a .pt state dict, {NAMED}"
            )
        data = path.read_bytes()
        if is_state_dict(path):
            teacher = _load_state_dict(path, data, arch, normalization, names, image_size)
        else:
            teacher = _load_safetensors(
                path, data, arch, normalization, names, image_size, renamed=order is not None
            )
    if order is None:
        return teacher
    teacher.class_order = order
    return teacher if class_names is None else with_outputs_in(teacher, class_names)


def is_state_dict(spec: str | Path) -> bool:
    """Whether a teacher is a state dict by the ending of its name, which needs its architecture and classes said."""
    return published(spec) is None and str(spec).lower().endswith(STATE_DICT_ENDINGS)


def is_named(given: str | Path | Teacher) -> bool:
    """Whether a teacher says itself which class each of its outputs is."""
    if isinstance(given, Teacher):
        return True
    if is_state_dict(given) or published(given) is not None:
        return False
    return read_header(Path(given)) is not None


def with_class_order(
    teacher: Teacher,
    class_order: str | Path | Sequence[str] | Mapping[Any, Any],
    class_names: Sequence[str],
) -> Teacher:
    """A copy of a teacher whose outputs stand in the order of `class_names`, where `class_order` says how they stood.

    The given one stays as it is; one that was loaded with this class order already is returned.

    Raises:
        UsageError: the class order does not fit the teacher or `class_names`.
    """
    order = read_class_order(class_order, class_names)
    if teacher.class_order == order and list(teacher.class_names) == list(class_names):
        return teacher
    if teacher.class_order not in (None, order):
        raise UsageError("the teacher was loaded with another class order: give it once")
    if len(order) != len(teacher.class_names):
        raise UsageError(
            f"the class order names {plural(len(order), 'class')}, the teacher has "
            f"{plural(len(teacher.class_names), 'output')}"
        )
    renamed = dataclasses.replace(teacher, class_names=order, class_order=order)
    return with_outputs_in(renamed, class_names)


def with_outputs_in(teacher: Teacher, class_names: Sequence[str]) -> Teacher:
    """A copy of a teacher whose outputs are put from the order of its `class_names` into that of the given ones.

    Raises:
        UsageError: these are other classes.
    """
    places = output_places(teacher.class_names, class_names)
    model = _with_permuted_outputs(teacher.model, torch.tensor(places), teacher.image_size)
    return dataclasses.replace(teacher, model=model, class_names=list(class_names))


def _with_permuted_outputs(model: nn.Module, places: Tensor, image_size: int) -> nn.Module:
    """A copy whose output i is output `places[i]`: by the rows of its last layer, or else by a step behind it."""
    if bool((places == torch.arange(len(places))).all()):
        return model
    permuted = copy.deepcopy(model)
    linears = [module for module in permuted.modules() if isinstance(module, nn.Linear)]
    if linears and linears[-1].out_features == len(places):
        with torch.no_grad():
            for parameter in (linears[-1].weight, linears[-1].bias):
                if parameter is not None:
                    parameter.copy_(parameter[places.to(parameter.device)])
            draws = torch.Generator().manual_seed(0)
            like = next(model.parameters())
            images = torch.randn(2, 3, image_size, image_size, generator=draws).to(like.device, like.dtype)
            try:
                before, after = model(images), permuted(images)
            except (RuntimeError, ValueError, TypeError):
                before, after = None, None
        if isinstance(before, Tensor) and isinstance(after, Tensor) and before.ndim == 2:
            wanted = before[:, places.to(before.device)]
            if torch.allclose(after, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())):
                return permuted
    return PermutedOutputs(copy.deepcopy(model), places).train(model.training)


class PermutedOutputs(nn.Module):
    """A model whose output i is output `places[i]` of `model`, for all of its outputs or some."""

    places: Tensor

    def __init__(self, model: nn.Module, places: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("places", places)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> logits [B, C]."""
        return self.model(images).index_select(1, self.places)


def checked_logits(output: Any, classes: int, role: str = "teacher") -> Tensor:
    """What a teacher's model returned, where it is logits of its classes.

    Args:
        output: of the model.
        classes: C.
        role: of the teacher, for the message.

    Returns:
        The logits, [B, C].

    Raises:
        UsageError: another type than a tensor, or another shape.
    """
    if not isinstance(output, Tensor):
        raise UsageError(
            f"the {role}'s model returns a {type(output).__name__}, wanted logits, a tensor [B, {classes}]: wrap it "
            "in a module whose forward returns them (output.logits, or output[0])"
        )
    if output.ndim != 2 or output.shape[1] != classes or not output.is_floating_point():
        raise UsageError(
            f"the {role}'s model returns {str(output.dtype).removeprefix('torch.')} {list(output.shape)}, wanted "
            f"logits of its {plural(classes, 'class')}, floating [B, {classes}]"
        )
    return output


def _load_safetensors(
    path: Path,
    data: bytes,
    arch: str | None,
    normalization: NormalizationChoice | None,
    class_names: Sequence[str] | None,
    image_size: int | None,
    *,
    renamed: bool,
) -> Teacher:
    tensors, metadata = read_tensors(path, data, what="teacher file")
    header = metadata.get(METADATA_KEY)
    if METADATA_KEY not in metadata and arch is not None:
        return _from_weights(path, data, tensors, arch, normalization, class_names, image_size)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UsageError(
            f"{path} has no {FORMAT} metadata, so its architecture and classes are unknown: "
            f"make it with train-teacher or save_teacher, or give its architecture ({_arch_argument()}) as well"
        )
    facts = dict(header)
    facts.pop("format")
    try:
        teacher = Teacher(
            model=nn.Identity(),
            arch=facts.pop("arch"),
            class_names=list(facts.pop("class_names")),
            image_size=int(facts.pop("image_size")),
            mean=three(facts.pop("mean")),
            std=three(facts.pop("std")),
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
    if renamed and class_names is not None:
        if len(class_names) != len(teacher.class_names):
            raise UsageError(
                f"the class order names {plural(len(class_names), 'class')}, {path} has {len(teacher.class_names)}"
            )
        teacher.class_names = list(class_names)
    wanted = _normalization(normalization) if normalization is not None else (teacher.mean, teacher.std)
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
    size = image_size if image_size is not None or arch is None else described_input(arch)
    if arch is None or class_names is None or size is None:
        given = {
            f"the architecture ({_arch_argument()})": arch,
            "class_names": class_names,
            argument("image_size"): size,
        }
        missing = " and ".join(name for name, value in given.items() if value is None)
        raise UsageError(f"{path} is a bare state dict: it needs {missing} as well")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols, ahead of the refusal below
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (  # torch.load takes the bytes of a damaged file as they come
        *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError),
        *(TypeError, OSError, ArithmeticError, AssertionError, MemoryError),
    ) as error:
        found = re.search(r"GLOBAL (\S+) was not", str(error))
        if found:
            reason = f"holds Python objects ({found[1]}); only tensors are read from such a file"
        elif _looks_pickled(data):
            reason = "holds Python objects, or is truncated; only tensors are read from such a file"
        else:
            reason = "is not a PyTorch file"
        raise UsageError(
            f"{path} {reason}: convert it with torch.save(model.state_dict(), ...) where it came from"
        ) from error
    return _from_weights(path, data, state, arch, normalization, class_names, image_size)


def _from_weights(
    path: Path,
    data: bytes,
    state: Any,
    arch: str,
    normalization: NormalizationChoice | None,
    class_names: Sequence[str] | None,
    image_size: int | None,
) -> Teacher:
    """A teacher from a file that holds weights and nothing about them; what a library says of its own serves."""
    said = described_input(arch)
    if said is not None:
        image_size = said[0] if image_size is None else image_size
        normalization = said[1:] if normalization is None else normalization
    if class_names is None or image_size is None:
        missing = "class_names" if class_names is None else argument("image_size")
        raise UsageError(f"{path} holds weights alone: it needs {missing} as well")
    mean, std = _normalization(normalization if normalization is not None else "imagenet")
    return Teacher(
        model=_fit(path, state, arch, len(class_names), image_size, {}),
        arch=arch,
        class_names=list(class_names),
        image_size=image_size,
        mean=mean,
        std=std,
        sha256=hashlib.sha256(data).hexdigest(),
        path=str(path),
    )


def _arch_argument() -> str:
    """How the caller says a teacher's architecture: `--arch` of a command is another network's."""
    return argument("teacher_arch") if on_command_line() else "arch"


def _normalization(given: NormalizationChoice) -> Normalization:
    try:
        return resolve_normalization(given)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _of_others(
    spec: str | Path,
    class_names: Sequence[str] | None,
    image_size: int | None,
    normalization: NormalizationChoice | None,
    *,
    in_order: bool,
) -> Teacher:
    """A teacher that others have published; `in_order`: the names are said to be those of its outputs, one by one."""
    said = None if normalization is None else _normalization(normalization)
    found = load_published(spec, image_size, said)
    model, theirs = _ready(found.model), found.class_names
    names = theirs if class_names is None else list(class_names)
    if in_order and len(names) != len(theirs):
        raise UsageError(f"the class order names {plural(len(names), 'class')}, {spec} has {len(theirs)}")
    places = torch.tensor(range(len(theirs)) if in_order else places_of(theirs, names, spec))
    if len(places) < len(theirs):
        model = PermutedOutputs(model, places).eval()
    else:
        model = _with_permuted_outputs(model, places, found.image_size)
    return Teacher(
        model=model,
        arch=found.arch,
        class_names=names,
        image_size=found.image_size,
        mean=found.mean,
        std=found.std,
        sha256=hashlib.sha256(serialize_tensors(found.model.state_dict(), {})).hexdigest(),
        top1=found.top1,
        path=str(spec),
    )


def _fit(
    path: Path,
    state: Any,
    arch: str,
    num_classes: int,
    image_size: int,
    options: Mapping[str, Any],
) -> nn.Module:
    """A model of `arch` holding the weights in `state`, or a UsageError that names what does not fit."""
    try:
        with torch.random.fork_rng(
            devices=[]
        ):  # initial weights are overwritten; keep the caller's generator
            model = create_model(arch, num_classes, image_size, **options)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    try:
        weights = find_weights(state, model.state_dict(), arch, num_classes)
    except ValueError as error:
        raise UsageError(
            f"{path} does not fit {arch} with {plural(num_classes, 'class')} at {image_size} px: {error}"
        ) from error
    model.load_state_dict(weights)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            raise UsageError(f"{path} holds NaN in {name}: its weights are damaged, train it again")
    return _ready(model)


def _ready(model: nn.Module) -> nn.Module:
    return model.float().eval()
