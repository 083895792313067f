"""Import heavy libraries without the optional dependencies that this project never uses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hide_modules(*modules: str) -> Iterator[None]:
    """Within the block, make modules that are not loaded yet look as if they were not installed.

    DeepSpeed's autotuner imports MLflow, and assisted generation in transformers imports scikit-learn. Each
    costs a second of CPU time in every process, and a study starts dozens of processes.
    """
    hidden = [name for name in modules if name not in sys.modules]
    # None in sys.modules makes `import` raise ModuleNotFoundError and `find_spec` return None.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
