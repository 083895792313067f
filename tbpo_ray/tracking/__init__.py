"""Experiment tracking with MLflow; no other package imports it."""
