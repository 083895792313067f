"""Measurements behind the claims in the README; `jobs/benchmark.py` runs them."""
