"""The C++ extension: what it may link against, and what DDFAST_BUILD_EXT does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddfast.ops._dispatch import native_status

ROOT = Path(__file__).parent.parent
NATIVE = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])


def setup_py(**environment):
    """Run setup.py far enough to decide about the extension."""
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@NATIVE
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm, of binutils, is not installed")
def test_links_against_nothing_but_the_stable_abi():
    import ddfast._C

    path = ddfast._C.__file__
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1].split("@")[0] for line in listing.splitlines()]
    mangled = ("_ZN3c10", "_ZNK3c10", "_ZN2at", "_ZNK2at", "_ZN5torch", "_ZNK5torch")
    assert [symbol for symbol in symbols if symbol.startswith(mangled)] == []
    python = {symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))}
    assert python == {"PyModule_Create2"}
    assert any(symbol == "torch_library_impl" for symbol in symbols)
    assert path.endswith(".abi3.so")


def test_a_missing_compiler_fails_loudly_only_when_the_extension_is_demanded():
    demanded = setup_py(DDFAST_BUILD_EXT="1", CXX="/nowhere/c++")
    assert demanded.returncode != 0
    assert "DDFAST_BUILD_EXT=1, but there is no C++ compiler '/nowhere/c++'" in demanded.stderr

    wished = setup_py(DDFAST_BUILD_EXT="auto", CXX="/nowhere/c++")
    lines = [line for line in wished.stderr.splitlines() if line.startswith("ddfast: ")]
    assert wished.returncode == 0
    assert lines == [
        "ddfast: building without the C++ extension, because there is no C++ compiler '/nowhere/c++' (set CXX)"
    ]

    unwished = setup_py(DDFAST_BUILD_EXT="0", CXX="/nowhere/c++")
    assert unwished.returncode == 0
    assert "ddfast: " not in unwished.stderr


def test_an_unknown_mode_is_refused():
    refused = setup_py(DDFAST_BUILD_EXT="yes")
    assert refused.returncode != 0
    assert "DDFAST_BUILD_EXT is 'yes'; use auto, 1 (build or fail) or 0 (pure wheel)" in refused.stderr


def test_every_op_runs_without_the_extension():
    program = (
        "import torch, ddfast.ops as ops\n"
        "assert all(p.body == 'reference' for p in ops.paths() if p.device == 'cpu')\n"
        "masked = ops.masked_batch(torch.ones(1, 3, 4, 4), torch.ones(2, 4, dtype=torch.bool), grid=2)\n"
        "phi = ops.shapley_heatmap(torch.ones(1, 2, 5), torch.tensor([0]), torch.ones(2, 4))\n"
        "boxes = ops.noisy_crop_boxes(phi, torch.tensor([7]), seed=0, grid=2, image_size=8, crop_size=4)\n"
        "print(masked.sum().item(), phi.sum().item(), tuple(boxes.shape))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "DDFAST_NATIVE": "0"},
        capture_output=True,
        text=True,
    )
    assert finished.stdout == "96.0 8.0 (1, 5, 4)\n", finished.stderr
