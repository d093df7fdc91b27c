"""A data set of Hugging Face's Hub by its name: `hf:OWNER/NAME`, or `hf:OWNER/NAME:CONFIGURATION`."""

from __future__ import annotations

import functools
from typing import Any

from ddfast.data.sources import Source
from ddfast.errors import UsageError, one_line
from ddfast.fetching import in_silence

PREFIX = "hf:"


def open_hub(name: str, split: str) -> Source:
    """One split of a data set of the Hub, downloaded once by the library `datasets` into its own cache.

    Args:
        name: with `hf:` before it.
        split: "train" or "test", as `open_source`.

    Raises:
        UsageError: in one line: `datasets` is not installed, the set cannot be fetched, or it has no images and labels.
    """
    from ddfast.data.memory import open_memory

    source = open_memory(_fetched(name), split)
    source.name = name
    return source


@functools.lru_cache(maxsize=2)
def _fetched(name: str) -> Any:
    """The splits of a set; the last ones are held, as a run opens its data more than once."""
    repository, _, configuration = name.removeprefix(PREFIX).partition(":")
    if not repository:
        raise UsageError(f"{name} wants a name behind the colon, as hf:uoft-cs/cifar10")
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{name} needs the package datasets: pip install datasets") from error
    try:
        with in_silence():
            return datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # the library, and each transport below it, has errors of its own
        raise UsageError(
            f"{name} could not be fetched: {one_line(error)}; where there is no network give the folder of its Parquet "
            "files"
        ) from error
