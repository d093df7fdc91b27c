"""Packaging: the `kernels/` folder is installed as `ddfast.kernels`; the version is read from the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "ddfast" / "__init__.py").read_text()).group(1)

setup(
    version=VERSION,
    packages=[*find_packages(include=["ddfast", "ddfast.*"]), "ddfast.kernels"],
    package_dir={"ddfast": "ddfast", "ddfast.kernels": "kernels"},
    package_data={"ddfast.report": ["*.html", "*.css"]},
)
