"""Methods that make pixels: they optimise or sample images in long loops, from a state that survives a kill."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddfast.data.pool import ClassPool
from ddfast.errors import DivergedError, UsageError
from ddfast.methods.base import Context, Method
from ddfast.output.pixels import CURVE as CURVE  # the names of a state's curve
from ddfast.output.pixels import Regions
from ddfast.output.whitening import Whitening
from ddfast.wording import argument


@dataclass(frozen=True)
class Group:
    """Classes that are synthesised together: the unit of work of a rank, and of resumption.

    Attributes:
        number: place among the groups of a run.
        classes: their labels, ascending.
    """

    number: int
    classes: tuple[int, ...]


@dataclass
class State:
    """Where the synthesis of a group stands. With the draws, which are keyed by the step, it decides all that follows.

    Attributes:
        group: whose state it is.
        tensors: by name; "pixels" is among them, float32 [N, 3, H, W], the images of the group class by class.
        step: steps that are done.
        curve: a row for every step that was noted, by the names of the method's `measures`; what a row lacks was not
            measured.
        unreadable: places in the source of the files of its classes that cannot be decoded, once it is finished.
    """

    group: Group
    tensors: dict[str, Tensor]
    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    unreadable: set[int] = field(default_factory=set)

    @property
    def pixels(self) -> Tensor:
        """The images of the group, float32 [N, 3, H, W]."""
        return self.tensors["pixels"]


class Synthesis(Method):
    """Base of the methods that make pixels. What `loss` and `images` return is in the method's `space`."""

    stages: ClassVar[tuple[str, ...]] = ("synthesize",)
    needs_teacher: ClassVar[bool] = False
    protocol: ClassVar[str] = "dsa"
    space: ClassVar[str] = "normalized"  # of the pixels; "unit" where they lie in [0, 1]
    factor: int = 1  # tiles per side that a stored image decodes to
    pads: ClassVar[bool] = False  # whether images are padded where the factor does not divide their side
    factors: ClassVar[
        tuple[int, ...]
    ] = ()  # those that a run may choose, the default first; none: `factor` alone
    draws_images: ClassVar[bool] = True  # whether steps draw real images, which are then decoded and held
    judged: ClassVar[bool] = True  # whether the images of any step can train students
    measures: ClassVar[Mapping[str, str]] = CURVE  # what a row of the curve may hold
    lever: ClassVar[str] = "iterations"  # the option that makes a run shorter

    def check_ipc(self, ipc: int) -> None:
        """Refuse a number of images per class at which an option would do nothing.

        Raises:
            UsageError: which one, and what to do.
        """

    def check_pool(self, counts: Tensor, class_names: Sequence[str], ipc: int) -> None:
        """Refuse a pool that the method cannot work on, before anything is written.

        Args:
            counts: int64 [classes], images that each class of the pool has.
            class_names: their names.
            ipc: images per class that the run is to make.

        Raises:
            UsageError: which class, what is missing, and what to do.
        """

    def drawn_at_once(self, ipc: int) -> int:
        """The most images of one class that a draw asks for; classes with few more are decoded to be sure."""
        return ipc

    def open(self, context: Context) -> None:
        """Load what the method needs besides the pool, before anything is written; on every rank.

        Raises:
            UsageError: it is not there, or does not fit the run.
        """

    def notes(self, context: Context) -> list[str]:
        """What is worth a line when a run starts, each a sentence without a full stop."""
        return []

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps that a group takes."""

    @abstractmethod
    def groups(self, classes: int, ipc: int) -> Sequence[Group]:
        """The classes of a run, dealt to groups by the settings alone: ranks may come and go."""

    def in_one_group(self, classes: int, ipc: int) -> str:
        """The setting, as its caller types it, with which all images of a run are one group."""
        return f"{argument('class_batch')} {classes}"

    def judged_on(self, context: Context) -> tuple[str, dict[str, Any]]:
        """Architecture of the students that judge images while they are made, and its keyword arguments."""
        return str(self.options.arch), {}

    @abstractmethod
    def begin(self, group: Group, pool: ClassPool, context: Context) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(self, number: int, state: State, pool: ClassPool, context: Context) -> float:
        """Take step `number`, counted from 0, and return its loss. `state.tensors` change, `state.step` does not.

        Draws are keyed by (seed, purpose, group, step), so that a run that was killed goes on with the same ones.

        Raises:
            DivergedError: the loss is no longer finite; the state is as it was before the step.
        """

    def close(self) -> None:
        """Give back what steps hold besides the state, once none is taken any more."""

    def tiles_per_side(self, factor: str, image_size: int) -> int:
        """See `Method`: the method decides."""
        known = self.factors or (self.factor,)
        if factor not in ("auto", *map(str, known)):
            may = " or ".join(map(str, sorted(known)))
            raise UsageError(f"{argument('factor')} of {self.name} is {may}, got {factor}: leave it out")
        chosen = str(known[0]) if factor == "auto" else factor
        return int(chosen) if self.pads else super().tiles_per_side(chosen, image_size)

    def learned_rate(self, state: State) -> float | None:
        """The learning rate of students that was optimised with the images, None where none was."""
        return None

    def whitening(self, context: Context) -> Whitening | None:
        """The transform that the images are whitened by, which stays with the set; None where they are not."""
        return None

    def is_noted(self, number: int, times: int = 10) -> bool:
        """Whether what costs something is measured in this step: the first, the last, and about `times` between."""
        return number % max(1, self.steps // times) == 0 or number == self.steps - 1

    def finite(
        self,
        number: int,
        measured: Mapping[str, Tensor],
        made: Tensor,
        called: Mapping[str, str],
        advice: str,
    ) -> dict[str, float]:
        """What was measured, as numbers: the one time that a step waits for a GPU.

        Args:
            number: of the step.
            measured: scalars by name.
            made: what the step made; it is only looked at.
            called: names in words; that of `made` stands under "made".
            advice: what to do where something is not finite.

        Raises:
            DivergedError: something is not finite.
        """
        values = [*measured.values(), torch.linalg.vector_norm(made)]
        found = torch.stack([value.double() for value in values]).tolist()
        row = dict(zip((*measured, "made"), found, strict=True))
        if bad := next((name for name, value in row.items() if not math.isfinite(value)), None):
            raise DivergedError(
                f"{called.get(bad, bad)} of {self.name} would no longer be finite at step {number} of {self.steps}: "
                f"{advice}; what was made before that step is kept"
            )
        del row["made"]
        return row

    def images(self, state: State) -> Tensor:
        """What students train on, float32 [N, 3, H, W]."""
        return state.pixels

    def before(self, state: State, pool: ClassPool, context: Context) -> Tensor | None:
        """What the report shows beside the images of a finished state, float32 [N, 3, H, W]: those of the start."""
        return self.images(self.begin(state.group, pool, context))

    def regions(
        self, images: Tensor, pool: Callable[[], ClassPool], context: Context
    ) -> tuple[Regions, str] | None:
        """The regions of the finished images that students see beside them, and what chose them; None for none.

        Args:
            images: float32 [N, 3, H, W] in the method's space, of all classes, class by class.
            pool: opens the real images of all classes.
            context: of the run.
        """
        return None
