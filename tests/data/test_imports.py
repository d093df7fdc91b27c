from __future__ import annotations

import subprocess
import sys

import pytest

import ddfast.data


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, ddfast.data\n"
        "ddfast.data.open_source\n"
        "heavy = {'pyarrow', 'PIL', 'torchvision', 'torch', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_loads() -> None:
    assert set(ddfast.data.__all__) == set(dir(ddfast.data))
    for name in ddfast.data.__all__:
        assert getattr(ddfast.data, name) is not None


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'open_sauce'; it has .*open_source"):
        _ = ddfast.data.open_sauce
