"""The folder a distilled set is: what writes its parts, and `DistilledSet`, which opens it again.

    train/00000_<class>/000000.png     ImageFolder
    train/metadata.jsonl               one row an image: file_name, label, label_name, tiles
    soft_labels.safetensors            teacher probabilities [N, tiles, C] fp16, or the top k of them; not where the
                                       labels are hard
    pixels.safetensors                 of images that were optimised: float32, before any rounding to 8 bits
    manifest.json                      written last, by the pipeline: a folder without it is unfinished

torchvision's `ImageFolder(root / "train")` and `datasets.load_dataset("imagefolder", data_dir=root,
split="train")` open it as well; both take the label order from here. The latter gives labels as numbers, with their
names beside them: `ddfast.output.export_huggingface` writes a folder whose labels are a `ClassLabel`.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ddfast.arguments import path_of
from ddfast.data.decoding import _EXTENSION, decode, encode_image
from ddfast.data.sources import is_image
from ddfast.errors import BadImage, UsageError, one_line, shown
from ddfast.files import atomic_path, atomic_write_bytes, make_folder
from ddfast.isolation import isolated
from ddfast.output.pixels import PIXELS, Pixels, read_pixels, to_unit
from ddfast.output.whitening import Whitening, read_whitening
from ddfast.wording import plural

SCORES = "scores"
QUARANTINED = "quarantined.jsonl"
_LABEL_PARTS = ".soft-labels"

SELECTION = "selection.parquet"

FORMAT_VERSION = 1
"""Of the output folder; `DistilledSet` refuses a newer one."""

METADATA = "train/metadata.jsonl"
SOFT_LABELS = "soft_labels.safetensors"
MANIFEST = "manifest.json"
MOSAIC = "mosaic.png"
_NAME_BYTES = 200  # of a class name in a folder name; file systems end at 255
_FINISH = "finish it with the same distill command and --resume"


# Writing ----------------------------------------------------------------------------------------------------


def class_folder(label: int, class_name: str) -> str:
    """Folder name of a class: `00007_garden_hose`.

    The index keeps label order and uniqueness. Of the name, letters, marks and digits of any script stay, as
    do `-`, `_` and `.`; the rest becomes `_`; it is cut at 200 bytes.
    """
    name = unicodedata.normalize("NFC", class_name)
    safe = "".join(c if c in "-_." or unicodedata.category(c)[0] in "LMN" else "_" for c in name)
    safe = safe.encode("utf-8", "replace")[:_NAME_BYTES].decode("utf-8", "ignore").rstrip(".")
    return f"{label:05d}_{safe}"


def image_path(label: int, class_name: str, index: int, format: str = "png") -> str:
    """Posix path of an image in the output folder: `train/00000_<class>/000000.png`, `.jpg` for "jpeg"."""
    return f"train/{class_folder(label, class_name)}/{index:06d}{_EXTENSION[format]}"


def write_image(path: str | Path, image: Tensor, *, quality: int = 95, subsampling: str = "4:4:4") -> None:
    """Encode by the path's ending and write atomically, making the folder. Arguments as `encode_image`."""
    path = Path(path)
    format = "png" if path.suffix == ".png" else "jpeg"
    make_folder(path.parent)
    atomic_write_bytes(path, encode_image(image, format, quality=quality, subsampling=subsampling))


@dataclass(frozen=True)
class Tile:
    """Where a tile of a distilled image came from.

    `source` is a sample's key, `box` (x0, y0, x1, y1) in pixels of the fitted source, `score` what it was
    ranked by, None where the method ranks by nothing.
    """

    source: str
    box: Sequence[float]
    score: float | None = None


def metadata_row(
    label: int, class_name: str, index: int, tiles: Iterable[Tile], format: str = "png"
) -> dict[str, Any]:
    """One line of `train/metadata.jsonl`: tiles in row-major order, `file_name` relative to `train/`."""
    return {
        "file_name": image_path(label, class_name, index, format).removeprefix("train/"),
        "label": int(label),
        "label_name": class_name,
        "tiles": [
            {
                "source": tile.source,
                "box": [float(edge) for edge in tile.box],
                "score": None if tile.score is None else float(tile.score),
            }
            for tile in tiles
        ],
    }


def write_metadata(root: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write `train/metadata.jsonl` atomically. The order of the rows is that of the soft labels.

    Raises:
        ValueError: a number is NaN or infinite, which JSON has not.
        UsageError: no space, no permission.
    """
    make_folder(Path(root) / "train")
    with atomic_path(Path(root) / METADATA) as temporary, open(temporary, "wb") as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))


def write_soft_labels(
    root: str | Path, probabilities: Tensor, temperature: float, top_k: int | None = None
) -> None:
    """Write `soft_labels.safetensors` atomically; equal arguments give equal bytes.

    Args:
        root: the output folder.
        probabilities: float [N, tiles, C], softmax(logits / temperature) of the teacher on each tile.
        temperature: what the logits were divided by; kept in the file's metadata.
        top_k: keep the k largest of each row only, as fp16 `soft_labels` [N, tiles, k] in descending order
            (ties: lower class first) and int32 `indices` of the same shape. None, or at least C: everything,
            [N, tiles, C].

    Raises:
        ValueError: another shape, a value that is not finite, or `top_k` below 1.
        UsageError: no space, no permission.
    """
    from safetensors.torch import save

    if probabilities.ndim != 3 or not probabilities.is_floating_point():
        raise ValueError(f"probabilities must be float [N, tiles, C], got {list(probabilities.shape)}")
    if not torch.isfinite(probabilities).all():
        raise ValueError("probabilities must be finite, got NaN or infinity")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    probabilities = probabilities.detach().cpu()
    tensors = {"soft_labels": probabilities.to(torch.float16).contiguous()}
    if top_k is not None and top_k < probabilities.shape[2]:
        order = torch.argsort(probabilities, dim=2, descending=True, stable=True)[..., :top_k]
        tensors["soft_labels"] = probabilities.gather(2, order).to(torch.float16).contiguous()
        tensors["indices"] = order.to(torch.int32).contiguous()
    # One metadata entry: the library writes several of them in an order that changes from run to run.
    atomic_write_bytes(Path(root) / SOFT_LABELS, save(tensors, {"temperature": repr(float(temperature))}))


# Reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoftLabels:
    """Stored teacher probabilities.

    Attributes:
        values: fp16 [N, tiles, C], or [N, tiles, k] of the top k.
        indices: int32 [N, tiles, k], the classes of `values`; None where all are stored.
        temperature: what the logits were divided by.
        num_classes: C.
    """

    values: Tensor
    indices: Tensor | None
    temperature: float
    num_classes: int

    def dense(self, rows: Tensor | slice | None = None) -> Tensor:
        """Probabilities float32 [n, tiles, C] of some images, all by default.

        Where the top k are stored, what they leave is spread evenly over the other classes ("marginal
        smoothing" of Shen and Xing, A Fast Knowledge Distillation Framework, ECCV 2022).
        """
        picked = slice(None) if rows is None else rows
        values = self.values[picked].float()
        if self.indices is None:
            return values
        indices = self.indices[picked].long()
        others = self.num_classes - values.shape[2]
        rest = (1 - values.sum(dim=2, keepdim=True)).clamp(min=0) / max(others, 1)
        return rest.expand(*values.shape[:2], self.num_classes).scatter(2, indices, values)


def read_soft_labels(root: str | Path, num_classes: int, places: Sequence[int] | None = None) -> SoftLabels:
    """Read `soft_labels.safetensors` of an output folder, all of it or the images at `places`, in ascending order.

    Raises:
        UsageError: it is missing, truncated, damaged, or does not fit `num_classes`.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(root) / SOFT_LABELS
    if not path.is_file():
        raise UsageError(f"{root} has no {SOFT_LABELS}: {_FINISH}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            if places is None:
                tensors = {name: file.get_tensor(name) for name in names}
            else:
                tensors = {name: _slices(file.get_slice(name), places) for name in names}
        values = tensors["soft_labels"]
        temperature = float(metadata["temperature"])
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, MemoryError) as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): delete it and {_FINISH}") from error
    indices = tensors.get("indices")
    width = num_classes if indices is None else values.shape[-1]
    if values.dtype != torch.float16 or values.ndim != 3 or values.shape[2] != width:
        raise UsageError(
            f"{path} holds {values.dtype} {list(values.shape)}, wanted fp16 [images, tiles, {num_classes}]"
        )
    if indices is not None and (
        indices.dtype != torch.int32
        or indices.shape != values.shape
        or bool((indices < 0).any() or (indices >= num_classes).any())
    ):
        raise UsageError(f"{path} has indices that do not fit its values or {num_classes} classes")
    if not torch.isfinite(values).all():
        raise UsageError(f"{path} holds NaN or infinity: delete it and {_FINISH}")
    return SoftLabels(values, indices, temperature, num_classes)


def _slices(stored: Any, places: Sequence[int]) -> Tensor:
    """The images at ascending places of a tensor in a file, read in runs of neighbours."""
    parts, first = [], 0
    for index in range(1, len(places) + 1):
        if index == len(places) or places[index] != places[index - 1] + 1:
            parts.append(stored[places[first] : places[index - 1] + 1])
            first = index
    return torch.cat(parts) if parts else stored[:0]


class DistilledSet(Dataset[tuple[Any, int, Tensor]]):
    """A finished output folder as a map-style dataset of (image, label, soft label).

    The image is uint8 [3, H, W], with `float=True` float32 [3, H, W] in [0, 1], or what `transform` makes of it; the
    label an int; the soft label float32 [C], the mean over the tiles, or the label's one-hot where the set has hard
    labels only. The order is that of `train/metadata.jsonl`.

    Floats of images that were optimised are the stored pixels themselves, neither rounded to 8 bits nor clipped:
    a picture's lie in [0, 1], and an optimiser may have left that by a little. No mean is subtracted: `mean` and
    `std` are there for `transform=torchvision.transforms.Normalize(...)`.

    Attributes:
        root: the folder.
        manifest: `manifest.json` as a dict.
        rows: `train/metadata.jsonl` as dicts.
        class_names, classes: in label order.
        display_names: the names that people read, in label order; the same where none were given.
        labels: int64 [N].
        targets: the same as a list, as torchvision's datasets have it.
        class_to_idx: label of each class name.
        image_size: side of the images, in pixels.
        factor: tiles per side of an image.
        mean, std: the normalisation of teacher and students, per channel, for images scaled to 0..1.
        temperature: of the soft labels; None where the labels are hard.
        stored: the soft labels as they are in the file; None where the labels are hard.
        pixels: what students train on where the images were optimised: float32, before rounding to 8 bits; else
            None.
    """

    @isolated()
    def __init__(
        self, root: str | Path, transform: Callable[[Any], Any] | None = None, float: bool = False
    ) -> None:
        """Open and check a folder; no image is decoded yet.

        Args:
            root: the output folder of a distillation.
            transform: called with every image: with the RGB Pillow picture, or with the tensor where `float` is on.
            float: images as float32 in [0, 1], those that were optimised as they are stored.

        Raises:
            UsageError: no such folder, an unfinished run, a newer format, missing or surplus images, counts
                that disagree, or a damaged file.
        """
        self.root = path_of(root, "root")
        self.transform = transform
        self.float = bool(float)
        self.manifest = _read_manifest(self.root)
        self.class_names = [str(name) for name in _wanted(self.manifest, "class_names", list, self.root)]
        self.display_names = _display_names(self.manifest, self.class_names, self.root)
        self.image_size = int(_wanted(self.manifest, "image_size", int, self.root))
        self.mean = _three(self.manifest, "mean", self.root)
        self.std = _three(self.manifest, "std", self.root)
        self.rows = _read_rows(self.root, self.class_names)
        self.targets: list[int] = [row["label"] for row in self.rows]
        self.labels = torch.tensor(self.targets, dtype=torch.int64)
        self.stored = (
            None if _is_hard(self.root, self.manifest) else read_soft_labels(self.root, len(self.class_names))
        )
        self.temperature = None if self.stored is None else self.stored.temperature
        self.pixels = read_pixels(self.root) if _is_made(self.root, self.manifest) else None
        counts = _wanted(self.manifest, "counts", dict, self.root)
        found = {MANIFEST: counts.get("images"), METADATA: len(self.rows)}
        if self.stored is not None:
            found[SOFT_LABELS] = len(self.stored.values)
        if self.pixels is not None:
            found[PIXELS] = len(self.pixels.labels)
        if len(set(found.values())) > 1:
            said = ", ".join(f"{name} has {count}" for name, count in found.items())
            raise UsageError(f"{self.root} disagrees on the number of images: {said}; distil it again")
        if self.pixels is not None:
            self._check_pixels(self.pixels)
        self.factor = self._factor()
        _check_images(self.root, self.rows)

    def _check_pixels(self, pixels: Pixels) -> None:
        """Raise `UsageError` unless the pixels are those of the listed images."""
        height, width = pixels.images.shape[2:]
        if (height, width) != (self.image_size, self.image_size):
            raise UsageError(
                f"{self.root / PIXELS} holds {width}x{height}, {MANIFEST} says {self.image_size}: distil it again"
            )
        if not torch.equal(pixels.labels, self.labels):
            raise UsageError(
                f"{self.root / PIXELS} has other labels than {METADATA}, or another order: distil it again"
            )

    def _factor(self) -> int:
        """Tiles per side, by what students are trained on."""
        if self.pixels is not None:
            return self.pixels.factor
        if self.stored is not None:
            return math.isqrt(self.stored.values.shape[1])
        factor = self.manifest.get("factor", 1)
        if type(factor) is not int or factor < 1 or self.image_size % factor:
            raise UsageError(f"{self.root / MANIFEST} has no usable 'factor': distil it again")
        return factor

    @property
    def classes(self) -> list[str]:
        """The class names in label order, as torchvision's datasets name them."""
        return self.class_names

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Label of each class name."""
        return {name: label for label, name in enumerate(self.class_names)}

    def __repr__(self) -> str:
        stored = "soft and hard labels" if self.stored is not None else "hard labels"
        pixels = ", float32 pixels" if self.pixels is not None else ""
        counts = f"{plural(len(self), 'image')} of {plural(len(self.class_names), 'class')}"
        return (
            f"DistilledSet by {self.manifest.get('method')}: {counts}, {self.image_size} px{pixels}, {stored}\n"
            f"in {self.root}"
        )

    def _repr_html_(self) -> str:
        """What it is, and its mosaic as a data URI: no file beside the notebook is needed."""
        said = html.escape(repr(self)).replace("\n", "<br>")
        picture = base64.b64encode(self._mosaic()).decode("ascii")
        return (
            f'<p>{said}</p><img src="data:image/png;base64,{picture}" alt="images of the distilled set" '
            'style="max-width: 100%">'
        )

    def _mosaic(self) -> bytes:
        """`mosaic.png` of the folder, drawn anew where it is gone."""
        from ddfast.output.mosaic import mosaic_labels, mosaic_picture, mosaic_rows, png_bytes

        try:
            return (self.root / MOSAIC).read_bytes()
        except OSError:
            pass
        shown = set(mosaic_labels(len(self.class_names)))
        kept = [place for place, label in enumerate(self.targets) if label in shown]
        rows = mosaic_rows([self.targets[place] for place in kept])
        places = [kept[place] for row in rows for place in row]
        labels = [self.targets[place] for place in places]
        return png_bytes(
            mosaic_picture([self._decoded(place) for place in places], labels, self.display_names)
        )

    @property
    def soft_labels(self) -> Tensor | None:
        """Float32 [N, tiles, C], all at once; None where the labels are hard."""
        return None if self.stored is None else self.stored.dense()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a distilled set of {len(self)} images")
        index = index % len(self)
        image = self._image(index)
        label = self.targets[index]
        if self.stored is None:
            return image, label, F.one_hot(self.labels[index], len(self.class_names)).float()
        return image, label, self.stored.dense(slice(index, index + 1))[0].mean(dim=0)

    def in_unit(self, pixels: Tensor) -> Tensor:
        """Stored pixels [N, 3, H, W] as those of pictures, in [0, 1] or nearly: without normalisation or whitening."""
        assert self.pixels is not None
        whitening = self._whitening
        if whitening is not None:
            return whitening.undone(pixels)
        return to_unit(pixels, self.mean, self.std, self.pixels.space)

    @cached_property
    def _whitening(self) -> Whitening | None:
        return read_whitening(self.root)

    def _image(self, index: int) -> Any:
        """An image as it is handed out."""
        if self.float:
            image: Any
            if self.pixels is not None:
                image = self.in_unit(self.pixels.images[index : index + 1])[0]
            else:
                image = self._decoded(index).float().div_(255)
            return image if self.transform is None else self.transform(image)
        image = self._decoded(index)
        if self.transform is None:
            return image
        from PIL import Image

        return self.transform(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))

    def _decoded(self, index: int) -> Tensor:
        """The picture of an image, uint8 [3, H, W].

        Raises:
            UsageError: it cannot be read, or has another size than the manifest says.
        """
        return self.picture(self.rows[index]["file_name"])[1]

    def picture(self, file_name: str) -> tuple[bytes, Tensor]:
        """A picture by its name in the metadata: the file's bytes, and what they show, uint8 [3, H, W].

        Raises:
            UsageError: it cannot be read, or has another size than the manifest says.
        """
        path = self.root / "train" / file_name
        try:
            held = path.read_bytes()
            image = decode(held)
        except (OSError, BadImage) as error:
            raise UsageError(f"{path} cannot be read ({one_line(error)}): delete it and {_FINISH}") from error
        if tuple(image.shape[1:]) != (self.image_size, self.image_size):
            height, width = image.shape[1:]
            raise UsageError(
                f"{path} is {width}x{height}, {MANIFEST} says {self.image_size}: delete it and {_FINISH}"
            )
        return held, image


def _is_hard(root: Path, manifest: dict[str, Any]) -> bool:
    """Whether a set has hard labels only: its manifest names no label teacher, and none has labelled it."""
    no_teacher = "label_teacher" in manifest and manifest["label_teacher"] is None
    return no_teacher and not (root / SOFT_LABELS).exists()


def _is_made(root: Path, manifest: dict[str, Any]) -> bool:
    """Whether the images were optimised: then students train on pixels, not on the pictures of them."""
    options = manifest.get("options")
    return (isinstance(options, dict) and "synthesize" in options) or (root / PIXELS).exists()


def _read_manifest(root: Path) -> dict[str, Any]:
    if root.is_file():
        raise UsageError(f"{root} is a file; wanted the output folder of ddfast distill")
    if not root.is_dir():
        raise UsageError(f"no such folder: {root}; wanted the output folder of ddfast distill")
    path = root / MANIFEST
    if not path.is_file():
        raise UsageError(f"{root} has no {MANIFEST}: not a distilled set, or an unfinished one; {_FINISH}")
    manifest = _parsed(path, path.read_bytes())
    version = manifest.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UsageError(
            f"{path} has format version {version}, this ddfast reads up to {FORMAT_VERSION}: update it"
        )
    if manifest.get("complete") is not True:
        raise UsageError(f"{root} is unfinished: {_finish(manifest)}")
    return manifest


def _finish(manifest: dict[str, Any]) -> str:
    """How an unfinished folder is finished; another IPC may have been selected since its distill command."""
    said = f"{_FINISH} (its IPC is {manifest.get('ipc')} now)"
    chooses = isinstance(options := manifest.get("options"), dict) and "score" in options
    return f"{said}, or run ddfast compose and ddfast relabel on it" if chooses else said


def _read_rows(root: Path, class_names: Sequence[str]) -> list[dict[str, Any]]:
    path = root / METADATA
    if not path.is_file():
        raise UsageError(f"{root} has no {METADATA}: {_FINISH}")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        row = _parsed(path, line, f", line {number}")
        name, label = row.get("file_name"), row.get("label")
        if type(label) is not int or not 0 <= label < len(class_names):
            raise UsageError(f"{path}, line {number}: label {label!r} is none of 0 to {len(class_names) - 1}")
        parts = name.split("/") if isinstance(name, str) else []
        if len(parts) != 2 or not all(parts) or ".." in parts or "." in parts:
            raise UsageError(f"{path}, line {number}: file_name {name!r} is not <class folder>/<image>")
        rows.append(row)
    return rows


def _parsed(path: Path, text: bytes, place: str = "") -> dict[str, Any]:
    advice = f"delete it and {_FINISH}" if path.name != MANIFEST else "distil it again, into another folder"
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}{place} is damaged ({one_line(error)}): {advice}") from error
    if not isinstance(record, dict):
        raise UsageError(f"{path}{place} is damaged (no JSON object): {advice}")
    return record


def _wanted(manifest: dict[str, Any], key: str, kind: type, root: Path) -> Any:
    value = manifest.get(key)
    if not isinstance(value, kind):
        raise UsageError(f"{root / MANIFEST} has no usable {key!r}: distil it again")
    return value


def _display_names(manifest: dict[str, Any], class_names: list[str], root: Path) -> list[str]:
    """Names to show, those of the classes where the manifest has no others."""
    found = manifest.get("display_names")
    if found is None:
        return class_names
    if not isinstance(found, list) or len(found) != len(class_names):
        raise UsageError(f"{root / MANIFEST} has no usable 'display_names': distil it again")
    return [str(name) for name in found]


def _three(manifest: dict[str, Any], key: str, root: Path) -> list[float]:
    values = _wanted(manifest, key, list, root)
    numbers = [value for value in values if isinstance(value, (int, float)) and abs(value) < 1e9]
    if len(values) != 3 or len(numbers) != 3:
        raise UsageError(
            f"{root / MANIFEST} has no usable {key!r}: wanted three numbers, got {str(values)[:80]}"
        )
    return [float(value) for value in values]


def _check_images(root: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Raise `UsageError` unless the images in `train/` are exactly those of the rows."""
    listed = [row["file_name"] for row in rows]
    present: set[str] = set()
    for folder in os.scandir(root / "train"):
        if folder.is_dir():
            present |= {f"{folder.name}/{entry.name}" for entry in os.scandir(folder) if is_image(entry.name)}
    missing = sorted(set(listed) - present)
    if missing:
        raise UsageError(f"{root} lacks {plural(len(missing), 'image')} ({shown(missing, 3)}): {_FINISH}")
    surplus = sorted(present - set(listed))
    if surplus or len(set(listed)) != len(listed):
        what = (
            f"images that {METADATA} does not list ({shown(surplus, 3)})"
            if surplus
            else "images listed twice"
        )
        raise UsageError(f"{root} has {what}: distil it into an empty folder")


PREPARED = "prepared.parquet"
