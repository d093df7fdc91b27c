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
- On a GPU nvJPEG decodes with the same chroma upsampling; the hardware decoder is left out, because which
  files it gets depends on the batch and its rounding is its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ddfast.data.decoding import centre_offsets, decode_fit, fitted_size, pixel_limit
from ddfast.data.distilled import encode_image
from ddfast.data.jpeg import PlainJpeg, plain_jpeg
from ddfast.data.loading import Loaded, checked_workers, in_order
from ddfast.data.native_jpeg import suits
from ddfast.data.sources import one_line
from ddfast.errors import BadImage, DDFastError

if TYPE_CHECKING:
    from ddfast.data.loaders import Load
    from ddfast.data.samples import Sample
    from ddfast.data.sources import Source

_MAX_BATCH = 128
_IN_FLIGHT = 2  # batches: one decodes while the last one is handed out


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A plain JPEG on its way to DALI."""

    data: bytes
    jpeg: PlainJpeg


_Read = tuple["Sample", "Tensor | BadImage | _Encoded"]


def dali_load(device: str | None) -> Load:
    """`load` through DALI, decoding on a GPU, "cuda" or "cuda:1", or on the CPU where it is None."""

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
        """As `ddfast.data.loading.load`; `ahead` below 4 counts as 4."""
        workers = checked_workers(size, resize, workers, ahead)
        limit = pixel_limit() if max_pixels is None else max_pixels
        batch_size = max(1, min(ahead // 4, _MAX_BATCH))

        def read(sample: Sample) -> _Read:
            try:
                data = source.read(sample)
                jpeg = plain_jpeg(data)
                if jpeg is not None and suits(jpeg, limit):
                    return sample, _Encoded(data, jpeg)
                return sample, decode_fit(data, size, resize, max_pixels=limit)
            except BadImage as error:
                return sample, error

        decoder = _Decoder(size, resize, batch_size, max(workers, 1), _index(device), limit)
        reads = in_order(read, samples, workers, max(ahead - (_IN_FLIGHT + 1) * batch_size, 1))
        return _batches(decoder, reads, batch_size)

    return load


def _index(device: str | None) -> int | None:
    if device is None:
        return None
    number = device.partition(":")[2]
    return int(number) if number else torch.cuda.current_device()


def _batches(
    decoder: _Decoder, reads: Generator[_Read, None, None], batch_size: int
) -> Generator[Loaded, None, None]:
    """Batches decode in a thread of their own, in order, while earlier ones are handed out."""
    with ThreadPoolExecutor(1, thread_name_prefix="ddfast-decode-dali") as runner:
        running: list[Future[list[Loaded]]] = []
        try:
            while True:
                while len(running) < _IN_FLIGHT and (batch := list(islice(reads, batch_size))):
                    running.append(runner.submit(decoder.decode, batch))
                if not running:
                    return
                yield from running.pop(0).result()
        finally:
            for future in running:
                future.cancel()
            reads.close()
            runner.submit(decoder.close)


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
    ) -> None:
        self.size, self.resize, self.batch_size = size, resize, batch_size
        self.threads, self.device, self.max_pixels = threads, device, max_pixels
        self._pipeline: Any = None

    def close(self) -> None:
        """End the pipeline's threads."""
        self._pipeline = None

    def decode(self, batch: Sequence[_Read]) -> list[Loaded]:
        """The batch with every encoded image decoded, in the same order."""
        waiting = [image for _, image in batch if isinstance(image, _Encoded)]
        decoded: Iterator[Tensor | BadImage] = iter(self._images(waiting) if waiting else ())
        return [(sample, next(decoded) if isinstance(image, _Encoded) else image) for sample, image in batch]

    def _images(self, encoded: Sequence[_Encoded]) -> Sequence[Tensor | BadImage]:
        try:
            return self._run(encoded)
        except RuntimeError:  # what DALI raises when a file cannot be decoded; the pipeline is lost with it
            self._pipeline = None
        if len(encoded) > 1:
            return [image for one in encoded for image in self._images([one])]
        self._check()
        try:
            return [decode_fit(encoded[0].data, self.size, self.resize, max_pixels=self.max_pixels)]
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
        (images,) = self._pipeline.run()
        if self.device is not None:
            images = images.as_cpu()
        pixels = torch.from_numpy(np.array(images.as_tensor()))  # [n, size, size, 3], a copy
        return list(pixels.permute(0, 3, 1, 2).contiguous())

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
            prefetch_queue_depth=1,  # each batch is waited for, in a thread of its own
            exec_dynamic=False,
        )
        options = {"hw_decoder_load": 0.0, "jpeg_fancy_upsampling": True} if on_gpu else {}
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
