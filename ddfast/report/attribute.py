"""`ddfast attribute`: where a teacher looks, as pictures, a table and a page."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddfast.arguments import one_of, output_folder, path_of, whole_number
from ddfast.attribution import list_estimators
from ddfast.data.decoding import decode_fit
from ddfast.data.loading import load
from ddfast.data.opening import open_source
from ddfast.data.sources import Sample, Source, check_outside, is_image, utf8
from ddfast.errors import BadImage, UsageError, shown
from ddfast.files import atomic_folder, atomic_write_bytes, atomic_write_text, make_folder
from ddfast.isolation import isolated
from ddfast.models import Teacher, load_teacher
from ddfast.models.teacher import checked_logits
from ddfast.ops._dispatch import say_slow_ops
from ddfast.output.mosaic import spread
from ddfast.progress import Progress, say
from ddfast.report.charts import boxes_over, heat_over
from ddfast.report.parts import render
from ddfast.report.pictures import data_uri, display_side, heatmap_picture, png_bytes, to_picture
from ddfast.wording import argument, plural

PAGE = "index.html"
TABLE = "attribution.csv"
_BATCH = 16
_PICTURE_SIDE = 256
_NAME_BYTES = 150  # of a file's stem in the name of its picture


@dataclass(frozen=True)
class Attributed:
    """One image with its attribution.

    Attributes:
        file: name in its folder, or key in its set.
        image: uint8 [3, S, S], fitted to the teacher.
        label: class whose score is attributed.
        choice: the teacher's first choice.
        value: the attributed score of the whole image: logit, probability or log-probability.
        phi: float32 [rows, cols].
    """

    file: str
    image: Tensor
    label: int
    choice: int
    value: float
    phi: NDArray[np.float32]


class LooseFiles(Source):
    """Image files without labels; every sample has label 0 and its file's name for a key."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self._paths = {utf8(path.name): path for path in paths}
        super().__init__(name, "train", [""], [(key, 0) for key in self._paths])

    def read(self, sample: Sample) -> bytes:
        """The file's bytes. Raises `BadImage` where it cannot be read."""
        try:
            return self._paths[sample.key].read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or type(error).__name__}") from error

    def size_of(self, sample: Sample) -> int:
        """Size of the file in bytes."""
        return self._paths[sample.key].stat().st_size

    def close(self) -> None:
        """Nothing stays open."""


@isolated()
def attribute_images(
    data: str | Path,
    *,
    teacher: Teacher | str | Path | Callable[[], Teacher],
    out: str | Path,
    grid: int = 4,
    n_samples: int = 32,
    estimator: str = "permutation",
    value: str = "logit",
    limit: int = 64,
    seed: int = 0,
    device: str = "auto",
    workers: int | None = None,
    quiet: bool = False,
) -> int:
    """Write the Shapley heatmaps of some images.

    The folder holds `heatmaps/000000_<stem>.png`, `attribution.csv` (file, class, value, first choice, picture,
    and phi of every cell in row-major order) and `index.html`. An image of a labelled set is attributed for its
    label, any other for the teacher's first choice.

    Args:
        data: an image file, a folder of images, or a labelled set, of which evenly spaced images are taken.
        teacher: explains the images: a loaded one, its file or `torchvision:NAME`, or a function that loads it once the
            other arguments are checked.
        out: folder that is missing or empty.
        grid: cells per side.
        n_samples: model evaluations an image.
        estimator: of the Shapley values, see `ddfast.shapley`.
        value: "logit", "prob" or "logprob".
        limit: images at most.
        seed: of the coalitions.
        device: "auto", "cpu" or "cuda".
        workers: decoding threads; default one a core.
        quiet: print nothing.

    Returns:
        The number of heatmaps. Files that cannot be decoded are skipped, and named on standard error.

    Raises:
        UsageError: no usable image, `out` is not empty, classes that the teacher does not know, or arguments
            out of range. Nothing is half-written.
    """
    from ddfast.attribution.estimators.plans import make_plan
    from ddfast.training.device import resolve_device

    limit = whole_number(limit, "limit", least=1)
    grid = whole_number(grid, "grid", least=1)
    n_samples = whole_number(n_samples, "n_samples", least=1)
    seed = whole_number(seed, "seed", least=0, most=2**63 - 1)
    workers = None if workers is None else whole_number(workers, "workers", least=0)
    one_of(value, "value", ("logit", "prob", "logprob"))
    one_of(estimator, "estimator", list_estimators())
    try:
        make_plan(estimator, (grid, grid), n_samples, seed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    where = resolve_device(device)
    out = path_of(out, "out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder; give {argument('out')} a new one")
    output_folder(out)
    if isinstance(teacher, (str, Path)):
        teacher = load_teacher(teacher)
    elif not isinstance(teacher, Teacher):
        teacher = teacher()
    teacher = dataclasses.replace(teacher, model=copy.deepcopy(teacher.model).float().eval())
    if grid > teacher.image_size:
        raise UsageError(
            f"{argument('grid')} must be at most the image size {teacher.image_size}, got {grid}"
        )
    source = _open(data)
    check_outside(out, source)
    targets = None if isinstance(source, LooseFiles) else _teacher_labels(source, teacher)
    samples = [source.samples[place] for place in spread(len(source.samples), limit)]
    say_slow_ops(where, quiet=quiet)
    teacher.model.to(where)
    found: list[Attributed] = []
    waiting: list[tuple[Sample, Tensor]] = []
    bad = 0
    with Progress("attribute", len(samples), "images", quiet=quiet) as progress:
        for done, (sample, image) in enumerate(
            load(source, samples, teacher.image_size, workers=workers), start=1
        ):
            if isinstance(image, BadImage):
                bad += 1
                say(f"skipped {shown([sample.key])}: {image}", quiet=quiet)
            else:
                waiting.append((sample, image))
            if waiting and (len(waiting) == _BATCH or done == len(samples)):
                found += _attributed(
                    waiting, targets, teacher, grid, n_samples, estimator, value, seed, where
                )
                waiting = []
            progress.advance()
    if not found:
        raise UsageError(f"{data} holds no usable image: {bad} of {len(samples)} cannot be decoded")
    if bad:
        say(f"skipped {bad} of {plural(len(samples), 'file')}", quiet=quiet)
    with atomic_folder(out) as folder:
        _write(folder, found, bad, teacher, grid, n_samples, value)
    return len(found)


def _open(data: str | Path) -> Source:
    """A labelled set where `data` is one, else its image files."""
    path = Path(os.path.expanduser(data))
    if path.is_file():
        if is_image(path.name) or _decodes(path):
            return LooseFiles(str(data), [path])
        return open_source(data)
    try:
        return open_source(data)
    except UsageError:
        if not path.is_dir():
            raise
        loose = sorted(entry for entry in path.iterdir() if is_image(entry.name) and entry.is_file())
        if not loose:
            raise
        return LooseFiles(str(data), loose)


def _decodes(path: Path) -> bool:
    """Whether a file without an image's ending is one; archives are not read."""
    if path.suffix.lower() in (".zip", ".tar"):
        return False
    try:
        decode_fit(path.read_bytes(), 8)
    except (BadImage, OSError):
        return False
    return True


def _teacher_labels(source: Source, teacher: Teacher) -> list[int]:
    """The teacher's class index of every label of the source."""
    known = {name: index for index, name in enumerate(teacher.class_names)}
    unknown = [name for name in source.class_names if name not in known]
    if unknown:
        raise UsageError(
            f"the teacher does not know the classes {shown(unknown, 3)}; give its own set, or the images in one folder "
            "without class folders to attribute its first choice"
        )
    return [known[name] for name in source.class_names]


def _attributed(
    batch: Sequence[tuple[Sample, Tensor]],
    targets: Sequence[int] | None,
    teacher: Teacher,
    grid: int,
    n_samples: int,
    estimator: str,
    value: str,
    seed: int,
    device: torch.device,
) -> list[Attributed]:
    """Attribute one batch of fitted images, uint8 [3, S, S]."""
    from ddfast.attribution import shapley

    images = torch.stack([image for _, image in batch]).to(device)
    mean, std = torch.tensor(teacher.mean, device=device), torch.tensor(teacher.std, device=device)
    with torch.no_grad():
        normalised = (images.float() / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
        outputs = teacher.model(normalised.contiguous(memory_format=torch.channels_last))
    logits = checked_logits(outputs, len(teacher.class_names)).float()
    if not bool(torch.isfinite(logits).all()):
        raise UsageError("the teacher returns NaN or infinity: its weights are damaged, train it again")
    choices = logits.argmax(dim=1)
    labels = choices if targets is None else torch.tensor([targets[s.label] for s, _ in batch], device=device)
    scores = {"prob": logits.softmax(dim=1), "logprob": logits.log_softmax(dim=1)}.get(value, logits)
    try:
        phi = shapley(
            teacher.model,
            images,
            labels,
            grid=grid,
            n_samples=n_samples,
            estimator=estimator,
            value=value,
            seed=seed,
            mean=mean,
            std=std,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    values = scores.gather(1, labels[:, None])[:, 0]
    return [
        Attributed(
            sample.key,
            image,
            int(labels[i]),
            int(choices[i]),
            float(values[i]),
            phi[i].float().cpu().view(grid, grid).numpy(),
        )
        for i, (sample, image) in enumerate(batch)
    ]


def _write(
    folder: Path,
    found: Sequence[Attributed],
    bad: int,
    teacher: Teacher,
    grid: int,
    n_samples: int,
    value: str,
) -> None:
    """Write pictures, table and page into an empty folder."""
    make_folder(folder / "heatmaps")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    cells = [f"phi_{row}_{column}" for row in range(grid) for column in range(grid)]
    table.writerow(["file", "class", "value", "first_choice", "picture", *cells])
    side = display_side(teacher.image_size, _PICTURE_SIDE)
    cards = []
    for index, one in enumerate(found):
        picture = f"heatmaps/{index:06d}_{_file_safe(one.file)}.png"
        atomic_write_bytes(folder / picture, png_bytes(heatmap_picture(one.image, one.phi, side=side)))
        label, choice = teacher.class_names[one.label], teacher.class_names[one.choice]
        phi = [f"{cell:.9g}" for cell in one.phi.ravel().tolist()]
        table.writerow([one.file, label, f"{one.value:.9g}", choice, picture, *phi])
        cards.append(_card(one, label, choice, value, teacher.image_size))
    atomic_write_text(folder / TABLE, text.getvalue())
    page = render(
        "heatmaps.html",
        title=f"Where {teacher.arch} looks",
        lead=(
            f"Shapley values of {grid}×{grid} cells, {plural(n_samples, 'model evaluation')} an image. Every image "
            "has its own scale: its strongest cell takes the full colour."
        ),
        skipped=f"{plural(bad, 'file')} could not be decoded and {'are' if bad != 1 else 'is'} left out."
        if bad
        else "",
        cards=cards,
    )
    atomic_write_text(folder / PAGE, page)


def _card(one: Attributed, label: str, choice: str, value: str, size: int) -> dict[str, object]:
    """What the template shows of one image."""
    uri = data_uri(to_picture(one.image))
    measured = [(value, f"{one.value:.3g}"), ("attributions add up to", f"{one.phi.sum():.3g}")]
    if label != choice:
        measured.append(("first choice", choice))
    return {
        "title": label,
        "score": None,
        "file": one.file,
        "reason": None,
        "boxes": boxes_over(uri, size, [], None),
        "heat": heat_over(uri, size, one.phi.astype(np.float64)),
        "tile": None,
        "measured": measured,
        "labels": [],
    }


def _file_safe(name: str) -> str:
    """A file's stem in letters, marks and digits of any script, `-`, `_` and `.`; the rest becomes `_`."""
    stem = unicodedata.normalize("NFC", Path(name).stem)
    safe = "".join(c if c in "-_." or unicodedata.category(c)[0] in "LMN" else "_" for c in stem)
    return safe.encode("utf-8", "replace")[:_NAME_BYTES].decode("utf-8", "ignore") or "image"
