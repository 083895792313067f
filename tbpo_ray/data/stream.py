"""The training stream: the micro-batches of each rank in order, starting at any step, through Ray Data.

Ray Train calls :class:`StreamConfig` at every start of a worker group with the actual number of workers. It
gives each rank its own pipeline that starts at the newest checkpoint, so that resuming and resizing need
nothing else. Lightweight Ray Data tasks on the node of the rank read the data, and the rank prefetches a
bounded amount in the background. :func:`local_micro_batches` is the same stream without Ray.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pyarrow as pa
import ray.data
import ray.train
from ray.data import DataIterator, ExecutionOptions, ExecutionResources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tbpo_ray.data.ray_data import quiet_data_context
from tbpo_ray.data.reader import MicroBatch, PairReader
from tbpo_ray.data.schedule import Schedule
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.data.window import decode_windows, read_window

__all__ = ["MicroBatch", "MicroBatchIterator", "StreamConfig", "local_micro_batches", "stream_datasets"]

READ_CPUS = 0
"""Reading reserves no core: training workers may have reserved them all, and would then wait forever."""
WINDOW_BYTES, WINDOW_STEPS = 4 * 2**20, 256
"""Approximate maximum of token bytes per rank, and maximum number of steps, that one read covers."""


class StreamConfig(ray.train.DataConfig):
    """A data configuration for Ray Train with one exactly ordered pipeline per rank.

    Args:
        prepared: the pairs.
        schedule: their order.
        start_step: called at each start of a worker group; returns the step at which training resumes, for
            example from the newest checkpoint. Must be serializable.
        extra_dirs: folders whose columns are joined to the pairs (see :class:`PairReader`).
        read_tasks: maximum number of concurrent reading tasks per rank.
        buffer_bytes: maximum number of bytes per rank in the object store.
    """

    def __init__(
        self,
        prepared: PreparedPairs,
        schedule: Schedule,
        start_step: Callable[[], int] = int,
        extra_dirs: Sequence[str] = (),
        read_tasks: int = 1,
        buffer_bytes: int = 128 * 2**20,
    ):
        super().__init__(datasets_to_split=[])
        self._path, self._schedule_params = prepared.path, schedule.params
        self._window = window_steps(schedule)
        self._steps_total = schedule.steps_total
        self._start_step = start_step
        self._extra_dirs = list(extra_dirs)
        self._read_tasks, self._buffer_bytes = read_tasks, buffer_bytes

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, DataIterator]]:
        """The `{name: iterator}` of each rank; called by Ray Train."""
        start = self._start_step()
        nodes = worker_node_ids or [None] * world_size  # type: ignore[list-item]
        return [
            {name: self._rank_iterator(rank, world_size, start, nodes[rank]) for name in datasets}
            for rank in range(world_size)
        ]

    def _rank_iterator(self, rank: int, world: int, start: int, node: str | None) -> DataIterator:
        # The share of a rank in a window shrinks with the number of ranks, so windows can be longer.
        size = min(self._window * world, WINDOW_STEPS)
        windows = [
            {"first": first, "last": min(first + size, self._steps_total)}
            for first in range(start, self._steps_total, size)
        ] or [{"first": start, "last": start}]
        options: dict[str, Any] = {"num_cpus": READ_CPUS, "concurrency": self._read_tasks}
        if node is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
        with quiet_data_context() as context:
            context.target_max_block_size = 1  # one block per window
            context.execution_options = ExecutionOptions(
                preserve_order=True,
                resource_limits=ExecutionResources(object_store_memory=self._buffer_bytes),
            )
            source = ray.data.from_items(windows, override_num_blocks=min(len(windows), 256))
            read = source.map_batches(
                cast(Any, read_window),
                batch_size=1,
                batch_format="pyarrow",
                fn_kwargs={
                    "path": self._path,
                    "params": self._schedule_params,
                    "extra_dirs": self._extra_dirs,
                    "rank": rank,
                    "world": world,
                },
                **options,
            )
            return cast(DataIterator, read.iterator())


def stream_datasets(config: StreamConfig) -> dict[str, Any]:
    """The arguments of `TorchTrainer(datasets=..., dataset_config=...)` for a :class:`StreamConfig`."""
    # TorchTrainer requires a dataset for each name; the one row is never read.
    return {"datasets": {"train": ray.data.range(1)}, "dataset_config": config}


def window_steps(schedule: Schedule) -> int:
    """The number of steps that one read covers on a single rank."""
    bytes_per_step = 4 * schedule.tokens_per_pair * min(schedule.pairs_per_step, schedule.pairs)
    return max(1, min(WINDOW_STEPS, int(WINDOW_BYTES / bytes_per_step)))


def local_micro_batches(
    prepared: PreparedPairs,
    schedule: Schedule,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    extra_dirs: Sequence[str] = (),
) -> Iterator[MicroBatch]:
    """The same stream as :class:`StreamConfig` gives a rank, read in this process."""
    reader = PairReader(prepared, extra_dirs)
    size = min(window_steps(schedule) * world, WINDOW_STEPS)
    for first in range(start_step, schedule.steps_total, size):
        yield from reader.micro_batches(schedule, rank, world, first, min(first + size, schedule.steps_total))


class MicroBatchIterator(Iterator[MicroBatch]):
    """The micro-batches of a rank's :class:`DataIterator`, prefetched by a background thread.

    Args:
        data_iterator: the result of `ray.train.get_dataset_shard("train")` with a :class:`StreamConfig`.
        prefetch: maximum number of decoded windows to hold in memory.
    """

    def __init__(self, data_iterator: DataIterator, prefetch: int = 2):
        # The queue holds windows, not micro-batches: a thread switch can take milliseconds on a busy node.
        self._ready: queue.Queue[list[MicroBatch] | BaseException | None] = queue.Queue(maxsize=prefetch)
        self._window: Iterator[MicroBatch] = iter(())
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(data_iterator,), daemon=True)
        self._thread.start()

    def __next__(self) -> MicroBatch:
        while not self._closed.is_set():
            micro = next(self._window, None)
            if micro is not None:
                return micro
            item = self._ready.get()
            if isinstance(item, BaseException):
                self.close()
                raise item
            if item is None:
                self.close()
            else:
                self._window = iter(item)
        raise StopIteration

    def close(self) -> None:
        """Stop prefetching, which also ends the pipeline."""
        self._closed.set()

    def _fill(self, data_iterator: DataIterator) -> None:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            for table in data_iterator.iter_batches(
                batch_size=cast(int, None), batch_format="pyarrow", prefetch_batches=1
            ):
                for window in decode_windows(cast(pa.Table, table)):
                    if not self._put(window):
                        return
            self._put(None)
        except BaseException as error:  # re-raised in the thread that reads the stream
            self._put(error)

    def _put(self, item: list[MicroBatch] | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
