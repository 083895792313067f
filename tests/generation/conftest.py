"""Prompts for the tiny model, and a check for leaked engines."""

from __future__ import annotations

import contextlib
import time

import pytest

from tbpo_ray.generation.samples import PromptTokens


@pytest.fixture
def prompts() -> list[PromptTokens]:
    return [PromptTokens(f"p{i}", [1, 3, 300 + i, 4], f"prompt {i}", {"number": i}) for i in range(12)]


@pytest.fixture(scope="session")
def engines_left():
    """A function that waits for actors, engine processes and placement groups to end, and lists the rest."""
    return _engines_left


def _engines_left(seconds: float = 120) -> list[str]:
    import psutil
    import ray

    end = time.monotonic() + seconds
    while True:
        actors = [
            f"actor {actor['ActorClassName']}"
            for actor in ray._private.state.actors().values()
            if actor["State"] != "DEAD"
            and ("WatchedEngine" in actor["ActorClassName"] or "Telemetry" in actor["ActorClassName"])
        ]
        engines = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # it has just ended
                line = " ".join(process.cmdline())
                engines += [line] if "EngineCore" in line or "WatchedEngine" in line else []
        groups = [
            f"placement group {key}"
            for key, group in ray.util.placement_group_table().items()
            if group["state"] != "REMOVED"
        ]
        left = actors + engines + groups
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.5)
