"""Trials that look for faults: random draws against a slow and plain reference."""
