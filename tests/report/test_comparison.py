import numpy as np
import pytest
from PIL import Image

from ddfast.report import Arm, write_comparison
from tests.report.rendering import write_run, write_source


@pytest.fixture
def arms(tmp_path):
    source = write_source(tmp_path / "data", ["a", "<b>"])
    write_run(tmp_path / "ours", source)
    write_run(tmp_path / "random", source, method="random", phi=False)
    ours = Arm("Our<i>s", tmp_path / "ours", [60.0, 62.0, 64.0], 0.75, "cropped")
    return source, [ours, Arm("Random", tmp_path / "random", [50.0], None)]


def test_a_comparison_shows_accuracy_coverage_and_both_sets(tmp_path, arms):
    source, both = arms
    page = write_comparison(tmp_path / "out", title="T<1>", arms=both, facts={"Seeds": "3"}, source=source)
    text = page.read_text("utf-8")
    for said in (
        "62.0%",
        "± 2.0",
        "50.0%",
        "75%",
        "12.0 percentage points more",
        "cropped",
        "Seeds",
        "T&lt;1&gt;",
    ):
        assert said in text
    assert "Our<i>" not in text
    assert text.count('class="bar strong"') == 1
    assert text.count('class="whisker"') == 1
    assert np.asarray(Image.open(tmp_path / "out" / "mosaic.png")).shape[1] > 2 * 96


def test_the_same_arms_give_the_same_bytes(tmp_path, arms):
    source, both = arms
    pages = [
        write_comparison(tmp_path / n, title="t", arms=both, facts={}, source=source) for n in ("x", "y")
    ]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert (tmp_path / "x/mosaic.png").read_bytes() == (tmp_path / "y/mosaic.png").read_bytes()


def test_the_lead_does_not_flatter(tmp_path, arms):
    source, both = arms
    page = write_comparison(tmp_path / "out", title="t", arms=both[::-1], facts={}, source=source)
    assert "12.0 percentage points fewer" in page.read_text("utf-8")


def test_known_objects_are_outlined(tmp_path, arms):
    source, both = arms
    truth = {sample.key: (4, 4, 12, 12) for sample in source.samples}
    page = write_comparison(tmp_path / "out", title="t", arms=both, facts={}, source=source, truth=truth)
    assert page.read_text("utf-8").count('class="box truth"') == 2


def test_impossible_arms_are_refused(tmp_path, arms):
    with pytest.raises(ValueError, match="at least one student"):
        Arm("a", tmp_path, [])
    with pytest.raises(ValueError, match="share"):
        Arm("a", tmp_path, [1.0], 82)
    with pytest.raises(ValueError, match="at least two arms"):
        write_comparison(tmp_path / "out", title="t", arms=arms[1][:1], facts={})
