"""`python -m ddfast`, the form that torchrun starts."""

import sys

from ddfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
