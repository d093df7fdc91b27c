"""Decoded splits for training and testing: in memory as uint8, or decoded anew on every pass where too
large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ddfast.data.pool import MEMORY_LIMIT
from ddfast.errors import BadImage, UsageError, shown
from ddfast.ops.precision import autocast
from ddfast.progress import Progress, say
from ddfast.training.augmentation import normalize
from ddfast.training.device import memory_layout
from ddfast.wording import plural

if TYPE_CHECKING:
    from ddfast.data.samples import Sample
    from ddfast.data.sources import Source
    from ddfast.output.whitening import Whitening
EVALUATION_BATCH = 500


@dataclass
class ImageSet:
    """Decoded images of one split.

    Attributes:
        images: uint8 [N, 3, S, S], or whitened, float32.
        labels: int64 [N].
        bad: keys of the files that could not be decoded and are not among the N.

    """

    images: Tensor
    labels: Tensor
    bad: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels at `order` (int64 [M]), batch by batch."""
        for index in order.to(self.images.device).split(batch_size):
            yield self.images[index], self.labels[index]

    def on(self, device: torch.device) -> ImageSet:
        """The same set in the memory of `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def whitened(images: ImageSet, whitening: Whitening) -> ImageSet:
    """A set as what trains on whitened images sees it: float32, not to be normalised, some at a time for the memory."""
    pieces = [whitening(piece) for piece in images.images.split(EVALUATION_BATCH)]
    return replace(images, images=torch.cat(pieces))


class StreamedSet:
    """A split too large for memory: every pass decodes it again, in the order that is asked for.

    `len` counts all files; `bad` holds the keys of those that could not be decoded so far.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        workers: int | None = None,
        samples: Sequence[Sample] | None = None,
    ) -> None:
        """`samples` of the source; None: all."""
        self.source, self.size, self.workers = source, size, workers
        self.samples = source.samples if samples is None else samples
        self.bad: set[str] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels at `order`, without the files that cannot be decoded, batch by batch."""
        from ddfast.data.loading import load

        images: list[Tensor] = []
        labels: list[int] = []
        samples = [self.samples[index] for index in order.tolist()]
        for sample, image in load(self.source, samples, self.size, workers=self.workers):
            if not isinstance(image, Tensor):
                self.bad.add(sample.key)
                continue
            images.append(image)
            labels.append(sample.label)
            if len(images) == batch_size:
                yield torch.stack(images), torch.tensor(labels)
                images, labels = [], []
        if images:
            yield torch.stack(images), torch.tensor(labels)


def native_size(source: Source) -> int:
    """Shorter side of the first training image that can be decoded, at most 224 px.

    Raises:
        UsageError: none can be decoded.

    """
    from ddfast.data.decoding import decode
    from ddfast.data.sources import reasons_in_words

    reasons = []
    for sample in source.samples:
        try:
            image = decode(source.read(sample))
        except BadImage as error:
            reasons.append(str(error))
            continue
        return min(image.shape[1], image.shape[2], 224)
    raise UsageError(f"{source.name}: no training image can be decoded{reasons_in_words(reasons)}")


def read_training_set(
    source: Source,
    size: int,
    *,
    samples: Sequence[Sample] | None = None,
    workers: int | None = None,
    quiet: bool = False,
    memory_limit: int = MEMORY_LIMIT,
) -> ImageSet | StreamedSet:
    """The training split, or `samples` of it, at size x size: in memory where it fits in `memory_limit` bytes, else
    streamed."""
    count = len(source.samples if samples is None else samples)
    if count * 3 * size * size > memory_limit:
        say(
            f"{plural(count, 'image')} of {size} px exceed {memory_limit >> 20} MiB: decoding every pass",
            quiet=quiet,
        )
        return StreamedSet(source, size, workers, samples)
    return _read(source, size, None, workers, quiet, samples)


def read_test_set(
    source: Source,
    size: int,
    *,
    samples: Sequence[Sample] | None = None,
    enlarged: bool = True,
    workers: int | None = None,
    quiet: bool = False,
) -> ImageSet:
    """A split, or `samples` of it: the centre of size x size of each image.

    The shorter side is resized to `size` first, or, `enlarged`, to `size // 7 * 8`, as RDED tests; at 32 px these are
    the same.
    """
    return _read(source, size, max(size // 7 * 8, size) if enlarged else size, workers, quiet, samples)


def _read(
    source: Source,
    size: int,
    resize: int | None,
    workers: int | None,
    quiet: bool,
    samples: Sequence[Sample] | None = None,
) -> ImageSet:
    from ddfast.data.loading import load_all
    from ddfast.data.sources import reasons_in_words

    samples = source.samples if samples is None else samples
    with Progress(f"decode {source.split}", len(samples), "images", quiet=quiet) as progress:
        images, labels, bad = load_all(
            source,
            size,
            samples=samples,
            resize=resize,
            workers=workers,
            progress=lambda done, total: progress.advance(),
        )
    if bad:
        sample, reason = bad[0]
        say(
            f"{source.split}: left out {plural(len(bad), 'unreadable image')}, the first {sample.key}: {reason}",
            quiet=quiet,
        )
    if not len(labels):
        raise UsageError(
            f"{source.name}: none of the {plural(len(bad), 'image')} of the {source.split} split can be decoded"
            f"{reasons_in_words(reason for _, reason in bad)}"
        )
    lacking = sorted({sample.label for sample, _ in bad} - set(labels.tolist()))
    if lacking and resize is None:  # a test may go on without
        names = shown([source.class_names[label] for label in lacking])
        raise UsageError(
            f"{source.name}: no image of {names} in the {source.split} split can be decoded"
            f"{reasons_in_words(reason for sample, reason in bad if sample.label in lacking)}"
        )
    return ImageSet(images, labels, {sample.key for sample, _ in bad})


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy in percent: overall, among the five likeliest classes, and of each class (NaN for a class without
    test images)."""

    top1: float
    top5: float
    per_class: list[float]


def measure_accuracy(
    model: nn.Module,
    test: ImageSet,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    precision: str = "float32",
) -> Accuracy:
    """Accuracy in eval mode; the model's mode is put back. Of fewer than five classes, top-5 is certain."""
    was_training, layout = model.training, memory_layout(model, device)
    model.eval()
    outputs = []
    with torch.inference_mode(), autocast(precision, device):
        for images in test.images.split(EVALUATION_BATCH):
            inputs = normalize(images.to(device), mean, std).contiguous(memory_format=layout)
            outputs.append(model(inputs).cpu())
    model.train(was_training)
    logits = torch.cat(outputs)
    correct = logits.argmax(dim=1) == test.labels
    classes = logits.shape[1]
    among_five = (logits.topk(min(5, classes), dim=1).indices == test.labels[:, None]).any(dim=1)
    hits = torch.bincount(test.labels[correct], minlength=classes).double()
    per_class = 100 * hits / torch.bincount(test.labels, minlength=classes)
    return Accuracy(
        100 * correct.double().mean().item(), 100 * among_five.double().mean().item(), per_class.tolist()
    )
