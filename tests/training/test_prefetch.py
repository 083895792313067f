"""Batches that are collated ahead are those that are collated when they are asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tbpo_ray.data.reader import MicroBatch
from tbpo_ray.training.batch import BatchLayout, PairBatch, collate_columns
from tbpo_ray.training.prefetch import DEPTH, BatchPrefetcher

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


def stream(count: int) -> Iterator[MicroBatch]:
    rng = np.random.default_rng(0)
    for index in range(count):
        prompt, chosen, rejected = (
            [rng.integers(0, 50, rng.integers(2, 9)) for _ in range(3)] for _ in range(3)
        )
        yield MicroBatch(0, index, count, 3 * count, np.arange(3), prompt, chosen, rejected)


def collate(micro: MicroBatch) -> PairBatch:
    return collate_columns(micro.columns(), BatchLayout(2, 0, True, False))


@pytest.mark.parametrize("device", [CPU, ELSEWHERE])
def test_every_micro_batch_once_in_order(device: torch.device) -> None:
    made: list[PairBatch] = []

    def keep(micro: MicroBatch) -> PairBatch:
        made.append(collate(micro))
        return made[-1]

    batches = list(BatchPrefetcher(stream(7), keep, device))
    assert [micro.index for micro, _ in batches] == list(range(7))
    for (_, batch), host, expected in zip(batches, made, stream(7), strict=True):
        assert torch.equal(host.input_ids, collate(expected).input_ids)
        assert batch.input_ids.device == device
        assert batch.real_tokens == int((host.segment >= 0).sum())


def test_collation_runs_ahead_of_an_accelerator_in_a_thread_of_its_own() -> None:
    threads: list[int] = []

    def noted(micro: MicroBatch) -> PairBatch:
        threads.append(threading.get_ident())
        return collate(micro)

    batches = BatchPrefetcher(stream(9), noted, ELSEWHERE)
    next(batches)
    end = time.monotonic() + 10
    while len(threads) < DEPTH + 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(threads) >= DEPTH + 1, "nothing was collated ahead"
    assert len(threads) <= DEPTH + 2, "more was collated than is allowed to wait"
    assert set(threads) != {threading.get_ident()}
    batches.close()


@pytest.mark.parametrize("device", [CPU, ELSEWHERE])
def test_an_error_reaches_the_training_thread_after_the_batches_before_it(device: torch.device) -> None:
    def broken() -> Iterator[MicroBatch]:
        yield from stream(2)
        raise OSError("the disk is gone")

    batches = BatchPrefetcher(broken(), collate, device)
    assert [next(batches)[0].index for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


@pytest.mark.parametrize("device", [CPU, ELSEWHERE])
def test_waiting_for_the_data_is_measured(device: torch.device) -> None:
    def slow() -> Iterator[MicroBatch]:
        for micro in stream(2):
            time.sleep(0.1)
            yield micro

    batches = BatchPrefetcher(slow(), collate, device)
    list(batches)
    assert 0.15 < batches.seconds_waited < 5
