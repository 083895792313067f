"""The exceptions that users can encounter. `tbpo_ray.cli.run_job` turns them into exit codes."""

from __future__ import annotations


class TbpoError(Exception):
    """Base class of the errors that this project raises deliberately."""


class InputError(TbpoError, ValueError):
    """Bad configuration or bad input: exit status 2, one line per fault, no traceback.

    Args:
        faults: one sentence per fault, each naming the field, the value and an accepted value.
    """

    def __init__(self, *faults: str):
        self.faults: tuple[str, ...] = faults
        super().__init__("\n".join(faults))


class RunFailedError(TbpoError, RuntimeError):
    """Work was started and could not be finished: exit status 1."""


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, at most `limit` characters; its class name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__
