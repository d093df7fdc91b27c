"""Methods that make pixels: they optimise or sample images in long loops, from a state that survives a kill."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ddfast.data.pool import ClassPool
from ddfast.errors import UsageError
from ddfast.methods.base import Context, Method
from ddfast.output.pixels import CURVE as CURVE  # the names of a state's curve
from ddfast.output.pixels import CURVE_OF_SOME as CURVE_OF_SOME
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
        curve: a row for every step that was noted, by the names of `CURVE` and `CURVE_OF_SOME`; what a row lacks was
            not measured.
    """

    group: Group
    tensors: dict[str, Tensor]
    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def pixels(self) -> Tensor:
        """The images of the group, float32 [N, 3, H, W]."""
        return self.tensors["pixels"]


class Synthesis(Method):
    """Base of the methods that make pixels. What `loss` and `images` return is in the method's `space`."""

    stages: ClassVar[tuple[str, ...]] = ("synthesize",)
    needs_teacher: ClassVar[bool] = False
    space: ClassVar[str] = "normalized"  # of the pixels; "unit" where they lie in [0, 1]
    factor: ClassVar[int] = 1  # tiles per side that a stored image decodes to

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

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps that a group takes."""

    @abstractmethod
    def groups(self, classes: int, ipc: int) -> Sequence[Group]:
        """The classes of a run, dealt to groups by the settings alone: ranks may come and go."""

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

    def tiles_per_side(self, factor: str, image_size: int) -> int:
        """See `Method`: the method decides."""
        if factor not in ("auto", str(self.factor)):
            raise UsageError(
                f"{argument('factor')} of {self.name} is {self.factor}, got {factor}: leave it out"
            )
        return super().tiles_per_side(str(self.factor), image_size)

    def learned_rate(self, state: State) -> float | None:
        """The learning rate of students that was optimised with the images, None where none was."""
        return None

    def whitening(self, context: Context) -> Whitening | None:
        """The transform that the images are whitened by, which stays with the set; None where they are not."""
        return None

    def images(self, state: State) -> Tensor:
        """What students train on, float32 [N, 3, H, W]."""
        return state.pixels
