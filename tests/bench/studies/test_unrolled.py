"""The study of the ways back through a training, on a few images."""

import csv

from bench.studies import unrolled


def test_errors_and_memory_are_told_for_every_way_and_length(toy_folder, tmp_path, capsys):
    out = tmp_path / "unrolled"
    size = ["--image-size", "16", "--width", "4", "--memory-width", "4", "--warm-steps", "2"]
    assert unrolled.main(["--data", str(toy_folder), "--steps", "1,4", *size, "--out", str(out)]) == 0
    with out.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["way"], row["steps"]) for row in rows[:3]] == [
        ("autograd", "1"),
        ("exact", "1"),
        ("detached", "1"),
    ]
    assert len(rows) == 2 * 2 * 3
    errors = {(row["way"], row["steps"], row["rate"]): row["error"] for row in rows}
    for rate in ("0.01", "0.05"):
        assert errors["autograd", "4", rate] == ""
        assert float(errors["exact", "4", rate]) < 1e-12
        assert float(errors["detached", "1", rate]) < 1e-12  # a single step has no weights to go back through
        assert float(errors["detached", "4", rate]) > 1e-4
    assert [row["bytes"] != "" for row in rows] == [row["rate"] == "0.01" for row in rows]
    page = out.with_suffix(".md").read_text()
    assert "python -m bench.studies unrolled" in page
    assert "commit" in page
    assert "![error and memory against the number of steps](unrolled.png)" in page
    assert out.with_suffix(".png").stat().st_size > 1000
    assert capsys.readouterr().out.strip() == page.strip()
