"""What tests of methods share."""

from tests.conftest import digests

__all__ = ["digests"]
