"""Small messages between the ranks, from any thread and without a deadline of minutes.

A collective fails when a rank is late by more than the backend's timeout (ten minutes with NCCL), and
collectives belong to the training thread. Writing and reading checkpoints takes as long as storage takes, so
the ranks wait for each other here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from tbpo_ray.training.distributed import broadcast_object, rank, world_size

TIMEOUT = timedelta(hours=6)
"""How long to wait for a rank that is alive. The death of a rank ends the worker group at once."""


class RankStore:
    """Lets rank 0 decide on what all ranks say. Creating it is collective.

    Every rank calls `decide` equally often, from one thread at a time.
    """

    def __init__(self) -> None:
        self.rank, self.world = rank(), world_size()
        self._calls = 0
        self._store = _connect(self.rank) if self.world > 1 else None

    def decide(self, value: Any, decision: Callable[[Sequence[Any]], Any]) -> Any:
        """Gather a value of each rank on rank 0, and return its decision on all ranks.

        Args:
            value: what JSON can represent.
            decision: called on rank 0 with the values in the order of the ranks; returns what JSON can
                represent.

        Raises:
            RuntimeError: a rank cannot be reached, or does not answer within `TIMEOUT`; on all ranks but
                rank 0, `decision` has failed.
        """
        if self._store is None:
            return decision([value])
        call, self._calls = self._calls, self._calls + 1
        if self.rank:
            self._store.set(f"{call}/{self.rank}", json.dumps(value))
            answer = self._read(f"{call}/decision")
            if "failure" in answer:
                raise RuntimeError(answer["failure"])
            return answer["result"]
        others = [self._read(f"{call}/{other}") for other in range(1, self.world)]
        try:
            result = decision([value, *others])
        except BaseException as error:  # the other ranks wait
            self._store.set(f"{call}/decision", json.dumps({"failure": f"rank 0: {error!r}"}))
            raise
        self._store.set(f"{call}/decision", json.dumps({"result": result}))
        # All ranks have read the decision before, or they would not have called again.
        for key in (f"{call - 1}/decision", *(f"{call}/{other}" for other in range(1, self.world))):
            self._store.delete_key(key)
        return result

    def meet(self) -> None:
        """Return when every rank has called it."""
        self.decide(None, lambda _: None)

    def _read(self, key: str) -> Any:
        assert self._store is not None
        return json.loads(self._store.get(key))


def _connect(own_rank: int) -> dist.TCPStore:
    """A store of the ranks' own: the process group's would block other users while a thread waits in it."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")

    def join(port: int, *, is_server: bool) -> dist.TCPStore:
        return dist.TCPStore(host, port, None, is_server, TIMEOUT, wait_for_workers=False)

    server = join(0, is_server=True) if own_rank == 0 else None
    port = cast("int", broadcast_object(server.port if server else None))
    return server or join(port, is_server=False)
