"""Train a diffusion prior: a small class-conditional UNet of diffusers on the images at hand.

DDPM (Ho et al., 2020): noise of a random strength is laid on an image, and the network says which. What samples is the
moving average of the weights. The folder is one that `DDPMPipeline.from_pretrained` opens as well.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.arguments import data_of, number_below_one, one_of, output_folder, positive_number, whole_number
from ddfast.crowding import Neighbours, warn_of_crowding
from ddfast.errors import UsageError
from ddfast.files import atomic_write_text, make_folder, sweep_temporary
from ddfast.isolation import isolated, on_threads
from ddfast.models.diffusion import (
    PRIOR_FILE,
    Prior,
    diffusers_is_there,
    load_prior,
    new_denoiser,
    new_schedule,
    sample,
    save_prior,
)
from ddfast.ops.precision import PRECISIONS, autocast, compute_dtype
from ddfast.progress import Outlook, say, ways_of_machine
from ddfast.ranks import usable_cores
from ddfast.seeding import generator, seeded
from ddfast.training.augmentation import random_flip
from ddfast.training.course import Course, held_arithmetic
from ddfast.training.device import resolve_device
from ddfast.training.fitting import Fitting, cosine
from ddfast.training.image_sets import ImageSet, StreamedSet, native_size, read_training_set
from ddfast.training.network_folder import training_places
from ddfast.training.teacher import check_identity
from ddfast.wording import argument, plural, setting

FORMAT = "ddfast-prior-1"
SAMPLES = "samples"
_STATE = "training.state"
_SHOWN = 6  # images of a class in a grid of samples
_GRID_STEPS = 50  # of the sampler, for a grid
_WARM_UP = 0.05  # share of the steps in which the learning rate rises


@dataclass(frozen=True)
class PriorConfig:
    """How a prior is trained.

    Attributes:
        epochs: passes over the training split.
        image_size: side in pixels.
        width: channels of the first level, a multiple of 8; the others have twice as many.
        lr: highest learning rate of AdamW: it rises over the first twentieth of the steps, then falls as a cosine.
        batch_size: images a step.
        ema: share of the moving average that a step keeps, at most; less in the first steps.
        flip: mirror images at random, which digits do not bear.
        seed: of weights, order, noise and mirroring.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where it is faster.
    """

    epochs: int
    image_size: int
    width: int = 32
    lr: float = 1e-3
    batch_size: int = 64
    ema: float = 0.999
    flip: bool = True
    seed: int = 0
    precision: str = "float32"

    def checked(self) -> PriorConfig:
        """The same with plain numbers.

        Raises:
            UsageError: one is out of range.
        """
        one_of(self.precision, "precision", PRECISIONS)
        return replace(
            self,
            epochs=whole_number(self.epochs, "epochs", least=1),
            image_size=whole_number(self.image_size, "image_size", least=1),
            width=whole_number(self.width, "width", least=1),
            lr=positive_number(self.lr, "lr"),
            batch_size=whole_number(self.batch_size, "batch_size", least=1),
            ema=number_below_one(self.ema, "ema"),
            flip=bool(self.flip),
            seed=whole_number(self.seed, "seed", least=0, most=2**63 - 1),
        )


@isolated()
def train_prior(
    data: Any,
    *,
    epochs: int,
    out: str | Path,
    image_size: int | None = None,
    images_per_class: int | None = None,
    width: int = 32,
    lr: float = 1e-3,
    batch_size: int = 64,
    ema: float = 0.999,
    flip: bool = True,
    sample_every: int | None = None,
    seed: int = 0,
    resume: bool = False,
    device: str = "auto",
    workers: int | None = None,
    quiet: bool = False,
    precision: str = "float32",
) -> Prior:
    """Train a class-conditional diffusion model on the training split of `data`, and write it into the folder `out`.

    Where all images are grey the network has one channel, and its samples have three equal ones.

    The folder then holds `model_index.json`, `unet/` and `scheduler/`, as `DDPMPipeline.save_pretrained` writes them,
    `prior.json` with the class names, and `samples/epoch-<N>.png`, what it made on the way.

    Args:
        data: an image folder, archive, named set, or images in memory, as `ddfast.data.open_source` takes it.
        epochs: passes over the training images.
        out: the folder. It may not hold anything yet, unless `resume` finds that it is of this training.
        image_size: side in pixels; None: the shorter side of the first training image, at most 224.
        images_per_class: train on so many of each class, those that a run with this seed draws; None: all.
        width: channels of the network's first level, a multiple of 8; 32 at 32 px is about a million parameters.
        lr: highest learning rate of AdamW.
        batch_size: images a step.
        ema: share of the moving average of the weights that a step keeps.
        flip: mirror images at random.
        sample_every: epochs from one picture of samples to the next; None: five in all, 0: none.
        seed: of all draws.
        resume: continue a killed training from its last saved step, at most a minute before; start where there is
            nothing to continue, return at once where it is finished.
        device: "auto", "cpu" or "cuda".
        workers: decoding workers; None: the loader's default.
        quiet: print nothing.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where it is faster.

    Raises:
        UsageError: bad arguments or data, diffusers is not there, or a folder that holds something else.
    """
    from ddfast.data import open_source
    from ddfast.data.sources import check_outside

    diffusers_is_there()
    neighbours = Neighbours()
    out = output_folder(out)
    tried = PriorConfig(
        epochs=epochs,
        image_size=8 if image_size is None else image_size,
        width=width,
        lr=lr,
        batch_size=batch_size,
        ema=ema,
        flip=flip,
        seed=seed,
        precision=precision,
    ).checked()
    if images_per_class is not None:
        images_per_class = whole_number(images_per_class, "images_per_class", least=1)
    every = None if sample_every is None else whole_number(sample_every, "sample_every", least=0)
    where = resolve_device(device)
    if workers is not None:
        workers = whole_number(workers, "workers", least=0)
    _check_folder(out, resume)
    data = data_of(data)
    source = open_source(data, "train")
    check_outside(out, source)
    for note in source.notes():
        say(note, quiet=quiet)
    config = replace(tried, image_size=native_size(source) if image_size is None else tried.image_size)
    places, drawn_from = training_places(source, images_per_class, config.seed, quiet)
    identity = json.loads(
        json.dumps(
            {
                **asdict(config),
                "images_per_class": images_per_class,
                "data": source.fingerprint() + drawn_from,
            }
        )
    )
    if (out / PRIOR_FILE).is_file():
        check_identity(out / PRIOR_FILE, _said(out).get("training") or {}, identity)
        say(f"{out} is finished", quiet=quiet)
        (out / _STATE).unlink(missing_ok=True)
        return load_prior(out)
    arithmetic = held_arithmetic(
        out / _STATE,
        identity,
        {
            "arithmetic": compute_dtype(config.precision, where),
            "threads": torch.get_num_threads(),
            "device": where.type,
        },
        resume,
    )
    _untrained(config, len(source.class_names))  # what it refuses, before anything is read
    make_folder(out)
    sweep_temporary(out)
    samples = None if places is None else source.samples.take(places)
    train = read_training_set(source, config.image_size, samples=samples, workers=workers, quiet=quiet)
    denoiser = _untrained(config, len(source.class_names), 1 if _is_grey(train) else 3)
    if where.type == "cpu":
        warn_of_crowding(neighbours, torch.get_num_threads(), "OMP_NUM_THREADS={}".format, quiet=quiet)
    ways = ways_of_machine(where.type, arithmetic["threads"], usable_cores(), "OMP_NUM_THREADS={}".format)
    outlook = Outlook(config.epochs, [f"fewer {argument('epochs')}", f"a smaller {argument('width')}", *ways])
    training = _Training(denoiser, config, where, arithmetic["arithmetic"])
    parameters = sum(value.numel() for value in denoiser.parameters())
    images = "grey image" if training.channels == 1 else "image"
    say(
        f"training a prior of {parameters:,} parameters for {plural(config.epochs, 'epoch')} on "
        f"{plural(len(train), images)} of {config.image_size} px ({where.type}, {arithmetic['arithmetic']})",
        quiet=quiet,
    )
    course = Course(
        fitting=training.fitting,
        train=train,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        prepare=training.prepare,
        loss=training.loss,
        rate=training.rate,
        path=out / _STATE,
        identity=identity,
        arithmetic=arithmetic,
        quiet=quiet,
        outlook=outlook,
        after_step=training.after_step,
        kept=training.kept,
        restore=training.restore,
        least=1,
    )
    shown_every = max(1, config.epochs // 5) if every is None else every

    def after_epoch(epoch: int, loss: float) -> None:
        say(f"epoch {epoch}/{config.epochs}: loss {loss:.4f}", quiet=quiet)
        if shown_every and (epoch % shown_every == 0 or epoch == config.epochs):
            _draw_samples(training, source.class_names, config, out / SAMPLES / f"epoch-{epoch:04d}.png")

    with on_threads(arithmetic["threads"]):
        course.run(after_epoch)
    _write(out, training, source.class_names, config, identity, arithmetic, train)
    (out / _STATE).unlink(missing_ok=True)
    say(f"wrote {out}", quiet=quiet)
    return load_prior(out)


class _Training:
    """The network on its way, and the moving average of its weights."""

    def __init__(
        self, denoiser: nn.Module, config: PriorConfig, device: torch.device, precision: str
    ) -> None:
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        self.config = config
        self.channels = int(denoiser.config.in_channels)  # type: ignore[union-attr, arg-type]
        self.precision = precision
        self.fitting = Fitting(
            denoiser, lambda model: torch.optim.AdamW(model.parameters(), lr=config.lr), device, precision
        )
        self.schedule = new_schedule()
        self.noise = DDPMScheduler.from_config(self.schedule)
        self.average = EMAModel(self.fitting.model.parameters(), decay=config.ema)

    def prepare(self, images: Tensor, labels: Tensor, draws: torch.Generator) -> tuple[Any, Tensor]:
        """Noisy images in [-1, 1], their timesteps and labels; the noise is what the network is to say."""
        if self.config.flip:
            images = random_flip(images, draws)
        clean = images[:, : self.channels].float() / 127.5 - 1
        wanted = torch.randn(clean.shape, generator=draws).to(clean.device)
        steps = int(self.schedule["num_train_timesteps"])
        timesteps = torch.randint(steps, (len(clean),), generator=draws).to(clean.device)
        return (self.noise.add_noise(clean, wanted, timesteps), timesteps, labels, False), wanted

    def loss(self, said: tuple[Tensor, ...], wanted: Tensor) -> Tensor:
        """Mean squared error of the noise."""
        return F.mse_loss(said[0].float(), wanted)

    def rate(self, share: float) -> float:
        """The learning rate at a share of all steps."""
        rise = min(1.0, (share + 1e-3) / _WARM_UP)
        return self.config.lr * rise * cosine(max(0.0, (share - _WARM_UP) / (1 - _WARM_UP)))

    def after_step(self) -> None:
        """Move the average."""
        self.average.step(self.fitting.model.parameters())

    def kept(self) -> dict[str, Tensor]:
        """The average, and how many steps it has seen."""
        held = {f"average.{number}": value for number, value in enumerate(self.average.shadow_params)}
        return {**held, "averaged": torch.tensor(self.average.optimization_step)}

    def restore(self, tensors: Any) -> None:
        """Put `kept` back."""
        for number, value in enumerate(self.average.shadow_params):
            value.copy_(tensors[f"average.{number}"])
        self.average.optimization_step = int(tensors["averaged"])

    def averaged(self) -> _Averaged:
        """Context in which the network has the average's weights."""
        return _Averaged(self)


class _Averaged:
    def __init__(self, training: _Training) -> None:
        self._training = training

    def __enter__(self) -> nn.Module:
        model, average = self._training.fitting.model, self._training.average
        average.store(model.parameters())
        average.copy_to(model.parameters())
        return model.eval()

    def __exit__(self, *_: object) -> None:
        model = self._training.fitting.model
        self._training.average.restore(model.parameters())
        model.train()


def _untrained(config: PriorConfig, classes: int, channels: int = 3) -> nn.Module:
    with seeded(config.seed, "weights"):
        return new_denoiser(config.image_size, classes, config.width, channels)


def _is_grey(train: ImageSet | StreamedSet) -> bool:
    """Whether all images are grey, so that one channel says everything; those that are streamed count as coloured."""
    return isinstance(train, ImageSet) and all(
        torch.equal(each[:, :1].expand_as(each), each) for each in train.images.split(1024)
    )


def _as_prior(training: _Training, denoiser: nn.Module, classes: int, size: int) -> Prior:
    return Prior(denoiser, training.schedule, None, None, classes, size, (training.channels, size, size), "")


def _draw_samples(training: _Training, class_names: Any, config: PriorConfig, path: Path) -> None:
    """A picture of samples, a row a class, from the same noise every time."""
    from ddfast.output.mosaic import mosaic_labels, write_mosaic

    labels = [label for label in mosaic_labels(len(class_names)) for _ in range(_SHOWN)]
    device = training.fitting.device
    with training.averaged() as denoiser, autocast(training.precision, device):
        prior = _as_prior(training, denoiser, len(class_names), config.image_size)
        draws = [generator(config.seed, "shown", number) for number in range(len(labels))]
        images = sample(prior, torch.tensor(labels, device=device), draws, _GRID_STEPS)
    make_folder(path.parent)
    write_mosaic(path, to_levels(images), labels, class_names)


def to_levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] in 8 bits, on the CPU."""
    return (images.float() * 127.5 + 127.5).round_().clamp_(0, 255).to(torch.uint8).cpu()


def _write(
    out: Path,
    training: _Training,
    class_names: Any,
    config: PriorConfig,
    identity: dict[str, Any],
    arithmetic: dict[str, Any],
    train: Any,
) -> None:
    """The finished prior; `prior.json` comes last, and says that the rest is whole."""
    for name in ("unet", "scheduler"):
        shutil.rmtree(out / name, ignore_errors=True)
    with training.averaged() as denoiser:
        save_prior(out, denoiser, training.schedule)
    said = {
        "format": FORMAT,
        "class_names": list(class_names),
        "image_size": config.image_size,
        "images": len(train),
        "unreadable": len(train.bad),
        "training": identity,
        "arithmetic": arithmetic,
    }
    atomic_write_text(out / PRIOR_FILE, json.dumps(said, indent=2, ensure_ascii=False) + "\n")


def _said(out: Path) -> dict[str, Any]:
    """`prior.json` of a folder."""
    try:
        held = json.loads((out / PRIOR_FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        held = None
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise UsageError(f"{out / PRIOR_FILE} is damaged: choose another {argument('out')}")
    return held


def _check_folder(out: Path, resume: bool) -> None:
    """Refuse a folder that holds something else, or a finished prior without `resume`."""
    if (out / PRIOR_FILE).is_file():
        if not resume:
            raise UsageError(
                f"{out} holds a finished prior: use it, give another {argument('out')}, or delete it to train anew "
                f"({setting('resume', True)} leaves it as it is)"
            )
        return
    left = [entry.name for entry in out.iterdir()] if out.exists() else []
    ours = (out / _STATE).exists() or (out / SAMPLES).is_dir()
    if not ours and any(not (name.startswith(".") and ".tmp-" in name) for name in left):
        raise UsageError(
            f"{out} is not empty and holds no prior of train-prior: choose another {argument('out')}"
        )
