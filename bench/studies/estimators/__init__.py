"""Estimators of Shapley values against each other."""
