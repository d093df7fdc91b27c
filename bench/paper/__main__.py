"""`python -m bench.paper NAME --data DATA [...]`: run one study of the paper. Without a name, list them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.paper import grid
from bench.paper.recipes import RECIPES
from ddfast.errors import DDFastError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study named first with the arguments behind it. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: python -m bench.paper NAME --data DATA [--teacher FILE] [...]\n")
        for name, recipe in RECIPES.items():
            print(f"  {name:<10} {recipe.title.partition(': ')[2]}")
        return 0
    if words[0] not in RECIPES:
        print(f"bench.paper: unknown study {words[0]!r}; known: {', '.join(RECIPES)}", file=sys.stderr)
        return 2
    try:
        return grid.main(words[0], words[1:])
    except DDFastError as error:
        print(f"bench.paper {words[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
