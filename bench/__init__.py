"""Benchmarks and comparisons. They run from a checkout and are not installed."""
