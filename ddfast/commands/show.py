"""`ddfast attribute`, `report`, `export`, `demo` and `env`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ddfast.arguments import whole_number
from ddfast.commands.flags import add_data, add_device, whole
from ddfast.commands.teachers import add_teacher, check_teacher, class_names_of, is_bare, said_normalization
from ddfast.errors import UsageError
from ddfast.wording import argument, plural


def add_attribute(commands: Any) -> None:
    """Add `ddfast attribute`."""
    from ddfast.attribution import list_estimators

    parser = commands.add_parser("attribute", help="heatmaps of images, as pictures and a table")
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="an image file, a folder of images, or a labelled set",
    )
    add_teacher(
        parser, required=True, help="teacher file, .pt state dict, torchvision:NAME, timm:NAME or hf:NAME"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="output folder, a new one")
    parser.add_argument(
        "--grid", type=whole, default=4, metavar="N", help="cells per side, which share the score"
    )
    parser.add_argument("--n-samples", type=whole, default=32, metavar="N", help="model evaluations an image")
    parser.add_argument(
        "--estimator",
        default="permutation",
        metavar="NAME",
        help=f"estimator of the Shapley values: {', '.join(list_estimators())}",
    )
    parser.add_argument(
        "--value",
        default="logit",
        metavar="{logit,prob,logprob}",
        help="what the cells share: the class's logit, probability or log-probability",
    )
    parser.add_argument("--limit", type=whole, default=64, metavar="N", help="images at most")
    parser.add_argument(
        "--seed",
        type=whole,
        default=0,
        metavar="N",
        help="decides which cells are shown together, a number of at least 0",
    )
    parser.add_argument(
        "--image-size",
        type=whole,
        default=None,
        metavar="PX",
        help="side of the images in pixels, for a .pt state dict; default what the teacher file says",
    )
    add_device(parser)
    parser.set_defaults(parser=parser, run=_attribute)


def _attribute(arguments: argparse.Namespace) -> None:
    from ddfast.models import load_teacher
    from ddfast.models.published import published
    from ddfast.report.attribute import attribute_images

    spec = arguments.teacher
    check_teacher(arguments, spec, arguments.class_order)

    def load() -> Any:
        said: dict[str, Any] = {"class_order": arguments.class_order}
        bare = is_bare(arguments, spec)
        if bare or arguments.image_size is not None:
            said["image_size"] = arguments.image_size
        if bare and arguments.class_order is None:
            try:
                said["class_names"] = class_names_of(arguments.data)
            except UsageError as error:
                raise UsageError(
                    f"{spec} does not name its classes, and neither does {argument('data')} ({error}): say them with "
                    f"{argument('class_order')}"
                ) from error
        teacher = load_teacher(
            spec, arch=arguments.teacher_arch, normalization=said_normalization(arguments), **said
        )
        return teacher if published(spec) is None else _named_as(teacher, arguments.data)

    count = attribute_images(
        arguments.data,
        teacher=load,
        out=arguments.out,
        grid=arguments.grid,
        n_samples=arguments.n_samples,
        estimator=arguments.estimator,
        value=arguments.value,
        limit=arguments.limit,
        seed=arguments.seed,
        device=arguments.device,
        workers=arguments.workers,
        quiet=arguments.quiet,
    )
    print(f"{plural(count, 'heatmap')} in {arguments.out}")


def _named_as(teacher: Any, data: str) -> Any:
    """A published teacher with the names of as many classes of labelled data, where it does not know them."""
    try:
        names = list(class_names_of(data))
    except UsageError:  # images without labels
        return teacher
    known = set(names) <= set(teacher.class_names)
    if known or len(names) != len(teacher.class_names):
        return teacher
    return dataclasses.replace(teacher, class_names=names)


def add_report(commands: Any) -> None:
    """Add `ddfast report`."""
    parser = commands.add_parser("report", help="write report.html and mosaic.png of a distilled set again")
    parser.add_argument("folder", metavar="FOLDER", help="output folder of ddfast distill")
    add_data(parser, required=False, default=None, help="the data; default where the run found them")
    parser.set_defaults(parser=parser, run=_report)


def _report(arguments: argparse.Namespace) -> None:
    import json

    from ddfast.data import open_source
    from ddfast.output import DistilledSet
    from ddfast.pipeline.run import RUN
    from ddfast.progress import say
    from ddfast.report import write_report

    distilled = DistilledSet(arguments.folder)
    data = arguments.data
    if data is None:
        try:
            data = json.loads((distilled.root / RUN).read_text("utf-8"))["data"]
        except (OSError, ValueError, KeyError, RecursionError):
            say(f"{RUN} names no data: the report goes without sources (--data gives them)")
    try:
        source = None if data is None else open_source(data, "train")
        held = (distilled.manifest.get("data") or {}).get("fingerprint")
        if source is not None and held is not None and source.fingerprint() != held:
            raise UsageError(f"{data} holds other images than the run was made of")
    except UsageError as error:
        if arguments.data is not None:
            raise
        say(f"the report goes without sources: {error}")
        source = None
    write_report(distilled.root, source=source)
    print(distilled.root / "report.html")


def add_export(commands: Any) -> None:
    """Add `ddfast export`."""
    parser = commands.add_parser(
        "export", help="write a distilled set as WebDataset shards or for Hugging Face"
    )
    parser.add_argument("folder", metavar="FOLDER", help="output folder of ddfast distill")
    parser.add_argument(
        "--to",
        "--format",
        dest="to",
        choices=("webdataset", "huggingface"),
        default="webdataset",
        help="webdataset: tar shards; huggingface: a folder of Parquet with named labels and a dataset card",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="PATTERN",
        help="shards/train-{000000..}.tar, or one .tar; of huggingface a new folder",
    )
    parser.add_argument(
        "--images-per-shard",
        type=whole,
        default=10_000,
        metavar="N",
        help="images in each file but the last",
    )
    parser.add_argument(
        "--push-to-hub",
        default=None,
        metavar="OWNER/NAME",
        help="of huggingface: also push it to the Hub under this name, as who is logged in there; default none",
    )
    parser.add_argument(
        "--private", action="store_true", help="of --push-to-hub: a set that is new on the Hub is yours alone"
    )
    parser.set_defaults(parser=parser, run=_export)


def _export(arguments: argparse.Namespace) -> None:
    if arguments.to == "huggingface":
        from ddfast.output.huggingface import export_huggingface

        whole_number(arguments.images_per_shard, "images_per_shard", least=1)
        print(
            export_huggingface(
                arguments.folder,
                arguments.out,
                images_per_file=arguments.images_per_shard,
                push_to_hub=arguments.push_to_hub,
                private=arguments.private,
            )
        )
        return
    for keyword in ("push_to_hub", "private"):
        if getattr(arguments, keyword):
            raise UsageError(f"{argument(keyword)} is of --to huggingface: give that as well")
    from ddfast.output.webdataset import export_webdataset

    paths = export_webdataset(arguments.folder, arguments.out, images_per_shard=arguments.images_per_shard)
    print(paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1].name}")


def add_demo(commands: Any) -> None:
    """Add `ddfast demo`."""
    parser = commands.add_parser(
        "demo", help="render a set, train a teacher, distil, compare with a random subset"
    )
    parser.add_argument("--out", default="./demo-out", metavar="FOLDER", help="output folder")
    parser.add_argument(
        "--seed",
        type=whole,
        default=0,
        metavar="N",
        help="decides the images and every random draw, a number of at least 0",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but the comparison")
    parser.set_defaults(parser=parser, run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    from ddfast.demo.demo import run_demo

    run_demo(Path(arguments.out), seed=arguments.seed, quiet=arguments.quiet)


def add_env(commands: Any) -> None:
    """Add `ddfast env`."""
    parser = commands.add_parser("env", help="versions, and which path every op takes here, and why")
    parser.set_defaults(parser=parser, run=_env)


def _env(arguments: argparse.Namespace) -> None:
    from ddfast.report.environment import describe_environment

    print(describe_environment())
