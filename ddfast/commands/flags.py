"""Flags: those that derive from the settings of a run or from a method's options, and those that commands share."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ddfast.settings import fields, flag_of, is_on, is_taken


def add_settings(
    parser: argparse.ArgumentParser,
    names: Sequence[str] | None = None,
    *,
    offers: Collection[str] | None = None,
    required: Collection[str] = (),
    **said: Mapping[str, Any],
) -> None:
    """Add the flags of settings, with their defaults and help.

    Args:
        parser: of the command.
        names: which settings, in this order; None: all of a run.
        offers: what the method has (`Method.offers`); flags that it does not take are not shown.
        required: settings without which the command does nothing, beside those without a default.
        **said: of a setting, arguments of `add_argument` that are otherwise for this command.
    """
    held = {field.name: field for field in fields()}
    for name in held if names is None else names:
        field = held[name]
        arguments: dict[str, Any] = {"help": _help(field)}
        if offers is not None and not is_taken(field, offers):
            arguments["help"] = argparse.SUPPRESS
        if isinstance(field.default, bool):
            arguments |= {"action": "store_true", "dest": f"no_{name}" if is_on(field) else name}
        else:
            missing = field.default is dataclasses.MISSING
            arguments |= {
                "dest": name,
                "default": None if missing else field.default,
                "required": missing or name in required,
                **_of_value(field),
            }
        parser.add_argument(flag_of(field), **{**arguments, **said.get(name, {})})


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of a run as a command line gives them, by keyword."""
    return {
        field.name: not getattr(arguments, f"no_{field.name}")
        if is_on(field)
        else getattr(arguments, field.name)
        for field in fields()
    }


def add_options(parser: argparse._ArgumentGroup, options: type) -> None:
    """Add the flags of a method's options. One that is not given is not in the namespace."""
    for field in dataclasses.fields(options):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=f"{_help(field)} (default: {flag if field.default else '--no-' + flag[2:]})",
            )
            continue
        default = "" if field.default is None else f" (default: {field.default})"
        parser.add_argument(
            flag, **_of_value(field), default=argparse.SUPPRESS, help=f"{_help(field)}{default}"
        )


def given_options(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """The options of a method that a command line gives."""
    names = [field.name for field in dataclasses.fields(options)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def option_flags(options: type) -> dict[str, bool]:
    """The flags of a method's options, and whether each takes a value."""
    flags: dict[str, bool] = {}
    for field in dataclasses.fields(options):
        name = field.name.replace("_", "-")
        flags["--" + name] = not isinstance(field.default, bool)
        if isinstance(field.default, bool):
            flags["--no-" + name] = False
    return flags


def _of_value(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """How the value of a flag is read."""
    kind = field.metadata.get("type") or type(field.default)
    return {
        "type": _TYPES.get(kind),
        "choices": field.metadata.get("choices"),
        "metavar": field.metadata.get("metavar")
        or (None if field.metadata.get("choices") else _METAVARS.get(kind)),
    }


def _help(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata["help"]).replace("%", "%%")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device, --workers and --quiet."""
    add_settings(parser, ("device", "workers", "quiet"))


def add_data(parser: argparse.ArgumentParser, **said: Any) -> None:
    """Add --data, with other arguments of `add_argument` where they are given."""
    add_settings(parser, ("data",), data=said)


def whole(text: str) -> int:
    """A whole number, for argparse."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a whole number, got {text!r}") from None


def number(text: str) -> float:
    """A number, for argparse."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a number, got {text!r}") from None


_TYPES: dict[Any, Callable[[str], Any]] = {int: whole, float: number}
_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "NAME"}


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between, for argparse."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted whole numbers with commas between, got {text!r}") from None
