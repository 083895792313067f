"""Contexts that keep `ray.data.llm` from flooding the log and from leaving an actor in the cluster."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

_NOISY = (
    "ray.data",
    "ray.llm",
    "ray.llm.ray.llm._internal.common.utils.download_utils",
    "ray._private.worker",
    "vllm",
)


@contextlib.contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Silence Ray Data's progress bars, plans and logs while the block runs."""
    import ray.data.llm  # noqa: F401  (sets log levels on import, so import it first)
    from ray.data import DataContext

    context = DataContext.get_current()
    previous = (context.enable_progress_bars, context.print_on_execution_start, context.verbose_stats_logs)
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    context.enable_progress_bars = context.print_on_execution_start = context.verbose_stats_logs = False
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # failures are raised as exceptions
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start, context.verbose_stats_logs = previous
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def remove_telemetry_actor() -> Iterator[None]:
    """Remove the detached actor that `ray.data.llm` leaves in the cluster, unless it was there before."""
    import ray

    name = {"name": "llm_batch_telemetry", "namespace": "llm_batch_telemetry"}

    def find() -> Any:
        try:
            return ray.get_actor(**name)
        except ValueError:
            return None

    before = find()
    try:
        yield
    finally:
        after = find()
        if before is None and after is not None:
            ray.kill(after)
