"""Import heavy libraries without the parts that nobody here uses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hide_modules(*modules: str) -> Iterator[None]:
    """Make modules that are not loaded yet look as if they were not installed.

    DeepSpeed's autotuner loads MLflow, and the assisted generation of transformers scikit-learn: a second of
    CPU time each in every process, of which a study starts dozens.
    """
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
