"""What a distillation method is: a name, options, the stages that a run of it goes through, and what it checks.

`ddfast.methods.selection.base` holds what methods that choose crops share, `ddfast.methods.synthesis` what those share
that make pixels.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ddfast.arguments import whole_number
from ddfast.errors import UsageError
from ddfast.settings import is_place, plain
from ddfast.wording import argument, did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self

    from ddfast.models import Teacher


@dataclass(frozen=True)
class Prepared:
    """A value for every image of the pool, from `Method.prepare`.

    Attributes:
        ids: int64 [N], ascending.
        values: float32 [N].
    """

    ids: np.ndarray
    values: np.ndarray

    def of(self, ids: Tensor) -> Tensor:
        """The values of these ids, float32 [M] on the CPU; NaN for an id that the pool has not."""
        wanted = ids.cpu().numpy()
        places = np.searchsorted(self.ids, wanted).clip(max=len(self.ids) - 1)
        return torch.from_numpy(np.where(self.ids[places] == wanted, self.values[places], np.float32("nan")))


@dataclass(frozen=True, eq=False)
class Context:
    """What scoring needs beside the images: fixed at the start of a run and written in its manifest."""

    teacher: Teacher | None
    image_size: int
    factor: int
    seed: int
    precision: str
    forward_batch: int
    device: torch.device
    prepared: Prepared | None = None
    ipc: int = 0
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def tile(self) -> int:
        """Side of a tile in pixels."""
        return self.image_size // self.factor


def _as_default(value: Any, default: Any, name: str) -> Any:
    """An option's value as the type of its default: numbers may be NumPy's, or text.

    Raises:
        UsageError: it cannot be one, or is not finite.
    """
    if isinstance(default, bool):
        if isinstance(value, (bool, np.bool_)):
            return bool(value)
        raise UsageError(f"{argument(name)} must be true or false, got {value!r}")
    if isinstance(default, int):
        return whole_number(value, name)
    if isinstance(default, float):
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise UsageError(f"{argument(name)} must be a finite number, got {value!r}")
        return found
    return value


class Method(ABC):
    """Base of every method: a name, a dataclass of options, and the stages of a run."""

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    # The stages that a run goes through, in order; `ddfast.pipeline.stages` knows them.
    stages: ClassVar[tuple[str, ...]]
    needs_teacher: ClassVar[bool] = True
    protocol: ClassVar[str] = "rded"  # by which its authors evaluate
    # Whether `list_methods` names it; one that only serves a comparison is not named.
    listed: ClassVar[bool] = True
    # Whether a teacher is of use where one is given, though the method goes without as well.
    uses_teacher: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        self.options = options

    @classmethod
    def requires_teacher(cls) -> bool:
        """Whether no run goes without a teacher: the method asks one, or its soft labels do."""
        return cls.needs_teacher or "relabel" in cls.stages

    @classmethod
    def offers(cls) -> frozenset[str]:
        """What settings may depend on: the method's stages, and "teacher" where it uses one."""
        teacher = {"teacher"} if cls.requires_teacher() or cls.uses_teacher else set()
        return frozenset({*cls.stages, *teacher})

    @classmethod
    def stages_with_options(cls) -> tuple[str, ...]:
        """The stages that the method's own options decide; the others do the same for every method."""
        return tuple(stage for stage in cls.stages if stage not in ("compose", "relabel"))

    @classmethod
    def stage_of_option(cls, field: dataclasses.Field[Any]) -> str:
        """The stage that an option decides; the one that scores or makes pixels where it names none of the method's."""
        named = str(field.metadata.get("stage"))
        if named in cls.stages_with_options():
            return named
        return "score" if "score" in cls.stages else "synthesize"

    def tiles_per_side(self, factor: str, image_size: int) -> int:
        """Tiles per side of an image of this side in pixels, from the setting `factor`.

        Raises:
            UsageError: not so many.
        """
        found = (1 if image_size <= 64 else 2) if factor == "auto" else int(factor)
        if image_size % found:
            raise UsageError(
                f"{argument('factor')} must be auto, 1 or 2 and divide the image size {image_size}, got {factor}"
            )
        return found

    def own_image_size(self) -> int | None:
        """The side in pixels that the method's images have where neither a setting nor a teacher says it; None: any.

        Raises:
            UsageError: what it is read from is not there.
        """
        return None

    def resolved(self, factor: int, ipc: int) -> Method:
        """This method with every `auto` option fixed for `factor` tiles per side and `ipc` images per class."""
        return self

    @classmethod
    def from_options(cls, given: Mapping[str, Any], preset: str | None = None) -> Self:
        """Build a method from `given` option values over `preset` over the defaults.

        Raises:
            UsageError: unknown preset or option, or a value that the options refuse; the valid ones are
                listed.
        """
        if preset is not None and preset not in cls.presets:
            known = ", ".join(sorted(cls.presets)) or "none"
            near = did_you_mean(preset, cls.presets)
            raise UsageError(f"method {cls.name} has no preset {preset!r}; its presets: {known}{near}")
        fields = {field.name: field for field in dataclasses.fields(cls.Options)}
        for name in given:
            if name not in fields:
                valid = ", ".join(fields) or "none"
                near = did_you_mean(name, fields)
                raise UsageError(f"method {cls.name} has no option {name!r}; its options: {valid}{near}")
        values = {**(cls.presets[preset] if preset else {}), **given}
        for name, value in values.items():
            field = fields[name]
            if field.metadata.get("choices") is not None or field.metadata.get("check") is not None:
                values[name] = plain(field, value)
            else:
                values[name] = _as_default(value, field.default, name)
        try:
            return cls(cls.Options(**values))
        except (TypeError, ValueError) as error:
            raise UsageError(f"options of {cls.name}: {error}") from error

    def check(self, image_size: int | None) -> None:  # noqa: B027 - most methods have nothing to refuse here
        """Refuse options that no run could use, before anything is read.

        Args:
            image_size: side of the images in pixels; None where it is not known yet.

        Raises:
            UsageError: what is wrong, and what would be right.
        """

    def inputs(self) -> dict[str, Any]:
        """What decides the result besides data, teachers and settings, as the manifest tells it: hashes of files."""
        return {}

    @classmethod
    def place_names(cls) -> list[str]:
        """The options that are paths."""
        return [field.name for field in dataclasses.fields(cls.Options) if is_place(field)]

    def places(self) -> dict[str, str]:
        """The options that are paths, which the manifest leaves out: what is found there counts; see `inputs`."""
        values = {name: getattr(self.options, name) for name in self.place_names()}
        return {name: str(value) for name, value in values.items() if value is not None}

    def options_of_stage(self, stage: str) -> dict[str, Any]:
        """Option values that decide `stage`, one of `stages_with_options`, without paths."""
        return {
            field.name: getattr(self.options, field.name)
            for field in dataclasses.fields(self.options)
            if self.stage_of_option(field) == stage and not is_place(field)
        }
