"""The demo: a rendered set, from command to report."""
