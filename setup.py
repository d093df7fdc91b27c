"""Packaging: the `kernels/` folder is installed as `ddfast.kernels`, and `csrc/*.cpp` becomes `ddfast._C`.

`ddfast._C` uses only LibTorch's stable ABI (of torch 2.10) and Python's limited API (of 3.10), so that one
binary serves every later torch and Python. `DDFAST_BUILD_EXT` decides whether it is built:

- `auto` (default): build the extension where torch can be imported and a C++ compiler is found, else a pure
  wheel, with one line that says why. Build isolation hides torch; `--no-build-isolation` shows it.
- `1`: build the extension or fail. An isolated build then fetches torch for its headers, see `build_backend.py`.
- `0`: a pure wheel. Every op then runs its PyTorch reference on the CPU.
"""

import importlib.util
import os
import re
import shlex
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "ddfast" / "version.py").read_text()).group(1)

PYTHON_ABI = "0x030A0000"
TORCH_ABI = "0x020A000000000000"
COMPILER_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
]
# A fused multiply-add rounds once where two operations round twice. Without this flag the bits of a result
# would depend on the CPU the compiler builds for. No flag that relaxes floating-point arithmetic is given.
COMPILER_FLAGS += ["-ffp-contract=off"]


def missing_requirement() -> str | None:
    """What keeps this environment from building the extension, or None."""
    if importlib.util.find_spec("torch") is None:
        return (
            "torch cannot be imported (DDFAST_BUILD_EXT=1 lets pip fetch it for the build; "
            "--no-build-isolation shows yours)"
        )
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r} (set CXX)"
    return None


def extensions() -> list[Extension]:
    """The extension modules that `DDFAST_BUILD_EXT` asks for."""
    mode = os.environ.get("DDFAST_BUILD_EXT", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"DDFAST_BUILD_EXT is {mode!r}; use auto, 1 (build or fail) or 0 (pure wheel)")
    if mode == "0":
        return []
    reason = missing_requirement()
    if reason is not None:
        if mode == "1":
            raise SystemExit(f"DDFAST_BUILD_EXT=1, but {reason}")
        print(f"ddfast: building without the C++ extension, because {reason}", file=sys.stderr)
        return []

    torch = Path(importlib.util.find_spec("torch").origin).parent
    return [
        Extension(
            "ddfast._C",
            sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h")),
            include_dirs=["csrc", str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            define_macros=[("Py_LIMITED_API", PYTHON_ABI), ("TORCH_TARGET_VERSION", TORCH_ABI)],
            extra_compile_args=COMPILER_FLAGS,
            language="c++",
            py_limited_api=True,
            optional=mode == "auto",
        )
    ]


class BuildSideBySide(build_ext):
    """Compiles the sources of an extension several at a time, which halves the minute that they take on two cores."""

    def build_extension(self, extension: Extension) -> None:
        """Build one extension."""
        one_after_another = self.compiler.compile

        def side_by_side(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as threads:
                made = threads.map(lambda source: one_after_another([source], **options), sources)
                return [name for names in made for name in names]

        self.compiler.compile = side_by_side
        try:
            super().build_extension(extension)
        finally:
            self.compiler.compile = one_after_another


EXTENSIONS = extensions()

setup(
    version=VERSION,
    packages=[*find_packages(include=["ddfast", "ddfast.*"]), "ddfast.kernels"],
    package_dir={"ddfast": "ddfast", "ddfast.kernels": "kernels"},
    package_data={"ddfast.report": ["*.html", "*.css"]},
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildSideBySide},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
)
