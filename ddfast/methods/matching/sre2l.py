"""SRe2L: images in which a trained network reads their class, and its BatchNorm the statistics of its training.

Yin, Xing and Shen, "Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective",
NeurIPS 2023. Squeeze is `ddfast train-teacher`; recovery is here; relabel is the stage of that name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ddfast.arguments import one_of, path_of, positive_number, whole_number
from ddfast.data.pool import ClassPool
from ddfast.errors import DivergedError, UsageError
from ddfast.methods.base import Context
from ddfast.methods.matching.batch_norm import StatisticsNetwork, has_statistics
from ddfast.methods.matching.cmi import Regulariser
from ddfast.methods.matching.pixels import CALLED
from ddfast.methods.matching.real import all_drawn, lower, normalised, short_of
from ddfast.methods.synthesis import Group, State, Synthesis
from ddfast.models.frozen import frozen
from ddfast.models.registry import check_model
from ddfast.ops.precision import autocast, repeatable_convolutions
from ddfast.ops.transfer import to_device
from ddfast.seeding import generator, seeded
from ddfast.settings import option
from ddfast.training.augmentation import random_resized_boxes
from ddfast.training.device import memory_layout
from ddfast.wording import argument, plural, setting

INITIAL = ("noise", "real")
BETAS, EPS = (0.5, 0.9), 1e-8  # of Adam
_STATISTICS_OF = 50  # images in a batch below which its statistics are noisy


@dataclass(frozen=True)
class SRe2LOptions:
    """Options of `sre2l`. The defaults are those of its authors' code for CIFAR-100."""

    iterations: int = option(1000, "steps of the pixels", stage="synthesize")
    batch: int = option(
        100,
        "images that are recovered together, of all classes where there is room: what BatchNorm's statistics are of",
        stage="synthesize",
    )
    class_images: int = option(
        0,
        "images of a class in a batch; 0: what there is room for beside all other classes, and with CMI at least 2",
        stage="synthesize",
    )
    init: str = option(
        "noise", "images to begin with: normal noise, or real ones", stage="synthesize", choices=INITIAL
    )
    lr_img: float = option(0.25, "learning rate of the pixels, falling to 0 by a cosine", stage="synthesize")
    bn_weight: float = option(0.01, "weight of the distances to BatchNorm's statistics", stage="synthesize")
    first_bn: float = option(
        10.0, "weight of the first layer among them; the others have 1", stage="synthesize"
    )
    shift: int = option(
        4, "pixels that a step rolls the images down and right by, at most", stage="synthesize"
    )
    either_way: bool = option(
        False, "roll them up and left as well, as for Tiny-ImageNet", stage="synthesize"
    )
    crop: bool = option(
        False,
        "let a step look at a random crop, enlarged and at times mirrored, as for all sets above 32 px",
        stage="synthesize",
    )
    cmi: float = option(
        0.0,
        "weight of the regulariser by conditional mutual information (CMI) of a batch, 0 for none",
        stage="synthesize",
    )
    cmi_ratio: float = option(
        0.0,
        "in place of --cmi: the weight at which CMI's gradient has this share of the loss's in the first step, and "
        "which then stays; 0.1 to 0.3 are sensible",
        stage="synthesize",
    )
    proxies: str | None = option(
        None,
        "folder of networks trained on the real images (ddfast train-proxies), for CMI; default the teacher itself",
        stage="synthesize",
        type=str,
        metavar="FOLDER",
        is_place=True,
    )
    cmi_every: int = option(
        1, "steps from one in which CMI acts to the next, with the same weight", stage="synthesize"
    )
    proxy_arch: str | None = option(
        None, "take only the proxies of this architecture; default all", stage="synthesize", type=str
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("iterations", 1),
            ("batch", 1),
            ("class_images", 0),
            ("shift", 0),
            ("cmi_every", 1),
        ):
            self._set(name, whole_number(getattr(self, name), name, least=least))
        self._set("lr_img", positive_number(self.lr_img, "lr_img"))
        for name in ("bn_weight", "first_bn", "cmi", "cmi_ratio"):
            self._set(name, positive_number(getattr(self, name), name, zero=True))
        one_of(self.init, "init", INITIAL)
        if self.proxies is not None:
            self._set("proxies", str(path_of(self.proxies, "proxies")))
        if self.class_images > self.batch:
            raise UsageError(
                f"{argument('class_images')} {self.class_images} do not fit in a batch of {self.batch}: "
                f"raise {argument('batch')}, or lower it"
            )
        self._check_cmi()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # a frozen dataclass: numbers as the plain types that are meant

    @property
    def has_cmi(self) -> bool:
        """Whether CMI acts."""
        return self.cmi > 0 or self.cmi_ratio > 0

    def _check_cmi(self) -> None:
        if self.cmi and self.cmi_ratio:
            raise UsageError(
                f"{argument('cmi')} {self.cmi:g} is a weight and {argument('cmi_ratio')} {self.cmi_ratio:g} finds "
                "one: give either"
            )
        acts = f"{argument('cmi')} or {argument('cmi_ratio')}"
        for name, default, needed, is_given in (
            ("cmi_every", 1, acts, self.has_cmi),
            ("proxy_arch", None, argument("proxies"), self.proxies is not None),
        ):
            if getattr(self, name) != default and not is_given:
                raise UsageError(
                    f"{argument(name)} is of no use without {needed}: give that as well, or leave it out"
                )
        if self.has_cmi and (self.batch == 1 or self.class_images == 1):
            raise UsageError(
                "CMI is 0 where a batch has a single image of a class: give it room for 2, with "
                f"{argument('batch')} and {argument('class_images')}"
            )


@dataclass(frozen=True)
class Batch(Group):
    """Images that are recovered together: `each` of every class of the group, from number `first` on."""

    first: int
    each: int


_TINY: dict[str, Any] = {"lr_img": 0.1, "bn_weight": 1.0, "crop": True, "either_way": True}


class SRe2L(Synthesis):
    """Recovery from a teacher with BatchNorm, then its soft labels."""

    name = "sre2l"
    summary = (
        "images recovered from a network's BatchNorm statistics, with its soft labels (SRe2L, NeurIPS 2023)"
    )
    Options = SRe2LOptions
    stages = ("synthesize", "relabel")
    needs_teacher = True
    draws_images = False
    protocol = "rded"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar10": {},  # their code has no CIFAR-10; with 10 classes a batch has 10 images of each
        "cifar100": {},
        "tiny_imagenet": {**_TINY, "iterations": 4000},
        "tiny_imagenet_1k": _TINY,
        "imagenet1k": {"iterations": 4000, "crop": True, "shift": 32},
    }

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._network: StatisticsNetwork | None = None
        self._regulariser: Regulariser | None = None

    def loss(self, network: StatisticsNetwork, images: Tensor, labels: Tensor) -> Tensor:
        """CE(f(A(s)), y) + r sum_l w_l (||mu_l - mean_l||_2 + ||var_l - variance_l||_2), a scalar.

        Args:
            network: f, the teacher, whose BatchNorm layers l keep mean_l and variance_l.
            images: A(s), normalised and augmented, [N, 3, H, W].
            labels: y, int64 [N].
        """
        logits, distances = network(images)
        weights = torch.ones_like(distances)
        weights[0] = self.options.first_bn
        fit = functional.cross_entropy(logits.to(distances.dtype), labels)
        return fit + self.options.bn_weight * (weights * distances).sum()

    def augmented(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """What a step looks at: one draw for all images of a batch, as in the authors' code.

        Images are rolled by 0 to `shift` px down and right, with `either_way` by -`shift` to `shift` px. With `crop` a
        random crop is enlarged, and mirrored or not, before.
        """
        most = self.options.shift
        least = -most if self.options.either_way else 0
        height, width = images.shape[-2:]
        if self.options.crop:
            left, top, end, bottom = random_resized_boxes(1, height, draws)[0].tolist()
            mirrored = bool(torch.rand((), generator=draws) < 0.5)
        down, right = torch.randint(least, most + 1, (2,), generator=draws).tolist()
        if not self.options.crop:
            return torch.roll(images, (down, right), (2, 3))
        rows = _resized(height, top, bottom).roll(down, 0)
        columns = _resized(width, left, end)
        columns = (columns.flip(0) if mirrored else columns).roll(right, 0)
        rows, columns = (to_device(each.to(images.dtype), images.device) for each in (rows, columns))
        return rows @ images @ columns.T

    # Checks -------------------------------------------------------------------------------------------------

    def check(self, image_size: int | None) -> None:
        """Refuse an architecture of proxies that does not exist, or does not take images of that size."""
        if self.options.proxy_arch is not None:
            check_model(self.options.proxy_arch, image_size, what=f"{argument('proxy_arch')}: ")

    def check_ipc(self, ipc: int) -> None:
        """Refuse CMI on single images."""
        if self.options.has_cmi and ipc == 1:
            raise UsageError(
                "CMI is 0 where a class has a single image, so it would do nothing: "
                f"give {argument('ipc')} at least 2, or leave out {self._cmi_argument}"
            )

    def check_pool(self, counts: Tensor, class_names: Sequence[str], ipc: int) -> None:
        """Refuse a class that has fewer images than the start takes."""
        needed = self.drawn_at_once(ipc)
        if few := short_of(needed, counts, class_names):
            raise UsageError(
                f"{setting('init', 'real')} begins with {plural(needed, 'different image')} of a class, but {few}: "
                + lower("ipc", int(counts.min()), f"take {setting('init', 'noise')}")
            )

    def drawn_at_once(self, ipc: int) -> int:
        """See `Synthesis`."""
        return ipc if self.options.init == "real" else 0

    def open(self, context: Context) -> None:
        """Copy the teacher and load the proxies, once in a process.

        Raises:
            UsageError: the teacher keeps no BatchNorm statistics, or of the proxies.
        """
        if self._network is not None:
            return
        teacher = context.teacher
        assert teacher is not None, "sre2l needs a teacher"
        if not has_statistics(teacher.model):
            raise UsageError(
                f"sre2l recovers images from the statistics of BatchNorm, and the teacher {teacher.arch} keeps none: "
                "train one that does, convnet3 or resnet18_small for example, or take a method that needs none, "
                "such as rded or dm"
            )
        if self.options.proxies is not None:
            self._regulariser = Regulariser.load(self.options.proxies, self.options.proxy_arch, context)
        elif self.options.has_cmi:
            layout = memory_layout(teacher.model, context.device)
            self._regulariser = Regulariser([frozen(teacher.model, context.device, layout)])
        self._network = StatisticsNetwork(teacher.model, context.device)

    def inputs(self) -> dict[str, Any]:
        """The proxies' files."""
        if self.options.proxies is None:
            return {}
        from ddfast.training.proxies import proxies_identity

        return {"proxies": proxies_identity(self.options.proxies)}

    def notes(self, context: Context) -> list[str]:
        """A batch that is too small for its statistics."""
        groups = self.groups(context.classes, context.ipc)
        least = min(len(group.classes) * group.each for group in groups)
        if least >= _STATISTICS_OF:
            return []
        if context.classes * context.ipc < _STATISTICS_OF:
            more = argument("ipc") + (
                f" and {argument('batch')}" if self.options.batch < _STATISTICS_OF else ""
            )
        else:
            more = argument("class_images" if self.options.class_images else "batch")
        return [
            f"a batch has {plural(least, 'image')}, and BatchNorm statistics of fewer than {_STATISTICS_OF} are "
            f"noisy: a higher {more} would give better ones"
        ]

    # Steps --------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Iterations."""
        return int(self.options.iterations)

    def groups(self, classes: int, ipc: int) -> list[Batch]:
        """Batches of at most `batch` images, of as many classes as fit; sizes as even as they can be.

        With CMI none has a single image of a class, for which a batch of 2 may hold 3.
        """
        options = self.options
        least = 2 if options.has_cmi else 1
        each = options.class_images or max(least, options.batch // classes)
        found: list[Batch] = []
        for first, last in _even(ipc, min(each, options.batch), least):
            for start, end in _even(classes, max(1, options.batch // (last - first))):
                found.append(Batch(len(found), tuple(range(start, end)), first, last - first))
        return found

    def in_one_group(self, classes: int, ipc: int) -> str:
        """See `Synthesis`."""
        whole = setting("batch", classes * ipc)
        apart = 0 < self.options.class_images < ipc
        return f"{whole} and {setting('class_images', ipc)}" if apart else whole

    def begin(self, group: Group, pool: ClassPool, context: Context) -> State:
        """Pixels of the start, normalised, and Adam's moments, which are 0."""
        assert isinstance(group, Batch)
        begun = torch.cat([self._initial(label, group, pool, context) for label in group.classes])
        pixels = to_device(begun, context.device)
        moments = {name: torch.zeros_like(pixels) for name in ("first_moment", "second_moment")}
        return State(group, {"pixels": pixels, **moments})

    def _initial(self, label: int, group: Batch, pool: ClassPool, context: Context) -> Tensor:
        """[each, 3, S, S], float32, on the CPU. An image's draws do not depend on the batch that it is in."""
        size, last = context.image_size, group.first + group.each
        if self.options.init == "real":
            drawn = all_drawn(pool, label, last, generator(context.seed, "init", label), context, "ipc")
            return normalised(drawn[group.first :], context, torch.float32).cpu()
        draws = (generator(context.seed, "init", label, number) for number in range(group.first, last))
        return torch.stack([torch.randn(3, size, size, generator=each) for each in draws])

    @torch.enable_grad()
    def step(self, number: int, state: State, pool: ClassPool, context: Context) -> float:
        """See `Synthesis`. The loss that is returned is that of the batch, without CMI."""
        self.open(context)
        assert self._network is not None
        group = state.group
        assert isinstance(group, Batch)
        state.tensors = {name: tensor.to(context.device) for name, tensor in state.tensors.items()}
        labels = to_device(torch.tensor(group.classes).repeat_interleave(group.each), context.device)
        pixels = state.pixels.detach().requires_grad_()
        # Networks that draw when they are called draw the same after a kill.
        with (
            repeatable_convolutions(),
            seeded(context.seed, "forward", group.number, number, device=context.device),
            autocast(context.precision, context.device),
        ):
            draws = generator(context.seed, "augment", group.number, number)
            loss = self.loss(self._network, self.augmented(pixels, draws), labels)
            (gradient,) = torch.autograd.grad(loss, pixels)
            measured = {"loss": loss.detach(), "gradient_norm": torch.linalg.vector_norm(gradient)}
            pulled, weight = self._regularise(number, state, context, measured)
        if pulled is not None:
            gradient = gradient + pulled
        moved, moments = self._updated(number, state, gradient, context)
        if self.is_noted(number):
            each = state.pixels.unflatten(0, (len(group.classes), -1))
            measured["pixel_variance"] = each.var(dim=1, correction=0).mean()
        row = self._checked(number, measured, moved)
        state.tensors |= {"pixels": moved, **moments, **weight}
        state.curve.append({"step": float(number), **row})
        return row["loss"]

    def _updated(
        self, number: int, state: State, gradient: Tensor, context: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels and moments after a step of Adam as torch has it, clamped to what a picture can show."""
        first, second = (state.tensors[f"{name}_moment"] for name in ("first", "second"))
        first = first.lerp(gradient, 1 - BETAS[0])
        second = (BETAS[1] * second).addcmul_(gradient, gradient, value=1 - BETAS[1])
        rate = 0.5 * (1 + math.cos(math.pi * number / self.steps)) * self.options.lr_img
        corrections = [1 - beta ** (number + 1) for beta in BETAS]
        scale = (second.sqrt() / math.sqrt(corrections[1])).add_(EPS)
        moved = state.pixels.addcdiv(first, scale, value=-rate / corrections[0])
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (context.mean, context.std))
        black, white = (
            to_device(edge.to(moved.dtype), context.device).view(3, 1, 1)
            for edge in (-mean / std, (1 - mean) / std)
        )
        return moved.clamp_(black, white), {"first_moment": first, "second_moment": second}

    def close(self) -> None:
        """See `Synthesis`."""
        if self._regulariser is not None:
            self._regulariser.close()

    def _regularise(
        self, number: int, state: State, context: Context, measured: dict[str, Tensor]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The gradient of lambda * CMI where it acts in this step, and lambda where it was found in it.

        What was measured joins `measured`.
        """
        options = self.options
        acts = options.has_cmi and number % options.cmi_every == 0
        if self._regulariser is None or not (acts or self.is_noted(number)):
            return None, {}
        images = state.pixels.unflatten(0, (len(state.group.classes), -1))
        measured["cmi"], gradient = self._regulariser.value_and_gradient(
            images, number, context.seed, wanted=acts
        )
        if gradient is None:
            return None, {}
        gradient, found = gradient.flatten(0, 1), {}
        if options.cmi:
            weight: Any = options.cmi
        elif "cmi_weight" in state.tensors:
            weight = state.tensors["cmi_weight"]
        else:
            weight = options.cmi_ratio * measured["gradient_norm"] / torch.linalg.vector_norm(gradient)
            measured["cmi_weight"] = weight
            found = {"cmi_weight": weight}
        pulled = weight * gradient
        measured["cmi_gradient_norm"] = torch.linalg.vector_norm(pulled)
        return pulled, found

    def _checked(self, number: int, measured: dict[str, Tensor], moved: Tensor) -> dict[str, float]:
        """See `Synthesis.finite`."""
        options = self.options
        weight = measured.pop("cmi_weight", None)
        if (
            weight is not None
            and not math.isfinite(weight.item())
            and math.isfinite(measured["gradient_norm"].item())
        ):
            raise DivergedError(
                f"CMI has no gradient in the first step, so {argument('cmi_ratio')} finds no weight for it: give one "
                f"as {argument('cmi')}, or take other {argument('proxies')}"
            )
        lower = [f"{argument(name)}, now {getattr(options, name):g}" for name in ("bn_weight", "lr_img")]
        if options.has_cmi:
            lower.append(f"{self._cmi_argument}, now {options.cmi or options.cmi_ratio:g}")
        return self.finite(number, measured, moved, CALLED, f"lower {', or '.join(lower)}")

    @property
    def _cmi_argument(self) -> str:
        return argument("cmi" if self.options.cmi else "cmi_ratio")

    def judged_on(self, context: Context) -> tuple[str, dict[str, Any]]:
        """See `Synthesis`: the teacher's."""
        assert context.teacher is not None
        return context.teacher.arch, dict(context.teacher.arch_options)


def _even(count: int, most: int, least: int = 1) -> list[tuple[int, int]]:
    """(first, last exclusive) of the fewest runs of at most `most` that `count` things go into, as even as can be.

    Where such a run would have fewer than `least`, there are fewer runs, and longer ones.
    """
    runs = max(1, min(-(-count // most), count // least))
    ends = [count * run // runs for run in range(runs + 1)]
    return list(itertools.pairwise(ends))


def _resized(size: int, first: int, last: int) -> Tensor:
    """The matrix [size, size] that enlarges places `first` to `last` of a row of `size` px to all of it.

    Bilinear, as torchvision's RandomResizedCrop has it; a crop is no larger than the image, so antialiasing is idle.
    """
    identity = torch.eye(last - first).unsqueeze(0)
    enlarged = functional.interpolate(identity, size=size, mode="linear", align_corners=False)[0].T
    return functional.pad(enlarged, (first, size - last))
