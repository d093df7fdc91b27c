"""What a micro-batch of the score pass costs, part by part: the host's time, the device's, and who waits for whom.

The pass is the pipeline's own, `ddfast.pipeline.score.score`, from JPEG files to shards of the score table. It runs
four times, each into a folder of its own: to warm up; with the host's clock on every part
(`bench.speed.score_pass.SEAMS`), so that the parts add up to the time of the pass; under PyTorch's profiler, which
tells what ran on the device, from which part it was launched, and which calls waited for it; and on a GPU with
`torch.cuda.set_sync_debug_mode`, which names the lines that waited. Decoding runs in other threads and is also timed
alone. What a run does once, compiling and recording the passes on its first images, is a part of its own that no
micro-batch is charged for.
"""

from __future__ import annotations

import bisect
import json
import re
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.speed.host_time import Clock, narrow_resnet18
from bench.speed.registry import Settings
from bench.speed.score_pass import ONCE, SEAMS, parts, write_jpegs
from bench.speed.subjects import IMAGENET_MEAN, IMAGENET_STD, random_resnet18, rendered
from ddfast.models import Teacher
from ddfast.pipeline.opening import open_run
from ddfast.pipeline.run import Run
from ddfast.pipeline.score import score
from ddfast.settings import Settings as RunSettings

REST = "the rest"
DECODING = "decoding, in other threads"
COLUMNS = ("part", "host_ms", "waiting_ms", "device_ms", "launches", "kernels", "waits")
CLASSES = 10

_PART = "part "  # before the name of a part in a profile
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = re.compile(r"Launch|Memcpy|Memset")
# Calls that return only when the device has done something; allocating waits for all of it.
_WAIT = re.compile(r"Synchronize|^cuda(Malloc|Free|HostAlloc)|^cu(MemAlloc|MemFree)")


@dataclass
class Part:
    """Of one part of a micro-batch: milliseconds of the host, those of them spent waiting, and of the device."""

    host: float = 0.0
    waiting: float = 0.0
    device: float = 0.0
    launches: float = 0.0
    kernels: float = 0.0
    waits: float = 0.0


@dataclass(frozen=True)
class Budget:
    """One micro-batch of the score pass; all times are milliseconds a micro-batch.

    Attributes:
        case: the network, the images and the arithmetic.
        sources: images in a micro-batch.
        wall: time of the pass.
        busy: time in which the device did anything at all.
        decode: time that decoding alone takes, with nothing else to do.
        parts: by name, in the order of the pass.
        waited: how often a line of Python made the host wait, "file:line" -> times a micro-batch.
        missing: seams of the pass that were not found.
        once: seconds that recording took, once a run.
    """

    case: str
    sources: int
    wall: float
    busy: float
    decode: float
    parts: Mapping[str, Part]
    waited: Mapping[str, float] = field(default_factory=dict)
    missing: Sequence[str] = ()
    once: float = 0.0

    @property
    def host(self) -> float:
        """Milliseconds in which the scoring thread worked: neither waiting for the device nor for images."""
        return sum(
            max(part.host - part.waiting, 0.0)
            for name, part in self.parts.items()
            if name not in (DECODING, "wait for images")
        )

    @property
    def binds(self) -> str:
        """Which of decoding, host and device takes longest, and by how much the pass is longer still."""
        times = {"decoding": self.decode, "the host": self.host, "the device": self.busy}
        name = max(times, key=times.__getitem__)
        told = ", ".join(f"{each} {spent:.2f} ms" for each, spent in times.items())
        return (
            f"{name[0].upper()}{name[1:]} binds: alone they would take {told} of a micro-batch's {self.wall:.2f} ms, "
            f"{self.wall / times[name]:.2f} times the longest."
        )

    def rows(self) -> list[dict[str, str]]:
        """The parts as rows of a CSV."""
        return [
            {
                "part": name,
                "host_ms": f"{part.host:.4f}",
                "waiting_ms": f"{part.waiting:.4f}",
                "device_ms": f"{part.device:.4f}",
                "launches": f"{part.launches:.1f}",
                "kernels": f"{part.kernels:.1f}",
                "waits": f"{part.waits:.1f}",
            }
            for name, part in self.parts.items()
        ]

    def page(self) -> str:
        """The table, what binds, and the lines that waited, in Markdown."""
        recording = f" Recording took {self.once:.1f} s, once a run." if self.once else ""
        lines = [
            f"{self.case}; a micro-batch is {self.sources} sources: {self.wall:.2f} ms, "
            f"{1e3 * self.sources / self.wall:.0f} sources a second. {self.binds}\n",
            f"The device is busy {100 * self.busy / self.wall:.0f} % of the time, "
            f"{self.busy:.2f} ms of a micro-batch.{recording}\n",
            "| part | host, ms | of it waiting | device, ms | launches | kernels | waits |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        total = Part()
        for name, part in self.parts.items():
            host = "" if name == DECODING else f"{part.host:.2f}"
            # A part with others inside of it shows what they do not do.
            shown = f"{name}: the rest" if any(o.startswith(f"{name}:") for o in self.parts) else name
            lines.append(
                f"| {shown} | {host} | {part.waiting:.2f} | {part.device:.2f} | {part.launches:.0f} | "
                f"{part.kernels:.0f} | {part.waits:.1f} |"
            )
            for key in vars(total):
                setattr(total, key, getattr(total, key) + getattr(part, key))
        lines += [
            f"| together | {total.host:.2f} | {total.waiting:.2f} | {total.device:.2f} | {total.launches:.0f} | "
            f"{total.kernels:.0f} | {total.waits:.1f} |\n",
            "The host's times are of the pass as it runs and add up to it; the device's, the launches and the waits "
            "are of a profiled pass. What overlaps on the device counts once in its busy time, twice in the table.\n",
        ]
        if self.waited:
            lines.append("Lines that made the host wait, times a micro-batch:\n")
            ranked = sorted(self.waited.items(), key=lambda item: -item[1])
            lines += [f"- {place}: {times:.1f}" for place, times in ranked[:20]]
            lines.append("")
        if self.missing:
            lines.append(f"Not told apart, as they are not there any more: {', '.join(self.missing)}.\n")
        return "\n".join(lines)


# Measuring
# -----------------------------------------------------------------------------------------------------


def measured(settings: Settings) -> Budget:
    """The budget of InfoUtil with its defaults and ResNet-18 at 224 px; a tiny network for a quick run."""
    size = settings.size(224, quick=16, gpu=224)
    sources = settings.size(64, quick=40, gpu=512)
    model = narrow_resnet18(CLASSES) if settings.quick else random_resnet18(size, CLASSES)
    names = [f"{label:02d}" for label in range(CLASSES)]
    teacher = Teacher(model.cpu(), "resnet18", names, size, IMAGENET_MEAN, IMAGENET_STD, sha256="0" * 64)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        write_jpegs(data, rendered(min(sources, 128), size), count=sources, classes=names)
        return _of_passes(settings, data, teacher, Path(folder))


def _of_passes(settings: Settings, data: Path, teacher: Teacher, folder: Path) -> Budget:
    device, precision = settings.device, settings.precisions()[-1]

    def opened(name: str) -> Run:
        settings = RunSettings(
            data=data, teacher=teacher, ipc=1, out=folder / name, images_per_class=10**6, factor=2,
            precision=precision, device=device.type, preflight=False, quiet=True, threads=torch.get_num_threads(),
        )  # fmt: skip
        return open_run("infoutil", settings)

    def finished(run: Run) -> None:
        score(run)
        if device.type == "cuda":
            torch.cuda.synchronize()

    warm = opened("warm")
    finished(warm)
    sources, micro_batch = len(warm.pool()), int(warm.plan["arithmetic"]["micro_batch"])
    batches = -(-sources // micro_batch)
    decode = _decoding(warm) / batches
    clock = Clock(time.perf_counter)
    run = opened("timed")
    with parts(_until_recorded(clock)) as missing, clock.part(REST):
        finished(run)
    once = clock.seconds.pop(ONCE, 0.0)
    host = {name: 1e3 * seconds / batches for name, seconds in clock.seconds.items()}
    trace = _traced(lambda: finished(opened("traced")), device, folder / "trace.json")
    waited = _waits(lambda: finished(opened("waits")), batches) if device.type == "cuda" else {}
    found, busy = accounted(trace, batches)
    for name, spent in host.items():
        found[name].host = spent
    wall = sum(host.values())  # one part or another is entered all the time
    order = (*SEAMS, REST, DECODING)
    case = f"ResNet-18 at {teacher.image_size} px, {precision}, loader {warm.loader.name}"
    if settings.quick:
        case += ", narrow and tiny: the numbers mean nothing"
    named = {name: found[name] for name in order if name in found}
    return Budget(case, micro_batch, wall, busy, decode, named, waited, missing, once)


def _until_recorded(clock: Clock) -> Callable[[str], AbstractContextManager[None]]:
    """The clock's parts, of which those inside of the recording count to it."""
    return lambda name: clock.part(ONCE if ONCE in clock.inside else name)


def _decoding(run: Run) -> float:
    """Milliseconds of decoding all sources of a run, with nobody to wait for."""
    samples = [run.source.samples[int(place)] for place in run.pool()]
    started = time.perf_counter()
    for _ in run.load(samples):
        pass
    return 1e3 * (time.perf_counter() - started)


def _traced(run: Callable[[], Any], device: torch.device, path: Path) -> list[dict[str, Any]]:
    """The events of a profile of the call, in the format of Chrome's traces."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        parts(lambda name: record_function(_PART + name)),
        profile(activities=activities) as found,
        record_function(_PART + REST),
    ):
        run()
    found.export_chrome_trace(str(path))
    return json.loads(path.read_text("utf-8"))["traceEvents"]


def _waits(run: Callable[[], Any], batches: int) -> dict[str, float]:
    """The lines that waited for the device, as PyTorch warns of them."""
    quiet = parts(lambda name: _told_of_waits("default") if name == ONCE else nullcontext())
    with quiet, _told_of_waits("warn"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run()
    lines = Counter(
        f"{Path(each.filename).name}:{each.lineno}"
        for each in told
        if "called a synchronizing" in str(each.message)
    )
    return {line: count / batches for line, count in lines.items()}


@contextmanager
def _told_of_waits(mode: str) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


# From a trace to parts
# -----------------------------------------------------------------------------------------------------


def accounted(events: Iterable[Mapping[str, Any]], batches: int) -> tuple[dict[str, Part], float]:
    """What ran on the device and what waited for it, by the part that it was called from, a micro-batch.

    A call belongs to the innermost part that the scoring thread was in at that time: that thread waits while
    autograd's works for it. What any other thread calls is decoding.

    Args:
        events: of a Chrome trace; times in microseconds.
        batches: micro-batches in it.

    Returns:
        The parts, without the host's times and without what was done once, and the milliseconds in which the device
        was busy.
    """
    events = [event for event in events if event.get("ph") == "X"]
    marks = [event for event in events if _is_mark(event)]
    scoring = {event["tid"] for event in marks}
    scoring |= {event["tid"] for event in events if str(event["name"]).startswith("autograd::engine")}
    part_at = _innermost(marks)
    found: dict[str, Part] = defaultdict(Part)
    for event in marks:
        found[event["name"].removeprefix(_PART)]  # a part that calls nothing is there all the same
    caller: dict[Any, str] = {}
    for event in events:
        if event.get("cat") not in ("cuda_runtime", "cuda_driver"):
            continue
        name = part_at(event["ts"]) if event["tid"] in scoring else DECODING
        caller[event.get("args", {}).get("correlation")] = name
        if _LAUNCH.search(event["name"]):
            found[name].launches += 1
        elif _WAIT.search(event["name"]):
            found[name].waits += 1
            found[name].waiting += event["dur"] / 1e3
    spans = []
    for event in events:
        if event.get("cat") in _ON_DEVICE:
            name = caller.get(event.get("args", {}).get("correlation"), REST)
            if name == ONCE:
                continue
            found[name].device += event["dur"] / 1e3
            found[name].kernels += 1
            spans.append((event["ts"], event["ts"] + event["dur"]))
    found.pop(ONCE, None)
    for part in found.values():
        for key, value in vars(part).items():
            setattr(part, key, value / batches)
    return found, _covered(spans) / 1e3 / batches


def _is_mark(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "user_annotation" and str(event["name"]).startswith(_PART)


def _innermost(marks: Sequence[Mapping[str, Any]]) -> Callable[[float], str]:
    """A function of a time: the innermost mark around it, `REST` where there is none, `ONCE` anywhere inside of it."""
    changes: list[tuple[float, str]] = [(float("-inf"), REST)]
    open_marks: list[tuple[float, str]] = []  # (end, name), the innermost last

    def close(before: float) -> None:
        while open_marks and open_marks[-1][0] <= before:
            end, _ = open_marks.pop()
            changes.append((end, open_marks[-1][1] if open_marks else REST))

    for mark in sorted(marks, key=lambda mark: (mark["ts"], -mark["dur"])):
        close(mark["ts"])
        name = mark["name"].removeprefix(_PART)
        if any(around == ONCE for _, around in open_marks):
            name = ONCE
        open_marks.append((mark["ts"] + mark["dur"], name))
        changes.append((mark["ts"], name))
    close(float("inf"))
    times = [when for when, _ in changes]
    return lambda when: changes[bisect.bisect_right(times, when) - 1][1]


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total
