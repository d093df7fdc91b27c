"""The command line: `ddfast COMMAND`. Exit codes: 0 done, 2 bad usage or bad input (one line), 1 anything else."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ddfast import __version__
from ddfast.data.loaders import LOADERS
from ddfast.errors import DDFastError, UsageError


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors and defaults in the help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    parser = build_parser(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except DDFastError as error:
        print(f"ddfast: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt as stop:
        print(f"ddfast: interrupted; {stop if stop.args else '--resume continues'}", file=sys.stderr)
        return 130


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands. The options of a method are added where `argv` names the method."""
    parser = _Parser(
        prog="ddfast", description="Distil an image data set into a tiny one that trains models as well."
    )
    parser.add_argument("--version", action="version", version=f"ddfast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    _add_demo(commands)
    _add_train_teacher(commands)
    _add_distill(commands, argv)
    _add_stages(commands, argv)
    _add_evaluate(commands)
    _add_attribute(commands)
    _add_report(commands)
    _add_export(commands)
    _add_env(commands)
    _add_bench(commands)
    return parser


# Shared arguments
# -----------------------------------------------------------------------------------------------


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--workers", type=int, default=None, help="decoding threads; default one a core")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the result")


def _data(parser: argparse.ArgumentParser, **kwargs: Any) -> None:
    kwargs.setdefault("required", True)
    parser.add_argument(
        "--data",
        **kwargs,
        help="folder with train/ and val/ or test/, a .zip or .tar shards of that layout, or a torchvision set",
    )


def _teacher(parser: argparse.ArgumentParser, *, required: bool, help: str) -> None:
    parser.add_argument("--teacher", required=required, help=help)
    parser.add_argument("--teacher-arch", default=None, help="architecture of a weights-only .pt state dict")
    parser.add_argument(
        "--normalization", default=None, help="normalisation of a .pt state dict: imagenet, cifar10, ..."
    )
    parser.add_argument(
        "--class-order",
        default=None,
        metavar="FILE",
        help="classes in the order of the teacher's outputs, one a line or JSON, where it is not the data's",
    )


def _load_teacher(
    arguments: argparse.Namespace,
    spec: str | None,
    class_names: Callable[[], Sequence[str]],
    image_size: int | None,
    class_order: str | None,
) -> Any:
    """A teacher by its file; where that does not name its classes, they and their order are those of the data."""
    from ddfast.models import load_teacher
    from ddfast.models.teacher import is_state_dict

    if spec is None:
        return None
    if spec.startswith("torchvision:") and class_order is None:
        teacher, names = load_teacher(spec), list(class_names())
        # torchvision names its classes in words; a data set of as many folders is taken to be in the same
        # order.
        same_number = len(names) == len(teacher.class_names)
        return dataclasses.replace(teacher, class_names=names) if same_number else teacher
    said: dict[str, Any] = {"class_order": class_order}
    if is_state_dict(spec) or (arguments.teacher_arch is not None and not spec.startswith("torchvision:")):
        said |= {"arch": arguments.teacher_arch, "normalization": arguments.normalization}
        if is_state_dict(spec) or not _names_itself(spec):
            said |= {"image_size": image_size, "class_names": class_names()}
    if class_order is not None:
        said["class_names"] = class_names()
    return load_teacher(spec, **said)


def _names_itself(spec: str) -> bool:
    """Whether a file is a teacher file of ours, and no bare safetensors."""
    from ddfast.models.teacher import read_header

    return read_header(Path(spec)) is not None


def _class_names(data: str, split: str = "train") -> Callable[[], Sequence[str]]:
    """The classes of a data set, read when they are asked for."""
    from ddfast.data import open_source

    return lambda: open_source(data, split).class_names


# train-teacher
# --------------------------------------------------------------------------------------------------


def _add_train_teacher(commands: Any) -> None:
    parser = commands.add_parser("train-teacher", help="train a teacher on the full set")
    _data(parser)
    parser.add_argument("--arch", required=True, help="architecture, convnet3 or resnet18 for example")
    parser.add_argument("--epochs", type=int, required=True, help="passes over the training split")
    parser.add_argument("--out", required=True, help="teacher file to write, .safetensors; a new one")
    parser.add_argument(
        "--checkpoint-epochs",
        type=_integers,
        default=(),
        metavar="N[,N...]",
        help="also write <out>-epochN.safetensors after these epochs: early label teachers",
    )
    parser.add_argument(
        "--image-size", type=int, default=None, help="side in pixels; default that of the first image"
    )
    parser.add_argument("--optimizer", default="sgd", help="sgd or adamw")
    parser.add_argument(
        "--lr", type=float, default=None, help="learning rate; default by optimizer and architecture"
    )
    parser.add_argument("--schedule", default="cosine", help="cosine or constant")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="weight decay")
    parser.add_argument(
        "--augment", default=None, help="crop-flip, rrc-flip, flip or none; default by image size"
    )
    parser.add_argument("--width", type=int, default=None, help="channels of a ConvNet's layers; default 128")
    parser.add_argument("--seed", type=int, default=0, help="weights, order and augmentation")
    parser.add_argument(
        "--precision",
        default="auto",
        help="float32, bfloat16, or auto: bfloat16 where it is known to be faster",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last finished epoch")
    _device(parser)
    parser.set_defaults(run=_train_teacher)


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted numbers with commas between, got {text!r}") from None


def _train_teacher(arguments: argparse.Namespace) -> None:
    try:
        _train_teacher_whole(arguments)
    except KeyboardInterrupt:
        state = Path(arguments.out).with_suffix(".state")
        kept = "--resume continues behind the last whole epoch" if state.is_file() else _NOTHING_KEPT
        raise KeyboardInterrupt(kept) from None


_NOTHING_KEPT = "no epoch was finished, so nothing was kept: start again"


def _train_teacher_whole(arguments: argparse.Namespace) -> None:
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


# distill and its stages
# -----------------------------------------------------------------------------------------


def _add_distill(commands: Any, argv: Sequence[str]) -> None:
    parser = commands.add_parser("distill", help="distil a data set: score, select, synthesize, relabel")
    _method_arguments(parser, argv)
    parser.set_defaults(run=lambda arguments: _distill(arguments, "relabel"))


def _add_stages(commands: Any, argv: Sequence[str]) -> None:
    parser = commands.add_parser("score", help="stage 1 of distill: the score table")
    _method_arguments(parser, argv)
    parser.set_defaults(run=lambda arguments: _distill(arguments, "score"))
    for name, help in (
        ("select", "stage 2: rank the score table; another --ipc selects again"),
        ("synthesize", "stage 3: write the images"),
        ("relabel", "stage 4: soft labels and report"),
    ):
        stage = commands.add_parser(name, help=help)
        stage.add_argument("folder", help="output folder of ddfast score")
        _data(stage, required=False, default=None)
        stage.add_argument("--teacher", default=None, help="teacher file, where it has moved")
        stage.add_argument("--label-teacher", default=None, help="label teacher file, where it has moved")
        if name == "select":
            stage.add_argument("--ipc", type=int, default=None, help="images per class; default as scored")
        _device(stage)
        stage.set_defaults(run=_stage)


def _method_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    from ddfast.methods import get_method, list_methods

    known = list_methods()
    parser.add_argument("method", metavar="METHOD", help=", ".join(known))
    _data(parser)
    _teacher(parser, required=True, help="teacher file, .pt state dict, or torchvision:NAME")
    parser.add_argument(
        "--label-teacher", default=None, help="another teacher for the soft labels, an early one"
    )
    parser.add_argument(
        "--label-class-order",
        default=None,
        metavar="FILE",
        help="the same of the label teacher; default --class-order where its file does not name its classes",
    )
    parser.add_argument("--ipc", type=int, required=True, help="images per class")
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument("--seed", type=int, default=0, help="pool, coalitions, noise and draws")
    parser.add_argument("--images-per-class", type=int, default=300, help="sources scored of each class")
    parser.add_argument(
        "--factor", choices=("auto", "1", "2"), default="auto", help="tiles per side; auto: 1 up to 64 px"
    )
    parser.add_argument(
        "--image-size", type=int, default=None, help="side of the images in pixels; default the teacher's"
    )
    parser.add_argument("--format", choices=("png", "jpeg"), default="png", help="of the images")
    parser.add_argument(
        "--preset", default=None, help="named option values of the method, `paper` for infoutil"
    )
    parser.add_argument(
        "--precision",
        default="float32",
        help="float32, bfloat16, or auto: bfloat16 where it is known to be faster",
    )
    parser.add_argument("--batch-size", default="auto", help="images in flight; never changes the result")
    parser.add_argument(
        "--loader",
        choices=LOADERS,
        default="auto",
        help="what decodes; part of the arithmetic",
    )
    parser.add_argument(
        "--threads",
        default="auto",
        help="CPU threads of one process, part of the arithmetic; auto: DDFAST_THREADS or every core",
    )
    parser.add_argument(
        "--label-top-k",
        default="auto",
        help="probabilities stored of each soft label: a number, all, or auto: all of up to 2048 classes, else 256",
    )
    parser.add_argument(
        "--scores", default=None, help="folder of a run whose score table has the same settings"
    )
    parser.add_argument("--resume", action="store_true", help="continue an unfinished run")
    parser.add_argument(
        "--no-preflight", action="store_true", help="skip the try of the teacher on training images"
    )
    _device(parser)
    named = next((word for word in argv[1:] if word in known), None)
    if named is None:
        return
    group = parser.add_argument_group(f"options of {named}")
    for field in dataclasses.fields(get_method(named).Options):
        flag = "--" + field.name.replace("_", "-")
        help = field.metadata["help"]
        if isinstance(field.default, bool):
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help
            )
        else:
            kind = type(field.default)
            group.add_argument(
                flag,
                type=kind,
                choices=field.metadata["choices"],
                default=argparse.SUPPRESS,
                help=f"{help} (default: {field.default})",
            )


def _distill(arguments: argparse.Namespace, until: str) -> None:
    from ddfast.distillation import distill
    from ddfast.methods import get_method

    method = get_method(arguments.method)
    from ddfast.models.teacher import is_named

    names, size = _class_names(arguments.data), arguments.image_size
    teacher = _load_teacher(arguments, arguments.teacher, names, size, arguments.class_order)
    label_order = arguments.label_class_order
    if label_order is None and arguments.label_teacher is not None and not is_named(arguments.label_teacher):
        label_order = arguments.class_order
    label_teacher = _load_teacher(arguments, arguments.label_teacher, names, size, label_order)
    chosen = {
        f.name: getattr(arguments, f.name)
        for f in dataclasses.fields(method.Options)
        if hasattr(arguments, f.name)
    }
    out = distill(
        arguments.method,
        data=arguments.data,
        teacher=teacher,
        label_teacher=label_teacher,
        ipc=arguments.ipc,
        out=arguments.out,
        seed=arguments.seed,
        images_per_class=arguments.images_per_class,
        factor=arguments.factor,
        image_size=arguments.image_size,
        image_format=arguments.format,
        preset=arguments.preset,
        precision=arguments.precision,
        device=arguments.device,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        loader=arguments.loader,
        threads=arguments.threads,
        label_top_k=arguments.label_top_k,
        scores=arguments.scores,
        resume=arguments.resume,
        preflight=not arguments.no_preflight,
        quiet=arguments.quiet,
        until=until,
        **chosen,
    )
    _print_once(out)


def _print_once(text: object) -> None:
    """Print from one of the processes that torchrun started, or from the only one."""
    from ddfast.ranks import is_main

    if is_main():
        print(text)


def _stage(arguments: argparse.Namespace) -> None:
    from ddfast.distillation import finish
    from ddfast.methods import pipeline
    from ddfast.methods.run import reopen

    run = reopen(
        arguments.folder,
        data=arguments.data,
        teacher=arguments.teacher,
        label_teacher=arguments.label_teacher,
        device=arguments.device,
        workers=arguments.workers,
        quiet=arguments.quiet,
    )
    if arguments.command == "select" and arguments.ipc is not None:
        pipeline.change_ipc(run, arguments.ipc)
    getattr(pipeline, arguments.command)(run)
    if arguments.command == "relabel":
        finish(run)
    run.ranks.leave()
    _print_once(run.out)


# evaluate
# -------------------------------------------------------------------------------------------------------


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="train students on a distilled set and test them")
    parser.add_argument("--distilled", required=True, help="output folder of ddfast distill")
    _data(parser)
    parser.add_argument("--arch", required=True, help="the students' architecture")
    parser.add_argument(
        "--width", type=int, default=None, help="channels of a ConvNet student's layers; default 128"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of students")
    _teacher(
        parser, required=False, help="label online with this teacher; without it the stored soft labels serve"
    )
    parser.add_argument(
        "--epochs", type=int, default=None, help="passes over the distilled set; default the protocol's"
    )
    parser.add_argument(
        "--protocol",
        default="rded",
        help="rded, rded_plain, sre2l, sre2l_tiny, or with hard labels dc, dsa, idc, igds",
    )
    parser.add_argument("--batch-size", type=int, default=None, help="images a step; default the protocol's")
    parser.add_argument(
        "--auto-augment",
        "--autoaugment",
        action="store_true",
        help="AutoAugment on the students' images, before the protocol's own augmentation",
    )
    parser.add_argument(
        "--precision",
        default="float32",
        help="float32, bfloat16, or auto: bfloat16 where it is known to be faster",
    )
    parser.add_argument("--json", default=None, help="also write the whole result to this file, a new one")
    parser.add_argument(
        "--no-preflight", action="store_true", help="skip the try of the teacher on test images"
    )
    _device(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    import json

    from ddfast.data import DistilledSet
    from ddfast.data.files import atomic_write_text, make_folder
    from ddfast.training import evaluate

    if arguments.json:  # before the work, not after it
        if Path(arguments.json).exists():
            raise UsageError(f"--json {arguments.json} exists already: give another file or delete it")
        make_folder(Path(arguments.json).parent)
    if arguments.class_order is not None and arguments.teacher is None:
        raise UsageError("--class-order says how a teacher's outputs stand: give --teacher as well")
    teacher = None
    if arguments.teacher is not None:
        distilled = DistilledSet(arguments.distilled)
        teacher = _load_teacher(
            arguments,
            arguments.teacher,
            lambda: distilled.class_names,
            distilled.image_size,
            arguments.class_order,
        )
    result = evaluate(
        arguments.distilled,
        arguments.data,
        arch=arguments.arch,
        arch_options={} if arguments.width is None else {"width": arguments.width},
        seeds=arguments.seeds,
        teacher=teacher,
        preflight=not arguments.no_preflight,
        epochs=arguments.epochs,
        protocol=arguments.protocol,
        batch_size=arguments.batch_size,
        autoaugment=arguments.auto_augment,
        precision=arguments.precision,
        device=arguments.device,
        workers=arguments.workers,
        quiet=arguments.quiet,
    )
    print(
        f"labels {result.labels}, {result.epochs} epochs of batch {result.batch_size}, {len(result.seeds)} seeds"
    )
    print(f"top5 {result.top5_mean:.2f}, best tested epoch {result.best_mean:.2f} ± {result.best_std:.2f}")
    print(result, flush=True)
    if arguments.json:
        atomic_write_text(arguments.json, json.dumps(result.as_dict(), indent=2) + "\n")


# attribute, report, export, demo
# ----------------------------------------------------------------------------------------


def _add_attribute(commands: Any) -> None:
    parser = commands.add_parser("attribute", help="heatmaps of images, as pictures and a table")
    parser.add_argument("--data", required=True, help="an image file, a folder of images, or a labelled set")
    _teacher(parser, required=True, help="teacher file, .pt state dict, or torchvision:NAME")
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument("--grid", type=int, default=4, help="cells per side")
    parser.add_argument("--n-samples", type=int, default=32, help="model evaluations an image")
    parser.add_argument(
        "--estimator", default="permutation", help="Shapley estimator; an unknown one lists all"
    )
    parser.add_argument("--value", default="logit", help="logit, prob or logprob")
    parser.add_argument("--limit", type=int, default=64, help="images at most")
    parser.add_argument("--seed", type=int, default=0, help="of the coalitions")
    parser.add_argument(
        "--image-size", type=int, default=None, help="side of the images of a .pt state dict in pixels"
    )
    _device(parser)
    parser.set_defaults(run=_attribute)


def _attribute(arguments: argparse.Namespace) -> None:
    from ddfast.models import load_teacher
    from ddfast.models.teacher import is_state_dict
    from ddfast.report.attribute import attribute_images

    said: dict[str, Any] = {"class_order": arguments.class_order}
    if is_state_dict(arguments.teacher) or arguments.image_size is not None:
        said["image_size"] = arguments.image_size
    if is_state_dict(arguments.teacher) and arguments.class_order is None:
        try:
            said["class_names"] = _class_names(arguments.data)()
        except UsageError as error:
            raise UsageError(
                f"{arguments.teacher} does not name its classes, and neither does --data ({error}): say them with "
                "--class-order"
            ) from error
    count = attribute_images(
        arguments.data,
        teacher=load_teacher(
            arguments.teacher, arch=arguments.teacher_arch, normalization=arguments.normalization, **said
        ),
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
    print(f"{count} heatmaps in {arguments.out}")


def _add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="write report.html and mosaic.png of a distilled set again")
    parser.add_argument("folder", help="output folder of ddfast distill")
    _data(parser, required=False, default=None)
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> None:
    import json

    from ddfast.data import DistilledSet, open_source
    from ddfast.methods.run import RUN
    from ddfast.progress import say
    from ddfast.report import write_report

    distilled = DistilledSet(arguments.folder)
    data = arguments.data
    if data is None:
        try:
            data = json.loads((distilled.root / RUN).read_text("utf-8"))["data"]
        except (OSError, ValueError, KeyError):
            say(f"{RUN} names no data: the report goes without sources (--data gives them)")
    try:
        source = None if data is None else open_source(data, "train")
    except UsageError as error:
        if arguments.data is not None:
            raise
        say(f"the report goes without sources: {error}")
        source = None
    write_report(distilled.root, source=source)
    print(distilled.root / "report.html")


def _add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="write a distilled set as WebDataset shards")
    parser.add_argument("folder", help="output folder of ddfast distill")
    parser.add_argument("--out", required=True, help="shards/train-{000000..}.tar, or one .tar")
    parser.add_argument(
        "--images-per-shard", type=int, default=10_000, help="images in each shard but the last"
    )
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    from ddfast.data.webdataset_export import export_webdataset

    paths = export_webdataset(arguments.folder, arguments.out, images_per_shard=arguments.images_per_shard)
    print(paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1].name}")


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo", help="render a set, train a teacher, distil, compare with a random subset"
    )
    parser.add_argument("--out", default="./demo-out", help="output folder")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the comparison")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    from ddfast.demo import run_demo

    run_demo(Path(arguments.out), seed=arguments.seed, quiet=arguments.quiet)


# env, bench
# -----------------------------------------------------------------------------------------------------


def _add_env(commands: Any) -> None:
    parser = commands.add_parser("env", help="versions, and which path every op takes here, and why")
    parser.set_defaults(run=_env)


def _env(arguments: argparse.Namespace) -> None:
    from ddfast.report.environment import describe_environment

    print(describe_environment())


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser("bench", help="benchmarks; from a checkout", add_help=False)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "bench" / "__main__.py").is_file():
        raise UsageError("benchmarks are not installed: run this from a checkout of the repository")
    sys.path.insert(0, str(checkout))
    import importlib

    run: Callable[[Sequence[str]], int] = importlib.import_module("bench.__main__").main
    return run(arguments.arguments)
