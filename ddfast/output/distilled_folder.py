"""`Distilled`: the path of an output folder, with the set and the report that are in it."""

from __future__ import annotations

import html
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddfast.errors import UsageError

if TYPE_CHECKING:
    from ddfast.output.distilled import DistilledSet

    _Path = Path
else:
    _Path = type(Path())  # before Python 3.12 only the system's own kind can be inherited from

_REPORT = "report.html"


class Distilled(_Path):
    """The output folder of a distillation: a `Path` in every respect, equal to that of the folder.

    What is derived from it (`distilled / "train"`, `distilled.parent`) is a plain `Path`.
    """

    def __new__(cls, *parts: Any) -> Distilled:  # noqa: D102
        if sys.version_info >= (3, 12):
            return super().__new__(cls, *parts)
        # Paths are made of these three before 3.12; `_from_parts` below makes plain ones.
        plain, self = Path(*parts), object.__new__(cls)
        for name in ("_drv", "_root", "_parts"):
            setattr(self, name, getattr(plain, name))
        return self

    if sys.version_info >= (3, 12):

        def with_segments(self, *segments: Any) -> Path:
            """The plain path that is derived from this one."""
            return Path(*segments)

    else:

        @classmethod
        def _from_parts(cls, *arguments: Any) -> Path:
            return _Path._from_parts(*arguments)  # type: ignore[attr-defined, no-any-return]

        @classmethod
        def _from_parsed_parts(cls, *arguments: Any) -> Path:
            return _Path._from_parsed_parts(*arguments)  # type: ignore[attr-defined, no-any-return]

    def __reduce__(self) -> Any:
        return Distilled, (str(self),)

    @property
    def path(self) -> Path:
        """The folder as a plain `Path`."""
        return Path(str(self))

    @cached_property
    def set(self) -> DistilledSet:
        """The distilled set, opened when it is first asked for.

        Raises:
            UsageError: the folder is unfinished, or damaged.
        """
        from ddfast.output.distilled import DistilledSet

        return DistilledSet(self.path)

    @property
    def report(self) -> Path:
        """Path of `report.html`, which is written when the set is finished."""
        return self.path / _REPORT

    def _repr_html_(self) -> str:
        """What the set is, its mosaic and its report; of an unfinished folder what it lacks."""
        try:
            shown = self.set._repr_html_()
        except UsageError as error:
            return f"<p>{html.escape(str(error))}</p>"
        return f"{shown}<p>report: <code>{html.escape(str(self.report))}</code></p>"
