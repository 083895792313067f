"""Several ranks as threads of one process, which talk through a real store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tbpo_ray.training import rank_store
from tbpo_ray.training.rank_store import RankStore


def on_ranks(monkeypatch: pytest.MonkeyPatch, world: int, work: Callable[[RankStore], Any]) -> list[Any]:
    """What `work` returns, or the exception that it raises, for each of `world` ranks."""
    local, port, known = threading.local(), [0], threading.Event()

    def broadcast(value: Any) -> Any:
        if local.rank == 0:
            port[0] = value
            known.set()
        assert known.wait(30)
        return port[0]

    monkeypatch.setattr(rank_store, "rank", lambda: local.rank)
    monkeypatch.setattr(rank_store, "world_size", lambda: world)
    monkeypatch.setattr(rank_store, "broadcast_object", broadcast)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    def rank(index: int) -> Any:
        local.rank = index
        store = RankStore()
        try:
            return work(store)
        except Exception as error:  # a result like any other
            return error
        finally:
            arrived.wait(30)  # the server lives as long as a rank uses it

    arrived = threading.Barrier(world)
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank, range(world)))
