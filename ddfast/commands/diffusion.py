"""`ddfast train-prior` and `train-estimator`: what `ddfast distill igds` samples with."""

from __future__ import annotations

import argparse
from typing import Any

from ddfast.commands.config import add_config
from ddfast.commands.flags import add_data, add_device, number, whole


def add_train_prior(commands: Any) -> None:
    """Add `ddfast train-prior`."""
    parser = commands.add_parser(
        "train-prior", help="train the diffusion model that igds samples from (a small UNet)"
    )
    _add_common(parser, "folder of the prior, which diffusers opens as well; a new one", "FOLDER")
    _add_numbers(
        parser,
        (
            "--width",
            whole,
            "N",
            "channels of the network's first level, a multiple of 8; default 32, 1 M parameters",
        ),
        (
            "--lr",
            number,
            "X",
            "highest learning rate of AdamW, which rises and falls as a cosine; default 0.001",
        ),
        ("--batch-size", whole, "N", "images a step; default 64"),
        ("--ema", number, "X", "share of the moving average of the weights that a step keeps; default 0.999"),
        (
            "--sample-every",
            whole,
            "N",
            "epochs from one picture of samples to the next, 0: none; default five in all",
        ),
    )
    _add_rest(parser)
    parser.set_defaults(parser=parser, run=_train_prior)


def add_train_estimator(commands: Any) -> None:
    """Add `ddfast train-estimator`."""
    from ddfast.models import list_models

    parser = commands.add_parser(
        "train-estimator", help="train what tells igds how much its images say (MoCo and a classifier)"
    )
    _add_common(parser, "file of the estimator, .safetensors; a new one", "FILE")
    known = f"{', '.join(list_models())}, timm:NAME or torchvision:NAME"
    _add_numbers(
        parser,
        ("--arch", str, "NAME", f"of the encoder: {known}; default convnet3_in"),
        ("--width", whole, "N", "channels of a ConvNet's layers; default 128"),
        (
            "--weights",
            str,
            "FILE",
            "a teacher, a state dict or a MoCo checkpoint that the encoder starts from; default none",
        ),
        ("--kl", number, "LAMBDA", "weight of the KL between the views of an image, 0 is MoCo; default 0.1"),
        ("--tau", number, "X", "temperature, of the contrast and of the softmax; default 0.07"),
        (
            "--momentum-encoder",
            number,
            "X",
            "share of the encoder's moving average that a step keeps; default 0.99",
        ),
        (
            "--queue",
            whole,
            "N",
            "keys that an image is told from, at most a quarter of the images; default 4096",
        ),
        ("--lr", number, "X", "learning rate of SGD, which falls as a cosine; default 0.06"),
        ("--weight-decay", number, "X", "weight decay, on every parameter; default 0.0005"),
        ("--batch-size", whole, "N", "images a step; default 256"),
        (
            "--normalization",
            str,
            "NAME",
            "mean and deviation of the pixels: imagenet, cifar10, tinyimagenet, none, or numbers as "
            "mean,mean,mean/std,std,std; default imagenet",
        ),
    )
    _add_rest(parser)
    parser.set_defaults(parser=parser, run=_train_estimator)


def _add_common(parser: argparse.ArgumentParser, out: str, metavar: str) -> None:
    add_data(parser)
    parser.add_argument(
        "--epochs", type=whole, required=True, metavar="N", help="passes over the training split"
    )
    parser.add_argument("--out", required=True, metavar=metavar, help=out)
    parser.add_argument(
        "--image-size",
        type=whole,
        default=None,
        metavar="PX",
        help="side in pixels; default that of the first image, 224 at most",
    )
    parser.add_argument(
        "--images-per-class",
        type=whole,
        default=None,
        metavar="N",
        help="images trained on of each class; default all",
    )


def _add_numbers(parser: argparse.ArgumentParser, *flags: tuple[str, Any, str, str]) -> None:
    for flag, kind, metavar, help in flags:
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=help)


def _add_rest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-flip",
        action="store_true",
        help="no mirror images among the augmentations, which digits do not bear",
    )
    parser.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="decides all draws, a number of at least 0"
    )
    parser.add_argument(
        "--precision",
        default=argparse.SUPPRESS,
        metavar="{float32,bfloat16,auto}",
        help="what networks compute in; auto: bfloat16 where it is known to be faster; default float32",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last saved step")
    add_device(parser)
    add_config(parser)


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords of a training that a command line gives."""
    own = ("data", "parser", "run", "command", "config", "write_config", "print_config", "no_flip", "width")
    given = {name: value for name, value in vars(arguments).items() if name not in own}
    return given | ({"flip": False} if arguments.no_flip else {})


def _train_prior(arguments: argparse.Namespace) -> None:
    from ddfast.training.prior import train_prior

    given = _given(arguments)
    if hasattr(arguments, "width"):
        given["width"] = arguments.width
    prior = train_prior(arguments.data, **given)
    print(f"prior {arguments.out}\nimages of {prior.image_size} px, {prior.classes} classes")


def _train_estimator(arguments: argparse.Namespace) -> None:
    from ddfast.training.estimator import train_estimator

    given = _given(arguments)
    if hasattr(arguments, "width"):
        given["arch_options"] = {"width": arguments.width}
    estimator = train_estimator(arguments.data, **given)
    accuracy = "not measured" if estimator.top1 is None else f"{estimator.top1:.2f}"
    print(f"estimator {arguments.out}\ntop1 {accuracy}")
