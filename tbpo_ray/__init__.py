"""Token-level Bregman preference optimization on Ray clusters.

The names below are the Python interface beside the jobs. Each is imported when it is first used, so that
reading a configuration loads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbpo_ray.config.loading import load_config, sft_config
    from tbpo_ray.config.schema import Config
    from tbpo_ray.evaluation.report import compare_runs
    from tbpo_ray.tuning.space import Space
    from tbpo_ray.workflows.evaluate import evaluate
    from tbpo_ray.workflows.pipeline import run_pipeline
    from tbpo_ray.workflows.train import train
    from tbpo_ray.workflows.tune import tune

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Space",
    "compare_runs",
    "evaluate",
    "load_config",
    "run_pipeline",
    "sft_config",
    "train",
    "tune",
]

_MODULES = {
    "Config": "config.schema",
    "Space": "tuning.space",
    "compare_runs": "evaluation.report",
    "evaluate": "workflows.evaluate",
    "load_config": "config.loading",
    "run_pipeline": "workflows.pipeline",
    "sft_config": "config.loading",
    "train": "workflows.train",
    "tune": "workflows.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
