"""What a speed entry is: contenders on the same inputs, behind a gate that must pass before any of them is timed.

    @speed_entry(
        "grad_norm",
        what="per-sample gradient norms against vmap(grad)",
        minutes=0.5,
        targets={"cpu": {"float32": Target(5.0, memory=1 / 4)}},
    )
    def grad_norm(settings: Settings) -> Iterator[Contest]:
        ...
        yield Contest("ResNet-18", ours=[Contender("float32", run)], peer=Contender("vmap", plain), gate=gate)

A gate returns `Check`s: what was compared, the error found and the error allowed. One that fails stops its contest,
because the time of a wrong answer is no result.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.speed.measuring import Spread, calls_a_round, extra_bytes, seconds_of
from ddfast.ops.precision import resolve_precision


class GateFailed(Exception):
    """A contender's result is wrong, so nothing was timed."""


class Unavailable(Exception):
    """An entry cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Settings:
    """How the entries run.

    Attributes:
        device: where the contenders compute.
        rounds: timed rounds a contest; None for each entry's own number.
        quick: tiny sizes and one round, to try the path; the numbers mean nothing.
        teacher: a teacher file for the entries that can take one, instead of a seeded random network.
        data: images for that teacher, as `--data` of `ddfast distill`.
    """

    device: torch.device
    rounds: int | None = None
    quick: bool = False
    teacher: Path | None = None
    data: str | None = None

    def size(self, cpu: Any, *, quick: Any, gpu: Any) -> Any:
        """The one of three sizes that fits: tiny for a quick run, else that of the device."""
        if self.quick:
            return quick
        return gpu if self.device.type == "cuda" else cpu

    def rounds_or(self, usual: int) -> int:
        """Timed rounds where the entry's own number is `usual`."""
        return self.rounds or (1 if self.quick else usual)

    def precisions(self) -> tuple[str, ...]:
        """`float32`, and `auto` where it means something else here."""
        return ("float32",) if resolve_precision("auto", self.device) is None else ("float32", "auto")


@dataclass(frozen=True)
class Target:
    """What an entry is meant to reach.

    Attributes:
        ratio: the peer's time over ours, at least.
        memory: our extra memory over the peer's, at most; None for no target.
        rate: our units of work a second, at least; None for no target.
        share: our share of a whole, at most, instead of a ratio.
    """

    ratio: float | None = None
    memory: float | None = None
    rate: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Contender:
    """One way of doing the work.

    Attributes:
        name: as it stands in the tables.
        run: does the work once, on inputs made beforehand, and returns the result.
        work: units of work that one call does, so that contenders may differ in how much they do.
        package: distribution whose version goes into the table; None for PyTorch's own.
    """

    name: str
    run: Callable[[], Any]
    work: float = 1.0
    package: str | None = None


@dataclass(frozen=True)
class Check:
    """One comparison of a gate: an error and the largest one allowed. NaN never passes."""

    what: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number and small enough."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.what}: {self.error:.2g} {'<=' if self.passed else 'exceeds'} {self.allowed:.2g}"


@dataclass(frozen=True)
class Measurement:
    """One row of the results: a contender of ours against its peer, or a share of a whole.

    Times are seconds a unit of work. `ratio` is taken within each round, so that a drift of the machine cancels.
    """

    case: str
    contender: str
    peer: str
    unit: str
    gate: str
    rounds: int
    seconds: Spread | None = None
    peer_seconds: Spread | None = None
    ratio: Spread | None = None
    share: Spread | None = None
    extra_bytes: int | None = None
    peer_extra_bytes: int | None = None
    peer_package: str | None = None
    note: str = ""

    @property
    def rate(self) -> float | None:
        """Units of work a second, of ours, in the median."""
        return 1 / self.seconds.p50 if self.seconds is not None else None

    @property
    def memory_ratio(self) -> float | None:
        """Our extra memory over the peer's; None where either was not measured or the peer needed none."""
        if self.extra_bytes is None or not self.peer_extra_bytes:
            return None
        return self.extra_bytes / self.peer_extra_bytes

    def meets(self, target: Target | None) -> bool | None:
        """Whether every figure of the target is reached in the median; None without a target."""
        if target is None:
            return None
        compared = [
            (target.ratio, self.ratio.p50 if self.ratio else None, 1),
            (target.rate, self.rate, 1),
            (target.memory, self.memory_ratio, -1),
            (target.share, self.share.p50 if self.share else None, -1),
        ]
        return all(
            found is not None and sign * found >= sign * wanted for wanted, found, sign in compared if wanted
        )


class Measurable(Protocol):
    """What an entry yields: something that checks itself and is then measured."""

    @property
    def case(self) -> str:
        """What is measured, as it stands in the tables."""
        ...

    def measure(self, device: torch.device, rounds: int | None, quick: bool) -> list[Measurement]:
        """Check, then measure."""
        ...


@dataclass(frozen=True)
class Contest:
    """Contenders of ours against one peer, on the same inputs.

    Attributes:
        case: what they compute, as it stands in the tables.
        ours: the contenders, one row each.
        peer: whom they are measured against.
        gate: compares their results; see `Check`.
        unit: what `Contender.work` counts, in the plural.
        rounds: timed rounds, each with every contender once, in alternating order.
        long: a call takes seconds. It is then neither repeated within a round nor warmed up again, as the gate has run
            every contender, and memory is read in the last round instead of in a call of its own.
        note: a sentence for the table.
    """

    case: str
    ours: Sequence[Contender]
    peer: Contender
    gate: Callable[[], Iterable[Check]]
    unit: str = "calls"
    rounds: int = 7
    long: bool = False
    note: str = ""

    def measure(self, device: torch.device, rounds: int | None, quick: bool) -> list[Measurement]:
        """Pass the gate, warm up, time the contenders in turn, then measure the memory of each.

        Raises:
            GateFailed: a check did not pass. Nothing was timed.
        """
        checks = passed(self.case, self.gate())
        contenders = [*self.ours, self.peer]
        rounds = rounds or (1 if quick else self.rounds)
        calls = [1 if quick or self.long else calls_a_round(each.run, device) for each in contenders]
        times: list[list[float]] = [[] for _ in contenders]
        memory = [0] * len(contenders)
        for number in range(rounds):
            order = range(len(contenders)) if number % 2 == 0 else range(len(contenders) - 1, -1, -1)
            for index in order:

                def timed(index: int = index) -> None:
                    run, work = contenders[index].run, contenders[index].work
                    times[index].append(seconds_of(run, device, calls[index]) / work)

                if self.long and number == rounds - 1:
                    memory[index] = extra_bytes(timed, device)
                else:
                    timed()
        if not self.long:
            memory = [extra_bytes(each.run, device) for each in contenders]
        return [
            Measurement(
                case=self.case,
                contender=contender.name,
                peer=self.peer.name,
                unit=self.unit,
                gate=checks,
                rounds=rounds,
                seconds=Spread.of(times[index]),
                peer_seconds=Spread.of(times[-1]),
                ratio=Spread.of([peer / own for peer, own in zip(times[-1], times[index], strict=True)]),
                extra_bytes=memory[index],
                peer_extra_bytes=memory[-1],
                peer_package=self.peer.package,
                note=self.note,
            )
            for index, contender in enumerate(self.ours)
        ]


def passed(case: str, checks: Iterable[Check]) -> str:
    """The checks as one sentence.

    Raises:
        GateFailed: one of them did not pass, or there are none.
    """
    checks = list(checks)
    failed = [check for check in checks if not check.passed]
    if failed or not checks:
        told = "; ".join(map(str, failed)) or "it compares nothing"
        raise GateFailed(f"{case}: the gate refuses to time: {told}")
    return "; ".join(map(str, checks))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """||found - wanted|| / ||wanted||, in float64 on the CPU; infinity where the shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm())


# The entries
# -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A registered entry. `targets` are by device type and contender; `minutes` its cost on two CPU cores."""

    name: str
    what: str
    minutes: float
    contests: Callable[[Settings], Iterable[Measurable]]
    targets: Mapping[str, Mapping[str, Target]] = field(default_factory=dict)

    def target(self, device: torch.device, measurement: Measurement) -> Target | None:
        """The target of a row; keys are `case` or contender names, the more specific first."""
        known = self.targets.get(device.type, {})
        return known.get(f"{measurement.case}: {measurement.contender}", known.get(measurement.contender))

    def run(self, settings: Settings) -> list[Measurement]:
        """Measure every contest, one after another.

        Raises:
            GateFailed: a contender is wrong.
            Unavailable: something that the entry needs is missing.
        """
        rows: list[Measurement] = []
        for contest in self.contests(settings):
            rows += contest.measure(settings.device, settings.rounds, settings.quick)
        return rows


ENTRIES: dict[str, Entry] = {}


def speed_entry(
    name: str, *, what: str, minutes: float, targets: Mapping[str, Mapping[str, Target]] | None = None
) -> Callable[[Callable[[Settings], Iterable[Measurable]]], Callable[[Settings], Iterable[Measurable]]]:
    """Register a function from `Settings` to contests under `name`."""

    def register(
        contests: Callable[[Settings], Iterable[Measurable]],
    ) -> Callable[[Settings], Iterable[Measurable]]:
        if name in ENTRIES:
            raise ValueError(f"two speed entries are called {name!r}")
        ENTRIES[name] = Entry(name, what, minutes, contests, targets or {})
        return contests

    return register


def require(package: str) -> None:
    """Check that a peer is installed.

    Raises:
        Unavailable: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed (pip install {package}, or make dev)")


def clock() -> str:
    """Local date and time to the minute, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M%z")
