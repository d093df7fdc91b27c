"""What a reader meets on a page: contrast, sizes and widths, in light and in dark, on a telephone and at a desk."""

import functools
import re
from pathlib import Path

import pytest

from ddfast.data import open_source
from ddfast.output.evaluations import keep_evaluation
from ddfast.report import Arm, write_comparison, write_report
from tests.output.made import write_made
from tests.report.browser import CHROMIUM, find_axe, look
from tests.report.folders import build_data, build_run
from tests.report.rendering import write_run, write_source
from tests.report.test_made import CURVE, SETTINGS

STYLE = (Path(__file__).parents[2] / "ddfast" / "report" / "page.css").read_text("utf-8")
LEAST = 4.5  # WCAG 2.1, level AA, of text that is not large
NAMES = ["ball", "a class of a rather long name, as WordNet has them", "leaf"]


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def themes():
    """The colours of the page by name, in light and in dark."""
    roots = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", root)) for root in roots]
    assert len(found) == 2
    return {"light": found[0], "dark": {**found[0], **found[1]}}


def text_colours():
    """Names of the colours that anything is written in: all of `color`, and `fill` where it is a chart's text."""
    found = {}
    for selector, body in re.findall(r"([^{}]+)\{([^{}]*)\}", STYLE):
        wanted = "color" if not re.search(r"text|name|value|deviation", selector) else "color|fill"
        for value in re.findall(rf"(?<![\w-])(?:{wanted}): ([^;]+)", body):
            found.setdefault(value.strip(), selector.strip())
    return found


def test_contrast_is_computed_as_wcag_defines_it():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_of_every_colour_is_read_on_every_ground(theme):
    colours = themes()[theme]
    written = text_colours()
    assert len(written) >= 4
    for value, selector in written.items():
        name = re.fullmatch(r"var\(--([\w-]+)\)", value)
        assert name, f"{selector}: {value} is the same in light and dark: give it a name"
        for ground in ("paper", "card"):
            assert contrast(colours[name[1]], colours[ground]) >= LEAST, (selector, name[1], ground)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One page of each kind."""
    root = tmp_path_factory.mktemp("pages")
    build_data(root / "data", NAMES, 6, 32)
    for method in ("infoutil", "random"):
        (root / method / "scores").mkdir(parents=True)
        build_run(root / method, root / "data", ipc=6, factor=1, method=method, size=32)
    source = open_source(root / "data", "train")
    keep_evaluation(root / "infoutil", result(better_than_random={"points": 5.13, "error": 0.84}))
    write_made(root / "made", NAMES, curve=CURVE, options={"synthesize": SETTINGS})
    arms = [Arm("Ours", root / "infoutil", [60.0, 62.5], 0.5), Arm("Random", root / "random", [50.0, 51.0])]
    paths = {
        "chosen": write_report(root / "infoutil", source=source),
        "made": write_report(root / "made"),
        "comparison": write_comparison(
            root / "out",
            title="Two sets",
            arms=arms,
            facts={"Seeds": "2"},
            source=source,
            reference=("teacher", 12.0),
        ),
    }
    return {name: path.read_text("utf-8") for name, path in paths.items()}


def result(**more):
    return {
        "images": "8 bits",
        "arch": "convnet3",
        "arch_options": {},
        "protocol": "rded",
        "labels": "stored",
        "epochs": 300,
        "batch_size": 18,
        "steps": 300,
        "recipe": "d16df23c60e5",
        "digests": {
            "images": "aabbccddeeff",
            "labels": "112233445566",
            "teacher": None,
            "test": "001122334455",
        },
        "top1": [41.2, 40.1, 42.6],
        "top5": [88.0, 87.0, 88.0],
        "best": [42.0, 41.0, 43.0],
        **more,
    }


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """axe-core, where npm brings it; what it is asked here is asked of every page by this file as well."""
    return find_axe(tmp_path_factory.mktemp("axe")) if CHROMIUM is not None else None


@pytest.fixture(scope="module")
def looked(pages, axe, tmp_path_factory):
    """What stands in a page of a kind, looked at once."""
    return functools.cache(lambda kind: look(pages[kind], tmp_path_factory.mktemp(kind), axe))


@pytest.mark.parametrize("kind", ["chosen", "made", "comparison"])
def test_pages_fit_every_window_and_can_be_read_there(kind, pages, looked):
    page = pages[kind]
    assert "<main" in page
    assert '<html lang="en"' in page
    assert all("alt=" in image for image in re.findall(r"<img [^>]*>", page))
    assert all("aria-label=" in chart for chart in re.findall(r'<svg class="chart[^>]*>', page))
    for theme in themes().values():  # without a browser this is what is known
        assert (
            min(contrast(theme[name], theme["card"]) for name in ("ink", "soft", "faint", "accent-text"))
            >= LEAST
        )
    if CHROMIUM is None:
        return
    for place, found in looked(kind).items():
        assert found["content"] <= found["width"], (place, "scrolls sideways")
        assert len(found["texts"]) > 40, place
        worst = min(found["texts"], key=lambda text: text["contrast"])
        assert worst["contrast"] >= LEAST, (place, worst)
        smallest = min(found["texts"], key=lambda text: text["size"])
        assert smallest["size"] >= 12, (place, smallest)
        charts = [text for text in found["texts"] if text["chart"]]
        assert charts, place
        for text in charts:  # no chart's text leaves the window
            assert text["left"] >= 0, (place, text)
            assert text["right"] <= found["width"], (place, text)
        assert not found["violations"], (place, found["violations"])


def test_thumbnails_grow_with_the_window(pages, looked):
    page = pages["chosen"]
    assert "repeat(var(--columns), minmax(0, 1fr))" in page
    assert not re.search(r"\.(mosaic|versus)[^{]*\{[^}]*max-width", STYLE)
    if CHROMIUM is None:
        return
    side = {
        width: min(image["width"] for image in found["images"] if image["group"] == "mosaic")
        for (mode, width), found in looked("chosen").items()
        if mode == "light"
    }
    assert side[400] >= 80
    assert side[900] >= 100
    assert side[1400] >= 170  # six in a row beside the name of the class


@pytest.mark.parametrize(
    ("record", "method", "answer", "note"),
    [
        (
            {"better_than_random": {"points": 5.13, "error": 0.84}},
            "infoutil",
            "Yes, by 5.1 ± 0.8 points",
            "41.3% ± 1.3",
        ),
        (
            {"better_than_random": {"points": -2.0, "error": 0.5}},
            "infoutil",
            "No, worse by 2.0 ± 0.5 points",
            "",
        ),
        (
            {"better_than_random": {"points": 0.3, "error": 0.8}},
            "infoutil",
            "Not shown: +0.3 ± 0.8 points",
            "",
        ),
        (
            {"better_than_random": {"points": 3.0, "error": 0.0}, "top1": [40.0]},
            "infoutil",
            "Yes, by 3.0 points",
            "One student each",
        ),
        (
            {},
            "infoutil",
            "Not measured yet",
            "Students reach 41.3% ± 1.3 (convnet3, stored soft labels), which alone",
        ),
        (
            None,
            "infoutil",
            "Not measured yet",
            "ddfast compare FOLDER --data DATA &amp;&amp; ddfast report FOLDER",
        ),
        (
            None,
            "random",
            "This is the random set",
            "ddfast compare FOLDER --data DATA &amp;&amp; ddfast report FOLDER",
        ),
    ],
)
def test_the_headline_answers_whether_it_is_better_than_random(record, method, answer, note, tmp_path):
    build_data(tmp_path / "data", NAMES[:2], 2, 32)
    (tmp_path / "run" / "scores").mkdir(parents=True)
    build_run(tmp_path / "run", tmp_path / "data", ipc=1, factor=1, method=method, size=32)
    if record is not None:
        keep_evaluation(tmp_path / "run", result(**record))
    page = write_report(tmp_path / "run").read_text("utf-8")
    said = page.split("Better than random?")[1].split("</section>")[0]
    assert f'<p class="answer">{answer}</p>' in said
    assert note in said


def test_bars_of_soft_labels_share_one_scale_and_numbers_have_words(pages):
    page = pages["chosen"]
    bars = [
        (float(width), float(share))
        for width, share in re.findall(
            r'<b style="width: ([\d.]+)%"></b></i><span class="share">([\d.]+)', page
        )
    ]
    assert len(bars) > 10
    assert all(width == pytest.approx(100 * share, abs=0.06) for width, share in bars)
    assert page.count('<span class="head">probability</span>') == page.count('class="labels"') > 0
    assert re.search(r'<span class="score"><span>score</span> [\d.]', page)
    assert "top-1 61.2% ± 1.8" in pages["comparison"]
    assert "from 10.0 to 6.00" in pages["made"]


def test_what_a_crop_was_ranked_by_stands_beside_its_number_once(tmp_path):
    source = write_source(tmp_path / "data", NAMES)
    write_run(tmp_path / "run", source)
    page = write_report(tmp_path / "run", source=source).read_text("utf-8")
    cards = [text.split("</article>")[0] for text in page.split('class="sample card"')[1:]]
    assert len(cards) == 3
    for card in cards:
        assert re.search(r'<span class="score"><span>teacher&#39;s loss</span> [\d.]', card)
        assert card.count("teacher&#39;s loss") == 1
        assert "gradient norm" in card
