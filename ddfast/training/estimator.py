"""Train the variational estimator of IGDS: MoCo with a term for the spread of an image's views, then a classifier.

IGDS, Algorithm 2 and Section 3.1.3: two views of an image, an encoder and its moving average, a queue of keys;

    loss = InfoNCE - lambda KL

where KL is the mean over both views of KL(H || Q), H = softmax(projection / tau) and Q the mean of H over the views of
the same image: I(X; X^ | Y~) of Eq. 10 with the image itself as the label, by the closed form of `ddfast.cmi`. The key
gets no gradient. lambda = 0 is MoCo. The classifier is linear, on the features of the frozen encoder, in which
Softplus stands for ReLU as it does when the estimator guides.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.arguments import (
    architecture_options,
    data_of,
    number_below_one,
    one_of,
    output_file,
    path_of,
    positive_number,
    whole_number,
)
from ddfast.crowding import Neighbours, warn_of_crowding
from ddfast.errors import UsageError, one_line
from ddfast.files import atomic_write_bytes, make_folder, sweep_temporary_of
from ddfast.isolation import isolated, on_threads
from ddfast.models.checkpoint import find_weights
from ddfast.models.estimator import (
    PROJECTION,
    Encoder,
    Estimator,
    describe,
    estimator_bytes,
    load_estimator,
    read_estimator_header,
    smoothed,
)
from ddfast.models.fusing import fuse
from ddfast.models.normalization import AUTO, Normalization
from ddfast.models.normalization import normalization as resolve_normalization
from ddfast.ops import class_kl
from ddfast.ops.precision import PRECISIONS, autocast, compute_dtype
from ddfast.progress import Outlook, say, ways_of_machine
from ddfast.ranks import usable_cores
from ddfast.seeding import generator, seeded
from ddfast.state import read_tensors
from ddfast.training.augmentation import normalize, random_flip, random_resized_boxes, resize_boxes
from ddfast.training.course import Course, held_arithmetic
from ddfast.training.device import memory_layout, resolve_device
from ddfast.training.differentiable import draw
from ddfast.training.fitting import Fitting, cosine, part
from ddfast.training.image_sets import ImageSet, StreamedSet, native_size, read_test_set, read_training_set
from ddfast.training.network_folder import training_places
from ddfast.training.teacher import check_identity
from ddfast.wording import argument, plural, setting

_SCALE = (0.2, 1.0)  # of the area that a view shows (MoCo v2)
_QUEUES = 4  # times that the images are more than the keys of a queue, which holds few of an image's own
_PIECES = (
    8  # that keys go through a network with BatchNorm in, shuffled: else its statistics tell the positive
)
_BATCH = 256  # images whose features are taken at once, for the classifier
_CLASSIFIER = {"epochs": 50, "batch": 256, "lr": 1e-2, "weight_decay": 1e-4}  # AdamW, cosine


@dataclass(frozen=True)
class EstimatorConfig:
    """How an estimator is trained.

    Attributes:
        arch: of the encoder: name for `create_model`, `timm:NAME` or `torchvision:NAME`.
        epochs: passes over the training split for the encoder; 0 with `weights` keeps these.
        image_size: side in pixels.
        arch_options: keyword arguments of `create_model`.
        kl: lambda, weight of the KL term; 0 is MoCo.
        tau: temperature, of the contrast and of the softmax.
        momentum_encoder: share of the moving average that a step keeps.
        queue: keys that an image is told from; at most a quarter of the images.
        lr: learning rate of SGD with momentum 0.9 at the start; it falls as a cosine.
        weight_decay: on every parameter.
        batch_size: images a step.
        flip: mirror images among the augmentations, which digits do not bear.
        seed: of weights, order and augmentation.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where it is faster.
        normalization: of the pixels, a name or (mean, std).
    """

    epochs: int
    image_size: int
    arch: str = "convnet3_in"
    arch_options: Any = None
    kl: float = 0.1
    tau: float = 0.07
    momentum_encoder: float = 0.99
    queue: int = 4096
    lr: float = 0.06
    weight_decay: float = 5e-4
    batch_size: int = 256
    flip: bool = True
    seed: int = 0
    precision: str = "float32"
    normalization: str | Normalization = AUTO

    def checked(self) -> EstimatorConfig:
        """The same with plain numbers.

        Raises:
            UsageError: one is out of range.
        """
        one_of(self.precision, "precision", PRECISIONS)
        try:
            mean_std = resolve_normalization(self.normalization)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error
        return replace(
            self,
            epochs=whole_number(self.epochs, "epochs", least=0),
            image_size=whole_number(self.image_size, "image_size", least=1),
            arch_options=architecture_options(self.arch_options),
            kl=positive_number(self.kl, "kl", zero=True),
            tau=positive_number(self.tau, "tau"),
            momentum_encoder=number_below_one(self.momentum_encoder, "momentum_encoder"),
            queue=whole_number(self.queue, "queue", least=1),
            lr=positive_number(self.lr, "lr"),
            weight_decay=positive_number(self.weight_decay, "weight_decay", zero=True),
            batch_size=whole_number(self.batch_size, "batch_size", least=2),
            flip=bool(self.flip),
            seed=whole_number(self.seed, "seed", least=0, most=2**63 - 1),
            normalization=mean_std,
        )


@isolated()
def train_estimator(
    data: Any,
    *,
    epochs: int,
    out: str | Path,
    arch: str = "convnet3_in",
    arch_options: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    images_per_class: int | None = None,
    weights: str | Path | None = None,
    kl: float = 0.1,
    tau: float = 0.07,
    momentum_encoder: float = 0.99,
    queue: int = 4096,
    lr: float = 0.06,
    weight_decay: float = 5e-4,
    batch_size: int = 256,
    flip: bool = True,
    normalization: str | Normalization = "auto",
    seed: int = 0,
    resume: bool = False,
    device: str = "auto",
    workers: int | None = None,
    quiet: bool = False,
    precision: str = "float32",
) -> Estimator:
    """Train an estimator on the training split of `data` and write it to the file `out`.

    Args:
        data: an image folder, archive, named set, or images in memory, as `ddfast.data.open_source` takes it.
        epochs: passes over the training images for the encoder.
        out: the file, `.safetensors`. It may not exist yet, unless `resume` finds that it is of this training.
        arch: of the encoder: name for `create_model`, `timm:NAME` or `torchvision:NAME`.
        arch_options: its keyword arguments, `{"width": 64}` for example.
        image_size: side in pixels; None: the shorter side of the first training image, at most 224.
        images_per_class: train on so many of each class, those that a run with this seed draws; None: all.
        weights: file that the encoder starts from: a teacher of ours, a state dict, or a checkpoint of MoCo.
        kl: lambda, weight of the KL term; 0 is MoCo.
        tau: temperature, of the contrast and of the softmax.
        momentum_encoder: share of the encoder's moving average that a step keeps.
        queue: keys that an image is told from; at most a quarter of the images.
        lr: learning rate of SGD at the start; it falls as a cosine.
        weight_decay: on every parameter.
        batch_size: images a step.
        flip: mirror images among the augmentations.
        normalization: of the pixels, a name or (mean, std).
        seed: of all draws.
        resume: continue a killed training from its last saved step, at most a minute before; start where there is
            nothing to continue, return at once where it is finished.
        device: "auto", "cpu" or "cuda".
        workers: decoding workers; None: the loader's default.
        quiet: print nothing.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where it is faster.

    Raises:
        UsageError: bad arguments or data, a file in the way, or weights that do not fit the encoder.
    """
    from ddfast.data import open_source

    neighbours = Neighbours()
    out = path_of(out, "out")
    if out.suffix != ".safetensors":
        raise UsageError(f"the estimator's file must end in .safetensors, got {out}")
    output_file(out)
    tried = EstimatorConfig(
        epochs=epochs,
        image_size=64 if image_size is None else image_size,
        arch=arch,
        arch_options=arch_options,
        kl=kl,
        tau=tau,
        momentum_encoder=momentum_encoder,
        queue=queue,
        lr=lr,
        weight_decay=weight_decay,
        batch_size=batch_size,
        flip=flip,
        seed=seed,
        precision=precision,
        normalization=AUTO if normalization == "auto" else normalization,
    ).checked()
    if images_per_class is not None:
        images_per_class = whole_number(images_per_class, "images_per_class", least=1)
    if not tried.epochs and weights is None:
        raise UsageError(f"{argument('epochs')} 0 keeps {argument('weights')} as they are: give them as well")
    started = None if weights is None else _read_weights(path_of(weights, "weights"))
    where = resolve_device(device)
    if workers is not None:
        workers = whole_number(workers, "workers", least=0)
    state = out.with_suffix(".state")
    if out.exists() and not resume:
        header = read_estimator_header(out)
        what = "no estimator" if header is None else describe(header)
        raise UsageError(
            f"{out} exists already ({what}): give another {argument('out')}, delete it to train anew, or use "
            f"{setting('resume', True)} if it is of this training"
        )
    data = data_of(data)
    source = open_source(data, "train")
    for note in source.notes():
        say(note, quiet=quiet)
    config = replace(tried, image_size=native_size(source) if image_size is None else tried.image_size)
    encoder = _untrained(config)
    start = (
        None if started is None else _start_from(encoder, started, config.arch, path_of(weights, "weights"))
    )
    places, drawn_from = training_places(source, images_per_class, config.seed, quiet)
    identity = json.loads(
        json.dumps(
            {
                **asdict(config),
                "images_per_class": images_per_class,
                "weights": start,
                "data": source.fingerprint() + drawn_from,
            }
        )
    )
    if out.exists():
        header = read_estimator_header(out)
        if header is None:
            raise UsageError(
                f"{out} is no estimator, so it cannot be resumed: give another {argument('out')}"
            )
        check_identity(out, header.get("training") or {}, identity)
        say(f"{out} is finished", quiet=quiet)
        state.unlink(missing_ok=True)
        return load_estimator(out)
    arithmetic = held_arithmetic(
        state,
        identity,
        {
            "arithmetic": compute_dtype(config.precision, where),
            "threads": torch.get_num_threads(),
            "device": where.type,
        },
        resume,
    )
    make_folder(out.parent)
    for path in (out, state):
        sweep_temporary_of(path)
    samples = None if places is None else source.samples.take(places)
    train = read_training_set(source, config.image_size, samples=samples, workers=workers, quiet=quiet)
    try:
        test_source = open_source(data, "test")
    except UsageError as error:
        say(f"the accuracy will not be measured: {error}", quiet=quiet)
        test = None
    else:
        test = read_test_set(test_source, config.image_size, workers=workers, quiet=quiet)
    if len(train) < 2:
        raise UsageError(f"training needs at least 2 images, got {len(train)}")
    if config.queue > (most := max(1, len(train) // _QUEUES)):
        say(
            f"the queue holds {plural(most, 'key')}, not {config.queue}: of {plural(len(train), 'image')} a longer one "
            "would hold many that an image would be told from as if they were not its own",
            quiet=quiet,
        )
        config = replace(config, queue=most)
    if where.type == "cpu":
        warn_of_crowding(neighbours, torch.get_num_threads(), "OMP_NUM_THREADS={}".format, quiet=quiet)
    ways = ways_of_machine(where.type, arithmetic["threads"], usable_cores(), "OMP_NUM_THREADS={}".format)
    outlook = Outlook(config.epochs, [f"fewer {argument('epochs')}", *ways])
    training = _Training(encoder, config, where, arithmetic["arithmetic"])
    say(
        f"training an encoder {config.arch} for {plural(config.epochs, 'epoch')} on {plural(len(train), 'image')} of "
        f"{config.image_size} px ({where.type}, {arithmetic['arithmetic']}, lambda {config.kl:g})",
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
        rate=lambda share: config.lr * cosine(share),
        path=state,
        identity=identity,
        arithmetic=arithmetic,
        quiet=quiet,
        outlook=outlook,
        after_step=training.after_step,
        kept=training.kept,
        restore=training.restore,
    )
    with on_threads(arithmetic["threads"]):
        course.run(lambda epoch, loss: say(f"epoch {epoch}/{config.epochs}: loss {loss:.4f}", quiet=quiet))
        encoder.eval().requires_grad_(False)
        classifier, top1 = _classifier(
            encoder, train, test, config, len(source.class_names), where, arithmetic["arithmetic"]
        )
    data_bytes = estimator_bytes(
        encoder,
        classifier,
        arch=config.arch,
        arch_options=config.arch_options,
        class_names=source.class_names,
        image_size=config.image_size,
        mean=resolve_normalization(config.normalization)[0],
        std=resolve_normalization(config.normalization)[1],
        tau=config.tau,
        top1=top1,
        images=len(train),
        unreadable=len(train.bad),
        training=identity,
        arithmetic=arithmetic["arithmetic"],
        threads=arithmetic["threads"],
    )
    atomic_write_bytes(out, data_bytes)
    state.unlink(missing_ok=True)
    reached = "" if top1 is None else f", linear test top-1 {top1:.2f}%"
    say(f"wrote {out}{reached}", quiet=quiet)
    return load_estimator(out)


class _Training:
    """The encoder on its way, its moving average and the queue of keys (Algorithm 2)."""

    def __init__(
        self, encoder: Encoder, config: EstimatorConfig, device: torch.device, precision: str
    ) -> None:
        self.config, self.precision, self.device = config, precision, device
        self.mean_std = resolve_normalization(config.normalization)
        self._layout = memory_layout(encoder, device)
        self._momentum = copy.deepcopy(encoder).to(device).to(memory_format=self._layout)
        self._momentum.requires_grad_(False).train()
        self._keys = fuse(self._momentum)
        self._mixes = any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in encoder.modules())
        self.fitting: Fitting = Fitting(
            encoder,
            lambda model: torch.optim.SGD(
                model.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay
            ),
            device,
            precision,
        )
        filled = torch.randn(config.queue, PROJECTION, generator=generator(config.seed, "queue"))
        self._queue = F.normalize(filled, dim=1).to(device)
        self._latest: Tensor | None = None

    def prepare(self, images: Tensor, labels: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """x_q, and k = f_m(x_k): two views of each image, the second encoded by the moving average."""
        query, other = (self._view(images, draws) for _ in range(2))
        with torch.no_grad(), autocast(self.precision, self.device):
            self._latest = self._encoded(other, draws)
        return query, self._latest

    def _view(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """Cut, enlarge, mirror, colour."""
        size = images.shape[-1]
        boxes = random_resized_boxes(len(images), size, draws, scale=_SCALE)
        seen = resize_boxes(images, boxes, size)
        seen = random_flip(seen, draws) if self.config.flip else seen
        return draw("colour", len(seen), (size, size), draws)(normalize(seen, *self.mean_std))

    def _encoded(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """Keys, float32 [B, 128]."""
        images = images.contiguous(memory_format=self._layout)
        if not self._mixes or len(images) < 2 * _PIECES:
            return self._keys(images)
        order = torch.randperm(len(images), generator=draws).to(images.device)
        keys = torch.cat([self._keys(images[piece]) for piece in order.tensor_split(_PIECES)])
        return torch.empty_like(keys).index_copy_(0, order, keys)

    def loss(self, query: Tensor, keys: Tensor) -> Tensor:
        """InfoNCE - lambda KL."""
        return contrast(query, keys, self._queue, self.config.tau) - self.config.kl * spread(
            query, keys, self.config.tau
        )

    @torch.no_grad()
    def after_step(self) -> None:
        """f_m <- m f_m + (1 - m) f; the keys join the queue, and the oldest leave it."""
        pairs = zip(self._momentum.parameters(), self.fitting.model.parameters(), strict=True)
        for ours, theirs in pairs:
            ours.lerp_(theirs.detach(), 1 - self.config.momentum_encoder)
        assert self._latest is not None
        self._queue = torch.cat([self._queue, self._latest])[-self.config.queue :]

    def kept(self) -> dict[str, Tensor]:
        """The moving average and the queue."""
        return {
            "queue": self._queue,
            **{f"momentum.{name}": value for name, value in self._momentum.state_dict().items()},
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `kept` back."""
        self._queue = tensors["queue"].to(self.device)
        self._momentum.load_state_dict(part(tensors, "momentum."))


def contrast(query: Tensor, keys: Tensor, queue: Tensor, tau: float) -> Tensor:
    """InfoNCE, -E log of Eq. 14's share of the positive: query and keys [B, D] of length 1, queue [K, D]."""
    logits = torch.cat([(query * keys).sum(dim=1, keepdim=True), query @ queue.T], dim=1) / tau
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64, device=query.device))


def spread(query: Tensor, keys: Tensor, tau: float) -> Tensor:
    """Mean over both views [B, D] of KL(softmax(view / tau) || the mean of an image's two), at most log 2."""
    images = torch.arange(len(query), device=query.device).repeat(2)
    return class_kl(torch.cat([query, keys]) / tau, images)


# Classifier
# ----------------------------------------------------------------------------------------------------------


def _classifier(
    encoder: Encoder,
    train: ImageSet | StreamedSet,
    test: ImageSet | None,
    config: EstimatorConfig,
    classes: int,
    device: torch.device,
    precision: str,
) -> tuple[nn.Linear, float | None]:
    """The linear classifier g of the frozen features, and its test accuracy in percent.

    It is trained on features of mean 0 and deviation 1, and these are then put into its weights.
    """
    smooth = smoothed(encoder).eval()
    features, labels = _features(smooth, train, config, device)
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(1e-6)
    scaled = (features - mean) / std
    with seeded(config.seed, "classifier"):
        linear = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(linear.bias)
    fitting = Fitting(
        nn.Sequential(nn.Flatten(), linear),
        lambda model: torch.optim.AdamW(
            model.parameters(), lr=_CLASSIFIER["lr"], weight_decay=_CLASSIFIER["weight_decay"]
        ),
        device,
    )
    epochs, batch = int(_CLASSIFIER["epochs"]), int(_CLASSIFIER["batch"])
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator(config.seed, "classifier", epoch))
        pieces = order.to(device).split(batch)
        fitting.epoch(
            ((scaled[piece][:, :, None, None], labels[piece]) for piece in pieces),
            F.cross_entropy,
            rate=lambda step, epoch=epoch, pieces=pieces: (  # type: ignore[misc]
                _CLASSIFIER["lr"] * cosine((epoch + step / len(pieces)) / epochs)
            ),
        )
    with torch.no_grad():
        linear.bias.sub_(linear.weight @ (mean / std))
        linear.weight.div_(std)
    top1 = None
    if test is not None:
        seen, wanted = _features(smooth, test, config, device)
        with torch.no_grad():
            top1 = round(100 * float((linear(seen).argmax(dim=1) == wanted).double().mean()), 4)
    return linear.cpu(), top1


@torch.no_grad()
def _features(
    smooth: Encoder, images: ImageSet | StreamedSet, config: EstimatorConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features float32 [N, F] and labels [N] of a split, on the device."""
    mean_std, layout = resolve_normalization(config.normalization), memory_layout(smooth, device)
    found, labels = [], []
    for batch, of in images.batches(torch.arange(len(images)), _BATCH):
        seen = normalize(batch.to(device), *mean_std).contiguous(memory_format=layout)
        found.append(smooth.features(seen).float())
        labels.append(of.to(device))
    return torch.cat(found), torch.cat(labels)


# Weights to start from
# ----------------------------------------------------------------------------------------------------------


def _untrained(config: EstimatorConfig) -> Encoder:
    try:
        with seeded(config.seed, "weights"):
            return Encoder(config.arch, config.image_size, **config.arch_options)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error).replace("image_size", argument("image_size"))) from error


def _read_weights(path: Path) -> dict[str, Any]:
    """What a file of weights holds."""
    if not path.is_file():
        raise UsageError(
            f"{argument('weights')} {path} is no file: give a teacher, a state dict or a MoCo checkpoint"
        )
    if path.suffix == ".safetensors":
        return dict(read_tensors(path, path.read_bytes(), what="file of weights")[0])
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or a forbidden pickle
        raise UsageError(
            f"{path} cannot be read as weights ({one_line(error)}): give a state dict"
        ) from error
    return held if isinstance(held, dict) else {}


def _start_from(encoder: Encoder, held: dict[str, Any], arch: str, path: Path) -> str:
    """Put a file's weights into the encoder, its projection too where MoCo's is there; the file's SHA-256."""
    flat = dict(_tensors(held))
    own, heads = {}, {}
    for name, tensor in flat.items():
        if "encoder_k" in name or name.rpartition(".")[2].startswith("queue"):
            continue  # MoCo's moving average, and its queue
        if f".{encoder.last}." in f".{name}":
            heads[f".{name}".rpartition(f".{encoder.last}.")[2]] = tensor
        else:
            own[name] = tensor
    try:
        encoder.network.load_state_dict(find_weights(own, encoder.network.state_dict(), arch, 0))
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{path} does not fit the encoder {arch}: {one_line(error)}") from error
    shapes = {name: value.shape for name, value in encoder.projection.state_dict().items()}
    if all(name in heads and heads[name].shape == shape for name, shape in shapes.items()):
        encoder.projection.load_state_dict({name: heads[name] for name in shapes})
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _tensors(held: Mapping[str, Any], prefix: str = "") -> Any:
    for key, value in held.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")
