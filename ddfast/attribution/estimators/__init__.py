"""Estimators of Shapley values: coalitions, plans and the designs that are kept."""
