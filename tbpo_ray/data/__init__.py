"""Preference data: read, validate, render, tokenize, store, and stream to the workers in a fixed order."""
