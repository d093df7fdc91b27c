import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddfast.errors import UsageError
from ddfast.models import Teacher
from ddfast.report.attribute import attribute_images
from tests.report.rendering import SIZE, write_source


class Corner(torch.nn.Module):
    """Two classes: the mean of the top left quarter, and minus it."""

    def forward(self, images):
        mean = images[:, :, : SIZE // 2, : SIZE // 2].mean(dim=(1, 2, 3))
        return torch.stack([mean, -mean], dim=1)


@pytest.fixture
def teacher():
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return Teacher(Corner().eval(), "corner", ["bright", "dark"], SIZE, mean, std, sha256="0" * 64)


def white(path):
    Image.new("RGB", (40, 48), "white").save(path)
    return path


def rows_of(out):
    with open(out / "attribution.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_one_file_is_attributed_to_the_first_choice(tmp_path, teacher):
    out = tmp_path / "out"
    count = attribute_images(
        white(tmp_path / "a <b>.png"), teacher=teacher, out=out, grid=2, n_samples=8, quiet=True
    )
    assert count == 1
    (row,) = rows_of(out)
    assert (row["class"], row["first_choice"]) == ("bright", "bright")
    phi = [float(row[f"phi_{r}_{c}"]) for r in range(2) for c in range(2)]
    np.testing.assert_allclose(phi, [1, 0, 0, 0], atol=1e-6)
    assert float(row["value"]) == pytest.approx(1)
    assert row["picture"] == "heatmaps/000000_a _b_.png".replace(" ", "_")
    picture = np.asarray(Image.open(out / row["picture"])).astype(int)
    side = picture.shape[0]
    assert picture[side // 4, side // 4, 0] > picture[side // 4, side // 4, 2] + 80
    assert np.ptp(picture[side * 3 // 4, side * 3 // 4]) <= 1
    page = (out / "index.html").read_text("utf-8")
    assert "a &lt;b&gt;.png" in page
    assert "a <b>" not in page


def test_a_flat_folder_skips_and_counts_bad_images(tmp_path, teacher, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        white(folder / name)
    (folder / "bad.jpg").write_bytes(b"no image")
    count = attribute_images(folder, teacher=teacher, out=tmp_path / "out", grid=2, n_samples=8)
    assert count == 2
    assert [row["file"] for row in rows_of(tmp_path / "out")] == ["a.png", "b.png"]
    assert "skipped 1 of 3" in capsys.readouterr().err
    assert "1 file could not be decoded" in (tmp_path / "out" / "index.html").read_text("utf-8")


def test_a_labelled_set_is_attributed_to_its_labels(tmp_path, teacher):
    write_source(tmp_path / "data", ["bright", "dark"])
    out = tmp_path / "out"
    count = attribute_images(
        tmp_path / "data", teacher=teacher, out=out, grid=2, n_samples=8, limit=4, quiet=True
    )
    assert count == 4
    rows = rows_of(out)
    assert [row["class"] for row in rows] == ["bright", "bright", "dark", "dark"]
    assert {row["first_choice"] for row in rows} == {"bright"}
    assert all(float(row["phi_0_0"]) < 0 for row in rows[2:])


def test_bad_requests_are_refused_and_leave_nothing(tmp_path, teacher):
    image = white(tmp_path / "a.png")
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="estimator"):
        attribute_images(image, teacher=teacher, out=out, estimator="none", quiet=True)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    with pytest.raises(UsageError, match="no usable image"):
        attribute_images(bad, teacher=teacher, out=out, quiet=True)
    with pytest.raises(UsageError, match="no such folder"):
        attribute_images(tmp_path / "nowhere", teacher=teacher, out=out, quiet=True)
    write_source(tmp_path / "data", ["cat", "dog"])
    with pytest.raises(UsageError, match="does not know the classes cat, dog"):
        attribute_images(tmp_path / "data", teacher=teacher, out=out, quiet=True)
    assert not out.exists()
    with pytest.raises(UsageError, match="not an empty folder"):
        attribute_images(image, teacher=teacher, out=tmp_path, quiet=True)
    assert not list(tmp_path.glob(".*"))


def test_nothing_is_written_among_the_images(tmp_path, teacher):
    flat = tmp_path / "flat"
    for number, name in enumerate(teacher.class_names):
        (flat / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (40 * number, 90, 20)).save(flat / name / "0.png")
    with pytest.raises(UsageError, match="lies among the images"):
        attribute_images(flat, teacher=teacher, out=flat / "heat", quiet=True)
    assert not (flat / "heat").exists()


@pytest.mark.parametrize("linked", [False, True])
def test_the_folder_may_be_an_empty_one(linked, tmp_path, teacher, monkeypatch):
    Image.new("RGB", (16, 16), (40, 90, 20)).save(tmp_path / "one.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty")
    out = tmp_path / "link" if linked else Path(".")
    assert attribute_images(tmp_path / "one.png", teacher=teacher, out=out, n_samples=18, quiet=True) == 1
    assert (tmp_path / "empty" / "index.html").is_file()
