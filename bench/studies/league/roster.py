"""The methods of the league by their names in tables: their settings at an IPC, and what they cannot do without.

The studies that take any method, `league`, `dd_ranking` and `table4`, take them from here, so that the same words make
the same sets, which a shared `--work` holds once.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.studies.arms import Arm
from bench.studies.cmi import SUBJECTS
from ddfast.errors import UsageError
from ddfast.methods import get_method

WITH_CMI = " + CMI"


@dataclass(frozen=True)
class Member:
    """A method of the league.

    Attributes:
        name: as it stands in tables.
        method: as `ddfast.distill` calls it.
        needs: options of the study that it cannot do without, each a folder or a file.
        cmi: by IPC, as `at_ipc` reads it, the value of `cmi_option` with the regulariser; none: it has no such arm.
        cmi_option: the option that weighs the regulariser.
        cmi_views: images that stand in for one where CMI is measured: with a single one it is 0.
    """

    name: str
    method: str
    needs: tuple[str, ...] = ()
    cmi: Mapping[int, float] = field(default_factory=dict, hash=False)
    cmi_option: str = "cmi"
    cmi_views: int = 1


# Lambda is that of CMI's authors where they have one. UDD runs IDC's loop, and takes IDC's; MTT's is a share of the
# loss, and so is SRe2L's `cmi_ratio`: the middle of what their options say is sensible.
MEMBERS = (
    Member("random", "random"),
    Member("herding", "herding"),
    Member("k-center", "k_center"),
    Member("k-means", "k_means"),
    Member("forgetting", "forgetting"),
    Member("RDED", "rded"),
    Member("InfoUtil", "infoutil"),
    Member("DM", "dm", cmi=SUBJECTS["dm"].cmi),
    Member("DC", "dc", cmi=SUBJECTS["dc"].cmi),
    Member("DSA", "dsa", cmi=SUBJECTS["dsa"].cmi),
    Member("IDC", "idc", cmi=SUBJECTS["idc"].cmi, cmi_views=4),
    Member("IDM", "idm", cmi=SUBJECTS["idm"].cmi, cmi_views=4),
    Member("MTT", "mtt", ("experts",), {0: 0.2}),
    Member("SRe2L", "sre2l", cmi={0: 0.2}, cmi_option="cmi_ratio"),
    Member("UDD", "udd", cmi=SUBJECTS["idc"].cmi, cmi_views=9),
    Member("IGDS", "igds", ("prior", "estimator")),
)
_MADE_BY = {
    "experts": "ddfast train-experts",
    "prior": "ddfast train-prior",
    "estimator": "ddfast train-estimator",
    "proxies": "ddfast train-proxies",
}


@dataclass(frozen=True)
class Entry:
    """A row of the league: a member, with the regulariser or without."""

    member: Member
    with_cmi: bool = False

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return self.member.name + (WITH_CMI if self.with_cmi else "")

    @property
    def needs(self) -> tuple[str, ...]:
        """Options of the study that it cannot do without. SRe2L's teacher is a proxy by itself."""
        own = self.with_cmi and self.member.method != "sre2l"
        return (*self.member.needs, *(("proxies",) if own else ()))

    def lacks(self, ipc: int, arguments: argparse.Namespace) -> str | None:
        """Why it has no row at an IPC, in words; None where it has one."""
        if self.name in arguments.leave_out:
            return str(arguments.leave_out[self.name])
        missing = [name for name in self.needs if getattr(arguments, name) is None]
        if missing:
            makers = ", ".join(_MADE_BY[name] for name in missing)
            return f"no --{' and no --'.join(missing)} given ({makers})"
        if self.with_cmi and ipc * self._views(ipc, arguments) == 1:
            return "CMI is 0 where a class has a single image"
        return None

    def _views(self, ipc: int, arguments: argparse.Namespace) -> int:
        """Of an image where CMI is measured: fewer where a budget takes the tiles away."""
        factor = self.settings(ipc, arguments).get("factor", 0)
        return int(factor) ** 2 or self.member.cmi_views

    def settings(self, ipc: int, arguments: argparse.Namespace) -> dict[str, Any]:
        """Options of the method at an IPC, the budget among them."""
        names = {each.name for each in dataclasses.fields(get_method(self.member.method).Options)}
        found: dict[str, Any] = {name: str(getattr(arguments, name)) for name in self.needs}
        if "arch" in names:
            found["arch"] = arguments.matched
        if "chooser_steps" in names and arguments.proxies is not None:
            found["proxies"] = str(arguments.proxies)  # one of them chooses the regions, with CMI and without
        if self.member.method == "igds" and arguments.factor != "auto":
            found["factor"] = int(arguments.factor)
        if "unguided" in names:
            found["unguided"] = False  # samples beside, for the report alone
        if self.with_cmi:
            given = arguments.cmi.get(self.member.method, self.member.cmi)
            found[self.member.cmi_option] = float(given.get(ipc, given.get(0, 0.0)))
            if self.member.method == "sre2l" and arguments.proxies is not None:
                found["proxies"] = str(arguments.proxies)
        for key in ((self.member.method, 0), (self.name, 0), (self.member.method, ipc), (self.name, ipc)):
            found |= arguments.budget.get(key, {})
        return found

    def arm(self, ipc: int, arguments: argparse.Namespace, seed: int = 0) -> Arm:
        """The arm at an IPC."""
        return Arm(self.name, self.member.method, {**self.settings(ipc, arguments), "seed": seed})

    def spent(self, ipc: int, arguments: argparse.Namespace) -> str:
        """The settings in words, without folders."""
        places = get_method(self.member.method).place_names()
        told = [f"{key}={value}" for key, value in self.settings(ipc, arguments).items() if key not in places]
        return " ".join([self.member.method, *told])


ENTRIES = tuple(
    entry
    for member in MEMBERS
    for entry in (Entry(member), Entry(member, with_cmi=True))
    if not entry.with_cmi or member.cmi
)
NAMES = tuple(entry.name for entry in ENTRIES)
_METHODS = tuple(member.method for member in MEMBERS)


def entries(names: Sequence[str]) -> list[Entry]:
    """The rows of these names, in the order in which they are given.

    Raises:
        UsageError: an unknown name.
    """
    known = {name.lower(): entry for name, entry in zip(NAMES, ENTRIES, strict=True)}
    if unknown := [name for name in names if name.lower() not in known]:
        raise UsageError(f"unknown methods {', '.join(unknown)}; known: {', '.join(NAMES)}")
    return [known[name.lower()] for name in names]


# Options ----------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """Options of the studies that take methods of the league; `default` are the rows where none are named."""
    parser.add_argument(
        "--methods",
        type=lambda text: [word.strip() for word in text.split(",") if word.strip()],
        default=list(default),
        metavar="NAME,...",
        help=f"of {', '.join(NAMES)};\ndefault {'all' if len(default) == len(NAMES) else ', '.join(default) or 'none'}",
    )
    parser.add_argument("--matched", default="convnet3_in", help="architecture that pixels are matched on")
    for name, what in (
        ("proxies", "folder"),
        ("experts", "folder"),
        ("prior", "folder"),
        ("estimator", "file"),
    ):
        parser.add_argument(f"--{name}", type=Path, default=None, help=f"{what} of {_MADE_BY[name]}")
    parser.add_argument(
        "--budget",
        type=budget,
        action="append",
        default=[],
        metavar="METHOD:KEY=VALUE ...",
        help='options of a method, as "dsa:iterations=15 inner_loop=10"; of one row, "DSA + CMI:cmi_every=5";\n'
        'at one IPC, "dsa@50:iterations=3"; may be repeated, default the method\'s own',
    )
    parser.add_argument(
        "--cmi",
        type=weights,
        action="append",
        default=[],
        metavar="METHOD:WEIGHT",
        help='weight of the regulariser, by IPC: "dm:8000,50:2000"; default the authors\'; may be repeated',
    )
    parser.add_argument(
        "--leave-out",
        type=reason,
        action="append",
        default=[],
        metavar="NAME=REASON",
        help="a row that is not run, and why; may be repeated",
    )


def settle(arguments: argparse.Namespace) -> list[Entry]:
    """The rows that are asked for; what was given several times becomes one dictionary each.

    Raises:
        UsageError: an unknown method, in any option.
    """
    for each in entries(list(dict(arguments.leave_out))):
        arguments.methods += [] if each.name.lower() in map(str.lower, arguments.methods) else [each.name]
    found = entries(arguments.methods)
    reasons = dict(arguments.leave_out)
    arguments.leave_out = {entries([name])[0].name: why for name, why in reasons.items()}
    budgets: dict[tuple[str, int], dict[str, Any]] = {}
    for name, ipc, settings in arguments.budget:
        row = name if name in _METHODS else entries([name])[0].name
        budgets.setdefault((row, ipc), {}).update(settings)
    arguments.budget = budgets
    for name, _ in arguments.cmi:
        if not any(member.method == name and member.cmi for member in MEMBERS):
            raise UsageError(f"--cmi: {name} takes no regulariser here; known: {_with_regulariser()}")
    arguments.cmi = dict(arguments.cmi)
    return found


def _with_regulariser() -> str:
    return ", ".join(member.method for member in MEMBERS if member.cmi)


def budget(text: str) -> tuple[str, int, dict[str, Any]]:
    """`dsa@50:iterations=3 inner_loop=10` as (method or row, IPC or 0, settings)."""
    name, separator, rest = text.partition(":")
    plain, _, ipc = name.partition("@")
    if not separator or "=" not in rest or (ipc and not ipc.strip().isdigit()):
        raise argparse.ArgumentTypeError(
            f"wanted METHOD:KEY=VALUE ... or METHOD@IPC:KEY=VALUE ..., got {text!r}"
        )
    return plain.strip(), int(ipc or 0), Arm.parse(f"{plain.strip().split()[0]} {rest.strip()}").settings


def weights(text: str) -> tuple[str, dict[int, float]]:
    """`dm:8000,50:2000` as ("dm", {0: 8000.0, 50: 2000.0})."""
    name, _, rest = text.partition(":")
    pairs = [part.partition(":") if ":" in part else ("0", "", part) for part in rest.split(",")]
    try:
        return name.strip(), {int(ipc): float(weight) for ipc, _, weight in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"wanted METHOD:WEIGHT or METHOD:WEIGHT,IPC:WEIGHT, got {text!r}"
        ) from None


def reason(text: str) -> tuple[str, str]:
    """`MTT=its experts take 12 hours` as a pair."""
    name, separator, why = text.partition("=")
    if not separator or not why.strip():
        raise argparse.ArgumentTypeError(f"wanted NAME=REASON, got {text!r}")
    return name.strip(), why.strip()
