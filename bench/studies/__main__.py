"""`python -m bench.studies NAME --data DATA [...]`: run one study of the paper. Without a name, list them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from bench.studies import against_time, cmi, grid, igds, udd, unrolled
from bench.studies.infoutil import continual, entropy, gallery
from bench.studies.infoutil import stage_costs as stages
from bench.studies.infoutil.recipes import RECIPES
from bench.studies.league import league
from ddfast.errors import DDFastError, UsageError

Study = Callable[[Sequence[str]], int]


def every_table(argv: Sequence[str]) -> int:
    """Every table of accuracies with the same arguments; what several of them ask for is trained once."""
    if any(word.partition("=")[0] == "--out" for word in argv):
        raise UsageError("all writes every table under its own name: leave --out out")
    return max(grid.run_recipe(name, argv) for name in RECIPES)


STUDIES: dict[str, tuple[str, Study]] = {
    **{name: (recipe.title, functools.partial(grid.run_recipe, name)) for name, recipe in RECIPES.items()},
    "all": ("every table above, one after another", every_table),
    "table4": (continual.TITLE, continual.main),
    "figure3": (stages.TITLE, stages.main),
    "league": (league.TITLE, league.main),
    "cmi": (cmi.TITLE, cmi.main),
    "igds": (igds.TITLE, igds.main),
    "udd": (udd.TITLE, udd.main),
    "unrolled": (unrolled.TITLE, unrolled.main),
    "cost": (against_time.TITLE, against_time.main),
    "gallery": ("Figure 1: heatmaps and crops, InfoUtil beside RDED", gallery.main),
    "entropy": ("Section 5: soft-label entropy by teacher age", entropy.main),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study named first with the arguments behind it. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: python -m bench.studies NAME --data DATA [--teacher FILE] [...]\n")
        for name, (title, _) in STUDIES.items():
            print(f"  {name:<10} {title}")
        return 0
    if words[0] not in STUDIES:
        print(f"bench.studies: unknown study {words[0]!r}; known: {', '.join(STUDIES)}", file=sys.stderr)
        return 2
    try:
        return STUDIES[words[0]][1](words[1:])
    except DDFastError as error:
        print(f"bench.studies {words[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
