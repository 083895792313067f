"""Policies, references, tokenizers, adapters: load and export."""
