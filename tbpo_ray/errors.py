"""The few exceptions a user can meet. Jobs turn them into exit codes (see jobs/__init__.py)."""

from __future__ import annotations


class TbpoError(Exception):
    """Base of every error this project raises on purpose."""


class InputError(TbpoError, ValueError):
    """Bad configuration or bad input: exit status 2, one line per fault, no traceback.

    Args:
        faults: one sentence per fault, each naming the field, the value and what would do.
    """

    def __init__(self, *faults: str):
        self.faults: tuple[str, ...] = faults
        super().__init__("\n".join(faults))


class RunFailedError(TbpoError, RuntimeError):
    """Work that was started could not be finished: exit status 1."""
