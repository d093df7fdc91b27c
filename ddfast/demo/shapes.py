"""A rendered, labelled image set: one small object at a known place on a cluttered background.

Ten classes of shapes, drawn from signed distance fields so that every edge is antialiased analytically.
Colour, size, rotation and place carry no class information, the background is full of strokes, specks and
blobs that are no class, and the object covers a few percent of the image, off centre. So a whole image shown
to a small student is mostly noise, and a crop that finds the object is worth more than the image it came
from. The place of every object is written beside the images, which lets a run count how often a chosen crop
covers the object.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddfast.errors import UsageError
from ddfast.files import atomic_write_text, explained, make_folder

Array = NDArray[np.float64]
BOXES_FILE = "boxes.csv"
CONFIG_FILE = "shapes.json"
SPLITS = ("train", "test")
_CURVE_POINTS = 40  # vertices of an outline that is a curve


@dataclass(frozen=True)
class ShapesConfig:
    """What is rendered. Equal configurations give equal pixels.

    Attributes:
        image_size: side in pixels, at least 16.
        train_per_class: images of each class in the training split.
        test_per_class: images of each class in the test split.
        radius: smallest and largest radius of an object, as a share of the side (7 to 10 px at 64 px).
        turn: largest rotation of an object, in degrees either way.
        clutter: amount of background clutter, as a multiple of the default; 0 leaves gradient and texture.
        seed: of every random draw.
    """

    image_size: int = 64
    train_per_class: int = 200
    test_per_class: int = 50
    radius: tuple[float, float] = (0.11, 0.155)
    turn: float = 20.0
    clutter: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.radius
        if self.image_size < 16:
            raise UsageError(f"image_size must be at least 16 pixels, got {self.image_size}")
        if not 0 < low <= high <= 0.45:
            raise UsageError(f"radius must satisfy 0 < low <= high <= 0.45 of the side, got {low} and {high}")
        if self.train_per_class < 1 or self.test_per_class < 1:
            raise UsageError(
                f"each split needs at least one image a class, got {self.train_per_class} for train and "
                f"{self.test_per_class} for test"
            )
        if self.clutter < 0:
            raise UsageError(f"clutter must not be negative, got {self.clutter}")


@dataclass(frozen=True, slots=True)
class Box:
    """Tight box of an object in pixels; x1 and y1 are exclusive."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) in pixels."""
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2


def write_shapes(out: str | Path, config: ShapesConfig | None = None) -> Path:
    """Render the set as an image folder: `train/<class>/NNNN.png`, `test/<class>/NNNN.png` and `boxes.csv`.

    Files that stand there are written again; other files in `out` are left alone. `shapes.json` comes last: see
    `is_rendered`.

    Args:
        out: folder, made where it is missing.
        config: what to render (default `ShapesConfig()`).

    Returns:
        `out` as a Path.

    Raises:
        UsageError: no space, no permission.
    """
    from PIL import Image

    config = config or ShapesConfig()
    out = make_folder(out)
    (out / CONFIG_FILE).unlink(missing_ok=True)
    rows: list[tuple[str, str, Box]] = []
    for split, per_class in zip(SPLITS, (config.train_per_class, config.test_per_class), strict=True):
        for label, name in enumerate(CLASSES):
            folder = make_folder(out / split / name)
            for index in range(per_class):
                pixels, box = render(label, index, split, config)
                path = folder / f"{index:04d}.png"
                with explained(path):
                    Image.fromarray(pixels).save(path, compress_level=1)
                rows.append((split, f"{name}/{index:04d}.png", box))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("split", "key", "x0", "y0", "x1", "y1"))
    table.writerows((split, key, *(f"{v:.2f}" for v in (b.x0, b.y0, b.x1, b.y1))) for split, key, b in rows)
    atomic_write_text(out / BOXES_FILE, text.getvalue())
    atomic_write_text(out / CONFIG_FILE, _config_text(config))
    return out


def is_rendered(root: str | Path, config: ShapesConfig) -> bool:
    """Whether `write_shapes` has finished in `root` with this configuration."""
    try:
        return (Path(root) / CONFIG_FILE).read_text("utf-8") == _config_text(config)
    except OSError:
        return False


def _config_text(config: ShapesConfig) -> str:
    return json.dumps(asdict(config), indent=2) + "\n"


def read_boxes(root: str | Path, split: str = "train") -> dict[str, Box]:
    """Boxes of one split by the image's key, "class/file", as written by `write_shapes`.

    Raises:
        UsageError: `root` has no boxes.csv.
    """
    path = Path(root) / BOXES_FILE
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give a folder that write_shapes rendered")
    with path.open(encoding="utf-8", newline="") as lines:
        return {
            row["key"]: Box(float(row["x0"]), float(row["y0"]), float(row["x1"]), float(row["y1"]))
            for row in csv.DictReader(lines)
            if row["split"] == split
        }


def render(
    label: int, index: int, split: str = "train", config: ShapesConfig | None = None
) -> tuple[NDArray[np.uint8], Box]:
    """One image of the set, independent of every other one.

    Args:
        label: class in 0..9, an index into `CLASSES`.
        index: number of the image within its class and split.
        split: "train" or "test".
        config: see `ShapesConfig`; the counts in it do not matter here.

    Returns:
        uint8 [S, S, 3] RGB pixels, and the object's box.
    """
    config = config or ShapesConfig()
    rng = np.random.Generator(np.random.PCG64([config.seed, SPLITS.index(split), label, index]))
    canvas = _Canvas(config.image_size)
    lightness = _paint_background(canvas, rng)
    for _ in range(rng.poisson(5.5 * config.clutter)):
        _paint_blob(canvas, rng, lightness)
    for _ in range(rng.poisson(12.5 * config.clutter)):
        _paint_stroke(canvas, rng, lightness)
    for _ in range(rng.poisson(20 * config.clutter)):
        _paint_speck(canvas, rng, lightness)
    box = _paint_object(canvas, rng, CLASSES[label], lightness, config)
    for _ in range(rng.poisson(2.5 * config.clutter)):
        _paint_stroke(canvas, rng, lightness, thin=True)
    return canvas.pixels(rng), box


class _Canvas:
    """sRGB canvas in [0, 1] with coordinates of pixel centres in units of 1/64 of the side."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.scale = size / 64  # pixels per unit
        centres = (np.arange(size) + 0.5) / self.scale
        self.x, self.y = np.meshgrid(centres, centres)
        self.rgb: Array = np.zeros((size, size, 3))

    def around(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice]:
        """Rows and columns of the pixels that touch a box in units; empty where the box lies outside."""
        low = [max(math.floor(edge * self.scale) - 1, 0) for edge in (y0, x0)]
        high = [max(math.ceil(edge * self.scale) + 1, 0) for edge in (y1, x1)]
        return slice(low[0], high[0]), slice(low[1], high[1])

    def coverage(self, distance: Array) -> Array:
        """Share of each pixel inside a shape, from the signed distance (negative inside) in units."""
        return np.clip(0.5 - distance * self.scale, 0, 1)

    def blend(self, place: tuple[slice, slice], colour: Array, alpha: Array) -> None:
        """Lay `colour` ([3] or [h, w, 3]) over the pixels at `place` with opacity `alpha` [h, w]."""
        self.rgb[place] += alpha[..., None] * (colour - self.rgb[place])

    def noise(self, rng: np.random.Generator, cells: int) -> Array:
        """Smooth noise in [-1, 1] with `cells` lattice cells a side, [S, S]."""
        lattice = rng.uniform(-1, 1, (cells + 1, cells + 1))
        place = (np.arange(self.size) + 0.5) / self.size * cells
        low = np.minimum(place.astype(int), cells - 1)
        t = place - low
        t = t * t * (3 - 2 * t)
        rows = lattice[low] * (1 - t)[:, None] + lattice[low + 1] * t[:, None]
        return rows[:, low] * (1 - t) + rows[:, low + 1] * t

    def pixels(self, rng: np.random.Generator) -> NDArray[np.uint8]:
        """uint8 [S, S, 3] with a little sensor grain."""
        grain = rng.normal(0, 0.012, (self.size, self.size, 1))
        return (np.clip(self.rgb + grain, 0, 1) * 255 + 0.5).astype(np.uint8)


def _colour(lightness: float, chroma: float, hue: float) -> Array:
    """sRGB [3] of an OKLCH colour (Ottosson, 2020), clipped to the gamut; hue in radians."""
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.array(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ]
    )
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _paint_background(canvas: _Canvas, rng: np.random.Generator) -> float:
    """Gradient between two related colours, with soft texture. Returns its mean lightness in OKLCH."""
    lightness = float(rng.uniform(0.28, 0.5))
    hue = rng.uniform(0, 2 * math.pi)
    near = _colour(lightness + 0.07, rng.uniform(0.02, 0.07), hue)
    far = _colour(lightness - 0.07, rng.uniform(0.02, 0.07), hue + rng.uniform(-1.2, 1.2))
    angle = rng.uniform(0, 2 * math.pi)
    ramp = ((canvas.x - 32) * math.cos(angle) + (canvas.y - 32) * math.sin(angle)) / 90 + 0.5
    ramp = np.clip(ramp + 0.35 * canvas.noise(rng, 3) + 0.12 * canvas.noise(rng, 9), 0, 1)
    canvas.rgb[:] = near + ramp[..., None] * (far - near)
    canvas.rgb += (0.03 * canvas.noise(rng, 20))[..., None]
    return lightness


def _clutter_colour(rng: np.random.Generator, lightness: float) -> Array:
    shift = rng.choice((-1, 1)) * rng.uniform(0.06, 0.2)
    return _colour(max(lightness + shift, 0.12), rng.uniform(0.02, 0.12), rng.uniform(0, 2 * math.pi))


def _paint_blob(canvas: _Canvas, rng: np.random.Generator, lightness: float) -> None:
    """A wobbly, soft-edged, half-transparent patch."""
    x, y = rng.uniform(0, 64, 2)
    radius, softness = rng.uniform(5, 12), rng.uniform(1.5, 5)
    reach = 1.9 * radius + softness
    place = canvas.around(x - reach, y - reach, x + reach, y + reach)
    dx, dy = canvas.x[place] - x, canvas.y[place] - y
    angle = np.arctan2(dy, dx)
    wobble = sum(rng.uniform(0.1, 0.3) * np.cos(k * angle + rng.uniform(0, 2 * math.pi)) for k in (1, 2, 3))
    distance = np.hypot(dx, dy) - radius * (1 + wobble)
    alpha = np.clip(0.5 - distance / softness, 0, 1) * rng.uniform(0.25, 0.6)
    canvas.blend(place, _clutter_colour(rng, lightness), alpha)


def _paint_stroke(canvas: _Canvas, rng: np.random.Generator, lightness: float, thin: bool = False) -> None:
    """A straight or bent line with round ends, bent too little to close."""
    heading = rng.uniform(0, 2 * math.pi)
    bend = rng.uniform(-0.45, 0.45) if rng.random() < 0.6 else 0.0
    steps = 6 if bend else 1
    length = rng.uniform(8, 34) / steps
    width = rng.uniform(0.35, 0.6) if thin else rng.uniform(0.5, 1.7)
    chain = [rng.uniform(-4, 68, 2)]
    for _ in range(steps):
        chain.append(chain[-1] + length * np.array((math.cos(heading), math.sin(heading))))
        heading += bend
    points = np.array(chain)
    place = canvas.around(*(points.min(axis=0) - width), *(points.max(axis=0) + width))
    distance = _segments_distance(canvas.x[place], canvas.y[place], points) - width
    canvas.blend(place, _clutter_colour(rng, lightness), canvas.coverage(distance) * rng.uniform(0.6, 1.0))


def _paint_speck(canvas: _Canvas, rng: np.random.Generator, lightness: float) -> None:
    """A dot, far smaller than an object."""
    x, y = rng.uniform(0, 64, 2)
    radius = rng.uniform(0.5, 1.6)
    place = canvas.around(x - radius, y - radius, x + radius, y + radius)
    distance = np.hypot(canvas.x[place] - x, canvas.y[place] - y) - radius
    canvas.blend(place, _clutter_colour(rng, lightness), canvas.coverage(distance) * rng.uniform(0.5, 1.0))


def _paint_object(
    canvas: _Canvas, rng: np.random.Generator, name: str, lightness: float, config: ShapesConfig
) -> Box:
    """Shadow, shaded body and rim of one object; returns the box of its body."""
    radius = 64 * rng.uniform(*config.radius)
    x, y = _off_centre(rng, radius)
    turn = math.radians(rng.uniform(-config.turn, config.turn))
    reach = 1.2 * radius + 4  # the shadow ends within
    place = canvas.around(x - reach, y - reach, x + reach, y + reach)
    dx, dy = (canvas.x[place] - x) / radius, (canvas.y[place] - y) / radius
    u = dx * math.cos(turn) + dy * math.sin(turn)
    v = -dx * math.sin(turn) + dy * math.cos(turn)
    distance = _SHAPES[name](u, v) * radius

    body = float(rng.uniform(0.74, 0.88))
    hue, chroma = rng.uniform(0, 2 * math.pi), rng.uniform(0.11, 0.17)
    shadow = np.clip(0.5 - (_shifted(distance, canvas.scale) - 0.3) / 3.0, 0, 1) * 0.35
    canvas.blend(place, _colour(max(lightness - 0.35, 0.05), 0.02, hue), shadow)
    top = _colour(min(body + 0.07, 0.97), chroma, hue)
    bottom = _colour(body - 0.07, chroma, hue + 0.15)
    shade = np.clip(0.5 + 0.5 * (dx * 0.5 + dy * 0.85), 0, 1)[..., None]
    inside = canvas.coverage(distance)
    canvas.blend(place, top + shade * (bottom - top), inside)
    rim = inside * np.clip(1 + (distance + 0.2) / 0.9, 0, 1)
    canvas.blend(place, _colour(min(body + 0.16, 0.99), chroma * 0.6, hue), rim * 0.55)

    rows, columns = (np.flatnonzero((distance < 0).any(axis=axis)) for axis in (1, 0))
    left, top_edge = place[1].start, place[0].start
    return Box(
        float(left + columns[0]),
        float(top_edge + rows[0]),
        float(left + columns[-1] + 1),
        float(top_edge + rows[-1] + 1),
    )


def _shifted(distance: Array, scale: float) -> Array:
    """The field moved right and down by about one unit, for a shadow; the border repeats."""
    step = max(1, round(scale))
    padded = np.pad(distance, ((step, 0), (step, 0)), mode="edge")
    return padded[: distance.shape[0], : distance.shape[1]]


def _off_centre(rng: np.random.Generator, radius: float) -> tuple[float, float]:
    """A centre that keeps the object inside the image and out of the middle, in units."""
    margin = radius + 0.5
    while True:
        x, y = rng.uniform(margin, 64 - margin, 2)
        if math.hypot(x - 32, y - 32) >= 11:
            return float(x), float(y)


def _segments_distance(x: Array, y: Array, points: Array) -> Array:
    """Distance of every pixel to a chain of line segments, points [P, 2]."""
    nearest = np.full(x.shape, np.inf)
    for (ax, ay), (bx, by) in pairwise(points):
        ex, ey = bx - ax, by - ay
        t = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        np.minimum(nearest, (x - ax - t * ex) ** 2 + (y - ay - t * ey) ** 2, out=nearest)
    return np.sqrt(nearest)


def _polygon_distance(x: Array, y: Array, points: Array) -> Array:
    """Signed distance to a closed polygon [P, 2]: negative where a ray crosses its edges an odd number of times."""
    closed = np.concatenate((points, points[:1]))
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in pairwise(closed):
        if ay == by:
            continue
        crosses = (ay > y) != (by > y)
        inside ^= crosses & (x < ax + (y - ay) * (bx - ax) / (by - ay))
    distance = _segments_distance(x, y, closed)
    return np.where(inside, -distance, distance)


# Outlines live in the unit disc; each function takes coordinates in units of the object's radius.


def _regular(corners: int) -> Array:
    angles = np.arange(corners) * 2 * math.pi / corners - math.pi / 2
    return np.stack((np.cos(angles), np.sin(angles)), axis=1)


def _square() -> Array:
    return np.array(((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))) * 0.74


def _polygon(points: Array) -> Callable[[Array, Array], Array]:
    return lambda u, v: _polygon_distance(u, v, points)


def _star() -> Array:
    points = _regular(10)
    points[1::2] *= 0.45
    return points


def _cross(arm: float = 0.3, reach: float = 0.95) -> Array:
    quarter = np.array(((arm, -arm), (reach, -arm), (reach, arm)))
    x, y = quarter[:, 0], quarter[:, 1]
    turned = [np.stack(pair, axis=1) for pair in ((x, y), (-y, x), (-x, -y), (y, -x))]
    return np.concatenate(turned)


def _arrow() -> Array:
    right = [(0.0, -1.0), (0.72, -0.15), (0.27, -0.15), (0.27, 0.95)]
    return np.array([*right, *((-x, y) for x, y in reversed(right[1:]))])


def _heart() -> Array:
    t = np.arange(_CURVE_POINTS) * 2 * math.pi / _CURVE_POINTS
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack((x, y - 2.5), axis=1) / 16.5


def _crescent() -> Array:
    """Between the unit circle and a smaller one that cuts into it."""
    offset, hole = 0.5, 0.78
    horn = math.acos((1 + offset**2 - hole**2) / (2 * offset))
    outer = np.linspace(horn, 2 * math.pi - horn, _CURVE_POINTS * 2 // 3)
    half = math.acos((1 - offset**2 - hole**2) / (2 * offset * hole))
    inner = np.linspace(2 * math.pi - half, half, _CURVE_POINTS // 2)[1:-1]
    arcs = (
        np.stack((np.cos(outer), np.sin(outer)), axis=1),
        np.stack((offset + hole * np.cos(inner), hole * np.sin(inner)), axis=1),
    )
    return np.concatenate(arcs) + np.array((0.12, 0.0))


def _disc(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - 0.9


def _ring(u: Array, v: Array) -> Array:
    return np.abs(np.hypot(u, v) - 0.73) - 0.23


_SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "arrow": _polygon(_arrow()),
    "crescent": _polygon(_crescent()),
    "cross": _polygon(_cross()),
    "disc": _disc,
    "heart": _polygon(_heart()),
    "hexagon": _polygon(_regular(6)),
    "ring": _ring,
    "square": _polygon(_square()),
    "star": _polygon(_star()),
    "triangle": _polygon(_regular(3)),
}
CLASSES: tuple[str, ...] = tuple(_SHAPES)
