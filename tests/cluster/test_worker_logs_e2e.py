"""What a dead worker printed is kept and quoted."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import pytest

from tbpo_ray.cluster.worker_logs import keep_dead_workers_logs

pytestmark = pytest.mark.e2e


def test_the_log_of_an_actor_that_died_is_kept_and_its_last_error_quoted(ray_session, tmp_path):
    import ray

    class Engine:
        def fail(self, reason):
            print(f"ERROR 11-26 18:40:12 [core.py:800] ValueError: {reason}", file=sys.stderr, flush=True)
            os._exit(1)

    actor: Any = ray.remote(num_cpus=0)(Engine)  # Ray types the methods of a handle as plain methods
    earlier, killed, engine = actor.remote(), actor.remote(), actor.remote()
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(earlier.fail.remote("an older error"))
    began = time.time()
    ray.kill(killed)
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(engine.fail.remote("no such head size"))
    sentence = keep_dead_workers_logs(tmp_path / "engine.log", since=began)
    assert sentence == (
        f"its last error: ValueError: no such head size; its log is in {tmp_path / 'engine.log'}"
    )
    kept = (tmp_path / "engine.log").read_text()
    assert kept.count("--- Engine, process ") == 1 and "no such head size" in kept
    assert keep_dead_workers_logs(tmp_path / "none.log", since=time.time()) == ""
    assert not (tmp_path / "none.log").exists()
