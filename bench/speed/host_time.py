"""Speed entries of what a GPU waits for: the host time of the score pass, and of each Triton launcher.

`host_time` scores micro-batches with a ResNet-18 whose every width is divided by 64, 1 to 8 channels, on images of 16
pixels, in one thread: so little is computed that what is left is Python, the dispatcher and the allocator, for which a
GPU would be waiting. Times are those of the process on a core, which neighbours on the machine do not lengthen.

Little is not nothing: 128 images under 32 coalitions are 4,096 images however small they are. So the arithmetic is
taken off: the time inside of every operator that neither makes nor views a tensor, on the same clock, measured in
passes of their own under a dispatch mode, where an operator is what autograd and composite operators have been taken
apart into. Only operators on what would lie on the GPU count, those inside of the masks, the forward passes, the tail,
the crops and the norms: what draws coalitions is the host's work on every machine. An operator's own dispatch, a
microsecond or two, goes off with it, and so does the body of a fused op, which on a GPU is a launcher (`launchers`
tells its Python). So what is left is a lower bound of the host's time. On a GPU each of those operators is a launch of
about 4 microseconds; their number stands beside it. The printed times are the least of all rounds.

It is the CPU's path through the pass: what only a GPU does, as recording and replaying graphs, is told by
`python -m bench.gpu`, and what only a CPU does, as its fused convolutions, shows here alone.

`launchers` runs every launcher of `ddfast.kernels` on tiny CPU tensors with the launch itself, `JITFunction.run`,
replaced by nothing: what is left is checking, allocating and the arguments of the launch, in Python, and the operators
of torch that a launcher calls beside its kernel, each a launch of its own on a GPU. Their time is printed with it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.speed.measuring import Spread
from bench.speed.registry import (
    Check,
    Measurable,
    Measurement,
    Settings,
    Unavailable,
    passed,
    require,
    speed_entry,
)
from bench.speed.score_pass import Pass, parts
from bench.speed.subjects import IMAGENET_MEAN, IMAGENET_STD, Subject, rendered
from ddfast.unchanged import unchanged

NARROWED = 64  # what every width of ResNet-18 is divided by
SIZE = 16  # pixels
COALITIONS = 32  # of each image, the default of InfoUtil
MICRO_BATCHES = (16, 128)
_ALLOCATING = ("empty", "empty_strided", "empty_like", "new_empty", "set_", "resize_")


# The score pass
# -----------------------------------------------------------------------------------------------------


def narrow_resnet18(classes: int = 10) -> nn.Module:
    """torchvision's ResNet-18 in eval mode with seeded weights and every width divided by 64."""
    from torchvision.models import resnet18

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet18(num_classes=classes)
        for name, layer in list(model.named_modules()):
            narrow = _narrowed(layer, classes)
            if narrow is not None:
                owner, _, last = name.rpartition(".")
                setattr(model.get_submodule(owner), last, narrow)
    return model.eval()


def _narrowed(layer: nn.Module, classes: int) -> nn.Module | None:
    if isinstance(layer, nn.Conv2d):
        inputs = 3 if layer.in_channels == 3 else layer.in_channels // NARROWED
        outputs = layer.out_channels // NARROWED
        # A layer's own sizes are tuples of any length to PyTorch's annotations.
        return nn.Conv2d(inputs, outputs, layer.kernel_size, layer.stride, layer.padding, bias=False)  # type: ignore[arg-type]
    if isinstance(layer, nn.BatchNorm2d):
        return nn.BatchNorm2d(layer.num_features // NARROWED)
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features // NARROWED, classes)
    return None


class Clock:
    """Adds up the seconds spent in each part, without those spent in parts inside of it, by the clock `now`."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside: list[str] = []  # the parts that are entered
        self._deeper: list[float] = []  # seconds of the parts inside of each

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context whose time counts to `name`."""
        self.inside.append(name)
        self._deeper.append(0.0)
        started = self.now()
        try:
            yield
        finally:
            spent = self.now() - started
            self.inside.pop()
            self.seconds[name] += spent - self._deeper.pop()
            if self._deeper:
                self._deeper[-1] += spent


class Operators(TorchDispatchMode):
    """Context in which the time of every operator that computes is noted with the part that it lies in."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.noted: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        started = self.clock.now()
        result = func(*args, **(kwargs or {}))
        spent = self.clock.now() - started
        part = self.clock.inside[-1] if self.clock.inside else ""
        if ":" in part and not func.is_view and func.overloadpacket.__name__ not in _ALLOCATING:
            self.noted.append((part, spent))
        return result


@dataclass(frozen=True)
class HostTime:
    """One micro-batch of the score pass, in whole and by part, with its arithmetic and without."""

    case: str
    scored: Pass

    def measure(self, device: torch.device, rounds: int | None, quick: bool) -> list[Measurement]:
        """Check the crops and norms, then time micro-batches in one thread; prints a table of milliseconds."""
        rounds = rounds or (1 if quick else 15)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            gate = passed(self.case, self.scored.checks())
            batch = self.scored.micro_batch(self.scored.found.images)
            method, context = self.scored.method, self.scored.context

            def run() -> None:
                method.score(batch, context)

            with unchanged(self.scored.found.model):  # as a run holds its teacher
                for _ in range(1 if quick else 4):
                    run()
                whole, by_part, missing = self._timed(run, rounds)
                computed, operators = arithmetic(run, 1 if quick else rounds)
        finally:
            torch.set_num_threads(threads)
        if missing:
            raise Unavailable(
                f"the score pass has no {', '.join(missing)} any more: see bench/speed/score_pass.py"
            )
        inner = sorted({name for one in by_part for name in one if ":" in name})
        # No part computes for longer than it takes.
        computed = {name: min(computed[name], *(one[name] for one in by_part)) for name in inner}
        print(f"  {self.case}, ms in one thread\n{_HEADER}", flush=True)
        common: dict[str, Any] = {"peer": "", "gate": gate, "rounds": rounds, "unit": "micro-batches"}
        rows = []
        for part in ("whole", "attribution", "norms", *inner):
            found = whole if part == "whole" else _sums(by_part, part)
            within = [name for name in inner if part == "whole" or f"{name}:".startswith(f"{part}:")]
            taken = sum(computed[name] for name in within)
            launched = sum(operators[name] for name in within)
            print(_line(part, min(found), taken, self.scored.batch, launched), flush=True)
            for contender, off in () if ":" in part else (("with arithmetic", 0.0), ("without", taken)):
                spread = Spread.of([max(seconds - off, 0.0) for seconds in found])
                rows.append(Measurement(f"{self.case}: {part}", contender, seconds=spread, **common))
        return rows

    def _timed(
        self, run: Callable[[], None], rounds: int
    ) -> tuple[list[float], list[dict[str, float]], list[str]]:
        """Seconds of each round, seconds of its parts, and the seams that were not found."""
        clock = Clock(time.thread_time)
        whole, by_part = [], []
        for _ in range(rounds):
            started = time.thread_time()
            run()
            whole.append(time.thread_time() - started)
        with parts(clock.part) as missing:
            for _ in range(rounds):
                clock.seconds.clear()
                with clock.part("method"):
                    run()
                by_part.append(dict(clock.seconds))
        return whole, by_part, missing


_HEADER = f"  {'':<28}{'whole':>9}{'arithmetic':>12}{'host':>9}{'host a source':>15}{'operators':>11}"


def _line(part: str, seconds: float, computed: float, sources: int, operators: int) -> str:
    host = 1e3 * (seconds - computed)
    return f"  {part:<28}{1e3 * seconds:>9.2f}{1e3 * computed:>12.2f}{host:>9.2f}{host / sources:>15.4f}{operators:>11}"


def _sums(by_part: Sequence[dict[str, float]], part: str) -> list[float]:
    """Seconds of a part and of the parts named behind it, for each round."""
    return [sum(v for name, v in one.items() if f"{name}:".startswith(f"{part}:")) for one in by_part]


def arithmetic(run: Callable[[], Any], calls: int) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and number of the operators that compute, by part; of each operator the least of some calls."""
    found: list[list[tuple[str, float]]] = []
    for _ in range(calls):
        clock = Clock(time.thread_time)
        with parts(clock.part), Operators(clock) as operators:
            run()
        found.append(operators.noted)
    seconds: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for same in zip(*found, strict=True):  # every call runs the same operators
        part = same[0][0]
        seconds[part] += min(spent for _, spent in same)
        count[part] += 1
    return seconds, count


@speed_entry(
    "host_time",
    what="the score pass's Python and dispatch, beside a network too narrow to compute",
    minutes=0.5,
)
def host_time(settings: Settings) -> Iterator[Measurable]:
    """Micro-batches of 16 and of 128 sources, each in one forward pass of all its masked images."""
    if settings.device.type != "cpu":
        raise Unavailable("host_time counts the host's work on a CPU; `python -m bench.gpu` tells a GPU's")
    for count in settings.size(MICRO_BATCHES, quick=(2, 4), gpu=()):
        images = rendered(count, SIZE)
        found = Subject(
            "narrow ResNet-18",
            narrow_resnet18().to(memory_format=torch.channels_last),
            images,
            torch.arange(count) % 10,
            IMAGENET_MEAN,
            IMAGENET_STD,
        )
        scored = Pass("host time", "float32", found, count, COALITIONS * count)
        yield HostTime(f"micro-batch {count}", scored)


# Triton launchers
# -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LauncherTime:
    """Seconds that one launcher takes in Python, on given arguments, with the launch replaced by nothing."""

    case: str
    launch: Callable[[], Any]

    def measure(self, device: torch.device, rounds: int | None, quick: bool) -> list[Measurement]:
        """Count the launches, which must be some, then time the call without them; prints a line."""
        rounds = rounds or (1 if quick else 7)
        calls = 2 if quick else 200
        with no_launches() as launched:
            self.launch()
            gate = passed(self.case, [Check("calls without a launch", float(not launched), 0.0)])
            count, computed = self._operators(calls)
            times = []
            for _ in range(rounds):
                started = time.thread_time()
                for _ in range(calls):
                    self.launch()
                times.append((time.thread_time() - started) / calls)
        kernels = ", ".join(sorted(launched))
        print(
            f"  {1e6 * min(times):6.1f} us, {1e6 * computed:5.1f} us of it in {count:2} operators of torch: "
            f"{self.case} ({kernels})",
            flush=True,
        )
        spread = Spread.of(times)
        return [Measurement(self.case, "python", "", "calls", gate, rounds, seconds=spread)]

    def _operators(self, calls: int) -> tuple[int, float]:
        """How many operators compute in a call, and their seconds: of each the least of some calls."""
        found = []
        for _ in range(calls):
            clock = Clock(time.thread_time)
            with clock.part("launcher: python"), Operators(clock) as operators:
                self.launch()
            found.append([spent for _, spent in operators.noted])
        return len(found[0]), sum(map(min, zip(*found, strict=True)))


@contextmanager
def no_launches() -> Iterator[set[str]]:
    """Context in which a Triton launch does nothing; its value names the kernels that would have been launched."""
    from triton.runtime.jit import JITFunction

    launched: set[str] = set()

    def nothing(self: Any, *args: Any, **kwargs: Any) -> None:
        launched.add(self.__name__)

    with mock.patch.object(JITFunction, "run", nothing):
        yield launched


def _whatever_the_sources(run: Callable[[], Any], sources: int) -> Any:
    return run()


@speed_entry("launchers", what="the Python of every Triton launcher, without the launch", minutes=0.3)
def launchers(settings: Settings) -> Iterator[Measurable]:
    """The tiny inputs of the entry `ops`, as the ops' faces hand them to the launchers."""
    require("triton")
    from bench.speed.op_cases import op_cases
    from bench.speed.static import Case, cases, launches
    from bench.speed.static import launchers as known

    small = Settings(torch.device("cpu"), quick=True)
    found = [
        Case(case.op, case.case, partial(_whatever_the_sources, case.ours))
        for case in op_cases(small)
        if case.op in known()
    ]
    served = {case.op for case in found}
    for case in (*found, *(case for case in cases() if case.op not in served)):
        yield LauncherTime(f"{case.op}, {case.what}", launches(case, 1, "cpu")[0])
