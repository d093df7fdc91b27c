"""A run as a file: `--config` reads flags from one, `--write-config` and `--print-config` write the given ones."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddfast.arguments import output_file
from ddfast.commands.parser import commands_of, method_in, unknown_flag
from ddfast.errors import UsageError
from ddfast.settings import fields, flag_of, is_taken
from ddfast.wording import did_you_mean

_OWN = ("config", "write_config", "print_config", "help")  # never in a file
_SUFFIXES = (".yaml", ".yml", ".json", ".toml")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add --config, --write-config and --print-config."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=".yaml, .json or .toml file of flags without their dashes, `ipc: 10` for example, or the manifest.json of "
        "a run; flags of the command line win; default none",
    )
    parser.add_argument(
        "--write-config",
        metavar="FILE",
        help="write the flags that are given to this file, a new one, and run nothing; default none",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the flags that are given, and run nothing"
    )


# Reading
# ----------------------------------------------------------------------------------------------------------


def with_config(parser: argparse.ArgumentParser, given: Sequence[str], build: Any) -> list[str]:
    """The words of a command line with those of its `--config` ahead of its own flags, so that its own win.

    Args:
        parser: of all commands.
        given: the words of the command line.
        build: makes the parser of a command line, with the options of the method that it names.

    Raises:
        UsageError: the file cannot be read, or says what the command does not take.
    """
    found = _command_in(parser, given)
    if found is None:
        return list(given)
    place, taker = found
    paths = [path for path in _values_of("--config", given) if path is not None]
    if "--config" not in taker._option_string_actions or not paths:
        return list(given)
    command, method, words = given[place], method_in(taker, given), list[str]()
    has_method = any(action.dest == "method" for action in taker._actions)
    for path in paths:
        held = _read(Path(path))
        if _is_manifest(held):
            if not has_method:
                raise UsageError(
                    f"{path} is the manifest of a run, which ddfast distill and ddfast score take, not ddfast {command}"
                )
            held = _of_manifest(Path(path), held, given)
        named = held.pop("method", None) if has_method else None
        if method is None and named is not None:
            method = str(named)
            words.insert(0, method)
        known = commands_of(build([command, *([method] if method else [])]))[command]
        words += _words(known, held, path, method)
    return [*given[: place + 1], *words, *given[place + 1 :]]


def _command_in(
    parser: argparse.ArgumentParser, given: Sequence[str]
) -> tuple[int, argparse.ArgumentParser] | None:
    """Where the command stands in a command line, and its parser."""
    commands = commands_of(parser)
    place = next((place for place, word in enumerate(given) if not word.startswith("-")), None)
    return None if place is None or given[place] not in commands else (place, commands[given[place]])


def _values_of(flag: str, given: Sequence[str]) -> Iterable[str | None]:
    """The values that a command line gives a flag, None where it ends in it."""
    for place, word in enumerate(given):
        if word == flag:
            yield given[place + 1] if place + 1 < len(given) else None
        elif word.startswith(flag + "="):
            yield word[len(flag) + 1 :]


def _read(path: Path) -> dict[str, Any]:
    """The keys and values of a file of flags."""
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UsageError(f"--config must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}, got {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        held = _parsed(text, suffix, path)
    except OSError as error:
        raise UsageError(
            f"--config {path} cannot be read: {(error.strerror or str(error)).lower()}"
        ) from error
    except (ValueError, RecursionError) as error:
        kind = "YAML" if suffix == ".yml" else suffix[1:].upper()
        raise UsageError(f"--config {path} is no {kind}: {error}") from error
    if held is None:
        return {}
    if not isinstance(held, dict):
        raise UsageError(
            f"--config {path} must hold a flag and its value on each line, `ipc: 10`, got {type(held).__name__}"
        )
    return held


def _parsed(text: str, suffix: str, path: Path) -> Any:
    """What a file says. JSON and TOML need nothing but Python; JSON is YAML too."""
    if suffix == ".json":
        return json.loads(text, object_pairs_hook=_once)
    if suffix == ".toml":
        return _module(("tomllib", "tomli"), "tomli", ".toml on Python 3.10", path).loads(text)
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError:
        pass
    try:
        return _plain_yaml(text)
    except GivenTwice:
        raise
    except ValueError:
        yaml = _module(("yaml",), "pyyaml", "this .yaml", path)
    try:
        return yaml.load(text, Loader=_loader_of(yaml))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


class GivenTwice(ValueError):
    """A key stands in an object twice."""


def _loader_of(yaml: Any) -> Any:
    """PyYAML's safe loader, which takes the last of several values of a key, made to refuse them."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _once([(self.construct_object(key, deep=True), None) for key, _ in node.value])
            return super().construct_mapping(node, deep)

    return Loader


def _plain_yaml(text: str) -> dict[str, Any]:
    """Lines of a key and a JSON value, as `--write-config` writes them: YAML that needs no library."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    pairs = [line.partition(": ")[::2] for line in lines]
    if not all(key.replace("-", "").replace("_", "").isalnum() for key, _ in pairs):
        raise ValueError("not that plain")
    return _once([(key, json.loads(value)) for key, value in pairs])


def _module(names: Sequence[str], package: str, what: str, path: Path) -> Any:
    """The first of these modules that is there."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise UsageError(
        f"--config {path}: {what} is read by {package}, which is not installed: pip install {package}, or write it as "
        ".json"
    )


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are given once each."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise GivenTwice(f"{key!r} is given twice")
        found[key] = value
    return found


def _words(
    taker: argparse.ArgumentParser, held: Mapping[str, Any], path: str, method: str | None
) -> list[str]:
    """A file's keys and values as words of a command line."""
    words: list[str] = []
    seen: dict[str, str] = {}
    for key, value in held.items():
        flag = _flag_of(taker, str(key))
        if flag is None:
            names = [
                name[2:]
                for name, action in taker._option_string_actions.items()
                if name.startswith("--") and action.dest not in _OWN
            ]
            command = taker.prog.split()[-1]
            whose = f"ddfast {command}{f' {method}' if method else ''}"
            near = did_you_mean(key, names)
            flag_like = f"--{str(key).replace('_', '-')}"
            own = (
                f"{whose} has no such flag{near}" if near else unknown_flag(flag_like, taker, command, method)
            )
            raise UsageError(f"--config {path}: unknown key {str(key)!r}: {own}")
        action = taker._option_string_actions[flag]
        if action.dest in seen:
            raise UsageError(f"--config {path}: {seen[action.dest]!r} and {str(key)!r} are the same flag")
        seen[action.dest] = str(key)
        words += _as_words(taker, action, flag, value, f"--config {path}: {str(key)!r}", str(key))
    return words


def _flag_of(taker: argparse.ArgumentParser, key: str) -> str | None:
    """The flag that a key means: without its dashes, by its keyword in Python, or switched off by `false`."""
    name = key.replace("_", "-")
    for flag in (f"--{name}", f"--no-{name}"):
        action = taker._option_string_actions.get(flag)
        if action is not None and action.dest not in _OWN:
            return flag
    keyword = key.replace("-", "_")
    for action in taker._actions:
        if action.dest == keyword and action.dest not in _OWN and action.option_strings:
            return action.option_strings[0]
    return None


def _as_words(
    taker: argparse.ArgumentParser, action: argparse.Action, flag: str, value: Any, where: str, key: str
) -> list[str]:
    """One key and its value as words; none where the value says what holds anyway."""
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"{where} must be true or false, got {value!r}")
        named_off = flag.startswith("--no-") and not key.replace("_", "-").startswith("no-")
        on = value != named_off
        if on:
            return [flag]
        other = flag.replace("--no-", "--", 1) if flag.startswith("--no-") else f"--no-{flag[2:]}"
        return [other] if taker._option_string_actions.get(other) is action else []
    if isinstance(value, (list, tuple)) and all(isinstance(one, (str, int, float)) for one in value):
        value = ",".join(map(str, value))
    if isinstance(value, (bool, dict, list, tuple)):
        raise UsageError(f"{where} must be one value, got {json.dumps(value, default=str)}")
    return [f"{flag}={value}"]


# A manifest
# ----------------------------------------------------------------------------------------------------------


def _is_manifest(held: Mapping[str, Any]) -> bool:
    return {"format_version", "method", "options", "arithmetic"} <= held.keys()


def _of_manifest(path: Path, plan: dict[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """The flags that make a manifest's run again; paths are those of `run.json` beside it."""
    from ddfast.methods import get_method
    from ddfast.models.teacher import is_state_dict
    from ddfast.pipeline.plan import read_plan
    from ddfast.pipeline.run import RUN

    plan = (read_plan(path.parent) if path.name == "manifest.json" else None) or plan
    method = get_method(plan["method"])
    flags: dict[str, Any] = {"method": plan["method"], "device": plan["arithmetic"]["device"]}
    for field in fields():
        place = field.metadata["manifest"]
        if place is not None and is_taken(field, method.offers()):
            value: Any = plan
            for key in place.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            flags[flag_of(field)[2:]] = "all" if field.name == "label_top_k" and value is None else value
    for options in plan["options"].values():
        flags |= options
    try:
        facts = json.loads((path.parent / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        facts = {}
    for name in ("data", "teacher", "label_teacher", *method.place_names()):
        flags[name] = facts.get(name)
    bare = flags["teacher"] is not None and is_state_dict(flags["teacher"])
    if bare:
        flags["teacher-arch"] = plan["teacher"]["arch"]
    if bare or plan["teacher"] is None:
        flags["normalization"] = "/".join(",".join(map(repr, plan[name])) for name in ("mean", "std"))
    if plan.get("display_names") and (names := facts.get("class_names")) is not None:
        flags["class-names"] = names
    elif plan.get("display_names") and not list(_values_of("--class-names", given)):
        raise UsageError(f"the classes of {path} were shown by the names of --class-names: give it as well")
    for role, flag in (("teacher", "--class-order"), ("label_teacher", "--label-class-order")):
        said = plan[role] and plan[role].get("class_order")
        same = role == "label_teacher" and plan[role] == plan["teacher"]
        if said and not same and not list(_values_of(flag, given)):
            raise UsageError(f"the {role.replace('_', ' ')} of {path} was read with {flag}: give it as well")
    return flags


# Writing
# ----------------------------------------------------------------------------------------------------------


def writes_config(given: Sequence[str]) -> bool:
    """Whether a command line asks for its flags instead of a run."""
    return "--print-config" in given or any(True for _ in _values_of("--write-config", given))


def write_config(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Write or print the flags of a command line, those that are given and nothing else.

    Args:
        parser: of the command line, which is not of use afterwards.
        given: its words.

    Raises:
        UsageError: the file exists, or cannot be written.
    """
    from ddfast.files import atomic_write_text
    from ddfast.progress import say
    from ddfast.ranks import is_main

    found = _command_in(parser, given)
    assert found is not None
    place, taker = found
    flags = _given(taker, [*given[:place], *given[place + 1 :]])
    path = next((path for path in _values_of("--write-config", given) if path is not None), None)
    if not is_main():
        return
    if path is None:
        print(_as_text(flags, ".yaml"), end="")
        return
    target = output_file(path, "write_config")
    if target.suffix.lower() not in _SUFFIXES:
        raise UsageError(
            f"--write-config must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}, got {path}"
        )
    if target.exists():
        raise UsageError(f"--write-config {path} exists already: give another file or delete it")
    atomic_write_text(target, _as_text(flags, target.suffix.lower()))
    say(f"wrote {path}: ddfast {given[place]} --config {path} runs it", quiet="--quiet" in given)


def _given(taker: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """The arguments that are given, by their flags without dashes."""
    for action in taker._actions:
        action.default, action.required = argparse.SUPPRESS, False
        if not action.option_strings:
            action.nargs = "?"
    taker._defaults.clear()
    values = vars(taker.parse_args(list(words)))
    found: dict[str, Any] = {}
    for action in taker._actions:
        if action.dest not in values or action.dest in _OWN:
            continue
        flag = next((one for one in action.option_strings if one.startswith("--")), f"--{action.dest}")
        value = values[action.dest]
        found[flag[2:]] = list(value) if isinstance(value, tuple) else value
    return found


def _as_text(flags: Mapping[str, Any], suffix: str) -> str:
    """Flags as a file. Values are written as JSON's, which YAML and TOML read alike."""
    if suffix == ".json":
        return json.dumps(flags, indent=2, ensure_ascii=False) + "\n"
    between = " = " if suffix == ".toml" else ": "
    return "".join(
        f"{flag}{between}{json.dumps(value, ensure_ascii=False)}\n" for flag, value in flags.items()
    )
