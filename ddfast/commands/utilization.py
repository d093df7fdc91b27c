"""`ddfast utilization`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ddfast.commands.flags import add_data, add_device, whole
from ddfast.errors import UsageError
from ddfast.wording import argument


def add_utilization(commands: Any) -> None:
    """Add `ddfast utilization`."""
    parser = commands.add_parser(
        "utilization", help="how evenly a network uses distilled images (mUE), as numbers and a picture"
    )
    parser.add_argument("folder", metavar="FOLDER", help="output folder of ddfast distill")
    parser.add_argument(
        "--arch",
        default=None,
        metavar="NAME",
        help="architecture of the network; default what a set of pixels was matched on",
    )
    parser.add_argument(
        "--teacher",
        default=None,
        metavar="FILE",
        help="a trained network; default none: one is trained on real images",
    )
    add_data(parser, required=False, default=None, help="the real data; default where the run found them")
    parser.add_argument(
        "--steps",
        type=whole,
        default=1000,
        metavar="N",
        help="steps of that training, of 64 real images each",
    )
    parser.add_argument(
        "--images-per-class",
        type=whole,
        default=500,
        metavar="N",
        help="real images that it draws from, at most",
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of that training, at least 0")
    parser.add_argument(
        "--out",
        default=None,
        metavar="FILE",
        help="picture of images, maps and regions, a new .png; default FOLDER-utilization.png beside the folder",
    )
    parser.add_argument("--json", default=None, metavar="FILE", help="also write the numbers; default none")
    add_device(parser)
    parser.set_defaults(parser=parser, run=_utilization)


def _utilization(arguments: argparse.Namespace) -> None:
    import json

    from ddfast.arguments import output_file
    from ddfast.files import atomic_write_text, beside, make_folder
    from ddfast.report.utilization import utilization

    folder = Path(arguments.folder)
    out = Path(arguments.out) if arguments.out else beside(folder, "-utilization.png")
    for name, path in (("out", arguments.out), ("json", arguments.json)):
        if path and Path(path).exists():
            raise UsageError(f"{argument(name)} {path} exists already: give another file or delete it")
    if arguments.json:
        output_file(arguments.json, "json")
    if out.suffix != ".png":
        raise UsageError(f"{argument('out')} must end in .png, got {out}")
    found = utilization(
        folder,
        arch=arguments.arch,
        teacher=arguments.teacher,
        data=arguments.data,
        steps=arguments.steps,
        images_per_class=arguments.images_per_class,
        seed=arguments.seed,
        picture=out,
        device=arguments.device,
        workers=arguments.workers,
        quiet=arguments.quiet,
    )
    if arguments.json:
        make_folder(Path(arguments.json).parent)
        atomic_write_text(arguments.json, json.dumps(found.as_dict(), indent=2) + "\n")
    print(f"picture: {out}")
    print(found)
