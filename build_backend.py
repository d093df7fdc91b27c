"""setuptools' build backend, with torch among the requirements of an isolated build that is asked for the C++ ops.

`DDFAST_BUILD_EXT=1 pip install .` fetches torch (gigabytes) into the build environment for its headers. Otherwise an
isolated build fetches setuptools alone and makes a pure wheel.
"""

import os

from setuptools.build_meta import *  # noqa: F403 - all other hooks are setuptools' own
from setuptools.build_meta import __all__ as __all__

TORCH = "torch>=2.10"  # the oldest with the stable ABI that csrc/ is written to


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    """What an isolated build needs beside setuptools."""
    return [TORCH] if os.environ.get("DDFAST_BUILD_EXT") == "1" else []


def get_requires_for_build_editable(config_settings: object = None) -> list[str]:
    """The same of an editable install."""
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings: object = None) -> list[str]:
    """Sources need nothing."""
    return []
