"""Micro-batches on their device, collated while the one before is computed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

import torch

from tbpo_ray.data.reader import MicroBatch
from tbpo_ray.training.batch import PairBatch

DEPTH = 2
"""Collated micro-batches that wait for the device."""


class BatchPrefetcher(Iterator[tuple[MicroBatch, PairBatch]]):
    """Collates micro-batches of a stream and moves them to a device.

    For an accelerator a thread collates ahead, into pinned memory where the device is a GPU, so that the copy
    does not wait and the training thread only issues work. On the CPU, whose cores compute anyway, each
    micro-batch is collated when it is asked for. Both give the same batches in the same order.

    Args:
        stream: the micro-batches; read by the thread alone from now on.
        collate: builds a batch on the host.
        device: where the batches go.
    """

    def __init__(
        self, stream: Iterator[MicroBatch], collate: Callable[[MicroBatch], PairBatch], device: torch.device
    ):
        self.stream, self.collate, self.device = stream, collate, device
        self.seconds_waited = 0.0
        """How long the training thread has waited for the stream, or for the thread."""
        self._ready: queue.Queue[tuple[MicroBatch, PairBatch] | BaseException] | None = None
        self._closed = threading.Event()
        if device.type != "cpu":
            self._ready = queue.Queue(maxsize=DEPTH)
            threading.Thread(target=self._fill, args=(self._ready,), daemon=True).start()

    def __next__(self) -> tuple[MicroBatch, PairBatch]:
        began = time.perf_counter()
        if self._ready is None:
            micro = next(self.stream)
            self.seconds_waited += time.perf_counter() - began
            return micro, self.collate(micro)
        if self._closed.is_set():
            raise StopIteration
        item = self._ready.get()
        self.seconds_waited += time.perf_counter() - began
        if isinstance(item, BaseException):
            self.close()
            raise item
        micro, batch = item
        return micro, batch.to(self.device)

    def close(self) -> None:
        """Stop collating ahead."""
        self._closed.set()

    def _fill(self, ready: queue.Queue[tuple[MicroBatch, PairBatch] | BaseException]) -> None:
        try:
            while True:
                micro = next(self.stream)
                batch = self.collate(micro)
                if self.device.type == "cuda":
                    batch = batch.pin()
                if not self._put(ready, (micro, batch)):
                    return
        except BaseException as error:  # StopIteration too; raised again in the training thread
            self._put(ready, error)

    def _put(
        self,
        ready: queue.Queue[tuple[MicroBatch, PairBatch] | BaseException],
        item: tuple[MicroBatch, PairBatch] | BaseException,
    ) -> bool:
        while not self._closed.is_set():
            try:
                ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
