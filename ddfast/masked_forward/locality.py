"""Locality reuse: which features of a masked image can be put together from those of a few masked images.

A mask over a grid of patches changes an early feature map only near the patches. Let the patches fall into
classes by (row mod m, column mod n). Where every location of a feature map depends on at most one patch of each
class, it cannot tell a coalition from the variant in which whole classes are present or absent as that one patch
is. So the feature maps of all coalitions are assembled, location by location, from the 2^(m n) variants, and no
bit changes. With m = n = 2 these are 16 variants; the condition then holds while the receptive field is no wider
than a patch and a pixel. With m = n = 3 there are 512, worth their price in an enumeration of all coalitions,
and they are assembled from the 16 in turn.

No table of architectures says what a location depends on. It is measured on the traced graph: one patch is
filled with NaN, and where NaN comes out, the patch is seen. A comparison or a `where` swallows NaN, so patches are
also replaced by other random numbers, in float64 unless the network is large, and every location that changes
sees the patch. What both miss, a comparison of what the first image's features are assembled to with what the model
computes for it finds.
"""

from __future__ import annotations

import itertools
import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from ddfast.masked_forward.tracing import TRACE_ERRORS
from ddfast.ops._grid import player_map

log = logging.getLogger(__name__)

MAX_VARIANTS = 512
"""Variants of an image: more would cost more memory than they are likely to save time."""

OPERATIONS_PER_BYTE = 12
"""Operations in the time that a byte takes to memory, about, on CPUs in float32 and on GPUs in float32."""

FLOAT64_PROBE_WORK = 2e10
"""Operations up to which the probe with random numbers runs in float64; larger ones run in float32."""

RANDOM_PROBES = 3
"""Draws of random numbers: each one decides a comparison anew."""

WORTHWHILE = 0.92
"""Reuse is taken where its estimate is below this share of the direct way's."""

Scheme = tuple[int, int]
"""Classes of patches: (m, n) for row mod m and column mod n."""


class NoReuseError(Exception):
    """There is nothing to reuse; the message says why."""


@dataclass(frozen=True)
class Cut:
    """One assembly: the tensors where it happens, and how.

    Attributes:
        scheme: (m, n), the classes of patches.
        patterns: bool [2^(m n), d], the coalitions that are the variants.
        inside: names of the graph's nodes that are computed for variants.
        frontier: names of the nodes whose values are assembled, in graph order.
        tables: for each of them int32 [h, w, m n], or None where only its shape is read later.
    """

    scheme: Scheme
    patterns: Tensor
    inside: frozenset[str]
    frontier: tuple[str, ...]
    tables: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Locality:
    """What locality reuse does for a model, an image size and a grid.

    Attributes:
        cuts: the assemblies, first to last; empty where images go through the model directly.
        reason: why there is none, or in words what is reused.
        share_of_work: estimated share of one evaluation's work that lies before the last cut, 0 to 1.
        speedup: estimated time of the direct way over that of this one, at the number of evaluations asked.
    """

    cuts: tuple[Cut, ...] = ()
    reason: str = ""
    share_of_work: float = 0.0
    speedup: float = 1.0

    @property
    def key(self) -> tuple:
        """Equal for localities that cut alike."""
        return tuple((cut.scheme, cut.frontier) for cut in self.cuts)

    @property
    def cut(self) -> str | None:
        """Names of the tensors that the last cut assembles, joined by commas; None where there is no cut."""
        return ", ".join(self.cuts[-1].frontier) if self.cuts else None


def measure(graph: fx.GraphModule, image: Tensor) -> None:
    """Run one image [1, C, H, W] and note each node's shape and work in `node.meta`.

    `shape` is that of a tensor without its first dimension, None for other values. `depends` says whether it is
    a function of the images. `work` is in operations: the floating-point operations counted, and
    `OPERATIONS_PER_BYTE` for every byte of float32 read and written.

    Raises:
        NoReuseError: a node that cannot be run, or a result that is not one tensor.
    """
    values: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise NoReuseError("the model returns more than one tensor")
            break
        with FlopCounterMode(display=False) as counter:
            value = values[node] = _run(graph, node, values, image)
        node.meta["depends"] = node.op == "placeholder" or any(
            source.meta["depends"] for source in node.all_input_nodes
        )
        node.meta["shape"] = tuple(value.shape[1:]) if isinstance(value, Tensor) and value.dim() else None
        moved = [value, *(values[source] for source in node.all_input_nodes)]
        elements = sum(t.numel() for t in moved if isinstance(t, Tensor))
        free = node.op in ("placeholder", "get_attr") or not isinstance(value, Tensor)
        node.meta["work"] = (
            0.0 if free else float(counter.get_total_flops() + OPERATIONS_PER_BYTE * 4 * elements)
        )


Probes = dict[tuple, "Probe"]
"""Probes of a graph, by image size, grid and schemes."""


def find(
    graph: fx.GraphModule,
    image_size: tuple[int, int, int],
    grid: tuple[int, int],
    evaluations: int,
    probes: Probes,
) -> Locality:
    """The cuts that pay for `evaluations` coalitions an image, on a graph that `measure` has seen.

    Args:
        graph: a traced model in eval mode.
        image_size: (channels, height, width).
        grid: (rows, columns) of patches.
        evaluations: coalitions an image.
        probes: what was measured for the same structure before; what is measured now is added.
    """
    schemes = tuple(scheme for scheme in _schemes(grid) if _variants(scheme) < evaluations)
    if not schemes:
        return Locality(reason=f"{evaluations} evaluations an image are no more than the variants would be")
    key = (image_size, grid, schemes)
    try:
        if key not in probes:
            probe = Probe(image_size, grid, schemes)
            probe.run(graph)
            probes[key] = probe
        return _cheapest(graph, probes[key], evaluations)
    except NoReuseError as error:
        return Locality(reason=str(error))


def _schemes(grid: tuple[int, int]) -> list[Scheme]:
    """Classes of at most three rows and columns, by the number of variants."""
    rows, cols = grid
    found = itertools.product(range(1, min(rows, 3) + 1), range(1, min(cols, 3) + 1))
    return sorted((s for s in found if _variants(s) <= MAX_VARIANTS), key=lambda s: (s[0] * s[1], s))


def _variants(scheme: Scheme) -> int:
    return 1 << scheme[0] * scheme[1]


def patch_classes(scheme: Scheme, grid: tuple[int, int]) -> Tensor:
    """int64 [d], the class of each patch of the grid."""
    row, col = torch.arange(grid[0])[:, None], torch.arange(grid[1])
    return (row % scheme[0] * scheme[1] + col % scheme[1]).flatten()


def table_of(seen: Tensor, scheme: Scheme, grid: tuple[int, int]) -> Tensor | None:
    """int32 [h, w, m n]: the patch of each class that a location sees, -1 for none; None where one sees two.

    Args:
        seen: bool [d, h, w], the locations that each patch reaches.
        scheme: classes of patches.
        grid: (rows, columns) of patches.
    """
    classes = patch_classes(scheme, grid).to(seen.device)
    columns = []
    for which in range(scheme[0] * scheme[1]):
        of_class = seen[classes == which]
        if bool((of_class.sum(0) > 1).any()):
            return None
        patch = torch.nonzero(classes == which)[:, 0].int()
        columns.append(torch.where(of_class, patch[:, None, None], -1).amax(0))
    return torch.stack(columns, -1).int()


# --- what a location depends on


@dataclass
class Probe:
    """Which patches reach which locations of the values of a graph, as far as the values are local.

    Attributes:
        seen: for each local value bool [d, h, w], the locations that each patch reaches.
        refused: what the first value that is not local is.
    """

    image_size: tuple[int, int, int]
    grid: tuple[int, int]
    schemes: tuple[Scheme, ...]
    seen: dict[str, Tensor] = field(default_factory=dict, init=False)
    refused: str = field(default="", init=False)
    _tables: dict[tuple[str, Scheme], Tensor | None] = field(default_factory=dict, init=False)

    def run(self, graph: fx.GraphModule) -> None:
        """Find the values whose locations see at most one patch of each class of some scheme.

        Values behind others that are not local are not computed.

        Raises:
            NoReuseError: a node cannot be run.
        """
        generator = torch.Generator().manual_seed(0)
        _, height, width = self.image_size
        patches = self.grid[0] * self.grid[1]
        inside = (player_map(*self.grid, height, width) == torch.arange(patches)[:, None, None]).unsqueeze(1)

        def numbers(*shape: int) -> Tensor:
            # Magnitudes from 0.1 to 10, so that what saturates and what rounds away both answer.
            scale = 10 ** (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)
            return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

        clean = numbers(1, *self.image_size)
        nan = torch.where(inside, torch.nan, clean)
        self.seen = self._pass(graph, torch.cat([clean, nan]).float(), _nan_reaches, None)
        work = sum(node.meta["work"] for node in graph.graph.nodes if node.name in self.seen)
        exact = torch.float64 if (1 + patches) * work < FLOAT64_PROBE_WORK else torch.float32
        for _ in range(RANDOM_PROBES):
            clean = numbers(1, *self.image_size)
            other = torch.where(inside, numbers(patches, *self.image_size), clean)
            changed = self._pass(graph, torch.cat([clean, other]).to(exact), _differs, set(self.seen))
            self.seen = {name: self.seen[name] | changed[name] for name in changed}

    def table(self, name: str, scheme: Scheme) -> Tensor | None:
        """`table_of` a value; None also where the value is not local at all."""
        key = name, scheme
        if key not in self._tables:
            self._tables[key] = table_of(self.seen[name], scheme, self.grid) if name in self.seen else None
        return self._tables[key]

    def _pass(
        self,
        graph: fx.GraphModule,
        images: Tensor,
        reaches: Callable[[Tensor], Tensor],
        within: set[str] | None,
    ) -> dict[str, Tensor]:
        """Run the batch (the clean image, then one for each patch) as far as the values stay local."""
        device = next((t.device for t in graph.parameters()), torch.device("cpu"))
        images = images.to(device)
        values: dict[fx.Node, Any] = {}
        local: dict[str, Tensor] = {}
        uses = {node: len(node.users) for node in graph.graph.nodes}
        for node in graph.graph.nodes:
            sources = node.all_input_nodes
            wanted = not node.meta.get("depends") or within is None or node.name in within
            if node.op != "output" and wanted and all(source in values for source in sources):
                value = _run(graph, node, values, images, images.dtype)
                if not node.meta["depends"]:
                    values[node] = value
                elif isinstance(value, Tensor) and value.dim() == 4 and len(value) == len(images):
                    seen = reaches(value).cpu()
                    if any(table_of(seen, scheme, self.grid) is not None for scheme in self.schemes):
                        values[node], local[node.name] = value, seen
                    elif not self.refused:
                        self.refused = f"{describe(graph, node)} sees too many patches at once"
                elif not self.refused and isinstance(value, Tensor):
                    self.refused = f"{describe(graph, node)} gives no feature map"
            for source in sources:
                uses[source] -= 1
                if not uses[source]:
                    values.pop(source, None)
        return local


def _nan_reaches(values: Tensor) -> Tensor:
    """bool [d, h, w]: where one of the images behind the first is NaN; where the first is, all reach."""
    nan = (values != values).any(1)
    return nan[1:] | nan[:1]


def _differs(values: Tensor) -> Tensor:
    """bool [d, h, w]: where the images behind the first differ from it; NaN differs from all."""
    return (values[1:] != values[:1]).any(1)


def _run(
    graph: fx.GraphModule,
    node: fx.Node,
    values: dict[fx.Node, Any],
    images: Tensor,
    dtype: torch.dtype | None = None,
) -> Any:
    """The value of a node; with a dtype, its weights are brought to it first.

    Raises:
        NoReuseError: the node raised.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])
    try:
        if node.op == "placeholder":
            return images
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(graph)
            floating = dtype is not None and isinstance(value, Tensor) and value.is_floating_point()
            return value.detach().to(dtype) if floating else value
        if node.op == "call_module":
            return _in_dtype(graph.get_submodule(str(node.target)), dtype)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
    except TRACE_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NoReuseError(f"{describe(graph, node)} cannot be run by itself: {reason}") from error


def _in_dtype(module: nn.Module, dtype: torch.dtype | None) -> Callable[..., Any]:
    """The module as a function with its floating tensors in `dtype`."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if dtype is None or all(t.dtype == dtype or not t.is_floating_point() for t in tensors.values()):
        return module
    converted = {k: t.detach().to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    return lambda *args, **kwargs: torch.func.functional_call(module, converted, args, kwargs)


def describe(graph: fx.GraphModule, node: fx.Node) -> str:
    """A node in words: the module's path and type, or the function's name."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return f"{str(node.target).removeprefix('model.')} ({type(module).__name__})"
    return str(getattr(node.target, "__name__", node.target))


# Modules and functions whose output at a location is a function of their inputs at that location.
_POINTWISE_MODULES = (
    nn.BatchNorm2d,
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Dropout,
    nn.Dropout2d,
)
_POINTWISE_FUNCTIONS = (operator.add, torch.add, torch.relu, nn.functional.relu)


def note_reach(graph: fx.GraphModule, image_size: tuple[int, int, int], grid: tuple[int, int]) -> None:
    """Note in `node.meta["reach"]` which patches can reach a location, on a graph that `measure` has seen.

    bool [d, h, w], by the windows of convolutions and poolings: no location depends on another patch. None from the
    first layer on whose windows are not known here.
    """
    modules = dict(graph.named_modules())
    patches = torch.arange(grid[0] * grid[1])[:, None, None]
    for node in graph.graph.nodes:
        shape = node.meta.get("shape")
        node.meta["reach"] = None
        if node.op == "placeholder":
            node.meta["reach"] = player_map(*grid, *image_size[1:]) == patches
            continue
        sources = [source.meta["reach"] for source in node.all_input_nodes]
        if not sources or any(source is None for source in sources) or shape is None or len(shape) != 3:
            continue
        module = modules[str(node.target)] if node.op == "call_module" else None
        if type(module) is nn.Conv2d:
            reach = _windows(module, sources[0])
        elif type(module) in (nn.MaxPool2d, nn.AvgPool2d):
            assert module is not None
            reach = module(sources[0].float()[:, None])[:, 0] > 0
        elif type(module) in _POINTWISE_MODULES or (
            node.op == "call_function" and node.target in _POINTWISE_FUNCTIONS
        ):
            reach = torch.stack(sources).any(0) if len({s.shape for s in sources}) == 1 else None
        else:
            continue
        if reach is not None and reach.shape[1:] == shape[1:]:
            node.meta["reach"] = reach


def _windows(conv: nn.Conv2d, reach: Tensor) -> Tensor | None:
    """What reaches the outputs of a convolution, of what reaches its inputs."""
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return None
    window = torch.ones(1, 1, *conv.kernel_size, dtype=torch.float32)
    return (
        nn.functional.conv2d(reach.float()[:, None], window, None, conv.stride, conv.padding, conv.dilation)[
            :, 0
        ]
        > 0
    )


def tile_reach(reach: Tensor) -> Tensor | None:
    """int64 [ceil(h / 2) * ceil(w / 2)]: a bit for each patch that reaches a tile of 2x2 locations.

    None where there are more patches than bits, or every tile is reached by all of them.
    """
    if len(reach) >= 63:
        return None
    tiles = nn.functional.max_pool2d(reach.float()[:, None], 2, ceil_mode=True)[:, 0].flatten(1).long()
    bits = (tiles << torch.arange(len(reach))[:, None]).sum(0)
    return None if bool((tiles == 1).all()) else bits


# --- where to cut


@dataclass(frozen=True)
class _Region:
    """Nodes to compute for variants, and what the rest reads of them."""

    scheme: Scheme
    inside: frozenset[fx.Node]
    frontier: tuple[fx.Node, ...]
    work: float  # of the nodes inside, for one image
    gather: float  # of assembling the frontier for one image


def _cheapest(graph: fx.GraphModule, probe: Probe, evaluations: int) -> Locality:
    """One cut or two that cost least, by the work noted in the graph's nodes.

    Raises:
        NoReuseError: the direct way costs no more.
    """
    nodes = [node for node in graph.graph.nodes if node.op != "output"]
    total = sum(node.meta["work"] for node in nodes)
    schemes = [scheme for scheme in probe.schemes if _variants(scheme) < evaluations]
    regions = {scheme: list(_regions(nodes, probe, scheme)) for scheme in schemes}
    directly = evaluations * total
    best: tuple[float, tuple[_Region, ...]] = (directly, ())
    for scheme in schemes:
        for last in regions[scheme]:
            trunk = evaluations * (total - last.work + last.gather)
            best = min(best, (_variants(scheme) * last.work + trunk, (last,)), key=operator.itemgetter(0))
            for coarser in schemes:
                if _variants(coarser) >= _variants(scheme):
                    continue
                for first in regions[coarser]:
                    if not first.inside < last.inside:
                        continue
                    between = last.work - first.work + first.gather
                    cost = _variants(coarser) * first.work + _variants(scheme) * between + trunk
                    best = min(best, (cost, (first, last)), key=operator.itemgetter(0))
    cost, chosen = best
    if cost > WORTHWHILE * directly:
        raise NoReuseError(
            f"{evaluations} evaluations an image would be only {directly / cost:.2f} times faster: {probe.refused}"
        )
    share = chosen[-1].work / total
    places = [", ".join(describe(graph, node) for node in region.frontier) for region in chosen]
    reason = f"{share:.0%} of the work is shared by way of " + ", then of ".join(places)
    return Locality(tuple(_cut(region, probe) for region in chosen), reason, share, directly / cost)


def _regions(nodes: Sequence[fx.Node], probe: Probe, scheme: Scheme) -> Iterator[_Region]:
    """For every prefix of the graph's order, the nodes in it that are local under the scheme."""
    inside: set[fx.Node] = set()
    work = 0.0
    for node in nodes:
        if probe.table(node.name, scheme) is None:
            continue
        if any(source.meta["depends"] and source not in inside for source in node.all_input_nodes):
            continue
        inside.add(node)
        work += node.meta["work"]
        if not node.meta["work"]:
            continue
        frontier = tuple(n for n in nodes if n in inside and any(user not in inside for user in n.users))
        elements = sum(math.prod(n.meta["shape"]) for n in frontier if not only_shape_is_read(n, inside))
        yield _Region(scheme, frozenset(inside), frontier, work, 2 * 4 * OPERATIONS_PER_BYTE * elements)


def only_shape_is_read(node: fx.Node, inside: set[fx.Node] | frozenset[fx.Node]) -> bool:
    """Whether nodes outside want no more of this one than its shape."""

    def reads_shape(user: fx.Node) -> bool:
        if user.op == "call_method":
            return user.target in ("size", "dim")
        return user.op == "call_function" and user.target is getattr and user.args[1] in ("shape", "ndim")

    return all(reads_shape(user) for user in node.users if user not in inside)


def _cut(region: _Region, probe: Probe) -> Cut:
    classes = patch_classes(region.scheme, probe.grid)
    patterns = torch.arange(_variants(region.scheme))[:, None] >> classes & 1 == 1
    tables = tuple(
        None if only_shape_is_read(node, region.inside) else probe.table(node.name, region.scheme)
        for node in region.frontier
    )
    inside = frozenset(node.name for node in region.inside)
    return Cut(region.scheme, patterns, inside, tuple(node.name for node in region.frontier), tables)
