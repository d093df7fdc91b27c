"""The page of images that were optimised."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from ddfast.cli import main
from ddfast.output.pixels import to_bytes
from ddfast.report import Arm, write_comparison, write_report
from ddfast.report.curves import line_chart, line_of
from ddfast.report.pictures import data_uri, to_picture
from tests.output.made import MEAN, STD, write_made
from tests.report.rendering import write_run, write_source

EVIL = "<script>alert(1)</script>"
NAMES = ["apple", EVIL, "pear & plum"]
CURVE = [
    {
        "group": group,
        "step": step,
        "loss": 9.0 - step + 2 * group,
        "gradient_norm": 3.0,
        "cmi_gradient_norm": 1.0,
        "pixel_variance": 0.5,
        **({"cmi": 0.25 - step / 100} if step % 2 == 0 else {}),
        **({"accuracy": 30.0 + step} if step in (0, 4) else {}),
    }
    for group in (0, 1)
    for step in range(5)
]
SETTINGS = {
    "iterations": 20_000,
    "real_batch": 256,
    "init": "real",
    "cmi": 0.5,
    "cmi_every": 5,
    "proxy_arch": "resnet18_in",
}


class Page(HTMLParser):
    """Headings, facts, sources of pictures by class, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.images: list[dict[str, str]] = []
        self.labels: list[str] = []
        self.words: list[str] = []
        self.figures = 0
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "img":
            self.images.append(given)
        elif tag == "svg" and "role" in given:
            self.labels.append(given.get("aria-label") or "")
        elif tag not in ("meta", "br", "line", "rect", "path", "circle", "i", "svg"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data):
        if self._open[-1:] == ["style"]:
            return
        if self._open[-1:] == ["h2"]:
            self.headings.append(data)
        self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(word for word in self.words if word)


def page_of(root, **kwargs) -> Page:
    return Page(write_report(root, **kwargs).read_text("utf-8"))


def test_the_page_shows_before_after_curve_and_files(tmp_path):
    stored = write_made(
        tmp_path,
        NAMES,
        curve=CURVE,
        options={"synthesize": SETTINGS},
        inputs={"proxies": [{"file": f"proxy-{number:05d}.safetensors"} for number in range(10)]},
        preset="cifar10_ipc2",
    )
    page = page_of(tmp_path)
    assert page.headings == [
        "Better than random?",
        "Before and after",
        "How it went",
        "What 8 bits cost",
        "Files, and how to open them",
    ]
    eight = to_bytes(stored, MEAN, STD, "normalized")
    shown = {image["alt"]: image["src"] for image in page.images}
    assert len(shown) == 12
    for place in range(6):
        name, number = NAMES[place // 2], place % 2 + 1
        assert shown[f"{name} after, image {number}"] == data_uri(to_picture(eight[place]))
        # `write_made` turns the set around to begin with.
        assert shown[f"{name} before, image {number}"] == data_uri(to_picture(eight.flip(0)[place]))
    for fact in (
        "made_up preset cifar10_ipc2",
        "6 images made from 600",
        "2 per class × 3 classes",
        "20,000 from real images",
        "256 images per class and iteration",
        "CMI λ 0.5 10 proxies, resnet18_in, every 5 iterations",
        "Seed 5",
        "ddfast evaluate --distilled distilled",
        "pixels.safetensors",
        "before.png",
        "options.synthesize.iterations",
    ):
        assert fact in page.text
    for absent in (
        "soft label",
        "own class in the labels",
        "teacher reads",
        "candidate crop",
        "Scores",
        "attribution",
    ):
        assert absent not in page.text
    assert page.labels == [
        f"{title} over steps"
        for title in (
            "Loss",
            "CMI, nats",
            "Gradient in the pixels",
            "CMI's share of the gradient",
            "Pixel variance",
            "Test accuracy",
        )
    ]
    for change in ("from 10.0 to 6.00", "from 0.250 to 0.210", "from 25.0% to 25.0%", "from 30.0% to 34.0%"):
        assert change in page.text
    assert "means over 2 groups of classes" in page.text


def test_what_is_not_there_leaves_no_empty_section(tmp_path):
    write_made(tmp_path, NAMES, before=False, curve=[], options={"synthesize": {}}, data=None)
    page = page_of(tmp_path)
    assert page.headings[0] == "Better than random?"
    assert page.headings[1:] == ["The distilled images", "What 8 bits cost", "Files, and how to open them"]
    assert not page.labels
    assert len(page.images) == 6
    assert "6 images, made pixel by pixel" in page.text
    for absent in ("before", "Iterations", "CMI", "curve.parquet", "Teacher", "Time"):
        assert absent not in page.text.replace("before any", "")


def test_only_what_was_measured_has_a_chart(tmp_path):
    curve = [{"group": 0, "step": step, "loss": 1.0, "pixel_variance": 0.0} for step in range(3)]
    write_made(tmp_path, NAMES, ipc=1, curve=curve)
    page = page_of(tmp_path)
    assert page.labels == ["Loss over steps"]  # of one image a class there is no variance
    assert "groups of classes" not in page.text


def test_the_bytes_are_the_same_again_and_before_the_run_is_complete(tmp_path):
    write_made(tmp_path, NAMES, curve=CURVE, complete=False)
    (tmp_path / "run.json").write_text(json.dumps({"seconds": {"synthesize": 4000.0}}))
    first = {
        name: (write_report(tmp_path).parent / name).read_bytes() for name in ("report.html", "mosaic.png")
    }
    (tmp_path / "run.json").write_text(json.dumps({"seconds": {"synthesize": 1.0}}))
    write_report(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in first} == first
    assert "Time" not in Page(first["report.html"].decode()).text
    assert not list(tmp_path.glob(".*tmp*"))


def test_names_are_escaped_and_nothing_is_loaded(tmp_path):
    write_made(
        tmp_path, NAMES, curve=CURVE, quarantined={"count": 1, "files": [{"path": EVIL, "reason": "<i>"}]}
    )
    text = write_report(tmp_path, title="<u>title</u>").read_text("utf-8")
    assert "<script" not in text
    assert "<u>" not in text
    assert "<i>" not in text
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    assert "http" not in text
    assert str(tmp_path) not in text
    assert "1 file could not be read" in Page(text).text


# Eight bits


def test_what_rounding_changes_is_counted(tmp_path):
    levels = torch.full((2, 3, 16, 16), 100.0)
    levels[0, 0, 0, 0], levels[1, 1, 0, :3] = 100.25, torch.tensor([-51.0, 285.0, 255.0])
    images = (levels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    write_made(tmp_path, ["a", "b"], ipc=1, images=images)
    text = page_of(tmp_path).text
    assert "Largest change 51.0 grey levels of 255" in text
    assert f"Mean change {(0.25 + 51 + 30) / 1536:.4f}" in text
    assert "2 of 1,536 pixel values, clamped" in text  # 255 itself is inside
    assert "0.1% 2 of" in text


def test_an_accuracy_of_both_is_drawn(tmp_path):
    both = {
        "float32": {
            "arch": "convnet3_in",
            "protocol": "dsa",
            "epochs": 1000,
            "seeds": [0, 1],
            "top1": [50.0, 52.0],
        },
        "8 bits": {"mean": 50.6},
    }
    write_made(tmp_path, NAMES, accuracy=both)
    page = page_of(tmp_path)
    assert "Rounding cost 0.4 points of test accuracy." in page.text
    assert "Students: convnet3_in, protocol dsa, 1,000 epochs, 2 students each." in page.text
    assert "Pixels, float32 51.0 ± 1.4 percent; The same images in 8 bits 50.6 ± 0.0 percent" in page.labels


@pytest.mark.parametrize(
    "accuracy", [None, {}, {"float32": {"mean": 50.0}}, {"float32": 3, "8 bits": "x"}, [1]]
)
def test_half_an_accuracy_is_none(tmp_path, accuracy):
    write_made(tmp_path, NAMES, accuracy=accuracy)
    page = page_of(tmp_path)
    assert "the PNGs are for people" in page.text
    assert page.labels == ["Loss over steps"]


# Charts


def test_a_line_is_the_mean_over_groups_with_their_spread():
    line = line_of("x", {0: [(0, 1.0), (2, 3.0)], 1: [(0, 3.0), (2, 9.0)], 2: []})
    assert line is not None
    assert (line.groups, line.averaged, line.first, line.last) == (2, 1, 0, 2)
    assert [values.tolist() for values in (line.mean, line.low, line.high)] == [[2, 6], [1, 3], [3, 9]]
    assert 'class="band' in line_chart([line], "x")
    alone = line_of("x", {0: [(0, 1.0), (2, 3.0)]})
    assert 'class="band' not in line_chart([alone], "x")
    assert line_of("x", {0: []}) is None


def test_many_steps_are_averaged():
    steps = 20_000
    line = line_of("x", {0: [(step, float(step % 2)) for step in range(steps)]})
    assert len(line.mean) == 160
    assert line.averaged == 125
    assert np.abs(line.mean - 0.5).max() < 0.005
    assert (line.first, line.last) == (0, steps - 1)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([7.8, 3.6], ["2", "4", "6", "8"]),
        ([0.0896, 0.0863], ["0.086", "0.087", "0.088", "0.089", "0.090"]),
        ([2.0, 0.008], ["0.001", "0.01", "0.1", "1", "10"]),
        ([-1.0, 1.0], ["−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        ([0.0, 0.0], ["−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        ([5.0], ["2", "4", "6", "8"]),
        ([1e-9, 3e-9], ["1.00×10⁻⁹", "1.50×10⁻⁹", "2.00×10⁻⁹", "2.50×10⁻⁹", "3.00×10⁻⁹"]),
        ([0.0, 3e6], ["0", "1.00×10⁶", "2.00×10⁶", "3.00×10⁶"]),
    ],
)
def test_axes_have_round_numbers_that_enclose_the_values(values, names):
    chart = str(line_chart([line_of("x", {0: list(enumerate(values))})], "x"))
    found = re.findall(r'text-anchor="end">([^<]*)</text>', chart)
    assert found[: len(names)] == names
    assert "nan" not in chart.lower().replace("nanmean", "")
    heights = [float(y) for y in re.findall(r'cy="([\d.-]+)"', chart)]
    assert all(0 <= y <= 210 for y in heights)


# Elsewhere


def test_a_comparison_may_hold_optimised_sets(tmp_path):
    source = write_source(tmp_path / "data", ["a", "b"])
    write_run(tmp_path / "chosen", source)
    write_made(tmp_path / "made", ["a", "b"], size=32)
    arms = [Arm("Chosen", tmp_path / "chosen", [50.0]), Arm("Made", tmp_path / "made", [60.0, 62.0])]
    for number, order in enumerate((arms, arms[::-1])):
        out = tmp_path / f"out{number}"
        text = write_comparison(
            out, title="both", arms=order, facts={"data": "two"}, source=source
        ).read_text()
        assert "61.0%" in text
        assert "None" not in text
        assert ("How Made chose" in text, "How Chosen chose" in text) == (False, number == 0)
        assert (out / "mosaic.png").stat().st_size > 0


def test_the_commands_work_on_such_a_folder(tmp_path, capsys):
    write_made(tmp_path / "set", ["a", "b"])
    assert main(["report", str(tmp_path / "set")]) == 0
    assert main(["export", str(tmp_path / "set"), "--out", str(tmp_path / "all.tar")]) == 0
    assert (tmp_path / "set" / "report.html").is_file()
    assert (tmp_path / "all.tar").is_file()
    assert (
        main(["evaluate", "--distilled", str(tmp_path / "set"), "--data", "gone", "--arch", "convnet3_in"])
        == 2
    )
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        "ddfast: the distilled set holds no soft labels: give a teacher (--teacher), or a --protocol"
    )
