"""What stands around a download by another library: its chatter is held back, what goes wrong is one line of ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = ("huggingface_hub", "timm", "datasets", "transformers")


@contextmanager
def in_silence() -> Iterator[None]:
    """Without the warnings of these libraries, such as a line for each attempt to reach the Hub."""
    before = {name: logging.getLogger(name).level for name in _LIBRARIES}
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
