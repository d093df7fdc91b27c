"""The page of the scale run from made-up figures, and the pieces it is measured with. Nothing is timed."""

import sys

import pytest

from bench.trials import scale

FIGURES = {
    "classes": 100,
    "sources": 1200,
    "seconds": 20.0,
    "peak_memory": 900_000_000,
    "score_seconds": 8.0,
    "rate": 150.0,
    "processor_ms": 1.5,
    "busy": 0.98,
    "select_seconds": 0.1,
    "compose_seconds": 1.0,
    "relabel_seconds": 0.5,
    "report_seconds": 0.2,
    "other_seconds": 10.2,
}


def row(name, **changes):
    return scale.Measured(name=name, **{**FIGURES, **changes})


def page(whole):
    rows = {"whole": whole, "tenth": row("tenth"), "no model": row("tenth, no model", rate=3000.0)}
    kill = {"killed_after": 4.0, "shards_kept": 2, "shards": 4, "sources_scored_after": 600}
    kill |= {"resumed_for": 17.0, "lost": 1.0, "same_bytes": True}
    stages = scale.Stages(
        read=0.1,
        decode=2.0,
        attribution=300.0,
        crops=1.0,
        norms=200.0,
        rows=0.05,
        end_to_end_rate=2.0,
        processor_seconds=0.8,
        busy=0.99,
        decode_rate=600.0,
        threads=2,
        loader="torchvision",
        flops=3_600_000_000,
    )
    return scale.report(rows, kill, {"flops": 1_600_000, "top1": 40.0}, stages)


def test_the_page_says_what_was_met_and_what_is_counted():
    text = page(row("whole", sources=12_000, peak_memory=930_000_000))
    assert "1.033 times the tenth's (bound 1.1): met" in text
    assert (
        "600 sources left to score, 17.0 s more; 1.0 s lost against the undisturbed run; the same bytes"
        in text
    )
    assert "| the paper, one A100, its whole pipeline | 149 | 5.83 h |" in text
    assert "| these 2 cores, as measured | 2.00 | 435 h |" in text
    assert "1,000 a second ask for 169 TFLOP/s, which is 253% of float32's 67, 34% of TF32's 495" in text
    assert "1,000 a second need 4 of them, 3,000 10" in text
    assert "a ceiling of 20,000 a second" in text
    assert "Nothing here was measured on a GPU" in text


def test_a_missed_bound_is_said():
    text = page(row("whole", peak_memory=1_100_000_000, busy=0.5))
    assert "1.222 times the tenth's (bound 1.1): missed" in text
    assert "Model busy 50.0% of the score pass (bound 90%): missed" in text


def test_a_class_is_the_same_images_again(tmp_path):
    for name in ("a", "b"):
        scale.render_class(tmp_path / name, 7, 3)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["00.jpg", "01.jpg", "02.jpg"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_run_that_ends_before_its_kill_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="ended with exit code 0"):
        scale.run([sys.executable, "-c", ""], 1, kill_at=(tmp_path, 1))
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "part-00000.parquet").touch()
    assert scale.run([sys.executable, "-c", "import time; time.sleep(600)"], 1, kill_at=(tmp_path, 1)) > 0
