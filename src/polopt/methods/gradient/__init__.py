"""Gradient estimators and the geometry of the step."""
