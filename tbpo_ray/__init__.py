"""Token-level Bregman preference optimization on Ray clusters."""

__version__ = "0.1.0"
