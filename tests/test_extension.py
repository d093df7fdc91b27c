"""The C++ extension: what it may link against, what DDFAST_BUILD_EXT does, and what is said where it is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import build_backend
import ddfast
from ddfast.ops import _dispatch
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


@pytest.mark.parametrize("hook", ["wheel", "editable"])
def test_an_isolated_build_fetches_torch_only_when_the_ops_are_asked_for(hook, monkeypatch):
    requires = getattr(build_backend, f"get_requires_for_build_{hook}")
    for value, wanted in (("1", ["torch>=2.10"]), ("auto", []), ("0", [])):
        monkeypatch.setenv("DDFAST_BUILD_EXT", value)
        assert requires() == requires({}) == wanted
    monkeypatch.delenv("DDFAST_BUILD_EXT")
    assert requires() == []
    assert build_backend.get_requires_for_build_sdist() == []


def test_the_backend_has_every_hook_that_setuptools_has():
    from setuptools import build_meta

    hooks = [name for name in build_meta.__all__ if name.startswith(("build_", "prepare_", "get_"))]
    assert {"build_wheel", "build_editable", "build_sdist"} <= set(hooks)
    assert all(callable(getattr(build_backend, name)) for name in hooks)


def test_a_build_that_is_asked_for_the_ops_says_how_to_show_it_a_torch():
    hidden = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', '--name']\n"
        "runpy.run_path('setup.py')"
    )
    build = subprocess.run(
        [sys.executable, "-c", hidden],
        cwd=ROOT,
        env={**os.environ, "DDFAST_BUILD_EXT": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode != 0
    assert build.stderr.splitlines()[-1] == (
        "DDFAST_BUILD_EXT=1, but torch cannot be imported (DDFAST_BUILD_EXT=1 lets pip fetch it for the build; "
        "--no-build-isolation shows yours)"
    )


SLOW = (
    "ops run in plain PyTorch, several times slower than in C++: the extension ddfast._C was not built "
    "(DDFAST_BUILD_EXT=1 and a C++ compiler build it); ddfast env tells more"
)


@pytest.fixture
def not_built(monkeypatch):
    """A machine on which the extension was not built."""
    reason = "the extension ddfast._C was not built (DDFAST_BUILD_EXT=1 and a C++ compiler build it)"
    monkeypatch.setattr(_dispatch, "native_status", lambda: (False, reason))
    monkeypatch.setattr(_dispatch, "_SAID", set())
    monkeypatch.delenv("DDFAST_NATIVE", raising=False)


def test_the_first_long_run_says_once_that_the_ops_are_slow(not_built, capsys):
    _dispatch.say_slow_ops(torch.device("cpu"), quiet=True)
    _dispatch.say_slow_ops(torch.device("cuda"))
    assert capsys.readouterr().err == ""
    _dispatch.say_slow_ops(torch.device("cpu"))
    _dispatch.say_slow_ops(torch.device("cpu"))
    assert capsys.readouterr().err == SLOW + "\n"


def test_who_switched_the_ops_off_is_told_nothing(not_built, monkeypatch, capsys):
    monkeypatch.setenv("DDFAST_NATIVE", "0")
    _dispatch.say_slow_ops(torch.device("cpu"))
    assert capsys.readouterr().err == ""


def test_every_long_call_says_it(not_built, toy_folder, toy_teacher, tmp_path, monkeypatch, capsys):
    from ddfast.report.attribute import attribute_images
    from ddfast.training.proxies import train_proxies

    short = {"epochs": 1, "batch_size": 32, "image_size": 16}
    small = {"device": "cpu"}
    calls = {
        "train_teacher": lambda: ddfast.train_teacher(
            toy_folder,
            out=tmp_path / "t.safetensors",
            arch="convnet3",
            arch_options={"width": 4},
            **short,
            **small,
        ),
        "distill": lambda: ddfast.distill(
            "random", data=toy_folder, teacher=toy_teacher, ipc=1, out=tmp_path / "set", **small
        ),
        "evaluate": lambda: ddfast.evaluate(
            tmp_path / "set",
            toy_folder,
            arch="convnet3",
            arch_options={"width": 4},
            epochs=1,
            seeds=1,
            **small,
        ),
        "train_proxies": lambda: train_proxies(
            toy_folder, arch="convnet3_in", count=1, out=tmp_path / "proxies", **short, **small
        ),
        "attribute": lambda: attribute_images(
            toy_folder, teacher=toy_teacher, out=tmp_path / "heat", n_samples=32, limit=1, **small
        ),
    }
    for name, call in calls.items():
        monkeypatch.setattr(_dispatch, "_SAID", set())
        call()
        assert capsys.readouterr().err.splitlines().count(SLOW) == 1, name
