"""Command-line arguments that all studies share."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from bench import facts


def study_parser(name: str, description: str | None, *, wrapped: bool = False) -> argparse.ArgumentParser:
    """The parser of a study with the arguments that all share; its description as it stands, or `wrapped`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.studies {name}",
        description=description,
        formatter_class=argparse.HelpFormatter if wrapped else argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--data",
        "--dataset",
        required=True,
        help="folder, .zip or .tar shards with train/ and test/ or val/, or a torchvision set",
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        action="append",
        default=[],
        help="teacher file, may be repeated; default: trained once for each architecture and kept in --work",
    )
    parser.add_argument("--teacher-arch", action="append", default=[], help="architectures to train instead")
    parser.add_argument("--teacher-epochs", type=int, default=200, help="of a teacher that is trained here")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/paper"), help="sets and students, shared by all"
    )
    parser.add_argument("--out", type=Path, default=None, help="results, without ending")
    parser.add_argument("--images-per-class", type=int, default=None, help="sources scored of each class")
    parser.add_argument("--factor", default="auto", help="tiles per side; auto: 1 up to 64 px, else 2")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32"))
    return parser


def without_folders(text: str) -> str:
    """Words of a command, files by their names alone: of `experts=/a/b` stays `experts=b`."""
    words = []
    for word in text.split(" "):
        key, equals, value = word.rpartition("=")
        is_file = "/" in value and (value.startswith(("/", ".", "~")) or Path(value).exists())  # 1/2 is none
        words.append(key + equals + (Path(value).name if is_file else value))
    return " ".join(words)


def told(name: str, argv: Sequence[str], module: str = "bench.studies") -> str:
    """The command that makes the same from nothing, and the commit that wrote the page.

    Folders of the machine, and what was kept from earlier, are left out of it.
    """
    words: list[str] = []
    given = iter(argv)
    for word in given:
        if word in ("--work", "--out"):  # where results are kept decides none of them
            next(given, None)
        elif not word.startswith(("--work=", "--out=", "--kept")):
            words.append(without_folders(word))
    commit, changed = facts.commit()
    where = f"commit {commit}{' and changes' if changed else ''}"
    return f"Made by `python -m {module} {name} {shlex.join(words)}`; written at {where}.\n"
