"""`ddfast distill`, and the stages of a method one at a time."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddfast.arguments import whole_number
from ddfast.commands.config import add_config
from ddfast.commands.examples import epilog, examples
from ddfast.commands.flags import (
    add_device,
    add_options,
    add_settings,
    given_options,
    given_settings,
    whole,
)
from ddfast.commands.parser import method_in
from ddfast.commands.teachers import add_architecture, class_names_of, teacher_choice
from ddfast.errors import UsageError
from ddfast.wording import argument


def add_distill(commands: Any, argv: Sequence[str]) -> None:
    """Add `ddfast distill`."""
    parser = commands.add_parser("distill", help="distil a data set, all stages of a method in a row")
    _method_arguments(parser, argv)
    parser.set_defaults(parser=parser, run=lambda arguments: _distill(arguments, None))


def add_stages(commands: Any, argv: Sequence[str]) -> None:
    """Add the stages of a method as commands of their own."""
    parser = commands.add_parser("score", help="stage 1 of distill: the score table")
    _method_arguments(parser, argv)
    parser.set_defaults(parser=parser, run=lambda arguments: _distill(arguments, "score"))
    for name, help in (
        ("prepare", "what comes before the pixels, of methods that learn something first"),
        ("select", "stage 2: rank the score table; another --ipc selects again"),
        ("compose", "stage 3: write the images"),
        ("relabel", "stage 4: soft labels and report"),
        (
            "synthesize",
            "make the pixels, of methods that optimise them; of the others the old name of compose",
        ),
    ):
        stage = commands.add_parser(name, help=help)
        stage.add_argument("folder", metavar="FOLDER", help="output folder of ddfast score or ddfast distill")
        add_settings(
            stage,
            ("data", "teacher", "label_teacher"),
            data={"required": False, "help": "the data, where they have moved; default where they were"},
            teacher={"help": "teacher file, where it has moved; default where it was"},
            label_teacher={"help": "label teacher file, where it has moved; default where it was"},
        )
        if name == "select":
            stage.add_argument(
                "--ipc", type=whole, default=None, metavar="N", help="images per class; default as scored"
            )
        if name in ("prepare", "synthesize"):
            add_settings(stage, ("pool_memory",))
        add_device(stage)
        stage.set_defaults(parser=stage, run=_stage)


def _method_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """The flags of a run, and those of the method that the command line names."""
    from ddfast.methods import get_method, list_methods

    known = list_methods()
    command = parser.prog.split()[-1]
    methods = {name: get_method(name) for name in known}
    if command == "score":
        methods = {name: method for name, method in methods.items() if "score" in method.stages}
    parser.add_argument("method", metavar="METHOD", help=", ".join(methods))
    named = method_in(parser, argv)
    method = get_method(named) if named in known else None
    offers = None if method is None else method.offers()
    unasked = offers is not None and "teacher" not in offers
    add_config(parser)
    add_architecture(parser, **({"help": argparse.SUPPRESS} if unasked else {}))
    wanted = method is not None and method.requires_teacher()
    said: dict[str, Any] = {"preflight": {"help": argparse.SUPPRESS}} if unasked else {}
    if method is not None:
        said["preset"] = {"help": argparse.SUPPRESS}
        if method.presets:
            said["preset"] = {"help": f"named option values: {', '.join(method.presets)}; default none"}
    add_settings(parser, offers=offers, required={"teacher"} if wanted else (), **said)
    if method is None:
        lines = [f"  {name:<12}{known_method.summary}" for name, known_method in methods.items()]
        hint = f"ddfast {command} METHOD --help shows the options of a method as well."
        parser.description = "\n".join(["methods:", *lines, "", hint])
        parser.epilog = epilog(examples(command))
    else:
        parser.description = f"{named}: {method.summary}"
        parser.epilog = epilog(examples(command, named, needs_teacher=wanted))
        if dataclasses.fields(method.Options):
            add_options(parser.add_argument_group(f"options of {named}"), method.Options)


def _distill(arguments: argparse.Namespace, until: str | None) -> None:
    from ddfast.distillation import distill
    from ddfast.methods import get_method
    from ddfast.models.teacher import is_named

    method = get_method(arguments.method)
    if until is not None:
        until = _stage_of(until, arguments.method, method.stages)

    def data_and_size() -> tuple[Sequence[str], int | None]:
        return class_names_of(arguments.data), arguments.image_size

    settings = given_settings(arguments)
    settings["teacher"] = teacher_choice(
        arguments,
        arguments.teacher,
        data_and_size,
        arguments.class_order,
        describes_pixels=method.requires_teacher(),
    )
    label_order = arguments.label_class_order
    if label_order is None and arguments.label_teacher is not None and not is_named(arguments.label_teacher):
        label_order = arguments.class_order
    settings["label_teacher"] = teacher_choice(
        arguments, arguments.label_teacher, data_and_size, label_order, "label_teacher"
    )
    if arguments.label_class_order is not None and settings["label_teacher"] is None:
        raise UsageError(
            f"{argument('label_class_order')} describes a label teacher: give {argument('label_teacher')} as well"
        )
    del settings["class_order"], settings["label_class_order"]  # in what loads the teachers
    out = distill(arguments.method, **settings, **given_options(arguments, method.Options), until=until)
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
        pool_memory=getattr(arguments, "pool_memory", None),
        quiet=arguments.quiet,
    )
    try:
        stages = run.method.stages
        stage = _stage_of(arguments.command, run.method.name, stages)
        if stage == "select" and arguments.ipc is not None:
            change_ipc(run, arguments.ipc)
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
