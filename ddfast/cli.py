"""The command line: `ddfast COMMAND`. Exit codes: 0 done, 2 bad usage or bad input (one line), 1 anything else."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ddfast.arguments import output_file, whole_number
from ddfast.data.loaders import LOADERS
from ddfast.errors import DDFastError, UsageError
from ddfast.version import __version__
from ddfast.wording import argument, did_you_mean, flags_of_command, plural

_ERRORS_OF_FILES = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC),
    *(errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.EIO, errno.EMFILE),
}


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the nearest name, and defaults in the help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message)}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            what = "commands" if action.dest == "command" else "choices"
            said = f"unknown command {value!r}" if action.dest == "command" else f"got {value!r}"
            raise argparse.ArgumentError(
                None if action.dest == "command" else action,
                f"{said}; {what}: {', '.join(known)}{did_you_mean(value, known)}",
            )

    def flags(self) -> dict[str, str]:
        """The long flag of every argument that this command takes, by the argument's keyword."""
        return {
            action.dest: next((s for s in action.option_strings if s.startswith("--")), action.dest)
            for action in self._actions
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = None
    try:
        parser = build_parser(given)
        _check_flags(parser, given)
        arguments, rest = parser.parse_known_args(given)
        if rest:
            arguments.parser.error(f"does not know what to do with {' '.join(map(repr, rest))}")
        with flags_of_command(arguments.parser.flags()):
            code = int(arguments.run(arguments) or 0)
        sys.stdout.flush()  # here, where a reader that has gone is no accident
        return code
    except DDFastError as error:
        from ddfast.ranks import is_main

        if not error.shared or is_main():
            _say(str(error))
        return error.exit_code
    except BrokenPipeError:
        # What reads our output has gone; without this the interpreter would complain of it as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _ERRORS_OF_FILES:
            raise
        where = f" {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes)) else ""
        _say(f"cannot read or write{where}: {os.strerror(error.errno or 0).lower()}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        _say(f"out of memory: {str(error).splitlines()[0]}" if str(error) else "out of memory")
        return 1
    except KeyboardInterrupt as stop:
        left = "nothing was begun" if arguments is None else _after_interruption(arguments)
        _say(f"interrupted; {stop if stop.args else left}")
        return 130


def _is_lack_of_memory(error: BaseException) -> bool:
    """Whether Python, a GPU (a RuntimeError of its own type) or torch's allocator of the CPU had no more memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _say(message: str) -> None:
    print(f"ddfast: {_one_line(message)}", file=sys.stderr)


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _check_flags(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Refuse a flag that the command does not take, ahead of argparse's complaint of all that is missing."""
    from ddfast.methods import list_methods

    commands = _commands(parser)
    command = next((word for word in given if not word.startswith("-")), None)
    if command is not None and command not in commands:
        return  # an unknown command is argparse's to refuse
    taker = parser if command is None else commands[command]
    method = None
    if command in ("distill", "score"):
        method = _method_in(taker, given)
        if method is not None and method not in (names := list_methods()):
            taker.error(
                f"unknown method {method!r}; known methods: {', '.join(names)}{did_you_mean(method, names)}"
            )
    for flag in _words(taker, given)[1]:
        if flag not in taker._option_string_actions and flag not in parser._option_string_actions:
            taker.error(_unknown(flag, taker, command, method))


def _unknown(flag: str, taker: argparse.ArgumentParser, command: str | None, method: str | None) -> str:
    """What to say of a flag that a command does not take: whose it is, or which one was meant."""
    from ddfast.methods import list_methods

    if command in ("distill", "score"):
        owners = [name for name in list_methods() if flag in _method_flags(name)]
        if owners:
            whose = f"{flag} is an option of {_listed(owners)}"
            return (
                f"{whose}, not of {method}"
                if method
                else f"{whose}: name it, ddfast {command} {owners[0]} ..."
            )
    near = did_you_mean(flag, [name for name in taker._option_string_actions if name.startswith("--")])
    others = [
        name for name, other in _commands(build_parser([])).items() if flag in other._option_string_actions
    ]
    if command is not None and others and not near:
        return f"{flag} is an option of {_listed([f'ddfast {name}' for name in others])}, not of ddfast {command}"
    return f"unknown option {flag}{near or f'; {taker.prog} --help lists the options'}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(
        dict(action.choices) for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )


def _words(parser: argparse.ArgumentParser, given: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that are neither flags nor their values, and the flags."""
    from ddfast.methods import list_methods

    valued = {flag: action.nargs != 0 for flag, action in parser._option_string_actions.items()}
    for name in list_methods():
        valued = {**_method_flags(name), **valued}
    plain, flags = [], []
    words = iter(given)
    for word in words:
        if not word.startswith("-") or _is_number(word):
            plain.append(word)
            continue
        flag = word.split("=")[0]
        flags.append(flag)
        if flag == word and valued.get(flag, False):
            next(words, None)
    return plain, flags


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _after_interruption(arguments: argparse.Namespace) -> str:
    """What has become of the work, and how to go on."""
    command = arguments.command
    if command in ("distill", "score"):
        if (Path(arguments.out) / "manifest.json").is_file():
            return "the same command with --resume continues"
        return "nothing has been written yet"
    if command == "train-teacher":
        if Path(arguments.out).with_suffix(".state").is_file():
            return "the same command with --resume continues after the last whole epoch"
        return "no epoch was finished, so the training starts from its beginning again"
    if command in ("select", "compose", "relabel", "synthesize", "demo"):
        return "the same command continues"
    if command == "evaluate":
        return "nothing has been written, and the students would be trained anew"
    if command == "export":
        return "the shards that are there are whole: delete them before it is run again"
    return "nothing has been written" if command == "attribute" else "run it again"


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
    return parser


# Shared arguments
# -----------------------------------------------------------------------------------------------


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--workers",
        type=_whole,
        default=None,
        help="decoding threads; default one a core, 0: none of their own",
    )
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


def _teacher_choice(
    arguments: argparse.Namespace,
    spec: str | None,
    classes_and_size: Callable[[], tuple[Sequence[str], int | None]],
    class_order: str | None,
    role: str = "teacher",
) -> Any:
    """What loads the teacher that is named, once the other options are checked; None where none is.

    Args:
        arguments: of the command.
        spec: teacher file, state dict, or torchvision:NAME.
        classes_and_size: what gives the classes of the data and the image size, for a file that does not name them.
        class_order: file of the order of its outputs.
        role: "teacher" or "label_teacher".

    Raises:
        UsageError: there is no such file, or an option that only a state dict needs is missing or left over.
    """
    if spec is None:
        for keyword in ("teacher_arch", "normalization", "class_order"):
            if role == "teacher" and getattr(arguments, keyword) is not None:
                raise UsageError(
                    f"{argument(keyword)} describes a teacher: give {argument('teacher')} as well"
                )
        return None
    _check_teacher(arguments, spec, class_order, role)
    return lambda: _load_teacher(arguments, spec, classes_and_size, class_order)


def _check_teacher(
    arguments: argparse.Namespace, spec: str, class_order: str | None, role: str = "teacher"
) -> None:
    """Refuse a teacher that is not there, and what is said of it that cannot be; arguments as `_teacher_choice`."""
    from ddfast.models.class_order import read_class_order
    from ddfast.models.normalization import normalization
    from ddfast.models.registry import check_model
    from ddfast.models.teacher import is_state_dict
    from ddfast.pipeline.opening import check_teacher_choice

    check_teacher_choice(spec, role)
    if class_order is not None:
        read_class_order(class_order)
    if arguments.normalization is not None:
        try:
            normalization(arguments.normalization)
        except ValueError as error:
            raise UsageError(str(error)) from error
    if arguments.teacher_arch is not None:
        check_model(arguments.teacher_arch, what=f"{argument('teacher_arch')}: ")
    if is_state_dict(spec):
        wanted = {"teacher_arch": "its architecture", "image_size": "its image size"}
        missing = [
            f"{what} as {argument(keyword)}"
            for keyword, what in wanted.items()
            if getattr(arguments, keyword, "of the data") is None
        ]
        if missing:
            raise UsageError(f"{spec} is a bare state dict: give {' and '.join(missing)}")


def _load_teacher(
    arguments: argparse.Namespace,
    spec: str,
    classes_and_size: Callable[[], tuple[Sequence[str], int | None]],
    class_order: str | None,
) -> Any:
    """A teacher by its file; where that does not name its classes, they and their order are those of the data."""
    from ddfast.models import load_teacher

    if spec.startswith("torchvision:") and class_order is None:
        teacher, names = load_teacher(spec), list(classes_and_size()[0])
        # torchvision names its classes in words; a data set of as many folders is taken to be in the same
        # order.
        same_number = len(names) == len(teacher.class_names)
        return dataclasses.replace(teacher, class_names=names) if same_number else teacher
    said: dict[str, Any] = {"class_order": class_order}
    bare = _is_bare(arguments, spec)
    if bare or (arguments.teacher_arch is not None and not spec.startswith("torchvision:")):
        said |= {"arch": arguments.teacher_arch, "normalization": arguments.normalization}
    if bare or class_order is not None:
        said["class_names"], size = classes_and_size()
        said |= {"image_size": size} if bare else {}
    return load_teacher(spec, **said)


def _is_bare(arguments: argparse.Namespace, spec: str) -> bool:
    """Whether a teacher file holds weights alone."""
    from ddfast.models.teacher import is_named, is_state_dict

    if arguments.teacher_arch is None or spec.startswith("torchvision:"):
        return is_state_dict(spec)
    return not is_named(spec)


def _class_names(data: str) -> Sequence[str]:
    """The classes of a data set."""
    from ddfast.data import open_source

    return open_source(data, "train").class_names


# train-teacher
# --------------------------------------------------------------------------------------------------


def _add_train_teacher(commands: Any) -> None:
    parser = commands.add_parser("train-teacher", help="train a teacher on the full set")
    _data(parser)
    parser.add_argument("--arch", required=True, help="architecture, convnet3 or resnet18 for example")
    parser.add_argument("--epochs", type=_whole, required=True, help="passes over the training split")
    parser.add_argument("--out", required=True, help="teacher file to write, .safetensors; a new one")
    parser.add_argument(
        "--checkpoint-epochs",
        type=_integers,
        default=(),
        metavar="N[,N...]",
        help="also write <out>-epochN.safetensors after these epochs: early label teachers",
    )
    parser.add_argument(
        "--image-size", type=_whole, default=None, help="side in pixels; default that of the first image"
    )
    parser.add_argument("--optimizer", default="sgd", help="sgd or adamw")
    parser.add_argument(
        "--lr", type=_number, default=None, help="learning rate; default by optimizer and architecture"
    )
    parser.add_argument("--schedule", default="cosine", help="cosine or constant")
    parser.add_argument("--batch-size", type=_whole, default=128, help="images a step")
    parser.add_argument("--weight-decay", type=_number, default=5e-4, help="weight decay")
    parser.add_argument(
        "--augment", default=None, help="crop-flip, rrc-flip, flip or none; default by image size"
    )
    parser.add_argument(
        "--width", type=_whole, default=None, help="channels of a ConvNet's layers; default 128"
    )
    parser.add_argument("--seed", type=_whole, default=0, help="weights, order and augmentation")
    parser.add_argument(
        "--precision",
        default="auto",
        help="float32, bfloat16, or auto: bfloat16 where it is known to be faster",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last finished epoch")
    _device(parser)
    parser.set_defaults(parser=parser, run=_train_teacher)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a whole number, got {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a number, got {text!r}") from None


_TYPES: dict[type, Callable[[str], Any]] = {int: _whole, float: _number}


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted whole numbers with commas between, got {text!r}") from None


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


# distill and its stages
# -----------------------------------------------------------------------------------------


def _add_distill(commands: Any, argv: Sequence[str]) -> None:
    parser = commands.add_parser("distill", help="distil a data set, all stages of a method in a row")
    _method_arguments(parser, argv)
    parser.set_defaults(parser=parser, run=lambda arguments: _distill(arguments, None))


def _add_stages(commands: Any, argv: Sequence[str]) -> None:
    parser = commands.add_parser("score", help="stage 1 of distill: the score table")
    _method_arguments(parser, argv)
    parser.set_defaults(parser=parser, run=lambda arguments: _distill(arguments, "score"))
    for name, help in (
        ("select", "stage 2: rank the score table; another --ipc selects again"),
        ("compose", "stage 3: write the images"),
        ("relabel", "stage 4: soft labels and report"),
        ("synthesize", "of methods that make pixels, what makes them; of the others the old name of compose"),
    ):
        stage = commands.add_parser(name, help=help)
        stage.add_argument("folder", help="output folder of ddfast score")
        _data(stage, required=False, default=None)
        stage.add_argument("--teacher", default=None, help="teacher file, where it has moved")
        stage.add_argument("--label-teacher", default=None, help="label teacher file, where it has moved")
        if name == "select":
            stage.add_argument("--ipc", type=_whole, default=None, help="images per class; default as scored")
        _device(stage)
        stage.set_defaults(parser=stage, run=_stage)


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
    parser.add_argument("--ipc", type=_whole, required=True, help="images per class")
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument("--seed", type=_whole, default=0, help="pool, coalitions, noise and draws")
    parser.add_argument("--images-per-class", type=_whole, default=300, help="sources scored of each class")
    parser.add_argument(
        "--factor", choices=("auto", "1", "2"), default="auto", help="tiles per side; auto: 1 up to 64 px"
    )
    parser.add_argument(
        "--image-size", type=_whole, default=None, help="side of the images in pixels; default the teacher's"
    )
    parser.add_argument(
        "--format", dest="image_format", choices=("png", "jpeg"), default="png", help="of the images"
    )
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
    named = _method_in(parser, argv)
    if named not in known:
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
                type=_TYPES.get(kind, kind),
                choices=field.metadata["choices"],
                default=argparse.SUPPRESS,
                help=f"{help} (default: {field.default})",
            )


def _method_flags(method: str) -> dict[str, bool]:
    """The flags of a method's own options, and whether each takes a value."""
    from ddfast.methods import get_method

    flags: dict[str, bool] = {}
    for field in dataclasses.fields(get_method(method).Options):
        name = field.name.replace("_", "-")
        flags["--" + name] = not isinstance(field.default, bool)
        if isinstance(field.default, bool):
            flags["--no-" + name] = False
    return flags


def _method_in(parser: argparse.ArgumentParser, argv: Sequence[str]) -> str | None:
    """The word of the command line that names the method: the first behind the command."""
    return next(iter(_words(parser, argv)[0][1:]), None)


def _distill(arguments: argparse.Namespace, until: str | None) -> None:
    from ddfast.distillation import distill
    from ddfast.methods import get_method

    method = get_method(arguments.method)
    from ddfast.models.teacher import is_named

    def data_and_size() -> tuple[Sequence[str], int | None]:
        return _class_names(arguments.data), arguments.image_size

    teacher = _teacher_choice(arguments, arguments.teacher, data_and_size, arguments.class_order)
    label_order = arguments.label_class_order
    if label_order is None and arguments.label_teacher is not None and not is_named(arguments.label_teacher):
        label_order = arguments.class_order
    label_teacher = _teacher_choice(
        arguments, arguments.label_teacher, data_and_size, label_order, "label_teacher"
    )
    if arguments.label_class_order is not None and label_teacher is None:
        raise UsageError(
            f"{argument('label_class_order')} describes a label teacher: give {argument('label_teacher')} as well"
        )
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
        image_format=arguments.image_format,
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
    if until is not None:
        _say_what_is_left(out, until, arguments.quiet)
    _print_once(out)


def _say_what_is_left(out: Path, stage: str, quiet: bool) -> None:
    """Name the commands that an unfinished set still needs behind `stage`."""
    from ddfast.methods import get_method
    from ddfast.pipeline.plan import read_plan
    from ddfast.progress import say
    from ddfast.ranks import is_main

    plan = read_plan(out)
    if plan is not None and not plan["complete"] and is_main():
        stages = get_method(plan["method"]).stages
        left = [f"ddfast {later} {out}" for later in stages[stages.index(stage) + 1 :]]
        say(f"the set is unfinished: next run {' and then '.join(left)}", quiet=quiet)


def _print_once(text: object) -> None:
    """Print from one of the processes that torchrun started, or from the only one."""
    from ddfast.ranks import is_main

    if is_main():
        print(text)


def _stage(arguments: argparse.Namespace) -> None:
    from ddfast.distillation import finish
    from ddfast.pipeline.opening import reopen
    from ddfast.pipeline.select import change_ipc
    from ddfast.pipeline.stages import stage_named

    if arguments.command == "select" and arguments.ipc is not None:
        whole_number(arguments.ipc, "ipc", least=1)
    run = reopen(
        arguments.folder,
        data=arguments.data,
        teacher=arguments.teacher,
        label_teacher=arguments.label_teacher,
        device=arguments.device,
        workers=arguments.workers,
        quiet=arguments.quiet,
    )
    try:
        if arguments.command == "select" and arguments.ipc is not None:
            change_ipc(run, arguments.ipc)
        stages = run.method.stages
        stage = _stage_of(arguments.command, run.method.name, stages)
        stage_named(stage)(run)
        if stage == stages[-1]:
            finish(run)
    finally:
        run.ranks.leave()
    _say_what_is_left(run.out, stage, arguments.quiet)
    _print_once(run.out)


def _stage_of(command: str, method: str, stages: Sequence[str]) -> str:
    """The stage of a method that a command asks for: its own name, or what it was called before."""
    if command == "synthesize" and command not in stages:
        command = "compose"
    if command not in stages:
        raise UsageError(f"a run of {method} has no stage {command}; it has {', '.join(stages)}")
    return command


# evaluate
# -------------------------------------------------------------------------------------------------------


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="train students on a distilled set and test them")
    parser.add_argument("--distilled", required=True, help="output folder of ddfast distill")
    _data(parser)
    parser.add_argument("--arch", required=True, help="the students' architecture")
    parser.add_argument(
        "--width", type=_whole, default=None, help="channels of a ConvNet student's layers; default 128"
    )
    parser.add_argument("--seeds", type=_whole, default=3, help="number of students")
    _teacher(
        parser, required=False, help="label online with this teacher; without it the stored soft labels serve"
    )
    parser.add_argument(
        "--epochs", type=_whole, default=None, help="passes over the distilled set; default the protocol's"
    )
    parser.add_argument(
        "--protocol",
        default="rded",
        help="rded, rded_plain, sre2l, sre2l_tiny, or with hard labels dc, dsa, idc, igds",
    )
    parser.add_argument(
        "--batch-size", type=_whole, default=None, help="images a step; default the protocol's"
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
    parser.add_argument("--json", default=None, help="also write the whole result to this file, a new one")
    parser.add_argument(
        "--no-preflight", action="store_true", help="skip the try of the teacher on test images"
    )
    _device(parser)
    parser.set_defaults(parser=parser, run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    import json

    from ddfast.files import atomic_write_text
    from ddfast.output import DistilledSet
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
        teacher=_teacher_choice(arguments, arguments.teacher, classes_and_size, arguments.class_order),
        preflight=not arguments.no_preflight,
        epochs=arguments.epochs,
        protocol=arguments.protocol,
        batch_size=arguments.batch_size,
        autoaugment=arguments.autoaugment,
        precision=arguments.precision,
        device=arguments.device,
        workers=arguments.workers,
        quiet=arguments.quiet,
    )
    print(
        f"labels {result.labels}, {plural(result.epochs, 'epoch')} of batch {result.batch_size}, "
        f"{plural(len(result.seeds), 'seed')}"
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
    parser.add_argument("--grid", type=_whole, default=4, help="cells per side")
    parser.add_argument("--n-samples", type=_whole, default=32, help="model evaluations an image")
    parser.add_argument(
        "--estimator", default="permutation", help="Shapley estimator; an unknown one lists all"
    )
    parser.add_argument("--value", default="logit", help="logit, prob or logprob")
    parser.add_argument("--limit", type=_whole, default=64, help="images at most")
    parser.add_argument("--seed", type=_whole, default=0, help="of the coalitions")
    parser.add_argument(
        "--image-size", type=_whole, default=None, help="side of the images of a .pt state dict in pixels"
    )
    _device(parser)
    parser.set_defaults(parser=parser, run=_attribute)


def _attribute(arguments: argparse.Namespace) -> None:
    from ddfast.models import load_teacher
    from ddfast.report.attribute import attribute_images

    spec = arguments.teacher
    _check_teacher(arguments, spec, arguments.class_order)

    def load() -> Any:
        said: dict[str, Any] = {"class_order": arguments.class_order}
        bare = _is_bare(arguments, spec)
        if bare or arguments.image_size is not None:
            said["image_size"] = arguments.image_size
        if bare and arguments.class_order is None:
            try:
                said["class_names"] = _class_names(arguments.data)
            except UsageError as error:
                raise UsageError(
                    f"{spec} does not name its classes, and neither does {argument('data')} ({error}): say them with "
                    f"{argument('class_order')}"
                ) from error
        return load_teacher(spec, arch=arguments.teacher_arch, normalization=arguments.normalization, **said)

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


def _add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="write report.html and mosaic.png of a distilled set again")
    parser.add_argument("folder", help="output folder of ddfast distill")
    _data(parser, required=False, default=None)
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
        "--images-per-shard", type=_whole, default=10_000, help="images in each shard but the last"
    )
    parser.set_defaults(parser=parser, run=_export)


def _export(arguments: argparse.Namespace) -> None:
    from ddfast.output.webdataset import export_webdataset

    paths = export_webdataset(arguments.folder, arguments.out, images_per_shard=arguments.images_per_shard)
    print(paths[0] if len(paths) == 1 else f"{paths[0]} .. {paths[-1].name}")


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo", help="render a set, train a teacher, distil, compare with a random subset"
    )
    parser.add_argument("--out", default="./demo-out", help="output folder")
    parser.add_argument("--seed", type=_whole, default=0, help="of everything")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the comparison")
    parser.set_defaults(parser=parser, run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    from ddfast.demo.demo import run_demo

    run_demo(Path(arguments.out), seed=arguments.seed, quiet=arguments.quiet)


# env
# -----------------------------------------------------------------------------------------------------


def _add_env(commands: Any) -> None:
    parser = commands.add_parser("env", help="versions, and which path every op takes here, and why")
    parser.set_defaults(parser=parser, run=_env)


def _env(arguments: argparse.Namespace) -> None:
    from ddfast.report.environment import describe_environment

    print(describe_environment())
