"""A model of InfoUtil's score pass on one H200, part by part: arithmetic, bytes and the host's time, counted.

    python -m bench pass_model [--into bench/results/scale.md]

Nothing of it runs on a GPU. Operations and bytes are counted kernel by kernel for ResNet-18 at 224 px in bfloat16, each
map once for every kernel that reads or writes it; the host's time is measured here, by `bench.speed.host_time` on this
CPU. A kernel takes the longer of its operations at half of the data sheet's matrix rate and its bytes at four fifths of
the memory's: assumed, not measured. With `--into` the page's section of that name is written anew.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import facts
from bench.speed.measuring import Spread
from ddfast.files import atomic_write_text
from ddfast.models import create_model
from ddfast.pipeline.plan import MICRO_BATCH

# NVIDIA's data sheet of the H200 SXM, dense; bytes a second of its memory.
MATRIX_RATE, MEMORY_RATE = 990e12, 4.8e12
MATRIX_SHARE, MEMORY_SHARE = 0.5, 0.8
SIZE, CLASSES, BYTES = 224, 1000, 2
HEADING = "## The score pass on one H200, part by part"


@dataclass(frozen=True)
class Kernel:
    """One launch over the map of an image: its operations, and the bytes that it reads and writes."""

    operations: float
    bytes: float

    def seconds(self) -> float:
        """The longer of its operations and its bytes."""
        return max(self.operations / (MATRIX_SHARE * MATRIX_RATE), self.bytes / (MEMORY_SHARE * MEMORY_RATE))


def counted(model: nn.Module, *, fused: bool) -> list[Kernel]:
    """The kernels of a network's forward pass over an image of `SIZE` px, batch norms folded into convolutions.

    Args:
        model: a network of convolutions, ReLUs, pools and residual blocks.
        fused: whether convolutions add bias and residual and apply the ReLU while they write.
    """
    model = model.eval().to("meta")
    kernels: list[Kernel] = []

    def seen(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        read, written = BYTES * inputs[0].numel(), BYTES * output.numel()
        if isinstance(module, nn.Conv2d):
            work = 2 * output.numel() * module.weight[0].numel()
            kernels.append(Kernel(work, read + written))
            if not fused:
                kernels.append(Kernel(0, 2 * written))  # the folded bias, a pass of its own over the map
        elif isinstance(module, (nn.Linear, nn.MaxPool2d, nn.AdaptiveAvgPool2d)):
            work = 2 * module.weight.numel() if isinstance(module, nn.Linear) else 0
            kernels.append(Kernel(work, read + written))
        elif isinstance(module, nn.ReLU) and not fused:
            kernels.append(Kernel(0, 2 * written))
        elif hasattr(module, "downsample"):  # a residual block: its sum reads two maps and writes one
            kernels.append(Kernel(0, written if fused else 3 * written))

    handles = [module.register_forward_hook(seen) for module in model.modules()]
    with torch.no_grad():
        model(torch.empty(1, 3, SIZE, SIZE, device="meta"))
    for handle in handles:
        handle.remove()
    return kernels


@dataclass(frozen=True)
class Part:
    """A part of the pass over one source: kernels, and how often each of them runs."""

    name: str
    kernels: list[Kernel]
    times: float

    @property
    def operations(self) -> float:
        """Operations of a source."""
        return self.times * sum(kernel.operations for kernel in self.kernels)

    @property
    def bytes(self) -> float:
        """Bytes of a source."""
        return self.times * sum(kernel.bytes for kernel in self.kernels)

    def seconds(self) -> float:
        """Of a source: every kernel takes the longer of its operations and its bytes."""
        return self.times * sum(kernel.seconds() for kernel in self.kernels)

    def bound(self) -> str:
        """What more of the time is bound by."""
        operations = sum(
            k.seconds() for k in self.kernels if k.operations / MATRIX_RATE / MATRIX_SHARE >= k.seconds()
        )
        return "operations" if 2 * operations > self.seconds() / self.times else "bytes"


def parts(
    network: list[Kernel], norms: list[Kernel], evaluations: float, crops: float, shared: float = 0.0
) -> list[Part]:
    """The pass over one source.

    Args:
        network: the kernels of the masked forward pass.
        norms: those of the norms' forward pass. Their backward pass is as much again, for inputs alone; a ghost norm
            reads a layer's input and gradient once more, and its products are those of the weight's gradient.
        evaluations: masked images of each source.
        crops: of which the gradient norm is taken.
        shared: share of the masked forward pass that coalitions of an image have in common, computed once.
    """
    image = Kernel(0, 3 * SIZE**2 * BYTES)
    ghost = [Kernel(kernel.operations, kernel.bytes) for kernel in norms if kernel.operations]
    return [
        Part("masked images", [image], evaluations + 1),
        Part("their forward pass", network, evaluations * (1 - shared)),
        Part("crops of the norms", [image], 2 * crops),
        Part("forward and backward pass of the crops", norms, 2 * crops),
        Part("ghost norms", ghost, crops),
    ]


def host_milliseconds() -> tuple[float, float]:
    """Milliseconds of the host's time a source, at micro-batches of 16 and of 128: medians of `host_time`."""
    from bench.speed import host_time
    from bench.speed.registry import Settings

    found: dict[str, Spread] = {}
    for case in host_time.host_time(Settings(torch.device("cpu"), quick=False)):
        for row in case.measure(torch.device("cpu"), None, quick=False):
            if row.case.endswith(": whole") and row.contender == "without" and row.seconds is not None:
                found[row.case] = row.seconds
    small, large = (1e3 * found[f"micro-batch {n}: whole"].p50 / n for n in host_time.MICRO_BATCHES)
    return small, large


def page(model: nn.Module, host: tuple[float, float]) -> str:
    """The section."""
    batch = MICRO_BATCH["cuda"]
    unfused, fused = counted(model, fused=False), counted(model, fused=True)
    plain, better = parts(unfused, unfused, 32, 5), parts(fused, unfused, 32, 5)
    least = parts(fused, unfused, 20, 2, shared=0.25)

    def seconds(found: Sequence[Part]) -> float:
        return sum(part.seconds() for part in found)

    def row(
        name: str, work: float, moved: float, fewer: float, taken: float, quicker: float, bound: str
    ) -> str:
        times = f"{1e3 * batch * taken:.1f} | {1e3 * batch * quicker:.1f}"
        return f"| {name} | {work / 1e9:,.0f} | {moved / 1e6:,.0f} | {fewer / 1e6:,.0f} | {times} | {bound} |"

    rows = [
        row(a.name, a.operations, a.bytes, b.bytes, a.seconds(), b.seconds(), b.bound())
        for a, b in zip(plain, better, strict=True)
    ]
    work, moved, fewer = (
        sum(getattr(part, name) for part in found)
        for found, name in ((plain, "operations"), (plain, "bytes"), (better, "bytes"))
    )
    rows.append(row("all", work, moved, fewer, seconds(plain), seconds(better), ""))
    budget = 1e3 * batch * seconds(better)
    versions = ", ".join(f"{name} {version}" for name, version in facts.software().items())
    return "\n".join(
        [
            HEADING,
            "",
            f"`python -m bench pass_model`: ResNet-18 at {SIZE} px in bfloat16, 32 evaluations and 5 norms a source, "
            f"micro-batches of {batch}; counted, but for the host's time. Every kernel takes the longer of its "
            f"operations at {100 * MATRIX_SHARE:.0f}% of {MATRIX_RATE / 1e12:.0f} TFLOP/s and its bytes at "
            f"{100 * MEMORY_SHARE:.0f}% of {MEMORY_RATE / 1e12:.1f} TB/s. Fused: convolutions of the masked forward "
            "pass "
            "add bias and residual and apply the ReLU while they write.",
            "",
            "| part | GFLOP a source | MB a source | fused | ms a micro-batch | fused | bound by |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
            *rows,
            "",
            f"- The device: {1 / seconds(plain):,.0f} sources a second, "
            f"{1 / seconds(better):,.0f} with fused epilogues.",
            f"- The host: {host[1]:.2f} ms a source at micro-batches of {batch} ({host[0]:.2f} at 16), measured on "
            "this "
            f"CPU with a network too narrow to compute: {1e3 / host[1]:,.0f} sources a second before any CUDA graph. "
            f"Of the {budget:.0f} ms that the device takes for a micro-batch the host needs {batch * host[1]:.0f}; it "
            "waits once, for rows that were computed a micro-batch ago (tests/pipeline/test_waits.py counts).",
            f"- So the device binds. 3,000 a second are not to be had from it with all of this work: about 20 "
            "evaluations, norms of two crops, and a quarter of the masked forward pass shared between coalitions "
            f"would give {1 / seconds(least):,.0f}.",
            "",
            f"{facts.device_name(torch.device('cpu'))}; {versions}; commit {facts.commit()[0]}.",
        ]
    )


def replaced(text: str, section: str) -> str:
    """A page with its section of `HEADING` written anew, before the section that follows the projection."""
    found = re.search(rf"^{re.escape(HEADING)}\n.*?(?=^## |\Z)", text, flags=re.M | re.S)
    if found:
        return text[: found.start()] + section + "\n\n" + text[found.end() :]
    place = text.index("## Between here and")
    return text[:place] + section + "\n\n" + text[place:]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the section, and write it into a page where one is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--into", type=Path, default=None, help="page whose section is written anew")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    section = page(create_model("resnet18", CLASSES, SIZE), host_milliseconds())
    print(section)
    if arguments.into is not None:
        text = arguments.into.read_text(encoding="utf-8")
        atomic_write_text(arguments.into, replaced(text, section))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
