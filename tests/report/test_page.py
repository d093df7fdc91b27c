import json
import re
import subprocess
import sys

import pytest

from ddfast.errors import UsageError
from ddfast.report import write_report
from tests.report.rendering import write_run, write_source

EVIL = "<script>alert(1)</script>".replace("/", "∕")  # a class is a folder, whose name holds no slash
NAMES = ["apple", EVIL, "pear & plum"]


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "data", NAMES)


def page_of(root, **kwargs):
    return write_report(root, **kwargs).read_text("utf-8")


def test_the_report_is_written_and_its_bytes_are_the_same_again(tmp_path, source):
    root = tmp_path / "run"
    write_run(root, source)
    write_report(root, source=source)
    first = {name: (root / name).read_bytes() for name in ("report.html", "mosaic.png")}
    write_report(root, source=source)
    assert {name: (root / name).read_bytes() for name in first} == first
    assert not list(root.glob(".*tmp*"))


def test_the_report_is_written_before_the_manifest_is_complete(tmp_path, source):
    root = tmp_path / "run"
    write_run(root, source, complete=False)
    before = page_of(root, source=source)
    text = (root / "manifest.json").read_text("utf-8").replace('"complete": false', '"complete": true')
    (root / "manifest.json").write_text(text, "utf-8")
    assert page_of(root, source=source) == before


def test_names_are_escaped(tmp_path, source):
    root = tmp_path / "run"
    write_run(root, source, quarantined=({"path": f"{EVIL}/x.jpg", "reason": "<i>truncated</i>"},))
    page = page_of(root, source=source, title="<u>title</u>")
    assert "<script" not in page
    assert "<b>.png" not in page
    assert "<i>truncated" not in page
    assert "<u>title" not in page
    assert page.count("&lt;script&gt;") >= 4  # mosaic, gallery, table, quarantined
    assert "pear &amp; plum" in page


def test_the_page_needs_nothing_else_and_says_nothing_of_the_machine(tmp_path, source):
    root = tmp_path / "run"
    write_run(root, source)
    page = page_of(root, source=source)
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page
    assert str(tmp_path) not in page
    assert "prefers-color-scheme" in page
    assert "viewport" in page


def test_facts_and_settings_are_shown(tmp_path, source):
    root = tmp_path / "run"
    write_run(root, source, factor=1)
    page = page_of(root, source=source)
    for fact in (
        "infoutil",
        "convnet3",
        "83.8% top-1",
        "options.score.estimator",
        "permutation",
        "1 per class",
        "each class kept the crops with the lowest loss of the teacher",
    ):
        assert fact in page
    assert page.count('class="sample card"') == 3


def test_heatmaps_come_with_phi_only(tmp_path, source):
    write_run(tmp_path / "with", source)
    write_run(tmp_path / "without", source, method="rded", phi=False)
    with_phi, without = (
        page_of(tmp_path / "with", source=source),
        page_of(tmp_path / "without", source=source),
    )
    assert "attribution of the source" in with_phi
    assert "attribution of the source" not in without
    assert without.count('class="box chosen"') == 3
    assert without.count('class="box other"') == 3 * 2


def test_a_missing_source_is_said_and_the_crop_is_still_shown(tmp_path, source):
    root = tmp_path / "run"
    write_run(root, source)
    page = page_of(root)
    assert page.count("the data was not given") >= 3
    assert page.count('alt="kept crop"') == 3


def test_a_file_that_is_gone_is_said(tmp_path, source):
    root = tmp_path / "run"
    write_run(root, source)
    kept = source.samples[0]
    (tmp_path / "data" / "train" / kept.key).write_bytes(b"")
    page = page_of(root, source=source)
    assert page.count("the file can no longer be read") == 1
    other = write_source(tmp_path / "other", ["x", "y"])
    assert "the data no longer holds this file" in page_of(root, source=other)


def test_quarantined_files_are_listed_with_their_reasons(tmp_path, source):
    root = tmp_path / "run"
    write_run(root, source, quarantined=({"path": "apple/bad.jpg", "reason": "truncated file"},))
    page = page_of(root, source=source)
    assert "apple/bad.jpg" in page
    assert "truncated file" in page
    assert "1 file could not be read" in page


def test_tiles_of_factor_two(tmp_path):
    source = write_source(tmp_path / "data", ["a", "b"], each=4)
    write_run(tmp_path / "run", source, factor=2)
    page = page_of(tmp_path / "run", source=source)
    assert "every image holds 4 tiles" in page
    assert page.count('class="sample card"') == 6  # three of each class


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no distilled set"):
        write_report(tmp_path)


def test_the_package_imports_nothing_heavy():
    code = (
        "import ddfast.report, sys; print(sorted({'PIL', 'jinja2', 'torch', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("method", "said"), [("rded", "(RDED)"), ("random", "drawn uniformly"), ("own", "method own")]
)
def test_every_method_has_its_lead(tmp_path, source, method, said):
    root = tmp_path / "run"
    write_run(root, source, method=method)
    manifest = json.loads((root / "manifest.json").read_text("utf-8"))
    manifest["options"]["select"] = {}
    (root / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    assert said in page_of(root)


def test_of_many_classes_a_report_holds_the_shown_ones(tmp_path, monkeypatch):
    from ddfast.report import contents
    from ddfast.report import folder as reading

    names = [f"class {index}" for index in range(9)]
    source = write_source(tmp_path / "many", names)
    write_run(tmp_path / "run", source)
    everything = reading.read_folder(tmp_path / "run")
    for module in (contents, reading):
        monkeypatch.setattr(module, "SHOWN_TABLE_ROWS", 2)
        monkeypatch.setattr(module, "SHOWN_CLASSES", 3)
    assert reading.shown_labels(9).tolist() == [0, 1, 4, 8]
    folder = reading.read_folder(tmp_path / "run")
    assert folder.images == everything.images == 9
    assert [row["label"] for row in folder.rows] == [0, 1, 4, 8]
    assert [row.label for row in folder.selection] == [0, 1, 4, 8]
    assert set(folder.scores["label"].tolist()) == {0, 1, 4, 8}
    # The labels are those of the same images.
    assert folder.soft_labels.values.equal(everything.soft_labels.values[[0, 1, 4, 8]])
    assert contents.class_rows(folder) == contents.class_rows(everything)
    page = write_report(tmp_path / "run", source=source).read_text()
    assert "candidate crops of 4 of 9 classes" in page
    assert "The first 2 of 9 classes." in page
