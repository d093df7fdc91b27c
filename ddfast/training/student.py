"""Train one student on a distilled set that is held in memory, by a protocol of `ddfast.training.protocol`.

Under `rded` the seven details of RDED's validation are kept: ShufflePatches, RandomResizedCrop of scale (1/factor, 1),
mirror, normalisation, CutMix on every batch, labels from the teacher on the mixed batch, KL at temperature T
without T^2, and BatchNorm statistics that see every batch twice (RDED runs a second forward pass in train
mode for its log).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddfast.errors import UsageError
from ddfast.isolation import isolated
from ddfast.models.registry import create_model
from ddfast.models.teacher import Teacher
from ddfast.progress import Outlook, Progress
from ddfast.seeding import generator, seeded
from ddfast.training.device import resolve_device
from ddfast.training.distilled_images import DistilledImages
from ddfast.training.fitting import Fitting, constant, finite_loss
from ddfast.training.image_sets import ImageSet, measure_accuracy
from ddfast.training.mixing import StudentAugmentation, _hard_labels, _online_labels, _stored_labels
from ddfast.training.protocol import Protocol, protocol_named

_LEARNED = (
    "dsa",
    "dsa_no_flip",
)  # the protocols of MTT, whose students take the learning rate of their images


@dataclass(frozen=True)
class StudentResult:
    """One trained student.

    Attributes:
        model: the student after the last epoch, eval mode, on the CPU.
        top1: test accuracy after the last epoch, percent.
        top5: the same among the five likeliest classes.
        best: the best of the tested epochs, percent (what RDED reports; it is chosen on the test set).
        best_epoch: the epoch of `best`, from 0.
        per_class: accuracy of each class after the last epoch, percent.
        curve: tested epoch -> test accuracy, percent.
        final_loss: mean KL of the last epoch.
        epochs: passes over the set.
        batch_size: images a step.
        steps: updates of the weights.

    """

    model: nn.Module
    top1: float
    top5: float
    best: float
    best_epoch: int
    per_class: list[float]
    curve: dict[int, float]
    final_loss: float
    epochs: int
    batch_size: int
    steps: int


@isolated()
def train_student(
    distilled: DistilledImages,
    test: ImageSet,
    *,
    arch: str,
    arch_options: Mapping[str, Any] | None = None,
    teacher: Teacher | None = None,
    protocol: str | Protocol = "rded",
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    autoaugment: bool = False,
    precision: str = "float32",
    device: str | torch.device = "auto",
    quiet: bool = False,
    outlook: Outlook | None = None,
) -> StudentResult:
    """Train one student from new weights and test it.

    Args:
        distilled: the set to learn from. Optimised images are decoded to their tiles under every protocol. A learning
            rate that was optimised with them takes the place of that of the protocol `dsa`.
        test: the real test split, images of the same size.
        arch: name for `create_model`.
        arch_options: its keyword arguments, `{"width": 32}` for example.
        teacher: labels every mixed batch online; None: the stored soft labels, mixed by area. A protocol with hard
            labels takes none.
        protocol: a name of `PROTOCOLS`, or a protocol of your own.
        epochs: passes over the set; None: the protocol's.
        batch_size: images a step; None: the protocol's rule.
        seed: fixes the initial weights, the order, the augmentation and CutMix.
        autoaugment: torchvision's AutoAugment on the uint8 image before everything else; policy CIFAR10 up to
            32 px, IMAGENET above.
        precision: "float32", "bfloat16" (autocast of teacher and student), or "auto": bfloat16 where it is faster.
        device: "auto", "cpu" or "cuda".
        quiet: show no progress.
        outlook: of several students, a stage each.

    Raises:
        UsageError: data, labels, teacher and architecture that do not fit one another.

    """
    distilled = (distilled if teacher is None else distilled.normalized_like(teacher)).checked()
    try:
        rules = protocol_named(protocol) if isinstance(protocol, str) else protocol
    except ValueError as error:
        raise UsageError(str(error)) from error
    if rules.labels == "hard" and teacher is not None:
        raise UsageError(f"the protocol {rules.name} trains on hard labels: leave the teacher out")
    where = resolve_device(device)
    epochs = rules.epochs_for(distilled.ipc) if epochs is None else epochs
    teacher_arch = teacher.arch if teacher is not None else None
    size, classes = distilled.image_size, distilled.num_classes
    if epochs < 1:
        raise UsageError(f"epochs must be at least 1, got {epochs}")
    # An optimised image stands for its tiles or regions, whatever the protocol.
    if distilled.is_float or distilled.boxes is not None or rules.decode:
        distilled = distilled.decoded()
    if batch_size is None:
        batch_size = rules.batch_size_for(distilled.ipc, classes, size, arch, teacher_arch)
    batch_size = min(max(batch_size, 1), len(distilled.labels))
    try:
        with seeded(seed, "weights"):
            student = create_model(arch, classes, size, **(arch_options or {}))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if rules.statistics_twice:
        count_batches_twice(student)
    lr = rules.lr_for(arch, teacher_arch, classes, size)
    if takes_learned_rate(rules, distilled):
        assert distilled.learned_rate is not None
        lr = distilled.learned_rate
    fitting = Fitting(student, lambda model: rules.make_optimizer(model, lr), where, precision)
    augmentation = StudentAugmentation(distilled, rules, seed=seed, autoaugment=autoaugment, device=where)
    if rules.labels == "hard":
        temperature = 1.0
        labels = _hard_labels(distilled, where)
    elif teacher is not None:
        temperature = rules.temperature
        labels = _online_labels(distilled, teacher, temperature, precision, where)
    else:
        temperature = distilled.temperature
        labels = _stored_labels(distilled, rules, where)
    loss_scale = temperature**2 if rules.scale_by_temperature else 1.0
    tested, passes = rules.tested_epochs(epochs), epochs + rules.passes_after
    curve: dict[int, float] = {}

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(distilled.labels), generator=generator(seed, "order", epoch))
        for index in order.split(batch_size):
            if len(index) == 1 < batch_size:
                continue  # BatchNorm has no statistics of one value
            batch = augmentation(index)
            yield batch.inputs, labels(batch)

    def objective(logits: Tensor, targets: Tensor) -> Tensor:
        return loss_scale * distillation_loss(logits, targets, temperature)

    progress = Progress(f"seed {seed}", passes, "epochs", quiet=quiet, outlook=outlook)
    with seeded(seed, "dropout", device=where), progress:
        for epoch in range(passes):
            if rules.restart and epoch in rules.stepped_epochs(epochs):
                fitting.renew_optimizer()
            losses = fitting.epoch(
                batches(epoch), objective, rate=constant(lr * rules.lr_factor(epoch, epochs))
            )
            note = ""
            if epoch in tested:
                measured = measure_accuracy(
                    fitting.network, test, distilled.mean, distilled.std, where, precision
                )
                curve[epoch] = measured.top1
                note = f"top-1 {measured.top1:.2f}%"
            progress.advance(note=note)
        loss = finite_loss(
            losses.mean(), "the teacher or the soft labels are damaged", what="the student's loss"
        )
    best_epoch = max(curve, key=lambda epoch: (curve[epoch], -epoch))
    return StudentResult(
        model=fitting.model.eval().cpu(),
        top1=measured.top1,
        top5=measured.top5,
        best=curve[best_epoch],
        best_epoch=best_epoch,
        per_class=measured.per_class,
        curve=curve,
        final_loss=loss,
        epochs=epochs,
        batch_size=batch_size,
        steps=passes * steps_of_a_pass(len(distilled.labels), batch_size),
    )


def takes_learned_rate(rules: Protocol, distilled: DistilledImages) -> bool:
    """Whether students learn at a rate that was optimised with their images, in place of the protocol's."""
    return rules.name in _LEARNED and distilled.learned_rate is not None


def steps_of_a_pass(images: int, batch_size: int) -> int:
    """Updates of a pass; a last batch of one image makes none, as BatchNorm has no statistics of one value."""
    return -(-images // batch_size) - int(images % batch_size == 1 < batch_size)


def distillation_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """KL(targets || softmax(logits / T)), summed over classes, averaged over the batch; no factor T^2 (RDED).

    Args:
        logits: [B, C] of the student.
        targets: probabilities [B, C] at temperature T.
        temperature: T.

    """
    return F.kl_div(F.log_softmax(logits.float() / temperature, dim=1), targets, reduction="batchmean")


def count_batches_twice(model: nn.Module) -> None:
    """Make one train-mode forward pass move BatchNorm's running statistics as two would.

    RDED runs a second forward pass on the mixed batch in train mode, only for its log, so the statistics r
    move twice towards the batch's s: r <- (1-m)^2 r + (1 - (1-m)^2) s. One pass with momentum 1 - (1-m)^2
    (0.19 for 0.1) does the same and saves a fifth of a step.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.momentum is not None:
            module.momentum = 1 - (1 - module.momentum) ** 2
