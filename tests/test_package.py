import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ddfast

ROOT = Path(__file__).parent.parent


def python(code, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/", **kwargs
    )


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torchvision", "pyarrow", "PIL", "triton", "jinja2", "captum", "numpy", "torch")
    found = python(f"import sys, ddfast; print([m for m in {heavy} if m in sys.modules])")
    assert found.stdout.strip() == "[]", found.stderr


def test_importing_every_public_name_never_initialises_cuda():
    found = python(
        "import ddfast, torch\nfor name in dir(ddfast): getattr(ddfast, name)\nprint(torch.cuda.is_initialized())"
    )
    assert found.stdout.strip() == "False", found.stderr


def test_every_public_name_resolves():
    for name in ddfast.__all__:
        assert getattr(ddfast, name) is not None


def test_the_citation_names_this_version():
    assert f"\nversion: {ddfast.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"it has .*shapley"):
        ddfast.shaply  # noqa: B018


def test_kernels_refuse_another_name():
    found = subprocess.run(
        [sys.executable, "-c", "import kernels"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert found.returncode != 0
    assert "import them as 'ddfast.kernels'" in found.stderr
    assert importlib.import_module("ddfast.kernels").__name__ == "ddfast.kernels"
