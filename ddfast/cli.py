"""The command line: `ddfast COMMAND`. Exit codes: 0 done, 2 bad usage or bad input (one line), 1 anything else."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ddfast.commands import compare, diffusion, distill, show, train, utilization
from ddfast.commands.config import with_config, write_config, writes_config
from ddfast.commands.examples import epilog, examples
from ddfast.commands.parser import Parser, check_flags, commands_of, one_line
from ddfast.errors import DDFastError
from ddfast.version import __version__
from ddfast.wording import flags_of_command

_ERRORS_OF_FILES = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC),
    *(errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.EIO, errno.EMFILE),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path need not be valid Unicode
    try:
        given = with_config(build_parser([]), given, build_parser) if _mentions_config(given) else given
        parser = build_parser(given)
        check_flags(parser, given, lambda: build_parser([]))
        if writes_config(given) and not {"-h", "--help"} & set(given):
            write_config(parser, given)
            return 0
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


def _mentions_config(given: Sequence[str]) -> bool:
    return any(word.split("=")[0] == "--config" for word in given)


def _is_lack_of_memory(error: BaseException) -> bool:
    """Whether Python, a GPU (a RuntimeError of its own type) or torch's allocator of the CPU had no more memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _say(message: str) -> None:
    print(f"ddfast: {one_line(message)}", file=sys.stderr)


def _after_interruption(arguments: argparse.Namespace) -> str:
    """What has become of the work, and how to go on."""
    command = arguments.command
    if command in ("distill", "score"):
        if (Path(arguments.out) / "manifest.json").is_file():
            return "the same command with --resume continues"
        return "nothing has been written yet"
    if command in ("train-proxies", "train-experts", "train-prior", "train-estimator"):
        return "the same command with --resume continues"
    if command == "train-teacher":
        if Path(arguments.out).with_suffix(".state").is_file():
            return "the same command with --resume continues after the last whole epoch"
        return "no epoch was finished, so the training starts from its beginning again"
    if command in ("prepare", "select", "compose", "relabel", "synthesize", "demo"):
        return "the same command continues"
    if command == "evaluate":
        return "nothing has been written, and the students would be trained anew"
    if command == "compare":
        return "the sets that were made stay, and the students would be trained anew"
    if command == "export" and arguments.to == "webdataset":
        return "the shards that are there are whole: delete them before it is run again"
    return "nothing has been written" if command in ("attribute", "export", "utilization") else "run it again"


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands. The options of a method are added where `argv` names the method."""
    parser = Parser(
        prog="ddfast", description="Distil an image data set into a tiny one that trains models as well."
    )
    parser.add_argument("--version", action="version", version=f"ddfast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    show.add_demo(commands)
    train.add_train_teacher(commands)
    distill.add_distill(commands, argv)
    distill.add_stages(commands, argv)
    train.add_train_proxies(commands)
    train.add_train_experts(commands)
    diffusion.add_train_prior(commands)
    diffusion.add_train_estimator(commands)
    train.add_evaluate(commands)
    compare.add_compare(commands)
    show.add_attribute(commands)
    show.add_report(commands)
    show.add_export(commands)
    utilization.add_utilization(commands)
    show.add_env(commands)
    for name, command in [("", parser), *commands_of(parser).items()]:
        command.epilog = command.epilog or epilog(examples(name))
    return parser
