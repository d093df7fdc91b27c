"""The forward passes of the Shapley engine: a model prepared once, then run on masked images at full speed.

`prepare` traces the model, folds its batch norms, casts its weights where a low precision was asked for, fuses
what the CPU's convolutions can take in while they write, and cuts it where locality reuse pays. What cannot be
done is left out, with the reason in `Forward.reason`; what cannot be traced runs as it is. The choice depends on
the model, the size of the images, the grid, the precision and the number of evaluations an image, and on nothing
that happened before, so equal arguments give equal bits.

A model is prepared again when its structure or its weights change, or what its forward calls on the images. Graphs and
measurements are kept as long as the model lives.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from ddfast.masked_forward import folding, locality, tracing
from ddfast.masked_forward.call_log import Log
from ddfast.masked_forward.locality import Cut, Locality
from ddfast.ops import assemble_masked_features
from ddfast.ops.graphs import Recorded
from ddfast.ops.layouts import called
from ddfast.ops.precision import autocast, resolve_precision
from ddfast.ops.transfer import to_device
from ddfast.random_states import RandomStates

log = logging.getLogger(__name__)

Stage = Callable[..., tuple[Tensor, ...]]
Masked = Callable[[Tensor], Tensor]
"""Coalitions bool [k, d] -> the masked images [b k, C, H, W] of a group of b images."""

# The largest difference between assembled and computed features, as a share of the largest feature. Both come from the
# same layers, and mostly agree to the bit; but a convolution may take another algorithm at another batch size.
_AGREEMENT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}
_AGREEMENT_TF32 = 2e-3
_CHECKED_COALITIONS = 16


@dataclass
class Forward:
    """A model as a chain of stages from masked images to class scores, with assemblies between them.

    Attributes:
        stages: functions of the tensors that the stage before gives, the first one of masked images.
        cuts: the assembly behind each stage but the last; empty without reuse.
        dtype: what masked images are given as.
        precision: what the stages run under, "float32" where they are cast already.
        reason: why nothing is reused, or what is; why weights are not folded or cast.
        traced: whether the stages are graphs, not the model as it is.
    """

    stages: Sequence[Stage]
    cuts: Sequence[Cut]
    dtype: torch.dtype
    precision: str
    reason: str
    traced: bool = True
    checked: bool = field(default=False, init=False)
    lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    shares: bool = field(default=True, init=False)  # tiles between coalitions, see `folding.fuse_epilogues`

    def _run(
        self, stage: Stage, inputs: tuple[Tensor, ...], sets: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """A stage of the maps of images under coalitions; `sets` [b, k] are what `players_of` makes of those."""
        if isinstance(stage, fx.GraphModule) and stage.meta.get("takes_sets"):
            return stage(*inputs, sets if self.shares else None)
        return stage(*inputs)

    def direct(self, masked: Tensor, *, once: bool = False) -> Tensor:
        """Scores [n, classes] of masked images [n, C, H, W]; `once`: not worth a recording on a GPU."""
        with autocast(self.precision, masked.device):
            values: tuple[Tensor, ...] = (masked,)
            for stage in self.stages:
                values = self._run(stage.function if once and isinstance(stage, Recorded) else stage, values)
        return values[0]

    def variants(
        self, masked: Masked, images: int, chunk: int, cuts: Sequence[Cut] | None = None
    ) -> tuple[Tensor, ...]:
        """The features [b, variants, C, h, w] from which every coalition's are assembled at the last cut.

        Args:
            masked: the masked images of a group of b images.
            images: b.
            chunk: masked images in one pass, at most.
            cuts: those of this `Forward`, as they were read; another thread may give reuse up meanwhile.
        """
        maps: tuple[Tensor, ...] = ()
        cuts = self.cuts if cuts is None else cuts
        for stage, cut, before in zip(self.stages[:-1], cuts, (None, *cuts), strict=False):
            together = max(1, chunk // images)
            pieces = []
            for patterns in cut.patterns.split(together):
                inputs = (masked(patterns),) if before is None else assemble(before, maps, patterns)
                sets = players_of(patterns).expand(images, -1)
                with autocast(self.precision, inputs[0].device):
                    found = self._run(stage, inputs, sets)
                pieces.append([_by_image(features, images) for features in found])
            maps = tuple(_join(piece) for piece in zip(*pieces, strict=True))
        return maps

    def last(self, assembled: tuple[Tensor, ...], sets: Tensor | None = None) -> Tensor:
        """Scores [n, classes] of what is assembled at the last cut.

        Args:
            assembled: tensors [n, ...] of b images under k coalitions, n = b k.
            sets: the coalitions, int64 [b, k] of `players_of`; None: unknown.
        """
        with autocast(self.precision, assembled[0].device):
            return self._run(self.stages[-1], assembled, sets)[0]

    def agrees(self, masked: Masked, maps: tuple[Tensor, ...], players: int) -> bool:
        """Whether assembled features of an image are those that the model computes for it.

        Compared once, under 16 coalitions drawn at random; where they differ, reuse is given up.

        Args:
            masked: the masked images of the first image of a group.
            maps: the variants' features of the group.
            players: d.
        """
        with self.lock:
            if not self.checked:
                self._agrees(masked, maps, players)
                self.checked = True
            return bool(self.cuts)

    def _agrees(self, masked: Masked, maps: tuple[Tensor, ...], players: int) -> None:
        generator = torch.Generator().manual_seed(0)
        coalitions = torch.rand(_CHECKED_COALITIONS, players, generator=generator, dtype=torch.float32) < 0.5
        cut = self.cuts[-1]
        found = assemble(cut, tuple(features[:1] for features in maps), coalitions)
        values: tuple[Tensor, ...] = (masked(coalitions),)
        with autocast(self.precision, values[0].device):
            for stage in self.stages[:-1]:
                values = self._run(stage, values)
        for wanted, features, table in zip(values, found, cut.tables, strict=True):
            if table is None:
                continue
            allowed = _AGREEMENT.get(features.dtype, 0.0)
            if features.is_cuda and features.dtype == torch.float32:
                allowed = _AGREEMENT_TF32
            difference = (wanted.double() - features.double()).abs().amax()
            # Not finite: the caller counts such scores and raises.
            if bool(difference > allowed * wanted.double().abs().amax()):
                where = ", ".join(cut.frontier)
                self.reason = f"features assembled at {where} differ from computed ones by {difference:.3g}"
                log.warning("locality reuse is off: %s", self.reason)
                self.cuts = ()
                return
        shared, alone = self.last(found, players_of(coalitions)[None]), self.last(found)
        if bool(alone.isfinite().all()) and not _close(shared, alone):
            self.shares = False
            log.warning("sharing of tiles between coalitions is off: it changes the scores")


def assemble(cut: Cut, maps: tuple[Tensor, ...], coalitions: Tensor) -> tuple[Tensor, ...]:
    """The tensors of a cut [b k, C, h, w] under coalitions bool [k, d] or [b, k, d]."""
    coalitions = to_device(coalitions, maps[0].device)
    return tuple(
        # Where only the shape is read, one number stands for all.
        features.new_zeros(()).expand(len(features) * coalitions.shape[-2], *features.shape[2:])
        if table is None
        else assemble_masked_features(features, coalitions, table)
        for features, table in zip(maps, cut.tables, strict=True)
    )


def players_of(coalitions: Tensor) -> Tensor:
    """int64 [...]: the players of coalitions bool [..., d] as bits; those past the 63rd are left out."""
    first = coalitions[..., :63].long()
    return (first << torch.arange(first.shape[-1], device=first.device)).sum(-1)


def _by_image(features: Tensor, images: int) -> Tensor:
    """[b v, C, h, w] as [b, v, h, w, C]."""
    return features.permute(0, 2, 3, 1).unflatten(0, (images, -1))


def _join(pieces: Sequence[Tensor]) -> Tensor:
    """Pieces [b, v, h, w, C] of the variants as [b, V, C, h, w], channels last in memory."""
    joined = pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces), dim=1)
    return joined.permute(0, 1, 4, 2, 3)


# --- preparing a model


@dataclass
class _Prepared:
    """What is kept of a model while it lives."""

    structure: tuple[int, ...]
    weights: tuple = ()
    probes: locality.Probes = field(default_factory=dict)
    found: dict[tuple, Locality] = field(default_factory=dict)
    forwards: dict[tuple, Forward] = field(default_factory=dict)
    calls: dict[tuple, Log] = field(default_factory=dict)  # of the model's forward, where it was traced


_PREPARED: weakref.WeakKeyDictionary[nn.Module, _Prepared] = weakref.WeakKeyDictionary()
_PREPARING = threading.RLock()


def prepare(
    model: Callable[[Tensor], Tensor],
    image_size: tuple[int, int, int],
    grid: tuple[int, int],
    evaluations: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    precision: str = "float32",
    images: Tensor | None = None,
    calls: Log | None = None,
    anew: bool = False,
    as_it_is: str = "",
) -> Forward:
    """The forward passes of a model over masked images.

    Args:
        model: module in eval mode, or function.
        image_size: (channels, height, width).
        grid: (rows, columns) of patches.
        evaluations: coalitions an image, about: within a sixth of it the choice is the same.
        dtype: dtype of the model's parameters.
        device: where they are.
        precision: "float32", "bfloat16" or "auto"; the latter two lower float32 models only.
        images: masked images [n, C, H, W], on which a graph has to make the model's calls; None: made up ones.
        calls: what the model's forward called on these images; where it differs from what it called before, the model
            is prepared anew. None: not known.
        anew: forget what was kept of the model.
        as_it_is: why the model is not to be traced, where it is not.
    """
    if not isinstance(model, nn.Module):
        return _as_it_is(model, dtype, precision, "the model is a function, not a module")
    # What is kept must be of use outside of the caller's inference mode, too.
    with _PREPARING, torch.inference_mode(False), torch.no_grad():
        kept, structure = _PREPARED.get(model), (tracing.fingerprint(model), *_integers(model))
        if kept is None or kept.structure != structure or anew:
            kept = _PREPARED[model] = _Prepared(structure)
        evaluations = _rounded(evaluations)
        weights = _weights(model)
        if kept.weights != weights:
            kept.weights = weights
            kept.forwards.clear()
            kept.calls.clear()
        settings = (image_size, grid, dtype, str(device), precision, _compiles())
        seen = (settings, 0 if images is None else len(images))
        if calls is not None and kept.calls.get(seen, calls) != calls:
            kept = _PREPARED[model] = _Prepared(structure, weights)
        found = kept.found.get((settings, evaluations))
        if found is None or (settings, found.key) not in kept.forwards or as_it_is:
            forward, found = _make(
                model, kept, image_size, grid, evaluations, dtype, device, precision, images, as_it_is
            )
            kept.found[settings, evaluations] = found
            kept.forwards[settings, found.key] = forward
        if calls is not None and kept.forwards[settings, found.key].traced:
            kept.calls[seen] = calls
        return kept.forwards[settings, found.key]


def _rounded(evaluations: int) -> int:
    """Down to a quarter of a power of two, so that close numbers share what is prepared."""
    return int(2 ** (math.floor(4 * math.log2(max(evaluations, 1))) / 4))


def locality_of(
    model: Callable[[Tensor], Tensor],
    image_size: int | tuple[int, int] | tuple[int, int, int],
    grid: int | tuple[int, int] = 4,
    evaluations: int = 64,
) -> Locality:
    """What `shapley` reuses between the coalitions of an image, and why not more.

    Args:
        model: module in eval mode; a function is never reused.
        image_size: pixels a side, (height, width) or (channels, height, width); 3 channels by default.
        grid: cells a side, or (rows, columns).
        evaluations: coalitions an image.

    Returns:
        A `Locality`: `cut` names the tensors that are assembled (None: none), `reason` says why there or why
        not, `share_of_work` is the share of a forward pass before the cut, `speedup` the gain to expect.

    Raises:
        ValueError: a model in training mode.
    """
    check_model(model)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = size if len(size) == 3 else (3, *size)
    cells = (grid, grid) if isinstance(grid, int) else grid
    states = RandomStates()
    try:
        with _PREPARING, torch.inference_mode(False), torch.no_grad():
            graph = _graph(model, _made_up(model, size))
            return _analysed(model, graph, size, cells, evaluations, {})
    except (tracing.CannotTraceError, locality.NoReuseError) as error:
        return Locality(reason=str(error))
    finally:
        states.restore()


def check_model(model: Callable[[Tensor], Tensor], images: Tensor | None = None) -> None:
    """Every module is in eval mode and the parameters are where the images are."""
    if not callable(model):
        raise ValueError(f"model must be a module or a function of images, got {type(model).__name__}")
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        if module.training:
            which = f"its module {name!r}" if name else "it"
            raise ValueError(
                f"the model must be in eval mode, but {which} is in training mode: call model.eval()"
            )
    parameter = next(model.parameters(), None)
    if images is not None and parameter is not None and parameter.device != images.device:
        raise ValueError(
            f"images are on {images.device}, the model is on {parameter.device}: move one of them"
        )


def _as_it_is(model: Callable[[Tensor], Tensor], dtype: torch.dtype, precision: str, reason: str) -> Forward:
    log.debug("the model runs as it is: %s", reason)

    def run(masked: Tensor) -> tuple[Tensor, ...]:
        scores = called(model, masked)
        # It may be the model's own memory, which its next call writes to.
        return (scores.clone() if isinstance(scores, Tensor) else scores,)

    # Autocast lowers float32 only.
    return Forward([run], (), dtype, precision if dtype == torch.float32 else "float32", reason, False)


def _make(
    model: nn.Module,
    kept: _Prepared,
    image_size: tuple[int, int, int],
    grid: tuple[int, int],
    evaluations: int,
    dtype: torch.dtype,
    device: torch.device,
    precision: str,
    images: Tensor | None,
    as_it_is: str,
) -> tuple[Forward, Locality]:
    try:
        if as_it_is:
            raise tracing.CannotTraceError(as_it_is)
        with autocast("float32", device):
            graph = _graph(model, _made_up(model, image_size) if images is None else images)
        found = _analysed(model, graph, image_size, grid, evaluations, kept.probes)
    except (tracing.CannotTraceError, locality.NoReuseError) as error:
        reference = weakref.ref(model)  # the cache must not keep the model alive

        def run(masked: Tensor) -> Tensor:
            alive = reference()
            assert alive is not None
            return alive(masked)

        return _as_it_is(run, dtype, precision, str(error)), Locality(reason=str(error))
    log.info("locality reuse: %s", found.reason)
    reason = found.reason
    low = resolve_precision(precision, device) if dtype == torch.float32 else None
    under = "float32"
    if low is not None:
        refused = folding.low_precision_reason(graph)
        if refused:
            under, low = precision, None
            reason += f"; autocast runs it: {refused}"
    folding.cast(graph, low or dtype)
    locality.note_reach(graph, image_size, grid)
    stages: list[Stage] = []
    for part in _split(graph, found.cuts):
        if under == "float32":
            folding.fuse_epilogues(part, device, low or dtype, share=not _compiles())
            fused = part.meta.get("epilogues", "")
            reason += f"; {fused}" if fused else ""
        stages.append(_accelerated(part, device))
    tables = [
        replace(
            cut,
            patterns=cut.patterns.to(device),
            tables=tuple(None if t is None else t.to(device) for t in cut.tables),
        )
        for cut in found.cuts
    ]
    return Forward(stages, tables, low or dtype, under, reason), found


def _graph(model: Callable[[Tensor], Tensor], images: Tensor) -> fx.GraphModule:
    graph = tracing.trace(model, images)
    folding.fold_batch_norms(graph)
    return graph


def _made_up(model: Callable[[Tensor], Tensor], image_size: tuple[int, int, int]) -> Tensor:
    """Two images without symmetry, [2, C, H, W]."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    like = next((p for p in parameters if p.is_floating_point()), torch.empty(0, dtype=torch.float32))
    image = made_up_image(image_size)
    return torch.stack([image, 1.5 - 2 * image]).to(like.device, like.dtype)


def made_up_image(image_size: tuple[int, int, int]) -> Tensor:
    """Float32 [C, H, W]: any image will do; this one has no symmetry."""
    pixels = image_size[0] * image_size[1] * image_size[2]
    return torch.linspace(-2, 2, pixels, dtype=torch.float32).sin().view(image_size)


def _analysed(
    model: Callable[[Tensor], Tensor],
    graph: fx.GraphModule,
    image_size: tuple[int, int, int],
    grid: tuple[int, int],
    evaluations: int,
    probes: locality.Probes,
) -> Locality:
    """Shapes and work of the graph's nodes, noted in them, and the cuts that pay.

    Raises:
        NoReuseError: the graph does not give what the model gives.
    """
    parameter = next(
        (p for p in graph.parameters() if p.is_floating_point()), torch.empty(0, dtype=torch.float32)
    )
    image = made_up_image(image_size)[None].to(parameter.device, parameter.dtype)
    with autocast("float32", image.device):
        locality.measure(graph, image.clone())
        wanted, given = called(model, image.clone()), graph(image.clone())
        if not _close(given, wanted):
            raise locality.NoReuseError("the traced graph does not give what the model gives")
        return locality.find(graph, image_size, grid, evaluations, probes)


def _close(given: Tensor, wanted: Tensor) -> bool:
    """Whether scores agree but for the rounding of folded weights."""
    if not isinstance(wanted, Tensor) or given.shape != wanted.shape or given.dtype != wanted.dtype:
        return False
    low = wanted.dtype.itemsize == 2 or wanted.is_cuda
    given, wanted = given.double(), wanted.double()
    return bool(
        (given - wanted).abs().amax() <= (0.05 if low else 1e-3) * wanted.abs().amax().clamp(min=1e-30)
    )


def _weights(model: nn.Module) -> tuple:
    """Changes whenever a weight does: addresses, versions, and the values, as `tensor.data` counts no version."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    places = tuple((t.data_ptr(), t._version if not t.is_inference() else 0, t.shape) for t in tensors)
    if not tensors:
        return places
    # The hash is an exclusive or of bits, which a change of an even number of signs leaves as it was.
    hashes = torch.stack([torch.hash_tensor(t.detach()).view(torch.int64) for t in tensors]).tolist()
    sums = torch.stack([t.detach().sum().double() for t in tensors]).tolist()
    return (*places, *hashes, *sums)


def _integers(model: nn.Module) -> tuple[int, ...]:
    """Changes with the values of integers and truth values: they may move pixels, and so what is local."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not t.is_floating_point() and t.numel()]
    hashes = [torch.hash_tensor(t.detach()).view(torch.int64) for t in tensors if not t.is_complex()]
    # Of all bits at their places: an exclusive or does not see a permutation.
    places = [_order_of(t) for t in tensors if not t.is_complex()]
    return tuple(torch.stack([*hashes, *places]).tolist()) if hashes else ()


def _order_of(tensor: Tensor) -> Tensor:
    """A sum over the elements weighted by their places, int64, with wrap-around."""
    flat = tensor.detach().reshape(-1).long()
    place = torch.arange(1, len(flat) + 1, device=flat.device)
    return (flat * (place * 0x9E3779B97F4A7C1 | 1)).sum()


def _split(graph: fx.GraphModule, cuts: Sequence[Cut]) -> list[fx.GraphModule]:
    """The graph in parts, one before each cut and one behind the last; each gives a tuple of tensors."""
    done: set[str] = set()
    given: tuple[str, ...] = tuple(n.name for n in graph.graph.nodes if n.op == "placeholder")
    parts = []
    everything = [node for node in graph.graph.nodes if node.op != "placeholder"]
    for inside, wanted in [*((cut.inside, cut.frontier) for cut in cuts), (None, None)]:
        part, copies = fx.Graph(), {}
        originals = {node.name: node for node in graph.graph.nodes}
        for name in given:
            copies[originals[name]] = part.placeholder(name)
            copies[originals[name]].meta.update(originals[name].meta)
        for node in everything:
            constant = not node.meta.get("depends", True)
            here = (inside is None or node.name in inside) and node.name not in done
            if node.op == "output" or not (here or constant):
                continue
            if node not in copies:
                copies[node] = part.node_copy(node, copies.__getitem__)
        names = wanted if wanted is not None else (everything[-1].args[0].name,)
        part.output(tuple(copies[originals[name]] for name in names))
        module = fx.GraphModule(graph, part)
        module.graph.eliminate_dead_code()
        module.recompile()
        parts.append(module.eval())
        done, given = set(inside or ()), names
    return parts


# --- what a GPU, or a compiler, adds


def _compiles() -> bool:
    """Whether stages go through torch.compile: where DDFAST_COMPILE=1.

    It is not the default: it takes a minute at first, and on the CPU it gained less over folded and fused
    convolutions than runs vary.
    """
    return os.environ.get("DDFAST_COMPILE", "0") == "1"


def _accelerated(stage: fx.GraphModule, device: torch.device) -> Stage:
    run: Stage = torch.compile(stage, dynamic=False) if _compiles() else stage
    return Recorded(run) if device.type == "cuda" else run
