"""`ddfast train-teacher`, `train-proxies`, `train-experts` and `evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddfast.arguments import output_file
from ddfast.commands.config import add_config
from ddfast.commands.flags import add_data, add_device, add_settings, number, whole, whole_numbers
from ddfast.commands.teachers import add_teacher, teacher_choice
from ddfast.errors import UsageError
from ddfast.files import make_folder
from ddfast.wording import argument, plural

_NORMALIZATION = (
    "mean and deviation of the pixels, those of the run: imagenet, cifar10, tinyimagenet, none, or numbers as "
    "mean,mean,mean/std,std,std; default imagenet, as that of a run"
)
_HISTORY = (
    "folder of history.jsonl, the run's numbers as they come, and of TensorBoard's files where it is installed; "
    "default none"
)


def _architectures() -> str:
    from ddfast.models import list_models

    return f"architecture: {', '.join(list_models())}, or timm:NAME where timm is installed"


def _add_image_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-size",
        type=whole,
        default=None,
        metavar="PX",
        help="side in pixels; default that of the first image, 224 at most",
    )


def _add_width(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--width", type=whole, default=None, metavar="N", help="channels of a ConvNet's layers; default 128"
    )


def _add_batch_size(parser: argparse.ArgumentParser, default: int | None) -> None:
    text = "images a step" if default is not None else "images a step; default the protocol's"
    parser.add_argument("--batch-size", type=whole, default=default, metavar="N", help=text)


def _add_precision(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--precision",
        default=default,
        metavar="{float32,bfloat16,auto}",
        help="what networks compute in; auto: bfloat16 where it is known to be faster",
    )


def add_train_teacher(commands: Any) -> None:
    """Add `ddfast train-teacher`."""
    parser = commands.add_parser("train-teacher", help="train a teacher on the full set")
    add_data(parser)
    parser.add_argument("--arch", required=True, metavar="NAME", help=_architectures())
    parser.add_argument(
        "--epochs", type=whole, required=True, metavar="N", help="passes over the training split"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="teacher file to write, .safetensors; a new one"
    )
    parser.add_argument(
        "--checkpoint-epochs",
        type=whole_numbers,
        default=(),
        metavar="N[,N...]",
        help="also write <out>-epochN.safetensors after these epochs: early label teachers; default none",
    )
    _add_image_size(parser)
    parser.add_argument(
        "--optimizer",
        default="sgd",
        metavar="{sgd,adamw}",
        help="optimiser: sgd with momentum 0.9, or adamw",
    )
    parser.add_argument(
        "--lr",
        type=number,
        default=None,
        metavar="X",
        help="learning rate of the first step; default 0.001 with adamw, else 0.05 for ConvNets and 0.1 for others",
    )
    parser.add_argument(
        "--schedule",
        default="cosine",
        metavar="{cosine,constant}",
        help="how the learning rate goes on: down to 0 as a cosine, or constant",
    )
    _add_batch_size(parser, 128)
    parser.add_argument(
        "--weight-decay",
        type=number,
        default=5e-4,
        metavar="X",
        help="share of every weight that a step takes off, times the learning rate",
    )
    parser.add_argument(
        "--augment",
        default=None,
        metavar="{crop-flip,rrc-flip,flip,dsa,dsa-no-flip,none}",
        help="random changes of the images: crop-flip shifts by up to 4 px and mirrors, rrc-flip cuts and enlarges and "
        "mirrors, dsa takes one of six for a batch; default crop-flip up to 64 px, rrc-flip above",
    )
    _add_width(parser)
    parser.add_argument("--normalization", default=argparse.SUPPRESS, metavar="NAME", help=_NORMALIZATION)
    parser.add_argument(
        "--seed",
        type=whole,
        default=0,
        metavar="N",
        help="decides weights, order and augmentation, a number of at least 0",
    )
    _add_precision(parser, "float32")
    parser.add_argument("--resume", action="store_true", help="continue from the last finished epoch")
    add_settings(parser, ("log_dir", "wandb"), log_dir={"help": _HISTORY})
    add_device(parser)
    add_config(parser)
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
        *(
            "log_dir",
            "wandb",
            "weight_decay",
            "augment",
            "normalization",
            "seed",
            "precision",
            "resume",
            "device",
            "workers",
            "quiet",
        ),
    )
    settings = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
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
    _add_networks(parser, "proxies", arch="resnet18_in", epochs=20, momentum="0.9", weight_decay="0.001")
    parser.set_defaults(parser=parser, run=_train_proxies)


def add_train_experts(commands: Any) -> None:
    """Add `ddfast train-experts`."""
    parser = commands.add_parser(
        "train-experts", help="train the networks whose weights, epoch by epoch, mtt follows (--experts)"
    )
    _add_networks(parser, "experts", arch="convnet3_in", epochs=50, momentum="0", weight_decay="0")
    parser.add_argument(
        "--augment",
        default="dsa",
        metavar="{dsa,dsa-no-flip,crop-flip,rrc-flip,flip,none}",
        help="random changes of the images: dsa takes one of six for a batch, dsa-no-flip leaves out mirroring, which "
        "digits do not bear",
    )
    parser.add_argument(
        "--zca",
        action="store_true",
        help="whiten the images in place of a normalisation; runs with these experts take --normalization none",
    )
    parser.set_defaults(parser=parser, run=_train_experts)


def _add_networks(
    parser: argparse.ArgumentParser, nouns: str, *, arch: str, epochs: int, momentum: str, weight_decay: str
) -> None:
    """The flags of a folder of networks that are trained alike."""
    add_data(parser)
    parser.add_argument("--arch", default=arch, metavar="NAME", help=_architectures())
    parser.add_argument(
        "--count", type=whole, default=10, metavar="N", help="number of networks, each of its own weights"
    )
    parser.add_argument(
        "--epochs", type=whole, default=epochs, metavar="N", help="passes over the training split"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help=f"folder of the {nouns}")
    parser.add_argument(
        "--images-per-class",
        type=whole,
        default=None,
        metavar="N",
        help="images trained on of each class; default all",
    )
    _add_image_size(parser)
    for flag, kind, metavar, help in (
        ("--lr", number, "X", "learning rate of SGD, constant; default 0.01"),
        ("--momentum", number, "X", f"momentum of SGD, in [0, 1); default {momentum}"),
        ("--weight-decay", number, "X", f"weight decay, on every parameter; default {weight_decay}"),
        ("--batch-size", whole, "N", "images a step; default 256"),
        ("--normalization", str, "NAME", _NORMALIZATION),
        (
            "--precision",
            str,
            "{float32,bfloat16,auto}",
            "what networks compute in; auto: bfloat16 where it is known to be faster; default float32",
        ),
    ):
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=help)
    parser.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="decides weights and order, a number of at least 0"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last finished epoch")
    add_device(parser)
    add_config(parser)


def _network_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of `_add_networks` that are given, as keyword arguments."""
    names = (
        *("arch", "count", "epochs", "out", "images_per_class", "image_size", "lr", "batch_size", "seed"),
        *("momentum", "weight_decay", "normalization", "precision", "resume", "device", "workers", "quiet"),
    )
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def _train_proxies(arguments: argparse.Namespace) -> None:
    from ddfast.training.proxies import train_proxies

    print(train_proxies(arguments.data, **_network_settings(arguments)))


def _train_experts(arguments: argparse.Namespace) -> None:
    from ddfast.training.experts import train_experts

    print(
        train_experts(
            arguments.data, augment=arguments.augment, zca=arguments.zca, **_network_settings(arguments)
        )
    )


def add_evaluate(commands: Any) -> None:
    """Add `ddfast evaluate`."""
    parser = commands.add_parser("evaluate", help="train students on a distilled set and test them")
    parser.add_argument(
        "--distilled", required=True, metavar="FOLDER", help="output folder of ddfast distill"
    )
    add_data(parser)
    parser.add_argument(
        "--arch",
        default=None,
        metavar="NAME",
        help=f"the students' {_architectures()}; default what a set of pixels was matched on",
    )
    _add_width(parser)
    parser.add_argument(
        "--seeds",
        type=whole,
        default=3,
        metavar="N",
        help="number of students, each from other initial weights",
    )
    add_teacher(
        parser,
        required=False,
        help="label online with this teacher; default none: the stored soft labels serve",
    )
    parser.add_argument(
        "--epochs",
        type=whole,
        default=None,
        metavar="N",
        help="passes over the distilled set; default the protocol's",
    )
    parser.add_argument(
        "--protocol",
        default="rded",
        metavar="NAME",
        help="how students are trained: rded, rded_plain, sre2l, sre2l_tiny, or with hard labels dc, dsa, idc, igds; "
        "for digits dsa_no_flip, idc_no_flip",
    )
    _add_batch_size(parser, None)
    parser.add_argument(
        "--auto-augment",
        "--autoaugment",
        dest="autoaugment",
        action="store_true",
        help="AutoAugment on the students' images, before the protocol's own augmentation",
    )
    _add_precision(parser, "float32")
    parser.add_argument(
        "--rounded",
        action="store_true",
        help="train on the 8-bit images of a set that has pixels in float32: what rounding costs",
    )
    parser.add_argument(
        "--regions",
        choices=("none", "chosen", "all"),
        default="chosen",
        help="of a set whose images have regions (udd), those that students see beside each, enlarged",
    )
    parser.add_argument(
        "--json",
        default=None,
        metavar="FILE",
        help="also write the whole result to this file, a new one; default none",
    )
    parser.add_argument(
        "--no-preflight", action="store_true", help="skip the try of the teacher on test images"
    )
    add_settings(parser, ("log_dir", "wandb"), log_dir={"help": _HISTORY})
    add_device(parser)
    add_config(parser)
    parser.set_defaults(parser=parser, run=_evaluate)


def _beside(regions: str) -> str:
    """What students saw beside each image, in words."""
    return {"none": "", "chosen": " and their chosen regions", "all": " and all of their regions"}[regions]


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
        regions=arguments.regions,
        log_dir=arguments.log_dir,
        wandb=arguments.wandb,
    )
    if arguments.json:  # first: whoever reads what is printed may go away
        make_folder(Path(arguments.json).parent)
        atomic_write_text(arguments.json, json.dumps(result.as_dict(), indent=2) + "\n")
    print(
        f"images {result.images}{_beside(result.regions)}; labels {result.labels}, {plural(result.epochs, 'epoch')} "
        f"of batch {result.batch_size}, {plural(len(result.seeds), 'seed')}"
    )
    print(f"top5 {result.top5_mean:.2f}, best tested epoch {result.best_mean:.2f} ± {result.best_std:.2f}")
    print(f"recipe {result.recipe}")
    print(result, flush=True)
    try:
        keep_evaluation(arguments.distilled, result.as_dict())
    except UsageError as error:  # what was asked for stands above
        say(f"the result is not kept in the folder: {error}")
