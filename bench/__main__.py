"""`python -m bench NAME [...]` and `ddfast bench NAME [...]`: run one benchmark; without a name, list them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

BENCHES = {
    "compare": "students trained on the sets of several methods, side by side",
    "kill": "kill a distillation at random moments, resume, compare bytes",
}


def main(argv: Sequence[str]) -> int:
    """Run the benchmark named first with the arguments behind it."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: ddfast bench NAME [...]\n")
        for name, what in BENCHES.items():
            print(f"  {name:<10} {what}")
        return 0
    if argv[0] not in BENCHES:
        print(f"ddfast bench: unknown benchmark {argv[0]!r}; known: {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    return int(importlib.import_module(f"bench.{argv[0]}").main(argv[1:]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
