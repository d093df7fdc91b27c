"""`ddfast train-teacher`, `train-proxies` and `evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddfast.arguments import output_file
from ddfast.commands.flags import add_data, add_device, number, whole, whole_numbers
from ddfast.commands.teachers import add_teacher, teacher_choice
from ddfast.errors import UsageError
from ddfast.wording import argument, plural


def add_train_teacher(commands: Any) -> None:
    """Add `ddfast train-teacher`."""
    parser = commands.add_parser("train-teacher", help="train a teacher on the full set")
    add_data(parser)
    parser.add_argument("--arch", required=True, help="architecture, convnet3 or resnet18 for example")
    parser.add_argument("--epochs", type=whole, required=True, help="passes over the training split")
    parser.add_argument("--out", required=True, help="teacher file to write, .safetensors; a new one")
    parser.add_argument(
        "--checkpoint-epochs",
        type=whole_numbers,
        default=(),
        metavar="N[,N...]",
        help="also write <out>-epochN.safetensors after these epochs: early label teachers",
    )
    parser.add_argument(
        "--image-size", type=whole, default=None, help="side in pixels; default that of the first image"
    )
    parser.add_argument("--optimizer", default="sgd", help="sgd or adamw")
    parser.add_argument(
        "--lr", type=number, default=None, help="learning rate; default by optimizer and architecture"
    )
    parser.add_argument("--schedule", default="cosine", help="cosine or constant")
    parser.add_argument("--batch-size", type=whole, default=128, help="images a step")
    parser.add_argument("--weight-decay", type=number, default=5e-4, help="weight decay")
    parser.add_argument(
        "--augment", default=None, help="crop-flip, rrc-flip, flip or none; default by image size"
    )
    parser.add_argument(
        "--width", type=whole, default=None, help="channels of a ConvNet's layers; default 128"
    )
    parser.add_argument("--seed", type=whole, default=0, help="weights, order and augmentation")
    parser.add_argument(
        "--precision",
        default="auto",
        help="float32, bfloat16, or auto: bfloat16 where it is known to be faster",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last finished epoch")
    add_device(parser)
    parser.set_defaults(parser=parser, run=_train_teacher)


def _train_teacher(arguments: argparse.Namespace) -> None:
    from ddfast.training import train_teacher

    names = (
        *(
            "arch",
            "epochs",
            "out",
            "checkpoint_epochs",
            "image_size",
            "optimizer",
            "lr",
            "schedule",
            "batch_size",
        ),
        *("weight_decay", "augment", "seed", "precision", "resume", "device", "workers", "quiet"),
    )
    settings = {name: getattr(arguments, name) for name in names}
    if arguments.width is not None:
        settings["arch_options"] = {"width": arguments.width}
    teacher = train_teacher(arguments.data, **settings)
    accuracy = "not measured" if teacher.top1 is None else f"{teacher.top1:.2f}"
    print(f"teacher {arguments.out}\ntop1 {accuracy}")


def add_train_proxies(commands: Any) -> None:
    """Add `ddfast train-proxies`."""
    parser = commands.add_parser(
        "train-proxies", help="train the networks that measure conditional mutual information (--cmi)"
    )
    add_data(parser)
    parser.add_argument("--arch", default="resnet18_in", help="architecture of the proxies")
    parser.add_argument("--count", type=whole, default=10, help="number of networks, each of its own weights")
    parser.add_argument("--epochs", type=whole, default=20, help="passes over the training split")
    parser.add_argument("--out", required=True, help="folder of the proxies")
    parser.add_argument(
        "--images-per-class", type=whole, default=None, help="images trained on of each class; default all"
    )
    parser.add_argument(
        "--image-size", type=whole, default=None, help="side in pixels; default that of the first image"
    )
    for flag, kind, help in (
        ("--lr", number, "learning rate of SGD, constant; default 0.01"),
        ("--momentum", number, "of SGD; default 0.9"),
        ("--weight-decay", number, "on every parameter; default 0.001"),
        ("--batch-size", whole, "images a step; default 256"),
        ("--normalization", str, "of the pixels, as that of the run: a name or mean,mean,mean/std,std,std"),
        ("--precision", str, "float32 (default), bfloat16, or auto: bfloat16 where it is known to be faster"),
    ):
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=help)
    parser.add_argument("--seed", type=whole, default=0, help="weights and order")
    parser.add_argument("--resume", action="store_true", help="continue from the last finished epoch")
    add_device(parser)
    parser.set_defaults(parser=parser, run=_train_proxies)


def _train_proxies(arguments: argparse.Namespace) -> None:
    from ddfast.training.proxies import train_proxies

    names = (
        *("arch", "count", "epochs", "out", "images_per_class", "image_size", "lr", "batch_size", "seed"),
        *("momentum", "weight_decay", "normalization", "precision", "resume", "device", "workers", "quiet"),
    )
    settings = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    print(train_proxies(arguments.data, **settings))


def add_evaluate(commands: Any) -> None:
    """Add `ddfast evaluate`."""
    parser = commands.add_parser("evaluate", help="train students on a distilled set and test them")
    parser.add_argument("--distilled", required=True, help="output folder of ddfast distill")
    add_data(parser)
    parser.add_argument(
        "--arch", default=None, help="the students' architecture; default what a set of pixels was matched on"
    )
    parser.add_argument(
        "--width", type=whole, default=None, help="channels of a ConvNet student's layers; default 128"
    )
    parser.add_argument("--seeds", type=whole, default=3, help="number of students")
    add_teacher(
        parser, required=False, help="label online with this teacher; without it the stored soft labels serve"
    )
    parser.add_argument(
        "--epochs", type=whole, default=None, help="passes over the distilled set; default the protocol's"
    )
    parser.add_argument(
        "--protocol",
        default="rded",
        help="rded, rded_plain, sre2l, sre2l_tiny, or with hard labels dc, dsa, idc, igds",
    )
    parser.add_argument(
        "--batch-size", type=whole, default=None, help="images a step; default the protocol's"
    )
    parser.add_argument(
        "--auto-augment",
        "--autoaugment",
        dest="autoaugment",
        action="store_true",
        help="AutoAugment on the students' images, before the protocol's own augmentation",
    )
    parser.add_argument(
        "--precision",
        default="float32",
        help="float32, bfloat16, or auto: bfloat16 where it is known to be faster",
    )
    parser.add_argument(
        "--rounded",
        action="store_true",
        help="train on the 8-bit images of a set that has pixels in float32: what rounding costs",
    )
    parser.add_argument("--json", default=None, help="also write the whole result to this file, a new one")
    parser.add_argument(
        "--no-preflight", action="store_true", help="skip the try of the teacher on test images"
    )
    add_device(parser)
    parser.set_defaults(parser=parser, run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    import json

    from ddfast.files import atomic_write_text
    from ddfast.output import DistilledSet
    from ddfast.output.evaluations import keep_evaluation
    from ddfast.progress import say
    from ddfast.training import evaluate

    if arguments.json:  # before the work, not after it
        output_file(arguments.json, "json")
        if Path(arguments.json).exists():
            raise UsageError(
                f"{argument('json')} {arguments.json} exists already: give another file or delete it"
            )

    def classes_and_size() -> tuple[Sequence[str], int | None]:
        distilled = DistilledSet(arguments.distilled)
        return distilled.class_names, distilled.image_size

    result = evaluate(
        arguments.distilled,
        arguments.data,
        arch=arguments.arch,
        arch_options={} if arguments.width is None else {"width": arguments.width},
        seeds=arguments.seeds,
        teacher=teacher_choice(arguments, arguments.teacher, classes_and_size, arguments.class_order),
        preflight=not arguments.no_preflight,
        epochs=arguments.epochs,
        protocol=arguments.protocol,
        batch_size=arguments.batch_size,
        autoaugment=arguments.autoaugment,
        precision=arguments.precision,
        device=arguments.device,
        workers=arguments.workers,
        quiet=arguments.quiet,
        rounded=arguments.rounded,
    )
    print(
        f"images {result.images}; labels {result.labels}, {plural(result.epochs, 'epoch')} "
        f"of batch {result.batch_size}, {plural(len(result.seeds), 'seed')}"
    )
    print(f"top5 {result.top5_mean:.2f}, best tested epoch {result.best_mean:.2f} ± {result.best_std:.2f}")
    print(f"recipe {result.recipe}")
    print(result, flush=True)
    if arguments.json:
        atomic_write_text(arguments.json, json.dumps(result.as_dict(), indent=2) + "\n")
    try:
        keep_evaluation(arguments.distilled, result.as_dict())
    except UsageError as error:  # what was asked for stands above
        say(f"the result is not kept in the folder: {error}")
