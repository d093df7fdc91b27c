"""A run from its opening to its report, a file for each stage."""
