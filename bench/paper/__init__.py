"""The studies of the InfoUtil paper as one-command recipes: `python -m bench.paper`."""
