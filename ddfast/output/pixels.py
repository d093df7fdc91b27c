"""What a method that makes pixels leaves beside the PNGs: what students train on, how it went, how it began.

pixels.safetensors    images float32 [N, 3, H, W] and labels int64 [N], before any rounding to 8 bits; where students
                      see regions of the images as well, windows int64 [K, 4] and regions int64 [N, P]
curve.parquet         a row for every step that was noted, by group and step
before.png            the images of the start, laid out as mosaic.png
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddfast.errors import UsageError, one_line
from ddfast.files import arrow_file, atomic_write_bytes

if TYPE_CHECKING:
    import pyarrow as pa

PIXELS = "pixels.safetensors"
CURVE_TABLE = "curve.parquet"
BEFORE = "before.png"

SPACES = ("normalized", "unit")
"""Of stored pixels: (x - mean) / std, or x itself, where a picture's x lies in [0, 1]."""

CURVE = {
    "loss": "the method's own loss",
    "cmi": "conditional mutual information of the proxy's features, in nats",
    "gradient_norm": "norm of the loss's gradient in the pixels",
    "cmi_gradient_norm": "norm of the gradient of lambda times CMI in the pixels",
    "cfc": "category-wise feature contrastive loss, summed over classes",
    "cfc_gradient_norm": "norm of the gradient of its weight times CFC in the pixels",
    "pixel_variance": "variance over the images of a class, mean over pixels and classes",
    "accuracy": "test accuracy of students trained on the images of this step, in percent",
}
"""Columns of curve.parquet behind `group` and `step`, of methods that optimise pixels: what each one is."""

GUIDED = {
    "loss": "less the information that is maximised, I(X; Y) + beta H(X | Y), in nats",
    "information": "I(X; Y), its lower bound by the estimator's classifier, in nats",
    "context": "H(X | Y), its lower bound by the estimator's projection, in nats",
    "gradient_norm": "norm of the information's gradient in the samples",
    "moved": "norm of what guidance adds over the norm of the whole step",
    "unguided_information": "I(X; Y) of the same noise sampled without guidance",
    "unguided_context": "H(X | Y) of the same noise sampled without guidance",
}
"""The same of methods that sample from a diffusion prior."""

WITH_RATE = {**CURVE, "learned_rate": "learning rate of students that is optimised with the images"}
"""The same of methods that optimise a learning rate with the pixels."""

_AGAIN = "finish it with the same distill command and --resume"
_KEYS = ("group", "step")


# Pixels ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regions:
    """The regions of each image that students see beside it, enlarged to its size.

    Attributes:
        windows: int64 [K, 4], all candidates: x0, y0, x1, y1 in pixels, x1 and y1 exclusive.
        chosen: int64 [N, P], the places of each image's regions in `windows`, ascending.
    """

    windows: Tensor
    chosen: Tensor

    def boxes(self, which: str = "chosen") -> Tensor:
        """int64 [N, P, 4]: the chosen ones, or "all" K windows of every image."""
        if which == "all":
            return self.windows.expand(len(self.chosen), -1, -1)
        return self.windows[self.chosen]


@dataclass(frozen=True)
class Pixels:
    """The images that students train on, as they were optimised.

    Attributes:
        images: float32 [N, 3, H, W].
        labels: int64 [N].
        space: of `images`, one of `SPACES`.
        factor: tiles per side that an image decodes to.
        learned_rate: learning rate that was optimised with the images, None where none was.
        regions: of the images that students see beside them, None where they see the images alone.
    """

    images: Tensor
    labels: Tensor
    space: str
    factor: int = 1
    learned_rate: float | None = None
    regions: Regions | None = None


def write_pixels(
    root: str | Path,
    images: Tensor,
    labels: Tensor,
    *,
    space: str,
    factor: int = 1,
    learned_rate: float | None = None,
    regions: Regions | None = None,
) -> None:
    """Write `pixels.safetensors` atomically; equal arguments give equal bytes. They are left as they are.

    Args:
        root: the output folder.
        images: float32 [N, 3, H, W], in the order of `train/metadata.jsonl`.
        labels: int64 [N].
        space: one of `SPACES`.
        factor: tiles per side that an image decodes to.
        learned_rate: learning rate that was optimised with the images.
        regions: of the images that students see beside them; only whole images, of factor 1, have some.

    Raises:
        UsageError: a shape, dtype or value that does not fit, NaN or infinity, no space, no permission.
    """
    if regions is not None:
        regions = Regions(*(each.detach().cpu().contiguous() for each in (regions.windows, regions.chosen)))
    pixels = Pixels(
        images.detach().cpu().contiguous(),
        labels.detach().cpu().contiguous(),
        space,
        factor,
        learned_rate,
        regions,
    )
    path = Path(root) / PIXELS
    wrong = _fault(pixels)
    if wrong:
        raise UsageError(f"cannot write {path}: {wrong}")
    atomic_write_bytes(path, _serialized(pixels))


def read_pixels(root: str | Path) -> Pixels:
    """Read `pixels.safetensors` of an output folder.

    Raises:
        UsageError: it is missing, truncated, damaged, or holds what no method writes.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(root) / PIXELS
    if not path.is_file():
        raise UsageError(f"{root} has no {PIXELS}: {_AGAIN}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
            regions = None
            if {"windows", "regions"} & set(file.keys()):
                regions = Regions(file.get_tensor("windows"), file.get_tensor("regions"))
        pixels = Pixels(
            images,
            labels,
            space=facts["space"],
            factor=json.loads(facts.get("factor", "1")),
            learned_rate=json.loads(facts.get("learned_rate", "null")),
            regions=regions,
        )
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        MemoryError,
        RecursionError,
    ) as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): delete it and {_AGAIN}") from error
    wrong = _fault(pixels)
    if wrong:
        raise UsageError(f"{path} cannot be used: {wrong}; delete it and {_AGAIN}")
    return pixels


def _fault(pixels: Pixels) -> str:
    """What is wrong with these pixels, in words; "" where nothing is."""
    images, labels, factor, rate = pixels.images, pixels.labels, pixels.factor, pixels.learned_rate
    if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        return f"images must be float32 [N, 3, H, W], got {_described(images)}"
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        return f"labels must be int64 [{len(images)}], got {_described(labels)}"
    if bool((labels < 0).any()):
        return f"labels must be 0 or more, got {int(labels.min())}"
    if pixels.space not in SPACES:
        return f"space must be one of {', '.join(SPACES)}, got {str(pixels.space)[:40]!r}"
    height, width = images.shape[2:]
    if type(factor) is not int or not 1 <= factor <= min(height, width):
        return f"factor must be a whole number from 1 to {min(height, width)}, got {str(factor)[:40]}"
    if rate is not None and (
        isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate)
    ):
        return f"learned_rate must be a finite number, got {str(rate)[:40]}"
    if pixels.regions is not None and (wrong := _fault_of_regions(pixels.regions, pixels)):
        return wrong
    bad = int((~torch.isfinite(images)).sum())
    return f"images hold NaN or infinity in {bad} of {images.numel()} places" if bad else ""


def _fault_of_regions(regions: Regions, pixels: Pixels) -> str:
    """What is wrong with the regions of otherwise sound pixels."""
    windows, chosen, (height, width) = regions.windows, regions.chosen, pixels.images.shape[2:]
    if pixels.factor != 1:
        return f"images of factor {pixels.factor} have tiles, and regions beside them"
    if windows.dtype != torch.int64 or windows.ndim != 2 or windows.shape[1] != 4 or not len(windows):
        return f"windows must be int64 [K, 4], got {_described(windows)}"
    x0, y0, x1, y1 = windows.unbind(1)
    inside = (x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height) & (x1 > x0) & (y1 > y0)
    if not bool(inside.all()):
        return f"windows must lie in {width}x{height}, got {windows[~inside][0].tolist()}"
    if (
        chosen.dtype != torch.int64
        or chosen.ndim != 2
        or len(chosen) != len(pixels.images)
        or not chosen.numel()
    ):
        return f"regions must be int64 [{len(pixels.images)}, P], got {_described(chosen)}"
    if bool((chosen < 0).any() | (chosen >= len(windows)).any()):
        return f"regions must lie in 0..{len(windows) - 1}, got {int(chosen.min())}..{int(chosen.max())}"
    return ""


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _serialized(pixels: Pixels) -> bytes:
    """The file's bytes. The format's own writer puts several metadata entries in an order that changes."""
    # Integers first, as that writer does: eight-byte numbers lie at multiples of eight.
    tensors = {"labels": ("I64", pixels.labels)}
    if pixels.regions is not None:
        tensors |= {"regions": ("I64", pixels.regions.chosen), "windows": ("I64", pixels.regions.windows)}
    tensors["images"] = ("F32", pixels.images)
    facts = {
        "factor": json.dumps(pixels.factor),
        "learned_rate": json.dumps(None if pixels.learned_rate is None else float(pixels.learned_rate)),
        "space": pixels.space,
    }
    header: dict[str, Any] = {"__metadata__": facts}
    end = 0
    for name, (kind, tensor) in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    opening = json.dumps(header, separators=(",", ":")).encode()
    opening += b" " * (-len(opening) % 8)
    bodies = [tensor.numpy().tobytes() for _, tensor in tensors.values()]
    return b"".join((struct.pack("<Q", len(opening)), opening, *bodies))


def to_unit(images: Tensor, mean: Sequence[float], std: Sequence[float], space: str) -> Tensor:
    """Stored pixels as a picture's values, which lie in [0, 1] where they can be shown; nothing is clamped.

    Args:
        images: float [..., 3, H, W] in `space`.
        mean, std: of the normalisation, per channel, for values in [0, 1].
        space: one of `SPACES`.

    Returns:
        float [..., 3, H, W], a new tensor.
    """
    if space not in SPACES:
        raise UsageError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
    if space == "unit":
        return images.clone()
    return images * _channels(std, images) + _channels(mean, images)


def to_bytes(images: Tensor, mean: Sequence[float], std: Sequence[float], space: str) -> Tensor:
    """Stored pixels in 8 bits, rounded to the nearest grey level and clamped: uint8 [..., 3, H, W].

    Arguments as `to_unit`.
    """
    return to_unit(images, mean, std, space).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=like.dtype, device=like.device).view(3, 1, 1)


# Curve -------------------------------------------------------------------------------------------------------


def curve_schema(columns: Iterable[str] = CURVE) -> pa.Schema:
    """Columns of `curve.parquet`: group int32, step int64, then the given ones, float64, null where not measured."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("group", pa.int32(), nullable=False),
            pa.field("step", pa.int64(), nullable=False),
            *(pa.field(name, pa.float64()) for name in columns),
        ]
    )


def write_curve(
    root: str | Path, rows: Iterable[Mapping[str, float | None]], columns: Iterable[str] = CURVE
) -> None:
    """Write `curve.parquet` atomically, sorted by group and step; equal rows in any order give equal bytes.

    Args:
        root: the output folder.
        rows: "group", "step" and what was measured there, by the names of `columns`. What a row lacks, or what is
            None, NaN or infinite in it, becomes null.
        columns: what a row may hold, `CURVE`, `WITH_RATE` or `GUIDED`.

    Raises:
        ValueError: a row without group or step, an unknown name, or two rows of one step.
        UsageError: no space, no permission.
    """
    import pyarrow as pa

    from ddfast.output.table import write_table

    names = tuple(columns)
    ordered = sorted((dict(row) for row in rows), key=lambda row: _place(row, names))
    for row, following in itertools.pairwise(ordered):
        if _place(row, names) == _place(following, names):
            raise ValueError(f"the curve has step {row['step']} of group {row['group']} twice")
    schema = curve_schema(names)
    found: dict[str, list[Any]] = {"group": [], "step": [], **{name: [] for name in names}}
    for row in ordered:
        for key, place in zip(_KEYS, _place(row, names), strict=True):
            found[key].append(place)
        for name in names:
            value = row.get(name)
            found[name].append(None if value is None or not math.isfinite(value) else float(value))
    arrays = [pa.array(found[field.name], field.type) for field in schema]
    write_table(Path(root) / CURVE_TABLE, pa.Table.from_arrays(arrays, schema=schema))


def _place(row: Mapping[str, float | None], columns: Sequence[str]) -> tuple[int, int]:
    """(group, step) of a row, whose names are checked."""
    unknown = [name for name in row if name not in _KEYS and name not in columns]
    if unknown:
        raise ValueError(f"a row of the curve may hold group, step, {', '.join(columns)}; got {unknown[0]!r}")
    found = []
    for key in _KEYS:
        value = row.get(key)
        if value is None or value != value or int(value) != value or value < 0:
            raise ValueError(f"a row of the curve needs a {key} that counts from 0, got {value!r}")
        found.append(int(value))
    return found[0], found[1]


def read_curve(root: str | Path) -> list[dict[str, float]]:
    """The rows of `curve.parquet`, by group and step; what was not measured is left out of a row.

    Columns that this version does not know are read as well.

    Raises:
        UsageError: it is missing, truncated, damaged or no curve.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ddfast.output.table import read_table

    path = Path(root) / CURVE_TABLE
    if not path.is_file():
        raise UsageError(f"{root} has no {CURVE_TABLE}: {_AGAIN}")
    try:
        with arrow_file(path) as raw:
            schema = pq.read_schema(raw).remove_metadata()
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): delete it and {_AGAIN}") from error
    keys = curve_schema().names[:2]
    if schema.names[:2] != keys or any(field.type != pa.float64() for field in list(schema)[2:]):
        raise UsageError(f"{path} is no curve: it has the columns {', '.join(schema.names)[:200]}")
    return [
        {name: value for name, value in row.items() if value is not None}
        for row in read_table(path, schema).to_pylist()
    ]


# Before ------------------------------------------------------------------------------------------------------


def write_before(root: str | Path, images: Tensor, labels: Sequence[int], class_names: Sequence[str]) -> Path:
    """Write `before.png`: the images that a synthesis began with, laid out as `mosaic.png`.

    Args:
        root: the output folder.
        images: uint8 [N, 3, S, S], of all classes or at least of those that `mosaic_labels` names; see `to_bytes`.
        labels: [N] class indices.
        class_names: in label order.

    Returns:
        Path of the picture. Equal arguments give equal bytes with one Pillow version.
    """
    from ddfast.output.mosaic import write_mosaic

    path = Path(root) / BEFORE
    write_mosaic(path, images, labels, class_names)
    return path
