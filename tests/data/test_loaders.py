"""The three loaders: what each returns, how far apart their pixels and the crops chosen from them are."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ddfast.data import dali, loaders
from ddfast.data.decoding import decode_fit, fit
from ddfast.data.jpeg import PlainJpeg, plain_jpeg
from ddfast.data.loaders import LOADERS, Loader, dali_missing, resolve_loader
from ddfast.data.loading import load_all
from ddfast.data.native_jpeg import torchvision_decodes
from ddfast.data.opening import open_source
from ddfast.data.samples import Sample
from ddfast.data.sources import Source
from ddfast.errors import BadImage, DDFastError, UsageError
from tests.data.rendering import encoded, png, smooth

PHOTOGRAPHS = Path(__file__).parents[2].parent / "shared" / "data" / "clothing10.zip"

needs_dali = pytest.mark.skipif(dali_missing() is not None, reason="DALI is not installed")
needs_native = pytest.mark.skipif(not torchvision_decodes(), reason="this torchvision has no JPEG decoder")
FAST = [pytest.param("dali", marks=needs_dali), pytest.param("torchvision", marks=needs_native)]
# Grey levels: mean over an image, largest inside, largest in the outermost two rows and columns.
BOUNDS = {"dali": (0.5, 4, 24), "torchvision": (0.05, 1, 1)}


class MemorySource(Source):
    """Images in memory, all of one class or another."""

    def __init__(self, images: dict[str, bytes]) -> None:
        super().__init__("memory", "train", ["a", "b"], [(key, int(key[0] == "b")) for key in images])
        self.images = images

    def read(self, sample: Sample) -> bytes:
        if self.images[sample.key] == b"gone":
            raise UsageError("the source has gone away")
        return self.images[sample.key]

    def size_of(self, sample: Sample) -> int:
        return len(self.images[sample.key])

    def close(self) -> None:
        self.images = {}


def jpeg(seed: int = 0, width: int = 60, height: int = 45, **options: object) -> bytes:
    return encoded(Image.fromarray(smooth(width, height, seed)), "JPEG", **{"quality": 92, **options})


def with_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return jpeg(exif=exif)


def every_kind() -> dict[str, bytes]:
    """Files of every kind that is a sample, most of which only Pillow reads."""
    picture = Image.fromarray(smooth(40, 30))
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    return {
        "a/plain.jpg": jpeg(),
        "a/progressive.jpg": jpeg(progressive=True),
        "a/optimised.jpg": jpeg(optimize=True, restart_marker_blocks=2),
        "a/full-colour.jpg": jpeg(subsampling=0),
        "a/half-colour.jpg": jpeg(subsampling=1),
        "a/gray.jpg": encoded(picture.convert("L"), "JPEG"),
        "a/cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "a/rgb.jpg": encoded(picture, "JPEG", keep_rgb=True),
        "a/trailing.jpg": jpeg() + b"\0\0rubbish",
        "a/strip.jpg": encoded(Image.fromarray(smooth(400, 10)), "JPEG"),
        "a/small.jpg": encoded(Image.fromarray(smooth(9, 7)), "JPEG"),
        **{f"a/turned{value}.jpg": with_orientation(value) for value in range(1, 9)},
        "b/palette.gif": encoded(picture.convert("P"), "GIF"),
        "b/palette.png": encoded(picture.convert("P"), "PNG"),
        "b/sixteen.png": encoded(Image.fromarray(deep), "PNG"),
        "b/alpha.png": encoded(picture.convert("RGBA"), "PNG"),
        "b/x.webp": encoded(picture, "WEBP"),
        "b/x.tiff": encoded(picture, "TIFF"),
        "b/x.bmp": encoded(picture, "BMP"),
        "b/x.ppm": encoded(picture, "PPM"),
        "b/jpeg-called.png": jpeg(3),
    }


def damaged() -> dict[str, bytes]:
    """Files that cannot be decoded, each in another way."""
    whole = jpeg(1, 200, 150)
    marker_inside = bytearray(whole)
    marker_inside[-400:-398] = b"\xff\x3a"
    no_tables = whole.replace(b"\xff\xdb", b"\xff\xfe")  # quantisation tables turned into comments
    other_component = bytearray(whole)  # the scan names a component that the frame has not
    other_component[whole.index(b"\xff\xda") + 5] = 67
    return {
        "a/empty.jpg": b"",
        "a/text.jpg": b"not an image",
        "a/cut.jpg": whole[: len(whole) // 2],
        "a/header.jpg": whole[:100],
        "a/marker.jpg": bytes(marker_inside),
        "b/scan.jpg": bytes(other_component),
        "b/tables.jpg": no_tables,
        "b/cut.png": png(9)[:60],
    }


def results(name: str, images: dict[str, bytes], size: int = 24, **options: int) -> dict[str, object]:
    source = MemorySource(images)
    return {
        sample.key: image for sample, image in resolve_loader(name)(source, source.samples, size, **options)
    }


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ddfast-decode")]


def assert_near(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    mean, inside, border = BOUNDS[name]
    assert found.dtype == torch.uint8
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    gap = (found.int() - wanted.int()).abs()
    assert gap.float().mean() <= mean
    assert gap[:, 2:-2, 2:-2].max() <= inside
    assert gap.max() <= border


# Choosing


def test_auto_on_a_cpu_is_the_same_with_and_without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = resolve_loader("auto", "cpu")
    monkeypatch.setattr(loaders, "dali_missing", lambda: "DALI is not installed")
    assert resolve_loader("auto", "cpu") == chosen or resolve_loader("auto", "cpu").name == chosen.name
    assert chosen.name == ("torchvision" if torchvision_decodes() else "pillow")
    assert chosen.reason


def test_auto_on_a_gpu_is_dali_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "dali_missing", lambda: None)
    chosen = resolve_loader("auto", "cuda:1")
    assert (chosen.name, "GPU" in chosen.reason) == ("dali", True)
    monkeypatch.setattr(loaders, "dali_missing", lambda: "DALI is not installed")
    chosen = resolve_loader("auto", torch.device("cuda", 0))
    assert chosen.name in ("torchvision", "pillow")
    assert "nvidia-dali-cuda130" in chosen.reason


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "dali_missing", lambda: "DALI is not installed")
    with pytest.raises(UsageError, match=r"DALI is not installed; pip install nvidia-dali-cuda130"):
        resolve_loader("dali")
    with pytest.raises(
        UsageError, match="--loader must be one of auto, dali, dali-hw, torchvision, pillow, got 'ffmpeg'"
    ):
        resolve_loader("ffmpeg")


def test_without_a_jpeg_decoder_pillow_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddfast.data import native_jpeg

    monkeypatch.setattr(native_jpeg, "torchvision_decodes", lambda: False)
    assert resolve_loader("auto").name == "pillow"
    with pytest.raises(UsageError, match="built without JPEG"):
        resolve_loader("torchvision")


def test_every_name_resolves_to_a_loader() -> None:
    for name in LOADERS:
        if name == "dali-hw" or (name == "dali" and dali_missing()):
            continue
        assert isinstance(resolve_loader(name), Loader)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_a_jpeg_engine_that_is_not_there_is_said_in_one_line(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run names its loader: on a GPU without the engine its bytes would be others."""
    monkeypatch.setattr(loaders, "dali_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(
        UsageError, match="use --loader dali; a run that began with dali-hw goes on"
    ) as caught:
        resolve_loader("dali-hw", device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("capability", "found"), [((9, 0), True), ((8, 0), True), ((8, 6), False)])
def test_the_engine_is_taken_where_it_is_asked_for_and_there(
    capability: tuple[int, int], found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "dali_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dali.has_engine("cuda:1") is found
    assert resolve_loader("auto", "cuda").name == "dali"  # whatever the GPU has: any other can go on
    if found:
        assert resolve_loader("dali-hw", "cuda").name == "dali-hw"


def test_without_a_gpu_there_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(device: object) -> tuple[int, int]:
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "get_device_capability", none)
    assert not dali.has_engine("cuda")


@pytest.mark.parametrize("name", LOADERS)
def test_the_command_line_takes_every_loader(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from ddfast.cli import main

    arguments = ["--data", "/nowhere", "--teacher", "none", "--ipc", "1", "--out", "/nowhere/out"]
    assert main(["score", "random", *arguments, "--loader", name]) == 2
    assert "no teacher file" in capsys.readouterr().err


# Same images


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_file_gives_pillows_image(name: str, workers: int) -> None:
    images = every_kind()
    found = results(name, images, workers=workers)
    assert found.keys() == images.keys()
    plain = 0
    for key, image in found.items():
        assert isinstance(image, torch.Tensor), key
        wanted = decode_fit(images[key], 24)
        if plain_jpeg(images[key]) is None:
            assert torch.equal(image, wanted), key
        else:
            plain += 1
            assert_near(image, wanted, name)
    assert plain >= 8


@pytest.mark.parametrize("name", FAST)
def test_an_image_of_the_right_size_is_exact(name: str) -> None:
    images = {f"a/{n}.jpg": jpeg(n, 24, 24) for n in range(4)}
    for key, image in results(name, images).items():
        assert torch.equal(image, decode_fit(images[key], 24))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("resize", [None, 30])
def test_resizing_then_cutting_agrees(name: str, resize: int | None) -> None:
    images = {
        f"a/{n}.jpg": jpeg(n, *shape) for n, shape in enumerate([(61, 47), (33, 90), (50, 50), (25, 31)])
    }
    for key, image in results(name, images, resize=resize).items():
        assert_near(image, decode_fit(images[key], 24, resize), name)


@pytest.mark.parametrize("name", FAST)
def test_damaged_files_take_their_place_with_pillows_reasons(name: str) -> None:
    images = every_kind() | damaged()
    found, wanted = results(name, images), results("pillow", images)
    assert [key for key, image in found.items() if isinstance(image, BadImage)] == sorted(damaged())
    for key in damaged():
        assert str(found[key]) == str(wanted[key])


@pytest.mark.parametrize("name", FAST)
def test_an_image_does_not_depend_on_its_neighbours(name: str) -> None:
    images = every_kind() | damaged()
    together = results(name, images, ahead=256)
    for ahead in (1, 9):
        apart = results(name, images, ahead=ahead)
        for key, image in together.items():
            if isinstance(image, torch.Tensor):
                assert torch.equal(image, apart[key])  # type: ignore[arg-type]
            else:
                assert str(image) == str(apart[key])


@needs_dali
def test_a_file_that_breaks_the_pipeline_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check of markers, DALI itself meets the damaged files."""
    images = {f"a/{n:02d}.jpg": jpeg(n) for n in range(20)}
    images |= {f"b/{n:02d}.jpg": jpeg(n, 200, 150)[:1500] for n in range(3)}
    monkeypatch.setattr(dali, "plain_jpeg", lambda data: PlainJpeg(60, 45))
    for key, image in results("dali", images, ahead=64).items():
        if key.startswith("a"):
            assert isinstance(image, torch.Tensor)
            assert_near(image, decode_fit(images[key], 24), "dali")
        else:
            assert str(image) == "truncated"


@needs_dali
def test_dali_failing_on_good_images_is_no_fault_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[torch.Tensor]:
        raise RuntimeError("CUDA out of memory\non a second line")

    monkeypatch.setattr(dali._Decoder, "_run", broken)
    with pytest.raises(DDFastError, match=r"DALI fails on a good image .* use --loader pillow") as caught:
        results("dali", {"a/0.jpg": jpeg()})
    assert not isinstance(caught.value, UsageError)
    assert "\n" not in str(caught.value)


# Batches, and a GPU that is not there


@pytest.mark.parametrize(
    ("size", "ahead", "workers", "on_gpu", "batch"),
    [
        (224, 64, 2, False, 16),
        (224, 1, 2, False, 4),  # two a thread
        (224, 1, 0, False, 1),
        (224, 4096, 2, False, 128),
        (224, 1, 16, True, 111),  # 16 MiB
        (224, 512, 16, True, 128),
        (32, 1, 16, True, 128),
        (1024, 64, 16, True, 16),
        (4096, 1, 16, True, 1),
    ],
)
def test_a_batch_is_large_enough_for_its_decoder(
    size: int, ahead: int, workers: int, on_gpu: bool, batch: int
) -> None:
    assert dali._batch_size(size, ahead, workers, on_gpu=on_gpu) == batch


def test_two_batches_decode_at_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=30)
    made, used = [], set()

    def decode(self: dali._Decoder, batch: list) -> list:
        used.add(self)
        both.wait()  # until the other batch decodes too
        return [(sample, torch.zeros(1)) for sample, _ in batch]

    init = dali._Decoder.__init__

    def counted(self: dali._Decoder, *args: object) -> None:
        init(self, *args)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(dali._Decoder, "__init__", counted)
    monkeypatch.setattr(dali._Decoder, "decode", decode)
    source = MemorySource({f"a/{n:02d}.jpg": jpeg(n) for n in range(16)})
    found = list(dali.dali_load(None)(source, source.samples, 16, workers=2, ahead=16))
    assert [sample.key for sample, _ in found] == [sample.key for sample in source.samples]
    assert (len(made), len(used), [decoder.threads for decoder in made]) == (2, 2, [1, 1])
    assert decoding_threads() == []


class _Images:
    """A list of images as DALI gives it, on the GPU until it is asked for on the CPU."""

    def __init__(self, images: np.ndarray, moved: list[str]) -> None:
        self.images, self.moved = images, moved

    def as_cpu(self) -> SimpleNamespace:
        self.moved.append("to the host")
        return SimpleNamespace(as_tensor=lambda: self.images)

    def as_tensor(self) -> torch.Tensor:
        return torch.from_numpy(self.images)


class _Dali:
    """Stands in for NVIDIA DALI and for CUDA's streams; Pillow decodes, and files of 13 bytes fail."""

    UINT8 = FLOAT = RGB = INTERP_LINEAR = 0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.options: list[dict[str, object]] = []
        self.moved: list[str] = []
        self.waits = 0
        monkeypatch.setattr(dali.importlib, "import_module", lambda name: self)
        monkeypatch.setattr(dali, "_index", lambda device: 0)
        monkeypatch.setattr(dali, "_gpu", lambda index: torch.device("meta"))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        self.decoders = self

    def synchronize(self) -> None:
        self.waits += 1

    def external_source(self, **options: object) -> None: ...

    def image(self, data: object, **options: object) -> None:
        self.options.append(options)

    def resize(self, image: object, **options: object) -> None:
        self.size = options["size"][0]  # type: ignore[index]

    def Pipeline(self, **options: object) -> _Dali:
        return self

    def __enter__(self) -> _Dali:
        return self

    def __exit__(self, *raised: object) -> None: ...

    def set_outputs(self, *outputs: object) -> None: ...

    def build(self) -> None: ...

    def feed_input(self, name: str, data: list) -> None:
        if name == "encoded":
            self.fed = [bytes(one) for one in data]

    def run(self) -> tuple[_Images]:
        if any(len(data) == 13 for data in self.fed):
            raise RuntimeError("cannot decode")
        # The memory of the last batch, written over.
        if not hasattr(self, "memory") or len(self.memory) < len(self.fed):
            self.memory = np.zeros((8, self.size, self.size, 3), np.uint8)
        for place, data in enumerate(self.fed):
            self.memory[place] = decode_fit(data, self.size).permute(1, 2, 0).numpy()
        return (_Images(self.memory[: len(self.fed)], self.moved),)


def on_stand_in(images: dict[str, bytes], stand_in: _Dali, size: int, **options: bool) -> dict[str, object]:
    source = MemorySource(images)
    load = dali.dali_load("cuda", **options)
    return {sample.key: image for sample, image in load(source, source.samples, size, workers=1, ahead=8)}


@pytest.mark.parametrize("engine", [False, True])
def test_which_decoder_of_the_gpu_takes_a_file_is_fixed(
    engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = _Dali(monkeypatch)
    on_stand_in({"a/0.jpg": jpeg()}, stand_in, 24, engine=engine)
    (options,) = stand_in.options
    assert options["device"] == "mixed"
    assert options["hw_decoder_load"] == (
        1.0 if engine else 0.0
    )  # all or nothing, never a share of the batch
    assert options["jpeg_fancy_upsampling"] is True


@pytest.mark.parametrize("size", [24, 1])
def test_images_stay_on_the_gpu_where_the_consumer_is_there(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dali, "_LEAST_BYTES", 0)  # batches of 2: the second is written over the first
    stand_in = _Dali(monkeypatch)
    images = {f"a/{n}.jpg": jpeg(n) for n in range(5)}
    found = on_stand_in(images, stand_in, size, on_device=True)
    for key, image in found.items():
        assert torch.equal(image, decode_fit(images[key], size))  # type: ignore[arg-type]
        assert image.is_contiguous()  # type: ignore[attr-defined]
    assert (stand_in.moved, stand_in.waits) == ([], 3)
    assert on_stand_in(images, stand_in, size).keys() == images.keys()
    assert stand_in.moved == ["to the host"] * 3


def test_what_pillow_decodes_is_brought_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = _Dali(monkeypatch)
    monkeypatch.setattr(dali, "plain_jpeg", lambda data: PlainJpeg(60, 45) if data[:1] == b"\xff" else None)
    broken = b"\xff" + b"no picture.."  # DALI fails on it, and so does Pillow
    images = {"a/0.jpg": jpeg(), "a/1.png": png(3), "a/2.jpg": broken, "a/3.png": b"not an image"}
    assert len(broken) == 13
    found = on_stand_in(images, stand_in, 24, on_device=True)
    kinds = [image.device.type if isinstance(image, torch.Tensor) else "bad" for image in found.values()]
    assert kinds == ["cpu", "meta", "bad", "bad"]  # "meta" stands for the GPU
    assert [image.device.type for image in on_stand_in({"a/1.png": png(3)}, stand_in, 24).values()] == ["cpu"]  # type: ignore[attr-defined]


def test_the_consumers_stream_holds_an_image_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]
        held: object = None

        def record_stream(self, stream: object) -> None:
            self.held = stream

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the consumer's")
    image = torch.zeros(3).as_subclass(OnGpu)
    dali._keep_for_consumer(image)
    assert image.held == "the consumer's"
    dali._keep_for_consumer(torch.zeros(3))
    dali._keep_for_consumer(BadImage("truncated"))


def test_only_a_gpu_keeps_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "dali_missing", lambda: None)
    for name, device in (("pillow", "cuda"), ("dali", "cpu")):
        chosen = resolve_loader(name, device)
        assert chosen.on_device() is chosen
    on_gpu = resolve_loader("dali", "cuda")
    assert on_gpu.on_device().load is on_gpu.load_on_device is not on_gpu.load


def test_the_table_of_machines_is_whole() -> None:
    assert {len(row) for row in dali.MACHINES} == {4}


@pytest.mark.parametrize("name", FAST)
def test_the_pixel_limit_holds(name: str) -> None:
    images = {"a/big.jpg": jpeg(0, 80, 60), "b/small.jpg": jpeg(0, 40, 30)}
    found = results(name, images, max_pixels=4000)
    assert str(found["a/big.jpg"]).startswith("too large: 80x60 is more than the limit of 4000 pixels")
    assert isinstance(found["b/small.jpg"], torch.Tensor)


# As a generator


@pytest.mark.parametrize("name", FAST)
def test_order_closing_and_endless_samples(name: str) -> None:
    source = MemorySource({f"a/{n}.jpg": jpeg(n) for n in range(5)})
    drawn = 0

    def endless() -> Iterator[Sample]:
        nonlocal drawn
        while True:
            drawn += 1
            yield source.samples[drawn % 5]

    running = resolve_loader(name)(source, endless(), 16, workers=2, ahead=16)
    keys = [next(running)[0].key for _ in range(33)]
    assert keys == [source.samples[n % 5].key for n in range(1, 34)]
    running.close()
    assert drawn <= 33 + 2 * 16
    assert decoding_threads() == []


@pytest.mark.parametrize("name", FAST)
def test_a_source_that_goes_ends_it(name: str) -> None:
    images = {f"a/{n:02d}.jpg": jpeg(n) for n in range(20)} | {"b/0.jpg": b"gone"}
    with pytest.raises(UsageError, match="the source has gone away"):
        results(name, images)
    assert decoding_threads() == []


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("options", [{"size": 0}, {"size": 4, "resize": 3}, {"size": 4, "workers": -1}])
def test_arguments_are_checked_first(name: str, options: dict[str, int]) -> None:
    source = MemorySource({"a/0.jpg": jpeg(), "b/0.jpg": jpeg()})
    with pytest.raises(ValueError, match="must be at least"):
        resolve_loader(name)(source, source.samples, **options)


@pytest.mark.parametrize("name", FAST)
def test_a_split_is_loaded_into_memory_by_the_loader_given(name: str) -> None:
    images = every_kind() | damaged()
    source = MemorySource(images)
    found, labels, bad = load_all(source, 24, loader=resolve_loader(name))
    kept = [sample for sample in source.samples if sample.key not in damaged()]
    assert labels.tolist() == [sample.label for sample in kept]
    assert [sample.key for sample, _ in bad] == sorted(damaged())
    one_by_one = results(name, images)
    for image, sample in zip(found, kept, strict=True):
        assert torch.equal(image, one_by_one[sample.key])  # type: ignore[arg-type]


# Plain JPEGs


def test_what_is_plain() -> None:
    plain = {key for key, data in every_kind().items() if plain_jpeg(data) is not None}
    assert plain == {
        *(f"a/{kind}.jpg" for kind in ("plain", "progressive", "optimised", "full-colour", "half-colour")),
        *("a/gray.jpg", "a/trailing.jpg", "a/strip.jpg", "a/small.jpg", "a/turned1.jpg", "b/jpeg-called.png"),
    }
    assert plain_jpeg(jpeg(0, 60, 45)) == PlainJpeg(60, 45)
    assert not any(plain_jpeg(data) for key, data in damaged().items() if key != "b/tables.jpg")


@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_never_plain(part: float) -> None:
    for data in (jpeg(), jpeg(progressive=True)):
        assert plain_jpeg(data[: int(len(data) * part)]) is None


def test_any_prefix_or_flip_is_answered() -> None:
    data = bytearray(with_orientation(6))
    for place in range(min(len(data), 700)):
        flipped = data.copy()
        flipped[place] ^= 0xFF
        assert plain_jpeg(bytes(flipped)) is None or isinstance(plain_jpeg(bytes(flipped)), PlainJpeg)
        assert plain_jpeg(bytes(data[:place])) is None


# Crops chosen


@pytest.mark.skipif(not PHOTOGRAPHS.is_file(), reason="no ../shared/data/clothing10.zip beside the checkout")
@pytest.mark.parametrize("name", FAST)
def test_photographs_and_the_crops_chosen_from_them_agree(name: str) -> None:
    """Pixels stay within the bounds, and noisy crops by Shapley values of a network almost all stay in place."""
    import ddfast
    from ddfast.ops import noisy_crop_boxes

    source = open_source(PHOTOGRAPHS)
    samples = source.samples.take(range(0, len(source), len(source) // 32))[:32]
    images = {}
    for loader in ("pillow", name):
        found = [image for _, image in resolve_loader(loader)(source, samples, 64)]
        images[loader] = torch.stack(found)  # type: ignore[arg-type]
    for found, wanted in zip(images[name], images["pillow"], strict=True):
        assert_near(found, wanted, name)
    torch.manual_seed(0)
    model = ddfast.create_model("convnet3", num_classes=10, image_size=64, width=24).eval()
    labels = torch.tensor([sample.label for sample in samples])
    ids = torch.tensor([sample.id for sample in samples])
    boxes = {}
    for loader, batch in images.items():
        phi = ddfast.shapley(model, batch, labels, grid=4, n_samples=32, mean=(0.5,) * 3, std=(0.25,) * 3)
        boxes[loader] = noisy_crop_boxes(phi, ids, seed=0, grid=4, image_size=64, crop_size=32, crops=5)
    same = (boxes[name] == boxes["pillow"]).all(dim=2).float().mean()
    assert same >= 0.97


def test_pictures_in_the_tests_are_what_they_say() -> None:
    assert Image.open(io.BytesIO(every_kind()["a/cmyk.jpg"])).mode == "CMYK"
    assert Image.open(io.BytesIO(every_kind()["b/sixteen.png"])).mode.startswith("I;16")


# Odd files: all loaders agree, or all hand them to Pillow

PACKET = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"%s</x:xmpmeta>'
ATTRIBUTE, ELEMENT = (
    b' tiff:Orientation="%d"/>',
    b"><tiff:Orientation>%d</tiff:Orientation></rdf:Description>",
)


def adobe(transform: int) -> bytes:
    return b"\xff\xee\0\x0eAdobe\0d\0\0\0\0" + bytes([transform])


def with_sampling(data: bytes, factors: int) -> bytes:
    """A JPEG whose first component has other sampling factors, which hold as many blocks."""
    changed = bytearray(data)
    changed[changed.index(b"\xff\xc0") + 11] = factors
    return bytes(changed)


def scan_starts(data: bytes) -> list[int]:
    return [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]


def odd_files() -> dict[str, bytes]:
    """JPEGs that decoders may take differently."""
    square, picture = {"width": 64, "height": 64}, Image.fromarray(smooth(64, 64))
    whole, halved = jpeg(2, **square, subsampling=2), jpeg(2, **square, subsampling=1)
    staged = jpeg(2, **square, progressive=True)
    restarted = jpeg(2, **square, restart_marker_blocks=2)
    third = restarted.index(b"\xff\xd3")
    twice = Image.Exif()
    twice[0x0112] = 1
    exif = twice.tobytes()
    entry = exif.index(b"\x01\x12")
    last_counts = (
        exif[: entry - 1] + b"\2" + exif[entry : entry + 12] + exif[entry : entry + 8] + b"\0\6\0\0\0\0\0\0"
    )
    odd = {f"attribute{n}": jpeg(xmp=PACKET % (ATTRIBUTE % n)) for n in (1, 3, 6, 8)}
    odd |= {f"element{n}": jpeg(xmp=PACKET % (ELEMENT % n)) for n in (1, 2, 5, 7, 9)}
    odd |= {f"exif{n}-xmp6": jpeg(xmp=PACKET % (ATTRIBUTE % 6), exif=orientation(n)) for n in (0, 1, 3, 9)}
    odd |= {
        f"exif{head.hex()}": jpeg(exif=b"Exif\0\0" + head + exif[10:])
        for head in (b"MM\0*", b"MM*\0", b"II\0*")
    }
    odd |= {f"adobe{n}": whole[:20] + adobe(n) + whole[20:] for n in (0, 1, 2)}
    odd |= {
        "exif-twice": jpeg(exif=last_counts),
        "4:1:1": with_sampling(whole, 0x41),
        "4:1:0": with_sampling(whole, 0x14),
        "4:4:0": with_sampling(halved, 0x12),
        "gray": with_sampling(encoded(picture.convert("L"), "JPEG"), 0x22),
        "no-jfif": whole[:2] + whole[20:],
        "cut": whole[: len(whole) * 2 // 3] + b"\xff\xd9",
        "staged-cut": staged[: len(staged) * 9 // 10] + b"\xff\xd9",
        "restart-wrong": restarted[:third] + b"\xff\xd6" + restarted[third + 2 :],
        "restart-gone": restarted[:third] + restarted[third + 2 :],
        "padded": whole[:-2] + b"\0\0\0\xff\xd9",
        "filled": whole.replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
        "twice": whole + halved,
        "profile": jpeg(icc_profile=b"x" * 3000),
        "pictures": encoded(
            Image.fromarray(smooth(64, 64)), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))]
        ),
        "ycck": encoded(picture.convert("CMYK"), "JPEG"),
        "twelve-bits": whole.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
    }
    odd |= {f"scans{n}": staged[: scan_starts(staged)[n]] + b"\xff\xd9" for n in (1, 3, -1)}
    return {f"a/{name}.jpg": data for name, data in odd.items()}


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("name", FAST)
def test_odd_jpegs_give_pillows_image_or_reason(name: str) -> None:
    images = odd_files()
    found, wanted = results(name, images), results("pillow", images)
    for key, image in wanted.items():
        if isinstance(image, BadImage):
            assert str(found[key]) == str(image), key
        elif plain_jpeg(images[key]) is None:
            assert torch.equal(found[key], image), key  # type: ignore[arg-type]
        else:
            assert_near(found[key], image, name)  # type: ignore[arg-type]
    assert isinstance(wanted["a/twelve-bits.jpg"], BadImage)


def test_what_is_turned_or_lacks_scans_is_not_plain() -> None:
    plain = {
        key.removeprefix("a/").removesuffix(".jpg") for key, data in odd_files().items() if plain_jpeg(data)
    }
    assert {"attribute1", "element1", "4:1:1", "4:1:0", "4:4:0", "twice", "pictures", "adobe1"} <= plain
    assert not plain & {
        "attribute3",
        "attribute6",
        "element5",
        "element9",
        "exif1-xmp6",
        "exif3-xmp6",
        "exif-twice",
    }
    assert not plain & {"scans1", "scans3", "scans-1", "adobe0", "adobe2", "ycck", "twelve-bits"}


@pytest.mark.parametrize("name", [*FAST, "pillow"])
def test_orientation_is_what_exif_transpose_makes_of_it(name: str) -> None:
    images = {
        key: data
        for key, data in odd_files().items()
        if "attribute" in key or "element" in key or "exif" in key
    }
    for key, image in results(name, images).items():
        with Image.open(io.BytesIO(images[key])) as opened:
            wanted = fit(ImageOps.exif_transpose(opened).convert("RGB"), 24)
        if name == "pillow":
            assert torch.equal(image, wanted), key  # type: ignore[arg-type]
        else:
            assert_near(image, wanted, name)  # type: ignore[arg-type]
