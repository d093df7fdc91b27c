"""The masked forward pass of ResNet-18 layer by layer, against the rates that this machine reaches.

    python -m bench roofline [--threads N] [--rounds N] [--out FILE]

First the machine's rates: float32 and bfloat16 multiply-adds, each the better of a matrix product and of a
convolution by oneDNN, and the bandwidth of a large copy. Then the pass of `masked_forward` (4 images, 62 coalitions
each), every layer timed where it runs: the operations it does, those that a direct convolution of all maps would take,
the bytes of its inputs, weights and outputs, and the least time that the rates allow for what it does. Last, the whole
pass as it is, without the tiles that coalitions share, and without reuse. Writes `bench/results/roofline_cpu.md`.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import ddfast
from bench import facts
from bench.speed.registry import Settings
from bench.speed.results import RESULTS
from bench.speed.subjects import Subject, subject
from ddfast.attribution import engine
from ddfast.files import atomic_write_text
from ddfast.masked_forward import folding
from ddfast.masked_forward.forward import Forward

IMAGES, SIZE, GRID, EVALUATIONS = 4, 224, 4, 64
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rates:
    """What the machine reaches: operations a second (a multiply-add is two), and bytes a second."""

    float32: float
    bfloat16: float
    copy: float

    def of(self, dtype: torch.dtype) -> float:
        """Operations a second in a dtype."""
        return self.bfloat16 if dtype == torch.bfloat16 else self.float32


@dataclass
class Layer:
    """What one layer took over the passes.

    Attributes:
        direct: operations of a direct convolution of all maps.
        done: operations that were done.
        limit: the least seconds for them and the bytes, by the machine's rates.
    """

    seconds: float = 0.0
    direct: float = 0.0
    done: float = 0.0
    moved: float = 0.0
    limit: float = 0.0


def best_seconds(run: Callable[[], Any], rounds: int = 5) -> float:
    """The least seconds of a call, after one to warm up."""
    run()
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found)


@torch.no_grad()
def measure_rates() -> Rates:
    """The machine's rates with the threads that torch has now."""

    def operations(dtype: torch.dtype) -> float:
        side, channels, batch = 28, 256, 32
        a = torch.randn(2048, 2048).to(dtype)
        x = torch.randn(batch, channels, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
        w = torch.randn(channels, channels, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
        product = 2 * 2048**3 / best_seconds(lambda: a @ a)
        convolution = 2 * 9 * channels**2 * side**2 * batch
        return max(product, convolution / best_seconds(lambda: functional.conv2d(x, w, padding=1)))

    source, target = torch.ones(2**26), torch.empty(2**26)  # 256 MiB each, past every cache
    copied = 2 * source.numel() * 4 / best_seconds(lambda: target.copy_(source))
    return Rates(operations(torch.float32), operations(torch.bfloat16), copied)


# One layer
# -----------------------------------------------------------------------------------------------------


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _bytes(*values: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(values))


def distinct_tiles(sets: Tensor, reads: Tensor) -> int:
    """Tiles of a batch that `winograd_conv2d` computes: those of different sets among the players they read."""
    keys = (sets[:, :, None] & reads).sort(1).values
    return int((keys[:, 1:] != keys[:, :-1]).sum() + keys[:, 0].numel())


def operations_of(
    target: Any, module: nn.Module | None, args: Sequence[Any], output: Tensor
) -> tuple[float, float]:
    """(direct, done) operations of one call; (0, 0) of what has none to speak of."""
    if target is folding._winograd_conv2d:
        x, weight = args[0], args[1]
        maps, channels = len(x), x.shape[1]
        tiles = maps * ((output.shape[2] + 1) // 2) * ((output.shape[3] + 1) // 2)
        if len(args) > 5 and args[5] is not None:
            tiles = distinct_tiles(args[5], args[6])
        outputs = weight.shape[1] * weight.shape[3]
        return 2.0 * 9 * channels * output.numel(), 2.0 * 16 * channels * outputs * tiles
    if target in (folding._onednn_conv2d, folding._onednn_conv2d_):
        weight = args[1]
    elif isinstance(module, nn.Conv2d | nn.Linear):
        weight = module.weight
    else:
        return 0.0, 0.0
    direct = 2.0 * output.numel() * weight[0].numel()
    return direct, direct


class _Timed(fx.Interpreter):
    """Runs a stage node by node and adds up what each took."""

    def __init__(self, stage: fx.GraphModule, layers: dict[str, Layer], rates: Rates) -> None:
        super().__init__(stage)
        self.layers, self.rates = layers, rates

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_module", "call_function", "call_method"):
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        started = time.perf_counter()
        output = super().run_node(n)
        seconds = time.perf_counter() - started
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        weights = list(module.parameters()) if isinstance(module, nn.Module) else []
        if not isinstance(output, Tensor):
            return output
        direct, done = operations_of(n.target, module, args, output)
        winograd = n.target is folding._winograd_conv2d
        rate = self.rates.float32 if winograd else self.rates.of(output.dtype)
        moved = _bytes(args, weights, output)
        layer = self.layers[_name(n, args)]
        layer.seconds += seconds
        layer.direct += direct
        layer.done += done
        layer.moved += moved
        layer.limit += max(done / rate, moved / self.rates.copy)
        return output


def _name(node: fx.Node, args: Sequence[Any]) -> str:
    """A layer's name and how it runs."""
    if node.target in (folding._winograd_conv2d, folding._onednn_conv2d, folding._onednn_conv2d_):
        path = str(node.args[1]).rpartition("_")[0].removeprefix("model_")  # of its weight
        how = "Winograd" if node.target is folding._winograd_conv2d else "oneDNN"
        shared = ", shared tiles" if len(args) > 5 and how == "Winograd" and args[5] is not None else ""
        return f"{path.replace('_', '.')} ({how}{shared})"
    if node.op == "call_module":
        return f"{str(node.target).removeprefix('model.')} (torch)"
    return f"{node.name} (torch)"


# The pass
# -----------------------------------------------------------------------------------------------------


@contextmanager
def timed_layers(layers: dict[str, Layer], rates: Rates) -> Iterator[None]:
    """Context in which the stages of every `Forward`, its assemblies and its masks are timed."""

    def run(self: Forward, stage: Any, inputs: tuple[Tensor, ...], sets: Tensor | None = None) -> Any:
        takes_sets = stage.meta.get("takes_sets")
        given = (*inputs, sets if self.shares else None) if takes_sets else inputs
        return _Timed(stage, layers, rates).run(*given)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            output = function(*args, **kwargs)
            layer = layers[name]
            layer.seconds += time.perf_counter() - started
            moved = _bytes(output) * 2
            layer.moved += moved
            layer.limit += moved / rates.copy
            return output

        return call

    with (
        mock.patch.object(Forward, "_run", run),
        mock.patch.object(engine, "assemble", timed("assembly", engine.assemble)),
        mock.patch.object(engine, "masked_batch", timed("masks", engine.masked_batch)),
    ):
        yield


def attribute(found: Subject, precision: str) -> Tensor:
    """phi [4, 16] of the pass that `masked_forward` times."""
    return ddfast.shapley(
        found.model,
        found.images,
        found.labels,
        grid=GRID,
        n_samples=EVALUATIONS,
        estimator="permutation",
        precision=precision,
        seed=torch.arange(len(found.images)),
        mean=found.mean,
        std=found.std,
    )


def profile(found: Subject, precision: str, rates: Rates, rounds: int) -> tuple[dict[str, Layer], float]:
    """What each layer took in the fastest of `rounds` passes, and the seconds of that pass."""
    attribute(found, precision)
    best: tuple[float, dict[str, Layer]] = float("inf"), {}
    for _ in range(rounds):
        layers: dict[str, Layer] = defaultdict(Layer)
        with timed_layers(layers, rates):
            started = time.perf_counter()
            attribute(found, precision)
            seconds = time.perf_counter() - started
        best = min(best, (seconds, layers), key=lambda each: each[0])
    return best[1], best[0]


def levers(found: Subject, precision: str, rounds: int) -> dict[str, float]:
    """Seconds of the whole pass as it is, without shared tiles and without reuse: the least of `rounds`, in turn."""
    plain = Forward._run

    def alone(self: Forward, stage: Any, inputs: tuple[Tensor, ...], sets: Tensor | None = None) -> Any:
        return plain(self, stage, inputs)

    def direct() -> None:
        with mock.patch.object(engine.ImageGame, "_maps", return_value=None):
            attribute(found, precision)

    def unshared() -> None:
        with mock.patch.object(Forward, "_run", alone):
            attribute(found, precision)

    runs = {
        "as it is": lambda: attribute(found, precision),
        "no shared tiles": unshared,
        "no reuse at all": direct,
    }
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def table(layers: dict[str, Layer], total: float) -> Iterator[str]:
    """The layers in the order they ran, as Markdown, and what binds."""
    yield "| layer | ms | share of the pass | direct GFLOP | done GFLOP | MB | least ms | share of the limit |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"

    def row(name: str, layer: Layer) -> str:
        return (
            f"| {name} | {1e3 * layer.seconds:.1f} | {100 * layer.seconds / total:.1f}% | {layer.direct / 1e9:.1f} | "
            f"{layer.done / 1e9:.1f} | {layer.moved / 1e6:.0f} | {1e3 * layer.limit:.1f} | "
            f"{100 * layer.limit / max(layer.seconds, 1e-12):.0f}% |"
        )

    every = Layer()
    for name, layer in layers.items():
        for quantity in ("seconds", "direct", "done", "moved", "limit"):
            setattr(every, quantity, getattr(every, quantity) + getattr(layer, quantity))
        if layer.seconds >= 0.002 * total:
            yield row(name, layer)
    yield row("all layers", every)
    rest = 1e3 * (total - every.seconds)
    yield f"| outside of layers | {rest:.1f} | {100 * rest / 1e3 / total:.1f}% | | | | | |"


def report(found: Subject, rates: Rates, rounds: int) -> Iterator[str]:
    """The page, line by line."""
    yield (
        f"The masked forward pass layer by layer: {found.name}, {len(found.images)} images of {SIZE} px, 62 coalitions "
        "each, the fastest pass of several. The least time of a layer is what its operations take at the machine's "
        "rate or its bytes at the rate of a copy, whichever is more."
    )
    yield ""
    yield (
        f"Rates: float32 {rates.float32 / 1e9:.0f} GFLOP/s, bfloat16 {rates.bfloat16 / 1e9:.0f} GFLOP/s, "
        f"copy {rates.copy / 1e9:.1f} GB/s (read and written)."
    )
    for precision in Settings(_CPU).precisions():
        layers, total = profile(found, precision, rates, rounds)
        evaluations = len(found.images) * 62
        yield ""
        yield f"## {precision}: {1e3 * total:.0f} ms, {evaluations / total:.0f} evaluations a second with the clock on"
        yield ""
        yield from table(layers, total)
        seconds = levers(found, precision, rounds)
        done = sum(layer.done for layer in layers.values())
        direct = sum(layer.direct for layer in layers.values())
        limit = sum(layer.limit for layer in layers.values())
        yield ""
        for name, took in seconds.items():
            yield f"- {name}: {1e3 * took:.0f} ms, {evaluations / took:.0f} evaluations a second"
        yield (
            f"- of the {direct / 1e9:.0f} GFLOP that direct convolutions of these maps would take, {done / 1e9:.0f} "
            f"are done; at the machine's rates they take {1e3 * limit:.0f} ms, "
            f"{100 * limit / seconds['as it is']:.0f}% of the pass"
        )


NOTES = """
What the pass does: one image's maps behind the stem, layer1 and layer2's first convolution are put together from 16
variants; 3x3 convolutions with stride 1 go through Winograd's algorithm in float32, and there a tile of 2x2 outputs
that several coalitions have in common is computed once, as the players that reach it say. At `auto` the maps are
bfloat16 and Winograd's products float32; it is taken only where tiles are shared and no tile is cut off by the edge.

What is left: the last layers, where every tile is reached by every patch, and the convolutions with stride 2, which
oneDNN computes for every map.

What was tried and left: chunks of 16 to 256 masked images, within 12% of each other at float32 and 6% at `auto`; the
bfloat16 max-pool as maxima of shifted slices, 14 ms in place of 21 on one thread, which is 2% of the pass.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=facts.usable_cores(), help="default all usable cores")
    parser.add_argument("--rounds", type=int, default=5, help="passes; the fastest counts (default 5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "roofline_cpu.md")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    found = subject(Settings(_CPU), IMAGES, SIZE)
    lines = [*report(found, measure_rates(), arguments.rounds), *NOTES.splitlines(), ""]
    commit, changed = facts.commit()
    versions = ", ".join(f"{name} {version}" for name, version in facts.software().items())
    changes = " and changes" if changed else ""
    lines.append(
        f"- {facts.device_name(_CPU)}, {arguments.threads} threads; {versions}, commit {commit}{changes}"
    )
    text = "\n".join(lines) + "\n"
    print(text)
    atomic_write_text(arguments.out, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
