from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from ddfast.data.decoding import FORMATS, decode, decode_fit, fit
from ddfast.errors import BadImage
from tests.data.rendering import encoded, smooth

RGB = smooth()
HEIGHT, WIDTH, _ = RGB.shape


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def largest_difference(image: torch.Tensor, pixels: np.ndarray) -> int:
    return int((image.int() - as_tensor(pixels).int()).abs().max())


def assert_plain(image: torch.Tensor, height: int = HEIGHT, width: int = WIDTH) -> None:
    assert image.dtype == torch.uint8
    assert image.shape == (3, height, width)
    assert image.is_contiguous()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_exactly(format: str) -> None:
    image = decode(encoded(Image.fromarray(RGB), format))
    assert_plain(image)
    assert torch.equal(image, as_tensor(RGB))


def test_lossless_webp_comes_back_exactly() -> None:
    assert torch.equal(decode(encoded(Image.fromarray(RGB), "WEBP", lossless=True)), as_tensor(RGB))


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "YCbCr"])
def test_jpeg_modes_keep_their_colours(mode: str) -> None:
    data = encoded(Image.fromarray(RGB).convert(mode), "JPEG", quality=100, subsampling=0)
    image = decode(data)
    assert_plain(image)
    assert largest_difference(image, RGB) <= 6


def test_an_adobe_cmyk_jpeg_is_not_inverted() -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    data = encoded(red, "JPEG", quality=100)
    assert b"Adobe" in data
    assert decode(data)[:, 4, 4].tolist() == pytest.approx([255, 0, 0], abs=4)


def test_cmyk_tiff_keeps_its_colours() -> None:
    image = decode(encoded(Image.fromarray(RGB).convert("CMYK"), "TIFF"))
    assert largest_difference(image, RGB) <= 2


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "PPM"])
def test_grayscale_is_repeated(format: str) -> None:
    gray = RGB[..., 0]
    image = decode(encoded(Image.fromarray(gray), format))
    assert_plain(image)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    assert largest_difference(image, gray[..., None].repeat(3, axis=2)) <= (8 if format == "JPEG" else 0)


def test_one_bit_images_become_black_and_white() -> None:
    bits = RGB[..., 0] > RGB[..., 0].mean()
    image = decode(encoded(Image.fromarray(bits), "PNG"))
    assert torch.equal(image, as_tensor(bits[..., None].repeat(3, axis=2).astype(np.uint8) * 255))


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "TIFF"])
def test_palettes_are_looked_up(format: str) -> None:
    palette = Image.fromarray(RGB).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert torch.equal(decode(encoded(palette, format)), as_tensor(expected))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_composited_on_white(format: str) -> None:
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, WIDTH // 2 :] = 255
    alpha[0] = 128
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    image = decode(encoded(Image.fromarray(np.dstack([RGB, alpha])), format, **options))
    weight = alpha[..., None] / 255.0
    expected = np.rint(RGB * weight + 255 * (1 - weight)).astype(np.uint8)
    assert_plain(image)
    assert largest_difference(image, expected) <= 1
    assert (image[:, 1:, : WIDTH // 2] == 255).all()
    assert torch.equal(image[:, 1:, WIDTH // 2 :], as_tensor(RGB)[:, 1:, WIDTH // 2 :])


def test_opaque_alpha_changes_nothing() -> None:
    opaque = np.dstack([RGB, np.full((HEIGHT, WIDTH), 255, np.uint8)])
    assert torch.equal(decode(encoded(Image.fromarray(opaque), "PNG")), as_tensor(RGB))


def test_gray_with_alpha_is_composited_on_white() -> None:
    gray = np.full((HEIGHT, WIDTH), 100, np.uint8)
    alpha = np.where(np.arange(WIDTH) < 4, 0, 255).astype(np.uint8)[None].repeat(HEIGHT, axis=0)
    image = decode(encoded(Image.fromarray(np.dstack([gray, alpha])), "PNG"))
    assert (image[:, :, :4] == 255).all()
    assert (image[:, :, 4:] == 100).all()


def test_a_transparent_palette_entry_is_white() -> None:
    palette = Image.new("P", (4, 2), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((3, 1), 1)
    for format in ("PNG", "GIF"):
        image = decode(encoded(palette, format, transparency=0))
        assert image[:, 0, 0].tolist() == [255, 255, 255]
        assert image[:, 1, 3].tolist() == [200, 100, 50]


def test_palette_alpha_given_as_bytes_is_composited_on_white() -> None:
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    image = decode(encoded(palette, "PNG", transparency=bytes([127, 255])))
    assert image[:, 0, 0].tolist() == [128, 128, 128]
    assert image[:, 0, 1].tolist() == [200, 100, 50]


def test_a_transparent_colour_of_an_rgb_png_is_white() -> None:
    image = decode(encoded(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3)))
    assert (image == 255).all()


def png_of_depth_16(samples: np.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG from uint16 [H, W, channels]."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width, _ = samples.shape
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(("channels", "colour_type"), [(1, 0), (3, 2)])
def test_sixteen_bit_png_keeps_its_high_byte(channels: int, colour_type: int) -> None:
    values = (
        np.linspace(0, 65535, HEIGHT * WIDTH * channels).astype(np.uint16).reshape(HEIGHT, WIDTH, channels)
    )
    image = decode(png_of_depth_16(values, colour_type))
    expected = (values >> 8).astype(np.uint8).repeat(3 // channels, axis=2)
    assert_plain(image)
    assert torch.equal(image, as_tensor(expected))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grayscale_is_scaled_not_clipped(format: str) -> None:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    image = decode(encoded(Image.fromarray(values), format))
    assert torch.equal(image, as_tensor((values >> 8).astype(np.uint8)[..., None].repeat(3, axis=2)))


def test_thirty_two_bit_integers_use_their_own_range() -> None:
    values = np.array([[-1000, 0], [500_000, 999_000]], np.int32)
    image = decode(encoded(Image.fromarray(values), "TIFF"))
    assert image[0].flatten().tolist() == [0, 0, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.0, 0.25], [0.5, 1.0]], [0, 64, 128, 255]),
        ([[-2.0, 0.0], [2.0, 6.0]], [0, 64, 128, 255]),
        ([[float("nan"), 0.0], [float("inf"), 1.0]], [0, 0, 0, 255]),
        ([[7.0, 7.0], [7.0, 7.0]], [0, 0, 0, 0]),
        ([[-3e38, 0.0], [0.0, 3e38]], [0, 128, 128, 255]),
    ],
)
def test_float_tiff(values: list[list[float]], expected: list[int]) -> None:
    image = decode(encoded(Image.fromarray(np.array(values, np.float32)), "TIFF"))
    assert_plain(image, 2, 2)
    assert image[0].flatten().tolist() == expected


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](RGB)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    image = decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options))
    assert_plain(image)
    assert largest_difference(image, RGB) <= (6 if format == "JPEG" else 0)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_without_meaning_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert torch.equal(decode(encoded(Image.fromarray(RGB), "PNG", exif=exif)), as_tensor(RGB))


@pytest.mark.parametrize(
    "block", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage" * 9]
)
def test_damaged_exif_does_not_cost_the_image(block: bytes) -> None:
    data = encoded(Image.fromarray(RGB), "JPEG", quality=100, subsampling=0)
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    assert largest_difference(decode(data[:2] + segment + data[2:]), RGB) <= 6


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken(format: str) -> None:
    first, second = Image.new("RGB", (5, 4), (255, 0, 0)), Image.new("RGB", (5, 4), (0, 0, 255))
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(first, format, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(data)) as frames:
        assert getattr(frames, "n_frames", 1) == 2
    assert (decode(data) == torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]).all()


# What is not an image


@pytest.mark.parametrize(
    "data", [b"hello, I am a text file\n" * 20, b"\0" * 1000, b"\xff", b"%PDF-1.7", b"<svg/>"]
)
def test_what_is_no_image_says_so(data: bytes) -> None:
    with pytest.raises(BadImage, match=r"^not an image \(JPEG, PNG"):
        decode(data)


def test_an_empty_file_says_so() -> None:
    with pytest.raises(BadImage, match=r"^empty file$"):
        decode(b"")


def test_formats_that_run_programs_are_not_opened() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with Image.open(io.BytesIO(eps)) as opened:
        assert opened.format == "EPS"
    assert "EPS" not in FORMATS
    with pytest.raises(BadImage, match="not an image"):
        decode(eps)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(format: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    with pytest.raises(BadImage) as caught:
        decode(data[: int(len(data) * part)])
    assert 0 < len(str(caught.value)) <= 160
    assert "\n" not in str(caught.value)


def test_a_truncated_jpeg_is_called_truncated() -> None:
    with pytest.raises(BadImage, match=r"^truncated$"):
        decode(encoded(Image.fromarray(RGB), "JPEG")[:-40])


def test_the_reason_is_the_same_on_every_run_and_names_no_object() -> None:
    data = bytearray(encoded(Image.fromarray(RGB), "PNG"))
    data[45] ^= 0xFF
    reasons = set()
    for _ in range(3):
        with pytest.raises(BadImage) as caught:
            decode(bytes(data))
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "0x" not in reasons.pop()


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(BadImage, match=r"^too large: "):
        decode(bomb)


def test_the_pixel_limit_can_be_lowered_and_raised() -> None:
    data = encoded(Image.fromarray(RGB), "PNG")
    with pytest.raises(BadImage, match=f"too large: {WIDTH}x{HEIGHT} is more than the limit of 383 pixels"):
        decode(data, max_pixels=383)
    assert_plain(decode(data, max_pixels=384))
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = 100  # what Pillow refuses at twice its value
        assert_plain(decode(data, max_pixels=1 << 40))
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_no_pillow_warning_leaks_even_where_warnings_are_errors() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(RGB), "TIFF", exif=exif)
    corrupt = data.replace(struct.pack("<HHI", 0x0112, 3, 1), struct.pack("<HHI", 0x0112, 3, 9_999_999))
    assert corrupt != data
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with Image.open(io.BytesIO(corrupt)) as opened:
            opened.load()
        assert seen, "this file is meant to make Pillow warn"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        decode(corrupt)
        assert list(warnings.filters) == before


def test_decoding_in_threads_leaves_the_warning_filters_alone() -> None:
    data = encoded(Image.fromarray(RGB), "PNG")
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [decode(data) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
    for thread in threads:
        thread.join()
    decode(data)
    assert list(warnings.filters) == before


def decoded_or_reason(data: bytes) -> torch.Tensor | str:
    """The image, or why there is none. Every other exception fails the test."""
    try:
        return decode(data, max_pixels=1 << 20)
    except BadImage as error:
        return str(error)


SEEDS = [
    encoded(Image.fromarray(RGB), format, **options)
    for format, options in [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("GIF", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ]
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=12),
    cut=st.integers(0, 4000),
)
def test_a_mutated_file_is_an_image_or_a_bad_image(
    seed: bytes, edits: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(seed)
    for place, value in edits:
        data[place % len(data)] = value
    data = data[: len(data) - cut % len(data)] if cut % 3 == 0 else data
    image = decoded_or_reason(bytes(data))
    if isinstance(image, str):
        assert 0 < len(image) <= 160
        assert "\n" not in image
    else:
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_politely(data: bytes) -> None:
    for magic in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"P6 9 9 255 ", b"BM"):
        assert len(decoded_or_reason(magic + data)) > 0


# Fitting


@pytest.mark.parametrize("shape", [(31, 47), (47, 31), (64, 64), (17, 200), (33, 33), (32, 40), (5, 7)])
@pytest.mark.parametrize(("size", "resize"), [(32, None), (32, 36), (1, None), (48, 48)])
def test_fit_is_torchvisions_resize_and_centre_crop(
    shape: tuple[int, int], size: int, resize: int | None
) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8))
    steps = v2.Compose([v2.Resize(resize or size, antialias=True), v2.CenterCrop(size)])
    expected = as_tensor(np.asarray(steps(picture)))
    assert torch.equal(fit(picture, size, resize), expected)
    assert torch.equal(fit(as_tensor(np.asarray(picture)), size, resize), expected)
    assert torch.equal(decode_fit(encoded(picture, "PNG"), size, resize), expected)


def test_fit_of_the_right_size_changes_nothing() -> None:
    pixels = smooth(20, 20)
    assert torch.equal(fit(as_tensor(pixels), 20), as_tensor(pixels))


def test_fit_takes_the_centre() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    assert (fit(as_tensor(pixels), 10) == 255).all()


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (2, 3_000_000)])
def test_a_long_strip_does_not_blow_up(shape: tuple[int, int]) -> None:
    picture = Image.new("RGB", shape[::-1], (9, 8, 7))
    assert fit(picture, 64).flatten(1).unique(dim=1).flatten().tolist() == [9, 8, 7]


def test_fit_refuses_what_it_cannot_do() -> None:
    good = torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="got size=8, resize=7"):
        fit(good, 8, 7)
    with pytest.raises(ValueError, match="got size=0"):
        fit(good, 0)
    for bad in (good.float(), good[:1], good[0], torch.zeros(3, 0, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="image must be uint8"):
            fit(bad, 4)
    with pytest.raises(ValueError, match="mode 'L'"):
        fit(Image.new("L", (8, 8)), 4)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "GIF", "PPM"])
def test_damage_is_not_reported_on_the_terminal(capfd: pytest.CaptureFixture[str], format: str) -> None:
    """libtiff alone prints its own errors, which Pillow does not keep from it."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    for cut in range(20, len(data), len(data) // 15):
        for broken in (data[:cut], data[:cut] + b"\xff" * 20 + data[cut + 20 :]):
            assert len(decoded_or_reason(broken)) > 0
    assert capfd.readouterr() == ("", "")


# The transparent colour of a PNG, compared at the file's own depth


def raw_png(depth: int, colour: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG of one row, of so many bits a channel; colour type 0 is grayscale, 2 RGB."""
    width = len(row) * 8 // depth // (3 if colour == 2 else 1)
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    chunks = (b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "wanted"),
    [
        (1, b"\x0f", 1, [0, 0, 0, 0, 255, 255, 255, 255]),
        (1, b"\x0f", 0, [255] * 8),
        (2, b"\x1b", 2, [0, 85, 255, 255]),
        (4, b"\x12\x3f", 3, [17, 34, 255, 255]),
        (8, b"\1\2\3\4", 3, [1, 2, 255, 4]),
        (16, b"\1\0\2\0\3\0\3\1", 0x300, [1, 2, 255, 3]),
        (16, b"\xff\xff\xff\0\0\xff", 0xFF, [255, 255, 255]),
    ],
)
def test_a_transparent_gray_is_white(depth: int, row: bytes, transparent: int, wanted: list[int]) -> None:
    image = decode(raw_png(depth, 0, row, transparent.to_bytes(2, "big")))
    assert image.tolist() == [[wanted]] * 3


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "wanted"),
    [
        (8, [1, 2, 3, 4, 5, 6], (4, 5, 6), [[1, 2, 3], [255] * 3]),
        (16, [0x100, 0x200, 0x300, 0x100, 0x200, 0x301], (0x100, 0x200, 0x300), [[255] * 3, [1, 2, 3]]),
        (16, [0x104, 0x205, 0x306, 0x400, 0x500, 0x600], (0x104, 0x205, 0x306), [[255] * 3, [4, 5, 6]]),
        (16, [4, 5, 6, 0x400, 0x500, 0x600], (4, 5, 6), [[255] * 3, [4, 5, 6]]),
    ],
)
def test_a_transparent_colour_is_white(
    depth: int, row: list[int], transparent: tuple[int, ...], wanted: list[list[int]]
) -> None:
    data = b"".join(value.to_bytes(depth // 8, "big") for value in row)
    image = decode(raw_png(depth, 2, data, b"".join(value.to_bytes(2, "big") for value in transparent)))
    assert image.permute(1, 2, 0).tolist() == [wanted]
