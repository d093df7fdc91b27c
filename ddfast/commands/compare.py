"""`ddfast compare`: distilled sets beside random sets of the same size, a coreset and the teacher."""

from __future__ import annotations

import argparse
from typing import Any

from ddfast.commands.flags import add_data, add_device, whole


def add_compare(commands: Any) -> None:
    """Add `ddfast compare`."""
    parser = commands.add_parser(
        "compare", help="distilled sets beside random ones of the same size, a coreset and the teacher"
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output folders of ddfast distill")
    add_data(parser)
    parser.add_argument(
        "--teacher",
        metavar="FILE",
        default=None,
        help="file of the sets' teacher, where it has moved; it labels the random sets and chooses the coreset",
    )
    parser.add_argument(
        "--coreset",
        metavar="METHOD",
        default="herding",
        help="herding, k_center, k_means, forgetting or none; it needs a teacher",
    )
    parser.add_argument(
        "--arch",
        metavar="ARCH",
        default=None,
        help="the students' architecture; default what pixels were matched on, else the teacher's",
    )
    parser.add_argument(
        "--width", metavar="CHANNELS", type=whole, default=None, help="channels of a ConvNet student's layers"
    )
    parser.add_argument("--seeds", metavar="N", type=whole, default=3, help="number of students on each set")
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        default="rded",
        help="of the students, as ddfast evaluate has it; the column of hard labels takes its numbers too",
    )
    parser.add_argument(
        "--epochs", metavar="N", type=whole, default=None, help="passes over each set; default the protocol's"
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=whole, default=None, help="images a step; default the protocol's"
    )
    parser.add_argument(
        "--precision",
        metavar="DTYPE",
        default="float32",
        help="float32, bfloat16, or auto: bfloat16 where it is known to be faster",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default=None,
        help="folder for comparison.csv, report.html and the sets that are made; default beside the first DIR, with "
        "-comparison behind its name",
    )
    add_device(parser)
    parser.set_defaults(parser=parser, run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from ddfast.comparison import compare

    print(
        compare(
            arguments.folders,
            arguments.data,
            teacher=arguments.teacher,
            coreset=arguments.coreset,
            arch=arguments.arch,
            arch_options={} if arguments.width is None else {"width": arguments.width},
            seeds=arguments.seeds,
            protocol=arguments.protocol,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            precision=arguments.precision,
            out=arguments.out,
            device=arguments.device,
            workers=arguments.workers,
            quiet=arguments.quiet,
        )
    )
