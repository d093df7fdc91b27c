"""Images a second from archive to model input: DALI, torchvision and Pillow side by side.

    python -m bench loading --data clothing10.zip --size 224 --out bench/results/loading

Every contender reads, decodes, resizes the shorter side with an antialiasing filter and cuts the centre, for the
same images, in the same order, in rounds that alternate. Before anything is timed, its images are compared with
Pillow's. Then the time of one thread is divided among reading, decoding and the rest, and `ddfast score` runs once with
each contender: the share of its time in which the model did not wait for images is how well it is fed. Writes OUT.csv
and OUT.md.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import facts
from bench.speed.measuring import Spread
from ddfast.data.loaders import dali_missing, resolve_loader
from ddfast.data.opening import open_source
from ddfast.data.samples import Sample
from ddfast.data.sources import Source
from ddfast.errors import BadImage
from ddfast.files import atomic_write_text

DATA = facts.SHARED_DATA / "clothing10.zip"
MAX_MEAN_DIFFERENCE = 1.0  # grey levels, over all images: a contender that differs more does other work
HEADER = (
    "data",
    "size",
    "loader",
    "threads",
    "images",
    "mean_difference",
    "max_difference",
    "p20",
    "p50",
    "p80",
)

BUSY_BOUND = 0.9  # share of the score pass in which the model must not wait

Load = Callable[..., Generator[tuple[Sample, Any], None, None]]


def contenders(device: str) -> dict[str, Load]:
    """Name -> what loads."""
    names = ["pillow", "torchvision"]
    if dali_missing() is None:
        from ddfast.data.dali import has_engine

        names += ["dali", *(["dali-hw"] if has_engine(device) else [])]
    return {name: resolve_loader(name, device) for name in names}


def difference(load: Load, source: Source, samples: Sequence[Sample], size: int) -> tuple[float, int]:
    """Mean and largest difference from Pillow's images, in grey levels."""
    total, largest = 0.0, 0
    pillow = resolve_loader("pillow")(source, samples, size)
    for (_, a), (_, b) in zip(pillow, load(source, samples, size, workers=1), strict=True):
        if isinstance(a, BadImage) or isinstance(b, BadImage):
            raise SystemExit(f"{source.name} holds damaged images: give a set without")
        gap = (a.int() - b.int()).abs()
        total += gap.float().mean().item()
        largest = max(largest, int(gap.max()))
    return total / len(samples), largest


def rate(load: Load, source: Source, samples: Sequence[Sample], size: int, threads: int) -> float:
    """Images a second over one pass."""
    started = time.perf_counter()
    count = sum(1 for _ in load(source, samples, size, workers=threads))
    return count / (time.perf_counter() - started)


def measured(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each contender and number of threads."""
    source = open_source(arguments.data)
    step = max(1, len(source) // arguments.images)
    samples = source.samples.take(range(0, len(source), step))[: arguments.images]
    loads = contenders(arguments.device)
    gaps = {name: difference(load, source, samples[:128], arguments.size) for name, load in loads.items()}
    for name, (mean, _) in gaps.items():
        if mean > MAX_MEAN_DIFFERENCE:
            raise SystemExit(f"{name} differs from Pillow by {mean:.2f} grey levels: not timed")
    for threads in arguments.threads:
        rates: dict[str, list[float]] = {name: [] for name in loads}
        for _ in range(arguments.rounds):
            for name, load in loads.items():
                rates[name].append(rate(load, source, samples, arguments.size, threads))
        for name, values in rates.items():
            spread = Spread.of(values)
            yield {
                "data": Path(arguments.data).name,
                "size": arguments.size,
                "loader": name,
                "threads": threads,
                "images": len(samples),
                "mean_difference": f"{gaps[name][0]:.3f}",
                "max_difference": gaps[name][1],
                **{level: f"{getattr(spread, level):.1f}" for level in ("p20", "p50", "p80")},
            }


def stages(source: Source, samples: Sequence[Sample], size: int) -> dict[str, dict[str, float]]:
    """Milliseconds an image in one thread: reading, decoding to the file's own size, and resizing and cutting."""
    from ddfast.data.decoding import decode, decode_fit, pixel_limit
    from ddfast.data.jpeg import plain_jpeg
    from ddfast.data.native_jpeg import decode_fit_native, torchvision_decodes

    def milliseconds(work: Callable[[Any], Any], over: Sequence[Any]) -> float:
        started = time.perf_counter()
        for one in over:
            work(one)
        return 1000 * (time.perf_counter() - started) / len(over)

    files = [source.read(sample) for sample in samples]
    reading = milliseconds(source.read, samples)
    found = {}
    decoded = milliseconds(decode, files)
    whole = milliseconds(lambda data: decode_fit(data, size), files)
    found["pillow"] = {"read": reading, "decode": decoded, "resize and crop": max(0.0, whole - decoded)}
    plain = [data for data in files if plain_jpeg(data) is not None]
    if torchvision_decodes() and plain:
        from torchvision.io import ImageReadMode, decode_jpeg

        def native(data: bytes) -> torch.Tensor:
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)

        limit = pixel_limit()
        decoded = milliseconds(native, plain)
        whole = milliseconds(lambda data: decode_fit_native(data, size, max_pixels=limit), plain)
        found["torchvision"] = {
            "read": reading,
            "decode": decoded,
            "checks, resize and crop": whole - decoded,
        }
    return found


def score_pass(data: str, size: int, loader: str, sources: int, device: str, work: Path) -> dict[str, Any]:
    """What `ddfast score` with random weights says of itself: sources, seconds and the model's busy share."""
    from ddfast.models import create_model, save_teacher

    names = open_source(data).class_names
    arch, options = ("resnet18", {}) if size > 64 else ("convnet3", {"width": 128})
    teacher = work / f"{arch}-{len(names)}.safetensors"
    if not teacher.exists():
        torch.manual_seed(0)
        model = create_model(arch, len(names), image_size=size, **options).eval()
        half = (0.5, 0.5, 0.5)
        save_teacher(
            teacher,
            model,
            arch=arch,
            arch_options=options,
            class_names=names,
            image_size=size,
            mean=half,
            std=half,
        )
    out = work / f"{Path(data).stem}-{loader}"
    command = [
        *(sys.executable, "-m", "ddfast", "score", "infoutil", "--data", data, "--teacher", str(teacher)),
        *("--out", str(out), "--ipc", "1", "--images-per-class", str(max(4, sources // len(names)))),
        *("--loader", loader, "--device", device, "--no-preflight", "--quiet"),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    said = json.loads((out / "run.json").read_text())["score"]
    return {"data": Path(data).name, "size": size, "arch": arch, "loader": loader, **said}


def report(
    rows: Sequence[dict[str, Any]],
    shares: dict[str, dict[str, dict[str, float]]],
    passes: Sequence[dict[str, Any]],
    device: str,
) -> str:
    """The rows, the stages by set and loader, and the score passes as a page."""
    base = {(row["data"], row["size"], row["threads"]): row for row in rows if row["loader"] == "pillow"}
    dirty = " with changes" if facts.commit()[1] else ""
    lines = [
        "# Loading: images a second",
        "",
        "`python -m bench loading`: read, decode, resize and crop; medians over rounds that alternate, with the 20th",
        "and the 80th percentile. Differences are from Pillow's images, in grey levels of 255.",
        "",
        f"{facts.device_name(torch.device(device))}, {facts.usable_cores()} cores; "
        f"Pillow {facts.version('pillow')}, DALI {_dali_version()}, torchvision {facts.version('torchvision')}, "
        f"torch {torch.__version__}; commit {facts.commit()[0]}{dirty}.",
        "",
        "| data | px | loader | threads | images/s | p20 to p80 | of Pillow | difference mean / max |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        times = float(row["p50"]) / float(base[row["data"], row["size"], row["threads"]]["p50"])
        lines.append(
            f"| {row['data']} | {row['size']} | {row['loader']} | {row['threads']} | {float(row['p50']):.0f} | "
            f"{float(row['p20']):.0f} to {float(row['p80']):.0f} | {times:.2f} | "
            f"{row['mean_difference']} / {row['max_difference']} |"
        )
    lines += [
        "",
        "Where the time of one thread goes (DALI reads as the others do and decodes and resizes in one piece):",
        "",
        "| data | loader | stage | ms an image | share |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for data, loaders in shares.items():
        for loader, taken in loaders.items():
            total = sum(taken.values())
            lines += [
                f"| {data} | {loader} | {stage} | {each:.3f} | {100 * each / total:.0f}% |"
                for stage, each in taken.items()
            ]
    if passes:
        best: dict[str, float] = {}
        for one in passes:
            best[one["data"]] = max(best.get(one["data"], 0.0), one["busy"])
        busy = min(best.values())
        lines += [
            "",
            f"The score pass of InfoUtil (`ddfast score`, random weights, default options, {device}). With one of the "
            f"loaders the model is to be busy at least {100 * BUSY_BOUND:.0f}% of the time: "
            f"{'met' if busy >= BUSY_BOUND else 'missed'}.",
            "",
            "| data | model | loader | sources | sources/s | core time a source, ms | model busy |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: |",
            *(
                f"| {one['data']} | {one['arch']}, {one['size']} px | {one['loader']} | {one['sources']} | "
                f"{one['sources'] / one['seconds']:.2f} | {1000 * one['processor_seconds'] / one['sources']:.1f} | "
                f"{100 * one['busy']:.1f}% |"
                for one in passes
            ),
        ]
    return "\n".join([*lines, "", *machines()]) + "\n"


def machines() -> list[str]:
    """The table of what DALI does on each kind of machine, which nothing here has measured."""
    from ddfast.data.dali import MACHINES

    rows = [f"| {' | '.join(row)} |" for row in MACHINES]
    return [
        "What DALI does on each kind of machine:",
        "",
        rows[0],
        "| --- " * len(MACHINES[0]) + "|",
        *rows[1:],
    ]


def _dali_version() -> str:
    versions = [facts.version(f"nvidia-dali-cuda{cuda}") for cuda in (130, 120)]
    return next((version for version in versions if version != "not installed"), "not installed")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", nargs="+", default=[str(DATA)], help="image sets, as --data of ddfast distill"
    )
    parser.add_argument("--size", nargs="+", type=int, default=[224], help="side in pixels, one for each set")
    parser.add_argument("--images", type=int, default=512, help="of each set, evenly spread")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for DALI to decode on the GPU")
    parser.add_argument(
        "--score", type=int, default=48, help="sources that `ddfast score` takes by each loader; 0: none"
    )
    parser.add_argument("--out", type=Path, help="write OUT.csv and OUT.md")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    shares: dict[str, dict[str, dict[str, float]]] = {}
    passes: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for data, size in zip(arguments.data, arguments.size, strict=True):
            rows += measured(argparse.Namespace(**{**vars(arguments), "data": data, "size": size}))
            with open_source(data) as source:
                shares[Path(data).name] = stages(
                    source, source.samples.take(range(min(256, len(source)))), size
                )
            for loader in contenders(arguments.device) if arguments.score else ():
                passes.append(score_pass(data, size, loader, arguments.score, arguments.device, Path(work)))
    page = report(rows, shares, passes, arguments.device)
    print(page)
    if arguments.out is not None:
        table = io.StringIO()
        writer = csv.DictWriter(table, HEADER, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write_text(arguments.out.with_suffix(".csv"), table.getvalue())
        atomic_write_text(arguments.out.with_suffix(".md"), page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
