"""How a command line is read: one-line errors that suggest the nearest name, also of a method's options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ddfast.commands.flags import option_flags
from ddfast.settings import fields, flag_of
from ddfast.wording import did_you_mean


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells of every flag whether it must be given, and what holds where it is not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.option_strings or action.help in (None, argparse.SUPPRESS):
            return action.help
        if action.required:
            return f"{action.help} (required)"
        if isinstance(action, argparse._StoreTrueAction):
            return f"{action.help} (default: off)"
        if action.nargs == 0 or "default" in str(action.help):  # one that acts at once, or says it in words
            return action.help
        if action.default in (None, (), argparse.SUPPRESS):
            return f"{action.help} (default: none)"
        return super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Lists and examples keep their lines, however narrow the terminal: they are to be copied."""
        if "\n" not in text:
            return super()._fill_text(text, width, indent)
        return "\n".join(indent + line for line in text.splitlines())


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the nearest name, and defaults in the help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and end with code 2."""
        self.exit(2, f"{self.prog}: {one_line(message)}\n")

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


def check_flags(
    parser: argparse.ArgumentParser, given: Sequence[str], plain: Callable[[], argparse.ArgumentParser]
) -> None:
    """Refuse a flag that the command does not take, ahead of argparse's complaint of all that is missing.

    Args:
        parser: of all commands, with the options of the method that is named.
        given: the words of the command line.
        plain: makes the parser of all commands without any method's options.
    """
    from ddfast.methods import list_methods

    commands = commands_of(parser)
    command = next((word for word in given if not word.startswith("-")), None)
    if command is not None and command not in commands:
        return  # an unknown command is argparse's to refuse
    taker = parser if command is None else commands[command]
    method = None
    if command in ("distill", "score"):
        method = method_in(taker, given)
        if method is not None and method not in (names := list_methods()):
            taker.error(
                f"unknown method {method!r}; known methods: {', '.join(names)}{did_you_mean(method, names)}"
            )
    for flag in _words(taker, given)[1]:
        if flag not in taker._option_string_actions and flag not in parser._option_string_actions:
            taker.error(unknown_flag(flag, taker, command, method, plain))


def unknown_flag(
    flag: str,
    taker: argparse.ArgumentParser,
    command: str | None,
    method: str | None,
    plain: Callable[[], argparse.ArgumentParser] | None = None,
) -> str:
    """What to say of a flag that a command does not take: whose it is, or which one was meant.

    Args:
        flag: with its dashes.
        taker: the command's parser.
        command: its name, None for `ddfast` alone.
        method: that was named, None where none was.
        plain: makes the parser of all commands without any method's options; None: other commands are not asked.
    """
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
    commands = {} if plain is None else commands_of(plain())
    others = [name for name, other in commands.items() if flag in other._option_string_actions]
    if command is not None and others and not near:
        return f"{flag} is an option of {_listed([f'ddfast {name}' for name in others])}, not of ddfast {command}"
    return f"unknown option {flag}{near or f'; {taker.prog} --help lists the options'}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by its name."""
    return next(
        dict(action.choices) for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )


def _words(parser: argparse.ArgumentParser, given: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line that are neither flags nor their values, and the flags."""
    from ddfast.methods import list_methods

    valued = {flag: action.nargs != 0 for flag, action in parser._option_string_actions.items()}
    valued |= {flag_of(field): not isinstance(field.default, bool) for field in fields()}
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


def _method_flags(method: str) -> dict[str, bool]:
    from ddfast.methods import get_method

    return option_flags(get_method(method).Options)


def method_in(parser: argparse.ArgumentParser, argv: Sequence[str]) -> str | None:
    """The word of the command line that names the method: the first behind the command."""
    return next(iter(_words(parser, argv)[0][1:]), None)


def one_line(message: str) -> str:
    """A message without line breaks."""
    return " ".join(message.split())
