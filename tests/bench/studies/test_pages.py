"""Every page that a study writes names its command, its commit and its budget; conftest reads those of all tests."""

import ast
from pathlib import Path

import pytest

from bench.studies.arguments import told, without_folders
from tests.bench.studies.conftest import lacks

STUDIES = Path(__file__).parents[3] / "bench" / "studies"
WRITERS = [path for path in sorted(STUDIES.rglob("*.py")) if '".md"' in path.read_text("utf-8")]


def test_what_a_page_lacks_is_noticed():
    page = "# Title\n\n- students: 30 epochs\n\n" + told(
        "league", ["--data", "/x/cifar10.zip", "--out", "/y"]
    )
    assert lacks(page) == []
    assert "`python -m bench.studies league --data cifar10.zip`" in page  # no folders of the machine
    assert lacks(page.replace("30 epochs", "")) == ["budget"]
    assert lacks(page.replace("Made by", "By")) == ["command"]
    assert lacks(page.replace("written at commit", "")) == ["commit"]


def test_there_are_pages_to_look_at():
    assert {path.stem for path in WRITERS} >= {
        "page",
        "cmi",
        "igds",
        "udd",
        "dd_ranking",
        "compare",
        "continual",
    }
    assert STUDIES / "league" / "page.py" in WRITERS


@pytest.mark.parametrize("path", WRITERS, ids=lambda path: path.stem)
def test_every_writer_of_a_page_tells_its_command_and_commit(path):
    called = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "told" in called


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("/a/cifar10.zip", "cifar10.zip"),
        ("experts=/a/b", "experts=b"),
        ("whitened: experts=../a/b normalization=none", "whitened: experts=b normalization=none"),
        ("sizes=1/3,1/2", "sizes=1/3,1/2"),
        ("--ipc", "--ipc"),
    ],
)
def test_pages_name_files_without_their_folders(word, told):
    assert without_folders(word) == told
