"""NVIDIA DALI as a loader: its threads, or the GPU, decode and resize; Pillow has the last word.

What DALI gets and what it does not
- Only plain JPEGs (`ddfast.data.jpeg`) reach it, as encoded bytes from the source, so that folders, zips and
  tar shards are all served and a sample stays with its bytes. Every other format, a turned or CMYK
  photograph, a file with a broken chain of markers and an image longer than 16:1 go through Pillow.
- A file that DALI cannot decode makes its whole pipeline invalid. The pipeline is then built anew, the samples
  of the batch go through it one at a time, and those that fail again go to Pillow, whose image or reason
  counts. So what becomes of a file depends on its bytes alone, not on its neighbours.
- DALI resizes the region that the centre crop keeps, with Pillow's triangle filter and sizes. On a CPU the
  decoded pixels are Pillow's; after resizing they differ by rounding, and at the border of the image by how
  a filter that reaches outside is cut (DALI repeats the edge, Pillow drops what is outside).
- On a GPU nvJPEG decodes with the same chroma upsampling, by one of two decoders that need not agree in the last bits:
  its CUDA decoder, which every GPU has, or the JPEG engine that some have (`ENGINES`). A share of the batch for each,
  as DALI has it by default, would make an image depend on its neighbours. So a run takes one of them, and which one
  is a part of the arithmetic: `dali` and `dali-hw` are two loaders, and a run that began with one goes on with it on
  any machine or is refused. Left alone, a run takes `dali`, which it can continue anywhere. The engine takes what it
  can, baseline files, and the CUDA decoder the others, such as progressive ones: again by the file's bytes alone.

`MACHINES` tells what is done where.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ddfast.data.decoding import centre_offsets, decode_fit, encode_image, fitted_size, pixel_limit
from ddfast.data.jpeg import PlainJpeg, plain_jpeg
from ddfast.data.loading import Loaded, checked_workers, in_order
from ddfast.data.native_jpeg import suits
from ddfast.errors import BadImage, DDFastError, one_line

if TYPE_CHECKING:
    from ddfast.data.loading import Load
    from ddfast.data.samples import Sample
    from ddfast.data.sources import Source

MACHINES = (
    ("", "CPU", "GPU", "GPU with a JPEG engine"),
    ("loader", "dali", "dali", "dali-hw, where asked for"),
    ("decodes", "libjpeg-turbo", "nvJPEG in CUDA", "the engine; nvJPEG in CUDA what it does not take"),
    (
        "images a batch",
        "a quarter of those ahead, 2 a thread or more, 128 or less",
        *2 * ("a quarter of those ahead, 16 MiB or more, 128 or less",),
    ),
    ("batches in flight", *3 * ("2, each in a pipeline of its own with half of the threads",)),
    ("images end up", "on the host", *2 * ("on the GPU in the score pass, else on the host",)),
)
"""What DALI does on each kind of machine: a table, its first row the heading."""

ENGINES = ((8, 0), (9, 0), (10, 0), (10, 3))
"""Compute capabilities of the GPUs with an engine for JPEG: A100 and A30, H100 and H200, B200, B300."""

_MAX_BATCH = 128
_LEAST_BYTES = 16 << 20  # of decoded images in a GPU's batch: less would leave it waiting for the host
_LEAST_A_THREAD = 2  # images of a batch on the CPU: fewer would leave threads waiting for the slowest
_IN_FLIGHT = 2  # batches: one decodes while the other is fed, copied out and waited for


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A plain JPEG on its way to DALI."""

    data: bytes
    jpeg: PlainJpeg


_Read = tuple["Sample", "Tensor | BadImage | _Encoded"]


def dali_load(device: str | None, *, engine: bool = False, on_device: bool = False) -> Load:
    """`load` through DALI, decoding on a GPU, "cuda" or "cuda:1", or on the CPU where it is None.

    Args:
        device: where it decodes.
        engine: decode by the GPU's JPEG engine what that takes.
        on_device: leave the images on the GPU; those that Pillow decodes are brought there.
    """

    def load(
        source: Source,
        samples: Iterable[Sample],
        size: int,
        *,
        resize: int | None = None,
        workers: int | None = None,
        ahead: int = 64,
        max_pixels: int | None = None,
    ) -> Generator[Loaded, None, None]:
        """As `ddfast.data.loading.load`; where `ahead` is less than four batches (`MACHINES`), it counts as four."""
        workers = checked_workers(size, resize, workers, ahead)
        limit = pixel_limit() if max_pixels is None else max_pixels
        batch_size = _batch_size(size, ahead, workers, on_gpu=device is not None)

        def read(sample: Sample) -> _Read:
            try:
                data = source.read(sample)
                jpeg = plain_jpeg(data)
                if jpeg is not None and suits(jpeg, limit):
                    return sample, _Encoded(data, jpeg)
                return sample, decode_fit(data, size, resize, max_pixels=limit)
            except BadImage as error:
                return sample, error

        count = min(_IN_FLIGHT, max(workers, 1))  # with a single thread there is one pipeline
        threads = max(workers // count, 1)
        decoders = [
            _Decoder(size, resize, batch_size, threads, _index(device), limit, engine, on_device)
            for _ in range(count)
        ]
        reads = in_order(read, samples, workers, max(ahead - (_IN_FLIGHT + 1) * batch_size, batch_size))
        return _batches(decoders, reads, batch_size)

    return load


def _batch_size(size: int, ahead: int, workers: int, *, on_gpu: bool) -> int:
    """Images decoded together: a quarter of those ahead, but not so few that the decoder would wait."""
    least = _LEAST_BYTES // (3 * size * size) if on_gpu else _LEAST_A_THREAD * workers
    return max(1, min(max(ahead // 4, least), _MAX_BATCH))


def has_engine(device: str) -> bool:
    """Whether a GPU, "cuda" or "cuda:1", has an engine for JPEG; False where there is no such GPU."""
    if torch.device(device).type != "cuda":
        return False
    try:
        return torch.cuda.get_device_capability(torch.device(device)) in ENGINES
    except (RuntimeError, AssertionError):  # no driver, no such device, a torch without CUDA
        return False


def _index(device: str | None) -> int | None:
    if device is None:
        return None
    number = device.partition(":")[2]
    return int(number) if number else torch.cuda.current_device()


def _gpu(index: int) -> torch.device:
    return torch.device("cuda", index)


def _batches(
    decoders: Sequence[_Decoder], reads: Generator[_Read, None, None], batch_size: int
) -> Generator[Loaded, None, None]:
    """Batches decode in threads of their own and are handed out in order, while the next ones decode."""
    free: SimpleQueue[_Decoder] = SimpleQueue()
    for decoder in decoders:
        free.put(decoder)

    def decode(batch: Sequence[_Read]) -> list[Loaded]:
        decoder = free.get()
        try:
            return decoder.decode(batch)
        finally:
            free.put(decoder)

    runner = ThreadPoolExecutor(len(decoders), thread_name_prefix="ddfast-decode-dali")
    running: deque[Future[list[Loaded]]] = deque()
    try:
        while True:
            while len(running) < _IN_FLIGHT and (batch := list(islice(reads, batch_size))):
                running.append(runner.submit(decode, batch))
            if not running:
                return
            for sample, image in running.popleft().result():
                _keep_for_consumer(image)
                yield sample, image
    finally:
        reads.close()
        runner.shutdown(wait=True, cancel_futures=True)
        for decoder in decoders:
            decoder.close()


def _keep_for_consumer(image: Tensor | BadImage) -> None:
    """Tell the allocator that an image made on a decoder's stream is read on the consumer's.

    Without it the memory could be given to the next batch while kernels that read the image are still queued.
    """
    if isinstance(image, Tensor) and image.is_cuda:
        image.record_stream(torch.cuda.current_stream(image.device))


class _Decoder:
    """A pipeline of one size of image, built when first needed and again after each failure."""

    def __init__(
        self,
        size: int,
        resize: int | None,
        batch_size: int,
        threads: int,
        device: int | None,
        max_pixels: int,
        engine: bool = False,
        on_device: bool = False,
    ) -> None:
        self.size, self.resize, self.batch_size = size, resize, batch_size
        self.threads, self.device, self.max_pixels = threads, device, max_pixels
        self.engine, self.on_device = engine, on_device and device is not None
        self._pipeline: Any = None
        self._stream: torch.cuda.Stream | None = None

    def close(self) -> None:
        """End the pipeline's threads."""
        self._pipeline = None

    def decode(self, batch: Sequence[_Read]) -> list[Loaded]:
        """The batch with every encoded image decoded, in the same order."""
        waiting = [image for _, image in batch if isinstance(image, _Encoded)]
        decoded: Iterator[Tensor | BadImage] = iter(self._images(waiting) if waiting else ())
        return [
            (sample, next(decoded) if isinstance(image, _Encoded) else self._placed(image))
            for sample, image in batch
        ]

    def _images(self, encoded: Sequence[_Encoded]) -> Sequence[Tensor | BadImage]:
        try:
            return self._run(encoded)
        except RuntimeError:  # what DALI raises when a file cannot be decoded; the pipeline is lost with it
            self._pipeline = None
        if len(encoded) > 1:
            return [image for one in encoded for image in self._images([one])]
        self._check()
        try:
            image = decode_fit(encoded[0].data, self.size, self.resize, max_pixels=self.max_pixels)
            return [self._placed(image)]
        except BadImage as error:
            return [error]

    def _check(self) -> None:
        """Decode an image that is good: DALI may fail for reasons that lie in no file."""
        try:
            self._run([_good_jpeg()])
        except RuntimeError as error:
            raise DDFastError(
                f"DALI fails on a good image ({one_line(error)}): use --loader pillow"
            ) from error

    def _run(self, encoded: Sequence[_Encoded]) -> list[Tensor | BadImage]:
        if self._pipeline is None:
            self._pipeline = self._built()
        regions = np.array([self._region(one.jpeg) for one in encoded], np.float32)
        self._pipeline.feed_input("encoded", [np.frombuffer(one.data, np.uint8) for one in encoded])
        self._pipeline.feed_input("start", list(regions[:, 0]))
        self._pipeline.feed_input("end", list(regions[:, 1]))
        (images,) = self._pipeline.run()  # which waits for the images, on the host
        if self.on_device:
            return list(self._copied(images.as_tensor()))
        if self.device is not None:
            images = images.as_cpu()
        pixels = torch.from_numpy(np.array(images.as_tensor()))  # [n, size, size, 3], a copy
        return list(pixels.permute(0, 3, 1, 2).contiguous())

    def _copied(self, images: Any) -> Tensor:
        """Images [n, size, size, 3] in DALI's memory, which the next batch overwrites, as [n, 3, size, size] in ours.

        On a stream of the decoder's own: on the default one the copy would queue behind the model's work.
        """
        with self._on_own_stream():
            pixels = torch.from_dlpack(images)
            return pixels.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)

    def _placed(self, image: Tensor | BadImage) -> Tensor | BadImage:
        """An image of Pillow's where DALI's are."""
        if not self.on_device or self.device is None or isinstance(image, BadImage):
            return image
        with self._on_own_stream():
            return image.to(_gpu(self.device))

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """Context of work on the decoder's stream, which is waited for at its end."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def _region(self, jpeg: PlainJpeg) -> list[list[float]]:
        """[[y0, x0], [y1, x1]]: the part of the image that `fit` keeps, in its pixels."""
        width, height = fitted_size(
            jpeg.width, jpeg.height, self.size if self.resize is None else self.resize
        )
        left, top = centre_offsets(width, height, self.size)
        down, across = jpeg.height / height, jpeg.width / width
        return [[top * down, left * across], [(top + self.size) * down, (left + self.size) * across]]

    def _built(self) -> Any:
        dali: Any = importlib.import_module(
            "nvidia.dali"
        )  # typed Any: checked where DALI is not installed, too
        fn: Any = importlib.import_module("nvidia.dali.fn")
        types: Any = importlib.import_module("nvidia.dali.types")
        on_gpu = self.device is not None
        pipeline = dali.Pipeline(
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=self.device,
            prefetch_queue_depth=1,  # each batch is waited for, in a thread of its own; the other pipeline goes on
            exec_dynamic=False,
        )
        load = 1.0 if self.engine else 0.0  # a share between them would depend on an image's neighbours
        options = {"hw_decoder_load": load, "jpeg_fancy_upsampling": True} if on_gpu else {}
        with pipeline:
            image = fn.decoders.image(
                fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                **options,
            )
            image = fn.resize(
                image,
                size=[self.size, self.size],
                roi_start=fn.external_source(name="start", dtype=types.FLOAT, ndim=1),
                roi_end=fn.external_source(name="end", dtype=types.FLOAT, ndim=1),
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            pipeline.set_outputs(image)
        pipeline.build()
        return pipeline


def _good_jpeg() -> _Encoded:
    data = encode_image(torch.full((3, 16, 16), 128, dtype=torch.uint8), "jpeg")
    return _Encoded(data, PlainJpeg(16, 16))
