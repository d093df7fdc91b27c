"""What a JPEG's markers tell without decoding it: its size, and whether every decoder will see the same image.

JPEG is a chain of segments, each FF, a marker byte and a length, and of entropy-coded data in which FF is
followed by 00 or by a restart marker (ITU-T T.81, annex B).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

_PROGRESSIVE = 0xC2
_FRAMES = {0xC0, 0xC1, _PROGRESSIVE}  # baseline, extended and progressive Huffman coding
_TABLES = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # Huffman, quantisation, restart, comment, application
_START_OF_SCAN, _END_OF_IMAGE, _APPLICATION_1, _ADOBE = 0xDA, 0xD9, 0xE1, 0xEE
_YCC = 1  # the colour transform in Adobe's segment that three components usually have
_IN_SCAN = {0x00, *range(0xD0, 0xD8)}  # what follows FF in entropy-coded data: a stuffed zero or a restart
_UPRIGHT = 1
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
# What Pillow's `exif_transpose` looks for, as an attribute or an element; the namespace's prefix is fixed.
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_ALL_COEFFICIENTS = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class PlainJpeg:
    """A JPEG that holds nothing unusual: size in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a frame header says; `components` are the components' identifiers."""

    jpeg: PlainJpeg
    components: bytes
    progressive: bool


def plain_jpeg(data: bytes) -> PlainJpeg | None:
    """The size of a JPEG that needs no judgement; None for every other file.

    Plain is: 8 bits, one component or three in YCbCr, Huffman-coded, in one scan of all components or in all the
    scans of a progressive image, upright by its EXIF data and its XMP, its chain of markers unbroken up to an
    end-of-image marker. Truncated files, progressive ones that lack scans, unknown markers in the data, CMYK, RGB
    and turned photographs are not plain. Damaged entropy-coded data is not looked for.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        return _walk(data)
    except (IndexError, struct.error):
        return None


def _walk(data: bytes) -> PlainJpeg | None:
    place, frame, scans = 2, None, 0
    whole: dict[int, int] = {}  # component -> a bit for each coefficient that has its last bit
    while True:
        if data[place] != 0xFF:
            return None
        while data[place + 1] == 0xFF:  # fill bytes
            place += 1
        marker = data[place + 1]
        place += 2
        if marker == _END_OF_IMAGE:
            return frame.jpeg if frame is not None and scans and _is_whole(frame, whole) else None
        if scans and frame is not None and not frame.progressive:
            return None
        if marker not in _TABLES and marker not in _FRAMES and marker != _START_OF_SCAN:
            return None
        (length,) = struct.unpack_from(">H", data, place)
        content = data[place + 2 : place + length]
        if length < 2 or len(content) != length - 2:
            return None
        place += length
        if marker in _FRAMES:
            if frame is not None or (frame := _frame(content, marker)) is None:
                return None
        elif (marker == _APPLICATION_1 and _turned(content)) or (
            marker == _ADOBE and content[:5] == b"Adobe" and content[11] != _YCC
        ):
            return None
        elif marker == _START_OF_SCAN:
            if frame is None or not _scan_fits(content, frame):
                return None
            scans += 1
            first, last, precision = content[-3:]
            if precision & 0xF == 0:
                for component in content[1:-3:2]:
                    whole[component] = whole.get(component, 0) | (2 << last) - (1 << first)
            place = _end_of_scan(data, place)


def _is_whole(frame: _Frame, whole: dict[int, int]) -> bool:
    """Whether every scan of a progressive image is there: decoders smooth one that lacks some, each in its way."""
    return not frame.progressive or all(
        whole.get(component, 0) & _ALL_COEFFICIENTS == _ALL_COEFFICIENTS for component in frame.components
    )


def _turned(content: bytes) -> bool:
    """Whether an application segment says, in EXIF or in XMP, that the image is not upright, or makes no sense."""
    if content[:6] == b"Exif\0\0":
        return _orientation(content[6:]) != _UPRIGHT
    return content.startswith(_XMP) and any(said != b"1" for said in _XMP_ORIENTATION.findall(content))


def _scan_fits(content: bytes, frame: _Frame) -> bool:
    """Whether a scan header names components of the frame: all of them, or some if progressive."""
    names = content[1 : 1 + 2 * content[0] : 2]
    known = 0 < len(names) == len(set(names)) and set(names) <= set(frame.components)
    return known and len(content) == 4 + 2 * len(names) and (frame.progressive or names == frame.components)


def _end_of_scan(data: bytes, place: int) -> int:
    """Where the marker stands that ends the entropy-coded data from `place` on. `IndexError` without one.

    A search for FF byte by byte: a regular expression takes 20 times as long.
    """
    while True:
        place = data.find(0xFF, place)
        if place < 0:
            raise IndexError("no marker ends the scan")
        following = data[place + 1]
        if following not in _IN_SCAN and following != 0xFF:
            return place
        place += 1 if following == 0xFF else 2


def _frame(content: bytes, marker: int) -> _Frame | None:
    precision, height, width, components = struct.unpack_from(">BHHB", content)
    names = content[6::3]
    if (
        precision != 8
        or 0 in (height, width)
        or components not in (1, 3)
        or len(content) != 6 + 3 * components
    ):
        return None
    if names == b"RGB" or len(set(names)) != components:
        return None
    return _Frame(PlainJpeg(width, height), names, marker == _PROGRESSIVE)


def _orientation(tiff: bytes) -> int:
    """The orientation in EXIF data; 1 where it has none, 0 where it makes no sense."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 0
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, start)
    for entry in range(entries):
        tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * entry)
        if tag == 0x0112 and (kind, count, value) != (3, 1, _UPRIGHT):  # of several the last may count
            return value if (kind, count) == (3, 1) else 0
    return _UPRIGHT
